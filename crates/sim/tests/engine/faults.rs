//! Faults, garbage, stopping and dying.

use std::net::SocketAddr;

use futures_util::{StreamExt as _, stream};
use proto::{
    grpc::{
        health::v1::{
            HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
        },
        reflection::v1::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest,
        },
    },
    inference::{ModelStreamInferResponse, ServerReadyRequest, infer_parameter::ParameterChoice},
};
use serde_json::{Value, json};
use sim::engine::Ended;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tonic::{Code, Streaming};

use crate::world::{ENDLESS, World, http, infer, is_silent, raw_http, send_http, soon};

#[tokio::test]
async fn the_admin_port_says_what_is_wrong_and_how_full_it_is() {
    let world = World::new(3, 2);
    let (status, state) = world.admin("GET", "/").await;
    assert_eq!((status, &state["fault"]), (200, &Value::Null));
    assert_eq!((&state["slots"], &state["queue"]), (&json!(3), &json!(2)));
    for (path, fault, factor) in [
        ("/slow?factor=20", json!("slow"), json!(20.0)),
        ("/hang", json!("hang"), Value::Null),
        ("/refuse", json!("refuse"), Value::Null),
        ("/heal", Value::Null, Value::Null),
    ] {
        let (status, state) = world.admin("POST", path).await;
        assert_eq!((status, &state["fault"], &state["factor"]), (200, &fault, &factor));
    }
}

#[tokio::test]
async fn the_admin_port_refuses_nonsense_with_what_is_allowed() {
    let world = World::new(1, 1);
    for (method, path, want, says) in [
        ("POST", "/slow", 400, "from 1 to 10000"),
        ("POST", "/slow?factor=much", 400, "from 1 to 10000"),
        ("POST", "/slow?factor=0.5", 400, "from 1 to 10000, not 0.5"),
        ("POST", "/slow?factor=NaN", 400, "from 1 to 10000, not NaN"),
        ("POST", "/slow?factor=2&by=3", 400, "from 1 to 10000"),
        ("GET", "/hang", 405, "POST /hang"),
        ("POST", "/break", 404, "POST /hang"),
    ] {
        let (status, answer) = world.admin(method, path).await;
        assert_eq!(status, want, "{method} {path}");
        assert!(answer["error"].as_str().unwrap().contains(says), "{answer}");
    }
    assert_eq!(world.admin("GET", "/").await.1["fault"], Value::Null);
}

#[tokio::test]
async fn a_hung_engine_answers_nothing_until_it_heals() {
    let world = World::new(2, 1);
    let (mut ready, mut busy) = (world.kserve(), world.kserve());
    soon(ready.server_ready(ServerReadyRequest {})).await.unwrap();
    let mut inferring = Box::pin(busy.model_infer(infer("a", ENDLESS)));
    tokio::select! {
        _ = &mut inferring => panic!("16,384 tokens came at once"),
        () = world.until("running", 1) => {}
    }
    world.admin("POST", "/hang").await;
    let mut asking = Box::pin(ready.server_ready(ServerReadyRequest {}));
    let mut health = Box::pin(raw_http(world.at.http, "GET", "/health", ""));
    assert!(is_silent(&mut inferring).await);
    let state = world.admin("GET", "/").await.1;
    assert_eq!((&state["fault"], &state["running"]), (&json!("hang"), &json!(1)));
    assert!(is_silent(&mut asking).await);
    assert!(is_silent(&mut health).await);
    assert_eq!(world.admin("GET", "/").await.1, state);
    world.admin("POST", "/heal").await;
    assert!(soon(asking).await.unwrap().get_ref().ready);
    assert!(soon(health).await.starts_with("HTTP/1.1 200 "));
    soon(async { while world.admin("GET", "/").await.1["tokens"] == state["tokens"] {} }).await;
}

