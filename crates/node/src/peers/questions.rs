//! What is asked of the board: by routing, health, reflection and metrics.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use balance::{Place, Server, Standing};
use base::{EngineName, Load, RegionName, clock};
use membership::{NodeId, Presence, RegionOffer, RegionView};

use super::{
    board::{Board, PeerName},
    entry::{Entry, Life, load_of_region},
    state::{Region, State},
};
use crate::offer::{Ask, Has, Offer};

/// Peers metrics name; the rest are one.
const NAMED_MAX: usize = 256;
/// A node listens to all others of its region while they are few, and else to so many of each model.
const HEARD_MANY: usize = 32;

/// What metrics say of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct PeerFigures {
    /// How many of those meant are present: of one peer, 0 or 1.
    pub(crate) present: u32,
    pub(crate) ejected: u32,
    pub(crate) in_flight: u32,
    pub(crate) heard: Option<Duration>,
}

/// A peer that can be asked what its engines declare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Askable {
    pub(crate) place: usize,
    pub(crate) id: NodeId,
    /// Which descriptor of it is known, by process and version.
    pub(crate) described: (u64, u32),
}

/// How well a node knows the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Acquaintance {
    /// There is a link with somebody.
    pub(crate) is_linked: bool,
    /// What each member of the region serves is known.
    pub(crate) is_complete: bool,
    /// How pressed those with engines are is known, of as many as this node listens to, and what other regions have.
    pub(crate) is_current: bool,
}

impl Board {
    /// For metrics: at most 256 peers by name, the listed ones first, then those of this region; and all others as one.
    pub(crate) fn figures(&self) -> (Vec<(PeerName, PeerFigures)>, Option<PeerFigures>) {
        let state = self.state.lock();
        let now = clock::now();
        let known = |entry: &&Entry| entry.listed.is_some() || entry.life != Life::Left;
        let mut entries: Vec<&Entry> = state.all().map(|(_, entry)| entry).filter(known).collect();
        entries.sort_by_key(|entry| {
            let is_far = entry.name.region != self.own.region;
            (entry.listed.is_none(), entry.is_heard_of(), is_far, entry.id)
        });
        let others = entries.split_off(NAMED_MAX.min(entries.len()));
        let named = entries.iter().map(|entry| (entry.name.clone(), figures(entry, now))).collect();
        let add = |sum: PeerFigures, of: PeerFigures| PeerFigures {
            present: sum.present + of.present,
            ejected: sum.ejected + of.ejected,
            in_flight: sum.in_flight.saturating_add(of.in_flight),
            heard: None,
        };
        let sum = others.iter().map(|entry| figures(entry, now)).reduce(add);
        (named, sum.map(|sum| PeerFigures { heard: None, ..sum }))
    }

    /// The load of every engine of every peer that takes calls, as far as it is known.
    pub(crate) fn loads(&self) -> Vec<Load> {
        let state = self.state.lock();
        let now = clock::now();
        state.routable().flat_map(|(_, entry)| entry.loads(now)).collect()
    }

    /// The loads of each peer's engines, as far as they are known.
    pub(crate) fn loads_by_peer(&self) -> Vec<(PeerName, Vec<Load>)> {
        let state = self.state.lock();
        let now = clock::now();
        state.all().map(|(_, entry)| (entry.name.clone(), entry.loads(now))).collect()
    }

    /// What regions have, by their relays.
    pub(crate) fn region_views(&self) -> Vec<RegionView> {
        let state = self.state.lock();
        let view = |(name, region): (&RegionName, &Region)| RegionView {
            region: name.clone(),
            sampled: region.sampled,
            offers: region.offers.iter().map(|(_, offer)| offer.clone()).collect(),
        };
        state.regions.iter().map(view).collect()
    }

    /// The engines of peers that suit a call.
    pub(crate) fn servers(&self, ask: &Ask) -> Vec<(Server, Load)> {
        let state = self.state.lock();
        let now = clock::now();
        let mut servers = Vec::new();
        for (place, entry) in state.routable() {
            entry.servers(place, ask, now, |server, load| servers.push((server, load)));
        }
        servers
    }

    /// What regions have that suits a call, as one engine each would say it, whether or not anybody there is known.
    pub(crate) fn regions(&self, ask: &Ask) -> Vec<Load> {
        let state = self.state.lock();
        let now = clock::now();
        let fresh = state.regions.values().filter(|region| region.is_fresh(now));
        let suits = |(offer, _): &&(Offer, RegionOffer)| offer.fit(ask, &[]).is_some();
        let offers = fresh.flat_map(|region| &region.offers).filter(suits);
        offers.map(|(_, of_region)| load_of_region(of_region)).collect()
    }

    /// Whether each engine of a peer has a service or a model, and whether it may be sent calls.
    pub(crate) fn have(&self, name: &str) -> Vec<(Has, Standing)> {
        let mut all = Vec::new();
        self.each(|offer, services, standing| all.push((offer.has(name, services), standing)));
        all
    }

    /// Hands each name of what engines of peers serve to `each`, and whether the engine may be sent calls.
    pub(crate) fn served(&self, mut each: impl FnMut(&str, Standing)) {
        self.each(|offer, services, standing| {
            offer.names(services).for_each(|name| each(name, standing));
        });
    }

