//! The gossip port: nodes tell each other what they serve and how pressed they are.
//!
//! Whoever dials subscribes; whoever is dialled speaks. A node dials every peer it lists that has a gossip address, and
//! pushes its own figures to all who dialled it. Frames are those of `membership`; what they say lands on the [`Board`]
//! that routing reads, which is what will stay when nodes find each other by themselves.
//!
//! A node speaks only about itself: what a link says is put down to the peer whose certificate it carries. The list of
//! revocations is the exception, for it carries its authority's signature: either end hands it on when the other's is older.
//!
//! Whoever has no certificate yet may speak to a node that holds the authority, to get one, and to nobody else (`signer`).

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base::{Load, clock};
use bytes::Bytes;
use http::uri::Authority;
use identity::{Role, SignedRevocations, SpiffeId};
use membership::{Frame, Hello, PROTOCOL_VERSION, Reporter, WireError, decode, encode};
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use transport::{Incoming, Link, Links};

use crate::{
    catalog::Catalog,
    engines::Engine,
    peers::Board,
    signer::{Caller, Contact, Signer},
    throttle::Places,
    trust::{Lists, Port, Trust},
};

/// Nodes that may subscribe. Further ones are turned down.
const SUBSCRIBERS_MAX: usize = 128;
/// Handshakes in progress at most, and above how many the other end must first prove its address.
const HANDSHAKES_MAX: usize = 64;
const PROVE_ABOVE: usize = 16;
/// The first frames of a link must have come within this.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// A subscriber that has heard nothing for so long dials anew: the other end speaks once a second at the least.
const SILENT_AFTER: Duration = Duration::from_millis(3_500);
/// Strangers who may ask for a certificate at once, and as many nodes. Further ones are turned down.
const ENROLMENTS_MAX: usize = 32;
/// Of them, those of one address; and handshakes in progress of one.
const ENROLMENTS_OF_ONE: usize = 8;
const HANDSHAKES_OF_ONE: usize = 32;
/// Lists of revocations one link may hand on that this node cannot believe.
const DISBELIEVED_MAX: u32 = 4;
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
    pub(crate) trust: Arc<Trust>,
    /// Who answers those who want a certificate; `None`: they are not let in.
    pub(crate) enrolment: Option<Enrolment>,
    pub(crate) seed: u64,
}

/// The authority behind a gossip port.
#[derive(Clone, Debug)]
pub(crate) struct Enrolment {
    pub(crate) signer: Arc<Signer>,
    pub(crate) contact: Contact,
}

impl Gossip {
    /// Speaks and listens until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self { links, voice, board, subscriptions, trust, enrolment, seed } = self;
        let hello = Hello {
            trust_domain: voice.own.trust_domain.clone(),
            protocol: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            node: voice.own.name.clone(),
            region: voice.own.region.clone(),
            epoch: voice.epoch,
            revocations: 0,
            revocations_digest: 0,
            card: None,
        };
        let own = Own { hello: Arc::new(hello), trust };
        let mut listening = JoinSet::new();
        for subscription in subscriptions {
            let rng = StdRng::seed_from_u64(seed ^ subscription.index as u64);
            let (links, own, board) = (links.clone(), own.clone(), board.clone());
            listening.spawn(subscribe(subscription, links, own, board, rng));
        }
        tokio::select! {
            () = speak(&links, voice, own, enrolment) => {}
            () = stop.cancelled() => {}
        }
        listening.shutdown().await;
        links.close().await;
    }
}

/// What this end of a link says of itself and believes of the other. Cloneable.
#[derive(Clone, Debug)]
struct Own {
    hello: Arc<Hello>,
    trust: Arc<Trust>,
}

impl Own {
    /// The first frame of a link.
    fn hello(&self) -> Bytes {
        let identity = self.trust.identity();
        let revocations = identity.revocations().version();
        let revocations_digest = identity.revocations_digest();
        let hello = (*self.hello).clone();
        encode(&Frame::Hello(Hello { revocations, revocations_digest, ..hello })).into()
    }

    /// Hands our lists of revocations to the other end when it knows of others than we do, and every new one; ends with the
    /// link.
    async fn hand_on(&self, link: &Link, theirs: &Hello) -> Result<(), transport::TransportError> {
        let mut lists = self.trust.revocations();
        let ours = self.trust.identity().revocations_digest();
        let mut told: Lists = if theirs.revocations_digest == ours {
            lists.borrow().clone()
        } else {
            Lists::default()
        };
        lists.mark_changed();
        while lists.changed().await.is_ok() {
            let all = lists.borrow_and_update().clone();
            let is_new =
                |list: &&Arc<SignedRevocations>| !told.iter().any(|t| Arc::ptr_eq(t, list));
            for list in all.iter().filter(is_new) {
                let frame = Frame::Revocations(list.encode().to_vec());
                link.send_whole(encode(&frame).into()).await?;
            }
            told = all;
        }
        std::future::pending().await
    }

