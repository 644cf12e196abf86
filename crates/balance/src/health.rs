//! Whether an engine passes its health checks, and when the next one is due.
//!
//! ```text
//!  unproven ── a check fails ──> absent
//!      │                           │
//!      └────── a check passes ─────┴──> up ── `failures` in a row ──> down ── `successes` in a row ──> up
//! ```
//!
//! An engine is sent calls before its first check: a node that starts under load would otherwise refuse what it could do.
//! One that has never passed is looked for more often and returns with its first passed check: it is probably starting.

use std::time::{Duration, Instant};

use rand::{Rng, RngExt as _};

/// Checks are spread by this share of their interval, so that nodes started together do not check together.
const JITTER: f64 = 0.1;
/// The first check comes within this, or within the interval if that is shorter.
const FIRST_WITHIN: Duration = Duration::from_millis(500);

/// An engine that has never passed is checked at least this often.
const ABSENT_INTERVAL: Duration = Duration::from_secs(1);

/// When an engine counts as faulty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthConfig {
    /// Time between checks. Default 10 s.
    pub interval: Duration,
    /// A check that takes longer has failed. Default 2 s.
    pub timeout: Duration,
    /// Failed checks in a row after which the engine leaves. Default 3.
    pub failures: u32,
    /// Passed checks in a row after which it returns. Default 2.
    pub successes: u32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(2),
            failures: 3,
            successes: 2,
        }
    }
}

/// What a check changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthChange {
    /// The engine leaves.
    Left,
    /// The engine returns.
    Returned,
}

/// The health of one engine.
#[derive(Clone, Debug)]
pub struct Health {
    config: HealthConfig,
    state: State,
    /// Checks in a row that speak against the state.
    against: u32,
    next_check: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unproven,
    Absent,
    Up,
    Down,
}

/// What checks say of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may be sent calls.
    Up,
    /// It has never passed a check: it is sent calls only when there is nobody else.
    Absent,
    /// It failed: it is sent none.
    Down,
}

impl Health {
    /// An engine nobody has checked.
    pub fn new(config: HealthConfig, now: Instant, rng: &mut impl Rng) -> Self {
        let first = FIRST_WITHIN.min(config.interval).mul_f64(rng.random_range(0.0..1.0));
        Self { config, state: State::Unproven, against: 0, next_check: now + first }
    }

    /// What checks say of it.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self.state {
            State::Unproven | State::Up => Verdict::Up,
            State::Absent => Verdict::Absent,
            State::Down => Verdict::Down,
        }
    }

    /// When the next check is due.
    #[must_use]
    pub fn next_check(&self) -> Instant {
        self.next_check
    }

    /// A check ended at `now`.
    pub fn checked(
        &mut self,
        now: Instant,
        passed: bool,
        rng: &mut impl Rng,
    ) -> Option<HealthChange> {
        let (needed, next, change) = match (self.state, passed) {
            (State::Unproven | State::Absent, true) => (1, State::Up, None),
            (State::Unproven | State::Absent, false) => (1, State::Absent, None),
            (State::Up, true) => (1, State::Up, None),
            (State::Up, false) => (self.config.failures, State::Down, Some(HealthChange::Left)),
            (State::Down, false) => (1, State::Down, None),
            (State::Down, true) => (self.config.successes, State::Up, Some(HealthChange::Returned)),
        };
        self.against = if change.is_some() { self.against + 1 } else { 0 };
        let is_change = change.is_some() && self.against >= needed;
        if change.is_none() || is_change {
            self.state = next;
        }
        if is_change {
            self.against = 0;
        }
        let interval = match self.state {
            State::Absent => self.config.interval.min(ABSENT_INTERVAL),
            State::Unproven | State::Up | State::Down => self.config.interval,
        };
        self.next_check = now + interval.mul_f64(rng.random_range(1.0 - JITTER..1.0 + JITTER));
        change.filter(|_| is_change)
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn checks(results: &[bool]) -> Vec<Option<HealthChange>> {
        let (mut rng, now) = (StdRng::seed_from_u64(3), base::clock::now());
        let mut health = Health::new(HealthConfig::default(), now, &mut rng);
        results.iter().map(|passed| health.checked(now, *passed, &mut rng)).collect()
    }

    const LEFT: Option<HealthChange> = Some(HealthChange::Left);
    const RETURNED: Option<HealthChange> = Some(HealthChange::Returned);

    #[test]
    fn three_failures_in_a_row_and_no_fewer_make_an_engine_leave() {
        assert_eq!(checks(&[true, false, false, true, false, false, false])[5..], [None, LEFT]);
    }

    #[test]
    fn two_successes_in_a_row_bring_it_back() {
        let changes = checks(&[true, false, false, false, true, false, true, true, false]);
        assert_eq!(changes[3..], [LEFT, None, None, None, RETURNED, None]);
    }

    #[test]
    fn an_engine_that_has_never_passed_is_looked_for_often_and_up_with_its_first_pass() {
        let (mut rng, now) = (StdRng::seed_from_u64(3), base::clock::now());
        let mut health = Health::new(HealthConfig::default(), now, &mut rng);
        assert_eq!(health.verdict(), Verdict::Up, "unproven");
        for _ in 0..20 {
            assert_eq!(health.checked(now, false, &mut rng), None);
            assert_eq!(health.verdict(), Verdict::Absent);
            assert!(health.next_check() <= now + Duration::from_millis(1_100));
        }
        assert_eq!(health.checked(now, true, &mut rng), None);
        assert_eq!(health.verdict(), Verdict::Up);
        assert!(health.next_check() >= now + Duration::from_secs(9));
    }

    #[test]
    fn checks_are_spread_around_their_interval() {
        let (mut rng, now) = (StdRng::seed_from_u64(9), base::clock::now());
        let mut health = Health::new(HealthConfig::default(), now, &mut rng);
        assert!(health.next_check() <= now + FIRST_WITHIN);
        let mut waits: Vec<_> = (0..100)
            .map(|_| {
                health.checked(now, true, &mut rng);
                (health.next_check() - now).as_secs_f64()
            })
            .collect();
        assert!(waits.iter().all(|wait| (9.0..=11.0).contains(wait)));
        waits.dedup();
        assert!(waits.len() > 90);
    }
}
