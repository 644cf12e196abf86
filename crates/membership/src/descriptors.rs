//! What nodes serve, by the SHA-256 their cards name: which bodies are wanted, whom to ask, and what is handed on.
//!
//! A body is as good from anybody who has it: its hash says whether it is the one. It is kept once however many cards name
//! it, and goes with the last of them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem::size_of,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Descriptor, EngineDescriptor, Frame, NodeId, WireError,
    wire::{ASKED_MAX, DESCRIPTOR_BYTES_MAX, decode_descriptor, encode_descriptor},
};

/// SHA-256 of an encoded descriptor.
pub(crate) type Hash = [u8; 32];

/// Hashes known at once; more cards than that are not listened to either.
const HASHES_MAX: usize = 16_384;
/// Memory of all bodies, encoded and decoded.
const BYTES_MAX: usize = 64 << 20;
/// Hashes asked for and not yet answered.
const IN_FLIGHT_MAX: usize = 64;
/// Nodes remembered that may have a body.
const SOURCES_MAX: usize = 8;
/// Who has not answered within this is not waited for.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest wait before everybody is asked again who had no answer.
const AGAIN_MAX: Duration = Duration::from_secs(32);
/// Whether somebody who has a body is linked by now is looked at this often.
const LOOK: Duration = Duration::from_millis(500);
/// A body there is no room for is asked for again after this.
const NO_ROOM: Duration = Duration::from_secs(60);
/// Bodies are handed on in frames of about this, so that other frames come between.
const FRAME_BYTES: usize = 60 << 10;
/// One answer is not longer; what is missing is asked for again.
const ANSWER_BYTES_MAX: usize = 512 << 10;

/// Descriptors by their hash.
#[derive(Debug, Default)]
pub(crate) struct Bodies {
    entries: BTreeMap<Hash, Entry>,
    /// Memory of the bodies.
    bytes: usize,
    own: Option<Hash>,
    own_before: Option<Hash>,
    /// What is to be asked for, the longest waiting first.
    queue: VecDeque<Hash>,
    /// What was asked for, and until when an answer is waited for.
    in_flight: BTreeMap<Hash, Instant>,
    /// No answer is overdue before.
    overdue: Option<Instant>,
    /// When the queue is to be looked at; `None`: it is empty, or everything waits for an answer.
    look: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    /// Cards that name it.
    cards: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    Here(Body),
    Wanted(Box<Wanted>),
    /// What hashes to this is no descriptor: its owner's fault, and of no use to ask for again.
    Broken {
        is_absurd: bool,
    },
}

#[derive(Debug)]
struct Body {
    descriptor: Arc<Descriptor>,
    encoded: Arc<[u8]>,
}

#[derive(Debug, Default)]
struct Wanted {
    /// Whose cards name it.
    owners: Vec<NodeId>,
    /// Who may have it, whoever was asked last at the end.
    sources: VecDeque<NodeId>,
    tries: u32,
    not_before: Option<Instant>,
}

/// A body that was wanted, and has come.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) hash: Hash,
    /// An error: it is no descriptor that can be used.
    pub(crate) body: Result<Arc<Descriptor>, WireError>,
    /// Whose cards have named it since it was wanted; they may name another by now.
    pub(crate) owners: Vec<NodeId>,
}

impl Bodies {
    /// What this node serves: replaces what it served before.
    pub(crate) fn own(
        &mut self,
        descriptor: Descriptor,
        sha256: impl Fn(&[u8]) -> Hash,
    ) -> (Arc<Descriptor>, Arrived) {
        let encoded = encode_descriptor(&descriptor);
        let hash = sha256(&encoded);
        let body = Body { descriptor: Arc::new(descriptor), encoded: encoded.into() };
        let descriptor = Arc::clone(&body.descriptor);
        let entry = self
            .entries
            .entry(hash)
            .or_insert(Entry { cards: 0, state: State::Broken { is_absurd: false } });
        entry.cards += 1;
        let mut owners = Vec::new();
        if !matches!(entry.state, State::Here(_)) {
            self.bytes += body.bytes();
            if let State::Wanted(wanted) = std::mem::replace(&mut entry.state, State::Here(body)) {
                owners = wanted.owners;
            }
            self.forget_asking(&hash);
        }
        // The card that names the one before is not replaced yet.
        let before = self.own.replace(hash);
        if let Some(older) = std::mem::replace(&mut self.own_before, before) {
            self.release(&older);
        }
        let arrived = Arrived { hash, body: Ok(Arc::clone(&descriptor)), owners };
        (descriptor, arrived)
    }

