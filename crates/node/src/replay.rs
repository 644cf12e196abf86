//! A request body that can be sent more than once: what the first attempt read is kept, up to a bound, until a reply comes.
//!
//! Only the newest attempt gets anything; an older one that is still being torn down sees its body break off.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use parking_lot::Mutex;
use tonic::{Status, body::Body};
use transport::TransportError;

use crate::buffers::{Buffers, HeldBytes, PER_CALL_BYTES, PIECE_BYTES};

/// The body of one call, for all its attempts.
#[derive(Clone, Debug)]
pub(crate) struct Replay(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    source: Body,
    source_ended: bool,
    /// The caller's side broke off: nobody else is to blame for what follows.
    source_failed: bool,
    /// What was read from the source, in order; empty once it need not or cannot be kept.
    kept: Vec<Piece>,
    keeping: bool,
    /// Whether something was read that is not kept.
    lost: bool,
    bytes: usize,
    held: HeldBytes,
    buffers: Buffers,
    attempt: u32,
    /// How many of the kept pieces the current attempt has read.
    read: usize,
}

#[derive(Clone, Debug)]
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl Piece {
    fn frame(self) -> Frame<Bytes> {
        match self {
            Self::Data(data) => Frame::data(data),
            Self::Trailers(trailers) => Frame::trailers(trailers),
        }
    }
}

impl Replay {
    /// The call's body, `body`. `keep`: it may be sent again.
    pub(crate) fn new(body: Body, keep: bool, buffers: Buffers) -> Self {
        Self(Arc::new(Mutex::new(State {
            source: body,
            source_ended: false,
            source_failed: false,
            kept: Vec::new(),
            keeping: keep,
            lost: false,
            bytes: 0,
            held: HeldBytes::default(),
            buffers,
            attempt: 0,
            read: 0,
        })))
    }

    /// The body for the next attempt; what was read so far comes first.
    pub(crate) fn body(&self) -> Body {
        let attempt = {
            let mut state = self.0.lock();
            state.attempt += 1;
            state.read = 0;
            state.attempt
        };
        // Unlocked: a new body is asked at once whether it has ended.
        Body::new(Replayed { state: self.0.clone(), attempt })
    }

    /// Whether another attempt would get the whole body.
    pub(crate) fn is_whole(&self) -> bool {
        !self.0.lock().lost
    }

    /// Whether the caller has said all it has to say, as far as is known.
    pub(crate) fn is_complete(&self) -> bool {
        let state = self.0.lock();
        state.source_ended || state.source.is_end_stream()
    }

    /// Whether the caller's side broke off.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.lock().source_failed
    }

    /// There will be no other attempt: nothing need be kept.
    pub(crate) fn commit(&self) {
        let mut state = self.0.lock();
        state.keeping = false;
        state.forget();
    }
}

impl State {
    /// Gives back what nobody will read again: all that is kept, once the last attempt has read it.
    fn forget(&mut self) {
        if !self.keeping && self.read >= self.kept.len() {
            self.kept = Vec::new();
            self.held = HeldBytes::default();
            self.read = 0;
        }
    }

    /// Keeps `piece` for later attempts, unless it is too much.
    fn keep(&mut self, piece: &Piece) {
        let size = match piece {
            Piece::Data(data) => data.len(),
            Piece::Trailers(_) => 0,
        };
        self.bytes += size + PIECE_BYTES;
        let fits =
            self.keeping && self.bytes <= PER_CALL_BYTES && self.buffers.take(size, &mut self.held);
        if fits {
            self.kept.push(piece.clone());
        } else {
            self.lost = true;
            self.keeping = false;
            self.forget();
        }
    }
}

/// The body of one attempt.
#[derive(Debug)]
struct Replayed {
    state: Arc<Mutex<State>>,
    attempt: u32,
}

