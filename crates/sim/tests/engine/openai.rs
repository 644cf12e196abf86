//! OpenAI's API and the metrics over HTTP.

use axum::http::{Request, StatusCode, Version};
use serde_json::{Value, json};
use sim::{engine::Config, words::Words};
use tokio::io::AsyncReadExt as _;
use tonic::body::Body;

use crate::world::{ENDLESS, World, http, raw_http, send_http, soon};

/// What the server makes of a chat of one message.
fn chat_words(content: &str) -> Words {
    Words::after(&format!("<|user|> {content} <|end|>\n"))
}

fn chat(content: &str, tokens: i64, more: &Value) -> String {
    let mut body = json!({
        "model": "sim", "max_tokens": tokens, "messages": [{ "role": "user", "content": content }],
    });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

/// The `data:` lines of a stream of events; the last is `[DONE]`.
fn events(body: &str) -> Vec<Value> {
    let mut events: Vec<&str> =
        body.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
    assert_eq!(events.pop(), Some("[DONE]"));
    events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

#[tokio::test]
async fn a_chat_is_answered_with_one_object_and_its_usage() {
    let world = World::new(2, 1);
    let (status, body) = world.post("/v1/chat/completions", &chat("hi", 5, &json!({}))).await;
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &answer["object"]), (200, &json!("chat.completion")));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], chat_words("hi").text(5));
    assert_eq!(choice["finish_reason"], "length");
    let usage = json!({ "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8 });
    assert_eq!(answer["usage"], usage);
}

#[tokio::test]
async fn a_streamed_chat_opens_with_the_role_and_closes_with_usage_and_done() {
    let world = World::new(2, 1);
    let more = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let (status, body) = world.post("/v1/chat/completions", &chat("hi", 4, &more)).await;
    assert_eq!(status, 200);
    let events = events(&body);
    assert_eq!(events.len(), 6);
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    for (index, event) in events[1..5].iter().enumerate() {
        let choice = &event["choices"][0];
        let index = u32::try_from(index).unwrap();
        assert_eq!(choice["delta"]["content"], chat_words("hi").token(index));
        let reason = if index == 3 { json!("length") } else { Value::Null };
        assert_eq!(choice["finish_reason"], reason);
    }
    assert_eq!(events[5]["choices"], json!([]));
    assert_eq!(events[5]["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn a_completion_is_answered_whole_or_streamed() {
    let world = World::new(2, 1);
    let request = r#"{"model": "sim", "prompt": "once upon", "max_tokens": 3, "stream": false}"#;
    let (status, body) = world.post("/v1/completions", request).await;
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &answer["object"]), (200, &json!("text_completion")));
    assert_eq!(answer["choices"][0]["text"], Words::after("once upon").text(3));
    let (_, body) = world.post("/v1/completions", &request.replace("false", "true")).await;
    let events = events(&body);
    let text: String =
        events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!((events.len(), text), (3, Words::after("once upon").text(3)));
}

#[tokio::test]
async fn a_wrong_request_is_told_what_is_wrong() {
    let world = World::new(1, 1);
    let path = "/v1/chat/completions";
    let other = chat("hi", 1, &json!({ "model": "other" }));
    let role = chat("hi", 1, &json!({ "messages": [{ "content": "x" }] }));
    for (body, want, says) in [
        (other, 404, "ask for `sim`"),
        ("{".to_owned(), 400, "EOF while parsing"),
        (String::new(), 400, "EOF while parsing"),
        (role, 400, "missing field `role`"),
        (chat("hi", 0, &json!({})), 400, "from 1 to 16384, not 0"),
        (chat("hi", 0, &json!({ "max_tokens": "x" })), 400, "max_tokens: invalid type: string"),
        (chat("hi", 1, &json!({ "stream": 1 })), 400, "stream: invalid type"),
        (chat("hi", 1, &json!({ "messages": [] })), 400, "at least one message"),
    ] {
        let (status, body) = world.post(path, &body).await;
        let error: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &error["error"]["code"]), (want, &json!(want)));
        assert!(error["error"]["message"].as_str().unwrap().contains(says), "{error}");
    }
    let (status, body) = http(world.at.http, "GET", "/nothing", "").await;
    assert!(status == 404 && body.contains("GET /v1/models"), "{body}");
    let (status, body) = http(world.at.http, "GET", path, "").await;
    assert!(status == 405 && body.contains("POST /v1/chat/completions"), "{body}");
}

#[tokio::test]
async fn a_body_without_end_is_refused() {
    let world = World::new(1, 1);
    let (status, body) = world.post("/v1/completions", &" ".repeat((4 << 20) + 1)).await;
    assert!(status == 413 && body.contains("length limit"), "{status} {body}");
}

