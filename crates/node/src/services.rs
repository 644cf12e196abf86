//! The services a node answers itself rather than passing on: reflection, and for clients health.

use http::{Request, Response};
use proto::grpc::health::v1::health_server::HealthServer;
use tonic::{body::Body, server::Grpc};
use tonic_prost::ProstCodec;
use tower::ServiceExt as _;

use crate::{health::Health, reflection::Reflection};

/// What they are called.
const REFLECTION: [&str; 2] = [
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];
const HEALTH: &str = "/grpc.health.v1.Health/";
/// Longest request that is read.
const REQUEST_BYTES_MAX: usize = 64 << 10;

/// The services a port answers itself. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Services {
    pub(crate) reflection: Reflection,
    /// `None`: health checks are passed on.
    pub(crate) health: Option<Health>,
}

impl Services {
    /// The answer, if the call is for one of them; otherwise the call.
    pub(crate) async fn answer(
        &self,
        request: Request<Body>,
    ) -> Result<Response<Body>, Request<Body>> {
        let path = request.uri().path();
        match &self.health {
            _ if REFLECTION.contains(&path) => {
                let mut grpc = Grpc::new(ProstCodec::default())
                    .apply_max_message_size_config(Some(REQUEST_BYTES_MAX), None);
                Ok(grpc.streaming(self.reflection.clone(), request).await)
            }
            Some(health) if path.starts_with(HEALTH) => {
                let server =
                    HealthServer::new(health.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
                let answered = server.oneshot(request).await;
                Ok(answered.unwrap_or_else(|never| match never {}))
            }
            _ => Err(request),
        }
    }
}
