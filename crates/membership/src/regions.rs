//! What other regions have, from what several relays say of them, one of which may lie.
//!
//! Whoever speaks of a region is a voice: a relay of this region that hands on what one relay there says, or speaks of its own.
//! Each relay of this region listens to another one of theirs, so that one that lies does not speak with every voice. Of each figure
//! the median counts (of two the lower), and no voice brings more than its share of the candidates, or larger ones than the others'.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    mem::size_of,
    sync::Arc,
    time::{Duration, Instant},
};

use base::{ModelName, RegionName};

use crate::{
    Candidate, Digest, NodeId, RegionOffer, RegionView,
    wire::{CANDIDATES_MAX, pack, unpack},
};

/// Older figures say nothing.
const OLD: Duration = Duration::from_secs(3);
/// Views are not closer than this: of all regions that have changed meanwhile at once.
const GAP_MIN: Duration = Duration::from_millis(40);
/// Whose claim is so many times the median has no candidates.
const EXCESS: f64 = 1.5;
const REGIONS_MAX: usize = 256;
const VOICES_MAX: usize = 9;
/// Memory of all that was said, and of one part of a digest.
const BYTES_MAX: usize = 16 << 20;
/// What is kept is counted this often.
const COUNTED_EVERY: Duration = Duration::from_secs(1);
const PART_BYTES_MAX: usize = 16 << 10;

/// What is known of all regions.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    regions: BTreeMap<RegionName, Region>,
    /// Models are named by many voices.
    keys: BTreeSet<Arc<Key>>,
    /// Memory of what was said, at most: what was dropped since it was last counted is in it still.
    bytes: usize,
    counted: Option<Instant>,
    viewed: Option<Instant>,
    /// When views are due, or figures become too old, at the earliest.
    next: Option<Instant>,
}

/// What is offered.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    model: Option<ModelName>,
    protocol: String,
}

#[derive(Debug, Default)]
struct Region {
    voices: Vec<Voice>,
    /// Since when there is something nobody was told.
    changed: Option<Instant>,
}

#[derive(Debug)]
struct Voice {
    /// Who speaks.
    from: NodeId,
    /// Whose words they are.
    origin: NodeId,
    said: Option<Said>,
    /// Parts of a newer digest.
    pending: Option<Box<Pending>>,
}

/// A digest as it is kept: packed, for there are many copies of it in a region, and most are replaced unseen.
#[derive(Debug)]
struct Said {
    /// Epoch and sequence.
    count: (u64, u64),
    sampled: Instant,
    /// In order of their keys.
    offers: Box<[Offer]>,
}

#[derive(Debug)]
struct Pending {
    count: (u64, u64),
    sampled: Instant,
    parts: Vec<Option<Vec<Offer>>>,
}

#[derive(Debug)]
struct Offer {
    key: Arc<Key>,
    free: u32,
    slots: u32,
    drain_rate: f32,
    wait_ms: (u32, u32),
    kv_free: Option<f32>,
    candidates: Box<[u8]>,
}

