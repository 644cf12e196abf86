//! Which link with a node is the one: there is one between two nodes, and when both dial at once both ends must keep the same.
//!
//! With a node of version 1 there may be one each way: it speaks only over those it was dialled on, and listens only on those it
//! dialled.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use membership::NodeId;

use super::link::SUPERSEDED;

/// Dials of both ends that are further apart did not cross: whoever dials then has lost the older link.
const CROSSING: Duration = Duration::from_secs(10);

/// The links of a node, each with what its owner keeps of it.
#[derive(Debug)]
pub(super) struct Table<L> {
    own: NodeId,
    links: BTreeMap<(NodeId, Side), Held<L>>,
}

/// Which of the links with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    /// The only one.
    Both,
    /// The one this end dialled, to a node of version 1.
    Out,
    /// The one a node of version 1 dialled.
    In,
}

impl Side {
    const ALL: [Self; 3] = [Self::Both, Self::Out, Self::In];
}

/// A link as it counts here.
#[derive(Debug)]
struct Held<L> {
    entry: Entry,
    link: L,
}

/// What decides between links with the same node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// Different for every link.
    pub(super) number: u64,
    /// The process at the other end.
    pub(super) epoch: u64,
    /// Whether this end dialled.
    pub(super) dialled: bool,
    /// Whether the other end speaks version 1.
    pub(super) is_legacy: bool,
    /// Since when it works.
    pub(super) since: Instant,
}

impl Entry {
    fn side(&self) -> Side {
        match (self.is_legacy, self.dialled) {
            (false, _) => Side::Both,
            (true, true) => Side::Out,
            (true, false) => Side::In,
        }
    }
}

/// What is left of the links with a node when one is gone.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// It had been replaced before.
    AsBefore,
    /// Nothing.
    Nothing,
    /// The one the other way, and whether this end dialled it.
    Other { dialled: bool },
}

impl<L> Table<L> {
    pub(super) fn new(own: NodeId) -> Self {
        Self { own, links: BTreeMap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.links.len()
    }

    pub(super) fn contains(&self, id: NodeId) -> bool {
        self.of(id).next().is_some()
    }

    fn of(&self, id: NodeId) -> impl Iterator<Item = &Held<L>> {
        self.links.range((id, Side::Both)..=(id, Side::In)).map(|(_, held)| held)
    }

    /// The link over which this end speaks to a node.
    pub(super) fn to(&self, id: NodeId) -> Option<&L> {
        let held = self.links.get(&(id, Side::Both)).or_else(|| self.links.get(&(id, Side::In)));
        held.map(|held| &held.link)
    }

    /// The process at the other end of the links with a node.
    pub(super) fn epoch(&self, id: NodeId) -> Option<u64> {
        self.of(id).map(|held| held.entry.epoch).max()
    }

    /// Whether link `number` with a node is in use.
    pub(super) fn is_current(&self, id: NodeId, number: u64) -> bool {
        self.of(id).any(|held| held.entry.number == number)
    }

    /// A link with a node works: those whose place it takes.
    ///
    /// # Errors
    /// It is not needed; why.
    pub(super) fn admit(
        &mut self,
        id: NodeId,
        entry: Entry,
        link: L,
    ) -> Result<Vec<L>, &'static str> {
        if let Some(why) = self.of(id).find_map(|held| self.prefers(id, &held.entry, &entry)) {
            return Err(why);
        }
        let (side, one_way) = (entry.side(), [Side::Out, Side::In]);
        let replaces = |other: Side, held: &Held<L>| {
            let is_beside = one_way.contains(&other) && one_way.contains(&side) && other != side;
            !is_beside || held.entry.epoch < entry.epoch
        };
        let replaced = Side::ALL.into_iter().filter_map(|other| {
            let is_replaced =
                self.links.get(&(id, other)).is_some_and(|held| replaces(other, held));
            is_replaced.then(|| self.links.remove(&(id, other))).flatten()
        });
        let replaced = replaced.map(|held| held.link).collect();
        self.links.insert((id, side), Held { entry, link });
        Ok(replaced)
    }

