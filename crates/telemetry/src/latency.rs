//! Latencies with a bounded error at every percentile: an HdrHistogram, shown as the cumulative buckets of OpenMetrics.

use std::{fmt, time::Duration};

use hdrhistogram::Histogram;
use parking_lot::Mutex;

/// Longest latency told apart, in microseconds: an hour. Longer ones count as this.
const LONGEST_US: u64 = 3_600_000_000;
/// Significant decimal digits: errors below 1 %.
const DIGITS: u8 = 2;
/// Upper bounds of the buckets, in seconds: three a decade from 0.1 ms to five minutes.
const BOUNDS: [f64; 20] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];

/// Latencies of one kind, shared by threads.
pub struct Latency(Mutex<Inner>);

struct Inner {
    histogram: Histogram<u64>,
    sum: Duration,
}

impl fmt::Debug for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Latency").finish_non_exhaustive()
    }
}

impl Default for Latency {
    #[expect(clippy::expect_used, reason = "the bounds are constants, and a test makes one")]
    fn default() -> Self {
        let histogram =
            Histogram::new_with_bounds(1, LONGEST_US, DIGITS).expect("bounds in the right order");
        Self(Mutex::new(Inner { histogram, sum: Duration::ZERO }))
    }
}

/// What was recorded until now.
#[derive(Clone, Debug, PartialEq)]
pub struct LatencySnapshot {
    /// Sum of all latencies, in seconds.
    pub sum_s: f64,
    /// How many.
    pub count: u64,
    /// Upper bounds in seconds, and how many latencies lie above the one before and at or below this. The last is
    /// infinite.
    pub buckets: Vec<(f64, u64)>,
}

impl Latency {
    /// Records one.
    pub fn record(&self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(LONGEST_US);
        let mut inner = self.0.lock();
        inner.histogram.saturating_record(us.max(1));
        inner.sum += latency;
    }

    /// The latency below which the share `quantile` of all lies; zero without any.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.0.lock().histogram.value_at_quantile(quantile))
    }

    /// What was recorded until now.
    #[must_use]
    pub fn snapshot(&self) -> LatencySnapshot {
        let inner = self.0.lock();
        let mut buckets: Vec<(f64, u64)> =
            BOUNDS.iter().chain([&f64::INFINITY]).map(|bound| (*bound, 0)).collect();
        for value in inner.histogram.iter_recorded() {
            // A recorded value stands for its whole cell, whose lower end decides.
            let lowest = inner.histogram.lowest_equivalent(value.value_iterated_to()) as f64 / 1e6;
            let place = buckets.partition_point(|(bound, _)| *bound < lowest);
            if let Some((_, count)) = buckets.get_mut(place) {
                *count += value.count_at_value();
            }
        }
        LatencySnapshot { sum_s: inner.sum.as_secs_f64(), count: inner.histogram.len(), buckets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_in_the_bucket_whose_bound_is_next_above() {
        let latency = Latency::default();
        for us in [50, 100, 101, 999, 1_000, 1_020, 40_000_000, 999_000_000] {
            latency.record(Duration::from_micros(us));
        }
        let snapshot = latency.snapshot();
        assert_eq!(snapshot.count, 8);
        assert!((snapshot.sum_s - 1_039.003_27).abs() < 1e-9, "{}", snapshot.sum_s);
        let filled: Vec<_> = snapshot.buckets.into_iter().filter(|(_, count)| *count > 0).collect();
        let want =
            [(0.0001, 2), (0.00025, 1), (0.001, 2), (0.0025, 1), (60.0, 1), (f64::INFINITY, 1)];
        assert_eq!(filled, want);
    }

    #[test]
    fn what_is_longer_than_an_hour_counts_as_an_hour() {
        let latency = Latency::default();
        latency.record(Duration::MAX / 4);
        assert_eq!(latency.snapshot().count, 1);
        assert!(latency.quantile(1.0) >= Duration::from_secs(3_600));
    }

    #[test]
    fn quantiles_are_within_a_hundredth() {
        let latency = Latency::default();
        for ms in 1..=1_000 {
            latency.record(Duration::from_millis(ms));
        }
        let median = latency.quantile(0.5).as_secs_f64();
        assert!((0.495..=0.505).contains(&median), "{median}");
    }
}
