//! How pressed one engine is: the figures its node keeps, other nodes are told, and routing reads.

use std::time::Duration;

/// The load of one engine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Calls in progress, whoever sent them.
    pub in_flight: u32,
    /// Calls that wait for a slot.
    pub queued: u32,
    /// Calls it can run at once now; `None`: not known.
    pub slots: Option<u32>,
    /// How long a call takes, as a moving average; zero: not known.
    pub service_time: Duration,
    /// Calls that end per second, as a moving average.
    pub drain_rate: f64,
    /// Whether it fails: it should be sent nothing.
    pub unusable: bool,
    /// Time from one message of a streamed answer to the next, as a moving average; zero: not known.
    pub step_time: Duration,
    /// Share of its key-value cache in use, 0 to 1, as the engine reports it; `None`: it does not.
    pub kv_use: Option<f64>,
}

/// Slots assumed of an engine that has not said: only the order among engines matters.
pub const ASSUMED_SLOTS: u32 = 64;

/// No engine ends more calls per second.
const RATE_MAX: f64 = 1e6;

impl Load {
    /// A rate somebody else claims: one that is no number, or below nothing, says nothing.
    #[must_use]
    pub fn rate(claimed: f64) -> f64 {
        if claimed.is_finite() { claimed.clamp(0.0, RATE_MAX) } else { 0.0 }
    }

    /// Several engines as one: counts and rates add up, times and shares are means. A mean is weighted by what it was
    /// measured on, and what is not known has no part in it. Engines without a limit count as [`ASSUMED_SLOTS`] each;
    /// without engines there is no limit.
    #[must_use]
    pub fn total(loads: impl IntoIterator<Item = Self>) -> Self {
        let mut total = Self { slots: Some(0), unusable: true, ..Self::default() };
        let (mut service, mut step, mut kv) = (Mean::default(), Mean::default(), Mean::default());
        for load in loads {
            let slots = load.slots.unwrap_or(ASSUMED_SLOTS);
            total.in_flight = total.in_flight.saturating_add(load.in_flight);
            total.queued = total.queued.saturating_add(load.queued);
            total.slots = total.slots.map(|sum| sum.saturating_add(slots));
            total.drain_rate += load.drain_rate;
            total.unusable &= load.unusable;
            service.add_time(load.service_time, load.drain_rate);
            step.add_time(load.step_time, load.drain_rate);
            load.kv_use.into_iter().for_each(|used| kv.add(used, slots.into()));
        }
        Self {
            slots: total.slots.filter(|slots| *slots > 0),
            unusable: total.unusable && total.slots.is_some_and(|slots| slots > 0),
            service_time: service.time(),
            step_time: step.time(),
            kv_use: kv.value(),
            ..total
        }
    }

    /// Free slots. An engine without a limit always has one.
    #[must_use]
    pub fn free(&self) -> u32 {
        match self.slots {
            Some(slots) => slots.saturating_sub(self.in_flight),
            None => ASSUMED_SLOTS.saturating_sub(self.in_flight).max(1),
        }
    }

    /// The share of its slots in use, 0 and above.
    #[must_use]
    pub fn utilisation(&self) -> f64 {
        f64::from(self.in_flight) / f64::from(self.slots.unwrap_or(ASSUMED_SLOTS).max(1))
    }
}

/// A weighted mean.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    weights: f64,
}

impl Mean {
    /// What runs nothing now still counts where nobody else does.
    const WEIGHT_MIN: f64 = 1e-6;

    fn add(&mut self, value: f64, weight: f64) {
        let weight = weight.max(Self::WEIGHT_MIN);
        self.sum += value * weight;
        self.weights += weight;
    }

    fn add_time(&mut self, time: Duration, weight: f64) {
        if !time.is_zero() {
            self.add(time.as_secs_f64(), weight);
        }
    }

    fn value(self) -> Option<f64> {
        (self.weights > 0.0).then(|| self.sum / self.weights)
    }

    fn time(self) -> Duration {
        self.value().and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_engines_are_one_with_sums_and_means_of_what_is_known() {
        let ms = Duration::from_millis;
        let busy = Load {
            in_flight: 6,
            queued: 2,
            slots: Some(8),
            service_time: ms(100),
            drain_rate: 30.0,
            step_time: ms(20),
            kv_use: Some(0.5),
            unusable: true,
        };
        let idle = Load { service_time: ms(200), drain_rate: 10.0, ..Load::default() };
        let total = Load::total([busy, idle]);
        assert_eq!((total.in_flight, total.queued, total.slots), (6, 2, Some(8 + ASSUMED_SLOTS)));
        assert_eq!((total.service_time, total.step_time), (ms(125), ms(20)));
        assert_eq!((total.kv_use, total.unusable), (Some(0.5), false));
        assert!((total.drain_rate - 40.0).abs() < f64::EPSILON);
    }

    #[test]
    fn no_engines_have_no_limit_and_do_not_fail() {
        assert_eq!(Load::total([]), Load::default());
        let failing = Load { unusable: true, ..Load::default() };
        assert!(Load::total([failing, failing]).unusable);
    }
}
