//! A network in memory, for tests: machines, links, latency, loss, cuts and deaths, all by one heap of events.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    sync::Arc,
    time::{Duration, Instant},
};

use base::Load;
use bytes::Bytes;
use prost::Message as _;
use proto::isobar::mesh::v1 as wire;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{Disbelief, EngineDescriptor, Judged};

pub(super) const MS: Duration = Duration::from_millis(1);
pub(super) const S: Duration = Duration::from_secs(1);
const LATENCY: Duration = Duration::from_millis(2);

/// Signs by a secret everybody knows; the certificate is a name and a region. Cards are shared by all machines of a test.
#[derive(Clone, Debug)]
pub(super) struct Toy {
    name: String,
    shelf: Arc<parking_lot::Mutex<BTreeMap<Pair, Arc<Card>>>>,
}

pub(super) fn digest(parts: &[&[u8]]) -> [u8; 32] {
    let mut out = [0; 32];
    for (lane, place) in out.chunks_mut(8).enumerate() {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ (lane as u64 + 1).wrapping_mul(0x9e37_79b9);
        for byte in parts.concat() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            hash ^= hash >> 29;
        }
        place.copy_from_slice(&hash.to_be_bytes());
    }
    out
}

pub(super) fn id_of(name: &str) -> NodeId {
    NodeId(digest(&[name.as_bytes()])[..16].try_into().unwrap())
}

pub(super) fn sign(name: &str, card: &[u8]) -> Vec<u8> {
    wire::SignedCard {
        card: card.to_vec(),
        signature: digest(&[b"secret", name.as_bytes(), card]).to_vec(),
        scheme: 1,
        certificates: vec![name.as_bytes().to_vec()],
    }
    .encode_to_vec()
}

impl Judge for Toy {
    fn sign(&mut self, card: &[u8]) -> Result<Vec<u8>, String> {
        Ok(sign(&self.name, card))
    }

    fn judge(&mut self, signed: &[u8]) -> Result<Judged, Disbelief> {
        let no = |why: &str| Disbelief::Doubtful(why.to_owned());
        let signed = wire::SignedCard::decode(signed).map_err(|e| e.to_string())?;
        let name = signed.certificates.first().ok_or_else(|| no("no certificate"))?;
        let name = std::str::from_utf8(name).map_err(|e| e.to_string())?;
        let (region, node) = name.split_once('/').ok_or_else(|| no("no region"))?;
        let node = node.parse().map_err(|_| no("no name"))?;
        let region = region.parse().map_err(|_| no("no region"))?;
        if signed.signature != digest(&[b"secret", name.as_bytes(), &signed.card]) {
            return Err(Disbelief::Forged("forged".to_owned()));
        }
        Ok(Judged { id: id_of(name), node, region, card: signed.card })
    }

    fn share(&mut self, card: Card) -> Arc<Card> {
        let pair = card.pair();
        let mut shelf = self.shelf.lock();
        Arc::clone(shelf.entry(pair).or_insert_with(|| Arc::new(card)))
    }

    fn sha256(&self, bytes: &[u8]) -> [u8; 32] {
        digest(&[bytes])
    }
}

pub(super) struct Node {
    pub(super) name: String,
    id: NodeId,
    pub(super) mesh: Option<Mesh<Toy>>,
    pub(super) events: Vec<(Instant, Event)>,
    seed: u64,
    wake: Option<Instant>,
}

impl Node {
    pub(super) fn peer(&self) -> Peer {
        let (region, node) = self.name.split_once('/').unwrap();
        Peer { id: id_of(&self.name), node: node.parse().unwrap(), region: region.parse().unwrap() }
    }
}

#[derive(Debug)]
enum What {
    Wake(usize),
    Frame { from: usize, to: usize, bytes: Bytes },
    Dialled { from: usize, to: Option<usize>, target: Target },
    Lost { at: usize, other: NodeId },
    Sample(usize),
}

