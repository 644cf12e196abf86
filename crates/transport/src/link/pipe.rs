//! What lies between those who use a link over TCP and the task that drives its connection: frames that wait on either side,
//! and how the link ended.
//!
//! A frame on the wire is a message of gRPC: a zero, the length in four bytes, big endian, and so many bytes.

use std::{
    collections::VecDeque,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::Waker,
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::FlowControl;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::FRAME_BYTES_MAX;
use crate::TransportError;

/// Bytes before each frame.
const PREFIX_BYTES: usize = 5;
/// Above so many bytes that wait to be written, a frame that may be lost is dropped, and one that must arrive waits.
const WAITING_BYTES_MAX: usize = 64 << 10;
/// Frames that wait to be read at most; their bytes are bounded by the window of the stream.
const FRAMES_MAX: usize = 4096;

/// How a link ended.
#[derive(Clone, Debug)]
pub(super) struct End {
    /// What those who use it are told.
    pub(super) why: String,
    pub(super) parting: Parting,
    /// Whether the other end said that it is done, rather than that it closes the link.
    pub(super) is_done: bool,
    /// What came that is no frame.
    bad: Option<&'static str>,
}

/// What the other end is told.
#[derive(Clone, Debug)]
pub(super) enum Parting {
    /// Why, after what waits to be written.
    Say(String),
    /// That we are done too; what waits is dropped.
    Agree,
    /// Nothing: nobody would hear it.
    Leave,
}

impl End {
    pub(super) fn new(why: impl Into<String>, parting: Parting) -> Self {
        Self { why: why.into(), parting, is_done: false, bad: None }
    }

    /// The other end said good-bye, or that it is done.
    pub(super) fn parted(why: String, is_done: bool) -> Self {
        Self { is_done, ..Self::new(why, Parting::Agree) }
    }

    /// Something is wrong with the other end, and it is told what.
    pub(super) fn fault(why: impl Into<String>) -> Self {
        let why = why.into();
        Self::new(why.clone(), Parting::Say(why))
    }

    /// What came from the other end is no frame.
    pub(super) fn bad_frame(why: &'static str) -> Self {
        Self { bad: Some(why), ..Self::fault(why) }
    }

    fn error(&self) -> TransportError {
        match self.bad {
            Some(why) => TransportError::BadFrame(why),
            None => TransportError::Closed(self.why.clone()),
        }
    }
}

/// Between a link and its driver.
#[derive(Debug)]
pub(super) struct Pipe {
    inbox: Mutex<Inbox>,
    arrived: Notify,
    outbox: Mutex<Outbox>,
    room: Notify,
    rtt_us: AtomicU64,
    end: OnceLock<End>,
    ended: CancellationToken,
}

#[derive(Debug)]
struct Inbox {
    frames: VecDeque<Bytes>,
    /// Says that so many bytes may be sent again; `None` when the link has ended.
    credit: Option<FlowControl>,
}

/// What waits to be written. Locked by users and driver for moments only.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Frames with their prefixes.
    pub(super) bytes: BytesMut,
    /// Whether nothing comes after them.
    pub(super) is_finished: bool,
    /// Wakes the driver.
    pub(super) driver: Option<Waker>,
}

impl Outbox {
    fn push(&mut self, frame: &[u8]) {
        self.bytes.reserve(PREFIX_BYTES + frame.len());
        self.bytes.put_u8(0);
        self.bytes.put_u32(u32::try_from(frame.len()).unwrap_or(u32::MAX));
        self.bytes.put_slice(frame);
    }
}

impl Pipe {
    pub(super) fn new(credit: FlowControl, rtt: Duration) -> Self {
        let pipe = Self {
            inbox: Mutex::new(Inbox { frames: VecDeque::new(), credit: Some(credit) }),
            arrived: Notify::new(),
            outbox: Mutex::default(),
            room: Notify::new(),
            rtt_us: AtomicU64::new(0),
            end: OnceLock::new(),
            ended: CancellationToken::new(),
        };
        pipe.set_rtt(rtt);
        pipe
    }