    /// One more card names `hash`; `sources` may have the body, its owner the first. Returns its body, if it is here already.
    /// Each call is undone by one [`Self::release`].
    pub(crate) fn want(
        &mut self,
        now: Instant,
        hash: Hash,
        sources: &[NodeId],
    ) -> Option<Arc<Descriptor>> {
        if let Some(entry) = self.entries.get_mut(&hash) {
            entry.cards = entry.cards.saturating_add(1);
        } else if self.entries.len() < HASHES_MAX {
            self.entries.insert(hash, Entry { cards: 1, state: State::Wanted(Box::default()) });
            self.queue.push_back(hash);
        }
        if let Some(Entry { state: State::Wanted(wanted), .. }) = self.entries.get_mut(&hash) {
            wanted.owners.extend(sources.first().filter(|owner| !wanted.owners.contains(owner)));
        }
        for source in sources {
            self.offered(now, &hash, *source);
        }
        self.get(&hash).cloned()
    }

    /// Somebody else may have the body of `hash`, which is wanted already.
    pub(crate) fn offered(&mut self, now: Instant, hash: &Hash, source: NodeId) {
        if let Some(Entry { state: State::Wanted(wanted), .. }) = self.entries.get_mut(hash)
            && wanted.sources.len() < SOURCES_MAX
            && !wanted.sources.contains(&source)
        {
            wanted.sources.push_back(source);
            self.look_at(now);
        }
    }

    /// One card fewer names `hash`; the last one takes the body with it.
    pub(crate) fn release(&mut self, hash: &Hash) {
        let Some(entry) = self.entries.get_mut(hash) else { return };
        entry.cards = entry.cards.saturating_sub(1);
        if entry.cards == 0
            && let Some(Entry { state, .. }) = self.entries.remove(hash)
        {
            match state {
                State::Here(body) => self.bytes -= body.bytes(),
                State::Wanted(_) => self.forget_asking(hash),
                State::Broken { .. } => {}
            }
        }
    }

    /// Whom to ask for what now, among the nodes that are linked: one [`Frame::DescriptorsAsk`] each.
    pub(crate) fn asks(
        &mut self,
        now: Instant,
        is_linked: impl Fn(NodeId) -> bool,
    ) -> Vec<(NodeId, Vec<Hash>)> {
        let mut overdue = vec![];
        if self.overdue.is_some_and(|due| due <= now) {
            overdue = self.in_flight.extract_if(.., |_, until| *until <= now).collect();
            self.queue.extend(overdue.iter().map(|(hash, _)| hash));
            self.overdue = self.in_flight.values().copied().min();
        }
        if overdue.is_empty() && self.look.is_none_or(|look| look > now) {
            return vec![];
        }
        self.look = None;
        let mut asks: BTreeMap<NodeId, Vec<Hash>> = BTreeMap::new();
        for _ in 0..self.queue.len() {
            if self.in_flight.len() >= IN_FLIGHT_MAX {
                break;
            }
            let Some(hash) = self.queue.pop_front() else { break };
            let Some(Entry { state: State::Wanted(wanted), .. }) = self.entries.get_mut(&hash)
            else {
                continue;
            };
            if let Some((source, until)) = wanted.ask(now, &is_linked) {
                asks.entry(source).or_default().push(hash);
                self.in_flight.insert(hash, until);
                self.overdue = Some(self.overdue.map_or(until, |due| due.min(until)));
            } else {
                self.queue.push_back(hash);
                self.look_at(now + LOOK);
            }
        }
        // Should all cards go whose bodies are in flight, the others are not forgotten.
        if self.look.is_none() {
            self.look_at(now + ANSWER);
        }
        asks.into_iter().collect()
    }

