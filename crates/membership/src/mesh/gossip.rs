//! What is believed of whom: packets of SWIM judged before foca sees them, deaths only one node speaks of, and own evidence.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use foca::{Member, Message, State, Timer};

use super::{Event, Mesh, Way};
use crate::{
    Frame, Judge, NodeId, Pair, Pool,
    pool::{Change, Seen},
    strikes::Offence,
    swim::{Packet, readdressed},
    timers::Due,
};

/// Nobody but a node itself may raise its incarnation by more.
pub(super) const LEAP_MAX: u16 = 64;
/// A node that had to refute so much takes a new card, with which its incarnation begins anew: leaps stay short.
const WORN: u16 = 48;
/// Who was heard so recently is not down because somebody says so.
const HEARD: Duration = Duration::from_secs(2);
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
/// Relays taken from one region.
const RELAYS_OF_REGION_MAX: usize = 8;
/// Deaths, suspicions and misses remembered.
const DOUBTS_MAX: usize = 4096;

/// What speaks against the life of others.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    suspicions: BTreeMap<(Pool, NodeId), Suspicion>,
    /// Who was called down by one node only, which, and when.
    held: BTreeMap<NodeId, (NodeId, Instant)>,
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

impl Doubts {
    /// Node `id` was heard.
    pub(super) fn clear(&mut self, id: NodeId) {
        self.held.remove(&id);
        self.unreached.remove(&id);
        for pool in [Pool::Region, Pool::Relays] {
            self.suspicions.remove(&(pool, id));
        }
    }

    pub(super) fn sweep(&mut self, now: Instant) {
        self.held.retain(|_, (_, at)| now < *at + SECOND);
        self.unreached.retain(|_, at| now < *at + UNREACHED);
        self.blamed.retain(|_, at| now < *at + UNREACHED);
    }

    fn is_unreached(&self, now: Instant, id: NodeId) -> bool {
        self.unreached.get(&id).is_some_and(|at| now < *at + UNREACHED)
    }
}

impl<J: Judge> Mesh<J> {
    pub(super) fn hear_swim(&mut self, now: Instant, from: NodeId, pool: Pool, bytes: &[u8]) {
        let Ok(mut packet) = Packet::read(bytes) else {
            return self.strike(now, from, Offence::Strike, "a SWIM packet that cannot be read");
        };
        match self.judge_header(now, from, pool, &mut packet) {
            Ok(true) => {}
            Ok(false) => return,
            Err(lie) => return self.strike(now, from, Offence::Lie, lie),
        }
        if packet.header.message == Message::TurnUndead {
            if packet.header.dst == self.card.pair() {
                self.called_down(now, from);
            }
            return;
        }
        let updates = std::mem::take(&mut packet.updates);
        let has_left = updates
            .iter()
            .any(|update| *update.id() == packet.header.src && update.state() == State::Down);
        packet.updates = self.judge_updates(now, from, pool, updates);
        // A lie in the updates closes the link.
        if !self.links.is_up(from) {
            return;
        }
        let Some(members) = self.members_mut(pool) else { return };
        let said = Member::new(packet.header.src, packet.header.src_incarnation, State::Alive);
        let is_empty = packet.header.message == Message::Gossip && packet.updates.is_empty();
        if is_empty && !members.is_news(&said) && members.is_active(from) {
            return;
        }
        members.receive(&packet);
        if has_left {
            members.leaves(from);
        }
        self.settle(now, pool);
    }

