//! What is known of all other nodes, shared by all workers: filled by what membership says and by replies, read by every call.
//!
//! Peers an operator listed are on the board from the start, members as long as anybody needs to know of them, and nodes of
//! which relays alone speak as long as there is room for them. Workers name an entry by its place; a place is given to another
//! only when nobody can mean the one before any more.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use base::{NodeName, RegionName, clock};
use http::{HeaderMap, uri::Authority};
use identity::{Role, SpiffeId};
use membership::NodeId;
#[cfg(test)]
use membership::Presence;
use parking_lot::Mutex;
use tokio::sync::watch;
use transport::Target;

use super::{entry::Listing, state::State};
use crate::{gossip, offer::Ask, orca};

/// What is known of the other nodes.
#[derive(Debug)]
pub(crate) struct Board {
    pub(super) own: SpiffeId,
    make: MakeTarget,
    /// How many are listed: they have the first places.
    pub(super) listed: usize,
    pub(super) state: Mutex<State>,
    /// Whether any of them serves models by name.
    pub(super) has_models: AtomicBool,
    /// Counts what changed of who is there and what they serve.
    pub(super) changes: watch::Sender<u64>,
}

/// Who a peer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerName {
    pub(crate) node: NodeName,
    pub(crate) region: RegionName,
}

/// A peer an operator listed.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) name: PeerName,
    /// Where its port for peers is reached. It wins over what the peer says: it may lead through a relay.
    pub(crate) address: Authority,
    /// Whether its gossip port is listed too.
    pub(crate) has_gossip: bool,
}

/// Makes what a channel to a peer needs.
pub(crate) struct MakeTarget(pub(crate) Box<Make>);

type Make = dyn Fn(&PeerName, Authority) -> Result<Target, String> + Send + Sync;

impl fmt::Debug for MakeTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MakeTarget").finish_non_exhaustive()
    }
}

/// A call that begins at a peer.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) generation: u64,
    /// The engines of the peer that suit the call.
    pub(super) suited: Vec<usize>,
}

/// A call that is over at a peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Over {
    pub(super) at: At,
    pub(super) engine: Option<usize>,
    pub(super) began: Instant,
    /// Whether what the peer says of itself may count the call.
    pub(super) counted: bool,
}

/// An entry, and no other that has its place later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    pub(super) place: usize,
    pub(super) generation: u64,
}

impl Board {
    /// Knows of the listed peers alone. `own` is this node, of which nothing is taken in.
    pub(crate) fn new(own: SpiffeId, listed: Vec<Listed>, make: MakeTarget) -> Self {
        let board = Self {
            own,
            make,
            listed: listed.len(),
            state: Mutex::default(),
            has_models: AtomicBool::new(false),
            changes: watch::Sender::new(0),
        };
        let now = clock::now();
        for peer in listed {
            let id = board.id(&peer.name);
            let mut state = board.state.lock();
            if let Some((_, entry)) = state.entry(id, &peer.name, now) {
                entry.listed = Some(Listing { has_gossip: peer.has_gossip });
                entry.address = Some(peer.address);
            }
        }
        board
    }

    /// How members call a node among themselves.
    pub(super) fn id(&self, name: &PeerName) -> NodeId {
        let id = SpiffeId {
            trust_domain: self.own.trust_domain.clone(),
            role: Role::Node,
            region: name.region.clone(),
            name: name.node.clone(),
        };
        gossip::node_id(&id)
    }

    /// This node, as members call it.
    pub(crate) fn own(&self) -> NodeId {
        gossip::node_id(&self.own)
    }

    /// Changes of who is there and of what they serve.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether the model of a call decides which of them serves it.
    pub(super) fn has_models(&self) -> bool {
        self.has_models.load(Ordering::Relaxed)
    }

    /// Lists peers of region us, and can call nobody. This node is a, in region eu.
    #[cfg(test)]
    pub(crate) fn of_test(peers: &[&str]) -> Self {
        let listed = |node: &&str| Listed {
            name: PeerName { node: node.parse().unwrap(), region: "us".parse().unwrap() },
            address: format!("{node}.test:8444").parse().unwrap(),
            has_gossip: true,
        };
        let make = MakeTarget(Box::new(|_, _| Err("nobody is called".to_owned())));
        let own = "spiffe://mesh.test/node/eu/a".parse().unwrap();
        Self::new(own, peers.iter().map(listed).collect(), make)
    }

