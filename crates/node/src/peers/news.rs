//! What the board makes of what membership says.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use base::clock;
use http::uri::Authority;
use inference::Protocol;
use membership::{Card, Descriptor, Event, LoadFrame, NodeId, Presence, RegionOffer, RegionView};
use parking_lot::MutexGuard;

use super::{
    board::{Board, PeerName},
    entry::{Entry, Life},
    state::{Region, State},
};
use crate::offer::Offer;

/// Regions of which anything is known. Further ones are left out.
const REGIONS_MAX: usize = 256;
/// Offers of a region that are taken in while calls wait.
const AT_ONCE: usize = 32;

impl Board {
    /// Takes in what membership says.
    pub(crate) fn apply(&self, event: &Event) {
        let now = clock::now();
        match event {
            Event::Member(card) => self.member(card, now),
            Event::Legacy { peer, epoch } => {
                let name = PeerName { node: peer.node.clone(), region: peer.region.clone() };
                self.change(|state| {
                    let Some((place, entry)) = state.entry(peer.id, &name, now) else { return };
                    entry.is_legacy = true;
                    entry.lives();
                    entry.view.greet(*epoch);
                    state.heard_of.remove(&place);
                });
            }
            Event::Described { id, epoch, descriptor } => {
                let place = self.state.lock().places.get(id).copied();
                if let Some(place) = place {
                    self.greet(place, *epoch);
                    self.described(place, *epoch, descriptor.clone());
                }
            }
            Event::Load { id, frame, rtt } => {
                let place = self.state.lock().places.get(id).copied();
                if let Some(place) = place {
                    self.frame(place, frame, *rtt);
                }
            }
            Event::Reachable { id, is } => self.change_of(*id, |entry| match is {
                true => entry.linked(),
                false => entry.unlinked(now),
            }),
            Event::Parted(id) => self.change_of(*id, |entry| entry.is_linked = None),
            Event::Down { id, left } => self.change_of(*id, |entry| {
                entry.is_gone(if *left { Life::Left } else { Life::Down }, now);
            }),
            Event::Forgotten(id) => self.forgotten(*id, now),
            Event::Quarantined { peer, until, .. } => {
                self.change_of(peer.id, |entry| entry.quarantined = Some(*until));
            }
            Event::Region(view) => self.region(view, now),
            // Whoever is suspected may defend itself; the rest is for others.
            Event::Suspected { .. } | Event::Superseded { .. } | Event::Note(_) => {}
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn change_of(&self, id: NodeId, change: impl FnOnce(&mut Entry)) {
        self.change(|state| {
            if let Some((_, entry)) = state.of(id) {
                change(entry);
            }
        });
    }

    fn member(&self, card: &Card, now: Instant) {
        if card.id == self.own() {
            return;
        }
        let name = PeerName { node: card.node.clone(), region: card.region.clone() };
        let address = address(&card.facts.peers);
        if address.is_none() {
            tracing::warn!(peer = %name.node, address = card.facts.peers, "a member's address cannot be called");
        }
        self.change(|state| {
            let Some((place, entry)) = state.entry(card.id, &name, now) else { return };
            let pair = Some((card.facts.epoch, card.facts.bump));
            if entry.card < pair {
                (entry.card, entry.is_legacy) = (pair, false);
                entry.lives();
            }
            let is_listed = entry.listed.is_some();
            state.heard_of.remove(&place);
            if !is_listed {
                state.lead(place, address);
            }
        });
    }

    fn forgotten(&self, id: NodeId, now: Instant) {
        self.change(|state| {
            let generation = state.next();
            let Some((place, entry)) = state.of(id) else { return };
            if entry.listed.is_none() {
                return state.remove(place, now);
            }
            entry.forget(generation);
            state.routable.remove(&place);
        });
        self.look_for_models();
    }

    fn region(&self, view: &RegionView, now: Instant) {
        let known = |offer: &RegionOffer| {
            let protocol: Protocol = offer.protocol.parse().ok()?;
            let models = offer.model.iter().cloned().collect();
            Some((Offer { protocol, models }, offer.clone()))
        };
        let offers: Vec<_> = view.offers.iter().filter_map(known).collect();
        if offers.iter().any(|(offer, _)| !offer.models.is_empty()) {
            self.has_models.store(true, Ordering::Relaxed);
        }
        self.state.lock().sweep(now);
        for few in offers.chunks(AT_ONCE) {
            let mut state = self.state.lock();
            self.heard_of(&mut state, view, few, now);
            // Whoever has a call to route goes first.
            MutexGuard::unlock_fair(state);
        }
        let mut state = self.state.lock();
        if state.regions.contains_key(&view.region) || state.regions.len() < REGIONS_MAX {
            let region = Region { sampled: view.sampled, offers };
            state.regions.insert(view.region.clone(), region);
        }
    }

    /// Relays name nodes that have room.
    fn heard_of(
        &self,
        state: &mut State,
        view: &RegionView,
        offers: &[(Offer, RegionOffer)],
        now: Instant,
    ) {
        for offer in offers {
            for candidate in &offer.1.candidates {
                let node = candidate.node.clone();
                let name = PeerName { node, region: view.region.clone() };
                let id = self.id(&name);
                let is_new = !state.places.contains_key(&id);
                if id == self.own() || (is_new && !state.make_room(now)) {
                    continue;
                }
                let Some((place, entry)) = state.entry(id, &name, now) else { continue };
                let leads = entry.is_heard_of() || entry.address.is_none();
                state.routable.insert(place);
                if is_new {
                    state.heard_of.insert(place);
                }
                if leads {
                    state.lead(place, address(&candidate.peers));
                }
                state.hear(place, offer, candidate, view.sampled);
            }
        }
    }

    fn described(&self, place: usize, epoch: u64, descriptor: Arc<Descriptor>) {
        let mut lost_models = false;
        self.change(|state| {
            let served = state.read(&descriptor);
            let Some(entry) = state.get_mut(place) else { return };
            if entry.view.describe(epoch, descriptor.clone()) {
                let has_models = served.has_models();
                let before = entry.served.replace(served);
                lost_models = !has_models && before.is_some_and(|before| before.has_models());
                if has_models {
                    self.has_models.store(true, Ordering::Relaxed);
                }
            }
        });
        if lost_models {
            self.look_for_models();
        }
    }

    /// Looks whether anybody serves models by name, where somebody did who does not any more.
    fn look_for_models(&self) {
        let state = self.state.lock();
        let served = state.all().filter_map(|(_, entry)| entry.served.as_ref());
        let of_regions = state.regions.values().flat_map(|region| &region.offers);
        let any = served.into_iter().any(|served| served.has_models())
            || of_regions.into_iter().any(|(offer, _)| !offer.models.is_empty());
        self.has_models.store(any, Ordering::Relaxed);
    }

    /// The peer at `place` said how pressed it is.
    fn frame(&self, place: usize, frame: &LoadFrame, rtt: Duration) {
        let now = clock::now();
        let mut state = self.state.lock();
        let Some(entry) = state.get_mut(place) else { return };
        let was_out = entry.view.presence(now) != Presence::Present;
        if !entry.view.frame(frame, rtt, now) {
            return;
        }
        if was_out && !frame.draining {
            // It is there again, perhaps as a new process: what was ejected is not this.
            entry.breaker.replied();
            let name = &entry.name;
            tracing::info!(peer = %name.node, region = %name.region, "a peer speaks");
        }
        state.routable.insert(place);
    }

    /// A link to the peer at `place` begins, to its process `epoch`.
    fn greet(&self, place: usize, epoch: u64) {
        if let Some(entry) = self.state.lock().get_mut(place) {
            entry.view.greet(epoch);
        }
    }
}

/// Where others say that a node is called.
fn address(text: &str) -> Option<Authority> {
    text.parse().ok()
}

#[cfg(test)]
mod tests;
