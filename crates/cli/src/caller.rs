//! One gRPC call, of any kind, with every moment of it: what `call`, `bench` and `demo` are made of.
//!
//! Messages are bytes here: who sends them knows what they mean.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use base::clock;
use bytes::{Buf as _, BufMut as _, Bytes};
use http::{Response, header::CONTENT_TYPE, uri::PathAndQuery};
use tokio_stream::Stream;
use tonic::{
    Code, Request, Status,
    body::Body,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::MetadataMap,
};
use transport::{Channel, grpc};

/// Longest message that is read.
const MESSAGE_BYTES_MAX: usize = 256 << 20;

/// How a reply says who served it.
pub(crate) const SERVED_BY: &str = "x-isobar-served-by";

/// What is the same for many calls.
#[derive(Clone, Debug)]
pub(crate) struct Method {
    pub(crate) path: PathAndQuery,
    pub(crate) metadata: MetadataMap,
    /// `None`: as long as it takes.
    pub(crate) deadline: Option<Duration>,
}

/// How a call ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) status: Status,
    pub(crate) headers: MetadataMap,
    pub(crate) trailers: MetadataMap,
    pub(crate) messages: u64,
    pub(crate) began: Instant,
    /// When the head of the answer came.
    pub(crate) head: Option<Instant>,
    pub(crate) first_message: Option<Instant>,
    pub(crate) ended: Instant,
}

impl Ended {
    pub(crate) fn is_ok(&self) -> bool {
        self.status.code() == Code::Ok
    }

    /// Which node and engine answered, as the mesh says it.
    pub(crate) fn served_by(&self) -> Option<&str> {
        let found = self.headers.get(SERVED_BY).or_else(|| self.trailers.get(SERVED_BY));
        found.and_then(|value| value.to_str().ok())
    }
}

/// Makes a call and hands each message to `on`, which may end it; past the deadline it is given up, which cancels it at the server.
pub(crate) async fn call(
    channel: &Channel,
    method: &Method,
    messages: impl Stream<Item = Bytes> + Send + 'static,
    mut on: impl FnMut(Bytes) -> ControlFlow<()>,
) -> Ended {
    let mut ended = Ended {
        status: Status::ok(""),
        headers: MetadataMap::new(),
        trailers: MetadataMap::new(),
        messages: 0,
        began: clock::now(),
        head: None,
        first_message: None,
        ended: clock::now(),
    };
    let outcome = match method.deadline {
        None => attempt(channel, method, messages, &mut ended, &mut on).await,
        Some(deadline) => {
            let attempt = attempt(channel, method, messages, &mut ended, &mut on);
            tokio::time::timeout(deadline, attempt).await.unwrap_or_else(|_| {
                Err(Status::deadline_exceeded("no end of the answer within the deadline"))
            })
        }
    };
    ended.ended = clock::now();
    if let Err(status) = outcome {
        ended.trailers = status.metadata().clone();
        ended.status = status;
    }
    ended
}

async fn attempt(
    channel: &Channel,
    method: &Method,
    messages: impl Stream<Item = Bytes> + Send + 'static,
    ended: &mut Ended,
    on: &mut impl FnMut(Bytes) -> ControlFlow<()>,
) -> Result<(), Status> {
    let service = tower::ServiceBuilder::new()
        .map_result(|reply: Result<Response<Body>, _>| {
            reply.map_err(Status::from).and_then(checked)
        })
        .service(channel.clone());
    let mut grpc: Grpc<_> = Grpc::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut request = Request::new(messages);
    *request.metadata_mut() = method.metadata.clone();
    if let Some(deadline) = method.deadline {
        request.set_timeout(deadline);
    }
    let reply = send(&mut grpc, request, method.path.clone()).await?;
    ended.head = Some(clock::now());
    let (headers, mut reply, _) = reply.into_parts();
    ended.headers = headers;
    while let Some(message) = reply.message().await? {
        ended.messages += 1;
        ended.first_message.get_or_insert_with(clock::now);
        if on(message).is_break() {
            return Err(Status::cancelled("given up here"));
        }
    }
    if let Some(trailers) = reply.trailers().await? {
        ended.trailers = trailers;
    }
    Ok(())
}

/// An answer of gRPC, whatever its status.
fn checked(reply: Response<Body>) -> Result<Response<Body>, Status> {
    if grpc::is_grpc(reply.headers()) {
        return Ok(reply);
    }
    let kind = reply.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    Err(Status::unknown(format!(
        "this is no gRPC server: it answers with HTTP status {} and {}",
        reply.status(),
        kind.unwrap_or("no content type"),
    )))
}

async fn send<S, M>(
    grpc: &mut Grpc<S>,
    request: Request<M>,
    path: PathAndQuery,
) -> Result<tonic::Response<tonic::Streaming<Bytes>>, Status>
where
    S: tonic::client::GrpcService<Body>,
    S::ResponseBody: http_body::Body<Data = Bytes> + Send + 'static,
    <S::ResponseBody as http_body::Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    M: Stream<Item = Bytes> + Send + 'static,
{
    // Nobody waits here: whether there is room is known only when the call is made.
    grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
    grpc.streaming(request, path, Raw).await
}

/// Messages as they are on the wire.
#[derive(Clone, Copy, Debug)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
