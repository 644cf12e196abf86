//! What both ends of an HTTP/3 connection share: control streams, SETTINGS, GOAWAY, pings, and the count of calls.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{sync::Notify, task::JoinSet};

use super::{
    Code,
    frame::{self, ConnectionFault, Decoder, Frame, Settings},
    varint,
};
use crate::{Limits, TransportError, unread::Unread};

/// Unidirectional streams a peer may have open: three it needs, the rest for reserved types.
pub(crate) const UNI_STREAMS: u32 = 16;

/// How long the peer may let a frame on the control stream wait.
const CONTROL_WRITE: Duration = Duration::from_secs(1);

/// Stream types of RFC 9114 §6.2 and RFC 9204 §4.2.
const CONTROL: u64 = 0x00;
const PUSH: u64 = 0x01;
const QPACK_ENCODER: u64 = 0x02;
const QPACK_DECODER: u64 = 0x03;

/// Which end of the connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// One HTTP/3 connection, shared by its streams.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) quic: quinn::Connection,
    pub(crate) limits: Arc<Limits>,
    pub(crate) unread: Unread,
    side: Side,
    peer: Mutex<PeerState>,
    in_flight: AtomicUsize,
    busy: Notify,
    control: tokio::sync::Mutex<Option<quinn::SendStream>>,
    control_opened: Notify,
    /// Why this end closed the connection, when its calls should know.
    given_up: Mutex<Option<TransportError>>,
}

/// What the peer has said on its control stream.
#[derive(Debug, Default)]
struct PeerState {
    settings: Settings,
    goaway: Option<u64>,
    control: bool,
    qpack_encoder: bool,
    qpack_decoder: bool,
}

impl Connection {
    pub(crate) fn new(quic: quinn::Connection, limits: Arc<Limits>, side: Side) -> Arc<Self> {
        Arc::new(Self {
            unread: Unread::new(&limits),
            quic,
            limits,
            side,
            peer: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            busy: Notify::new(),
            control: tokio::sync::Mutex::new(None),
            control_opened: Notify::new(),
            given_up: Mutex::new(None),
        })
    }

    /// The longest header section the peer accepts, in bytes; `None`: it has not said.
    pub(crate) fn peer_section_limit(&self) -> Option<u64> {
        self.peer.lock().settings.max_field_section_bytes
    }

    /// Whether the peer has announced that it takes no new calls.
    pub(crate) fn is_going_away(&self) -> bool {
        self.peer.lock().goaway.is_some()
    }

    /// What the loss of the connection means for the call on stream `id`.
    pub(crate) fn lost(
        &self,
        error: &quinn::ConnectionError,
        id: quinn::StreamId,
    ) -> TransportError {
        // §5.2: streams at or above the announced one were not and will not be processed.
        if self.side == Side::Client
            && self.peer.lock().goaway.is_some_and(|first| u64::from(id) >= first)
        {
            return TransportError::ResetH3(Code::REQUEST_REJECTED);
        }
        let given_up = self.given_up.lock().clone();
        given_up.unwrap_or_else(|| TransportError::from_connection(error))
    }

