//! Health of the mesh, in gRPC's own terms: can anybody serve this service, or this model?
//!
//! The name asked for is a service or a model; none means this node. Busy is not unhealthy: a server without room serves.
//! A node that drains serves nothing. Source: gRPC `doc/health-checking.md`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use balance::Standing;
use futures_util::stream::{self, StreamExt as _};
use proto::grpc::health::v1::{
    HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
    health_check_response::ServingStatus, health_server,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::{
    catalog::{BUILT_IN, Catalog, Scope},
    router::Router,
};

/// How often a watched status is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Answers health checks. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    pub(crate) router: Router,
    pub(crate) catalog: Arc<Catalog>,
    /// Whether the node takes calls.
    pub(crate) ready: Arc<AtomicBool>,
    /// Ends watches.
    pub(crate) drain: CancellationToken,
}

impl Health {
    /// The status of a service or a model; `None`: nobody has it.
    fn status(&self, name: &str) -> Option<ServingStatus> {
        let is_own = name.is_empty() || BUILT_IN.contains(&name);
        let standings = if is_own { vec![Standing::Usable] } else { self.router.standings(name) };
        if standings.is_empty() {
            return None;
        }
        let is_ready = self.ready.load(Ordering::Relaxed);
        let serves = is_ready && standings.contains(&Standing::Usable);
        Some(if serves { ServingStatus::Serving } else { ServingStatus::NotServing })
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

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let status = self.status(&request.get_ref().service);
        let status = status.ok_or_else(|| {
            Status::not_found("nobody in the mesh has a service or model of this name")
        })?;
        Ok(Response::new(response(status)))
    }

    async fn list(
        &self,
        _: Request<HealthListRequest>,
    ) -> Result<Response<HealthListResponse>, Status> {
        let mut names = self.catalog.services(Scope::Mesh);
        names.extend(self.catalog.models());
        names.push(String::new());
        let statuses: BTreeMap<String, HealthCheckResponse> = names
            .into_iter()
            .filter_map(|name| {
                let status = response(self.status(&name)?);
                Some((name, status))
            })
            .collect();
        Ok(Response::new(HealthListResponse { statuses }))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<BoxStream<HealthCheckResponse>>, Status> {
        let start = (self.clone(), request.into_inner().service, None);
        let statuses = stream::unfold(start, |(health, name, last)| async move {
            let status = health.next(&name, last).await?;
            Some((Ok(response(status)), (health, name, Some(status))))
        });
        Ok(Response::new(statuses.boxed()))
    }
}
