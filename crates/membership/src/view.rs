//! What other nodes said of themselves, and how much of it still holds.
//!
//! Figures age: a frame says when the next will come; after twice that they count for less and less, after three times
//! that and a second they count for nothing. What this node itself sent since the figures were taken is added to them.
//! Replies carry figures too, and the newer replace the older, engine by engine. Nobody has more slots than its descriptor says.

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

/// What is known of one node. Its index is the caller's.
#[derive(Clone, Debug, Default)]
pub struct View {
    nodes: Vec<Node>,
    /// Indices of nodes that were removed.
    vacant: Vec<usize>,
}

#[derive(Clone, Debug, Default)]
struct Node {
    /// Epoch and sequence of the newest frame.
    newest: (u64, u64),
    descriptor: Option<(u64, Arc<Descriptor>)>,
    heard: Option<Heard>,
    draining: bool,
    /// Nothing came over its connections although something was due: out until it speaks again.
    cut_off: Option<Instant>,
    /// There is no way to it: out until there is one.
    unreachable: bool,
    engines: Vec<Engine>,
}

#[derive(Clone, Copy, Debug)]
struct Heard {
    at: Instant,
    next: Duration,
    /// Half the way there and back.
    one_way: Duration,
}

#[derive(Clone, Debug)]
struct Engine {
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
    /// A view of `nodes` nodes of which nothing is known.
    #[must_use]
    pub fn new(nodes: usize) -> Self {
        Self { nodes: vec![Node::default(); nodes], vacant: vec![] }
    }

    /// A node of which nothing is known yet: its index, perhaps that of one that was removed.
    pub fn add(&mut self) -> usize {
        self.vacant.pop().unwrap_or_else(|| {
            self.nodes.push(Node::default());
            self.nodes.len() - 1
        })
    }

    /// Node `index` is forgotten; its index may be given to another.
    pub fn remove(&mut self, index: usize) {
        if let Some(node) = self.nodes.get_mut(index)
            && !self.vacant.contains(&index)
        {
            *node = Node::default();
            self.vacant.push(index);
        }
    }

    /// Whether there is a way to node `index`. Without one it is silent at once.
    pub fn reachable(&mut self, index: usize, is: bool) {
        if let Some(node) = self.nodes.get_mut(index) {
            node.unreachable = !is;
        }
    }

    /// A new link to node `index` begins, to its process `epoch`. If that is another than before, all that was known is
    /// forgotten: the certificate is proof enough, whatever the clocks say.
    pub fn greet(&mut self, index: usize, epoch: u64) {
        if let Some(node) = self.nodes.get_mut(index)
            && node.newest.0 != epoch
        {
            let unreachable = node.unreachable;
            *node = Node { newest: (epoch, 0), unreachable, ..Node::default() };
        }
    }

    /// What node `index` serves, as its process `epoch` said. Returns whether that is news.
    pub fn describe(
        &mut self,
        index: usize,
        epoch: u64,
        descriptor: impl Into<Arc<Descriptor>>,
    ) -> bool {
        let descriptor = descriptor.into();
        let Some(node) = self.nodes.get_mut(index) else { return false };
        let is_older = node
            .descriptor
            .as_ref()
            .is_some_and(|(known, before)| (*known, before.version) > (epoch, descriptor.version));
        if is_older || epoch < node.newest.0 {
            return false;
        }
        // Figures go by place: where the engines are other ones, or of a new process, the old figures say nothing.
        let names = |descriptor: &Descriptor| {
            descriptor.engines.iter().map(|engine| engine.name.clone()).collect::<Vec<_>>()
        };
        let are_same = node
            .descriptor
            .as_ref()
            .is_some_and(|(known, before)| *known == epoch && names(before) == names(&descriptor));
        if !are_same {
            node.engines.clear();
        }
        node.descriptor = Some((epoch, descriptor));
        true
    }

    /// What node `index` serves.
    #[must_use]
    pub fn descriptor(&self, index: usize) -> Option<&Descriptor> {
        self.nodes.get(index)?.descriptor.as_ref().map(|(_, descriptor)| &**descriptor)
    }

    /// Which descriptor of node `index` is known, by process and version.
    #[must_use]
    pub fn described(&self, index: usize) -> Option<(u64, u32)> {
        let (epoch, descriptor) = self.nodes.get(index)?.descriptor.as_ref()?;
        Some((*epoch, descriptor.version))
    }

