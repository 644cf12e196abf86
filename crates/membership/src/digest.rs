//! What a region has of each model, as one of its relays sums it up for everybody else.
//!
//! Every 400 ms the newest load frames of all members become totals per model and protocol. For each receiver some nodes
//! are drawn by their free slots, so that not everybody sends to the same ones.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use base::{ASSUMED_SLOTS, EngineName, Load, ModelName, NodeName, RegionName};
use rand::{Rng, RngExt as _};

use crate::{
    Candidate, Card, Descriptor, Digest, EngineDescriptor, LoadFrame, RegionOffer,
    view::{gone_at, within},
    wire::{CANDIDATES_MAX, OFFERS_MAX, PARTS_MAX, SLOTS_MAX, is_word},
};

/// Time from one digest to the next.
const INTERVAL: Duration = Duration::from_millis(400);
/// Nobody is said to wait longer.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Parts of a digest.
const PARTS: usize = PARTS_MAX as usize;
/// Longest part of a digest, encoded, as it is handed on.
const PART_BYTES_MAX: usize = 1100;
/// Draws that may hit who is drawn already before all are looked at.
const DRAWS_MAX: usize = 64;
/// Among so few all are looked at at once.
const FEW: usize = 32;

/// What a relay knows of one member of its region, itself included.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample<'a> {
    pub(crate) card: &'a Card,
    pub(crate) descriptor: &'a Descriptor,
    pub(crate) frame: &'a LoadFrame,
    /// How old the figures are: since they were taken.
    pub(crate) age: Duration,
}

impl Sample<'_> {
    /// Whether what it says counts.
    fn counts(&self) -> bool {
        !self.frame.draining
            && self.frame.epoch == self.card.facts.epoch
            && self.frame.descriptor_version == self.descriptor.version
            && self.frame.engines.len() == self.descriptor.engines.len()
            && self.age <= gone_at(self.frame.next)
    }

    /// Its engines that can be used, and what can be believed of their load.
    fn engines(&self) -> impl Iterator<Item = (&EngineDescriptor, Load)> {
        let engines = self.descriptor.engines.iter().zip(&self.frame.engines);
        engines.filter(|(_, load)| !load.unusable).map(|(engine, load)| {
            let most = engine.slots.unwrap_or(SLOTS_MAX);
            let slots = load.slots.unwrap_or(ASSUMED_SLOTS);
            (engine, within(Load { slots: Some(slots), ..*load }, Some(most)))
        })
    }
}

/// Sums up a region. Kept while the node lives, whether it is a relay or not: its digests count up.
#[derive(Debug)]
pub(crate) struct Digester {
    region: RegionName,
    epoch: u64,
    sequence: u64,
    next: Instant,
    summed: Instant,
    /// The mean age of the figures when they were summed up.
    age: Duration,
    /// Names and addresses of those that count.
    nodes: Vec<(NodeName, String)>,
    offers: Vec<Summed>,
}

/// What the region has of one model.
#[derive(Debug)]
struct Summed {
    /// Without candidates.
    offer: RegionOffer,
    rooms: Vec<Room>,
}

/// A node with free slots for a model.
#[derive(Clone, Copy, Debug)]
struct Room {
    node: usize,
    free: u32,
    slots: u32,
    /// Free slots of this one and all before it.
    up_to: u64,
}

#[derive(Debug, Default)]
struct Total {
    nodes: u32,
    free: u64,
    slots: u64,
    drain_rate: f64,
    waits: Vec<(Duration, u32)>,
    /// Shares of caches that are free, and how many.
    kv: (f64, u32),
    rooms: Vec<Room>,
}

impl Digester {
    /// The digester of process `epoch` of a node.
    pub(crate) fn new(region: RegionName, epoch: u64, now: Instant) -> Self {
        let (nodes, offers) = (vec![], vec![]);
        let (next, summed, age) = (now, now, Duration::ZERO);
        Self { region, epoch, sequence: 0, next, summed, age, nodes, offers }
    }

    /// When [`Self::sum`] is due.
    pub(crate) fn next_deadline(&self) -> Instant {
        self.next
    }

    /// It is not time yet.
    pub(crate) fn put_off(&mut self, until: Instant) {
        self.next = until;
    }