    /// When [`Self::asks`] is to be called, if nothing changes before.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.overdue.filter(|_| !self.in_flight.is_empty()).into_iter().chain(self.look).min()
    }

    /// A body came. `None`: nobody wanted it, or there is no room. An error: it is no descriptor that can be used.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        bytes: &[u8],
        sha256: impl Fn(&[u8]) -> Hash,
    ) -> Option<Arrived> {
        if bytes.len() > DESCRIPTOR_BYTES_MAX {
            return None;
        }
        let hash = sha256(bytes);
        if !matches!(self.entries.get(&hash)?.state, State::Wanted(_)) {
            return None;
        }
        self.forget_asking(&hash);
        let entry = self.entries.get_mut(&hash)?;
        let State::Wanted(wanted) = &mut entry.state else { return None };
        let descriptor = match decode_descriptor(bytes) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                let owners = std::mem::take(&mut wanted.owners);
                entry.state = State::Broken { is_absurd: matches!(error, WireError::Slots(_)) };
                self.look_at(now);
                return Some(Arrived { hash, body: Err(error), owners });
            }
        };
        let body = Body { descriptor: Arc::new(descriptor), encoded: bytes.into() };
        if self.bytes + body.bytes() > BYTES_MAX {
            wanted.not_before = Some(now + NO_ROOM);
            self.queue.push_back(hash);
            self.look_at(now);
            return None;
        }
        self.bytes += body.bytes();
        let descriptor = Arc::clone(&body.descriptor);
        let owners = std::mem::take(&mut wanted.owners);
        entry.state = State::Here(body);
        self.look_at(now);
        Some(Arrived { hash, body: Ok(descriptor), owners })
    }

    /// Whether what hashes to this was seen, and speaks of an engine such as there is none.
    pub(crate) fn is_absurd(&self, hash: &Hash) -> bool {
        self.entries
            .get(hash)
            .is_some_and(|entry| matches!(entry.state, State::Broken { is_absurd: true }))
    }

    /// The body of `hash`, if it is here.
    pub(crate) fn get(&self, hash: &Hash) -> Option<&Arc<Descriptor>> {
        self.body(hash).map(|body| &body.descriptor)
    }

    /// What of `hashes` is here, as frames.
    pub(crate) fn answer(&self, hashes: &[Hash]) -> Vec<Frame> {
        let hashes: BTreeSet<_> = hashes.iter().take(ASKED_MAX).collect();
        let (mut frames, mut chunk, mut bytes, mut all) = (vec![], vec![], 0, 0);
        for body in hashes.into_iter().filter_map(|hash| self.body(hash)) {
            let more = body.encoded.len() + 4;
            if all + more > ANSWER_BYTES_MAX {
                break;
            }
            if bytes + more > FRAME_BYTES && !chunk.is_empty() {
                frames.push(Frame::Descriptors(std::mem::take(&mut chunk)));
                bytes = 0;
            }
            chunk.push(body.encoded.to_vec());
            (bytes, all) = (bytes + more, all + more);
        }
        if !chunk.is_empty() {
            frames.push(Frame::Descriptors(chunk));
        }
        frames
    }

    fn body(&self, hash: &Hash) -> Option<&Body> {
        match &self.entries.get(hash)?.state {
            State::Here(body) => Some(body),
            State::Wanted(_) | State::Broken { .. } => None,
        }
    }

    /// What is wanted is either in the queue or in flight; this is neither any more.
    fn forget_asking(&mut self, hash: &Hash) {
        if self.in_flight.remove(hash).is_none() {
            self.queue.retain(|queued| queued != hash);
        }
    }

    fn look_at(&mut self, at: Instant) {
        if !self.queue.is_empty() {
            self.look = Some(self.look.map_or(at, |look| look.min(at)));
        }
    }
}

impl Wanted {
    /// Whom to ask now, and until when to wait for the answer.
    fn ask(
        &mut self,
        now: Instant,
        is_linked: impl Fn(NodeId) -> bool,
    ) -> Option<(NodeId, Instant)> {
        if self.not_before.is_some_and(|not_before| not_before > now) {
            return None;
        }
        let place = self.sources.iter().position(|source| is_linked(*source))?;
        let source = self.sources.remove(place)?;
        self.sources.push_back(source);
        self.tries = self.tries.saturating_add(1);
        let rounds = self.tries / u32::try_from(self.sources.len()).unwrap_or(1).max(1);
        let again = ANSWER * 2_u32.pow(rounds.min(5)).div_ceil(2);
        self.not_before = (rounds > 0).then(|| now + again.min(AGAIN_MAX));
        Some((source, now + ANSWER))
    }
}

impl Body {
    /// Its memory, about.
    fn bytes(&self) -> usize {
        /// A short text of its own on the heap.
        const TEXT: usize = 48;
        let engine = |engine: &EngineDescriptor| {
            let texts = engine.models.len() + engine.services.len() + 3;
            size_of::<EngineDescriptor>() + texts * TEXT
        };
        self.encoded.len() * 2 + self.descriptor.engines.iter().map(engine).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SLOTS_MAX, encode};

    /// No SHA-256, but as good as one here.
    fn hash(bytes: &[u8]) -> Hash {
        let mut hash: Hash = [0; 32];
        for (i, byte) in bytes.iter().enumerate() {
            let at = &mut hash[i % 31];
            *at = at.wrapping_mul(31).wrapping_add(*byte) ^ (i / 31) as u8;
        }
        hash
    }

