//! How long a connection may be used. A certificate ends while connections live, and one that was withdrawn must end them:
//! whoever knows certificates says so here, and this crate obeys.

use std::{
    any::Any,
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;

/// Says how long a connection may be used, once the other end has shown its certificates.
pub trait Lessor: fmt::Debug + Send + Sync {
    /// The lease of a connection whose other end showed `certificates`, its own first.
    fn lease(&self, certificates: &[CertificateDer<'static>]) -> Lease;

    /// A handshake with `remote` failed, on a port that serves.
    fn refused(&self, remote: SocketAddr, why: &str);
}

/// How long one connection may be used. Cloneable.
///
/// ```text
///  handshake          half              end
///  ├── used ───────────┼── used, while ──┼── no new call; those in progress go on
///                      │  another is     │
///                      │  opened         │            withdrawn, at any moment: closed at once
/// ```
#[derive(Clone)]
pub struct Lease {
    half: Option<Instant>,
    end: Option<Instant>,
    withdrawn: CancellationToken,
    /// What the lessor keeps of it; dropped with the connection.
    _held: Option<Arc<dyn Any + Send + Sync>>,
}

impl Lease {
    /// A second before its end a short lease is not renewed any earlier.
    const NOT_BEFORE: Duration = Duration::from_millis(500);

    /// Without an end.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { half: None, end: None, withdrawn: CancellationToken::new(), _held: None }
    }

    /// From `now` for `left`, or until `withdrawn` is cancelled. `held` lives as long as the connection.
    #[must_use]
    pub fn limited(
        now: Instant,
        left: Duration,
        withdrawn: CancellationToken,
        held: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        // Beyond what the clock can say there is no end.
        let half = now.checked_add((left / 2).max(Self::NOT_BEFORE.min(left)));
        Self { half, end: now.checked_add(left), withdrawn, _held: Some(held) }
    }

    /// Whether another connection should take its place: half its time is over.
    #[must_use]
    pub fn is_old(&self, now: Instant) -> bool {
        self.half.is_some_and(|half| now >= half)
    }

    /// Whether no new call may be made.
    #[must_use]
    pub fn is_over(&self, now: Instant) -> bool {
        self.withdrawn.is_cancelled() || self.end.is_some_and(|end| now >= end)
    }

    /// Resolves when no new call may be made.
    pub async fn over(&self) {
        sleep_until(self.end).await;
    }

    /// Resolves when another connection should take its place.
    pub async fn old(&self) {
        sleep_until(self.half).await;
    }

    /// Resolves when the connection must end at once.
    pub async fn withdrawn(&self) {
        self.withdrawn.cancelled().await;
    }
}

async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("half", &self.half)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_old_at_half_and_over_at_its_end() {
        let now = base::clock::now();
        let second = Duration::from_secs(1);
        let withdrawn = CancellationToken::new();
        let lease = Lease::limited(now, 20 * second, withdrawn.clone(), Arc::new(()));
        assert!(!lease.is_old(now) && !lease.is_old(now + 9 * second));
        assert!(lease.is_old(now + 10 * second) && !lease.is_over(now + 19 * second));
        assert!(lease.is_over(now + 20 * second));
        withdrawn.cancel();
        assert!(lease.is_over(now));
    }

    #[test]
    fn a_lease_without_time_is_over_at_once_and_one_for_ever_never() {
        let now = base::clock::now();
        let lease = Lease::limited(now, Duration::ZERO, CancellationToken::new(), Arc::new(()));
        assert!(lease.is_old(now) && lease.is_over(now));
        let lease = Lease::limited(now, Duration::MAX, CancellationToken::new(), Arc::new(()));
        assert!(!lease.is_old(now) && !lease.is_over(now));
        assert!(!Lease::unlimited().is_over(now));
    }
}
