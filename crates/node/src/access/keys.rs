//! The public keys of an issuer, from a JWK set (RFC 7517). Symmetric keys and unknown kinds are passed over.

use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk},
};
use serde_json::Value;

/// Keys of one set, at most; further ones are not looked at.
const KEYS_MAX: usize = 64;
const RSA: &[Algorithm] = &[
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];

/// Why a text is no JWK set that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// It is something else.
    #[error("it is no JWK set: it must be JSON such as {{\"keys\": […]}}")]
    NotASet,
    /// It has keys, and none for checking signatures.
    #[error("it holds no public key for RS, PS, ES or EdDSA signatures")]
    NoKeys,
}

/// Keys, each with what it may be used for. None is a set too: its issuer has withdrawn them all.
#[derive(Debug, Default)]
pub(super) struct KeySet {
    keys: Vec<Key>,
    passed_over: usize,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

/// Why there is no key for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoKey {
    /// No key is called so, or none is known at all.
    Unknown,
    /// The key is not for that algorithm.
    OtherAlgorithm,
    /// The token names none, and several would do.
    Unnamed,
}

impl KeySet {
    pub(super) fn parse(text: &[u8]) -> Result<Self, KeySetError> {
        let set: Value = serde_json::from_slice(text).map_err(|_| KeySetError::NotASet)?;
        let all = set["keys"].as_array().ok_or(KeySetError::NotASet)?;
        let keys: Vec<_> = all.iter().take(KEYS_MAX).filter_map(Key::read).collect();
        let passed_over = all.len() - keys.len();
        Ok(Self { keys, passed_over })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The set, unless it has keys and none of them can be used: then somebody took one set for another.
    pub(super) fn meant_for_us(self) -> Result<Self, KeySetError> {
        if self.is_empty() && self.passed_over > 0 { Err(KeySetError::NoKeys) } else { Ok(self) }
    }

    /// The key for a token that says it was signed by `id` with `algorithm`.
    pub(super) fn find(
        &self,
        id: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<&DecodingKey, NoKey> {
        let fits = |key: &&Key| key.algorithms.contains(&algorithm);
        let Some(id) = id else {
            let mut keys = self.keys.iter().filter(fits);
            let first = keys.next().ok_or(NoKey::Unknown)?;
            return if keys.next().is_some() { Err(NoKey::Unnamed) } else { Ok(&first.key) };
        };
        let mut called = self.keys.iter().filter(|key| key.id.as_deref() == Some(id)).peekable();
        if called.peek().is_none() {
            return Err(NoKey::Unknown);
        }
        called.find(fits).map(|key| &key.key).ok_or(NoKey::OtherAlgorithm)
    }
}

impl Key {
    /// `None`: not a public key for signatures that we know.
    fn read(value: &Value) -> Option<Self> {
        let is_for_signatures = value["use"].as_str().is_none_or(|purpose| purpose == "sig");
        let operations = value["key_ops"].as_array();
        if !is_for_signatures || operations.is_some_and(|all| !all.iter().any(|o| o == "verify")) {
            return None;
        }
        let jwk: Jwk = serde_json::from_value(value.clone()).ok()?;
        let algorithms = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => RSA,
            AlgorithmParameters::EllipticCurve(key) => match key.curve {
                EllipticCurve::P256 => &[Algorithm::ES256],
                EllipticCurve::P384 => &[Algorithm::ES384],
                _ => return None,
            },
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
                &[Algorithm::EdDSA]
            }
            _ => return None,
        };
        let only = value["alg"].as_str();
        let wanted = only.map(str::parse::<Algorithm>).transpose().ok()?;
        let algorithms: Vec<_> =
            algorithms.iter().copied().filter(|a| wanted.is_none_or(|w| w == *a)).collect();
        let key = DecodingKey::from_jwk(&jwk).ok()?;
        let id = value["kid"].as_str().map(str::to_owned);
        (!algorithms.is_empty()).then_some(Self { id, algorithms, key })
    }
}
