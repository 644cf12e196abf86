//! `isobar call`: one method of any gRPC server, with JSON in and out, and everything that happens on the way.

use std::{
    fs,
    io::{self, Read},
    ops::ControlFlow,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use http::uri::PathAndQuery;
use prost::Message as _;
use prost_reflect::{DynamicMessage, MessageDescriptor, MethodDescriptor, SerializeOptions};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{KeyAndValueRef, MetadataKey, MetadataMap, MetadataValue};
use transport::grpc;

use crate::{
    Failure,
    caller::{self, Ended, Method},
    log, output,
    schema::{self, Schema, SchemaOptions},
    target::{Caller, Protocol, TargetOptions, duration},
};

/// Messages read ahead of what the server takes.
const AHEAD: usize = 16;
/// Messages of one call that --json holds.
const MESSAGES_MAX: usize = 100_000;
/// A call whose messages are all known at the start is given up after this, unless --deadline says otherwise.
const DEADLINE: Duration = Duration::from_secs(60);

/// Options of `isobar call`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without METHOD the server is asked for its services; with the name of a service, for its methods.

  isobar call 127.0.0.1:8443 --ca .isobar/ca.pem
  isobar call 127.0.0.1:8443 --ca .isobar/ca.pem inference.GRPCInferenceService
  isobar call 127.0.0.1:8443 --ca .isobar/ca.pem inference.GRPCInferenceService/ModelReady -d '{\"name\": \"llama\"}'")]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOptions,
    /// What to call: package.Service/Method
    method: Option<String>,
    #[command(flatten)]
    schema: SchemaOptions,
    /// Messages as JSON, one after another; @FILE reads them from a file, - from standard input, each sent as it comes. By
    /// default an empty message, or standard input where the method takes a stream
    #[arg(short, long, value_name = "JSON")]
    data: Option<String>,
    /// Header to send, as 'name: value'; the value of a name that ends in -bin is base64. May be repeated
    #[arg(short = 'H', long = "header", value_name = "HEADER")]
    headers: Vec<String>,
    /// How long a call may take, and connecting and asking for declarations before it; by default a minute, or without end
    /// where messages come from standard input
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    deadline: Option<Duration>,
    /// Make the call so many times, one after another
    #[arg(long, value_name = "TIMES", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeat: u32,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    log::to_stderr(tracing::Level::WARN, false)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make a runtime")?;
    let outcome = runtime.block_on(async {
        let caller = Caller::new()?;
        let outcome = with(options, &caller).await;
        caller.close().await;
        outcome
    });
    // Whoever reads standard input may wait for a line for ever.
    runtime.shutdown_background();
    outcome
}

async fn with(options: &Options, caller: &Caller) -> Result<(), Failure> {
    let whom = options.target.whom()?;
    let metadata = metadata(&options.headers)?;
    let channel = caller.channel(&whom, 0);
    let began = base::clock::now();
    let preparing = async {
        channel.connect().await.map_err(|error| Failure::Failed(error.into()))?;
        let connect = base::clock::now() - began;
        Ok::<_, Failure>((connect, Schema::load(&options.schema, &channel, &metadata).await?))
    };
    let within = options.deadline.unwrap_or(DEADLINE);
    let prepared = tokio::time::timeout(within, preparing).await;
    let (connect, schema) = prepared.unwrap_or_else(|_| {
        let why = "the server did not say within the deadline what it declares";
        Err(anyhow::anyhow!("{why}: give the file with --proto, or more time").into())
    })?;
    let Some(name) = &options.method else { return list(options, &schema) };
    if let Some(service) = schema.service(name) {
        return describe(options, &service);
    }
    let method = schema.method(name)?;
    let input = Input::new(options, &method)?;
    let call = Call {
        method: Method {
            path: path(&method)?,
            metadata,
            deadline: options.deadline.or_else(|| input.is_bounded().then_some(DEADLINE)),
        },
        schema: &schema,
        input: method.input(),
        output: method.output(),
        protocol: whom.protocol,
        connect,
        as_json: options.json,
        takes_stream: method.is_client_streaming(),
        is_stream: method.is_server_streaming(),
    };
    let (mut calls, mut failed) = (Vec::new(), 0);
    for _ in 0..options.repeat {
        let (ended, messages) = call.make(&channel, &input).await?;
        failed += u32::from(!ended.is_ok());
        if options.json {
            calls.push(call.json(&ended, messages));
        } else {
            output::note(&call.text(&ended));
        }
    }
    if options.json {
        let address = whom.authority.as_str();
        output::json_line(&json!({
            "address": address,
            "method": method.full_name(),
            "protocol": whom.protocol.as_str(),
            "connect_s": connect.as_secs_f64(),
            "calls": calls,
        }))?;
    }
    match failed {
        0 => Ok(()),
        _ if options.repeat == 1 => Err(Failure::Said),
        _ => Err(anyhow::anyhow!("{failed} of {} calls failed", options.repeat).into()),
    }
}