impl Regions {
    /// A part of a digest came from `from`, a relay of this region that made it or hands it on, or the relay of another that
    /// made it. The caller has seen to it that `from` is one of them, and that the card of who made it says `digest.region`.
    /// Returns whether it was news.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        from: NodeId,
        digest: Digest,
        one_way: Duration,
    ) -> bool {
        let age = digest.age + one_way;
        let Some(sampled) = now.checked_sub(age).filter(|_| age < OLD) else { return false };
        let is_full =
            !self.regions.contains_key(&digest.region) && self.regions.len() >= REGIONS_MAX;
        if is_full || self.bytes > BYTES_MAX {
            return false;
        }
        let region = self.regions.entry(digest.region).or_default();
        let Some(voice) = region.voice(from, digest.relay.unwrap_or(from)) else {
            return false;
        };
        let count = (digest.epoch, digest.sequence);
        if !voice.wants(count, digest.part) {
            return false;
        }
        let offers = digest.offers.into_iter().map(|offer| Offer::new(offer, &self.keys));
        let offers: Vec<_> = offers.collect();
        let bytes = offers.iter().map(Offer::bytes).sum::<usize>();
        if bytes > PART_BYTES_MAX {
            return false;
        }
        self.keys.extend(offers.iter().map(|offer| Arc::clone(&offer.key)));
        self.bytes += bytes;
        if voice.part(count, sampled, digest.part, offers) {
            region.changed.get_or_insert(now);
        }
        self.next = self.next.into_iter().chain(region.due(self.viewed)).min();
        true
    }

    /// What has changed, at most 25 times a second. A region nobody speaks of any more comes once without offers.
    pub(crate) fn views(&mut self, now: Instant) -> Vec<Arc<RegionView>> {
        if self.next.is_none_or(|next| next > now) {
            return vec![];
        }
        let mut views = vec![];
        for (name, region) in &mut self.regions {
            region.forget(now);
            if region.view_due(self.viewed).is_some_and(|due| due <= now) {
                region.changed = None;
                views.push(Arc::new(region.view(name, now)));
            }
        }
        if !views.is_empty() {
            self.viewed = Some(now);
        }
        self.regions.retain(|_, region| !region.voices.is_empty() || region.changed.is_some());
        self.next = self.regions.values().filter_map(|region| region.due(self.viewed)).min();
        if self.bytes > BYTES_MAX || self.counted.is_none_or(|at| now >= at + COUNTED_EVERY) {
            self.counted = Some(now);
            self.count();
        }
        views
    }

    fn count(&mut self) {
        self.keys.retain(|key| Arc::strong_count(key) > 1);
        self.bytes =
            self.regions.values().flat_map(|region| &region.voices).map(Voice::bytes).sum();
    }

    /// When [`Self::views`] is due.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.next
    }

    /// Whether what relay `id` says counts.
    pub(crate) fn hears(&self, id: NodeId) -> bool {
        self.regions.values().flat_map(|region| &region.voices).any(|voice| voice.origin == id)
    }

    /// The regions known, and how old what is known is.
    pub(crate) fn ages(&self, now: Instant) -> Vec<(RegionName, Duration)> {
        let age = |(name, region): (&RegionName, &Region)| {
            Some((name.clone(), now.saturating_duration_since(region.sampled()?)))
        };
        self.regions.iter().filter_map(age).collect()
    }
}

impl Region {
    /// The voice of `from`, which speaks of what `origin` says.
    fn voice(&mut self, from: NodeId, origin: NodeId) -> Option<&mut Voice> {
        let place = self.voices.iter().position(|voice| voice.from == from);
        let place = match place {
            Some(place) => place,
            None if self.voices.len() < VOICES_MAX => {
                self.voices.push(Voice::new(from, origin));
                self.voices.len() - 1
            }
            None => return None,
        };
        let voice = self.voices.get_mut(place)?;
        if voice.origin != origin {
            // What the other said goes on counting until this one's first digest is complete.
            (voice.origin, voice.pending) = (origin, None);
            if let Some(said) = &mut voice.said {
                said.count = (0, 0);
            }
        }
        Some(voice)
    }

    /// When a view is due; the last ones were made then.
    fn view_due(&self, viewed: Option<Instant>) -> Option<Instant> {
        let changed = self.changed?;
        Some(viewed.map_or(changed, |viewed| changed.max(viewed + GAP_MIN)))
    }

    /// When a view is due, or something becomes too old.
    fn due(&self, viewed: Option<Instant>) -> Option<Instant> {
        let old = self.voices.iter().filter_map(|voice| voice.sampled().map(|at| at + OLD));
        old.chain(self.view_due(viewed)).min()
    }

    /// Forgets what is too old.
    fn forget(&mut self, now: Instant) {
        for voice in &mut self.voices {
            voice.pending.take_if(|pending| pending.sampled + OLD <= now);
            if voice.said.take_if(|said| said.sampled + OLD <= now).is_some() {
                self.changed.get_or_insert(now);
            }
        }
        self.voices.retain(|voice| voice.said.is_some() || voice.pending.is_some());
    }

    fn said(&self) -> impl Iterator<Item = &Said> {
        self.voices.iter().filter_map(|voice| voice.said.as_ref())
    }

    fn sampled(&self) -> Option<Instant> {
        median(self.said().map(|said| said.sampled), Instant::cmp)
    }

