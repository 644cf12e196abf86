//! Who hears whom, and how long does it take?
//!
//! Regions are points on a plane; inside one, nodes are 0.2 to 1 ms apart, between two 10 to 100 ms, one way.

use std::collections::BTreeSet;

use rand::{RngExt as _, rngs::StdRng};

/// A moment or a time of the simulation, in nanoseconds.
pub(super) type Nanos = u64;

pub(super) const MS: Nanos = 1_000_000;
pub(super) const SECOND: Nanos = 1_000 * MS;

/// Nobody hears anybody sooner.
pub(super) const SHORTEST_WAY: Nanos = 200_000;

/// What a datagram costs beside its frame: IP, UDP, QUIC.
pub(super) const OVERHEAD_BYTES: u64 = 45;
/// What fits into one packet.
const PACKET_BYTES: u64 = 1_150;

#[derive(Debug)]
pub(super) struct Network {
    regions: usize,
    /// One way between two regions, by both.
    ways: Vec<Nanos>,
    loss: f64,
    rng: StdRng,
    /// In which half of a split world each host is; empty: it is whole.
    halves: Vec<bool>,
    /// Who is cut off from everybody, by host.
    isolated: BTreeSet<u32>,
    /// From whom to whom nothing comes.
    deaf: BTreeSet<(u32, u32)>,
}

impl Network {
    pub(super) fn new(regions: u32, loss: f64, mut rng: StdRng) -> Self {
        let regions = regions as usize;
        let points: Vec<(f64, f64)> = (0..regions).map(|_| (rng.random(), rng.random())).collect();
        let way = |a: (f64, f64), b: (f64, f64)| {
            let far = (a.0 - b.0).hypot(a.1 - b.1) / std::f64::consts::SQRT_2;
            nanos((10.0 + 90.0 * far) * 1e6)
        };
        let ways = points.iter().flat_map(|a| points.iter().map(|b| way(*a, *b))).collect();
        Self {
            regions,
            ways,
            loss,
            rng,
            halves: vec![],
            isolated: BTreeSet::new(),
            deaf: BTreeSet::new(),
        }
    }

    /// One way from host to host, each with its region, without jitter.
    pub(super) fn way(&self, (a, ra): (u32, u32), (b, rb): (u32, u32)) -> Nanos {
        if ra == rb {
            let mixed = (u64::from(a.min(b)) << 32 | u64::from(a.max(b)))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            return SHORTEST_WAY + (mixed >> 32) * 800_000 / (1 << 32);
        }
        let at = ra as usize * self.regions + rb as usize;
        self.ways.get(at).copied().unwrap_or(50 * MS)
    }

    /// One way with jitter: up to a tenth more, seldom much.
    pub(super) fn jittered(&mut self, way: Nanos) -> Nanos {
        let draw: f64 = self.rng.random();
        way + nanos(way as f64 * 0.1 * draw * draw)
    }

    /// Whether one packet is lost by chance.
    pub(super) fn loses(&mut self) -> bool {
        self.loss > 0.0 && self.rng.random_bool(self.loss)
    }

    /// How often so many bytes of a stream are held up by a packet that has to be sent again.
    pub(super) fn losses(&mut self, bytes: usize) -> u32 {
        let mut losses = 0;
        for _ in 0..packets(bytes).min(64) {
            losses += u32::from(self.loses());
        }
        // Packets of one flight are sent again together; one lost twice takes twice as long.
        losses.min(1 + u32::from(losses > 1 && self.loses()))
    }

    /// Whether nothing comes from the one to the other.
    pub(super) fn is_blocked(&self, from: u32, to: u32) -> bool {
        let half = |host: u32| self.halves.get(host as usize).copied();
        (!self.halves.is_empty() && half(from) != half(to))
            || (!self.isolated.is_empty()
                && (self.isolated.contains(&from) || self.isolated.contains(&to)))
            || (!self.deaf.is_empty() && self.deaf.contains(&(from, to)))
    }

    /// Whether anything is cut.
    pub(super) fn is_whole(&self) -> bool {
        self.halves.is_empty() && self.isolated.is_empty() && self.deaf.is_empty()
    }

    /// Splits the world, or makes it whole with an empty list.
    pub(super) fn split(&mut self, halves: Vec<bool>) {
        self.halves = halves;
    }

    pub(super) fn isolate(&mut self, host: u32, is: bool) {
        if is {
            self.isolated.insert(host)
        } else {
            self.isolated.remove(&host)
        };
    }

    pub(super) fn deafen(&mut self, from: u32, to: u32, is: bool) {
        if is {
            self.deaf.insert((from, to))
        } else {
            self.deaf.remove(&(from, to))
        };
    }

    /// A draw from 0 up to this.
    pub(super) fn up_to(&mut self, most: Nanos) -> Nanos {
        self.rng.random_range(0..=most)
    }
}

fn packets(bytes: usize) -> u64 {
    (bytes as u64).div_ceil(PACKET_BYTES).max(1)
}

/// What a frame of so many bytes is on the wire.
pub(super) fn on_wire(bytes: usize) -> u64 {
    bytes as u64 + OVERHEAD_BYTES * packets(bytes)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive and below an hour"
)]
fn nanos(time: f64) -> Nanos {
    time as Nanos
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn ways_are_symmetric_and_within_their_bounds() {
        let network = Network::new(5, 0.0, StdRng::seed_from_u64(1));
        for (a, b) in [(0, 1), (7, 900), (3, 12)] {
            let inside = network.way((a, 2), (b, 2));
            assert!((200_000..=MS).contains(&inside));
            let between = network.way((a, 1), (b, 4));
            assert!((10 * MS..=100 * MS).contains(&between));
            assert_eq!(network.way((b, 4), (a, 1)), between);
            assert_eq!(network.way((b, 2), (a, 2)), inside);
        }
    }

    #[test]
    fn a_split_world_is_blocked_both_ways_and_the_deaf_one_way() {
        let mut network = Network::new(1, 0.0, StdRng::seed_from_u64(1));
        network.deafen(0, 1, true);
        assert!(network.is_blocked(0, 1) && !network.is_blocked(1, 0) && !network.is_whole());
        network.deafen(0, 1, false);
        network.split(vec![true, true, false]);
        assert!(network.is_blocked(0, 2) && network.is_blocked(2, 1) && !network.is_blocked(0, 1));
        network.split(vec![]);
        assert!(network.is_whole() && !network.is_blocked(0, 2));
    }
}
