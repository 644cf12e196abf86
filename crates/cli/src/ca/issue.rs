//! `isobar ca issue`: certificates by hand.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use base::{NodeName, RegionName, clock};
use clap::Args;
use identity::{Role, SpiffeId};
use serde_json::json;

use super::{Place, absolute, failure, role};
use crate::{Failure, output, target};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Options of `isobar ca issue`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What the certificate makes its holder: client, operator or node
    #[arg(long, value_parser = role)]
    role: Role,
    /// Name of its holder
    #[arg(long)]
    name: NodeName,
    /// Region of its holder
    #[arg(long)]
    region: RegionName,
    /// Directory for cert.pem, key.pem and ca.pem, made when it does not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Certify the key.pem that is in the directory already, instead of a new one: not after it may have been stolen
    #[arg(long)]
    keep_key: bool,
    /// How long it lives [default: 24h; for nodes as long as the certificates of all nodes]
    #[arg(long, value_name = "DURATION", value_parser = target::duration)]
    ttl: Option<Duration>,
    /// Address the certificate of a node also holds for; may be repeated
    #[arg(long = "ip", value_name = "ADDRESS")]
    ips: Vec<IpAddr>,
    #[command(flatten)]
    place: Place,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> Result<(), Failure> {
    if options.role == Role::Authority {
        let why = "authorities issue their own certificates: name the directory of the authority in [authority]";
        return Err(Failure::usage(anyhow::anyhow!(why)));
    }
    let now = clock::wall();
    let authority = options.place.open(now)?;
    let id = SpiffeId {
        trust_domain: authority.trust_domain().clone(),
        role: options.role,
        region: options.region.clone(),
        name: options.name.clone(),
    };
    let usual = if options.role == Role::Node { authority.life() } else { DAY };
    let ttl = options.ttl.unwrap_or(usual);
    let (out, keep_key) = (&options.out, options.keep_key);
    authority.issue_to(out, keep_key, &id, &options.ips, ttl, now).map_err(failure)?;
    let out = absolute(out)?;
    if options.json {
        let file = |name: &str| out.join(name);
        output::json_line(&json!({
            "id": id.to_string(),
            "cert": file("cert.pem"),
            "key": file("key.pem"),
            "ca": file("ca.pem"),
        }))?;
        return Ok(());
    }
    output::text(&format!("{id}: cert.pem, key.pem and ca.pem in {}", out.display()))?;
    Ok(())
}
