//! What a bench calls, and what every answer must be.

use std::{fs, ops::ControlFlow, time::Duration};

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Uri};
use parking_lot::Mutex;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor};
use serde_json::Value;
use tonic::Code;
use transport::{Channel, PeerTls, grpc};

use super::{HTTP_API, Options, connection::Connection, runtime};
use crate::{
    Failure, call,
    caller::{self, Ended, Method},
    load::{Outcome, Wrong},
    schema::Schema,
    target::{Caller, Whom},
};

/// What is called, prepared once for all threads.
#[derive(Debug)]
pub(super) enum Subject {
    Grpc(Box<Grpc>),
    OpenAi(Box<Http>),
}

/// A path of an HTTP API, and what it is sent.
#[derive(Debug)]
pub(super) struct Http {
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
    pub(super) tls: PeerTls,
    pub(super) body: Bytes,
    pub(super) is_stream: bool,
}

#[derive(Debug)]
pub(super) struct Grpc {
    pub(super) whom: Whom,
    pub(super) method: Method,
    /// The messages of a call; calls take turns.
    requests: Vec<Vec<Bytes>>,
    /// The same as they are on the wire.
    framed: Vec<Bytes>,
    /// How long one call may take.
    limit: Duration,
    check: Check,
}

impl Subject {
    pub(super) fn new(options: &Options) -> Result<Self, Failure> {
        let data = match options.data.strip_prefix('@') {
            Some(file) => fs::read_to_string(file)
                .with_context(|| format!("cannot read {file}"))
                .map_err(Failure::Usage)?,
            None => options.data.clone(),
        };
        if options.method.starts_with(HTTP_API) {
            return Self::openai(options, &data);
        }
        let whom = options.target.whom()?;
        let metadata = call::metadata(&options.headers)?;
        // The server is asked once how its messages are declared.
        let runtime = runtime()?;
        let schema = runtime.block_on(async {
            let caller = Caller::new()?;
            let channel = caller.channel(&whom, 0);
            channel.connect().await.map_err(|error| Failure::Failed(error.into()))?;
            let schema = Schema::load(&options.schema, &channel, &metadata).await;
            caller.close().await;
            schema
        })?;
        let declared = schema.method(&options.method)?;
        let messages = call::messages(&data, &declared.input()).map_err(Failure::Usage)?;
        if messages.is_empty() && !declared.is_client_streaming() {
            return Err(Failure::Usage(anyhow::anyhow!("-d holds no message")));
        }
        let requests = match declared.is_client_streaming() {
            true => vec![messages],
            false => messages.into_iter().map(|message| vec![message]).collect(),
        };
        let method = Method { path: call::path(&declared)?, metadata, deadline: options.deadline };
        let expect = options.expect.clone().map(|expect| expectation(expect, &declared.output()));
        let check = Check {
            output: declared.output(),
            is_stream: declared.is_server_streaming(),
            expect: expect.transpose().map_err(Failure::Usage)?,
            good: Mutex::default(),
        };
        let framed = requests.iter().map(|messages| framed(messages)).collect();
        Ok(Self::Grpc(Box::new(Grpc {
            whom,
            method,
            requests,
            framed,
            limit: options.limit(),
            check,
        })))
    }

    fn openai(options: &Options, data: &str) -> Result<Self, Failure> {
        let for_grpc = [
            (options.expect.is_some(), "--expect"),
            (options.schema.is_given(), "--proto"),
            (options.connections != 1, "--connections"),
        ];
        if let Some((_, option)) = for_grpc.iter().find(|(is_given, _)| *is_given) {
            let why = "is for gRPC: an HTTP API is called over as many connections as it takes";
            return Err(Failure::Usage(anyhow::anyhow!("{option} {why}")));
        }
        let uri = options.target.uri(&options.method)?;
        let request: Value =
            serde_json::from_str(data).context("-d is not JSON").map_err(Failure::Usage)?;
        let headers = call::metadata(&options.headers)?.into_headers();
        Ok(Self::OpenAi(Box::new(Http {
            uri,
            headers,
            tls: options.target.tls()?,
            body: Bytes::from(request.to_string()),
            is_stream: request["stream"] == true,
        })))
    }
}

/// The messages of a call as gRPC frames them: a flag, a length of four bytes, the message.
fn framed(messages: &[Bytes]) -> Bytes {
    let mut body = BytesMut::new();
    for message in messages {
        body.put_u8(0);
        body.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
        body.extend_from_slice(message);
    }
    body.freeze()
}