fn list(options: &Options, schema: &Schema) -> Result<(), Failure> {
    let services = schema.services()?;
    if options.json {
        output::json_line(&json!({ "services": services }))?;
    } else {
        output::text(&services.join("\n"))?;
    }
    Ok(())
}

fn describe(options: &Options, service: &prost_reflect::ServiceDescriptor) -> Result<(), Failure> {
    if options.json {
        let methods: Vec<Value> = service
            .methods()
            .map(|method| {
                json!({
                    "name": method.name(),
                    "input": method.input().full_name(),
                    "output": method.output().full_name(),
                    "client_streaming": method.is_client_streaming(),
                    "server_streaming": method.is_server_streaming(),
                })
            })
            .collect();
        output::json_line(&json!({ "service": service.full_name(), "methods": methods }))?;
        return Ok(());
    }
    let mut text = schema::describe(service);
    let mut seen = Vec::new();
    for method in service.methods() {
        let input = method.input();
        if !seen.contains(&input) {
            text.push_str("\n\n");
            text.push_str(&schema::fields(&input));
            seen.push(input);
        }
    }
    output::text(&text)?;
    Ok(())
}

/// The path of a method.
pub(crate) fn path(method: &MethodDescriptor) -> Result<PathAndQuery, Failure> {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    path.parse().context("the name of the method is no path").map_err(Failure::from)
}

/// Headers as they were given.
pub(crate) fn metadata(headers: &[String]) -> Result<MetadataMap, Failure> {
    let mut metadata = MetadataMap::new();
    for header in headers {
        add(&mut metadata, header).map_err(Failure::Usage)?;
    }
    Ok(metadata)
}

fn add(metadata: &mut MetadataMap, header: &str) -> anyhow::Result<()> {
    let (name, value) = header
        .split_once(':')
        .with_context(|| format!("`{header}` is no header: write 'name: value'"))?;
    let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
    if name.ends_with("-bin") {
        let key = MetadataKey::from_bytes(name.as_bytes())?;
        let bytes = data_encoding::BASE64
            .decode(value.as_bytes())
            .or_else(|_| data_encoding::BASE64_NOPAD.decode(value.as_bytes()))
            .with_context(|| format!("the value of {name} is not base64"))?;
        metadata.append_bin(key, MetadataValue::from_bytes(&bytes));
    } else {
        let key = MetadataKey::from_bytes(name.as_bytes())
            .with_context(|| format!("`{name}` is no name of a header"))?;
        let value: MetadataValue<_> =
            value.parse().with_context(|| format!("the value of {name} is no text of ASCII"))?;
        metadata.append(key, value);
    }
    Ok(())
}

/// Where the messages come from.
enum Input {
    /// They are known.
    Known(Vec<Bytes>),
    /// From standard input, as they come.
    Typed,
}

impl Input {
    fn new(options: &Options, method: &MethodDescriptor) -> Result<Self, Failure> {
        let text = match options.data.as_deref() {
            None if method.is_client_streaming() => return Self::typed(options),
            Some("-") => return Self::typed(options),
            None => "{}".to_owned(),
            Some(data) => match data.strip_prefix('@') {
                Some(file) => fs::read_to_string(file)
                    .with_context(|| format!("cannot read {file}"))
                    .map_err(Failure::Usage)?,
                None => data.to_owned(),
            },
        };
        let messages = messages(&text, &method.input()).map_err(Failure::Usage)?;
        if messages.len() != 1 && !method.is_client_streaming() {
            return Err(Failure::Usage(anyhow::anyhow!(
                "{} takes exactly one message, and {} were given",
                method.full_name(),
                messages.len()
            )));
        }
        Ok(Self::Known(messages))
    }

