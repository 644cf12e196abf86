//! What others serve, how pressed they are, and what other regions have: planes B, C and D, wired to the links.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use base::{Load, RegionName};

use super::{Event, Mesh, Peer, SUMMED_EVERY, Way, link::peer_of};
use crate::{
    DATAGRAM_BYTES_MAX, Descriptor, Digest, Frame, Judge, LoadFrame, NodeId, Pool, WireError,
    descriptors::Arrived, digest::Sample, encode, links::Link, pool::Members, strikes::Offence,
    subscribe::Known, view::within,
};

/// Nodes that may subscribe, the relays of this region aside. Further ones are told to wait for so long.
const SUBSCRIBERS_MAX: usize = 128;
const REFUSED_FOR: Duration = Duration::from_secs(30);
/// So many slots are never a mistake, unless the descriptor says about as many.
const ABSURD_MIN: u32 = 1024;
/// What is held against the owner of a descriptor.
pub(super) const ABSURD: &str = "an engine of more slots than any can have";
/// A relay that does not know enough to sum its region up looks again after this.
const SOON: Duration = Duration::from_millis(50);
/// Where a node has fewer others in its region, everybody listens to everybody, and needs no digest of it.
const DIGEST_ABOVE: usize = 64;

impl<J: Judge> Mesh<J> {
    /// What was asked for, what is to be chosen, said or summed up by now.
    pub(super) fn tend_planes(&mut self, now: Instant) {
        if self.is_leaving {
            return;
        }
        self.ask_descriptors(now);
        self.choose_subscriptions(now);
        self.report(now);
        if self.relaying.is_relay() && self.digester.next_deadline() <= now {
            self.digest(now);
        }
        if self.regions.next_deadline().is_some_and(|due| due <= now) {
            for view in self.regions.views(now) {
                self.event(Event::Region(view));
            }
        }
    }

