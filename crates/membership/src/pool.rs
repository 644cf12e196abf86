//! One set of nodes that watch each other: foca, what came out of it, and a mirror of what it believes.
//!
//! foca says nothing of suspicions and answers no question without looking at everybody, so each of its changes is done a
//! second time here, by the same order of preference (SWIM, section 4.2). Down is decided here alone: foca's own timers for it
//! are never given back to it.

use std::{
    collections::BTreeMap,
    fmt,
    num::{NonZeroU8, NonZeroUsize},
    time::Duration,
};

use foca::{
    Config, Foca, Member, Message, NoCustomBroadcast, Notification, PeriodicParams, Runtime, State,
    Timer,
};
use rand::rngs::SmallRng;

use crate::{
    NodeId, Pair, Pool, SWIM_BYTES_MAX,
    swim::{Layout, Packet, own_incarnation},
};

/// Members of one pool at most.
pub(crate) const MEMBERS_MAX: usize = 16_384;
/// In a pool of so many each is linked with every other.
const LINKED: usize = 64;
/// In a larger one a probe often takes a new link, and each member is watched over the links it has, by dozens: foca's
/// probes, which its configuration cannot slow down as the pool grows, come so long after each other.
const PROBES_AFTER: Duration = Duration::from_secs(2);
/// A member that is down is forgotten after this.
const REMOVE_AFTER: Duration = Duration::from_secs(3600);

/// What a pool believes of one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) epoch: u64,
    pub(crate) bump: u16,
    pub(crate) incarnation: u16,
    pub(crate) state: State,
    /// It said itself that it goes.
    pub(crate) left: bool,
}

impl Seen {
    pub(crate) fn is_active(&self) -> bool {
        self.state != State::Down
    }

    pub(crate) fn pair(&self, id: NodeId) -> Pair {
        Pair { id, epoch: self.epoch, bump: self.bump }
    }

    fn is(&self, pair: Pair) -> bool {
        (self.epoch, self.bump) == (pair.epoch, pair.bump)
    }
}

/// A change of what is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) id: NodeId,
    /// `None`: it was not known, or is not any more.
    pub(crate) before: Option<Seen>,
    pub(crate) after: Option<Seen>,
}

/// What foca wants done.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) sends: Vec<(Pair, Vec<u8>)>,
    pub(crate) timers: Vec<(Timer<Pair>, Duration)>,
    /// Probes that failed: with the incarnation that is suspected.
    pub(crate) failed: Vec<(Pair, u16)>,
    is_undead: bool,
}

impl Runtime<Pair> for Wanted {
    fn notify(&mut self, notification: Notification<'_, Pair>) {
        self.is_undead |= matches!(notification, Notification::Defunct);
    }

    fn send_to(&mut self, to: Pair, data: &[u8]) {
        self.sends.push((to, data.to_vec()));
    }

    fn submit_after(&mut self, event: Timer<Pair>, after: Duration) {
        if let Timer::ChangeSuspectToDown { member_id, incarnation, .. } = event {
            self.failed.push((member_id, incarnation));
        } else {
            self.timers.push((event, after));
        }
    }
}

/// The members of one pool, this node not included.
pub(crate) struct Members {
    kind: Pool,
    foca: Foca<Pair, Layout, SmallRng, NoCustomBroadcast>,
    seen: BTreeMap<NodeId, Seen>,
    active: usize,
    transmissions: NonZeroU8,
    incarnation: u16,
    pub(crate) wanted: Wanted,
    pub(crate) changes: Vec<Change>,
}

impl fmt::Debug for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Members").field("kind", &self.kind).field("seen", &self.seen).finish()
    }
}

impl Members {
    pub(crate) fn new(kind: Pool, own: Pair, rng: SmallRng) -> Self {
        let transmissions = transmissions(1);
        Self {
            kind,
            foca: Foca::new(own, config(kind, transmissions), rng, Layout),
            seen: BTreeMap::new(),
            active: 0,
            transmissions,
            incarnation: 0,
            wanted: Wanted::default(),
            changes: Vec::new(),
        }
    }

    /// This node as the pool knows it.
    pub(crate) fn own(&self) -> Pair {
        *self.foca.identity()
    }

    /// How often this node has had to say that it lives, under its present pair.
    pub(crate) fn incarnation(&self) -> u16 {
        self.incarnation
    }

    pub(crate) fn active(&self) -> usize {
        self.active
    }

    /// Time from one probe to the next, at least.
    pub(crate) fn probes_after(&self) -> Duration {
        if self.active > LINKED { PROBES_AFTER } else { Duration::ZERO }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.seen.len() >= MEMBERS_MAX
    }

