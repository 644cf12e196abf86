//! The two halves of a request stream, and bodies over them.
//!
//! Dropping quinn's `SendStream` sends a clean end and dropping its `RecvStream` stops with code 0. Both would make a
//! truncated message look complete, so both halves live behind guards that say how they end.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as _, Frame as BodyFrame, SizeHint};
use parking_lot::Mutex;
use tonic::{Status, body::Body};

use super::{
    Code,
    connection::{Connection, InFlight},
    frame::{ConnectionFault, Decoder, Frame},
    headers::{self, SectionError},
    qpack::QpackError,
};
use crate::{
    TransportError,
    unread::{Watch, Watched},
};

/// Most bytes taken from a stream at once.
const READ_BYTES: usize = 64 << 10;
/// Frames are gathered up to this size before they are handed to QUIC.
const GATHER_BYTES: usize = 16 << 10;

/// The sending half. Dropped before [`Sender::finish`], it resets the stream with the code it was given.
#[derive(Debug)]
pub(crate) struct Sender {
    stream: quinn::SendStream,
    connection: Arc<Connection>,
    /// What is left to be written of an interim response.
    interim: BytesMut,
    open: bool,
    drop_code: Code,
}

/// How a body ended early.
#[derive(Debug)]
pub(crate) enum Cut {
    /// The body itself failed.
    Body(Status),
    /// The other end does not want more (STOP_SENDING).
    Stopped,
    /// The connection is gone.
    Lost,
    /// The trailers are longer than the other end accepts.
    TooLong,
}

impl Sender {
    pub(crate) fn new(
        stream: quinn::SendStream,
        connection: Arc<Connection>,
        drop_code: Code,
    ) -> Self {
        Self { stream, connection, interim: BytesMut::new(), open: true, drop_code }
    }

    /// Resolves when the other end wants no more, or is gone.
    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let stopped = self.stream.stopped();
        async move {
            // `Ok(None)`: everything was delivered, which is no reason to stop anything.
            if let Ok(None) = stopped.await {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Resolves when the other end has everything, or is gone.
    pub(crate) async fn delivered(&self) {
        drop(self.stream.stopped().await);
    }

    /// Sends `head` and then everything of `body`, then ends the stream cleanly.
    pub(crate) async fn send(&mut self, head: BytesMut, mut body: Body) -> Result<(), Cut> {
        let mut out = std::mem::take(&mut self.interim);
        out.unsplit(head);
        let mut began = false;
        loop {
            if body.is_end_stream() {
                break;
            }
            // What is ready now goes into one write; only before waiting is it handed on.
            let ready = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut body).poll_frame(cx)));
            let frame = match ready.await {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    self.write(&mut out, None).await?;
                    std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
                }
            };
            let Some(frame) = frame else { break };
            let began = std::mem::replace(&mut began, true);
            match frame.map_err(Cut::Body)?.into_data() {
                // Nothing, said before anything else, is handed on all the same: it may be a signal.
                Ok(data) if data.is_empty() && began => {}
                Ok(data) => {
                    let copy_below = self.connection.limits.copy_below_bytes;
                    let whole = headers::put_data(&mut out, data, copy_below);
                    if whole.is_some() || out.len() >= GATHER_BYTES {
                        self.write(&mut out, whole).await?;
                    }
                }
                Err(other) => {
                    if let Ok(trailers) = other.into_trailers() {
                        let limit = self.connection.peer_section_limit();
                        let section =
                            headers::encode_trailers(&trailers, limit).map_err(|_| Cut::TooLong)?;
                        out.unsplit(headers::frame(&section));
                    }
                }
            }
        }
        self.write(&mut out, None).await?;
        self.finish();
        Ok(())
    }

    /// Sends an interim response. Cancelled half-way, what follows begins with its rest.
    pub(crate) async fn send_interim(&mut self, frame: BytesMut) -> Result<(), Cut> {
        self.interim = frame;
        while !self.interim.is_empty() {
            let written = self.stream.write(&self.interim).await.map_err(|_| Cut::Lost)?;
            self.interim.advance(written);
        }
        Ok(())
    }

    /// Hands `out`, and `whole` after it, to QUIC; waits while the connection's send window is full.
    async fn write(&mut self, out: &mut BytesMut, whole: Option<Bytes>) -> Result<(), Cut> {
        let mut chunks = [out.split().freeze(), whole.unwrap_or_default()];
        if chunks.iter().all(Bytes::is_empty) {
            return Ok(());
        }
        self.stream.write_all_chunks(&mut chunks).await.map_err(|error| match error {
            quinn::WriteError::Stopped(_) => Cut::Stopped,
            quinn::WriteError::ConnectionLost(_)
            | quinn::WriteError::ClosedStream
            | quinn::WriteError::ZeroRttRejected => Cut::Lost,
        })
    }

    fn finish(&mut self) {
        self.open = false;
        // Fails only when the stream was stopped or reset: then there is nothing to end.
        drop(self.stream.finish());
    }

    /// Ends the stream with `code`.
    pub(crate) fn reset(mut self, code: Code) {
        self.drop_code = code;
    }

    /// RFC 9218: 0 is the most urgent of 8; quinn sends higher priorities first.
    pub(crate) fn set_urgency(&self, urgency: u8) {
        drop(self.stream.set_priority(3 - i32::from(urgency)));
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if self.open {
            drop(self.stream.reset(self.drop_code.into()));
        }
    }
}

