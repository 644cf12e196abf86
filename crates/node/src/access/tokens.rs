//! Whose is a token? A JWT (RFC 7519) signed by an issuer the configuration names, for this audience, in its time.
//!
//! Only asymmetric signatures are taken, and only those the key itself is for (RFC 8725 §3.1, §3.2). A token that was good is
//! remembered until it expires or the keys of its issuer change, so that most calls cost a hash.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, AlgorithmFamily, Validation, errors::ErrorKind};
use lru::LruCache;
use parking_lot::Mutex;
use serde_json::{Map, Value};

use super::{
    Tenant,
    api_keys::sha256,
    issuer::{Issuer, Keys},
    keys::NoKey,
};
use crate::config::{AccessConfig, TenantConfig};

/// Longest token.
const TOKEN_BYTES_MAX: usize = 8 << 10;
/// By how much clocks may differ.
const LEEWAY_S: u64 = 30;
/// Tokens that are remembered.
const REMEMBERED_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Why a token is nobody's. Says nothing of what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    #[error(
        "the token is longer than {TOKEN_BYTES_MAX} bytes: ask its issuer for one with fewer claims"
    )]
    TooLong,
    #[error("the token is no JWT that can be read: send it whole, as its issuer gave it")]
    Malformed,
    #[error(
        "the token is not signed in a way that is taken: have it signed with RS, PS, ES or EdDSA, as its key is for"
    )]
    Algorithm,
    #[error(
        "the token is of no issuer, or for no audience, that [[access.jwt]] names: check its `iss` and `aud`"
    )]
    Issuer,
    #[error(
        "the key that signed the token is not among those of its issuer: try again in ten seconds, or get a new token"
    )]
    UnknownKey(usize),
    #[error("the token names no key (`kid`), and its issuer has several")]
    UnnamedKey,
    #[error("the signature of the token is wrong: get a new one from its issuer")]
    Signature,
    #[error("the token does not say when it expires (`exp`)")]
    NoExpiry,
    #[error("the token has expired: get a new one from its issuer")]
    Expired,
    #[error("the token is not valid yet: check the clocks of its issuer and of this node")]
    NotYet,
    #[error(
        "the tenant claim of the token stands for no tenant: list its value, with the issuer where there are several, in `jwt` of a [[tenant]]"
    )]
    NoTenant,
}

type Claims = Map<String, Value>;

/// The issuers, and whom their tokens stand for.
#[derive(Debug)]
pub(super) struct Tokens {
    issuers: Box<[Arc<Issuer>]>,
    /// Whom the values of the claim stand for, by issuer: what one says is nothing to another's tenants.
    tenants: Box<[HashMap<String, Arc<Tenant>>]>,
    remembered: Mutex<LruCache<[u8; 32], Known>>,
}

/// A token that was good.
#[derive(Clone, Debug)]
struct Known {
    tenant: Arc<Tenant>,
    /// In seconds since 1970.
    expires_s: u64,
    issuer: usize,
    generation: u64,
}

/// Whether a credential is a token rather than an API key: three parts in base64url.
pub(super) fn looks_like_one(credential: &[u8]) -> bool {
    let is_part = |part: &[u8]| {
        !part.is_empty() && part.iter().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(b))
    };
    let mut parts = credential.split(|byte| *byte == b'.');
    parts.by_ref().take(3).filter(|part| is_part(part)).count() == 3 && parts.next().is_none()
}

