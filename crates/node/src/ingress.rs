//! Calls from clients: the layers, in order.
//!
//! ```text
//!  1 counted      in flight until its last byte
//!  2 gRPC         anything else is answered with 415
//!  3 hop          what only a node may say is stripped; a call that comes back is refused
//!  4 deadline     over everything below, headers and body
//!  5 model        a bounded look at the front of the body, where an engine here depends on it
//!  6 route        an engine of this node with room, else a peer
//!  7 attempt      the call, relayed untouched both ways
//!  8 ending       a reply that breaks off or lacks a status gets one
//! ```

use std::{convert::Infallible, pin::Pin, sync::Arc, task};

use base::Deadline;
use http::{HeaderValue, Request, Response, header};
use tonic::{Code, body::Body};
use transport::{
    CallInfo, Protocol,
    grpc::{self, OnEnd},
};

use crate::{
    engines::{Engines, Slot},
    hop::{self, Pseudonym},
    metrics::{Counted, Metrics, Side, To},
    model::ModelFinder,
    peers::{PeerCall, Peers},
    refusal::{Refusal, Who},
};

/// The service of the ports for clients, on one worker. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Ingress(pub(crate) Arc<Parts>);

/// What the layers work with.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) own: Pseudonym,
    pub(crate) who: Who,
    pub(crate) metrics: Metrics,
    pub(crate) models: ModelFinder,
    pub(crate) engines: Engines,
    pub(crate) peers: Peers,
    /// Where the same services are offered over h3, as `alt-svc` says it (RFC 7838).
    pub(crate) alt_svc: HeaderValue,
}

/// Who answers a call. It holds the place of the call there until the call ends.
enum Route {
    Engine(Slot),
    Peer(PeerCall),
}

/// Told the end of a call: the books first, then the place at the engine or peer is free.
struct Held(Counted, Option<Route>);

impl OnEnd for Held {
    fn ended(&mut self, code: Code) {
        self.0.ended(code);
        self.1 = None;
    }
}

impl Ingress {
    async fn serve(self, request: Request<Body>) -> Response<Body> {
        let mut counted = self.0.metrics.begin(Side::Ingress);
        let over_tcp = request
            .extensions()
            .get::<CallInfo>()
            .is_some_and(|info| info.protocol == Protocol::H2);
        let mut response = match self.admit(request).await {
            Ok((reply, deadline, route)) => {
                grpc::ending(reply, deadline, "engine", Held(counted, Some(route)))
            }
            Err(refusal) => {
                tracing::debug!(%refusal, "refused");
                counted.ended(refusal.outcome());
                refusal.response(&self.0.who)
            }
        };
        if over_tcp {
            response.headers_mut().insert(header::ALT_SVC, self.0.alt_svc.clone());
        }
        response
    }

    async fn admit(
        &self,
        mut request: Request<Body>,
    ) -> Result<(Response<Body>, Option<Deadline>, Route), Refusal> {
        if !grpc::is_grpc(request.headers()) {
            return Err(Refusal::NotGrpc);
        }
        hop::strip(request.headers_mut());
        hop::guard(request.headers(), &self.0.own).map_err(Refusal::Loop)?;
        let deadline = hop::deadline(request.headers())?;
        let (reply, route) = grpc::until(deadline, self.attempt(request, deadline))
            .await
            .map_err(|_| Refusal::Deadline)??;
        Ok((reply, deadline, route))
    }

    async fn attempt(
        &self,
        request: Request<Body>,
        deadline: Option<Deadline>,
    ) -> Result<(Response<Body>, Route), Refusal> {
        let (request, route) = self.route(request).await?;
        let (mut head, body) = request.into_parts();
        hop::forward(&mut head.headers, head.version, &self.0.own, deadline);
        let request = Request::from_parts(head, body);
        let reply = match &route {
            Route::Engine(slot) => {
                self.0.metrics.attempt(To::Engine);
                let mut reply = slot.send(request).await?;
                hop::strip(reply.headers_mut());
                let served_by = self.0.own.served_by(slot.engine());
                reply.headers_mut().insert(hop::SERVED_BY, served_by);
                reply
            }
            Route::Peer(peer) => {
                self.0.metrics.attempt(To::Peer);
                peer.send(request).await?
            }
        };
        Ok((reply, route))
    }

    /// An engine of this node with room, else a peer, else the reason why not.
    async fn route(&self, request: Request<Body>) -> Result<(Request<Body>, Route), Refusal> {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let (model, body) = if self.0.engines.depend_on_model() {
            let found = self.0.models.find(path, &head.headers, body).await;
            found.map_err(|status| Refusal::broken_request(&status))?
        } else {
            (None, body)
        };
        let route = match self.0.engines.take(path, model.as_ref()) {
            Ok(slot) => Route::Engine(slot),
            Err(refusal) => self.0.peers.choose().map(Route::Peer).ok_or(refusal)?,
        };
        Ok((Request::from_parts(head, body), route))
    }
}

impl tower::Service<Request<Body>> for Ingress {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> task::Poll<Result<(), Infallible>> {
        task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let reply = self.clone().serve(request);
        Box::pin(async move { Ok(reply.await) })
    }
}
