//! What goes into the machine and comes out of it: inputs, outputs, news, and the picture for people.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use base::{Load, NodeName, RegionName, TrustDomain, ZoneName};
use bytes::Bytes;

use crate::{Card, Descriptor, Hello, LoadFrame, NodeId};

/// Who this node is, for as long as its process lives.
#[derive(Clone, Debug)]
pub struct Own {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub node: NodeName,
    /// Its region.
    pub region: RegionName,
    /// Its zone.
    pub zone: Option<ZoneName>,
    /// The mesh.
    pub trust_domain: TrustDomain,
    /// The process: greater after each start.
    pub epoch: u64,
    /// Where its port for peers is reached, host and port.
    pub peers: String,
    /// Where its gossip port is reached, host and port.
    pub gossip: String,
    /// The release it runs.
    pub release: String,
}

/// Who is at the other end of a link, by its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    /// The node.
    pub id: NodeId,
    /// Its name.
    pub node: NodeName,
    /// Its region.
    pub region: RegionName,
}

/// How a link goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// QUIC over UDP.
    Quic,
    /// HTTP/2 over TCP.
    Tcp,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time has passed, nothing else.
    Tick,
    /// A link works: both ends have said hello. One to the same node that was there before is replaced by it.
    LinkUp {
        /// Who is there.
        peer: Peer,
        /// What it said first. (Its name and region were compared with its certificate already.)
        hello: Box<Hello>,
        /// How the link goes.
        transport: Transport,
        /// Whether this node dialled. With a node of version 1 there may be a link each way: each is told of by itself.
        dialled: bool,
    },
    /// The link with this node is gone, and there is no other.
    LinkDown {
        /// Which node.
        id: NodeId,
        /// Why, for people.
        why: String,
    },
    /// What this node sent over a link is nothing that a node sends, however it errs. The link may be gone by now.
    Broke {
        /// Who, by its certificate.
        peer: Peer,
        /// What it sent, for people.
        why: String,
    },
    /// A link that was asked for came to nothing.
    DialFailed {
        /// What [`Output::Dial`] asked for.
        target: Target,
        /// Why, for people.
        why: String,
    },
    /// A frame came over the link with this node.
    Frame {
        /// From whom.
        from: NodeId,
        /// The frame.
        bytes: Bytes,
        /// Time to the node and back.
        rtt: Duration,
    },
    /// How pressed the engines are, in the order of the descriptor. Wanted every
    /// [`sample_interval`](crate::Mesh::sample_interval), and when something changed.
    Loads {
        /// One per engine.
        loads: Vec<Load>,
        /// Attempts that came since the process began, by source region.
        arrivals: Vec<(RegionName, u64)>,
    },
    /// What this node serves has changed.
    Describe(Descriptor),
    /// From now on this node takes no new calls.
    Drain,
    /// This node goes: the others are told, and nothing is dialled any more.
    Leave,
    /// Where nodes may be found, besides those known: hosts and ports. Replaces what was there.
    Seeds(Vec<Seed>),
    /// The node's loop came so much too late: suspicions are withheld for a while.
    Lagged(Duration),
    /// The certificate was renewed: the card is signed anew.
    Renewed,
}

/// Where a node may be found.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seed {
    /// Host and port of its gossip port.
    pub address: String,
    /// Who it must be; `None`: anybody of the mesh.
    pub peer: Option<Peer>,
    /// Whether it was listed by an operator: it is always linked and subscribed to, in whatever region it is, and may be a node of
    /// version 1, which has no card.
    pub is_listed: bool,
}

/// Whom to reach.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// A node whose card is known.
    Member {
        /// Who it must be.
        peer: Peer,
        /// Host and port.
        address: String,
    },
    /// Whoever is there.
    Seed(Seed),
}

impl Target {
    /// Host and port.
    #[must_use]
    pub fn address(&self) -> &str {
        match self {
            Self::Member { address, .. } => address,
            Self::Seed(seed) => &seed.address,
        }
    }

