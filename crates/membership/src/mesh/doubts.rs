//! Who may be dead: own evidence, suspicions that stand for a while, and deaths only one node speaks of.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use foca::{Member, State};

use super::{Mesh, Way};
use crate::{
    Frame, Judge, NodeId, Pair, Pool,
    pool::{Seen, suspect_for},
    timers::Due,
};

/// Two who call the same node down within this are believed.
const SECOND: Duration = Duration::from_secs(30);
/// A node that could not be reached counts as evidence for so long.
const UNREACHED: Duration = Duration::from_secs(30);
/// A suspected node has at least so long to say that it lives.
const REFUTE_MIN: Duration = Duration::from_millis(1500);
/// Who hears nobody at all is likelier cut off than alone: it waits so long before it calls others down.
const ALONE: Duration = Duration::from_secs(30);
/// Who has heard somebody so recently is not cut off.
const COMPANY: Duration = Duration::from_secs(3);
/// The news that a suspected node is down, or lives, may be missed: somebody who stays suspected is looked after this often.
const OPEN: Duration = Duration::from_secs(5);
/// A suspected node is not told so more often.
const WARN: Duration = Duration::from_secs(1);
/// Deaths, suspicions and misses remembered.
const DOUBTS_MAX: usize = 4096;

/// What speaks against the life of others.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    suspicions: BTreeMap<(Pool, NodeId), Suspicion>,
    /// Who is suspected, by anybody: looked after until that is over.
    open: BTreeMap<(Pool, NodeId), Open>,
    /// Of those, who is to be told.
    unwarned: BTreeSet<(Pool, NodeId)>,
    /// Who was called down by one node only, which, and when.
    held: BTreeMap<(Pool, NodeId), (NodeId, Instant)>,
    /// Who could not be reached, and when.
    unreached: BTreeMap<NodeId, Instant>,
    /// When this node last began a suspicion because it could not reach somebody.
    blamed: BTreeMap<NodeId, Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Suspicion {
    pair: Pair,
    incarnation: u16,
    since: Instant,
    due: Instant,
}

/// A suspicion, by anybody.
#[derive(Clone, Copy, Debug)]
struct Open {
    pair: Pair,
    incarnation: u16,
    since: Instant,
    /// When the node was last told of it by this one.
    warned: Option<Instant>,
}

impl Doubts {
    /// Node `id` was heard.
    pub(super) fn clear(&mut self, id: NodeId) {
        self.unreached.remove(&id);
        for pool in [Pool::Region, Pool::Relays] {
            self.held.remove(&(pool, id));
            self.suspicions.remove(&(pool, id));
        }
    }

    /// A suspicion is over.
    pub(super) fn decided(&mut self, pool: Pool, id: NodeId) {
        self.suspicions.remove(&(pool, id));
    }

    /// `from` says that `id` is down: whether this node knows so itself, or somebody else said so. If not it is remembered.
    ///
    /// Of relays only what this node knows itself counts, for it is linked with all of them: others say the same of one that
    /// has died and of one that is no relay any more. `is_blind`: it does not listen to
    /// `id`, so that it cannot find out, and two others are believed of a relay too.
    pub(super) fn confirm(
        &mut self,
        now: Instant,
        from: NodeId,
        (pool, id): (Pool, NodeId),
        is_blind: bool,
    ) -> bool {
        let is_own = self.suspicions.contains_key(&(pool, id)) || self.is_unreached(now, id);
        let second = self.held.get(&(pool, id)).filter(|_| pool == Pool::Region || is_blind);
        if is_own || second.is_some_and(|(other, at)| *other != from && now < *at + SECOND) {
            self.held.remove(&(pool, id));
            return true;
        }
        if self.held.len() < DOUBTS_MAX {
            self.held.insert((pool, id), (from, now));
        }
        false
    }

    pub(super) fn sweep(&mut self, now: Instant) {
        self.held.retain(|_, (_, at)| now < *at + SECOND);
        self.unreached.retain(|_, at| now < *at + UNREACHED);
        self.blamed.retain(|_, at| now < *at + UNREACHED);
    }

    /// As if this node had just blamed `id`: it does not do so again.
    #[cfg(test)]
    pub(super) fn has_blamed(&mut self, now: Instant, id: NodeId) {
        self.blamed.insert(id, now);
    }

    fn is_unreached(&self, now: Instant, id: NodeId) -> bool {
        self.unreached.get(&id).is_some_and(|at| now < *at + UNREACHED)
    }
}

impl<J: Judge> Mesh<J> {
    pub(super) fn was_heard(&self, now: Instant, id: NodeId, within: Duration) -> bool {
        self.links.get(id).is_some_and(|link| now < link.heard + within)
    }

