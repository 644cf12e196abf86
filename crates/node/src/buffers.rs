//! How much of requests the whole process holds back, and the bodies that hold it.
//!
//! A request is held back for two reasons: to find the model it names (`model`), and to send it once more when the first
//! attempt fails (`replay`). Both take from one budget; a call that finds it empty is refused as busy at the door.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, body::Body};

/// The budget of a process, shared by its workers. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Buffers(Arc<Semaphore>);

/// Bytes taken from the budget, given back when dropped.
#[derive(Debug, Default)]
pub(crate) struct HeldBytes(Option<OwnedSemaphorePermit>);

/// What one piece of a body takes beyond its bytes: many small pieces are not for free.
pub(crate) const PIECE_BYTES: usize = 128;

/// A call is admitted only while this much is left: what one call may hold back for one reason.
pub(crate) const PER_CALL_BYTES: usize = 1 << 20;

impl Buffers {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    /// Whether one call more may be admitted.
    pub(crate) fn have_room(&self) -> bool {
        self.0.available_permits() >= PER_CALL_BYTES
    }

    /// Takes a piece of `bytes` into `held`; `false`: there is not that much left.
    pub(crate) fn take(&self, bytes: usize, held: &mut HeldBytes) -> bool {
        let permit = u32::try_from(bytes.saturating_add(PIECE_BYTES))
            .ok()
            .and_then(|bytes| self.0.clone().try_acquire_many_owned(bytes).ok());
        match (permit, &mut held.0) {
            (None, _) => return false,
            (Some(more), Some(held)) => held.merge(more),
            (Some(first), held) => *held = Some(first),
        }
        true
    }

    #[cfg(test)]
    pub(crate) fn left(&self) -> usize {
        self.0.available_permits()
    }
}

/// A body of which the front was looked at.
#[derive(Debug)]
pub(crate) struct Look {
    /// What was taken off the front, in order.
    pub(crate) seen: VecDeque<Frame<Bytes>>,
    pub(crate) rest: Body,
    /// What the front takes from the budget.
    pub(crate) held: HeldBytes,
}

impl Look {
    /// A body nothing was taken off.
    pub(crate) fn new(body: Body) -> Self {
        Self { seen: VecDeque::new(), rest: body, held: HeldBytes::default() }
    }
}

impl http_body::Body for Look {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(frame) = self.seen.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        self.held = HeldBytes::default();
        Pin::new(&mut self.rest).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.seen.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let seen: u64 = self.seen.iter().filter_map(Frame::data_ref).map(|d| d.len() as u64).sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(seen));
        if let Some(upper) = rest.upper().and_then(|upper| upper.checked_add(seen)) {
            hint.set_upper(upper);
        }
        hint
    }
}
