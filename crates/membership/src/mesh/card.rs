//! Whose words are believed: cards that come, cards that are asked for, and this node's own.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use base::RegionName;
use foca::{Member, State};
use rand::seq::IndexedRandom as _;

use super::{Event, Mesh, Own, Peer, Target, Way, gossip::LEAP_MAX, link::peer_of};
use crate::{
    ASKED_MAX, Card, Disbelief, Facts, Frame, Judge, NodeId, PROTOCOL_VERSION, Pair, Pool,
    cards::{OTHERS_MAX, Pending},
    decode_card, encode, encode_card,
    strikes::Offence,
    wire::CARD_BYTES_MAX,
};

/// This node makes at most one card in this: what has just started learns what it serves in several steps.
const RENEWAL_GAP_FEW: Duration = Duration::from_millis(100);
/// After a few cards, one in this.
const RENEWAL_GAP: Duration = Duration::from_secs(1);
/// If it has to make many, it waits longer from one to the next.
const RENEWAL_GAP_MAX: Duration = Duration::from_secs(10);
/// So many make it wait.
const RENEWALS_FEW: u32 = 5;
/// From these bumps on it waits so long at least: a process has 65,535 cards, and whoever makes it take new ones must not be able
/// to use them up before somebody has seen it.
const SCARCE: [(u16, Duration); 2] =
    [(16_384, Duration::from_secs(60)), (49_152, Duration::from_secs(600))];
/// Cards go in frames of about this, so that other frames come between.
const FRAME_BYTES: usize = 60 << 10;
/// All cards are given to one node, and asked for, no more often than this.
pub(super) const ALL_GAP: Duration = Duration::from_secs(10);
/// All were asked for and nothing came: somebody else is asked.
const ALL_ANSWER: Duration = Duration::from_secs(3);
/// Bytes of cards given in one answer: whoever misses the rest finds out by comparing.
const GIVEN_BYTES_MAX: usize = 6 << 20;
/// What comes so long after all cards were asked for is the answer.
pub(super) const ALL_COMES: Duration = Duration::from_secs(30);

/// Cards of one other region.
const OTHERS_OF_REGION_MAX: usize = 16;

/// Relays of each other region that are told who asks for relays.
const RELAYS_TOLD: usize = 4;

/// When this node makes a card.
#[derive(Debug)]
pub(super) struct Renewal {
    /// What the next card names.
    pub(super) descriptor: [u8; 32],
    due: Option<Instant>,
    last: Option<Instant>,
    /// Cards made with little time between them.
    burst: u32,
    /// Another process of this epoch has had this bump.
    beyond: u16,
}

impl Renewal {
    pub(super) fn new(descriptor: [u8; 32]) -> Self {
        Self { descriptor, due: None, last: None, burst: 0, beyond: 0 }
    }

    /// When the next card may be made after the one with this bump.
    fn earliest(&self, now: Instant, bump: u16) -> Instant {
        let gap = if self.burst < RENEWALS_FEW {
            RENEWAL_GAP_FEW
        } else {
            let factor = 1 << (self.burst - RENEWALS_FEW).min(4);
            (RENEWAL_GAP * factor).min(RENEWAL_GAP_MAX)
        };
        let scarce = SCARCE.iter().filter(|(from, _)| bump >= *from).map(|(_, gap)| *gap);
        let gap = scarce.fold(gap, Duration::max);
        self.last.map_or(now, |last| now.max(last + gap))
    }

    fn made(&mut self, now: Instant) {
        let is_soon = self.last.is_some_and(|last| now < last + 6 * RENEWAL_GAP_MAX);
        self.burst = if is_soon { self.burst.saturating_add(1) } else { 0 };
        self.last = Some(now);
    }
}

/// What became of a card.
#[derive(Debug)]
pub(super) enum Taken {
    /// It is newer than what was known.
    New(Arc<Card>),
    /// It is not.
    Old(Arc<Card>),
    /// It is of this node's name.
    Own(Pair),
}

