//! What an engine's own refusals say about its room, whatever its configuration claims.
//!
//! A busy answer with `n` other calls in progress says: `n` is all it can do now, but at least one: a single answer may be
//! about its call alone, such as one with too long a message. That is the ceiling until a trial shows more; each success
//! doubles it, until it no longer binds. Trials above the ceiling are made after waits that double from [`WAIT_FIRST`] to
//! [`WAIT_MAX`], or after the time the engine asked for.

use std::time::{Duration, Instant};

const WAIT_FIRST: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(5);
/// An engine that answers busy so often below this share of its slots is lying: it has no room at all, and is asked only
/// in trials, or when nobody else has room.
const LIES_MAX: u32 = 5;
const LIE_BELOW: f64 = 0.25;

/// The ceiling that one engine's busy answers put over its slots.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Pressure(Option<Pressed>);

#[derive(Clone, Copy, Debug, PartialEq)]
struct Pressed {
    ceiling: u32,
    /// When the engine last said that it is busy.
    since: Instant,
    next_trial: Instant,
    wait: Duration,
    lies: u32,
}

impl Pressure {
    /// How many calls it bears; `None`: as many as it has slots.
    pub(crate) fn ceiling(&self) -> Option<u32> {
        self.0.map(|pressed| pressed.ceiling)
    }

    /// Whether one call more than the ceiling may be tried.
    pub(crate) fn is_trial_due(&self, now: Instant) -> bool {
        self.0.is_some_and(|pressed| now >= pressed.next_trial)
    }

    /// A call above the ceiling begins.
    pub(crate) fn trial_began(&mut self, now: Instant) {
        if let Some(pressed) = &mut self.0 {
            pressed.next_trial = now + pressed.wait;
        }
    }

    /// The engine said that it is busy while `others` calls were in progress there. `asked`: how long it wants to be left
    /// alone, if it said so.
    pub(crate) fn busy(&mut self, now: Instant, others: u32, slots: u32, asked: Option<Duration>) {
        let before = self.0;
        let is_lie = f64::from(others) < LIE_BELOW * f64::from(slots);
        let lies = before.map_or(0, |pressed| pressed.lies) + u32::from(is_lie);
        // Calls that were under way together are refused together; only a later trial says that waiting was not enough.
        let is_news = before.is_none_or(|pressed| now >= pressed.since + pressed.wait);
        let wait = match before {
            _ if lies >= LIES_MAX => WAIT_MAX,
            Some(pressed) if is_news => (pressed.wait * 2).min(WAIT_MAX),
            Some(pressed) => pressed.wait,
            None => WAIT_FIRST,
        };
        let pause = asked.map_or(wait, |asked| asked.min(WAIT_MAX).max(WAIT_FIRST));
        let bears = if lies >= LIES_MAX { 0 } else { others.max(1) };
        self.0 = Some(Pressed {
            ceiling: before.map_or(bears, |pressed| pressed.ceiling.min(bears)),
            since: if is_news { now } else { before.map_or(now, |pressed| pressed.since) },
            next_trial: now + pause,
            wait,
            lies,
        });
    }

    /// A call that began at `began` went well.
    pub(crate) fn succeeded(&mut self, began: Instant, slots: u32) {
        let Some(pressed) = &mut self.0 else { return };
        // What began before the engine was busy says nothing about now.
        if began < pressed.since {
            return;
        }
        pressed.ceiling = pressed.ceiling.saturating_mul(2).max(1);
        pressed.wait = WAIT_FIRST;
        pressed.lies = 0;
        if pressed.ceiling >= slots {
            self.0 = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOTS: u32 = 64;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_busy_answer_caps_at_what_runs_and_successes_lift_the_cap() {
        let start = base::clock::now();
        let mut pressure = Pressure::default();
        pressure.busy(start, 20, SLOTS, None);
        assert_eq!(pressure.ceiling(), Some(20));
        pressure.succeeded(at(start, 0), SLOTS);
        assert_eq!(pressure.ceiling(), Some(40));
        pressure.succeeded(at(start, 1), SLOTS);
        assert_eq!(pressure.ceiling(), None);
    }

    #[test]
    fn successes_of_calls_from_before_lift_nothing() {
        let start = base::clock::now();
        let mut pressure = Pressure::default();
        pressure.busy(at(start, 10), 3, SLOTS, None);
        pressure.succeeded(start, SLOTS);
        assert_eq!(pressure.ceiling(), Some(3));
    }

    #[test]
    fn trials_of_a_busy_engine_wait_longer_and_longer_up_to_five_seconds() {
        let mut now = base::clock::now();
        let mut pressure = Pressure::default();
        pressure.busy(now, 40, SLOTS, None);
        for wait in [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
            assert!(!pressure.is_trial_due(at(now, wait - 1)), "{wait}");
            now = at(now, wait);
            assert!(pressure.is_trial_due(now), "{wait}");
            pressure.trial_began(now);
            assert!(!pressure.is_trial_due(now));
            pressure.busy(now, 40, SLOTS, None);
        }
    }

    #[test]
    fn answers_that_come_together_lengthen_the_wait_once() {
        let now = base::clock::now();
        let mut pressure = Pressure::default();
        for others in (20..64).rev() {
            pressure.busy(now, others, SLOTS, None);
        }
        assert!(pressure.is_trial_due(at(now, 100)));
        assert_eq!(pressure.ceiling(), Some(20));
    }

    #[test]
    fn an_engine_that_refuses_while_idle_gets_one_trial_in_five_seconds() {
        let now = base::clock::now();
        let mut pressure = Pressure::default();
        for answers in 1..=5 {
            pressure.busy(now, 0, SLOTS, None);
            assert_eq!(pressure.ceiling(), Some(if answers < 5 { 1 } else { 0 }));
        }
        assert!(!pressure.is_trial_due(at(now, 4_999)));
        assert!(pressure.is_trial_due(at(now, 5_000)));
        // One success ends the suspicion.
        pressure.succeeded(at(now, 5_000), SLOTS);
        pressure.busy(at(now, 6_000), 2, SLOTS, None);
        assert!(pressure.is_trial_due(at(now, 6_200)));
    }

    #[test]
    fn the_time_an_engine_asks_for_is_honoured_within_bounds() {
        let now = base::clock::now();
        for (asked, due) in [(700, 700), (1, 100), (3_600_000, 5_000)] {
            let mut pressure = Pressure::default();
            pressure.busy(now, 40, SLOTS, Some(Duration::from_millis(asked)));
            assert!(
                !pressure.is_trial_due(at(now, due - 1)) && pressure.is_trial_due(at(now, due))
            );
        }
    }
}