    #[cfg(test)]
    pub(crate) fn presence_of(&self, id: NodeId) -> Presence {
        let state = self.state.lock();
        let entry = state.places.get(&id).and_then(|place| state.get(*place));
        match entry {
            None => Presence::Unknown,
            Some(entry) if entry.is_out() => Presence::Silent,
            Some(entry) => entry.view.presence(clock::now()),
        }
    }

    /// Which way leads to the peer at `place`; `None`: none.
    pub(super) fn way(&self, place: usize) -> Option<u64> {
        let state = self.state.lock();
        state.get(place).filter(|entry| entry.address.is_some()).map(|entry| entry.way)
    }

    /// That way as a target.
    pub(super) fn target(&self, place: usize, way: u64) -> Option<Target> {
        let (name, address) = {
            let state = self.state.lock();
            let entry = state.get(place).filter(|entry| entry.way == way)?;
            (entry.name.clone(), entry.address.clone()?)
        };
        match (self.make.0)(&name, address) {
            Ok(target) => Some(target),
            Err(error) => {
                tracing::warn!(peer = %name.node, region = %name.region, error, "a peer cannot be called");
                None
            }
        }
    }

    /// A call begins at `now`, that way, for the sake of engine `engine`; `None`: another has the place.
    pub(super) fn began(
        &self,
        place: usize,
        way: u64,
        engine: Option<usize>,
        ask: &Ask,
        now: Instant,
    ) -> Option<Begun> {
        let mut state = self.state.lock();
        let entry = state.get_mut(place).filter(|entry| entry.way == way)?;
        if let Some(figures) = engine.and_then(|engine| entry.figures(engine)) {
            figures.sent(now);
        }
        entry.breaker.begin(now);
        entry.in_flight += 1;
        Some(Begun { generation: entry.generation, suited: entry.suited(ask) })
    }

    pub(super) fn ended(&self, over: Over) {
        let mut state = self.state.lock();
        let Some(entry) = state.at(over.at) else { return };
        let one_way = entry.view.one_way();
        if let Some(figures) = over.engine.and_then(|engine| entry.figures(engine)) {
            figures.ended(over.began, one_way, over.counted);
        }
        entry.in_flight = entry.in_flight.saturating_sub(1);
    }

    pub(super) fn answered(&self, at: At) {
        if let Some(entry) = self.state.lock().at(at) {
            entry.breaker.answered();
        }
    }

    pub(super) fn replied(&self, at: At) {
        if let Some(entry) = self.state.lock().at(at) {
            entry.breaker.replied();
        }
    }

    pub(super) fn busy(&self, at: At, engines: &[usize]) {
        let now = clock::now();
        let mut state = self.state.lock();
        let Some(entry) = state.at(at) else { return };
        for engine in engines {
            if let Some(figures) = entry.figures(*engine) {
                figures.busy(now);
            }
        }
    }

    pub(super) fn broken(&self, at: At, now: Instant, cut_off: bool) {
        let mut state = self.state.lock();
        let Some(entry) = state.at(at) else { return };
        if cut_off {
            entry.cut_off(now);
        }
        if entry.breaker.broken(now) {
            let name = &entry.name;
            tracing::warn!(peer = %name.node, region = %name.region, "calls to a peer broke off again and again; it is ejected for a while");
        }
    }

    /// A reply reported the load of the engine called `engine`. Returns whether it did.
    pub(super) fn learn(&self, at: At, engine: &str, trailers: &HeaderMap) -> bool {
        let now = clock::now();
        let mut state = self.state.lock();
        let Some(entry) = state.at(at) else { return false };
        let Some((engine, known)) = entry.known(engine, now) else { return false };
        let Some(load) = orca::read(trailers, known) else { return false };
        entry.view.reply(engine, load, now);
        true
    }
}
