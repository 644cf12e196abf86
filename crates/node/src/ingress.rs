//! Calls from clients: the layers, in order.
//!
//! ```text
//!  1 probes       /livez, /readyz and, where anybody may call, /room for load balancers, over any HTTP
//!  2 recorded     in flight until its last byte
//!  3 gRPC         anything else is answered with 415
//!  4 hop          what only a node may say is stripped; a call that comes back is refused
//!  5 deadline     over everything below, headers and body
//!  6 who          which tenant calls, and whether it may call this; whether the node serves is told everybody
//!  7 own services health and reflection are answered for the whole mesh
//!  8 memory       a node that holds back as much as it may is busy
//!  9 model        a bounded look at the front of the body, where who serves it or who may call it depends on it
//! 10 route        an engine of this node with room, else a peer's by free share, else a refusal, once the mesh is known
//! 11 attempt      the call, relayed both ways
//! 12 again        elsewhere, before the first byte of an answer, within the node's budget
//! 13 ending       a reply that breaks off or lacks a status gets one; it says how pressed this node is
//! ```

use std::{convert::Infallible, pin::Pin, sync::Arc, task};

use base::{Deadline, clock};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, Version, header};
use tonic::body::Body;
use transport::{
    CallInfo, Protocol,
    grpc::{self, End, OnEnd, Overdue},
};

use crate::{
    access::{Access, Forbidden, Tenant, Verdict, guard},
    attempt::{Answer, Attempt},
    buffers::Buffers,
    config::MethodPattern,
    health::Stranger,
    hop::{self, Pseudonym},
    metrics::{Metrics, Side, To},
    model::{self, Wanted},
    offer::Ask,
    orca::{self, NodeReport},
    probes::Probes,
    record::{AccessLog, Record},
    refusal::{Refusal, Who},
    replay::Replay,
    router::{RETRIES_MAX, Route, Router},
    services::{self, Own, Services},
};

/// The service of the ports for clients, on one worker. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Ingress(pub(crate) Arc<Parts>);

/// What the layers work with.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) own: Pseudonym,
    pub(crate) who: Who,
    pub(crate) access: Arc<Access>,
    pub(crate) probes: Probes,
    pub(crate) services: Services,
    pub(crate) metrics: Metrics,
    pub(crate) log: AccessLog,
    pub(crate) buffers: Buffers,
    pub(crate) router: Router,
    /// Methods that may run twice, besides those everybody knows.
    pub(crate) idempotent: Arc<[MethodPattern]>,
    pub(crate) overdue: Overdue,
    pub(crate) report: NodeReport,
    /// Where the same services are offered over h3, as `alt-svc` says it (RFC 7838).
    pub(crate) alt_svc: HeaderValue,
}

/// Told the end of a call: the books first, then the place at the engine or peer is free.
struct Held {
    parts: Arc<Parts>,
    record: Record,
    /// Who served it, and its request; `None`: nobody but this node.
    served: Option<(Route, Replay)>,
    served_by: Option<HeaderValue>,
}

impl OnEnd for Held {
    fn data(&mut self, data: &Bytes) {
        if let Some((route, _)) = &mut self.served {
            route.saw(data);
        }
    }

    fn trailers(&mut self, trailers: &mut HeaderMap) {
        match &mut self.served {
            Some((Route::Engine(slot, _), _)) => {
                slot.said(trailers);
            }
            Some((Route::Peer(call), _)) => {
                let by = self.served_by.as_ref().and_then(|by| by.to_str().ok()?.split_once('/'));
                if let Some((_, engine)) = by {
                    call.learn(engine, trailers);
                }
            }
            None => {}
        }
        if self.record.is_known() {
            trailers.insert(orca::REPORT, self.parts.report());
        }
    }

    fn ended(&mut self, end: End<'_>) {
        self.record.ended(&end);
        if let Some((route, replay)) = &mut self.served {
            route.ended(&end, replay);
        }
    }
}

