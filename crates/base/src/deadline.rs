//! How long a caller still waits: `grpc-timeout` (gRPC over HTTP/2, "Timeout") in and out.

use std::time::{Duration, Instant};

/// The longest timeout `grpc-timeout` can say: eight digits of hours.
const VALUE_MAX: u64 = 99_999_999;

/// The moment after which nobody waits for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline `timeout` after `now`; `None` when that is beyond what the clock can say, that is: never.
    #[must_use]
    pub fn after(now: Instant, timeout: Duration) -> Option<Self> {
        now.checked_add(timeout).map(Self)
    }

    /// The moment itself.
    #[must_use]
    pub fn instant(self) -> Instant {
        self.0
    }

    /// What is left at `now`, zero once it has passed.
    #[must_use]
    pub fn remaining(self, now: Instant) -> Duration {
        self.0.saturating_duration_since(now)
    }
}

/// A `grpc-timeout` nobody can read. The caller is at fault; the call was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("grpc-timeout must be 1 to 8 digits and a unit of H, M, S, m, u or n")]
pub struct TimeoutError;

/// Reads a `grpc-timeout` value: `100m` is 100 ms.
///
/// # Errors
/// [`TimeoutError`] when the value does not follow the grammar.
pub fn parse_grpc_timeout(value: &[u8]) -> Result<Duration, TimeoutError> {
    let (unit, digits) = value.split_last().ok_or(TimeoutError)?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return Err(TimeoutError);
    }
    let count = digits.iter().fold(0u64, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Ok(Duration::from_secs(count * 3600)),
        b'M' => Ok(Duration::from_secs(count * 60)),
        b'S' => Ok(Duration::from_secs(count)),
        b'm' => Ok(Duration::from_millis(count)),
        b'u' => Ok(Duration::from_micros(count)),
        b'n' => Ok(Duration::from_nanos(count)),
        _ => Err(TimeoutError),
    }
}

/// Writes a `grpc-timeout` value in the finest unit whose eight digits hold it, rounded down so that a hop never
/// promises more time than the caller gave.
#[must_use]
pub fn format_grpc_timeout(timeout: Duration) -> String {
    let units = [
        (timeout.as_nanos(), 'n'),
        (timeout.as_micros(), 'u'),
        (timeout.as_millis(), 'm'),
        (u128::from(timeout.as_secs()), 'S'),
        (u128::from(timeout.as_secs() / 60), 'M'),
    ];
    for (count, unit) in units {
        if count <= u128::from(VALUE_MAX) {
            return format!("{count}{unit}");
        }
    }
    format!("{}H", (timeout.as_secs() / 3600).min(VALUE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_read() {
        for (text, want) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("100m", Duration::from_millis(100)),
            ("5u", Duration::from_micros(5)),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ] {
            assert_eq!(parse_grpc_timeout(text.as_bytes()), Ok(want), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "m", "1", "1x", "123456789m", "-1m", "1.5S", " 1m", "1m "] {
            assert_eq!(parse_grpc_timeout(text.as_bytes()), Err(TimeoutError), "{text:?}");
        }
    }

    #[test]
    fn a_written_timeout_reads_back_no_longer_and_no_more_than_a_ten_thousandth_shorter() {
        for nanos in [0u64, 1, 99_999_999, 100_000_000, 123_456_789_012, 86_400_000_000_000_000] {
            let want = Duration::from_nanos(nanos);
            let got = parse_grpc_timeout(format_grpc_timeout(want).as_bytes()).unwrap();
            assert!(got <= want && want - got <= want / 10_000, "{want:?} {got:?}");
        }
        assert_eq!(format_grpc_timeout(Duration::MAX), "99999999H");
    }
}
