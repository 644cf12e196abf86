//! Whom this node believes, for as long as connections live: leases by certificate, revocations, and the books of whom it
//! turned away.

use std::{
    any::Any,
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use base::clock;
use identity::{Identity, SignedRevocations, SpiffeId};
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use transport::{Lease, Lessor};

/// Lines of the log about whom was turned away, per second; what is beyond is counted, and said with the next line.
const LINES_PER_SECOND: u32 = 10;

/// What a node believes of the others. Shared by all its ports.
#[derive(Debug)]
pub(crate) struct Trust {
    identity: Identity,
    /// The list as it is handed on; `None`: nobody was ever revoked.
    signed: watch::Sender<Option<Arc<SignedRevocations>>>,
    /// Where the list is kept.
    kept: Option<PathBuf>,
    open: Arc<Mutex<Open>>,
    refused: [AtomicU64; Port::ALL.len()],
    lines: Mutex<Lines>,
}

/// A port that turns strangers away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    Peers,
    Gossip,
    Admin,
}

impl Port {
    pub(crate) const ALL: [Self; 3] = [Self::Peers, Self::Gossip, Self::Admin];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Peers => "peers",
            Self::Gossip => "gossip",
            Self::Admin => "admin",
        }
    }
}

/// The connections that a certificate keeps open.
#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: BTreeMap<u64, Held>,
}

#[derive(Debug)]
struct Held {
    peer: SpiffeId,
    issued: SystemTime,
    withdrawn: CancellationToken,
}

/// Takes a connection off the books when it ends.
struct Entry {
    open: Arc<Mutex<Open>>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.open.lock().connections.remove(&self.number);
    }
}

#[derive(Debug)]
struct Lines {
    second: Instant,
    written: u32,
    left_out: u32,
}

