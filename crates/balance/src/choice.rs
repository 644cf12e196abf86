//! Choosing among candidates by the share of their slots in use.

use std::num::NonZeroU32;

use rand::{Rng, RngExt as _};

/// Slots assumed where a candidate has not said: only the order among candidates matters.
const ASSUMED_SLOTS: u32 = 64;

/// What is known of one candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Calls in progress there that we know of.
    pub in_flight: u32,
    /// How many it can run at once; `None`: not known.
    pub slots: Option<NonZeroU32>,
}

impl Candidate {
    fn utilisation(&self) -> f64 {
        f64::from(self.in_flight) / f64::from(self.slots.map_or(ASSUMED_SLOTS, NonZeroU32::get))
    }
}

/// The candidate with the smallest share of its slots in use; the first of equals. For engines of one's own, whose counts
/// are exact.
#[must_use]
pub fn least_utilised(candidates: &[Candidate]) -> Option<usize> {
    (0..candidates.len())
        .min_by(|a, b| candidates[*a].utilisation().total_cmp(&candidates[*b].utilisation()))
}

/// The less utilised of two candidates drawn at random. For peers, whose counts are only ours: the best of all would be
/// the best for every node at once, and they would all run there.
///
/// Source: M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
#[must_use]
pub fn two_choices(candidates: &[Candidate], rng: &mut impl Rng) -> Option<usize> {
    match candidates.len() {
        0 => None,
        1 => Some(0),
        count => {
            let first = rng.random_range(0..count);
            let second = (first + rng.random_range(1..count)) % count;
            let less = candidates[second].utilisation() < candidates[first].utilisation();
            Some(if less { second } else { first })
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn candidates(in_flight: &[(u32, u32)]) -> Vec<Candidate> {
        in_flight
            .iter()
            .map(|(in_flight, slots)| Candidate {
                in_flight: *in_flight,
                slots: NonZeroU32::new(*slots),
            })
            .collect()
    }

    #[test]
    fn the_least_utilised_is_by_share_not_by_count() {
        assert_eq!(least_utilised(&candidates(&[(4, 8), (10, 64), (1, 4)])), Some(1));
        assert_eq!(least_utilised(&[]), None);
    }

    #[test]
    fn two_choices_spreads_equals_and_avoids_the_most_utilised() {
        let mut rng = StdRng::seed_from_u64(7);
        let equal = candidates(&[(0, 8); 4]);
        let mut counts = [0u32; 4];
        for _ in 0..4_000 {
            counts[two_choices(&equal, &mut rng).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (800..1_200).contains(count)), "{counts:?}");

        let one_busy = candidates(&[(8, 8), (0, 8), (0, 8)]);
        assert!((0..1_000).all(|_| two_choices(&one_busy, &mut rng) != Some(0)));
    }

    #[test]
    fn few_candidates_need_no_luck() {
        let mut rng = StdRng::seed_from_u64(1);
        assert_eq!(two_choices(&[], &mut rng), None);
        assert_eq!(two_choices(&candidates(&[(9, 1)]), &mut rng), Some(0));
    }
}
