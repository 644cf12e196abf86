//! The metrics port: `/metrics` and the probes over HTTP/1.1, on the control runtime, so that a scrape never delays a call.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    probes::{self, Probes},
};

/// Connections served at once; further ones wait in the kernel's backlog.
const CONNECTIONS: usize = 64;
/// A request's headers must have come within this, and a connection may stay idle for as long.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// What the port answers from. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Scrape {
    pub(crate) metrics: Metrics,
    pub(crate) probes: Probes,
}

impl Scrape {
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
            let scrape = self.clone();
            connections.spawn(async move {
                let _permit = permit;
                let service = hyper::service::service_fn(move |request| {
                    let response = scrape.answer(&request);
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
            let mut response = probes::text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        if let Some(answer) = self.probes.answer(request.method(), request.uri()) {
            return answer;
        }
        if request.uri().path() != "/metrics" {
            return probes::text(StatusCode::NOT_FOUND, "/metrics, /livez, /readyz or /room\n");
        }
        match self.metrics.render() {
            Ok(metrics) => {
                let mut response = probes::text(StatusCode::OK, metrics);
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
                response
            }
            Err(error) => probes::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}
