//! The peers: whether each is reached over TCP and QUIC on each of its ports, and whether it is who it should be.

use std::{net::SocketAddr, time::Duration};

use futures_util::{StreamExt as _, stream};
use identity::{PeerFault, Role, SpiffeId};
use node::config::PeerConfig;
use rustls::ClientConfig;
use transport::{LINK_ALPN, Prober, Sight, Unreached};

use super::{
    dns,
    facts::Facts,
    finding::{Check, Finding, Level},
    life, system,
};

/// Peers looked at side by side.
const AT_ONCE: usize = 128;

pub(super) type Seen = Result<Sight, Unreached>;

pub(super) async fn check(facts: &Facts, prober: &Prober) -> Vec<Finding> {
    // Without TLS there is nothing to look with; the checks of certificates say why.
    let Ok(tls) = facts.tls() else { return Vec::new() };
    let peers = &facts.config.mesh.peers;
    let looks = peers.iter().map(|peer| look(facts, prober, peer, &tls));
    let found: Vec<Vec<Finding>> = stream::iter(looks).buffered(AT_ONCE).collect().await;
    found.into_iter().flatten().collect()
}

/// How messages call a peer.
fn subject(peer: &PeerConfig) -> String {
    format!("peer {} ({})", peer.name, peer.region)
}

async fn look(
    facts: &Facts,
    prober: &Prober,
    peer: &PeerConfig,
    tls: &ClientConfig,
) -> Vec<Finding> {
    let (calls, gossip) =
        tokio::join!(calls(facts, prober, peer, tls), gossip(facts, prober, peer, tls));
    calls.into_iter().chain(gossip).collect()
}

/// The port calls go to.
async fn calls(
    facts: &Facts,
    prober: &Prober,
    peer: &PeerConfig,
    tls: &ClientConfig,
) -> Vec<Finding> {
    let subject = subject(peer);
    let (addresses, mut findings) =
        dns::look(&subject, &peer.peers.authority(), facts.timeout).await;
    if addresses.is_empty() {
        return findings;
    }
    if let Some(found) = dns::family(&subject, &addresses, facts.config.listen.peers) {
        let is_cut_off = found.level == Level::Error;
        findings.push(found);
        if is_cut_off {
            return findings;
        }
    }
    findings.extend(system::mtu(&subject, &addresses));
    let within = share(facts.timeout, &addresses);
    let (tcp, quic) = tokio::join!(
        first(&addresses, |address| prober.tcp(address, tls.clone(), b"h2", within)),
        first(&addresses, |address| prober.quic(address, tls.clone(), b"h3", within)),
    );
    let port = peer.peers.to_string();
    findings.extend(reached(&subject, &port, &tcp, &quic));
    // The two may end at different machines; what both show is said once.
    for sight in [quic, tcp].into_iter().flatten() {
        for finding in judged(facts, peer, &subject, &sight) {
            if !findings.iter().any(|other| other.check == finding.check) {
                findings.push(finding);
            }
        }
    }
    findings
}

/// The time one of several addresses is given.
pub(super) fn share(timeout: Duration, addresses: &[SocketAddr]) -> Duration {
    timeout / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX)
}

/// The first address that answers, or what the last one said.
pub(super) async fn first<F: Future<Output = Seen>>(
    addresses: &[SocketAddr],
    dial: impl Fn(SocketAddr) -> F,
) -> Seen {
    let mut last = Err(Unreached::Failed("it has no address".to_owned()));
    for address in addresses {
        last = dial(*address).await;
        if last.is_ok() {
            break;
        }
    }
    last
}

/// What the two protocols came to: one of them is enough to live, none is not.
fn reached(subject: &str, port: &str, tcp: &Seen, quic: &Seen) -> Vec<Finding> {
    let number = port.rsplit(':').next().unwrap_or(port);
    match (tcp, quic) {
        (Ok(tcp), Ok(quic)) => {
            vec![
                answered(Check::PeerTcp, subject, port, tcp),
                answered(Check::PeerUdp, subject, port, quic),
            ]
        }
        (Ok(tcp), Err(error)) => {
            let what = format!("h3 over UDP at {port}: {error}; h2 over TCP works, at a price");
            let remedy = format!("let UDP port {number} through, there, here and in between");
            vec![
                answered(Check::PeerTcp, subject, port, tcp),
                Finding::warning(Check::PeerUdp, subject, what, remedy),
            ]
        }
        (Err(error), Ok(quic)) => {
            let what =
                format!("h2 over TCP at {port}: {error}; should UDP fail there is no other way");
            let remedy = format!("let TCP port {number} through, there, here and in between");
            vec![
                Finding::warning(Check::PeerTcp, subject, what, remedy),
                answered(Check::PeerUdp, subject, port, quic),
            ]
        }
        (Err(tcp), Err(quic)) => vec![unreachable(subject, port, tcp, quic)],
    }
}

