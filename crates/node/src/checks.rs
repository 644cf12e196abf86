//! Health checks of this node's engines, on the control runtime: one task per engine, asking what the configuration says.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header, uri::PathAndQuery};
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper_util::rt::TokioIo;
use inference::Protocol;
use prost::Message;
use proto::{
    grpc::health::v1::{
        HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    },
    inference::{ServerReadyRequest, ServerReadyResponse},
};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::net::TcpStream;
use tonic::{Code, body::Body};
use transport::{Channel, grpc};

use crate::{config::HealthKind, engines::Engine};

/// Longest answer to a check that is read.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Checks `engine` over `channel`, for ever.
pub(crate) async fn run(engine: Arc<Engine>, channel: Channel, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let timeout = Duration::from(engine.health.timeout);
    loop {
        tokio::time::sleep(engine.check_in()).await;
        let result = match tokio::time::timeout(timeout, check(&engine, &channel)).await {
            Ok(result) => result,
            Err(_) => Err(format!("no answer within {timeout:?}")),
        };
        engine.checked(result, &mut rng);
    }
}

async fn check(engine: &Engine, channel: &Channel) -> Result<(), String> {
    match (&engine.health.kind, engine.offer.protocol) {
        (HealthKind::Kserve, _) | (HealthKind::Auto, Protocol::KserveV2) => kserve(channel).await,
        (HealthKind::Grpc, _) | (HealthKind::Auto, Protocol::Grpc) => grpc_health(channel).await,
        (HealthKind::Http(path), _) => http(engine.target.authority().as_str(), path).await,
        (HealthKind::Tcp, _) => connect(engine.target.authority().as_str()).await.map(drop),
    }
}

async fn kserve(channel: &Channel) -> Result<(), String> {
    const PATH: &str = "/inference.GRPCInferenceService/ServerReady";
    let answer: ServerReadyResponse = match unary(channel, PATH, &ServerReadyRequest {}).await {
        Ok(answer) => answer,
        Err((_, why)) => return Err(why),
    };
    if answer.ready { Ok(()) } else { Err("the server says that it is not ready".to_owned()) }
}

async fn grpc_health(channel: &Channel) -> Result<(), String> {
    const PATH: &str = "/grpc.health.v1.Health/Check";
    let request = HealthCheckRequest { service: String::new() };
    match unary::<_, HealthCheckResponse>(channel, PATH, &request).await {
        Ok(answer) if answer.status() == ServingStatus::Serving => Ok(()),
        Ok(answer) => Err(format!("the server says {}", answer.status().as_str_name())),
        // A server without the health service that answers at all is as healthy as it can say.
        Err((Some(Code::Unimplemented), _)) => Ok(()),
        Err((_, why)) => Err(why),
    }
}

/// A unary call; the error is the status, if there was one, and what to say about it.
async fn unary<Q: Message, A: Message + Default>(
    channel: &Channel,
    path: &'static str,
    request: &Q,
) -> Result<A, (Option<Code>, String)> {
    let message = request.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes();
    let body = Bytes::from([&[0][..], &length, &message].concat());
    let request = Request::post(path)
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Body::new(Full::new(body)))
        .map_err(|error| (None, error.to_string()))?;
    let reply = channel.send(request).await.map_err(|error| (None, error.to_string()))?;
    let (head, body) = reply.into_parts();
    if head.status != StatusCode::OK {
        return Err((None, format!("HTTP status {}", head.status)));
    }
    let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| (None, error.to_string()))?;
    let code = grpc::status_code(&head.headers)
        .or_else(|| body.trailers().and_then(grpc::status_code))
        .ok_or_else(|| (None, "a reply without a status".to_owned()))?;
    if code != Code::Ok {
        return Err((Some(code), format!("status {code:?}")));
    }
    let bytes = body.to_bytes();
    let message = bytes.get(5..).ok_or_else(|| (None, "an empty reply".to_owned()))?;
    A::decode(message).map_err(|error| (None, error.to_string()))
}

async fn connect(authority: &str) -> Result<TcpStream, String> {
    TcpStream::connect(authority).await.map_err(|error| error.to_string())
}

/// A GET that must answer with a status of 2xx, on a connection of its own.
async fn http(authority: &str, path: &PathAndQuery) -> Result<(), String> {
    let stream = connect(authority).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| e.to_string())?;
    let request = Request::get(path.as_str())
        .header(header::HOST, authority)
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let answering = sender.send_request(request);
    tokio::pin!(answering, connection);
    let mut open = true;
    // The connection carries the answer, and may end with it in one go.
    let answer: Response<_> = loop {
        tokio::select! {
            answer = &mut answering => break answer.map_err(|error| error.to_string())?,
            _ = &mut connection, if open => open = false,
        }
    };
    if answer.status().is_success() {
        Ok(())
    } else {
        Err(format!("HTTP status {}", answer.status()))
    }
}
