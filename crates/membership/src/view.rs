//! What another node said of itself, and how much of it still holds.
//!
//! Figures age: a frame says when the next will come; after twice that they count for less and less, after three times
//! that and a second they count for nothing. What this node itself sent since the figures were taken is added to them.
//! Replies carry figures too, and the newer replace the older, engine by engine.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use base::Load;

use crate::{Descriptor, LoadFrame};

/// A node whose last frame is older than three times the announced wait and this is silent.
const SILENT_AFTER: Duration = Duration::from_secs(1);
/// A silent node is unknown rather than gone after this: its data port may work although its gossip port does not.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);
/// Own sends remembered per engine; older ones are forgotten first.
const SENDS_MAX: usize = 4096;

/// What one node said of itself.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Epoch and sequence of the newest frame.
    newest: (u64, u64),
    descriptor: Option<(u64, Arc<Descriptor>)>,
    heard: Option<Heard>,
    draining: bool,
    /// Nothing came over its connections although something was due: out until it speaks again.
    cut_off: Option<Instant>,
    engines: Vec<Figures>,
    /// The newest frame, when it came, while it is of a descriptor that has not come.
    early: Option<Box<(LoadFrame, Instant)>>,
}

#[derive(Clone, Copy, Debug)]
struct Heard {
    at: Instant,
    next: Duration,
    /// Half the way there and back.
    one_way: Duration,
}

/// The figures of one engine as of a moment, and what this node sent there since.
#[derive(Clone, Debug)]
pub struct Figures {
    load: Load,
    sampled: Instant,
    /// When this node sent calls there that the figures may not count yet, oldest first.
    sends: VecDeque<Instant>,
}

/// What is known of one engine of another node, now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// The figures, own sends since then included.
    pub load: Load,
    /// How old they are.
    pub age: Duration,
    /// How much they still count, 0 to 1.
    pub confidence: f64,
}

/// What is known of a node as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It speaks.
    Present,
    /// It takes no new calls.
    Draining,
    /// It spoke and does not any more.
    Silent,
    /// It has never spoken, or not for long.
    Unknown,
}

impl View {
    /// It is known now to be process `epoch`. If that is another than before, all that was known is forgotten: who says so is
    /// believed, whatever the clocks say.
    pub fn greet(&mut self, epoch: u64) {
        if self.newest.0 != epoch {
            *self = Self { newest: (epoch, 0), ..Self::default() };
        }
    }

    /// What the node serves, as its process `epoch` said. Returns whether that is news.
    pub fn describe(&mut self, epoch: u64, descriptor: Arc<Descriptor>) -> bool {
        let is_older = self
            .descriptor
            .as_ref()
            .is_some_and(|(known, before)| (*known, before.version) > (epoch, descriptor.version));
        if is_older || epoch < self.newest.0 {
            return false;
        }
        // Figures go by place: where the engines are other ones, or of a new process, the old figures say nothing.
        let names = |descriptor: &Descriptor| {
            descriptor.engines.iter().map(|engine| engine.name.clone()).collect::<Vec<_>>()
        };
        let are_same = self
            .descriptor
            .as_ref()
            .is_some_and(|(known, before)| *known == epoch && names(before) == names(&descriptor));
        if !are_same {
            self.engines.clear();
        }
        self.descriptor = Some((epoch, descriptor));
        if let Some(early) = self.early.take() {
            self.take(&early.0, early.1);
        }
        true
    }

    /// What the node serves.
    #[must_use]
    pub fn descriptor(&self) -> Option<&Arc<Descriptor>> {
        self.descriptor.as_ref().map(|(_, descriptor)| descriptor)
    }

    /// Which descriptor of the node is known, by process and version.
    #[must_use]
    pub fn described(&self) -> Option<(u64, u32)> {
        let (epoch, descriptor) = self.descriptor.as_ref()?;
        Some((*epoch, descriptor.version))
    }

    /// The node said how pressed it is; `rtt` is that of the way the frame came. Returns whether it was news.
    pub fn frame(&mut self, frame: &LoadFrame, rtt: Duration, now: Instant) -> bool {
        if (frame.epoch, frame.sequence) <= self.newest {
            return false;
        }
        self.newest = (frame.epoch, frame.sequence);
        let one_way = rtt / 2;
        self.heard = Some(Heard { at: now, next: frame.next, one_way });
        self.draining = frame.draining;
        self.cut_off = None;
        self.take(frame, now);
        true
    }

