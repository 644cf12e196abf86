//! What a bench calls, and what every answer must be.

use std::fs;

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderMap, Uri};
use parking_lot::Mutex;
use prost_reflect::{DynamicMessage, MessageDescriptor};
use serde_json::Value;
use transport::{Channel, PeerTls, grpc};

use super::{Options, runtime};
use crate::{
    Failure, call,
    caller::{self, Method},
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
    method: Method,
    /// The messages of a call; calls take turns.
    requests: Vec<Vec<Bytes>>,
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
        if options.method.starts_with("/v1/") {
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
            let schema = Schema::load(&options.schema, &channel).await;
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
        let method =
            Method { path: call::path(&declared)?, metadata, deadline: Some(options.deadline) };
        let check = Check {
            output: declared.output(),
            is_stream: declared.is_server_streaming(),
            expect: options.expect.clone(),
            good: Mutex::default(),
        };
        Ok(Self::Grpc(Box::new(Grpc { whom, method, requests, check })))
    }

    fn openai(options: &Options, data: &str) -> Result<Self, Failure> {
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

/// What every answer must be.
#[derive(Debug)]
struct Check {
    output: MessageDescriptor,
    is_stream: bool,
    expect: Option<Value>,
    /// The last message that was found good: the same bytes need no second look.
    good: Mutex<Bytes>,
}

impl Check {
    /// Whether a message is one of those declared, and the `last` has what is expected.
    fn message(&self, bytes: &Bytes, last: bool) -> Result<(), Wrong> {
        if *self.good.lock() == *bytes {
            return Ok(());
        }
        let wrong = |why: String| Err(Wrong::Answer(why));
        let Ok(message) = DynamicMessage::decode(self.output.clone(), bytes.clone()) else {
            return wrong(format!("an answer that is no {}", self.output.full_name()));
        };
        if last && let Some(expect) = &self.expect {
            let found =
                call::to_json(&message).map_err(|error| Wrong::Answer(error.to_string()))?;
            if !contains(&found, expect) {
                let shown: String = found.to_string().chars().take(200).collect();
                return wrong(format!("an answer without what is expected: {shown}"));
            }
        }
        // Of a stream, only its last message was held against what is expected.
        if last || self.expect.is_none() {
            *self.good.lock() = bytes.clone();
        }
        Ok(())
    }
}

/// Whether `found` has all of `wanted`.
fn contains(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, wanted)| found.get(key).is_some_and(|found| contains(found, wanted))),
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(f, w)| contains(f, w))
        }
        _ => found == wanted,
    }
}

impl Grpc {
    pub(super) async fn call(&self, channel: &Channel, number: u64) -> Outcome {
        let turn = usize::try_from(number).unwrap_or(0) % self.requests.len();
        let request = tokio_stream::iter(self.requests[turn].clone());
        let (mut bytes, mut bad, mut last) = (0, Ok(()), None);
        let ended = caller::call(channel, &self.method, request, |message| {
            bytes += message.len() as u64;
            if let Some(before) = last.replace(message)
                && bad.is_ok()
            {
                bad = self.check.message(&before, false);
            }
        })
        .await;
        let result = if !ended.is_ok() {
            Err(Wrong::Status(grpc::code_name(ended.status.code()).to_owned()))
        } else if bad.is_err() {
            bad
        } else {
            match &last {
                Some(_) if !self.check.is_stream && ended.messages > 1 => {
                    Err(Wrong::Answer("more than one message".to_owned()))
                }
                Some(last) => self.check.message(last, true),
                None if self.check.is_stream => Ok(()),
                None => Err(Wrong::Answer("OK without a message".to_owned())),
            }
        };
        Outcome {
            result,
            first: ended.first_message,
            ended: ended.ended,
            messages: ended.messages,
            bytes,
            served_by: ended.served_by().map(str::to_owned),
        }
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
    fn answers_are_held_against_what_is_declared_and_expected() {
        let pool = prost_reflect::DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET).unwrap();
        let output = pool.get_message_by_name("inference.ServerReadyResponse").unwrap();
        let expect = Some(json!({ "ready": true }));
        let check = Check { output, is_stream: false, expect, good: Mutex::default() };
        let (ready, not_ready) = (Bytes::from_static(b"\x08\x01"), Bytes::new());
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
