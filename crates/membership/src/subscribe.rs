//! Whose load this node wants to know, now that it knows more nodes than it can listen to.
//!
//! Of each model: everybody who serves it, wherever they are, while those are few; else those of this region while those are
//! few; else a sample by rendezvous hashing, which spreads subscribers evenly and changes little when members come and go.
//! The sample is drawn place by place, and two of its places are drawn anew every half minute.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use base::{ModelName, ZoneName};
use rand::{Rng, RngExt as _};

use crate::{Descriptor, NodeId, id::mix};

/// So many nodes are few.
const FEW: usize = 64;
/// Nodes of a sample.
const SAMPLE: usize = 32;
/// How many of them are of other zones, where there are zones.
const SAMPLE_OTHER_ZONES: usize = 8;
/// Places of a sample that are drawn anew at once.
const SWAPPED: usize = 2;
/// And how often.
const SWAP: Duration = Duration::from_secs(30);
/// Members are not looked at more often.
const LOOK: Duration = Duration::from_secs(1);
/// Where they are few it costs nothing, and calls wait for what they say.
const LOOK_AT_FEW: Duration = Duration::from_millis(50);
/// Who refuses is asked again after this at the latest, whatever it says, and after [`LOOK`] at the earliest.
const REFUSED_MAX: Duration = Duration::from_secs(600);
/// Refusals remembered.
const REFUSALS_MAX: usize = 1024;

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
    /// What it serves, if that is known. Those of one hash share one body.
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
    /// Makes the choice of one process unlike that of the next.
    pub(crate) salt: u64,
}

/// What is to be said to whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Load frames of these are wanted.
    pub(crate) subscribe: Vec<NodeId>,
    /// And of these not any more.
    pub(crate) unsubscribe: Vec<NodeId>,
}

/// Whom `own` subscribes to, in order of their ids. `swaps` counts how often places of the samples were drawn anew.
pub(crate) fn choose(own: &Chooser, members: &[Known<'_>], swaps: u64) -> Vec<NodeId> {
    let always = members.iter().filter(|m| m.listed || (own.is_relay && m.in_region));
    let mut chosen: Vec<_> = always.map(|member| member.id).collect();
    let groups = same_descriptor(members);
    for serving in same_groups(&groups) {
        let groups = serving.iter().filter_map(|index| groups.get(*index));
        chosen.extend(of_model(own, groups.flatten().copied().collect(), swaps));
    }
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}

/// The members that share a descriptor.
fn same_descriptor<'m, 'a>(members: &'m [Known<'a>]) -> Vec<Vec<&'m Known<'a>>> {
    let body = |member: &&Known<'_>| member.descriptor.map(Arc::as_ptr);
    let mut sorted: Vec<_> = members.iter().filter(|m| m.descriptor.is_some()).collect();
    sorted.sort_by_key(body);
    sorted.chunk_by(|a, b| body(a) == body(b)).map(<[_]>::to_vec).collect()
}

