//! `isobar ca show`: what an authority is made of, and whom it has let in and excluded.

use std::time::SystemTime;

use base::clock;
use clap::Args;
use data_encoding::HEXLOWER;
use identity::{Authority, AuthorityStatus, Revocations, TokenStatus};
use serde_json::{Value, json};

use super::{Place, failure, text};
use crate::{Failure, output};

/// Options of `isobar ca show`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    place: Place,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> Result<(), Failure> {
    let now = clock::wall();
    let authority = options.place.open(now)?;
    let status = authority.status().map_err(failure)?;
    let mut tokens = authority.tokens().map_err(failure)?;
    tokens.retain(|token| token.uses_left > 0 && token.expires_at > now);
    let revoked = authority.revoked().map_err(failure)?;
    if options.json {
        output::json(&json(&authority, &status, &tokens, &revoked))?;
    } else {
        output::text(&report(&authority, &status, &tokens, &revoked))?;
    }
    Ok(())
}

fn json(
    authority: &Authority,
    status: &AuthorityStatus,
    tokens: &[TokenStatus],
    revoked: &Revocations,
) -> Value {
    let tokens: Vec<_> = tokens
        .iter()
        .map(|token| {
            json!({
                "id": token.id,
                "names": token.names.as_str(),
                "region": token.region.as_str(),
                "uses_left": token.uses_left,
                "expires_at": text(token.expires_at),
                "redeemed_by": token.redemptions.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(),
            })
        })
        .collect();
    let excluded: Vec<_> = revoked
        .entries()
        .map(|(id, revoked)| {
            let (at, until) = (text(revoked.at), text(revoked.forget_at));
            json!({ "id": id.to_string(), "revoked_at": at, "forgotten_at": until })
        })
        .collect();
    json!({
        "trust_domain": authority.trust_domain().as_str(),
        "life_s": authority.life().as_secs(),
        "roots": status.roots.iter().map(certificate).collect::<Vec<_>>(),
        "issuer": certificate(&status.issuer),
        "signs_until": text(status.until),
        "tokens": tokens,
        "revocations": { "version": revoked.version(), "entries": excluded },
    })
}

fn certificate((sha256, until): &([u8; 32], SystemTime)) -> Value {
    json!({ "sha256": HEXLOWER.encode(sha256), "expires_at": text(*until) })
}

fn report(
    authority: &Authority,
    status: &AuthorityStatus,
    tokens: &[TokenStatus],
    revoked: &Revocations,
) -> String {
    let life = humantime::format_duration(authority.life());
    let mut lines =
        vec![format!("authority of {}, certificates live {life}", authority.trust_domain())];
    let certificate = |what: &str, (sha256, until): &([u8; 32], SystemTime)| {
        format!("{what}  sha256 {}  until {}", HEXLOWER.encode(sha256), text(*until))
    };
    lines.extend(status.roots.iter().map(|root| certificate("root  ", root)));
    lines.push(certificate("issuer", &status.issuer));
    lines.push(format!("tokens that are good: {}", tokens.len()));
    lines.extend(tokens.iter().map(|token| {
        let TokenStatus { names, region, uses_left, expires_at, .. } = token;
        format!("  {names} in {region}, {uses_left} left until {}", text(*expires_at))
    }));
    lines.push(format!("revoked: {} (version {})", revoked.len(), revoked.version()));
    let excluded = revoked.entries();
    lines.extend(excluded.map(|(id, revoked)| format!("  {id} on {}", text(revoked.at))));
    lines.join("\n")
}