    /// A dial of `id` failed; `lost`: a link with it was lost before.
    pub(super) fn not_reached(&mut self, now: Instant, id: NodeId, lost: Option<Instant>) {
        if self.doubts.unreached.len() < DOUBTS_MAX {
            self.doubts.unreached.insert(id, now);
        }
        for pool in [Pool::Region, Pool::Relays] {
            let held = self.doubts.held.remove(&(pool, id));
            let is_held = held.is_some_and(|(_, at)| now < at + SECOND);
            let seen = self.members(pool).and_then(|members| members.seen(id)).copied();
            let Some(seen) = seen.filter(Seen::is_active) else { continue };
            if is_held && self.pool_of_node(id) == pool {
                let down = Member::new(seen.pair(id), seen.incarnation, State::Down);
                self.call(now, pool, down, true);
            } else if let Some(lost) = lost {
                self.blame(now, pool, id, seen, lost);
            }
        }
    }

    pub(super) fn pool_of_node(&self, id: NodeId) -> Pool {
        self.cards.get(id).map_or(Pool::Region, |card| self.pool_of(&card.region))
    }

    /// A link that was in use is lost and cannot be made again: own evidence, which the others are told.
    fn blame(&mut self, now: Instant, pool: Pool, id: NodeId, seen: Seen, lost: Instant) {
        let is_recent = |at: &Instant| now < *at + UNREACHED;
        let is_suspected = self.doubts.suspicions.contains_key(&(pool, id));
        if is_suspected
            || self.is_lenient(now)
            || self.doubts.blamed.get(&id).is_some_and(is_recent)
        {
            return;
        }
        self.doubts.blamed.insert(id, now);
        let update = Member::new(seen.pair(id), seen.incarnation, State::Suspect);
        self.call(now, pool, update, true);
        // The time since a link was lost counts, unless that was another time.
        let due = lost + suspect_for(pool);
        let due = if due > now { due.max(now + REFUTE_MIN) } else { now + suspect_for(pool) };
        self.suspect(now, pool, seen.pair(id), seen.incarnation, due);
    }

    fn call(&mut self, now: Instant, pool: Pool, update: Member<Pair>, spread: bool) {
        if let Some(members) = self.members_mut(pool) {
            members.apply(update, spread);
            self.settle(now, pool);
        }
    }

    pub(super) fn suspect(
        &mut self,
        now: Instant,
        pool: Pool,
        pair: Pair,
        incarnation: u16,
        due: Instant,
    ) {
        let before = self.doubts.suspicions.get(&(pool, pair.id));
        let is_same = before.is_some_and(|s| s.pair == pair && s.incarnation == incarnation);
        let seen = self.members(pool).and_then(|members| members.seen(pair.id));
        // A probe of an older card that came to nothing.
        let is_past = seen.is_some_and(|seen| seen.pair(pair.id) > pair);
        if is_same || is_past || self.doubts.suspicions.len() >= DOUBTS_MAX {
            return;
        }
        let suspicion = Suspicion { pair, incarnation, since: now, due };
        self.doubts.suspicions.insert((pool, pair.id), suspicion);
        self.timers.set(due, Due::Suspicion(pool, pair.id));
    }

    pub(super) fn is_lenient(&self, now: Instant) -> bool {
        self.lenient.is_some_and(|until| now < until)
    }

    /// A suspicion of ours has had its time.
    pub(super) fn decide(&mut self, now: Instant, pool: Pool, id: NodeId) {
        let Some(suspicion) = self.doubts.suspicions.get(&(pool, id)).copied() else { return };
        let is_cut_off = self.is_cut_off(now, pool, id);
        let wait = match self.lenient {
            _ if now < suspicion.due => Some(suspicion.due),
            Some(until) if now < until => Some(until),
            _ if is_cut_off && now < suspicion.since + ALONE => Some(now + COMPANY),
            _ => None,
        };
        if let Some(until) = wait {
            return self.timers.set(until, Due::Suspicion(pool, id));
        }
        self.doubts.suspicions.remove(&(pool, id));
        let Suspicion { pair, incarnation, since, .. } = suspicion;
        let is_heard = self.links.get(id).is_some_and(|link| link.heard > since);
        let seen = self.members(pool).and_then(|members| members.seen(id));
        let stands = seen.is_some_and(|seen| {
            (seen.pair(id), seen.incarnation, seen.state) == (pair, incarnation, State::Suspect)
        });
        if stands && !is_heard && !self.strikes.is_quarantined(now, id) {
            // Who is cut off does not come back with the news that all others are dead.
            let down = Member::new(pair, incarnation, State::Down);
            self.call(now, pool, down, !is_cut_off);
        }
    }

