//! One link: the hellos at its beginning, frames both ways while it lives, the lists of revocations beside them, and its end.
//!
//! ```text
//!                 ┌──────────────── link ────────────────┐
//!  machine ──> datagrams, bounded: dropped when full ──> other end
//!          ──> streams, bounded: the link ends when full ──>
//!  machine <── frames ──────────────────────────────────── other end
//!              revocations are taken in here
//! ```
//!
//! A link is leased: at half of what is left of either certificate the end that dialled makes another, which takes its place
//! before this one ends. One that is replaced, or is not needed, is heard for a moment longer: what is on its way arrives.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use identity::{Role, SignedRevocations, SpiffeId};
use membership::{Frame, Hello, NodeId, Peer, Transport, Way, decode, encode};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use transport::{Lease, Link, LinkTransport, TransportError};

use crate::trust::{Lists, Trust};

use super::{dial::Dial, judge};

/// The first frame of a link must have come within this.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// An earlier process is given so long to hear that there is a later one.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// Why the link with it ends.
pub(super) const SUPERSEDED: &str = "a later process of this node is linked";
/// Frames that wait to leave: those that may be lost, and those that may not.
const DATAGRAMS_MAX: usize = 256;
const STREAMS_MAX: usize = 512;
/// Bytes of the latter.
const STREAM_BYTES_MAX: usize = 8 << 20;
/// Lists of revocations one link may hand on that this node cannot believe.
const DISBELIEVED_MAX: u32 = 4;
/// What begins a frame of revocations: field 4, with a length.
const REVOCATIONS: u8 = 0x22;
/// What waits to leave when a link is to end leaves within this.
const FLUSHED_WITHIN: Duration = Duration::from_secs(1);
/// Waits between dials for a link in the place of one that is old, doubling.
const REDIAL_FIRST: Duration = Duration::from_secs(1);
const REDIAL_MAX: Duration = Duration::from_secs(30);
/// A link over TCP is to go over QUIC as soon as UDP comes through: it is tried after this, and then so often.
const TO_QUIC_FIRST: Duration = Duration::from_secs(5);
const TO_QUIC_EVERY: Duration = Duration::from_secs(30);

/// What a link tells whoever owns the machine.
#[derive(Debug)]
pub(super) enum News {
    /// Both ends have said hello, or the one that dialled; the answer is awaited.
    Up(Box<Up>),
    /// A dial came to nothing.
    DialFailed { dial: Dial, why: String, is_self: bool },
    /// A frame came from this process.
    Frame { epoch: u64, from: NodeId, bytes: Bytes, rtt: Duration },
    /// What came from this node was no frame that a node sends; its link ends, or came to nothing.
    Broke { peer: Peer, why: String },
    /// Link `number` is gone.
    Ended { number: u64, id: NodeId, why: String },
    /// The lease of link `number` is half over, and this end dialled it; or `to_quic`, it goes over TCP and QUIC may work by now.
    Old { number: u64, id: NodeId, to_quic: bool },
    /// Another process has this node's certificate; whom it dialled tells it of itself.
    Twin { epoch: u64, answer: Option<oneshot::Sender<Hello>> },
}

/// A link on which both ends have said hello, or the dialling one has.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) peer: Peer,
    pub(super) hello: Hello,
    pub(super) transport: Transport,
    /// What was dialled; `None`: the other end did.
    pub(super) dialled: Option<Dial>,
    /// Whether it is taken, and by what it is driven.
    pub(super) answer: oneshot::Sender<Answer>,
}

/// What becomes of a link.
#[derive(Debug)]
pub(super) enum Answer {
    /// It is the one.
    Taken(Box<Taken>),
    /// It is not needed; why.
    Not(String),
    /// It is not needed, for there is a later process of that node: this frame says so. Before it goes this node's hello, for a
    /// link that the other end dialled.
    Superseded { hello: Box<Hello>, frame: Bytes },
}

/// How a link is driven.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) number: u64,
    /// This node's hello, for a link that the other end dialled.
    pub(super) hello: Hello,
    outlet: Outlet,
}

