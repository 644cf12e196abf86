//! How much of requests the whole process holds back, and the bodies that hold it.
//!
//! A request is held back for two reasons: to find the model it names (`model`), and to send it once more when the first
//! attempt fails (`replay`). Both take from one budget; a call that finds it empty is refused as busy at the door.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

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
