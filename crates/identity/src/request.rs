//! What a node hands to an authority to get a certificate: its new public key, and the proof that it has the private one.

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::PrivateKeyDer;

use crate::IdentityError;

/// A key made just now, and the request to certify it. The key never leaves this machine.
#[derive(Debug)]
pub struct CertificateRequest {
    key: KeyPair,
    csr: Vec<u8>,
}

impl CertificateRequest {
    /// Makes an ECDSA P-256 key and the request for it (PKCS#10). It names nobody: the authority knows who asks.
    ///
    /// # Errors
    /// The crypto library fails.
    pub fn new() -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let csr = CertificateParams::new([])?.serialize_request(&key)?.der().to_vec();
        Ok(Self { key, csr })
    }

    /// The request, in DER.
    #[must_use]
    pub fn csr(&self) -> &[u8] {
        &self.csr
    }

    /// The key, once it is certified.
    #[must_use]
    pub fn into_key(self) -> PrivateKeyDer<'static> {
        self.key.into()
    }
}
