//! Who is linked and who is to be: links that come and go, dials, and those that are not needed any more.

use std::time::{Duration, Instant};

use super::{Event, Mesh, Output, Peer, Target, Transport, Way, card::Taken, planes::ABSURD};
use crate::{
    Card, Frame, Hello, Judge, NodeId, Pool,
    links::{Begin, IDLE, Link, ORDINARY_MAX, backoff},
    pool::Members,
    strikes::Offence,
};

/// Why a link ends that is not needed: the other end has nothing to fear for.
const NOT_NEEDED: &str = "nobody needs this link now";
/// A node that is new asks everybody it links for others.
const YOUNG: Duration = Duration::from_secs(30);
/// A node whose link was lost is dialled for so long although nobody needs it: it may be dead.
const LOST: Duration = Duration::from_secs(20);

impl<J: Judge> Mesh<J> {
    pub(super) fn link_up(
        &mut self,
        now: Instant,
        peer: &Peer,
        hello: &Hello,
        transport: Transport,
        dialled: bool,
    ) {
        let id = peer.id;
        self.doomed.remove(&id);
        if let Err(why) = self.admit(now, peer, hello) {
            self.links.done(id);
            self.drop_link(id);
            return self.close(id, why);
        }
        let protocol = if hello.card.is_none() { 1 } else { hello.version().unwrap_or(1) };
        let before = self.links.up.remove(&id).filter(|link| link.epoch == hello.epoch);
        self.subscribers.remove(&id);
        let mut link = Link::new(now, peer.clone(), transport, hello.epoch);
        link.protocol = protocol;
        if let Some(before) = &before {
            link.inherit(before);
        }
        link.dialled = (link.dialled.0 || dialled, link.dialled.1 || !dialled);
        let is_legacy = link.is_legacy();
        self.links.up.insert(id, link);
        self.doubts.clear(id);
        self.found_seed(peer);
        // A node of version 1 that dialled is dialled all the same: over its own link it says nothing.
        let dial = if is_legacy && !dialled { None } else { self.links.done(id) };
        let (waiting, failures) = dial.map(|dial| (dial.queue, dial.failures)).unwrap_or_default();
        if let Some(link) = self.links.up.get_mut(&id) {
            link.failures = link.failures.max(failures);
        }
        if is_legacy {
            self.greet_legacy(now, peer, hello.epoch, dialled);
        } else {
            waiting.into_iter().for_each(|packet| self.send(now, id, packet, Way::Datagram));
            self.greet(now, peer);
        }
        self.weigh_reach(now, id);
    }

    /// Whether a link is kept, and the card of the other end.
    fn admit(&mut self, now: Instant, peer: &Peer, hello: &Hello) -> Result<(), String> {
        if self.strikes.is_quarantined(now, peer.id) {
            return Err("this node is not listened to for a while".to_owned());
        }
        if self.is_leaving {
            return Err("this node goes".to_owned());
        }
        if hello.version().is_none() {
            return Err("no common version of the protocol".to_owned());
        }
        let Some(signed) = &hello.card else {
            return if peer.id == self.own.id {
                Err("this is the same node".to_owned())
            } else {
                Ok(())
            };
        };
        let card = match self.take_card(now, Some(peer), signed) {
            Ok(Taken::New(card) | Taken::Old(card)) => card,
            Ok(Taken::Own(_)) if peer.id == self.own.id => {
                return Err("this is the same node".to_owned());
            }
            Ok(Taken::Own(_)) => return self.lie(now, peer, "says hello with another's card"),
            Err(why) => {
                self.disbelieve(now, peer, &why);
                return Err(format!("the card is not believed: {why}"));
            }
        };
        if card.id != peer.id || card.facts.epoch != hello.epoch {
            return self.lie(now, peer, "says hello with another's card");
        }
        match self.cards.get(peer.id).cloned() {
            None => Err("as many nodes are known as can be".to_owned()),
            Some(newest) if newest.facts.epoch > hello.epoch => {
                // A later process has the name: this one is told, and must stop.
                let frame = Frame::Cards(Pool::Region, vec![newest.signed.to_vec()]);
                let bytes = crate::encode(&frame).into();
                self.outputs.push_back(Output::Send { to: peer.id, bytes, way: Way::Stream });
                self.doomed.insert(peer.id, now + 2 * super::ROUND);
                Err(String::new())
            }
            Some(newest) if self.bodies.is_absurd(&newest.facts.descriptor) => {
                self.lie(now, peer, ABSURD)
            }
            Some(newest) => {
                self.apply_card(now, &newest, true);
                Ok(())
            }
        }
    }