/// What every answer must be.
#[derive(Debug)]
struct Check {
    output: MessageDescriptor,
    is_stream: bool,
    /// Fields the last message must have, under the names JSON has for them.
    expect: Option<Value>,
    /// The last message that was found good: the same bytes need no second look.
    good: Mutex<Option<Bytes>>,
}

/// How KServe v2 reports an error in a stream whose status is OK.
const STREAM_ANSWER: &str = "inference.ModelStreamInferResponse";
const STREAM_ERROR: &str = "error_message";

impl Check {
    /// Whether a message is one of those declared, and the `last` has what is expected.
    fn message(&self, bytes: &Bytes, last: bool) -> Result<(), Wrong> {
        if self.good.lock().as_ref() == Some(bytes) {
            return Ok(());
        }
        let Ok(message) = DynamicMessage::decode(self.output.clone(), bytes.clone()) else {
            return wrong(format!("an answer that is no {}", self.output.full_name()));
        };
        if self.output.full_name() == STREAM_ANSWER
            && let Some(error) = message.get_field_by_name(STREAM_ERROR)
            && let Some(error) = error.as_str().filter(|error| !error.is_empty())
        {
            return wrong(format!("an error in the stream: {error}"));
        }
        if last && let Some(expect) = &self.expect {
            let found = call::to_json(&message).map_err(|e| Wrong::Answer(e.to_string()))?;
            if !contains(&found, expect) {
                let shown: String = found.to_string().chars().take(200).collect();
                return wrong(format!("an answer without what is expected: {shown}"));
            }
        }
        // Of a stream, only its last message was held against what is expected.
        if last || self.expect.is_none() {
            *self.good.lock() = Some(bytes.clone());
        }
        Ok(())
    }

    /// Whether an answer that ended well is whole.
    fn end(&self, messages: u64, last: Option<&Bytes>) -> Result<(), Wrong> {
        match last {
            Some(_) if !self.is_stream && messages > 1 => wrong("more than one message"),
            Some(last) => self.message(last, true),
            None if self.is_stream && self.expect.is_none() => Ok(()),
            None => wrong("OK without a message"),
        }
    }
}

fn wrong(why: impl Into<String>) -> Result<(), Wrong> {
    Err(Wrong::Answer(why.into()))
}

/// What is expected of a message, under the names JSON has for its fields; a field it does not have is an error.
fn expectation(value: Value, kind: &MessageDescriptor) -> anyhow::Result<Value> {
    let Value::Object(fields) = value else {
        anyhow::bail!("--expect is an object with fields of {}", kind.full_name());
    };
    let mut found = serde_json::Map::new();
    for (name, value) in fields {
        let field = kind.get_field_by_json_name(&name).or_else(|| kind.get_field_by_name(&name));
        let field =
            field.with_context(|| format!("--expect: {} has no field {name}", kind.full_name()))?;
        let value = match (field.kind(), value) {
            (Kind::Message(kind), value @ Value::Object(_)) if !field.is_map() => {
                expectation(value, &kind)?
            }
            (Kind::Message(kind), Value::Array(list)) => {
                let list = list.into_iter().map(|value| expectation(value, &kind));
                Value::Array(list.collect::<anyhow::Result<_>>()?)
            }
            (_, value) => value,
        };
        found.insert(field.json_name().to_owned(), value);
    }
    Ok(Value::Object(found))
}

/// Whether `found` has all of `wanted`. Numbers of 64 bits are texts in JSON, and may be written as numbers.
fn contains(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, wanted)| found.get(key).is_some_and(|found| contains(found, wanted))),
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(f, w)| contains(f, w))
        }
        (Value::String(found), Value::Number(wanted)) => *found == wanted.to_string(),
        _ => found == wanted,
    }
}

impl Grpc {
    /// Makes a call over HTTP/2.
    pub(super) async fn call_on(&self, connection: &Connection, number: usize) -> Outcome {
        let body = self.framed[number % self.framed.len()].clone();
        let mut answer = Answer::new(&self.check);
        let outcome = connection.call(body, self.limit, |message| answer.message(message)).await;
        answer.judge(outcome)
    }