    pub(super) fn planes_deadline(&self) -> Option<Instant> {
        if self.is_leaving {
            return None;
        }
        let digest = self.relaying.is_relay().then(|| self.digester.next_deadline());
        [
            self.bodies.next_deadline(),
            self.subscriptions.next_deadline(),
            self.reporter.next_deadline(self.subscribers.len()),
            self.regions.next_deadline(),
            digest,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    // B: what they serve.

    pub(super) fn describe(&mut self, now: Instant, descriptor: Descriptor) {
        let judge = &self.judge;
        let (descriptor, arrived) = self.bodies.own(descriptor, |bytes| judge.sha256(bytes));
        self.descriptor = descriptor;
        self.own_figures = None;
        self.renewal.descriptor = arrived.hash;
        self.want_card(now);
        self.arrived(now, &arrived);
        let legacy = self.subscribers.iter().filter(|id| self.is_legacy(**id));
        for id in legacy.copied().collect::<Vec<_>>() {
            self.say_descriptor(now, id);
        }
    }

    fn is_legacy(&self, id: NodeId) -> bool {
        self.links.get(id).is_some_and(Link::is_legacy)
    }

    fn say_descriptor(&mut self, now: Instant, to: NodeId) {
        let frame = Frame::Descriptor(Descriptor::clone(&self.descriptor));
        self.say(now, to, &frame, Way::Stream);
    }

    fn ask_descriptors(&mut self, now: Instant) {
        if self.bodies.next_deadline().is_none_or(|due| due > now) {
            return;
        }
        let links = &self.links;
        let is_linked = |id| links.get(id).is_some_and(|link| !link.is_legacy());
        for (to, hashes) in self.bodies.asks(now, is_linked) {
            self.say(now, to, &Frame::DescriptorsAsk(hashes), Way::Stream);
        }
    }

    pub(super) fn hear_descriptors_ask(
        &mut self,
        now: Instant,
        from: NodeId,
        hashes: &[crate::descriptors::Hash],
    ) {
        for frame in self.bodies.answer(hashes) {
            let bytes: bytes::Bytes = encode(&frame).into();
            if self.links.up.get_mut(&from).is_some_and(|link| link.may_give(now, bytes.len())) {
                self.send(now, from, bytes, Way::Stream);
            }
        }
    }

    pub(super) fn hear_descriptors(&mut self, now: Instant, bodies: &[Vec<u8>]) {
        for body in bodies {
            let judge = &self.judge;
            if let Some(arrived) = self.bodies.take(now, body, |bytes| judge.sha256(bytes)) {
                self.arrived(now, &arrived);
            }
        }
    }

    fn arrived(&mut self, now: Instant, arrived: &Arrived) {
        for id in &arrived.owners {
            let card = self.cards.get(*id).filter(|c| c.facts.descriptor == arrived.hash);
            let Some(card) = card.cloned() else { continue };
            match &arrived.body {
                Ok(descriptor) => {
                    self.described(now, *id, card.facts.epoch, Arc::clone(descriptor));
                }
                Err(WireError::Slots(_)) => {
                    self.convict(now, &peer_of(&card), Offence::Lie, ABSURD);
                }
                // It may be of a later version.
                Err(_) => {}
            }
        }
    }

    pub(super) fn described(
        &mut self,
        now: Instant,
        id: NodeId,
        epoch: u64,
        descriptor: Arc<Descriptor>,
    ) {
        self.subscriptions.changed(now);
        self.event(Event::Described { id, epoch, descriptor });
    }

    // C: how pressed they are.

    fn choose_subscriptions(&mut self, now: Instant) {
        if !self.subscriptions.is_due(now) {
            return;
        }
        let Self { cards, bodies, seeds, own, region, relay, subscriptions, rng, .. } = self;
        let listed: BTreeSet<_> =
            seeds.listed().map(|(peer, _)| peer.id).filter(|id| *id != own.id).collect();
        let known = |id: NodeId| {
            let card = cards.get(id)?;
            Some(Known {
                id,
                in_region: card.region == own.region,
                zone: card.facts.zone.as_ref(),
                listed: listed.contains(&id),
                descriptor: bodies.get(&card.facts.descriptor),
            })
        };
        let of_region = region.all();
        let relays = relay.iter().flat_map(Members::all);
        let of_others =
            relays.filter(|(id, _)| cards.get(*id).is_some_and(|c| c.region != own.region));
        let alive = of_region.chain(of_others).filter(|(_, seen)| seen.is_active());
        let mut members: Vec<_> = alive.filter_map(|(id, _)| known(id)).collect();
        // Listed nodes may be of version 1, without a card, or of another region.
        let present: BTreeSet<_> = members.iter().filter(|m| m.listed).map(|m| m.id).collect();
        members.extend(listed.difference(&present).map(|id| {
            known(*id).unwrap_or(Known {
                id: *id,
                in_region: false,
                zone: None,
                listed: true,
                descriptor: None,
            })
        }));
        let changes = subscriptions.update(now, rng, &members);
        for id in changes.unsubscribe {
            self.subscribe_to(now, id, false);
        }
        for id in changes.subscribe {
            if self.links.is_up(id) {
                self.subscribe_to(now, id, true);
            } else {
                self.plan_dial(now, id, None);
            }
        }
    }

    pub(super) fn subscribe_to(&mut self, now: Instant, id: NodeId, wanted: bool) {
        let Some(link) = self.links.up.get_mut(&id) else { return };
        if link.is_legacy() || link.subscribed == wanted {
            return;
        }
        link.subscribed = wanted;
        self.say(now, id, &Frame::Subscribe(wanted), Way::Stream);
    }

    pub(super) fn hear_subscribe(&mut self, now: Instant, from: NodeId, wanted: bool) {
        if !wanted {
            self.subscribers.remove(&from);
            return;
        }
        let is_known = self.subscribers.contains(&from);
        let has_room = self.subscribers.len() < SUBSCRIBERS_MAX;
        if !is_known && !has_room && !self.relaying.is_of_ours(from) {
            self.say(now, from, &Frame::NotSubscribed(REFUSED_FOR), Way::Stream);
            return;
        }
        self.subscribers.insert(from);
        if let Some(bytes) = self.reporter.first(now) {
            self.send(now, from, bytes, Way::Datagram);
        }
    }

    pub(super) fn not_subscribed(&mut self, now: Instant, from: NodeId, wait: Duration) {
        if let Some(link) = self.links.up.get_mut(&from) {
            link.subscribed = false;
            self.subscriptions.refused(now, from, wait);
        }
    }

    pub(super) fn sampled(
        &mut self,
        now: Instant,
        loads: Vec<Load>,
        arrivals: Vec<(RegionName, u64)>,
    ) {
        if self.relaying.is_relay() {
            let frame = LoadFrame {
                epoch: self.own.epoch,
                sequence: 0,
                descriptor_version: self.descriptor.version,
                sample_age: Duration::ZERO,
                next: Duration::from_secs(1),
                draining: self.is_draining,
                engines: loads.clone(),
                arrivals: vec![],
            };
            self.own_figures = Some((frame, now));
        }
        self.reporter.sampled(now, loads, arrivals);
    }

    /// Says how pressed this node is, if that is due.
    pub(super) fn report(&mut self, now: Instant) {
        let Some(bytes) = self.reporter.poll(now, self.subscribers.len()) else { return };
        let subscribers: Vec<_> = self.subscribers.iter().copied().collect();
        for id in subscribers {
            self.send(now, id, bytes.clone(), Way::Datagram);
        }
    }

    pub(super) fn hear_load(&mut self, now: Instant, from: NodeId, mut frame: LoadFrame) {
        let Some(link) = self.links.up.get_mut(&from) else { return };
        if frame.epoch > link.epoch {
            return self.strike(now, from, Offence::Lie, "a load frame of another process");
        }
        if frame.epoch < link.epoch || link.load.is_some_and(|(last, _)| frame.sequence <= last) {
            return;
        }
        link.load = Some((frame.sequence, now));
        let rtt = link.rtt;
        if !link.subscribed && !link.is_legacy() {
            return;
        }
        if self.cut(&mut frame, from) {
            self.strike(now, from, Offence::Strike, "many more slots than its descriptor says");
        }
        if self.relaying.is_relay() && self.region.is_active(from) {
            let age = frame.sample_age + rtt / 2;
            let sampled = now.checked_sub(age).unwrap_or(now);
            self.figures.insert(from, (frame.clone(), sampled));
        }
        self.event(Event::Load { id: from, frame: Box::new(frame), rtt });
    }

    /// Nobody has more slots than its descriptor says. Returns whether it claims so many that it is no mistake.
    fn cut(&mut self, frame: &mut LoadFrame, from: NodeId) -> bool {
        let Some(link) = self.links.up.get_mut(&from) else { return false };
        let of_frame = |body: &&Arc<Descriptor>| body.version == frame.descriptor_version;
        if link.served.as_ref().filter(of_frame).is_none() {
            let card = self.cards.get(from).filter(|card| card.facts.epoch == link.epoch);
            let body = card.and_then(|card| self.bodies.get(&card.facts.descriptor));
            link.served = body.filter(of_frame).cloned();
        }
        let Some(descriptor) = &link.served else { return false };
        let mut is_absurd = false;
        for (load, engine) in frame.engines.iter_mut().zip(&descriptor.engines) {
            is_absurd |= load.slots.is_some_and(|slots| slots > absurd_above(engine.slots));
            *load = within(*load, engine.slots);
        }
        is_absurd
    }

    // Nodes of version 1.

    pub(super) fn greet_legacy(&mut self, now: Instant, peer: &Peer, epoch: u64, dialled: bool) {
        self.event(Event::Legacy { peer: peer.clone(), epoch });
        let Some(link) = self.links.get(peer.id) else { return };
        // Whoever dials subscribes, and is told nothing else.
        if link.dialled.1 && (dialled || self.subscribers.len() < SUBSCRIBERS_MAX) {
            self.subscribers.insert(peer.id);
        }
        if !dialled {
            self.say_descriptor(now, peer.id);
            if let Some(bytes) = self.reporter.first(now) {
                // Behind the descriptor, without which it says nothing.
                self.send(now, peer.id, bytes, Way::Stream);
            }
        }
    }

    pub(super) fn hear_legacy(&mut self, now: Instant, from: NodeId, frame: Frame) {
        let Some(link) = self.links.get(from) else { return };
        match frame {
            Frame::Descriptor(descriptor) => {
                let (id, epoch) = (from, link.epoch);
                self.event(Event::Described { id, epoch, descriptor: Arc::new(descriptor) });
            }
            Frame::Load(frame) => self.hear_load(now, from, frame),
            _ => {}
        }
    }

    // D: what regions have.

    /// Whether somebody wants to know what this node sums up.
    pub(super) fn sums_up(&self) -> bool {
        self.relaying.is_relay() && (self.has_listeners() || self.is_summed_up())
    }

    /// Whether there are relays of other regions.
    fn has_listeners(&self) -> bool {
        self.fellows_elsewhere().next().is_some()
    }

    /// Whether figures have yet to come: its own, which are taken while somebody wants to know, or a new relay's of others, which
    /// it has asked all of them for.
    fn is_incomplete(&self, now: Instant) -> bool {
        let mut active = self.region.all().filter(|(_, seen)| seen.is_active());
        self.own_figures.is_none()
            || (self.relaying.is_new(now) && active.any(|(id, _)| !self.figures.contains_key(&id)))
    }

    fn digest(&mut self, now: Instant) {
        if !self.sums_up() {
            return self.digester.put_off(now + SUMMED_EVERY);
        }
        // A part is not the whole, and nobody could tell.
        if self.is_incomplete(now) {
            return self.digester.put_off(now + SOON);
        }
        let age = |sampled: &Instant| now.saturating_duration_since(*sampled);
        let others = self.figures.iter().filter(|(id, _)| self.region.is_active(**id));
        let others = others.filter_map(|(id, (frame, sampled))| {
            let card = self.cards.get(*id)?;
            let descriptor = self.bodies.get(&card.facts.descriptor)?;
            Some(Sample { card, descriptor, frame, age: age(sampled) })
        });
        let (card, descriptor) = (&self.card, &self.descriptor);
        let own = self.own_figures.as_ref().map(|(frame, sampled)| Sample {
            card,
            descriptor,
            frame,
            age: age(sampled),
        });
        self.digester.sum(now, others.chain(own));
        let mut receivers: Vec<_> = self.fellows_elsewhere().collect();
        if self.is_summed_up() {
            receivers.extend(self.ordinary());
        }
        for to in receivers.into_iter().filter(|id| self.links.is_up(*id)).collect::<Vec<_>>() {
            for digest in self.digester.digests(now, &mut self.rng) {
                self.say(now, to, &Frame::Digest(digest), Way::Datagram);
            }
        }
    }

    /// The relays of all other regions: each knows by itself whom it listens to, and need not wait for another when one dies.
    fn fellows_elsewhere(&self) -> impl Iterator<Item = NodeId> {
        let all = self.relay.iter().flat_map(|relay| relay.all());
        let active = all.filter(|(_, seen)| seen.is_active()).map(|(id, _)| id);
        let is_elsewhere =
            |id: &NodeId| self.cards.get(*id).is_some_and(|card| card.region != self.own.region);
        active.filter(is_elsewhere)
    }

    /// Whether this region is so large that its own nodes hear of it by its relays.
    fn is_summed_up(&self) -> bool {
        self.region.active() >= DIGEST_ABOVE
    }

    /// The linked nodes of this region that are no relays.
    fn ordinary(&self) -> Vec<NodeId> {
        let is_one = |id: &NodeId| self.region.is_active(*id) && !self.relaying.is_of_ours(*id);
        self.links.up.keys().copied().filter(is_one).collect()
    }

    pub(super) fn hear_digest(&mut self, now: Instant, from: NodeId, digest: Digest) {
        let Some(link) = self.links.get(from) else { return };
        let peer = link.peer.clone();
        let is_theirs = link.peer.region == digest.region;
        let is_of_region = link.peer.region == self.own.region;
        let (epoch, one_way) = (link.epoch, link.rtt / 2);
        match digest.relay {
            None if !is_theirs => {
                self.strike(now, from, Offence::Lie, "a digest of another region as its own");
            }
            None if digest.epoch > epoch => {
                self.strike(now, from, Offence::Lie, "a digest of another process");
            }
            Some(_) if !is_of_region || digest.region == self.own.region => {
                // What is handed on comes from another region, and stays in one.
                self.strike(now, from, Offence::Strike, "hands on a digest where none is to go");
            }
            None if digest.contradicts_itself() => {
                self.strike(now, from, Offence::Strike, "a digest whose parts are more than all");
            }
            None if self.overclaims(&peer, &digest) && self.strikes.overclaims(now, &peer) => {
                let why = "a digest that gives itself more slots than its descriptor does";
                self.strike(now, from, Offence::Lie, why);
            }
            None if is_of_region => {
                // Where everybody hears everybody, a relay that says it nevertheless would be the only one to say so.
                if self.is_summed_up() && self.relaying.is_of_ours(from) {
                    self.regions.take(now, from, digest, one_way);
                }
            }
            None => self.hear_relay(now, from, digest, one_way),
            Some(relay) => {
                if !self.relaying.is_of_ours(from) {
                    return;
                }
                match self.cards.get(relay) {
                    Some(card) if card.region == digest.region => {
                        self.regions.take(now, from, digest, one_way);
                    }
                    Some(_) => {
                        self.strike(now, from, Offence::Strike, "a digest of a relay of elsewhere");
                    }
                    None => {
                        let update = foca::Member::alive(crate::Pair {
                            id: relay,
                            epoch: digest.epoch,
                            bump: 0,
                        });
                        if self.cards.miss(now, Pool::Relays, update, from) {
                            self.ask_cards(now, from, Pool::Relays, vec![relay]);
                        }
                    }
                }
            }
        }
    }

    /// Whether the relay `peer` says of itself that it has many more slots than its descriptor says, as that is known here.
    fn overclaims(&self, peer: &Peer, digest: &Digest) -> bool {
        let card = self.cards.get(peer.id);
        let Some(body) = card.and_then(|card| self.bodies.get(&card.facts.descriptor)) else {
            return false;
        };
        let mut slots = body.engines.iter().map(|engine| engine.slots);
        let most = slots.try_fold(0_u32, |all, slots| Some(all.saturating_add(slots?)));
        let candidates = digest.offers.iter().flat_map(|offer| &offer.candidates);
        let mut its_own = candidates.filter(|candidate| candidate.node == peer.node);
        its_own.any(|candidate| candidate.slots > absurd_above(most))
    }

    /// The digest of a relay elsewhere that is listened to goes to everybody of this region that is linked, once, and as it came,
    /// if that is news.
    fn hear_relay(&mut self, now: Instant, from: NodeId, mut digest: Digest, one_way: Duration) {
        if !self.is_fellow(from) {
            return;
        }
        let parts = digest.part.1;
        let Self { relaying, outlet, .. } = self;
        let most = relaying.most_missed(now);
        let Some(ear) = relaying.listens(now, from, &digest) else { return };
        // As the others of the region hear it: by this relay's voice.
        digest.relay = Some(from);
        let handed_on = Digest { age: digest.age + one_way, ..digest.clone() };
        let bytes: bytes::Bytes = encode(&Frame::Digest(handed_on)).into();
        // Relays make parts that fit.
        if bytes.len() > DATAGRAM_BYTES_MAX {
            return;
        }
        let passes = ear.passes(|missed| outlet.passes(now, parts, bytes.len(), (missed, most)));
        if !self.regions.take(now, self.own.id, digest, one_way) || !passes {
            return;
        }
        let linked = self.links.up.keys().copied().filter(|id| self.region.is_active(*id));
        for to in linked.collect::<Vec<_>>() {
            self.send(now, to, bytes.clone(), Way::Datagram);
        }
    }
}

/// Above how many slots it is no mistake, where the descriptor says so many; `None`: it does not say.
fn absurd_above(slots: Option<u32>) -> u32 {
    slots.map_or(u32::MAX, |slots| slots.saturating_mul(4).max(ABSURD_MIN))
}