    pub(super) fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    pub(super) fn set_rtt(&self, rtt: Duration) {
        self.rtt_us.store(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Writes a frame unless too much waits already.
    pub(super) fn offer(&self, frame: &[u8]) -> Result<(), TransportError> {
        self.try_push(frame).map(drop)
    }

    /// Writes a frame as soon as there is room.
    pub(super) async fn push(&self, frame: &[u8]) -> Result<(), TransportError> {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.try_push(frame)? {
                return Ok(());
            }
            tokio::select! {
                () = room => {}
                () = self.ended.cancelled() => {}
            }
        }
    }

    fn try_push(&self, frame: &[u8]) -> Result<bool, TransportError> {
        if let Some(end) = self.end.get() {
            return Err(end.error());
        }
        let mut outbox = self.outbox.lock();
        if outbox.bytes.len() > WAITING_BYTES_MAX {
            return Ok(false);
        }
        outbox.push(frame);
        let driver = outbox.driver.take();
        drop(outbox);
        wake(driver);
        Ok(true)
    }

    /// Says that nothing more is written.
    pub(super) fn finish(&self) {
        let mut outbox = self.outbox.lock();
        outbox.is_finished = true;
        let driver = outbox.driver.take();
        drop(outbox);
        wake(driver);
    }

    /// The next frame; may be given up at any time.
    pub(super) async fn receive(&self) -> Result<Bytes, TransportError> {
        loop {
            let arrived = self.arrived.notified();
            let end = self.end.get();
            // What came before the end is still read.
            if let Some(frame) = self.take() {
                return Ok(frame);
            }
            if let Some(end) = end {
                return Err(end.error());
            }
            tokio::select! {
                () = arrived => {}
                () = self.ended.cancelled() => {}
            }
        }
    }

    fn take(&self) -> Option<Bytes> {
        let mut inbox = self.inbox.lock();
        let was_full = inbox.frames.len() >= FRAMES_MAX;
        let frame = inbox.frames.pop_front()?;
        if let Some(credit) = &mut inbox.credit {
            // Fails when the stream is over, and then nobody wants it.
            drop(credit.release_capacity(PREFIX_BYTES + frame.len()));
        }
        drop(inbox);
        if was_full {
            wake(self.outbox.lock().driver.take());
        }
        Some(frame)
    }

    /// Hands a frame that came to whoever reads.
    pub(super) fn deliver(&self, frame: Bytes) {
        self.inbox.lock().frames.push_back(frame);
        self.arrived.notify_one();
    }

    /// Whether nothing more is to be delivered now.
    pub(super) fn is_full(&self) -> bool {
        self.inbox.lock().frames.len() >= FRAMES_MAX
    }

    /// Whether everything that came was read.
    pub(super) fn is_read(&self) -> bool {
        self.inbox.lock().frames.is_empty()
    }

    /// What waits to be written, for the driver.
    pub(super) fn outbox(&self) -> &Mutex<Outbox> {
        &self.outbox
    }

    /// There is room again.
    pub(super) fn made_room(&self) {
        self.room.notify_waiters();
    }

    /// Ends the link; only the first end counts.
    pub(super) fn end(&self, end: End) {
        if self.end.set(end).is_ok() {
            // The connection ends only when nobody holds its stream.
            self.inbox.lock().credit = None;
            self.ended.cancel();
        }
    }

    /// Resolves when the link has ended.
    pub(super) async fn ended(&self) -> End {
        self.ended.cancelled().await;
        self.end.get().cloned().unwrap_or_else(|| End::new("closed", Parting::Leave))
    }
}

fn wake(driver: Option<Waker>) {
    if let Some(driver) = driver {
        driver.wake();
    }
}

/// Puts frames together from what comes.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    bytes: BytesMut,
}

impl Assembler {
    /// Whether a frame has begun.
    pub(super) fn has_begun(&self) -> bool {
        !self.bytes.is_empty()
    }

    pub(super) fn push(&mut self, data: &[u8]) {
        self.bytes.extend_from_slice(data);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// What is wrong with what came, in words.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, &'static str> {
        let Some(mut prefix) = self.bytes.get(..PREFIX_BYTES) else { return Ok(None) };
        if prefix.get_u8() != 0 {
            return Err("a frame does not begin as one");
        }
        let length = prefix.get_u32() as usize;
        if length > FRAME_BYTES_MAX {
            return Err(super::TOO_LONG);
        }
        if self.bytes.len() < PREFIX_BYTES + length {
            return Ok(None);
        }
        self.bytes.advance(PREFIX_BYTES);
        let frame = self.bytes.split_to(length).freeze();
        if self.bytes.is_empty() {
            // An idle link holds no buffer.
            self.bytes = BytesMut::new();
        }
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_put_together_however_they_are_cut() {
        let mut outbox = Outbox::default();
        let frames = [vec![], vec![1], vec![7; 300], vec![9; FRAME_BYTES_MAX]];
        for frame in &frames {
            outbox.push(frame);
        }
        for cut in [1, 4, 5, 6, 299, 1 << 20] {
            let (mut assembler, mut got) = (Assembler::default(), Vec::new());
            for piece in outbox.bytes.chunks(cut) {
                assembler.push(piece);
                while let Some(frame) = assembler.next().unwrap() {
                    got.push(frame.to_vec());
                }
            }
            assert!(got == frames && !assembler.has_begun(), "{cut}");
        }
    }

    #[test]
    fn what_is_no_frame_is_said() {
        let next = |bytes: &[u8]| {
            let mut assembler = Assembler::default();
            assembler.push(bytes);
            assembler.next()
        };
        assert!(next(&[1, 0, 0, 0, 0]).unwrap_err().contains("begin"));
        assert!(next(&[0, 0, 1, 0, 1]).unwrap_err().contains("longer"));
        assert_eq!(next(&[0, 0, 1, 0, 0]), Ok(None), "the longest that is read");
        assert_eq!(next(&[0, 0, 0, 0]), Ok(None));
    }
}