#[tokio::test]
async fn a_refused_call_is_told_when_to_come_back() {
    let world = World::new(1, 1);
    world.admin("POST", "/refuse").await;
    let body = chat("hi", 1, &json!({}));
    let reply = soon(raw_http(world.at.http, "POST", "/v1/chat/completions", &body)).await;
    assert!(reply.starts_with("HTTP/1.1 503 "), "{reply}");
    assert!(reply.contains("retry-after: 1\r\n"), "{reply}");
    assert!(reply.contains("server busy: "), "{reply}");
    assert_eq!(http(world.at.http, "GET", "/health", "").await.0, 200, "full is healthy");
}

#[tokio::test]
async fn the_port_speaks_http_2_too() {
    let world = World::new(1, 1);
    let request = Request::get("/health").body(Body::empty()).unwrap();
    let channel = World::channel_to(world.at.http);
    let reply = soon(channel.send(request)).await.unwrap();
    assert_eq!((reply.status(), reply.version()), (StatusCode::OK, Version::HTTP_2));
}

#[tokio::test]
async fn the_model_is_listed() {
    let world = World::new(1, 1);
    let (_, body) = http(world.at.http, "GET", "/v1/models", "").await;
    let models: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(models["data"][0]["id"], "sim");
}

#[tokio::test]
async fn metrics_speak_as_vllm_does_and_count_the_prefix_cache() {
    let world = World::with(Config { model: "a\"b".parse().unwrap(), ..Config::default() });
    let prompt = "word ".repeat(40);
    let body = json!({ "model": "a\"b", "prompt": prompt, "max_tokens": 2 }).to_string();
    for _ in 0..2 {
        assert_eq!(world.post("/v1/completions", &body).await.0, 200);
    }
    world.until("finished", 2).await;
    let (status, text) = http(world.at.http, "GET", "/metrics", "").await;
    assert_eq!(status, 200);
    let model = r#"engine="0",model_name="a\"b""#;
    for line in [
        format!("vllm:num_requests_running{{{model}}} 0"),
        format!("vllm:num_requests_waiting{{{model}}} 0"),
        format!("vllm:kv_cache_usage_perc{{{model}}} 0"),
        format!("vllm:prompt_tokens_total{{{model}}} 80"),
        format!("vllm:generation_tokens_total{{{model}}} 4"),
        format!("vllm:request_success_total{{{model},finished_reason=\"length\"}} 2"),
        format!("vllm:prefix_cache_queries_total{{{model}}} 80"),
        format!("vllm:prefix_cache_hits_total{{{model}}} 32"),
        format!("vllm:time_to_first_token_seconds_count{{{model}}} 2"),
    ] {
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn metrics_are_classic_text_unless_openmetrics_is_asked_for() {
    let world = World::new(1, 1);
    let open = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
    for (accept, kind, counter, is_open) in [
        ("", "text/plain; version=0.0.4", "vllm:prompt_tokens_total", false),
        ("accept: */*\r\n", "text/plain; version=0.0.4", "vllm:prompt_tokens_total", false),
        (
            &format!("accept: {open}\r\n"),
            "application/openmetrics-text",
            "vllm:prompt_tokens",
            true,
        ),
    ] {
        let mut stream = send_http(world.at.http, &["GET", "/metrics"], accept, "").await;
        let mut page = String::new();
        soon(stream.read_to_string(&mut page)).await.unwrap();
        assert!(page.contains(&format!("content-type: {kind}")), "{page}");
        assert!(page.contains(&format!("# TYPE {counter} counter\n")), "{page}");
        assert_eq!(page.ends_with("# EOF\n"), is_open, "{page}");
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_frees_its_slot_streamed_or_not() {
    let world = World::new(1, 0);
    for (cancelled, is_stream) in (1..).zip([false, true]) {
        let body = chat("hi", ENDLESS, &json!({ "stream": is_stream }));
        let path = "/v1/chat/completions";
        let mut stream = send_http(world.at.http, &["POST", path], "", &body).await;
        world.until("running", 1).await;
        if is_stream {
            let mut head = [0; 12];
            soon(stream.read_exact(&mut head)).await.unwrap();
            assert_eq!(&head, b"HTTP/1.1 200");
        }
        drop(stream);
        world.until("running", 0).await;
        world.until("cancelled", cancelled).await;
    }
    let (status, _) = world.post("/v1/chat/completions", &chat("hi", 1, &json!({}))).await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_stream_that_is_given_up_says_so_before_it_is_done() {
    let mut world = World::new(1, 0);
    let at = world.at.http;
    let body = chat("hi", ENDLESS, &json!({ "stream": true }));
    let streaming = http(at, "POST", "/v1/chat/completions", &body);
    let ((status, body), _) = tokio::join!(streaming, async {
        world.until("running", 1).await;
        world.stop().await
    });
    assert_eq!(status, 200);
    let events = events(&body);
    let error = &events.last().unwrap()["error"];
    assert_eq!(
        (&error["code"], &error["message"]),
        (&json!(503), &json!("the server is stopping"))
    );
    assert!(events[..events.len() - 1].iter().all(|event| event["error"].is_null()));
}
