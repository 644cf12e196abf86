//! An engine on loopback, and clients of it. Every wait has a deadline that only a broken engine meets.

use std::{net::SocketAddr, time::Duration};

use proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
    grpc_inference_service_client::GrpcInferenceServiceClient, infer_parameter::ParameterChoice,
    model_infer_request::InferInputTensor,
};
use serde_json::Value;
use sim::engine::{Addresses, Config, Ended, Engine};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use transport::{Channel, Dialer, Limits, Pool, QuicKeys, Target, Worker};

/// Longer than anything takes on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Tokens of a call that is not meant to end by itself.
pub(crate) const ENDLESS: i64 = 16_384;

pub(crate) struct World {
    pub(crate) at: Addresses,
    pub(crate) channel: Channel,
    running: JoinSet<Ended>,
    stop: CancellationToken,
}

impl World {
    pub(crate) fn new(slots: u32, queue: u32) -> Self {
        Self::with(Config { slots, queue: Some(queue), ..Config::default() })
    }

    pub(crate) fn with(config: Config) -> Self {
        let any = "127.0.0.1:0".parse().unwrap();
        let step = Duration::from_millis(1);
        let config = Config { grpc: any, http: any, admin: any, step, ..config };
        let engine = Engine::start(&config).unwrap();
        let (at, stop) = (engine.addresses(), CancellationToken::new());
        let mut running = JoinSet::new();
        running.spawn(engine.run(stop.clone().cancelled_owned()));
        let channel = Self::channel_to(at.grpc);
        Self { at, channel, running, stop }
    }

    /// A channel of its own to one of the ports.
    pub(crate) fn channel_to(address: SocketAddr) -> Channel {
        let worker = Worker::new(0, 1, CancellationToken::new(), CancellationToken::new());
        let dialer = Dialer::new(&worker, &QuicKeys::random(), Limits::engines()).unwrap();
        let target = Target::plaintext("sim", address.to_string().parse().unwrap());
        Pool::new(dialer).channel(target)
    }

    pub(crate) fn kserve(&self) -> GrpcInferenceServiceClient<Channel> {
        GrpcInferenceServiceClient::new(self.channel.clone())
    }

    /// What the admin port says to a request.
    pub(crate) async fn admin(&self, method: &str, path: &str) -> (u16, Value) {
        let (status, body) = http(self.at.admin, method, path, "").await;
        (status, serde_json::from_str(&body).unwrap())
    }

    /// Waits until a figure of the admin port is `want`.
    pub(crate) async fn until(&self, figure: &str, want: u64) {
        soon(async {
            while self.admin("GET", "/").await.1[figure] != want {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> (u16, String) {
        http(self.at.http, "POST", path, body).await
    }

    /// Tells the engine to stop; how it ended.
    pub(crate) async fn stop(&mut self) -> Ended {
        self.stop.cancel();
        self.ended().await
    }

    pub(crate) async fn ended(&mut self) -> Ended {
        soon(self.running.join_next()).await.unwrap().unwrap()
    }
}

/// Waits for what has to come.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("nothing came in time")
}

/// Whether something does not come, as far as a moment can tell.
pub(crate) async fn is_silent<T>(future: impl Future<Output = T>) -> bool {
    tokio::time::timeout(Duration::from_millis(100), future).await.is_err()
}

/// Status and body of one request over HTTP/1.1.
pub(crate) async fn http(at: SocketAddr, method: &str, path: &str, body: &str) -> (u16, String) {
    let reply = soon(raw_http(at, method, path, body)).await;
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body =
        if head.contains("transfer-encoding: chunked") { unchunk(body) } else { body.into() };
    (status, body)
}

/// The whole reply, as text.
pub(crate) async fn raw_http(at: SocketAddr, method: &str, path: &str, body: &str) -> String {
    let mut stream = send_http(at, &[method, path], "", body).await;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    reply
}

/// Sends a request with `headers`, lines that end in CRLF; the reply comes on the connection.
pub(crate) async fn send_http(
    at: SocketAddr,
    method_and_path: &[&str; 2],
    headers: &str,
    body: &str,
) -> TcpStream {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let (line, length) = (method_and_path.join(" "), body.len());
    let request = format!(
        "{line} HTTP/1.1\r\nhost: sim\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

fn unchunk(mut chunks: &str) -> String {
    let mut body = String::new();
    while let Some((size, rest)) = chunks.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        body.push_str(&rest[..size]);
        chunks = &rest[size + 2..];
    }
    body
}

/// A request for `tokens` tokens.
pub(crate) fn infer(prompt: &str, tokens: i64) -> ModelInferRequest {
    let contents = InferTensorContents {
        bytes_contents: vec![prompt.as_bytes().to_vec()],
        ..Default::default()
    };
    let input = InferInputTensor {
        name: "text_input".to_owned(),
        datatype: "BYTES".to_owned(),
        shape: vec![1],
        contents: Some(contents),
        ..Default::default()
    };
    let choice = Some(ParameterChoice::Int64Param(tokens));
    let parameter = InferParameter { parameter_choice: choice };
    ModelInferRequest {
        model_name: "sim".to_owned(),
        id: "id of the call".to_owned(),
        parameters: [("max_tokens".to_owned(), parameter)].into(),
        inputs: vec![input],
        ..Default::default()
    }
}

/// The text of a response.
pub(crate) fn text_of(response: &ModelInferResponse) -> String {
    let contents = response.outputs[0].contents.as_ref().unwrap();
    String::from_utf8(contents.bytes_contents[0].clone()).unwrap()
}
