//! A certificate authority in a directory, for development: no ceremony, no password, no service.
//!
//! ```text
//! DIR/ca.key                            the CA's private key (0600)
//! DIR/ca.pem                            its certificate: what clients and nodes believe
//! DIR/trust-domain                      the trust domain, for people to read; the certificate decides
//! DIR/nodes/<region>/<name>/key.pem     a node's private key (0600)
//! DIR/nodes/<region>/<name>/cert.pem    its certificate
//! ```
//!
//! Several nodes may start in an empty directory at once, and a process may be killed at any instant. No lock is needed,
//! because a certificate is made *from* a key already on disk: first the key is put in its place unless one is there
//! already, then whichever key is there is read back and certified. So there is one key, made by the winner, and every
//! certificate that can ever be seen beside it matches it. For the same reason renewal keeps the key; to change a node's
//! key, delete the node's directory.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base::{NodeName, RegionName, TrustDomain};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::{
    IdentityError, NodeIdentity, Role, SpiffeId,
    certificate::names,
    files,
    id::{mesh_uri, parse_mesh_uri},
    node::{Paths, check_key, check_life},
    tls,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const CA_LIFE: Duration = DAY.saturating_mul(3650);
const NODE_LIFE: Duration = DAY.saturating_mul(365);
/// A certificate with less life than this is issued anew.
const RENEW_BEFORE: Duration = DAY.saturating_mul(7);
/// Certificates begin a little in the past, for peers whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

const CA_REMEDY: &str = "restore it, or delete ca.pem beside it to begin with a new CA";
const NODE_REMEDY: &str = "start again to have it issued anew";

/// A development CA: opened or made by [`Self::open_or_create`], issues nodes' identities with [`Self::node`].
pub struct DevCa {
    dir: PathBuf,
    trust_domain: TrustDomain,
    certificate: CertificateDer<'static>,
    until: SystemTime,
    issuer: Issuer<'static, KeyPair>,
}

impl DevCa {
    /// Opens the CA in `dir`, or makes one there for `trust_domain`. Processes that do so at the same time get the same CA.
    ///
    /// # Errors
    /// `dir` holds a CA for another trust domain, one that has expired, one without its key, with a key other users can
    /// read, or something else under the names of this layout; or it cannot be written.
    pub fn open_or_create(
        dir: &Path,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        files::create_directory(dir)?;
        if !files::exists(&dir.join("ca.pem"))? {
            create(dir, trust_domain, now)?;
        }
        let ca = Self::open(dir, now)?;
        if ca.trust_domain != *trust_domain {
            return Err(IdentityError::OtherTrustDomain {
                dir: dir.into(),
                found: ca.trust_domain,
                wanted: trust_domain.clone(),
            });
        }
        files::write_if_different(&dir.join("trust-domain"), &format!("{trust_domain}\n"))?;
        Ok(ca)
    }