/// A card of this node, signed.
pub(super) fn make(
    own: &Own,
    judge: &mut impl Judge,
    descriptor: [u8; 32],
    bump: u16,
) -> Result<Arc<Card>, String> {
    let facts = Facts {
        epoch: own.epoch,
        bump,
        peers: own.peers.clone(),
        gossip: own.gossip.clone(),
        zone: own.zone.clone(),
        descriptor,
        release: own.release.clone(),
        protocol_max: PROTOCOL_VERSION,
    };
    let card = encode_card(&facts);
    decode_card(&card).map_err(|error| format!("this node's card would not be read: {error}"))?;
    let signed = judge.sign(&card)?;
    if signed.len() > CARD_BYTES_MAX {
        return Err(format!("this node's card has {} bytes", signed.len()));
    }
    let (id, node, region) = (own.id, own.node.clone(), own.region.clone());
    Ok(judge.share(Card { id, node, region, facts, signed: signed.into() }))
}

impl<J: Judge> Mesh<J> {
    /// This node needs a new card: soon it has one. Returns whether that was not known yet.
    pub(super) fn want_card(&mut self, now: Instant) -> bool {
        let is_new = self.renewal.due.is_none();
        if is_new {
            let due = self.renewal.earliest(now, self.card.facts.bump);
            self.renewal.due = Some(due);
            self.timers.set(due, crate::timers::Due::Renewal);
        }
        is_new
    }

    pub(super) fn renew(&mut self, now: Instant) {
        self.renewal.due = None;
        if self.is_leaving || self.is_superseded {
            return;
        }
        let bump = self.card.facts.bump.max(self.renewal.beyond).checked_add(1);
        let Some(bump) = bump else {
            self.note("this process has made 65,535 cards; restart it".to_owned());
            return;
        };
        self.renewal.made(now);
        match make(&self.own, &mut self.judge, self.renewal.descriptor, bump) {
            Ok(card) => {
                // Figures are of what others can ask for by the card, not before.
                self.reporter.describes(self.descriptor.version);
                self.stand_on(now, card);
            }
            Err(why) => {
                self.note(format!("this node's card cannot be signed: {why}"));
                self.want_card(now);
            }
        }
    }

    /// From now on this node is known by `card`: everybody linked has it before the pools speak of it.
    fn stand_on(&mut self, now: Instant, card: Arc<Card>) {
        let pair = card.pair();
        self.card = card;
        let cards = vec![self.card.signed.to_vec()];
        let bytes: bytes::Bytes = encode(&Frame::Cards(Pool::Region, cards)).into();
        let linked: Vec<_> =
            self.links.up.iter().filter(|(_, link)| !link.is_legacy()).map(|(id, _)| *id).collect();
        for id in linked {
            self.send(now, id, bytes.clone(), Way::Stream);
        }
        for pool in [Pool::Region, Pool::Relays] {
            if let Some(members) = self.members_mut(pool) {
                members.rename(pair);
                self.settle(now, pool);
            }
        }
    }

    /// Judges a card and keeps it, if it is newer than what was known. `from` brought it.
    pub(super) fn take_card(
        &mut self,
        now: Instant,
        from: Option<&Peer>,
        signed: &[u8],
    ) -> Result<Taken, Disbelief> {
        let card = self.read_card(signed)?;
        if card.id == self.own.id {
            self.own_name(now, &card);
            return Ok(Taken::Own(card.pair()));
        }
        if from.is_some_and(|peer| self.cards.is_proof(peer.id, card.pair())) {
            return Ok(Taken::Old(card));
        }
        match self.cards.pair(card.id) {
            Some(known) if known >= card.pair() => return Ok(Taken::Old(card)),
            None if !self.has_room(now, from, &card) => return Ok(Taken::Old(card)),
            _ => {}
        }
        self.keep_card(now, from.map(|peer| peer.id), &card);
        Ok(Taken::New(card))
    }

    fn read_card(&mut self, signed: &[u8]) -> Result<Arc<Card>, Disbelief> {
        if let Some(card) = self.judge.known(signed) {
            return Ok(card);
        }
        let judged = self.judge.judge(signed)?;
        let facts = decode_card(&judged.card).map_err(|error| error.to_string())?;
        let (id, node, region) = (judged.id, judged.node, judged.region);
        Ok(self.judge.share(Card { id, node, region, facts, signed: signed.into() }))
    }

    fn has_room(&mut self, now: Instant, from: Option<&Peer>, card: &Card) -> bool {
        let Some(peer) = from else { return !self.cards.is_full() };
        if peer.id == card.id {
            return !self.cards.is_full();
        }
        let is_other = card.region != self.own.region;
        if is_other && !self.has_room_for(&card.region) {
            if self.cards.is_missed(card.id) {
                self.drop_other(&card.region);
            }
            if !self.has_room_for(&card.region) {
                return false;
            }
        }
        if self.cards.is_full() {
            return false;
        }
        let is_taken = self.strikes.new_id(now, peer);
        if !is_taken {
            self.strike(now, peer.id, Offence::Strike, "too many new nodes in a minute");
        }
        is_taken
    }

