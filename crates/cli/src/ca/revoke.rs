//! `isobar ca revoke`: who is not believed any more.

use base::{NodeName, RegionName, clock};
use clap::Args;
use identity::{Role, SpiffeId};
use serde_json::json;

use super::{Place, failure, node_id, role};
use crate::{Failure, output};

/// What a list of names cannot do.
const KEY_HOLDER: &str = "a node that holds the issuing key can certify itself again: \
                          only a new issuing certificate and root exclude it (`isobar ca rotate`)";

/// Options of `isobar ca revoke`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Name of the member, with --region; or REGION/NAME
    #[arg(value_name = "NODE")]
    member: String,
    /// Region of the member
    #[arg(long)]
    region: Option<RegionName>,
    /// What the member is
    #[arg(long, default_value = "node", value_parser = role)]
    role: Role,
    #[command(flatten)]
    place: Place,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

/// Where and who.
fn member(options: &Options) -> Result<(RegionName, NodeName), Failure> {
    let usage = |text: String| Failure::usage(anyhow::anyhow!(text));
    match (&options.region, options.member.contains('/')) {
        (None, true) => node_id(&options.member).map_err(usage),
        (None, false) => Err(usage("add --region, or write REGION/NAME".to_owned())),
        (Some(_), true) => Err(usage("write REGION/NAME or --region, not both".to_owned())),
        (Some(region), false) => {
            let name = options.member.parse().map_err(|e: base::NameError| usage(e.to_string()))?;
            Ok((region.clone(), name))
        }
    }
}

pub(super) fn run(options: &Options) -> Result<(), Failure> {
    let (region, name) = member(options)?;
    let now = clock::wall();
    let authority = options.place.open(now)?;
    let trust_domain = authority.trust_domain().clone();
    let id = SpiffeId { trust_domain, role: options.role, region, name };
    let version = authority.revoke(&id, now).map_err(failure)?;
    // Authorities certify themselves. Records that cannot be read say nothing against the name.
    let known = id.role == Role::Authority || authority.has_issued_to(&id).unwrap_or(true);
    if options.json {
        output::json_line(&json!({ "revoked": id.to_string(), "version": version }))?;
    } else {
        let again = match id.role {
            Role::Node => "give it a new token (`isobar ca token`)",
            _ => "issue it another certificate (`isobar ca issue`)",
        };
        let about_keys =
            if id.role == Role::Node { format!("\n  {KEY_HOLDER}") } else { String::new() };
        output::text(&format!(
            "revoked {id}\n  nodes learn of it from the authority within seconds; to let it in again, {again}{about_keys}"
        ))?;
    }
    if !known {
        output::note(&format!("{id}: nothing was ever issued to it here: is the name right?"));
    }
    Ok(())
}
