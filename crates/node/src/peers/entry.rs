//! One other node: what it said of itself, what relays say of it, and what calls to it came to.
//!
//! What it says itself comes first. Where it does not, because nobody subscribed, a relay of its region may have named it among
//! those with room: that counts for three seconds, and never against what this node has seen of it by itself since.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use balance::{Breaker, Place, Server, Standing};
use base::{ASSUMED_SLOTS, EngineName, Load};
use http::uri::Authority;
use membership::{Candidate, Descriptor, Figures, NodeId, Presence, RegionOffer, Seen, View};

use super::{PeerName, hearsay::Hearsay};
use crate::offer::{Ask, Offer};

/// A relay may name a node for so long after the node was last heard: it counts only when it is that much newer than what this
/// node saw of the node by itself.
const SAID_LATE_BY: Duration = Duration::from_secs(5);

/// Who was the only one to say that it serves a call, and is gone, is waited for so long: others that may serve it, and do not say, are
/// asked only after that, for their own error would be taken for the answer.
const WAITED_FOR: Duration = Duration::from_secs(60);

/// What is known of one other node.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: NodeId,
    pub(super) name: PeerName,
    /// Tells it from others that have or had its place.
    pub(super) generation: u64,
    /// Where calls are sent; `None`: not known.
    pub(super) address: Option<Authority>,
    /// Tells the way there from earlier ones, by another address.
    pub(super) way: u64,
    pub(super) listed: Option<Listing>,
    /// The process and its card; `None`: it has none, or is not a member as far as is known.
    pub(super) card: Option<(u64, u16)>,
    /// Its gossip speaks version 1.
    pub(super) is_legacy: bool,
    pub(super) life: Life,
    /// Since when it is gone, by common judgement or its own word.
    gone: Option<Instant>,
    /// Whether there is a link with it; `None`: nothing was said of that.
    pub(super) is_linked: Option<bool>,
    pub(super) quarantined: Option<Instant>,
    /// When this node last had reason to think that it is gone.
    doubted: Option<Instant>,
    pub(super) view: View,
    pub(super) served: Option<Arc<Served>>,
    hearsay: Hearsay,
    pub(super) breaker: Breaker,
    /// Calls of this node in progress there.
    pub(super) in_flight: u32,
}

/// How an operator listed it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listing {
    /// Whether it can be heard.
    pub(super) has_gossip: bool,
}

/// Whether it is alive, by common judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Alive,
    Down,
    Left,
}

/// What a descriptor says, as routing reads it. Nodes with the same descriptor share it.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) descriptor: Arc<Descriptor>,
    /// What each engine serves; `None`: something we do not know.
    offers: Vec<Option<Offer>>,
    /// The services each engine reflects, sorted.
    services: Vec<Vec<String>>,
    /// All of them, sorted.
    pub(super) reflects: Arc<[String]>,
}

impl Served {
    pub(super) fn new(descriptor: Arc<Descriptor>) -> Self {
        let sorted = |mut services: Vec<String>| {
            services.sort();
            services
        };
        let engines = &descriptor.engines;
        let services: Vec<_> = engines.iter().map(|e| sorted(e.services.clone())).collect();
        let mut all = sorted(services.concat());
        all.dedup();
        let offers = engines.iter().map(Offer::of_peer).collect();
        Self { descriptor, offers, services, reflects: all.into() }
    }

    pub(super) fn has_models(&self) -> bool {
        self.offers.iter().flatten().any(|offer| !offer.models.is_empty())
    }

    /// Each engine that speaks what we know: its place, what it serves and what it reflects.
    pub(super) fn offers(&self) -> impl Iterator<Item = (usize, &Offer, &[String])> {
        let both = self.offers.iter().zip(&self.services).enumerate();
        both.filter_map(|(index, (offer, services))| {
            offer.as_ref().map(|offer| (index, offer, &services[..]))
        })
    }

    fn engine(&self, name: &str) -> Option<usize> {
        self.descriptor.engines.iter().position(|engine| engine.name.as_str() == name)
    }

    /// Whether one of its engines is called `id` by all who front it.
    pub(super) fn fronts(&self, id: &EngineName) -> bool {
        self.descriptor.engines.iter().any(|engine| engine.id.as_ref() == Some(id))
    }
}

impl Entry {
    pub(super) fn new(id: NodeId, name: PeerName, generation: u64) -> Self {
        Self {
            id,
            name,
            generation,
            address: None,
            way: generation,
            listed: None,
            card: None,
            is_legacy: false,
            life: Life::Alive,
            gone: None,
            is_linked: None,
            quarantined: None,
            doubted: None,
            view: View::default(),
            served: None,
            hearsay: Hearsay::default(),
            breaker: Breaker::default(),
            in_flight: 0,
        }
    }

    /// As at the start. The way there stays, and with it the channels.
    pub(super) fn forget(&mut self, generation: u64) {
        let fresh = Self::new(self.id, self.name.clone(), generation);
        let (listed, address, way) = (self.listed, self.address.take(), self.way);
        *self = Self { listed, address, way, ..fresh };
    }

