//! How many slots of an engine that other nodes front too are this node's.
//!
//! Everybody who fronts it knows who the others are, by what they say they serve, and takes an equal share. One that is new
//! takes one slot until the others have had the time to hear of it and to take less. One that is silent keeps its share, for it
//! may go on using it; one that is down by common judgement does not.

use std::{
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use balance::{Owner, share};
use base::{EngineName, clock};
use membership::NodeId;

use crate::{
    engines::Engine,
    peers::{Acquaintance, Board},
};

/// The others have heard of this node so long after it was linked with any of them.
const HEARD_WITHIN: Duration = Duration::from_secs(2);
/// When nobody answers for so long, or not everybody of the region says what it serves, this node waits no longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked at while this node is new.
const LOOK: Duration = Duration::from_millis(100);

/// Keeps the shares of this node's engines, until there is nothing to keep. `may_have_others`: there are nodes it was told of.
pub(crate) async fn keep(engines: Arc<[Arc<Engine>]>, board: Arc<Board>, may_have_others: bool) {
    let shared = |engine: &Arc<Engine>| {
        Some(Shared { id: engine.id.clone()?, slots: engine.slots?, engine: engine.clone() })
    };
    let shared: Vec<_> = engines.iter().filter_map(shared).collect();
    if shared.is_empty() {
        return;
    }
    let mut changes = board.changes();
    let mut newness = Newness::new(clock::now(), may_have_others);
    loop {
        changes.mark_unchanged();
        let is_new = newness.is_new(board.acquaintance(), clock::now());
        shared.iter().for_each(|shared| shared.take(&board, is_new));
        let changed = async {
            // The board is this task's too: it does not end before.
            drop(changes.changed().await);
        };
        if is_new {
            drop(tokio::time::timeout(LOOK, changed).await);
        } else {
            changed.await;
        }
    }
}

/// An engine that several nodes may front.
#[derive(Debug)]
struct Shared {
    id: EngineName,
    slots: NonZeroU32,
    engine: Arc<Engine>,
}

impl Shared {
    /// Takes this node's share.
    fn take(&self, board: &Board, is_new: bool) {
        let others = board.owners(&self.id);
        let share = share_of(self.slots, board.own(), &others, is_new);
        if self.engine.set_share(share) {
            let (engine, slots, nodes) = (&self.engine.name, self.slots, others.len() + 1);
            tracing::info!(%engine, share, slots, nodes, "the share of an engine that several nodes may front");
        }
    }
}

/// The share of `slots` that is `own`'s beside `others`.
fn share_of(slots: NonZeroU32, own: NodeId, others: &[NodeId], is_new: bool) -> NonZeroU32 {
    if is_new {
        return NonZeroU32::MIN;
    }
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let before = others.iter().filter(|other| **other < own).count();
    let of = NonZeroU32::MIN.saturating_add(count(others.len()));
    share(slots, Owner { place: count(before), of })
}

/// Whether others may not have heard of this node yet.
#[derive(Debug)]
struct Newness {
    began: Instant,
    acquainted: Option<Instant>,
    is_over: bool,
}

impl Newness {
    fn new(now: Instant, may_have_others: bool) -> Self {
        Self { began: now, acquainted: None, is_over: !may_have_others }
    }

    fn is_new(&mut self, acquaintance: Acquaintance, now: Instant) -> bool {
        if acquaintance.is_linked && self.acquainted.is_none() {
            self.acquainted = Some(now);
        }
        let is_heard = self.acquainted.is_some_and(|at| now >= at + HEARD_WITHIN);
        let is_late = now >= self.acquainted.unwrap_or(self.began) + PATIENCE;
        self.is_over |= is_late || (is_heard && acquaintance.is_complete);
        !self.is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn node(n: u8) -> NodeId {
        NodeId([n; 16])
    }

    fn share(own: u8, others: &[u8]) -> u32 {
        let others: Vec<_> = others.iter().map(|n| node(*n)).collect();
        share_of(NonZeroU32::new(8).unwrap(), node(own), &others, false).get()
    }

    #[test]
    fn all_who_front_an_engine_take_shares_that_make_the_whole() {
        assert_eq!(share(1, &[]), 8);
        assert_eq!([share(1, &[9, 5]), share(5, &[9, 1]), share(9, &[1, 5])], [3, 3, 2]);
    }

    /// Linked, and complete.
    fn knows(is_linked: bool, is_complete: bool) -> Acquaintance {
        Acquaintance { is_linked, is_complete, is_current: true }
    }

    #[test]
    fn who_is_new_takes_one_slot_until_the_others_have_heard_of_it() {
        let now = clock::now();
        let mut newness = Newness::new(now, true);
        assert!(newness.is_new(knows(false, true), now));
        assert!(newness.is_new(knows(true, true), now + 500 * MS));
        assert!(newness.is_new(knows(true, true), now + 2_499 * MS));
        assert!(!newness.is_new(knows(true, true), now + 2_500 * MS));
        assert!(!newness.is_new(knows(false, false), now + 9_000 * MS), "it was a member once");
        let eight = NonZeroU32::new(8).unwrap();
        assert_eq!(share_of(eight, node(1), &[], true).get(), 1);
    }

    #[test]
    fn who_does_not_know_yet_what_the_others_serve_waits_for_it_within_reason() {
        let now = clock::now();
        let mut newness = Newness::new(now, true);
        assert!(newness.is_new(knows(true, false), now));
        assert!(newness.is_new(knows(true, false), now + 9_999 * MS));
        assert!(!newness.is_new(knows(true, false), now + 10_000 * MS));
    }

    #[test]
    fn who_finds_nobody_is_alone_after_a_while() {
        let now = clock::now();
        let mut newness = Newness::new(now, true);
        assert!(newness.is_new(knows(false, true), now + 9_999 * MS));
        assert!(!newness.is_new(knows(false, true), now + 10_000 * MS));
        assert!(!Newness::new(now, false).is_new(knows(false, true), now), "nobody to be found");
    }
}
