//! Certificates of clients: whom to believe, and which names one carries.
//!
//! What a name means is the caller's affair: this reads certificates that a handshake has judged already.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{RootCertStore, pki_types::CertificateDer};
use x509_parser::extensions::GeneralName;

use crate::{IdentityError, files, node::root_store};

const REMEDY: &str = "give the PEM file of the authority that signs the certificates of clients";

/// Whose certificates clients may show.
#[derive(Clone, Debug)]
pub struct ClientRoots(pub(crate) RootCertStore);

impl ClientRoots {
    /// Reads the file of the authorities.
    ///
    /// # Errors
    /// The file is missing, unreadable or holds no certificate.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        root_store(path, &files::read_certificates(path, REMEDY)?).map(Self)
    }
}

/// What a client's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientNames {
    /// Its URIs, and its DNS names in lower case.
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
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let names = names.filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            GeneralName::DNSName(host) => Some(host.to_ascii_lowercase()),
            _ => None,
        });
        let until = u64::try_from(x509.validity().not_after.timestamp()).unwrap_or_default();
        Ok(Self { names: names.collect(), until: UNIX_EPOCH + Duration::from_secs(until) })
    }
}

fn unreadable(error: impl ToString) -> IdentityError {
    IdentityError::Unreadable(error.to_string())
}
