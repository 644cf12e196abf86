//! Which link with a node is the one: there is one between two nodes, and when both dial at once both ends must keep the same.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use membership::NodeId;

/// Dials of both ends that are further apart did not cross: whoever dials then has lost the older link.
const CROSSING: Duration = Duration::from_secs(10);

/// The links of a node, each with what its owner keeps of it.
#[derive(Debug)]
pub(super) struct Table<L> {
    own: NodeId,
    links: BTreeMap<NodeId, Held<L>>,
}

/// A link as it counts here.
#[derive(Debug)]
struct Held<L> {
    entry: Entry,
    link: L,
}

/// What decides between two links with the same node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// Different for every link.
    pub(super) number: u64,
    /// The process at the other end.
    pub(super) epoch: u64,
    /// Whether this end dialled.
    pub(super) dialled: bool,
    /// Since when it works.
    pub(super) since: Instant,
}

/// What became of a new link.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admitted<L> {
    /// It is the only one.
    First,
    /// It takes the place of this one.
    Instead(L),
    /// It is not needed; why.
    Not(&'static str),
}

impl<L> Table<L> {
    pub(super) fn new(own: NodeId) -> Self {
        Self { own, links: BTreeMap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.links.len()
    }

    pub(super) fn contains(&self, id: NodeId) -> bool {
        self.links.contains_key(&id)
    }

    pub(super) fn get(&self, id: NodeId) -> Option<&L> {
        self.links.get(&id).map(|held| &held.link)
    }

    /// The process at the other end of the link with a node.
    pub(super) fn epoch(&self, id: NodeId) -> Option<u64> {
        self.links.get(&id).map(|held| held.entry.epoch)
    }

    /// A link with a node works.
    pub(super) fn admit(&mut self, id: NodeId, entry: Entry, link: L) -> Admitted<L> {
        if let Some(held) = self.links.get(&id)
            && let Some(why) = self.prefers(id, &held.entry, &entry)
        {
            return Admitted::Not(why);
        }
        match self.links.insert(id, Held { entry, link }) {
            Some(older) => Admitted::Instead(older.link),
            None => Admitted::First,
        }
    }

    /// Why the older of two links is the better one, if it is.
    fn prefers(&self, id: NodeId, older: &Entry, newer: &Entry) -> Option<&'static str> {
        if older.epoch != newer.epoch {
            return (newer.epoch < older.epoch).then_some("a later process of this node is linked");
        }
        let crossed = newer.since.saturating_duration_since(older.since) < CROSSING;
        let dialler = |entry: &Entry| if entry.dialled { self.own } else { id };
        (crossed && dialler(older) < dialler(newer)).then_some("doubled")
    }

    /// Takes the link with a node out, whichever it is.
    pub(super) fn remove(&mut self, id: NodeId) -> Option<L> {
        self.links.remove(&id).map(|held| held.link)
    }

    /// Takes link `number` with a node out, if it is still the one.
    pub(super) fn remove_number(&mut self, id: NodeId, number: u64) -> Option<L> {
        self.is_current(id, number).then(|| self.remove(id)).flatten()
    }

    /// Whether link `number` is the one with a node.
    pub(super) fn is_current(&self, id: NodeId, number: u64) -> bool {
        self.links.get(&id).is_some_and(|held| held.entry.number == number)
    }

    /// Takes all of them out.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = L> {
        std::mem::take(&mut self.links).into_values().map(|held| held.link)
    }
}

#[cfg(test)]
mod tests {
    use base::clock;

    use super::*;

    const SMALL: NodeId = NodeId([1; 16]);
    const GREAT: NodeId = NodeId([2; 16]);

    /// The same links as both ends see them, in their order: who dialled each, and its number; which is left at each end.
    fn left(links: &[(NodeId, u64)], order: [&[usize]; 2], apart: Duration) -> [Option<u64>; 2] {
        let start = clock::now();
        [(SMALL, GREAT), (GREAT, SMALL)].map(|(own, other)| {
            let mut table = Table::new(own);
            let order = order[usize::from(own == GREAT)];
            for (at, index) in (0..).zip(order) {
                let (dialler, number) = links[*index];
                let since = start + apart * at;
                let entry = Entry { number, epoch: 1, dialled: dialler == own, since };
                table.admit(other, entry, number);
            }
            table.get(other).copied()
        })
    }

    #[test]
    fn both_ends_keep_the_same_of_two_links_that_crossed() {
        let links = [(SMALL, 1), (GREAT, 2)];
        for orders in [[&[0, 1], &[0, 1]], [&[0, 1], &[1, 0]], [&[1, 0], &[0, 1]]] {
            let [small, great] = orders.map(|order: &[usize; 2]| &order[..]);
            assert_eq!(left(&links, [small, great], Duration::ZERO), [Some(1), Some(1)]);
        }
    }

    #[test]
    fn the_newest_link_of_one_end_replaces_its_older_one() {
        for dialler in [SMALL, GREAT] {
            let links = [(dialler, 1), (dialler, 2)];
            assert_eq!(left(&links, [&[0, 1]; 2], Duration::ZERO), [Some(2), Some(2)]);
        }
    }

    #[test]
    fn whoever_dials_long_after_has_lost_the_older_link() {
        let links = [(SMALL, 1), (GREAT, 2)];
        assert_eq!(left(&links, [&[0, 1]; 2], CROSSING), [Some(2), Some(2)]);
    }

    #[test]
    fn a_later_process_counts_and_an_earlier_one_does_not() {
        let (mut table, since) = (Table::new(SMALL), clock::now());
        let entry = |number, epoch, dialled| Entry { number, epoch, dialled, since };
        assert_eq!(table.admit(GREAT, entry(1, 5, true), "first"), Admitted::First);
        assert_eq!(table.admit(GREAT, entry(2, 6, false), "later"), Admitted::Instead("first"));
        let Admitted::Not(why) = table.admit(GREAT, entry(3, 5, true), "earlier") else {
            panic!("an earlier process is let in")
        };
        assert!(why.contains("later process"));
        assert_eq!(table.epoch(GREAT), Some(6));
        assert_eq!(table.remove_number(GREAT, 1), None);
        assert_eq!(table.remove_number(GREAT, 2), Some("later"));
        assert!(!table.contains(GREAT) && table.len() == 0);
    }
}
