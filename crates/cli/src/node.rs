//! `isobar node`: runs a node until it is told to stop.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::Args;
use node::{Addresses, Credentials, Node, config::Config};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{Failure, credentials, log, output, parent, setup::environment};

/// Options of `isobar node`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Configuration file; `conf.d/*.toml` beside it is merged
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Take the node's identity from a development CA, made when it does not exist
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = ".isobar")]
    dev_ca: Option<PathBuf>,
    /// Let everybody call everything, unless the configuration says who may; --dev-ca does so too
    #[arg(long)]
    dev: bool,
    /// Check the configuration and the certificates, start nothing
    #[arg(long)]
    check: bool,
    /// End at once, without draining, when standard input is closed, and so with the process that holds it
    #[arg(long)]
    exit_with_stdin: bool,
    /// Print results as JSON objects, one a line, and log as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    log::to_stderr(tracing::Level::INFO, options.json)?;
    let mut config = Config::load(&options.config, &environment()).map_err(Failure::usage)?;
    let opened = if options.dev || options.dev_ca.is_some() {
        config.open_for_development()
    } else {
        Vec::new()
    };
    node::check_access(&config).map_err(Failure::usage)?;
    // The control side: one thread, apart from the workers, so that a busy data plane never delays it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make a runtime")?;
    let credentials = credentials::of(&config, options.dev_ca.as_deref(), !options.check);
    let (credentials, ca) = runtime.block_on(credentials)?;
    if options.check {
        return checked(options, &config);
    }
    say_who_may_call(&config, &opened);
    if options.exit_with_stdin {
        parent::exit_with_stdin()?;
    }
    let outcome = runtime.block_on(serve(options, &config, credentials, &ca));
    // Names that are being looked up are not waited for.
    runtime.shutdown_background();
    outcome
}

/// Says loudly what was opened, and that nobody may call where that is so: both are easily missed.
fn say_who_may_call(config: &Config, opened: &[String]) {
    for sentence in opened {
        tracing::warn!("--dev: {sentence}");
    }
    if config.is_closed() {
        tracing::warn!("{}", config.who_may_call());
    }
}

fn checked(options: &Options, config: &Config) -> Result<(), Failure> {
    let (peers, engines) = (config.mesh.peers.len(), config.engines.len());
    let (name, region) = (&config.node.name, &config.node.region);
    if options.json {
        let node = (name.as_str(), region.as_str());
        let access = config.who_may_call();
        let found = json!({
            "ok": true, "node": node.0, "region": node.1, "peers": peers, "engines": engines, "access": access,
        });
        output::json_line(&found)?;
    } else {
        let file = options.config.display();
        output::text(&format!(
            "{file} is good: node {name} (region {region}), {engines} engines, {peers} peers; {}",
            config.who_may_call()
        ))?;
    }
    Ok(())
}

async fn serve(
    options: &Options,
    config: &Config,
    credentials: Credentials,
    ca: &Path,
) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut node = Node::start(config, credentials).await?;
    let ready = if options.json {
        output::json_line(&ready_json(config, node.addresses(), ca))
    } else {
        output::text(&ready_text(config, node.addresses(), ca))
    };
    ready.context("cannot say that the node is ready")?;
    let failed = tokio::select! {
        () = asked_to_stop(&mut terminate, &mut interrupt) => None,
        error = node.failed() => Some(error),
    };
    if let Some(error) = &failed {
        tracing::error!(%error, "this node cannot go on");
    }
    tracing::info!("draining: no new calls; a second signal ends at once");
    node.drain(asked_to_stop(&mut terminate, &mut interrupt)).await;
    tracing::info!("stopped");
    failed.map_or(Ok(()), |error| Err(error.into()))
}

async fn asked_to_stop(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn ready_json(config: &Config, addresses: Addresses, ca: &Path) -> serde_json::Value {
    json!({
        "node": config.node.name.as_str(),
        "region": config.node.region.as_str(),
        "trust_domain": config.mesh.trust_domain.as_str(),
        "listen": {
            "clients": addresses.clients,
            "peers": addresses.peers,
            "gossip": addresses.gossip,
            "plaintext": addresses.plaintext,
            "metrics": addresses.metrics,
            "admin": addresses.admin,
        },
        "ca": ca,
    })
}

fn ready_text(config: &Config, addresses: Addresses, ca: &Path) -> String {
    let (name, region, mesh) = (&config.node.name, &config.node.region, &config.mesh.trust_domain);
    let mut lines = vec![
        format!("isobar node {name} (region {region}) of {mesh} is ready"),
        format!("  clients    {}   h2 and h3 over TLS", addresses.clients),
        format!("  peers      {}   h3 and h2, mutual TLS", addresses.peers),
        format!("  gossip     {}   QUIC, or HTTP/2 over TCP, mutual TLS", addresses.gossip),
    ];
    if let Some(plaintext) = addresses.plaintext {
        lines.push(format!("  plaintext  {plaintext}   h2c"));
    }
    lines.push(format!("  metrics    {}   /metrics /livez /readyz /room", addresses.metrics));
    let how = if addresses.admin.ip().is_loopback() { "gRPC" } else { "gRPC, operators only" };
    lines.push(format!("  admin      {}   {how}", addresses.admin));
    lines.push(format!("  ca         {}", ca.display()));
    if config.tls.cert.is_none() && config.access.anonymous.is_some() {
        lines.push("  try it from Python (pip install 'tritonclient[grpc]'):".to_owned());
        lines.push(format!(
            "    python3 -c 'import tritonclient.grpc as t; print(t.InferenceServerClient(\"{}\", ssl=True, \
             root_certificates=\"{}\").is_server_ready())'",
            reachable(addresses.clients),
            ca.display()
        ));
    }
    lines.join("\n")
}

/// An address a client on this machine can dial and a development certificate covers.
fn reachable(address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port())
    } else {
        address
    }
}