#[tokio::test]
async fn a_hung_engine_answers_nothing_to_an_open_stream() {
    let world = World::new(2, 1);
    let (requests, later) = mpsc::channel(1);
    let requests_of = stream::unfold(later, async |mut later| Some((later.recv().await?, later)));
    requests.send(infer("a", 1)).await.unwrap();
    let stream = soon(world.kserve().model_stream_infer(requests_of)).await.unwrap();
    let mut stream = stream.into_inner();
    assert!(soon(stream.message()).await.unwrap().is_some());
    world.admin("POST", "/hang").await;
    requests.send(infer("b", 0)).await.unwrap();
    assert!(is_silent(stream.message()).await, "not even that it is wrong");
    world.admin("POST", "/heal").await;
    let message = soon(stream.message()).await.unwrap().unwrap();
    assert!(message.error_message.contains("not 0"), "{}", message.error_message);
    world.admin("POST", "/hang").await;
    drop(requests);
    assert!(is_silent(stream.message()).await, "nor that it is over");
    world.admin("POST", "/heal").await;
    assert!(soon(stream.message()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_hung_engine_answers_nothing_on_an_open_stream_of_any_service() {
    let world = World::new(1, 1);
    let list = || ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let (requests, later) = mpsc::channel(1);
    let requests_of = stream::unfold(later, async |mut later| Some((later.recv().await?, later)));
    requests.send(list()).await.unwrap();
    let mut client = ServerReflectionClient::new(world.channel.clone());
    let mut answers = soon(client.server_reflection_info(requests_of)).await.unwrap().into_inner();
    assert!(soon(answers.message()).await.unwrap().is_some());
    world.admin("POST", "/hang").await;
    requests.send(list()).await.unwrap();
    assert!(is_silent(answers.message()).await);
    world.admin("POST", "/heal").await;
    assert!(soon(answers.message()).await.unwrap().is_some());
}

#[tokio::test]
async fn a_hung_engine_answers_nothing_to_a_request_whose_head_it_has() {
    let world = World::new(1, 1);
    let mut stream = TcpStream::connect(world.at.http).await.unwrap();
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{";
    stream.write_all(head).await.unwrap();
    let mut reply = [0; 12];
    assert!(is_silent(stream.read_exact(&mut reply)).await);
    world.admin("POST", "/hang").await;
    stream.write_all(b"!").await.unwrap();
    assert!(is_silent(stream.read_exact(&mut reply)).await);
    world.admin("POST", "/heal").await;
    soon(stream.read_exact(&mut reply)).await.unwrap();
    assert_eq!(&reply, b"HTTP/1.1 400");
}

#[tokio::test]
async fn a_refusing_engine_is_ready_and_takes_nothing_until_it_heals() {
    let world = World::new(2, 1);
    world.admin("POST", "/refuse").await;
    let refused = soon(world.kserve().model_infer(infer("a", 1))).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
    let ready = soon(world.kserve().server_ready(ServerReadyRequest {})).await.unwrap();
    assert!(ready.get_ref().ready);
    world.admin("POST", "/heal").await;
    assert!(soon(world.kserve().model_infer(infer("a", 1))).await.is_ok());
}

#[tokio::test]
async fn a_slow_engine_goes_on_and_heals() {
    let world = World::new(1, 1);
    world.admin("POST", "/slow?factor=10000").await;
    let mut client = world.kserve();
    let mut inferring = Box::pin(client.model_infer(infer("a", 1)));
    assert!(is_silent(&mut inferring).await);
    // Its only step would have taken 20 s: what is left of it shrinks.
    world.admin("POST", "/slow?factor=2").await;
    assert!(soon(inferring).await.is_ok());
}

/// Says something on a fresh connection and reads until it closes, or for a moment.
async fn say(at: SocketAddr, what: &[u8]) {
    let mut stream = TcpStream::connect(at).await.unwrap();
    // The other end may have had enough already.
    drop(stream.write_all(what).await);
    let mut sink = Vec::new();
    is_silent(stream.read_to_end(&mut sink)).await;
}

#[tokio::test]
async fn garbage_on_any_port_does_no_harm() {
    let world = World::new(1, 1);
    let noise: Vec<u8> =
        (0..4_096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let half_preface = &b"PRI * HTTP/2.0\r\n\r\nSM"[..];
    let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &noise].concat();
    let get = &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..];
    for at in [world.at.grpc, world.at.http, world.at.admin] {
        for what in [
            get,
            &noise,
            half_preface,
            &preface,
            b"\0",
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9999999999\r\n\r\n{",
        ] {
            say(at, what).await;
        }
    }
    assert!(soon(world.kserve().model_infer(infer("a", 1))).await.is_ok());
    assert_eq!(http(world.at.http, "GET", "/health", "").await.0, 200);
    assert_eq!(world.admin("GET", "/").await.0, 200);
}

#[tokio::test]
async fn an_engine_that_is_stopped_finishes_what_is_short_and_tells_watchers() {
    let mut world = World::new(1, 1);
    let mut health = HealthClient::new(world.channel.clone());
    let watch = soon(health.watch(HealthCheckRequest::default())).await.unwrap();
    let mut watch = watch.into_inner();
    assert_eq!(soon(watch.message()).await.unwrap().unwrap().status(), ServingStatus::Serving);
    let requests = stream::iter([infer("a", 20)]);
    let mut stream = soon(world.kserve().model_stream_infer(requests)).await.unwrap().into_inner();
    let (ended, tokens) = tokio::join!(world.stop(), async {
        let mut tokens = 0;
        while let Some(message) = soon(stream.message()).await.unwrap() {
            assert_eq!(message.error_message, "");
            tokens += 1;
        }
        tokens
    });
    assert_eq!(tokens, 20);
    assert!(matches!(ended, Ended::Stopped), "{ended:?}");
    assert_eq!(soon(watch.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert!(soon(watch.message()).await.unwrap().is_none());
    assert!(TcpStream::connect(world.at.grpc).await.is_err());
}

/// How a stream ends: tokens of each request that was answered in full, and the status.
async fn ending(mut stream: Streaming<ModelStreamInferResponse>) -> (Vec<usize>, Code) {
    let (mut whole, mut tokens) = (Vec::new(), 0);
    loop {
        let message = match soon(stream.message()).await {
            Ok(Some(message)) => message,
            Ok(None) => return (whole, Code::Ok),
            Err(status) => return (whole, status.code()),
        };
        tokens += 1;
        let last = &message.infer_response.unwrap().parameters["triton_final_response"];
        if last.parameter_choice == Some(ParameterChoice::BoolParam(true)) {
            whole.push(std::mem::take(&mut tokens));
        }
    }
}

#[tokio::test]
async fn an_engine_that_is_stopped_refuses_the_requests_behind_the_one_in_progress() {
    let mut world = World::new(4, 0);
    let requests = || stream::iter([infer("a", 50), infer("b", ENDLESS), infer("c", 1)]);
    let (mut ended, mut open) = (world.kserve(), world.kserve());
    let ended = soon(ended.model_stream_infer(requests())).await.unwrap().into_inner();
    let open = open.model_stream_infer(requests().chain(stream::pending()));
    let open = soon(open).await.unwrap().into_inner();
    let (_, ended, open) = tokio::join!(world.stop(), ending(ended), ending(open));
    // The second is refused, or given up on a machine so slow that it had begun.
    for outcome in [ended, open] {
        assert_eq!(outcome, (vec![50], Code::Unavailable));
    }
}

#[tokio::test]
async fn an_engine_that_is_stopped_ends_a_stream_well_only_after_its_client_has() {
    let mut world = World::new(2, 0);
    let (mut ended, mut open) = (world.kserve(), world.kserve());
    let requests = || stream::iter([infer("a", 20)]);
    let ended = soon(ended.model_stream_infer(requests())).await.unwrap().into_inner();
    let open = open.model_stream_infer(requests().chain(stream::pending()));
    let open = soon(open).await.unwrap().into_inner();
    let (_, ended, open) = tokio::join!(world.stop(), ending(ended), ending(open));
    assert_eq!(ended, (vec![20], Code::Ok));
    assert_eq!(open, (vec![20], Code::Unavailable));
}

#[tokio::test]
async fn an_engine_that_is_stopped_takes_no_call_whose_body_comes_later() {
    let mut world = World::new(2, 1);
    let at = world.at;
    let body = br#"{"model": "sim", "prompt": "a", "max_tokens": 1}"#;
    let mut stream = TcpStream::connect(at.http).await.unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut reply = String::new();
    assert!(is_silent(stream.read_to_string(&mut reply)).await);
    tokio::join!(world.stop(), async {
        soon(async { while TcpStream::connect(at.admin).await.is_ok() {} }).await;
        // The engine may have waited in vain already; it says the same.
        drop(stream.write_all(body).await);
        soon(stream.read_to_string(&mut reply)).await.unwrap();
    });
    assert!(reply.starts_with("HTTP/1.1 503 "), "{reply}");
    assert!(reply.contains("the server is stopping"), "{reply}");
}

#[tokio::test]
async fn an_engine_that_is_stopped_while_it_hangs_says_so_as_openai_would() {
    let mut world = World::new(1, 1);
    world.admin("POST", "/hang").await;
    let mut stream = send_http(world.at.http, &["GET", "/v1/models"], "", "").await;
    let mut reply = String::new();
    assert!(is_silent(stream.read_to_string(&mut reply)).await);
    world.stop().await;
    soon(stream.read_to_string(&mut reply)).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 503 "), "{reply}");
    let (_, body) = reply.split_once("\r\n\r\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["error"]["type"], "ServiceUnavailableError");
}

#[tokio::test]
async fn an_engine_that_is_stopped_gives_up_what_is_long_or_hangs() {
    let mut world = World::new(2, 1);
    let requests = stream::iter([infer("a", ENDLESS)]);
    let mut stream = soon(world.kserve().model_stream_infer(requests)).await.unwrap().into_inner();
    world.admin("POST", "/hang").await;
    let mut client = world.kserve();
    let asking = client.server_ready(ServerReadyRequest {});
    let (ended, asked, status) = tokio::join!(world.stop(), soon(asking), async {
        loop {
            match soon(stream.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream looks complete"),
                Err(status) => return status,
            }
        }
    });
    assert!(matches!(ended, Ended::Stopped), "{ended:?}");
    assert_eq!(asked.unwrap_err().code(), Code::Unavailable);
    assert_eq!(status.code(), Code::Unavailable);
}

#[tokio::test]
async fn an_engine_that_is_told_to_die_ends_at_once() {
    let mut world = World::new(1, 1);
    let mut stream = TcpStream::connect(world.at.admin).await.unwrap();
    stream.write_all(b"POST /die HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let ended = world.ended().await;
    assert!(matches!(ended, Ended::Died), "{ended:?}");
    for at in [world.at.grpc, world.at.http, world.at.admin] {
        assert!(TcpStream::connect(at).await.is_err());
    }
}
