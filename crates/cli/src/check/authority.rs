//! The authority this node holds: whether it can sign, for how much longer, and whether the root's key was put away.
//!
//! The files are only read: opening an authority takes a lock, and may sign its list of revocations anew.

use std::path::{Path, PathBuf};

use base::TrustDomain;
use identity::IdentityError;
use rustls::pki_types::CertificateDer;
use serde::Deserialize;

use super::{
    certificates::{called, exposed},
    facts::Facts,
    finding::{Check, Finding, Level},
    life,
};

/// Keys of the root, and where a rotation leaves them.
const ROOT_KEYS: [&str; 2] = ["root.key", "root.next.key"];
const RESTORE: &str = "restore it from a copy, or name the directory that `isobar ca init` made";

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let Some(dir) = &facts.config.authority.dir else { return Vec::new() };
    let dir = online(dir);
    let mut findings: Vec<_> = settings(facts, &dir).into_iter().collect();
    findings.extend(issuer(facts, &dir));
    findings.extend(roots(facts, &dir));
    findings.extend(dir.parent().into_iter().flat_map(root_keys));
    findings
}

/// The part of an authority's directory that signs: the directory, or what is below it.
fn online(dir: &Path) -> PathBuf {
    let below = dir.join("authority");
    let is_below = !dir.join("authority.toml").exists() && below.join("authority.toml").exists();
    if is_below { below } else { dir.to_owned() }
}

#[derive(Deserialize)]
struct Settings {
    trust_domain: TrustDomain,
}

/// Whether there is an authority, and of which mesh.
fn settings(facts: &Facts, dir: &Path) -> Option<Finding> {
    let path = dir.join("authority.toml");
    let subject = path.display().to_string();
    let read = std::fs::read_to_string(&path).map_err(|error| error.to_string());
    let read = read.and_then(|text| {
        toml::from_str::<Settings>(&text).map_err(|error| error.message().to_owned())
    });
    let mesh = &facts.config.mesh.trust_domain;
    match read {
        Err(error) => Some(Finding::error(Check::AuthorityUnusable, subject, error, RESTORE)),
        Ok(settings) if settings.trust_domain != *mesh => {
            let what =
                format!("it is of {}, and mesh.trust_domain is {mesh}", settings.trust_domain);
            let remedy = "use one of the two for both";
            Some(Finding::error(Check::AuthorityUnusable, subject, what, remedy))
        }
        Ok(_) => None,
    }
}

/// The issuing certificate and its key.
fn issuer(facts: &Facts, dir: &Path) -> Vec<Finding> {
    let (cert, key) = (dir.join("issuer.pem"), dir.join("issuer.key"));
    let mut findings: Vec<_> = exposed(&key).into_iter().collect();
    let loaded = match identity::load_server_cert(&cert, &key) {
        // A rotation changes the certificate first.
        Err(error @ (IdentityError::KeyMismatch { .. } | IdentityError::Missing { .. })) => {
            identity::load_server_cert(&cert, &dir.join("issuer.next.key")).map_err(|_| error)
        }
        other => other,
    };
    match loaded {
        Ok((chain, _)) => {
            let remedy = "change it with `isobar ca rotate --issuer`, for which the root's key has to be there, or put another \
                          one of your own authority there";
            findings.extend(chain.iter().filter_map(|one| lives(facts, &cert, one, remedy)));
        }
        Err(error) => {
            let what = error.to_string();
            let subject = cert.display().to_string();
            findings.push(Finding::error(Check::AuthorityUnusable, subject, what, RESTORE));
        }
    }
    findings
}

/// What nodes are to believe.
fn roots(facts: &Facts, dir: &Path) -> Vec<Finding> {
    let path = dir.join("roots.pem");
    match identity::read_certificates(&path) {
        Ok(roots) => {
            let remedy = "begin `isobar ca rotate`: it takes until every node has renewed, twice";
            roots.iter().filter_map(|root| lives(facts, &path, root, remedy)).collect()
        }
        Err(error) => {
            let subject = path.display().to_string();
            vec![Finding::error(Check::AuthorityUnusable, subject, error.to_string(), RESTORE)]
        }
    }
}

fn lives(
    facts: &Facts,
    path: &Path,
    one: &CertificateDer<'static>,
    remedy: &str,
) -> Option<Finding> {
    let said = identity::describe(one).ok()?;
    let life = life::by_days(&said, facts.now);
    let (subject, what) = (path.display().to_string(), format!("{}: {}", called(&said), life.what));
    Some(match life.level {
        Level::Ok => Finding::ok(Check::AuthorityExpiring, subject, what),
        level if life.is_future => {
            let remedy = "check this machine's clock";
            Finding::new(level, Check::AuthorityExpiring, subject, what, remedy)
        }
        level => Finding::new(level, Check::AuthorityExpiring, subject, what, remedy),
    })
}

/// Keys of the root beside what signs.
fn root_keys(parent: &Path) -> Vec<Finding> {
    let keys = ROOT_KEYS.into_iter().map(|name| parent.join(name)).filter(|key| key.exists());
    keys.flat_map(|key| {
        let what =
            "the root's key lies on this machine: whoever gets in can make authorities of the mesh";
        let remedy = "move it offline; nothing but `isobar ca rotate` needs it";
        let subject = key.display().to_string();
        let lies = Finding::warning(Check::AuthorityRootKey, subject, what, remedy);
        std::iter::once(lies).chain(exposed(&key))
    })
    .collect()
}