/// The receiving half. Dropped before its end, it tells the other end to stop with the code it was given.
#[derive(Debug)]
pub(crate) struct Receiver {
    stream: quinn::RecvStream,
    connection: Arc<Connection>,
    decoder: Decoder,
    input: Bytes,
    /// What ended the stream from this side, told to the reader when it comes back.
    given_up: Option<TransportError>,
    open: bool,
    drop_code: Code,
}

impl Receiver {
    pub(crate) fn new(
        stream: quinn::RecvStream,
        connection: Arc<Connection>,
        drop_code: Code,
    ) -> Self {
        let decoder = Decoder::request(connection.limits.header_section_bytes as usize);
        let input = Bytes::new();
        Self { stream, connection, decoder, input, given_up: None, open: true, drop_code }
    }

    /// The next frame, or `None` at a clean end.
    pub(crate) async fn frame(&mut self) -> Result<Option<Frame>, TransportError> {
        std::future::poll_fn(|cx| self.poll_frame(cx)).await
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, TransportError>> {
        loop {
            if let Some(error) = &self.given_up {
                return Poll::Ready(Err(error.clone()));
            }
            match self.decoder.decode(&mut self.input) {
                Ok(Some(frame)) => return Poll::Ready(Ok(Some(frame))),
                Ok(None) => {}
                Err(fault) => return Poll::Ready(Err(self.connection.fail(fault))),
            }
            match std::task::ready!(self.poll_chunk(cx)) {
                Ok(Some(chunk)) => self.input = chunk,
                Ok(None) => {
                    self.open = false;
                    if self.decoder.is_between_frames() {
                        return Poll::Ready(Ok(None));
                    }
                    let reason = "a stream ended inside a frame";
                    let fault = ConnectionFault { code: Code::FRAME_ERROR, reason };
                    return Poll::Ready(Err(self.connection.fail(fault)));
                }
                Err(error) => return Poll::Ready(Err(self.broke_off(error))),
            }
        }
    }

    /// The stream broke off: every later read says so too. quinn itself says it once and then claims a clean end.
    fn broke_off(&mut self, error: quinn::ReadError) -> TransportError {
        self.open = false;
        let error = match error {
            quinn::ReadError::ConnectionLost(error) => {
                self.connection.lost(&error, self.stream.id())
            }
            other => TransportError::from_read(other),
        };
        self.given_up = Some(error.clone());
        error
    }

    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, quinn::ReadError>> {
        // The future keeps nothing between polls: quinn holds the waker in the connection.
        pin!(self.stream.read_chunk(READ_BYTES, true))
            .poll(cx)
            .map_ok(|chunk| chunk.map(|chunk| chunk.bytes))
    }

    /// Tells the other end to stop, with `code`.
    pub(crate) fn stop(&mut self, code: Code) {
        if std::mem::take(&mut self.open) {
            drop(self.stream.stop(code.into()));
        }
    }

    /// The longest field section this end accepts, in bytes.
    pub(crate) fn section_limit(&self) -> usize {
        self.connection.limits.header_section_bytes as usize
    }

    /// What a bad field section means: only broken QPACK ends the connection.
    pub(crate) fn section_error(&self, error: SectionError) -> TransportError {
        match error {
            SectionError::Qpack(QpackError::Malformed(reason)) => self
                .connection
                .fail(ConnectionFault { code: Code::QPACK_DECOMPRESSION_FAILED, reason }),
            SectionError::Qpack(QpackError::TooLong { limit_bytes }) => {
                TransportError::HeadersTooLong { limit_bytes }
            }
            SectionError::Malformed(reason) => TransportError::Malformed(reason),
        }
    }

    /// A frame in a place of the message where it may not stand (RFC 9114 §4.1).
    pub(crate) fn out_of_order(&self) -> TransportError {
        let reason = "frames of a message out of order";
        self.connection.fail(ConnectionFault { code: Code::FRAME_UNEXPECTED, reason })
    }
}

impl Watched for Receiver {
    fn has_unread(&mut self) -> bool {
        if self.input.is_empty() && self.open && self.given_up.is_none() {
            match self.poll_chunk(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Ok(Some(chunk))) => self.input = chunk,
                Poll::Ready(Err(error)) => drop(self.broke_off(error)),
                // quinn says a clean end again when asked again.
                Poll::Ready(Ok(None)) | Poll::Pending => {}
            }
        }
        !self.input.is_empty()
    }

