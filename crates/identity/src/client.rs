//! Certificates of clients: whom to believe, and which names one carries.
//!
//! What a name means is the caller's affair: this reads certificates that a handshake has judged already.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::RwLock;
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error as TlsError, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_parser::extensions::GeneralName;

use crate::{IdentityError, files, id::SCHEME, node::root_store, tls};

const REMEDY: &str = "give the PEM file of the authority that signs the certificates of clients";

/// Whose certificates clients may show. Clones are the same; they can be read anew while ports are open.
#[derive(Clone, Debug)]
pub struct ClientRoots(Arc<RwLock<Roots>>);

#[derive(Debug)]
struct Roots {
    certificates: Vec<CertificateDer<'static>>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Roots {
    fn load(path: &Path) -> Result<Self, IdentityError> {
        let certificates = files::read_certificates(path, REMEDY)?;
        let store = root_store(path, &certificates)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(store.into(), tls::provider())
            .allow_unauthenticated()
            .build()
            .map_err(|error| TlsError::General(error.to_string()))?;
        Ok(Self { certificates, verifier })
    }
}

impl ClientRoots {
    /// Reads the file of the authorities.
    ///
    /// # Errors
    /// The file is missing, unreadable or holds no certificate.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        Ok(Self(Arc::new(RwLock::new(Roots::load(path)?))))
    }

    /// Reads the file again; says whether it holds others.
    ///
    /// # Errors
    /// As [`Self::load`]; nothing has changed.
    pub fn reload(&self, path: &Path) -> Result<bool, IdentityError> {
        let found = Roots::load(path)?;
        let mut roots = self.0.write();
        let are_others = roots.certificates != found.certificates;
        if are_others {
            *roots = found;
        }
        Ok(are_others)
    }

    fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        self.0.read().verifier.clone()
    }
}

/// By the roots of the moment.
impl ClientCertVerifier for ClientRoots {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Roots come and go; a client that has several certificates is told by its operator which to show.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.verifier().verify_client_cert(leaf, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.verifier().verify_tls12_signature(message, leaf, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.verifier().verify_tls13_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier().supported_verify_schemes()
    }
}

/// What a client's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientNames {
    /// What it goes by: its URIs, and its DNS names in lower case. Where a URI is a SPIFFE id, whoever signed it vouches for
    /// that alone (a node's DNS name is whatever it chose to join as), and no DNS name counts.
    pub names: Vec<String>,
    /// The end of its life.
    pub until: SystemTime,
}

impl ClientNames {
    /// Reads a certificate. This does not judge: only a certificate that passed a handshake proves anything.
    ///
    /// # Errors
    /// The certificate cannot be parsed.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, x509) = x509_parser::parse_x509_certificate(certificate).map_err(unreadable)?;
        let names = x509.subject_alternative_name().map_err(unreadable)?;
        let (mut uris, mut hosts) = (Vec::new(), Vec::new());
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                // One that is written like a URI is none.
                GeneralName::DNSName(host) if !host.contains("://") => {
                    hosts.push(host.to_ascii_lowercase());
                }
                _ => {}
            }
        }
        let names =
            if uris.iter().any(|uri| is_spiffe(uri)) { uris } else { [uris, hosts].concat() };
        let until = u64::try_from(x509.validity().not_after.timestamp()).unwrap_or_default();
        Ok(Self { names, until: UNIX_EPOCH + Duration::from_secs(until) })
    }
}

/// Whether a URI is a SPIFFE id, of whatever shape its path is.
fn is_spiffe(uri: &str) -> bool {
    uri.get(..SCHEME.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME))
}

fn unreadable(error: impl ToString) -> IdentityError {
    IdentityError::Unreadable(error.to_string())
}
