//! Calls from peers: the layers, in order. A call that came from a peer is never forwarded again.
//!
//! ```text
//!  1 counted      in flight until its last byte
//!  2 gRPC         anything else is answered with 415
//!  3 hop          a call that comes back, or crossed two nodes already, is refused
//!  4 deadline     what the ingress says is left, over everything below
//!  5 model        a bounded look at the front of the body, where an engine here depends on it
//!  6 engine       the least utilised of those that serve it, if a slot is free
//!  7 attempt      the call, relayed untouched both ways
//!  8 ending       a reply that breaks off or lacks a status gets one
//! ```
//!
//! That the caller is a node of this mesh was proved in the TLS handshake: the port accepts nobody else.

use std::{convert::Infallible, pin::Pin, sync::Arc, task};

use base::Deadline;
use http::{Request, Response};
use tonic::{Code, body::Body};
use transport::grpc::{self, OnEnd};

use crate::{
    engines::{Engines, Slot},
    hop::{self, Pseudonym},
    metrics::{Counted, Metrics, Side, To},
    model::ModelFinder,
    refusal::{Refusal, Who},
};

/// The service of the port for peers, on one worker. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Egress(pub(crate) Arc<Parts>);

/// What the layers work with.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) own: Pseudonym,
    pub(crate) who: Who,
    pub(crate) metrics: Metrics,
    pub(crate) models: ModelFinder,
    pub(crate) engines: Engines,
}

/// Told the end of a call: the books first, then the slot is free.
struct Held(Counted, Option<Slot>);

impl OnEnd for Held {
    fn ended(&mut self, code: Code) {
        self.0.ended(code);
        self.1 = None;
    }
}

impl Egress {
    async fn serve(self, request: Request<Body>) -> Response<Body> {
        let mut counted = self.0.metrics.begin(Side::Egress);
        match self.admit(request).await {
            Ok((reply, deadline, slot)) => {
                grpc::ending(reply, deadline, "engine", Held(counted, Some(slot)))
            }
            Err(refusal) => {
                tracing::debug!(%refusal, "refused");
                counted.ended(refusal.outcome());
                refusal.response(&self.0.who)
            }
        }
    }

    async fn admit(
        &self,
        request: Request<Body>,
    ) -> Result<(Response<Body>, Option<Deadline>, Slot), Refusal> {
        if !grpc::is_grpc(request.headers()) {
            return Err(Refusal::NotGrpc);
        }
        hop::guard(request.headers(), &self.0.own).map_err(Refusal::Loop)?;
        let deadline = hop::deadline(request.headers())?;
        let (reply, slot) = grpc::until(deadline, self.attempt(request, deadline))
            .await
            .map_err(|_| Refusal::Deadline)??;
        Ok((reply, deadline, slot))
    }

    async fn attempt(
        &self,
        request: Request<Body>,
        deadline: Option<Deadline>,
    ) -> Result<(Response<Body>, Slot), Refusal> {
        let (mut head, body) = request.into_parts();
        let path = head.uri.path();
        let (model, body) = if self.0.engines.depend_on_model() {
            let found = self.0.models.find(path, &head.headers, body).await;
            found.map_err(|status| Refusal::broken_request(&status))?
        } else {
            (None, body)
        };
        let slot = self.0.engines.take(path, model.as_ref())?;
        hop::forward(&mut head.headers, head.version, &self.0.own, deadline);
        self.0.metrics.attempt(To::Engine);
        let mut reply = slot.send(Request::from_parts(head, body)).await?;
        hop::strip(reply.headers_mut());
        reply.headers_mut().insert(hop::SERVED_BY, self.0.own.served_by(slot.engine()));
        Ok((reply, slot))
    }
}

impl tower::Service<Request<Body>> for Egress {
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