    /// It is there, by its own word.
    pub(super) fn lives(&mut self) {
        (self.life, self.gone) = (Life::Alive, None);
    }

    /// It left, or is down by common judgement.
    pub(super) fn is_gone(&mut self, life: Life, now: Instant) {
        self.life = life;
        self.gone.get_or_insert(now);
    }

    /// It has been gone for so long that it is no longer waited for.
    fn is_given_up(&self, now: Instant) -> bool {
        self.life != Life::Alive && self.gone.is_some_and(|gone| now >= gone + WAITED_FOR)
    }

    /// Whether it is on the board for what relays say of it alone.
    pub(super) fn is_heard_of(&self) -> bool {
        self.listed.is_none() && self.card.is_none() && !self.is_legacy
    }

    /// Whether it is a living member, by its own word.
    pub(super) fn is_member(&self) -> bool {
        self.card.is_some() && self.life == Life::Alive
    }

    /// Whether it says that it has engines.
    pub(super) fn has_engines(&self) -> bool {
        self.served.as_ref().is_some_and(|served| !served.descriptor.engines.is_empty())
    }

    /// Whether nobody would miss it: no call is there, and no relay names it any more.
    pub(super) fn is_unused(&self, now: Instant) -> bool {
        self.in_flight == 0 && self.hearsay.newest(now).is_none()
    }

    /// A link with it works.
    pub(super) fn linked(&mut self) {
        self.lives();
        self.is_linked = Some(true);
        (self.quarantined, self.doubted) = (None, None);
    }

    /// The link with it is gone.
    pub(super) fn unlinked(&mut self, now: Instant) {
        self.is_linked = Some(false);
        self.doubted = Some(now);
    }

    /// Nothing came over a connection although something was due.
    pub(super) fn cut_off(&mut self, now: Instant) {
        self.view.cut_off(now);
        self.doubted = Some(now);
    }

    /// A relay named it among those that have room. Returns whether there is more to remember; `may_grow`: there may be.
    pub(super) fn hear(
        &mut self,
        (offer, of_region): &(Offer, RegionOffer),
        candidate: &Candidate,
        sampled: Instant,
        may_grow: bool,
    ) -> bool {
        self.hearsay.hear(offer, load_of(of_region, candidate), sampled, may_grow)
    }

    /// Clears away what relays said too long ago. Returns how much is left.
    pub(super) fn sweep(&mut self, now: Instant) -> usize {
        self.hearsay.sweep(now)
    }

    /// Whether this node should leave it alone, whatever is known of its room.
    pub(super) fn is_out(&self) -> bool {
        self.life != Life::Alive || self.quarantined.is_some() || self.is_linked == Some(false)
    }

    /// Whether what relays say is all there is to go by, and can be gone by.
    fn goes_by_hearsay(&self, now: Instant) -> bool {
        let speaks = matches!(self.view.presence(now), Presence::Present | Presence::Draining);
        let is_banned = self.quarantined.is_some_and(|until| now < until);
        let is_told = self.hearsay.newest(now).is_some_and(|at| Some(at) >= self.counts_since());
        is_told && !speaks && self.life == Life::Alive && !is_banned
    }

    /// What relays say must be so much newer than what this node saw.
    fn counts_since(&self) -> Option<Instant> {
        self.doubted.max(self.view.heard()).map(|last| last + SAID_LATE_BY)
    }

    /// Whether its engine with this load may be sent calls.
    fn standing(&self, load: &Load, now: Instant) -> Standing {
        match self.view.presence(now) {
            _ if self.is_out() => Standing::Down,
            Presence::Present if !self.breaker.allows(now) => Standing::Ejected,
            // Its node knows better, and is asked when there is nobody else.
            Presence::Present if load.unusable => Standing::Ejected,
            Presence::Present => Standing::Usable,
            Presence::Draining | Presence::Silent | Presence::Unknown => Standing::Down,
        }
    }

    /// Whether an engine that was described and whose load is not known could be sent calls: for who asks what there is.
    fn standing_unheard(&self, now: Instant) -> Standing {
        let may_answer = match self.view.presence(now) {
            Presence::Present => true,
            // Nobody subscribed.
            Presence::Unknown => self.card.is_some(),
            Presence::Draining | Presence::Silent => false,
        };
        if may_answer && !self.is_out() { Standing::Usable } else { Standing::Down }
    }

    fn standing_by_hearsay(&self, now: Instant) -> Standing {
        if self.breaker.allows(now) { Standing::Usable } else { Standing::Ejected }
    }

