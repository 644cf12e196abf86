//! What can be wrong with a GPU?

/// What is wrong with a batch. It has one fault at a time: the next replaces the last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// Steps take longer, and so does what is left of the one in progress.
    Slow(SlowFactor),
    /// No step ends. Requests are taken while there is room. After it the step goes on where it stood.
    Hang,
    /// Every arrival is refused; what is there goes on.
    Refuse,
}

/// How many times longer than healthy every step takes: 1 to 10,000.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub(crate) struct SlowFactor(f64);

/// A number that is no [`SlowFactor`]. The fault is with whoever wrote it; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("a factor is a number from 1 to 10000, not {0}")]
pub(crate) struct SlowFactorError(f64);

impl TryFrom<f64> for SlowFactor {
    type Error = SlowFactorError;

    fn try_from(factor: f64) -> Result<Self, SlowFactorError> {
        if (1.0..=10_000.0).contains(&factor) {
            Ok(Self(factor))
        } else {
            Err(SlowFactorError(factor))
        }
    }
}

impl From<SlowFactor> for f64 {
    fn from(factor: SlowFactor) -> Self {
        factor.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_that_does_not_slow_is_refused_with_the_allowed_ones() {
        for wrong in [0.0, 0.99, -1.0, 10_001.0, f64::NAN, f64::INFINITY] {
            let error = SlowFactor::try_from(wrong).unwrap_err().to_string();
            assert!(error.starts_with("a factor is a number from 1 to 10000"), "{error}");
        }
    }
}
