//! `isobar ca`: certificate authorities, the one of a mesh and those for development.

mod init;
mod issue;
mod revoke;
mod rotate;
mod show;
mod token;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context as _;
use base::{NodeName, RegionName, TrustDomain, clock};
use clap::{Args, Subcommand};
use identity::{Authority, DevCa, IdentityError, Role};
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
    /// Make the certificate authority of a mesh: a root to put away, and what signs for nodes
    Init(init::Options),
    /// Make a token with which a node joins the mesh, and print it
    Token(token::Options),
    /// Exclude a member from the mesh
    Revoke(revoke::Options),
    /// Change the root of the mesh in three steps without cutting anybody off, or what signs under it
    Rotate(rotate::Options),
    /// Issue a certificate by hand: for a client, an operator, or a node that does not join with a token
    Issue(issue::Options),
    /// Show the roots, what signs, the tokens that are good and who is excluded
    Show(show::Options),
}

/// Where the mesh's authority is.
#[derive(Debug, Args)]
struct Place {
    /// Directory of the authority, as given to `isobar ca init`
    #[arg(long, default_value = "ca")]
    dir: PathBuf,
}

impl Place {
    fn open(&self, now: SystemTime) -> Result<Authority, Failure> {
        Authority::open(&self.dir, now).map_err(failure)
    }
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
        Command::Init(options) => init::run(options),
        Command::Token(options) => token::run(options),
        Command::Revoke(options) => revoke::run(options),
        Command::Rotate(options) => rotate::run(options),
        Command::Issue(options) => issue::run(options),
        Command::Show(options) => show::run(options),
    }
}

/// What the user cannot mend by another command line or another file failed.
fn failure(error: IdentityError) -> Failure {
    match error {
        IdentityError::NotYet { .. }
        | IdentityError::IssuerEnding { .. }
        | IdentityError::Revocation(_)
        | IdentityError::File { .. } => Failure::Failed(error.into()),
        other => Failure::usage(other),
    }
}

fn role(text: &str) -> Result<Role, String> {
    let all = [Role::Node, Role::Client, Role::Operator, Role::Authority];
    let found = all.into_iter().find(|role| role.as_str() == text);
    found.ok_or_else(|| "write node, client, operator or authority".to_owned())
}

/// A moment as people write it.
fn text(moment: SystemTime) -> String {
    humantime::format_rfc3339_seconds(moment).to_string()
}

/// A path from anywhere.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    Ok(path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?)
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
    let ca = absolute(&authority.ca_path())?;
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
