//! Whether this node knows everybody another knows: news that never came is made good within half a minute.
//!
//! A node says what it has of its region as sums, one of each part of the space of ids, and gets the cards of the parts in which
//! the other has something else. Gossip misses somebody now and then; in a large region nothing else would ever tell.

use std::time::{Duration, Instant};

use super::{Mesh, Way, card::ALL_GAP};
use crate::{Frame, Judge, NodeId, Pair, Pool, id::mix, wire::PARTS_OF_REGION_MAX};

/// Rounds from one comparison to the next, and of a node that has just started.
const ROUNDS: u64 = 30;
const ROUNDS_YOUNG: u64 = 5;
/// One node is told no more often.
const GAP: Duration = Duration::from_secs(2);
/// Members of a part, about: so many cards come for one that is missing.
const MEMBERS_OF_PART: usize = 8;

impl<J: Judge> Mesh<J> {
    /// Asks somebody of the region for what this node does not know, if it is time.
    pub(super) fn compare(&mut self, now: Instant) {
        let every = if self.rounds < 2 * ROUNDS { ROUNDS_YOUNG } else { ROUNDS };
        if !self.rounds.is_multiple_of(every) {
            return;
        }
        let Some(Pair { id, .. }) = self.somebody(Pool::Region) else { return };
        let parts = (self.region.active() / MEMBERS_OF_PART).max(1).next_power_of_two();
        let sums = self.sums(parts.min(PARTS_OF_REGION_MAX));
        if let Some(link) = self.links.up.get_mut(&id) {
            link.asks_all(now, !self.has_all);
        }
        self.say(now, id, &Frame::CardsCompare(sums), Way::Stream);
    }

    /// `from` says what it has of the region.
    pub(super) fn hear_cards_compare(&mut self, now: Instant, from: NodeId, theirs: &[u64]) {
        let Some(link) = self.links.up.get_mut(&from) else { return };
        let is_stranger = link.peer.region != self.own.region;
        let is_soon = link.compared.is_some_and(|at| now < at + GAP);
        if is_stranger || is_soon || link.gave_all.is_some_and(|(at, _)| now < at + ALL_GAP) {
            return;
        }
        link.compared = Some(now);
        let ours = self.sums(theirs.len());
        let differs = |id: NodeId| {
            let part = part_of(id, theirs.len());
            ours.get(part) != theirs.get(part)
        };
        let active = self.region.all().filter(|(id, seen)| seen.is_active() && differs(*id));
        let mut cards: Vec<_> = active.filter_map(|(id, _)| self.cards.get(id).cloned()).collect();
        if differs(self.own.id) {
            cards.push(self.card.clone());
        }
        if cards.is_empty() {
            return;
        }
        if let Some(link) = self.links.up.get_mut(&from) {
            link.gave_all = Some((now, Pool::Region));
        }
        self.give_cards(now, from, Pool::Region, &cards);
    }

    /// One sum of each part: of the pairs that are alive, this node's included.
    pub(super) fn sums(&self, parts: usize) -> Vec<u64> {
        let mut sums = vec![0_u64; parts];
        let active = self.region.all().filter(|(_, seen)| seen.is_active());
        for pair in active.map(|(id, seen)| seen.pair(id)).chain([self.card.pair()]) {
            if let Some(sum) = sums.get_mut(part_of(pair.id, parts)) {
                *sum ^= fingerprint(pair);
            }
        }
        sums
    }
}

/// Ids are hashes: their first bytes spread evenly. `parts` is a power of two.
fn part_of(id: NodeId, parts: usize) -> usize {
    let [first, second, ..] = id.0;
    usize::from(u16::from_be_bytes([first, second])) & (parts - 1)
}

/// Sixty-four bits of a pair.
fn fingerprint(pair: Pair) -> u64 {
    let [high, low] = pair.id.halves();
    [high, low, pair.epoch, pair.bump.into()].into_iter().fold(0, |sum, word| mix(sum ^ word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_made_as_documented() {
        let pair = Pair { id: NodeId([1; 16]), epoch: 7, bump: 1 };
        assert_eq!(fingerprint(pair), 0x80ea_4d58_c692_3761);
        assert_eq!([part_of(pair.id, 1), part_of(pair.id, 64)], [0, 1]);
    }
}
