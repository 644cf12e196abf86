//! A node's own identity: its certificate, the key to it, and the roots it believes.
//!
//! Everything that would make peers refuse the node is found here, when the identity is loaded, instead of at the first
//! handshake.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use base::clock;
use rustls::{
    Error as TlsError, InconsistentKeys, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer},
    sign::CertifiedKey,
};

use crate::{
    CertificateSummary, IdentityError, Role, SpiffeId,
    certificate::{Life, Side, life, peer_id, unix_time, verify_chain},
    files, tls,
};

const REMEDY: &str = "join a mesh with `isobar join --token TOKEN`, check the path, or start with --dev-ca for development";

/// What a node shows its peers and what it demands of them, at one moment; [`crate::Identity`] puts it to use.
#[derive(Clone)]
pub struct NodeIdentity {
    pub(crate) id: SpiffeId,
    pub(crate) certified: Arc<CertifiedKey>,
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) key: Arc<PrivateKeyDer<'static>>,
    trusted: Vec<CertificateDer<'static>>,
    summary: CertificateSummary,
}

/// Where an identity's parts are; errors point there.
#[derive(Clone, Copy)]
pub(crate) struct Paths<'a> {
    pub(crate) ca: &'a Path,
    pub(crate) cert: &'a Path,
    pub(crate) key: &'a Path,
}

impl NodeIdentity {
    /// Reads an identity from PEM files: the roots to believe (`ca`, one or more), the node's certificate with its
    /// intermediates (`cert`, its own first) and the private key (`key`, readable by its owner only).
    ///
    /// # Errors
    /// A file is missing, unreadable or holds something else; the key is open to other users or belongs to another
    /// certificate; the certificate is outside its time, not vouched for by `ca`, or not that of a node.
    pub fn load(ca: &Path, cert: &Path, key: &Path) -> Result<Self, IdentityError> {
        let chain = files::read_certificates(cert, REMEDY)?;
        let roots = files::read_certificates(ca, REMEDY)?;
        let secret = files::read_secret_key(key, REMEDY)?;
        Self::new(Paths { ca, cert, key }, &roots, chain, secret, clock::wall())
    }

    /// Judges the parts as peers will.
    pub(crate) fn new(
        paths: Paths<'_>,
        roots: &[CertificateDer<'static>],
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        let certified = check_key(paths, &chain, &key)?;
        check_life(paths.cert, &chain, now)?;
        let store = root_store(paths.ca, roots)?;
        check_chain(paths, &chain, &store, now)?;
        let id = node_id(paths.cert, &chain)?;
        Ok(Self {
            id,
            summary: CertificateSummary::of(certified.end_entity_cert()?)?,
            certified: Arc::new(certified),
            roots: Arc::new(store),
            key: Arc::new(key),
            trusted: roots.to_vec(),
        })
    }

    /// An identity as an authority handed it out: the chain for `key`, own certificate first, and the roots to believe. `dir`
    /// is where [`Self::store`] will put it; errors point there.
    ///
    /// # Errors
    /// Peers would not believe it.
    pub fn issued(
        dir: &Path,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        let at = IdentityFiles::in_dir(dir);
        Self::new(at.paths(), roots, chain, key, now)
    }

    /// Puts the identity into `dir` as `ca.pem`, `cert.pem` and `key.pem`, all at once: nobody ever sees a certificate
    /// beside another's key.
    ///
    /// # Errors
    /// The directory cannot be written; what was there before is there still.
    pub fn store(&self, dir: &Path) -> Result<(), IdentityError> {
        let chain = files::pem("CERTIFICATE", self.certified.cert.iter().map(AsRef::as_ref));
        let roots = files::pem("CERTIFICATE", self.trusted.iter().map(AsRef::as_ref));
        let key = files::pem(files::key_label(&self.key), [self.key.secret_der()].into_iter());
        files::replace_all(
            dir,
            &[
                (IdentityFiles::CA, files::PUBLIC, &roots),
                (IdentityFiles::CERT, files::PUBLIC, &chain),
                (IdentityFiles::KEY, files::SECRET, &key),
            ],
        )
    }

    /// Puts the roots alone into `dir` as `ca.pem`, for clients: somebody else keeps the rest.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn store_roots(&self, dir: &Path) -> Result<(), IdentityError> {
        files::create_secret_directory(dir)?;
        let roots = files::pem("CERTIFICATE", self.trusted.iter().map(AsRef::as_ref));
        files::write_file(&dir.join(IdentityFiles::CA), roots.as_bytes())
    }

    /// Who the node is.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The node's certificate and key for a port whose clients know it by host name: it is also valid for `localhost`, the
    /// node's name and loopback addresses. Feed it to [`crate::client_server_config`].
    #[must_use]
    pub fn server_cert(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (self.certified.cert.clone(), self.key.clone_key())
    }