    fn lie(&mut self, now: Instant, peer: &Peer, why: &str) -> Result<(), String> {
        self.convict(now, peer, Offence::Lie, why);
        Err(why.to_owned())
    }

    /// A node of version 2 is linked.
    fn greet(&mut self, now: Instant, peer: &Peer) {
        let id = peer.id;
        let is_of_region = peer.region == self.own.region;
        if is_of_region {
            let seen = self.region.seen(id).copied();
            let pair = self.cards.pair(id);
            let is_young = now < self.began + YOUNG;
            if !self.has_all || self.region.active() < 4 {
                self.ask_all(now, id);
            }
            // Who is down here has to hear it; who is new knows others.
            if let Some(pair) = pair
                && (is_young || seen.is_none_or(|seen| !seen.is_active()))
            {
                self.region.announce(pair);
                self.settle(now, Pool::Region);
            }
        }
        if !is_of_region || self.relaying.is_lonely() {
            self.say(now, id, &Frame::CardsAsk(Pool::Relays, vec![]), Way::Stream);
        }
        if self.subscriptions.is_subscribed(&id) {
            self.subscribe_to(now, id, true);
        }
    }

    pub(super) fn link_down(&mut self, now: Instant, id: NodeId, why: &str) {
        self.doomed.remove(&id);
        let is_idle = why.contains(NOT_NEEDED);
        let link = if is_idle { self.part(id) } else { self.drop_link(id) };
        let Some(link) = link else { return };
        if self.is_leaving {
            return;
        }
        let is_wanted = self.wants(id);
        let is_down = self.is_down(&link.peer);
        // A link nobody needs is closed by whichever end has too many: dialled again, it would be closed again.
        if is_wanted && !is_down {
            let lost = (!link.is_legacy() && link.was_in_use(now)).then_some(link.heard);
            self.plan_dial_after(now, id, lost, link.failures_after(now));
        }
    }

    /// Takes a link away here: the node cannot be reached.
    pub(super) fn drop_link(&mut self, id: NodeId) -> Option<Link> {
        let link = self.take_link(id)?;
        if link.reachable {
            self.event(Event::Reachable { id, is: false });
        }
        Some(link)
    }

    /// Takes a link away here that nobody needs.
    fn part(&mut self, id: NodeId) -> Option<Link> {
        let link = self.take_link(id)?;
        if link.reachable {
            self.event(Event::Parted(id));
        }
        Some(link)
    }

    fn take_link(&mut self, id: NodeId) -> Option<Link> {
        let link = self.links.up.remove(&id)?;
        self.subscribers.remove(&id);
        self.relaying.links_changed();
        Some(link)
    }

    fn is_down(&self, peer: &Peer) -> bool {
        let members = self.members(self.pool_of(&peer.region));
        let seen = members.and_then(|members| members.seen(peer.id));
        // Who left the pool of relays only is no relay any more.
        let has_left = seen.is_some_and(|seen| seen.left) && peer.region != self.own.region;
        seen.is_some_and(|seen| !seen.is_active()) && !has_left
    }

    /// Tells whether `id` can be reached, if that has changed.
    pub(super) fn weigh_reach(&mut self, now: Instant, id: NodeId) {
        let Some(link) = self.links.get(id) else { return };
        let is = (link.is_legacy() || !self.is_down(&link.peer))
            && !self.strikes.is_quarantined(now, id);
        if is == link.reachable {
            return;
        }
        if let Some(link) = self.links.up.get_mut(&id) {
            link.reachable = is;
        }
        self.event(Event::Reachable { id, is });
    }

    pub(super) fn close(&mut self, id: NodeId, why: String) {
        if !why.is_empty() {
            self.outputs.push_back(Output::Close { id, why });
        }
    }

    /// Whether this node needs a link with `id`.
    pub(super) fn wants(&self, id: NodeId) -> bool {
        self.subscriptions.is_subscribed(&id)
            || self.relaying.needs(id)
            || self.is_fellow(id)
            || self.seeds.is_listed(id)
    }

    /// `id` is to be linked, unless it is.
    pub(super) fn plan_dial(&mut self, now: Instant, id: NodeId, lost: Option<Instant>) {
        self.plan_dial_after(now, id, lost, 0);
    }

    /// `id` is to be linked, unless it is, after so many dials in vain.
    fn plan_dial_after(&mut self, now: Instant, id: NodeId, lost: Option<Instant>, failures: u32) {
        let is_known = self.cards.get(id).is_some() || self.seeds.is_listed(id);
        if self.links.is_heard(id) || !is_known || self.strikes.is_quarantined(now, id) {
            return;
        }
        let due = now + backoff(failures, &mut self.rng);
        if !self.links.plan(due, id, lost, failures) {
            return;
        }
        if due > now {
            self.timers.set(due, crate::timers::Due::Dial(id));
        } else {
            self.dial(now, id);
        }
    }