    /// Node `index` said how pressed it is; `rtt` is that of the way the frame came. Returns whether it was news.
    pub fn frame(&mut self, index: usize, frame: &LoadFrame, rtt: Duration, now: Instant) -> bool {
        let Some(node) = self.nodes.get_mut(index) else { return false };
        if (frame.epoch, frame.sequence) <= node.newest {
            return false;
        }
        node.newest = (frame.epoch, frame.sequence);
        let one_way = rtt / 2;
        node.heard = Some(Heard { at: now, next: frame.next, one_way });
        node.draining = frame.draining;
        node.cut_off = None;
        // Figures of a descriptor we do not hold cannot be told apart; that the node speaks still counts.
        let known = node.descriptor.as_ref().filter(|(epoch, descriptor)| {
            *epoch == frame.epoch
                && descriptor.version == frame.descriptor_version
                && descriptor.engines.len() == frame.engines.len()
        });
        let Some((_, descriptor)) = known else { return true };
        let age = frame.sample_age + one_way;
        let sampled = now.checked_sub(age).unwrap_or(now);
        let before = std::mem::take(&mut node.engines).into_iter().map(Some);
        let before = before.chain(std::iter::repeat_with(|| None));
        node.engines = frame
            .engines
            .iter()
            .zip(&descriptor.engines)
            .zip(before)
            .map(|((load, described), before)| {
                let load = within(*load, described.slots);
                let fresh = Engine { load, sampled, sends: VecDeque::new() };
                let Some(mut engine) = before else { return fresh };
                engine.sampled_at(sampled, one_way, load);
                engine
            })
            .collect();
        true
    }

    /// A reply from engine `engine` of node `index` said how pressed it is, at `now`.
    pub fn reply(&mut self, index: usize, engine: usize, load: Load, now: Instant) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        let one_way = node.heard.map_or(Duration::ZERO, |heard| heard.one_way);
        let slots = node.descriptor.as_ref().and_then(|(_, d)| d.engines.get(engine)?.slots);
        if let Some(engine) = node.engines.get_mut(engine) {
            let load = within(load, slots);
            engine.sampled_at(now.checked_sub(one_way).unwrap_or(now), one_way, load);
        }
    }

    /// Node `index` said that these of its engines have no room: so it is, until it says otherwise.
    pub fn busy(&mut self, index: usize, engines: &[usize], now: Instant) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        for engine in engines {
            let Some(engine) = node.engines.get_mut(*engine) else { continue };
            let full = Load {
                in_flight: engine.load.in_flight.max(engine.load.slots.unwrap_or(0)),
                slots: Some(engine.load.slots.unwrap_or(engine.load.in_flight)),
                ..engine.load
            };
            engine.sampled_at(now, Duration::ZERO, full);
        }
    }

    /// This node sent a call to node `index`, for the sake of its engine `engine`.
    pub fn sent(&mut self, index: usize, engine: usize, now: Instant) {
        let engine = self.nodes.get_mut(index).and_then(|node| node.engines.get_mut(engine));
        if let Some(engine) = engine {
            if engine.sends.len() >= SENDS_MAX {
                engine.sends.pop_front();
            }
            engine.sends.push_back(now);
        }
    }

    /// The call this node sent at `began` for the sake of engine `engine` of node `index` is over: it is not added to the
    /// figures any more. `counted`: it ran there, so figures taken since it arrived count it, and it is taken from them.
    pub fn ended(&mut self, index: usize, engine: usize, began: Instant, counted: bool) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        let one_way = node.heard.map_or(Duration::ZERO, |heard| heard.one_way);
        let Some(engine) = node.engines.get_mut(engine) else { return };
        if let Ok(place) = engine.sends.binary_search(&began) {
            engine.sends.remove(place);
        } else if counted && began + one_way <= engine.sampled {
            engine.load.in_flight = engine.load.in_flight.saturating_sub(1);
        }
    }

    /// Nothing came over a connection to node `index` although something was due.
    pub fn cut_off(&mut self, index: usize, now: Instant) {
        if let Some(node) = self.nodes.get_mut(index) {
            node.cut_off = Some(now);
        }
    }

    /// Whether node `index` can be sent calls.
    #[must_use]
    pub fn presence(&self, index: usize, now: Instant) -> Presence {
        let Some(node) = self.nodes.get(index) else { return Presence::Unknown };
        let Some(heard) = node.heard else { return Presence::Unknown };
        let silent_for =
            now.saturating_duration_since(heard.at).saturating_sub(heard.next * 3 + SILENT_AFTER);
        if silent_for >= FORGOTTEN_AFTER {
            Presence::Unknown
        } else if silent_for > Duration::ZERO || node.cut_off.is_some() || node.unreachable {
            Presence::Silent
        } else if node.draining {
            Presence::Draining
        } else {
            Presence::Present
        }
    }

    /// When node `index` was last heard, before `now`.
    #[must_use]
    pub fn heard(&self, index: usize, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.nodes.get(index)?.heard?.at))
    }

    /// What is known of engine `engine` of node `index`.
    #[must_use]
    pub fn seen(&self, index: usize, engine: usize, now: Instant) -> Option<Seen> {
        let node = self.nodes.get(index)?;
        let engine = node.engines.get(engine)?;
        let heard = node.heard?;
        let unseen = u32::try_from(engine.sends.len()).unwrap_or(u32::MAX);
        let age = now.saturating_duration_since(engine.sampled);
        let load = Load { in_flight: engine.load.in_flight.saturating_add(unseen), ..engine.load };
        Some(Seen { load, age, confidence: confidence(age, heard.next) })
    }
}

