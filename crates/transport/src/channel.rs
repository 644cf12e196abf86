//! One channel type over h2 and h3: a tower service that makes calls to a target.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use http::{Request, Response, Uri, uri::PathAndQuery};
use tonic::body::Body;
use tower::Service;

use crate::{
    Limits, Target, TransportError, h3,
    http2::{self, CallError},
    pool::{Entry, Pool},
};

/// Calls one target, over connections shared with every clone. Dropping a call's future, or the body of its response,
/// cancels it at the server.
#[derive(Clone, Debug)]
pub struct Channel {
    pool: Pool,
    entry: Arc<Entry>,
}

impl Channel {
    pub(crate) fn new(pool: Pool, entry: Arc<Entry>) -> Self {
        Self { pool, entry }
    }

    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// Whom it calls.
    #[must_use]
    pub fn target(&self) -> &Target {
        self.entry.target()
    }

    /// Opens a connection, unless there is one with room: what a call would do first.
    ///
    /// # Errors
    /// [`TransportError::Dial`], mostly; no call was made.
    pub async fn connect(&self) -> Result<(), TransportError> {
        self.pool.connect(&self.entry).await
    }

    /// Makes a call. The authority of the request is replaced by the target's.
    ///
    /// # Errors
    /// [`TransportError`]; [`TransportError::is_retry_safe`] says whether the server can have seen the call.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Body>, TransportError> {
        let target = self.entry.target();
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::builder()
            .scheme(target.scheme())
            .authority(target.authority().clone())
            .path_and_query(path.unwrap_or_else(|| PathAndQuery::from_static("/")))
            .build()
            .map_err(|_| TransportError::Malformed("a request without a path"))?;
        self.pool.call(&self.entry, request).await
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = TransportError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, TransportError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), TransportError>> {
        // Whether there is room is known only when a connection is chosen, in the call.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let channel = self.clone();
        Box::pin(async move { channel.send(request).await })
    }
}

/// A connection of either kind.
#[derive(Clone, Debug)]
pub(crate) enum Connection {
    H2(http2::Client),
    H3(h3::client::Client),
}

/// A place on a connection for one call.
#[derive(Debug)]
pub(crate) enum Place {
    H2(http2::Place),
    H3(Box<h3::client::Stream>),
}

impl Connection {
    pub(crate) fn is_usable(&self, now: Instant) -> bool {
        match self {
            Self::H2(client) => client.is_usable(now),
            Self::H3(client) => client.is_usable(now),
        }
    }

    /// Whether another connection should take its place.
    pub(crate) fn is_old(&self, now: Instant) -> bool {
        match self {
            Self::H2(client) => client.is_old(now),
            Self::H3(client) => client.is_old(now),
        }
    }

    pub(crate) fn is_quic(&self) -> bool {
        matches!(self, Self::H3(_))
    }

    pub(crate) fn in_flight(&self) -> usize {
        match self {
            Self::H2(client) => client.in_flight(),
            Self::H3(client) => client.in_flight(),
        }
    }

    /// The calls it can carry at once.
    pub(crate) fn streams(&self, limits: &Limits) -> usize {
        match self {
            Self::H2(client) => client.streams(),
            Self::H3(_) => limits.streams as usize,
        }
    }

    pub(crate) fn close(&self) {
        match self {
            Self::H2(client) => client.close(),
            Self::H3(client) => client.close(),
        }
    }

    /// Takes a place for a call. `None`: it is full.
    pub(crate) async fn place(&self) -> Result<Option<Place>, TransportError> {
        match self {
            Self::H2(client) => Ok(client.place().map(Place::H2)),
            Self::H3(client) => Ok(client.open().await?.map(|stream| Place::H3(Box::new(stream)))),
        }
    }
}

impl Place {
    pub(crate) async fn call(self, request: Request<Body>) -> Result<Response<Body>, CallError> {
        match self {
            Self::H2(place) => place.call(request).await,
            Self::H3(stream) => stream.call(request).await.map_err(CallError::Failed),
        }
    }
}