    fn descriptor(version: u32, engines: usize) -> Descriptor {
        let engine = |i: usize| EngineDescriptor {
            name: format!("gpu-{i}").parse().unwrap(),
            protocol: "kserve-v2".into(),
            models: vec!["llama".parse().unwrap()],
            services: vec![],
            id: None,
            slots: Some(64),
        };
        Descriptor { version, engines: (0..engines).map(engine).collect() }
    }

    fn node(i: u8) -> NodeId {
        NodeId([i; 16])
    }

    #[test]
    fn a_body_goes_from_its_owner_to_whoever_wants_it_and_on() {
        let now = base::clock::now();
        let (mut owner, mut other) = (Bodies::default(), Bodies::default());
        let name = owner.own(descriptor(1, 2), hash).1.hash;
        assert_eq!(other.want(now, name, &[node(1)]), None);
        assert_eq!(other.next_deadline(), Some(now));
        let asks = other.asks(now, |_| true);
        assert_eq!(asks, [(node(1), vec![name])]);
        assert!(other.asks(now, |_| true).is_empty(), "asked once");
        let [Frame::Descriptors(bodies)] = &owner.answer(&asks[0].1)[..] else { panic!("one") };
        let Arrived { hash: came, body, owners } = other.take(now, &bodies[0], hash).unwrap();
        assert_eq!(owners, [node(1)]);
        let body = body.unwrap();
        assert_eq!((came, &*body), (name, &descriptor(1, 2)));
        assert!(other.take(now, &bodies[0], hash).is_none(), "it is here");
        assert_eq!(other.answer(&[name]), owner.answer(&[name]), "handed on as it came");
        assert_eq!(other.want(now, name, &[node(2)]), Some(body), "no need to ask again");
        assert_eq!((other.next_deadline(), other.asks(now, |_| true)), (None, vec![]));
    }

    #[test]
    fn a_body_is_kept_until_the_last_card_that_names_it_goes() {
        let now = base::clock::now();
        let mut bodies = Bodies::default();
        let first = bodies.own(descriptor(1, 1), hash).1.hash;
        assert!(bodies.want(now, first, &[]).is_some());
        let second = bodies.own(descriptor(2, 1), hash).1.hash;
        assert!(bodies.get(&first).is_some() && bodies.get(&second).is_some());
        bodies.release(&first);
        assert!(bodies.get(&first).is_some(), "this node's card names it yet");
        bodies.own(descriptor(2, 1), hash);
        assert!(bodies.get(&first).is_none() && bodies.get(&second).is_some(), "the same again");
        bodies.release(&second);
        bodies.release(&second);
        assert_eq!((bodies.entries.len(), bodies.bytes), (0, 0));
    }

    #[test]
    fn who_does_not_answer_is_asked_less_and_others_instead() {
        let now = base::clock::now();
        let mut bodies = Bodies::default();
        bodies.want(now, [7; 32], &[node(1), node(2)]);
        bodies.offered(now, &[7; 32], node(3));
        let mut asked = vec![];
        for ms in (0..120_000).step_by(100) {
            let now = now + Duration::from_millis(ms);
            let asks = bodies.asks(now, |id| id != node(2));
            asked.extend(asks.iter().map(|(id, _)| (ms, id.0[0])));
        }
        assert_eq!(asked[..3], [(0, 1), (2_000, 3), (4_000, 1)]);
        assert!((5..20).contains(&asked.len()), "{asked:?}");
        assert!(asked.iter().any(|(ms, _)| *ms > 80_000), "it is never given up: {asked:?}");
    }

    #[test]
    fn without_a_link_nothing_is_asked_and_with_one_it_is_soon() {
        let now = base::clock::now();
        let mut bodies = Bodies::default();
        bodies.want(now, [7; 32], &[node(1)]);
        assert!(bodies.asks(now, |_| false).is_empty());
        let due = bodies.next_deadline().unwrap();
        assert!(due > now && due <= now + LOOK);
        assert_eq!(bodies.asks(due, |_| true).len(), 1);
    }

    #[test]
    fn hashes_nobody_answers_for_do_not_hold_up_the_others() {
        let now = base::clock::now();
        let (mut owner, mut bodies) = (Bodies::default(), Bodies::default());
        for i in 0..200_u8 {
            let mut never = [0; 32];
            never[31] = i;
            bodies.want(now, never, &[node(1)]);
        }
        let name = owner.own(descriptor(1, 1), hash).1.hash;
        bodies.want(now, name, &[node(2)]);
        let mut most = 0;
        let came = (0..100).any(|step| {
            let now = now + Duration::from_millis(step * 100);
            let asks = bodies.asks(now, |_| true);
            most = most.max(bodies.in_flight.len());
            asks.iter().any(|(id, hashes)| *id == node(2) && hashes == &[name])
        });
        assert!(came && most == IN_FLIGHT_MAX, "{most}");
    }