    /// Whether an engine of a peer says that it has a service or a model of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        let mut has = false;
        self.each(|offer, _, _| has |= offer.is_called(name));
        has
    }

    fn each(&self, mut each: impl FnMut(&Offer, &[String], Standing)) {
        let state = self.state.lock();
        let now = clock::now();
        for (_, entry) in state.all().filter(|(_, entry)| entry.life != Life::Left) {
            entry.serves(now, &mut each);
        }
        for region in state.regions.values() {
            let standing = if region.is_fresh(now) { Standing::Usable } else { Standing::Down };
            region.offers.iter().for_each(|(offer, _)| each(offer, &[], standing));
        }
    }

    /// Whether there is a peer, listed or a member, that has never said what it serves.
    pub(crate) fn has_undescribed(&self) -> bool {
        let state = self.state.lock();
        state.all().any(|(_, entry)| is_undescribed(entry))
    }

    /// Whether somebody who cannot be asked now may serve a call: its engines are not known, or they would suit.
    pub(crate) fn may_serve(&self, ask: &Ask) -> bool {
        let state = self.state.lock();
        let now = clock::now();
        state.all().filter(|(_, entry)| entry.life != Life::Left).any(|(_, entry)| {
            let suits = || !entry.suited(ask).is_empty();
            is_undescribed(entry) || (entry.listed.is_some() && entry.is_unknown(now)) || suits()
        })
    }

    /// The listed peers of which nothing is known, for when nobody known can take a call: one whose breaker allows it if any
    /// does, rather one that cannot be heard than one that is silent, and of those the one with fewest of our calls. Those that
    /// can be heard only if not `is_new`: they will speak.
    pub(crate) fn unknown(&self, tried: &[Place], is_new: bool) -> Option<usize> {
        let state = self.state.lock();
        let now = clock::now();
        let was_tried = |place: usize| {
            tried.iter().any(|tried| tried.is_same(Place::Peer { node: place, engine: None }))
        };
        let unknown = (0..self.listed).filter_map(|place| {
            let entry = state.get(place)?;
            let has_gossip = entry.listed?.has_gossip;
            let will_speak = is_new && has_gossip;
            (!will_speak && !was_tried(place) && entry.is_unknown(now))
                .then_some((place, has_gossip, entry))
        });
        let order = |&(_, has_gossip, entry): &(usize, bool, &Entry)| {
            let is_down = has_gossip && entry.life == Life::Down;
            (!entry.breaker.allows(now), is_down, entry.in_flight)
        };
        unknown.min_by_key(order).map(|(place, ..)| place)
    }

    /// The sets of services peers reflect, and who of them can be asked how they are declared.
    pub(crate) fn reflecting(&self) -> BTreeMap<Arc<[String]>, Vec<Askable>> {
        let state = self.state.lock();
        let now = clock::now();
        let mut sets: BTreeMap<Arc<[String]>, Vec<Askable>> = BTreeMap::new();
        for (place, entry) in state.all().filter(|(_, entry)| entry.life != Life::Left) {
            let (Some(served), Some(described)) = (&entry.served, entry.view.described()) else {
                continue;
            };
            if served.reflects.is_empty() {
                continue;
            }
            let askable = sets.entry(served.reflects.clone()).or_default();
            if entry.may_be_asked(now) {
                askable.push(Askable { place, id: entry.id, described });
            }
        }
        sets
    }

    /// Who of this node's region is alive and fronts the engine that all who do call `id`.
    pub(crate) fn owners(&self, id: &EngineName) -> Vec<NodeId> {
        let state = self.state.lock();
        let is_here =
            |entry: &&Entry| entry.name.region == self.own.region && entry.life == Life::Alive;
        let fronts = |entry: &&Entry| entry.served.as_ref().is_some_and(|s| s.fronts(id));
        let entries = state.all().map(|(_, entry)| entry);
        entries.filter(is_here).filter(fronts).map(|entry| entry.id).collect()
    }

    /// How well this node knows its region.
    pub(crate) fn acquaintance(&self) -> Acquaintance {
        let state = self.state.lock();
        let is_linked = state.all().any(|(_, entry)| entry.is_linked == Some(true));
        let is_silent = |entry: &Entry| {
            entry.name.region == self.own.region && entry.is_member() && entry.served.is_none()
        };
        let is_complete = !state.all().any(|(_, entry)| is_silent(entry));
        let is_current = self.is_current(&state);
        Acquaintance { is_linked, is_complete, is_current }
    }

    fn is_current(&self, state: &State) -> bool {
        let now = clock::now();
        let (mut heard, mut silent, mut far) = (0, 0, BTreeMap::<_, bool>::new());
        for (_, entry) in state.all().filter(|(_, entry)| entry.is_member()) {
            let region = &entry.name.region;
            let is_heard = entry.view.presence(now) != Presence::Unknown;
            if *region != self.own.region {
                let is_known = is_heard || state.regions.contains_key(region);
                *far.entry(region).or_default() |= is_known;
            } else if entry.has_engines() {
                *(if is_heard { &mut heard } else { &mut silent }) += 1;
            }
        }
        far.into_values().all(|is_known| is_known) && (silent == 0 || heard >= HEARD_MANY)
    }
}

/// Whether a peer, listed or a member, has never said what it serves.
fn is_undescribed(entry: &Entry) -> bool {
    entry.view.descriptor().is_none()
        && (entry.listed.is_some() || (!entry.is_heard_of() && entry.life == Life::Alive))
}

fn figures(entry: &Entry, now: Instant) -> PeerFigures {
    PeerFigures {
        present: u32::from(entry.is_present(now)),
        ejected: u32::from(!entry.breaker.is_closed()),
        in_flight: entry.in_flight,
        heard: entry.view.heard().map(|heard| now.saturating_duration_since(heard)),
    }
}