/// Frames on their way to one link's task.
#[derive(Debug)]
struct Outlet {
    datagrams: mpsc::Receiver<Bytes>,
    streams: mpsc::Receiver<Bytes>,
    waiting_bytes: Arc<AtomicUsize>,
    ending: oneshot::Receiver<Ending>,
}

/// How a link ends when this end wants it to.
#[derive(Debug)]
struct Ending {
    why: String,
    /// How long the other end is heard yet, once everything has left.
    linger: Duration,
}

/// The near end of a link, as the owner of the machine holds it.
#[derive(Debug)]
pub(super) struct Reins {
    datagrams: mpsc::Sender<Bytes>,
    streams: mpsc::Sender<Bytes>,
    waiting_bytes: Arc<AtomicUsize>,
    ending: oneshot::Sender<Ending>,
}

impl Reins {
    /// Both ends of what drives link `number`.
    pub(super) fn new(number: u64, hello: Hello) -> (Self, Taken) {
        let (datagrams, to_datagrams) = mpsc::channel(DATAGRAMS_MAX);
        let (streams, to_streams) = mpsc::channel(STREAMS_MAX);
        let (ending, to_ending) = oneshot::channel();
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let outlet = Outlet {
            datagrams: to_datagrams,
            streams: to_streams,
            waiting_bytes: waiting_bytes.clone(),
            ending: to_ending,
        };
        (Self { datagrams, streams, waiting_bytes, ending }, Taken { number, hello, outlet })
    }

    /// Sends a frame; `false`: it must arrive, and there is no room for it.
    pub(super) fn send(&self, bytes: Bytes, way: Way) -> bool {
        match way {
            Way::Datagram => {
                // One that finds no room is lost, as it may be on the way.
                drop(self.datagrams.try_send(bytes));
                true
            }
            Way::Stream => {
                let length = bytes.len();
                let waiting = self.waiting_bytes.fetch_add(length, Ordering::Relaxed);
                waiting + length <= STREAM_BYTES_MAX && self.streams.try_send(bytes).is_ok()
            }
        }
    }

    /// Whether the link's task is gone.
    pub(super) fn is_closed(&self) -> bool {
        self.datagrams.is_closed()
    }

    /// Ends the link once everything has left, after `linger`.
    pub(super) fn end(self, why: impl Into<String>, linger: Duration) {
        // Whoever hears this no more has ended already.
        drop(self.ending.send(Ending { why: why.into(), linger }));
    }
}

/// What this end of every link says of itself and believes of the others. Cloneable.
#[derive(Clone, Debug)]
pub(super) struct Common {
    pub(super) trust: Arc<Trust>,
    /// This process.
    pub(super) epoch: u64,
    pub(super) news: mpsc::Sender<News>,
}

impl Common {
    /// This node, as others see it.
    pub(super) fn own(&self) -> &SpiffeId {
        self.trust.identity().id()
    }

    /// The first frame of a link.
    pub(super) fn first(&self, hello: Hello) -> Bytes {
        let identity = self.trust.identity();
        let revocations = identity.revocations().version();
        let revocations_digest = identity.revocations_digest();
        encode(&Frame::Hello(Hello { revocations, revocations_digest, ..hello })).into()
    }

