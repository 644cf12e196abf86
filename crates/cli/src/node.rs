//! `isobar node`: runs a node until it is told to stop.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use base::clock;
use clap::Args;
use identity::{DevCa, NodeIdentity};
use node::{Addresses, ClientCertificate, Node, config::Config};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    Failure, log, output, parent,
    setup::{IdentityPaths, environment},
};

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
    let (identity, ca) = identity(options, &config)?;
    let certificate = certificate(options, &config, &identity)?;
    if options.check {
        return checked(options, &config);
    }
    say_who_may_call(&config, &opened);
    if options.exit_with_stdin {
        parent::exit_with_stdin()?;
    }
    // The control side: one thread, apart from the workers, so that a busy data plane never delays it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make a runtime")?;
    let outcome = runtime.block_on(serve(options, &config, &identity, certificate, &ca));
    // Names that are being looked up are not waited for.
    runtime.shutdown_background();
    outcome
}

/// The identity of the node, and where the certificate of its authority lies.
fn identity(options: &Options, config: &Config) -> Result<(NodeIdentity, PathBuf), Failure> {
    let (identity, ca) = if let Some(dir) = &options.dev_ca {
        let now = clock::wall();
        let authority =
            DevCa::open_or_create(dir, &config.mesh.trust_domain, now).map_err(Failure::usage)?;
        let (region, name) = (&config.node.region, &config.node.name);
        let identity =
            authority.node(region, name, &listened(config), now).map_err(Failure::usage)?;
        (identity, authority.ca_path())
    } else {
        let paths = IdentityPaths::of_state(config);
        let identity = NodeIdentity::load(&paths.ca, &paths.cert, &paths.key)
            .context("this node has no identity; for development start it with --dev-ca")
            .map_err(Failure::Usage)?;
        (identity, paths.ca)
    };
    matches_config(&identity, config)?;
    let ca = ca.canonicalize().with_context(|| format!("cannot find {}", ca.display()))?;
    Ok((identity, ca))
}

/// A node may only speak under the name its certificate gives it.
fn matches_config(identity: &NodeIdentity, config: &Config) -> Result<(), Failure> {
    let id = identity.id();
    let configured = (&config.node.name, &config.node.region, &config.mesh.trust_domain);
    if (&id.name, &id.region, &id.trust_domain) != configured {
        return Err(Failure::Usage(anyhow::anyhow!(
            "the certificate is for {id}, and the configuration says node {} in region {} of {}: \
             set node.name, node.region and mesh.trust_domain to what the certificate says, or get another",
            configured.0,
            configured.1,
            configured.2,
        )));
    }
    Ok(())
}

/// The particular addresses the node listens on: a development certificate covers them too.
fn listened(config: &Config) -> Vec<IpAddr> {
    let listen = &config.listen;
    let addresses = [listen.clients.ip(), listen.peers.ip(), listen.gossip.ip()];
    addresses.into_iter().filter(|address| !address.is_unspecified()).collect()
}

/// The certificate for clients: from `[tls]`, or the node's own where a development CA vouches for localhost.
fn certificate(
    options: &Options,
    config: &Config,
    identity: &NodeIdentity,
) -> Result<ClientCertificate, Failure> {
    let (chain, key) = match (&config.tls.cert, &config.tls.key) {
        (Some(cert), Some(key)) => identity::load_server_cert(cert, key).map_err(Failure::usage)?,
        _ if options.dev_ca.is_some() => identity.server_cert(),
        _ => {
            return Err(Failure::Usage(anyhow::anyhow!(
                "{}: clients need a certificate: set tls.cert and tls.key, or start with --dev-ca",
                options.config.display()
            )));
        }
    };
    Ok(ClientCertificate { chain, key })
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
    identity: &NodeIdentity,
    certificate: ClientCertificate,
    ca: &Path,
) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let node = Node::start(config, identity, certificate).await?;
    let ready = if options.json {
        output::json_line(&ready_json(config, node.addresses(), ca))
    } else {
        output::text(&ready_text(config, node.addresses(), ca))
    };
    ready.context("cannot say that the node is ready")?;
    asked_to_stop(&mut terminate, &mut interrupt).await;
    tracing::info!("draining: no new calls; a second signal ends at once");
    node.drain(asked_to_stop(&mut terminate, &mut interrupt)).await;
    tracing::info!("stopped");
    Ok(())
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
        format!("  gossip     {}   QUIC, mutual TLS", addresses.gossip),
    ];
    if let Some(plaintext) = addresses.plaintext {
        lines.push(format!("  plaintext  {plaintext}   h2c"));
    }
    lines.push(format!("  metrics    {}   /metrics /livez /readyz /room", addresses.metrics));
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
