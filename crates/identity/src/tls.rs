//! TLS as this mesh speaks it: 1.3 only, one crypto provider, named here and never taken from the process.
//!
//! Between peers both sides show a certificate, and the SPIFFE id in it is the whole identity: a host name, an address
//! or SNI proves nothing, so none is checked or sent. A peer connection never resumes an earlier one and never sends
//! early data: both would skip the checks below. The port for clients is ordinary TLS with a name in a certificate.

use std::{fmt, path::Path, sync::Arc};

use base::{NodeName, RegionName, TrustDomain};
use parking_lot::RwLock;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError,
    OtherError, RootCertStore, ServerConfig, SignatureScheme, SupportedProtocolVersion,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};

use crate::{
    CertificateSummary, ClientRoots, Identity, IdentityError, Role, SpiffeId,
    authority::fingerprint,
    certificate::{Side, peer_id, verify_chain},
    files,
    node::{Paths, check_key, root_store},
};

const VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13];
const CA_REMEDY: &str = "give the PEM file of the authority that signed the server's certificate";
const OWN_CERT_REMEDY: &str = "give the PEM files of a certificate and its key";
const SERVER_CERT_REMEDY: &str = "check `cert` and `key` in [tls]";

/// The node one means to reach.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExpectedPeer {
    /// Where it is.
    pub region: RegionName,
    /// Which one it is.
    pub name: NodeName,
}

/// The protocol of enrolment, which whoever has no certificate yet may speak to an authority.
pub const ENROL_ALPN: &[u8] = b"isobar-enrol/1";

impl Identity {
    /// For the port of peers: lets in whoever proves to be a node of our mesh, in any region.
    ///
    /// # Errors
    /// The TLS library refuses the protocol versions.
    pub fn peer_server_config(&self, alpn: &[&[u8]]) -> Result<ServerConfig, IdentityError> {
        let verifier = PeerVerifier::new(self, Role::Node, None);
        self.server_config(verifier, Shown::Own(self.clone()), alpn)
    }

    /// For the admin port: lets in whoever proves to be an operator of our mesh.
    ///
    /// # Errors
    /// The TLS library refuses the protocol versions.
    pub fn operator_server_config(&self, alpn: &[&[u8]]) -> Result<ServerConfig, IdentityError> {
        let verifier = PeerVerifier::new(self, Role::Operator, None);
        self.server_config(verifier, Shown::Own(self.clone()), alpn)
    }

    /// For the gossip port of an authority: as [`Self::peer_server_config`], and whoever shows no certificate is let in
    /// too. A handshake that offers [`ENROL_ALPN`] alone, or beside it only `h2` to enrol over TCP, is shown `authority`, every
    /// other this node's certificate.
    ///
    /// Whoever accepts connections must refuse those without a certificate that speak anything else, and over `h2` those
    /// that ask for anything else.
    ///
    /// # Errors
    /// The TLS library refuses the protocol versions.
    pub fn authority_server_config(
        &self,
        authority: &ServedCertificate,
        alpn: &[&[u8]],
    ) -> Result<ServerConfig, IdentityError> {
        let mut verifier = PeerVerifier::new(self, Role::Node, None);
        verifier.must_authenticate = false;
        self.server_config(verifier, Shown::Either(self.clone(), authority.clone()), alpn)
    }

    fn server_config(
        &self,
        verifier: PeerVerifier,
        shown: Shown,
        alpn: &[&[u8]],
    ) -> Result<ServerConfig, IdentityError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(shown));
        config.alpn_protocols = owned(alpn);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// For a connection to one peer: shows our certificate and goes on only if `expect` answers. The server name given
    /// to the connection plays no part.
    ///
    /// # Errors
    /// The TLS library refuses the protocol versions.
    pub fn peer_client_config(
        &self,
        alpn: &[&[u8]],
        expect: ExpectedPeer,
    ) -> Result<ClientConfig, IdentityError> {
        self.client_config(alpn, Role::Node, Some(expect))
    }

    /// For a connection to whichever node of our mesh answers: shows our certificate, and who answered is in its own.
    ///
    /// # Errors
    /// The TLS library refuses the protocol versions.
    pub fn any_peer_client_config(&self, alpn: &[&[u8]]) -> Result<ClientConfig, IdentityError> {
        self.client_config(alpn, Role::Node, None)
    }

    /// For asking an authority, whichever answers, to renew our certificate.
    ///
    /// # Errors
    /// The TLS library refuses the protocol versions.
    pub fn renewal_client_config(&self) -> Result<ClientConfig, IdentityError> {
        self.client_config(&[ENROL_ALPN], Role::Authority, None)
    }

    fn client_config(
        &self,
        alpn: &[&[u8]],
        role: Role,
        expect: Option<ExpectedPeer>,
    ) -> Result<ClientConfig, IdentityError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(PeerVerifier::new(self, role, expect)))
            .with_client_cert_resolver(Arc::new(ShownToServers(self.clone())));
        config.alpn_protocols = owned(alpn);
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Ok(config)
    }
}