    /// The certificate: its number and its life.
    #[must_use]
    pub fn certificate(&self) -> &CertificateSummary {
        &self.summary
    }

    /// Whether both show the same certificates and believe the same roots.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.certified.cert == other.certified.cert && self.trusted == other.trusted
    }

    /// The roots it believes, ready to judge by.
    #[must_use]
    pub fn roots(&self) -> &RootCertStore {
        &self.roots
    }

    /// The roots it believes, as certificates.
    #[must_use]
    pub fn trusted(&self) -> &[CertificateDer<'static>] {
        &self.trusted
    }
}

#[cfg(test)]
impl NodeIdentity {
    /// The same node showing other certificates, which nobody has judged.
    pub(crate) fn showing(self, chain: Vec<CertificateDer<'static>>) -> Self {
        let key = self.key.clone_key();
        let certified = CertifiedKey::from_der(chain, key, &tls::provider()).unwrap();
        Self { certified: Arc::new(certified), ..self }
    }
}

/// Where the three files of an identity are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The roots to believe.
    pub ca: PathBuf,
    /// The node's certificate and its intermediates.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl IdentityFiles {
    const CA: &str = "ca.pem";
    const CERT: &str = "cert.pem";
    const KEY: &str = "key.pem";

    /// Under their usual names in a directory.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        Self { ca: dir.join(Self::CA), cert: dir.join(Self::CERT), key: dir.join(Self::KEY) }
    }

    /// Reads the identity: see [`NodeIdentity::load`].
    ///
    /// # Errors
    /// As there.
    pub fn load(&self) -> Result<NodeIdentity, IdentityError> {
        NodeIdentity::load(&self.ca, &self.cert, &self.key)
    }

    fn paths(&self) -> Paths<'_> {
        Paths { ca: &self.ca, cert: &self.cert, key: &self.key }
    }
}

impl fmt::Debug for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeIdentity").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Whether the key is that of the first certificate.
pub(crate) fn check_key(
    paths: Paths<'_>,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<CertifiedKey, IdentityError> {
    match CertifiedKey::from_der(chain.to_vec(), key.clone_key(), &tls::provider()) {
        Ok(certified) => Ok(certified),
        Err(TlsError::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            Err(IdentityError::KeyMismatch { cert: paths.cert.into(), key: paths.key.into() })
        }
        Err(TlsError::InvalidCertificate(reason)) => Err(IdentityError::DamagedCertificate {
            path: paths.cert.into(),
            reason: reason.to_string(),
        }),
        Err(_) => Err(IdentityError::NoKey { path: paths.key.into() }),
    }
}

/// Whether the first certificate of a file is valid now; until when, if so.
pub(crate) fn check_life(
    path: &Path,
    chain: &[CertificateDer<'static>],
    now: SystemTime,
) -> Result<SystemTime, IdentityError> {
    let path = path.to_path_buf();
    let Some(leaf) = chain.first() else { return Err(IdentityError::NoCertificate { path }) };
    match life(leaf, now) {
        Ok(Life::Valid { until }) => Ok(until),
        Ok(Life::NotYet { from }) => Err(IdentityError::NotYetValid { path, from }),
        Ok(Life::Over { until }) => Err(IdentityError::Expired { path, until }),
        Err(e) => Err(IdentityError::DamagedCertificate { path, reason: e.to_string() }),
    }
}

pub(crate) fn root_store(
    path: &Path,
    certificates: &[CertificateDer<'static>],
) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone()).map_err(|e| IdentityError::DamagedCertificate {
            path: path.into(),
            reason: e.to_string(),
        })?;
    }
    Ok(roots)
}

/// A peer is server and client alike.
fn check_chain(
    paths: Paths<'_>,
    chain: &[CertificateDer<'static>],
    roots: &RootCertStore,
    now: SystemTime,
) -> Result<(), IdentityError> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(IdentityError::NoCertificate { path: paths.cert.into() });
    };
    let algorithms = tls::provider().signature_verification_algorithms;
    [Side::Server, Side::Client]
        .into_iter()
        .try_for_each(|side| {
            verify_chain(leaf, intermediates, roots, &algorithms, side, unix_time(now))
        })
        .map_err(|source| IdentityError::Untrusted {
            cert: paths.cert.into(),
            ca: paths.ca.into(),
            source,
        })
}

