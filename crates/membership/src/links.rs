//! Who is linked, who is being dialled, and when a dial that failed is tried again.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{RngExt as _, rngs::SmallRng};

use crate::{Descriptor, NodeId, Peer, Pool, Seed, Target, Transport, strikes::Rate};

/// Links at most: those of a relay, which is linked with every node of its region, and some that others want.
pub const LINKS_MAX: usize = 2_048;
/// Links an ordinary node has at most, unless it needs more; those nobody needs make room.
pub(crate) const ORDINARY_MAX: usize = 320;
/// A link nobody needs, on which nothing goes, is closed after this.
pub(crate) const IDLE: Duration = Duration::from_secs(30);
/// Dials in progress at once.
const DIALS_MAX: usize = 64;
/// A dial that has come to nothing nobody told of.
pub(crate) const DIAL_TIMEOUT: Duration = Duration::from_secs(15);
/// Packets kept for a node while it is dialled.
const QUEUE_MAX: usize = 4;
/// Waits between dials: at once, then these, and then the last one.
const BACKOFF_MS: [u64; 6] = [0, 500, 1000, 2000, 5000, 10_000];
/// A link that has lasted so long works: one that is lost sooner is made again no sooner than after a dial that failed.
const STEADY: Duration = Duration::from_secs(5);
/// A link that was used so recently when it went did not go because nobody needed it.
const IN_USE: Duration = Duration::from_secs(5);

/// Cards and descriptors given to one node within this, at most; who asks for more has to ask again.
const GIVEN_IN: Duration = Duration::from_secs(10);
const GIVEN_MAX: usize = 64 << 20;
/// Bytes of cards that may come in answer when all are asked for.
const EXPECTED_MAX: usize = 8 << 20;

/// A link.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) peer: Peer,
    pub(crate) transport: Transport,
    /// The other end's process.
    pub(crate) epoch: u64,
    /// The version both speak.
    pub(crate) protocol: u32,
    pub(crate) rtt: Duration,
    /// When it was made.
    pub(crate) since: Instant,
    /// How often it was dialled in vain before.
    pub(crate) failures: u32,
    /// When something last came.
    pub(crate) heard: Instant,
    /// When something last came or went that somebody needed.
    pub(crate) used: Instant,
    pub(crate) rate: Rate,
    /// This node dialled, and the other end did: a node of version 1 may have both.
    pub(crate) dialled: (bool, bool),
    /// All cards were asked for, and whether none were known before; and given, of which pool.
    pub(crate) asked_all: Option<(Instant, bool)>,
    /// Bytes that may come in answer beyond what else it may send.
    pub(crate) expected: usize,
    pub(crate) gave_all: Option<(Instant, Pool)>,
    /// When it last said what it knows.
    pub(crate) compared: Option<Instant>,
    /// What was given to it lately: since when, and how many bytes.
    given: (Instant, usize),
    /// It was asked for its load, and when a frame last came.
    pub(crate) subscribed: bool,
    pub(crate) load: Option<(u64, Instant)>,
    /// The descriptor its last load frame was of: within one process a version stands for one descriptor.
    pub(crate) served: Option<Arc<Descriptor>>,
    /// Whoever routes was told that it can be reached.
    pub(crate) reachable: bool,
}

impl Link {
    pub(crate) fn new(now: Instant, peer: Peer, transport: Transport, epoch: u64) -> Self {
        Self {
            peer,
            transport,
            epoch,
            protocol: 1,
            rtt: Duration::ZERO,
            since: now,
            heard: now,
            used: now,
            rate: Rate::new(now),
            dialled: (false, false),
            asked_all: None,
            expected: 0,
            failures: 0,
            gave_all: None,
            compared: None,
            given: (now, 0),
            subscribed: false,
            load: None,
            served: None,
            reachable: false,
        }
    }