/// A certificate and its key that are shown from now on until there is a newer one. Clones are the same.
#[derive(Clone, Debug)]
pub struct ServedCertificate(Arc<RwLock<Arc<CertifiedKey>>>);

impl ServedCertificate {
    /// Begins with a certificate, its chain up to the root, and its key.
    ///
    /// # Errors
    /// The key is not that of the certificate.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, IdentityError> {
        let certified = CertifiedKey::from_der(chain, key, &provider())?;
        Ok(Self(Arc::new(RwLock::new(Arc::new(certified)))))
    }

    /// Takes a newer one.
    ///
    /// # Errors
    /// As [`Self::new`]; nothing has changed.
    pub fn replace(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), IdentityError> {
        let certified = CertifiedKey::from_der(chain, key, &provider())?;
        *self.0.write() = Arc::new(certified);
        Ok(())
    }

    /// Takes another one, if it is another; says whether it is.
    ///
    /// # Errors
    /// As [`Self::new`]; nothing has changed.
    pub fn replace_if_other(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<bool, IdentityError> {
        if self.0.read().cert == chain {
            return Ok(false);
        }
        self.replace(chain, key).map(|()| true)
    }
}

/// What is shown to the other end, as it is at the moment of the handshake.
#[derive(Debug)]
enum Shown {
    Own(Identity),
    Either(Identity, ServedCertificate),
    Served(ServedCertificate),
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let enrols = || hello.alpn().is_some_and(are_for_enrolment);
        match self {
            Self::Either(_, authority) if enrols() => Some(authority.0.read().clone()),
            Self::Served(served) => Some(served.0.read().clone()),
            Self::Own(identity) | Self::Either(identity, _) => Some(identity.show()),
        }
    }
}

/// Whether somebody who offers these protocols wants to enrol and nothing else.
fn are_for_enrolment<'a>(offered: impl Iterator<Item = &'a [u8]>) -> bool {
    let mut enrols = false;
    for protocol in offered {
        match protocol {
            ENROL_ALPN => enrols = true,
            b"h2" => {}
            _ => return false,
        }
    }
    enrols
}

/// A node has one certificate to show, whoever asks.
#[derive(Debug)]
struct ShownToServers(Identity);