    /// Calls in progress.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a call until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> InFlight {
        if self.in_flight.fetch_add(1, Ordering::Relaxed) == 0 {
            self.busy.notify_one();
        }
        InFlight(self.clone())
    }

    /// Closes the connection because the peer broke a rule of RFC 9114 that demands it.
    pub(crate) fn fail(&self, fault: ConnectionFault) -> TransportError {
        self.quic.close(fault.code.into(), fault.reason.as_bytes());
        TransportError::Closed(format!("closed by this end: {fault}"))
    }

    /// Tells the peer the first stream that will not be served.
    pub(crate) async fn send_goaway(&self, id: u64) {
        if !self.say(&frame::goaway(id)).await {
            tracing::debug!("cannot announce the end of the connection");
        }
    }

    /// Writes a frame to the control stream; `false` when the peer takes none within a second.
    async fn say(&self, frame: &[u8]) -> bool {
        let write = async {
            loop {
                if let Some(control) = self.control.lock().await.as_mut() {
                    return control.write_all(frame).await.is_ok();
                }
                self.control_opened.notified().await;
            }
        };
        tokio::time::timeout(CONTROL_WRITE, write).await.unwrap_or(false)
    }

    /// Gives the peer time to acknowledge the last replies and to close: closing at once would drop them.
    pub(crate) async fn linger(&self) {
        let wait = self.quic.rtt() * 3 + Duration::from_millis(50);
        drop(tokio::time::timeout(wait, self.quic.closed()).await);
    }

    /// Serves everything that is not a request until the connection ends.
    pub(crate) async fn run(self: &Arc<Self>) {
        tokio::select! {
            () = self.run_control() => {}
            () = self.run_upkeep() => {}
            _ = self.quic.closed() => {}
        }
    }

    async fn run_control(self: &Arc<Self>) {
        let mut streams = JoinSet::new();
        match self.quic.open_uni().await {
            Ok(mut control) => {
                let preface = frame::control_preface(self.limits.header_section_bytes as usize);
                // A failure here is the end of the connection, which `closed` reports.
                drop(control.write_all(&preface).await);
                *self.control.lock().await = Some(control);
                self.control_opened.notify_one();
            }
            Err(_) => return,
        }
        loop {
            tokio::select! {
                stream = self.quic.accept_uni() => {
                    let Ok(stream) = stream else { return };
                    let connection = self.clone();
                    streams.spawn(async move {
                        if let Err(fault) = connection.read_uni(stream).await {
                            drop(connection.fail(fault));
                        }
                    });
                }
                Some(_) = streams.join_next() => {}
            }
        }
    }

    /// Reads one unidirectional stream of the peer to its end. A stream that breaks off says nothing.
    async fn read_uni(&self, mut stream: quinn::RecvStream) -> Result<(), ConnectionFault> {
        let mut head = Vec::new();
        let kind = loop {
            if let Some((kind, length)) = varint::read(&head) {
                head.drain(..length);
                break kind;
            }
            match next_chunk(&mut stream).await {
                Some(chunk) => head.extend_from_slice(&chunk),
                None => return Ok(()),
            }
        };
        let rest = Bytes::from(head);
        match kind {
            CONTROL => {
                claim(&mut self.peer.lock().control)?;
                self.read_control(stream, rest).await
            }
            QPACK_ENCODER => {
                claim(&mut self.peer.lock().qpack_encoder)?;
                read_qpack_encoder(stream, rest).await
            }
            QPACK_DECODER => {
                claim(&mut self.peer.lock().qpack_decoder)?;
                // Acknowledgements of a dynamic table we do not use.
                while next_chunk(&mut stream).await.is_some() {}
                closed_critical()
            }
            PUSH if self.side == Side::Server => Err(ConnectionFault {
                code: Code::STREAM_CREATION_ERROR,
                reason: "a client opened a push stream",
            }),
            PUSH => Err(ConnectionFault {
                code: Code::ID_ERROR,
                reason: "a push stream, and this end allows no pushes",
            }),
            // §6.2.3: a type we do not know is no error; nobody will read it.
            _ => {
                drop(stream.stop(Code::STREAM_CREATION_ERROR.into()));
                Ok(())
            }
        }
    }

    async fn read_control(
        &self,
        mut stream: quinn::RecvStream,
        mut input: Bytes,
    ) -> Result<(), ConnectionFault> {
        let mut decoder = Decoder::control();
        loop {
            while let Some(frame) = decoder.decode(&mut input)? {
                self.hear(&frame)?;
            }
            match next_chunk(&mut stream).await {
                Some(chunk) => input = chunk,
                None => return closed_critical(),
            }
        }
    }

    fn hear(&self, frame: &Frame) -> Result<(), ConnectionFault> {
        let mut peer = self.peer.lock();
        match frame {
            Frame::Settings(settings) => peer.settings = *settings,
            Frame::GoAway(id) => {
                if peer.goaway.is_some_and(|before| before < *id) {
                    return Err(ConnectionFault {
                        code: Code::ID_ERROR,
                        reason: "a GOAWAY above an earlier one",
                    });
                }
                peer.goaway = Some(*id);
            }
            Frame::Data(_) | Frame::Headers(_) | Frame::HeadersTooLong => {}
        }
        Ok(())
    }

    /// While calls are in flight: asks for an ACK now and then, because a quiet call is not an idle connection; gives the
    /// connection up when nothing comes; gives up calls nobody reads when they hold what the other calls need. When the calls have
    /// ended and nothing came meanwhile, it goes on until something does: else calls that are given up sooner than a connection
    /// would keep a dead one for ever.
    async fn run_upkeep(&self) {
        let tick = self.limits.ping_interval.min(self.unread.interval());
        // Short beside a call that is given up, so that its silence is seen.
        let tick = self.limits.silence.map_or(tick, |silence| tick.min(silence / 8));
        let mut pinged = base::clock::now();
        let mut received = 0;
        let mut silent_for = Duration::ZERO;
        let mut ping = None;
        loop {
            while self.in_flight() == 0 && (silent_for.is_zero() || self.limits.silence.is_none()) {
                silent_for = Duration::ZERO;
                beside(&mut ping, self.busy.notified()).await;
            }
            // A ping that finds no room is no reason to count slower.
            beside(&mut ping, tokio::time::sleep(tick)).await;
            let now = base::clock::now();
            let is_due = now.saturating_duration_since(pinged) >= self.limits.ping_interval;
            if is_due && ping.is_none() {
                pinged = now;
                // A peer that takes none owes us credit, and an ACK, anyway.
                ping = Some(Box::pin(async {
                    self.say(&frame::ping()).await;
                }));
            }
            let datagrams = self.quic.stats().udp_rx.datagrams;
            // Ticks are counted, not time: after a pause of this process what came meanwhile is still unread.
            silent_for = if datagrams == received { silent_for + tick } else { Duration::ZERO };
            received = datagrams;
            if let Some(limit) = self.limits.silence
                && silent_for >= limit
            {
                *self.given_up.lock() = Some(TransportError::Silent(limit));
                self.quic.close(Code::NO_ERROR.into(), b"silent");
                return;
            }
            self.unread.sweep(now);
        }
    }
}

