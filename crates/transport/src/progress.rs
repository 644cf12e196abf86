//! How far a call has come at the other end: what the caller of a peer needs to know to give up on it and try another.
//!
//! Over HTTP/3 the other end acknowledges a call with an interim 103 response as soon as it has admitted it, before any
//! engine sees it ([`Acknowledge`]). hyper cannot send interim responses over HTTP/2: there a call is never acknowledged
//! before its reply, and says so.

use std::{sync::Arc, time::Duration};

use tokio::sync::{Notify, watch};

/// An attempt that gets no acknowledgement within this is tried elsewhere, or later where the way is long.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_millis(250);
/// The same while a connection is being made.
const CONNECTED_WITHIN: Duration = Duration::from_secs(1);
/// How long the other end may hold back an ACK (RFC 9000 §18.2, `max_ack_delay`).
const ACK_DELAY: Duration = Duration::from_millis(25);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No connection has been found yet.
    Connecting,
    /// The head is on its way.
    Sent { rtt: Duration },
    /// The other end has admitted the call.
    Acknowledged,
    /// The other end cannot say.
    Mute,
}

/// The transport's side: an extension of a request whose progress somebody watches.
#[derive(Clone, Debug)]
pub struct Progress(Arc<watch::Sender<Stage>>);

/// The watching side. Cloneable.
#[derive(Clone, Debug)]
pub struct Watching(watch::Receiver<Stage>);

impl Progress {
    /// The two sides.
    #[must_use]
    pub fn new() -> (Self, Watching) {
        let (sender, receiver) = watch::channel(Stage::Connecting);
        (Self(Arc::new(sender)), Watching(receiver))
    }

    pub(crate) fn sent(&self, rtt: Duration) {
        self.0.send_replace(Stage::Sent { rtt });
    }

    pub(crate) fn acknowledged(&self) {
        self.0.send_replace(Stage::Acknowledged);
    }

    pub(crate) fn mute(&self) {
        self.0.send_replace(Stage::Mute);
    }
}

impl Watching {
    /// Whether the other end has admitted the call.
    #[must_use]
    pub fn is_acknowledged(&self) -> bool {
        *self.0.borrow() == Stage::Acknowledged
    }

    /// Whether the call need not be held back any more: it was acknowledged, or never will be.
    #[must_use]
    pub fn is_admitted(&self) -> bool {
        matches!(*self.0.borrow(), Stage::Acknowledged | Stage::Mute)
    }

    /// Resolves when the call need not be held back any more: it was acknowledged, or never will be.
    pub async fn admitted(&mut self) {
        let settled = |stage: &Stage| matches!(stage, Stage::Acknowledged | Stage::Mute);
        if self.0.wait_for(settled).await.is_err() {
            // The call ended without either; whoever ended it knows why.
            std::future::pending::<()>().await;
        }
    }

    /// Resolves when an acknowledgement is overdue; never for a call that was acknowledged, or will not be.
    pub async fn overdue(mut self) {
        let connected = async {
            let stage = self.0.wait_for(|stage| *stage != Stage::Connecting).await;
            stage.map(|stage| *stage)
        };
        let rtt = match tokio::time::timeout(CONNECTED_WITHIN, connected).await {
            Err(_) => return,
            Ok(Ok(Stage::Sent { rtt })) => rtt,
            Ok(_) => return std::future::pending().await,
        };
        let admitted = self.admitted();
        if tokio::time::timeout(acknowledged_within(rtt), admitted).await.is_ok() {
            std::future::pending::<()>().await;
        }
    }
}

/// max(250 ms, RTT + 2 PTO), with the variance of a quiet path taken as a quarter of its RTT (RFC 9002 §6.2.1).
fn acknowledged_within(rtt: Duration) -> Duration {
    let pto = rtt * 2 + ACK_DELAY;
    ACKNOWLEDGED_WITHIN.max(rtt + pto * 2)
}

/// The serving side: an extension of every request that came over HTTP/3. Cloneable.
#[derive(Clone, Debug, Default)]
pub struct Acknowledge(Arc<Notify>);

impl Acknowledge {
    /// Tells the caller that the call is admitted. Once is enough.
    pub fn send(&self) {
        self.0.notify_one();
    }

    /// Resolves when the call is admitted.
    pub(crate) async fn wanted(&self) {
        self.0.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    async fn is_overdue_within(watching: Watching, wait: Duration) -> bool {
        tokio::time::timeout(wait, watching.overdue()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn an_acknowledgement_is_overdue_after_a_quarter_of_a_second() {
        let (progress, watching) = Progress::new();
        progress.sent(2 * MS);
        assert!(!is_overdue_within(watching.clone(), 249 * MS).await);
        assert!(is_overdue_within(watching, 251 * MS).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_way_is_given_more_time() {
        let (progress, watching) = Progress::new();
        progress.sent(150 * MS);
        assert!(!is_overdue_within(watching.clone(), 790 * MS).await);
        assert!(is_overdue_within(watching, 810 * MS).await);
    }

    #[tokio::test(start_paused = true)]
    async fn connecting_may_take_a_second() {
        let (_progress, watching) = Progress::new();
        assert!(!is_overdue_within(watching.clone(), 990 * MS).await);
        assert!(is_overdue_within(watching, 1_010 * MS).await);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_acknowledged_or_mute_is_never_overdue() {
        for mute in [false, true] {
            let (progress, mut watching) = Progress::new();
            progress.sent(MS);
            if mute {
                progress.mute();
            } else {
                progress.acknowledged();
            }
            watching.admitted().await;
            assert_eq!(watching.is_acknowledged(), !mute);
            assert!(!is_overdue_within(watching, Duration::from_secs(3_600)).await);
        }
    }
}
