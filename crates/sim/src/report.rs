//! How full an engine is, in the trailers of its replies: ORCA, under the names vLLM uses in the reports it sends over HTTP.

use std::sync::Arc;

use axum::{
    body::HttpBody as _,
    extract::{Request, State},
    http::{HeaderName, HeaderValue},
    middleware::Next,
    response::Response,
};
use http_body_util::BodyExt as _;
use prost::Message as _;
use proto::xds::data::orca::v3::OrcaLoadReport;
use tonic::metadata::{BinaryMetadataValue, MetadataValue};

use crate::gpu::Gpu;

/// The trailer.
const REPORT: HeaderName = HeaderName::from_static("endpoint-load-metrics-bin");
/// What begins the path of what runs on the GPU.
const KSERVE: &str = "/inference.";

/// Adds the report to the trailers of whatever is asked of the model. A reply that is nothing but a head goes without.
pub(crate) async fn add(State(gpu): State<Arc<Gpu>>, request: Request, next: Next) -> Response {
    let is_reported = request.uri().path().starts_with(KSERVE);
    let response = next.run(request).await;
    // A reply that is nothing but a head has to stay one.
    if !is_reported || response.body().is_end_stream() {
        return response;
    }
    response.map(|body| {
        axum::body::Body::new(body.map_frame(move |mut frame| {
            if let Some(trailers) = frame.trailers_mut() {
                trailers.insert(REPORT, value(&gpu));
            }
            frame
        }))
    })
}

fn value(gpu: &Gpu) -> HeaderValue {
    let report = report(gpu).encode_to_vec();
    let encoded: BinaryMetadataValue = MetadataValue::from_bytes(&report);
    HeaderValue::from_bytes(encoded.as_encoded_bytes())
        .unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// The figures of the moment.
fn report(gpu: &Gpu) -> OrcaLoadReport {
    let figures = gpu.figures();
    let named = [
        ("kv_cache_usage_perc", figures.cache_usage()),
        ("num_requests_running", f64::from(figures.running)),
        ("num_requests_waiting", f64::from(figures.waiting)),
    ];
    OrcaLoadReport {
        named_metrics: named.map(|(name, figure)| (name.to_owned(), figure)).into(),
        ..OrcaLoadReport::default()
    }
}