pub(super) struct World {
    pub(super) now: Instant,
    pub(super) nodes: Vec<Node>,
    pub(super) loss: f64,
    /// Nodes that do not hear each other.
    pub(super) cut: BTreeSet<(usize, usize)>,
    pub(super) links: BTreeSet<(usize, usize)>,
    paused: BTreeSet<usize>,
    pub(super) sent: u64,
    pub(super) dials: u64,
    heap: BinaryHeap<Reverse<(Instant, u64, usize)>>,
    pending: BTreeMap<usize, What>,
    count: u64,
    rng: StdRng,
    shelf: Arc<parking_lot::Mutex<BTreeMap<Pair, Arc<Card>>>>,
}

pub(super) fn descriptor(name: &str) -> Descriptor {
    let engine = EngineDescriptor {
        name: name.parse().unwrap(),
        protocol: "kserve-v2".into(),
        models: vec!["llama".parse().unwrap()],
        services: vec![],
        id: None,
        slots: Some(64),
    };
    Descriptor { version: 1, engines: vec![engine] }
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            now: base::clock::now(),
            nodes: vec![],
            loss: 0.0,
            cut: BTreeSet::new(),
            links: BTreeSet::new(),
            paused: BTreeSet::new(),
            sent: 0,
            dials: 0,
            heap: BinaryHeap::new(),
            pending: BTreeMap::new(),
            count: 0,
            rng: StdRng::seed_from_u64(seed),
            shelf: Arc::default(),
        }
    }

    /// A node `region/name`, with the first one as its seed.
    pub(super) fn add(&mut self, name: &str) -> usize {
        self.add_at(name, 100)
    }

    pub(super) fn add_at(&mut self, name: &str, epoch: u64) -> usize {
        let index = self.nodes.len();
        let seed = self.rng.random();
        self.nodes.push(Node {
            name: name.to_owned(),
            id: id_of(name),
            mesh: None,
            events: vec![],
            seed,
            wake: None,
        });
        self.start(index, epoch, &[0]);
        index
    }

    pub(super) fn start(&mut self, index: usize, epoch: u64, seeds: &[usize]) {
        let (name, seed) = (self.nodes[index].name.clone(), self.nodes[index].seed);
        let mesh = self.make(&name, &format!("n{index}"), epoch, seed);
        self.nodes[index].mesh = Some(mesh);
        let seeds = seeds.iter().map(|seed| Seed {
            address: format!("n{seed}:1"),
            peer: None,
            is_listed: false,
        });
        self.input(index, Input::Seeds(seeds.collect()));
        self.at(200 * MS, What::Sample(index));
    }

    /// A machine that is not in the network.
    pub(super) fn machine(&self, name: &str) -> Mesh<Toy> {
        self.make(name, "nowhere", 100, 1)
    }

    fn make(&self, name: &str, host: &str, epoch: u64, seed: u64) -> Mesh<Toy> {
        let (region, node) = name.split_once('/').unwrap();
        let own = Own {
            id: id_of(name),
            node: node.parse().unwrap(),
            region: region.parse().unwrap(),
            zone: None,
            trust_domain: "mesh.example".parse().unwrap(),
            epoch,
            peers: format!("{host}:2"),
            gossip: format!("{host}:1"),
            release: "0.1.0".into(),
        };
        let toy = Toy { name: name.to_owned(), shelf: Arc::clone(&self.shelf) };
        Mesh::new(own, descriptor(node), toy, self.now, seed).unwrap()
    }

    pub(super) fn mesh(&self, index: usize) -> &Mesh<Toy> {
        self.nodes[index].mesh.as_ref().unwrap()
    }

    pub(super) fn id(&self, index: usize) -> NodeId {
        self.nodes[index].id
    }

    /// Who is linked with `from` under this id: two may have the same.
    fn linked(&self, from: usize, id: NodeId) -> Option<usize> {
        let is_linked = |to: &usize| self.links.contains(&(from.min(*to), from.max(*to)));
        (0..self.nodes.len()).filter(|to| self.id(*to) == id).find(is_linked)
    }

    fn at(&mut self, after: Duration, what: What) {
        self.count += 1;
        let key = usize::try_from(self.count).unwrap();
        self.heap.push(Reverse((self.now + after, self.count, key)));
        self.pending.insert(key, what);
    }

    pub(super) fn input(&mut self, index: usize, input: Input) {
        let now = self.now;
        if self.paused.contains(&index) {
            return;
        }
        let Some(mesh) = &mut self.nodes[index].mesh else { return };
        mesh.handle(now, input);
        self.drain(index);
    }

    fn drain(&mut self, index: usize) {
        while let Some(output) = self.nodes[index].mesh.as_mut().and_then(Mesh::poll_output) {
            match output {
                Output::Send { to, bytes, way } => self.send(index, to, bytes, way),
                Output::Dial(target) => self.dial(index, target),
                Output::Close { id, .. } => {
                    if let Some(other) = self.linked(index, id) {
                        self.unlink(index, other);
                    }
                }
                Output::Event(event) => self.nodes[index].events.push((self.now, event)),
            }
        }
        let due = self.nodes[index].mesh.as_ref().and_then(Mesh::next_deadline);
        if let Some(due) = due
            && self.nodes[index].wake.is_none_or(|wake| wake > due || wake < self.now)
        {
            self.nodes[index].wake = Some(due);
            self.at(due.saturating_duration_since(self.now), What::Wake(index));
        }
    }

    fn send(&mut self, from: usize, to: NodeId, bytes: Bytes, way: Way) {
        let Some(to) = self.linked(from, to) else { return };
        assert!(bytes.len() <= crate::STREAM_BYTES_MAX);
        assert!(way == Way::Stream || bytes.len() <= DATAGRAM_BYTES_MAX);
        self.sent += bytes.len() as u64;
        let is_lost = way == Way::Datagram && self.rng.random_bool(self.loss);
        if !is_lost && self.hears(from, to) {
            self.at(LATENCY, What::Frame { from, to, bytes });
        }
    }

    fn hears(&self, from: usize, to: usize) -> bool {
        !self.cut.contains(&(from, to))
    }

    fn dial(&mut self, from: usize, target: Target) {
        self.dials += 1;
        let address = target.address();
        let to = address.strip_prefix('n').and_then(|a| a.strip_suffix(":1")?.parse().ok());
        self.at(3 * LATENCY, What::Dialled { from, to, target });
    }

    pub(super) fn unlink(&mut self, a: usize, b: usize) {
        if self.links.remove(&(a.min(b), a.max(b))) {
            let (id_a, id_b) = (self.id(a), self.id(b));
            self.at(LATENCY, What::Lost { at: b, other: id_a });
            self.at(LATENCY, What::Lost { at: a, other: id_b });
        }
    }

    /// The node stops, and its links with it.
    pub(super) fn kill(&mut self, index: usize) {
        self.nodes[index].mesh = None;
        let links: Vec<_> =
            self.links.iter().copied().filter(|(a, b)| *a == index || *b == index).collect();
        for (a, b) in links {
            self.unlink(a, b);
        }
    }

    /// Nodes of the two groups do not hear each other, and their links are noticed as gone.
    pub(super) fn part(&mut self, one: &[usize], other: &[usize]) {
        for a in one {
            for b in other {
                self.cut.extend([(*a, *b), (*b, *a)]);
                self.unlink(*a, *b);
            }
        }
    }

    /// The node stands still; the others notice after three seconds.
    pub(super) fn pause(&mut self, index: usize) {
        self.paused.insert(index);
        let links: Vec<_> =
            self.links.iter().copied().filter(|(a, b)| *a == index || *b == index).collect();
        for (a, b) in links {
            self.links.remove(&(a, b));
            let (at, other) = (a + b - index, self.id(index));
            self.at(3 * S, What::Lost { at, other });
        }
    }

    /// It goes on, and finds its links gone.
    pub(super) fn resume(&mut self, index: usize, after: Duration) {
        self.paused.remove(&index);
        self.nodes[index].wake = None;
        self.input(index, Input::Lagged(after));
        let linked: Vec<_> = self.mesh(index).links.up.keys().copied().collect();
        for id in linked {
            if self.linked(index, id).is_none() {
                self.input(index, Input::LinkDown { id, why: "idle".into() });
            }
        }
    }

    pub(super) fn heal(&mut self) {
        self.cut.clear();
    }

    /// Frame `frame` comes to `to` as if `from` had sent it.
    pub(super) fn forge(&mut self, from: usize, to: usize, frame: &Frame) {
        let bytes = encode(frame).into();
        self.forge_bytes(from, to, bytes);
    }

    pub(super) fn forge_bytes(&mut self, from: usize, to: usize, bytes: Bytes) {
        let from = self.id(from);
        self.input(to, Input::Frame { from, bytes, rtt: 2 * LATENCY });
    }

    pub(super) fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(Reverse((at, _, key))) = self.heap.peek().copied() {
            if at > until {
                break;
            }
            self.heap.pop();
            self.now = self.now.max(at);
            let what = self.pending.remove(&key).unwrap();
            self.happen(what);
        }
        self.now = until;
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Wake(index) => {
                if self.nodes[index].wake.is_some_and(|wake| wake <= self.now) {
                    self.nodes[index].wake = None;
                    self.input(index, Input::Tick);
                }
            }
            What::Frame { from, to, bytes } => {
                if self.links.contains(&(from.min(to), from.max(to))) {
                    let from = self.id(from);
                    self.input(to, Input::Frame { from, bytes, rtt: 2 * LATENCY });
                }
            }
            What::Dialled { from, to, target } => self.dialled(from, to, target),
            What::Lost { at, other } => {
                let still = self.linked(at, other).is_some();
                if !still {
                    self.input(at, Input::LinkDown { id: other, why: "gone".into() });
                }
            }
            What::Sample(index) => {
                let load = Load { in_flight: 3, slots: Some(64), ..Load::default() };
                let is_wanted =
                    self.nodes[index].mesh.as_ref().map(|m| m.sample_interval().is_some());
                if is_wanted == Some(true) {
                    self.input(index, Input::Loads { loads: vec![load], arrivals: vec![] });
                }
                if is_wanted.is_some() {
                    self.at(200 * MS, What::Sample(index));
                }
            }
        }
    }

    fn dialled(&mut self, from: usize, to: Option<usize>, target: Target) {
        if self.nodes[from].mesh.is_none() {
            return;
        }
        let is_there = |to: &usize| {
            !self.paused.contains(to)
                && self.nodes.get(*to).is_some_and(|node| node.mesh.is_some())
                && self.hears(from, *to)
                && self.hears(*to, from)
        };
        let why = match to.filter(is_there) {
            None => "nobody is there",
            Some(to) if to == from => "that is this node",
            Some(to) if self.links.contains(&(from.min(to), from.max(to))) => "doubled",
            Some(to) => return self.link(from, to),
        };
        self.input(from, Input::DialFailed { target, why: why.into() });
    }

    fn link(&mut self, from: usize, to: usize) {
        // A link with the same name elsewhere is replaced.
        for (at, other) in [(from, to), (to, from)] {
            let id = self.id(other);
            if let Some(before) = self.linked(at, id) {
                self.links.remove(&(at.min(before), at.max(before)));
                let other = self.id(at);
                self.at(LATENCY, What::Lost { at: before, other });
            }
        }
        self.links.insert((from.min(to), from.max(to)));
        let hellos = [self.hello(from), self.hello(to)];
        let [from_hello, to_hello] = hellos;
        for (at, other, hello, dialled) in
            [(to, from, from_hello, false), (from, to, to_hello, true)]
        {
            let peer = self.nodes[other].peer();
            let hello = Box::new(hello);
            self.input(at, Input::LinkUp { peer, hello, transport: Transport::Quic, dialled });
        }
    }

    pub(super) fn hello(&self, index: usize) -> Hello {
        self.mesh(index).hello()
    }

    /// How node `a` sees node `b`.
    pub(super) fn sees(&self, a: usize, b: usize) -> Liveness {
        let id = self.id(b);
        let members = self.mesh(a).status(self.now).members;
        members.iter().find(|m| m.peer.id == id).map_or(Liveness::Unknown, |m| m.state)
    }

    /// Whether all of `nodes` see each other alive.
    pub(super) fn converged(&self, nodes: &[usize]) -> bool {
        nodes.iter().all(|a| {
            nodes
                .iter()
                .all(|b| a == b || matches!(self.sees(*a, *b), Liveness::Alive | Liveness::Suspect))
        })
    }

    pub(super) fn when(&self, at: usize, wanted: impl Fn(&Event) -> bool) -> Option<Instant> {
        self.nodes[at].events.iter().find(|(_, event)| wanted(event)).map(|(at, _)| *at)
    }
}