fn unreachable(subject: &str, port: &str, tcp: &Unreached, quic: &Unreached) -> Finding {
    let what = format!("nobody is reached at {port} (over TCP {tcp}; over UDP {quic})");
    let remedy = match (tcp, quic) {
        (Unreached::Refused, _) => {
            "start the peer, or put the address of its `listen.peers` here".to_owned()
        }
        (Unreached::Silent(_), _) => {
            let number = port.rsplit(':').next().unwrap_or(port);
            format!(
                "let TCP and UDP port {number} through every firewall, and see that the peer runs"
            )
        }
        _ => "see that a node, and nothing else, listens there".to_owned(),
    };
    Finding::error(Check::PeerUnreachable, subject, what, remedy)
}

fn answered(check: Check, subject: &str, port: &str, sight: &Sight) -> Finding {
    let ms = sight.rtt.as_secs_f64() * 1e3;
    let what = match sight.payload_bytes {
        Some(bytes) => {
            format!(
                "h3 over UDP at {port} answers in {ms:.1} ms, with {bytes} bytes a datagram or more"
            )
        }
        None => format!("h2 over TCP at {port} answers in {ms:.1} ms"),
    };
    Finding::ok(check, subject, what)
}

/// Whether it is who it should be, for how long, and whether it takes us for who we are.
fn judged(facts: &Facts, peer: &PeerConfig, subject: &str, sight: &Sight) -> Vec<Finding> {
    let Some(own) = &facts.own else { return Vec::new() };
    let expected = SpiffeId {
        trust_domain: facts.config.mesh.trust_domain.clone(),
        role: Role::Node,
        region: peer.region.clone(),
        name: peer.name.clone(),
    };
    let verdict = identity::judge_peer(&sight.certificates, &own.roots, &expected, facts.now);
    let mut findings = match verdict {
        Ok(()) | Err(PeerFault::Expired | PeerFault::NotYetValid) => {
            time_left(facts, subject, sight).into_iter().collect()
        }
        Err(fault) => vec![not_it(subject, &fault)],
    };
    findings.extend(revoked(facts, subject, &expected, sight));
    if let Some(said) = &sight.refusal {
        let what = format!("it turned us down after the handshake: {said}");
        let remedy = "compare the roots at both ends, this node's certificate and the clocks";
        findings.push(Finding::error(Check::PeerRefuses, subject, what, remedy));
    }
    findings
}

/// Whether this node was told not to believe the certificate the peer shows.
fn revoked(facts: &Facts, subject: &str, peer: &SpiffeId, sight: &Sight) -> Option<Finding> {
    let leaf = identity::describe(sight.certificates.first()?).ok()?;
    facts.revocations.revokes(peer, leaf.from).then(|| {
        let what = "it was revoked, and this node does not speak with it";
        let remedy = "take it out of [[mesh.peer]]; to let it in again join it anew with a token";
        Finding::error(Check::PeerRevoked, subject, what, remedy)
    })
}

fn not_it(subject: &str, fault: &PeerFault) -> Finding {
    let remedy = match fault {
        PeerFault::Untrusted(_) => "give both nodes certificates of one authority",
        _ => "correct name, region or address of the peer in [[mesh.peer]]",
    };
    Finding::error(Check::PeerIdentity, subject, fault.to_string(), remedy)
}

fn time_left(facts: &Facts, subject: &str, sight: &Sight) -> Option<Finding> {
    let leaf = identity::describe(sight.certificates.first()?).ok()?;
    let life = life::judge(&leaf, facts.now);
    let what = format!("its certificate: {}", life.what);
    Some(match life.level {
        Level::Ok => Finding::ok(Check::PeerExpiring, subject, what),
        level if life.is_future => {
            let remedy = "synchronise this machine's clock and the peer's with NTP";
            Finding::new(level, Check::ClockSkew, subject, what, remedy)
        }
        level => {
            let remedy = "renew it at the peer, and see why it was not renewed";
            Finding::new(level, Check::PeerExpiring, subject, what, remedy)
        }
    })
}

