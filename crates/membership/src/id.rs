//! Which node, and which of its cards.

use std::{cmp::Ordering, fmt};

/// A node: the first 16 bytes of the SHA-256 of its SPIFFE id, which names its trust domain, region and name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub [u8; 16]);

impl NodeId {
    /// Reads one; `None`: it has another length.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Its upper and its lower half, as numbers.
    pub(crate) fn halves(self) -> [u64; 2] {
        [0, 8].map(|at| {
            let half = self.0.get(at..at + 8).and_then(|half| half.try_into().ok());
            u64::from_be_bytes(half.unwrap_or_default())
        })
    }
}

/// Scatters 64 bits, much like the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
/// 2014); docs/wire.md has it.
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// As its bytes: compared as one number, which is what every map of nodes does most.
impl Ord for NodeId {
    fn cmp(&self, other: &Self) -> Ordering {
        u128::from_be_bytes(self.0).cmp(&u128::from_be_bytes(other.0))
    }
}

impl PartialOrd for NodeId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(4).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A node as it stands on one of its cards: what foca knows as an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// The node.
    pub id: NodeId,
    /// Its process: greater after each start.
    pub epoch: u64,
    /// Counts up with every card of an epoch.
    pub bump: u16,
}
