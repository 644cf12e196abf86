//! Streams nobody reads must not starve the others.
//!
//! HTTP/2 and QUIC give connection credit back only when bytes are read (RFC 9113 §6.9, RFC 9000 §4.1), so a few calls
//! whose reader stalls can hold the whole window of a connection. A slow reader alone is no fault: gRPC flow control is
//! made for it. Only while the stalled streams could hold more than half of the window are they given up, the
//! longest-stalled first.

use std::{
    fmt::Debug,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{Limits, TransportError};

/// What a stream must offer to be watched.
pub(crate) trait Watched: Debug + Send {
    /// Whether bytes wait to be read; may take one piece off the stream to find out.
    fn has_unread(&mut self) -> bool;

    /// Stops the stream: its bytes are dropped, and its reader will be told `error`.
    fn give_up(&mut self, error: TransportError);
}

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
    stream: Weak<Mutex<dyn Watched>>,
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

    /// How often to sweep: often enough that the timeout is kept within a fifth of itself.
    pub(crate) fn interval(&self) -> Duration {
        (self.timeout / 5).max(Duration::from_millis(10))
    }

    /// Begins to watch a stream.
    pub(crate) fn watch<S: Watched + 'static>(
        &self,
        stream: &Arc<Mutex<S>>,
        now: Instant,
    ) -> Watch {
        // The type is forgotten before the reference is weakened: a weak reference cannot change its own.
        let stream: Arc<Mutex<dyn Watched>> = stream.clone();
        let entry =
            Arc::new(Entry { stream: Arc::downgrade(&stream), last_take: Mutex::new(Some(now)) });
        let mut streams = self.streams.lock();
        // Forgotten streams go when the list would grow: amortised constant work.
        if streams.len() == streams.capacity() {
            streams.retain(|entry| entry.strong_count() > 0);
        }
        streams.push(Arc::downgrade(&entry));
        Watch(entry)
    }

    /// Gives up the longest-stalled streams while too many are stalled.
    pub(crate) fn sweep(&self, now: Instant) {
        let mut stalled: Vec<(Instant, Arc<Mutex<dyn Watched>>)> = Vec::new();
        self.streams.lock().retain(|entry| {
            let Some(entry) = entry.upgrade() else { return false };
            if let Some(since) = *entry.last_take.lock()
                && now.saturating_duration_since(since) >= self.timeout
                && let Some(stream) = entry.stream.upgrade()
            {
                stalled.push((since, stream));
            }
            true
        });
        stalled.retain(|(_, stream)| stream.lock().has_unread());
        stalled.sort_by_key(|(since, _)| *since);
        let surplus = stalled.len().saturating_sub(self.stalled_max);
        for (_, stream) in stalled.iter().take(surplus) {
            stream.lock().give_up(TransportError::Unread(self.timeout));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Stream {
        unread: bool,
        given_up: bool,
    }

    impl Watched for Stream {
        fn has_unread(&mut self) -> bool {
            self.unread && !self.given_up
        }

        fn give_up(&mut self, _: TransportError) {
            self.given_up = true;
        }
    }

    type Watching = (Arc<Mutex<Stream>>, Watch);

    /// Four streams that stalled one second after another, on a connection that bears two.
    fn stalled() -> (Unread, Instant, Vec<Watching>) {
        let unread = Unread::new(&Limits::clients());
        let start = base::clock::now();
        let streams = (0..4)
            .map(|i| {
                let stream = Arc::new(Mutex::new(Stream { unread: true, given_up: false }));
                let watch = unread.watch(&stream, start + Duration::from_secs(i));
                (stream, watch)
            })
            .collect();
        (unread, start, streams)
    }

    fn given_up(streams: &[Watching]) -> Vec<bool> {
        streams.iter().map(|(stream, _)| stream.lock().given_up).collect()
    }

    #[test]
    fn the_longest_stalled_go_first_and_only_as_many_as_must() {
        let (unread, start, streams) = stalled();
        unread.sweep(start + Duration::from_secs(6));
        assert_eq!(given_up(&streams), [false; 4], "two stalled for five seconds are borne");
        unread.sweep(start + Duration::from_secs(7));
        assert_eq!(given_up(&streams), [true, false, false, false]);
        unread.sweep(start + Duration::from_secs(60));
        assert_eq!(given_up(&streams), [true, true, false, false]);
    }

    #[test]
    fn a_reader_that_waits_or_takes_is_not_stalled() {
        let (unread, start, streams) = stalled();
        streams[0].1.waiting();
        streams[1].1.took(start + Duration::from_secs(58));
        streams[2].0.lock().unread = false;
        unread.sweep(start + Duration::from_secs(60));
        assert_eq!(given_up(&streams), [false; 4]);
    }

    #[test]
    fn streams_that_ended_are_forgotten() {
        let unread = Unread::new(&Limits::clients());
        let now = base::clock::now();
        for _ in 0..10_000 {
            let stream = Arc::new(Mutex::new(Stream { unread: true, given_up: false }));
            drop(unread.watch(&stream, now));
        }
        assert!(unread.streams.lock().len() < 64);
    }
}
