//! Who speaks for the region, and who is listened to in others: whether this node is a relay, and who its partners are.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use base::RegionName;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};

use super::{Mesh, Way};
use crate::{
    Digest, Frame, Judge, NodeId, Pool,
    links::Link,
    pool::Members,
    relays::{RELAYS, elect, weight},
};

/// A node that ranks among the relays becomes one after this, and one that does not any more ceases after that: in between
/// somebody may come back.
const BECOME: Duration = Duration::from_secs(2);
const CEASE: Duration = Duration::from_secs(10);
/// Who knows nobody of its region after so long a link hears of other regions only as a relay: it does not wait.
const INTRODUCED: Duration = Duration::from_millis(500);
/// A new relay is given so long to hear from all of its region before it sums it up.
const NEW: Duration = Duration::from_millis(1_500);
/// Somebody else is listened to where a relay says nothing for so long: one digest is lost.
const SILENT: Duration = Duration::from_millis(600);
/// Relays asked to take this one into their pool at once.
const ANNOUNCE_MAX: usize = 8;
/// Digests of one region are heard no closer than this: half as far apart as they are sent.
const APART: Duration = Duration::from_millis(200);
/// A relay asks somebody for relays of other regions in so many rounds.
const ASK_ROUNDS: u64 = 30;

/// What this node is to its region.
#[derive(Debug)]
pub(super) struct Relaying {
    /// The relays of this region, in their order.
    ours: Vec<NodeId>,
    is_stale: bool,
    is_relay: bool,
    /// When it last became one.
    became: Option<Instant>,
    /// Since when this node is what it should not be.
    since: Option<Instant>,
    /// Pools of relays so far: timers of an older one are void.
    generation: u32,
    /// Whose digests count first, by region: in each the relay of this one's rank.
    partners: BTreeMap<RegionName, NodeId>,
    are_partners_stale: bool,
    /// Whose digests count now.
    ears: BTreeMap<RegionName, Ear>,
}

/// The relay of another region that is listened to.
#[derive(Debug)]
pub(super) struct Ear {
    id: NodeId,
    heard: Instant,
    /// Its newest digest, in so many parts, and when the first of them came; `None`: it took another's place, whose last digest
    /// began then.
    count: Option<(u64, u64)>,
    parts: u32,
    began: Instant,
    /// Whether that is handed on; `None`: nobody has asked. And how many in a row were not.
    passes: Option<bool>,
    missed: u32,
}

impl Ear {
    /// Whether the parts of the newest digest are handed on: all or none, as `decide` says for the first, told how many before it
    /// were not.
    pub(super) fn passes(&mut self, decide: impl FnOnce(u32) -> bool) -> bool {
        *self.passes.get_or_insert_with(|| {
            let passes = decide(self.missed);
            self.missed = if passes { 0 } else { self.missed + 1 };
            passes
        })
    }
}

impl Relaying {
    pub(super) fn new() -> Self {
        Self {
            ours: Vec::new(),
            is_stale: true,
            is_relay: false,
            became: None,
            since: None,
            generation: 0,
            partners: BTreeMap::new(),
            are_partners_stale: false,
            ears: BTreeMap::new(),
        }
    }

    /// A relay of another region says what that has, in a part of this digest. Listened to is one: each relay of
    /// this region has another, so that one that lies is heard by one of them. `None`: it is not this one, or it is too soon for
    /// another digest.
    pub(super) fn listens(
        &mut self,
        now: Instant,
        id: NodeId,
        digest: &Digest,
    ) -> Option<&mut Ear> {
        let region = &digest.region;
        let (count, parts) = (Some((digest.epoch, digest.sequence)), digest.part.1);
        let is_partner = self.partners.get(region) == Some(&id);
        if !self.ears.contains_key(region) {
            let ear = Ear { id, heard: now, count, parts, began: now, passes: None, missed: 0 };
            self.ears.insert(region.clone(), ear);
        }
        let ear = self.ears.get_mut(region)?;
        if ear.id != id && !is_partner && now < ear.heard + SILENT {
            return None;
        }
        if ear.id != id {
            (ear.id, ear.count) = (id, None);
        }
        ear.heard = now;
        if ear.count == count {
            return (ear.parts == parts).then_some(ear);
        }
        // A late part of an earlier one, or another one too soon.
        if count < ear.count || now < ear.began + APART {
            return None;
        }
        (ear.count, ear.parts, ear.began, ear.passes) = (count, parts, now, None);
        Some(ear)
    }