impl Trust {
    /// Begins with what is kept in `kept` from earlier, as far as it can still be believed.
    pub(crate) fn new(identity: Identity, kept: Option<PathBuf>) -> Self {
        let trust = Self {
            identity,
            signed: watch::Sender::new(None),
            kept: None,
            open: Arc::default(),
            refused: Default::default(),
            lines: Mutex::new(Lines { second: clock::now(), written: 0, left_out: 0 }),
        };
        if let Some(path) = &kept
            && let Some(signed) = read(path)
            && let Err(error) = trust.adopt(signed)
        {
            tracing::warn!(%error, path = %path.display(), "the kept list of revocations is not used");
        }
        Self { kept, ..trust }
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The list as it is handed on, and word of the next.
    pub(crate) fn revocations(&self) -> watch::Receiver<Option<Arc<SignedRevocations>>> {
        self.signed.subscribe()
    }

    /// How many connections to nodes of the mesh are open.
    pub(crate) fn connections(&self) -> usize {
        self.open.lock().connections.len()
    }

    /// Whom each port turned away so far.
    pub(crate) fn refused(&self) -> impl Iterator<Item = (Port, u64)> {
        Port::ALL.into_iter().zip(&self.refused).map(|(p, n)| (p, n.load(Ordering::Relaxed)))
    }

    /// Takes a list somebody handed on, if it is newer than ours; keeps it, and closes the connections of those on it.
    /// Returns whether it was newer.
    ///
    /// # Errors
    /// It is not signed by an authority of ours; nothing has changed.
    pub(crate) fn adopt(
        &self,
        signed: SignedRevocations,
    ) -> Result<bool, identity::RevocationError> {
        let ours = self.signed.borrow().clone();
        if ours.is_some_and(|ours| !signed.supersedes(&ours)) {
            return Ok(false);
        }
        let (current, now) = (self.identity.current(), clock::wall());
        let list = signed.verify(current.roots(), &self.identity.id().trust_domain, now)?;
        tracing::info!(
            version = list.version(),
            members = list.len(),
            "a newer list of revocations"
        );
        self.identity.revoke(&list, now);
        self.keep(&signed);
        self.signed.send_replace(Some(Arc::new(signed)));
        self.withdraw();
        Ok(true)
    }

    fn keep(&self, signed: &SignedRevocations) {
        let Some(path) = &self.kept else { return };
        if let Err(error) = identity::write_file(path, signed.encode()) {
            tracing::warn!(%error, "the list of revocations cannot be kept: it is forgotten when the node stops");
        }
    }

    /// Ends the connections of everybody who is not believed any more.
    fn withdraw(&self) {
        let list = self.identity.revocations();
        for held in self.open.lock().connections.values() {
            if list.revokes(&held.peer, held.issued) {
                tracing::warn!(peer = %held.peer, "a connection ends: its certificate was revoked");
                held.withdrawn.cancel();
            }
        }
    }

    /// A port turned somebody away.
    pub(crate) fn turned_away(&self, port: Port, remote: SocketAddr, why: &str) {
        self.refused[port as usize].fetch_add(1, Ordering::Relaxed);
        if let Some(left_out) = self.may_say(clock::now()) {
            let port = port.label();
            tracing::warn!(%remote, port, why, left_out, "a stranger was turned away");
        }
    }

    /// Whether another line may be written now, and how many were left out before it.
    fn may_say(&self, now: Instant) -> Option<u32> {
        let mut lines = self.lines.lock();
        if now.saturating_duration_since(lines.second) >= Duration::from_secs(1) {
            (lines.second, lines.written) = (now, 0);
        }
        if lines.written >= LINES_PER_SECOND {
            lines.left_out = lines.left_out.saturating_add(1);
            return None;
        }
        lines.written += 1;
        Some(std::mem::take(&mut lines.left_out))
    }

    /// How long a connection may be used with whoever showed these certificates.
    pub(crate) fn lease_of(&self, certificates: &[CertificateDer<'static>]) -> Lease {
        let withdrawn = CancellationToken::new();
        let Ok(validity) = self.identity.validity(certificates) else {
            // Nobody who was let in gets here; nothing is granted to whoever does.
            withdrawn.cancel();
            return Lease::limited(clock::now(), Duration::ZERO, withdrawn, Arc::new(()));
        };
        let left = validity.until.duration_since(clock::wall()).unwrap_or_default();
        let (peer, issued) = (validity.peer, validity.issued);
        let held = Held { peer: peer.clone(), issued, withdrawn: withdrawn.clone() };
        let entry: Arc<dyn Any + Send + Sync> = Arc::new(self.register(held));
        // Between the handshake and this line the list may have changed.
        if self.identity.revocations().revokes(&peer, issued) {
            withdrawn.cancel();
        }
        Lease::limited(clock::now(), left, withdrawn, entry)
    }

    fn register(&self, held: Held) -> Entry {
        let mut open = self.open.lock();
        let number = open.next;
        open.next += 1;
        open.connections.insert(number, held);
        Entry { open: self.open.clone(), number }
    }
}

fn read(path: &std::path::Path) -> Option<SignedRevocations> {
    let bytes = std::fs::read(path).ok()?;
    match SignedRevocations::decode(&bytes) {
        Ok(signed) => Some(signed),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the kept list of revocations is not used");
            None
        }
    }
}

/// The connections of one port, as the transport asks about them.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) trust: Arc<Trust>,
    pub(crate) port: Port,
}

impl Lessor for Gate {
    fn lease(&self, certificates: &[CertificateDer<'static>]) -> Lease {
        self.trust.lease_of(certificates)
    }

    fn refused(&self, remote: SocketAddr, why: &str) {
        self.trust.turned_away(self.port, remote, why);
    }
}

#[cfg(test)]
mod tests {
    use identity::{Authority, CertificateRequest, NodeIdentity};

    use super::*;

    /// An authority in a directory of its own.
    struct Mesh(tempfile::TempDir);

    impl Mesh {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (domain, life) = ("mesh.test".parse().unwrap(), Duration::from_secs(3600));
            Authority::init(dir.path(), &domain, life, clock::wall()).unwrap();
            Self(dir)
        }

