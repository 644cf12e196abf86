//! What a request for a certificate proves: that its sender holds the key in it. Nothing else in it is believed
//! (PKCS#10, RFC 2986).

use rcgen::{CertificateParams, KeyPair, SubjectPublicKeyInfo};
use rustls::pki_types::PrivateKeyDer;
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{
        OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSASSAPSS,
        OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA, OID_SIG_ED25519,
    },
    prelude::FromDer as _,
    public_key::PublicKey,
    x509::SubjectPublicKeyInfo as Spki,
};

use crate::IdentityError;

/// Longest request.
const CSR_MAX_BYTES: usize = 8 * 1024;
/// Shortest and longest RSA key, in bits; longer ones only cost whoever checks their signatures.
const RSA_BITS: (usize, usize) = (2_048, 8_192);

/// Why a request for a certificate is refused. The fault is with whoever made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Longer than any honest one.
    #[error(
        "the certificate request has {0} bytes, and at most 8,192 are read: send the key and no more"
    )]
    TooLong(usize),
    /// Something else.
    #[error("the certificate request is not PKCS#10 in DER")]
    Unreadable,
    /// A key of a kind or size that is not certified.
    #[error(
        "the key in the certificate request is not ECDSA P-256, ECDSA P-384, Ed25519 or RSA of 2,048 to 8,192 bits"
    )]
    Key,
    /// Whoever sent it has not shown to hold the key.
    #[error("the certificate request is not signed with the key in it")]
    Signature,
}

/// The key in a request, if its sender holds it.
pub(crate) fn requested_key(csr: &[u8]) -> Result<SubjectPublicKeyInfo, CsrError> {
    if csr.len() > CSR_MAX_BYTES {
        return Err(CsrError::TooLong(csr.len()));
    }
    let (rest, request) =
        X509CertificationRequest::from_der(csr).map_err(|_| CsrError::Unreadable)?;
    if !rest.is_empty() {
        return Err(CsrError::Unreadable);
    }
    let key = &request.certification_request_info.subject_pki;
    if !is_strong(key) {
        return Err(CsrError::Key);
    }
    let signed_with = &request.signature_algorithm.algorithm;
    let sha1 = [OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA].contains(signed_with);
    if sha1 || request.verify_signature().is_err() {
        return Err(CsrError::Signature);
    }
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| CsrError::Key)
}

fn is_strong(key: &Spki<'_>) -> bool {
    let algorithm = &key.algorithm.algorithm;
    if *algorithm == OID_SIG_ED25519 {
        return key.subject_public_key.data.len() == 32;
    }
    if *algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
        return curve.is_some_and(|curve| [OID_EC_P256, OID_NIST_EC_P384].contains(&curve));
    }
    let rsa = *algorithm != OID_PKCS1_RSASSAPSS;
    match key.parsed() {
        Ok(PublicKey::RSA(key)) if rsa => (RSA_BITS.0..=RSA_BITS.1).contains(&key.key_size()),
        _ => false,
    }
}

/// A new private key (ECDSA P-256, PKCS#8), for [`make_request`].
///
/// # Errors
/// The machine has no randomness.
pub(crate) fn make_key() -> Result<PrivateKeyDer<'static>, IdentityError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    Ok(PrivateKeyDer::Pkcs8(key.serialize_der().into()))
}

/// A request to certify `key` (PKCS#10 in DER), signed with it. It names nobody: the authority knows who asks.
///
/// # Errors
/// The key is of a kind that cannot sign requests.
pub(crate) fn make_request(key: &PrivateKeyDer<'_>) -> Result<Vec<u8>, IdentityError> {
    let mut params = CertificateParams::new([])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    let request = params.serialize_request(&KeyPair::try_from(key)?)?;
    Ok(request.der().to_vec())
}
