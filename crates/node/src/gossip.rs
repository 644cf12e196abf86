//! The gossip port: nodes tell each other what they serve and how pressed they are.
//!
//! Whoever dials subscribes; whoever is dialled speaks. A node dials every peer it lists that has a gossip address, and
//! pushes its own figures to all who dialled it. Frames are those of `membership`; what they say lands on the [`Board`]
//! that routing reads, which is what will stay when nodes find each other by themselves.
//!
//! A node speaks only about itself: what a link says is put down to the peer whose certificate it carries.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base::{Load, clock};
use bytes::Bytes;
use http::uri::Authority;
use identity::{Role, SpiffeId};
use membership::{Frame, Hello, PROTOCOL_VERSION, Reporter, WireError, decode, encode};
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use transport::{Incoming, Link, Links};

use crate::{catalog::Catalog, engines::Engine, peers::Board};

/// Nodes that may subscribe. Further ones are turned down.
const SUBSCRIBERS_MAX: usize = 128;
/// Handshakes in progress at most, and above how many the other end must first prove its address.
const HANDSHAKES_MAX: usize = 64;
const PROVE_ABOVE: usize = 16;
/// The first frames of a link must have come within this.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// A subscriber that has heard nothing for so long dials anew: the other end speaks once a second at the least.
const SILENT_AFTER: Duration = Duration::from_millis(3_500);
/// Waits between dials, doubling.
const REDIAL_FIRST: Duration = Duration::from_millis(100);
const REDIAL_MAX: Duration = Duration::from_secs(2);

/// What this node says of itself.
#[derive(Debug)]
pub(crate) struct Voice {
    pub(crate) own: SpiffeId,
    pub(crate) catalog: Arc<Catalog>,
    /// The process: greater after each start.
    pub(crate) epoch: u64,
    pub(crate) engines: Arc<[Arc<Engine>]>,
    pub(crate) draining: Arc<AtomicBool>,
}

/// A peer to subscribe to.
#[derive(Debug)]
pub(crate) struct Subscription {
    /// Its place on the board.
    pub(crate) index: usize,
    pub(crate) address: Authority,
    pub(crate) tls: rustls::ClientConfig,
}

/// The gossip port of a node.
#[derive(Debug)]
pub(crate) struct Gossip {
    pub(crate) links: Links,
    pub(crate) voice: Voice,
    pub(crate) board: Arc<Board>,
    pub(crate) subscriptions: Vec<Subscription>,
    pub(crate) seed: u64,
}

impl Gossip {
    /// Speaks and listens until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self { links, voice, board, subscriptions, seed } = self;
        let hello = Arc::new(Hello {
            trust_domain: voice.own.trust_domain.clone(),
            protocol: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            node: voice.own.name.clone(),
            region: voice.own.region.clone(),
            epoch: voice.epoch,
        });
        let mut listening = JoinSet::new();
        for subscription in subscriptions {
            let rng = StdRng::seed_from_u64(seed ^ subscription.index as u64);
            let (links, hello, board) = (links.clone(), hello.clone(), board.clone());
            listening.spawn(subscribe(subscription, links, hello, board, rng));
        }
        tokio::select! {
            () = speak(&links, voice, &hello) => {}
            () = stop.cancelled() => {}
        }
        listening.shutdown().await;
        links.close().await;
    }
}

/// Serves those who dial: the figures of this node, pushed when they change and now and then.
async fn speak(links: &Links, voice: Voice, hello: &Hello) {
    let (said, saying) = watch::channel(Bytes::new());
    let speaker = Arc::new(Speaker {
        hello: encode(&Frame::Hello(hello.clone())).into(),
        trust_domain: hello.trust_domain.clone(),
        reporter: Mutex::new(Reporter::new(voice.epoch, voice.catalog.version())),
        audience: Audience::default(),
        voice,
    });
    let accepting = async {
        let mut subscribers = JoinSet::new();
        loop {
            let incoming = tokio::select! {
                incoming = links.accept() => incoming,
                Some(_) = subscribers.join_next() => continue,
            };
            let Some(incoming) = incoming else { return };
            if subscribers.len() >= SUBSCRIBERS_MAX + HANDSHAKES_MAX {
                incoming.refuse();
                continue;
            }
            // Who makes up addresses takes no place from those who have one.
            let under_way = subscribers.len().saturating_sub(speaker.audience.len());
            let incoming = if under_way >= PROVE_ABOVE {
                let Some(proved) = incoming.proved() else { continue };
                proved
            } else {
                incoming
            };
            subscribers.spawn(serve(incoming, speaker.clone(), saying.clone()));
        }
    };
    let reporting = async {
        loop {
            while speaker.audience.is_empty() {
                speaker.audience.came.notified().await;
            }
            let interval = speaker.reporter.lock().interval();
            tokio::time::sleep(interval).await;
            if let Some(frame) = speaker.frame() {
                said.send_replace(frame);
            }
        }
    };
    tokio::select! {
        () = accepting => {}
        () = reporting => {}
    }
}