    /// Hands each of its engines that suits a call to `each`.
    pub(super) fn servers(
        &self,
        index: usize,
        ask: &Ask,
        now: Instant,
        mut each: impl FnMut(Server, Load),
    ) {
        let mut hand = |engine, fit, standing, seen: Seen| {
            let server = Server {
                place: Place::Peer { node: index, engine: Some(engine) },
                fit,
                standing,
                utilisation: seen.load.utilisation(),
                free: f64::from(seen.load.free()) * seen.confidence,
                departures: seen.load.drain_rate * seen.age.as_secs_f64() * seen.confidence,
            };
            each(server, seen.load);
        };
        if self.address.is_none() || self.is_given_up(now) {
            return;
        }
        if self.goes_by_hearsay(now) {
            let standing = self.standing_by_hearsay(now);
            for room in self.hearsay.room(ask, self.counts_since(), now) {
                hand(room.number, room.fit, standing, room.seen);
            }
            return;
        }
        let Some(served) = &self.served else { return };
        for (engine, offer, services) in served.offers() {
            let Some(fit) = offer.fit(ask, services) else { continue };
            let Some(seen) = self.view.seen(engine, now) else { continue };
            hand(engine, fit, self.standing(&seen.load, now), seen);
        }
    }

    /// Hands each thing it serves to `each`: what, what is reflected there, and whether it may be sent calls.
    pub(super) fn serves(&self, now: Instant, mut each: impl FnMut(&Offer, &[String], Standing)) {
        let by_hearsay = self.goes_by_hearsay(now).then(|| self.standing_by_hearsay(now));
        let is_heard = self.view.presence(now) != Presence::Unknown;
        for (engine, offer, services) in self.served.iter().flat_map(|served| served.offers()) {
            let seen = self.view.seen(engine, now).filter(|_| is_heard);
            let own = || seen.map(|seen| self.standing(&seen.load, now));
            let standing = by_hearsay.or_else(own);
            each(offer, services, standing.unwrap_or_else(|| self.standing_unheard(now)));
        }
    }

    /// The load of each of its engines, as far as it takes calls.
    pub(super) fn loads(&self, now: Instant) -> Vec<Load> {
        if self.goes_by_hearsay(now) {
            return self.hearsay.largest(now).into_iter().collect();
        }
        if self.view.presence(now) != Presence::Present || self.is_out() {
            return Vec::new();
        }
        let engines = self.served.iter().flat_map(|served| 0..served.descriptor.engines.len());
        engines.filter_map(|engine| Some(self.view.seen(engine, now)?.load)).collect()
    }

    /// Whether it says how pressed it is, and takes calls.
    pub(super) fn is_present(&self, now: Instant) -> bool {
        self.view.presence(now) == Presence::Present && !self.is_out()
    }

    /// Whether it would answer what its engines declare.
    pub(super) fn may_be_asked(&self, now: Instant) -> bool {
        !self.is_out() && self.address.is_some() && self.standing_unheard(now) == Standing::Usable
    }

    /// Whether nothing is known of it, or what it serves is not, so that it is tried when nobody known can take a call.
    pub(super) fn is_unknown(&self, now: Instant) -> bool {
        let is_banned = self.quarantined.is_some_and(|until| now < until);
        let is_known = match self.view.presence(now) {
            Presence::Unknown => false,
            // Its figures came before its descriptor.
            Presence::Present => self.view.descriptor().is_some(),
            Presence::Draining | Presence::Silent => true,
        };
        !is_known && self.life != Life::Left && !is_banned && !self.goes_by_hearsay(now)
    }

    /// Its engines that suit a call.
    pub(super) fn suited(&self, ask: &Ask) -> Vec<usize> {
        let described = self.served.iter().flat_map(|served| served.offers());
        let described = described
            .filter(|(_, offer, services)| offer.fit(ask, services).is_some())
            .map(|(engine, ..)| engine);
        described.chain(self.hearsay.numbers(ask)).collect()
    }

    /// What is known of one engine.
    pub(super) fn figures(&mut self, engine: usize) -> Option<&mut Figures> {
        if Hearsay::is_numbered(engine) {
            return self.hearsay.figures(engine);
        }
        self.view.figures(engine)
    }

    /// The engine called `name`, and what is known of it.
    pub(super) fn known(&self, name: &str, now: Instant) -> Option<(usize, Load)> {
        let engine = self.served.as_ref()?.engine(name)?;
        Some((engine, self.view.seen(engine, now)?.load))
    }
}

/// What a relay says of a node, as the node would have said it: no more is free than in its region, and it ends its share of the
/// calls.
fn load_of(of_region: &RegionOffer, candidate: &Candidate) -> Load {
    let free = candidate.free.min(of_region.free);
    let slots = candidate.slots.max(free);
    let share = f64::from(slots) / f64::from(of_region.slots.max(1));
    Load {
        in_flight: slots - free,
        slots: Some(slots),
        drain_rate: Load::rate(of_region.drain_rate) * share.min(1.0),
        ..Load::default()
    }
}

/// What a region has of a model, as one engine would say it.
pub(super) fn load_of_region(offer: &RegionOffer) -> Load {
    let slots = if offer.slots == 0 { ASSUMED_SLOTS } else { offer.slots };
    Load {
        in_flight: slots.saturating_sub(offer.free),
        slots: Some(slots),
        drain_rate: Load::rate(offer.drain_rate),
        ..Load::default()
    }
}