    /// Takes the figures of a frame that came at `at`. Those of a descriptor we do not hold cannot be told apart: they wait for it.
    fn take(&mut self, frame: &LoadFrame, at: Instant) {
        self.early = None;
        let one_way = self.one_way();
        let known = self.descriptor.as_ref().filter(|(epoch, descriptor)| {
            *epoch == frame.epoch
                && descriptor.version == frame.descriptor_version
                && descriptor.engines.len() == frame.engines.len()
        });
        let Some((_, descriptor)) = known else {
            self.early = Some(Box::new((frame.clone(), at)));
            return;
        };
        let age = frame.sample_age + one_way;
        let sampled = at.checked_sub(age).unwrap_or(at);
        let before = std::mem::take(&mut self.engines).into_iter().map(Some);
        let before = before.chain(std::iter::repeat_with(|| None));
        self.engines = frame
            .engines
            .iter()
            .zip(&descriptor.engines)
            .zip(before)
            .map(|((load, described), before)| {
                let load = within(*load, described.slots);
                let Some(mut figures) = before else { return Figures::new(load, sampled) };
                figures.sampled_at(sampled, one_way, load);
                figures
            })
            .collect();
    }

    /// A reply from engine `engine` said how pressed it is, at `now`.
    pub fn reply(&mut self, engine: usize, load: Load, now: Instant) {
        let one_way = self.one_way();
        let slots = self.descriptor.as_ref().and_then(|(_, d)| d.engines.get(engine)?.slots);
        if let Some(figures) = self.engines.get_mut(engine) {
            let load = within(load, slots);
            figures.sampled_at(now.checked_sub(one_way).unwrap_or(now), one_way, load);
        }
    }

    /// The figures of one engine, as far as they are known.
    pub fn figures(&mut self, engine: usize) -> Option<&mut Figures> {
        self.engines.get_mut(engine)
    }

    /// Half the way to the node and back, as far as it is known.
    #[must_use]
    pub fn one_way(&self) -> Duration {
        self.heard.map_or(Duration::ZERO, |heard| heard.one_way)
    }

    /// Nothing came over a connection to the node although something was due.
    pub fn cut_off(&mut self, now: Instant) {
        self.cut_off = Some(now);
    }

    /// Whether the node can be sent calls.
    #[must_use]
    pub fn presence(&self, now: Instant) -> Presence {
        let Some(heard) = self.heard else { return Presence::Unknown };
        let silent_for =
            now.saturating_duration_since(heard.at).saturating_sub(gone_at(heard.next));
        if silent_for >= FORGOTTEN_AFTER {
            Presence::Unknown
        } else if silent_for > Duration::ZERO || self.cut_off.is_some() {
            Presence::Silent
        } else if self.draining {
            Presence::Draining
        } else {
            Presence::Present
        }
    }

    /// When the node was last heard.
    #[must_use]
    pub fn heard(&self) -> Option<Instant> {
        Some(self.heard?.at)
    }

    /// What is known of engine `engine`.
    #[must_use]
    pub fn seen(&self, engine: usize, now: Instant) -> Option<Seen> {
        let (figures, heard) = (self.engines.get(engine)?, self.heard?);
        // Until twice the announced wait has passed, then less, and nothing at three times it and a second.
        Some(figures.seen(now, heard.next * 2, gone_at(heard.next)))
    }
}

impl Figures {
    /// Figures taken at `sampled`.
    #[must_use]
    pub fn new(load: Load, sampled: Instant) -> Self {
        Self { load, sampled, sends: VecDeque::new() }
    }

    /// When they were taken.
    #[must_use]
    pub fn sampled(&self) -> Instant {
        self.sampled
    }

    /// Newer figures: own sends they count already, those that had arrived by then, are forgotten. Older ones change nothing.
    pub fn sampled_at(&mut self, sampled: Instant, one_way: Duration, load: Load) {
        if sampled < self.sampled {
            return;
        }
        self.load = load;
        self.sampled = sampled;
        while self.sends.front().is_some_and(|sent| *sent + one_way <= sampled) {
            self.sends.pop_front();
        }
    }

