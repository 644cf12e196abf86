//! The HTTP/2 connection under a link over TCP, the same from either end.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use base::clock;
use bytes::Bytes;
use h2::{PingPong, Reason};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsStream;

/// A connection that notes when something came.
#[derive(Debug)]
pub(super) struct Heard {
    stream: TlsStream<TcpStream>,
    at: Arc<Mutex<Instant>>,
}

impl Heard {
    pub(super) fn new(stream: TlsStream<TcpStream>) -> Self {
        Self { stream, at: Arc::new(Mutex::new(clock::now())) }
    }

    /// When something came last.
    pub(super) fn at(&self) -> Arc<Mutex<Instant>> {
        self.at.clone()
    }
}

impl AsyncRead for Heard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            *self.at.lock() = clock::now();
        }
        polled
    }
}

impl AsyncWrite for Heard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// The connection under a link, from either end.
#[derive(Debug)]
pub(super) enum Connection {
    Client(h2::client::Connection<Heard, Bytes>),
    Server(h2::server::Connection<Heard, Bytes>),
}

impl Connection {
    pub(super) fn ping_pong(&mut self) -> Option<PingPong> {
        match self {
            Self::Client(connection) => connection.ping_pong(),
            Self::Server(connection) => connection.ping_pong(),
        }
    }

    /// Reads and writes; ready, with the reason, when the connection is over.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        let ended = match self {
            Self::Client(connection) => std::task::ready!(Pin::new(connection).poll(cx)).err(),
            Self::Server(connection) => loop {
                match std::task::ready!(connection.poll_accept(cx)) {
                    // One stream is a link; there is no other.
                    Some(Ok((_, mut respond))) => respond.send_reset(Reason::REFUSED_STREAM),
                    Some(Err(error)) => break Some(error),
                    None => break None,
                }
            },
        };
        Poll::Ready(ended.map_or_else(|| "closed by peer".to_owned(), |error| error.to_string()))
    }

    /// Ends as soon as everything is written and no stream is open. A client's connection does so by itself.
    pub(super) fn shut_down(&mut self) {
        if let Self::Server(connection) = self {
            connection.graceful_shutdown();
        }
    }
}