    /// How many digests in a row of one region were not handed on, at most.
    pub(super) fn most_missed(&self, now: Instant) -> u32 {
        let heard = self.ears.values().filter(|ear| now < ear.heard + SILENT);
        heard.map(|ear| ear.missed).max().unwrap_or(0)
    }

    pub(super) fn is_relay(&self) -> bool {
        self.is_relay
    }

    /// Whether it has become a relay only just now.
    pub(super) fn is_new(&self, now: Instant) -> bool {
        self.became.is_some_and(|at| now < at + NEW)
    }

    /// Whether `id` is a relay of this region.
    pub(super) fn is_of_ours(&self, id: NodeId) -> bool {
        self.ours.contains(&id)
    }

    pub(super) fn ours(&self) -> &[NodeId] {
        &self.ours
    }

    /// A relay that knows none in other regions.
    pub(super) fn is_lonely(&self) -> bool {
        self.is_relay && self.partners.is_empty()
    }

    pub(super) fn generation(&self, pool: Pool) -> u32 {
        if pool == Pool::Relays { self.generation } else { 0 }
    }

    pub(super) fn partners(&self) -> impl Iterator<Item = NodeId> {
        self.partners.values().copied()
    }

    /// Whether this node needs a link with `id`.
    pub(super) fn needs(&self, id: NodeId) -> bool {
        self.ours.contains(&id) || self.partners.values().any(|partner| *partner == id)
    }

    pub(super) fn all_needed(&self) -> impl Iterator<Item = NodeId> {
        self.ours.iter().copied().chain(self.partners())
    }

    pub(super) fn links_changed(&mut self) {
        self.are_partners_stale = true;
    }
}

/// Whether `id` is alive in the pool of relays.
pub(super) fn is_fellow(relay: Option<&Members>, id: NodeId) -> bool {
    relay.is_some_and(|relay| relay.is_active(id))
}

impl<J: Judge> Mesh<J> {
    /// Whether `id` is alive in the pool of relays, if this node is in it.
    pub(super) fn is_fellow(&self, id: NodeId) -> bool {
        is_fellow(self.relay.as_ref(), id)
    }

    /// Somebody of a pool came or went.
    pub(super) fn relays_change(&mut self, pool: Pool, id: NodeId, was: bool, is: bool) {
        if was == is {
            return;
        }
        if pool == Pool::Relays {
            self.relaying.are_partners_stale = true;
            return;
        }
        let key = self.own.region.as_str().as_bytes();
        let ours = &self.relaying.ours;
        let zone = |id: NodeId| self.cards.get(id).and_then(|card| card.facts.zone.as_ref());
        let matters = if is {
            let lightest = ours.iter().map(|id| weight(*id, key)).min();
            let is_new_zone =
                zone(id).is_some() && !ours.iter().any(|other| zone(*other) == zone(id));
            ours.len() < RELAYS || is_new_zone || lightest.is_some_and(|l| weight(id, key) > l)
        } else {
            ours.contains(&id)
        };
        self.relaying.is_stale |= matters;
    }

    /// Once a second: who the relays are, whether this node is one, and with whom it speaks.
    pub(super) fn tend_relays(&mut self, now: Instant) {
        if self.is_leaving || self.is_superseded {
            return;
        }
        // A quarantine ends without a word.
        if self.strikes.is_anybody_out(now) {
            self.relaying.is_stale = true;
            self.relaying.are_partners_stale = true;
        }
        if std::mem::take(&mut self.relaying.is_stale) {
            self.elect_relays(now);
        }
        let should = self.relaying.ours.contains(&self.own.id);
        if should == self.relaying.is_relay {
            self.relaying.since = None;
        } else {
            let since = *self.relaying.since.get_or_insert(now);
            let wait = match should {
                true if self.is_alone(now) => Duration::ZERO,
                true => BECOME,
                false => CEASE,
            };
            if now >= since + wait {
                self.relaying.since = None;
                if should { self.become_relay(now) } else { self.cease_relay(now) }
            }
        }
        if self.relaying.is_relay {
            if std::mem::take(&mut self.relaying.are_partners_stale) {
                self.choose_partners(now);
            }
            let interval = if self.relaying.is_lonely() { ASK_ROUNDS / 6 } else { ASK_ROUNDS };
            if self.rounds.is_multiple_of(interval) {
                self.ask_for_relays(now);
            }
        }
    }