/// Which groups serve a model, once for all models that the same groups serve.
fn same_groups(groups: &[Vec<&Known<'_>>]) -> BTreeSet<Vec<usize>> {
    let mut models: BTreeMap<Option<&ModelName>, Vec<usize>> = BTreeMap::new();
    for (index, group) in groups.iter().enumerate() {
        let descriptor = group.first().and_then(|member| member.descriptor);
        for engine in descriptor.map_or(&[][..], |descriptor| &descriptor.engines) {
            let any = engine.models.is_empty().then_some(None);
            for model in engine.models.iter().map(Some).chain(any) {
                let serving = models.entry(model).or_default();
                if serving.last() != Some(&index) {
                    serving.push(index);
                }
            }
        }
    }
    models.into_values().collect()
}

/// Whom to listen to among those that serve one model.
fn of_model(own: &Chooser, mut serving: Vec<&Known<'_>>, swaps: u64) -> Vec<NodeId> {
    if serving.len() > FEW {
        serving.retain(|member| member.in_region);
    }
    if serving.len() > FEW {
        return sample(own, &serving, swaps);
    }
    serving.iter().map(|member| member.id).collect()
}

/// A sample of `serving`: own zone first.
fn sample(own: &Chooser, serving: &[&Known<'_>], swaps: u64) -> Vec<NodeId> {
    let [high, low] = own.id.halves();
    let key = mix(own.salt ^ low ^ mix(high));
    let (mut near, mut far) = (vec![], vec![]);
    for member in serving {
        let is_near = own.zone.is_none() || member.zone == own.zone.as_ref();
        let [high, low] = member.id.halves();
        let hash = mix(high ^ mix(low ^ key));
        if is_near { &mut near } else { &mut far }.push((hash, member.id));
    }
    let of_far = far.len().min(SAMPLE_OTHER_ZONES).max(SAMPLE.saturating_sub(near.len()));
    let mut drawn = Vec::with_capacity(SAMPLE);
    for slot in 0..SAMPLE {
        let among = if slot < of_far { &far } else { &near };
        let salt = mix(times_drawn(slot, swaps).wrapping_mul(SAMPLE as u64) + slot as u64);
        draw(among, salt, &mut drawn);
    }
    drawn
}

/// How often place `slot` of a sample was drawn anew.
fn times_drawn(slot: usize, swaps: u64) -> u64 {
    let turns = (SAMPLE / SWAPPED) as u64;
    (swaps + turns - 1 - (slot / SWAPPED) as u64) / turns
}

/// Adds the highest by this salt that is not drawn yet.
fn draw(among: &[(u64, NodeId)], salt: u64, drawn: &mut Vec<NodeId>) {
    let mut best = None;
    for (hash, id) in among {
        let score = mix(hash ^ salt);
        if best.is_none_or(|(highest, _)| score > highest) && !drawn.contains(id) {
            best = Some((score, *id));
        }
    }
    drawn.extend(best.map(|(_, id)| id));
}

/// The nodes this one subscribes to.
#[derive(Debug)]
pub(crate) struct Subscriptions {
    own: Chooser,
    /// In order of their ids.
    current: Vec<NodeId>,
    /// Who refused, and until when it is not asked.
    refused: BTreeMap<NodeId, Instant>,
    swaps: u64,
    /// When the next swap is due; `None`: nothing was chosen yet.
    swap: Option<Instant>,
    /// When the members were looked at last.
    looked: Option<Instant>,
    /// When they are to be looked at because something changed.
    look: Option<Instant>,
    /// How many there were then.
    members: usize,
}

impl Subscriptions {
    pub(crate) fn new(id: NodeId, zone: Option<ZoneName>) -> Self {
        let own = Chooser { id, zone, is_relay: false, salt: 0 };
        let (current, refused) = (vec![], BTreeMap::new());
        Self { own, current, refused, swaps: 0, swap: None, looked: None, look: None, members: 0 }
    }

    /// Members came, went, or serve something else.
    pub(crate) fn changed(&mut self, now: Instant) {
        let gap = if self.members <= FEW { LOOK_AT_FEW } else { LOOK };
        let look = self.looked.map_or(now, |looked| now.max(looked + gap));
        self.look = Some(self.look.map_or(look, |before| before.min(look)));
    }

    /// From now on this node is a relay, or is none any more.
    pub(crate) fn relays(&mut self, now: Instant, is_relay: bool) {
        if self.own.is_relay != is_relay {
            self.own.is_relay = is_relay;
            self.changed(now);
        }
    }

    /// When [`Self::update`] is to be called. `None`: when something changes.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let asked_again = self.refused.values().copied();
        asked_again.chain(self.look).chain(self.swap).min()
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
        if !self.is_due(now) {
            return Changes::default();
        }
        self.turn(now, rng);
        (self.look, self.looked, self.members) = (None, Some(now), members.len());
        self.refused.retain(|_, until| *until > now);
        let chosen = if self.refused.is_empty() {
            choose(&self.own, members, self.swaps)
        } else {
            let willing = |member: &&Known<'_>| !self.refused.contains_key(&member.id);
            let members: Vec<_> = members.iter().filter(willing).copied().collect();
            choose(&self.own, &members, self.swaps)
        };
        let missing = |these: &[NodeId], those: &[NodeId]| {
            these.iter().filter(|id| those.binary_search(id).is_err()).copied().collect()
        };
        let changes = Changes {
            subscribe: missing(&chosen, &self.current),
            unsubscribe: missing(&self.current, &chosen),
        };
        self.current = chosen;
        changes
    }

    /// Counts the swaps that are due.
    fn turn(&mut self, now: Instant, rng: &mut impl Rng) {
        match self.swap {
            None => {
                self.own.salt = rng.random();
                self.swap = Some(now + SWAP.mul_f64(rng.random_range(0.5..1.0)));
            }
            Some(swap) if swap <= now => {
                self.swaps += 1;
                self.swap = Some(now + SWAP);
            }
            Some(_) => {}
        }
    }

    /// Node `id` does not take this one as a subscriber, and need not be asked for `wait`. Another is chosen instead.
    pub(crate) fn refused(&mut self, now: Instant, id: NodeId, wait: Duration) {
        let Ok(place) = self.current.binary_search(&id) else { return };
        self.current.remove(place);
        if self.refused.len() < REFUSALS_MAX {
            self.refused.insert(id, now + wait.clamp(LOOK, REFUSED_MAX));
        }
        self.changed(now);
    }

    /// Whether the load of node `id` is wanted.
    pub(crate) fn is_subscribed(&self, id: &NodeId) -> bool {
        self.current.binary_search(id).is_ok()
    }

    /// Everybody whose load is wanted, in order of their ids.
    pub(crate) fn all(&self) -> &[NodeId] {
        &self.current
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::EngineDescriptor;

    fn id(i: usize) -> NodeId {
        let half = mix(i as u64);
        NodeId((u128::from(half) << 64 | u128::from(mix(half))).to_be_bytes())
    }

    fn serving(models: &[&str]) -> Arc<Descriptor> {
        let engine = EngineDescriptor {
            name: "gpu-0".parse().unwrap(),
            protocol: "kserve-v2".into(),
            models: models.iter().map(|model| model.parse().unwrap()).collect(),
            services: vec![],
            id: None,
            slots: None,
        };
        Arc::new(Descriptor { version: 1, engines: vec![engine] })
    }

    fn known(i: usize, descriptor: &Arc<Descriptor>) -> Known<'_> {
        let descriptor = Some(descriptor);
        Known { id: id(i), in_region: true, zone: None, listed: false, descriptor }
    }

    fn own(i: usize) -> Chooser {
        Chooser { id: id(i), zone: None, is_relay: false, salt: i as u64 }
    }

    fn difference(these: &[NodeId], those: &[NodeId]) -> usize {
        these.iter().filter(|id| !those.contains(id)).count()
    }

    #[test]
    fn few_nodes_are_all_chosen_wherever_they_are() {
        let llama = serving(&["llama"]);
        let near = (0..40).map(|i| known(i, &llama));
        let far = |n: usize| (100..100 + n).map(|i| Known { in_region: false, ..known(i, &llama) });
        let members: Vec<_> = near.clone().chain(far(24)).collect();
        assert_eq!(choose(&own(999), &members, 0).len(), 64);
        let members: Vec<_> = near.chain(far(25)).collect();
        let chosen = choose(&own(999), &members, 0);
        assert_eq!(chosen.len(), 40, "with one more only those of the region");
        assert!(chosen.is_sorted());
    }

    #[test]
    fn each_model_counts_by_itself_and_engines_without_models_as_one() {
        let (llama, qwen, any) = (serving(&["llama"]), serving(&["qwen", "phi"]), serving(&[]));
        let members: Vec<_> = (0..200)
            .map(|i| known(i, if i < 100 { &llama } else { &qwen }))
            .chain((200..210).map(|i| known(i, &any)))
            .chain((210..220).map(|i| Known { descriptor: None, ..known(i, &any) }))
            .chain((220..223).map(|i| Known { listed: true, descriptor: None, ..known(i, &any) }))
            .collect();
        let chosen = choose(&own(999), &members, 0);
        let count = |range: std::ops::Range<usize>| {
            range.filter(|i| chosen.binary_search(&id(*i)).is_ok()).count()
        };
        assert_eq!([count(0..100), count(100..200), count(200..210)], [32, 32, 10]);
        assert_eq!(
            [count(210..220), count(220..223)],
            [0, 3],
            "nobody knows, but an operator does"
        );
        assert_eq!(choose(&Chooser { is_relay: true, ..own(999) }, &members, 0).len(), 223);
    }

    #[test]
    fn a_thousand_nodes_have_about_as_many_subscribers_each() {
        let llama = serving(&["llama"]);
        let members: Vec<_> = (0..1_000).map(|i| known(i, &llama)).collect();
        let mut subscribers = BTreeMap::new();
        for i in 0..1_000 {
            let others: Vec<_> = members.iter().filter(|m| m.id != id(i)).copied().collect();
            let chosen = choose(&own(i), &others, 0);
            assert_eq!(chosen.len(), 32);
            for id in chosen {
                *subscribers.entry(id).or_insert(0) += 1;
            }
        }
        let counts = || subscribers.values().copied();
        let range = (counts().min().unwrap(), counts().max().unwrap());
        assert!(subscribers.len() == 1_000 && range.0 >= 10 && range.1 <= 64, "{range:?}");
    }

    #[test]
    fn own_zone_is_preferred_and_filled_up_where_it_is_small() {
        let llama = serving(&["llama"]);
        let zones: Vec<ZoneName> = ["a", "b"].map(|zone| zone.parse().unwrap()).into();
        for (in_zone, want) in [(100, 24), (10, 10), (295, 27), (0, 0)] {
            let members: Vec<_> = (0..300)
                .map(|i| Known { zone: zones.get(usize::from(i >= in_zone)), ..known(i, &llama) })
                .collect();
            let own = Chooser { zone: zones.first().cloned(), ..own(999) };
            let chosen = choose(&own, &members, 3);
            let near = (0..in_zone).filter(|i| chosen.contains(&id(*i))).count();
            assert_eq!((near, chosen.len()), (want, 32), "{in_zone}");
        }
    }

    #[test]
    fn a_sample_changes_little_with_its_members_and_two_by_two_with_time() {
        let llama = serving(&["llama"]);
        let members: Vec<_> = (0..1_000).map(|i| known(i, &llama)).collect();
        let own = own(5_000);
        let first = choose(&own, &members, 0);
        let mut before = first.clone();
        for swaps in 1..=16 {
            let after = choose(&own, &members, swaps);
            assert!((1..=3).contains(&difference(&before, &after)), "{swaps}");
            before = after;
        }
        assert!(difference(&first, &before) >= 29, "all places were drawn anew");
        let without: Vec<_> = members.iter().filter(|m| m.id != first[7]).copied().collect();
        assert!(difference(&first, &choose(&own, &without, 0)) <= 2);
        let joined: Vec<_> = (0..1_020).map(|i| known(i, &llama)).collect();
        assert!(difference(&first, &choose(&own, &joined, 0)) <= 5);
    }

    #[test]
    fn members_are_looked_at_once_a_second_and_two_are_swapped_every_half_minute() {
        let now = base::clock::now();
        let mut rng = StdRng::seed_from_u64(1);
        let llama = serving(&["llama"]);
        let members: Vec<_> = (0..200).map(|i| known(i, &llama)).collect();
        let mut subscriptions = Subscriptions::new(id(5_000), None);
        assert_eq!(subscriptions.next_deadline(), None);
        subscriptions.changed(now);
        let changes = subscriptions.update(now, &mut rng, &members);
        assert_eq!((changes.subscribe.len(), changes.unsubscribe.len()), (32, 0));
        assert!(changes.subscribe.iter().all(|id| subscriptions.is_subscribed(id)));
        subscriptions.changed(now);
        assert!(!subscriptions.is_due(now + LOOK / 2));
        assert_eq!(subscriptions.next_deadline(), Some(now + LOOK));
        let members = &members[1..];
        let changes = subscriptions.update(now + LOOK, &mut rng, members);
        assert!(changes.unsubscribe.len() <= 2);
        let mut swapped = 0;
        for second in 2..302 {
            let now = now + LOOK * second;
            if subscriptions.is_due(now) {
                swapped += subscriptions.update(now, &mut rng, members).subscribe.len();
            }
        }
        assert!((15..25).contains(&swapped), "{swapped} in five minutes");
        assert_eq!(subscriptions.all().len(), 32);
    }

    #[test]
    fn a_relay_listens_to_its_whole_region() {
        let now = base::clock::now();
        let mut rng = StdRng::seed_from_u64(1);
        let llama = serving(&["llama"]);
        let members: Vec<_> =
            (0..200).map(|i| Known { in_region: i < 150, ..known(i, &llama) }).collect();
        let mut subscriptions = Subscriptions::new(id(5_000), None);
        for (second, is_relay, want) in [(0, false, 32), (1, true, 150), (2, false, 32)] {
            subscriptions.changed(now);
            subscriptions.relays(now + LOOK * second, is_relay);
            subscriptions.update(now + LOOK * second, &mut rng, &members);
            assert_eq!(subscriptions.all().len(), want);
        }
    }

    #[test]
    fn who_refuses_is_replaced_and_asked_again_later() {
        let now = base::clock::now();
        let mut rng = StdRng::seed_from_u64(1);
        let llama = serving(&["llama"]);
        let members: Vec<_> = (0..10).map(|i| known(i, &llama)).collect();
        let mut subscriptions = Subscriptions::new(id(5_000), None);
        subscriptions.changed(now);
        subscriptions.update(now, &mut rng, &members);
        subscriptions.refused(now, id(3), 20 * LOOK);
        subscriptions.refused(now, id(99), 20 * LOOK);
        assert!(!subscriptions.is_subscribed(&id(3)));
        let again = (1..40).find(|second| {
            let now = now + LOOK * *second;
            subscriptions.update(now, &mut rng, &members).subscribe.contains(&id(3))
        });
        assert_eq!(again, Some(20));
    }
}