    /// Whether one more node of this other region may be known.
    fn has_room_for(&self, region: &RegionName) -> bool {
        let others = self.cards.len() - self.cards.of_region(&self.own.region);
        self.cards.of_region(region) < OTHERS_OF_REGION_MAX && others < OTHERS_MAX
    }

    /// Forgets a node of another region that was a relay once, for one that is: whose digests come has to be known.
    fn drop_other(&mut self, region: &RegionName) {
        let is_needed = |id: NodeId| {
            self.links.is_up(id)
                || self.seeds.is_listed(id)
                || self.regions.hears(id)
                || self.is_fellow(id)
        };
        let of_region = self.cards.all().filter(|card| card.region == *region);
        let old: Vec<_> = of_region.map(|card| card.id).filter(|id| !is_needed(*id)).collect();
        // Any of them: the newest, of whom nothing was heard yet, are not always the ones.
        if let Some(id) = old.choose(&mut self.rng).copied() {
            self.forget(id);
        }
    }

    fn keep_card(&mut self, now: Instant, from: Option<NodeId>, card: &Arc<Card>) {
        let before = self.cards.keep(Arc::clone(card));
        let is_restart = before.as_ref().is_none_or(|b| b.facts.epoch != card.facts.epoch);
        let is_change = before.as_ref().is_none_or(|b| b.facts.descriptor != card.facts.descriptor);
        self.event(Event::Member(Arc::clone(card)));
        if is_change {
            let sources: Vec<_> = [Some(card.id), from].into_iter().flatten().collect();
            let body = self.bodies.want(now, card.facts.descriptor, &sources);
            if let Some(before) = &before {
                self.bodies.release(&before.facts.descriptor);
            }
            if let Some(descriptor) = body {
                self.described(now, card.id, card.facts.epoch, descriptor);
            }
        } else if is_restart
            && let Some(descriptor) = self.bodies.get(&card.facts.descriptor).cloned()
        {
            self.described(now, card.id, card.facts.epoch, descriptor);
        }
    }

    /// A card of this node's name that somebody else has.
    fn own_name(&mut self, now: Instant, card: &Card) {
        let epoch = card.facts.epoch;
        if epoch > self.own.epoch && !self.is_superseded {
            self.is_superseded = true;
            self.event(Event::Superseded { epoch });
        } else if epoch == self.own.epoch && card.facts.bump > self.card.facts.bump {
            self.renewal.beyond = self.renewal.beyond.max(card.facts.bump);
            self.want_card(now);
        }
    }

    pub(super) fn hear_cards(&mut self, now: Instant, from: NodeId, pool: Pool, cards: &[Vec<u8>]) {
        let Some(link) = self.links.get(from) else { return };
        let peer = link.peer.clone();
        let answer = link.asked_all.filter(|(at, _)| now < *at + ALL_COMES);
        // Everybody else knows what the first answer says: it need not be told again.
        let spread = answer.is_none_or(|(_, is_first)| !is_first);
        let mut relays = Vec::new();
        for signed in cards {
            match self.take_card(now, Some(&peer), signed) {
                Ok(Taken::New(card)) => {
                    self.apply_card(now, &card, spread);
                    relays.push(card.id);
                }
                Ok(Taken::Old(card)) => {
                    self.cards.found(card.pair());
                    relays.push(card.id);
                }
                Ok(Taken::Own(pair)) => {
                    self.cards.found(pair);
                }
                // Whoever is asked for all it knows cannot leave out what this node alone does not believe.
                Err(Disbelief::Doubtful(_)) if answer.is_some() => self.cards.excuse(peer.id),
                Err(why) => self.disbelieve(now, &peer, &why),
            }
        }
        if pool == Pool::Relays {
            self.hear_of_relays(now, &relays);
        }
        self.has_all |= answer.is_some();
    }

    /// `peer` brought a card that is not believed.
    pub(super) fn disbelieve(&mut self, now: Instant, peer: &Peer, why: &Disbelief) {
        let offence = match why {
            Disbelief::Forged(_) => Offence::Lie,
            Disbelief::Doubtful(_) => {
                // It may be the one that was asked for.
                self.cards.excuse(peer.id);
                if !self.strikes.disbelieved(now, peer) {
                    return;
                }
                Offence::Strike
            }
        };
        self.convict(now, peer, offence, &format!("a card that is not believed: {why}"));
    }

