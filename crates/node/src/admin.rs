//! The metrics port: `/metrics`, `/livez` and `/readyz` over HTTP/1.1, on the control runtime, so that a scrape never
//! delays a call.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Connections served at once; further ones wait in the kernel's backlog.
const CONNECTIONS: usize = 64;
/// A request's headers must have come within this, and a connection may stay idle for as long.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// What the port answers from. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Admin {
    pub(crate) metrics: Metrics,
    /// Whether the node takes calls. Never depends on load: a busy node is not a broken one.
    pub(crate) ready: Arc<AtomicBool>,
}

impl Admin {
    /// Binds the port.
    pub(crate) async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
        TcpListener::bind(address).await
    }

    /// Serves until `stop`.
    pub(crate) async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let permit = tokio::select! {
                permit = permits.clone().acquire_owned() => permit,
                () = stop.cancelled() => return,
            };
            let stream = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = stop.cancelled() => return,
            };
            let stream = match stream {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection on the metrics port");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            let admin = self.clone();
            connections.spawn(async move {
                let _permit = permit;
                let service = hyper::service::service_fn(move |request| {
                    let response = admin.answer(&request);
                    async move { Ok::<_, Infallible>(response) }
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "a connection to the metrics port broke off");
                }
            });
        }
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n");
        }
        match request.uri().path() {
            "/livez" => text(StatusCode::OK, "ok\n"),
            "/readyz" if self.ready.load(Ordering::Relaxed) => text(StatusCode::OK, "ok\n"),
            "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            "/metrics" => match self.metrics.render() {
                Ok(metrics) => {
                    let mut response = text(StatusCode::OK, metrics);
                    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    let kind = HeaderValue::from_static(kind);
                    response.headers_mut().insert(header::CONTENT_TYPE, kind);
                    response
                }
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            _ => text(StatusCode::NOT_FOUND, "/metrics, /livez or /readyz\n"),
        }
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
