//! `isobar ca token`: with what a node joins.

use std::time::Duration;

use base::{NodeName, RegionName, clock};
use clap::Args;
use identity::{NamePattern, Role, TokenScope};
use serde_json::json;

use super::{Place, failure, role, text};
use crate::{Failure, output, target};

/// Options of `isobar ca token`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Name of the node that joins with it
    #[arg(long, value_name = "NAME", required_unless_present = "name_pattern")]
    node: Option<NodeName>,
    /// Names of the nodes that join with it, where * stands for any characters, such as 'gpu-*'
    #[arg(long, value_name = "PATTERN", conflicts_with = "node", value_parser = pattern)]
    name_pattern: Option<NamePattern>,
    /// How many nodes may join with it; more than one only with --name-pattern
    #[arg(long, default_value_t = 1, value_name = "N")]
    uses: u32,
    /// Region of the node
    #[arg(long)]
    region: RegionName,
    /// What the node becomes
    #[arg(long, default_value = "node", value_parser = role)]
    role: Role,
    /// How long the token is good, from 1s to 7d
    #[arg(long, default_value = "10m", value_name = "DURATION", value_parser = target::duration)]
    ttl: Duration,
    /// Gossip address of an authority at which to join; may be repeated
    #[arg(long = "seed", value_name = "HOST:PORT")]
    seeds: Vec<String>,
    #[command(flatten)]
    place: Place,
    /// Print the token and what it is good for as one JSON object
    #[arg(long)]
    json: bool,
}

fn pattern(text: &str) -> Result<NamePattern, String> {
    text.parse().map_err(|error: identity::IdentityError| error.to_string())
}

pub(super) fn run(options: &Options) -> Result<(), Failure> {
    let names = match (&options.node, &options.name_pattern) {
        (Some(name), _) => NamePattern::from(name),
        (None, Some(pattern)) => pattern.clone(),
        // clap demands one of them.
        (None, None) => {
            return Err(Failure::usage(anyhow::anyhow!("give --node or --name-pattern")));
        }
    };
    let scope = TokenScope {
        names,
        uses: options.uses,
        region: options.region.clone(),
        role: options.role,
        ttl: options.ttl,
        seeds: options.seeds.clone(),
    };
    let now = clock::wall();
    let token = options.place.open(now)?.issue_token(&scope, now).map_err(failure)?;
    let until = text(token.expires_at());
    let (names, region, uses) = (token.names(), token.region(), options.uses);
    if options.json {
        output::json_line(&json!({
            "token": token.reveal(),
            "id": token.id(),
            "trust_domain": token.trust_domain().as_str(),
            "names": names.as_str(),
            "region": region.as_str(),
            "role": token.role().as_str(),
            "uses": uses,
            "expires_at": until,
            "seeds": token.seeds(),
        }))?;
        return Ok(());
    }
    output::text(&token.reveal())?;
    let times = if uses == 1 { "once".to_owned() } else { format!("{uses} times") };
    output::note(&format!(
        "good {times} until {until}, for {names} in {region}: \
         there, put it into a file and run `isobar join --token-file FILE`"
    ));
    Ok(())
}