    /// A card that is new: what was said of its node before, or else that it lives, goes to its pools.
    pub(super) fn apply_card(&mut self, now: Instant, card: &Card, spread: bool) {
        let pending = self.cards.found(card.pair());
        for pool in [Pool::Region, Pool::Relays] {
            // Who is said to be dead is not of a pool for that.
            let said = pending
                .as_ref()
                .filter(|pending| pending.pool == pool && pending.update.state() != State::Down);
            let Some(members) = self.members(pool) else { continue };
            let is_known = members.seen(card.id).is_some();
            let is_of_pool = match pool {
                Pool::Region => card.region == self.own.region,
                Pool::Relays => is_known || said.is_some(),
            };
            if !is_of_pool || !is_known && !self.is_welcome(pool, card.id) {
                continue;
            }
            let is_believed = |update: &&Member<Pair>| {
                *update.id() == card.pair()
                    && update.state() != State::Down
                    && update.incarnation() <= LEAP_MAX
            };
            let update = said.map(|pending| &pending.update).filter(is_believed).cloned();
            let update = update.unwrap_or_else(|| Member::alive(card.pair()));
            if let Some(members) = self.members_mut(pool)
                && members.is_news(&update)
            {
                members.apply(update, spread);
                self.settle(now, pool);
            }
        }
    }

    /// `from` spoke of nodes whose cards are not known here.
    pub(super) fn ask_cards(&mut self, now: Instant, from: NodeId, pool: Pool, nodes: Vec<NodeId>) {
        if nodes.len() >= 8 && pool == Pool::Region {
            self.ask_all(now, from);
        }
        if !nodes.is_empty() {
            self.say(now, from, &Frame::CardsAsk(pool, nodes), Way::Stream);
        }
    }

    /// Asks `from` for the cards of the whole region, if nobody was asked just now.
    pub(super) fn ask_all(&mut self, now: Instant, from: NodeId) {
        let gap = if self.has_all { ALL_GAP } else { ALL_ANSWER };
        if self.asked_all.is_some_and(|at| now < at + gap) {
            return;
        }
        let Some(link) = self.links.up.get_mut(&from) else { return };
        link.asks_all(now, !self.has_all);
        self.asked_all = Some(now);
        self.say(now, from, &Frame::CardsAsk(Pool::Region, vec![]), Way::Stream);
    }

    pub(super) fn hear_cards_ask(
        &mut self,
        now: Instant,
        from: NodeId,
        pool: Pool,
        nodes: &[NodeId],
    ) {
        let cards: Vec<Arc<Card>> = if nodes.is_empty() {
            let Some(link) = self.links.up.get_mut(&from) else { return };
            let is_stranger = pool == Pool::Region && link.peer.region != self.own.region;
            if is_stranger || link.gave_all.is_some_and(|(at, p)| now < at + ALL_GAP && p == pool) {
                return;
            }
            link.gave_all = Some((now, pool));
            self.cards_of(pool)
        } else {
            let known = |id: &NodeId| {
                if *id == self.own.id { Some(&self.card) } else { self.cards.get(*id) }
            };
            nodes.iter().take(ASKED_MAX).filter_map(known).cloned().collect()
        };
        self.give_cards(now, from, pool, &cards);
    }

    pub(super) fn give_cards(&mut self, now: Instant, to: NodeId, pool: Pool, cards: &[Arc<Card>]) {
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut all = 0;
        let cards: Vec<_> = cards
            .iter()
            .take_while(|card| {
                all += card.signed.len();
                all <= GIVEN_BYTES_MAX
            })
            .collect();
        if !self.links.up.get_mut(&to).is_some_and(|link| link.may_give(now, all)) {
            return;
        }
        for card in cards {
            if bytes + card.signed.len() > FRAME_BYTES && !batch.is_empty() {
                let full = std::mem::take(&mut batch);
                self.say(now, to, &Frame::Cards(pool, full), Way::Stream);
                bytes = 0;
            }
            bytes += card.signed.len() + 4;
            batch.push(card.signed.to_vec());
        }
        if !batch.is_empty() {
            self.say(now, to, &Frame::Cards(pool, batch), Way::Stream);
        }
    }