/// Waits for `until`, and goes on with what is under way meanwhile.
async fn beside<F>(under_way: &mut Option<Pin<Box<F>>>, until: impl Future<Output = ()>)
where
    F: Future<Output = ()>,
{
    let mut until = std::pin::pin!(until);
    while let Some(future) = under_way {
        tokio::select! {
            () = &mut until => return,
            () = future => *under_way = None,
        }
    }
    until.await;
}

fn claim(slot: &mut bool) -> Result<(), ConnectionFault> {
    if std::mem::replace(slot, true) {
        return Err(ConnectionFault {
            code: Code::STREAM_CREATION_ERROR,
            reason: "a second stream of a type that may exist once",
        });
    }
    Ok(())
}

fn closed_critical() -> Result<(), ConnectionFault> {
    Err(ConnectionFault {
        code: Code::CLOSED_CRITICAL_STREAM,
        reason: "a control or QPACK stream was closed",
    })
}

/// The next piece of a stream, or `None` at its end, however it ends. After the end of the connection a fault changes
/// nothing, so it need not be told apart.
async fn next_chunk(stream: &mut quinn::RecvStream) -> Option<Bytes> {
    const CHUNK_BYTES: usize = 4096;
    stream.read_chunk(CHUNK_BYTES, true).await.ok().flatten().map(|chunk| chunk.bytes)
}

/// RFC 9204 §4.3: with a table capacity of 0 the only instruction that may come sets the capacity to 0 (0x20).
async fn read_qpack_encoder(
    mut stream: quinn::RecvStream,
    mut input: Bytes,
) -> Result<(), ConnectionFault> {
    loop {
        if input.iter().any(|byte| *byte != 0x20) {
            return Err(ConnectionFault {
                code: Code::QPACK_ENCODER_STREAM_ERROR,
                reason: "an instruction for a dynamic table, and this end allows none",
            });
        }
        match next_chunk(&mut stream).await {
            Some(chunk) => input = chunk,
            None => return closed_critical(),
        }
    }
}

/// A call in progress on a connection.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Connection>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