    /// The same node over another link: what it may do has not changed.
    pub(crate) fn inherit(&mut self, before: &Self) {
        (self.rtt, self.rate, self.load) = (before.rtt, before.rate, before.load);
        (self.gave_all, self.given) = (before.gave_all, before.given);
        (self.asked_all, self.expected) = (before.asked_all, before.expected);
        self.compared = before.compared;
        self.reachable = before.reachable;
        if before.is_legacy() && self.is_legacy() {
            self.dialled = before.dialled;
        }
    }

    /// It is asked for all cards it has, or for those this node has not; `is_first`: none were known before.
    pub(crate) fn asks_all(&mut self, now: Instant, is_first: bool) {
        self.asked_all = Some((now, is_first));
        self.expected = EXPECTED_MAX;
    }

    /// Whether so many bytes more may be given to who asks for them.
    pub(crate) fn may_give(&mut self, now: Instant, bytes: usize) -> bool {
        if now >= self.given.0 + GIVEN_IN {
            self.given = (now, 0);
        }
        let fits = self.given.1 + bytes <= GIVEN_MAX;
        if fits {
            self.given.1 += bytes;
        }
        fits
    }

    pub(crate) fn is_legacy(&self) -> bool {
        self.protocol < 2
    }

    /// In vain how often, counted on, if it ends now.
    pub(crate) fn failures_after(&self, now: Instant) -> u32 {
        let is_steady = now >= self.since + STEADY;
        if is_steady { 0 } else { self.failures.saturating_add(1) }
    }

    pub(crate) fn was_in_use(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.used) < IN_USE
    }
}

/// A node that is dialled, or is to be.
#[derive(Debug)]
pub(crate) struct Dial {
    pub(crate) failures: u32,
    /// When the next dial is due; `None`: one is in progress.
    pub(crate) due: Option<Instant>,
    started: Instant,
    /// Packets that wait for the link.
    pub(crate) queue: Vec<Bytes>,
    /// When it was last heard over a link that was in use and is lost: that the dial fails then says something.
    pub(crate) lost: Option<Instant>,
}

/// Everybody linked, and everybody dialled.
#[derive(Debug, Default)]
pub(crate) struct Links {
    pub(crate) up: BTreeMap<NodeId, Link>,
    pub(crate) dials: BTreeMap<NodeId, Dial>,
    in_progress: usize,
}

impl Links {
    pub(crate) fn get(&self, id: NodeId) -> Option<&Link> {
        self.up.get(&id)
    }

    pub(crate) fn is_up(&self, id: NodeId) -> bool {
        self.up.contains_key(&id)
    }

    /// Whether there is a link over which `id` speaks to this node: one of version 1 does only where it was dialled.
    pub(crate) fn is_heard(&self, id: NodeId) -> bool {
        self.up.get(&id).is_some_and(|link| !link.is_legacy() || link.dialled.0)
    }

    /// Node `id` is to be dialled when that is `due`, unless it is already. Returns whether that is new.
    pub(crate) fn plan(
        &mut self,
        due: Instant,
        id: NodeId,
        lost: Option<Instant>,
        failures: u32,
    ) -> bool {
        if self.dials.contains_key(&id) {
            return false;
        }
        let dial = Dial { failures, due: Some(due), started: due, queue: Vec::new(), lost };
        self.dials.insert(id, dial);
        true
    }

    /// A packet that waits for the link with `id`.
    pub(crate) fn queue(&mut self, id: NodeId, packet: Bytes) {
        if let Some(dial) = self.dials.get_mut(&id)
            && dial.queue.len() < QUEUE_MAX
        {
            dial.queue.push(packet);
        }
    }

    /// Whether the dial of `id` is due now and may begin: it is in progress from then on.
    pub(crate) fn begin(&mut self, now: Instant, id: NodeId) -> Begin {
        let Some(dial) = self.dials.get_mut(&id) else { return Begin::Nothing };
        if dial.due.is_none_or(|due| due > now) {
            return Begin::Nothing;
        }
        if self.in_progress >= DIALS_MAX {
            let again = now + Duration::from_millis(200);
            dial.due = Some(again);
            return Begin::Later(again);
        }
        (dial.due, dial.started) = (None, now);
        self.in_progress += 1;
        Begin::Now
    }

