//! Questions of load balancers, over plain HTTP: is the node alive, does it take calls, is there room for a model. The last
//! says what the mesh has, so it is told only where anybody may ask that: not on every port.

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use http_body_util::Full;
use percent_encoding::percent_decode_str;
use serde_json::json;

use crate::{model::Wanted, offer::Ask, readiness::Stage, refusal::Refusal, router::Router};

/// Longest method that is asked for.
const METHOD_BYTES_MAX: usize = 512;

const NOT_HERE: &str =
    "here /room is answered only where access.anonymous has a tenant: ask on the metrics port\n";

/// Answers probes. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Probes {
    pub(crate) router: Router,
    /// Whether everybody who reaches the port may know what the mesh has.
    pub(crate) tells_room: bool,
}

impl Probes {
    /// The answer, if it is a probe.
    pub(crate) fn answer(&self, method: &Method, uri: &Uri) -> Option<Response<Full<Bytes>>> {
        if method != Method::GET && method != Method::HEAD {
            return None;
        }
        // Never depends on load: a busy node is not a broken one.
        let stage = self.router.readiness.stage();
        match uri.path() {
            "/livez" => Some(text(StatusCode::OK, "ok\n")),
            "/readyz" => {
                let status = match stage {
                    Stage::Ready => StatusCode::OK,
                    Stage::Starting | Stage::Draining => StatusCode::SERVICE_UNAVAILABLE,
                };
                Some(text(status, format!("{}\n", stage.as_str())))
            }
            "/room" if !self.tells_room => Some(text(StatusCode::NOT_FOUND, NOT_HERE)),
            "/room" => Some(self.room(uri.query().unwrap_or_default(), stage)),
            _ => None,
        }
    }

    /// Whether anybody has room for `model=M`, or for `method=/package.Service/Method`.
    fn room(&self, query: &str, stage: Stage) -> Response<Full<Bytes>> {
        // What is no UTF-8 is shown as such, and is the name of nothing.
        let value = |wanted: &str| {
            query.split('&').find_map(|pair| {
                let (name, value) = pair.split_once('=')?;
                let value = percent_decode_str(value).decode_utf8_lossy().into_owned();
                (name == wanted).then_some(value)
            })
        };
        let ask = match (value("model").map(|model| model.parse()), value("method")) {
            (Some(Ok(model)), _) => Ask {
                path: "/inference.GRPCInferenceService/ModelInfer".to_owned(),
                wanted: Wanted::Model(model),
            },
            (Some(Err(error)), _) => {
                return text(StatusCode::BAD_REQUEST, format!("{error}\n"));
            }
            (None, Some(path)) if is_method(&path) => Ask { path, wanted: Wanted::Nothing },
            (None, _) => {
                let usage = "ask /room?model=NAME or /room?method=/package.Service/Method\n";
                return text(StatusCode::BAD_REQUEST, usage);
            }
        };
        if stage != Stage::Ready {
            let why = format!("this node is {}", stage.as_str());
            let why = json!({ "room": false, "reason": stage.as_str(), "why": why });
            return json_answer(StatusCode::SERVICE_UNAVAILABLE, &why);
        }
        match self.router.room(&ask) {
            Ok(free) => json_answer(StatusCode::OK, &json!({ "room": true, "free_slots": free })),
            Err(refusal) => {
                let status = match refusal {
                    Refusal::NoEngine { .. } => StatusCode::NOT_FOUND,
                    _ => StatusCode::SERVICE_UNAVAILABLE,
                };
                let why =
                    json!({ "room": false, "reason": refusal.label(), "why": refusal.to_string() });
                let mut response = json_answer(status, &why);
                if let Some(wait) = refusal.retry_after() {
                    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
                    response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
                }
                response
            }
        }
    }
}

/// Whether a text is the path of a gRPC method.
fn is_method(path: &str) -> bool {
    let parts: Vec<_> = path.split('/').collect();
    path.len() <= METHOD_BYTES_MAX
        && !path.chars().any(char::is_control)
        && matches!(parts[..], ["", service, method] if !service.is_empty() && !method.is_empty())
}

fn json_answer(status: StatusCode, body: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = text(status, format!("{body}\n"));
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// A short answer.
pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