    /// The node said that the engine has no room: so it is, until it says otherwise.
    pub fn busy(&mut self, now: Instant) {
        let full = Load {
            in_flight: self.load.in_flight.max(self.load.slots.unwrap_or(0)),
            slots: Some(self.load.slots.unwrap_or(self.load.in_flight)),
            ..self.load
        };
        self.sampled_at(now, Duration::ZERO, full);
    }

    /// This node sent a call there, for the sake of this engine.
    pub fn sent(&mut self, now: Instant) {
        if self.sends.len() >= SENDS_MAX {
            self.sends.pop_front();
        }
        self.sends.push_back(now);
    }

    /// The call this node sent at `began` is over: it is not added to the figures any more. `counted`: it ran there, so figures
    /// taken since it arrived count it, and it is taken from them.
    pub fn ended(&mut self, began: Instant, one_way: Duration, counted: bool) {
        if let Ok(place) = self.sends.binary_search(&began) {
            self.sends.remove(place);
        } else if counted && began + one_way <= self.sampled {
            self.load.in_flight = self.load.in_flight.saturating_sub(1);
        }
    }

    /// What they say now, own sends added. They count in full until they are `full_until` old, then less and less, and nothing at
    /// `gone_at`.
    #[must_use]
    pub fn seen(&self, now: Instant, full_until: Duration, gone_at: Duration) -> Seen {
        let unseen = u32::try_from(self.sends.len()).unwrap_or(u32::MAX);
        let age = now.saturating_duration_since(self.sampled);
        let load = Load { in_flight: self.load.in_flight.saturating_add(unseen), ..self.load };
        let left = gone_at.saturating_sub(age).div_duration_f64(gone_at.saturating_sub(full_until));
        Seen { load, age, confidence: left.clamp(0.0, 1.0) }
    }
}

/// How old figures are that count for nothing, after a frame that said the next comes within `next`.
pub(crate) fn gone_at(next: Duration) -> Duration {
    next * 3 + SILENT_AFTER
}

