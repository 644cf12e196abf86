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
