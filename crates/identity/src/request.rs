//! What a node hands to an authority to get a certificate: its new public key, and the proof that it has the private one.

use std::fmt;

use rustls::pki_types::PrivateKeyDer;

use crate::{
    IdentityError,
    authority::{make_key, make_request},
};

/// A key made just now, and the request to certify it. The key never leaves this machine.
pub struct CertificateRequest {
    key: PrivateKeyDer<'static>,
    csr: Vec<u8>,
}

impl CertificateRequest {
    /// Makes an ECDSA P-256 key and the request for it (PKCS#10). It names nobody: the authority knows who asks.
    ///
    /// # Errors
    /// The crypto library fails.
    pub fn new() -> Result<Self, IdentityError> {
        let key = make_key()?;
        let csr = make_request(&key)?;
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
        self.key
    }
}

impl fmt::Debug for CertificateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateRequest").finish_non_exhaustive()
    }
}
