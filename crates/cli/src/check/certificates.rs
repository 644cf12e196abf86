//! The certificates on disk: whether they can be read, belong together, are believed, and for how long.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use identity::{Described, PeerFault};
use rustls::pki_types::CertificateDer;

use super::{
    facts::{Facts, Own},
    finding::{Check, Finding, Level},
    life,
};

/// Who may read a key besides its owner.
const OTHERS: u32 = 0o077;
const RENEW: &str = "have it issued anew and let the node load it";

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = own(facts);
    findings.extend(for_clients(facts));
    findings
}

/// The node's identity in the mesh.
fn own(facts: &Facts) -> Vec<Finding> {
    let paths = &facts.paths;
    let missing: Vec<_> =
        [&paths.ca, &paths.cert, &paths.key].into_iter().filter(|path| !path.exists()).collect();
    if let Some(first) = missing.first() {
        return vec![absent(facts, first)];
    }
    // A development CA has its key beside the roots.
    let of_ca = facts.is_dev.then(|| exposed(&paths.ca.with_file_name("ca.key"))).flatten();
    let mut findings: Vec<_> = exposed(&paths.key).into_iter().chain(of_ca).collect();
    match &facts.own {
        Some(own) => findings.extend(identity_of(facts, own)),
        None => findings.extend(unusable(&paths.cert, &paths.key, Some(&paths.ca))),
    }
    findings
}

fn absent(facts: &Facts, path: &Path) -> Finding {
    let (subject, what) = (path.display().to_string(), "there is no such file");
    if facts.is_dev {
        let remedy = "start the node with --dev-ca once, and check again";
        return Finding::note(Check::CertificateMissing, subject, what, remedy);
    }
    let remedy = "give the node an identity; for development use --dev-ca";
    Finding::error(Check::CertificateMissing, subject, what, remedy)
}

/// A key that others can read.
fn exposed(key: &Path) -> Option<Finding> {
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
    let subject = facts.paths.cert.display().to_string();
    let mut findings = lives(facts, &subject, &own.chain);
    let roots = facts.paths.ca.display().to_string();
    for root in &own.roots {
        findings.extend(authority(facts, &roots, root));
    }
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

/// The time left to a certificate and to those that lead to its root.
fn lives(facts: &Facts, subject: &str, chain: &[CertificateDer<'static>]) -> Vec<Finding> {
    let Some((leaf, above)) = chain.split_first() else { return Vec::new() };
    let mut findings: Vec<_> =
        time_left(facts, Check::CertificateExpiring, subject, leaf).into_iter().collect();
    findings.extend(above.iter().filter_map(|one| authority(facts, subject, one)));
    findings
}

fn authority(facts: &Facts, subject: &str, one: &CertificateDer<'static>) -> Option<Finding> {
    time_left(facts, Check::CertificateAuthorityExpiring, subject, one)
}

fn time_left(
    facts: &Facts,
    check: Check,
    subject: &str,
    one: &CertificateDer<'static>,
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
        _ if facts.is_dev => "restart the node with --dev-ca: the development CA renews it",
        _ => RENEW,
    };
    Some(Finding::new(life.level, check, subject, what, remedy))
}

fn called(said: &Described) -> String {
    match &said.id {
        Some(id) => id.to_string(),
        None if said.subject.is_empty() => format!("serial {}", said.serial),
        None => said.subject.clone(),
    }
}

/// The certificate for clients.
fn for_clients(facts: &Facts) -> Vec<Finding> {
    let Some((cert, key)) = facts.tls_files() else {
        return no_tls(facts).into_iter().collect();
    };
    if let Some(found) = unusable(cert, key, None) {
        return vec![found];
    }
    let subject = cert.display().to_string();
    let chain = identity::read_certificates(cert).unwrap_or_default();
    let mut findings = lives(facts, &subject, &chain);
    findings.extend(chain.first().and_then(|leaf| names(&subject, leaf)));
    findings
}

fn no_tls(facts: &Facts) -> Option<Finding> {
    (!facts.is_dev).then(|| {
        let what = "there is no certificate for clients";
        let remedy = "set tls.cert and tls.key, or use --dev-ca";
        Finding::error(Check::CertificateMissing, "tls.cert", what, remedy)
    })
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
