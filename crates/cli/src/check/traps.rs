//! Configurations that are valid and do not do what was meant.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::uri::Authority;
use node::config::{Config, EngineConfig, ListenConfig};
use rustix::fs::{Access, access, statfs};

use super::{
    facts::Facts,
    finding::{Check, Finding},
};

/// What `statfs` calls file systems in memory.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// The beginning of 2026: this program is younger.
const PLAUSIBLE: Duration = Duration::from_secs(1_767_225_600);

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let config = &facts.config;
    let mut findings = Vec::new();
    // A development CA keeps what it needs in its own directory.
    if !facts.is_dev() {
        findings.extend(state_dir(&config.node.state_dir));
    }
    findings.extend(year(facts.now));
    findings.extend(region(config));
    findings.extend(own_address(config));
    findings.extend(same_address(config));
    findings.extend(config.mesh.peers.iter().filter(|peer| peer.gossip.is_none()).map(no_gossip));
    for engine in &config.engines {
        findings.extend(loops(engine, &config.listen));
        findings.extend(overlapping(engine));
    }
    findings
}

fn state_dir(dir: &Path) -> Vec<Finding> {
    let subject = format!("node.state_dir {}", dir.display());
    let mut findings = Vec::new();
    if dir.is_relative() {
        let what = "it is relative to wherever the node is started from";
        let remedy = "write the whole path";
        findings.push(Finding::note(Check::TrapStateDir, subject.clone(), what, remedy));
    }
    if !dir.is_dir() {
        let remedy = "make it, owned by the user the node runs as";
        let what = "there is no such directory";
        findings.push(Finding::warning(Check::TrapStateDir, subject, what, remedy));
        return findings;
    }
    if access(dir, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        let what = "this user may not write there";
        let remedy = "give it to the user the node runs as; if that is another, check as that one";
        findings.push(Finding::error(Check::TrapStateDir, subject.clone(), what, remedy));
    }
    if statfs(dir).is_ok_and(|found| is_in_memory(found.f_type as u64)) {
        let what = "it is in memory: a restart of the machine loses the node's identity";
        let remedy = "use a directory on a disk";
        findings.push(Finding::warning(Check::TrapStateInMemory, subject, what, remedy));
    }
    findings
}

fn is_in_memory(magic: u64) -> bool {
    magic == TMPFS_MAGIC || magic == RAMFS_MAGIC
}

fn year(now: SystemTime) -> Option<Finding> {
    (now < UNIX_EPOCH + PLAUSIBLE).then(|| {
        let what = "this machine's clock stands before 2026, when this program did not exist";
        let remedy = "synchronise it with NTP: certificates look invalid to it";
        Finding::error(Check::ClockImplausible, "clock", what, remedy)
    })
}

fn region(config: &Config) -> Option<Finding> {
    let is_alone = config.mesh.peers.is_empty();
    (config.node.region.as_str() == "default" && !is_alone).then(|| {
        let what = "the region is called \"default\", as every region is that nobody named";
        let remedy = "set node.region to where the node is: calls stay in a region when they can";
        Finding::note(Check::TrapDefaultRegion, "node.region", what, remedy)
    })
}

/// Peers whose address is one of this node's.
fn own_address(config: &Config) -> Vec<Finding> {
    let listen = &config.listen;
    let peers = config.mesh.peers.iter().flat_map(|peer| {
        let gossip = peer.gossip.as_ref().map(|gossip| (listen.gossip, gossip.authority()));
        [Some((listen.peers, peer.peers.authority())), gossip]
            .into_iter()
            .flatten()
            .map(move |(own, theirs)| (peer, own, theirs))
    });
    peers
        .filter(|(_, own, theirs)| is_same(*own, theirs))
        .map(|(peer, _, theirs)| {
            let what = format!("{theirs} is an address of this node itself");
            let remedy =
                "leave this node out of its own [[mesh.peer]] list, or correct the address";
            Finding::error(
                Check::TrapSelfPeer,
                format!("peer {} ({})", peer.name, peer.region),
                what,
                remedy,
            )
        })
        .collect()
}

