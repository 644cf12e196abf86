//! The port that breaks an engine on purpose, and says how it is. Loopback by default: it asks nobody who they are.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Query, State, rejection::QueryRejection},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    fault::{Fault, SlowFactor},
    gpu::Gpu,
};

/// What there is, for whoever asked for something else.
const USAGE: &str =
    "GET /, POST /slow?factor=20, POST /hang, POST /refuse, POST /heal or POST /die";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Slow {
    factor: f64,
}

/// The routes. Answers are JSON, also of a hung engine.
pub(crate) fn router(gpu: Arc<Gpu>) -> Router {
    let inject = |fault| {
        post(move |State(gpu): State<Arc<Gpu>>| async move {
            gpu.set_fault(fault);
            state(&gpu)
        })
    };
    Router::new()
        .route("/", get(|State(gpu): State<Arc<Gpu>>| async move { state(&gpu) }))
        .route("/slow", post(slow))
        .route("/hang", inject(Some(Fault::Hang)))
        .route("/refuse", inject(Some(Fault::Refuse)))
        .route("/heal", inject(None))
        .route("/die", post(die))
        .fallback(async || error(StatusCode::NOT_FOUND, USAGE))
        .method_not_allowed_fallback(async || error(StatusCode::METHOD_NOT_ALLOWED, USAGE))
        .with_state(gpu)
}

async fn slow(State(gpu): State<Arc<Gpu>>, query: Result<Query<Slow>, QueryRejection>) -> Response {
    let Ok(Query(Slow { factor })) = query else {
        let message = "write /slow?factor= and a number from 1 to 10000";
        return error(StatusCode::BAD_REQUEST, message);
    };
    match SlowFactor::try_from(factor) {
        Ok(factor) => {
            gpu.set_fault(Some(Fault::Slow(factor)));
            state(&gpu)
        }
        Err(wrong) => error(StatusCode::BAD_REQUEST, &wrong.to_string()),
    }
}

/// Death is abrupt: whoever asked may not hear of it.
async fn die(State(gpu): State<Arc<Gpu>>) -> Response {
    gpu.died.cancel();
    Json(json!({ "died": true })).into_response()
}

fn state(gpu: &Gpu) -> Response {
    let (fault, figures, totals) = (gpu.fault(), gpu.figures(), gpu.metrics.totals());
    let (name, factor): (Value, Value) = match fault {
        None => (Value::Null, Value::Null),
        Some(Fault::Slow(factor)) => ("slow".into(), f64::from(factor).into()),
        Some(Fault::Hang) => ("hang".into(), Value::Null),
        Some(Fault::Refuse) => ("refuse".into(), Value::Null),
    };
    let state = json!({
        "model": gpu.model.as_str(),
        "fault": name,
        "factor": factor,
        "running": figures.running,
        "waiting": figures.waiting,
        "slots": figures.slots,
        "queue": figures.queue,
        "steps": figures.steps,
        "tokens": totals.tokens,
        "finished": totals.finished,
        "cancelled": totals.cancelled,
        "refused": totals.refused,
    });
    Json(state).into_response()
}

fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}
