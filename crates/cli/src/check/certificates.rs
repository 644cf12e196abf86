//! The certificates on disk: whether they can be read, belong together, are believed, and for how long.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use identity::{Described, PeerFault};
use rustls::pki_types::CertificateDer;

use super::{
    facts::{Facts, Own, Source},
    finding::{Check, Finding, Level},
    life,
};

/// Who may read a key besides its owner.
const OTHERS: u32 = 0o077;
const RENEW: &str = "have it issued anew, and put it there: the node takes it in";

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = own(facts);
    findings.extend(for_clients(facts));
    findings
}

/// The node's identity in the mesh.
fn own(facts: &Facts) -> Vec<Finding> {
    if facts.source == Source::Spire {
        return of_agent(facts);
    }
    let paths = &facts.paths;
    let missing: Vec<_> =
        [&paths.ca, &paths.cert, &paths.key].into_iter().filter(|path| !path.exists()).collect();
    if let Some(first) = missing.first() {
        return vec![absent(facts, first)];
    }
    // A development CA has its key beside the roots.
    let of_ca = facts.is_dev().then(|| exposed(&paths.ca.with_file_name("ca.key"))).flatten();
    let mut findings: Vec<_> = exposed(&paths.key).into_iter().chain(of_ca).collect();
    match &facts.own {
        Some(own) => findings.extend(identity_of(facts, own)),
        None => findings.extend(unusable(&paths.cert, &paths.key, Some(&paths.ca))),
    }
    findings
}

/// What the SPIRE agent gives: nothing of it lies on disk.
fn of_agent(facts: &Facts) -> Vec<Finding> {
    if let Some(why) = &facts.agent_error {
        let remedy = "see that the agent runs, and that the id of this node is registered for this user's processes";
        return vec![Finding::error(Check::SpireAgent, "identity.socket", why, remedy)];
    }
    let gave = Finding::ok(Check::SpireAgent, "identity.socket", "the agent gives an identity");
    let own = facts.own.iter().flat_map(|own| identity_of(facts, own));
    std::iter::once(gave).chain(own).collect()
}

fn absent(facts: &Facts, path: &Path) -> Finding {
    let (subject, what) = (path.display().to_string(), "there is no such file");
    let (level, remedy) = match facts.source {
        Source::Dev => (Level::Note, "start the node with --dev-ca once, and check again"),
        Source::Authority => {
            (Level::Note, "start the node once: its own authority certifies it; then check again")
        }
        Source::Files => {
            (Level::Error, "see what puts the files there, or correct the paths in [identity]")
        }
        Source::Mesh | Source::Spire => (
            Level::Error,
            "join a mesh: `isobar ca token` at an authority, then `isobar join --token TOKEN` here; for development use --dev-ca",
        ),
    };
    Finding::new(level, Check::CertificateMissing, subject, what, remedy)
}

/// A key that others can read.
pub(super) fn exposed(key: &Path) -> Option<Finding> {
    let mode = fs::metadata(key).ok()?.permissions().mode() & 0o777;
    let subject = key.display().to_string();
    (mode & OTHERS != 0).then(|| {
        let what = format!("other users can read this private key (mode {mode:03o})");
        let remedy = format!("run `chmod 600 {subject}`; if others may have read it, make another");
        Finding::error(Check::CertificateKeyExposed, subject, what, remedy)
    })
}

/// Why a certificate, its key and the roots cannot be used together.
fn unusable(cert: &Path, key: &Path, roots: Option<&Path>) -> Option<Finding> {
    let subject = cert.display().to_string();
    let restore = "restore the file, or have another issued";
    let unreadable = |error: identity::IdentityError| {
        Finding::error(Check::CertificateUnreadable, subject.clone(), error.to_string(), restore)
    };
    match identity::load_server_cert(cert, key) {
        Err(error @ identity::IdentityError::KeyMismatch { .. }) => {
            let remedy = "copy certificate and key from the same place";
            Some(Finding::error(Check::CertificateKeyMismatch, subject, error.to_string(), remedy))
        }
        Err(error) => Some(unreadable(error)),
        Ok(_) => identity::read_certificates(roots?).err().map(unreadable),
    }
}

/// What the node's own certificate says, and its authorities'.
fn identity_of(facts: &Facts, own: &Own) -> Vec<Finding> {
    let subject = facts.own_subject();
    let mut findings: Vec<_> =
        own.chain.first().and_then(|leaf| own_life(facts, &subject, leaf)).into_iter().collect();
    let above = own.chain.iter().skip(1).map(|one| (subject.clone(), one));
    let roots = own.roots.iter().map(|root| (facts.paths.ca.display().to_string(), root));
    for (subject, one) in above.chain(roots) {
        findings.extend(authority_life(facts, &subject, one));
    }
    findings.extend(revoked(facts, &subject, own));
    match identity::judge_peer(&own.chain, &own.roots, &facts.id(), facts.now) {
        // Said above, with the dates.
        Ok(()) | Err(PeerFault::Expired | PeerFault::NotYetValid) => {}
        Err(fault @ PeerFault::Untrusted(_)) => {
            let remedy = "use a certificate and roots of one authority";
            findings.push(Finding::error(
                Check::CertificateUntrusted,
                subject,
                fault.to_string(),
                remedy,
            ));
        }
        Err(PeerFault::Other(_)) => findings.push(wrong_id(facts, subject, &own.chain)),
    }
    findings
}

