//! `isobar bench`: load on one method or one OpenAI-style path, every answer checked, latencies that leave nobody out.

mod connection;
mod drive;
mod report;
mod subject;

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use self::{drive::Run, report::Report, subject::Subject};
use crate::{
    Failure,
    load::Arrivals,
    log, output,
    schema::SchemaOptions,
    target::{TargetOptions, duration},
};

/// How paths of an OpenAI-style HTTP API begin.
const HTTP_API: &str = "/v1/";

/// Options of `isobar bench`.
#[derive(Debug, Args)]
#[command(after_help = "\
Open loop, 200 calls a second for 30 s, over HTTP/3:
  isobar bench 127.0.0.1:8443 --ca .isobar/ca.pem --h3 inference.GRPCInferenceService/ServerReady --rate 200 --duration 30s
Closed loop, 16 at a time:
  isobar bench http://127.0.0.1:8001 inference.GRPCInferenceService/ServerReady --concurrency 16
OpenAI-style HTTP:
  isobar bench http://127.0.0.1:8000 /v1/chat/completions -d '{\"model\": \"m\", \"stream\": true, \"messages\": []}' --rate 5")]
pub(crate) struct Options {
    #[command(flatten)]
    target: TargetOptions,
    /// What to call: package.Service/Method, or the path of an OpenAI-style HTTP API such as /v1/chat/completions
    method: String,
    #[command(flatten)]
    schema: SchemaOptions,
    /// What is sent, as JSON; @FILE reads it from a file. Where a call takes one message and several are given, calls take
    /// turns. By default an empty message
    #[arg(short, long, value_name = "JSON", default_value = "{}")]
    data: String,
    /// Header to send, as 'name: value'. May be repeated
    #[arg(short = 'H', long = "header", value_name = "HEADER")]
    headers: Vec<String>,
    /// Open loop: calls per second, made whether earlier ones have ended or not
    #[arg(long, value_name = "PER_SECOND", value_parser = rate)]
    rate: Option<f64>,
    /// Closed loop: so many calls in progress, each followed by the next
    #[arg(long, value_name = "CALLS", default_value_t = 1, conflicts_with = "rate",
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    concurrency: u32,
    /// How the gaps between calls are distributed in the open loop
    #[arg(long, value_enum, default_value = "poisson")]
    arrivals: Arrivals,
    /// How long calls are made
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    duration: Duration,
    /// Make so many calls instead, however long it takes
    #[arg(long, value_name = "CALLS", conflicts_with = "duration")]
    calls: Option<u64>,
    /// Calls of the first while are made and not counted
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
    warmup: Duration,
    /// How long one call may take, as the server is told too; by default a minute, of which it is told nothing
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    deadline: Option<Duration>,
    /// Connections, each carrying its share of the calls
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    connections: u32,
    /// Threads, each with its share of connections and calls
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
    /// Calls in progress at once in the open loop; those due beyond it are counted as not made
    #[arg(long, value_name = "CALLS", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    in_flight_max: u32,
    /// Fields every answer must have, as JSON; the last message of a stream counts
    #[arg(long, value_name = "JSON", value_parser = json_value)]
    expect: Option<Value>,
    /// Where the random gaps begin
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

impl Options {
    /// How long one call may take.
    fn limit(&self) -> Duration {
        const LIMIT: Duration = Duration::from_secs(60);
        self.deadline.unwrap_or(LIMIT)
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (1e-3..=1e6).contains(&rate) => Ok(rate),
        _ => Err("write calls per second, from 0.001 to 1000000".to_owned()),
    }
}

fn json_value(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    log::to_stderr(tracing::Level::WARN, false)?;
    let is_http = options.method.starts_with(HTTP_API);
    if options.threads > options.connections && !is_http {
        let why = "threads need at least as many --connections";
        return Err(Failure::Usage(anyhow::anyhow!("{} {why}", options.threads)));
    }
    if options.threads > options.in_flight_max {
        let why = "threads need at least as many calls as --in-flight-max";
        return Err(Failure::Usage(anyhow::anyhow!("{} {why}", options.threads)));
    }
    let subject = Subject::new(options)?;
    let stop = CancellationToken::new();
    // What was measured until then is worth something.
    let interrupted = stop.clone();
    let listening = runtime()?;
    let mut signals = {
        let _entered = listening.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let listener = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        listening.block_on(async {
            tokio::select! {
                _ = signals.0.recv() => interrupted.cancel(),
                _ = signals.1.recv() => interrupted.cancel(),
                () = interrupted.cancelled() => {}
            }
        });
    })?;
    let ran = Run::new(options, &subject, stop.clone()).drive();
    stop.cancel();
    // It only waits for what has just happened.
    drop(listener.join());
    let ran = ran?;
    let report = Report { options, subject: &subject, ran: &ran };
    if options.json {
        output::json_line(&report.json())?;
    } else {
        output::text(&report.text())?;
    }
    let tally = &ran.tally;
    if ran.is_cut_short {
        return Err(anyhow::anyhow!("stopped before its end").into());
    }
    if tally.ok == tally.calls && tally.calls > 0 && tally.not_made == 0 {
        return Ok(());
    }
    let bad = tally.calls - tally.ok + tally.not_made;
    Err(match tally.calls {
        0 => anyhow::anyhow!(
            "no call was counted: the duration is too short for the rate, or all warm-up"
        ),
        calls => anyhow::anyhow!("{bad} of {} calls failed", calls + tally.not_made),
    }
    .into())
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("cannot make a runtime")
}