        fn authority(&self) -> Authority {
            Authority::open(self.0.path(), clock::wall()).unwrap()
        }

        fn node(&self, name: &str) -> NodeIdentity {
            let (authority, now) = (self.authority(), clock::wall());
            let request = CertificateRequest::new().unwrap();
            let id = format!("spiffe://mesh.test/node/eu/{name}").parse().unwrap();
            let chain = authority.sign(&id, request.csr(), &[], now).unwrap();
            let roots = authority.roots();
            NodeIdentity::issued(self.0.path(), chain, request.into_key(), roots, now).unwrap()
        }

        fn trust(&self) -> Trust {
            let kept = self.0.path().join("kept.pb");
            Trust::new(Identity::new(self.node("a")), Some(kept))
        }

        /// The list after `name` was revoked.
        fn revoke(&self, name: &str) -> SignedRevocations {
            let id = format!("spiffe://mesh.test/node/eu/{name}").parse().unwrap();
            self.authority().revoke(&id, clock::wall()).unwrap();
            self.authority().revocations().clone()
        }
    }

    #[test]
    fn a_list_closes_the_connections_of_those_on_it_and_outlives_the_node() {
        let mesh = Mesh::new();
        let trust = mesh.trust();
        let (b, c) = (mesh.node("b"), mesh.node("c"));
        let lease = |node: &NodeIdentity| trust.lease_of(&node.server_cert().0);
        let (of_b, of_c) = (lease(&b), lease(&c));
        let now = clock::now();
        assert!(!of_b.is_over(now) && !of_c.is_over(now));
        assert_eq!(trust.connections(), 2);
        let mut told = trust.revocations();

        assert!(trust.adopt(mesh.revoke("b")).unwrap());
        assert!(of_b.is_over(now) && !of_c.is_over(now));
        assert!(lease(&b).is_over(now), "nor is there another");
        assert!(told.has_changed().unwrap() && told.borrow_and_update().is_some());
        drop((of_b, of_c));
        assert_eq!(trust.connections(), 0);
        assert!(mesh.trust().identity().revocations().revokes(b.id(), b.certificate().from));
    }

    #[test]
    fn only_a_newer_list_of_an_authority_of_ours_is_taken() {
        let mesh = Mesh::new();
        let trust = mesh.trust();
        let (older, newer) = (mesh.revoke("b"), mesh.revoke("c"));
        assert!(trust.adopt(newer.clone()).unwrap());
        assert!(!trust.adopt(older).unwrap() && !trust.adopt(newer).unwrap());
        assert_eq!(trust.identity().revocations().len(), 2);
    }

    #[test]
    fn a_list_of_another_authority_is_not_believed() {
        let (mesh, foreign) = (Mesh::new(), Mesh::new());
        let trust = mesh.trust();
        assert!(trust.adopt(foreign.revoke("a")).is_err());
        assert!(trust.identity().revocations().is_empty());
    }

    #[test]
    fn a_damaged_list_on_disk_stops_nobody() {
        let mesh = Mesh::new();
        std::fs::write(mesh.0.path().join("kept.pb"), [0xff; 100]).unwrap();
        assert!(mesh.trust().identity().revocations().is_empty());
    }

    #[test]
    fn strangers_are_all_counted_and_few_are_logged() {
        let trust = Mesh::new().trust();
        let remote = "192.0.2.1:1".parse().unwrap();
        let now = clock::now();
        let said = (0..1000).filter_map(|_| trust.may_say(now)).count();
        assert_eq!(said, 10);
        assert_eq!(trust.may_say(now + Duration::from_secs(1)), Some(990));
        trust.turned_away(Port::Gossip, remote, "no certificate");
        let counted: Vec<_> = trust.refused().map(|(_, count)| count).collect();
        assert_eq!(counted, [0, 1, 0]);
    }

    #[test]
    fn nothing_is_leased_to_whoever_showed_no_certificate() {
        assert!(Mesh::new().trust().lease_of(&[]).is_over(clock::now()));
    }
}
