//! The entries of the board: who has which place.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use base::RegionName;
use http::uri::Authority;
use membership::{Candidate, Descriptor, NodeId, RegionOffer};

use super::{
    board::{At, PeerName},
    entry::{Entry, Served},
};
use crate::offer::Offer;

/// Nodes on the board for what relays say of them alone. Those that nobody would miss make room for others.
const HEARD_OF_MAX: usize = 256;
/// Nodes on the board at all; membership keeps to fewer members.
const ENTRIES_MAX: usize = 18_000;
/// What relays say of nodes, model by model, in all and of one region: what is more is left out. What is too old is cleared away
/// this often.
const HEARSAY_MAX: usize = 32_768;
const HEARSAY_OF_REGION_MAX: usize = HEARSAY_MAX / 4;
const HEARSAY_SWEPT_EVERY: Duration = Duration::from_secs(1);
/// A place stays empty for so long: nobody who was told of it before takes the next for the one before.
const PLACE_RESTS: Duration = Duration::from_secs(30);
/// What a region was said to have is not what it has any more after this.
const REGION_OLD: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct State {
    /// By place; `None`: nobody has it.
    pub(super) entries: Vec<Option<Entry>>,
    /// Places that were left, and when.
    left: VecDeque<(Instant, usize)>,
    pub(super) places: BTreeMap<NodeId, usize>,
    /// Places of those whose room is known, or was.
    pub(super) routable: BTreeSet<usize>,
    /// Places of those of which relays alone speak.
    pub(super) heard_of: BTreeSet<usize>,
    /// How many generations and ways there were.
    count: u64,
    /// What nodes serve, by where their descriptor is in memory: many have the same.
    served: BTreeMap<usize, Weak<Served>>,
    pub(super) regions: BTreeMap<RegionName, Region>,
    /// How much relays say of nodes, by their region, at most: some of it may be gone since it was last cleared away.
    hearsay: BTreeMap<RegionName, usize>,
    hearsay_swept: Option<Instant>,
}

/// What a region has.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) sampled: Instant,
    pub(super) offers: Vec<(Offer, RegionOffer)>,
}

impl Region {
    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.sampled) < REGION_OLD
    }
}

impl State {
    pub(super) fn get(&self, place: usize) -> Option<&Entry> {
        self.entries.get(place)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, place: usize) -> Option<&mut Entry> {
        self.entries.get_mut(place)?.as_mut()
    }

    pub(super) fn at(&mut self, at: At) -> Option<&mut Entry> {
        self.get_mut(at.place).filter(|entry| entry.generation == at.generation)
    }

    pub(super) fn of(&mut self, id: NodeId) -> Option<(usize, &mut Entry)> {
        let place = *self.places.get(&id)?;
        Some((place, self.entries.get_mut(place)?.as_mut()?))
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (usize, &Entry)> {
        let all = self.entries.iter().enumerate();
        all.filter_map(|(place, entry)| Some((place, entry.as_ref()?)))
    }

    pub(super) fn routable(&self) -> impl Iterator<Item = (usize, &Entry)> {
        self.routable.iter().filter_map(|place| Some((*place, self.get(*place)?)))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    /// The entry of a node, a new one where there is none; `None`: the board is full.
    pub(super) fn entry(
        &mut self,
        id: NodeId,
        name: &PeerName,
        now: Instant,
    ) -> Option<(usize, &mut Entry)> {
        if !self.places.contains_key(&id) {
            if self.places.len() >= ENTRIES_MAX {
                return None;
            }
            let entry = Entry::new(id, name.clone(), self.next());
            let has_rested = |(left, _): &(Instant, usize)| now >= *left + PLACE_RESTS;
            let place = match self.left.pop_front_if(|left| has_rested(left)) {
                Some((_, place)) => place,
                None => self.entries.len(),
            };
            match self.entries.get_mut(place) {
                Some(empty) => *empty = Some(entry),
                None => self.entries.push(Some(entry)),
            }
            self.places.insert(id, place);
        }
        self.of(id)
    }

    pub(super) fn remove(&mut self, place: usize, now: Instant) {
        let Some(entry) = self.entries.get_mut(place).and_then(Option::take) else { return };
        self.places.remove(&entry.id);
        self.routable.remove(&place);
        self.heard_of.remove(&place);
        self.left.push_back((now, place));
    }

    /// Calls go this way from now on.
    pub(super) fn lead(&mut self, place: usize, address: Option<Authority>) {
        let way = self.next();
        let Some(entry) = self.get_mut(place) else { return };
        if address.is_some() && entry.address != address {
            (entry.address, entry.way) = (address, way);
        }
    }

    /// What a descriptor says, read once however many nodes have the same.
    pub(super) fn read(&mut self, descriptor: &Arc<Descriptor>) -> Arc<Served> {
        let address = Arc::as_ptr(descriptor).addr();
        if let Some(served) = self.served.get(&address).and_then(Weak::upgrade) {
            return served;
        }
        self.served.retain(|_, served| served.strong_count() > 0);
        let served = Arc::new(Served::new(descriptor.clone()));
        self.served.insert(address, Arc::downgrade(&served));
        served
    }

    /// A relay named a node, the one at `place`, among those that have room.
    pub(super) fn hear(
        &mut self,
        place: usize,
        offer: &(Offer, RegionOffer),
        candidate: &Candidate,
        sampled: Instant,
    ) {
        let all: usize = self.hearsay.values().sum();
        let Some(entry) = self.entries.get_mut(place).and_then(Option::as_mut) else { return };
        let of_region = match self.hearsay.get_mut(&entry.name.region) {
            Some(of_region) => of_region,
            None => self.hearsay.entry(entry.name.region.clone()).or_default(),
        };
        let may_grow = all < HEARSAY_MAX && *of_region < HEARSAY_OF_REGION_MAX;
        *of_region += usize::from(entry.hear(offer, candidate, sampled, may_grow));
    }

    /// Clears away what relays said too long ago, now and then.
    pub(super) fn sweep(&mut self, now: Instant) {
        if self.hearsay_swept.is_none_or(|last| now >= last + HEARSAY_SWEPT_EVERY) {
            self.hearsay_swept = Some(now);
            self.hearsay.clear();
            for entry in self.entries.iter_mut().flatten() {
                let left = entry.sweep(now);
                if left > 0 {
                    *self.hearsay.entry(entry.name.region.clone()).or_default() += left;
                }
            }
        }
    }

    /// Room for one more of which relays alone speak.
    pub(super) fn make_room(&mut self, now: Instant) -> bool {
        if self.heard_of.len() < HEARD_OF_MAX {
            return true;
        }
        let is_unused = |place: &&usize| self.get(**place).is_none_or(|e| e.is_unused(now));
        let unused = self.heard_of.iter().find(is_unused).copied();
        if let Some(place) = unused {
            self.remove(place, now);
        }
        unused.is_some()
    }
}