    /// Sums up all members that are alive, this one included.
    pub(crate) fn sum<'a>(&mut self, now: Instant, members: impl IntoIterator<Item = Sample<'a>>) {
        let members: Vec<_> = members.into_iter().filter(Sample::counts).collect();
        let shares = shares(&members);
        let mut totals: BTreeMap<(Option<&ModelName>, &str), Total> = BTreeMap::new();
        for (node, member) in members.iter().enumerate() {
            for (engine, load) in member.engines().filter(|(engine, _)| is_word(&engine.protocol)) {
                let load = engine
                    .id
                    .as_ref()
                    .and_then(|id| shares.get(id))
                    .map_or(load, |share| share.cut(load));
                let any = engine.models.is_empty().then_some(None);
                for model in engine.models.iter().map(Some).chain(any) {
                    totals.entry((model, &engine.protocol)).or_default().add(node, &load);
                }
            }
        }
        let mut totals: Vec<_> = totals.into_iter().collect();
        // What does not fit is what the fewest have.
        totals.sort_by_key(|(_, total)| Reverse(total.nodes));
        totals.truncate(OFFERS_MAX * PARTS);
        self.offers =
            totals.into_iter().map(|((model, protocol), t)| t.summed(model, protocol)).collect();
        // Who is idle speaks seldom, for there is nothing to say: its figures are not old.
        let is_busy = |m: &&Sample<'_>| m.frame.engines.iter().any(|load| load.in_flight > 0);
        let busy: Vec<_> = members.iter().filter(is_busy).map(|member| member.age).collect();
        self.age = if busy.is_empty() {
            mean(members.iter().map(|member| member.age))
        } else {
            mean(busy.into_iter())
        };
        self.nodes =
            members.iter().map(|m| (m.card.node.clone(), m.card.facts.peers.clone())).collect();
        (self.summed, self.next) = (now, now + INTERVAL);
    }

    /// The parts of one digest, with candidates drawn for one receiver. A region that has nothing says so.
    pub(crate) fn digests(&mut self, now: Instant, rng: &mut impl Rng) -> Vec<Digest> {
        self.sequence += 1;
        let offers: Vec<_> = self.offers.iter().map(|summed| self.offer(summed, rng)).collect();
        let parts = split(offers, PART_BYTES_MAX - HEAD_BYTES - self.region.as_str().len());
        let age = self.age + now.saturating_duration_since(self.summed);
        let count = u32::try_from(parts.len()).unwrap_or(PARTS_MAX);
        let digest = |(part, offers)| Digest {
            relay: None,
            region: self.region.clone(),
            epoch: self.epoch,
            sequence: self.sequence,
            age,
            part: (part, count),
            offers,
        };
        (0..).zip(parts).map(digest).collect()
    }

    fn offer(&self, summed: &Summed, rng: &mut impl Rng) -> RegionOffer {
        let candidate = |room: Room| {
            let (node, peers) = self.nodes.get(room.node)?.clone();
            Some(Candidate { node, peers, free: room.free, slots: room.slots })
        };
        let drawn = draw(&summed.rooms, CANDIDATES_MAX, rng);
        let candidates = drawn.into_iter().filter_map(candidate).collect();
        RegionOffer { candidates, ..summed.offer.clone() }
    }
}

impl Total {
    fn add(&mut self, node: usize, load: &Load) {
        let (free, slots) = (load.free(), load.slots.unwrap_or(0));
        self.free += u64::from(free);
        self.slots += u64::from(slots);
        self.drain_rate += load.drain_rate;
        self.waits.push((wait(load), slots));
        if let Some(kv_use) = load.kv_use {
            self.kv = (self.kv.0 + 1.0 - kv_use, self.kv.1 + 1);
        }
        match self.rooms.last_mut() {
            Some(room) if room.node == node => {
                room.free = room.free.saturating_add(free);
                room.slots = room.slots.saturating_add(slots);
            }
            _ => {
                self.nodes += 1;
                self.rooms.push(Room { node, free, slots, up_to: 0 });
            }
        }
    }

    fn summed(mut self, model: Option<&ModelName>, protocol: &str) -> Summed {
        self.waits.sort_unstable();
        let offer = RegionOffer {
            model: model.cloned(),
            protocol: protocol.to_owned(),
            free: u32::try_from(self.free).unwrap_or(u32::MAX),
            slots: u32::try_from(self.slots).unwrap_or(u32::MAX),
            drain_rate: self.drain_rate,
            wait: (percentile(&self.waits, 50), percentile(&self.waits, 90)),
            kv_free: (self.kv.1 > 0).then(|| self.kv.0 / f64::from(self.kv.1)),
            candidates: vec![],
        };
        self.rooms.retain(|room| room.free > 0);
        let mut up_to = 0;
        for room in &mut self.rooms {
            up_to += u64::from(room.free);
            room.up_to = up_to;
        }
        Summed { offer, rooms: self.rooms }
    }
}

