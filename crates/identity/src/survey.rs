//! Looking at certificates without living by them: what `isobar check` says of a file, and of who serves a port.
//!
//! A connection made with [`observing_config`] proves that the other end holds the key of the certificate it shows, and
//! nothing more; [`judge_peer`] says afterwards whether a node would have gone on. Nothing but the handshake may be done on it.

use std::{
    fmt,
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    version::TLS13,
};

use crate::{
    IdentityError, SpiffeId,
    certificate::{Side, names, parse, peer_id, seconds, unix_time, verify_chain},
    files,
    node::root_store,
    tls,
};

const REMEDY: &str = "check the path, or restore the file";

/// What a certificate says, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// The id of a member of the mesh, where it carries exactly one URI that is one.
    pub id: Option<SpiffeId>,
    /// The host names and addresses it holds for.
    pub hosts: Vec<String>,
    /// Whom it is for, as an X.509 name.
    pub subject: String,
    /// Its serial number, in hexadecimal.
    pub serial: String,
    /// The first moment of its life.
    pub from: SystemTime,
    /// The last one.
    pub until: SystemTime,
}

/// Reads what a certificate says. It is not judged.
///
/// # Errors
/// [`IdentityError::Unreadable`] when it cannot be parsed.
pub fn describe(certificate: &CertificateDer<'_>) -> Result<Described, IdentityError> {
    let x509 = parse(certificate)?;
    let names = names(certificate)?;
    let validity = x509.validity();
    Ok(Described {
        id: peer_id(std::slice::from_ref(certificate)).ok(),
        hosts: names.hosts(),
        subject: x509.subject().to_string(),
        serial: x509.raw_serial_as_string(),
        from: UNIX_EPOCH + seconds(validity.not_before),
        until: UNIX_EPOCH + seconds(validity.not_after),
    })
}

/// Every certificate of a PEM file, at least one.
///
/// # Errors
/// The file is missing, unreadable or holds none.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    files::read_certificates(path, REMEDY)
}

/// Why a node would not speak with a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerFault {
    /// Its certificate has expired.
    Expired,
    /// Its certificate is of the future.
    NotYetValid,
    /// No root vouches for it.
    Untrusted(String),
    /// Its certificate is that of somebody else, or of nobody.
    Other(String),
}

impl fmt::Display for PeerFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expired => f.write_str("its certificate has expired"),
            Self::NotYetValid => f.write_str("its certificate is not valid yet"),
            Self::Untrusted(why) => write!(f, "our roots do not vouch for its certificate ({why})"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

/// Whether a node that believes `roots` would take `chain` for that of the node `expected`.
///
/// # Errors
/// [`PeerFault`] says why not.
pub fn judge_peer(
    chain: &[CertificateDer<'static>],
    roots: &[CertificateDer<'static>],
    expected: &SpiffeId,
    now: SystemTime,
) -> Result<(), PeerFault> {
    let other = |error: IdentityError| PeerFault::Other(error.to_string());
    let (leaf, intermediates) =
        chain.split_first().ok_or_else(|| other(IdentityError::NoPeerCertificate))?;
    let roots = root_store(Path::new("the roots"), roots).map_err(other)?;
    let algorithms = tls::provider().signature_verification_algorithms;
    for side in [Side::Server, Side::Client] {
        verify_chain(leaf, intermediates, &roots, &algorithms, side, unix_time(now))
            .map_err(fault)?;
    }
    let found = peer_id(chain).map_err(other)?;
    if found == *expected {
        return Ok(());
    }
    Err(other(IdentityError::WrongPeer { expected: expected.clone(), found }))
}

fn fault(error: webpki::Error) -> PeerFault {
    match error {
        webpki::Error::CertExpired { .. } => PeerFault::Expired,
        webpki::Error::CertNotValidYet { .. } => PeerFault::NotYetValid,
        other => PeerFault::Untrusted(other.to_string()),
    }
}

/// For a look at who serves a port: any certificate will do, as long as the other end holds its key. `own` is what is shown
/// when a certificate is asked for.
///
/// # Errors
/// The TLS library refuses our key or certificate.
pub fn observing_config(
    own: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> Result<ClientConfig, IdentityError> {
    let builder = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Observer { provider: tls::provider() }));
    let mut config = match own {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// Believes that a certificate is the other end's, and nothing of what it says.
#[derive(Debug)]
struct Observer {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Observer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, leaf, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use base::clock;

    use super::*;
    use crate::DevCa;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn a_certificate_is_described_and_judged_as_a_peer_would() {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::wall();
        let ca = DevCa::open_or_create(dir.path(), &"mesh.test".parse().unwrap(), now).unwrap();
        let (region, name) = ("eu".parse().unwrap(), "a".parse().unwrap());
        let identity = ca.node(&region, &name, &[], now).unwrap();
        let (chain, _) = identity.server_cert();
        let said = describe(&chain[0]).unwrap();
        assert_eq!(said.id.as_ref(), Some(identity.id()));
        assert!(said.hosts.iter().any(|host| host == "localhost"));
        assert!(said.from < now && now + DAY * 364 < said.until);

        let roots = read_certificates(&ca.ca_path()).unwrap();
        let judge = |roots: &[_], id: &SpiffeId, when| judge_peer(&chain, roots, id, when);
        assert_eq!(judge(&roots, identity.id(), now), Ok(()));
        assert_eq!(judge(&roots, identity.id(), now + DAY * 400), Err(PeerFault::Expired));
        assert_eq!(judge(&roots, identity.id(), now - DAY), Err(PeerFault::NotYetValid));
        let other = "spiffe://mesh.test/node/eu/b".parse().unwrap();
        let wrong = judge(&roots, &other, now).unwrap_err().to_string();
        assert!(wrong.contains("eu/a answered"), "{wrong}");
        let elsewhere = tempfile::tempdir().unwrap();
        let stranger =
            DevCa::open_or_create(elsewhere.path(), &"x.y".parse().unwrap(), now).unwrap();
        let strange = read_certificates(&stranger.ca_path()).unwrap();
        assert!(matches!(judge(&strange, identity.id(), now), Err(PeerFault::Untrusted(_))));
    }
}
