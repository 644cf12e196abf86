//! One machine, the process on it, and what that process was told.

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    time::{Duration, Instant},
};

use bytes::Bytes;
use membership::{Descriptor, LoadFrame, Mesh, NodeId, Own, Peer, View};

use super::{
    Config,
    links::LinkRef,
    load::{Engine, Serving},
    network::Nanos,
    toy::{self, Toy},
};

/// Nodes whose loads one node's view holds; what more it subscribes to is not measured.
const VIEWED_MAX: usize = 160;
/// Frames that wait for a process that is stopped; later ones are lost, as in a socket's buffer.
const BUFFERED_MAX: usize = 64;

/// A machine: it stays when its process ends.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) node: u32,
    pub(super) region: u32,
    pub(super) own: Own,
    pub(super) toy: Toy,
    pub(super) engine: Engine,
    pub(super) process: Option<Box<Process>>,
    /// Counts processes: what was meant for an earlier one is not for this.
    pub(super) life: u32,
    pub(super) has_power: bool,
    pub(super) paused: Option<Nanos>,
    pub(super) buffered: VecDeque<(LinkRef, Bytes)>,
    /// How far its clock is ahead.
    pub(super) ahead: Nanos,
    /// When anything was last done to it.
    pub(super) touched: Nanos,
    pub(super) sent: u64,
    pub(super) received: u64,
    /// Cards kept on its disk.
    pub(super) kept: Vec<Vec<u8>>,
}

impl Host {
    pub(super) fn id(&self) -> NodeId {
        self.own.id
    }

    pub(super) fn place(&self, host: u32) -> (u32, u32) {
        (host, self.region)
    }

    pub(super) fn peer(&self) -> Peer {
        let Own { id, node, region, .. } = &self.own;
        Peer { id: *id, node: node.clone(), region: region.clone() }
    }

    /// Whether a process is there and goes on.
    pub(super) fn runs(&self) -> bool {
        self.process.is_some() && self.paused.is_none()
    }

    /// Keeps a frame for later, if there is room.
    pub(super) fn buffer(&mut self, link: LinkRef, bytes: Bytes) {
        if self.buffered.len() < BUFFERED_MAX {
            self.buffered.push_back((link, bytes));
        }
    }

    /// What its clock shows.
    pub(super) fn clock(&self, origin: Instant, now: Nanos) -> Instant {
        origin + Duration::from_nanos(now + self.ahead)
    }

    /// When its clock shows this.
    pub(super) fn when(&self, origin: Instant, clock: Instant) -> Nanos {
        let passed = clock.saturating_duration_since(origin).as_nanos();
        Nanos::try_from(passed).unwrap_or(Nanos::MAX).saturating_sub(self.ahead)
    }
}

/// A process, and what its machine has said so far.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) mesh: Mesh<Toy>,
    pub(super) started: Nanos,
    /// By the number of the node at the other end.
    pub(super) links: BTreeMap<u32, LinkRef>,
    /// When the next tick is on the heap.
    pub(super) armed: Nanos,
    pub(super) ticked: Nanos,
    pub(super) views: Views,
    /// Since when it has asked for whose loads.
    pub(super) subscribed: BTreeMap<u32, Nanos>,
    pub(super) known: Bits,
    described: Bits,
    serving: Serving,
    /// By region: when the newest figures were taken, and the free slots they say.
    pub(super) regions: Vec<Option<(Nanos, u32)>>,
}

impl Process {
    pub(super) fn new(mesh: Mesh<Toy>, config: &Config, now: Nanos) -> Self {
        let Config { nodes, regions, .. } = *config;
        Self {
            mesh,
            started: now,
            links: BTreeMap::new(),
            armed: Nanos::MAX,
            ticked: 0,
            views: Views::default(),
            subscribed: BTreeMap::new(),
            known: Bits::new(nodes),
            described: Bits::new(nodes),
            serving: Serving::new(config),
            regions: vec![None; regions as usize],
        }
    }
}

impl Process {
    /// From now on it is known what a node serves, or is not any more.
    pub(super) fn described(&mut self, id: NodeId, is: bool) {
        self.described.set(toy::index(id), is);
    }

    /// As routing takes a load frame in. Returns whether it is known whose it is.
    pub(super) fn load(
        &mut self,
        clock: Instant,
        id: NodeId,
        frame: &LoadFrame,
        rtt: Duration,
    ) -> bool {
        let node = toy::index(id);
        let is_described = self.described.has(node);
        if is_described {
            let serving = self.serving;
            self.views.frame(node, frame, (rtt, clock), || serving.descriptor(node));
        }
        is_described
    }
}

/// Loads of others, as routing sees them.
#[derive(Debug, Default)]
pub(super) struct Views(BTreeMap<u32, View>);

impl Views {
    /// A node said how pressed it is. What it serves is asked for where that is not known.
    pub(super) fn frame(
        &mut self,
        node: u32,
        frame: &LoadFrame,
        (rtt, now): (Duration, Instant),
        descriptor: impl FnOnce() -> Descriptor,
    ) {
        let has_room = self.0.len() < VIEWED_MAX;
        let view = match self.0.entry(node) {
            Entry::Occupied(view) => view.into_mut(),
            Entry::Vacant(place) if has_room => place.insert(View::default()),
            Entry::Vacant(_) => return,
        };
        if view.described().map(|(epoch, _)| epoch) != Some(frame.epoch) {
            view.greet(frame.epoch);
            view.describe(frame.epoch, descriptor().into());
        }
        view.frame(frame, rtt, now);
    }

    /// How old the load of a node's engine is, if anything came. `None`: there was no room to keep it.
    pub(super) fn age(&self, node: u32, now: Instant) -> Option<Option<Duration>> {
        match self.0.get(&node) {
            Some(view) => Some(view.seen(0, now).map(|seen| seen.age)),
            None if self.0.len() < VIEWED_MAX => Some(None),
            None => None,
        }
    }
}

/// A set of nodes by number.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits {
    words: Vec<u64>,
    count: u32,
}

impl Bits {
    pub(super) fn new(size: u32) -> Self {
        Self { words: vec![0; size.div_ceil(64) as usize], count: 0 }
    }

    pub(super) fn has(&self, at: u32) -> bool {
        self.words.get(at as usize / 64).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// Returns whether that is news.
    pub(super) fn set(&mut self, at: u32, is: bool) -> bool {
        let Some(word) = self.words.get_mut(at as usize / 64) else { return false };
        let bit = 1 << (at % 64);
        if (*word & bit != 0) == is {
            return false;
        }
        *word ^= bit;
        self.count = if is { self.count + 1 } else { self.count - 1 };
        true
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }
}