    /// `id` is suspected, by whomever: it is not forgotten.
    pub(super) fn watch(&mut self, now: Instant, pool: Pool, id: NodeId, seen: Seen) {
        let (pair, incarnation) = (seen.pair(id), seen.incarnation);
        self.doubts.unwarned.insert((pool, id));
        let open = Open { pair, incarnation, since: now, warned: None };
        if let Some(before) = self.doubts.open.get_mut(&(pool, id)) {
            *before = Open { warned: before.warned, ..open };
        } else if self.doubts.open.len() < DOUBTS_MAX {
            self.doubts.open.insert((pool, id), open);
            self.timers.set(now + suspect_for(pool) + OPEN, Due::Doubt(pool, id));
        }
    }

    /// `id` was suspected long enough to know better: this node finds out itself.
    pub(super) fn look_after(&mut self, now: Instant, pool: Pool, id: NodeId) {
        let seen = self.members(pool).and_then(|members| members.seen(id)).copied();
        let open = self.doubts.open.get(&(pool, id)).copied();
        let Some((seen, open)) = seen.filter(|seen| seen.state == State::Suspect).zip(open) else {
            self.doubts.open.remove(&(pool, id));
            return;
        };
        let Open { pair, incarnation, since, .. } = open;
        let stands = (seen.pair(id), seen.incarnation) == (pair, incarnation);
        let is_old = now >= since + suspect_for(pool) + OPEN;
        let is_unreached = self.doubts.unreached.get(&id).is_some_and(|at| *at >= since);
        if self.links.is_up(id) {
            // Its own word, if it gave it, was missed.
            self.warn(now, pool, id);
        } else if !self.is_leaving {
            if stands && is_old && is_unreached {
                self.suspect(now, pool, pair, incarnation, now);
            } else {
                self.plan_dial(now, id, None);
            }
        }
        self.timers.set(now + OPEN, Due::Doubt(pool, id));
    }

    /// Tells those that are suspected anew so, as far as this node can. They know best whether they live, and their own word
    /// convinces everybody.
    pub(super) fn warn_all(&mut self, now: Instant) {
        for (pool, id) in std::mem::take(&mut self.doubts.unwarned) {
            self.warn(now, pool, id);
        }
    }

    fn warn(&mut self, now: Instant, pool: Pool, id: NodeId) {
        let is_linked = self.links.get(id).is_some_and(|link| !link.is_legacy());
        let Some(members) = self.members(pool).filter(|_| is_linked && !self.is_leaving) else {
            return;
        };
        let seen = members.seen(id).filter(|seen| seen.state == State::Suspect);
        let open = self.doubts.open.get(&(pool, id));
        let Some((seen, open)) = seen.zip(open) else { return };
        if open.warned.is_some_and(|at| now < at + WARN) {
            return;
        }
        let packet = members.warning(seen.pair(id), seen.incarnation);
        if let Some(open) = self.doubts.open.get_mut(&(pool, id)) {
            open.warned = Some(now);
        }
        self.say(now, id, &Frame::Swim(pool, packet), Way::Stream);
    }

    /// Whether this node hears nobody of a pool, although there are several.
    fn is_cut_off(&self, now: Instant, pool: Pool, but: NodeId) -> bool {
        let Some(members) = self.members(pool) else { return false };
        let is_company = |id: &NodeId| *id != but && members.seen(*id).is_some();
        members.active() > 1
            && !self.links.up.iter().any(|(id, link)| now < link.heard + COMPANY && is_company(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_others_are_believed_of_a_member_and_nobody_of_a_relay() {
        let id = |i| NodeId([i; 16]);
        let now = base::clock::now();
        let mut doubts = Doubts::default();
        let member = (Pool::Region, id(9));
        assert!(!doubts.confirm(now, id(3), (Pool::Relays, id(9)), false), "of another pool");
        assert!(!doubts.confirm(now, id(1), member, false));
        assert!(!doubts.confirm(now, id(1), member, false), "the same one again");
        assert!(doubts.confirm(now, id(2), member, false));
        let relay = (Pool::Relays, id(8));
        assert!(!doubts.confirm(now, id(1), relay, false));
        assert!(!doubts.confirm(now, id(2), relay, false));
        assert!(doubts.confirm(now, id(3), relay, true), "nothing else would ever tell");
        doubts.unreached.insert(id(8), now);
        assert!(doubts.confirm(now, id(2), relay, false), "it was seen here too");
    }
}
