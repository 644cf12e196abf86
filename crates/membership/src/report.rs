//! When this node says how pressed it is: at once when something changed by more than a tenth, five times a second under
//! load, once a second when idle.

use std::time::{Duration, Instant};

use base::{Load, RegionName};
use bytes::Bytes;

use crate::{
    Frame, LoadFrame,
    wire::{ARRIVALS_MAX, encode},
};

/// Time between frames of a node that runs calls.
const ACTIVE: Duration = Duration::from_millis(200);
/// Time between frames of an idle node.
const IDLE: Duration = Duration::from_secs(1);
/// An engine that ends no more calls in a second, and runs none, is idle.
const IDLE_RATE: f64 = 0.5;
/// Frames are never closer than this.
const GAP_MIN: Duration = Duration::from_millis(50);
/// A frame goes so much earlier or later with the next look at the engines: figures are not old when they leave.
const SLACK: Duration = Duration::from_millis(25);
/// A change of this share of the slots is worth a frame.
const CHANGE: f64 = 0.1;
/// Figures older than this are not worth a frame for a new subscriber: newer ones come soon.
const FRESH: Duration = GAP_MIN;

/// Decides when a frame is due, and makes it.
#[derive(Clone, Debug)]
pub(crate) struct Reporter {
    epoch: u64,
    sequence: u64,
    descriptor_version: u32,
    last: Option<Said>,
    figures: Option<Figures>,
    draining: bool,
}

/// What was seen last.
#[derive(Clone, Debug)]
struct Figures {
    at: Instant,
    loads: Vec<Load>,
    arrivals: Vec<(RegionName, u64)>,
}

#[derive(Clone, Debug)]
struct Said {
    at: Instant,
    loads: Vec<Load>,
    draining: bool,
    next: Duration,
}

impl Reporter {
    /// A reporter of a process that is known as `epoch`.
    pub(crate) fn new(epoch: u64, descriptor_version: u32) -> Self {
        let (last, figures, draining) = (None, None, false);
        Self { epoch, sequence: 0, descriptor_version, last, figures, draining }
    }

    /// From now on the figures are of descriptor `version`, and the next frame is due at once.
    pub(crate) fn describes(&mut self, version: u32) {
        if self.descriptor_version != version {
            self.descriptor_version = version;
            self.last = None;
            self.figures = None;
        }
    }

    fn say(&mut self, now: Instant, loads: &[Load], draining: bool) -> LoadFrame {
        let next = next(loads);
        self.last = Some(Said { at: now, loads: loads.to_vec(), draining, next });
        self.make(loads, draining, next)
    }

    /// When a frame of these figures is due, and by how much that may be missed; `None`: nothing was said yet.
    fn due(&self, loads: &[Load], draining: bool) -> Option<(Instant, Duration)> {
        let last = self.last.as_ref()?;
        let is_news = draining != last.draining || changed(&last.loads, loads);
        Some(if is_news {
            (last.at + GAP_MIN, Duration::ZERO)
        } else {
            (last.at + last.next.min(next(loads)), SLACK)
        })
    }

    /// A frame now, for a subscriber that has just come. It changes nothing about when the next is due.
    fn first_frame(&mut self, loads: &[Load], draining: bool) -> LoadFrame {
        let next = self.last.as_ref().map_or(ACTIVE, |last| last.next);
        self.make(loads, draining, next)
    }

    /// The engines were looked at: loads in the order of the descriptor, attempts that came by source region.
    pub(crate) fn sampled(
        &mut self,
        now: Instant,
        loads: Vec<Load>,
        arrivals: Vec<(RegionName, u64)>,
    ) {
        self.figures = Some(Figures { at: now, loads, arrivals });
    }