    /// Why the older of two links is the better one, if it is.
    fn prefers(&self, id: NodeId, older: &Entry, newer: &Entry) -> Option<&'static str> {
        if older.epoch != newer.epoch {
            return (newer.epoch < older.epoch).then_some(SUPERSEDED);
        }
        let are_one = older.side() == Side::Both && newer.side() == Side::Both;
        let crossed = newer.since.saturating_duration_since(older.since) < CROSSING;
        let dialler = |entry: &Entry| if entry.dialled { self.own } else { id };
        (are_one && crossed && dialler(older) < dialler(newer)).then_some("doubled")
    }

    /// Every link: with whom, its number, and what is kept of it.
    pub(super) fn all(&self) -> impl Iterator<Item = (NodeId, u64, &L)> {
        self.links.iter().map(|((id, _), held)| (*id, held.entry.number, &held.link))
    }

    /// Takes all links with a node out.
    pub(super) fn remove(&mut self, id: NodeId) -> Vec<L> {
        Side::ALL
            .into_iter()
            .filter_map(|side| Some(self.links.remove(&(id, side))?.link))
            .collect()
    }

    /// Takes link `number` with a node out, if it is still there.
    pub(super) fn remove_number(&mut self, id: NodeId, number: u64) -> Left {
        let held = self.of(id).find(|held| held.entry.number == number);
        let Some(side) = held.map(|held| held.entry.side()) else { return Left::AsBefore };
        self.links.remove(&(id, side));
        match self.of(id).next() {
            Some(other) => Left::Other { dialled: other.entry.dialled },
            None => Left::Nothing,
        }
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

    fn entry(number: u64, epoch: u64, dialled: bool) -> Entry {
        Entry { number, epoch, dialled, is_legacy: false, since: clock::now() }
    }

    fn legacy(number: u64, epoch: u64, dialled: bool) -> Entry {
        Entry { is_legacy: true, ..entry(number, epoch, dialled) }
    }

    /// The same links as both ends see them, in their order: who dialled each, and its number; which is left at each end.
    fn left(links: &[(NodeId, u64)], order: [&[usize]; 2], apart: Duration) -> [Option<u64>; 2] {
        let start = clock::now();
        [(SMALL, GREAT), (GREAT, SMALL)].map(|(own, other)| {
            let mut table = Table::new(own);
            let order = order[usize::from(own == GREAT)];
            for (at, index) in (0..).zip(order) {
                let (dialler, number) = links[*index];
                let since = start + apart * at;
                let entry = Entry { since, ..entry(number, 1, dialler == own) };
                drop(table.admit(other, entry, number));
            }
            table.to(other).copied()
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
        let mut table = Table::new(SMALL);
        assert_eq!(table.admit(GREAT, entry(1, 5, true), "first"), Ok(vec![]));
        assert_eq!(table.admit(GREAT, entry(2, 6, false), "later"), Ok(vec!["first"]));
        let why = table.admit(GREAT, entry(3, 5, true), "earlier").unwrap_err();
        assert!(why.contains("later process"));
        assert_eq!(table.epoch(GREAT), Some(6));
        assert_eq!(table.remove_number(GREAT, 1), Left::AsBefore);
        assert_eq!(table.remove_number(GREAT, 2), Left::Nothing);
        assert!(!table.contains(GREAT) && table.len() == 0);
    }

    #[test]
    fn with_a_node_of_version_1_there_is_a_link_each_way() {
        let mut table = Table::new(SMALL);
        assert_eq!(table.admit(GREAT, legacy(1, 5, true), "out"), Ok(vec![]));
        assert_eq!(table.to(GREAT), None, "it does not listen there");
        assert_eq!(table.admit(GREAT, legacy(2, 5, false), "in"), Ok(vec![]));
        assert_eq!(table.admit(GREAT, legacy(3, 5, false), "newer in"), Ok(vec!["in"]));
        assert_eq!((table.len(), table.to(GREAT)), (2, Some(&"newer in")));
        assert_eq!(table.remove_number(GREAT, 1), Left::Other { dialled: false });
        assert_eq!(table.admit(GREAT, legacy(4, 5, true), "out"), Ok(vec![]));
        // It comes back as another process, and then as one of version 2.
        assert_eq!(table.admit(GREAT, legacy(5, 6, true), "out 6"), Ok(vec!["out", "newer in"]));
        assert_eq!(table.admit(GREAT, entry(6, 7, false), "both"), Ok(vec!["out 6"]));
        assert_eq!(table.remove(GREAT), ["both"]);
    }
}
