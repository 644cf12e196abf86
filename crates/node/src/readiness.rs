//! Whether a node takes calls, and whether it may refuse them.
//!
//! A node that has just started knows nobody: what it cannot route may be served by a node of which it hears in an instant.
//! Until it is acquainted with the mesh, such calls wait for that instead of being refused, and load balancers are told that
//! the node starts. It has others to wait for only if it was told of any, or knew some when it last ran.

use std::time::{Duration, Instant};

use base::clock;
use tokio_util::sync::CancellationToken;

use crate::peers::{Acquaintance, Board};

/// The first link brings word of others within this.
const INTRODUCED_WITHIN: Duration = Duration::from_millis(300);
/// Who is known and says nothing is not waited for longer than this after the first link: a node alone in its region becomes
/// a relay first, and is told then.
const HEARD_WITHIN: Duration = Duration::from_millis(2_500);
/// Nobody is waited for longer than this where nobody answers.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked at: what is heard of load wakes nobody.
const LOOK: Duration = Duration::from_millis(20);

/// Where a node is in its life. Cloneable: all clones are of one node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readiness {
    acquainted: CancellationToken,
    draining: CancellationToken,
}

/// That, as load balancers are told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It takes calls, and does not know yet who else could serve them.
    Starting,
    Ready,
    /// It takes no new calls.
    Draining,
}

impl Stage {
    /// For people and programs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ok",
            Self::Draining => "draining",
        }
    }
}

impl Readiness {
    /// Of whoever asks nobody else.
    pub(crate) fn of_one() -> Self {
        let readiness = Self::default();
        readiness.alone();
        readiness
    }

    pub(crate) fn stage(&self) -> Stage {
        if self.draining.is_cancelled() {
            Stage::Draining
        } else if self.acquainted.is_cancelled() {
            Stage::Ready
        } else {
            Stage::Starting
        }
    }

    /// Whether what this node does not know of is not there.
    pub(crate) fn is_acquainted(&self) -> bool {
        self.acquainted.is_cancelled()
    }

    /// Waits until it is: a short while after the start at most.
    pub(crate) async fn acquainted(&self) {
        self.acquainted.cancelled().await;
    }

    /// The node takes no new calls from now on.
    pub(crate) fn drain(&self) {
        self.draining.cancel();
    }

    /// Cancelled when the node takes no new calls.
    pub(crate) fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// There is nobody to get to know.
    pub(crate) fn alone(&self) {
        self.acquainted.cancel();
    }

    /// Gets acquainted with whom `board` knows; ends when that is done.
    pub(crate) async fn get_acquainted(self, board: &Board) {
        let began = clock::now();
        let mut first = First { began, linked: None };
        while !first.is_over(board.acquaintance(), clock::now()) {
            tokio::time::sleep(LOOK).await;
        }
        let after_ms = clock::now().saturating_duration_since(began).as_millis();
        tracing::info!(
            after_ms,
            is_linked = first.linked.is_some(),
            "this node has got to know the mesh, or waits no longer"
        );
        self.acquainted.cancel();
    }
}

/// The first moments of a node.
#[derive(Debug)]
struct First {
    began: Instant,
    /// When it was first linked with anybody.
    linked: Option<Instant>,
}

impl First {
    fn is_over(&mut self, known: Acquaintance, now: Instant) -> bool {
        if known.is_linked && self.linked.is_none() {
            self.linked = Some(now);
        }
        match self.linked {
            None => now >= self.began + PATIENCE,
            Some(at) if known.is_complete && known.is_current => now >= at + INTRODUCED_WITHIN,
            Some(at) => now >= at + HEARD_WITHIN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Linked, what they serve, how pressed they are.
    fn known(is_linked: bool, is_complete: bool, is_current: bool) -> Acquaintance {
        Acquaintance { is_linked, is_complete, is_current }
    }

    #[test]
    fn who_is_linked_and_has_heard_of_all_it_knows_waits_only_for_word_of_further_ones() {
        let began = clock::now();
        let mut first = First { began, linked: None };
        assert!(!first.is_over(known(false, true, true), began), "nobody is known yet");
        assert!(!first.is_over(known(true, true, true), began + 100 * MS));
        assert!(!first.is_over(known(true, true, false), began + 400 * MS));
        assert!(first.is_over(known(true, true, true), began + 400 * MS));
    }

    #[test]
    fn who_says_nothing_and_who_cannot_be_reached_are_not_waited_for_long() {
        let began = clock::now();
        for silent in [known(true, false, true), known(true, true, false)] {
            let mut first = First { began, linked: None };
            assert!(!first.is_over(silent, began + 100 * MS));
            assert!(!first.is_over(silent, began + 2_599 * MS));
            assert!(first.is_over(silent, began + 2_600 * MS));
        }
        let mut first = First { began, linked: None };
        assert!(!first.is_over(known(false, true, true), began + 1_999 * MS));
        assert!(first.is_over(known(false, true, true), began + 2_000 * MS));
    }

    #[test]
    fn a_node_starts_is_ready_and_drains() {
        let readiness = Readiness::default();
        assert_eq!(readiness.stage(), Stage::Starting);
        readiness.alone();
        assert_eq!(readiness.stage(), Stage::Ready);
        readiness.drain();
        assert_eq!(readiness.stage(), Stage::Draining);
        let hurried = Readiness::default();
        hurried.drain();
        assert_eq!(hurried.stage(), Stage::Draining, "it was told to stop while it started");
    }
}
