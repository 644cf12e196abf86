//! HTTP/1.1 by hyper, for probes and whoever has nothing better: gRPC needs trailers on both ends and is refused above.
//!
//! Also the first look at a TCP connection: which of HTTP/1.1 and HTTP/2 it speaks, within a deadline, because hyper
//! waits for a preface for ever.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tower::{Service, ServiceExt as _};

use crate::{CallInfo, Limits};

/// What an HTTP/2 client sends first (RFC 9113 §3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Which HTTP a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Http1,
    Http2,
}

/// Reads until it is clear what the connection speaks. `None`: it said nothing, or not enough, in time.
pub(crate) async fn sniff<I: AsyncRead + Unpin>(
    mut io: I,
    within: Duration,
) -> Option<(Version, Prefixed<I>)> {
    let mut seen = [0; PREFACE.len()];
    let mut length = 0;
    let look = async {
        while length < PREFACE.len() && seen[..length] == PREFACE[..length] {
            match io.read(&mut seen[length..]).await {
                Ok(0) | Err(_) => return None,
                Ok(read) => length += read,
            }
        }
        Some(if seen == *PREFACE { Version::Http2 } else { Version::Http1 })
    };
    let version = tokio::time::timeout(within, look).await.ok().flatten()?;
    let prefix = Bytes::copy_from_slice(&seen[..length]);
    Some((version, Prefixed { prefix, io }))
}

/// A connection of which the first bytes have been read.
#[derive(Debug)]
pub(crate) struct Prefixed<I> {
    prefix: Bytes,
    io: I,
}

impl<I: AsyncRead + Unpin> AsyncRead for Prefixed<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let length = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..length]);
        self.prefix.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Prefixed<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Serves one connection until it ends, or until `drain` and then the request in progress.
pub(crate) async fn serve<I, S>(
    io: I,
    limits: &Limits,
    info: CallInfo,
    service: S,
    drain: CancellationToken,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let handler = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let mut request =
            request.map(|body| Body::new(body.map_err(|e| Status::cancelled(e.to_string()))));
        request.extensions_mut().insert(info.clone());
        service.clone().oneshot(request)
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle_timeout)
        .max_buf_size(limits.header_section_bytes as usize);
    let connection = builder.serve_connection(TokioIo::new(io), handler);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an HTTP/1.1 connection broke off");
    }
}