    /// From now on frames say that the node takes no new calls.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
    }

    /// The frame for all `subscribers`, encoded once, if one is due. Without subscribers nothing is made.
    pub(crate) fn poll(&mut self, now: Instant, subscribers: usize) -> Option<Bytes> {
        let figures = self.figures.take_if(|_| subscribers > 0)?;
        let due = self.due(&figures.loads, self.draining);
        let is_due =
            due.is_none_or(
                |(due, slack)| {
                    if figures.at == now { now + slack >= due } else { now >= due + slack }
                },
            );
        let bytes = is_due.then(|| {
            let frame = self.say(now, &figures.loads, self.draining);
            figures.encoded(frame, now)
        });
        self.figures = Some(figures);
        bytes
    }

    /// The frame for a subscriber that has just come, encoded. `None`: the figures are too old, and `poll` makes one of the
    /// next.
    pub(crate) fn first(&mut self, now: Instant) -> Option<Bytes> {
        let is_fresh = |figures: &Figures| now.saturating_duration_since(figures.at) <= FRESH;
        let Some(figures) = self.figures.take().filter(is_fresh) else {
            self.last = None;
            return None;
        };
        let frame = self.first_frame(&figures.loads, self.draining);
        let bytes = figures.encoded(frame, now);
        self.figures = Some(figures);
        Some(bytes)
    }

    /// When [`Self::poll`] is due; `None`: nobody subscribes, or nothing was seen yet.
    pub(crate) fn next_deadline(&self, subscribers: usize) -> Option<Instant> {
        let figures = self.figures.as_ref().filter(|_| subscribers > 0)?;
        let due = self.due(&figures.loads, self.draining);
        Some(due.map_or(figures.at, |(due, slack)| due + slack))
    }

    /// How often the engines should be looked at; `None`: nobody subscribes.
    pub(crate) fn sample_interval(&self, subscribers: usize) -> Option<Duration> {
        (subscribers > 0).then_some(GAP_MIN)
    }

    fn make(&mut self, loads: &[Load], draining: bool, next: Duration) -> LoadFrame {
        self.sequence += 1;
        LoadFrame {
            epoch: self.epoch,
            sequence: self.sequence,
            descriptor_version: self.descriptor_version,
            sample_age: Duration::ZERO,
            next,
            draining,
            engines: loads.to_vec(),
            arrivals: vec![],
        }
    }
}

impl Figures {
    fn encoded(&self, frame: LoadFrame, now: Instant) -> Bytes {
        let sample_age = now.saturating_duration_since(self.at);
        let arrivals = self.arrivals.iter().take(ARRIVALS_MAX).cloned().collect();
        encode(&Frame::Load(LoadFrame { sample_age, arrivals, ..frame })).into()
    }
}

/// How long after figures like these the next frame comes at the latest.
fn next(loads: &[Load]) -> Duration {
    // One whose calls are short runs none at many a moment.
    let is_active =
        |load: &Load| load.in_flight > 0 || load.queued > 0 || load.drain_rate > IDLE_RATE;
    if loads.iter().any(is_active) { ACTIVE } else { IDLE }
}

