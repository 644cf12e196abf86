//! How many attempts may be retries. Without a bound, a failing fleet is finished off by the retries of its clients: each
//! refused call comes back two or three times, just when there is least room (Google SRE book, "Handling Overload").
//!
//! Retries are at most a share of the requests of the last ten seconds, plus a small burst for a node with little traffic.

use std::time::{Duration, Instant};

/// The window, in slices.
const SLICES: usize = 10;
const SLICE: Duration = Duration::from_secs(1);
/// Retries per request.
const SHARE: f64 = 0.2;
/// Retries a window allows whatever its requests.
const BURST: f64 = 10.0;

/// The budget of one node, shared by its workers.
#[derive(Clone, Debug)]
pub struct RetryBudget {
    slices: [Slice; SLICES],
    /// Slices since `start` that the current one is.
    current: u64,
    start: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slice {
    requests: u64,
    retries: u64,
}

impl RetryBudget {
    /// An unused budget.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { slices: [Slice::default(); SLICES], current: 0, start: now }
    }

    /// A request came.
    pub fn request(&mut self, now: Instant) {
        self.advance(now);
        self.slice().requests += 1;
    }

    /// Takes a retry out of the budget; `false`: there is none left.
    #[must_use = "without a retry from the budget there is no retry"]
    pub fn take(&mut self, now: Instant) -> bool {
        let has = self.has(now);
        if has {
            self.slice().retries += 1;
        }
        has
    }

    /// Whether there is a retry left.
    #[must_use]
    pub fn has(&mut self, now: Instant) -> bool {
        self.advance(now);
        let (requests, retries) = self
            .slices
            .iter()
            .fold((0, 0), |(req, ret), slice| (req + slice.requests, ret + slice.retries));
        (retries as f64) < SHARE * requests as f64 + BURST
    }

    fn slice(&mut self) -> &mut Slice {
        &mut self.slices[(self.current % SLICES as u64) as usize]
    }

    fn advance(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.start).as_secs() / SLICE.as_secs();
        // After a pause of a window or longer every slice is old.
        for _ in 0..passed.saturating_sub(self.current).min(SLICES as u64) {
            self.current += 1;
            *self.slice() = Slice::default();
        }
        self.current = self.current.max(passed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spent(budget: &mut RetryBudget, now: Instant) -> usize {
        (0..100_000).take_while(|_| budget.take(now)).count()
    }

    #[test]
    fn retries_are_a_fifth_of_the_requests_and_ten_more() {
        let now = base::clock::now();
        let mut budget = RetryBudget::new(now);
        assert_eq!(spent(&mut budget, now), 10);
        for _ in 0..1_000 {
            budget.request(now);
        }
        assert_eq!(spent(&mut budget, now), 200);
    }

    #[test]
    fn the_window_forgets_after_ten_seconds() {
        let start = base::clock::now();
        let mut budget = RetryBudget::new(start);
        for second in 0..10 {
            budget.request(start + Duration::from_secs(second));
        }
        let late = start + Duration::from_secs(9);
        assert_eq!(spent(&mut budget, late), 12);
        assert_eq!(spent(&mut budget, late + Duration::from_secs(9)), 0, "still in the window");
        assert_eq!(spent(&mut budget, late + Duration::from_secs(10)), 10);
        assert_eq!(spent(&mut budget, late + Duration::from_secs(10_000)), 10);
    }
}
