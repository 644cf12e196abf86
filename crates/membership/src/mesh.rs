//! The mesh as one node knows it: a machine without IO. Links, frames and time go in; frames to send, links to make, and news
//! for whoever routes come out. `node` drives it with sockets, `sim` with one heap of events.
//!
//! ```text
//!  LinkUp, LinkDown, DialFailed ──> link.rs, seeds.rs ──> Dial, Close  who is linked
//!  Frame: Swim ─────> gossip.rs, doubts.rs ──> Swim, Down, Suspected   what is believed of whom (A)
//!  Frame: Cards ────> card.rs ────> CardsAsk, Member                   whose words these are
//!  CardsCompare ────> compare.rs ─> Cards                              whether anybody was missed
//!  Frame: the rest ─> planes.rs ──> Described, Load, Region            what they serve (B), how pressed they are (C, D)
//!  the round, once a second ──────> relay.rs                           who speaks for the region
//! ```
//!
//! Nothing reaches foca that was not judged here: a pair without a card, a claim about this node, a leap of incarnations, a
//! death only one node speaks of.

mod card;
mod compare;
mod doubts;
mod gossip;
mod hear;
mod io;
mod link;
mod planes;
mod relay;
mod seeds;
mod status;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use base::RegionName;
use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

pub use io::{
    Candidate, Event, Input, Liveness, MemberStatus, Output, Own, Peer, RegionOffer, RegionView,
    Seed, Status, Target, Transport, Way,
};

use crate::{
    Card, Descriptor, Frame, Hello, Judge, LoadFrame, NodeId, PROTOCOL_OLDEST, PROTOCOL_VERSION,
    Pool,
    cards::Cards,
    descriptors::{Arrived, Bodies},
    digest::Digester,
    encode,
    links::{Links, Seeds},
    pool::Members,
    regions::Regions,
    report::Reporter,
    strikes::{Offence, Outlet, Strikes},
    subscribe::Subscriptions,
    timers::{Due, Timers},
    wire::DATAGRAM_BYTES_MAX,
};
use card::Renewal;
use doubts::Doubts;
use relay::Relaying;

/// How often everything is looked at that is not due at a moment of its own.
const ROUND: Duration = Duration::from_secs(1);
/// After the loop lagged, foca's timers wait so long for what has come meanwhile.
const HOLD: Duration = Duration::from_millis(250);
/// And suspicions so long.
const LENIENT: Duration = Duration::from_secs(10);
/// A lag of more than this makes others look late.
const LAG: Duration = Duration::from_millis(100);

/// A relay nobody subscribes to looks at its own engines this often, to sum them up.
const SUMMED_EVERY: Duration = Duration::from_millis(250);
/// Nothing has to be done more often.
const SOONEST: Duration = Duration::from_millis(1);
/// Room for outputs that is kept while there are none.
const OUTPUTS_KEPT: usize = 32;

/// The machine.
#[derive(Debug)]
pub struct Mesh<J> {
    own: Own,
    judge: J,
    rng: SmallRng,
    outputs: VecDeque<Output>,
    timers: Timers,
    deadline: Option<Instant>,
    /// This node's card.
    card: Arc<Card>,
    renewal: Renewal,
    cards: Cards,
    region: Members,
    relay: Option<Members>,
    links: Links,
    /// Links of older processes of a name, until they have read why they end.
    doomed: BTreeMap<NodeId, Instant>,
    seeds: Seeds,
    next_seed: Instant,
    /// When those who were once known are dialled again, while there is no link.
    next_known: Instant,
    /// All cards of the region were had from somebody; when they were last asked for.
    has_all: bool,
    asked_all: Option<Instant>,
    began: Instant,
    rounds: u64,
    strikes: Strikes,
    doubts: Doubts,
    relaying: Relaying,
    bodies: Bodies,
    descriptor: Arc<Descriptor>,
    subscriptions: Subscriptions,
    subscribers: BTreeSet<NodeId>,
    reporter: Reporter,
    /// Of whom this node sums up, if it is a relay: the newest frame, and when its figures were taken.
    figures: BTreeMap<NodeId, (LoadFrame, Instant)>,
    own_figures: Option<(LoadFrame, Instant)>,
    digester: Digester,
    regions: Regions,
    outlet: Outlet,
    /// foca's timers wait until then, and suspicions.
    hold: Option<Instant>,
    lenient: Option<Instant>,
    is_draining: bool,
    is_leaving: bool,
    is_superseded: bool,
}