fn changed(before: &[Load], now: &[Load]) -> bool {
    before.len() != now.len()
        || before.iter().zip(now).any(|(before, now)| {
            before.unusable != now.unusable
                || before.slots != now.slots
                || (before.utilisation() - now.utilisation()).abs() > CHANGE
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(in_flight: u32) -> [Load; 1] {
        [Load { in_flight, slots: Some(64), ..Load::default() }]
    }

    /// The engines are looked at, and a frame leaves if one is due.
    fn looked(reporter: &mut Reporter, now: Instant, loads: &[Load]) -> Option<Bytes> {
        reporter.sampled(now, loads.to_vec(), vec![]);
        reporter.poll(now, 1)
    }

    /// The milliseconds at which frames leave when `load` is looked at as often as is asked for, for five seconds.
    fn frames(load: impl Fn(u64) -> u32) -> Vec<u64> {
        let start = base::clock::now();
        let mut reporter = Reporter::new(1, 1);
        (0..5_000)
            .step_by(50)
            .filter(|ms| {
                let now = start + Duration::from_millis(*ms);
                looked(&mut reporter, now, &loads(load(*ms))).is_some()
            })
            .collect()
    }

    #[test]
    fn an_idle_node_speaks_once_a_second_and_a_busy_one_five_times() {
        assert_eq!(frames(|_| 0), [0, 1_000, 2_000, 3_000, 4_000]);
        assert_eq!(frames(|_| 30).len(), 25);
    }

    #[test]
    fn a_change_of_more_than_a_tenth_is_said_at_once_but_never_within_the_gap() {
        let jump = frames(|ms| if ms < 700 { 0 } else { 10 });
        assert_eq!(jump[..3], [0, 700, 900]);
        let small = frames(|ms| if ms < 700 { 1 } else { 6 });
        assert_eq!(small[..5], [0, 200, 400, 600, 800]);
        let wild = frames(|ms| if ms % 100 == 0 { 0 } else { 64 });
        assert!(wild.windows(2).all(|pair| pair[1] - pair[0] >= 50), "{wild:?}");
    }

    #[test]
    fn a_node_that_becomes_idle_says_so() {
        let frames = frames(|ms| if ms < 1_000 { 1 } else { 0 });
        assert!(frames.contains(&1_000) && frames.contains(&2_000), "{frames:?}");
    }

    #[test]
    fn draining_is_news_and_sequences_count_up() {
        let now = base::clock::now();
        let mut reporter = Reporter::new(9, 3);
        let first = decoded(looked(&mut reporter, now, &loads(0)));
        let later = now + GAP_MIN;
        assert!(looked(&mut reporter, later, &loads(0)).is_none());
        reporter.drain();
        let second = decoded(looked(&mut reporter, later, &loads(0)));
        assert_eq!((first.sequence, second.sequence), (1, 2));
        assert!(second.draining && second.epoch == 9 && second.descriptor_version == 3);
        assert_eq!(decoded(reporter.first(later)).sequence, 3);
    }

    fn decoded(bytes: Option<Bytes>) -> LoadFrame {
        match crate::decode(&bytes.expect("a frame")) {
            Ok(Frame::Load(frame)) => frame,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn without_subscribers_or_figures_nothing_is_made() {
        let now = base::clock::now();
        let mut reporter = Reporter::new(1, 1);
        assert_eq!((reporter.next_deadline(3), reporter.poll(now, 3)), (None, None));
        reporter.sampled(now, loads(1).into(), vec![]);
        assert_eq!((reporter.next_deadline(0), reporter.poll(now, 0)), (None, None));
        assert_eq!(
            (reporter.sample_interval(0), reporter.sample_interval(1)),
            (None, Some(GAP_MIN))
        );
        assert_eq!(decoded(reporter.poll(now, 1)).sequence, 1);
    }

    #[test]
    fn a_poll_says_what_was_seen_and_when_the_next_is_due() {
        let now = base::clock::now();
        let mut reporter = Reporter::new(1, 1);
        let arrivals = vec![("eu".parse().unwrap(), 7)];
        reporter.sampled(now, loads(1).into(), arrivals.clone());
        let frame = decoded(reporter.poll(now + Duration::from_millis(3), 2));
        assert_eq!((frame.sample_age, frame.arrivals), (Duration::from_millis(3), arrivals));
        let at = now + Duration::from_millis(3);
        assert_eq!(reporter.next_deadline(2), Some(at + ACTIVE + SLACK));
        assert_eq!(reporter.poll(at + GAP_MIN, 2), None);
        reporter.drain();
        assert_eq!(reporter.next_deadline(2), Some(at + GAP_MIN));
        assert!(decoded(reporter.poll(at + GAP_MIN, 2)).draining);
        reporter.sampled(at + GAP_MIN, loads(64).into(), vec![]);
        assert_eq!(reporter.next_deadline(2), Some(at + GAP_MIN * 2));
    }

    #[test]
    fn a_new_subscriber_gets_fresh_figures_at_once_and_old_ones_never() {
        let now = base::clock::now();
        let mut reporter = Reporter::new(1, 1);
        reporter.sampled(now, loads(1).into(), vec![]);
        reporter.poll(now, 1).unwrap();
        assert_eq!(decoded(reporter.first(now + GAP_MIN)).sequence, 2);
        assert_eq!(
            reporter.next_deadline(1),
            Some(now + ACTIVE + SLACK),
            "nothing else has changed"
        );
        let later = now + Duration::from_secs(60);
        assert_eq!(reporter.first(later), None);
        reporter.sampled(later, loads(1).into(), vec![]);
        assert_eq!(decoded(reporter.poll(later, 1)).sequence, 3);
    }

    #[test]
    fn figures_of_another_descriptor_are_not_said() {
        let now = base::clock::now();
        let mut reporter = Reporter::new(1, 1);
        reporter.sampled(now, loads(1).into(), vec![]);
        reporter.describes(2);
        assert_eq!((reporter.poll(now, 1), reporter.first(now)), (None, None));
        reporter.sampled(now, loads(1).into(), vec![]);
        assert_eq!(decoded(reporter.poll(now, 1)).descriptor_version, 2);
    }
}
