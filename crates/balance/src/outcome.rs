//! What an attempt came to, in the four classes routing knows. Busy is not broken: a saturated engine pushes back, and is
//! never ejected for it.

/// The class of an ended attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The engine did what it was asked, an error of the application included.
    Ok,
    /// The engine has no room: RESOURCE_EXHAUSTED, whoever said it.
    Busy,
    /// The engine, or the way to it, failed: UNAVAILABLE, a reset, a lost connection, no acknowledgement.
    Broken,
    /// The caller ended it: cancelled, out of time, or asked for nonsense. Says nothing about the engine.
    Caller,
}

impl Outcome {
    /// The class of a call that ended with a gRPC status of the engine's own, by its number.
    #[must_use]
    pub fn of_status(code: i32) -> Self {
        match code {
            // CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND.
            1 | 3 | 4 | 5 => Self::Caller,
            // RESOURCE_EXHAUSTED.
            8 => Self::Busy,
            // UNAVAILABLE.
            14 => Self::Broken,
            _ => Self::Ok,
        }
    }

    /// The word for logs and labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Busy => "busy",
            Self::Broken => "broken",
            Self::Caller => "caller",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_grpc_status_has_a_class() {
        let classes: Vec<_> = (0..=16).map(|code| Outcome::of_status(code).as_str()).collect();
        let want = [
            "ok", "caller", "ok", "caller", "caller", "caller", "ok", "ok", "busy", "ok", "ok",
            "ok", "ok", "ok", "broken", "ok", "ok",
        ];
        assert_eq!(classes, want);
    }
}
