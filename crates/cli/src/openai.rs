//! One call to an OpenAI-style HTTP server: a POST of JSON, answered by JSON or by a stream of events, checked to its end.
//!
//! A stream is complete when it says so: `finish_reason` and then `[DONE]`. Source: OpenAI API reference, "Streaming";
//! events as in the HTML standard, "Server-sent events".

use std::time::{Duration, Instant};

use anyhow::Context as _;
use base::clock;
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::{client::legacy, client::legacy::connect::HttpConnector};
use serde_json::Value;
use tokio_util::task::TaskTracker;

use crate::load::{Outcome, Wrong};

/// Longest line of a stream, and longest answer that is none.
const BYTES_MAX: usize = 16 << 20;

/// A server, and what it is sent.
#[derive(Clone, Debug)]
pub(crate) struct OpenAi {
    client: legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    uri: Uri,
    headers: HeaderMap,
    deadline: Duration,
}

/// Runs what the client spawns as tasks somebody awaits.
#[derive(Clone, Debug)]
struct Tracked(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// What is known of an answer so far.
#[derive(Debug, Default)]
struct Seen {
    first: Option<Instant>,
    messages: u64,
    bytes: u64,
}

impl OpenAi {
    /// A client; what it spawns are `tasks`.
    pub(crate) fn new(
        uri: Uri,
        headers: HeaderMap,
        tls: rustls::ClientConfig,
        deadline: Duration,
        tasks: &TaskTracker,
    ) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = legacy::Client::builder(Tracked(tasks.clone())).build(connector);
        Self { client, uri, headers, deadline }
    }

    /// Makes a call with `body`, which is JSON.
    pub(crate) async fn call(&self, body: Bytes, is_stream: bool) -> Outcome {
        let mut seen = Seen::default();
        let attempt = self.attempt(body, is_stream, &mut seen);
        let result = tokio::time::timeout(self.deadline, attempt)
            .await
            .unwrap_or_else(|_| Err(Wrong::Status("deadline".to_owned())));
        Outcome {
            result,
            first: seen.first,
            ended: clock::now(),
            messages: seen.messages,
            bytes: seen.bytes,
            served_by: None,
        }
    }

    async fn attempt(&self, body: Bytes, is_stream: bool, seen: &mut Seen) -> Result<(), Wrong> {
        let mut request = Request::post(self.uri.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| Wrong::Status(error.to_string()))?;
        request.headers_mut().extend(self.headers.clone());
        let reply = self.client.request(request).await;
        let reply = reply.map_err(|_| Wrong::Status("connection".to_owned()))?;
        let (head, body) = reply.into_parts();
        if head.status != StatusCode::OK {
            return Err(Wrong::Status(head.status.as_u16().to_string()));
        }
        if is_stream { events(body, seen).await } else { whole(body, seen).await }
    }
}

fn answer(why: impl Into<String>) -> Wrong {
    Wrong::Answer(why.into())
}

/// An answer in one piece.
async fn whole(body: Incoming, seen: &mut Seen) -> Result<(), Wrong> {
    let body = http_body_util::Limited::new(body, BYTES_MAX).collect().await;
    let body = body.map_err(|error| answer(format!("the answer broke off: {error}")))?.to_bytes();
    seen.bytes = body.len() as u64;
    seen.messages = 1;
    let value: Value =
        serde_json::from_slice(&body).map_err(|_| answer("the answer is no JSON"))?;
    let is_complete = ["choices", "data"]
        .iter()
        .any(|list| value[list].as_array().is_some_and(|choices| !choices.is_empty()));
    if is_complete { Ok(()) } else { Err(answer("the answer has neither choices nor data")) }
}

/// A stream of events.
async fn events(mut body: Incoming, seen: &mut Seen) -> Result<(), Wrong> {
    let (mut buffer, mut events) = (BytesMut::new(), Events::default());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| answer(format!("the stream broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        seen.bytes += data.len() as u64;
        buffer.extend_from_slice(&data);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line = buffer.split_to(end);
            buffer.advance(1);
            if events.line(&line).map_err(|error| answer(format!("{error:#}")))? {
                seen.messages += 1;
                seen.first.get_or_insert_with(clock::now);
            }
        }
        if buffer.len() > BYTES_MAX {
            return Err(answer("a line without an end"));
        }
    }
    let last = events.line(&buffer).and_then(|_| events.end());
    last.map_err(|error| answer(format!("{error:#}")))
}

/// What the events of a stream have said.
#[derive(Debug, Default)]
struct Events {
    finished: bool,
    done: bool,
}

impl Events {
    /// Takes in a line; returns whether it brought something of the answer.
    fn line(&mut self, line: &[u8]) -> anyhow::Result<bool> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(data) = line.strip_prefix(b"data:") else { return Ok(false) };
        anyhow::ensure!(!self.done, "something after [DONE]");
        let data = data.strip_prefix(b" ").unwrap_or(data);
        if data == b"[DONE]" {
            self.done = true;
            return Ok(false);
        }
        let event: Value = serde_json::from_slice(data).context("an event that is no JSON")?;
        anyhow::ensure!(
            event["error"].is_null(),
            "the stream reports an error: {}",
            event["error"]
        );
        let Some(choice) = event["choices"].get(0) else { return Ok(false) };
        self.finished |= choice["finish_reason"].is_string();
        let text = [&choice["delta"]["content"], &choice["text"]];
        Ok(text.iter().any(|text| text.as_str().is_some_and(|text| !text.is_empty())))
    }

    /// The stream has ended.
    fn end(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.done, "a stream that ends without [DONE]");
        anyhow::ensure!(self.finished, "a stream that ends without a finish_reason");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> anyhow::Result<usize> {
        let mut events = Events::default();
        let mut pieces = 0;
        for line in lines {
            pieces += usize::from(events.line(line.as_bytes())?);
        }
        events.end().map(|()| pieces)
    }

    const HELLO: &str = r#"data: {"choices":[{"delta":{"content":"hello"},"finish_reason":null}]}"#;
    const LAST: &str = r#"data: {"choices":[{"text":"!","finish_reason":"length"}]}"#;
    const USAGE: &str = r#"data: {"choices":[],"usage":{"total_tokens":3}}"#;

    #[test]
    fn a_stream_is_whole_when_it_says_so() {
        let role = r#"data: {"choices":[{"delta":{"role":"assistant"}}]}"#;
        let lines = [role, "", ": a comment", HELLO, "\r", LAST, USAGE, "data: [DONE]\r", ""];
        assert_eq!(read(&lines).unwrap(), 2);
    }

    #[test]
    fn a_stream_that_breaks_off_is_not_done() {
        for lines in [&[HELLO][..], &[HELLO, LAST], &[HELLO, "data: [DONE]"]] {
            assert!(read(lines).is_err(), "{lines:?}");
        }
        assert!(read(&["data: {"]).is_err());
        assert!(read(&[LAST, "data: [DONE]", HELLO]).is_err());
        assert!(read(&[r#"data: {"error":{"message":"busy"}}"#]).is_err());
    }
}