impl Engine {
    /// Newer figures: own sends they count already, those that had arrived by then, are forgotten.
    fn sampled_at(&mut self, sampled: Instant, one_way: Duration, load: Load) {
        if sampled < self.sampled {
            return;
        }
        self.load = load;
        self.sampled = sampled;
        while self.sends.front().is_some_and(|sent| *sent + one_way <= sampled) {
            self.sends.pop_front();
        }
    }
}

/// What an engine of so many `slots` can be believed of what it claims.
pub(crate) fn within(claimed: Load, slots: Option<u32>) -> Load {
    let Some(most) = slots else { return claimed };
    let slots = claimed.slots.unwrap_or(most).min(most);
    Load { in_flight: claimed.in_flight.min(most), slots: Some(slots), ..claimed }
}

/// 1 until twice the announced wait has passed, then falling to 0 at three times it and a second.
fn confidence(age: Duration, next: Duration) -> f64 {
    let (from, to) = (next * 2, next * 3 + SILENT_AFTER);
    let left = to.saturating_sub(age).div_duration_f64(to - from);
    left.clamp(0.0, 1.0)
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
        let mut view = View::new(1);
        assert!(view.describe(0, 1, descriptor(1)));
        assert!(view.frame(0, &frame(1, 1, 10), RTT, now));
        view
    }

    fn in_flight(view: &View, now: Instant) -> u32 {
        view.seen(0, 0, now).unwrap().load.in_flight
    }

    #[test]
    fn figures_are_as_old_as_their_sample_and_half_the_way() {
        let now = base::clock::now();
        let mut view = View::new(1);
        view.describe(0, 1, descriptor(1));
        view.frame(0, &LoadFrame { sample_age: 3 * MS, ..frame(1, 1, 10) }, RTT, now);
        assert_eq!(view.seen(0, 0, now + 20 * MS).unwrap().age, 28 * MS);
    }

    #[test]
    fn what_is_not_newer_is_dropped() {
        let now = base::clock::now();
        let mut view = view(now);
        for old in [frame(1, 1, 60), frame(1, 0, 60), frame(0, 99, 60)] {
            assert!(!view.frame(0, &old, RTT, now + MS));
        }
        assert_eq!(in_flight(&view, now + MS), 10);
        assert!(view.frame(0, &frame(1, 2, 20), RTT, now + 10 * MS));
        assert_eq!(in_flight(&view, now + 10 * MS), 20);
    }

    #[test]
    fn a_restarted_node_counts_anew_and_its_old_frames_are_dropped() {
        let now = base::clock::now();
        let mut view = view(now);
        assert!(view.describe(0, 2, descriptor(2)));
        assert_eq!(view.seen(0, 0, now), None, "figures of the old process are forgotten");
        let two = LoadFrame { engines: vec![load(1), load(2)], ..frame(2, 1, 0) };
        assert!(view.frame(0, &two, RTT, now + MS));
        assert_eq!(view.seen(0, 1, now + MS).unwrap().load.in_flight, 2);
        assert!(!view.frame(0, &frame(1, 500, 60), RTT, now + MS));
        assert!(!view.describe(0, 1, descriptor(1)));
    }

    #[test]
    fn own_sends_count_until_figures_taken_after_them_come() {
        let now = base::clock::now();
        let mut view = view(now);
        for i in 0..5 {
            view.sent(0, 0, now + i * 10 * MS);
        }
        assert_eq!(in_flight(&view, now + 50 * MS), 15);
        // Taken at 25 ms: it counts the sends of 0, 10 and 20 ms, which take 5 ms.
        view.frame(0, &frame(1, 2, 13), RTT, now + 30 * MS);
        assert_eq!(in_flight(&view, now + 50 * MS), 15);
        view.frame(0, &frame(1, 3, 15), RTT, now + 100 * MS);
        assert_eq!(in_flight(&view, now + 100 * MS), 15);
    }

    #[test]
    fn own_sends_that_have_ended_count_no_more() {
        let now = base::clock::now();
        let mut view = view(now);
        for i in 0..5 {
            view.sent(0, 0, now + i * MS);
        }
        for i in [3, 1] {
            view.ended(0, 0, now + i * MS, true);
        }
        assert_eq!(in_flight(&view, now + 9 * MS), 13);
    }

    #[test]
    fn own_calls_the_figures_count_are_taken_from_them_when_they_end() {
        let now = base::clock::now();
        let mut view = view(now);
        view.sent(0, 0, now + MS);
        // Taken at 25 ms, when the call was there.
        view.frame(0, &frame(1, 2, 11), RTT, now + 30 * MS);
        assert_eq!(in_flight(&view, now + 30 * MS), 11);
        view.ended(0, 0, now + MS, true);
        assert_eq!(in_flight(&view, now + 40 * MS), 10);
        // The figures a reply brings do not count its own call.
        view.sent(0, 0, now + 50 * MS);
        view.reply(0, 0, load(10), now + 70 * MS);
        view.ended(0, 0, now + 50 * MS, false);
        assert_eq!(in_flight(&view, now + 70 * MS), 10);
    }

    #[test]
    fn replies_replace_older_figures_and_older_frames_replace_no_reply() {
        let now = base::clock::now();
        let mut view = view(now);
        // Sent 3 ms before the reply comes: it cannot count that yet.
        view.sent(0, 0, now + 17 * MS);
        view.reply(0, 0, load(30), now + 20 * MS);
        assert_eq!(in_flight(&view, now + 20 * MS), 31);
        view.reply(0, 0, load(30), now + 30 * MS);
        assert_eq!(in_flight(&view, now + 30 * MS), 30);
        let old = LoadFrame { sample_age: 50 * MS, ..frame(1, 2, 5) };
        view.frame(0, &old, RTT, now + 35 * MS);
        assert_eq!(in_flight(&view, now + 35 * MS), 30);
    }

    #[test]
    fn a_busy_answer_means_no_room_until_the_next_figures() {
        let now = base::clock::now();
        let mut view = view(now);
        view.busy(0, &[0], now + MS);
        assert_eq!(view.seen(0, 0, now + MS).unwrap().load.free(), 0);
        view.frame(0, &frame(1, 2, 50), RTT, now + 50 * MS);
        assert_eq!(view.seen(0, 0, now + 50 * MS).unwrap().load.free(), 14);
    }

    #[test]
    fn figures_count_less_with_age_and_silence_makes_a_node_unusable() {
        let now = base::clock::now();
        let view = view(now);
        for (ms, want) in [(0, 1.0), (390, 1.0), (995, 0.5), (1_595, 0.0), (9_000, 0.0)] {
            let confidence = view.seen(0, 0, now + ms * MS).unwrap().confidence;
            assert!((confidence - want).abs() < 0.01, "{ms}: {confidence}");
        }
        for (ms, want) in [
            (1_600, Presence::Present),
            (1_601, Presence::Silent),
            (11_599, Presence::Silent),
            (11_600, Presence::Unknown),
        ] {
            assert_eq!(view.presence(0, now + ms * MS), want, "{ms}");
        }
    }

    #[test]
    fn a_node_cut_off_is_silent_until_it_speaks() {
        let now = base::clock::now();
        let mut view = view(now);
        view.cut_off(0, now + MS);
        assert_eq!(view.presence(0, now + MS), Presence::Silent);
        view.frame(0, &frame(1, 2, 1), RTT, now + 2 * MS);
        assert_eq!(view.presence(0, now + 2 * MS), Presence::Present);
    }

    #[test]
    fn a_node_whose_clock_went_back_is_believed_on_a_new_link() {
        let now = base::clock::now();
        let mut view = View::new(1);
        view.describe(0, 100, descriptor(1));
        view.frame(0, &frame(100, 7, 10), RTT, now);
        view.greet(0, 100);
        assert_eq!(in_flight(&view, now), 10, "the same process");
        view.greet(0, 50);
        assert_eq!(view.presence(0, now), Presence::Unknown);
        assert!(view.describe(0, 50, descriptor(1)));
        assert!(view.frame(0, &frame(50, 1, 3), RTT, now));
        assert_eq!(in_flight(&view, now), 3);
    }

    #[test]
    fn draining_is_said_and_heard() {
        let now = base::clock::now();
        let mut view = view(now);
        view.frame(0, &LoadFrame { draining: true, ..frame(1, 2, 1) }, RTT, now);
        assert_eq!(view.presence(0, now), Presence::Draining);
    }

    #[test]
    fn figures_outlive_a_descriptor_of_the_same_engines() {
        let now = base::clock::now();
        let mut view = view(now);
        let mut services = descriptor(1);
        services.version = 2;
        services.engines[0].services.push("p.S".into());
        assert!(view.describe(0, 1, services));
        assert_eq!((in_flight(&view, now), view.described(0)), (10, Some((1, 2))));
        assert!(view.describe(0, 1, Descriptor { version: 3, ..descriptor(2) }));
        assert_eq!(view.seen(0, 0, now), None, "other engines");
    }

    #[test]
    fn frames_of_an_unknown_descriptor_show_life_but_no_figures() {
        let now = base::clock::now();
        let mut view = View::new(1);
        assert!(view.frame(0, &frame(1, 1, 1), RTT, now));
        assert_eq!(view.presence(0, now), Presence::Present);
        assert_eq!(view.seen(0, 0, now), None);
        assert_eq!(View::new(1).presence(0, now), Presence::Unknown);
    }

    #[test]
    fn sends_are_remembered_within_a_bound() {
        let now = base::clock::now();
        let mut view = view(now);
        for _ in 0..100_000 {
            view.sent(0, 0, now + MS);
        }
        assert_eq!(view.nodes[0].engines[0].sends.len(), SENDS_MAX);
    }

    #[test]
    fn nodes_come_and_go_and_nothing_of_one_is_left_to_the_next() {
        let now = base::clock::now();
        let mut view = view(now);
        assert_eq!((view.add(), view.add()), (1, 2));
        view.remove(0);
        view.remove(0);
        view.remove(99);
        assert_eq!(view.presence(0, now), Presence::Unknown);
        assert_eq!((view.add(), view.add()), (0, 3));
        assert_eq!((view.described(0), view.heard(0, now)), (None, None));
        assert!(view.describe(0, 1, descriptor(1)) && view.frame(0, &frame(1, 1, 5), RTT, now));
        assert_eq!(in_flight(&view, now), 5);
    }

    #[test]
    fn a_node_that_cannot_be_reached_is_silent_whatever_it_said() {
        let now = base::clock::now();
        let mut view = view(now);
        view.reachable(0, false);
        assert_eq!(view.presence(0, now), Presence::Silent);
        view.frame(0, &frame(1, 2, 1), RTT, now + MS);
        assert_eq!(view.presence(0, now + MS), Presence::Silent);
        view.reachable(0, true);
        assert_eq!(view.presence(0, now + MS), Presence::Present);
    }

    #[test]
    fn nobody_has_more_slots_than_its_descriptor_says() {
        let now = base::clock::now();
        let mut view = View::new(1);
        let mut eight = descriptor(1);
        eight.engines[0].slots = Some(8);
        view.describe(0, 1, Arc::new(eight));
        view.frame(0, &frame(1, 1, 2), RTT, now);
        let seen = |view: &View| view.seen(0, 0, now).unwrap().load;
        assert_eq!((seen(&view).slots, seen(&view).free()), (Some(8), 6));
        view.reply(0, 0, Load { in_flight: 100, slots: None, ..Load::default() }, now + RTT);
        assert_eq!((seen(&view).slots, seen(&view).in_flight), (Some(8), 8));
    }
}