impl Ingress {
    async fn serve(self, request: Request<Body>) -> Response<Body> {
        if let Some(answer) = self.0.probes.answer(request.method(), request.uri()) {
            return answer.map(Body::new);
        }
        let parts = &self.0;
        let over_tls_tcp = request
            .extensions()
            .get::<CallInfo>()
            .is_some_and(|info| info.protocol == Protocol::H2);
        let mut record = Record::begin(&parts.metrics, &parts.log, Side::Ingress, &request);
        let (mut reply, deadline, served) = match self.admit(request, &mut record).await {
            Ok((reply, deadline, served)) => {
                record.answered(reply.headers().get(hop::SERVED_BY));
                (reply, deadline, served)
            }
            Err(answer) => (answer.into_reply(&parts.who, &mut record), None, None),
        };
        let served_by = reply.headers().get(hop::SERVED_BY).cloned();
        // Strangers learn nothing of what stands here.
        if record.is_known() && grpc::status_code(reply.headers()).is_some() {
            reply.headers_mut().insert(orca::REPORT, parts.report());
        }
        let held = Held { parts: parts.clone(), record, served, served_by };
        let mut response = grpc::ending(reply, deadline, "engine", held, &parts.overdue);
        if over_tls_tcp {
            response.headers_mut().insert(header::ALT_SVC, parts.alt_svc.clone());
        }
        response
    }

    async fn admit(
        &self,
        mut request: Request<Body>,
        record: &mut Record,
    ) -> Result<(Response<Body>, Option<Deadline>, Option<(Route, Replay)>), Answer> {
        if !grpc::is_grpc(request.headers()) {
            return Err(Refusal::NotGrpc.into());
        }
        if request.version() < Version::HTTP_2 {
            return Err(Refusal::NotOverHttp1.into());
        }
        hop::strip_request(request.headers_mut());
        hop::guard(request.headers(), &self.0.own).map_err(Refusal::Loop)?;
        let deadline = hop::deadline(request.headers()).map_err(Refusal::from)?;
        let for_models = self.who(&mut request, deadline, record).await?;
        let own = grpc::until(deadline, self.0.services.answer(request)).await;
        let request = match own.map_err(|_| Refusal::Deadline)? {
            Ok(reply) => return Ok((reply, deadline, None)),
            Err(request) => request,
        };
        if !self.0.buffers.have_room() {
            return Err(Refusal::NoMemory.into());
        }
        let answer = self.answer(request, deadline, for_models, record);
        let (reply, route, replay) =
            grpc::until(deadline, answer).await.map_err(|_| Refusal::Deadline)??;
        Ok((reply, deadline, Some((route, replay))))
    }

    /// Who calls, and whether that tenant may call this method; the tenant, where it may for some models.
    async fn who(
        &self,
        request: &mut Request<Body>,
        deadline: Option<Deadline>,
        record: &mut Record,
    ) -> Result<Option<Arc<Tenant>>, Refusal> {
        let own = services::own(request.uri().path());
        let info = request.extensions().get::<CallInfo>();
        let shown = info.map(|info| info.certificates.clone()).unwrap_or_default();
        let access = &self.0.access;
        let tenant = access.who(request.headers_mut(), &shown, deadline, clock::wall()).await;
        let tenant = match tenant {
            Err(refusal) if own == Some(Own::Check) => {
                let status = refusal.status(&self.0.who);
                request.extensions_mut().insert(Stranger(status));
                return Ok(None);
            }
            tenant => tenant?,
        };
        record.tenant(tenant.name());
        let path = request.uri().path();
        match tenant.may_call(path) {
            // Whoever is known may ask what there is.
            _ if own.is_some() => Ok(None),
            Verdict::Allowed => Ok(None),
            Verdict::ForSomeModels => Ok(Some(tenant)),
            Verdict::Refused => {
                let what = format!("method {}", path.trim_start_matches('/'));
                Err(Refusal::NotAllowed { tenant: tenant.name().clone(), what })
            }
        }
    }