    fn view(&self, name: &RegionName, now: Instant) -> RegionView {
        let voices = self.said().count();
        let mut offers: BTreeMap<&Key, Vec<&Offer>> = BTreeMap::new();
        for offer in self.said().flat_map(|said| &said.offers) {
            offers.entry(&offer.key).or_default().push(offer);
        }
        RegionView {
            region: name.clone(),
            sampled: self.sampled().unwrap_or(now),
            offers: offers.into_iter().filter_map(|(key, o)| merged(key, o, voices)).collect(),
        }
    }
}

impl Voice {
    fn new(from: NodeId, origin: NodeId) -> Self {
        Self { from, origin, said: None, pending: None }
    }

    /// Whether this part of a digest is news.
    fn wants(&self, count: (u64, u64), (part, parts): (u32, u32)) -> bool {
        let is_old = self.said.as_ref().is_some_and(|said| count <= said.count);
        let is_missing = |pending: &Pending| match count.cmp(&pending.count) {
            Ordering::Less => false,
            Ordering::Equal => {
                pending.parts.len() == parts as usize
                    && pending.parts.get(part as usize).is_some_and(Option::is_none)
            }
            Ordering::Greater => true,
        };
        part < parts && !is_old && self.pending.as_deref().is_none_or(is_missing)
    }

    /// Takes in a part that is news. Returns whether it completes its digest.
    fn part(
        &mut self,
        count: (u64, u64),
        sampled: Instant,
        (part, parts): (u32, u32),
        offers: Vec<Offer>,
    ) -> bool {
        let pending = self.pending.take().filter(|pending| pending.count == count);
        let mut pending = pending.unwrap_or_else(|| {
            let parts = std::iter::repeat_with(|| None).take(parts as usize).collect();
            Box::new(Pending { count, sampled, parts })
        });
        pending.sampled = pending.sampled.min(sampled);
        if let Some(place) = pending.parts.get_mut(part as usize) {
            *place = Some(offers);
        }
        if pending.parts.iter().any(Option::is_none) {
            self.pending = Some(pending);
            return false;
        }
        let Pending { sampled, parts, .. } = *pending;
        let mut offers: Vec<_> = parts.into_iter().flatten().flatten().collect();
        offers.sort_by(|a, b| a.key.cmp(&b.key));
        offers.dedup_by(|a, b| a.key == b.key);
        self.said = Some(Said { count, sampled, offers: offers.into() });
        true
    }

    /// When what it says was so, or will have been so: the oldest.
    fn sampled(&self) -> Option<Instant> {
        let said = self.said.iter().map(|said| said.sampled);
        said.chain(self.pending.iter().map(|pending| pending.sampled)).min()
    }

    fn bytes(&self) -> usize {
        let said = self.said.iter().flat_map(|said| &said.offers);
        let pending = self.pending.iter().flat_map(|pending| &pending.parts).flatten().flatten();
        said.chain(pending).map(Offer::bytes).sum()
    }
}

impl Offer {
    #[expect(clippy::cast_possible_truncation, reason = "figures lose digits nobody reads")]
    fn new(offer: RegionOffer, keys: &BTreeSet<Arc<Key>>) -> Self {
        let key = Key { model: offer.model, protocol: offer.protocol };
        let key = keys.get(&key).cloned().unwrap_or_else(|| Arc::new(key));
        let ms = |wait: Duration| u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        Self {
            key,
            free: offer.free.min(offer.slots),
            slots: offer.slots,
            drain_rate: offer.drain_rate as f32,
            wait_ms: (ms(offer.wait.0), ms(offer.wait.1)),
            kv_free: offer.kv_free.map(|free| free as f32),
            candidates: pack(&offer.candidates),
        }
    }

    /// Its memory, about.
    fn bytes(&self) -> usize {
        let model = self.key.model.as_ref().map_or(0, |model| model.as_str().len());
        size_of::<Self>() + size_of::<Key>() + model + self.candidates.len()
    }
}

/// The median; of an even number the lower of the two in the middle.
fn median<T>(values: impl Iterator<Item = T>, order: impl Fn(&T, &T) -> Ordering) -> Option<T> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(order);
    let middle = values.len().checked_sub(1)? / 2;
    values.into_iter().nth(middle)
}