    /// Makes a call over whatever a channel is over.
    pub(super) async fn call(&self, channel: &Channel, number: usize) -> Outcome {
        let request = tokio_stream::iter(self.requests[number % self.requests.len()].clone());
        let mut answer = Answer::new(&self.check);
        let call = caller::call(channel, &self.method, request, |message| {
            answer.message(&message);
            ControlFlow::Continue(())
        });
        let Ok(ended) = tokio::time::timeout(self.limit, call).await else {
            let late = Wrong::Status(grpc::code_name(Code::DeadlineExceeded).to_owned());
            return Outcome::failed(late);
        };
        let status = grpc::code_name(ended.status.code());
        let result = if ended.is_ok() { Ok(()) } else { Err(Wrong::Status(status.to_owned())) };
        let served_by = ended.served_by().map(str::to_owned);
        let Ended { first_message: first, ended, messages, .. } = ended;
        answer.judge(Outcome { result, first, ended, messages, bytes: 0, served_by })
    }
}

/// An answer as it comes.
struct Answer<'a> {
    check: &'a Check,
    bytes: u64,
    last: Option<Bytes>,
    bad: Result<(), Wrong>,
}

impl<'a> Answer<'a> {
    fn new(check: &'a Check) -> Self {
        Self { check, bytes: 0, last: None, bad: Ok(()) }
    }

    fn message(&mut self, message: &Bytes) {
        self.bytes += message.len() as u64;
        if let Some(before) = self.last.replace(message.clone())
            && self.bad.is_ok()
        {
            self.bad = self.check.message(&before, false);
        }
    }

    /// What became of the call, its answer considered.
    fn judge(self, outcome: Outcome) -> Outcome {
        let result = outcome
            .result
            .and(self.bad)
            .and_then(|()| self.check.end(outcome.messages, self.last.as_ref()));
        Outcome { result, bytes: self.bytes, ..outcome }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_may_say_more_than_is_expected_and_not_less() {
        let found = json!({ "a": { "b": [1, { "c": 2 }], "d": 3 }, "e": 4 });
        for good in [json!({}), json!({ "e": 4 }), json!({ "a": { "b": [1, {}] } })] {
            assert!(contains(&found, &good), "{good}");
        }
        for bad in [json!({ "f": null }), json!({ "a": { "b": [1] } }), json!({ "e": "4" })] {
            assert!(!contains(&found, &bad), "{bad}");
        }
    }

    #[test]
    fn what_is_expected_may_be_named_as_in_proto_or_in_json_and_nothing_else() {
        let pool = prost_reflect::DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET).unwrap();
        let kind = pool.get_message_by_name("inference.ModelStreamInferResponse").unwrap();
        let outputs = json!([{ "shape": [1], "name": "x" }]);
        for (outer, inner) in [("infer_response", "model_name"), ("inferResponse", "modelName")] {
            let given = json!({ outer: { inner: "m", "outputs": outputs } });
            let want = json!({ "inferResponse": { "modelName": "m", "outputs": outputs } });
            assert_eq!(expectation(given, &kind).unwrap(), want);
        }
        assert!(expectation(json!({ "infer_respons": {} }), &kind).is_err());
        assert!(expectation(json!(1), &kind).is_err());
        assert!(contains(&json!({ "a": "7" }), &json!({ "a": 7 })));
    }

    #[test]
    fn answers_are_held_against_what_is_declared_and_expected() {
        let pool = prost_reflect::DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET).unwrap();
        let output = pool.get_message_by_name("inference.ServerReadyResponse").unwrap();
        let expect = Some(json!({ "ready": true }));
        let check = Check { output, is_stream: false, expect, good: Mutex::default() };
        let (ready, not_ready) = (Bytes::from_static(b"\x08\x01"), Bytes::new());
        // An empty message is not what was found good before anything was.
        assert!(matches!(check.end(1, Some(&not_ready)), Err(Wrong::Answer(_))));
        assert!(matches!(check.end(0, None), Err(Wrong::Answer(_))));
        for _ in 0..2 {
            assert_eq!(check.message(&ready, true), Ok(()));
            assert!(matches!(
                check.message(&Bytes::from_static(b"\xff"), true),
                Err(Wrong::Answer(_))
            ));
            assert!(matches!(check.message(&not_ready, true), Err(Wrong::Answer(_))));
            assert_eq!(check.message(&not_ready, false), Ok(()), "only the last is expected to");
        }
    }
}
