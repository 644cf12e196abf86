//! Calls from peers: the layers, in order. A call that came from a peer is never forwarded again.
//!
//! ```text
//!  1 recorded     in flight until its last byte
//!  2 gRPC         anything else is answered with 415
//!  3 hop          a call that comes back, or crossed two nodes already, is refused
//!  4 deadline     what the ingress says is left, over everything below
//!  5 own services reflection is answered for the engines here
//!  6 memory       a node that holds back as much as it may is busy
//!  7 retries      second attempts of others are refused first when they are too many
//!  8 model        a bounded look at the front of the body, where an engine here depends on it
//!  9 engine       the least utilised of those that serve it, if a slot is free; else busy
//! 10 acknowledge  the ingress learns that the call is admitted, before any engine sees it
//! 11 release      a call that may run only once begins when the ingress, having heard so, lets it
//! 12 attempt      the call, relayed both ways
//! 13 again        at another engine here, before the first byte of an answer
//! 14 ending       a reply that breaks off or lacks a status gets one; it says how pressed the engine is
//! ```
//!
//! That the caller is a node of this mesh was proved in the TLS handshake: the port accepts nobody else.

use std::{convert::Infallible, pin::Pin, sync::Arc, task};

use base::Deadline;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tonic::body::Body;
use transport::{
    Acknowledge,
    grpc::{self, End, OnEnd, Overdue},
};

use crate::{
    arrivals::Arrivals,
    attempt::{self, Answer, Attempt},
    buffers::Buffers,
    config::MethodPattern,
    hop::{self, Pseudonym},
    metrics::{Metrics, Side, To},
    model::{self, Wanted},
    offer::Ask,
    orca,
    record::{AccessLog, Record},
    refusal::{Refusal, Who},
    replay::Replay,
    router::{RETRIES_MAX, Route, Router},
    services::Services,
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
    pub(crate) log: AccessLog,
    pub(crate) buffers: Buffers,
    /// Over this node's engines only.
    pub(crate) router: Router,
    pub(crate) idempotent: Arc<[MethodPattern]>,
    pub(crate) overdue: Overdue,
    pub(crate) services: Services,
    pub(crate) arrivals: Arc<Arrivals>,
}

/// Told the end of a call: the books first, then the slot is free.
struct Held {
    parts: Arc<Parts>,
    record: Record,
    /// Who served it, and its request; `None`: nobody but this node.
    served: Option<(Route, Replay)>,
}

impl Held {
    /// Says how pressed the engine is that served the call, or all of them when none did.
    fn report(&self, headers: &mut HeaderMap) {
        let report = match &self.served {
            Some((Route::Engine(slot, _), _)) => slot.load_after(),
            _ => self.parts.router.all_loads(),
        };
        headers.insert(orca::REPORT, orca::value(&report));
    }
}

impl OnEnd for Held {
    fn data(&mut self, data: &Bytes) {
        if let Some((route, _)) = &mut self.served {
            route.saw(data);
        }
    }

    fn trailers(&mut self, trailers: &mut HeaderMap) {
        if let Some((Route::Engine(slot, _), _)) = &self.served {
            slot.said(trailers);
        }
        self.report(trailers);
    }

    fn ended(&mut self, end: End<'_>) {
        self.record.ended(&end);
        if let Some((route, replay)) = &mut self.served {
            route.ended(&end, replay);
        }
    }
}

impl Egress {
    async fn serve(self, request: Request<Body>) -> Response<Body> {
        let parts = &self.0;
        let mut record = Record::begin(&parts.metrics, &parts.log, Side::Egress, &request);
        let (mut reply, deadline, served) = match self.admit(request, &mut record).await {
            Ok((reply, deadline, served)) => {
                record.answered(reply.headers().get(hop::SERVED_BY));
                (reply, deadline, served)
            }
            Err(answer) => {
                let mut reply = answer.into_reply(&parts.who, &mut record);
                hop::set_previous_attempts(reply.headers_mut(), record.retries());
                (reply, None, None)
            }
        };
        let held = Held { parts: parts.clone(), record, served };
        if grpc::status_code(reply.headers()).is_some() {
            held.report(reply.headers_mut());
        }
        grpc::ending(reply, deadline, "engine", held, &parts.overdue)
    }