/// What so many `voices` together say of one model: those that do not name it say that there is nothing.
fn merged(key: &Key, mut offers: Vec<&Offer>, voices: usize) -> Option<RegionOffer> {
    let silent = voices.checked_sub(offers.len())?;
    let middle = (voices.checked_sub(1)? / 2).checked_sub(silent)?;
    offers.sort_by_key(|offer| offer.free);
    let free = offers.get(middle)?.free;
    let count = |figure: fn(&Offer) -> u32| {
        let silent = std::iter::repeat_n(0, silent);
        median(offers.iter().map(|offer| figure(offer)).chain(silent), u32::cmp).unwrap_or(0)
    };
    let rates = offers.iter().map(|offer| offer.drain_rate).chain(std::iter::repeat_n(0.0, silent));
    let wait = |figure: fn(&Offer) -> u32| {
        let wait = median(offers.iter().map(|offer| figure(offer)), u32::cmp);
        Duration::from_millis(wait.unwrap_or(0).into())
    };
    let kv_free = median(offers.iter().filter_map(|offer| offer.kv_free), f32::total_cmp);
    Some(RegionOffer {
        model: key.model.clone(),
        protocol: key.protocol.clone(),
        free,
        slots: count(|offer| offer.slots),
        drain_rate: median(rates, f32::total_cmp).unwrap_or(0.0).into(),
        wait: (wait(|offer| offer.wait_ms.0), wait(|offer| offer.wait_ms.1)),
        kv_free: kv_free.map(f64::from),
        candidates: {
            offers.swap(0, middle);
            offers.retain(|offer| f64::from(offer.free) <= f64::from(free) * EXCESS);
            candidates(&offers, free)
        },
    })
}

/// Candidates of each voice in turn, so that none brings more than its share of them, nor on the average larger ones.
fn candidates(offers: &[&Offer], free: u32) -> Vec<Candidate> {
    let mut lists: Vec<_> = offers.iter().map(|offer| unpack(&offer.candidates)).collect();
    let mut taken: Vec<(usize, Candidate)> = Vec::with_capacity(CANDIDATES_MAX);
    for _ in 0..CANDIDATES_MAX {
        for (voice, list) in lists.iter_mut().enumerate() {
            let is_new = |c: &Candidate| taken.iter().all(|(_, before)| before.node != c.node);
            if let Some(candidate) = list.find(is_new).filter(|_| taken.len() < CANDIDATES_MAX) {
                taken.push((voice, candidate));
            }
        }
    }
    level(&mut taken, offers.len(), |candidate| &mut candidate.slots);
    level(&mut taken, offers.len(), |candidate| &mut candidate.free);
    let within =
        |(_, c): (usize, Candidate)| Candidate { free: c.free.min(c.slots).min(free), ..c };
    taken.into_iter().map(within).collect()
}

