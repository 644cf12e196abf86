//! Who calls, and what that tenant may call. Everything is refused but what the configuration allows.
//!
//! A caller is known by, in this order, its API key or token, the certificate of its connection, or, having shown nothing, by
//! what `access.anonymous` says. A credential that is shown and not good is refused whatever else would do.

mod api_keys;
mod certificates;
mod fetch;
mod guard;
mod issuer;
mod keys;
mod tenant;
mod tokens;

use std::{io, path::PathBuf, sync::Arc, time::SystemTime};

use base::Deadline;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use identity::{Identity, IdentityError};
use rustls::pki_types::CertificateDer;
use transport::grpc;

pub(crate) use self::guard::{Forbidden, guard};
pub use self::keys::KeySetError;
pub(crate) use self::tenant::{Tenant, Verdict};
use self::{
    api_keys::ApiKeys,
    certificates::{CertificateError, Certificates},
    fetch::Fetch,
    issuer::Issuer,
    tokens::{TokenError, Tokens},
};
use crate::{config::Config, refusal::Refusal};

/// Where an API key may stand, besides `authorization`.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Why what the configuration says of access cannot be used. The operator can mend it; nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The file of an issuer's keys cannot be read.
    #[error("access.jwt: {path} cannot be read ({source}): put the issuer's JWK set there")]
    Keys {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file of an issuer's keys holds none that can be used.
    #[error("access.jwt: {path}: {source}")]
    KeySet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KeySetError,
    },
    /// Certificates to be believed cannot be read.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Why a caller is nobody this node knows. Says nothing of what was shown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WhoError {
    #[error(
        "callers must say who they are: send an API key or a token as `authorization: Bearer …`, or a key as `x-api-key`, \
         or show a client certificate, whichever this mesh gave you"
    )]
    Nothing,
    #[error("`authorization` holds no `Bearer` and a key or token after it")]
    NotBearer,
    #[error(
        "the API key is no tenant's: check that it is whole and still valid; its SHA-256 must be in api_key_sha256 of a [[tenant]]"
    )]
    UnknownKey,
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error(transparent)]
    Token(#[from] TokenError),
}

impl From<WhoError> for Refusal {
    fn from(error: WhoError) -> Self {
        Self::Unauthenticated { why: error.to_string() }
    }
}

/// Who may call what, as one configuration says it. Immutable but for the keys of issuers.
#[derive(Debug)]
pub(crate) struct Access {
    anonymous: Option<Arc<Tenant>>,
    keys: ApiKeys,
    certificates: Certificates,
    tokens: Tokens,
    fetch: Fetch,
}

/// What a request shows.
enum Shown {
    Nothing,
    Key(HeaderValue),
    /// A key or a token.
    Bearer(HeaderValue),
}

impl Access {
    /// Reads the files that `config` names. `mesh` says which of its members are revoked.
    ///
    /// # Errors
    /// A file of keys is missing or holds none, or https needs roots and the machine has none.
    pub(crate) fn load(config: &Config, mesh: Option<Identity>) -> Result<Self, AccessError> {
        let tenants: Vec<_> = config
            .tenants
            .iter()
            .map(|tenant| (tenant, Arc::new(Tenant::new(tenant.name.clone(), &config.allow))))
            .collect();
        let issuers: Vec<_> =
            config.access.jwt.iter().map(Issuer::load).collect::<Result<_, _>>()?;
        let anonymous = config.access.anonymous.as_ref();
        let anonymous = tenants.iter().find(|(tenant, _)| Some(&tenant.name) == anonymous);
        Ok(Self {
            anonymous: anonymous.map(|(_, tenant)| tenant.clone()),
            keys: ApiKeys::new(&tenants),
            certificates: Certificates::new(&tenants, mesh),
            fetch: Fetch::new(issuers.iter().any(Issuer::is_over_https))?,
            tokens: Tokens::new(issuers, &config.access, &tenants),
        })
    }

    /// Whether callers who show nothing have a tenant.
    pub(crate) fn knows_anonymous(&self) -> bool {
        self.anonymous.is_some()
    }

    /// What keeps the keys of issuers fresh: one endless task for each.
    pub(crate) fn tasks(&self) -> impl Iterator<Item = impl Future<Output = ()> + Send + use<>> {
        let fetch = self.fetch.clone();
        self.tokens.issuers().map(move |issuer| issuer.clone().keep(fetch.clone()))
    }

    /// Who calls. What says so is taken out of the headers: it is for nobody behind this node.
    pub(crate) async fn who(
        &self,
        headers: &mut HeaderMap,
        certificates: &[CertificateDer<'static>],
        deadline: Option<Deadline>,
        now: SystemTime,
    ) -> Result<Arc<Tenant>, Refusal> {
        let (value, is_token) = match take(headers)? {
            Shown::Key(value) => (value, false),
            Shown::Bearer(value) => {
                let is_token = !self.tokens.is_empty() && tokens::looks_like_one(value.as_bytes());
                (value, is_token)
            }
            Shown::Nothing => return Ok(self.without_credential(certificates, now)?),
        };
        if !is_token {
            let tenant = self.keys.find(value.as_bytes());
            return Ok(tenant.cloned().ok_or(WhoError::UnknownKey)?);
        }
        let token = value.to_str().map_err(|_| WhoError::from(TokenError::Malformed))?;
        let first = self.tokens.verify(token, now);
        let Err(TokenError::UnknownKey(issuer)) = first else {
            return Ok(first.map_err(WhoError::from)?);
        };
        // Its keys may have changed: they are looked at again, and this call waits for it.
        grpc::until(deadline, self.tokens.refreshed(issuer))
            .await
            .map_err(|_| Refusal::Deadline)?;
        Ok(self.tokens.verify(token, now).map_err(WhoError::from)?)
    }

    fn without_credential(
        &self,
        certificates: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> Result<Arc<Tenant>, WhoError> {
        match certificates.first() {
            Some(certificate) => Ok(self.certificates.find(certificate, now)?),
            None => self.anonymous.clone().ok_or(WhoError::Nothing),
        }
    }
}

/// Takes the one credential out of the headers.
fn take(headers: &mut HeaderMap) -> Result<Shown, Refusal> {
    let count = |name: &HeaderName| headers.get_all(name).iter().count();
    if count(&header::AUTHORIZATION) + count(&API_KEY) > 1 {
        return Err(Refusal::TwoCredentials);
    }
    if let Some(key) = headers.remove(API_KEY) {
        return Ok(Shown::Key(key));
    }
    let Some(value) = headers.remove(header::AUTHORIZATION) else { return Ok(Shown::Nothing) };
    bearer(&value).map(Shown::Bearer).ok_or_else(|| WhoError::NotBearer.into())
}

/// What follows `Bearer` (RFC 6750 §2.1).
fn bearer(value: &HeaderValue) -> Option<HeaderValue> {
    let (scheme, rest) = value.as_bytes().split_at_checked(6)?;
    let rest = rest.strip_prefix(b" ")?.trim_ascii();
    let is_bearer = scheme.eq_ignore_ascii_case(b"bearer") && !rest.is_empty();
    if is_bearer { HeaderValue::from_bytes(rest).ok() } else { None }
}

#[cfg(test)]
mod tests;
