//! Which cards are known, and which have been asked for.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use foca::Member;

use crate::{Card, NodeId, Pair, Pool, pool::MEMBERS_MAX};

/// Cards of other regions kept by a node that is no relay, or not yet in its pool of relays.
pub(crate) const OTHERS_MAX: usize = 256;
/// Cards waited for at once; what comes beyond is heard of again.
const PENDING_MAX: usize = 1024;
/// A card is asked for again after this.
const AGAIN: Duration = Duration::from_secs(1);
/// Who has not answered within this has no such card.
const ANSWER: Duration = Duration::from_secs(5);

/// The newest card of each node.
#[derive(Debug, Default)]
pub(crate) struct Cards {
    known: BTreeMap<NodeId, Arc<Card>>,
    pending: BTreeMap<NodeId, Pending>,
}

/// What was heard of a node whose card is not known.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) pool: Pool,
    pub(crate) update: Member<Pair>,
    /// Who said so, and was asked.
    pub(crate) from: NodeId,
    asked: Instant,
    since: Instant,
}

impl Cards {
    pub(crate) fn get(&self, id: NodeId) -> Option<&Arc<Card>> {
        self.known.get(&id)
    }

    pub(crate) fn pair(&self, id: NodeId) -> Option<Pair> {
        self.known.get(&id).map(|card| card.pair())
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Card>> {
        self.known.values()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.known.len() >= MEMBERS_MAX
    }

    /// Keeps a card in place of an older one, which is returned.
    pub(crate) fn keep(&mut self, card: Arc<Card>) -> Option<Arc<Card>> {
        self.known.insert(card.id, card)
    }

    pub(crate) fn forget(&mut self, id: NodeId) -> Option<Arc<Card>> {
        self.known.remove(&id)
    }

    /// `from` said something of a node whose card is not known. Returns whether it is to be asked for the card.
    pub(crate) fn miss(
        &mut self,
        now: Instant,
        pool: Pool,
        update: Member<Pair>,
        from: NodeId,
    ) -> bool {
        let id = update.id().id;
        if let Some(pending) = self.pending.get_mut(&id) {
            if *update.id() >= *pending.update.id() {
                (pending.update, pending.pool) = (update, pool);
            }
            let is_due = now >= pending.asked + AGAIN;
            if is_due {
                (pending.asked, pending.from) = (now, from);
            }
            return is_due;
        }
        if self.pending.len() >= PENDING_MAX {
            return false;
        }
        self.pending.insert(id, Pending { pool, update, from, asked: now, since: now });
        true
    }

    /// Whether the card of `id` is waited for.
    pub(crate) fn is_missed(&self, id: NodeId) -> bool {
        self.pending.contains_key(&id)
    }

    /// The card of `id` has come: what was said of it before.
    pub(crate) fn found(&mut self, id: NodeId) -> Option<Pending> {
        self.pending.remove(&id)
    }

    /// Who did not answer for whom.
    pub(crate) fn unanswered(&mut self, now: Instant) -> Vec<NodeId> {
        let over = |pending: &Pending| now >= pending.since + ANSWER;
        let silent = self.pending.values().filter(|p| over(p)).map(|p| p.from).collect();
        self.pending.retain(|_, pending| !over(pending));
        silent
    }
}