    /// Attempts until one is answered, or there may be no other. `tenant` may call for some models.
    async fn answer(
        &self,
        request: Request<Body>,
        deadline: Option<Deadline>,
        tenant: Option<Arc<Tenant>>,
        record: &mut Record,
    ) -> Result<(Response<Body>, Route, Replay), Answer> {
        let parts = &self.0;
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let (wanted, body) = if parts.router.depends_on_model() || tenant.is_some() {
            let found = model::find(path, &head.headers, body, &parts.buffers).await;
            found.map_err(Refusal::from)?
        } else {
            (Wanted::Nothing, body)
        };
        if let Wanted::Model(model) = &wanted {
            record.model(model.as_str());
        }
        let (body, forbidden) = match tenant {
            Some(tenant) => {
                may_call_model(&tenant, path, &wanted)?;
                guard(path, &head.headers, body, tenant)
            }
            None => (body, Forbidden::default()),
        };
        let idempotent = inference::is_idempotent(path)
            || parts.idempotent.iter().any(|pattern| pattern.covers(path));
        let ask = Ask { path: path.to_owned(), wanted };
        let replay = Replay::new(body, true, parts.buffers.clone());
        parts.router.arrived();

        let mut route = parts.router.route_in_time(&ask, &[]).await?;
        let (mut tried, mut retries) = (Vec::new(), 0);
        loop {
            let next = hop::next(&head, replay.body(), &parts.own, deadline, retries);

            let to = if matches!(route, Route::Engine(..)) { To::Engine } else { To::Peer };
            parts.metrics.attempt(to);
            let failed = match route.attempt(next, idempotent, &replay).await {
                Attempt::Answered(mut reply) => {
                    replay.commit();
                    if let Route::Engine(slot, _) = &route {
                        let served_by = parts.own.served_by(&slot.engine().name);
                        reply.headers_mut().insert(hop::SERVED_BY, served_by);
                    }
                    let below = hop::previous_attempts(reply.headers());
                    hop::set_previous_attempts(reply.headers_mut(), retries + below);
                    return Ok((reply, route, replay));
                }
                Attempt::Failed(failed) => failed,
            };
            if let Some(refusal) = forbidden.refusal() {
                return Err(refusal.into());
            }
            parts.metrics.failed(to, failed.outcome);
            if !failed.is_rejected || retries > 0 {
                tried.push(route.place());
            }
            // Its place is free for others while this call waits.
            drop(route);
            retries += 1 + failed.retries_below;
            let may_retry =
                retries <= RETRIES_MAX && failed.allows_another(idempotent, &replay, deadline);
            if !may_retry || !parts.router.has_retry() {
                return Err(failed.answer);
            }
            let another = parts.router.route_in_time(&ask, &tried).await.or_else(|why| {
                // Whoever has not acknowledged in time may only be slow, or a packet was lost: better than nobody.
                let others = tried.split_last().filter(|_| failed.is_unacknowledged());
                others.map_or(Err(why), |(_, others)| parts.router.route(&ask, others))
            });
            let another = match another {
                Ok(another) if parts.router.take_retry() => another,
                Ok(_) => return Err(failed.answer),
                Err(why) => return Err(failed.without_another(why)),
            };
            tracing::debug!(outcome = failed.outcome.as_str(), ?to, "tried again elsewhere");
            parts.metrics.retried();
            record.retried();
            route = another;
        }
    }
}

/// Refuses a call for a model the tenant may not call, or for none that can be read.
fn may_call_model(tenant: &Tenant, path: &str, wanted: &Wanted) -> Result<(), Refusal> {
    let what = match wanted {
        Wanted::Model(model) if tenant.may_call_model(path, model) => return Ok(()),
        Wanted::Model(model) => format!("model {model}"),
        Wanted::Nothing => "a method without naming a model".to_owned(),
        Wanted::Unreadable(why) => format!("a model that cannot be read ({why})"),
    };
    Err(Refusal::NotAllowed { tenant: tenant.name().clone(), what })
}

impl Parts {
    /// How pressed this node is: all it can reach, as one.
    fn report(&self) -> HeaderValue {
        self.report.value(clock::now(), || self.router.all_loads())
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
