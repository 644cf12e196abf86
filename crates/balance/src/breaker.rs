//! Whether to send anything to a server that failed: a breaker per server, fed by what attempts came to.
//!
//! ```text
//!            two broken in a row                 wait is over
//!  closed ───────────────────────> open ──────────────────────> half-open: one trial
//!     ^                             ^                               │   │
//!     │                             └──── broken: the wait doubles ─┘   │
//!     └───────────────────────── an answer begins ──────────────────────┘
//! ```
//!
//! Closed means that traffic flows. That an answer begins lets traffic flow again, and proves nothing: what is broken is counted on,
//! and how long the last wait was, until a reply is whole. A busy reply is one. Source: M. Nygard, "Release It!", 2007.

use std::time::{Duration, Instant};

/// Failures in a row that open a breaker: one may be bad luck.
const BROKEN_IN_A_ROW: u32 = 2;
/// How long an opened breaker stays open, doubling with each failed trial up to the maximum.
const WAIT_FIRST: Duration = Duration::from_secs(5);
const WAIT_MAX: Duration = Duration::from_secs(40);
/// What broke so long before counts no more.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(80);
/// A trial of which nothing was heard for so long was ended by its caller: another may begin.
const TRIAL_LOST: Duration = Duration::from_secs(5);

/// The breaker of one server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breaker {
    state: State,
    broken_in_a_row: u32,
    openings: u32,
    last_broken: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    Open {
        until: Instant,
    },
    HalfOpen {
        trial_began: Instant,
    },
}

impl Breaker {
    /// Whether an attempt may be made: traffic flows, or a trial is due.
    #[must_use]
    pub fn allows(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Open { until } => now >= until,
            State::HalfOpen { trial_began } => now >= trial_began + TRIAL_LOST,
        }
    }

    /// Whether traffic flows.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// An attempt begins; takes the trial if one is due.
    pub fn begin(&mut self, now: Instant) {
        if !self.is_closed() && self.allows(now) {
            self.state = State::HalfOpen { trial_began: now };
        }
    }

    /// An answer began, which may yet break off. Returns whether that closed the breaker.
    pub fn answered(&mut self) -> bool {
        let is_trial = matches!(self.state, State::HalfOpen { .. });
        if is_trial {
            self.state = State::Closed;
        }
        is_trial
    }

    /// The server replied, to the end, whatever it said. Returns whether that closed the breaker.
    pub fn replied(&mut self) -> bool {
        let was_open = !self.is_closed();
        *self = Self::default();
        was_open
    }

    /// An attempt was broken. Returns whether that opened the breaker.
    pub fn broken(&mut self, now: Instant) -> bool {
        // Where no call ends by itself, as with streams that callers stop, time forgets.
        if self.last_broken.is_some_and(|last| now >= last + FORGOTTEN_AFTER) {
            (self.broken_in_a_row, self.openings) = (0, 0);
        }
        self.last_broken = Some(now);
        self.broken_in_a_row += 1;
        let opens = match self.state {
            State::Closed => self.broken_in_a_row >= BROKEN_IN_A_ROW,
            State::HalfOpen { .. } => true,
            // Attempts that began before it opened tell nothing new.
            State::Open { .. } => false,
        };
        if opens {
            let wait = WAIT_FIRST.saturating_mul(1 << self.openings.min(16)).min(WAIT_MAX);
            self.openings += 1;
            self.state = State::Open { until: now + wait };
        }
        opens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn now() -> Instant {
        base::clock::now()
    }

    fn opened(at: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        assert!(!breaker.broken(at));
        assert!(breaker.broken(at));
        breaker
    }

    #[test]
    fn one_failure_opens_nothing_and_a_reply_forgets_it() {
        let mut breaker = Breaker::default();
        for _ in 0..100 {
            assert!(!breaker.broken(now()));
            breaker.replied();
        }
        assert!(breaker.allows(now()));
    }

    #[test]
    fn two_failures_open_for_five_seconds_then_one_trial_passes() {
        let start = now();
        let mut breaker = opened(start);
        assert!(!breaker.allows(start + 4 * SECOND));
        let due = start + 5 * SECOND;
        assert!(breaker.allows(due));
        breaker.begin(due);
        assert!(!breaker.allows(due), "one trial at a time");
        assert!(breaker.replied());
        assert!(breaker.allows(due) && breaker.is_closed());
    }

    #[test]
    fn who_begins_every_answer_and_ends_none_is_ejected_for_longer_and_longer() {
        let mut at = now();
        let mut breaker = Breaker::default();
        breaker.answered();
        assert!(!breaker.broken(at));
        breaker.answered();
        assert!(breaker.broken(at));
        assert!(!breaker.answered() && !breaker.allows(at), "an older call goes on");
        for wait in [5, 10, 20] {
            assert!(!breaker.allows(at + wait * SECOND - SECOND / 10), "{wait}");
            at += wait * SECOND;
            breaker.begin(at);
            assert!(breaker.answered() && breaker.is_closed());
            assert!(breaker.broken(at), "one more is enough");
        }
        at += 40 * SECOND;
        breaker.begin(at);
        breaker.answered();
        breaker.replied();
        assert!(!breaker.broken(at), "a whole reply forgets it");
    }

    #[test]
    fn what_broke_long_ago_is_forgotten_where_no_call_ends_by_itself() {
        let mut at = now();
        let mut breaker = opened(at);
        at += 5 * SECOND;
        breaker.begin(at);
        assert!(breaker.answered());
        for _ in 0..10 {
            at += FORGOTTEN_AFTER;
            assert!(!breaker.broken(at));
        }
        assert!(
            breaker.broken(at + SECOND) && breaker.allows(at + 6 * SECOND),
            "as the first time"
        );
    }

    #[test]
    fn a_failed_trial_doubles_the_wait_up_to_forty_seconds() {
        let mut at = now();
        let mut breaker = opened(at);
        for wait in [5, 10, 20, 40, 40, 40] {
            assert!(!breaker.allows(at + wait * SECOND - SECOND / 10), "{wait}");
            at += wait * SECOND;
            assert!(breaker.allows(at), "{wait}");
            breaker.begin(at);
            assert!(breaker.broken(at));
        }
        // A reply forgets how long it was.
        breaker.replied();
        breaker.broken(at);
        breaker.broken(at);
        assert!(breaker.allows(at + 5 * SECOND));
    }

    #[test]
    fn a_trial_its_caller_cancelled_does_not_keep_the_server_out() {
        let start = now();
        let mut breaker = opened(start);
        let due = start + 5 * SECOND;
        breaker.begin(due);
        assert!(!breaker.allows(due + 4 * SECOND));
        assert!(breaker.allows(due + 5 * SECOND));
    }

    #[test]
    fn late_failures_of_older_attempts_do_not_lengthen_the_wait() {
        let start = now();
        let mut breaker = opened(start);
        for _ in 0..50 {
            assert!(!breaker.broken(start + SECOND));
        }
        assert!(breaker.allows(start + 5 * SECOND));
    }
}
