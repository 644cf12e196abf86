//! What a certificate says: whose it is, for how long, and who vouches for it.
//!
//! Chains are judged by `webpki` alone; the fields are read by `x509-parser`, from certificates that are our own or whose
//! chain has been judged already.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    RootCertStore,
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, UnixTime},
};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, time::ASN1Time};

use crate::{IdentityError, SpiffeId};

/// Tag of a URI among a certificate's names (RFC 5280 §4.2.1.6).
const URI_TAG: u32 = 6;

/// Who an authenticated peer is, from the certificates its handshake left (its own first).
///
/// This reads, it does not judge: only certificates that passed one of this crate's configurations prove anything.
///
/// # Errors
/// There is no certificate, it cannot be parsed, or it does not carry exactly one URI, the id of a mesh member.
pub fn peer_id(certificates: &[CertificateDer<'_>]) -> Result<SpiffeId, IdentityError> {
    let leaf = certificates.first().ok_or(IdentityError::NoPeerCertificate)?;
    names(leaf)?.only_uri()?.parse()
}

/// The subject alternative names of a certificate, as far as we use them.
#[derive(Debug, Default)]
pub(crate) struct Names {
    /// Unreadable ones too: they count.
    uris: Vec<Option<String>>,
    dns: BTreeSet<String>,
    ips: BTreeSet<IpAddr>,
}

impl Names {
    pub(crate) fn uri_count(&self) -> usize {
        self.uris.len()
    }

    pub(crate) fn only_uri(&self) -> Result<&str, IdentityError> {
        match self.uris.as_slice() {
            [Some(uri)] => Ok(uri),
            [None] => Err(IdentityError::Unreadable("its URI is not ASCII".into())),
            several => Err(IdentityError::UriNames { found: several.len() }),
        }
    }

    pub(crate) fn has_host(&self, name: &str) -> bool {
        self.dns.contains(name)
    }

    pub(crate) fn has_ip(&self, ip: &IpAddr) -> bool {
        self.ips.contains(ip)
    }

    /// Host names and addresses, as text.
    pub(crate) fn hosts(&self) -> Vec<String> {
        self.dns.iter().cloned().chain(self.ips.iter().map(ToString::to_string)).collect()
    }
}

pub(crate) fn names(certificate: &CertificateDer<'_>) -> Result<Names, IdentityError> {
    let x509 = parse(certificate)?;
    let mut names = Names::default();
    let Some(extension) = x509.subject_alternative_name().map_err(unreadable)? else {
        return Ok(names);
    };
    for name in &extension.value.general_names {
        match name {
            GeneralName::URI(uri) => names.uris.push(Some((*uri).into())),
            GeneralName::Invalid(tag, _) if tag.0 == URI_TAG => names.uris.push(None),
            GeneralName::DNSName(host) => {
                names.dns.insert((*host).into());
            }
            GeneralName::IPAddress(octets) => names.ips.extend(ip(octets)),
            _ => {}
        }
    }
    Ok(names)
}

fn ip(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}

/// The first and the last moment of a certificate's life.
pub(crate) fn validity(
    certificate: &CertificateDer<'_>,
) -> Result<(SystemTime, SystemTime), IdentityError> {
    let x509 = parse(certificate)?;
    let (from, until) = (x509.validity().not_before, x509.validity().not_after);
    Ok((UNIX_EPOCH + seconds(from), UNIX_EPOCH + seconds(until)))
}

/// Why a certificate may not sign others; `None`: it may.
pub(crate) fn lacks_to_sign(certificate: &CertificateDer<'_>) -> Option<&'static str> {
    let Ok(x509) = parse(certificate) else { return Some("it cannot be parsed") };
    if !x509.is_ca() {
        return Some("it is not the certificate of an authority (CA is not set)");
    }
    match x509.key_usage() {
        Ok(Some(usage)) if !usage.value.key_cert_sign() => {
            Some("its key usage does not include signing certificates")
        }
        Err(_) => Some("its key usage cannot be parsed"),
        _ => None,
    }
}

/// What an operator asks of a certificate: which one it is, and how long it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateSummary {
    /// The serial number, in lower-case hexadecimal digits.
    pub serial: String,
    /// The first moment of its life.
    pub from: SystemTime,
    /// The last.
    pub until: SystemTime,
}

impl CertificateSummary {
    /// Reads a certificate, and does not judge it.
    ///
    /// # Errors
    /// It cannot be parsed.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let x509 = parse(certificate)?;
        let (from, until) = (x509.validity().not_before, x509.validity().not_after);
        Ok(Self {
            serial: x509.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
            from: UNIX_EPOCH + seconds(from),
            until: UNIX_EPOCH + seconds(until),
        })
    }
}

/// How a moment relates to a certificate's life.
#[derive(Debug)]
pub(crate) enum Life {
    NotYet { from: String },
    Valid { until: SystemTime },
    Over { until: String },
}

pub(crate) fn life(
    certificate: &CertificateDer<'_>,
    now: SystemTime,
) -> Result<Life, IdentityError> {
    let x509 = parse(certificate)?;
    let (from, until) = (x509.validity().not_before, x509.validity().not_after);
    let now = since_epoch(now);
    Ok(if now < seconds(from) {
        Life::NotYet { from: from.to_string() }
    } else if now > seconds(until) {
        Life::Over { until: until.to_string() }
    } else {
        Life::Valid { until: UNIX_EPOCH + seconds(until) }
    })
}

/// Which end of a connection a certificate has to be good for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side {
    Client,
    Server,
}

/// Judges a chain: signatures up to one of `roots`, validity in time, CA flags, and the permitted usage.
pub(crate) fn verify_chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    algorithms: &WebPkiSupportedAlgorithms,
    side: Side,
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let usage = match side {
        Side::Client => KeyUsage::client_auth(),
        Side::Server => KeyUsage::server_auth(),
    };
    let leaf = EndEntityCert::try_from(leaf)?;
    let path =
        leaf.verify_for_usage(algorithms.all, &roots.roots, intermediates, now, usage, None, None);
    path.map(drop)
}

pub(crate) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(since_epoch(time))
}

pub(crate) fn parse<'a>(
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, IdentityError> {
    let (_, x509) = x509_parser::parse_x509_certificate(certificate).map_err(unreadable)?;
    Ok(x509)
}

fn unreadable(error: impl ToString) -> IdentityError {
    IdentityError::Unreadable(error.to_string())
}

/// Times before 1970 count as 1970: no certificate of ours is that old.
fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

pub(crate) fn seconds(time: ASN1Time) -> Duration {
    Duration::from_secs(time.timestamp().try_into().unwrap_or_default())
}

/// SHA-256 of a certificate, in lower-case hexadecimal digits.
#[must_use]
pub fn hex_fingerprint(certificate: &CertificateDer<'_>) -> String {
    crate::authority::fingerprint(certificate).iter().map(|byte| format!("{byte:02x}")).collect()
}