    /// The mesh this CA speaks for.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The file with the CA's certificate, for clients; relative if the directory was given so.
    #[must_use]
    pub fn ca_path(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// The identity of a node: the one on disk if this CA issued it, it is good for another week and it covers
    /// `localhost`, the node's name, 127.0.0.1, ::1 and `extra_ips`; a new one otherwise.
    ///
    /// # Errors
    /// The node's key is damaged or can be read by other users, or the directory cannot be written.
    pub fn node(
        &self,
        region: &RegionName,
        name: &NodeName,
        extra_ips: &[IpAddr],
        now: SystemTime,
    ) -> Result<NodeIdentity, IdentityError> {
        let dir = self.dir.join("nodes").join(region.as_str()).join(name.as_str());
        files::create_secret_directory(&dir)?;
        let (ca_path, cert_path, key_path) =
            (self.ca_path(), dir.join("cert.pem"), dir.join("key.pem"));
        let paths = Paths { ca: &ca_path, cert: &cert_path, key: &key_path };
        let id = SpiffeId {
            trust_domain: self.trust_domain.clone(),
            role: Role::Node,
            region: region.clone(),
            name: name.clone(),
        };

        let key = read_or_make_key(paths.key, NODE_REMEDY)?;
        if let Ok(identity) = self.current(paths, key.clone_key(), now)
            && identity.id == id
            && covers(&identity, extra_ips)
        {
            return Ok(identity);
        }
        let certificate = self.issue(&id, &key, extra_ips, now)?;
        files::replace(paths.cert, files::PUBLIC, &certificate.pem())?;
        self.identity(paths, vec![certificate.into()], key, now)
    }

    /// Signs a certificate; nothing is written.
    pub(crate) fn issue(
        &self,
        id: &SpiffeId,
        key: &PrivateKeyDer<'static>,
        extra_ips: &[IpAddr],
        now: SystemTime,
    ) -> Result<Certificate, IdentityError> {
        let params = server_params(id, extra_ips, now, (now + NODE_LIFE).min(self.until))?;
        Ok(params.signed_by(&KeyPair::try_from(key)?, &self.issuer)?)
    }

    fn open(dir: &Path, now: SystemTime) -> Result<Self, IdentityError> {
        let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        let paths = Paths { ca: &cert_path, cert: &cert_path, key: &key_path };
        let chain = files::read_certificates(paths.cert, CA_REMEDY)?;
        let key = files::read_secret_key(paths.key, CA_REMEDY)?;
        check_key(paths, &chain, &key)?;
        let until = check_life(paths.cert, &chain, now)?;
        let [certificate] = <[_; 1]>::try_from(chain).map_err(|_| IdentityError::NotADevCa {
            path: paths.cert.into(),
            reason: "it is several certificates".into(),
        })?;
        let trust_domain = trust_domain_of(paths.cert, &certificate)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, KeyPair::try_from(&key)?)?;
        Ok(Self { dir: dir.into(), trust_domain, certificate, until, issuer })
    }

    /// The identity on disk, if peers will believe it for a while.
    fn current(
        &self,
        paths: Paths<'_>,
        key: PrivateKeyDer<'static>,
        now: SystemTime,
    ) -> Result<NodeIdentity, IdentityError> {
        let chain = files::read_certificates(paths.cert, NODE_REMEDY)?;
        check_life(paths.cert, &chain, now)?;
        self.identity(paths, chain, key, now + RENEW_BEFORE)
    }

    fn identity(
        &self,
        paths: Paths<'_>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        now: SystemTime,
    ) -> Result<NodeIdentity, IdentityError> {
        NodeIdentity::new(paths, std::slice::from_ref(&self.certificate), chain, key, now)
    }
}

impl fmt::Debug for DevCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevCa")
            .field("dir", &self.dir)
            .field("trust_domain", &self.trust_domain)
            .finish_non_exhaustive()
    }
}

