//! What is believed of whom: packets of SWIM are judged before foca sees them, and what foca wants is done.

use std::time::{Duration, Instant};

use bytes::Bytes;
use foca::{Member, Message, State, Timer};
use rand::{RngExt as _, seq::IndexedRandom as _};

use super::{Event, Mesh, Way};
use crate::{
    Frame, Judge, NodeId, Pair, Pool,
    pool::{Change, Seen, farewell, suspect_for},
    strikes::Offence,
    swim::{Packet, is_gossip, readdressed, says_nothing},
    timers::Due,
};

/// Nobody but a node itself may raise its incarnation by more.
pub(super) const LEAP_MAX: u16 = 64;
/// A node that had to refute so much takes a new card, with which its incarnation begins anew.
const WORN: u16 = 48;
/// So nobody has a higher one, and whoever speaks of one lies.
const INCARNATION_MAX: u16 = 128;
/// To call down who was heard so recently counts against whoever does.
const HEARD: Duration = Duration::from_secs(2);
/// Links drawn by chance, before all are looked at.
const DRAWS: usize = 4;
/// Others who are told at once that a suspicion is refuted; they pass it on.
const TOLD: usize = 3;
/// Relays taken from one region.
const RELAYS_OF_REGION_MAX: usize = 8;

impl<J: Judge> Mesh<J> {
    pub(super) fn hear_swim(&mut self, now: Instant, from: NodeId, pool: Pool, bytes: &[u8]) {
        let Ok(mut packet) = Packet::read(bytes) else {
            return self.strike(now, from, Offence::Strike, "a SWIM packet that cannot be read");
        };
        match self.judge_header(now, from, pool, &mut packet) {
            Ok(true) => {}
            Ok(false) => return self.decline(now, from, pool, &packet),
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
        let highest = updates.iter().map(Member::incarnation).max().unwrap_or(0);
        if highest.max(packet.header.src_incarnation) > INCARNATION_MAX {
            return self.strike(now, from, Offence::Strike, "an incarnation nobody can have");
        }
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
        let is_suspected = packet.updates.iter().any(|update| *update.id() == members.own());
        let before = members.incarnation();
        members.receive(&packet);
        let is_new = members.incarnation() > before;
        if has_left {
            members.leaves(from);
        }
        self.settle(now, pool);
        if is_suspected {
            self.answer(now, pool, packet.header.src, is_new);
        }
    }

    /// Says to who suspects this node that it lives, and to some others if that is news.
    fn answer(&mut self, now: Instant, pool: Pool, to: Pair, is_new: bool) {
        let others = if is_new { TOLD } else { 0 };
        let others: Vec<_> = (0..others).filter_map(|_| self.somebody(pool)).collect();
        for to in [to].into_iter().chain(others) {
            let Some(members) = self.members(pool) else { return };
            let frame = Frame::Swim(pool, members.word(to));
            self.say(now, to.id, &frame, Way::Stream);
        }
    }

    /// Who takes this node for a relay although it is none is told so.
    fn decline(&mut self, now: Instant, from: NodeId, pool: Pool, packet: &Packet) {
        let is_for_relay = pool == Pool::Relays && self.relay.is_none();
        let is_asked =
            matches!(packet.header.message, Message::Ping(_) | Message::IndirectPing { .. });
        if is_for_relay && is_asked {
            let frame = Frame::Swim(pool, farewell(self.card.pair(), packet.header.src));
            self.say(now, from, &frame, Way::Datagram);
        }
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
        let known = self.cards.pair(from);
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
            _ if members.is_full() => false,
            Pool::Region => true,
            // Those that are none any more take no place.
            Pool::Relays => {
                let active = members.all().filter(|(_, seen)| seen.is_active());
                active.filter(is_of_region).count() < RELAYS_OF_REGION_MAX
            }
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
            // Most of all that is said has been heard before.
            if self.members(pool).is_some_and(|members| members.is_stale(&update)) {
                continue;
            }
            match self.cards.pair(pair.id) {
                Some(known) if known == pair => {
                    if self.judge_update(now, from, pool, &update) {
                        taken.push(update);
                    }
                }
                // It lives on under a newer card, or so its owner says: its death under the old one is no news.
                Some(known) if known > pair => {}
                None if update.state() == State::Down => {}
                // Also who calls a node down that stands on a later card has to have that.
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
        match update.state() {
            State::Alive => false,
            // Refuted by a higher incarnation, as long as there is one.
            State::Suspect if update.incarnation() < WORN => true,
            State::Suspect => {
                self.want_card(now);
                false
            }
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
        if self.want_card(now) && self.strikes.card_down(now, &peer) {
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
            return false;
        }
        update.state() != State::Down || pair.id == from || self.judge_down(now, from, pool, pair)
    }

    /// Whether another is down because `from` says so.
    fn judge_down(&mut self, now: Instant, from: NodeId, pool: Pool, pair: Pair) -> bool {
        let id = pair.id;
        // A link that is up was heard a second ago, whether or not anything was said.
        if self.links.is_up(id) {
            // Of the pool of relays a node may be gone, and live.
            let counts = pool == Pool::Region && self.was_heard(now, id, HEARD);
            let link = self.links.get(from).filter(|_| counts);
            let peer = link.map(|link| link.peer.clone());
            if peer.is_some_and(|peer| self.strikes.false_down(now, &peer, id)) {
                self.strike(now, from, Offence::Strike, "calls others down that live");
            }
            return false;
        }
        let is_blind = self.strikes.is_quarantined(now, id);
        if self.doubts.confirm(now, from, (pool, id), is_blind) {
            return true;
        }
        // Until somebody else says so: it is asked itself.
        if !self.links.is_up(id) && !self.is_leaving {
            self.plan_dial(now, id, None);
        }
        false
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
        let probes_after = members.probes_after();
        for (timer, after) in wanted.timers {
            let is_probe = matches!(timer, Timer::ProbeRandomMember(_));
            let after = if is_probe { after.max(probes_after) } else { after };
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
        self.warn_all(now);
        if is_worn {
            self.want_card(now);
        }
    }

    fn changed(&mut self, now: Instant, pool: Pool, change: Change) {
        let Change { id, before, after } = change;
        let was_active = before.is_some_and(|seen| seen.is_active());
        let is_active = after.is_some_and(|seen| seen.is_active());
        self.relays_change(pool, id, was_active, is_active);
        let suspected = |seen: Option<Seen>| seen.is_some_and(|s| s.state == State::Suspect);
        if let Some(seen) = after.filter(|seen| seen.state == State::Suspect) {
            self.watch(now, pool, id, seen);
        }
        if self.pool_of_node(id) != pool {
            return;
        }
        if suspected(before) != suspected(after) {
            self.event(Event::Suspected { id, is: suspected(after) });
        }
        let is_other = before.zip(after).is_some_and(|(a, b)| a.pair(id) != b.pair(id));
        // What spoke against a node on an older card says nothing of the newer one.
        if is_other {
            self.doubts.clear(id);
        } else if !is_active {
            self.doubts.decided(pool, id);
        }
        if was_active && !is_active {
            let left =
                self.members(pool).and_then(|members| members.seen(id)).is_some_and(|s| s.left);
            // Who leaves the pool of relays is no relay any more, and lives.
            if !left || pool == Pool::Region {
                self.event(Event::Down { id, left });
            }
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
        if says_nothing(&packet) {
            return;
        }
        if self.links.get(to.id).is_some_and(|link| !link.is_legacy()) {
            return self.say(now, to.id, &Frame::Swim(pool, packet), Way::Datagram);
        }
        if is_gossip(&packet) {
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

    /// Anybody of a pool that is linked, each as likely.
    pub(super) fn somebody(&mut self, pool: Pool) -> Option<Pair> {
        let Self { links, region, relay, rng, .. } = self;
        let members = match pool {
            Pool::Region => region,
            Pool::Relays => relay.as_ref()?,
        };
        let member = |id: &NodeId| members.seen(*id).filter(|s| s.is_active()).map(|s| s.pair(*id));
        // Most that are linked are of the region: few are looked at.
        let mut drawn = (0..DRAWS).filter_map(|_| {
            let place = rng.random_range(0..links.up.len().max(1));
            member(links.up.keys().nth(place)?)
        });
        if let Some(pair) = drawn.next() {
            return Some(pair);
        }
        let found: Vec<_> = links.up.keys().filter_map(member).collect();
        found.choose(rng).copied()
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
            .map(|pair| (pair.id, farewell(self.card.pair(), pair)))
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