fn wrong_id(facts: &Facts, subject: String, chain: &[CertificateDer<'static>]) -> Finding {
    let found = chain.first().and_then(|leaf| identity::describe(leaf).ok()?.id);
    let found = found.map_or_else(|| "nobody of a mesh".to_owned(), |id| id.to_string());
    let what = format!("it is for {found}, and the configuration says {}", facts.id());
    let remedy = "set node.name, node.region and mesh.trust_domain to what it says, or get another";
    Finding::error(Check::CertificateWrongId, subject, what, remedy)
}

/// Whether others were told not to believe the node's certificate.
fn revoked(facts: &Facts, subject: &str, own: &Own) -> Option<Finding> {
    let leaf = identity::describe(own.chain.first()?).ok()?;
    let (id, at) = (facts.id(), facts.revocations.revoked_at(&facts.id())?);
    facts.revocations.revokes(&id, leaf.from).then(|| {
        let at = humantime::format_rfc3339_seconds(at);
        let what = format!("this node was revoked on {at}: no other node speaks with it");
        let remedy = "find out why; to let it in again get a new certificate with a token: `isobar ca token` at an \
                      authority, then `isobar join --replace --token TOKEN` here";
        Finding::error(Check::CertificateRevoked, subject, what, remedy)
    })
}

/// The time left to the node's own certificate.
fn own_life(facts: &Facts, subject: &str, leaf: &CertificateDer<'static>) -> Option<Finding> {
    let remedy = match facts.source {
        Source::Dev => "restart the node with --dev-ca: the development CA renews it",
        Source::Authority => "start the node: its own authority certifies it anew",
        Source::Mesh => {
            "see that the node runs and reaches an authority; or get a new one with a token: `isobar ca token` at an \
             authority, then `isobar join --token TOKEN` here"
        }
        Source::Files => "see what renews the files: the node takes in what is put there",
        Source::Spire => {
            "see the SPIRE agent, which hands out newer ones: its log, and the entry of this node"
        }
    };
    let mut found = time_left(facts, Check::CertificateExpiring, subject, leaf, remedy)?;
    if facts.source == Source::Authority {
        // A start mends it.
        found.level = found.level.min(Level::Warning);
    }
    Some(found)
}

/// The time left to a root or an intermediate authority.
fn authority_life(facts: &Facts, subject: &str, one: &CertificateDer<'static>) -> Option<Finding> {
    let remedy = match facts.source {
        Source::Dev => "restart the node with --dev-ca: the development CA renews it",
        Source::Authority | Source::Mesh => {
            "change it at the authority with `isobar ca rotate`, which cuts nobody off when it is begun early"
        }
        Source::Files | Source::Spire => {
            "change it at your own authority; every node must know a new root before it is used"
        }
    };
    time_left(facts, Check::CertificateAuthorityExpiring, subject, one, remedy)
}

fn time_left(
    facts: &Facts,
    check: Check,
    subject: &str,
    one: &CertificateDer<'static>,
    remedy: &str,
) -> Option<Finding> {
    let said = match identity::describe(one) {
        Ok(said) => said,
        Err(error) => {
            let what = error.to_string();
            let remedy = "restore the file";
            return Some(Finding::error(Check::CertificateUnreadable, subject, what, remedy));
        }
    };
    let life = life::judge(&said, facts.now);
    let what = format!("{}: {}", called(&said), life.what);
    let remedy = match life.level {
        Level::Ok => return Some(Finding::ok(check, subject, what)),
        _ if life.is_future => "check this machine's clock",
        _ => remedy,
    };
    Some(Finding::new(life.level, check, subject, what, remedy))
}

pub(super) fn called(said: &Described) -> String {
    match &said.id {
        Some(id) => id.to_string(),
        None if said.subject.is_empty() => format!("serial {}", said.serial),
        None => said.subject.clone(),
    }
}

/// The certificate for clients.
fn for_clients(facts: &Facts) -> Vec<Finding> {
    let Some((cert, key)) = facts.tls_files() else {
        return vec![no_tls(facts)];
    };
    if let Some(found) = unusable(cert, key, None) {
        return vec![found];
    }
    let subject = cert.display().to_string();
    let chain = identity::read_certificates(cert).unwrap_or_default();
    let mut findings: Vec<_> = chain
        .first()
        .and_then(|leaf| time_left(facts, Check::CertificateExpiring, &subject, leaf, RENEW))
        .into_iter()
        .collect();
    findings.extend(chain.iter().skip(1).filter_map(|one| {
        time_left(facts, Check::CertificateAuthorityExpiring, &subject, one, RENEW)
    }));
    findings.extend(chain.first().and_then(|leaf| names(&subject, leaf)));
    findings
}

/// Clients are shown the node's own.
fn no_tls(facts: &Facts) -> Finding {
    let leaf = facts.own.as_ref().and_then(|own| identity::describe(own.chain.first()?).ok());
    let hosts = leaf.map(|leaf| leaf.hosts.join(", ")).filter(|hosts| !hosts.is_empty());
    let hosts = hosts.unwrap_or_else(|| format!("localhost and {}", facts.config.node.name));
    let what = format!("clients are shown the node's certificate of the mesh: good for {hosts}");
    let remedy =
        "set tls.cert and tls.key where clients call another name, or believe other authorities";
    Finding::note(Check::CertificateNames, "tls.cert", what, remedy)
}

/// Clients look for the name they call in it.
fn names(subject: &str, leaf: &CertificateDer<'static>) -> Option<Finding> {
    let hosts = identity::describe(leaf).ok()?.hosts;
    if hosts.is_empty() {
        let what = "it holds for no host name and no address, so that no client will believe it";
        let remedy = "have one issued with the names clients call this node by";
        return Some(Finding::warning(Check::CertificateNames, subject, what, remedy));
    }
    let what = format!("it holds for {}", hosts.join(", "));
    Some(Finding::note(
        Check::CertificateNames,
        subject,
        what,
        "make sure clients call one of these names",
    ))
}