    #[test]
    fn cards_that_go_while_their_bodies_are_in_flight_hold_up_nobody() {
        let now = base::clock::now();
        let mut bodies = Bodies::default();
        for i in 0..100 {
            bodies.want(now, [i; 32], &[node(1)]);
        }
        let asked = bodies.asks(now, |_| true).remove(0).1;
        asked.iter().for_each(|hash| bodies.release(hash));
        let due = bodies.next_deadline().unwrap();
        assert!(due <= now + ANSWER);
        assert_eq!(bodies.asks(due, |_| true).remove(0).1.len(), 100 - IN_FLIGHT_MAX);
    }

    #[test]
    fn garbage_is_asked_for_once_and_what_nobody_wants_is_not_taken() {
        let now = base::clock::now();
        let mut bodies = Bodies::default();
        assert!(bodies.take(now, &encode_descriptor(&descriptor(1, 1)), hash).is_none());
        let garbage = [0xff; 100];
        bodies.want(now, hash(&garbage), &[node(1)]);
        bodies.asks(now, |_| true);
        assert!(matches!(bodies.take(now, &garbage, hash), Some(Arrived { body: Err(_), .. })));
        assert!(!bodies.is_absurd(&hash(&garbage)));
        assert!(bodies.take(now, &vec![0; DESCRIPTOR_BYTES_MAX + 1], hash).is_none());
        let later = now + Duration::from_secs(100);
        assert!(bodies.asks(later, |_| true).is_empty() && bodies.next_deadline().is_none());
    }

    #[test]
    fn more_slots_than_an_engine_can_have_are_told_from_garbage() {
        let now = base::clock::now();
        let mut bodies = Bodies::default();
        for (slots, is_absurd) in [(SLOTS_MAX, false), (SLOTS_MAX + 1, true), (u32::MAX, true)] {
            let mut body = descriptor(1, 2);
            body.engines[1].slots = Some(slots);
            let encoded = encode_descriptor(&body);
            bodies.want(now, hash(&encoded), &[node(1)]);
            let Arrived { hash: came, body: taken, .. } = bodies.take(now, &encoded, hash).unwrap();
            assert_eq!((taken.is_err(), bodies.is_absurd(&came)), (is_absurd, is_absurd));
        }
    }

    #[test]
    fn everything_has_a_bound() {
        let now = base::clock::now();
        let mut bodies = Bodies::default();
        for i in 0..20_000_u32 {
            let mut name = [0; 32];
            name[..4].copy_from_slice(&i.to_be_bytes());
            bodies.want(now, name, &[node(1), node(2)]);
        }
        assert_eq!(bodies.entries.len(), HASHES_MAX);
        assert!(bodies.queue.len() <= HASHES_MAX);
        for i in 0..100 {
            bodies.offered(now, &[0; 32], node(i));
        }
        let Some(Entry { state: State::Wanted(wanted), .. }) = bodies.entries.get(&[0; 32]) else {
            panic!("wanted")
        };
        assert_eq!(wanted.sources.len(), SOURCES_MAX);
        // Bodies of 60 KB each, and far more in memory.
        let mut bodies = Bodies::default();
        let mut here = 0;
        for i in 0..250 {
            let encoded = encode_descriptor(&descriptor(i, 1_024));
            bodies.want(now, hash(&encoded), &[node(1)]);
            here += usize::from(bodies.take(now, &encoded, hash).is_some());
        }
        assert!(bodies.bytes <= BYTES_MAX && (100..250).contains(&here), "{here}");
    }

    #[test]
    fn answers_fit_into_frames_and_are_no_lever() {
        let mut bodies = Bodies::default();
        let now = base::clock::now();
        let mut hashes = vec![];
        for i in 0..40 {
            let encoded = encode_descriptor(&descriptor(i, 1_000));
            let name = hash(&encoded);
            bodies.want(now, name, &[node(1)]);
            bodies.take(now, &encoded, hash).unwrap().body.unwrap();
            hashes.extend([name, name]);
        }
        let frames = bodies.answer(&hashes);
        let lengths: Vec<_> = frames.iter().map(|frame| encode(frame).len()).collect();
        assert!(lengths.iter().all(|length| *length <= crate::STREAM_BYTES_MAX), "{lengths:?}");
        assert!(lengths.iter().sum::<usize>() <= ANSWER_BYTES_MAX + 4096 && lengths.len() > 5);
    }
}