/// What several nodes say of one engine they all front.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    /// Its slots, by who says most.
    all: u32,
    /// The sum of their shares.
    sum: u64,
}

impl Share {
    /// One node's share, where together they claim more than there is.
    fn cut(self, load: Load) -> Load {
        if self.sum <= u64::from(self.all) {
            return load;
        }
        let cut = |slots: u32| {
            let cut = u64::from(slots) * u64::from(self.all) / self.sum;
            u32::try_from(cut).unwrap_or(slots)
        };
        Load { slots: load.slots.map(cut), in_flight: cut(load.in_flight), ..load }
    }
}

/// Engines that several nodes front are counted once: each says its share.
fn shares<'a>(members: &'a [Sample<'_>]) -> BTreeMap<&'a EngineName, Share> {
    let mut shares: BTreeMap<_, Share> = BTreeMap::new();
    for (engine, load) in members.iter().flat_map(Sample::engines) {
        if let (Some(id), Some(slots)) = (&engine.id, engine.slots) {
            let share = shares.entry(id).or_default();
            share.all = share.all.max(slots);
            share.sum += u64::from(load.slots.unwrap_or(0));
        }
    }
    shares
}

/// How long a call that came now would wait for a slot.
fn wait(load: &Load) -> Duration {
    if load.free() > 0 {
        return Duration::ZERO;
    }
    let ahead = f64::from(load.queued) + 1.0;
    let seconds = if load.drain_rate > 0.0 {
        ahead / load.drain_rate
    } else {
        ahead * load.service_time.as_secs_f64() / f64::from(load.slots.unwrap_or(0).max(1))
    };
    let is_known = seconds > 0.0 && seconds < WAIT_MAX.as_secs_f64();
    if is_known { Duration::from_secs_f64(seconds) } else { WAIT_MAX }
}

/// Of sorted waits, weighted by slots.
fn percentile(waits: &[(Duration, u32)], percent: u64) -> Duration {
    let all: u64 = waits.iter().map(|(_, slots)| u64::from(*slots)).sum();
    let mut below = 0;
    let reached = waits.iter().find(|(_, slots)| {
        below += u64::from(*slots);
        below * 100 >= all * percent
    });
    reached.map_or(Duration::ZERO, |(wait, _)| *wait)
}

fn mean(ages: impl ExactSizeIterator<Item = Duration>) -> Duration {
    let count = u32::try_from(ages.len()).unwrap_or(u32::MAX).max(1);
    ages.sum::<Duration>() / count
}

/// Up to `most` of `rooms`, one after the other, each with the probability of its share of the slots that are left.
fn draw(rooms: &[Room], most: usize, rng: &mut impl Rng) -> Vec<Room> {
    let all = rooms.last().map_or(0, |room| room.up_to);
    let mut drawn: Vec<Room> = Vec::with_capacity(most.min(rooms.len()));
    for _ in 0..if rooms.len() > FEW { DRAWS_MAX } else { 0 } {
        let at = rng.random_range(0..all);
        let place = rooms.partition_point(|room| room.up_to <= at);
        let Some(room) = rooms.get(place) else { break };
        if drawn.iter().all(|before| before.node != room.node) {
            drawn.push(*room);
        }
        if drawn.len() == most {
            return drawn;
        }
    }
    // Few, or a few have nearly everything. Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006: the
    // highest of u^(1/w) are drawn as if one after the other.
    let left = rooms.iter().filter(|room| drawn.iter().all(|before| before.node != room.node));
    let mut keyed: Vec<_> = left
        .map(|room| (rng.random_range(f64::MIN_POSITIVE..1.0).ln() / f64::from(room.free), *room))
        .collect();
    keyed.sort_by(|a, b| b.0.total_cmp(&a.0));
    drawn.extend(keyed.into_iter().map(|(_, room)| room).take(most - drawn.len()));
    drawn
}

/// Bytes of a part besides its offers and the region's name, at most: tags, lengths, and numbers at their longest.
const HEAD_BYTES: usize = 64;
/// Bytes of an offer besides names and candidates, at most.
const OFFER_BYTES: usize = 48;
/// Bytes of a candidate besides its name and its address, at most.
const CANDIDATE_BYTES: usize = 21;

/// The offers in parts that fit: at most 64, if need be with fewer candidates, or without the last offers.
fn split(offers: Vec<RegionOffer>, room: usize) -> Vec<Vec<RegionOffer>> {
    let is_too_many = |places: &[Place]| places.last().is_some_and(|last| last.part >= PARTS);
    let mut most = CANDIDATES_MAX;
    let mut places = places(&offers, most, room);
    while is_too_many(&places) && most > 0 {
        most /= 2;
        places = self::places(&offers, most, room);
    }
    let mut parts = vec![vec![]];
    for (mut offer, place) in offers.into_iter().zip(places).filter(|(_, p)| p.part < PARTS) {
        offer.candidates.truncate(place.candidates);
        parts.resize_with(place.part + 1, Vec::new);
        if let Some(part) = parts.last_mut() {
            part.push(offer);
        }
    }
    parts
}

/// Where an offer goes, and with how many candidates.
#[derive(Clone, Copy)]
struct Place {
    part: usize,
    candidates: usize,
}

fn places(offers: &[RegionOffer], most: usize, room: usize) -> Vec<Place> {
    let (mut part, mut count, mut bytes) = (0, 0, 0);
    let place = |offer| {
        let (candidates, more) = fitting(offer, most, room);
        if count > 0 && (bytes + more > room || count >= OFFERS_MAX) {
            (part, count, bytes) = (part + 1, 0, 0);
        }
        (count, bytes) = (count + 1, bytes + more);
        Place { part, candidates }
    };
    offers.iter().map(place).collect()
}

/// How many candidates of an offer fit into a part, and how many bytes it takes with them.
fn fitting(offer: &RegionOffer, most: usize, room: usize) -> (usize, usize) {
    let model = offer.model.as_ref().map_or(0, |model| model.as_str().len());
    let mut bytes = OFFER_BYTES + model + offer.protocol.len();
    let mut count = 0;
    for candidate in offer.candidates.iter().take(most) {
        let more = CANDIDATE_BYTES + candidate.node.as_str().len() + candidate.peers.len();
        if bytes + more > room {
            break;
        }
        (bytes, count) = (bytes + more, count + 1);
    }
    (count, bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::{DATAGRAM_BYTES_MAX, Facts, Frame, NodeId, decode, encode};

    const MS: Duration = Duration::from_millis(1);

    /// A node of a test.
    pub(crate) struct Node {
        pub(crate) card: Card,
        pub(crate) descriptor: Descriptor,
        pub(crate) frame: LoadFrame,
    }

    impl Node {
        pub(crate) fn sample(&self) -> Sample<'_> {
            let Self { card, descriptor, frame } = self;
            Sample { card, descriptor, frame, age: 100 * MS }
        }
    }

    pub(crate) fn load(in_flight: u32) -> Load {
        Load { in_flight, slots: Some(64), drain_rate: 10.0, ..Load::default() }
    }

    pub(crate) fn node(i: usize, models: &[&str], loads: &[Load]) -> Node {
        let facts = Facts {
            epoch: 7,
            bump: 0,
            peers: format!("10.0.0.{i}:7700"),
            gossip: format!("10.0.0.{i}:7701"),
            zone: None,
            descriptor: [0; 32],
            release: "0".into(),
            protocol_max: 2,
        };
        let engine = |e: usize| EngineDescriptor {
            name: format!("gpu-{e}").parse().unwrap(),
            protocol: "kserve-v2".into(),
            models: models.iter().map(|model| model.parse().unwrap()).collect(),
            services: vec![],
            id: None,
            slots: Some(64),
        };
        Node {
            card: Card {
                id: NodeId((i as u128).to_be_bytes()),
                node: format!("n{i}").parse().unwrap(),
                region: "eu".parse().unwrap(),
                facts,
                signed: [].into(),
            },
            descriptor: Descriptor { version: 1, engines: (0..loads.len()).map(engine).collect() },
            frame: LoadFrame {
                epoch: 7,
                sequence: 1,
                descriptor_version: 1,
                sample_age: Duration::ZERO,
                next: 200 * MS,
                draining: false,
                engines: loads.to_vec(),
                arrivals: vec![],
            },
        }
    }

    fn summed(nodes: &[Node]) -> Digester {
        let mut digester = Digester::new("eu".parse().unwrap(), 7, base::clock::now());
        digester.sum(base::clock::now(), nodes.iter().map(Node::sample));
        digester
    }

    fn digests(nodes: &[Node]) -> Vec<Digest> {
        summed(nodes).digests(base::clock::now(), &mut StdRng::seed_from_u64(1))
    }

    fn offers(nodes: &[Node]) -> Vec<RegionOffer> {
        digests(nodes).into_iter().flat_map(|digest| digest.offers).collect()
    }

    #[test]
    fn what_the_members_have_is_summed_up_per_model() {
        let kv = |kv_use| Load { kv_use: Some(kv_use), ..load(40) };
        let nodes = [
            node(1, &["llama"], &[load(4), kv(0.5)]),
            node(2, &["llama", "qwen"], &[kv(0.1)]),
            node(3, &[], &[load(0)]),
        ];
        let offers = offers(&nodes);
        let figures: Vec<_> = offers
            .iter()
            .map(|o| {
                (o.model.as_ref().map(ToString::to_string), o.free, o.slots, o.candidates.len())
            })
            .collect();
        let want = [
            (Some("llama".to_owned()), 108, 192, 2),
            (None, 64, 64, 1),
            (Some("qwen".to_owned()), 24, 64, 1),
        ];
        assert_eq!(figures, want);
        assert!((offers[0].kv_free.unwrap() - 0.7).abs() < 1e-9 && offers[1].kv_free.is_none());
        assert!((offers[0].drain_rate - 30.0).abs() < 1e-9);
    }

    #[test]
    fn who_drains_or_is_silent_or_fails_or_speaks_of_something_else_counts_as_nothing() {
        let mut nodes: Vec<_> = (0..6).map(|i| node(i, &["llama"], &[load(0)])).collect();
        nodes[0].frame.draining = true;
        nodes[1].frame.epoch = 6;
        nodes[2].frame.descriptor_version = 2;
        nodes[3].frame.engines[0].unusable = true;
        nodes[4].frame.engines.clear();
        let mut digester = summed(&[]);
        let now = base::clock::now();
        let late = Sample { age: 1_601 * MS, ..nodes[5].sample() };
        digester.sum(now, nodes[..5].iter().map(Node::sample).chain([late]));
        let digests = digester.digests(now, &mut StdRng::seed_from_u64(1));
        assert_eq!((digests.len(), digests[0].part, digests[0].offers.len()), (1, (0, 1), 0));
        digester.sum(now, [Sample { age: 1_600 * MS, ..nodes[5].sample() }]);
        assert_eq!(digester.digests(now, &mut StdRng::seed_from_u64(1))[0].offers[0].free, 64);
    }

    #[test]
    fn nobody_has_more_free_slots_than_its_descriptor_says_and_shared_engines_count_once() {
        let liar = node(1, &["llama"], &[Load { slots: Some(1_000_000), ..load(0) }]);
        assert_eq!(offers(&[liar])[0].free, 64);
        let shared: Vec<_> = (0..4)
            .map(|i| {
                let mut node = node(i, &["llama"], &[load(0)]);
                node.descriptor.engines[0].id = Some("big".parse().unwrap());
                node
            })
            .collect();
        assert_eq!((offers(&shared)[0].free, offers(&shared)[0].slots), (64, 64));
        let shares: Vec<_> = shared
            .into_iter()
            .map(|mut node| {
                node.frame.engines[0].slots = Some(16);
                node
            })
            .collect();
        assert_eq!(offers(&shares)[0].candidates.iter().map(|c| c.free).sum::<u32>(), 64);
    }

    #[test]
    fn waits_are_of_queues_and_weighted_by_slots() {
        let full = |queued, drain_rate, slots| Load {
            queued,
            drain_rate,
            slots: Some(slots),
            service_time: Duration::from_secs(4),
            ..load(64)
        };
        let nodes = [
            node(1, &["llama"], &[load(0)]),
            node(2, &["llama"], &[full(9, 10.0, 64), full(15, 0.0, 2)]),
        ];
        let offer = &offers(&nodes)[0];
        assert_eq!(offer.wait, (Duration::from_secs(1), Duration::from_secs(1)));
        let nodes = [node(1, &["llama"], &[full(0, 0.0, 2), full(15, 0.0, 62), load(64)])];
        let one = Duration::from_secs(4) * 16 / 62;
        assert_eq!(offers(&nodes)[0].wait.0, 100 * MS);
        assert!(offers(&nodes)[0].wait.1.abs_diff(one) < MS);
        let unknown = Load { drain_rate: 0.0, service_time: Duration::ZERO, ..load(64) };
        assert_eq!(offers(&[node(1, &["llama"], &[unknown])])[0].wait.0, WAIT_MAX);
    }

    #[test]
    fn candidates_are_drawn_by_their_free_slots_anew_for_each_receiver() {
        for count in [10, 100] {
            // The odd ones have three times the free slots.
            let nodes: Vec<_> = (0..count)
                .map(|i| node(i, &["llama"], &[load(if i % 2 == 0 { 48 } else { 16 })]))
                .collect();
            let mut digester = summed(&nodes);
            let mut rng = StdRng::seed_from_u64(3);
            let (mut first, mut all) = ([0; 2], BTreeMap::new());
            for _ in 0..2_000 {
                let digests = digester.digests(base::clock::now(), &mut rng);
                let candidates = &digests[0].offers[0].candidates;
                let mut names: Vec<_> = candidates.iter().map(|c| c.node.clone()).collect();
                first[usize::from(candidates[0].free == 48)] += 1;
                names.sort();
                names.dedup();
                assert_eq!(names.len(), CANDIDATES_MAX);
                names.into_iter().for_each(|name| *all.entry(name).or_insert(0) += 1);
            }
            assert!((1_430..1_570).contains(&first[1]), "{count}: {first:?}");
            assert_eq!(all.len(), count, "everybody's turn comes");
        }
    }

    #[test]
    fn who_has_nearly_everything_is_drawn_once_and_who_is_full_never() {
        let mut nodes: Vec<_> = (0..50).map(|i| node(i, &["llama"], &[load(63)])).collect();
        nodes[7].descriptor.engines[0].slots = Some(SLOTS_MAX);
        nodes[7].frame.engines[0] = Load { slots: Some(SLOTS_MAX), ..load(0) };
        nodes[8].frame.engines[0] = load(64);
        let candidates = offers(&nodes)[0].candidates.clone();
        assert_eq!((candidates.len(), candidates[0].node.as_str()), (8, "n7"));
        assert!(candidates[1..].iter().all(|c| c.free == 1));
    }

    #[test]
    fn parts_fit_into_datagrams_when_they_are_handed_on_and_hold_every_model() {
        let names: Vec<_> = (0..300).map(|i| format!("org/{}-{i}", "x".repeat(i % 60))).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        for models in [1, 5, 60, 300] {
            let mut nodes: Vec<_> =
                (0..20).map(|i| node(i, &names[..models], &[load(i as u32)])).collect();
            nodes[3].card.facts.peers = format!("{}:7700", "h".repeat(250));
            let digests = digests(&nodes);
            assert!(digests.len() <= PARTS);
            let mut offers = 0;
            for mut digest in digests {
                digest.relay = Some(NodeId([255; 16]));
                (digest.epoch, digest.sequence) = (u64::MAX, u64::MAX);
                digest.age = Duration::from_secs(u32::MAX.into());
                let bytes = encode(&Frame::Digest(digest.clone()));
                assert!(bytes.len() <= PART_BYTES_MAX && bytes.len() < DATAGRAM_BYTES_MAX);
                assert!(matches!(decode(&bytes), Ok(Frame::Digest(_))));
                offers += digest.offers.len();
            }
            assert_eq!(offers, models);
        }
    }

    #[test]
    fn what_no_receiver_could_read_is_left_out() {
        let mut odd = node(1, &["llama"], &[load(0)]);
        odd.descriptor.engines[0].protocol = "no word".into();
        assert!(offers(&[odd]).is_empty());
        let engines = [load(0); 3];
        let many: Vec<_> = (0..2_000).map(|i| format!("m{i}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let nodes = [
            node(1, &many, &engines),
            node(2, &["llama"], &engines),
            node(3, &["llama"], &engines),
        ];
        let digests = digests(&nodes);
        assert!(digests.len() <= PARTS);
        assert!(
            digests.iter().all(|digest| decode(&encode(&Frame::Digest(digest.clone()))).is_ok())
        );
    }

    #[test]
    fn figures_age_and_digests_count_up() {
        let now = base::clock::now();
        let mut digester = summed(&[]);
        digester.sum(now, [node(1, &["llama"], &[load(0)]).sample()]);
        assert_eq!(digester.next_deadline(), now + INTERVAL);
        let mut rng = StdRng::seed_from_u64(1);
        let first = digester.digests(now, &mut rng);
        let second = digester.digests(now + 20 * MS, &mut rng);
        assert_eq!((first[0].age, second[0].age), (100 * MS, 120 * MS));
        assert!(second[0].sequence > first[0].sequence && first[0].epoch == 7);
    }
}