/// What subscribers are told.
#[derive(Debug)]
struct Speaker {
    hello: Bytes,
    trust_domain: base::TrustDomain,
    reporter: Mutex<Reporter>,
    audience: Audience,
    voice: Voice,
}

impl Speaker {
    /// What this node serves, and its version.
    fn descriptor(&self) -> (u32, Bytes) {
        let descriptor = self.voice.catalog.descriptor();
        (descriptor.version, encode(&Frame::Descriptor(descriptor)).into())
    }

    /// The figures, when it is time to say them.
    fn frame(&self) -> Option<Bytes> {
        let mut reporter = self.reporter.lock();
        reporter.describes(self.voice.catalog.version());
        let frame = reporter.frame(clock::now(), &self.loads(), self.draining());
        frame.map(|frame| encode(&Frame::Load(frame)).into())
    }

    /// The figures, for one who has just come and was told what they are of.
    fn first_frame(&self) -> Bytes {
        let mut reporter = self.reporter.lock();
        reporter.describes(self.voice.catalog.version());
        let frame = reporter.first_frame(&self.loads(), self.draining());
        encode(&Frame::Load(frame)).into()
    }

    fn loads(&self) -> Vec<Load> {
        self.voice.engines.iter().map(|engine| engine.load()).collect()
    }

    fn draining(&self) -> bool {
        self.voice.draining.load(Ordering::Relaxed)
    }
}

/// Who subscribes: one link per node, the newest.
#[derive(Debug, Default)]
struct Audience {
    links: Mutex<HashMap<String, (u64, Link)>>,
    came: Notify,
}

impl Audience {
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn len(&self) -> usize {
        self.links.lock().len()
    }

    /// Takes a subscriber in; `None`: there are too many. A node that dials anew replaces its older link.
    fn join(&self, node: &SpiffeId, link: &Link) -> Option<u64> {
        let mut links = self.links.lock();
        let node = node.to_string();
        if links.len() >= SUBSCRIBERS_MAX && !links.contains_key(&node) {
            return None;
        }
        let number = links.get(&node).map_or(1, |(number, _)| number + 1);
        if let Some((_, older)) = links.insert(node, (number, link.clone())) {
            older.close("replaced by a newer link");
        }
        self.came.notify_one();
        Some(number)
    }

    fn leave(&self, node: &SpiffeId, number: u64) {
        let mut links = self.links.lock();
        let node = node.to_string();
        if links.get(&node).is_some_and(|(newest, _)| *newest == number) {
            links.remove(&node);
        }
    }
}

/// Serves one subscriber until its link ends.
async fn serve(incoming: Incoming, speaker: Arc<Speaker>, mut saying: watch::Receiver<Bytes>) {
    let link = match incoming.accept().await {
        Ok(link) => link,
        Err(error) => return tracing::debug!(%error, "a gossip handshake failed"),
    };
    let node = match greeted(&link, &speaker.trust_domain).await {
        Ok((node, _)) => node,
        Err(why) => {
            tracing::warn!(remote = %link.remote(), why, "a subscriber was turned down");
            return link.close(&why);
        }
    };
    let Some(number) = speaker.audience.join(&node, &link) else {
        tracing::warn!(%node, "a subscriber was turned down: there are {SUBSCRIBERS_MAX} already");
        return link.close("too many subscribers");
    };
    saying.mark_unchanged();
    let speaking = async {
        let (mut told, descriptor) = speaker.descriptor();
        for frame in [speaker.hello.clone(), descriptor, speaker.first_frame()] {
            link.send_whole(frame).await?;
        }
        while saying.changed().await.is_ok() {
            let frame = saying.borrow_and_update().clone();
            if told != speaker.voice.catalog.version() {
                let (version, descriptor) = speaker.descriptor();
                link.send_whole(descriptor).await?;
                told = version;
            }
            link.send(frame).await?;
        }
        Ok::<_, transport::TransportError>(())
    };
    tokio::select! {
        spoken = speaking => {
            if let Err(error) = spoken {
                tracing::debug!(%error, %node, "a subscriber is gone");
            }
        }
        reason = link.closed() => tracing::debug!(reason, %node, "a subscriber is gone"),
    }
    speaker.audience.leave(&node, number);
    link.close("done");
}

