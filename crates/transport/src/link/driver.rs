//! The one task of a link over TCP: it moves frames between the link and its HTTP/2 stream, sees that the other end lives,
//! and says good-bye.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use base::clock;
use bytes::{Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue};
use tokio_util::sync::CancellationToken;

use super::{
    DONE_WITHIN,
    connection::Connection,
    pipe::{Assembler, End, Parting, Pipe},
    pulse::Pulse,
};

/// How long it may take until the other end knows that a link is over.
const PARTED_WITHIN: Duration = Duration::from_secs(1);
/// Bytes of a reason that are said.
const REASON_BYTES_MAX: usize = 512;
/// Longest piece that is written at once.
const PIECE_BYTES_MAX: usize = 16 << 10;
/// The trailer that says why a link ended, as gRPC names it.
const REASON: &str = "grpc-message";

/// Drives one link.
pub(super) struct Driver {
    connection: Connection,
    send: SendStream<Bytes>,
    body: RecvStream,
    pipe: Arc<Pipe>,
    pulse: Pulse,
    came: Assembler,
    /// When the frame that is not whole yet began.
    begun: Option<Instant>,
    /// Since when nothing can be written, although something waits to be.
    stuck: Option<Instant>,
    /// Whether our half of the stream is over.
    has_parted: bool,
}

impl Driver {
    pub(super) fn new(
        connection: Connection,
        (send, body): (SendStream<Bytes>, RecvStream),
        pipe: Arc<Pipe>,
        pulse: Pulse,
    ) -> Self {
        let (came, begun, stuck) = (Assembler::default(), None, None);
        Self { connection, send, body, pipe, pulse, came, begun, stuck, has_parted: false }
    }

