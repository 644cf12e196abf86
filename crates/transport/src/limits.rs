//! Every bound of a connection, in one place. What happens at a bound is said at the bound.

use std::time::Duration;

/// The bounds of connections of one kind: [`Limits::clients`], [`Limits::peers`] or [`Limits::engines`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Calls the other end may have open at once on one QUIC connection. Beyond it the other end waits: QUIC gives it no
    /// stream. Default 100 for clients, 1,024 for peers, granted in steps because a granted stream costs memory.
    pub streams: u32,
    /// Calls a client may have open at once on one HTTP/2 connection. Beyond it a stream is refused. Default 200.
    pub h2_streams: u32,
    /// Reset streams an HTTP/2 peer may leave behind unserved before the connection is closed with ENHANCE_YOUR_CALM
    /// ("rapid reset", CVE-2023-44487). Default 20.
    pub h2_pending_resets: usize,
    /// After this long (± 10 %) an HTTP/2 connection is drained, so that clients spread again. Default 30 min.
    pub h2_connection_age: Duration,
    /// Bytes one call may send that nobody has read. Default 1 MiB.
    pub stream_window_bytes: u32,
    /// Bytes all calls of a connection together may send that nobody has read. Default 4 MiB for clients, 64 MiB for peers.
    pub connection_window_bytes: u32,
    /// Bytes written to a connection that the other end has not acknowledged; beyond it, writers wait. Default 1 MiB for
    /// clients, 8 MiB for peers.
    pub send_window_bytes: u32,
    /// Bytes of one header section or one set of trailers, as RFC 9114 §4.2.2 counts them. Beyond it a request is answered
    /// with 431 and a response fails with RESOURCE_EXHAUSTED. Default 16 KiB for clients, 18 KiB for peers: what a hop adds
    /// must fit on top of what it was sent.
    pub header_section_bytes: u32,
    /// Body pieces below this are copied next to their frame header, so that small views do not pin large buffers.
    /// Default 4 KiB.
    pub copy_below_bytes: usize,
    /// A connection on which nothing arrives for so long is closed. Default 30 s for clients, 60 s for peers.
    pub idle_timeout: Duration,
    /// While calls are in flight something that asks for an ACK is sent this often, so that a quiet call is not idle.
    /// Default 10 s for clients, 250 ms for peers.
    pub ping_interval: Duration,
    /// A connection with calls in flight on which nothing arrives for so long, pings notwithstanding, is dead: its calls
    /// fail and the next ones open another. `None`: only the idle timeout ends it. Default 1 s for peers, otherwise none:
    /// engines of Python answer late under load, and gRPC servers close connections that ping them (`too_many_pings`).
    pub silence: Option<Duration>,
    /// A TLS or QUIC handshake, and the first frame of a request stream, must be done within this. Default 5 s.
    pub handshake_timeout: Duration,
    /// Handshakes in progress per worker. Beyond it new ones are refused. Default 1,024.
    pub handshakes: usize,
    /// Handshakes in progress per worker above which a QUIC client must first prove its address (Retry). Default 256.
    pub retry_above_handshakes: usize,
    /// Connections accepted per worker and port. Beyond it new ones are refused. Default 16,384.
    pub connections: usize,
    /// With more than half of a connection's window possibly held by calls whose bytes nobody has read for this long,
    /// the longest-stalled of them are reset, so that the others go on. Default 5 s.
    pub unread_timeout: Duration,
    /// Outgoing connections per worker. Beyond it the least recently used idle one is closed first; when none is idle the
    /// call is refused. Default 256.
    pub pool_connections: usize,
    /// How long a call waits for a stream on a full connection before another connection is opened. Default 5 ms.
    pub stream_wait: Duration,
    /// How long dialling QUIC may take before TCP is dialled beside it. Default 500 ms.
    pub tcp_race_after: Duration,
    /// How long dialling may take in all. Default 5 s.
    pub dial_timeout: Duration,
}

impl Limits {
    /// The defaults for connections from clients: anybody.
    #[must_use]
    pub fn clients() -> Self {
        Self {
            streams: 100,
            h2_streams: 200,
            h2_pending_resets: 20,
            h2_connection_age: Duration::from_secs(30 * 60),
            stream_window_bytes: 1 << 20,
            connection_window_bytes: 4 << 20,
            send_window_bytes: 1 << 20,
            header_section_bytes: 16 << 10,
            copy_below_bytes: 4 << 10,
            idle_timeout: Duration::from_secs(30),
            ping_interval: Duration::from_secs(10),
            silence: None,
            handshake_timeout: Duration::from_secs(5),
            handshakes: 1024,
            retry_above_handshakes: 256,
            connections: 16_384,
            unread_timeout: Duration::from_secs(5),
            pool_connections: 256,
            stream_wait: Duration::from_millis(5),
            tcp_race_after: Duration::from_millis(500),
            dial_timeout: Duration::from_secs(5),
        }
    }

    /// The defaults for connections between nodes, which have proved who they are, and to engines.
    #[must_use]
    pub fn peers() -> Self {
        Self {
            streams: 1024,
            h2_streams: 1024,
            connection_window_bytes: 64 << 20,
            send_window_bytes: 8 << 20,
            idle_timeout: Duration::from_secs(60),
            ping_interval: Duration::from_millis(250),
            silence: Some(Duration::from_secs(1)),
            header_section_bytes: 18 << 10,
            ..Self::clients()
        }
    }

    /// The defaults for connections to engines.
    #[must_use]
    pub fn engines() -> Self {
        Self { silence: None, ..Self::peers() }
    }

    /// Streams granted to a fresh connection; more are granted as they fill.
    pub(crate) fn first_streams(&self) -> u32 {
        self.streams.min(128)
    }
}
