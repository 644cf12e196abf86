//! What other regions have, from what several relays say of them, one of which may lie.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use base::RegionName;

use crate::{Digest, NodeId, RegionView};

/// What is known of all regions.
#[derive(Debug, Default)]
pub(crate) struct Regions {}

impl Regions {
    /// A digest came from `from`, a relay of this region that made it or hands it on, or the relay of another that made it.
    /// The caller has seen to it: `from` is a relay of one of the two, and the card of who made it says `digest.region`.
    /// Returns whether it completes one that is news.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        from: NodeId,
        digest: Digest,
        one_way: Duration,
    ) -> bool {
        drop((now, from, digest, one_way));
        false
    }

    /// What has changed, at most five times a second per region. A region nobody speaks of any more comes once without offers.
    pub(crate) fn views(&mut self, now: Instant) -> Vec<Arc<RegionView>> {
        let _ = now;
        vec![]
    }

    /// When [`Self::views`] is due.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// The regions known, and how old what is known is.
    pub(crate) fn ages(&self, now: Instant) -> Vec<(RegionName, Duration)> {
        let _ = now;
        vec![]
    }
}