    /// The dial of `id` is over, one way or another.
    pub(crate) fn done(&mut self, id: NodeId) -> Option<Dial> {
        let dial = self.dials.remove(&id)?;
        if dial.due.is_none() {
            self.in_progress = self.in_progress.saturating_sub(1);
        }
        Some(dial)
    }

    /// The dial of `id` failed, and is to be tried again: when.
    pub(crate) fn again(&mut self, now: Instant, id: NodeId, rng: &mut SmallRng) -> Instant {
        let before = self.done(id);
        let failures = before.as_ref().map_or(0, |dial| dial.failures).saturating_add(1);
        let due = now + backoff(failures, rng);
        let lost = before.and_then(|dial| dial.lost);
        let dial = Dial { failures, due: Some(due), started: now, queue: Vec::new(), lost };
        self.dials.insert(id, dial);
        due
    }

    /// Dials that were never answered.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<NodeId> {
        let is_over = |dial: &Dial| dial.due.is_none() && now >= dial.started + DIAL_TIMEOUT;
        self.dials.iter().filter(|(_, dial)| is_over(dial)).map(|(id, _)| *id).collect()
    }
}

/// Whether a dial begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    Now,
    Later(Instant),
    Nothing,
}

/// How long after so many failures.
pub(crate) fn backoff(failures: u32, rng: &mut SmallRng) -> Duration {
    let place = usize::try_from(failures).unwrap_or(usize::MAX).min(BACKOFF_MS.len() - 1);
    let ms = BACKOFF_MS.get(place).copied().unwrap_or(10_000);
    Duration::from_millis(ms).mul_f64(rng.random_range(0.8..1.2))
}

/// Places where nodes may be found.
#[derive(Debug, Default)]
pub(crate) struct Seeds {
    pub(crate) places: Vec<Place>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) target: Target,
    /// It was kept from an earlier life: forgotten once the mesh is found.
    pub(crate) is_kept: bool,
    pub(crate) failures: u32,
    pub(crate) due: Instant,
    pub(crate) since: Option<Instant>,
}

impl Place {
    pub(crate) fn new(now: Instant, target: Target, is_kept: bool) -> Self {
        Self { target, is_kept, failures: 0, due: now, since: None }
    }

    pub(crate) fn address(&self) -> &str {
        self.target.address()
    }

    pub(crate) fn is_listed(&self) -> bool {
        matches!(&self.target, Target::Seed(seed) if seed.is_listed && seed.peer.is_some())
    }

    pub(crate) fn peer(&self) -> Option<&Peer> {
        self.target.peer()
    }
}

impl Seeds {
    /// These seeds in place of those before; what is known of those that stay is kept.
    pub(crate) fn replace(&mut self, now: Instant, seeds: Vec<Seed>) {
        let mut before = std::mem::take(&mut self.places);
        for seed in seeds {
            let target = Target::Seed(seed);
            let known = before.iter().position(|place| place.target == target);
            let place = known.map(|at| before.swap_remove(at));
            self.places.push(place.unwrap_or_else(|| Place::new(now, target, false)));
        }
        self.places.extend(before.into_iter().filter(|place| place.is_kept));
    }

    pub(crate) fn failed(&mut self, now: Instant, target: &Target, rng: &mut SmallRng) {
        if let Some(place) = self.places.iter_mut().find(|place| place.target == *target) {
            place.failures = place.failures.saturating_add(1);
            place.since = None;
            place.due = now + backoff(place.failures, rng);
        }
    }

    /// Listed nodes by their id.
    pub(crate) fn listed(&self) -> impl Iterator<Item = (&Peer, &Seed)> {
        self.places.iter().filter_map(|place| match &place.target {
            Target::Seed(seed) if seed.is_listed => Some((seed.peer.as_ref()?, seed)),
            _ => None,
        })
    }

    pub(crate) fn is_listed(&self, id: NodeId) -> bool {
        self.listed().any(|(peer, _)| peer.id == id)
    }
}