    fn typed(options: &Options) -> Result<Self, Failure> {
        if options.repeat > 1 {
            let why = "standard input can be read once: leave out --repeat, or give -d";
            return Err(Failure::Usage(anyhow::anyhow!(why)));
        }
        Ok(Self::Typed)
    }

    fn is_bounded(&self) -> bool {
        matches!(self, Self::Known(_))
    }
}

/// Every message of a text.
pub(crate) fn messages(text: &str, kind: &MessageDescriptor) -> anyhow::Result<Vec<Bytes>> {
    let values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    values.map(|value| message(value.context("not JSON")?, kind)).collect()
}

fn message(value: Value, kind: &MessageDescriptor) -> anyhow::Result<Bytes> {
    let message = DynamicMessage::deserialize(kind.clone(), value)
        .with_context(|| format!("this is no {} as JSON", kind.full_name()))?;
    Ok(message.encode_to_vec().into())
}

/// One call, to be made again and again.
struct Call<'a> {
    method: Method,
    schema: &'a Schema,
    input: MessageDescriptor,
    output: MessageDescriptor,
    protocol: Protocol,
    connect: Duration,
    as_json: bool,
    /// Whether it takes a stream, and whether it answers with one.
    takes_stream: bool,
    is_stream: bool,
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let source = error.downcast_ref::<io::Error>();
    source.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

impl Call<'_> {
    /// Makes it; returns its messages when they are to be printed together.
    async fn make(
        &self,
        channel: &transport::Channel,
        input: &Input,
    ) -> Result<(Ended, Vec<Value>), Failure> {
        let mut messages = Vec::new();
        let mut trouble = None;
        let on = |bytes: Bytes| match self.received(&bytes, &mut messages) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                trouble = Some(error);
                ControlFlow::Break(())
            }
        };
        let ended = match input {
            Input::Known(known) => {
                let known = tokio_stream::iter(known.clone());
                caller::call(channel, &self.method, known, on).await
            }
            Input::Typed => {
                let (sender, typed) = mpsc::channel(AHEAD);
                let (broken, bad) = tokio::sync::oneshot::channel();
                let (kind, many) = (self.input.clone(), self.takes_stream);
                // It reads until its last message, or until the process ends.
                let reading = tokio::task::spawn_blocking(move || {
                    if let Err(error) = read_messages(io::stdin().lock(), &kind, many, &sender) {
                        // The call has ended when nobody hears it.
                        drop(broken.send(error));
                        // The stream must not look complete before the call is given up.
                        std::mem::forget(sender);
                    }
                });
                let call = caller::call(channel, &self.method, ReceiverStream::new(typed), on);
                let ended = tokio::select! {
                    ended = call => ended,
                    Ok(error) = bad => return Err(Failure::Usage(error)),
                };
                drop(reading);
                ended
            }
        };
        match trouble {
            // Whoever read the messages has seen enough.
            Some(error) if is_broken_pipe(&error) => Err(Failure::Said),
            Some(error) => Err(error.into()),
            None if !self.is_stream && ended.messages > 1 => {
                let name = self.method.path.path();
                Err(anyhow::anyhow!("{} messages where {name} has one", ended.messages).into())
            }
            None => Ok((ended, messages)),
        }
    }

    fn received(&self, bytes: &Bytes, messages: &mut Vec<Value>) -> anyhow::Result<()> {
        let message = DynamicMessage::decode(self.output.clone(), bytes.clone())
            .with_context(|| format!("the answer is no {}", self.output.full_name()))?;
        let value = to_json(&message)?;
        if !self.as_json {
            return Ok(output::json(&value)?);
        }
        anyhow::ensure!(
            messages.len() < MESSAGES_MAX,
            "more than {MESSAGES_MAX} messages: leave out --json to see them as they come"
        );
        messages.push(value);
        Ok(())
    }

    fn since(ended: &Ended, at: Option<Instant>) -> Option<f64> {
        at.map(|at| (at - ended.began).as_secs_f64())
    }

    fn json(&self, ended: &Ended, messages: Vec<Value>) -> Value {
        json!({
            "status": {
                "code": i32::from(ended.status.code()),
                "name": grpc::code_name(ended.status.code()),
                "message": ended.status.message(),
                "details": self.details(ended),
            },
            "served_by": ended.served_by(),
            "headers": metadata_json(&ended.headers),
            "trailers": metadata_json(&ended.trailers),
            "messages": messages,
            "timings": {
                "head_s": Self::since(ended, ended.head),
                "first_message_s": Self::since(ended, ended.first_message),
                "total_s": (ended.ended - ended.began).as_secs_f64(),
            },
        })
    }

    fn text(&self, ended: &Ended) -> String {
        let mut lines = vec![format!("status     {}", grpc::code_name(ended.status.code()))];
        if !ended.status.message().is_empty() {
            lines.push(format!("message    {}", ended.status.message()));
        }
        for detail in self.details(ended).as_array().into_iter().flatten() {
            lines.push(format!("detail     {detail}"));
        }
        if let Some(served_by) = ended.served_by() {
            lines.push(format!("served by  {served_by}"));
        }
        for (what, metadata) in [("header", &ended.headers), ("trailer", &ended.trailers)] {
            for (name, value) in pairs(metadata) {
                lines.push(format!("{what:<10} {name}: {value}"));
            }
        }
        let ms = |seconds: Option<f64>| {
            seconds.map_or_else(|| "-".to_owned(), |s| format!("{:.1} ms", s * 1e3))
        };
        lines.push(format!(
            "time       {} over {}: connect {}, head {}, first message {}",
            ms(Self::since(ended, Some(ended.ended))),
            self.protocol.as_str(),
            ms(Some(self.connect.as_secs_f64())),
            ms(Self::since(ended, ended.head)),
            ms(Self::since(ended, ended.first_message)),
        ));
        lines.join("\n")
    }

    /// The details of a status, as far as their types are known.
    fn details(&self, ended: &Ended) -> Value {
        let details = ended.status.details();
        let known = self.schema.message("google.rpc.Status").filter(|_| !details.is_empty());
        known
            .and_then(|kind| DynamicMessage::decode(kind, details).ok())
            .and_then(|status| to_json(&status).ok())
            .map_or_else(|| json!([]), |status| status["details"].clone())
    }
}

