//! The node's own ports: whether they can be had, and who could reach them.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
};

use node::config::ListenConfig;

use super::{
    dns,
    facts::Facts,
    finding::{Check, Finding},
    served::Served,
};

/// What one port is like at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Taken,
    /// Ports below 1024, mostly.
    Forbidden,
    /// The address is not one of this machine's.
    NotHere,
    Other(String),
}

/// A port of the configuration.
#[derive(Clone, Debug)]
pub(super) struct Door {
    /// Its key in `[listen]`.
    pub(super) key: &'static str,
    pub(super) address: SocketAddr,
    /// The protocol and what came of trying to bind.
    pub(super) states: Vec<(&'static str, State)>,
}

impl Door {
    pub(super) fn is_taken(&self) -> bool {
        self.states.iter().any(|(_, state)| *state == State::Taken)
    }

    fn subject(&self) -> String {
        format!("listen.{}", self.key)
    }
}

/// Tries every port that has a number: binds it and lets go of it.
pub(super) fn doors(listen: &ListenConfig) -> Vec<Door> {
    let all = [
        ("clients", Some(listen.clients), true, true),
        ("peers", Some(listen.peers), true, true),
        ("gossip", Some(listen.gossip), true, true),
        ("plaintext", listen.plaintext, true, false),
        ("metrics", Some(listen.metrics), true, false),
        ("admin", Some(listen.admin), true, false),
    ];
    all.into_iter()
        .filter_map(|(key, address, tcp, udp)| Some((key, address?, tcp, udp)))
        .filter(|(_, address, ..)| address.port() != 0)
        .map(|(key, address, tcp, udp)| {
            let tcp = tcp.then(|| ("TCP", state(TcpListener::bind(address).map(drop))));
            let udp = udp.then(|| ("UDP", state(UdpSocket::bind(address).map(drop))));
            Door { key, address, states: tcp.into_iter().chain(udp).collect() }
        })
        .collect()
}

fn state(bound: io::Result<()>) -> State {
    match bound {
        Ok(()) => State::Free,
        Err(error) => match error.kind() {
            ErrorKind::AddrInUse => State::Taken,
            ErrorKind::PermissionDenied => State::Forbidden,
            ErrorKind::AddrNotAvailable => State::NotHere,
            _ => State::Other(error.to_string()),
        },
    }
}

pub(super) fn check(facts: &Facts, doors: &[Door], served: &Served) -> Vec<Finding> {
    let mut findings: Vec<_> =
        doors.iter().flat_map(|door| bindable(door, served.holds(door.key))).collect();
    findings.extend(too_narrow(facts));
    findings.extend(too_wide(&facts.config.listen));
    findings
}

/// `is_ours`: where it is taken, this node holds it.
fn bindable(door: &Door, is_ours: bool) -> Vec<Finding> {
    let (subject, address) = (door.subject(), door.address);
    let faults: Vec<_> = door
        .states
        .iter()
        .filter_map(|(protocol, state)| fault(door, protocol, state, is_ours))
        .collect();
    if !faults.is_empty() {
        return faults;
    }
    let what = if door.is_taken() {
        format!("{address} is held by this node, which runs")
    } else {
        format!("{address} is free")
    };
    vec![Finding::ok(Check::ListenTaken, subject, what)]
}

fn fault(door: &Door, protocol: &str, state: &State, is_ours: bool) -> Option<Finding> {
    let (subject, address) = (door.subject(), door.address);
    let port = address.port();
    match state {
        State::Free => None,
        State::Taken if is_ours => None,
        State::Taken => {
            let what = format!("{address} ({protocol}) is held by something that is not this node");
            let remedy = format!(
                "find it with `ss -lntup 'sport = :{port}'` and stop it, or choose another port"
            );
            Some(Finding::error(Check::ListenTaken, subject, what, remedy))
        }
        State::Forbidden => {
            let what = format!("this user may not bind {address} ({protocol})");
            let remedy = "choose a port from 1024, or give the node CAP_NET_BIND_SERVICE; if the node runs as another user, \
                          check as that one";
            Some(Finding::error(Check::ListenForbidden, subject, what, remedy))
        }
        State::NotHere => {
            let what = format!("{} is no address of this machine", address.ip());
            let remedy = "write an address that `ip address` shows, or 0.0.0.0 for all of them";
            Some(Finding::error(Check::ListenNotHere, subject, what, remedy))
        }
        State::Other(error) => {
            let what = format!("{address} ({protocol}) cannot be bound: {error}");
            let remedy = "choose another address";
            Some(Finding::error(Check::ListenNotHere, subject, what, remedy))
        }
    }
}

/// Ports for others that only this machine reaches.
fn too_narrow(facts: &Facts) -> Vec<Finding> {
    let config = &facts.config;
    let elsewhere = config.mesh.peers.iter().find(|p| !dns::is_loopback(&p.peers.authority()));
    let Some(peer) = elsewhere else { return Vec::new() };
    let (peers, gossip) = (config.listen.peers, config.listen.gossip);
    [("peers", peers), ("gossip", gossip)]
        .into_iter()
        .filter(|(_, address)| address.ip().is_loopback())
        .map(|(key, address)| {
            let what =
                format!("only this machine reaches {address}, and peer {} is elsewhere", peer.name);
            let remedy = "listen on an address that the peers reach, such as 0.0.0.0";
            Finding::warning(Check::ListenLoopback, format!("listen.{key}"), what, remedy)
        })
        .collect()
}

/// Ports that others reach and that are not for everybody.
fn too_wide(listen: &ListenConfig) -> Vec<Finding> {
    let is_open = |address: &SocketAddr| !is_here(address.ip());
    let plaintext = listen.plaintext.filter(is_open).map(|address| {
        let what = format!("anybody who reaches {address} may call, without TLS");
        let remedy = "listen on 127.0.0.1, or keep others away with a firewall";
        Finding::warning(Check::ListenPlaintext, "listen.plaintext", what, remedy)
    });
    let metrics = Some(listen.metrics).filter(is_open).map(|address| {
        let what = format!(
            "anybody who reaches {address} reads the metrics, names of models and peers among them"
        );
        let remedy = "listen on 127.0.0.1, or keep others than the scraper away";
        Finding::note(Check::ListenMetrics, "listen.metrics", what, remedy)
    });
    let admin = Some(listen.admin).filter(is_open).map(|address| {
        let what = format!(
            "at {address} only who shows a certificate of the mesh with the role operator is let in"
        );
        let remedy = "get one with `isobar ca issue --role operator`, or listen on 127.0.0.1, where this machine's users \
                      need none";
        Finding::note(Check::ListenAdmin, "listen.admin", what, remedy)
    });
    plaintext.into_iter().chain(metrics).chain(admin).collect()
}

fn is_here(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door(state: State) -> Door {
        let address = ([127, 0, 0, 1], 8443).into();
        Door { key: "clients", address, states: vec![("TCP", state), ("UDP", State::Free)] }
    }

    #[test]
    fn a_taken_port_is_an_error_unless_the_node_holds_it() {
        let found = bindable(&door(State::Taken), false);
        assert_eq!((found.len(), found[0].check), (1, Check::ListenTaken));
        assert!(found[0].what.contains("127.0.0.1:8443 (TCP)"));
        let level = |door, runs| bindable(&door, runs)[0].level;
        assert_eq!(level(door(State::Taken), true), super::super::Level::Ok);
        assert_eq!(level(door(State::Free), false), super::super::Level::Ok);
        assert_eq!(level(door(State::Forbidden), true), super::super::Level::Error);
    }

    #[test]
    fn ports_that_are_taken_are_found() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let clients = held.local_addr().unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let listen = ListenConfig {
            clients,
            peers: any,
            gossip: any,
            metrics: any,
            admin: any,
            plaintext: None,
        };
        let doors = doors(&listen);
        assert_eq!(doors.len(), 1);
        assert_eq!(doors[0].states[0], ("TCP", State::Taken));
    }

    #[test]
    fn open_ports_without_tls_are_named() {
        let any = "127.0.0.1:0".parse().unwrap();
        let plaintext = Some("0.0.0.0:8080".parse().unwrap());
        let metrics = "[::]:9464".parse().unwrap();
        let listen = ListenConfig {
            clients: any,
            peers: any,
            gossip: any,
            plaintext,
            metrics,
            ..ListenConfig::default()
        };
        let found: Vec<_> = too_wide(&listen).into_iter().map(|f| f.check).collect();
        assert_eq!(found, [Check::ListenPlaintext, Check::ListenMetrics]);
        let admin = "10.0.0.1:9090".parse().unwrap();
        let found = too_wide(&ListenConfig { admin, ..ListenConfig::default() });
        assert_eq!((found.len(), found[0].check), (1, Check::ListenAdmin));
    }
}
