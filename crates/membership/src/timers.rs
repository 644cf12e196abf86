//! What is due when: one heap for the whole machine.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    time::Instant,
};

use foca::Timer;

use crate::{NodeId, Pair, Pool};

/// What is due.
#[derive(Debug)]
pub(crate) enum Due {
    /// A timer of foca's, in its pool, which may not be there any more: they are counted.
    Foca(Pool, u32, Timer<Pair>),
    /// A node is dialled.
    Dial(NodeId),
    /// A suspicion of ours is decided.
    Suspicion(Pool, NodeId),
    /// A suspicion of somebody else's has had its time.
    Doubt(Pool, NodeId),
    /// A new card is made.
    Renewal,
    /// Everything that is looked at once a second.
    Round,
}

#[derive(Debug)]
struct Entry {
    at: Instant,
    /// In the order in which they were set: foca wants it so.
    number: u64,
    due: Due,
}

/// The heap.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<Entry>>,
    number: u64,
}

impl Timers {
    pub(crate) fn set(&mut self, at: Instant, due: Due) {
        self.number += 1;
        self.heap.push(Reverse(Entry { at, number: self.number, due }));
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse(entry)| entry.at)
    }

    /// What is due at `now`, the earliest first.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Due> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry.due)
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}
