//! `isobar ca rotate`: how a mesh changes its root, or what signs under it.

use base::clock;
use clap::Args;
use identity::{Authority, Rotated};
use serde_json::json;

use super::{Place, failure, text};
use crate::{Failure, output};

/// Options of `isobar ca rotate`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Change only what signs, under the same root, whose key it needs: to be done before it ends
    #[arg(long, conflicts_with = "now")]
    issuer: bool,
    /// Do the next step although certificates from before the last one are in use: nodes that have not renewed since are
    /// cut off
    #[arg(long)]
    now: bool,
    #[command(flatten)]
    place: Place,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> Result<(), Failure> {
    let (dir, now) = (&options.place.dir, clock::wall());
    if options.issuer {
        Authority::rotate_issuer(dir, now).map_err(failure)?;
        return said(
            options,
            "issuer_replaced",
            None,
            "certificates are issued by a new issuer now",
            "soon",
        );
    }
    match Authority::rotate(dir, options.now, now).map_err(failure)? {
        Rotated::RootAdded { next_at } => said(
            options,
            "root_added",
            Some(text(next_at)),
            "1 of 3: there is a new root, which nodes will believe besides the old one as they renew; \
             its key is in root.next.key",
            "before the next step",
        ),
        Rotated::IssuerReplaced { next_at } => said(
            options,
            "issuer_replaced",
            Some(text(next_at)),
            "2 of 3: certificates are issued under the new root now; \
             those that `isobar ca issue` made have to be issued anew before the next step",
            "before the next step",
        ),
        Rotated::RootRemoved => said(
            options,
            "root_removed",
            None,
            "3 of 3: the old root is gone; move root.key away from this machine, and destroy the retired one",
            "before the next rotation",
        ),
    }
}

fn said(
    options: &Options,
    done: &str,
    next_at: Option<String>,
    sentence: &str,
    copies_when: &str,
) -> Result<(), Failure> {
    if options.json {
        output::json_line(&json!({ "done": done, "next_at": next_at }))?;
        return Ok(());
    }
    let mut text = format!(
        "{sentence}\n  other copies of authority/ must be brought up to date {copies_when}: \
         copy issuer.* and roots.pem there"
    );
    if let Some(at) = next_at {
        text.push_str(&format!("\n  run this again for the next step from {at}"));
    }
    output::text(&text)?;
    Ok(())
}
