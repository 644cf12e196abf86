//! A node that runs on this machine: whether its ports show the certificates that lie on disk.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use identity::SpiffeId;
use rustls::{ClientConfig, pki_types::CertificateDer};
use transport::{Prober, Sight, Unreached};

use super::{
    facts::Facts,
    finding::{Check, Finding},
    listen::Door,
};

/// What the node's own ports show.
#[derive(Debug, Default)]
pub(super) struct Served {
    is_running: bool,
    /// The ports that showed a certificate.
    shown: Vec<&'static str>,
    pub(super) findings: Vec<Finding>,
}

impl Served {
    /// Whether this node holds a port that is taken, as far as can be told: those without TLS say nothing of it, and the
    /// one for operators shows itself to them only.
    pub(super) fn holds(&self, key: &str) -> bool {
        let is_mute = matches!(key, "plaintext" | "metrics" | "admin");
        self.is_running && (is_mute || self.shown.contains(&key))
    }
}

/// A certificate that a port shows.
#[derive(Debug)]
struct Shown {
    key: &'static str,
    protocol: &'static str,
    leaf: CertificateDer<'static>,
}

pub(super) async fn check(facts: &Facts, prober: &Prober, doors: &[Door]) -> Served {
    let Ok(tls) = facts.tls() else { return Served::default() };
    let taken = doors.iter().filter(|door| door.is_taken());
    let looks = taken.map(|door| look(facts, prober, door, &tls));
    let shown: Vec<_> = futures_util::future::join_all(looks).await.into_iter().flatten().collect();
    // The clients' certificate is a name's, not the node's: what the other ports show says whether this node runs.
    let is_ours = |one: &Shown| id(one).as_ref() == Some(&facts.id());
    let shown: Vec<_> =
        shown.into_iter().filter(|one| one.key == "clients" || is_ours(one)).collect();
    if shown.iter().all(|one| one.key == "clients") {
        return Served::default();
    }
    let (own, clients) = on_disk(facts);
    let findings = shown
        .iter()
        .filter_map(|one| {
            let file = if one.key == "clients" { clients.as_ref() } else { own.as_ref() };
            Some(compare(one, file?))
        })
        .collect();
    Served { is_running: true, shown: shown.iter().map(|one| one.key).collect(), findings }
}

/// Whose certificate it is.
fn id(one: &Shown) -> Option<SpiffeId> {
    identity::describe(&one.leaf).ok()?.id
}

/// The node's own certificate on disk, and that for clients.
fn on_disk(facts: &Facts) -> (Option<CertificateDer<'static>>, Option<CertificateDer<'static>>) {
    let own = facts.own.as_ref().and_then(|own| own.chain.first().cloned());
    let clients = match facts.tls_files() {
        Some((cert, _)) => {
            identity::read_certificates(cert).ok().and_then(|chain| chain.into_iter().next())
        }
        None => own.clone(),
    };
    (own, clients)
}

/// What a port shows, over each protocol.
async fn look(facts: &Facts, prober: &Prober, door: &Door, tls: &ClientConfig) -> Vec<Shown> {
    let (address, within) = (dialled(door.address), facts.timeout);
    let tls = || tls.clone();
    let seen: Vec<(_, Result<Sight, Unreached>)> = match door.key {
        "clients" | "peers" => {
            let (tcp, quic) = tokio::join!(
                prober.tcp(address, tls(), b"h2", within),
                prober.quic(address, tls(), b"h3", within)
            );
            vec![("TCP", tcp), ("QUIC", quic)]
        }
        "gossip" => vec![("QUIC", prober.link(address, tls(), within).await)],
        _ => Vec::new(),
    };
    seen.into_iter()
        .filter_map(|(protocol, seen)| {
            let leaf = seen.ok()?.certificates.into_iter().next()?;
            Some(Shown { key: door.key, protocol, leaf })
        })
        .collect()
}

/// An address that reaches a port from this machine.
fn dialled(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn compare(shown: &Shown, file: &CertificateDer<'static>) -> Finding {
    let subject = format!("listen.{}", shown.key);
    if shown.leaf == *file {
        let what = format!("it shows the certificate on disk over {}", shown.protocol);
        return Finding::ok(Check::ServedDiffers, subject, what);
    }
    let (served, on_disk) = (summary(&shown.leaf), summary(file));
    let what = format!("over {} it shows {served}, and on disk lies {on_disk}", shown.protocol);
    let remedy = "restart the node, or wait until it loads the new one";
    Finding::warning(Check::ServedDiffers, subject, what, remedy)
}

fn summary(certificate: &CertificateDer<'static>) -> String {
    match identity::describe(certificate) {
        Ok(said) => format!("the certificate with serial {}", said.serial),
        Err(_) => "a certificate that cannot be read".to_owned(),
    }
}
