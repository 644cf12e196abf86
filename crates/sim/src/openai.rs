//! The HTTP API of OpenAI as vLLM serves it, with vLLM's `/health` and `/metrics`.

use std::{collections::VecDeque, convert::Infallible, fmt, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequest as _, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{
        IntoResponse, Response,
        sse::{Event, Sse},
    },
    routing::{get, post},
};
use base::clock;
use futures_util::stream;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{
    gpu::{Ask, Generation, Gpu, Refusal, round_up},
    metrics::classic,
    openai::shapes::{ChatRequest, Order, Shape, TextRequest},
};

mod shapes;

/// The last event of a stream.
const DONE: &str = "[DONE]";
/// Longest body of a request; beyond it the answer is 413.
const BODY_BYTES_MAX: usize = 4 << 20;
/// How long a body may take to arrive; beyond it the answer is 408.
const BODY_WITHIN: Duration = Duration::from_secs(10);
/// What there is, for whoever asked for something else.
const USAGE: &str =
    "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health or GET /metrics";

/// The routes.
pub(crate) fn router(gpu: Arc<Gpu>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(text))
        .route("/v1/models", get(models))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(async || error(StatusCode::NOT_FOUND, USAGE))
        .method_not_allowed_fallback(async || error(StatusCode::METHOD_NOT_ALLOWED, USAGE))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(gpu)
}

/// The answer to a call that a server which stops gives up.
pub(crate) fn stopped() -> Response {
    Failure::from(Refusal::Stopped).into_response()
}

async fn chat(State(gpu): State<Arc<Gpu>>, request: Request) -> Result<Response, Failure> {
    let order = read::<ChatRequest>(request).await?.order().map_err(Failure::bad_request)?;
    answer(gpu, order).await
}

async fn text(State(gpu): State<Arc<Gpu>>, request: Request) -> Result<Response, Failure> {
    let order = read::<TextRequest>(request).await?.order().map_err(Failure::bad_request)?;
    answer(gpu, order).await
}

async fn read<T: DeserializeOwned>(request: Request) -> Result<T, Failure> {
    let reading = tokio::time::timeout(BODY_WITHIN, Bytes::from_request(request, &()));
    let body = reading
        .await
        .map_err(|_| Failure::late())?
        .map_err(|rejection| Failure::Body(rejection.status(), rejection.body_text()))?;
    let mut json = serde_json::Deserializer::from_slice(&body);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(Failure::bad_request)?;
    json.end().map_err(Failure::bad_request)?;
    Ok(parsed)
}

async fn answer(gpu: Arc<Gpu>, order: Order) -> Result<Response, Failure> {
    // It may have hung since the head of the request came.
    gpu.awake().await?;
    let ask = Ask { model: &order.model, prompt: &order.prompt, tokens: order.tokens };
    let generation = gpu.generate(&ask)?;
    let shape = Shape::new(&order, clock::wall());
    if order.is_stream {
        let include_usage = order.include_usage;
        let answering = Answering { generation, shape, include_usage, ready: VecDeque::new() };
        return Ok(Sse::new(stream::unfold(answering, Answering::next)).into_response());
    }
    let (prompt_tokens, tokens) = (generation.prompt_tokens, generation.tokens);
    let text = generation.text().await?;
    Ok(Json(shape.whole(&text, prompt_tokens, tokens)).into_response())
}

/// A request that is being answered event by event.
struct Answering {
    generation: Generation,
    shape: Shape,
    include_usage: bool,
    /// Events made and not yet sent: at most those of one token.
    ready: VecDeque<String>,
}

impl Answering {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        if self.ready.is_empty() {
            let is_first = self.generation.is_untouched();
            match self.generation.next().await? {
                Ok(token) => self.make(&token, is_first),
                // The head is gone, so this is all there is to say it with; vLLM ends such a stream as any other.
                Err(refusal) => {
                    let failure = Failure::from(refusal);
                    let body = error_body(failure.status(), &failure.to_string());
                    self.ready.extend([body.to_string(), DONE.to_owned()]);
                }
            }
        }
        let event = self.ready.pop_front()?;
        Some((Ok(Event::default().data(event)), self))
    }

    fn make(&mut self, token: &str, is_first: bool) {
        let is_last = self.generation.is_done();
        if is_first {
            self.ready.extend(self.shape.opening().map(|chunk| chunk.to_string()));
        }
        self.ready.push_back(self.shape.chunk(token, is_last).to_string());
        if is_last {
            let (prompt, tokens) = (self.generation.prompt_tokens, self.generation.tokens);
            let usage = self.include_usage.then(|| self.shape.usage_chunk(prompt, tokens));
            self.ready.extend(usage.map(|chunk| chunk.to_string()));
            self.ready.push_back(DONE.to_owned());
        }
    }
}

async fn models(State(gpu): State<Arc<Gpu>>) -> Response {
    let model = json!({ "id": gpu.model.as_str(), "object": "model", "created": 0, "owned_by": "isobar-sim" });
    Json(json!({ "object": "list", "data": [model] })).into_response()
}

/// As in vLLM, whoever is full, or refuses, is healthy.
async fn health(State(gpu): State<Arc<Gpu>>) -> StatusCode {
    if gpu.drain.is_cancelled() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

/// In the format the scraper asks for, as vLLM does.
async fn metrics(State(gpu): State<Arc<Gpu>>, headers: HeaderMap) -> Response {
    let accepted = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let is_open = accepted.is_some_and(|accept| accept.contains("application/openmetrics-text"));
    match gpu.render_metrics() {
        Ok(text) if is_open => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Ok(text) => {
            let kind = "text/plain; version=0.0.4; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], classic(&text)).into_response()
        }
        Err(wrong) => error(StatusCode::INTERNAL_SERVER_ERROR, &wrong.to_string()),
    }
}

/// Why a request is not answered.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The caller's fault: what was sent cannot be read.
    #[error("{1}")]
    Body(StatusCode, String),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Failure {
    fn bad_request(why: impl fmt::Display) -> Self {
        let message = format!("the body is no request of this path: {why}");
        Self::Body(StatusCode::BAD_REQUEST, message)
    }

    fn late() -> Self {
        let message = format!("the body did not arrive within {BODY_WITHIN:?}");
        Self::Body(StatusCode::REQUEST_TIMEOUT, message)
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Body(status, _) => *status,
            Self::Refused(Refusal::UnknownModel { .. }) => StatusCode::NOT_FOUND,
            Self::Refused(Refusal::Tokens(_)) => StatusCode::BAD_REQUEST,
            Self::Refused(Refusal::Busy(_) | Refusal::Stopped) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = error(self.status(), &self.to_string());
        if let Self::Refused(Refusal::Busy(busy)) = self {
            let wait_s = round_up(busy.retry_after, Duration::from_secs(1));
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(wait_s));
        }
        response
    }
}

fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(error_body(status, message))).into_response()
}

fn error_body(status: StatusCode, message: &str) -> Value {
    let kind = match status {
        StatusCode::NOT_FOUND => "NotFoundError",
        StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
        status if status.is_client_error() => "BadRequestError",
        _ => "InternalServerError",
    };
    let code = status.as_u16();
    json!({ "error": { "message": message, "type": kind, "param": null, "code": code } })
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_end_in_time_is_answered_with_408() {
        let body = Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
        let failure = read::<TextRequest>(Request::new(body)).await.unwrap_err();
        let response = failure.into_response();
        assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
        let body = to_bytes(response.into_body(), BODY_BYTES_MAX).await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error"]["code"], 408);
        assert_eq!(body["error"]["message"], "the body did not arrive within 10s");
    }
}
