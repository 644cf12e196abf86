//! The services a node answers itself rather than passing on: reflection, load reports, and for clients health.

use std::time::Duration;

use http::{Request, Response};
use proto::{
    grpc::health::v1::health_server::HealthServer,
    xds::service::orca::v3::open_rca_service_server::OpenRcaServiceServer,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    body::Body,
    codec::{CompressionEncoding, EnabledCompressionEncodings},
    server::Grpc,
};
use tonic_prost::ProstCodec;
use tower::ServiceExt as _;
use transport::grpc;

use crate::{health::Health, rca::Reports, reflection::Reflection};

/// What reflection is called, newest first.
pub(crate) const REFLECTION: [&str; 2] =
    ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"];
/// What health is called.
pub(crate) const HEALTH: &str = "grpc.health.v1.Health";
/// What load reports out of band are called.
pub(crate) const REPORTS: &str = "xds.service.orca.v3.OpenRcaService";
/// All that a node answers itself.
pub(crate) const ANSWERED: [&str; 4] = [REFLECTION[0], REFLECTION[1], HEALTH, REPORTS];
/// The method of health that says whether the node serves.
const CHECK: &str = "Check";
/// The method of reflection.
pub(crate) const REFLECTION_METHOD: &str = "ServerReflectionInfo";
/// Longest request that is read: a name, or some.
const REQUEST_BYTES_MAX: usize = 4 << 10;
/// A request must have come within this, and within this after the node began to drain.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
const DRAINED_WITHIN: Duration = Duration::from_secs(1);

/// The services a port answers itself. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Services {
    pub(crate) reflection: Reflection,
    /// `None`: health checks are passed on.
    pub(crate) health: Option<Health>,
    pub(crate) reports: Reports,
    pub(crate) drain: CancellationToken,
}

/// Which of them a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    Reflection,
    /// Health's method for one answer.
    Check,
    /// Its others.
    Health,
    Reports,
}

/// Which of the services a node may answer itself the method at `path` is of.
pub(crate) fn own(path: &str) -> Option<Own> {
    let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
    if REFLECTION.contains(&service) && method == REFLECTION_METHOD {
        Some(Own::Reflection)
    } else if service == HEALTH {
        Some(if method == CHECK { Own::Check } else { Own::Health })
    } else if service == REPORTS {
        Some(Own::Reports)
    } else {
        None
    }
}

impl Services {
    /// The answer, if the call is for one of them; otherwise the call.
    pub(crate) async fn answer(
        &self,
        request: Request<Body>,
    ) -> Result<Response<Body>, Request<Body>> {
        let own = own(request.uri().path());
        let is_health = matches!(own, Some(Own::Check | Own::Health));
        let health = self.health.as_ref().filter(|_| is_health);
        if own == Some(Own::Reflection) {
            let reflection = self.reflection.clone();
            let mut gzip = EnabledCompressionEncodings::default();
            gzip.enable(CompressionEncoding::Gzip);
            let mut grpc = Grpc::new(ProstCodec::default())
                .apply_compression_config(gzip, EnabledCompressionEncodings::default())
                .apply_max_message_size_config(Some(REQUEST_BYTES_MAX), None);
            Ok(self.in_time(grpc.streaming(reflection, request)).await)
        } else if own == Some(Own::Reports) {
            let server = OpenRcaServiceServer::new(self.reports.clone())
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(REQUEST_BYTES_MAX);
            let answered =
                async { server.oneshot(request).await.unwrap_or_else(|never| match never {}) };
            Ok(self.in_time(answered).await)
        } else if let Some(health) = health {
            let server = HealthServer::new(health.clone())
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(REQUEST_BYTES_MAX);
            let answered =
                async { server.oneshot(request).await.unwrap_or_else(|never| match never {}) };
            Ok(self.in_time(answered).await)
        } else {
            Err(request)
        }
    }

    /// The handlers read a request before they answer: one that does not come holds nothing up.
    async fn in_time(&self, answer: impl Future<Output = Response<Body>>) -> Response<Body> {
        let drained = async {
            self.drain.cancelled().await;
            tokio::time::sleep(DRAINED_WITHIN).await;
        };
        tokio::select! {
            answer = answer => answer,
            () = tokio::time::sleep(REQUEST_WITHIN) => {
                grpc::refusal(&Status::deadline_exceeded("the request did not come in time"))
            }
            () = drained => grpc::refusal(&Status::unavailable("this node drains")),
        }
    }
}