    pub(crate) fn seen(&self, id: NodeId) -> Option<&Seen> {
        self.seen.get(&id)
    }

    pub(crate) fn is_active(&self, id: NodeId) -> bool {
        self.seen.get(&id).is_some_and(Seen::is_active)
    }

    /// Everybody, by id.
    pub(crate) fn all(&self) -> impl Iterator<Item = (NodeId, &Seen)> {
        self.seen.iter().map(|(id, seen)| (*id, seen))
    }

    /// Whether an update says more than is known.
    pub(crate) fn is_news(&self, update: &Member<Pair>) -> bool {
        let pair = *update.id();
        match self.seen.get(&pair.id) {
            None => true,
            Some(seen) if seen.is(pair) => is_change(seen, update.incarnation(), update.state()),
            Some(seen) => (pair.epoch, pair.bump) > (seen.epoch, seen.bump),
        }
    }

    /// Whether an update is of the card a member is known by, and says nothing of it that is not known.
    pub(crate) fn is_stale(&self, update: &Member<Pair>) -> bool {
        let seen = self.seen.get(&update.id().id).filter(|seen| seen.is(*update.id()));
        seen.is_some_and(|seen| !is_change(seen, update.incarnation(), update.state()))
    }

    /// A packet that was judged: every pair in it has a card, none is this node's.
    pub(crate) fn receive(&mut self, packet: &Packet) {
        let header = &packet.header;
        self.mirror(Member::new(header.src, header.src_incarnation, State::Alive));
        // foca takes no updates from who is down.
        if self.is_active(header.src.id) {
            for update in &packet.updates {
                self.hear(update);
            }
        }
        drop(self.foca.handle_data(&packet.write(), &mut self.wanted));
        self.settle();
    }

    fn hear(&mut self, update: &Member<Pair>) {
        if *update.id() != self.own() {
            self.mirror(update.clone());
        } else if update.state() == State::Suspect && update.incarnation() >= self.incarnation {
            self.incarnation = update.incarnation().saturating_add(1);
        }
    }

    /// What this node itself found out. `spread`: the others are told.
    pub(crate) fn apply(&mut self, update: Member<Pair>, spread: bool) {
        if update.id().id == self.own().id {
            return;
        }
        self.mirror(update.clone());
        drop(self.foca.apply_many(std::iter::once(update), spread, &mut self.wanted));
        self.settle();
    }

    /// Member `id` says itself that it goes.
    pub(crate) fn leaves(&mut self, id: NodeId) {
        if let Some(seen) = self.seen.get_mut(&id) {
            seen.left = true;
        }
    }

    pub(crate) fn timer(&mut self, timer: Timer<Pair>) {
        let removed = match &timer {
            Timer::RemoveDown(pair) => Some(*pair),
            _ => None,
        };
        drop(self.foca.handle_timer(timer, &mut self.wanted));
        if let Some(pair) = removed {
            self.remove(pair);
        }
        self.settle();
    }

    /// Asks a node whether it takes this one as a member.
    pub(crate) fn announce(&mut self, to: Pair) {
        drop(self.foca.announce(to, &mut self.wanted));
    }

    /// A packet by which this node tells a member that it is suspected.
    pub(crate) fn warning(&self, to: Pair, incarnation: u16) -> Vec<u8> {
        self.gossip(to, vec![Member::new(to, incarnation, State::Suspect)])
    }

    /// A packet by which this node tells a member that it lives itself.
    pub(crate) fn word(&self, to: Pair) -> Vec<u8> {
        self.gossip(to, Vec::new())
    }

    fn gossip(&self, to: Pair, updates: Vec<Member<Pair>>) -> Vec<u8> {
        let (src, src_incarnation) = (self.own(), self.incarnation);
        let header = foca::Header { src, src_incarnation, dst: to, message: Message::Gossip };
        Packet { header, updates }.write()
    }

    /// This node has a new card.
    pub(crate) fn rename(&mut self, own: Pair) {
        if self.foca.change_identity(own, &mut self.wanted).is_err() {
            return;
        }
        self.incarnation = 0;
        // It stands alone now until it hears something; it knows the others already.
        drop(self.foca.apply_many(std::iter::empty(), false, &mut self.wanted));
        self.settle();
    }

    pub(crate) fn leave(&mut self) {
        drop(self.foca.leave_cluster(&mut self.wanted));
        self.settle();
    }

    /// The same as foca's members, for tests.
    #[cfg(test)]
    pub(crate) fn is_true(&self) -> bool {
        let of = |member: &Member<Pair>| (*member.id(), member.incarnation(), member.state());
        let mut foca: Vec<_> = self.foca.iter_membership_state().map(of).collect();
        foca.sort_by_key(|(pair, ..)| *pair);
        let mine = self.seen.iter().map(|(id, s)| (s.pair(*id), s.incarnation, s.state));
        mine.collect::<Vec<_>>() == foca && self.active == self.foca.num_members()
    }

