//! What relays say of a node's room, model by model. Whoever lies may name many models: each question looks at few of them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use balance::Fit;
use base::Load;
use inference::Protocol;
use membership::{Figures, Seen};

use crate::offer::{Ask, Offer};

/// What a relay says of a node counts in full for so long, then less and less, and nothing after that.
const FULL_UNTIL: Duration = Duration::from_secs(1);
const GONE_AT: Duration = Duration::from_secs(3);
/// Offers of one node at most: further ones are left out.
const OFFERS_MAX: usize = 512;
/// Offers of one protocol that are looked at when a call does not ask for just one of them.
const OF_A_KIND: usize = 4;
/// Engines that relays speak of are numbered from here, those of descriptors below.
const FROM: usize = 1 << 16;

/// What relays say of one node.
#[derive(Debug, Default)]
pub(super) struct Hearsay {
    offers: BTreeMap<Offer, Said>,
    /// When the newest figures were taken.
    newest: Option<Instant>,
    /// Offers there ever were.
    count: usize,
}

/// What is said of its room for one model.
#[derive(Debug)]
struct Said {
    number: usize,
    figures: Figures,
}

/// Some of its room: the number it goes by, how well it suits a call, and what is said.
pub(super) struct Room {
    pub(super) number: usize,
    pub(super) fit: Fit,
    pub(super) seen: Seen,
}

impl Said {
    fn seen(&self, now: Instant) -> Option<Seen> {
        let seen = self.figures.seen(now, FULL_UNTIL, GONE_AT);
        (seen.confidence > 0.0).then_some(seen)
    }
}

impl Hearsay {
    /// A relay said this. Returns whether there is one offer more; `may_grow`: there may be.
    pub(super) fn hear(
        &mut self,
        offer: &Offer,
        load: Load,
        sampled: Instant,
        may_grow: bool,
    ) -> bool {
        self.newest = self.newest.max(Some(sampled));
        if let Some(said) = self.offers.get_mut(offer) {
            said.figures.sampled_at(sampled, Duration::ZERO, load);
            return false;
        }
        let grows = may_grow && self.offers.len() < OFFERS_MAX;
        if grows {
            let said = Said { number: FROM + self.count, figures: Figures::new(load, sampled) };
            self.offers.insert(offer.clone(), said);
            self.count += 1;
        }
        grows
    }

    /// Clears away what has become too old. Returns how much is left.
    pub(super) fn sweep(&mut self, now: Instant) -> usize {
        self.offers.retain(|_, said| said.seen(now).is_some());
        self.offers.len()
    }

    /// When the newest of what counts was so; `None`: nothing does.
    pub(super) fn newest(&self, now: Instant) -> Option<Instant> {
        self.newest.filter(|newest| now < *newest + GONE_AT)
    }

    /// Room for a call, taken since `since`.
    pub(super) fn room(&self, ask: &Ask, since: Option<Instant>, now: Instant) -> Vec<Room> {
        let suits = self.suited(ask);
        let suits = suits.filter(|(said, _)| Some(said.figures.sampled()) >= since);
        let room = suits.filter_map(|(said, fit)| {
            Some(Room { number: said.number, fit, seen: said.seen(now)? })
        });
        room.collect()
    }

    /// The numbers of what suits a call, whether or not it still counts.
    pub(super) fn numbers(&self, ask: &Ask) -> impl Iterator<Item = usize> {
        self.suited(ask).map(|(said, _)| said.number)
    }

    /// The one it asks for, and a few of those that might do.
    fn suited(&self, ask: &Ask) -> impl Iterator<Item = (&Said, Fit)> {
        let exact = ask.named().and_then(|named| self.offers.get_key_value(&named));
        let few = |protocol| {
            let all = self.offers.range(Offer { protocol, models: Vec::new() }..);
            all.take_while(move |(offer, _)| offer.protocol == protocol).take(OF_A_KIND)
        };
        let others = few(Protocol::KserveV2).chain(few(Protocol::Grpc));
        let others =
            others.filter(move |(offer, _)| exact.is_none_or(|(named, _)| named != *offer));
        let all = exact.into_iter().chain(others);
        let suited = all.filter_map(|(offer, said)| Some((said, offer.fit(ask, &[])?)));
        // The iterator must not borrow the call.
        suited.collect::<Vec<_>>().into_iter()
    }

    /// The largest of what counts: one engine may serve many models, and is told of once for each.
    pub(super) fn largest(&self, now: Instant) -> Option<Load> {
        let loads = self.offers.values().filter_map(|said| Some(said.seen(now)?.load));
        loads.max_by_key(|load| load.slots)
    }

    /// What is known of the one with this number, if it is one.
    pub(super) fn figures(&mut self, number: usize) -> Option<&mut Figures> {
        let said = self.offers.values_mut().find(|said| said.number == number)?;
        Some(&mut said.figures)
    }

    /// Whether a number is one of these, and not of a descriptor's engine.
    pub(super) fn is_numbered(number: usize) -> bool {
        number >= FROM
    }
}

#[cfg(test)]
mod tests {
    use base::clock;

    use super::*;
    use crate::model::Wanted;

    fn offer(protocol: Protocol, model: &str) -> Offer {
        Offer { protocol, models: vec![model.parse().unwrap()] }
    }

    fn ask(path: &str, wanted: Wanted) -> Ask {
        Ask { path: path.to_owned(), wanted }
    }

    #[test]
    fn of_thousands_of_models_the_one_is_found_and_few_others_are_looked_at() {
        let (now, mut hearsay) = (clock::now(), Hearsay::default());
        let load = Load { slots: Some(8), ..Load::default() };
        let grew = (0..4_000).filter(|n| {
            let kserve = offer(Protocol::KserveV2, &format!("m-{n}"));
            let grpc = offer(Protocol::Grpc, &format!("m-{n}"));
            hearsay.hear(&kserve, load, now, true) | hearsay.hear(&grpc, load, now, true)
        });
        assert_eq!(grew.count(), OFFERS_MAX / 2);
        assert!(!hearsay.hear(&offer(Protocol::Grpc, "m-1"), load, now, true));
        let infer = "/inference.GRPCInferenceService/ModelInfer";
        let model = |name: &str| ask(infer, Wanted::Model(name.parse().unwrap()));
        let fits =
            |ask: &Ask| hearsay.room(ask, None, now).iter().map(|r| r.fit).collect::<Vec<_>>();
        assert_eq!(fits(&model("m-77")), [vec![Fit::Well], vec![Fit::Perhaps; OF_A_KIND]].concat());
        assert_eq!(fits(&model("m-999")), [Fit::Perhaps; OF_A_KIND]);
        assert_eq!(fits(&ask("/p.S/M", Wanted::Nothing)).len(), 2 * OF_A_KIND);
        let later = now + GONE_AT;
        assert!(hearsay.newest(now).is_some() && hearsay.newest(later).is_none());
        assert_eq!((hearsay.sweep(now), hearsay.sweep(later)), (OFFERS_MAX, 0));
    }
}