/// Cuts a figure of each voice's candidates so that their mean is not above the median of the means.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a u32")]
fn level(
    taken: &mut [(usize, Candidate)],
    voices: usize,
    figure: impl Fn(&mut Candidate) -> &mut u32,
) {
    let mut sums = vec![(0.0, 0.0); voices];
    for (voice, candidate) in taken.iter_mut() {
        if let Some((sum, count)) = sums.get_mut(*voice) {
            (*sum, *count) = (*sum + f64::from(*figure(candidate)), *count + 1.0);
        }
    }
    let means: Vec<f64> = sums.into_iter().map(|(sum, count)| sum / f64::max(count, 1.0)).collect();
    let most = median(means.iter().copied().filter(|mean| *mean > 0.0), f64::total_cmp);
    for (voice, candidate) in taken {
        if let (Some(most), Some(mean)) = (most, means.get(*voice))
            && *mean > most
        {
            let figure = figure(candidate);
            *figure = (f64::from(*figure) * most / mean).ceil() as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::digest::{
        Digester,
        tests::{Node, load, node},
    };

    const MS: Duration = Duration::from_millis(1);

    fn id(i: u8) -> NodeId {
        NodeId([i; 16])
    }

    fn offer(free: u32, candidates: &[(&str, u32)]) -> RegionOffer {
        let candidate = |(name, free): &(&str, u32)| Candidate {
            node: name.parse().unwrap(),
            peers: "10.0.0.1:7700".into(),
            free: *free,
            slots: 64,
        };
        RegionOffer {
            model: Some("llama".parse().unwrap()),
            protocol: "kserve-v2".into(),
            free,
            slots: free * 2,
            drain_rate: 2.0,
            wait: (10 * MS, 20 * MS),
            kv_free: Some(0.5),
            candidates: candidates.iter().map(candidate).collect(),
        }
    }

    fn digest(relay: u8, sequence: u64, offers: Vec<RegionOffer>) -> Digest {
        Digest {
            relay: Some(id(relay)),
            region: "us".parse().unwrap(),
            epoch: 1,
            sequence,
            age: 100 * MS,
            part: (0, 1),
            offers,
        }
    }

    fn only(views: Vec<Arc<RegionView>>) -> RegionView {
        let [view] = &views[..] else { panic!("{views:?}") };
        RegionView::clone(view)
    }

    /// What a receiver sees when relays 1, 2, 3 say this through relays 11, 12, 13.
    fn view(said: impl IntoIterator<Item = Vec<RegionOffer>>) -> RegionView {
        let now = base::clock::now();
        let mut regions = Regions::default();
        for (relay, offers) in (1..).zip(said) {
            assert!(regions.take(now, id(relay + 10), digest(relay, 1, offers), 50 * MS));
        }
        only(regions.views(now))
    }

    #[test]
    fn a_digest_becomes_a_view_as_old_as_its_figures_and_the_way() {
        let now = base::clock::now();
        let mut regions = Regions::default();
        let said = offer(30, &[("a", 20), ("b", 10)]);
        assert!(regions.take(now, id(11), digest(1, 1, vec![said.clone()]), 50 * MS));
        let view = only(regions.views(now));
        assert_eq!((view.region.as_str(), view.sampled), ("us", now - 150 * MS));
        assert_eq!(view.offers, [said]);
        assert_eq!(regions.ages(now + MS), [("us".parse().unwrap(), 151 * MS)]);
    }

    #[test]
    fn what_is_not_newer_or_too_old_is_dropped() {
        let now = base::clock::now();
        let mut regions = Regions::default();
        assert!(regions.take(now, id(11), digest(1, 2, vec![]), 50 * MS));
        for (sequence, age) in [(2, 100), (1, 100), (3, 2_950)] {
            let digest = Digest { age: age * MS, ..digest(1, sequence, vec![]) };
            assert!(!regions.take(now, id(11), digest, 50 * MS), "{sequence} {age}");
        }
        assert!(regions.take(now, id(12), digest(2, 1, vec![]), 50 * MS), "another voice");
        assert!(regions.take(now, id(11), digest(1, 3, vec![]), 50 * MS));
    }

    #[test]
    fn views_come_25_times_a_second_at_most_and_once_more_when_all_are_silent() {
        let now = base::clock::now();
        let mut regions = Regions::default();
        let mut seen = vec![];
        for ms in (0..10_000).step_by(20) {
            let now = now + ms * MS;
            if ms < 1_000 {
                regions.take(now, id(11), digest(1, u64::from(ms) + 1, vec![offer(ms, &[])]), MS);
            }
            let is_due = regions.next_deadline().is_some_and(|due| due <= now);
            let views = regions.views(now);
            assert_eq!(views.is_empty(), !is_due);
            seen.extend(views.iter().map(|view| (ms, view.offers.len())));
        }
        let times: Vec<_> = seen.iter().map(|(ms, _)| *ms).collect();
        let closely: Vec<_> = (0..=1_000).step_by(40).chain([3_880]).collect();
        assert_eq!(times, closely, "{seen:?}");
        assert_eq!(seen.last(), Some(&(3_880, 0)));
        assert!(regions.next_deadline().is_none() && regions.ages(now).is_empty());
        assert!(regions.keys.is_empty() && regions.bytes == 0);
    }

    #[test]
    fn regions_that_change_one_after_the_other_are_viewed_at_once() {
        let now = base::clock::now();
        let mut regions = Regions::default();
        let mut times = vec![];
        for ms in 0..1_000 {
            let now = now + ms * MS;
            let region = format!("r{}", ms % 10).parse().unwrap();
            regions.take(now, id(11), Digest { region, ..digest(1, ms.into(), vec![]) }, MS);
            times.extend(regions.views(now).iter().map(|_| ms));
        }
        assert_eq!(times.iter().filter(|ms| **ms == 40).count(), 10);
        times.dedup();
        assert_eq!(times, (0..1_000).step_by(40).collect::<Vec<_>>());
    }

    #[test]
    fn a_voice_may_speak_for_another_relay_at_once() {
        let now = base::clock::now();
        let mut regions = Regions::default();
        let say = |regions: &mut Regions, ms: u32, relay, sequence| {
            let now = now + ms * MS;
            assert!(regions.take(now, id(11), digest(relay, sequence, vec![offer(ms, &[])]), MS));
            regions.views(now).first().map(|view| view.offers[0].free)
        };
        assert_eq!(say(&mut regions, 0, 1, 9), Some(0));
        assert_eq!(say(&mut regions, 100, 2, 3), Some(100), "it counts by itself");
        assert_eq!(say(&mut regions, 200, 1, 10), Some(200));
    }

    #[test]
    fn a_digest_counts_when_all_its_parts_are_there() {
        let now = base::clock::now();
        let mut regions = Regions::default();
        let model =
            |name: &str| RegionOffer { model: Some(name.parse().unwrap()), ..offer(1, &[]) };
        let part = |sequence, part, name| Digest {
            part: (part, 2),
            ..digest(1, sequence, vec![model(name)])
        };
        assert!(regions.take(now, id(11), part(1, 1, "b"), MS));
        assert!(!regions.take(now, id(11), part(1, 1, "b"), MS), "twice");
        assert!(regions.views(now).is_empty());
        assert!(regions.take(now, id(11), part(2, 0, "a"), MS), "one of the first is lost");
        assert!(!regions.take(now, id(11), part(1, 0, "a"), MS), "late");
        assert!(regions.take(now, id(11), part(2, 1, "b"), MS));
        assert_eq!(only(regions.views(now)).offers.len(), 2);
    }

    #[test]
    fn of_each_figure_the_median_counts_and_of_two_the_lower() {
        let (low, high) = (offer(10, &[]), RegionOffer { kv_free: None, ..offer(30, &[]) });
        let view_of = |said: &[&RegionOffer]| {
            let view = view(said.iter().map(|offer| vec![(*offer).clone()]));
            (view.offers[0].free, view.offers[0].slots, view.offers[0].kv_free)
        };
        assert_eq!(view_of(&[&high, &low]), (10, 20, Some(0.5)));
        assert_eq!(view_of(&[&high, &low, &offer(1_000_000, &[])]), (30, 60, Some(0.5)));
        assert_eq!(view_of(&[&high, &offer(0, &[]), &high]), (30, 60, Some(0.5)));
    }

    #[test]
    fn a_model_only_one_of_several_knows_is_not_there() {
        let ghost = RegionOffer { model: Some("ghost".parse().unwrap()), ..offer(1_000, &[]) };
        let honest = || vec![offer(10, &[])];
        let offers = view([honest(), honest(), vec![ghost.clone()]]).offers;
        assert_eq!(offers, [offer(10, &[])], "nor is one only one does not know gone");
        assert!(view([honest(), vec![ghost]]).offers.is_empty());
    }

    /// Of the calls that go to the region by its candidates, the share that goes to nodes named only by the third relay,
    /// which says `lie` of a region of a hundred nodes of which the others speak the truth.
    fn drawn_by(lie: impl Fn(&RegionOffer) -> RegionOffer) -> f64 {
        let mut rng = StdRng::seed_from_u64(9);
        let now = base::clock::now();
        let (mut to_liar, mut all) = (0, 0);
        for round in 0..120 {
            let nodes: Vec<Node> =
                (0..100).map(|i| node(i, &["llama"], &[load(rng.random_range(0..64))])).collect();
            let mut digester = Digester::new("us".parse().unwrap(), 1, now);
            digester.sum(now, nodes.iter().map(Node::sample));
            let mut said = |_| digester.digests(now, &mut rng).remove(0).offers.remove(0);
            let [first, second, third] = [0, 1, 2].map(&mut said);
            let mut order = [vec![first], vec![second], vec![lie(&third)]];
            order.rotate_left(round % 3);
            let view = view(order);
            assert_eq!(view.offers[0].free, third.free, "the truth");
            let candidates = &view.offers[0].candidates;
            let sum: u32 = candidates.iter().map(|c| c.free).sum();
            for _ in 0..10 {
                let mut at = rng.random_range(0..sum);
                let picked = candidates.iter().find(|c| {
                    let is_it = at < c.free;
                    at = at.saturating_sub(c.free);
                    is_it
                });
                to_liar += u32::from(picked.unwrap().node.as_str().starts_with("evil"));
                all += 1;
            }
        }
        f64::from(to_liar) / f64::from(all)
    }

    /// A relay of three has a third of the say.
    const MOST: f64 = 1.5 / 3.0;

    #[test]
    fn a_relay_that_claims_a_million_slots_draws_nothing() {
        let evil = [("evil-0", 1_000_000), ("evil-1", 1_000_000), ("evil-2", 1_000_000)];
        let drawn = drawn_by(|_| offer(1_000_000, &evil));
        assert!(drawn < 0.01, "{drawn}");
    }

    #[test]
    fn a_relay_that_names_only_itself_draws_little() {
        for claim in [64, 1_000_000] {
            let drawn = drawn_by(|truth| RegionOffer {
                candidates: offer(1, &[("evil", claim)]).candidates,
                ..truth.clone()
            });
            assert!(drawn < 0.2, "{claim}: {drawn}");
        }
    }

    #[test]
    fn a_relay_that_names_only_its_friends_draws_at_most_half_more_than_its_share() {
        let names: Vec<_> = (0..8).map(|i| format!("evil-{i}")).collect();
        for claim in [40, 64, 1_000_000] {
            let evil: Vec<_> = names.iter().map(|name| (name.as_str(), claim)).collect();
            let drawn = drawn_by(|truth| RegionOffer {
                candidates: offer(1, &evil).candidates,
                ..truth.clone()
            });
            assert!(drawn < MOST, "{claim}: {drawn}");
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_small() {
        let now = base::clock::now();
        let mut regions = Regions::default();
        for i in 0..1_000 {
            let region = format!("r{i}").parse().unwrap();
            regions.take(now, id(11), Digest { region, ..digest(1, 1, vec![]) }, MS);
            regions.take(now, id((i % 256) as u8), digest(1, 1, vec![]), MS);
        }
        assert_eq!(regions.regions.len(), REGIONS_MAX);
        assert!(regions.regions.values().all(|region| region.voices.len() <= VOICES_MAX));
        let names: Vec<_> = (0..8).map(|i| format!("node-{i:04}")).collect();
        let eight: Vec<_> = names.iter().map(|name| (name.as_str(), 10)).collect();
        let said = vec![offer(100, &eight)];
        let mut regions = Regions::default();
        regions.take(now, id(11), digest(1, 1, said), MS);
        let kept = size_of::<Voice>() + regions.bytes;
        assert!(kept < 600, "{kept}");
        let mut wide = vec![];
        for i in 0..64 {
            let model = Some(format!("{}{i}", "m".repeat(400)).parse().unwrap());
            wide.push(RegionOffer { model, ..offer(1, &eight) });
        }
        assert!(!regions.take(now, id(12), digest(2, 1, wide.clone()), MS), "no datagram");
        assert_eq!(regions.keys.len(), 1, "what is not taken is not remembered");
        wide.truncate(10);
        let mut refused = 0;
        for i in 0..REGIONS_MAX {
            for part in 0..63 {
                let region = format!("r{i}").parse().unwrap();
                let digest = Digest { region, part: (part, 64), ..digest(2, 1, wide.clone()) };
                refused += usize::from(!regions.take(now, id(12), digest, MS));
            }
        }
        assert!(refused > 0 && regions.bytes < BYTES_MAX + PART_BYTES_MAX);
    }
}
