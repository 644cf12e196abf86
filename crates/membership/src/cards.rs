//! Which cards are known, and which have been asked for.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use base::RegionName;
use foca::{Member, State};

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
    /// How many are of each region.
    regions: BTreeMap<RegionName, usize>,
    pending: BTreeMap<NodeId, Pending>,
}

/// What was heard of a node whose card is not known.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) pool: Pool,
    pub(crate) update: Member<Pair>,
    /// Who said so first, and was asked then.
    pub(crate) from: NodeId,
    /// What was said when it was asked: it may have answered that, and was not asked again.
    pub(crate) asked_for: Pair,
    pub(crate) since: Instant,
    /// When somebody was asked last.
    asked: Instant,
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
        match self.regions.get_mut(&card.region) {
            Some(count) => *count += 1,
            None => drop(self.regions.insert(card.region.clone(), 1)),
        }
        let before = self.known.insert(card.id, card);
        before.inspect(|before| self.one_less(&before.region))
    }

    pub(crate) fn forget(&mut self, id: NodeId) -> Option<Arc<Card>> {
        let known = self.known.remove(&id);
        known.inspect(|known| self.one_less(&known.region))
    }

    fn one_less(&mut self, region: &RegionName) {
        if let Some(count) = self.regions.get_mut(region) {
            *count -= 1;
            if *count == 0 {
                self.regions.remove(region);
            }
        }
    }

    /// How many are known of a region.
    pub(crate) fn of_region(&self, region: &RegionName) -> usize {
        self.regions.get(region).copied().unwrap_or(0)
    }

    pub(crate) fn len(&self) -> usize {
        self.known.len()
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
            return pending.more(now, pool, update, from);
        }
        if self.pending.len() >= PENDING_MAX {
            return false;
        }
        let asked_for = *update.id();
        self.pending.insert(id, Pending { pool, update, from, asked_for, asked: now, since: now });
        true
    }

    /// Whether the card of `id` is waited for.
    pub(crate) fn is_missed(&self, id: NodeId) -> bool {
        self.pending.contains_key(&id)
    }

    /// Whether the card `pair` stands on was asked of `from` only because it calls that node down: what it says then is no
    /// news, and the card shows no more than that there is one.
    pub(crate) fn is_proof(&self, from: NodeId, pair: Pair) -> bool {
        let is_asked = |pending: &Pending| {
            pending.update.state() == State::Down && pending.from == from && from != pair.id
        };
        self.pending.get(&pair.id).is_some_and(|p| is_asked(p) && pair >= *p.update.id())
    }

    /// A card has come: what was said before of the node as it stands there, or on an older one.
    pub(crate) fn found(&mut self, pair: Pair) -> Option<Pending> {
        let pending = self.pending.get(&pair.id)?;
        if *pending.update.id() > pair { None } else { self.pending.remove(&pair.id) }
    }

    /// `from` has answered with something: it may be what it was asked for.
    pub(crate) fn excuse(&mut self, from: NodeId) {
        self.pending.retain(|_, pending| pending.from != from);
    }

    /// What nobody had a card for.
    pub(crate) fn unanswered(&mut self, now: Instant) -> Vec<Pending> {
        self.pending
            .extract_if(.., |_, pending| now >= pending.since + ANSWER)
            .map(|(_, p)| p)
            .collect()
    }
}

