//! Health of the mesh, in gRPC's own terms: can anybody serve this service, or this model?
//!
//! The name asked for is a service or a model; none means this node. Busy is not unhealthy: a server without room serves.
//! A node that starts or drains serves nothing. A stranger is told whether this node serves, and nothing of what there is.
//! Source: gRPC `doc/health-checking.md`.

use std::{collections::BTreeMap, time::Duration};

use balance::Standing;
use futures_util::stream::{self, StreamExt as _};
use proto::grpc::health::v1::{
    HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
    health_check_response::ServingStatus, health_server,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::{offer::Has, readiness::Stage, router::Router, services::ANSWERED};

/// How often a watched status is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Longest name of a service or a model.
const NAME_BYTES_MAX: usize = 1024;
/// Names that are listed; where there are more, who asks must say which.
const LISTED_MAX: usize = 1000;

/// Answers health checks. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    pub(crate) router: Router,
    /// Ends watches.
    pub(crate) drain: CancellationToken,
}

/// Goes with a check that no tenant makes: what such a caller gets who asks for more than whether the node serves.
#[derive(Clone, Debug)]
pub(crate) struct Stranger(pub(crate) Status);

impl Health {
    /// The status of a service or a model; `None`: nobody has it.
    ///
    /// An engine that does not say what it has may have it, as routing sees it too.
    fn status(&self, name: &str) -> Option<ServingStatus> {
        let is_own = name.is_empty() || ANSWERED.contains(&name);
        let is_usable = if is_own { true } else { self.is_usable(name)? };
        Some(self.serving(is_usable))
    }

    /// Whether somebody who has a service or a model may be sent calls; `None`: nobody has it.
    fn is_usable(&self, name: &str) -> Option<bool> {
        let have = self.router.have(name);
        // Who says that he has it decides; where nobody does, who does not say.
        let decides =
            [Has::Yes, Has::Perhaps].into_iter().find(|has| have.iter().any(|h| h.0 == *has));
        let is_usable = |decides| have.contains(&(decides, Standing::Usable));
        match decides {
            Some(Has::Yes) => Some(is_usable(Has::Yes)),
            Some(decides) if is_usable(decides) => Some(true),
            _ if self.router.has_undescribed() => Some(true),
            // It does not know yet who is there.
            None if !self.router.readiness.is_acquainted() => Some(false),
            decides => decides.map(|_| false),
        }
    }

    fn serving(&self, is_usable: bool) -> ServingStatus {
        if is_usable && self.router.readiness.stage() == Stage::Ready {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    }

    /// The statuses of everything that somebody says it has.
    fn statuses(&self) -> BTreeMap<String, ServingStatus> {
        let own = ANSWERED.iter().chain([&""]);
        let mut usable: BTreeMap<String, bool> =
            own.map(|name| ((*name).to_owned(), true)).collect();
        self.router.served(|name, standing| {
            let is_usable = standing == Standing::Usable;
            if let Some(known) = usable.get_mut(name) {
                *known |= is_usable;
            } else if usable.len() <= LISTED_MAX {
                // One more than may be is enough to see that there are too many.
                usable.insert(name.to_owned(), is_usable);
            }
        });
        usable.into_iter().map(|(name, usable)| (name, self.serving(usable))).collect()
    }

    /// The next status of `name` that is not `last`; `None`: the node drains.
    async fn next(&self, name: &str, last: Option<ServingStatus>) -> Option<ServingStatus> {
        loop {
            let status = self.status(name).unwrap_or(ServingStatus::ServiceUnknown);
            if last != Some(status) {
                return Some(status);
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = self.drain.cancelled() => return None,
            }
        }
    }
}

/// The name that is asked for.
fn name(request: HealthCheckRequest) -> Result<String, Status> {
    if request.service.len() > NAME_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "a name of more than {NAME_BYTES_MAX} bytes: ask for a service or a model"
        )));
    }
    Ok(request.service)
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let stranger = request.extensions().get::<Stranger>().cloned();
        let name = name(request.into_inner())?;
        if let Some(Stranger(status)) = stranger.filter(|_| !name.is_empty()) {
            return Err(status);
        }
        let status = self.status(&name);
        let status = status.ok_or_else(|| {
            Status::not_found("nobody in the mesh has a service or model of this name")
        })?;
        Ok(Response::new(response(status)))
    }

    async fn list(
        &self,
        _: Request<HealthListRequest>,
    ) -> Result<Response<HealthListResponse>, Status> {
        let statuses = self.statuses();
        if statuses.len() > LISTED_MAX {
            let why = format!("more than {LISTED_MAX} names: ask for one of them");
            return Err(Status::resource_exhausted(why));
        }
        let statuses = statuses.into_iter().map(|(name, status)| (name, response(status)));
        let statuses = statuses.collect();
        Ok(Response::new(HealthListResponse { statuses }))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<BoxStream<HealthCheckResponse>>, Status> {
        let start = (self.clone(), name(request.into_inner())?, None);
        let statuses = stream::unfold(start, |(health, name, last)| async move {
            let status = health.next(&name, last).await?;
            Some((Ok(response(status)), (health, name, Some(status))))
        });
        Ok(Response::new(statuses.boxed()))
    }
}