    /// What foca did by itself, and what follows from it.
    fn settle(&mut self) {
        let failed = std::mem::take(&mut self.wanted.failed);
        for (pair, incarnation) in &failed {
            self.mirror_known(&Member::new(*pair, *incarnation, State::Suspect));
        }
        self.wanted.failed = failed;
        if let Some(said) = self.wanted.sends.last().and_then(|(_, packet)| own_incarnation(packet))
        {
            self.incarnation = said;
        }
        let transmissions = transmissions(self.active);
        if transmissions != self.transmissions
            && self.foca.set_config(config(self.kind, transmissions)).is_ok()
        {
            self.transmissions = transmissions;
        }
    }

    fn mirror_known(&mut self, update: &Member<Pair>) {
        if self.seen.contains_key(&update.id().id) {
            self.mirror(update.clone());
        }
    }

    fn mirror(&mut self, update: Member<Pair>) {
        if !self.is_news(&update) {
            return;
        }
        let Pair { id, epoch, bump } = *update.id();
        let after = Seen {
            epoch,
            bump,
            incarnation: update.incarnation(),
            state: update.state(),
            left: false,
        };
        let before = self.seen.insert(id, after);
        self.count(before.as_ref(), Some(&after));
        self.changes.push(Change { id, before, after: Some(after) });
    }

    fn remove(&mut self, pair: Pair) {
        let is_it = |seen: &Seen| seen.is(pair) && !seen.is_active();
        if self.seen.get(&pair.id).is_some_and(is_it) {
            let before = self.seen.remove(&pair.id);
            self.changes.push(Change { id: pair.id, before, after: None });
        }
    }

    fn count(&mut self, before: Option<&Seen>, after: Option<&Seen>) {
        let active = |seen: Option<&Seen>| usize::from(seen.is_some_and(Seen::is_active));
        self.active = self.active + active(after) - active(before);
    }
}

/// A packet by which a node tells another that it goes, or that it is of a pool no more.
pub(crate) fn farewell(own: Pair, to: Pair) -> Vec<u8> {
    let header = foca::Header { src: own, src_incarnation: 0, dst: to, message: Message::Gossip };
    Packet { header, updates: vec![Member::down(own)] }.write()
}

/// SWIM's order of preference among what is said of one pair.
fn is_change(seen: &Seen, incarnation: u16, state: State) -> bool {
    match (seen.state, state) {
        (State::Down, _) => false,
        (_, State::Down) => true,
        (State::Alive, State::Suspect) => incarnation >= seen.incarnation,
        _ => incarnation > seen.incarnation,
    }
}

/// How often a piece of news is passed on: four times the logarithm of the members, as SWIM has it, and never so seldom that
/// somebody in a small pool is likely to miss it.
fn transmissions(active: usize) -> NonZeroU8 {
    let digits = u8::try_from((active + 1).checked_ilog2().unwrap_or(0)).unwrap_or(u8::MAX);
    // 4 log10 n = 1.2 log2 n.
    NonZeroU8::new((digits.saturating_mul(6) / 5).max(8)).unwrap_or(NonZeroU8::MIN)
}

/// How long somebody who is suspected has to say that it lives.
pub(crate) fn suspect_for(kind: Pool) -> Duration {
    match kind {
        Pool::Region => Duration::from_secs(3),
        Pool::Relays => Duration::from_secs(10),
    }
}

fn config(kind: Pool, max_transmissions: NonZeroU8) -> Config {
    const fn count(n: usize) -> NonZeroUsize {
        match NonZeroUsize::new(n) {
            Some(n) => n,
            None => NonZeroUsize::MIN,
        }
    }
    let every = |ms, n| {
        Some(PeriodicParams { frequency: Duration::from_millis(ms), num_members: count(n) })
    };
    let (probe_ms, rtt_ms, gossip_ms) = match kind {
        Pool::Region => (500, 150, 200),
        Pool::Relays => (2000, 600, 500),
    };
    Config {
        probe_period: Duration::from_millis(probe_ms),
        probe_rtt: Duration::from_millis(rtt_ms),
        num_indirect_probes: count(3),
        max_transmissions,
        suspect_to_down_after: suspect_for(kind),
        remove_down_after: Some(REMOVE_AFTER),
        max_packet_size: count(SWIM_BYTES_MAX),
        notify_down_members: true,
        periodic_announce: every(30_000, 1),
        periodic_announce_to_down_members: every(10_000, 2),
        periodic_gossip: every(gossip_ms, 3),
    }
}