/// Whether a client of `authority` on this machine reaches the port `own`.
fn is_same(own: SocketAddr, authority: &Authority) -> bool {
    if authority.port_u16() != Some(own.port()) || own.port() == 0 {
        return false;
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let ip = match host.parse::<IpAddr>() {
        Ok(ip) => ip.to_canonical(),
        Err(_) => {
            return host == "localhost" && (own.ip().is_loopback() || own.ip().is_unspecified());
        }
    };
    ip == own.ip() || ip.is_unspecified() || (own.ip().is_unspecified() && ip.is_loopback())
}

/// Peers or engines that are one and the same port.
fn same_address(config: &Config) -> Vec<Finding> {
    let mut users: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for peer in &config.mesh.peers {
        let subject = format!("peer {}", peer.name);
        users.entry(peer.peers.to_string()).or_default().push(subject.clone());
        if let Some(gossip) = &peer.gossip {
            users.entry(gossip.to_string()).or_default().push(subject);
        }
    }
    for engine in &config.engines {
        let authority = engine.url.authority().to_string();
        users.entry(authority).or_default().push(format!("engine {}", engine.name));
    }
    users
        .into_iter()
        .filter(|(_, users)| users.len() > 1)
        .map(|(at, users)| shared(&at, &users))
        .collect()
}

fn shared(at: &str, users: &[String]) -> Finding {
    let what = format!("{} have one address", users.join(" and "));
    let remedy = "give each its own: a port is one node's, and the slots of an engine are counted once for each entry";
    Finding::warning(Check::TrapSameAddress, at, what, remedy)
}

fn no_gossip(peer: &node::config::PeerConfig) -> Finding {
    let what = "it has no `gossip`, so this node will not know how pressed it is and calls it last";
    let remedy = "set `gossip` to the peer's `listen.gossip`";
    Finding::note(
        Check::TrapNoGossip,
        format!("peer {} ({})", peer.name, peer.region),
        what,
        remedy,
    )
}

/// An engine that is this node.
fn loops(engine: &EngineConfig, listen: &ListenConfig) -> Option<Finding> {
    let authority = engine.url.authority();
    let (clients, peers) = (Some(listen.clients), Some(listen.peers));
    let ports = [clients, peers, listen.plaintext, Some(listen.metrics), Some(listen.admin)];
    ports.into_iter().flatten().any(|own| is_same(own, &authority)).then(|| {
        let what =
            format!("{} is a port of this node itself: its calls would go in a circle", engine.url);
        let remedy = "put the address of the engine's own gRPC port there";
        Finding::error(Check::TrapEngineLoop, format!("engine {}", engine.name), what, remedy)
    })
}

fn overlapping(engine: &EngineConfig) -> Option<Finding> {
    let health = &engine.health;
    (health.interval < health.timeout).then(|| {
        let (interval, timeout) = (health.interval, health.timeout);
        let what = format!("it is checked every {interval}, and a check may take {timeout}");
        let remedy = "make health.timeout shorter than health.interval";
        Finding::warning(Check::TrapHealthInterval, format!("engine {}", engine.name), what, remedy)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn config(text: &str) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        fs::write(&path, format!("[node]\nname = \"a\"\n{text}")).unwrap();
        Config::load(&path, &[]).unwrap()
    }

    fn names(findings: impl IntoIterator<Item = Finding>) -> Vec<&'static str> {
        findings.into_iter().map(|finding| finding.check.as_str()).collect()
    }

    #[test]
    fn addresses_of_this_node_are_known_however_they_are_spelt() {
        let any = "0.0.0.0:8444".parse().unwrap();
        for (text, same) in [
            ("127.0.0.1:8444", true),
            ("localhost:8444", true),
            ("[::1]:8444", true),
            ("127.0.0.1:8445", false),
            ("10.0.0.1:8444", false),
            ("gpu.example:8444", false),
        ] {
            assert_eq!(is_same(any, &text.parse().unwrap()), same, "{text}");
        }
        let one = "10.0.0.1:8444".parse().unwrap();
        assert!(is_same(one, &"10.0.0.1:8444".parse().unwrap()));
        assert!(!is_same(one, &"127.0.0.1:8444".parse().unwrap()));
    }

    #[test]
    fn peers_and_engines_that_are_this_node_or_each_other_are_found() {
        let config = config(
            "[[mesh.peer]]\nname = \"b\"\nregion = \"eu\"\npeers = \"localhost:8444\"\n\
             [[mesh.peer]]\nname = \"c\"\nregion = \"eu\"\npeers = \"10.0.0.7:8444\"\ngossip = \"10.0.0.7:8445\"\n\
             [[mesh.peer]]\nname = \"d\"\nregion = \"eu\"\npeers = \"10.0.0.7:8444\"\n\
             [[engine]]\nname = \"loop\"\nurl = \"http://127.0.0.1:8443\"\n",
        );
        assert_eq!(names(own_address(&config)), ["trap.self-peer"]);
        let shared = same_address(&config);
        assert_eq!((shared.len(), shared[0].subject.as_str()), (1, "10.0.0.7:8444"));
        assert_eq!(names(loops(&config.engines[0], &config.listen)), ["trap.engine-loop"]);
        assert_eq!(names(region(&config)), ["trap.default-region"]);
    }

    #[test]
    fn checks_that_overlap_are_found() {
        let engine = |health: &str| {
            config(&format!(
                "[[engine]]\nname = \"e\"\nurl = \"http://10.0.0.1:1\"\nhealth = {health}\n"
            ))
        };
        let short = engine("{ interval = \"1s\", timeout = \"2s\" }");
        assert_eq!(names(overlapping(&short.engines[0])), ["trap.health-interval"]);
        assert!(overlapping(&engine("{ interval = \"10s\" }").engines[0]).is_none());
    }

    #[test]
    fn directories_that_are_not_there_or_relative_are_found() {
        assert_eq!(names(state_dir(Path::new("surely/not/here"))), ["trap.state-dir"; 2]);
        let dir = tempfile::tempdir().unwrap();
        assert!(!names(state_dir(dir.path())).contains(&"trap.state-dir"));
        assert!(is_in_memory(TMPFS_MAGIC) && !is_in_memory(0xef53));
    }

    #[test]
    fn a_clock_of_another_age_is_found() {
        assert_eq!(names(year(UNIX_EPOCH)), ["clock.implausible"]);
        assert!(year(UNIX_EPOCH + PLAUSIBLE * 2).is_none());
    }
}