/// Key first, then the certificate made from whichever key is there.
fn create(dir: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<(), IdentityError> {
    let key = KeyPair::try_from(&read_or_make_key(&dir.join("ca.key"), CA_REMEDY)?)?;
    let params = ca_params("isobar development CA", trust_domain, &key, 0, (now, now + CA_LIFE))?;
    let pem = params.self_signed(&key)?.pem();
    files::write_unless_there(&dir.join("ca.pem"), files::PUBLIC, &pem)
}

/// What a CA's certificate says, whichever key signs it. `below`: how many CAs there may be between it and a member.
pub(crate) fn ca_params(
    name: &str,
    trust_domain: &TrustDomain,
    key: &KeyPair,
    below: u8,
    (now, until): (SystemTime, SystemTime),
) -> Result<CertificateParams, IdentityError> {
    let mut params = params("", now, until)?;
    // Two CAs on one machine need two names; the name follows the key, as everything here does.
    let fingerprint =
        params.key_identifier(key).iter().take(4).fold(0, |n, b| n << 8 | u32::from(*b));
    params.distinguished_name = common_name(&format!("{name} {fingerprint:08x}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names.push(SanType::URI(mesh_uri(trust_domain).try_into()?));
    Ok(params)
}

/// What the certificate of a member says that others connect to.
pub(crate) fn server_params(
    id: &SpiffeId,
    extra_ips: &[IpAddr],
    now: SystemTime,
    until: SystemTime,
) -> Result<CertificateParams, IdentityError> {
    let mut params = client_params(id, now, until)?;
    params.extended_key_usages.insert(0, ExtendedKeyUsagePurpose::ServerAuth);
    for host in hosts(id) {
        params.subject_alt_names.push(SanType::DnsName(host.try_into()?));
    }
    params.subject_alt_names.extend(ips(extra_ips).map(SanType::IpAddress));
    Ok(params)
}

/// What the certificate of a member says that only connects to others.
pub(crate) fn client_params(
    id: &SpiffeId,
    now: SystemTime,
    until: SystemTime,
) -> Result<CertificateParams, IdentityError> {
    let mut params = params(id.name.as_str(), now, until)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names.push(SanType::URI(id.to_string().try_into()?));
    Ok(params)
}

/// The key in a file, made first if there is none.
pub(crate) fn read_or_make_key(
    path: &Path,
    remedy: &'static str,
) -> Result<PrivateKeyDer<'static>, IdentityError> {
    if !files::exists(path)? {
        let pem = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?.serialize_pem();
        files::write_unless_there(path, files::SECRET, &pem)?;
    }
    files::read_secret_key(path, remedy)
}

fn params(
    name: &str,
    now: SystemTime,
    until: SystemTime,
) -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::new([])?;
    params.distinguished_name = common_name(name);
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = until.into();
    params.serial_number = Some(random_serial()?);
    Ok(params)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// 16 random bytes, positive and of full length whatever they are (RFC 5280 §4.1.2.2).
fn random_serial() -> Result<SerialNumber, IdentityError> {
    let mut bytes = random::<16>()?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], IdentityError> {
    let mut bytes = [0; N];
    tls::provider().secure_random.fill(&mut bytes).map_err(rustls::Error::from)?;
    Ok(bytes)
}

/// The names a client may call a node by on this machine.
fn hosts(id: &SpiffeId) -> [&str; 2] {
    ["localhost", id.name.as_str()]
}

fn ips(extra: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    let always = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    always.into_iter().chain(extra.iter().copied().filter(move |ip| !always.contains(ip)))
}

fn covers(identity: &NodeIdentity, extra_ips: &[IpAddr]) -> bool {
    let Some(names) = identity.certified.cert.first().and_then(|leaf| names(leaf).ok()) else {
        return false;
    };
    hosts(&identity.id).into_iter().all(|host| names.has_host(host))
        && ips(extra_ips).all(|ip| names.has_ip(&ip))
}

fn trust_domain_of(
    path: &Path,
    certificate: &CertificateDer<'_>,
) -> Result<TrustDomain, IdentityError> {
    let not_ours = |reason: String| IdentityError::NotADevCa { path: path.into(), reason };
    let names = names(certificate).map_err(|e| not_ours(e.to_string()))?;
    let uri = names.only_uri().map_err(|e| not_ours(e.to_string()))?;
    parse_mesh_uri(uri).ok_or_else(|| not_ours(format!("`{uri}` does not name a mesh")))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, thread};

    use base::clock;
    use x509_parser::extensions::ParsedExtension;

    use super::*;
    use crate::certificate::Names;

    fn mesh() -> TrustDomain {
        "mesh.test".parse().unwrap()
    }

    fn node(ca: &DevCa, name: &str, now: SystemTime) -> NodeIdentity {
        ca.node(&"eu".parse().unwrap(), &name.parse().unwrap(), &[], now).unwrap()
    }

    fn leaf_names(identity: &NodeIdentity) -> Names {
        names(&identity.certified.cert[0]).unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_ca_is_made_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("deep/.isobar");
        let now = clock::wall();
        let first = DevCa::open_or_create(&dir, &mesh(), now).unwrap();
        let again = DevCa::open_or_create(&dir, &mesh(), now + DAY).unwrap();
        assert_eq!(first.certificate, again.certificate);
        assert_eq!(again.trust_domain(), &mesh());
        assert_eq!(again.ca_path(), dir.join("ca.pem"));
        assert_eq!(fs::read_to_string(dir.join("trust-domain")).unwrap(), "mesh.test\n");
        assert_eq!(mode(&dir.join("ca.key")), 0o600);
        assert!(!format!("{first:?}").contains("BEGIN"));
    }

    #[test]
    fn a_node_keeps_its_certificate_until_the_last_week() {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::wall();
        let ca = DevCa::open_or_create(dir.path(), &mesh(), now).unwrap();
        let first = node(&ca, "a", now);
        assert_eq!(node(&ca, "a", now + DAY * 357).certified.cert, first.certified.cert);
        let renewed = node(&ca, "a", now + DAY * 359);
        assert_ne!(renewed.certified.cert, first.certified.cert);
        assert_eq!(renewed.key, first.key);
        assert_eq!(node(&ca, "a", now + DAY * 360).certified.cert, renewed.certified.cert);
        assert_ne!(
            node(&ca, "a", now).certified.cert,
            renewed.certified.cert,
            "renewed is not valid yet"
        );
    }

    #[test]
    fn a_node_is_private_to_its_owner_and_has_the_names_of_this_machine() {
        let dir = tempfile::tempdir().unwrap();
        let ca = DevCa::open_or_create(dir.path(), &mesh(), clock::wall()).unwrap();
        let identity = node(&ca, "a", clock::wall());
        let home = dir.path().join("nodes/eu/a");
        assert_eq!(mode(&home), 0o700);
        assert_eq!(mode(&home.join("key.pem")), 0o600);
        assert_eq!(fs::read_dir(&home).unwrap().count(), 2, "nothing is left behind");
        let names = leaf_names(&identity);
        assert_eq!(names.only_uri().unwrap(), "spiffe://mesh.test/node/eu/a");
        assert!(names.has_host("localhost") && names.has_host("a"));
        for ip in ["127.0.0.1", "::1"] {
            assert!(names.has_ip(&ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn a_new_address_gives_a_new_certificate_and_fewer_keep_it() {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::wall();
        let ca = DevCa::open_or_create(dir.path(), &mesh(), now).unwrap();
        let (region, name) = ("eu".parse().unwrap(), "a".parse().unwrap());
        let first = node(&ca, "a", now);
        let extra = ["127.0.0.2".parse().unwrap(), "127.0.0.1".parse().unwrap()];
        let wider = ca.node(&region, &name, &extra, now).unwrap();
        assert_ne!(wider.certified.cert, first.certified.cert);
        assert!(leaf_names(&wider).has_ip(&extra[0]));
        assert_eq!(node(&ca, "a", now).certified.cert, wider.certified.cert);
    }

    #[test]
    fn the_ca_signs_nodes_and_nothing_below_them() {
        let dir = tempfile::tempdir().unwrap();
        let ca = DevCa::open_or_create(dir.path(), &mesh(), clock::wall()).unwrap();
        let (_, x509) = x509_parser::parse_x509_certificate(&ca.certificate).unwrap();
        let constraints = x509.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(0));
        let usage = x509.key_usage().unwrap().unwrap().value;
        assert!(usage.key_cert_sign() && usage.crl_sign() && !usage.digital_signature());

        let identity = node(&ca, "a", clock::wall());
        let (_, x509) = x509_parser::parse_x509_certificate(&identity.certified.cert[0]).unwrap();
        assert!(!x509.basic_constraints().unwrap().unwrap().value.ca);
        let usage = x509.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && !usage.key_cert_sign());
        let usage = x509.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.server_auth && usage.client_auth && !usage.any);
        assert!(x509.extensions().iter().any(|e| {
            matches!(e.parsed_extension(), ParsedExtension::AuthorityKeyIdentifier(_))
        }));
        assert_eq!(x509.raw_serial().len(), 16);
    }

    #[test]
    fn processes_that_start_at_once_share_one_ca_and_see_matching_pairs() {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::wall();
        let start = std::sync::Barrier::new(8);
        let made = thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        let ca = DevCa::open_or_create(dir.path(), &mesh(), now).unwrap();
                        let identity = node(&ca, "a", now);
                        let home = dir.path().join("nodes/eu/a");
                        let (cert, key) = (home.join("cert.pem"), home.join("key.pem"));
                        let seen = NodeIdentity::load(&ca.ca_path(), &cert, &key).unwrap();
                        assert_eq!(seen.key, identity.key);
                        (ca.certificate, identity.key)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(made.iter().all(|one| *one == made[0]));
    }

    #[test]
    fn an_interrupted_creation_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::wall();
        let key = read_or_make_key(&dir.path().join("ca.key"), CA_REMEDY).unwrap();
        let ca = DevCa::open_or_create(dir.path(), &mesh(), now).unwrap();
        assert_eq!(files::read_secret_key(&dir.path().join("ca.key"), CA_REMEDY).unwrap(), key);

        let first = node(&ca, "a", now);
        fs::write(dir.path().join("nodes/eu/a/cert.pem"), "half a certif").unwrap();
        assert_eq!(node(&ca, "a", now).key, first.key);
    }

    #[test]
    fn a_ca_for_another_trust_domain_is_refused_naming_both() {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::wall();
        DevCa::open_or_create(dir.path(), &mesh(), now).unwrap();
        let other = "other.test".parse().unwrap();
        let error = DevCa::open_or_create(dir.path(), &other, now).unwrap_err().to_string();
        assert!(error.contains("mesh.test") && error.contains("other.test"), "{error}");
    }

    #[test]
    fn a_ca_that_cannot_be_trusted_is_refused() {
        let now = clock::wall();
        let refusal = |spoil: &dyn Fn(&Path), later: Duration| {
            let dir = tempfile::tempdir().unwrap();
            DevCa::open_or_create(dir.path(), &mesh(), now).unwrap();
            spoil(dir.path());
            DevCa::open_or_create(dir.path(), &mesh(), now + later).unwrap_err().to_string()
        };
        let open = |dir: &Path| {
            fs::set_permissions(dir.join("ca.key"), PermissionsExt::from_mode(0o644)).unwrap();
        };
        assert!(refusal(&open, DAY).contains("chmod 600"));
        let no_key = |dir: &Path| fs::remove_file(dir.join("ca.key")).unwrap();
        assert!(refusal(&no_key, DAY).contains("ca.key does not exist"));
        let other_key = |dir: &Path| {
            no_key(dir);
            read_or_make_key(&dir.join("ca.key"), CA_REMEDY).unwrap();
        };
        assert!(refusal(&other_key, DAY).contains("is not the private key of"));
        assert!(refusal(&|_| (), CA_LIFE + DAY).contains("expired on"));
        let foreign = |dir: &Path| {
            let key =
                KeyPair::try_from(&files::read_key(&dir.join("ca.key"), "").unwrap()).unwrap();
            let pem = params("x", now, now + CA_LIFE).unwrap().self_signed(&key).unwrap().pem();
            fs::write(dir.join("ca.pem"), pem).unwrap();
        };
        assert!(refusal(&foreign, DAY).contains("not the certificate of a development CA"));
    }

    #[test]
    fn a_node_of_a_ca_that_is_gone_is_certified_by_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::wall();
        let ca = DevCa::open_or_create(dir.path(), &mesh(), now).unwrap();
        let first = node(&ca, "a", now);
        for file in ["ca.pem", "ca.key"] {
            fs::remove_file(dir.path().join(file)).unwrap();
        }
        let ca = DevCa::open_or_create(dir.path(), &"new.test".parse().unwrap(), now).unwrap();
        let second = node(&ca, "a", now);
        assert_ne!(second.certified.cert, first.certified.cert);
        assert_eq!(second.id().to_string(), "spiffe://new.test/node/eu/a");
        assert_eq!(fs::read_to_string(dir.path().join("trust-domain")).unwrap(), "new.test\n");
    }
}