impl http_body::Body for Replayed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut state = self.state.lock();
        if state.attempt != self.attempt {
            return Poll::Ready(Some(Err(TransportError::cancelled().into())));
        }
        if let Some(piece) = state.kept.get(state.read).cloned() {
            state.read += 1;
            state.forget();
            return Poll::Ready(Some(Ok(piece.frame())));
        }
        if state.source_ended {
            return Poll::Ready(None);
        }
        let Some(frame) = std::task::ready!(Pin::new(&mut state.source).poll_frame(cx)) else {
            state.source_ended = true;
            return Poll::Ready(None);
        };
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                tracing::debug!(%error, "the request broke off");
                state.source_failed = true;
                state.lost = true;
                // To everybody further on the caller has gone away, whatever befell it.
                return Poll::Ready(Some(Err(TransportError::cancelled().into())));
            }
        };
        let piece = match frame.into_data() {
            Ok(data) => Piece::Data(data),
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => Piece::Trailers(trailers),
                // http-body knows no third kind.
                Err(_) => return Poll::Ready(None),
            },
        };
        // Read before it is kept: what cannot be kept any more is given back at once.
        state.read = state.kept.len();
        state.keep(&piece);
        state.read = state.kept.len();
        Poll::Ready(Some(Ok(piece.frame())))
    }

    fn is_end_stream(&self) -> bool {
        let state = self.state.lock();
        state.attempt == self.attempt
            && state.read >= state.kept.len()
            && (state.source_ended || state.source.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.state.lock();
        if state.read == 0 && state.bytes == 0 {
            state.source.size_hint()
        } else {
            SizeHint::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, Full};

    use super::*;

    /// A body of several pieces and trailers.
    struct Pieces(std::vec::IntoIter<Frame<Bytes>>);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.next().map(Ok))
        }
    }

    /// A body that fails at once.
    struct Broken;

    impl http_body::Body for Broken {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(Some(Err(Status::internal("reset"))))
        }
    }

    fn frames(pieces: &[&'static str]) -> Body {
        let trailers = HeaderMap::from_iter([(http::header::TE, "x".parse().unwrap())]);
        let data = pieces.iter().map(|piece| Frame::data(Bytes::from_static(piece.as_bytes())));
        let frames: Vec<_> = data.chain([Frame::trailers(trailers)]).collect();
        Body::new(Pieces(frames.into_iter()))
    }

    async fn all(body: Body) -> Result<String, Status> {
        let body = body.collect().await?;
        assert!(body.trailers().is_some(), "trailers are part of it");
        Ok(String::from_utf8(body.to_bytes().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn every_attempt_gets_the_whole_body() {
        let replay = Replay::new(frames(&["a", "b", "c"]), true, Buffers::new(1 << 20));
        let mut first = replay.body();
        let frame = std::future::poll_fn(|cx| Pin::new(&mut first).poll_frame(cx)).await;
        assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), "a");
        assert!(replay.is_whole());
        assert_eq!(all(replay.body()).await.unwrap(), "abc");
        assert_eq!(all(replay.body()).await.unwrap(), "abc");
        // The one before is cut off.
        assert!(all(first).await.is_err());
    }

    #[tokio::test]
    async fn a_body_beyond_the_bound_is_sent_once_and_nothing_of_it_stays() {
        let buffers = Buffers::new(4 << 20);
        let big = Body::new(Full::new(Bytes::from(vec![7; PER_CALL_BYTES + 1])));
        let replay = Replay::new(big, true, buffers.clone());
        let sent = replay.body().collect().await.unwrap().to_bytes();
        assert_eq!(sent.len(), PER_CALL_BYTES + 1);
        assert!(!replay.is_whole());
        assert_eq!(buffers.left(), 4 << 20);
    }

    #[tokio::test]
    async fn without_budget_a_body_is_sent_once() {
        let buffers = Buffers::new(PIECE_BYTES + 2);
        let replay = Replay::new(frames(&["abc"]), true, buffers.clone());
        assert_eq!(all(replay.body()).await.unwrap(), "abc");
        assert!(!replay.is_whole());
    }

    #[tokio::test]
    async fn what_is_kept_is_given_back_with_the_call() {
        let buffers = Buffers::new(1 << 20);
        let replay = Replay::new(frames(&["abc", "def"]), true, buffers.clone());
        assert_eq!(all(replay.body()).await.unwrap(), "abcdef");
        assert_eq!(buffers.left(), (1 << 20) - 6 - 3 * PIECE_BYTES);
        drop(replay);
        assert_eq!(buffers.left(), 1 << 20);
    }

    #[tokio::test]
    async fn many_small_pieces_are_not_for_free() {
        let buffers = Buffers::new(64 << 20);
        let one = Bytes::from_static(b"x");
        let many: Vec<_> = (0..100_000).map(|_| Frame::data(one.clone())).collect();
        let replay = Replay::new(Body::new(Pieces(many.into_iter())), true, buffers);
        assert_eq!(replay.body().collect().await.unwrap().to_bytes().len(), 100_000);
        assert!(!replay.is_whole(), "they would take more than a megabyte");
    }

    #[tokio::test]
    async fn a_request_that_breaks_off_is_the_callers_doing() {
        let replay = Replay::new(Body::new(Broken), true, Buffers::new(1 << 20));
        let error = replay.body().collect().await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::Cancelled);
        assert!(replay.has_failed() && !replay.is_whole());
    }

    #[tokio::test]
    async fn after_a_commit_nothing_more_is_kept() {
        let buffers = Buffers::new(1 << 20);
        let replay = Replay::new(frames(&["abc", "def"]), true, buffers.clone());
        let mut body = replay.body();
        let frame = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), "abc");
        assert_eq!(buffers.left(), (1 << 20) - 3 - PIECE_BYTES);
        replay.commit();
        assert_eq!(buffers.left(), 1 << 20, "what was read is given back at once");
        assert_eq!(all(body).await.unwrap(), "def");
        assert_eq!(buffers.left(), 1 << 20);
    }
}
