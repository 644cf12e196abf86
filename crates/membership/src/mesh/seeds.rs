//! Where others may be found while nobody is known, and who is asked for ever after.

use std::time::{Duration, Instant};

use rand::{
    RngExt as _,
    seq::{IndexedRandom as _, IteratorRandom as _},
};

use super::{Mesh, Output, Peer, Target, Way};
use crate::{
    Frame, Judge, NodeId, Pool,
    links::{DIAL_TIMEOUT, Place},
};

/// A random seed is asked this often, for as long as the node lives: it heals a mesh that began as two.
const SEED_EVERY: Duration = Duration::from_secs(30);
/// Seeds dialled at once while nobody is found.
const SEEDS_AT_ONCE: usize = 8;
/// Who has no link any more dials so many of those it knows this often, whatever became of them: seeds may be gone for good.
const KNOWN_EVERY: Duration = Duration::from_secs(5);
const KNOWN_AT_ONCE: usize = 8;
/// Places kept from an earlier life.
const KEPT_MAX: usize = 16;

impl<J: Judge> Mesh<J> {
    /// Listed nodes are always linked.
    pub(super) fn dial_listed(&mut self, now: Instant) {
        let listed = self.seeds.listed().map(|(peer, _)| peer.id);
        let listed: Vec<_> = listed.filter(|id| *id != self.own.id).collect();
        listed.into_iter().for_each(|id| self.plan_dial(now, id, None));
    }

    /// Once a second: places where others may be found.
    pub(super) fn tend_seeds(&mut self, now: Instant) {
        if self.is_leaving || self.is_superseded {
            return;
        }
        if self.links.up.values().any(|link| !link.is_legacy()) {
            self.seeds.places.retain(|place| !place.is_kept);
            if now >= self.next_seed {
                self.next_seed = now + SEED_EVERY.mul_f64(self.rng.random_range(0.8..1.2));
                self.ask_a_seed(now);
            }
            return;
        }
        if now >= self.next_known {
            self.next_known = now + KNOWN_EVERY.mul_f64(self.rng.random_range(0.8..1.2));
            let others = self.cards.all().map(|card| card.id).filter(|id| *id != self.own.id);
            let some = others.sample(&mut self.rng, KNOWN_AT_ONCE);
            some.into_iter().for_each(|id| self.plan_dial(now, id, None));
        }
        let own = (&self.own.gossip, self.own.id);
        // Listed nodes are dialled by their names.
        let is_due = |place: &&mut Place| {
            !place.is_listed()
                && place.address() != own.0
                && place.peer().is_none_or(|peer| peer.id != own.1)
                && match place.since {
                    Some(since) => now >= since + DIAL_TIMEOUT,
                    None => now >= place.due,
                }
        };
        let due = self.seeds.places.iter_mut().filter(is_due).take(SEEDS_AT_ONCE);
        let targets: Vec<_> = due
            .map(|place| {
                place.since = Some(now);
                place.target.clone()
            })
            .collect();
        self.outputs.extend(targets.into_iter().map(Output::Dial));
        self.next_seed = now + SEED_EVERY.mul_f64(self.rng.random_range(0.8..1.2));
    }

    fn ask_a_seed(&mut self, now: Instant) {
        let places: Vec<_> = self
            .seeds
            .places
            .iter()
            .filter(|place| place.address() != self.own.gossip)
            .map(|place| place.target.clone())
            .collect();
        let Some(target) = places.choose(&mut self.rng) else { return };
        let linked = self.linked_at(target);
        match linked {
            None => self.outputs.push_back(Output::Dial(target.clone())),
            Some(id) if self.region.is_active(id) => {
                if let Some(pair) = self.cards.pair(id) {
                    self.region.announce(pair);
                    self.settle(now, Pool::Region);
                }
            }
            Some(id) => self.say(now, id, &Frame::CardsAsk(Pool::Relays, vec![]), Way::Stream),
        }
    }

    fn linked_at(&self, target: &Target) -> Option<NodeId> {
        let (address, peer) = (target.address(), target.peer());
        let is_it = |id: &NodeId| {
            peer.is_some_and(|peer| peer.id == *id)
                || self.cards.get(*id).is_some_and(|card| card.facts.gossip == address)
        };
        self.links.up.keys().copied().find(is_it)
    }

    pub(super) fn found_seed(&mut self, peer: &Peer) {
        let address = self.cards.get(peer.id).map(|card| card.facts.gossip.clone());
        for place in &mut self.seeds.places {
            let is_it = place.peer().is_some_and(|p| p.id == peer.id)
                || address.as_deref() == Some(place.address());
            if is_it {
                (place.failures, place.since) = (0, None);
            }
        }
    }

    /// Judges cards that were kept, and dials some of them as if they were seeds.
    pub fn remember(&mut self, now: Instant, cards: &[Vec<u8>]) {
        for signed in cards.iter().take(4 * KEPT_MAX) {
            let Ok(judged) = self.judge.judge(signed) else { continue };
            let Ok(facts) = crate::decode_card(&judged.card) else { continue };
            let peer = Peer { id: judged.id, node: judged.node, region: judged.region };
            self.keep_place(now, Target::Member { peer, address: facts.gossip });
        }
    }

    /// Where somebody was, to be asked until anybody is linked. The last ones stay, half of them of this region at least.
    pub(super) fn keep_place(&mut self, due: Instant, target: Target) {
        let Some(peer) = target.peer().filter(|peer| peer.id != self.own.id) else { return };
        let is_near = peer.region == self.own.region;
        let is_far = |place: &Place| place.peer().is_none_or(|p| p.region != self.own.region);
        let places = &mut self.seeds.places;
        let kept = places.iter().filter(|place| place.is_kept);
        let (count, far) = (kept.clone().count(), kept.filter(|place| is_far(place)).count());
        let oldest = if !is_near && far >= KEPT_MAX / 2 {
            places.iter().position(|place| place.is_kept && is_far(place))
        } else if count >= KEPT_MAX {
            places.iter().position(|place| place.is_kept)
        } else {
            None
        };
        oldest.into_iter().for_each(|place| drop(places.remove(place)));
        places.push(Place::new(due, target, true));
    }
}