    /// Who it must be; `None`: anybody of the mesh.
    #[must_use]
    pub fn peer(&self) -> Option<&Peer> {
        match self {
            Self::Member { peer, .. } => Some(peer),
            Self::Seed(seed) => seed.peer.as_ref(),
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send a frame over the link with this node. Without a link it is lost. To a node of version 1 nothing is sent but over a
    /// link it dialled itself: it takes nothing over others.
    Send {
        /// To whom.
        to: NodeId,
        /// The frame, encoded.
        bytes: Bytes,
        /// Whether it may be lost (a datagram) or must arrive (a stream).
        way: Way,
    },
    /// Make a link, over QUIC or TCP; answered by [`Input::LinkUp`] or [`Input::DialFailed`]. Asked for once.
    Dial(Target),
    /// End the link with this node, and say why. Answered by nothing.
    Close {
        /// Which node.
        id: NodeId,
        /// Why.
        why: String,
    },
    /// News for whoever routes, logs and counts.
    Event(Event),
}

/// How a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It may be lost.
    Datagram,
    /// It arrives as long as the link lives.
    Stream,
}

/// News.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node is known by its card, or by a newer one. It may not be reachable yet.
    Member(Arc<Card>),
    /// A node whose gossip speaks version 1 is linked: it has no card.
    Legacy {
        /// Who.
        peer: Peer,
        /// Its process.
        epoch: u64,
    },
    /// What a node serves, and its process.
    Described {
        /// Who.
        id: NodeId,
        /// Its process.
        epoch: u64,
        /// What.
        descriptor: Arc<Descriptor>,
    },
    /// A node said how pressed it is.
    Load {
        /// Who.
        id: NodeId,
        /// What it said.
        frame: Box<LoadFrame>,
        /// Time to the node and back.
        rtt: Duration,
    },
    /// A node can be reached, or not any more: there is a link, and nobody has good reason to call it down.
    Reachable {
        /// Who.
        id: NodeId,
        /// Whether.
        is: bool,
    },
    /// The link with a node was closed because nobody needs it: nothing is wrong with it.
    Parted(NodeId),
    /// A node is not alive, by common judgement.
    Down {
        /// Who.
        id: NodeId,
        /// It said so itself.
        left: bool,
    },
    /// A node is forgotten: nobody needs to know of it any more.
    Forgotten(NodeId),
    /// A node is suspected, or not any more.
    Suspected {
        /// Who.
        id: NodeId,
        /// Whether.
        is: bool,
    },
    /// A node broke the rules: it is not listened to for a while.
    Quarantined {
        /// Who.
        peer: Peer,
        /// Until when.
        until: Instant,
        /// What it did.
        why: String,
    },
    /// What another region has of its models, as its relays see it, or this region where not all of it is subscribed to.
    Region(Arc<RegionView>),
    /// Another process has this node's name, and is the later one: this one must stop.
    Superseded {
        /// The epoch of the other.
        epoch: u64,
    },
    /// A fact for the log.
    Note(String),
}

/// What a region has, now.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionView {
    /// Which region.
    pub region: RegionName,
    /// When the figures were taken, by the clock of this node.
    pub sampled: Instant,
    /// One per model.
    pub offers: Vec<RegionOffer>,
}

/// What a region has of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionOffer {
    /// The model; `None`: engines that are sent any.
    pub model: Option<base::ModelName>,
    /// What the engines speak.
    pub protocol: String,
    /// Slots that are free.
    pub free: u32,
    /// Slots in all.
    pub slots: u32,
    /// Calls that end per second.
    pub drain_rate: f64,
    /// How long a call waits for a slot: median and ninetieth percentile.
    pub wait: (Duration, Duration),
    /// The mean share of key-value cache that is free, 0 to 1, where engines say.
    pub kv_free: Option<f64>,
    /// Nodes to try.
    pub candidates: Vec<Candidate>,
}

/// A node that has room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Who.
    pub node: NodeName,
    /// Where its port for peers is reached.
    pub peers: String,
    /// Its free slots for the model.
    pub free: u32,
    /// All its slots for the model.
    pub slots: u32,
}

/// What the mesh looks like from here, for people.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Everybody known, this node not included, by name.
    pub members: Vec<MemberStatus>,
    /// The relays of this region.
    pub relays: Vec<NodeName>,
    /// Whether this node is one.
    pub is_relay: bool,
    /// Who subscribes to this node's load.
    pub subscribers: usize,
    /// Regions by their digests, this one where it hears its own, and how old those are.
    pub regions: Vec<(RegionName, Duration)>,
    /// Who is in quarantine, for how long yet, and why.
    pub quarantined: Vec<(Peer, Duration, String)>,
}

/// What is known of one node.
#[derive(Clone, Debug)]
pub struct MemberStatus {
    /// Its card; `None`: a node of version 1.
    pub card: Option<Arc<Card>>,
    /// Who it is.
    pub peer: Peer,
    /// Its process.
    pub epoch: u64,
    /// Whether it is alive, by common judgement.
    pub state: Liveness,
    /// How it is linked, if it is.
    pub link: Option<(Transport, Duration)>,
    /// The version of the protocol spoken with it, if it is linked.
    pub protocol: Option<u32>,
    /// Whether this node asked for its load.
    pub subscribed: bool,
    /// How long ago its last load frame came.
    pub heard: Option<Duration>,
    /// Whether it subscribes to this node.
    pub subscriber: bool,
}

/// Whether a node is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It is.
    Alive,
    /// Somebody doubts it.
    Suspect,
    /// It is not.
    Down,
    /// It said good-bye.
    Left,
    /// Only its card is known.
    Unknown,
}
