//! Names: whether this machine can resolve them at all, and those of the peers and engines.

use std::{fs, net::SocketAddr, time::Duration};

use base::clock;
use http::uri::Authority;

use super::{
    facts::Facts,
    finding::{Check, Finding},
};

/// A name that takes longer to look up delays every connection.
const SLOW: Duration = Duration::from_secs(1);
const RESOLVERS: &str = "/etc/resolv.conf";

/// What the machine's own resolver is like.
pub(super) async fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![localhost(facts.timeout).await];
    let config = &facts.config;
    let peers = config.mesh.peers.iter().map(|peer| peer.peers.authority());
    let engines = config.engines.iter().map(|engine| engine.url.authority());
    if peers.chain(engines).any(|authority| address(&authority).is_none()) {
        findings.push(resolvers());
    }
    findings
}

async fn localhost(within: Duration) -> Finding {
    let looked = tokio::time::timeout(within, tokio::net::lookup_host(("localhost", 1))).await;
    let found: Vec<_> = looked.ok().and_then(Result::ok).into_iter().flatten().collect();
    if found.iter().any(|address| address.ip().is_loopback()) {
        return Finding::ok(Check::DnsLocalhost, "dns", "localhost resolves to this machine");
    }
    let what = "localhost does not resolve to a loopback address";
    let remedy = "put `127.0.0.1 localhost` into /etc/hosts";
    Finding::warning(Check::DnsLocalhost, "dns", what, remedy)
}

fn resolvers() -> Finding {
    let text = fs::read_to_string(RESOLVERS).unwrap_or_default();
    let servers: Vec<_> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .map(str::trim)
        .collect();
    if servers.is_empty() {
        let what = format!("{RESOLVERS} names no server, and the configuration has host names");
        let remedy = "name a server there, or the hosts in /etc/hosts";
        return Finding::warning(Check::DnsResolvers, "dns", what, remedy);
    }
    let what = format!("names are asked of {}", servers.join(", "));
    Finding::ok(Check::DnsResolvers, "dns", what)
}

/// The address an authority names outright.
fn address(authority: &Authority) -> Option<SocketAddr> {
    authority.as_str().parse().ok()
}

/// Whether an authority is this machine by its name alone.
pub(super) fn is_loopback(authority: &Authority) -> bool {
    match address(authority) {
        Some(address) => address.ip().to_canonical().is_loopback(),
        None => authority.host() == "localhost",
    }
}

/// Looks a name up: its addresses, and what is wrong with it.
pub(super) async fn look(
    subject: &str,
    authority: &Authority,
    within: Duration,
) -> (Vec<SocketAddr>, Vec<Finding>) {
    if let Some(address) = address(authority) {
        return (vec![address], Vec::new());
    }
    let began = clock::now();
    let lookup = tokio::net::lookup_host(authority.as_str());
    let looked = tokio::time::timeout(within, lookup).await;
    let took = clock::now() - began;
    let host = authority.host();
    let unresolved = |why: &str| {
        let what = format!("the name {host} {why}");
        let remedy = "check the spelling, the DNS entry and /etc/resolv.conf";
        (Vec::new(), vec![Finding::error(Check::DnsUnresolved, subject, what, remedy)])
    };
    match looked {
        Err(_) => unresolved(&format!("was not resolved within {within:?}")),
        Ok(Err(error)) => unresolved(&format!("cannot be resolved: {error}")),
        Ok(Ok(addresses)) => {
            let addresses: Vec<_> = addresses.collect();
            if addresses.is_empty() {
                return unresolved("has no address");
            }
            let found = resolved(subject, host, &addresses, took);
            (addresses, vec![found])
        }
    }
}

fn resolved(subject: &str, host: &str, addresses: &[SocketAddr], took: Duration) -> Finding {
    let v6 = addresses.iter().filter(|address| address.is_ipv6()).count();
    let (v4, took_ms) = (addresses.len() - v6, took.as_millis());
    let what =
        format!("the name {host} has {v4} IPv4 and {v6} IPv6 addresses, found in {took_ms} ms");
    if took > SLOW {
        let remedy = "use a resolver that is near, or a caching one on this machine";
        return Finding::warning(Check::DnsSlow, subject, what, remedy);
    }
    Finding::ok(Check::DnsUnresolved, subject, what)
}

/// Addresses there is no way to from here, or back; `listen` is where this node is reached.
pub(super) fn family(
    subject: &str,
    addresses: &[SocketAddr],
    listen: SocketAddr,
) -> Option<Finding> {
    let first = addresses.first()?.ip();
    let is_only_v6 = addresses.iter().all(SocketAddr::is_ipv6);
    if !addresses.iter().any(|address| transport::towards(*address).is_ok()) {
        let family = if is_only_v6 { "IPv6" } else { "IP" };
        let what = format!("this machine has no {family} route to {first}");
        let remedy = "give this machine such a route, or the peer an address of the other family";
        return Some(Finding::error(Check::DnsFamily, subject, what, remedy));
    }
    (is_only_v6 && listen.is_ipv4() && !first.is_loopback()).then(|| {
        let what = format!("it has IPv6 addresses only, and this node listens on {listen}");
        let remedy =
            "listen on `[::]`, which takes both families, or give the peer an IPv4 address";
        Finding::warning(Check::DnsFamily, subject, what, remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_by_its_addresses_and_name() {
        for (text, here) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("localhost:1", true),
            ("10.0.0.1:1", false),
            ("gpu.example:1", false),
        ] {
            assert_eq!(is_loopback(&text.parse().unwrap()), here, "{text}");
        }
    }

    #[tokio::test]
    async fn addresses_are_not_looked_up_and_reserved_names_not_found() {
        let within = Duration::from_secs(5);
        let (found, said) = look("x", &"[::1]:7".parse().unwrap(), within).await;
        assert!(found.len() == 1 && said.is_empty());
        let (found, said) = look("x", &"gpu.invalid:7".parse().unwrap(), within).await;
        assert!(found.is_empty());
        assert_eq!(said[0].check, Check::DnsUnresolved);
    }

    #[test]
    fn a_peer_of_the_other_family_is_found() {
        let four = "0.0.0.0:8444".parse().unwrap();
        let here = ["127.0.0.1:9".parse().unwrap()];
        assert!(family("x", &here, four).is_none() && family("x", &[], four).is_none());
        // A reserved address: whether there is a route, or only none back, it is named.
        let six = ["[2001:db8::1]:9".parse().unwrap()];
        assert_eq!(family("x", &six, four).unwrap().check, Check::DnsFamily);
    }
}