    /// The dial of `id` is due.
    pub(super) fn dial(&mut self, now: Instant, id: NodeId) {
        match self.links.begin(now, id) {
            Begin::Nothing => {}
            Begin::Later(at) => self.timers.set(at, crate::timers::Due::Dial(id)),
            Begin::Now => match self.target(id) {
                Some(target) if !self.is_leaving && !self.is_superseded => {
                    self.outputs.push_back(Output::Dial(target));
                }
                _ => drop(self.links.done(id)),
            },
        }
    }

    /// Where `id` is: as its card says, and if that is of no use as whoever listed it says.
    fn target(&self, id: NodeId) -> Option<Target> {
        let failures = self.links.dials.get(&id).map_or(0, |dial| dial.failures);
        let listed = self.seeds.listed().find(|(peer, _)| peer.id == id);
        let listed = listed.map(|(_, seed)| Target::Seed(seed.clone()));
        let member = self
            .cards
            .get(id)
            .map(|card| Target::Member { peer: peer_of(card), address: card.facts.gossip.clone() });
        if failures.is_multiple_of(2) { member.or(listed) } else { listed.or(member) }
    }

    pub(super) fn dial_failed(&mut self, now: Instant, target: &Target) {
        let id = target.peer().map(|peer| peer.id);
        self.seeds.failed(now, target, &mut self.rng);
        if let Some(id) = id {
            self.failed(now, id);
        }
    }

    fn failed(&mut self, now: Instant, id: NodeId) {
        let Some(dial) = self.links.dials.get(&id) else { return };
        let lost = dial.lost;
        if self.links.is_heard(id) || self.is_leaving {
            drop(self.links.done(id));
            return;
        }
        self.not_reached(now, id, lost);
        self.relaying.links_changed();
        let is_alive = [Pool::Region, Pool::Relays]
            .iter()
            .any(|pool| self.members(*pool).is_some_and(|members| members.is_active(id)));
        let is_down = self.cards.get(id).is_some() && !is_alive;
        let is_lost = lost.is_some_and(|lost| now < lost + LOST);
        if self.seeds.is_listed(id) || !is_down && (self.wants(id) || is_lost) {
            let due = self.links.again(now, id, &mut self.rng);
            self.timers.set(due, crate::timers::Due::Dial(id));
        } else {
            drop(self.links.done(id));
        }
    }

    /// Once a second: links that are needed, and those that are not.
    pub(super) fn tend_links(&mut self, now: Instant) {
        let over: Vec<_> =
            self.doomed.iter().filter(|(_, at)| now >= **at).map(|(id, _)| *id).collect();
        for id in over {
            self.doomed.remove(&id);
            self.close(id, "a later process has this name".to_owned());
        }
        for id in self.links.overdue(now) {
            self.failed(now, id);
        }
        if self.is_leaving {
            return;
        }
        // Relays are few, and far away: a link would come too late for a probe.
        let relays = self.relay.iter().flat_map(Members::all);
        let relays = relays.filter(|(_, seen)| seen.is_active()).map(|(id, _)| id);
        let wanted: Vec<_> = self
            .subscriptions
            .all()
            .iter()
            .copied()
            .chain(self.relaying.all_needed())
            .chain(relays)
            .filter(|id| *id != self.own.id && !self.links.is_up(*id))
            .filter(|id| self.cards.get(*id).is_some_and(|card| !self.is_down(&peer_of(card))))
            .collect();
        wanted.into_iter().for_each(|id| self.plan_dial(now, id, None));
        self.dial_listed(now);
        self.close_idle(now);
    }

    fn close_idle(&mut self, now: Instant) {
        let is_free = |id: &NodeId, link: &Link| {
            !link.is_legacy() && !self.subscribers.contains(id) && !self.wants(*id)
        };
        let free = self.links.up.iter().filter(|(id, link)| is_free(id, link));
        let mut free: Vec<_> = free.map(|(id, link)| (link.used.max(link.heard), *id)).collect();
        free.sort_unstable();
        let excess = if self.relaying.is_relay() {
            0
        } else {
            self.links.up.len().saturating_sub(ORDINARY_MAX)
        };
        let idle = free.iter().take_while(|(used, _)| now >= *used + IDLE).count();
        for (_, id) in free.into_iter().take(idle.max(excess)) {
            self.part(id);
            self.close(id, NOT_NEEDED.to_owned());
        }
    }
}

pub(super) fn peer_of(card: &Card) -> Peer {
    Peer { id: card.id, node: card.node.clone(), region: card.region.clone() }
}
