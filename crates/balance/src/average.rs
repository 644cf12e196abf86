//! Averages that forget: of a duration, and of a rate.

use std::time::{Duration, Instant};

/// Weight of a new sample.
const WEIGHT: f64 = 0.1;
/// A rate forgets with this time constant.
const MEMORY: Duration = Duration::from_secs(5);

/// An exponentially weighted moving average of a duration.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Average(Option<f64>);

impl Average {
    pub(crate) fn add(&mut self, sample: Duration) {
        let sample = sample.as_secs_f64();
        self.0 = Some(self.0.map_or(sample, |average| average + WEIGHT * (sample - average)));
    }

    /// Zero without samples.
    pub(crate) fn value(&self) -> Duration {
        Duration::from_secs_f64(self.0.unwrap_or(0.0))
    }
}

/// Events per second: each adds 1/τ, and all decay with time constant τ.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Rate {
    per_second: f64,
    at: Option<Instant>,
}

impl Rate {
    pub(crate) fn event(&mut self, now: Instant) {
        self.per_second = self.value(now) + 1.0 / MEMORY.as_secs_f64();
        self.at = Some(now);
    }

    pub(crate) fn value(&self, now: Instant) -> f64 {
        let Some(at) = self.at else { return 0.0 };
        let passed = now.saturating_duration_since(at).as_secs_f64();
        self.per_second * (-passed / MEMORY.as_secs_f64()).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_stream_of_events_shows_its_rate_and_is_forgotten() {
        let start = base::clock::now();
        let mut rate = Rate::default();
        assert!(rate.value(start) < f64::EPSILON);
        for i in 0..4_000u32 {
            rate.event(start + i * Duration::from_millis(10));
        }
        let end = start + Duration::from_secs(40);
        assert!((95.0..105.0).contains(&rate.value(end)), "{}", rate.value(end));
        assert!(rate.value(end + Duration::from_secs(30)) < 1.0);
    }

    #[test]
    fn an_average_starts_at_its_first_sample_and_follows() {
        let mut average = Average::default();
        assert_eq!(average.value(), Duration::ZERO);
        average.add(Duration::from_secs(1));
        assert_eq!(average.value(), Duration::from_secs(1));
        for _ in 0..100 {
            average.add(Duration::from_secs(3));
        }
        assert!(average.value() > Duration::from_millis(2_990));
    }
}
