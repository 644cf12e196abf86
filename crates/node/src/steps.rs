//! How long does a streamed answer take from one message to the next? Measured as it passes: per piece of the body some
//! arithmetic on the prefixes of its messages and at most one look at the clock, and one sum for the engine at the end.
//!
//! Messages are counted by their prefixes (gRPC over HTTP/2, "Length-Prefixed-Message"), not by pieces: a long message comes
//! in several, and several short ones in one. A caller that reads slowly makes steps look longer than they are.

use std::time::{Duration, Instant};

/// What is longer is no step: a caller that has asked for nothing more yet, or an engine that hangs.
const PAUSE: Duration = Duration::from_secs(5);
/// A flag and a length of four bytes.
const PREFIX_BYTES: u8 = 5;

/// The steps of one answer.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    framing: Framing,
    /// When the last message came.
    last: Option<Instant>,
    count: u32,
    took: Duration,
}

impl Steps {
    /// A piece of the body passes.
    pub(crate) fn saw(&mut self, data: &[u8], now: impl FnOnce() -> Instant) {
        let messages = self.framing.prefixes(data);
        if messages == 0 {
            return;
        }
        let now = now();
        // The first message of an answer is no step; others that came along with it took no time.
        let (since, steps) =
            self.last.replace(now).map_or((now, messages - 1), |at| (at, messages));
        let passed = now.saturating_duration_since(since);
        if passed <= PAUSE {
            self.count = self.count.saturating_add(steps);
            self.took = self.took.saturating_add(passed);
        }
    }

    /// How many there were, and how long they took in all.
    pub(crate) fn sum(&self) -> (u32, Duration) {
        (self.count, self.took)
    }
}

/// Where in a sequence of length-prefixed messages a body is.
#[derive(Debug, Default)]
struct Framing {
    /// Bytes of the prefix that have come.
    prefix: u8,
    /// The length it says, as far as it has come.
    length: u32,
    /// Bytes of the message that have yet to come.
    left: u32,
}

impl Framing {
    /// How many prefixes end in the next piece.
    fn prefixes(&mut self, mut data: &[u8]) -> u32 {
        let mut count = 0;
        while let Some((first, rest)) = data.split_first() {
            if self.left > 0 {
                let skipped = data.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= u32::try_from(skipped).unwrap_or(self.left);
                data = data.get(skipped..).unwrap_or_default();
                continue;
            }
            // The flag is shifted out by the four bytes behind it.
            self.length = (self.length << 8) | u32::from(*first);
            self.prefix += 1;
            data = rest;
            if self.prefix == PREFIX_BYTES {
                (self.prefix, self.left) = (0, self.length);
                count += 1;
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: usize) -> Vec<u8> {
        let length = u32::try_from(bytes).unwrap().to_be_bytes();
        [&[0], &length[..], &vec![0xff; bytes]].concat()
    }

    #[test]
    fn messages_are_counted_however_a_body_is_cut() {
        let body: Vec<u8> = [0, 3, 70_000, 0, 1].into_iter().flat_map(message).collect();
        for piece in [1, 2, 4, 5, 6, 7, 1_000, 16_384, body.len()] {
            let mut framing = Framing::default();
            let counts: Vec<u32> = body.chunks(piece).map(|data| framing.prefixes(data)).collect();
            assert_eq!(counts.iter().sum::<u32>(), 5, "pieces of {piece} bytes");
            assert_eq!((framing.prefix, framing.left), (0, 0));
        }
    }

    #[test]
    fn steps_are_what_lies_between_messages_but_no_pauses() {
        let start = base::clock::now();
        let mut steps = Steps::default();
        let mut at = |ms: u64, data: &[u8]| {
            steps.saw(data, || start + Duration::from_millis(ms));
            steps.sum()
        };
        let one = message(10);
        let two = [one.clone(), one.clone()].concat();
        assert_eq!(at(0, &one), (0, Duration::ZERO));
        assert_eq!(at(20, &one), (1, Duration::from_millis(20)));
        assert_eq!(at(60, &two), (3, Duration::from_millis(60)));
        assert_eq!(at(9_000, &one), (3, Duration::from_millis(60)), "a pause");
        assert_eq!(at(9_020, &one), (4, Duration::from_millis(80)));
    }

    #[test]
    fn the_clock_is_left_alone_where_no_message_begins() {
        let mut steps = Steps::default();
        let whole = message(100);
        let (front, rest) = whole.split_at(50);
        steps.saw(front, base::clock::now);
        steps.saw(rest, || panic!("looked at the clock"));
        assert_eq!(steps.sum(), (0, Duration::ZERO));
    }
}