    /// Whether this node has been told of others, and none of them is of its region.
    fn is_alone(&self, now: Instant) -> bool {
        let is_old = |link: &Link| !link.is_legacy() && now >= link.since + INTRODUCED;
        self.links.up.values().any(is_old)
            && self.cards.all().all(|card| card.region != self.own.region)
    }

    /// Who is not listened to does not speak for the region.
    fn elect_relays(&mut self, now: Instant) {
        let key = self.own.region.as_str().as_bytes();
        let alive = self.region.all().filter(|(_, seen)| seen.is_active()).map(|(id, _)| id);
        let alive = alive.filter(|id| !self.strikes.is_quarantined(now, *id));
        let zone = |id: NodeId| {
            if id == self.own.id {
                return self.own.zone.as_ref();
            }
            self.cards.get(id).and_then(|card| card.facts.zone.as_ref())
        };
        let ours = elect(key, alive.chain([self.own.id]), zone);
        if ours != self.relaying.ours {
            self.relaying.ours = ours;
            self.relaying.are_partners_stale = true;
        }
    }

    fn become_relay(&mut self, now: Instant) {
        self.relaying.is_relay = true;
        self.relaying.became = Some(now);
        self.relaying.generation = self.relaying.generation.wrapping_add(1);
        let rng = SmallRng::seed_from_u64(self.rng.random());
        self.relay = Some(Members::new(Pool::Relays, self.card.pair(), rng));
        self.subscriptions.relays(now, true);
        self.own_figures = None;
        let known = self
            .cards
            .all()
            .filter(|card| card.region != self.own.region || self.relaying.is_of_ours(card.id));
        let known: Vec<_> = known.map(|card| card.id).collect();
        self.announce_to(now, &known);
        self.ask_for_relays(now);
    }

    fn cease_relay(&mut self, now: Instant) {
        self.say_farewell(now, Pool::Relays);
        self.relaying.is_relay = false;
        self.relaying.partners.clear();
        self.relaying.ears.clear();
        self.relay = None;
        self.figures.clear();
        self.own_figures = None;
        self.subscriptions.relays(now, false);
    }

    /// Asks nodes whether they take this relay into their pool.
    fn announce_to(&mut self, now: Instant, ids: &[NodeId]) {
        let Some(relay) = &mut self.relay else { return };
        let strangers = ids.iter().filter(|id| !relay.is_active(**id));
        let pairs: Vec<_> =
            strangers.filter_map(|id| self.cards.pair(*id)).take(ANNOUNCE_MAX).collect();
        pairs.into_iter().for_each(|pair| relay.announce(pair));
        self.settle(now, Pool::Relays);
    }

    /// Asks somebody which relays other regions have, and some that are known already whether they listen.
    fn ask_for_relays(&mut self, now: Instant) {
        let others = self.cards.all().filter(|card| card.region != self.own.region);
        let mut others: Vec<_> = others.map(|card| card.id).collect();
        others.retain(|id| self.relay.as_ref().is_none_or(|relay| relay.seen(*id).is_none()));
        let few: Vec<_> = others.sample(&mut self.rng, 2).copied().collect();
        self.announce_to(now, &few);
        let linked = self.links.up.iter().filter(|(_, link)| !link.is_legacy());
        let linked: Vec<_> = linked.map(|(id, _)| *id).collect();
        if let Some(id) = linked.choose(&mut self.rng) {
            self.say(now, *id, &Frame::CardsAsk(Pool::Relays, vec![]), Way::Stream);
        }
    }

    /// Somebody told of relays.
    pub(super) fn hear_of_relays(&mut self, now: Instant, ids: &[NodeId]) {
        let is_ours =
            |id: &NodeId| self.cards.get(*id).is_some_and(|card| card.region == self.own.region);
        let (ours, others): (Vec<_>, Vec<_>) = ids.iter().copied().partition(is_ours);
        for id in ours {
            // The way into this node's region, if it came by another.
            if self.region.active() < RELAYS {
                self.plan_dial(now, id, None);
            }
        }
        self.announce_to(now, &others);
    }