impl Tokens {
    pub(super) fn new(
        issuers: Vec<Arc<Issuer>>,
        access: &AccessConfig,
        tenants: &[(&TenantConfig, Arc<Tenant>)],
    ) -> Self {
        let of = |issuer: &Arc<Issuer>| {
            let claims = tenants.iter().flat_map(|(config, tenant)| {
                config.claims(access).map(move |(issuer, value)| (issuer, value, tenant))
            });
            claims
                .filter(|(by, ..)| **by == issuer.config.issuer)
                .map(|(_, value, tenant)| (value.as_str().to_owned(), tenant.clone()))
                .collect()
        };
        let tenants: Vec<_> = issuers.iter().map(of).collect();
        Self {
            issuers: issuers.into(),
            tenants: tenants.into(),
            remembered: Mutex::new(LruCache::new(REMEMBERED_MAX)),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.issuers.is_empty()
    }

    pub(super) fn issuers(&self) -> impl Iterator<Item = &Arc<Issuer>> {
        self.issuers.iter()
    }

    /// Waits until the keys of an issuer were read again, if that may be now.
    pub(super) async fn refreshed(&self, issuer: usize) {
        if let Some(issuer) = self.issuers.get(issuer) {
            issuer.refreshed().await;
        }
    }

    /// Whose `token` is.
    pub(super) fn verify(&self, token: &str, now: SystemTime) -> Result<Arc<Tenant>, TokenError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::TooLong);
        }
        let now_s = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let digest = sha256(token.as_bytes());
        if let Some(known) = self.remembered.lock().get(&digest).cloned()
            && self.issuers[known.issuer].keys().generation == known.generation
        {
            in_time(known.expires_s, now_s)?;
            return Ok(known.tenant);
        }
        let known = self.judge(token, now_s)?;
        self.remembered.lock().put(digest, known.clone());
        Ok(known.tenant)
    }

    fn judge(&self, token: &str, now_s: u64) -> Result<Known, TokenError> {
        let header = jsonwebtoken::decode_header(token).map_err(|_| TokenError::Malformed)?;
        // RFC 7515 §4.1.11: who does not understand an extension refuses the token.
        if header.crit.is_some() {
            return Err(TokenError::Malformed);
        }
        if header.alg.family() == AlgorithmFamily::Hmac {
            return Err(TokenError::Algorithm);
        }
        let (issuer, keys) = self.issuer_of(token)?;
        let config = &self.issuers[issuer].config;
        let key = keys.set.find(header.kid.as_deref(), header.alg).map_err(|no| match no {
            NoKey::Unknown => TokenError::UnknownKey(issuer),
            NoKey::OtherAlgorithm => TokenError::Algorithm,
            NoKey::Unnamed => TokenError::UnnamedKey,
        })?;
        let validation = validation(header.alg, config.issuer.as_str(), config.audience.as_str());
        let claims = jsonwebtoken::decode::<Claims>(token, key, &validation)
            .map_err(|error| match error.kind() {
                ErrorKind::InvalidSignature => TokenError::Signature,
                _ => TokenError::Malformed,
            })?
            .claims;
        let expires_s = seconds(&claims, "exp")?.ok_or(TokenError::NoExpiry)?;
        in_time(expires_s, now_s)?;
        if seconds(&claims, "nbf")?.is_some_and(|from_s| from_s > now_s.saturating_add(LEEWAY_S)) {
            return Err(TokenError::NotYet);
        }
        let tenant = claims.get(config.tenant_claim.as_str()).and_then(Value::as_str);
        let tenant =
            tenant.and_then(|value| self.tenants[issuer].get(value)).ok_or(TokenError::NoTenant)?;
        let generation = keys.generation;
        Ok(Known { tenant: tenant.clone(), expires_s, issuer, generation })
    }

    /// Which issuer a token says it is of, before anything is believed of it.
    fn issuer_of(&self, token: &str) -> Result<(usize, Arc<Keys>), TokenError> {
        let claims: Claims = jsonwebtoken::dangerous::insecure_decode_claims(token)
            .map_err(|_| TokenError::Malformed)?;
        let is_for = |audience: &str| match claims.get("aud") {
            Some(Value::Array(several)) => several.iter().any(|one| one == audience),
            one => one.is_some_and(|one| one == audience),
        };
        let found = self.issuers.iter().position(|issuer| {
            let config = &issuer.config;
            claims.get("iss").is_some_and(|iss| iss == config.issuer.as_str())
                && is_for(config.audience.as_str())
        });
        let found = found.ok_or(TokenError::Issuer)?;
        Ok((found, self.issuers[found].keys()))
    }
}

/// Everything but time, which is not the library's to read.
fn validation(algorithm: Algorithm, issuer: &str, audience: &str) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.validate_exp = false;
    validation.set_required_spec_claims(&["iss", "aud"]);
    validation.set_issuer(&[issuer]);
    validation.set_audience(&[audience]);
    validation
}

/// A claim that is a moment, in seconds since 1970 (RFC 7519 §2, NumericDate).
fn seconds(claims: &Claims, name: &str) -> Result<Option<u64>, TokenError> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    if let Some(whole) = value.as_u64() {
        return Ok(Some(whole));
    }
    let number = value.as_f64().filter(|number| (0.0..1e15).contains(number));
    number.map(|number| Some(number as u64)).ok_or(TokenError::Malformed)
}

fn in_time(expires_s: u64, now_s: u64) -> Result<(), TokenError> {
    if expires_s.saturating_add(LEEWAY_S) > now_s { Ok(()) } else { Err(TokenError::Expired) }
}