    fn cards_of(&self, pool: Pool) -> Vec<Arc<Card>> {
        let of_region = |card: &&Arc<Card>| match pool {
            Pool::Region => self.region.is_active(card.id),
            Pool::Relays => self.relaying.is_of_ours(card.id),
        };
        let is_own = pool == Pool::Region || self.relaying.is_of_ours(self.own.id);
        let own = is_own.then(|| Arc::clone(&self.card));
        let ours = self.cards.all().filter(|card| card.region == self.own.region);
        let mut cards: Vec<_> = own.into_iter().chain(ours.filter(of_region).cloned()).collect();
        if pool == Pool::Relays {
            cards.extend(self.relays_elsewhere());
        }
        cards
    }

    /// A few nodes of each other region that are its relays, or if that is not known might know them.
    fn relays_elsewhere(&self) -> Vec<Arc<Card>> {
        let mut regions: BTreeMap<&RegionName, Vec<(bool, &Arc<Card>)>> = BTreeMap::new();
        for card in self.cards.all().filter(|card| card.region != self.own.region) {
            let is_relay = match &self.relay {
                Some(relay) if relay.is_active(card.id) => true,
                Some(_) => continue,
                None => self.regions.hears(card.id),
            };
            regions.entry(&card.region).or_default().push((!is_relay, card));
        }
        for cards in regions.values_mut() {
            cards.sort_by_key(|(is_none, _)| *is_none);
            cards.truncate(RELAYS_TOLD);
        }
        regions.into_values().flatten().map(|(_, card)| Arc::clone(card)).collect()
    }

    /// Somebody spoke of a node and did not have its card when asked.
    pub(super) fn had_no_card(&mut self, now: Instant, pending: &Pending) {
        let Pending { from, since, .. } = *pending;
        // Over a link that came later it was not asked.
        let Some(link) = self.links.get(from).filter(|link| link.since <= since) else { return };
        let (peer, id) = (link.peer.clone(), pending.update.id().id);
        if id != self.own.id && self.cards.pair(id) >= Some(pending.asked_for) {
            return;
        }
        if id == self.own.id {
            let why = "speaks of a later card of this node, which it does not have";
            self.strike(now, from, Offence::Lie, why);
        } else if self.cards.get(id).is_some() {
            let why = "speaks of later cards of other nodes, which it does not have";
            self.strike(now, from, Offence::Strike, why);
        }
        if self.strikes.unanswered(now, &peer) {
            let why = "speaks of many nodes whose cards it does not have";
            self.strike(now, from, Offence::Lie, why);
        }
    }

    /// Cards of nodes that nobody speaks of any more are forgotten.
    pub(super) fn sweep_cards(&mut self) {
        // Relays of other regions are asked for again when one is heard of.
        let drop_others = self.rounds.is_multiple_of(600);
        let is_needed = |card: &Card| {
            let pool = self.members(self.pool_of(&card.region));
            let is_relay_elsewhere = self.relay.is_none() && card.region != self.own.region;
            self.links.is_up(card.id)
                || self.seeds.is_listed(card.id)
                || pool.is_some_and(|members| members.seen(card.id).is_some())
                || is_relay_elsewhere && !drop_others
        };
        let gone: Vec<_> =
            self.cards.all().filter(|card| !is_needed(card)).map(|card| card.id).collect();
        for id in gone {
            self.forget(id);
        }
    }

    /// Nothing is known of `id` any more.
    pub(super) fn forget(&mut self, id: NodeId) {
        if let Some(card) = self.cards.forget(id) {
            self.bodies.release(&card.facts.descriptor);
            self.figures.remove(&id);
            if self.links.up.is_empty() {
                let (peer, address) = (peer_of(&card), card.facts.gossip.clone());
                self.keep_place(self.next_known, Target::Member { peer, address });
            }
            self.event(Event::Forgotten(id));
        }
    }

    pub(super) fn note(&mut self, fact: String) {
        self.event(Event::Note(fact));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_do_not_run_out_for_months_however_many_are_asked_for() {
        let began = base::clock::now();
        let (mut now, mut renewal) = (began, Renewal::new([0; 32]));
        for bump in 0..u16::MAX {
            now = renewal.earliest(now, bump);
            renewal.made(now);
            let took = (now - began).as_secs();
            assert!(bump != 5 || took < 2, "the first ones come at once");
            assert!(bump != 1_000 || took < 3 * 3600);
        }
        assert!((now - began).as_secs() > 120 * 24 * 3600);
    }
}
