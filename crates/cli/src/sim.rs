//! `isobar sim`: what is simulated, so that a mesh can be tried without GPUs.

use std::{net::SocketAddr, os::unix::process::CommandExt as _, process, time::Duration};

use anyhow::Context as _;
use base::ModelName;
use clap::{Args, Subcommand};
use serde_json::json;
use sim::{
    engine::{Config, Ended, Engine},
    mesh::{self, Fault},
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{Failure, log, output, parent, target::duration};

/// Options of `isobar sim`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a simulated GPU server: KServe v2 over gRPC, OpenAI's API over HTTP, faults on demand
    Engine(EngineOptions),
    /// Run the machines of a whole mesh on simulated time and a simulated network, and check what must always hold
    Mesh(MeshOptions),
}

/// Options of `isobar sim mesh`.
#[derive(Debug, Args)]
struct MeshOptions {
    /// Nodes in all
    #[arg(long, default_value_t = mesh::Config::default().nodes)]
    nodes: u32,
    /// Regions the nodes are spread over evenly
    #[arg(long, default_value_t = mesh::Config::default().regions)]
    regions: u32,
    /// Models; each node fronts one engine of one of them
    #[arg(long, default_value_t = mesh::Config::default().models)]
    models: u32,
    /// What every draw follows from: the same seed has the same outcome
    #[arg(long, default_value_t = mesh::Config::default().seed)]
    seed: u64,
    /// What goes wrong, several with commas between: none, crash, loss=PERCENT, asymmetric, flap, pause, restart,
    /// restart-older, duplicate, clock-jump, partition, byzantine, join, rolling
    #[arg(long, value_name = "FAULTS", default_value = "none", value_parser = faults)]
    fault: Faults,
    /// Simulated time in seconds; by default 90; for more than 2,000 nodes 30, or 13 where nothing
    /// goes wrong, in which a false alarm is hardly seen
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Packets the network loses, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0)]
    loss: f64,
    /// Say on standard error what this node was told, line by line
    #[arg(long, value_name = "NODE")]
    watch: Option<u32>,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug)]
struct Faults(Vec<Fault>);

fn faults(text: &str) -> Result<Faults, mesh::FaultError> {
    Fault::list(text).map(Faults)
}

/// Options of `isobar sim engine`.
#[derive(Debug, Args)]
struct EngineOptions {
    /// Where gRPC is served, without TLS; port 0 takes any
    #[arg(long, value_name = "ADDRESS", default_value_t = Config::default().grpc)]
    grpc: SocketAddr,
    /// Where HTTP is served: the OpenAI API, /health and /metrics
    #[arg(long, value_name = "ADDRESS", default_value_t = Config::default().http)]
    http: SocketAddr,
    /// Where faults are injected: POST /slow?factor=20, /hang, /refuse, /heal, /die; GET / shows
    #[arg(long, value_name = "ADDRESS", default_value_t = Config::default().admin)]
    admin: SocketAddr,
    /// Its only model
    #[arg(long, default_value_t = Config::default().model)]
    model: ModelName,
    /// Requests that run at once
    #[arg(long, default_value_t = Config::default().slots)]
    slots: u32,
    /// Length of a step of an empty batch; a full one takes twice as long. A running request yields a token per step
    #[arg(long, value_name = "DURATION", default_value = "20ms", value_parser = duration)]
    step: Duration,
    /// Requests that wait for a slot; beyond it the server is busy. By default a quarter of the slots
    #[arg(long)]
    queue: Option<u32>,
    /// Tokens of a prompt a request takes in per step
    #[arg(long, value_name = "TOKENS", default_value_t = Config::default().prefill_tokens_per_step)]
    prefill_tokens_per_step: u32,
    /// Blocks of 16 tokens the prefix cache holds
    #[arg(long, value_name = "BLOCKS", default_value_t = Config::default().cache_blocks)]
    cache_blocks: usize,
    /// Tokens of an answer whose length was not asked for
    #[arg(long, value_name = "TOKENS", default_value_t = Config::default().max_tokens)]
    max_tokens: u32,
    /// End at once when standard input is closed, and so with the process that holds it
    #[arg(long)]
    exit_with_stdin: bool,
    /// Print the result as one JSON object, and log as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    match &options.command {
        Command::Engine(options) => engine(options),
        Command::Mesh(options) => simulate(options),
    }
}

