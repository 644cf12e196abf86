//! Whether the other end of a link over TCP lives, and how far away it is: by pings of HTTP/2.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use base::clock;
use h2::{Ping, PingPong};
use parking_lot::Mutex;
use tokio::time::Sleep;

use super::KEEP_ALIVE;

/// A link on which nothing comes for so long is gone: there is time for a ping that was lost to be sent again, twice.
const SILENCE: Duration = Duration::from_millis(1400);
/// How often it is looked whether to ask.
const BEAT: Duration = Duration::from_millis(250);

/// Finds out whether the other end lives, and how far away it is.
#[derive(Debug)]
pub(super) struct Pulse {
    ping: PingPong,
    heard: Arc<Mutex<Instant>>,
    /// When a ping was sent that is not answered yet.
    asked: Option<Instant>,
    /// When the last one was sent.
    asked_last: Option<Instant>,
    /// The round trip, once one was measured.
    rtt: Option<Duration>,
    /// When `timer` is to fire.
    due: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Pulse {
    /// Asks at once.
    pub(super) fn new(ping: PingPong, heard: Arc<Mutex<Instant>>) -> Self {
        let timer = Box::pin(tokio::time::sleep(Duration::ZERO));
        let due = clock::now();
        Self { ping, heard, asked: None, asked_last: None, rtt: None, due, timer }
    }

    /// Ready when it is time to look.
    pub(super) fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.timer.as_mut().poll(cx)
    }

    /// Ready when a ping was answered, with the round trip now, smoothed as RFC 6298 does.
    pub(super) fn poll_pong(&mut self, cx: &mut Context<'_>) -> Poll<Duration> {
        let Some(asked) = self.asked else { return Poll::Pending };
        if std::task::ready!(self.ping.poll_pong(cx)).is_err() {
            // The connection is over, and says so itself.
            return Poll::Pending;
        }
        self.asked = None;
        let measured = clock::now().saturating_duration_since(asked);
        let rtt = self.rtt.map_or(measured, |rtt| (rtt * 7 + measured) / 8);
        Poll::Ready(*self.rtt.insert(rtt))
    }

    /// Asks again where nothing comes by itself; `false`: the other end is gone.
    pub(super) fn beat(&mut self, now: Instant) -> bool {
        let heard = *self.heard.lock();
        let quiet = now.saturating_duration_since(heard);
        // When this process itself stood still, what came meanwhile may not have been read yet.
        let is_late = now.saturating_duration_since(self.due) >= KEEP_ALIVE;
        if quiet >= SILENCE && !is_late {
            return false;
        }
        let is_due = |at: Instant| now.saturating_duration_since(at) >= SILENCE;
        let wants = quiet >= BEAT || self.asked_last.is_none_or(is_due);
        if self.asked.is_none() && wants && self.ping.send_ping(Ping::opaque()).is_ok() {
            (self.asked, self.asked_last) = (Some(now), Some(now));
        }
        let dead_at = heard + SILENCE;
        self.due = if dead_at > now { dead_at.min(now + BEAT) } else { now + BEAT };
        self.timer.as_mut().reset(self.due.into());
        true
    }
}
