//! Streams nobody reads must not starve the others.
//!
//! QUIC gives connection credit back only when bytes are read (RFC 9000 §4.1), so a few calls whose reader stalls can hold
//! the whole window of a connection. A slow reader alone is no fault: gRPC flow control is made for it. Only while the
//! stalled streams could hold more than half of the window are they given up, the longest-stalled first.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::stream::{Receiver, SharedReceiver};
use crate::{Limits, TransportError};

/// The streams of one connection that have a reader.
#[derive(Debug)]
pub(crate) struct Unread {
    timeout: Duration,
    /// How many streams may be stalled: more could hold over half of the connection's window.
    stalled_max: usize,
    streams: Mutex<Vec<Weak<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    receiver: Weak<Mutex<Receiver>>,
    /// When the reader last took something; `None` while it waits for more, which is not stalling.
    last_take: Mutex<Option<Instant>>,
}

/// A reader's side of the watch; the stream is forgotten when it is dropped.
#[derive(Debug)]
pub(crate) struct Watch(Arc<Entry>);

impl Watch {
    /// The reader took something.
    pub(crate) fn took(&self, now: Instant) {
        *self.0.last_take.lock() = Some(now);
    }

    /// The reader waits for more.
    pub(crate) fn waiting(&self) {
        *self.0.last_take.lock() = None;
    }
}

impl Unread {
    pub(crate) fn new(limits: &Limits) -> Self {
        let half = limits.connection_window_bytes / 2;
        Self {
            timeout: limits.unread_timeout,
            stalled_max: (half / limits.stream_window_bytes.max(1)) as usize,
            streams: Mutex::default(),
        }
    }

    /// Begins to watch a stream.
    pub(crate) fn watch(&self, receiver: &SharedReceiver, now: Instant) -> Watch {
        let entry = Arc::new(Entry {
            receiver: Arc::downgrade(receiver),
            last_take: Mutex::new(Some(now)),
        });
        let mut streams = self.streams.lock();
        // Forgotten streams go when the list would grow: amortised constant work.
        if streams.len() == streams.capacity() {
            streams.retain(|entry| entry.strong_count() > 0);
        }
        streams.push(Arc::downgrade(&entry));
        Watch(entry)
    }

    /// Gives up the longest-stalled streams while too many are stalled. Returns how many were given up.
    pub(crate) fn sweep(&self, now: Instant) -> usize {
        let mut stalled: Vec<(Instant, SharedReceiver)> = Vec::new();
        self.streams.lock().retain(|entry| {
            let Some(entry) = entry.upgrade() else { return false };
            if let Some(since) = *entry.last_take.lock()
                && now.saturating_duration_since(since) >= self.timeout
                && let Some(receiver) = entry.receiver.upgrade()
            {
                stalled.push((since, receiver));
            }
            true
        });
        stalled.retain(|(_, receiver)| receiver.lock().has_unread());
        stalled.sort_by_key(|(since, _)| *since);
        let surplus = stalled.len().saturating_sub(self.stalled_max);
        for (_, receiver) in stalled.iter().take(surplus) {
            receiver.lock().give_up(TransportError::Unread(self.timeout));
        }
        surplus
    }
}
