//! `isobar ca`: certificate authorities.

use std::{net::IpAddr, path::PathBuf};

use anyhow::Context as _;
use base::{NodeName, RegionName, TrustDomain, clock};
use clap::{Args, Subcommand};
use identity::DevCa;
use serde_json::json;

use crate::{Failure, output};

/// Options of `isobar ca`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a certificate authority and node certificates for development. Never use it in production: its key lies beside
    /// the certificates
    Dev(Dev),
}

#[derive(Debug, Args)]
struct Dev {
    /// Directory of the authority, made when it does not exist
    #[arg(long, default_value = ".isobar")]
    dir: PathBuf,
    /// Trust domain the certificates speak for
    #[arg(long, default_value = ::node::config::DEFAULT_TRUST_DOMAIN)]
    trust_domain: TrustDomain,
    /// Node to issue a certificate for, as REGION/NAME; may be repeated
    #[arg(long = "node", value_name = "REGION/NAME", value_parser = node_id)]
    nodes: Vec<(RegionName, NodeName)>,
    /// Address the certificates also hold for, besides localhost, 127.0.0.1 and ::1; may be repeated
    #[arg(long = "ip", value_name = "ADDRESS")]
    ips: Vec<IpAddr>,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

fn node_id(text: &str) -> Result<(RegionName, NodeName), String> {
    let (region, name) =
        text.split_once('/').ok_or("write REGION/NAME, for instance eu-west/gpu-1")?;
    let region = region.parse().map_err(|error: base::NameError| error.to_string())?;
    Ok((region, name.parse().map_err(|error: base::NameError| error.to_string())?))
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    match &options.command {
        Command::Dev(options) => dev(options),
    }
}

fn dev(options: &Dev) -> Result<(), Failure> {
    let now = clock::wall();
    let authority =
        DevCa::open_or_create(&options.dir, &options.trust_domain, now).map_err(Failure::usage)?;
    let mut ids = Vec::new();
    for (region, name) in &options.nodes {
        let node = authority.node(region, name, &options.ips, now).map_err(Failure::usage)?;
        ids.push(node.id().to_string());
    }
    let ca = authority.ca_path();
    let ca = ca.canonicalize().with_context(|| format!("cannot find {}", ca.display()))?;
    if options.json {
        let trust_domain = options.trust_domain.as_str();
        output::json_line(&json!({ "ca": ca, "trust_domain": trust_domain, "nodes": ids }))?;
        return Ok(());
    }
    let mut text = format!("development CA of {}: {}", options.trust_domain, ca.display());
    for id in ids {
        text.push_str("\n  ");
        text.push_str(&id);
    }
    output::text(&text)?;
    Ok(())
}
