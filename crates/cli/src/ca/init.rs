//! `isobar ca init`: how the authority of a mesh comes into being.

use std::{path::PathBuf, time::Duration};

use base::{TrustDomain, clock};
use clap::Args;
use identity::Authority;
use serde_json::json;

use super::{Place, absolute, failure};
use crate::{Failure, output, target};

/// Options of `isobar ca init`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Trust domain of the mesh, such as mesh.example: every id in it begins with it, for good
    #[arg(long)]
    trust_domain: TrustDomain,
    #[command(flatten)]
    place: Place,
    /// How long the certificates of nodes live; they are renewed at half of it
    #[arg(long, default_value = "24h", value_name = "DURATION", value_parser = target::duration)]
    life: Duration,
    /// Sign with this certificate of your own authority, followed by those above it but not the root
    #[arg(long, value_name = "FILE", requires_all = ["key", "roots"])]
    intermediate: Option<PathBuf>,
    /// The key of --intermediate
    #[arg(long, value_name = "FILE", requires = "intermediate")]
    key: Option<PathBuf>,
    /// The roots above --intermediate that nodes shall believe
    #[arg(long, value_name = "FILE", requires = "intermediate")]
    roots: Option<PathBuf>,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> Result<(), Failure> {
    let Options { trust_domain, place, life, intermediate, key, roots, .. } = options;
    let (dir, now) = (&place.dir, clock::wall());
    let external = intermediate.as_deref().zip(key.as_deref()).zip(roots.as_deref());
    match external {
        None => Authority::init(dir, trust_domain, *life, now).map_err(failure)?,
        Some(((cert, key), roots)) => {
            Authority::import(dir, trust_domain, *life, (cert, key, roots), now)
                .map_err(failure)?;
        }
    }
    let authority = absolute(&dir.join("authority"))?;
    let root_key = external.is_none().then(|| absolute(&dir.join("root.key"))).transpose()?;
    if options.json {
        output::json_line(&json!({
            "trust_domain": trust_domain.as_str(),
            "authority": authority,
            "root_key": root_key,
            "life_s": life.as_secs(),
        }))?;
        return Ok(());
    }
    let mut text = format!(
        "authority of {trust_domain}: {}\n  name it in the configuration of the nodes that issue certificates: \
         [authority] dir = \"{}\"",
        authority.display(),
        authority.display()
    );
    if let Some(key) = root_key {
        let line = format!("\n  move the root's key away from this machine: {}", key.display());
        text.push_str(&line);
    }
    output::text(&text)?;
    Ok(())
}