    /// In every other region the relay of the same rank, or if that cannot be reached the next.
    fn choose_partners(&mut self, now: Instant) {
        let Some(relay) = &self.relay else { return };
        let rank = self.relaying.ours.iter().position(|id| *id == self.own.id).unwrap_or(0);
        let mut regions: BTreeMap<&RegionName, Vec<NodeId>> = BTreeMap::new();
        let is_listened_to = |id: &NodeId| !self.strikes.is_quarantined(now, *id);
        let active = relay.all().filter(|(_, seen)| seen.is_active()).map(|(id, _)| id);
        for id in active.filter(is_listened_to) {
            if let Some(card) = self.cards.get(id).filter(|card| card.region != self.own.region) {
                regions.entry(&card.region).or_default().push(id);
            }
        }
        let zone = |id: NodeId| self.cards.get(id).and_then(|card| card.facts.zone.as_ref());
        let is_reached =
            |id: &NodeId| self.links.dials.get(id).is_none_or(|dial| dial.failures == 0);
        let chosen = regions.into_iter().filter_map(|(region, ids)| {
            let mut relays = elect(region.as_str().as_bytes(), ids.into_iter(), zone);
            let start = rank % relays.len().max(1);
            relays.rotate_left(start);
            let partner = relays.iter().find(|id| is_reached(id)).or_else(|| relays.first())?;
            Some((region.clone(), *partner))
        });
        self.relaying.partners = chosen.collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_listens_to_its_partner_and_to_others_while_that_is_silent() {
        let of = |sequence, parts| Digest {
            relay: None,
            region: "us".parse().unwrap(),
            epoch: 1,
            sequence,
            age: Duration::ZERO,
            part: (0, parts),
            offers: Vec::new(),
        };
        let [partner, other, liar] = [1, 2, 3].map(|id| NodeId([id; 16]));
        let began = base::clock::now();
        let mut relaying = Relaying::new();
        let hears = |relaying: &mut Relaying, ms: u64, id| {
            relaying.listens(began + Duration::from_millis(ms), id, &of(ms, 3)).is_some()
        };
        assert!(hears(&mut relaying, 0, other), "anybody, before there is a partner");
        relaying.partners.insert("us".parse().unwrap(), partner);
        assert!(hears(&mut relaying, 499, partner) && !hears(&mut relaying, 499, other));
        // One lies all the time, to everybody.
        let mut heard = 0;
        for ms in (500..4_000).step_by(400) {
            heard += (0..40).filter(|i| hears(&mut relaying, ms + i * 10, liar)).count();
            assert!(hears(&mut relaying, ms + 399, partner));
        }
        assert_eq!(heard, 0);
        let silent = 3_700 + 399;
        assert!(
            !hears(&mut relaying, silent + 599, other) && hears(&mut relaying, silent + 600, other)
        );
        assert!(!hears(&mut relaying, silent + 700, liar), "now it is the other");
        assert!(
            hears(&mut relaying, silent + 800, partner)
                && !hears(&mut relaying, silent + 900, other)
        );
        assert!(!hears(&mut relaying, silent + 999, partner), "another digest so soon");
        let part = began + Duration::from_millis(silent + 999);
        assert!(relaying.listens(part, partner, &of(silent + 800, 4)).is_none(), "of another size");
        let last = relaying.listens(part, partner, &of(silent + 800, 3));
        let last = last.expect("a part of the last one");
        assert!(!last.passes(|missed| missed > 0) && !last.passes(|_| true), "all parts or none");
        assert_eq!(relaying.most_missed(part), 1);
        let next = relaying.listens(part + APART, partner, &of(silent + 1_200, 3)).unwrap();
        assert!(next.passes(|missed| missed == 1), "what was left out is told");
        assert!(
            relaying.listens(part + 2 * APART, partner, &of(silent + 800, 3)).is_none(),
            "late"
        );
        // Another one is listened to from now on, whose digests are numbered otherwise.
        let at = part + 2 * APART + SILENT;
        assert!(relaying.listens(at, other, &of(9_000, 3)).is_some());
        relaying.partners.insert("us".parse().unwrap(), liar);
        assert!(relaying.listens(at + APART / 2, liar, &of(5, 3)).is_none(), "so soon");
        assert!(relaying.listens(at + 2 * APART, liar, &of(6, 3)).is_some());
        assert!(relaying.listens(at + 4 * APART, liar, &of(7, 3)).is_some());
    }
}