    /// Until the link is over and the other end knows, or `stop`.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let pipe = self.pipe.clone();
        let end = tokio::select! {
            biased;
            end = pipe.ended() => end,
            end = std::future::poll_fn(|cx| self.poll(cx)) => end,
            () = stop.cancelled() => End::new("closed", Parting::Say("stopped".to_owned())),
        };
        pipe.end(end);
        let reason = match pipe.ended().await.parting {
            Parting::Say(reason) => Some(reason),
            Parting::Agree => {
                pipe.outbox().lock().bytes.clear();
                None
            }
            Parting::Leave => return,
        };
        drop(tokio::time::timeout(PARTED_WITHIN, self.part(reason)).await);
    }

    /// Moves what can be moved; ready when the link is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.pipe.outbox().lock().driver = Some(cx.waker().clone());
        let over = self.connection.poll(cx);
        // What came before the connection ended says more than that it did.
        if let Poll::Ready(end) = self.poll_read(cx) {
            return Poll::Ready(end);
        }
        if let Poll::Ready(why) = over {
            return Poll::Ready(End::new(why, Parting::Leave));
        }
        self.stuck = match self.poll_write(cx) {
            Poll::Ready(()) => None,
            Poll::Pending => self.stuck.or_else(|| Some(clock::now())),
        };
        self.poll_pulse(cx)
    }

    /// Takes in what came.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        while !self.pipe.is_full() {
            match std::task::ready!(self.body.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.came.push(&data);
                    if let Err(why) = self.deliver() {
                        return Poll::Ready(End::bad_frame(why));
                    }
                }
                Some(Err(error)) => {
                    return Poll::Ready(End::new(error.to_string(), Parting::Leave));
                }
                None => return self.body.poll_trailers(cx).map(farewell),
            }
        }
        Poll::Pending
    }

    fn deliver(&mut self) -> Result<(), &'static str> {
        while let Some(frame) = self.came.next()? {
            self.pipe.deliver(frame);
            self.begun = None;
        }
        if self.came.has_begun() && self.begun.is_none() {
            self.begun = Some(clock::now());
        }
        Ok(())
    }

    /// Writes what waits as far as the other end lets us; ready when nothing waits.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut outbox = self.pipe.outbox().lock();
            let waiting = outbox.bytes.len();
            if waiting == 0 {
                // An idle link holds no buffer.
                outbox.bytes = BytesMut::new();
                let is_finished = outbox.is_finished;
                drop(outbox);
                if is_finished && !std::mem::replace(&mut self.has_parted, true) {
                    // Fails only when the stream is over, and reading says so.
                    drop(self.send.send_data(Bytes::new(), true));
                }
                return Poll::Ready(());
            }
            self.send.reserve_capacity(waiting);
            let most = self.send.capacity().min(PIECE_BYTES_MAX);
            if most == 0 {
                drop(outbox);
                match std::task::ready!(self.send.poll_capacity(cx)) {
                    Some(Ok(_)) => continue,
                    // The stream is over; reading says why.
                    Some(Err(_)) | None => return Poll::Pending,
                }
            }
            let piece = outbox.bytes.split_to(most.min(waiting)).freeze();
            drop(outbox);
            self.pipe.made_room();
            self.stuck = None;
            drop(self.send.send_data(piece, false));
        }
    }

    /// Sees that the other end lives, reads and ends what it begins.
    fn poll_pulse(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if let Poll::Ready(rtt) = self.pulse.poll_pong(cx) {
            self.pipe.set_rtt(rtt);
        }
        while self.pulse.poll_due(cx).is_ready() {
            let now = clock::now();
            let has_passed = |since: Instant| now.saturating_duration_since(since) >= DONE_WITHIN;
            if self.stuck.is_some_and(has_passed) {
                return Poll::Ready(End::fault(super::UNREAD));
            }
            if !self.pipe.is_read() {
                // It may be that we do not let the rest come.
                self.begun = self.begun.map(|_| now);
            }
            if self.begun.is_some_and(has_passed) {
                return Poll::Ready(End::fault(super::UNENDED));
            }
            if !self.pulse.beat(now) {
                return Poll::Ready(End::new("timed out", Parting::Leave));
            }
        }
        Poll::Pending
    }

    /// Writes what waits, says why the link ends, and waits until the other end has heard.
    async fn part(mut self, reason: Option<String>) {
        let reason = reason.as_deref();
        let is_over = std::future::poll_fn(|cx| self.poll_part(cx, reason)).await;
        let Self { mut connection, send, body, .. } = self;
        drop((send, body));
        if !is_over {
            connection.shut_down();
            std::future::poll_fn(|cx| connection.poll(cx)).await;
        }
    }

    /// Ready when both halves of the stream are over; `true`: the connection is, too.
    fn poll_part(&mut self, cx: &mut Context<'_>, reason: Option<&str>) -> Poll<bool> {
        if self.connection.poll(cx).is_ready() {
            return Poll::Ready(true);
        }
        if self.poll_write(cx).is_ready() && !std::mem::replace(&mut self.has_parted, true) {
            drop(match reason {
                Some(reason) => self.send.send_trailers(trailers(reason)),
                None => self.send.send_data(Bytes::new(), true),
            });
        }
        // What comes now is for nobody.
        while let Some(Ok(data)) = std::task::ready!(self.body.poll_data(cx)) {
            drop(self.body.flow_control().release_capacity(data.len()));
        }
        if self.has_parted { Poll::Ready(false) } else { Poll::Pending }
    }
}

/// What the end of the other end's half says.
fn farewell(trailers: Result<Option<HeaderMap>, h2::Error>) -> End {
    let reason = match trailers {
        Ok(trailers) => trailers.and_then(|trailers| trailers.get(REASON).cloned()),
        Err(error) => return End::new(error.to_string(), Parting::Leave),
    };
    let said = reason.as_ref().map(|reason| shown(reason.as_bytes())).unwrap_or_default();
    let why = match said.as_str() {
        "" => "closed by peer".to_owned(),
        said => format!("closed by peer: {said}"),
    };
    End::parted(why, reason.is_none())
}

fn trailers(reason: &str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let reason = HeaderValue::from_str(&shown(reason.as_bytes()));
    trailers.insert(REASON, reason.unwrap_or_else(|_| HeaderValue::from_static("")));
    trailers
}

/// What fits into a header, and into a line of a log.
fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let visible = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    text.chars().take(REASON_BYTES_MAX).map(visible).collect()
}