impl<J: Judge> Mesh<J> {
    /// A node that knows nobody. `seed` makes its random numbers.
    ///
    /// # Errors
    /// Its card cannot be signed.
    pub fn new(
        own: Own,
        descriptor: Descriptor,
        mut judge: J,
        now: Instant,
        seed: u64,
    ) -> Result<Self, String> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut bodies = Bodies::default();
        let (descriptor, Arrived { hash, .. }) =
            bodies.own(descriptor, |bytes| judge.sha256(bytes));
        let card = card::make(&own, &mut judge, hash, 0)?;
        let mut timers = Timers::default();
        timers.set(now + ROUND.mul_f64(rng.random()), Due::Round);
        let pool = SmallRng::seed_from_u64(rng.random());
        Ok(Self {
            region: Members::new(Pool::Region, card.pair(), pool),
            renewal: Renewal::new(hash),
            subscriptions: Subscriptions::new(own.id, own.zone.clone()),
            reporter: Reporter::new(own.epoch, descriptor.version),
            digester: Digester::new(own.region.clone(), own.epoch, now),
            deadline: timers.next(),
            outputs: VecDeque::new(),
            cards: Cards::default(),
            relay: None,
            links: Links::default(),
            doomed: BTreeMap::new(),
            seeds: Seeds::default(),
            next_seed: now,
            next_known: now,
            has_all: false,
            asked_all: None,
            began: now,
            rounds: 0,
            strikes: Strikes::default(),
            doubts: Doubts::default(),
            relaying: Relaying::new(),
            subscribers: BTreeSet::new(),
            figures: BTreeMap::new(),
            own_figures: None,
            regions: Regions::default(),
            outlet: Outlet::new(now),
            hold: None,
            lenient: None,
            is_draining: false,
            is_leaving: false,
            is_superseded: false,
            own,
            judge,
            rng,
            timers,
            card,
            bodies,
            descriptor,
        })
    }

    /// Something happened.
    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Tick => {}
            Input::LinkUp { peer, hello, transport, dialled } => {
                self.link_up(now, &peer, &hello, transport, dialled);
            }
            Input::LinkDown { id, why } => self.link_down(now, id, &why),
            Input::Broke { peer, why } => self.convict(now, &peer, Offence::Lie, &why),
            Input::DialFailed { target, .. } => self.dial_failed(now, &target),
            Input::Frame { from, bytes, rtt } => self.hear(now, from, &bytes, rtt),
            Input::Loads { loads, arrivals } => self.sampled(now, loads, arrivals),
            Input::Describe(descriptor) => self.describe(now, descriptor),
            Input::Drain => self.drain(now),
            Input::Leave => self.leave(now),
            Input::Seeds(seeds) => {
                self.seeds.replace(now, seeds);
                self.subscriptions.changed(now);
                self.dial_listed(now);
                self.tend_seeds(now);
            }
            Input::Lagged(lag) if lag > LAG => {
                self.hold = Some(now + HOLD);
                self.lenient = Some(now + LENIENT);
            }
            Input::Lagged(_) => {}
            Input::Renewed => drop(self.want_card(now)),
        }
        self.run(now);
    }

    /// What is to be done, until there is nothing more.
    pub fn poll_output(&mut self) -> Option<Output> {
        let output = self.outputs.pop_front();
        if output.is_none() && self.outputs.capacity() > OUTPUTS_KEPT {
            self.outputs.shrink_to(OUTPUTS_KEPT);
        }
        output
    }

    /// When [`Input::Tick`] is due, if nothing else comes before.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// How often loads are to be looked at; `None`: nobody wants to know.
    #[must_use]
    pub fn sample_interval(&self) -> Option<Duration> {
        let of_others = self.reporter.sample_interval(self.subscribers.len());
        of_others.or_else(|| self.sums_up().then_some(SUMMED_EVERY))
    }

    /// The first frame of a link: the hello to send, without what is said of revocations.
    #[must_use]
    pub fn hello(&self) -> Hello {
        Hello {
            trust_domain: self.own.trust_domain.clone(),
            protocol: (PROTOCOL_OLDEST, PROTOCOL_VERSION),
            node: self.own.node.clone(),
            region: self.own.region.clone(),
            epoch: self.own.epoch,
            revocations: 0,
            revocations_digest: 0,
            card: Some(self.card.signed.to_vec()),
        }
    }

    fn run(&mut self, now: Instant) {
        while let Some(due) = self.timers.pop(now) {
            self.fall_due(now, due);
        }
        self.tend_planes(now);
        let planes = self.planes_deadline().map(|due| due.max(now + SOONEST));
        self.deadline = [self.timers.next(), planes].into_iter().flatten().min();
    }

    fn fall_due(&mut self, now: Instant, due: Due) {
        match due {
            Due::Foca(..) if self.is_superseded => {}
            Due::Foca(pool, generation, timer) => match self.hold {
                Some(until) if until > now => {
                    self.timers.set(until, Due::Foca(pool, generation, timer));
                }
                _ => self.foca_timer(now, pool, generation, timer),
            },
            Due::Dial(id) => self.dial(now, id),
            Due::Suspicion(pool, id) => self.decide(now, pool, id),
            Due::Doubt(pool, id) => self.look_after(now, pool, id),
            Due::Renewal => self.renew(now),
            Due::Round => {
                self.round(now);
                self.timers.set(now + ROUND, Due::Round);
            }
        }
    }

    fn round(&mut self, now: Instant) {
        self.rounds += 1;
        self.tend_links(now);
        self.tend_seeds(now);
        self.tend_relays(now);
        self.compare(now);
        for pending in self.cards.unanswered(now) {
            // Answers may lie unread where this node itself stood still.
            if !self.is_lenient(now) {
                self.had_no_card(now, &pending);
            }
        }
        if self.rounds.is_multiple_of(60) {
            self.strikes.sweep(now);
            self.doubts.sweep(now);
            self.sweep_cards();
        }
    }

    fn drain(&mut self, now: Instant) {
        self.is_draining = true;
        if let Some((frame, _)) = &mut self.own_figures {
            frame.draining = true;
        }
        self.reporter.drain();
        self.report(now);
    }

    fn leave(&mut self, now: Instant) {
        if self.is_leaving {
            return;
        }
        self.is_leaving = true;
        self.drain(now);
        for pool in [Pool::Region, Pool::Relays] {
            self.say_farewell(now, pool);
        }
    }

    fn members(&self, pool: Pool) -> Option<&Members> {
        match pool {
            Pool::Region => Some(&self.region),
            Pool::Relays => self.relay.as_ref(),
        }
    }

    fn members_mut(&mut self, pool: Pool) -> Option<&mut Members> {
        match pool {
            Pool::Region => Some(&mut self.region),
            Pool::Relays => self.relay.as_mut(),
        }
    }

    /// The pool that says of nodes of `region` whether they live: that of the region, if it is this node's.
    fn pool_of(&self, region: &RegionName) -> Pool {
        if *region == self.own.region { Pool::Region } else { Pool::Relays }
    }

    fn event(&mut self, event: Event) {
        self.outputs.push_back(Output::Event(event));
    }

    fn say(&mut self, now: Instant, to: NodeId, frame: &Frame, way: Way) {
        self.send(now, to, encode(frame).into(), way);
    }

    /// Over the link with `to`, if there is one. What is too long for a datagram goes as a stream.
    fn send(&mut self, now: Instant, to: NodeId, bytes: Bytes, way: Way) {
        let Some(link) = self.links.up.get_mut(&to) else { return };
        link.used = now;
        let way = if bytes.len() > DATAGRAM_BYTES_MAX { Way::Stream } else { way };
        self.outputs.push_back(Output::Send { to, bytes, way });
    }
}