    async fn admit(
        &self,
        request: Request<Body>,
        record: &mut Record,
    ) -> Result<(Response<Body>, Option<Deadline>, Option<(Route, Replay)>), Answer> {
        if !grpc::is_grpc(request.headers()) {
            return Err(Refusal::NotGrpc.into());
        }
        hop::guard(request.headers(), &self.0.own).map_err(Refusal::Loop)?;
        let deadline = hop::deadline(request.headers()).map_err(Refusal::from)?;
        let own = grpc::until(deadline, self.0.services.answer(request)).await;
        let request = match own.map_err(|_| Refusal::Deadline)? {
            Ok(reply) => return Ok((reply, deadline, None)),
            Err(request) => request,
        };
        if !self.0.buffers.have_room() {
            return Err(Refusal::NoMemory.into());
        }
        let (reply, route, replay) = grpc::until(deadline, self.answer(request, deadline, record))
            .await
            .map_err(|_| Refusal::Deadline)??;
        Ok((reply, deadline, Some((route, replay))))
    }

    /// Attempts until one is answered, or there may be no other.
    async fn answer(
        &self,
        request: Request<Body>,
        deadline: Option<Deadline>,
        record: &mut Record,
    ) -> Result<(Response<Body>, Route, Replay), Answer> {
        let parts = &self.0;
        let (mut head, body) = request.into_parts();
        let before = hop::previous_attempts(&head.headers);
        parts.router.arrived();
        if before == 0 {
            parts.arrivals.came(&head.extensions);
        } else if !parts.router.take_retry() {
            return Err(Refusal::TooManyRetries.into());
        }
        let path = head.uri.path().to_owned();
        let idempotent = inference::is_idempotent(&path)
            || parts.idempotent.iter().any(|pattern| pattern.covers(&path));
        let by_model =
            parts.router.depends_on_model() && inference::kserve_model_field(&path).is_some();
        let acknowledge = head.extensions.get::<Acknowledge>().cloned();
        let mut body = body;
        if by_model {
            // Who serves it is in the body, which may come late, and not before the call is acknowledged.
            attempt::released(&mut head.headers, &mut body, acknowledge.as_ref()).await?;
        }
        let (wanted, mut body) = if by_model {
            let found = model::find(&path, &head.headers, body, &parts.buffers).await;
            found.map_err(Refusal::from)?
        } else {
            (Wanted::Nothing, body)
        };
        if let Wanted::Model(model) = &wanted {
            record.model(model.as_str());
        }
        let ask = Ask { path, wanted };
        let mut route = parts.router.route(&ask, &[])?;
        if !by_model {
            attempt::released(&mut head.headers, &mut body, acknowledge.as_ref()).await?;
        }

        let replay = Replay::new(body, idempotent, parts.buffers.clone());
        let (mut tried, mut retries) = (Vec::new(), 0);
        loop {
            let attempts = before + retries;
            let next = hop::next(&head, replay.body(), &parts.own, deadline, attempts);

            parts.metrics.attempt(To::Engine);
            let failed = match route.attempt(next, idempotent, &replay).await {
                Attempt::Answered(mut reply) => {
                    replay.commit();
                    if let Route::Engine(slot, _) = &route {
                        let served_by = parts.own.served_by(&slot.engine().name);
                        reply.headers_mut().insert(hop::SERVED_BY, served_by);
                    }
                    hop::set_previous_attempts(reply.headers_mut(), retries);
                    return Ok((reply, route, replay));
                }
                Attempt::Failed(failed) => failed,
            };
            parts.metrics.failed(To::Engine, failed.outcome);
            if !failed.is_rejected || retries > 0 {
                tried.push(route.place());
            }
            let may_retry =
                attempts < RETRIES_MAX && failed.allows_another(idempotent, &replay, deadline);
            let may_retry = may_retry && parts.router.has_retry();
            let again = if may_retry { parts.router.route(&ask, &tried).ok() } else { None };
            match again.filter(|_| parts.router.take_retry()) {
                Some(another) => {
                    parts.metrics.retried();
                    record.retried();
                    retries += 1;
                    route = another;
                }
                None => return Err(failed.answer),
            }
        }
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
