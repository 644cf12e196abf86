//! How long a connection may be used. A certificate ends while connections live, and one that was withdrawn must end them:
//! whoever knows certificates says so here, and this crate obeys.

use std::{
    any::Any,
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

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
#[derive(Clone, Debug, Default)]
pub struct Lease(Option<Arc<Terms>>);

/// Of a lease that has an end.
struct Terms {
    half: Option<Instant>,
    end: Option<Instant>,
    withdrawn: CancellationToken,
    /// What the lessor keeps of it; dropped with the connection.
    _held: Arc<dyn Any + Send + Sync>,
}

impl Lease {
    /// A connection is not replaced sooner than this: near the end of a certificate the next one is no better.
    const NOT_BEFORE: Duration = Duration::from_secs(2);

    /// Without an end.
    #[must_use]
    pub fn unlimited() -> Self {
        Self(None)
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
        let end = now.checked_add(left);
        Self(Some(Arc::new(Terms { half, end, withdrawn, _held: held })))
    }

    /// Whether another connection should take its place: half its time is over.
    #[must_use]
    pub fn is_old(&self, now: Instant) -> bool {
        self.0.as_ref().and_then(|terms| terms.half).is_some_and(|half| now >= half)
    }

    /// Whether no new call may be made: its time is over. One that is withdrawn ends by itself.
    #[must_use]
    pub fn is_over(&self, now: Instant) -> bool {
        self.0.as_ref().and_then(|terms| terms.end).is_some_and(|end| now >= end)
    }

    /// Whether it was withdrawn.
    #[must_use]
    pub fn is_withdrawn(&self) -> bool {
        self.0.as_ref().is_some_and(|terms| terms.withdrawn.is_cancelled())
    }

    /// Resolves when no new call may be made.
    pub async fn over(&self) {
        sleep_until(self.0.as_ref().and_then(|terms| terms.end)).await;
    }

    /// Resolves when another connection should take its place.
    pub async fn old(&self) {
        sleep_until(self.0.as_ref().and_then(|terms| terms.half)).await;
    }

    /// Resolves when the connection must end at once.
    pub async fn withdrawn(&self) {
        match &self.0 {
            Some(terms) => terms.withdrawn.cancelled().await,
            None => std::future::pending().await,
        }
    }
}

/// A byte stream that breaks off when its lease is withdrawn: what runs on it then fails, whoever runs it.
#[derive(Debug)]
pub(crate) struct Revocable<I> {
    io: I,
    /// `None`: nobody can withdraw it.
    withdrawn: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl<I> Revocable<I> {
    pub(crate) fn new(io: I, lease: &Lease) -> Self {
        let withdrawn =
            lease.0.as_ref().map(|terms| Box::pin(terms.withdrawn.clone().cancelled_owned()));
        Self { io, withdrawn }
    }

    /// An error once it is withdrawn; wakes whoever reads when it is.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.withdrawn.as_mut().map(|withdrawn| withdrawn.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => Err(io::Error::other("the certificate was withdrawn")),
            Some(Poll::Pending) | None => Ok(()),
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Revocable<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Revocable<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

impl fmt::Debug for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terms")
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
        assert!(!lease.is_withdrawn());
        withdrawn.cancel();
        assert!(lease.is_withdrawn());
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