fn node_id(path: &Path, chain: &[CertificateDer<'static>]) -> Result<SpiffeId, IdentityError> {
    peer_id(chain)
        .and_then(|id| match id.role {
            Role::Node => Ok(id),
            _ => Err(IdentityError::NotANode(id)),
        })
        .map_err(|e| IdentityError::NotANodeCertificate { path: path.into(), source: Box::new(e) })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::PermissionsExt,
        path::PathBuf,
        time::{Duration, SystemTime},
    };

    use base::clock;
    use tempfile::TempDir;

    use super::*;
    use crate::DevCa;

    const DAY: Duration = Duration::from_secs(86_400);

    /// A directory with a CA and the node eu/a, both made at `made`.
    struct World {
        dir: TempDir,
        ca: DevCa,
    }

    impl World {
        fn new(made: SystemTime) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let ca =
                DevCa::open_or_create(dir.path(), &"mesh.test".parse().unwrap(), made).unwrap();
            ca.node(&"eu".parse().unwrap(), &"a".parse().unwrap(), &[], made).unwrap();
            Self { dir, ca }
        }

        fn path(&self, file: &str) -> PathBuf {
            self.dir.path().join(file)
        }

        fn load(&self, ca: &str, cert: &str, key: &str) -> Result<NodeIdentity, IdentityError> {
            NodeIdentity::load(&self.path(ca), &self.path(cert), &self.path(key))
        }

        fn refusal(&self, ca: &str, cert: &str, key: &str) -> String {
            self.load(ca, cert, key).unwrap_err().to_string()
        }
    }

    const CERT: &str = "nodes/eu/a/cert.pem";
    const KEY: &str = "nodes/eu/a/key.pem";

    #[test]
    fn an_identity_loads_and_never_shows_its_key() {
        let world = World::new(clock::wall());
        let identity = world.load("ca.pem", CERT, KEY).unwrap();
        assert_eq!(identity.id().to_string(), "spiffe://mesh.test/node/eu/a");
        let shown = format!("{identity:?}");
        assert!(shown.contains("eu") && shown.ends_with(".. }"), "{shown}");
    }

    #[test]
    fn each_missing_or_wrong_file_is_named() {
        let world = World::new(clock::wall());
        fs::write(world.path("empty"), "").unwrap();
        fs::set_permissions(world.path("empty"), PermissionsExt::from_mode(0o600)).unwrap();
        for (ca, cert, key, file, says) in [
            ("none", CERT, KEY, "none", "does not exist"),
            ("ca.pem", "none", KEY, "none", "isobar join"),
            ("ca.pem", CERT, "none", "none", "does not exist"),
            ("empty", CERT, KEY, "empty", "no readable PEM certificate"),
            ("ca.pem", "empty", KEY, "empty", "no readable PEM certificate"),
            ("ca.pem", CERT, "empty", "empty", "no readable PEM private key"),
            ("ca.pem", CERT, "ca.key", "ca.key", "is not the private key of"),
            (CERT, CERT, KEY, CERT, "does not vouch for"),
            ("ca.pem", "ca.pem", "ca.key", "ca.pem", "does not vouch for"),
        ] {
            let error = world.refusal(ca, cert, key);
            assert!(error.contains(says), "{error}");
            assert!(error.contains(world.path(file).to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_damaged_certificate_is_named() {
        let world = World::new(clock::wall());
        let damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        fs::write(world.path("damaged"), damaged).unwrap();
        for (ca, cert) in [("damaged", CERT), ("ca.pem", "damaged")] {
            let error = world.refusal(ca, cert, KEY);
            assert!(error.contains("damaged certificate"), "{error}");
        }
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let world = World::new(clock::wall());
        for mode in [0o644, 0o640, 0o604] {
            fs::set_permissions(world.path(KEY), PermissionsExt::from_mode(mode)).unwrap();
            let error = world.refusal("ca.pem", CERT, KEY);
            assert!(error.contains(&format!("chmod 600 {}", world.path(KEY).display())), "{error}");
        }
        fs::set_permissions(world.path(KEY), PermissionsExt::from_mode(0o400)).unwrap();
        world.load("ca.pem", CERT, KEY).unwrap();
    }

    #[test]
    fn a_certificate_outside_its_time_is_refused() {
        let now = clock::wall();
        let past = World::new(now - 400 * DAY).refusal("ca.pem", CERT, KEY);
        assert!(past.contains("expired on"), "{past}");
        let future = World::new(now + 2 * DAY).refusal("ca.pem", CERT, KEY);
        assert!(future.contains("is valid only from"), "{future}");
    }

    #[test]
    fn only_nodes_are_nodes() {
        let world = World::new(clock::wall());
        let id = "spiffe://mesh.test/client/eu/a".parse().unwrap();
        let key = files::read_secret_key(&world.path(KEY), REMEDY).unwrap();
        let chain = vec![world.ca.issue(&id, &key, &[], clock::wall()).unwrap().into()];
        let roots = files::read_certificates(&world.path("ca.pem"), REMEDY).unwrap();
        let (ca, cert, path) = (world.path("ca.pem"), world.path(CERT), world.path(KEY));
        let paths = Paths { ca: &ca, cert: &cert, key: &path };
        let error = NodeIdentity::new(paths, &roots, chain, key, clock::wall()).unwrap_err();
        assert!(
            error.to_string().contains("spiffe://mesh.test/client/eu/a is not a node"),
            "{error}"
        );
    }
}
