//! Which nodes of a region are its relays, by rendezvous hashing (Thaler and Ravishankar, 1998): every node comes to the same
//! answer by itself, and a node that comes or goes changes no more than one place.

use base::ZoneName;

use crate::NodeId;

/// Relays of a region.
pub(crate) const RELAYS: usize = 3;

/// How much node `id` weighs for `key`: FNV-1a over both, 64 bits, and the finisher of MurmurHash3, so that ids that differ in
/// few bits weigh nothing alike. The same on every node and in every release: relays are agreed on by it.
pub(crate) fn weight(id: NodeId, key: &[u8]) -> u64 {
    let fnv = id.0.iter().chain(key).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut hash = fnv;
    for factor in [0xff51_afd7_ed55_8ccd_u64, 0xc4ce_b9fe_1a85_ec53] {
        hash = (hash ^ (hash >> 33)).wrapping_mul(factor);
    }
    hash ^ (hash >> 33)
}

/// The relays among `members`, the heaviest first, in different zones as far as there are as many. `zone` is asked of few.
pub(crate) fn elect<'a>(
    key: &[u8],
    members: impl Iterator<Item = NodeId>,
    zone: impl Fn(NodeId) -> Option<&'a ZoneName>,
) -> Vec<NodeId> {
    let mut heaviest: Vec<_> = members.map(|id| (weight(id, key), id)).collect();
    heaviest.sort_unstable_by(|a, b| b.cmp(a));
    let mut chosen: Vec<(usize, NodeId)> = Vec::with_capacity(RELAYS);
    let mut zones: Vec<Option<&ZoneName>> = Vec::with_capacity(RELAYS);
    for (rank, (_, id)) in heaviest.iter().enumerate() {
        let zone = zone(*id);
        if !zones.contains(&zone) {
            zones.push(zone);
            chosen.push((rank, *id));
        }
        if chosen.len() == RELAYS {
            break;
        }
    }
    for (rank, (_, id)) in heaviest.iter().enumerate() {
        if chosen.len() < RELAYS && !chosen.contains(&(rank, *id)) {
            chosen.push((rank, *id));
        }
    }
    chosen.sort_unstable();
    chosen.into_iter().map(|(_, id)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(n: u8) -> impl Iterator<Item = NodeId> {
        (0..n).map(|i| NodeId([i; 16]))
    }

    #[test]
    fn weights_never_change() {
        assert_eq!(weight(NodeId([0; 16]), b"eu"), 17_506_665_354_028_822_506);
    }

    #[test]
    fn one_node_more_changes_one_place_at_most() {
        for n in 3..100 {
            let before = elect(b"eu", ids(n), |_| None);
            let after = elect(b"eu", ids(n + 1), |_| None);
            assert_eq!(before.len(), RELAYS);
            assert!(before.iter().filter(|id| !after.contains(id)).count() <= 1);
        }
    }

    #[test]
    fn relays_are_in_different_zones_where_there_are_as_many() {
        let zones: [ZoneName; 3] = ["a", "b", "c"].map(|zone| zone.parse().unwrap());
        let zone = |id: NodeId| zones.get(usize::from(id.0[0] % 30).saturating_sub(27));
        let chosen = elect(b"eu", ids(90), zone);
        let mut found: Vec<_> = chosen.iter().map(|id| zone(*id)).collect();
        found.sort();
        assert_eq!(found, zones.iter().map(Some).collect::<Vec<_>>());
        assert_eq!(elect(b"eu", ids(2), zone).len(), 2);
    }
}