/// The port the peer says on how pressed it is.
async fn gossip(
    facts: &Facts,
    prober: &Prober,
    peer: &PeerConfig,
    tls: &ClientConfig,
) -> Vec<Finding> {
    let Some(port) = &peer.gossip else { return Vec::new() };
    let subject = subject(peer);
    let (addresses, looked) = dns::look(&subject, &port.authority(), facts.timeout).await;
    // What is wrong with the name they share is said once.
    let is_shared = port.authority().host() == peer.peers.authority().host();
    let mut findings = if is_shared { Vec::new() } else { looked };
    if addresses.is_empty() {
        return findings;
    }
    let within = share(facts.timeout, &addresses);
    let over_tcp = |address| prober.link_over_tcp(address, tls.clone(), LINK_ALPN, within);
    let (quic, tcp) = tokio::join!(
        first(&addresses, |address| prober.link(address, tls.clone(), within)),
        first(&addresses, over_tcp),
    );
    findings.push(heard(&subject, &port.to_string(), &quic, &tcp));
    findings
}

fn heard(subject: &str, port: &str, quic: &Seen, tcp: &Seen) -> Finding {
    let number = port.rsplit(':').next().unwrap_or(port);
    let ms = |sight: &Sight| sight.rtt.as_secs_f64() * 1e3;
    match (quic, tcp) {
        (Ok(quic), tcp) => {
            let ms = ms(quic);
            let what = match tcp {
                Ok(_) => format!("gossip at {port} answers in {ms:.1} ms, and over TCP too"),
                Err(error) => format!(
                    "gossip at {port} answers in {ms:.1} ms; over TCP: {error}, so should UDP fail there is no other way"
                ),
            };
            Finding::ok(Check::PeerGossip, subject, what)
        }
        (Err(error), Ok(tcp)) => {
            let ms = ms(tcp);
            let what =
                format!("gossip over UDP at {port}: {error}; over TCP it answers in {ms:.1} ms");
            let remedy = format!("let UDP port {number} through, there, here and in between");
            Finding::warning(Check::PeerGossip, subject, what, remedy)
        }
        (Err(error), Err(over_tcp)) => {
            let what = format!(
                "gossip over UDP at {port}: {error}; over TCP: {over_tcp}; this node will not know how pressed the peer is"
            );
            let remedy = format!(
                "let port {number} through for UDP and TCP, and compare it with the peer's `listen.gossip`"
            );
            Finding::warning(Check::PeerGossip, subject, what, remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight() -> Seen {
        let rtt = Duration::from_millis(3);
        Ok(Sight { certificates: Vec::new(), rtt, payload_bytes: Some(1452), refusal: None })
    }

    #[test]
    fn gossip_over_tcp_alone_is_a_warning_that_names_udp() {
        let silent = || Err(Unreached::Silent(Duration::from_secs(5)));
        let heard = |quic: Seen, tcp: Seen| heard("peer b", "b:8445", &quic, &tcp);
        assert_eq!(heard(sight(), sight()).level, Level::Ok);
        assert!(heard(sight(), silent()).what.contains("no other way"));
        let slow = heard(silent(), sight());
        assert_eq!(slow.level, Level::Warning);
        assert!(slow.remedy.contains("UDP port 8445"), "{}", slow.remedy);
        assert!(heard(silent(), silent()).what.contains("will not know"));
    }

    #[test]
    fn one_protocol_is_a_warning_and_none_an_error() {
        let silent = || Err(Unreached::Silent(Duration::from_secs(5)));
        let levels = |tcp: Seen, quic: Seen| -> Vec<_> {
            reached("peer b", "b:8444", &tcp, &quic)
                .into_iter()
                .map(|f| (f.level, f.check))
                .collect()
        };
        assert_eq!(
            levels(sight(), sight()),
            [(Level::Ok, Check::PeerTcp), (Level::Ok, Check::PeerUdp)]
        );
        assert_eq!(levels(sight(), silent())[1], (Level::Warning, Check::PeerUdp));
        assert_eq!(levels(silent(), sight())[0], (Level::Warning, Check::PeerTcp));
        assert_eq!(levels(silent(), silent()), [(Level::Error, Check::PeerUnreachable)]);
    }

    #[test]
    fn a_silent_port_is_named_with_its_protocol() {
        let silent = Err(Unreached::Silent(Duration::from_secs(5)));
        let found = reached("peer b", "b.example:8444", &sight(), &silent);
        assert!(found[1].remedy.contains("UDP port 8444"), "{}", found[1].remedy);
        assert!(found[1].what.contains("no answer within 5s"), "{}", found[1].what);
    }
}