/// Who is at the other end: the hello must come first, and say what the certificate says.
async fn greeted(link: &Link, mesh: &base::TrustDomain) -> Result<(SpiffeId, Hello), String> {
    let certificates = link.certificates();
    let node = identity::peer_id(&certificates).map_err(|error| error.to_string())?;
    if node.role != Role::Node || node.trust_domain != *mesh {
        return Err(format!("{node} is no node of {mesh}"));
    }
    let frame = tokio::time::timeout(HELLO_WITHIN, link.receive()).await;
    let frame = frame.map_err(|_| "no hello in time".to_owned())?.map_err(|e| e.to_string())?;
    let hello = match decode(&frame) {
        Ok(Frame::Hello(hello)) => hello,
        Ok(_) => return Err("the first frame is no hello".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    if (&hello.node, &hello.region, &hello.trust_domain) != (&node.name, &node.region, mesh) {
        return Err(format!("{node} says that it is {} of {}", hello.node, hello.region));
    }
    match hello.version() {
        Some(_) => Ok((node, hello)),
        None => Err(format!("no common protocol version: {:?} there", hello.protocol)),
    }
}

/// Subscribes to one peer, again and again.
async fn subscribe(
    subscription: Subscription,
    links: Links,
    hello: Arc<Hello>,
    board: Arc<Board>,
    mut rng: StdRng,
) {
    let name = board.names().get(subscription.index).cloned();
    let peer = name.map(|name| name.node.to_string()).unwrap_or_default();
    let mut wait = REDIAL_FIRST;
    loop {
        match links.dial(&subscription.address, subscription.tls.clone()).await {
            Ok(link) => {
                let heard = listen(&link, &subscription, &hello, &board).await;
                link.close("done");
                match heard {
                    // It spoke: what ended the link is news, and the next dial comes soon.
                    Ok(why) => {
                        tracing::info!(peer, why, "a peer's gossip link ended");
                        wait = REDIAL_FIRST;
                    }
                    Err(why) => tracing::warn!(peer, why, "a peer's gossip cannot be used"),
                }
            }
            Err(error) => tracing::debug!(peer, %error, "a peer's gossip port does not answer"),
        }
        tokio::time::sleep(wait.mul_f64(rng.random_range(0.8..1.2))).await;
        wait = (wait * 2).min(REDIAL_MAX);
    }
}

/// Listens to one link until it ends; `Ok` when it was good until then.
async fn listen(
    link: &Link,
    subscription: &Subscription,
    own: &Hello,
    board: &Board,
) -> Result<String, String> {
    link.send_whole(encode(&Frame::Hello(own.clone())).into()).await.map_err(|e| e.to_string())?;
    let (_, hello) = greeted(link, &own.trust_domain).await?;
    board.greet(subscription.index, hello.epoch);
    let mut heard = false;
    loop {
        let frame = match tokio::time::timeout(SILENT_AFTER, link.receive()).await {
            Ok(Ok(frame)) => frame,
            // A link that never worked is not dialled again and again at once.
            Ok(Err(error)) if heard => return Ok(error.to_string()),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Ok(format!("nothing heard for {SILENT_AFTER:?}")),
        };
        match decode(&frame) {
            Ok(Frame::Descriptor(descriptor)) => {
                board.describe(subscription.index, hello.epoch, descriptor);
            }
            Ok(Frame::Load(load)) if load.epoch == hello.epoch => {
                board.frame(subscription.index, &load, link.rtt());
                heard = true;
            }
            Ok(Frame::Load(_)) => return Err("a load frame of another epoch".to_owned()),
            Ok(Frame::Hello(_)) => return Err("a second hello".to_owned()),
            // A newer node may say more.
            Err(WireError::Unknown) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use identity::{DevCa, ExpectedPeer, NodeIdentity};
    use membership::{Descriptor, LoadFrame, Presence};
    use transport::QuicKeys;

    use super::*;
    use crate::peers::PeerName;

    /// Long enough for a loaded machine; a test that waits so long has failed.
    const LONG: Duration = Duration::from_secs(20);

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn identity(&self, name: &str) -> NodeIdentity {
            let (mesh, now) = ("mesh.test".parse().unwrap(), clock::wall());
            let ca = DevCa::open_or_create(self.0.path(), &mesh, now).unwrap();
            ca.node(&"eu".parse().unwrap(), &name.parse().unwrap(), &[], now).unwrap()
        }
    }

    fn links(identity: &NodeIdentity) -> Links {
        let tls = identity.peer_server_config(&[]).unwrap();
        Links::bind("127.0.0.1:0".parse().unwrap(), tls, &QuicKeys::random()).unwrap()
    }

    fn hello(node: &str, epoch: u64) -> Hello {
        Hello {
            trust_domain: "mesh.test".parse().unwrap(),
            protocol: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            node: node.parse().unwrap(),
            region: "eu".parse().unwrap(),
            epoch,
        }
    }

    fn load(epoch: u64, sequence: u64) -> Frame {
        Frame::Load(LoadFrame {
            epoch,
            sequence,
            descriptor_version: 1,
            sample_age: Duration::ZERO,
            next: Duration::from_millis(200),
            draining: false,
            engines: vec![],
        })
    }

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        tokio::time::timeout(LONG, future).await.expect("it takes too long")
    }

    /// What node a makes of what peer b, whose certificate is good, says.
    async fn heard(frames: Vec<Vec<u8>>) -> (Result<String, String>, Presence) {
        let dir = Dir::new();
        let (a, b) = (dir.identity("a"), dir.identity("b"));
        let (a_links, b_links) = (links(&a), links(&b));
        let address = b_links.address().unwrap().to_string().parse().unwrap();
        let expect = ExpectedPeer { region: "eu".parse().unwrap(), name: "b".parse().unwrap() };
        let subscription =
            Subscription { index: 0, address, tls: a.peer_client_config(&[], expect).unwrap() };
        let name = PeerName { node: "b".parse().unwrap(), region: "eu".parse().unwrap() };
        let board = Board::new(vec![name]);
        let speaking = async {
            let link = b_links.accept().await.unwrap().accept().await.unwrap();
            for frame in frames {
                // The other end may have had enough already.
                drop(link.send_whole(frame.into()).await);
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            link.close("done");
        };
        let listening = async {
            let link = a_links.dial(&subscription.address, subscription.tls.clone()).await.unwrap();
            let heard = listen(&link, &subscription, &hello("a", 1), &board).await;
            link.close("done");
            heard
        };
        let (heard, ()) = soon(async { tokio::join!(listening, speaking) }).await;
        let presence = board.presence(0);
        (heard, presence)
    }

    fn frame(frame: Frame) -> Vec<u8> {
        encode(&frame)
    }

    #[tokio::test]
    async fn a_peer_that_says_hello_and_its_load_is_present() {
        let (heard, presence) = heard(vec![
            frame(Frame::Hello(hello("b", 7))),
            frame(Frame::Descriptor(Descriptor { version: 1, engines: vec![] })),
            frame(load(7, 1)),
        ])
        .await;
        assert!(heard.is_ok(), "{heard:?}");
        assert_eq!(presence, Presence::Present);
    }

    #[tokio::test]
    async fn a_peer_that_speaks_for_another_or_out_of_turn_is_not_believed() {
        let good = || frame(Frame::Hello(hello("b", 7)));
        for (frames, why) in [
            (vec![frame(Frame::Hello(hello("c", 7))), frame(load(7, 1))], "says that it is c"),
            (vec![frame(load(7, 1))], "no hello"),
            (vec![good(), good()], "second hello"),
            (vec![good(), frame(load(8, 1))], "another epoch"),
            (vec![good(), vec![0xff; 100]], "not a frame"),
            (vec![good(), vec![0; 200_000]], ""),
        ] {
            let (heard, presence) = heard(frames).await;
            let said = heard.expect_err(why);
            assert!(said.contains(why), "{said}");
            assert_eq!(presence, Presence::Unknown, "{why}");
        }
    }

    #[tokio::test]
    async fn whoever_is_no_node_of_the_mesh_is_not_let_in() {
        let (ours, theirs) = (Dir::new(), Dir::new());
        let a = links(&ours.identity("a"));
        let stranger = theirs.identity("b");
        let expect = ExpectedPeer { region: "eu".parse().unwrap(), name: "a".parse().unwrap() };
        let tls = stranger.peer_client_config(&[], expect).unwrap();
        let address = a.address().unwrap().to_string().parse().unwrap();
        let accepting = async { a.accept().await.unwrap().accept().await.map(drop) };
        let dialler = links(&stranger);
        let dialling = dialler.dial(&address, tls);
        let (accepted, dialled) = soon(async { tokio::join!(accepting, dialling) }).await;
        assert!(accepted.is_err() && dialled.is_err());
    }
}
