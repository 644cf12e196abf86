//! Whose load this node wants to know, now that it knows more nodes than it can listen to.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use base::ZoneName;
use rand::Rng;

use crate::{Descriptor, NodeId};

/// A node that is alive and not this one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known<'a> {
    /// Who.
    pub(crate) id: NodeId,
    /// Whether it is of this node's region.
    pub(crate) in_region: bool,
    /// Its zone.
    pub(crate) zone: Option<&'a ZoneName>,
    /// Whether an operator listed it.
    pub(crate) listed: bool,
    /// What it serves, if that is known.
    pub(crate) descriptor: Option<&'a Arc<Descriptor>>,
}

/// Who chooses.
#[derive(Clone, Debug)]
pub(crate) struct Chooser {
    /// Who.
    pub(crate) id: NodeId,
    /// Its zone.
    pub(crate) zone: Option<ZoneName>,
    /// Whether it is a relay: it listens to its whole region.
    pub(crate) is_relay: bool,
}

/// What is to be said to whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Load frames of these are wanted.
    pub(crate) subscribe: Vec<NodeId>,
    /// And of these not any more.
    pub(crate) unsubscribe: Vec<NodeId>,
}

/// Whom `own` subscribes to, in order of their ids. `swaps` counts the times two were to be replaced.
pub(crate) fn choose(own: &Chooser, members: &[Known<'_>], swaps: u64) -> Vec<NodeId> {
    let _ = (own, members, swaps);
    vec![]
}

/// The nodes this one subscribes to.
#[derive(Debug)]
pub(crate) struct Subscriptions {
    own: Chooser,
}

impl Subscriptions {
    pub(crate) fn new(id: NodeId, zone: Option<ZoneName>) -> Self {
        Self { own: Chooser { id, zone, is_relay: false } }
    }

    /// Members came, went, or serve something else.
    pub(crate) fn changed(&mut self) {}

    /// From now on this node is a relay, or is none any more.
    pub(crate) fn relays(&mut self, is_relay: bool) {
        self.own.is_relay = is_relay;
    }

    /// When [`Self::update`] is to be called. `None`: when something changes.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// Whether [`Self::update`] would look at the members now.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.next_deadline().is_some_and(|due| due <= now)
    }

    /// Chooses anew, if it is due.
    pub(crate) fn update(
        &mut self,
        now: Instant,
        rng: &mut impl Rng,
        members: &[Known<'_>],
    ) -> Changes {
        let _ = (now, rng, members);
        Changes::default()
    }

    /// Node `id` does not take this one as a subscriber, and need not be asked for `wait`. Another is chosen instead.
    pub(crate) fn refused(&mut self, now: Instant, id: NodeId, wait: Duration) {
        let _ = (now, id, wait);
    }

    /// Whether the load of node `id` is wanted.
    pub(crate) fn is_subscribed(&self, id: &NodeId) -> bool {
        let _ = id;
        false
    }

    /// Everybody whose load is wanted, in order of their ids.
    pub(crate) fn all(&self) -> &[NodeId] {
        &[]
    }
}