    /// Whether a packet may go on; an error is a lie.
    fn judge_header(
        &mut self,
        now: Instant,
        from: NodeId,
        pool: Pool,
        packet: &mut Packet,
    ) -> Result<bool, &'static str> {
        let Some(link) = self.links.get(from) else { return Ok(false) };
        let header = &mut packet.header;
        if header.src.id != from {
            return Err("speaks in the name of another");
        }
        if pool == Pool::Region && link.peer.region != self.own.region {
            return Err("speaks in the pool of another region");
        }
        if header.src.epoch > link.epoch {
            return Err("speaks for another process than it said");
        }
        if header.src.epoch < link.epoch || header.dst.id != self.own.id {
            return Ok(false);
        }
        let (src, incarnation) = (header.src, header.src_incarnation);
        let other = match header.message {
            Message::PingReq { target, .. } | Message::IndirectAck { target, .. } => Some(target),
            Message::IndirectPing { origin, .. } | Message::ForwardedAck { origin, .. } => {
                Some(origin)
            }
            _ => None,
        };
        let is_about_us = other.is_some_and(|other| other.id == self.own.id);
        if is_about_us || !self.is_for_us(&mut packet.header) {
            return Ok(false);
        }
        let known = self.pair_of(from);
        if known.is_none_or(|known| known < src) {
            let update = Member::new(src, incarnation, State::Alive);
            if self.cards.miss(now, pool, update, from) {
                self.ask_cards(now, from, pool, vec![from]);
            }
            return Ok(false);
        }
        Ok(known == Some(src) && self.is_welcome(pool, from))
    }

    /// What was sent to an older card of this node is for this one, where it makes no difference.
    fn is_for_us(&self, header: &mut foca::Header<Pair>) -> bool {
        let own = self.card.pair();
        let is_ours = header.dst == own;
        let may_differ = matches!(
            header.message,
            Message::Ping(_) | Message::Announce | Message::Gossip | Message::Feed
        );
        if !is_ours && may_differ && header.dst < own {
            header.dst = own;
            return true;
        }
        is_ours
    }

    /// Whether a pool has room for `id`, if it is new there.
    pub(super) fn is_welcome(&self, pool: Pool, id: NodeId) -> bool {
        let Some(members) = self.members(pool) else { return false };
        if members.seen(id).is_some() {
            return true;
        }
        let region = self.cards.get(id).map(|card| &card.region);
        let is_of_region = |(other, _): &(NodeId, &Seen)| {
            self.cards.get(*other).map(|card| &card.region) == region
        };
        match pool {
            Pool::Region => !members.is_full(),
            Pool::Relays => members.all().filter(is_of_region).count() < RELAYS_OF_REGION_MAX,
        }
    }

    /// What foca may see of what `from` says of others.
    fn judge_updates(
        &mut self,
        now: Instant,
        from: NodeId,
        pool: Pool,
        updates: Vec<Member<Pair>>,
    ) -> Vec<Member<Pair>> {
        let mut taken = Vec::with_capacity(updates.len());
        let mut unknown = Vec::new();
        for update in updates {
            let pair = *update.id();
            if pair.id == self.own.id {
                if self.judge_own(now, from, pool, &update, &mut unknown) {
                    taken.push(update);
                }
                continue;
            }
            match self.pair_of(pair.id) {
                Some(known) if known == pair => {
                    if self.judge_update(now, from, pool, &update) {
                        taken.push(update);
                    }
                }
                // It lives on under a newer card, or so its owner says: its death under the old one is no news.
                Some(known) if known > pair => {}
                _ if update.state() == State::Down => {}
                _ => {
                    if self.cards.miss(now, pool, update, from) {
                        unknown.push(pair.id);
                    }
                }
            }
        }
        if !unknown.is_empty() {
            self.ask_cards(now, from, pool, unknown);
        }
        taken
    }

    /// What `from` says of this node.
    fn judge_own(
        &mut self,
        now: Instant,
        from: NodeId,
        pool: Pool,
        update: &Member<Pair>,
        unknown: &mut Vec<NodeId>,
    ) -> bool {
        let (pair, own) = (*update.id(), self.card.pair());
        if pair > own && self.cards.miss(now, pool, update.clone(), from) {
            // Only a card can say that another process has this name.
            unknown.push(pair.id);
        }
        if pair != own {
            return false;
        }
        let incarnation = self.members(pool).map_or(0, crate::pool::Members::incarnation);
        match update.state() {
            State::Alive => false,
            State::Suspect if update.incarnation() > incarnation => {
                let why = "claims an incarnation of this node that it never had";
                self.strike(now, from, Offence::Strike, why);
                false
            }
            State::Suspect => update.incarnation() == incarnation,
            State::Down => {
                self.called_down(now, from);
                false
            }
        }
    }

    /// What this node stands on is down for `from`: it needs a new card. Who says so again and again is not believed.
    fn called_down(&mut self, now: Instant, from: NodeId) {
        let Some(link) = self.links.get(from) else { return };
        let peer = link.peer.clone();
        if self.want_card(now) && self.strikes.false_down(now, &peer, self.own.id) {
            self.strike(now, from, Offence::Strike, "calls this node down again and again");
        }
    }

    /// What `from` says of another whose card is known.
    fn judge_update(
        &mut self,
        now: Instant,
        from: NodeId,
        pool: Pool,
        update: &Member<Pair>,
    ) -> bool {
        let pair = *update.id();
        let Some(members) = self.members(pool) else { return false };
        if !members.is_news(update) {
            return false;
        }
        let seen = members.seen(pair.id).copied();
        let is_of_region = self.cards.get(pair.id).is_some_and(|c| c.region == self.own.region);
        if pool == Pool::Region && !is_of_region {
            self.strike(now, from, Offence::Strike, "puts a node into a region it is not of");
            return false;
        }
        if seen.is_none() && (update.state() == State::Down || !self.is_welcome(pool, pair.id)) {
            return false;
        }
        let known = seen.filter(|seen| seen.pair(pair.id) == pair).map_or(0, |s| s.incarnation);
        if update.incarnation() > known.saturating_add(LEAP_MAX) && pair.id != from {
            self.strike(now, from, Offence::Strike, "a leap of another's incarnation");
            return false;
        }
        update.state() != State::Down || pair.id == from || self.judge_down(now, from, pool, pair)
    }

    /// Whether another is down because `from` says so.
    fn judge_down(&mut self, now: Instant, from: NodeId, pool: Pool, pair: Pair) -> bool {
        let id = pair.id;
        if self.was_heard(now, id, HEARD) {
            let peer = self.links.get(from).map(|link| link.peer.clone());
            if peer.is_some_and(|peer| self.strikes.false_down(now, &peer, id)) {
                self.strike(now, from, Offence::Strike, "calls others down that live");
            }
            return false;
        }
        let own =
            self.doubts.suspicions.contains_key(&(pool, id)) || self.doubts.is_unreached(now, id);
        let second = self.doubts.held.get(&id);
        if own || second.is_some_and(|(other, at)| *other != from && now < *at + SECOND) {
            self.doubts.held.remove(&id);
            return true;
        }
        if self.doubts.held.len() < DOUBTS_MAX {
            self.doubts.held.insert(id, (from, now));
        }
        // Until somebody else says so: it is asked itself.
        if !self.links.is_up(id) && !self.is_leaving {
            self.plan_dial(now, id, None);
        }
        false
    }

    fn was_heard(&self, now: Instant, id: NodeId, within: Duration) -> bool {
        self.links.get(id).is_some_and(|link| now < link.heard + within)
    }

    /// A dial of `id` failed; `lost`: a link with it was lost before.
    pub(super) fn not_reached(&mut self, now: Instant, id: NodeId, lost: Option<Instant>) {
        if self.doubts.unreached.len() < DOUBTS_MAX {
            self.doubts.unreached.insert(id, now);
        }
        let is_held = self.doubts.held.remove(&id).is_some_and(|(_, at)| now < at + SECOND);
        for pool in [Pool::Region, Pool::Relays] {
            let seen = self.members(pool).and_then(|members| members.seen(id)).copied();
            let Some(seen) = seen.filter(Seen::is_active) else { continue };
            if is_held && self.pool_of_node(id) == pool {
                self.call(now, pool, Member::new(seen.pair(id), seen.incarnation, State::Down));
            } else if let Some(lost) = lost {
                self.blame(now, pool, id, seen, lost);
            }
        }
    }

    fn pool_of_node(&self, id: NodeId) -> Pool {
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
        self.call(now, pool, update);
        let due = (lost + suspect_for(pool)).max(now + REFUTE_MIN);
        self.suspect(now, pool, seen.pair(id), seen.incarnation, due);
    }

    fn call(&mut self, now: Instant, pool: Pool, update: Member<Pair>) {
        if let Some(members) = self.members_mut(pool) {
            members.apply(update, true);
            self.settle(now, pool);
        }
    }

    fn suspect(&mut self, now: Instant, pool: Pool, pair: Pair, incarnation: u16, due: Instant) {
        let before = self.doubts.suspicions.get(&(pool, pair.id));
        let is_same = before.is_some_and(|s| s.pair == pair && s.incarnation == incarnation);
        if is_same || self.doubts.suspicions.len() >= DOUBTS_MAX {
            return;
        }
        let suspicion = Suspicion { pair, incarnation, since: now, due };
        self.doubts.suspicions.insert((pool, pair.id), suspicion);
        self.timers.set(due, Due::Suspicion(pool, pair.id));
    }

    fn is_lenient(&self, now: Instant) -> bool {
        self.lenient.is_some_and(|until| now < until)
    }

    /// A suspicion of ours has had its time.
    pub(super) fn decide(&mut self, now: Instant, pool: Pool, id: NodeId) {
        let Some(suspicion) = self.doubts.suspicions.get(&(pool, id)).copied() else { return };
        let wait = match self.lenient {
            _ if now < suspicion.due => Some(suspicion.due),
            Some(until) if now < until => Some(until),
            _ if self.is_cut_off(now, pool, id) && now < suspicion.since + ALONE => {
                Some(now + COMPANY)
            }
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
            self.call(now, pool, Member::new(pair, incarnation, State::Down));
        }
    }

    /// Whether this node hears nobody of a pool, although there are several.
    fn is_cut_off(&self, now: Instant, pool: Pool, but: NodeId) -> bool {
        let Some(members) = self.members(pool) else { return false };
        let is_company = |id: &NodeId| *id != but && members.seen(*id).is_some();
        members.active() > 1
            && !self.links.up.iter().any(|(id, link)| now < link.heard + COMPANY && is_company(id))
    }

    pub(super) fn foca_timer(
        &mut self,
        now: Instant,
        pool: Pool,
        generation: u32,
        timer: Timer<Pair>,
    ) {
        if generation != self.relaying.generation(pool) {
            return;
        }
        if let Some(members) = self.members_mut(pool) {
            members.timer(timer);
            self.settle(now, pool);
        }
    }

    /// Does what foca wants done, and tells of what has changed.
    pub(super) fn settle(&mut self, now: Instant, pool: Pool) {
        let generation = self.relaying.generation(pool);
        let Some(members) = self.members_mut(pool) else { return };
        let wanted = std::mem::take(&mut members.wanted);
        let changes = std::mem::take(&mut members.changes);
        let is_worn = members.incarnation() >= WORN;
        for (timer, after) in wanted.timers {
            self.timers.set(now + after, Due::Foca(pool, generation, timer));
        }
        for (pair, incarnation) in wanted.failed {
            if !self.strikes.is_quarantined(now, pair.id) {
                self.suspect(now, pool, pair, incarnation, now + suspect_for(pool));
            }
        }
        for change in changes {
            self.changed(now, pool, change);
        }
        for (to, packet) in wanted.sends {
            self.carry(now, pool, to, packet);
        }
        if is_worn {
            self.want_card(now);
        }
    }

    fn changed(&mut self, now: Instant, pool: Pool, change: Change) {
        let Change { id, before, after } = change;
        let was_active = before.is_some_and(|seen| seen.is_active());
        let is_active = after.is_some_and(|seen| seen.is_active());
        self.relays_change(pool, id, was_active, is_active);
        if self.pool_of_node(id) != pool {
            return;
        }
        let suspected = |seen: Option<Seen>| seen.is_some_and(|s| s.state == State::Suspect);
        if suspected(before) != suspected(after) {
            self.event(Event::Suspected { id, is: suspected(after) });
        }
        if !is_active {
            self.doubts.suspicions.remove(&(pool, id));
        }
        if was_active && !is_active {
            let left =
                self.members(pool).and_then(|members| members.seen(id)).is_some_and(|s| s.left);
            self.event(Event::Down { id, left });
        }
        if was_active != is_active {
            self.subscriptions.changed(now);
            self.weigh_reach(now, id);
        }
        if after.is_none() && !self.links.is_up(id) {
            self.forget(id);
        }
    }

    /// A packet of foca's, to whom it is for; gossip, where that takes a new link, to somebody who is linked.
    fn carry(&mut self, now: Instant, pool: Pool, to: Pair, packet: Vec<u8>) {
        if self.links.get(to.id).is_some_and(|link| !link.is_legacy()) {
            return self.say(now, to.id, &Frame::Swim(pool, packet), Way::Datagram);
        }
        if packet.first() == Some(&crate::swim::GOSSIP) {
            if let Some(other) = self.somebody(pool)
                && let Some(packet) = readdressed(&packet, other)
            {
                self.say(now, other.id, &Frame::Swim(pool, packet), Way::Datagram);
            }
            return;
        }
        if !self.is_leaving {
            self.plan_dial(now, to.id, None);
            let frame: Bytes = crate::encode(&Frame::Swim(pool, packet)).into();
            self.links.queue(to.id, frame);
        }
    }

    /// Anybody of a pool that is linked.
    fn somebody(&mut self, pool: Pool) -> Option<Pair> {
        let members = self.members(pool)?;
        let linked = |id: &NodeId| members.seen(*id).filter(|s| s.is_active()).map(|s| s.pair(*id));
        let mut found: Vec<_> = Vec::new();
        found.extend(self.links.up.keys().filter_map(linked));
        let count = found.len();
        if count == 0 {
            return None;
        }
        let place = rand::RngExt::random_range(&mut self.rng, 0..count);
        found.get(place).copied()
    }

    /// Tells everybody linked that this node goes, and leaves.
    pub(super) fn say_farewell(&mut self, now: Instant, pool: Pool) {
        let Some(members) = self.members(pool) else { return };
        let pair = |id: &NodeId| members.seen(*id).filter(|s| s.is_active()).map(|s| s.pair(*id));
        let packets: Vec<_> = self
            .links
            .up
            .keys()
            .filter_map(pair)
            .map(|pair| (pair.id, members.farewell(pair)))
            .collect();
        for (to, packet) in packets {
            self.say(now, to, &Frame::Swim(pool, packet), Way::Stream);
        }
        if let Some(members) = self.members_mut(pool) {
            members.leave();
            self.settle(now, pool);
        }
    }
}

fn suspect_for(pool: Pool) -> Duration {
    match pool {
        Pool::Region => Duration::from_secs(3),
        Pool::Relays => Duration::from_secs(10),
    }
}