/// What an engine of so many `slots` can be believed of what it claims.
pub(crate) fn within(claimed: Load, slots: Option<u32>) -> Load {
    let Some(most) = slots else { return claimed };
    let slots = claimed.slots.unwrap_or(most).min(most);
    Load { in_flight: claimed.in_flight.min(most), slots: Some(slots), ..claimed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EngineDescriptor;

    const MS: Duration = Duration::from_millis(1);
    const RTT: Duration = Duration::from_millis(10);

    fn descriptor(engines: usize) -> Descriptor {
        let engine = |i: usize| EngineDescriptor {
            name: format!("gpu-{i}").parse().unwrap(),
            protocol: "kserve-v2".into(),
            models: vec![],
            services: vec![],
            id: None,
            slots: None,
        };
        Descriptor { version: 1, engines: (0..engines).map(engine).collect() }
    }

    fn load(in_flight: u32) -> Load {
        Load { in_flight, slots: Some(64), ..Load::default() }
    }

    fn frame(epoch: u64, sequence: u64, in_flight: u32) -> LoadFrame {
        LoadFrame {
            epoch,
            sequence,
            descriptor_version: 1,
            sample_age: Duration::ZERO,
            next: 200 * MS,
            draining: false,
            engines: vec![load(in_flight)],
            arrivals: vec![],
        }
    }

    fn view(now: Instant) -> View {
        let mut view = View::default();
        assert!(view.describe(1, descriptor(1).into()));
        assert!(view.frame(&frame(1, 1, 10), RTT, now));
        view
    }

    fn ended(view: &mut View, began: Instant, counted: bool) {
        let one_way = view.one_way();
        view.figures(0).unwrap().ended(began, one_way, counted);
    }

    fn in_flight(view: &View, now: Instant) -> u32 {
        view.seen(0, now).unwrap().load.in_flight
    }

    #[test]
    fn figures_that_come_before_the_descriptor_wait_for_it() {
        let now = base::clock::now();
        let mut view = View::default();
        assert!(view.frame(&frame(1, 1, 7), RTT, now));
        assert!(view.seen(0, now).is_none());
        assert!(view.describe(1, descriptor(1).into()));
        let seen = view.seen(0, now + 10 * MS).unwrap();
        assert_eq!((seen.load.in_flight, seen.age), (7, 15 * MS));
    }

    #[test]
    fn figures_are_as_old_as_their_sample_and_half_the_way() {
        let now = base::clock::now();
        let mut view = View::default();
        view.describe(1, descriptor(1).into());
        view.frame(&LoadFrame { sample_age: 3 * MS, ..frame(1, 1, 10) }, RTT, now);
        assert_eq!(view.seen(0, now + 20 * MS).unwrap().age, 28 * MS);
    }

    #[test]
    fn what_is_not_newer_is_dropped() {
        let now = base::clock::now();
        let mut view = view(now);
        for old in [frame(1, 1, 60), frame(1, 0, 60), frame(0, 99, 60)] {
            assert!(!view.frame(&old, RTT, now + MS));
        }
        assert_eq!(in_flight(&view, now + MS), 10);
        assert!(view.frame(&frame(1, 2, 20), RTT, now + 10 * MS));
        assert_eq!(in_flight(&view, now + 10 * MS), 20);
    }

    #[test]
    fn a_restarted_node_counts_anew_and_its_old_frames_are_dropped() {
        let now = base::clock::now();
        let mut view = view(now);
        assert!(view.describe(2, descriptor(2).into()));
        assert_eq!(view.seen(0, now), None, "figures of the old process are forgotten");
        let two = LoadFrame { engines: vec![load(1), load(2)], ..frame(2, 1, 0) };
        assert!(view.frame(&two, RTT, now + MS));
        assert_eq!(view.seen(1, now + MS).unwrap().load.in_flight, 2);
        assert!(!view.frame(&frame(1, 500, 60), RTT, now + MS));
        assert!(!view.describe(1, descriptor(1).into()));
    }

    #[test]
    fn own_sends_count_until_figures_taken_after_them_come() {
        let now = base::clock::now();
        let mut view = view(now);
        for i in 0..5 {
            view.figures(0).unwrap().sent(now + i * 10 * MS);
        }
        assert_eq!(in_flight(&view, now + 50 * MS), 15);
        // Taken at 25 ms: it counts the sends of 0, 10 and 20 ms, which take 5 ms.
        view.frame(&frame(1, 2, 13), RTT, now + 30 * MS);
        assert_eq!(in_flight(&view, now + 50 * MS), 15);
        view.frame(&frame(1, 3, 15), RTT, now + 100 * MS);
        assert_eq!(in_flight(&view, now + 100 * MS), 15);
    }

    #[test]
    fn own_sends_that_have_ended_count_no_more() {
        let now = base::clock::now();
        let mut view = view(now);
        for i in 0..5 {
            view.figures(0).unwrap().sent(now + i * MS);
        }
        for i in [3, 1] {
            ended(&mut view, now + i * MS, true);
        }
        assert_eq!(in_flight(&view, now + 9 * MS), 13);
    }

    #[test]
    fn own_calls_the_figures_count_are_taken_from_them_when_they_end() {
        let now = base::clock::now();
        let mut view = view(now);
        view.figures(0).unwrap().sent(now + MS);
        // Taken at 25 ms, when the call was there.
        view.frame(&frame(1, 2, 11), RTT, now + 30 * MS);
        assert_eq!(in_flight(&view, now + 30 * MS), 11);
        ended(&mut view, now + MS, true);
        assert_eq!(in_flight(&view, now + 40 * MS), 10);
        // The figures a reply brings do not count its own call.
        view.figures(0).unwrap().sent(now + 50 * MS);
        view.reply(0, load(10), now + 70 * MS);
        ended(&mut view, now + 50 * MS, false);
        assert_eq!(in_flight(&view, now + 70 * MS), 10);
    }

    #[test]
    fn replies_replace_older_figures_and_older_frames_replace_no_reply() {
        let now = base::clock::now();
        let mut view = view(now);
        // Sent 3 ms before the reply comes: it cannot count that yet.
        view.figures(0).unwrap().sent(now + 17 * MS);
        view.reply(0, load(30), now + 20 * MS);
        assert_eq!(in_flight(&view, now + 20 * MS), 31);
        view.reply(0, load(30), now + 30 * MS);
        assert_eq!(in_flight(&view, now + 30 * MS), 30);
        let old = LoadFrame { sample_age: 50 * MS, ..frame(1, 2, 5) };
        view.frame(&old, RTT, now + 35 * MS);
        assert_eq!(in_flight(&view, now + 35 * MS), 30);
    }

    #[test]
    fn a_busy_answer_means_no_room_until_the_next_figures() {
        let now = base::clock::now();
        let mut view = view(now);
        view.figures(0).unwrap().busy(now + MS);
        assert_eq!(view.seen(0, now + MS).unwrap().load.free(), 0);
        view.frame(&frame(1, 2, 50), RTT, now + 50 * MS);
        assert_eq!(view.seen(0, now + 50 * MS).unwrap().load.free(), 14);
    }

    #[test]
    fn figures_count_less_with_age_and_silence_makes_a_node_unusable() {
        let now = base::clock::now();
        let view = view(now);
        for (ms, want) in [(0, 1.0), (390, 1.0), (995, 0.5), (1_595, 0.0), (9_000, 0.0)] {
            let confidence = view.seen(0, now + ms * MS).unwrap().confidence;
            assert!((confidence - want).abs() < 0.01, "{ms}: {confidence}");
        }
        for (ms, want) in [
            (1_600, Presence::Present),
            (1_601, Presence::Silent),
            (11_599, Presence::Silent),
            (11_600, Presence::Unknown),
        ] {
            assert_eq!(view.presence(now + ms * MS), want, "{ms}");
        }
    }

    #[test]
    fn a_node_cut_off_is_silent_until_it_speaks() {
        let now = base::clock::now();
        let mut view = view(now);
        view.cut_off(now + MS);
        assert_eq!(view.presence(now + MS), Presence::Silent);
        view.frame(&frame(1, 2, 1), RTT, now + 2 * MS);
        assert_eq!(view.presence(now + 2 * MS), Presence::Present);
    }

    #[test]
    fn a_node_whose_clock_went_back_is_believed_on_a_new_link() {
        let now = base::clock::now();
        let mut view = View::default();
        view.describe(100, descriptor(1).into());
        view.frame(&frame(100, 7, 10), RTT, now);
        view.greet(100);
        assert_eq!(in_flight(&view, now), 10, "the same process");
        view.greet(50);
        assert_eq!(view.presence(now), Presence::Unknown);
        assert!(view.describe(50, descriptor(1).into()));
        assert!(view.frame(&frame(50, 1, 3), RTT, now));
        assert_eq!(in_flight(&view, now), 3);
    }

    #[test]
    fn draining_is_said_and_heard() {
        let now = base::clock::now();
        let mut view = view(now);
        view.frame(&LoadFrame { draining: true, ..frame(1, 2, 1) }, RTT, now);
        assert_eq!(view.presence(now), Presence::Draining);
    }

    #[test]
    fn figures_outlive_a_descriptor_of_the_same_engines() {
        let now = base::clock::now();
        let mut view = view(now);
        let mut services = descriptor(1);
        services.version = 2;
        services.engines[0].services.push("p.S".into());
        assert!(view.describe(1, services.into()));
        assert_eq!((in_flight(&view, now), view.described()), (10, Some((1, 2))));
        assert!(view.describe(1, Descriptor { version: 3, ..descriptor(2) }.into()));
        assert_eq!(view.seen(0, now), None, "other engines");
    }

    #[test]
    fn frames_of_an_unknown_descriptor_show_life_but_no_figures() {
        let now = base::clock::now();
        let mut view = View::default();
        assert!(view.frame(&frame(1, 1, 1), RTT, now));
        assert_eq!(view.presence(now), Presence::Present);
        assert_eq!(view.seen(0, now), None);
        assert_eq!(View::default().presence(now), Presence::Unknown);
    }

    #[test]
    fn sends_are_remembered_within_a_bound() {
        let now = base::clock::now();
        let mut view = view(now);
        for _ in 0..100_000 {
            view.figures(0).unwrap().sent(now + MS);
        }
        assert_eq!(view.engines[0].sends.len(), SENDS_MAX);
    }
}