impl Pending {
    /// `from` speaks of the same node. Returns whether it is to be asked for the card.
    fn more(&mut self, now: Instant, pool: Pool, update: Member<Pair>, from: NodeId) -> bool {
        let order = update.id().cmp(self.update.id());
        // Whoever speaks of a later card than others do answers for it.
        let is_anew = order.is_gt() && from != self.from;
        if is_anew {
            (self.from, self.since) = (from, now);
        }
        if order.is_gt() || order.is_eq() && update.state() != State::Down {
            (self.update, self.pool) = (update, pool);
        }
        let is_due = is_anew || now >= self.asked + AGAIN;
        if is_due {
            (self.asked, self.asked_for) = (now, *self.update.id());
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Facts;

    const S: Duration = Duration::from_secs(1);

    fn pair(epoch: u64) -> Pair {
        Pair { id: NodeId([1; 16]), epoch, bump: 0 }
    }

    #[test]
    fn it_is_counted_how_many_are_known_of_each_region() {
        let card = |id: u8, bump, region: &str| {
            let facts = Facts {
                epoch: 1,
                bump,
                peers: String::new(),
                gossip: String::new(),
                zone: None,
                descriptor: [0; 32],
                release: String::new(),
                protocol_max: 2,
            };
            let (node, region) = ("n".parse().unwrap(), region.parse().unwrap());
            Arc::new(Card { id: NodeId([id; 16]), node, region, facts, signed: [].into() })
        };
        let [eu, us] = ["eu", "us"].map(|region| region.parse().unwrap());
        let mut cards = Cards::default();
        for (id, bump, region) in [(1, 0, "eu"), (2, 0, "eu"), (1, 1, "eu"), (3, 0, "us")] {
            cards.keep(card(id, bump, region));
        }
        let count = |cards: &Cards| [cards.len(), cards.of_region(&eu), cards.of_region(&us)];
        assert_eq!(count(&cards), [3, 2, 1], "a newer card is no other node");
        assert!(cards.forget(NodeId([3; 16])).is_some() && cards.forget(NodeId([3; 16])).is_none());
        assert_eq!(count(&cards), [2, 2, 0]);
        assert!(cards.forget(NodeId([1; 16])).is_some());
        assert_eq!(count(&cards), [1, 1, 0]);
    }

    #[test]
    fn who_speaks_of_the_latest_card_answers_for_it_and_is_asked() {
        let (honest, liar) = (NodeId([2; 16]), NodeId([3; 16]));
        let now = base::clock::now();
        let mut cards = Cards::default();
        let mut miss =
            |at, epoch, from| cards.miss(now + at, Pool::Region, Member::alive(pair(epoch)), from);
        assert!(miss(Duration::ZERO, 2, honest) && !miss(S / 2, 2, honest));
        assert!(miss(S, 9, liar), "it was not asked yet");
        assert!(!miss(S, 2, honest) && !miss(S, 10, liar) && miss(2 * S, 2, honest));
        assert!(cards.found(pair(2)).is_none(), "nobody has shown the later one");
        assert!(cards.unanswered(now + 5 * S).is_empty());
        let silent = cards.unanswered(now + 6 * S);
        assert_eq!(silent.iter().map(|pending| pending.from).collect::<Vec<_>>(), [liar]);
        assert!(!cards.is_missed(pair(2).id));
    }

    #[test]
    fn it_is_remembered_what_was_asked_for() {
        let from = NodeId([2; 16]);
        let now = base::clock::now();
        let mut cards = Cards::default();
        assert!(cards.miss(now, Pool::Region, Member::alive(pair(2)), from));
        assert!(!cards.miss(now + S / 2, Pool::Region, Member::alive(pair(3)), from));
        let silent = cards.unanswered(now + 5 * S);
        assert_eq!(silent.iter().map(|p| p.asked_for).collect::<Vec<_>>(), [pair(2)]);
    }

    #[test]
    fn a_card_shown_for_a_death_is_no_news_but_from_who_was_asked() {
        let (from, other) = (NodeId([2; 16]), NodeId([3; 16]));
        let now = base::clock::now();
        let mut cards = Cards::default();
        cards.miss(now, Pool::Region, Member::down(pair(2)), from);
        assert!(cards.is_proof(from, pair(2)) && cards.is_proof(from, pair(3)));
        assert!(!cards.is_proof(from, pair(1)) && !cards.is_proof(other, pair(2)));
        cards.miss(now, Pool::Region, Member::alive(pair(2)), other);
        assert!(!cards.is_proof(from, pair(2)), "somebody says that it lives");
        cards.miss(now, Pool::Region, Member::down(pair(2)), from);
        assert!(!cards.is_proof(from, pair(2)));
        cards.excuse(from);
        assert!(!cards.is_missed(pair(2).id));
    }
}