    fn give_up(&mut self, error: TransportError) {
        self.input = Bytes::new();
        self.given_up = Some(error);
        self.stop(Code::EXCESSIVE_LOAD);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop(self.drop_code);
    }
}

/// A message body as it comes off a stream: data, then perhaps trailers.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// Shared with the connection's watch over unread streams.
    receiver: Arc<Mutex<Receiver>>,
    watch: Watch,
    content_left: Option<u64>,
    data_seen: bool,
    trailers_seen: bool,
    done: bool,
    drop_code: Code,
    /// What must live as long as the body: the count of calls, and the upload that ends with it.
    _held: (Option<InFlight>, Option<AbortOnDrop>),
}

/// Stops a task when dropped.
#[derive(Debug)]
pub(crate) struct AbortOnDrop(pub(crate) tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Incoming {
    /// The body behind `receiver`, whose head has been read. Dropped before its end it stops the stream with `drop_code`.
    pub(crate) fn new(
        receiver: Receiver,
        content_length: Option<u64>,
        drop_code: Code,
        in_flight: Option<InFlight>,
        upload: Option<AbortOnDrop>,
    ) -> Self {
        let connection = receiver.connection.clone();
        let receiver = Arc::new(Mutex::new(receiver));
        Self {
            watch: connection.unread.watch(&receiver, base::clock::now()),
            receiver,
            content_left: content_length,
            data_seen: false,
            trailers_seen: false,
            done: false,
            drop_code,
            _held: (in_flight, upload),
        }
    }

    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<BodyFrame<Bytes>>, TransportError>> {
        let mut receiver = self.receiver.lock();
        let frame = loop {
            match receiver.poll_frame(cx) {
                // An empty piece says something only before all others.
                Poll::Ready(Ok(Some(Frame::Data(data)))) if data.is_empty() && self.data_seen => {}
                Poll::Ready(frame) => break frame?,
                Poll::Pending => {
                    self.watch.waiting();
                    return Poll::Pending;
                }
            }
        };
        match frame {
            Some(Frame::Data(data)) if !self.trailers_seen => {
                self.data_seen = true;
                if let Some(left) = &mut self.content_left {
                    *left = left
                        .checked_sub(data.len() as u64)
                        .ok_or(TransportError::Malformed("more data than content-length says"))?;
                }
                self.watch.took(base::clock::now());
                Poll::Ready(Ok(Some(BodyFrame::data(data))))
            }
            Some(Frame::Headers(section)) if !self.trailers_seen => {
                self.trailers_seen = true;
                self.check_length()?;
                let limit = receiver.section_limit();
                let trailers: HeaderMap = headers::decode_trailers(&section, limit)
                    .map_err(|error| receiver.section_error(error))?;
                Poll::Ready(Ok(Some(BodyFrame::trailers(trailers))))
            }
            Some(Frame::HeadersTooLong) => {
                let limit_bytes = receiver.section_limit();
                Poll::Ready(Err(TransportError::HeadersTooLong { limit_bytes }))
            }
            Some(_) => Poll::Ready(Err(receiver.out_of_order())),
            None => {
                self.check_length()?;
                Poll::Ready(Ok(None))
            }
        }
    }

    fn check_length(&self) -> Result<(), TransportError> {
        match self.content_left {
            Some(1..) => Err(TransportError::Malformed("less data than content-length says")),
            Some(0) | None => Ok(()),
        }
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Status>>> {
        if self.done {
            return Poll::Ready(None);
        }
        let next = std::task::ready!(self.poll_next(cx));
        Poll::Ready(match next {
            Ok(Some(frame)) => Some(Ok(frame)),
            Ok(None) => {
                self.done = true;
                None
            }
            Err(error) => {
                self.done = true;
                if matches!(error, TransportError::Malformed(_)) {
                    self.receiver.lock().stop(Code::MESSAGE_ERROR);
                }
                Some(Err(error.into()))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.done
    }

    fn size_hint(&self) -> SizeHint {
        self.content_left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.receiver.lock().stop(self.drop_code);
    }
}
