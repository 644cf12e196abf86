//! The exact number of calls an engine runs, against the number it can run.

use std::num::NonZeroU32;

/// One engine's slots. There is one per engine and node, shared by all workers: a count split per worker would refuse
/// calls while another worker has room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    limit: Option<NonZeroU32>,
    in_flight: u32,
}

impl Slots {
    /// An idle engine with `limit` slots; `None`: as many as come.
    #[must_use]
    pub fn new(limit: Option<NonZeroU32>) -> Self {
        Self { limit, in_flight: 0 }
    }

    /// Takes a slot; `false` when all are taken. Each `true` is answered by one [`Slots::give_back`].
    #[must_use = "a slot taken must be given back"]
    pub fn take(&mut self) -> bool {
        let has_room = self.limit.is_none_or(|limit| self.in_flight < limit.get());
        if has_room {
            self.in_flight += 1;
        }
        has_room
    }

    /// Gives a slot back.
    pub fn give_back(&mut self) {
        debug_assert!(self.in_flight > 0, "a slot was given back twice");
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Calls in progress.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// The number of slots, if it has a limit.
    #[must_use]
    pub fn limit(&self) -> Option<NonZeroU32> {
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_run_out_and_come_back() {
        let mut slots = Slots::new(NonZeroU32::new(2));
        assert!(slots.take() && slots.take());
        assert!(!slots.take());
        slots.give_back();
        assert!(slots.take());
        assert_eq!(slots.in_flight(), 2);
    }

    #[test]
    fn without_a_limit_there_is_always_room() {
        let mut slots = Slots::new(None);
        assert!((0..10_000).all(|_| slots.take()));
    }
}