/// A message as JSON: fields that hold their default are shown, lists only when they hold something.
pub(crate) fn to_json(message: &DynamicMessage) -> anyhow::Result<Value> {
    let options = SerializeOptions::new().skip_default_fields(false);
    let mut value = message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .context("the answer cannot be shown as JSON")?;
    without_empty(&mut value);
    Ok(value)
}

fn without_empty(value: &mut Value) {
    let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    match value {
        Value::Array(list) => list.iter_mut().for_each(without_empty),
        Value::Object(map) => {
            map.values_mut().for_each(without_empty);
            map.retain(|_, value| !is_empty(value));
        }
        _ => {}
    }
}

fn read_messages(
    from: impl Read,
    kind: &MessageDescriptor,
    many: bool,
    to: &mpsc::Sender<Bytes>,
) -> anyhow::Result<()> {
    let values = serde_json::Deserializer::from_reader(from).into_iter::<Value>();
    for (number, value) in values.enumerate() {
        anyhow::ensure!(
            many || number == 0,
            "standard input holds more than the one message the method takes"
        );
        let message = message(value.context("standard input is not JSON")?, kind)?;
        if to.blocking_send(message).is_err() {
            break;
        }
    }
    Ok(())
}

/// Names and values, binary ones as base64.
fn pairs(metadata: &MetadataMap) -> impl Iterator<Item = (String, String)> + '_ {
    metadata.iter().map(|pair| match pair {
        KeyAndValueRef::Ascii(name, value) => {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            (name.to_string(), value)
        }
        KeyAndValueRef::Binary(name, value) => {
            let bytes = value.to_bytes().unwrap_or_default();
            (name.to_string(), data_encoding::BASE64.encode(&bytes))
        }
    })
}

fn metadata_json(metadata: &MetadataMap) -> Value {
    let mut object = serde_json::Map::new();
    for (name, value) in pairs(metadata) {
        let values = object.entry(name).or_insert_with(|| json!([]));
        if let Some(values) = values.as_array_mut() {
            values.push(Value::String(value));
        }
    }
    Value::Object(object)
}
