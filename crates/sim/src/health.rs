//! gRPC's own health check, and server reflection of exactly what the port offers.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::stream;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use proto::{
    grpc::health::v1::{
        HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
        health_check_response::ServingStatus, health_server::Health,
    },
    inference::grpc_inference_service_server::SERVICE_NAME,
};
use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::gpu::{Gpu, shown};

/// Packages whose services the port offers.
const PACKAGES: [&str; 4] =
    ["inference", "grpc.health.v1", "grpc.reflection.v1", "grpc.reflection.v1alpha"];
/// Services whose health is known; the empty name is the server as a whole.
const SERVICES: [&str; 2] = ["", SERVICE_NAME];

/// The declarations of what the port offers, and nothing else.
pub(crate) fn descriptors() -> Result<FileDescriptorSet, prost::DecodeError> {
    let mut set = FileDescriptorSet::decode(proto::FILE_DESCRIPTOR_SET)?;
    set.file.retain(|file| PACKAGES.contains(&file.package()));
    Ok(set)
}

/// The service. An engine is healthy until it drains; one that hangs does not answer at all.
#[derive(Clone, Debug)]
pub(crate) struct Checks(pub(crate) Arc<Gpu>);

impl Checks {
    fn status(&self) -> HealthCheckResponse {
        if self.0.drain.is_cancelled() {
            answer(ServingStatus::NotServing)
        } else {
            answer(ServingStatus::Serving)
        }
    }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

/// What a watcher has been told.
enum Told {
    Nothing,
    State,
    End,
}

#[tonic::async_trait]
impl Health for Checks {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = &request.get_ref().service;
        if SERVICES.contains(&service.as_str()) {
            Ok(Response::new(self.status()))
        } else {
            Err(Status::not_found(format!("there is no service `{}` here", shown(service))))
        }
    }

    async fn list(
        &self,
        _: Request<HealthListRequest>,
    ) -> Result<Response<HealthListResponse>, Status> {
        let statuses: BTreeMap<_, _> =
            SERVICES.iter().map(|service| ((*service).to_owned(), self.status())).collect();
        Ok(Response::new(HealthListResponse { statuses }))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<BoxStream<HealthCheckResponse>>, Status> {
        let known = SERVICES.contains(&request.get_ref().service.as_str());
        let checks = self.clone();
        let next = move |told| {
            let checks = checks.clone();
            async move {
                match told {
                    Told::Nothing if known => Some((Ok(checks.status()), Told::State)),
                    Told::Nothing => Some((Ok(answer(ServingStatus::ServiceUnknown)), Told::State)),
                    // The only change there is. A stream that stayed open would hold the drain up.
                    Told::State => {
                        checks.0.drain.cancelled().await;
                        known.then(|| (Ok(checks.status()), Told::End))
                    }
                    Told::End => None,
                }
            }
        };
        Ok(Response::new(Box::pin(stream::unfold(Told::Nothing, next))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reflection_knows_what_the_port_offers_and_every_import_of_it() {
        let set = descriptors().unwrap();
        let mut services: Vec<_> = set
            .file
            .iter()
            .flat_map(|file| {
                file.service.iter().map(|service| format!("{}.{}", file.package(), service.name()))
            })
            .collect();
        services.sort();
        let want = [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            SERVICE_NAME,
        ];
        assert_eq!(services, want);
        for import in set.file.iter().flat_map(|file| &file.dependency) {
            assert!(set.file.iter().any(|file| file.name() == import), "{import}");
        }
    }
}