/// The variable in which the allocator is told what to do.
const ALLOCATOR_OPTIONS: &str = "_RJEM_MALLOC_CONF";

/// Thousands of machines live in gigabytes that are touched all over: with huge pages that takes a tenth less time, or better. Where it
/// cannot be had, the simulation goes on without.
fn take_huge_pages() {
    if std::env::var_os(ALLOCATOR_OPTIONS).is_none() {
        let mut args = std::env::args_os();
        let mut again = process::Command::new("/proc/self/exe");
        again.arg0(args.next().unwrap_or_default());
        again.args(args).env(ALLOCATOR_OPTIONS, "thp:always,metadata_thp:always,dirty_decay_ms:-1");
        drop(again.exec());
    }
}

fn simulate(options: &MeshOptions) -> Result<(), Failure> {
    if options.nodes > mesh::LARGE {
        take_huge_pages();
    }
    let config = mesh::Config {
        nodes: options.nodes,
        regions: options.regions,
        models: options.models,
        seed: options.seed,
        faults: options.fault.0.clone(),
        time: options.seconds.map(Duration::from_secs),
        loss: options.loss / 100.0,
        watch: options.watch,
    };
    let began = base::clock::now();
    // On one of the workers: the others are a step away.
    let (outcome, ()) = rayon::join(|| mesh::run(&config), || ());
    let outcome = outcome.map_err(Failure::usage)?;
    let took = base::clock::now().saturating_duration_since(began);
    outcome.story.iter().for_each(|line| output::note(line));
    output::note(&format!("wall_s {:.1}", took.as_secs_f64()));
    if options.json {
        output::json_line(&serde_json::to_value(&outcome.report)?)?;
    } else {
        output::text(&figures(&outcome.report)?)?;
    }
    for mesh::Violation { at_s, seed, what } in &outcome.violations {
        output::note(&format!("violated at {at_s:.3} s with seed {seed}: {what}"));
    }
    if outcome.report.violations > 0 { Err(Failure::Said) } else { Ok(()) }
}

/// One figure per line, those there is nothing to measure of left out.
fn figures(report: &mesh::Report) -> Result<String, Failure> {
    let all = serde_json::to_value(report)?;
    let all = all.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let lines = all.map(|(name, value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("{:32} {value}", name.replace('_', " "))
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

fn engine(options: &EngineOptions) -> Result<(), Failure> {
    log::to_stderr(tracing::Level::INFO, options.json)?;
    if options.exit_with_stdin {
        parent::exit_with_stdin()?;
    }
    let config = Config {
        grpc: options.grpc,
        http: options.http,
        admin: options.admin,
        model: options.model.clone(),
        slots: options.slots,
        step: options.step,
        queue: options.queue,
        prefill_tokens_per_step: options.prefill_tokens_per_step,
        cache_blocks: options.cache_blocks,
        max_tokens: options.max_tokens,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make a runtime")?;
    let ended = runtime.block_on(serve(options, config))?;
    // As a process that is killed: no good-bye to anybody.
    if matches!(ended, Ended::Died) {
        process::exit(1);
    }
    runtime.shutdown_background();
    match ended {
        Ended::Failed(error) => Err(error.into()),
        Ended::Stopped | Ended::Died => Ok(()),
    }
}

async fn serve(options: &EngineOptions, config: Config) -> Result<Ended, Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let model = config.model.clone();
    let engine = Engine::start(&config).map_err(Failure::usage)?;
    let at = engine.addresses();
    if options.json {
        let listen = json!({ "grpc": at.grpc, "http": at.http, "admin": at.admin });
        output::json_line(&json!({ "model": model.as_str(), "listen": listen }))?;
    } else {
        output::text(&format!(
            "simulated engine with model {model} is ready\n  \
             grpc   {}   KServe v2, health, reflection (h2c)\n  \
             http   {}   /v1/chat/completions /v1/completions /v1/models /health /metrics\n  \
             admin  {}   POST /slow?factor=20 /hang /refuse /heal /die",
            at.grpc, at.http, at.admin
        ))?;
    }
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(engine.run(stop).await)
}