    /// The other end handed a list on. One that we cannot believe, for its root may be newer than ours, is left; whoever hands
    /// on several has something else in mind.
    fn take(&self, signed: &[u8], disbelieved: &mut u32) -> Result<(), String> {
        let signed = SignedRevocations::decode(signed).map_err(|error| error.to_string())?;
        let Err(error) = self.trust.adopt(signed) else { return Ok(()) };
        tracing::warn!(%error, "a list of revocations is not believed");
        *disbelieved += 1;
        if *disbelieved < DISBELIEVED_MAX { Ok(()) } else { Err(error.to_string()) }
    }
}

/// Serves those who dial: the figures of this node, pushed when they change and now and then.
async fn speak(links: &Links, voice: Voice, own: Own, enrolment: Option<Enrolment>) {
    let (said, saying) = watch::channel(Bytes::new());
    let speaker = Arc::new(Speaker {
        own,
        reporter: Mutex::new(Reporter::new(voice.epoch, voice.catalog.version())),
        audience: Audience::default(),
        enrolment,
        shaking: Places::new(HANDSHAKES_MAX, HANDSHAKES_OF_ONE),
        enrolling: Places::new(ENROLMENTS_MAX, ENROLMENTS_OF_ONE),
        turning_away: Places::new(ENROLMENTS_MAX, ENROLMENTS_MAX),
        renewing: Places::new(ENROLMENTS_MAX, ENROLMENTS_MAX),
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
            if subscribers.len() >= SUBSCRIBERS_MAX + HANDSHAKES_MAX + 3 * ENROLMENTS_MAX {
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
    own: Own,
    reporter: Mutex<Reporter>,
    audience: Audience,
    enrolment: Option<Enrolment>,
    /// Handshakes in progress.
    shaking: Places,
    /// Strangers who ask, those who have asked too often, and nodes that renew: none takes the others' places.
    enrolling: Places,
    turning_away: Places,
    renewing: Places,
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

/// Serves whoever dialled: a subscriber, until its link ends, or somebody who wants a certificate.
async fn serve(incoming: Incoming, speaker: Arc<Speaker>, saying: watch::Receiver<Bytes>) {
    let (trust, remote) = (&speaker.own.trust, incoming.remote());
    let link = {
        let Some(_place) = speaker.shaking.take(remote.ip()) else { return incoming.refuse() };
        match incoming.accept().await {
            Ok(link) => link,
            Err(error) if error.is_refusal => {
                return trust.turned_away(Port::Gossip, remote, &error.why);
            }
            Err(error) => return tracing::debug!(%error, %remote, "a gossip handshake failed"),
        }
    };
    if link.protocol() == identity::ENROL_ALPN {
        return enrol(&link, remote, &speaker).await;
    }
    let greeted = match greeted(&link, &speaker.own.hello.trust_domain).await {
        Ok(greeted) => greeted,
        Err(why) => {
            trust.turned_away(Port::Gossip, remote, &why);
            return link.close(&why);
        }
    };
    serve_subscriber(&link, &speaker, saying, greeted).await;
}

/// Serves one subscriber until its link ends.
async fn serve_subscriber(
    link: &Link,
    speaker: &Speaker,
    mut saying: watch::Receiver<Bytes>,
    (node, hello): (SpiffeId, Hello),
) {
    let Some(number) = speaker.audience.join(&node, link) else {
        tracing::warn!(%node, "a subscriber was turned down: there are {SUBSCRIBERS_MAX} already");
        return link.close("too many subscribers");
    };
    let lease = speaker.own.trust.lease_of(&link.certificates());
    saying.mark_unchanged();
    let speaking = async {
        let (mut told, descriptor) = speaker.descriptor();
        for frame in [descriptor, speaker.first_frame()] {
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
    // Before anything else is said, whoever says it.
    let greeting = link.send_whole(speaker.own.hello()).await;
    let handing_on = async {
        greeting?;
        speaker.own.hand_on(link, &hello).await
    };
    let why = tokio::select! {
        Err(error) = handing_on => error.to_string(),
        Err(error) = speaking => error.to_string(),
        why = hear_subscriber(link, &speaker.own) => why,
        () = lease.over() => "a certificate has ended".to_owned(),
        () = lease.withdrawn() => "its certificate was revoked".to_owned(),
    };
    tracing::debug!(why, %node, "a subscriber is gone");
    speaker.audience.leave(&node, number);
    link.close(&why);
}

/// A subscriber has nothing to say but lists of revocations; ends when its link does, or when it says something else.
async fn hear_subscriber(link: &Link, own: &Own) -> String {
    let mut disbelieved = 0;
    loop {
        let frame = match link.receive().await {
            Ok(frame) => frame,
            Err(error) => return error.to_string(),
        };
        match decode(&frame) {
            Ok(Frame::Revocations(signed)) => {
                if let Err(why) = own.take(&signed, &mut disbelieved) {
                    return why;
                }
            }
            // A newer node may say more.
            Err(WireError::Unknown) => {}
            Ok(_) => return "a subscriber speaks out of turn".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}

/// Serves somebody who wants a certificate. `remote` is where the handshake proved it to be.
async fn enrol(link: &Link, remote: SocketAddr, speaker: &Speaker) {
    let served = match &speaker.enrolment {
        Some(enrolment) => serve_enrolment(link, remote, speaker, enrolment).await,
        None => Err("this node holds no authority".to_owned()),
    };
    let Err(why) = served else { return link.close("done") };
    if link.certificates().is_empty() {
        speaker.own.trust.turned_away(Port::Gossip, remote, &why);
    } else {
        tracing::debug!(why, %remote, "a renewal came to nothing");
    }
    link.close(&why);
}

async fn serve_enrolment(
    link: &Link,
    remote: SocketAddr,
    speaker: &Speaker,
    Enrolment { signer, contact }: &Enrolment,
) -> Result<(), String> {
    let address = remote.ip().to_canonical();
    let who = signer.admit(&link.certificates(), address);
    let places = match who {
        Caller::Node => &speaker.renewing,
        Caller::Stranger => &speaker.enrolling,
        Caller::Limited => &speaker.turning_away,
    };
    let _place = places.take(address).ok_or_else(|| "too many enrolments at once".to_owned())?;
    signer.serve(link, address, who, contact).await
}

/// Who is at the other end: the hello must come first, and say what the certificate says.
async fn greeted(link: &Link, mesh: &base::TrustDomain) -> Result<(SpiffeId, Hello), String> {
    let certificates = link.certificates();
    // Where an authority listens, whoever has none gets so far.
    let node = identity::peer_id(&certificates).map_err(|error| error.to_string())?;
    if node.role != Role::Node || node.trust_domain != *mesh {
        return Err(format!("{node} is no node of {mesh}"));
    }
    let frame = tokio::time::timeout(HELLO_WITHIN, link.receive_whole()).await;
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
    own: Own,
    board: Arc<Board>,
    mut rng: StdRng,
) {
    let name = board.names().get(subscription.index).cloned();
    let peer = name.map(|name| name.node.to_string()).unwrap_or_default();
    let mut wait = REDIAL_FIRST;
    loop {
        match links.dial(&subscription.address, subscription.tls.clone()).await {
            Ok(link) => {
                let heard = listen(&link, &subscription, &own, &board).await;
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
    own: &Own,
    board: &Board,
) -> Result<String, String> {
    link.send_whole(own.hello()).await.map_err(|e| e.to_string())?;
    let (_, hello) = greeted(link, &own.hello.trust_domain).await?;
    board.greet(subscription.index, hello.epoch);
    let lease = own.trust.lease_of(&link.certificates());
    tokio::select! {
        heard = hear(link, subscription, &hello, own, board) => heard,
        Err(error) = own.hand_on(link, &hello) => Ok(error.to_string()),
        () = lease.over() => Err("a certificate has ended".to_owned()),
        // Another link takes its place before the certificates end.
        () = lease.old() => Ok("it is time for a newer certificate".to_owned()),
        () = lease.withdrawn() => Err("its certificate was revoked".to_owned()),
    }
}

/// Takes in what a peer says of itself.
async fn hear(
    link: &Link,
    subscription: &Subscription,
    hello: &Hello,
    own: &Own,
    board: &Board,
) -> Result<String, String> {
    let (mut heard, mut disbelieved) = (false, 0);
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
            Ok(Frame::Revocations(signed)) => own.take(&signed, &mut disbelieved)?,
            Ok(Frame::Load(_)) => return Err("a load frame of another epoch".to_owned()),
            Ok(Frame::Hello(_)) => return Err("a second hello".to_owned()),
            Ok(_) => {}
            // A newer node may say more.
            Err(WireError::Unknown) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use identity::{DevCa, ExpectedPeer, Identity};
    use membership::{Descriptor, LoadFrame, Presence};
    use transport::QuicKeys;

    use super::*;

    /// Long enough for a loaded machine; a test that waits so long has failed.
    const LONG: Duration = Duration::from_secs(20);

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn identity(&self, name: &str) -> Identity {
            let (mesh, now) = ("mesh.test".parse().unwrap(), clock::wall());
            let ca = DevCa::open_or_create(self.0.path(), &mesh, now).unwrap();
            Identity::new(
                ca.node(&"eu".parse().unwrap(), &name.parse().unwrap(), &[], now).unwrap(),
            )
        }
    }

    fn links(identity: &Identity) -> Links {
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
            revocations: 0,
            revocations_digest: 0,
            card: None,
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
            arrivals: vec![],
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
        let board = Board::of_test(&["b"]);
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
            let trust = Arc::new(Trust::new(a.clone(), None));
            let own = Own { hello: Arc::new(hello("a", 1)), trust };
            let heard = listen(&link, &subscription, &own, &board).await;
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
