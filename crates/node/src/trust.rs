//! Whom this node believes, for as long as connections live: leases by certificate, revocations, and the books of whom it
//! turned away.

use std::{
    any::Any,
    cmp::Reverse,
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use base::clock;
use identity::{Identity, IdentityError, RevocationError, SignedRevocations, SpiffeId};
use parking_lot::Mutex;
use prost::Message as _;
use proto::isobar::mesh::v1::KeptRevocations;
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use transport::{Lease, Lessor};

/// Lines of the log about whom was turned away, per second; what is beyond is counted, and said with the next line.
const LINES_PER_SECOND: u32 = 10;

/// What a node believes of the others. Shared by all its ports.
#[derive(Debug)]
pub(crate) struct Trust {
    identity: Identity,
    /// The lists as they are handed on, the newest first. Of two authorities each may have revoked somebody the other does not
    /// know of: until one of them has put both on one list, both lists go around.
    lists: watch::Sender<Lists>,
    /// Lists that others handed on, to be judged.
    offers: mpsc::Sender<Offer>,
    offered: Mutex<Option<mpsc::Receiver<Offer>>>,
    /// Where they are kept.
    kept: Option<PathBuf>,
    open: Arc<Mutex<Open>>,
    refused: [AtomicU64; Port::ALL.len()],
    lines: Mutex<Lines>,
}

/// Signed lists of revocations, each of which says something that the newer ones do not.
pub(crate) type Lists = Arc<[Arc<SignedRevocations>]>;

/// A list somebody handed on, and who waits for the verdict.
type Offer = (SignedRevocations, oneshot::Sender<Result<bool, RevocationError>>);

/// Lists that wait to be judged; whoever brings more waits.
const OFFERS_MAX: usize = 16;
/// Who hands a list on is not kept waiting for longer, for nothing else is heard of it meanwhile.
const JUDGED_WITHIN: Duration = Duration::from_millis(500);
/// The file of the lists, beside the node's identity.
pub(crate) const KEPT: &str = "revocations.pb";
/// Lists that go around at most; a mesh has a few authorities.
const LISTS_MAX: usize = 8;

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
    /// Begins with what is kept in `kept` from earlier. It was judged when it was stored, and whoever can write there can replace
    /// the identity too: that roots have changed since, or a clock is wrong, makes nobody welcome again.
    pub(crate) fn new(identity: Identity, kept: Option<PathBuf>) -> Self {
        let lists = kept.as_deref().map(|path| read(path, &identity)).unwrap_or_default();
        for list in &lists {
            identity.revoke(list.claimed(), clock::wall());
        }
        let (offers, offered) = mpsc::channel(OFFERS_MAX);
        Self {
            identity,
            lists: watch::Sender::new(lists.into()),
            offers,
            offered: Mutex::new(Some(offered)),
            kept,
            open: Arc::default(),
            refused: Default::default(),
            lines: Mutex::new(Lines { second: clock::now(), written: 0, left_out: 0 }),
        }
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The lists as they are handed on, and word of the next.
    pub(crate) fn revocations(&self) -> watch::Receiver<Lists> {
        self.lists.subscribe()
    }

    /// How many connections to nodes of the mesh are open.
    pub(crate) fn connections(&self) -> usize {
        self.open.lock().connections.len()
    }

    /// Whom each port turned away so far.
    pub(crate) fn refused(&self) -> impl Iterator<Item = (Port, u64)> {
        Port::ALL.into_iter().zip(&self.refused).map(|(p, n)| (p, n.load(Ordering::Relaxed)))
    }

    /// Has a list that came over a link judged by [`Self::judge_offers`]: whoever speaks with others does not verify signatures
    /// meanwhile. Returns whether it was taken.
    ///
    /// # Errors
    /// It is not signed by an authority of ours; nothing has changed.
    pub(crate) async fn offer(&self, signed: SignedRevocations) -> Result<bool, RevocationError> {
        if self.knows(&signed) {
            return Ok(false);
        }
        let (tell, verdict) = oneshot::channel();
        let judged = async {
            self.offers.send((signed, tell)).await.ok()?;
            verdict.await.ok()
        };
        // Otherwise it is judged when its turn comes, and nobody is blamed for it.
        tokio::time::timeout(JUDGED_WITHIN, judged).await.ok().flatten().unwrap_or(Ok(false))
    }

    /// Judges what is offered, one after the other, for ever.
    pub(crate) async fn judge_offers(&self) {
        let Some(mut offered) = self.offered.lock().take() else { return };
        while let Some((signed, tell)) = offered.recv().await {
            // Who offered it may be gone.
            drop(tell.send(self.adopt(signed)));
        }
    }

    /// Whether a list says nothing new.
    fn knows(&self, signed: &SignedRevocations) -> bool {
        let known = self.identity.revocations();
        signed.version() <= known.version() && known.covers(signed.claimed(), clock::wall())
    }

    /// Takes a list, if it says anything new; closes the connections of those on it. Returns whether it did.
    ///
    /// # Errors
    /// It is not signed by an authority of ours; nothing has changed.
    pub(crate) fn adopt(&self, signed: SignedRevocations) -> Result<bool, RevocationError> {
        if self.knows(&signed) {
            return Ok(false);
        }
        let now = clock::wall();
        let current = self.identity.current();
        let list = signed.verify(current.roots(), &self.identity.id().trust_domain, now)?;
        tracing::info!(version = list.version(), members = list.len(), "a list of revocations");
        self.identity.revoke(&list, now);
        self.withdraw();
        self.lists.send_modify(|lists| *lists = with(lists, signed, now));
        Ok(true)
    }

    /// Keeps the lists on disk, beside everything else: whoever is on one must not wait for a disk.
    pub(crate) async fn keep_lists(&self) {
        let Some(path) = self.kept.clone() else { return };
        let mut lists = self.revocations();
        // What came before this began.
        if !lists.borrow().is_empty() {
            lists.mark_changed();
        }
        while lists.changed().await.is_ok() {
            let kept = KeptRevocations {
                lists: lists.borrow_and_update().iter().map(|l| l.encode().to_vec()).collect(),
            };
            let path = path.clone();
            let writing = move || identity::write_file(&path, &kept.encode_to_vec());
            match tokio::task::spawn_blocking(writing).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::error!(%error, "revocations cannot be kept: they are forgotten when the node stops");
                }
                Err(error) => tracing::error!(%error, "revocations cannot be kept"),
            }
        }
    }

    /// Ends the connections of everybody who is not believed any more.
    fn withdraw(&self) {
        let list = self.identity.revocations();
        for held in self.open.lock().connections.values() {
            if !held.withdrawn.is_cancelled() && list.revokes(&held.peer, held.issued) {
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

/// Keeps a list in `dir`, the directory of a node's identity, for a node that starts there.
///
/// # Errors
/// The file cannot be written.
pub fn keep_revocations(dir: &Path, list: &SignedRevocations) -> Result<(), IdentityError> {
    let kept = KeptRevocations { lists: vec![list.encode().to_vec()] };
    identity::write_file(&dir.join(KEPT), &kept.encode_to_vec())
}

/// The lists kept in `dir`, the directory of a node's identity; what cannot be read is left out.
#[must_use]
pub fn kept_revocations(dir: &Path) -> Vec<SignedRevocations> {
    let bytes = std::fs::read(dir.join(KEPT)).unwrap_or_default();
    let kept = KeptRevocations::decode(bytes.as_slice()).unwrap_or_default();
    kept.lists.iter().filter_map(|list| SignedRevocations::decode(list).ok()).collect()
}

/// The lists with one more: those the newest says everything of are left out.
fn with(lists: &Lists, one: SignedRevocations, now: SystemTime) -> Lists {
    let mut all: Vec<_> = lists.iter().cloned().chain([Arc::new(one)]).collect();
    all.sort_by_key(|list| Reverse(list.version()));
    let mut needed: Vec<Arc<SignedRevocations>> = Vec::new();
    for list in all {
        if !needed.iter().any(|newer| newer.claimed().covers(list.claimed(), now)) {
            needed.push(list);
        }
    }
    if needed.len() > LISTS_MAX {
        tracing::warn!(
            "more than {LISTS_MAX} lists of revocations go around: the oldest is handed on no more"
        );
        needed.truncate(LISTS_MAX);
    }
    needed.into()
}

/// The lists a file holds, for this mesh.
fn read(path: &Path, identity: &Identity) -> Vec<Arc<SignedRevocations>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::error!(%error, path = %path.display(), "the kept revocations cannot be read: nobody is revoked until a peer says so");
            return Vec::new();
        }
    };
    let kept = KeptRevocations::decode(bytes.as_slice()).unwrap_or_default();
    let lists = kept.lists.iter().take(LISTS_MAX).map(|list| SignedRevocations::decode(list));
    let (good, bad): (Vec<_>, Vec<_>) = lists.partition(Result::is_ok);
    if !bad.is_empty() || good.is_empty() {
        tracing::error!(path = %path.display(), "the kept revocations are damaged: what they said is unknown until a peer says so");
    }
    let of_ours = |list: &SignedRevocations| *list.trust_domain() == identity.id().trust_domain;
    good.into_iter().flatten().filter(of_ours).map(Arc::new).collect()
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

/// The ports for clients: whoever calls may do so until the certificate that is shown there ends.
#[derive(Debug)]
pub(crate) struct ClientGate(pub(crate) Identity);

impl Lessor for ClientGate {
    fn lease(&self, _: &[CertificateDer<'static>]) -> Lease {
        let until = self.0.current().certificate().until;
        let left = until.duration_since(clock::wall()).unwrap_or_default();
        Lease::limited(clock::now(), left, CancellationToken::new(), Arc::new(()))
    }

    fn refused(&self, remote: SocketAddr, why: &str) {
        tracing::debug!(%remote, why, "a client was turned away");
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
    fn a_list_closes_the_connections_of_those_on_it() {
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
        assert!(of_b.is_withdrawn() && !of_c.is_withdrawn());
        assert!(lease(&b).is_withdrawn(), "nor is there another");
        assert!(told.has_changed().unwrap());
        assert_eq!(told.borrow_and_update().len(), 1);
        drop((of_b, of_c));
        assert_eq!(trust.connections(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_hands_a_list_on_does_not_judge_it_and_does_not_wait_for_long() {
        let mesh = Mesh::new();
        let trust = mesh.trust();
        let (older, newer) = (mesh.revoke("b"), mesh.revoke("c"));
        assert!(!trust.offer(older).await.unwrap(), "nobody judges yet");
        assert!(trust.identity().revocations().is_empty());
        let offering = async { (trust.offer(newer.clone()).await, trust.offer(newer).await) };
        let (first, again) = tokio::select! {
            () = trust.judge_offers() => panic!("it judges for ever"),
            told = offering => told,
        };
        assert!(first.unwrap() && !again.unwrap());
        assert_eq!(trust.identity().revocations().len(), 2);
    }

    #[tokio::test]
    async fn lists_outlive_the_node() {
        let mesh = Mesh::new();
        let trust = mesh.trust();
        let b = mesh.node("b");
        let kept = mesh.0.path().join("kept.pb");
        let working = async {
            trust.adopt(mesh.revoke("b")).unwrap();
            while !kept.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = trust.keep_lists() => panic!("it keeps them for ever"),
            done = tokio::time::timeout(Duration::from_secs(20), working) => done.unwrap(),
        }
        let again = mesh.trust();
        assert!(again.identity().revocations().revokes(b.id(), b.certificate().from));
        assert_eq!(again.revocations().borrow().len(), 1, "and it hands them on");
    }

    #[test]
    fn what_one_authority_revoked_is_not_forgotten_for_the_list_of_another() {
        let mesh = Mesh::new();
        let copy = tempfile::tempdir().unwrap();
        let from = mesh.0.path().join("authority");
        let to = copy.path().join("authority");
        std::fs::create_dir(&to).unwrap();
        for file in ["issuer.pem", "issuer.key", "roots.pem", "authority.toml"] {
            std::fs::copy(from.join(file), to.join(file)).unwrap();
        }
        std::fs::create_dir(to.join("tokens")).unwrap();
        let trust = mesh.trust();
        trust.adopt(mesh.revoke("b")).unwrap();
        let other = Mesh(copy);
        trust.adopt(other.revoke("c")).unwrap();
        assert_eq!(trust.identity().revocations().len(), 2);
        assert_eq!(trust.revocations().borrow().len(), 2, "both go around");
        let digest = trust.identity().revocations_digest();

        // One of the authorities learns of the other's, and one list is enough.
        let all = trust.identity().revocations();
        mesh.authority().adopt(&all, clock::wall()).unwrap();
        trust.adopt(mesh.authority().revocations().clone()).unwrap();
        assert_eq!(trust.revocations().borrow().len(), 1);
        assert_eq!(trust.identity().revocations_digest(), digest);
    }

    #[test]
    fn only_a_newer_list_of_an_authority_of_ours_is_taken() {
        let mesh = Mesh::new();
        let trust = mesh.trust();
        let (older, newer) = (mesh.revoke("b"), mesh.revoke("c"));
        assert!(trust.adopt(newer.clone()).unwrap());
        assert!(!trust.adopt(older).unwrap() && !trust.adopt(newer).unwrap());
        assert_eq!(trust.revocations().borrow().len(), 1);
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
