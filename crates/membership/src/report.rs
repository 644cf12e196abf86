//! When this node says how pressed it is: at once when something changed by more than a tenth, five times a second under
//! load, once a second when idle.

use std::time::{Duration, Instant};

use base::{Load, RegionName};
use bytes::Bytes;

use crate::LoadFrame;

/// Time between frames of a node that runs calls.
const ACTIVE: Duration = Duration::from_millis(200);
/// Time between frames of an idle node.
const IDLE: Duration = Duration::from_secs(1);
/// Frames are never closer than this.
const GAP_MIN: Duration = Duration::from_millis(50);
/// A change of this share of the slots is worth a frame.
const CHANGE: f64 = 0.1;

/// Decides when a frame is due, and makes it.
#[derive(Clone, Debug)]
pub struct Reporter {
    epoch: u64,
    sequence: u64,
    descriptor_version: u32,
    last: Option<Said>,
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
    #[must_use]
    pub fn new(epoch: u64, descriptor_version: u32) -> Self {
        Self { epoch, sequence: 0, descriptor_version, last: None }
    }

    /// From now on the figures are of descriptor `version`, and the next frame is due at once.
    pub fn describes(&mut self, version: u32) {
        if self.descriptor_version != version {
            self.descriptor_version = version;
            self.last = None;
        }
    }

    /// How long until the loads should be looked at again.
    #[must_use]
    pub fn interval(&self) -> Duration {
        GAP_MIN
    }

    /// A frame, if one is due.
    pub fn frame(&mut self, now: Instant, loads: &[Load], draining: bool) -> Option<LoadFrame> {
        let is_active = loads.iter().any(|load| load.in_flight > 0 || load.queued > 0);
        let next = if is_active { ACTIVE } else { IDLE };
        if let Some(last) = &self.last {
            let passed = now.saturating_duration_since(last.at);
            let is_due = passed >= last.next.min(next);
            let is_news = draining != last.draining || changed(&last.loads, loads);
            if passed < GAP_MIN || !(is_due || is_news) {
                return None;
            }
        }
        self.last = Some(Said { at: now, loads: loads.to_vec(), draining, next });
        Some(self.make(loads, draining, next))
    }

    /// A frame now, for a subscriber that has just come. It changes nothing about when the next is due.
    pub fn first_frame(&mut self, loads: &[Load], draining: bool) -> LoadFrame {
        let next = self.last.as_ref().map_or(ACTIVE, |last| last.next);
        self.make(loads, draining, next)
    }

    /// The engines were looked at: loads in the order of the descriptor, attempts that came by source region.
    pub fn sampled(&mut self, now: Instant, loads: Vec<Load>, arrivals: Vec<(RegionName, u64)>) {
        drop((now, loads, arrivals));
    }

    /// From now on frames say that the node takes no new calls.
    pub fn drain(&mut self) {}

    /// The frame for all `subscribers`, encoded once, if one is due. Without subscribers nothing is made.
    pub fn poll(&mut self, now: Instant, subscribers: usize) -> Option<Bytes> {
        let _ = (now, subscribers);
        None
    }

    /// The frame for a subscriber that has just come, encoded. `None`: the figures are too old, and `poll` has one soon.
    pub fn first(&mut self, now: Instant) -> Option<Bytes> {
        let _ = now;
        None
    }

    /// When [`Self::poll`] is due; `None`: nobody subscribes.
    #[must_use]
    pub fn next_deadline(&self, subscribers: usize) -> Option<Instant> {
        let _ = subscribers;
        None
    }

    /// How often the engines should be looked at; `None`: nobody subscribes.
    #[must_use]
    pub fn sample_interval(&self, subscribers: usize) -> Option<Duration> {
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

    /// The milliseconds at which frames leave when `load` is looked at every 10 ms for five seconds.
    fn frames(load: impl Fn(u64) -> u32) -> Vec<u64> {
        let start = base::clock::now();
        let mut reporter = Reporter::new(1, 1);
        (0..5_000)
            .step_by(10)
            .filter(|ms| {
                let now = start + Duration::from_millis(*ms);
                reporter.frame(now, &loads(load(*ms)), false).is_some()
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
        let wild = frames(|ms| if ms % 20 == 0 { 0 } else { 64 });
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
        let first = reporter.frame(now, &loads(0), false).unwrap();
        let later = now + GAP_MIN;
        assert!(reporter.frame(later, &loads(0), false).is_none());
        let second = reporter.frame(later, &loads(0), true).unwrap();
        assert_eq!((first.sequence, second.sequence), (1, 2));
        assert!(second.draining && second.epoch == 9 && second.descriptor_version == 3);
        assert_eq!(reporter.first_frame(&loads(0), true).sequence, 3);
    }
}