    /// Who is at the other end: its hello must come first, and say what the certificate says.
    pub(super) async fn greeted(&self, link: &Link) -> Result<(Peer, Hello), String> {
        let mesh = &self.own().trust_domain;
        // Where an authority listens, whoever has no certificate gets so far.
        let node = identity::peer_id(&link.certificates()).map_err(|error| error.to_string())?;
        if node.role != Role::Node || node.trust_domain != *mesh {
            return Err(format!("{node} is no node of {mesh}"));
        }
        let frame = tokio::time::timeout(HELLO_WITHIN, link.receive_whole()).await;
        let frame = match frame.map_err(|_| "no hello in time".to_owned())? {
            Ok(frame) => frame,
            Err(error) => return Err(self.told(judge::peer(&node), error).await),
        };
        let hello = match decode(&frame) {
            Ok(Frame::Hello(hello)) => hello,
            Ok(_) => return Err("the first frame is no hello".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        if (&hello.node, &hello.region, &hello.trust_domain) != (&node.name, &node.region, mesh) {
            return Err(format!("{node} says that it is {} of {}", hello.node, hello.region));
        }
        match hello.version() {
            Some(_) => Ok((judge::peer(&node), hello)),
            None => Err(format!("no common protocol version: {:?} there", hello.protocol)),
        }
    }

    /// Tells of what came from `peer`, if that was no frame. Returns why the link ends.
    async fn told(&self, peer: Peer, error: TransportError) -> String {
        let why = error.to_string();
        if let TransportError::BadFrame(why) = error
            && !self.is_own(&peer)
        {
            drop(self.news.send(News::Broke { peer, why: why.to_owned() }).await);
        }
        why
    }

    /// Asks whether a link is wanted, and serves it until its end. `Err`: it is not; why.
    pub(super) async fn serve(
        self,
        link: &Link,
        (peer, hello): (Peer, Hello),
        dialled: Option<Dial>,
    ) -> Result<(), String> {
        let is_dialled = dialled.is_some();
        let (answer, answered) = oneshot::channel();
        let transport = transport(link);
        let (id, who, theirs) = (peer.id, peer.clone(), hello.clone());
        let up = Up { peer, hello, transport, dialled, answer };
        if self.news.send(News::Up(Box::new(up))).await.is_err() {
            return Err("the node stops".to_owned());
        }
        let taken = match answered.await {
            Ok(Answer::Taken(taken)) => *taken,
            Ok(Answer::Not(why)) => return Err(why),
            Ok(Answer::Superseded { hello, frame }) => {
                let hello = (!is_dialled).then(|| self.first(*hello));
                return Err(tell(link, hello.into_iter().chain([frame])).await);
            }
            Err(_) => return Err("the node stops".to_owned()),
        };
        let Taken { number, hello, outlet } = taken;
        let working = Working {
            lease: self.trust.lease_of(&link.certificates()),
            common: self.clone(),
            link,
            number,
            id,
            theirs,
            is_dialled,
        };
        let why = match working.until_its_end(outlet, hello).await {
            Ok(why) => why,
            Err(error) => self.told(who, error).await,
        };
        link.close(&why);
        drop(self.news.send(News::Ended { number, id, why }).await);
        Ok(())
    }

    /// Hands our lists of revocations to the other end when it knows of others than we do, and every new one; ends with the
    /// link.
    async fn hand_on(&self, link: &Link, theirs: &Hello) -> Result<(), TransportError> {
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
    async fn take(&self, signed: &[u8], disbelieved: &mut u32) -> Result<(), String> {
        let signed = SignedRevocations::decode(signed).map_err(|error| error.to_string())?;
        let Err(error) = self.trust.offer(signed).await else { return Ok(()) };
        tracing::warn!(%error, "a list of revocations is not believed");
        *disbelieved += 1;
        if *disbelieved < DISBELIEVED_MAX { Ok(()) } else { Err(error.to_string()) }
    }
}

/// Says this and waits a moment, so that it is heard before the link is closed. Returns why it is.
async fn tell(link: &Link, frames: impl Iterator<Item = Bytes>) -> String {
    for frame in frames {
        // Whoever is gone need not hear it.
        drop(link.send_whole(frame).await);
    }
    drop(tokio::time::timeout(HEARD_WITHIN, link.closed()).await);
    SUPERSEDED.to_owned()
}

/// How a link goes.
fn transport(link: &Link) -> Transport {
    match link.transport() {
        LinkTransport::Quic => Transport::Quic,
        LinkTransport::Tcp => Transport::Tcp,
    }
}

/// A link in use.
struct Working<'a> {
    common: Common,
    link: &'a Link,
    lease: Lease,
    number: u64,
    id: NodeId,
    /// What the other end said first.
    theirs: Hello,
    is_dialled: bool,
}

impl Working<'_> {
    /// Carries frames until the link ends; says why. An error is the link's.
    async fn until_its_end(&self, outlet: Outlet, hello: Hello) -> Result<String, TransportError> {
        if !self.is_dialled {
            self.link.send_whole(self.common.first(hello)).await?;
        }
        let Outlet { datagrams, streams, waiting_bytes, ending } = outlet;
        let reading = self.hear();
        let flushed = CancellationToken::new();
        let writing = async {
            tokio::try_join!(self.send(datagrams), self.send_whole(streams, &waiting_bytes))?;
            flushed.cancel();
            std::future::pending::<Result<(), TransportError>>().await
        };
        let handing_on = self.common.hand_on(self.link, &self.theirs);
        tokio::pin!(reading, writing);
        let asked = async {
            match ending.await {
                Ok(ending) => ending,
                Err(_) => std::future::pending().await,
            }
        };
        let ending = tokio::select! {
            why = &mut reading => return why,
            Err(error) = &mut writing => return Err(error),
            Err(error) = handing_on => return Err(error),
            () = self.lease.over() => return Ok("a certificate has ended".to_owned()),
            () = self.lease.withdrawn() => return Ok("its certificate was revoked".to_owned()),
            () = self.ask_for_another() => return Ok("the node stops".to_owned()),
            ending = asked => ending,
        };
        let leaving = async {
            // Its queues are closed: what is in them is the rest.
            drop(tokio::time::timeout(FLUSHED_WITHIN, flushed.cancelled()).await);
            tokio::time::sleep(ending.linger).await;
        };
        tokio::select! {
            heard = &mut reading => drop(heard?),
            Err(error) = &mut writing => return Err(error),
            () = leaving => {}
            () = self.lease.withdrawn() => {}
        }
        Ok(ending.why)
    }

    /// Hands on what comes, until what comes must not be said: why not. An error is the link's.
    async fn hear(&self) -> Result<String, TransportError> {
        let mut disbelieved = 0;
        loop {
            let bytes = self.link.receive().await?;
            if bytes.first() == Some(&REVOCATIONS)
                && let Ok(Frame::Revocations(signed)) = decode(&bytes)
            {
                match self.common.take(&signed, &mut disbelieved).await {
                    Ok(()) => continue,
                    Err(why) => return Ok(why),
                }
            }
            let (epoch, from, rtt) = (self.theirs.epoch, self.id, self.link.rtt());
            let frame = News::Frame { epoch, from, bytes, rtt };
            if self.common.news.send(frame).await.is_err() {
                return Ok("the node stops".to_owned());
            }
        }
    }

    async fn send(&self, mut datagrams: mpsc::Receiver<Bytes>) -> Result<(), TransportError> {
        while let Some(bytes) = datagrams.recv().await {
            self.link.send(bytes).await?;
        }
        Ok(())
    }

    async fn send_whole(
        &self,
        mut streams: mpsc::Receiver<Bytes>,
        waiting_bytes: &AtomicUsize,
    ) -> Result<(), TransportError> {
        while let Some(bytes) = streams.recv().await {
            let length = bytes.len();
            self.link.send_whole(bytes).await?;
            waiting_bytes.fetch_sub(length, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Once the lease is old, asks again and again for a link that takes the place of this one; and before, now and then, for
    /// one over QUIC while this is not. Ends when nobody listens.
    async fn ask_for_another(&self) {
        if !self.is_dialled {
            std::future::pending::<()>().await;
        }
        tokio::select! {
            () = self.lease.old() => {}
            () = self.ask_for_quic() => return,
        }
        let mut wait = REDIAL_FIRST;
        while self.ask(false).await {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(REDIAL_MAX);
        }
    }

    async fn ask_for_quic(&self) {
        if self.link.transport() == LinkTransport::Quic {
            std::future::pending::<()>().await;
        }
        let mut wait = TO_QUIC_FIRST;
        loop {
            tokio::time::sleep(wait).await;
            if !self.ask(true).await {
                return;
            }
            wait = TO_QUIC_EVERY;
        }
    }

    async fn ask(&self, to_quic: bool) -> bool {
        let (number, id) = (self.number, self.id);
        self.common.news.send(News::Old { number, id, to_quic }).await.is_ok()
    }
}