impl ResolvesClientCert for ShownToServers {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// What clients are shown.
#[derive(Clone, Debug)]
pub enum ClientFacing {
    /// The node's certificate of the mesh, whichever it is at the moment.
    Mesh(Identity),
    /// A certificate of its own, for a public name.
    Own(ServedCertificate),
}

/// For joining a mesh: believes an authority of `trust_domain` whose chain ends in the root with this SHA-256 fingerprint,
/// which it must send along. Shows no certificate: there is none yet.
///
/// # Errors
/// The TLS library refuses the protocol versions.
pub fn join_client_config(
    trust_domain: &TrustDomain,
    root_fingerprint: [u8; 32],
) -> Result<ClientConfig, IdentityError> {
    let verifier = PinnedVerifier {
        trust_domain: trust_domain.clone(),
        root_fingerprint,
        provider: provider(),
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = owned(&[ENROL_ALPN]);
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// For the port of clients: shows a certificate. Asks for none, and sessions may be resumed; or, with `clients`, takes a good
/// one from who has it, and no session is resumed: that would skip the check. Early data is off.
///
/// # Errors
/// The TLS library cannot make tickets, or use the roots of the clients.
pub fn client_server_config(
    shown: &ClientFacing,
    alpn: &[&[u8]],
    clients: Option<ClientRoots>,
) -> Result<ServerConfig, IdentityError> {
    let resolver = Arc::new(match shown {
        ClientFacing::Mesh(identity) => Shown::Own(identity.clone()),
        ClientFacing::Own(served) => Shown::Served(served.clone()),
    });
    let builder =
        ServerConfig::builder_with_provider(provider()).with_protocol_versions(VERSIONS)?;
    let mut config = if let Some(clients) = clients {
        let mut config =
            builder.with_client_cert_verifier(Arc::new(clients)).with_cert_resolver(resolver);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config
    } else {
        let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
        config.ticketer = aws_lc_rs::Ticketer::new()?;
        config
    };
    config.alpn_protocols = owned(alpn);
    Ok(config)
}

/// For calling the port of clients: ordinary TLS with a name. Believes the roots in `ca`, or those the machine believes.
/// `own` is a certificate with its intermediates and its key, for servers that ask for one.
///
/// # Errors
/// A file is missing, unreadable or holds something else; the machine believes nobody; or the TLS library refuses our key
/// or certificate.
pub fn client_config(
    ca: Option<&Path>,
    own: Option<(&Path, &Path)>,
) -> Result<ClientConfig, IdentityError> {
    let roots = match ca {
        Some(ca) => root_store(ca, &files::read_certificates(ca, CA_REMEDY)?)?,
        None => machine_roots()?,
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)?
        .with_root_certificates(roots);
    Ok(match own {
        Some((cert, key)) => {
            let chain = files::read_certificates(cert, OWN_CERT_REMEDY)?;
            let secret = files::read_key(key, OWN_CERT_REMEDY)?;
            check_key(Paths { ca: cert, cert, key }, &chain, &secret)?;
            let key = secret;
            builder.with_client_auth_cert(chain, key)?
        }
        None => builder.with_no_client_auth(),
    })
}

/// What the machine believes, as far as it can be used.
fn machine_roots() -> Result<RootCertStore, IdentityError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        return Err(IdentityError::NoRoots);
    }
    Ok(roots)
}

/// Reads the certificate for a public name, with its intermediates, and its key. The key's permissions are left to
/// whoever deploys it: secrets mounted into a container are readable by all in it.
///
/// # Errors
/// A file is missing, unreadable or holds something else, or the two do not belong together.
pub fn load_server_cert(
    cert: &Path,
    key: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), IdentityError> {
    let chain = files::read_certificates(cert, SERVER_CERT_REMEDY)?;
    let secret = files::read_key(key, SERVER_CERT_REMEDY)?;
    check_key(Paths { ca: cert, cert, key }, &chain, &secret)?;
    Ok((chain, secret))
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn owned(alpn: &[&[u8]]) -> Vec<Vec<u8>> {
    alpn.iter().map(|protocol| protocol.to_vec()).collect()
}

/// Decides whether a certificate is that of a member of the mesh.
#[derive(Debug)]
struct PeerVerifier {
    ours: Identity,
    role: Role,
    /// `None`: any of the role.
    expected: Option<SpiffeId>,
    /// Whether whoever shows none is turned away.
    must_authenticate: bool,
    provider: Arc<CryptoProvider>,
}

impl PeerVerifier {
    fn new(ours: &Identity, role: Role, expect: Option<ExpectedPeer>) -> Self {
        let expected = expect.map(|ExpectedPeer { region, name }| SpiffeId {
            trust_domain: ours.id().trust_domain.clone(),
            role,
            region,
            name,
        });
        Self { ours: ours.clone(), role, expected, must_authenticate: true, provider: provider() }
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        side: Side,
        now: UnixTime,
    ) -> Result<(), TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_chain(leaf, intermediates, &self.ours.roots(), algorithms, side, now)
            .map_err(chain_error)?;
        self.verify_id(leaf).map_err(|e| refusal(Arc::new(Refusal(e))))
    }

    fn verify_id(&self, leaf: &CertificateDer<'_>) -> Result<(), IdentityError> {
        let found = peer_id(std::slice::from_ref(leaf))?;
        let issued = CertificateSummary::of(leaf)?.from;
        let found = self.ours.judge(found, issued, self.role)?;
        match &self.expected {
            Some(expected) if *expected != found => {
                Err(IdentityError::WrongPeer { expected: expected.clone(), found })
            }
            _ => Ok(()),
        }
    }

    fn verify_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, leaf, signed, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Nodes have one certificate each and need no hint which to show; roots come and go.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        self.must_authenticate
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.verify(leaf, intermediates, Side::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.verify_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        self.verify(leaf, intermediates, Side::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.verify_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// Believes an authority under one root that is known by its fingerprint.
#[derive(Debug)]
struct PinnedVerifier {
    trust_domain: TrustDomain,
    root_fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl PinnedVerifier {
    /// The root the other end sent along, if it is the one.
    fn root(&self, sent: &[CertificateDer<'_>]) -> Result<RootCertStore, IdentityError> {
        let root = sent.iter().find(|sent| fingerprint(sent) == self.root_fingerprint);
        let root = root.ok_or_else(|| IdentityError::OtherRoot {
            wanted: self.root_fingerprint.iter().take(8).map(|b| format!("{b:02x}")).collect(),
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(root.clone().into_owned())?;
        Ok(roots)
    }

    fn verify_id(&self, leaf: &CertificateDer<'_>) -> Result<(), IdentityError> {
        let found = peer_id(std::slice::from_ref(leaf))?;
        if found.trust_domain != self.trust_domain {
            return Err(IdentityError::ForeignPeer { found, ours: self.trust_domain.clone() });
        }
        match found.role {
            Role::Authority => Ok(()),
            _ => Err(IdentityError::OtherRole { found, wanted: Role::Authority }),
        }
    }
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let refused = |e| refusal(Arc::new(Refusal(e)));
        let roots = self.root(intermediates).map_err(refused)?;
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_chain(leaf, intermediates, &roots, algorithms, Side::Server, now)
            .map_err(chain_error)?;
        self.verify_id(leaf).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(too_old())
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

/// The version is not offered, so this is never reached; it fails closed all the same.
fn too_old() -> TlsError {
    TlsError::General("peers speak TLS 1.3 only".into())
}

/// What `webpki` found, in the words that give the peer the right TLS alert.
fn chain_error(error: webpki::Error) -> TlsError {
    use webpki::Error as Chain;
    TlsError::InvalidCertificate(match error {
        Chain::CertExpired { time, not_after } => {
            CertificateError::ExpiredContext { time, not_after }
        }
        Chain::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        Chain::UnknownIssuer => CertificateError::UnknownIssuer,
        Chain::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        Chain::BadDer | Chain::BadDerTime | Chain::TrailingData(_) => CertificateError::BadEncoding,
        Chain::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => return refusal(Arc::new(other)),
    })
}

fn refusal(error: Arc<dyn std::error::Error + Send + Sync>) -> TlsError {
    CertificateError::Other(OtherError(error)).into()
}

/// `rustls` prints the cause of a refused certificate with `Debug`; this makes that the sentence for people.
struct Refusal(IdentityError);

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl std::error::Error for Refusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        fs,
        os::unix::fs::PermissionsExt,
        time::{Duration, SystemTime},
    };

    use base::clock;
    use rcgen::{CertificateParams, KeyPair, SanType};
    use rustls::{
        ClientConnection, ConnectionCommon, HandshakeKind, NamedGroup, ProtocolVersion,
        ServerConnection, SideData,
        sign::{CertifiedKey, SingleCertAndKey},
    };
    use tempfile::TempDir;

    use super::*;
    use crate::{Authority, CertificateRequest, ClientNames, DevCa, IdentityFiles, NodeIdentity};

    const ALPN: &[&[u8]] = &[b"h3"];
    const DAY: Duration = Duration::from_secs(86_400);

    /// A mesh in a directory of its own.
    struct Mesh {
        dir: TempDir,
        ca: DevCa,
    }

    impl Mesh {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let domain = "mesh.test".parse().unwrap();
            let ca = DevCa::open_or_create(dir.path(), &domain, clock::wall()).unwrap();
            Self { dir, ca }
        }

        fn own(&self, name: &str) -> NodeIdentity {
            self.ca
                .node(&"eu".parse().unwrap(), &name.parse().unwrap(), &[], clock::wall())
                .unwrap()
        }

        fn node(&self, name: &str) -> Identity {
            Identity::new(self.own(name))
        }

        /// Node x with another certificate of the same CA; what no honest issuer would hand out, too.
        fn impostor(&self, id: &str) -> Identity {
            let identity = self.own("x");
            let (_, key) = identity.server_cert();
            let certificate =
                self.ca.issue(&id.parse().unwrap(), &key, &[], clock::wall()).unwrap();
            Identity::new(identity.showing(vec![certificate.into()]))
        }
    }

    /// Node b by its own account only.
    fn self_signed(mesh: &Mesh) -> Identity {
        let mut params = CertificateParams::new([]).unwrap();
        let id = "spiffe://mesh.test/node/eu/b";
        params.subject_alt_names.push(SanType::URI(id.try_into().unwrap()));
        let identity = mesh.own("b");
        let key = KeyPair::try_from(&identity.server_cert().1).unwrap();
        Identity::new(identity.showing(vec![params.self_signed(&key).unwrap().into()]))
    }

    /// A stranger that would talk to the nodes of `mesh`.
    fn believing(mesh: &Mesh, mut stranger: NodeIdentity) -> Identity {
        stranger.roots = mesh.own("x").roots;
        Identity::new(stranger)
    }

    fn peer(name: &str) -> ExpectedPeer {
        ExpectedPeer { region: "eu".parse().unwrap(), name: name.parse().unwrap() }
    }

    fn shake(client: ClientConfig, server: ServerConfig) -> Result<Pair, TlsError> {
        let name = "not.the.name".try_into().unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = ServerConnection::new(Arc::new(server)).unwrap();
        exchange(&mut client, &mut server)?;
        Ok(Pair { client, server })
    }

    /// Carries bytes both ways until nobody has any; the first error of either side ends it.
    fn exchange(
        client: &mut ClientConnection,
        server: &mut ServerConnection,
    ) -> Result<(), TlsError> {
        while client.wants_write() || server.wants_write() {
            carry(client, server)?;
            carry(server, client)?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok(())
    }

    fn carry<A: SideData, B: SideData>(
        from: &mut ConnectionCommon<A>,
        to: &mut ConnectionCommon<B>,
    ) -> Result<(), TlsError> {
        let mut bytes = Vec::new();
        while from.wants_write() {
            from.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            to.read_tls(&mut rest).unwrap();
            to.process_new_packets()?;
        }
        Ok(())
    }

    #[derive(Debug)]
    struct Pair {
        client: ClientConnection,
        server: ServerConnection,
    }

    /// `a` calls the node `expect` and `b` answers.
    fn call(a: &Identity, expect: &str, b: &Identity) -> Result<Pair, TlsError> {
        let client = a.peer_client_config(ALPN, peer(expect)).unwrap();
        shake(client, b.peer_server_config(ALPN).unwrap())
    }

    #[test]
    fn two_nodes_of_a_mesh_know_each_other() {
        let mesh = Mesh::new();
        let Pair { client, server } = call(&mesh.node("a"), "b", &mesh.node("b")).unwrap();
        assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        assert_eq!(client.alpn_protocol(), Some(&b"h3"[..]));
        assert_eq!(server.server_name(), None);
        let answered = peer_id(client.peer_certificates().unwrap()).unwrap();
        assert_eq!(answered.to_string(), "spiffe://mesh.test/node/eu/b");
        let called = peer_id(server.peer_certificates().unwrap()).unwrap();
        assert_eq!(called.to_string(), "spiffe://mesh.test/node/eu/a");
    }

    #[test]
    fn whoever_calls_any_node_takes_nodes_alone() {
        let (mesh, foreign) = (Mesh::new(), Mesh::new());
        let a = mesh.node("a");
        let call = |b: &Identity| {
            let client = a.any_peer_client_config(ALPN).unwrap();
            shake(client, b.peer_server_config(ALPN).unwrap())
        };
        assert!(call(&mesh.node("b")).is_ok());
        assert!(call(&foreign.node("b")).is_err());
        assert!(call(&mesh.impostor("spiffe://mesh.test/operator/eu/x")).is_err());
    }

    #[test]
    fn the_key_exchange_is_post_quantum() {
        let mesh = Mesh::new();
        let Pair { client, server } = call(&mesh.node("a"), "b", &mesh.node("b")).unwrap();
        for group in
            [client.negotiated_key_exchange_group(), server.negotiated_key_exchange_group()]
        {
            assert_eq!(group.unwrap().name(), NamedGroup::X25519MLKEM768);
        }
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full), "without a retry");
    }

    #[test]
    fn peers_never_resume() {
        let mesh = Mesh::new();
        let client = mesh.node("a").peer_client_config(ALPN, peer("b")).unwrap();
        let server = mesh.node("b").peer_server_config(ALPN).unwrap();
        for _ in 0..2 {
            let Pair { client, server } = shake(client.clone(), server.clone()).unwrap();
            assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
            assert_eq!(client.tls13_tickets_received(), 0);
            assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
        }
    }

    #[test]
    fn a_server_that_is_not_the_called_node_is_refused() {
        let mesh = Mesh::new();
        let a = mesh.node("a");
        for (server, says) in [
            (
                mesh.node("c"),
                "called spiffe://mesh.test/node/eu/b, and spiffe://mesh.test/node/eu/c",
            ),
            (
                mesh.impostor("spiffe://mesh.test/node/us/b"),
                "spiffe://mesh.test/node/us/b answered",
            ),
            (mesh.impostor("spiffe://mesh.test/client/eu/b"), "is not a node"),
            (mesh.impostor("spiffe://other.test/node/eu/b"), "not of the trust domain `mesh.test`"),
            (Mesh::new().node("b"), "UnknownIssuer"),
            (self_signed(&mesh), "UnknownIssuer"),
        ] {
            let error = call(&a, "b", &server).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_client_that_is_not_a_node_is_refused() {
        let mesh = Mesh::new();
        let b = mesh.node("b");
        for (client, says) in [
            (mesh.impostor("spiffe://mesh.test/client/eu/a"), "is not a node"),
            (mesh.impostor("spiffe://mesh.test/operator/eu/a"), "is not a node"),
            (mesh.impostor("spiffe://other.test/node/eu/a"), "not of the trust domain `mesh.test`"),
            (believing(&mesh, Mesh::new().own("a")), "UnknownIssuer"),
            (self_signed(&mesh), "UnknownIssuer"),
        ] {
            let error = call(&client, "b", &b).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_client_without_a_certificate_is_refused() {
        let mesh = Mesh::new();
        let verifier = PeerVerifier::new(&mesh.node("a"), Role::Node, Some(peer("b")));
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        client.alpn_protocols = owned(ALPN);
        let server = mesh.node("b").peer_server_config(ALPN).unwrap();
        assert_eq!(shake(client, server).unwrap_err(), TlsError::NoCertificatesPresented);
    }

    #[test]
    fn a_certificate_outside_its_time_is_refused() {
        let mesh = Mesh::new();
        let b = mesh.node("b");
        let now = clock::wall();
        for (made, says) in [(now - 400 * DAY, "expired"), (now + 2 * DAY, "not valid yet")] {
            let own = mesh.own("a");
            let (_, key) = own.server_cert();
            let a = vec![mesh.ca.issue(own.id(), &key, &[], made).unwrap().into()];
            let a = Identity::new(own.showing(a));
            for (client, server, name) in [(&a, &b, "b"), (&b, &a, "a")] {
                let error = call(client, name, server).unwrap_err().to_string();
                assert!(error.contains(says), "{error}");
            }
        }
    }

    #[test]
    fn a_certificate_with_two_uris_or_none_is_nobodys() {
        for uris in [&[][..], &["spiffe://mesh.test/node/eu/a", "spiffe://mesh.test/node/eu/b"]] {
            let mut params = CertificateParams::new([]).unwrap();
            params.subject_alt_names =
                uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap().into();
            let error = peer_id(&[certificate]).unwrap_err().to_string();
            assert!(error.contains(&format!("carries {} URI names", uris.len())), "{error}");
        }
        assert!(matches!(peer_id(&[]), Err(IdentityError::NoPeerCertificate)));
    }

    #[test]
    fn clients_are_served_without_a_certificate_and_may_resume() {
        let mesh = Mesh::new();
        let identity = mesh.own("b");
        let (chain, key) = identity.server_cert();
        let shown = ClientFacing::Own(ServedCertificate::new(chain, key).unwrap());
        let server = client_server_config(&shown, &[b"h2", b"h3"], None).unwrap();
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .unwrap()
            .with_root_certificates(identity.roots.clone())
            .with_no_client_auth();
        client.alpn_protocols = vec![b"h2".to_vec()];
        let (client, server) = (Arc::new(client), Arc::new(server));
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let mut from =
                ClientConnection::new(client.clone(), "localhost".try_into().unwrap()).unwrap();
            let mut to = ServerConnection::new(server.clone()).unwrap();
            exchange(&mut from, &mut to).unwrap();
            assert_eq!(from.handshake_kind(), Some(kind));
            assert_eq!(from.alpn_protocol(), Some(&b"h2"[..]));
        }
    }

    #[test]
    fn a_client_may_show_a_certificate_and_one_that_is_shown_must_be_good() {
        let (mesh, other) = (Mesh::new(), Mesh::new());
        let identity = mesh.own("b");
        let roots = ClientRoots::load(&mesh.ca.ca_path()).unwrap();
        let shown = ClientFacing::Mesh(Identity::new(identity.clone()));
        let server = client_server_config(&shown, &[], Some(roots)).unwrap();
        let (server, known, foreign) = (Arc::new(server), mesh.own("c"), other.own("c"));
        for (shown, is_good) in [(None, true), (Some(known), true), (Some(foreign), false)] {
            let builder = ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(VERSIONS)
                .unwrap()
                .with_root_certificates(identity.roots.clone());
            let client = match &shown {
                Some(own) => {
                    // Whoever it is that is asked for: this client shows what it has.
                    let shown = SingleCertAndKey::from(own.certified.clone());
                    builder.with_client_cert_resolver(Arc::new(shown))
                }
                None => builder.with_no_client_auth(),
            };
            let client = Arc::new(client);
            let mut from = ClientConnection::new(client, "localhost".try_into().unwrap()).unwrap();
            let mut to = ServerConnection::new(server.clone()).unwrap();
            assert_eq!(exchange(&mut from, &mut to).is_ok(), is_good);
            if is_good {
                let certificates = to.peer_certificates().map(<[_]>::to_vec);
                let names = certificates.map(|chain| ClientNames::of(&chain[0]).unwrap().names);
                let has_id =
                    names.map(|names| names.contains(&"spiffe://mesh.test/node/eu/c".into()));
                assert_eq!(has_id, shown.map(|_| true));
            }
        }
    }

    #[test]
    fn a_server_certificate_loads_with_its_own_key_only() {
        let mesh = Mesh::new();
        mesh.own("a");
        mesh.own("b");
        let path = |file: &str| mesh.dir.path().join("nodes/eu").join(file);
        fs::set_permissions(path("a/key.pem"), PermissionsExt::from_mode(0o644)).unwrap();
        let (chain, _) = load_server_cert(&path("a/cert.pem"), &path("a/key.pem")).unwrap();
        assert_eq!(chain.len(), 1);
        for (cert, key, says) in [
            ("a/cert.pem", "b/key.pem", "is not the private key of"),
            ("a/none.pem", "a/key.pem", "[tls]"),
            ("a/cert.pem", "a/cert.pem", "no readable PEM private key"),
            ("a/key.pem", "a/key.pem", "no readable PEM certificate"),
        ] {
            let error = load_server_cert(&path(cert), &path(key)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    /// A mesh with an authority of its own, and the moment at which it was made.
    struct Signed {
        dir: TempDir,
        made: SystemTime,
    }

    impl Signed {
        const LIFE: Duration = Duration::from_secs(20);

        fn new() -> Self {
            let (dir, made) = (tempfile::tempdir().unwrap(), clock::wall());
            Authority::init(dir.path(), &"mesh.test".parse().unwrap(), Self::LIFE, made).unwrap();
            Self { dir, made }
        }

        fn authority(&self) -> Authority {
            Authority::open(self.dir.path(), clock::wall()).unwrap()
        }

        /// A certificate for `id` at `now`, with the roots of the moment.
        fn issue(&self, id: &str, now: SystemTime) -> NodeIdentity {
            let authority = self.authority();
            let request = CertificateRequest::new().unwrap();
            let chain = authority.sign(&id.parse().unwrap(), request.csr(), &[], now).unwrap();
            let key = request.into_key();
            NodeIdentity::issued(self.dir.path(), chain, key, authority.roots(), now).unwrap()
        }

        fn node(&self, name: &str) -> Identity {
            Identity::new(self.issue(&format!("spiffe://mesh.test/node/eu/{name}"), clock::wall()))
        }
    }

    #[test]
    fn a_renewed_certificate_is_shown_by_configurations_made_before() {
        let mesh = Signed::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        let client = a.peer_client_config(ALPN, peer("b")).unwrap();
        let server = b.peer_server_config(ALPN).unwrap();
        let mut serials = vec![];
        for _ in 0..3 {
            for identity in [&a, &b] {
                identity.replace(mesh.issue(&identity.id().to_string(), clock::wall())).unwrap();
            }
            let Pair { client, server } = shake(client.clone(), server.clone()).unwrap();
            let serial = |shown: Option<&[CertificateDer<'_>]>| {
                CertificateSummary::of(&shown.unwrap()[0]).unwrap().serial
            };
            assert_eq!(serial(client.peer_certificates()), b.served().unwrap().serial);
            assert_eq!(serial(server.peer_certificates()), a.current().certificate().serial);
            serials.push(b.served().unwrap().serial);
        }
        serials.dedup();
        assert_eq!(serials.len(), 3);
        let error =
            a.replace(mesh.issue("spiffe://mesh.test/node/eu/b", clock::wall())).unwrap_err();
        assert!(error.to_string().contains("nothing was changed"), "{error}");
    }

    #[test]
    fn roots_change_step_by_step_while_everybody_knows_everybody() {
        let mesh = Signed::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        let old = mesh.node("old");
        let meet = || call(&a, "b", &b).and_then(|_| call(&b, "a", &a)).map(drop);
        let renew = |identity: &Identity| {
            identity.replace(mesh.issue(&identity.id().to_string(), clock::wall())).unwrap();
        };
        for _ in 0..3 {
            Authority::rotate(mesh.dir.path(), true, clock::wall()).unwrap();
            meet().unwrap();
            // One end follows first, then the other.
            renew(&a);
            meet().unwrap();
            renew(&b);
            meet().unwrap();
        }
        assert_eq!(a.current().trusted().len(), 1, "the old root has gone");
        let error = call(&old, "b", &b).unwrap_err().to_string();
        assert!(error.contains("UnknownIssuer"), "{error}");
    }

    #[test]
    fn whoever_is_revoked_is_refused_until_it_is_certified_anew() {
        let mesh = Signed::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        mesh.authority().revoke(b.id(), clock::wall()).unwrap();
        let list = mesh.authority().revocations().clone();
        let list = list.verify(a.current().roots(), &a.id().trust_domain, clock::wall()).unwrap();
        a.revoke(&list, clock::wall());
        for error in [call(&a, "b", &b).unwrap_err(), call(&b, "a", &a).unwrap_err()] {
            assert!(error.to_string().contains("was revoked"), "{error}");
        }
        // Whoever is let in again begins after the moment of the revocation, which may be a second away.
        let again = mesh.issue(&b.id().to_string(), clock::wall() + Duration::from_secs(1));
        b.replace(again).unwrap();
        let issued = CertificateSummary::of(&b.current().certified.cert[0]).unwrap().from;
        assert!(!a.revocations().revokes(b.id(), issued));
    }

    #[test]
    fn a_joiner_knows_the_authority_by_its_root_and_nobody_else() {
        let mesh = Signed::new();
        let (region, name) = ("eu".parse().unwrap(), "a".parse().unwrap());
        let own = |mesh: &Signed| {
            let (chain, key) = mesh.authority().own(&region, &name, clock::wall()).unwrap();
            ServedCertificate::new(chain, key).unwrap()
        };
        let server = |mesh: &Signed| {
            let alpn: &[&[u8]] = &[b"isobar/1", ENROL_ALPN];
            mesh.node("a").authority_server_config(&own(mesh), alpn).unwrap()
        };
        let pin = mesh.authority().root_fingerprint();
        let join = |domain: &str, pin| join_client_config(&domain.parse().unwrap(), pin).unwrap();
        let joined = shake(join("mesh.test", pin), server(&mesh)).unwrap();
        assert_eq!(joined.server.alpn_protocol(), Some(ENROL_ALPN));
        assert_eq!(joined.server.peer_certificates(), None, "there is none yet");

        let other = Signed::new();
        for (domain, pin, served, says) in [
            ("mesh.test", pin, server(&other), "not an authority of the mesh the token is for"),
            ("other.test", pin, server(&mesh), "not of the trust domain `other.test`"),
            ("mesh.test", [0; 32], server(&mesh), "not an authority of the mesh the token is for"),
        ] {
            let error = shake(join(domain, pin), served).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        // A node without the role shows its own certificate, without the root.
        let plain = mesh.node("b").authority_server_config(&own(&other), &[ENROL_ALPN]).unwrap();
        assert!(shake(join("mesh.test", pin), plain).is_err());
    }

    #[test]
    fn over_tcp_who_enrols_is_shown_the_authority_and_who_gossips_the_node() {
        let mesh = Signed::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        let (chain, key) =
            mesh.authority().own(&a.id().region, &a.id().name, clock::wall()).unwrap();
        let authority = ServedCertificate::new(chain, key).unwrap();
        let server = || a.authority_server_config(&authority, &[b"h2"]).unwrap();
        let mut joining =
            join_client_config(&"mesh.test".parse().unwrap(), mesh.authority().root_fingerprint())
                .unwrap();
        joining.alpn_protocols = owned(&[b"h2", ENROL_ALPN]);
        let joined = shake(joining, server()).unwrap();
        assert_eq!(joined.server.alpn_protocol(), Some(&b"h2"[..]));
        assert_eq!(joined.server.peer_certificates(), None);
        for beside in [&b"isobar/1"[..], ENROL_ALPN] {
            let client = b.peer_client_config(&[b"h2", beside], peer("a")).unwrap();
            assert_eq!(shake(client, server()).is_ok(), beside != ENROL_ALPN);
        }
        let plain = b.peer_client_config(&[b"h2"], peer("a")).unwrap();
        assert!(shake(plain, server()).is_ok(), "h2 alone is no wish to enrol");
    }

    #[test]
    fn a_node_renews_at_an_authority_and_at_nobody_else() {
        let mesh = Signed::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        let (chain, key) =
            mesh.authority().own(&a.id().region, &a.id().name, clock::wall()).unwrap();
        let authority = ServedCertificate::new(chain, key).unwrap();
        let alpn: &[&[u8]] = &[b"isobar/1", ENROL_ALPN];
        let server = a.authority_server_config(&authority, alpn).unwrap();
        let renewing = shake(b.renewal_client_config().unwrap(), server).unwrap();
        let known = peer_id(renewing.server.peer_certificates().unwrap()).unwrap();
        assert_eq!(known, *b.id());
        // Who has only a node's certificate is no authority.
        let plain = a.peer_server_config(&[ENROL_ALPN]).unwrap();
        let error = shake(b.renewal_client_config().unwrap(), plain).unwrap_err().to_string();
        assert!(error.contains("does not have the role `authority`"), "{error}");
    }

    #[test]
    fn only_operators_reach_the_admin_port() {
        let mesh = Signed::new();
        let node = mesh.node("a");
        let request = CertificateRequest::new().unwrap();
        let id = "spiffe://mesh.test/operator/eu/alice".parse().unwrap();
        let authority = mesh.authority();
        let chain = authority.sign(&id, request.csr(), &[], clock::wall()).unwrap();
        let operator = CertifiedKey::from_der(chain, request.into_key(), &provider()).unwrap();
        for (shown, is_let_in) in
            [(Arc::new(operator), true), (mesh.node("b").current().certified.clone(), false)]
        {
            let client = ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(VERSIONS)
                .unwrap()
                .with_root_certificates(node.roots())
                .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
            let name = "localhost".try_into().unwrap();
            let mut from = ClientConnection::new(Arc::new(client), name).unwrap();
            let server = node.operator_server_config(&[]).unwrap();
            let mut to = ServerConnection::new(Arc::new(server)).unwrap();
            assert_eq!(exchange(&mut from, &mut to).is_ok(), is_let_in);
        }
    }

    #[test]
    fn the_lease_of_a_connection_ends_with_the_first_of_both_certificates() {
        let mesh = Signed::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        a.replace(mesh.issue(&a.id().to_string(), mesh.made + Duration::from_secs(4))).unwrap();
        let validity = a.validity(&b.current().certified.cert).unwrap();
        assert_eq!(validity.peer, *b.id());
        assert_eq!(validity.until, b.current().certificate().until);
        let validity = b.validity(&a.current().certified.cert).unwrap();
        assert_eq!(validity.until, b.current().certificate().until);
    }

    #[test]
    fn an_identity_is_stored_and_found_again_whole() {
        let mesh = Signed::new();
        let dir = mesh.dir.path().join("state/identity");
        let files = IdentityFiles::in_dir(&dir);
        let mut serials = BTreeSet::new();
        for _ in 0..3 {
            let identity = mesh.issue("spiffe://mesh.test/node/eu/a", clock::wall());
            identity.store(&dir).unwrap();
            let found = files.load().unwrap();
            assert!(found.is_same(&identity));
            serials.insert(found.certificate().serial.clone());
            let mode = fs::metadata(&files.key).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600);
        }
        assert_eq!(serials.len(), 3);
        let generations = fs::read_dir(&dir).unwrap().filter(|entry| {
            entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(".identity-")
        });
        assert_eq!(generations.count(), 1, "older ones are removed");
    }
}
