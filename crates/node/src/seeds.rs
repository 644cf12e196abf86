//! Where nodes to begin with are found now: names of the configuration are looked up, again every minute, and what was known
//! stays known while a name cannot be looked up.
//!
//! A host is looked up as everywhere else in this process, by what the machine is set up for. SRV records (RFC 2782) are asked
//! of the name servers in the machine's resolv.conf, which is read anew each time.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolverConfig},
    net::runtime::TokioRuntimeProvider,
    proto::rr::{RData, rdata::SRV},
};
use http::uri::Authority;
use rand::{RngExt as _, rngs::StdRng};
use tokio::sync::watch;

use crate::config::SeedAddress;

/// Addresses at most.
const ADDRESSES_MAX: usize = 64;
/// Targets of one SRV record set that are looked at.
const TARGETS_MAX: usize = 64;
/// Time between looks, at least and at most; and while a name has never been found.
const AGAIN: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(60)];
const AGAIN_SOON: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(4)];
/// A name that takes longer is not found this time.
const WITHIN: Duration = Duration::from_secs(10);

/// What the seeds of a configuration come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Each address and port.
    pub(crate) addresses: Vec<String>,
    /// Each host and port, as written, or as an SRV record names it.
    pub(crate) hosts: Vec<Authority>,
}

/// The seeds of a node.
#[derive(Debug)]
pub(crate) struct Seeds {
    entries: Vec<Entry>,
    names: Names,
}

/// One seed of the configuration, and what it came to when it was last found.
#[derive(Debug)]
struct Entry {
    seed: SeedAddress,
    found: Option<Found>,
    /// Why it was not found last time, so that it is said once.
    why: Option<String>,
}

impl Seeds {
    /// Those of a configuration, asked of `names`.
    pub(crate) fn new(seeds: &[SeedAddress], names: Names) -> Self {
        let entry = |seed: &SeedAddress| Entry { seed: seed.clone(), found: None, why: None };
        Self { entries: seeds.iter().map(entry).collect(), names }
    }

    /// What is known without a look.
    pub(crate) fn known(&self) -> Found {
        let mut all = Found::default();
        for entry in &self.entries {
            match (&entry.found, &entry.seed) {
                (Some(found), _) => {
                    all.addresses.extend(found.addresses.iter().cloned());
                    all.hosts.extend(found.hosts.iter().cloned());
                }
                (None, SeedAddress::At(seed)) => {
                    let host = seed.authority();
                    let is_address = host.as_str().parse::<SocketAddr>().is_ok();
                    all.addresses.extend(is_address.then(|| host.to_string()));
                    all.hosts.push(host);
                }
                (None, SeedAddress::Srv(_)) => {}
            }
        }
        let mut seen = BTreeSet::new();
        all.addresses.retain(|address| seen.insert(address.clone()));
        all.addresses.truncate(ADDRESSES_MAX);
        all
    }

    /// Looks all of them up; returns whether each has been found at least once.
    async fn look(&mut self) -> bool {
        let names = &self.names;
        let looks = self.entries.iter_mut().map(|entry| entry.look(names));
        futures_util::future::join_all(looks).await;
        self.entries.iter().all(|entry| entry.found.is_some())
    }

    /// Looks them up again and again, and tells when something changed.
    pub(crate) async fn run(mut self, tell: watch::Sender<Found>, mut rng: StdRng) {
        if self.entries.is_empty() {
            return;
        }
        loop {
            let [least, most] = if self.look().await { AGAIN } else { AGAIN_SOON };
            let found = self.known();
            tell.send_if_modified(|known| {
                let is_news = *known != found;
                *known = found;
                is_news
            });
            tokio::time::sleep(rng.random_range(least..most)).await;
        }
    }
}

impl Entry {
    async fn look(&mut self, names: &Names) {
        let looking = tokio::time::timeout(WITHIN, names.find(&self.seed)).await;
        match looking.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
            Ok(found) => {
                if self.why.take().is_some() {
                    tracing::info!(seed = %self.seed, "a seed's name is found again");
                }
                self.found = Some(found);
            }
            Err(why) => {
                if self.why.as_ref() != Some(&why) {
                    tracing::warn!(seed = %self.seed, why, "a seed's name is not found; what was known of it stays in use");
                }
                self.why = Some(why);
            }
        }
    }
}

/// Who is asked about names.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Names {
    /// The name server; `None`: what the machine is set up for.
    pub(crate) server: Option<SocketAddr>,
}

impl Names {
    async fn find(&self, seed: &SeedAddress) -> Result<Found, String> {
        match seed {
            SeedAddress::At(seed) => {
                let host = seed.authority();
                let looked = tokio::net::lookup_host(host.as_str()).await;
                let addresses = looked.map_err(|error| error.to_string())?;
                found(addresses.collect(), vec![host])
            }
            SeedAddress::Srv(name) => self.find_srv(name).await,
        }
    }

    async fn find_srv(&self, name: &str) -> Result<Found, String> {
        let resolver = self.resolver()?;
        let targets = targets(&resolver, name).await?;
        let looks = targets.iter().map(|(host, port)| addresses(&resolver, host, *port));
        let looked = futures_util::future::join_all(looks).await;
        // A target that is gone hides none of the others.
        let found_any: Vec<_> = looked.iter().flatten().flatten().copied().collect();
        match looked.into_iter().find_map(Result::err) {
            Some(why) if found_any.is_empty() => Err(why),
            _ => found(found_any, authorities(&targets)),
        }
    }

    fn resolver(&self) -> Result<TokioResolver, String> {
        let builder = match self.server {
            None => TokioResolver::builder_tokio().map_err(|error| {
                format!("the machine's resolver cannot be used: {error}: see /etc/resolv.conf")
            })?,
            Some(server) => {
                let over = |mut connection: ConnectionConfig| {
                    connection.port = server.port();
                    connection
                };
                let connections = vec![over(ConnectionConfig::udp())];
                let server = NameServerConfig::new(server.ip(), true, connections);
                let config = ResolverConfig::from_parts(None, vec![], vec![server]);
                TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            }
        };
        builder.build().map_err(|error| error.to_string())
    }
}

/// The hosts and ports that an SRV record names.
///
/// # Errors
/// It is not found; in words.
pub async fn look_up_srv(name: &str) -> Result<Vec<Authority>, String> {
    let looking = async { targets(&Names::default().resolver()?, name).await };
    let targets = tokio::time::timeout(WITHIN, looking).await;
    let targets = targets.unwrap_or_else(|_| Err("no answer in time".to_owned()))?;
    Ok(authorities(&targets))
}

/// As others write them; what is no host is left out.
fn authorities(targets: &[(String, u16)]) -> Vec<Authority> {
    targets.iter().filter_map(|(host, port)| format!("{host}:{port}").parse().ok()).collect()
}

/// Hosts and ports in the order of their priority.
async fn targets(resolver: &TokioResolver, name: &str) -> Result<Vec<(String, u16)>, String> {
    let looked =
        resolver.srv_lookup(format!("{name}.")).await.map_err(|error| error.to_string())?;
    let mut records: Vec<&SRV> = looked
        .answers()
        .iter()
        .filter_map(|record| match &record.data {
            RData::SRV(record) => Some(record),
            _ => None,
        })
        .collect();
    records.sort_by_key(|record| record.priority);
    let target = |record: &&SRV| {
        let host = record.target.to_ascii();
        let host = host.trim_end_matches('.').to_owned();
        // A target of "." says that the service is not there.
        (!host.is_empty() && record.port > 0).then_some((host, record.port))
    };
    let targets: Vec<_> = records.iter().filter_map(target).take(TARGETS_MAX).collect();
    if targets.is_empty() { Err("its SRV record names no host".to_owned()) } else { Ok(targets) }
}

async fn addresses(
    resolver: &TokioResolver,
    host: &str,
    port: u16,
) -> Result<Vec<SocketAddr>, String> {
    let looked = resolver.lookup_ip(format!("{host}.")).await;
    let looked = looked.map_err(|error| format!("{host}: {error}"))?;
    Ok(looked.iter().map(|ip: IpAddr| SocketAddr::new(ip, port)).collect())
}

fn found(mut addresses: Vec<SocketAddr>, hosts: Vec<Authority>) -> Result<Found, String> {
    // Answers come in any order: another order is no news.
    addresses.sort();
    addresses.dedup();
    if addresses.is_empty() {
        return Err("its name has no address".to_owned());
    }
    Ok(Found { addresses: addresses.iter().map(ToString::to_string).collect(), hosts })
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, sync::Arc};

    use parking_lot::Mutex;
    use rand::SeedableRng as _;
    use tokio::{net::UdpSocket, task::JoinSet};

    use super::*;

    /// What a name server answers: a target and a port per SRV record, and one address per target.
    type Zone = Arc<Mutex<Vec<(&'static str, u16, Ipv4Addr)>>>;

    const SERVICE: &str = "_isobar-gossip._udp.mesh.test";

    /// A name server on loopback (RFC 1035 §4) for one service.
    async fn serve(zone: Zone, tasks: &mut JoinSet<()>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tasks.spawn(async move {
            let mut bytes = [0; 1500];
            loop {
                let (length, from) = socket.recv_from(&mut bytes).await.unwrap();
                let answer = answer(&bytes[..length], &zone.lock());
                socket.send_to(&answer, from).await.unwrap();
            }
        });
        address
    }

    fn answer(question: &[u8], zone: &[(&str, u16, Ipv4Addr)]) -> Vec<u8> {
        let end = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        let kind = u16::from_be_bytes([question[end - 4], question[end - 3]]);
        let asked = question[12..end - 4].to_ascii_lowercase();
        let mut records = Vec::new();
        for (host, port, ip) in zone {
            let data = match kind {
                33 if asked == name(SERVICE) => {
                    let head = [0, 1, 0, 0].into_iter().chain(port.to_be_bytes());
                    head.chain(name(host)).collect::<Vec<u8>>()
                }
                1 if asked == name(host) => ip.octets().to_vec(),
                _ => continue,
            };
            // The name asked for, class IN, ten seconds.
            records.push([&[0xc0, 12][..], &kind.to_be_bytes(), &[0, 1, 0, 0, 0, 10]].concat());
            let length = u16::try_from(data.len()).unwrap();
            records.push([&length.to_be_bytes()[..], &data].concat());
        }
        let count = u8::try_from(records.len() / 2).unwrap();
        let header = [&question[..2], &[0x81, 0x80, 0, 1, 0, count, 0, 0, 0, 0]].concat();
        [&header[..], &question[12..end], &records.concat()].concat()
    }

    fn name(text: &str) -> Vec<u8> {
        let label =
            |label: &str| [&[u8::try_from(label.len()).unwrap()], label.as_bytes()].concat();
        text.split('.').map(label).chain([vec![0]]).flatten().collect()
    }

    fn seeds(texts: &[&str], server: Option<SocketAddr>) -> Seeds {
        let seeds: Vec<_> = texts.iter().map(|text| text.parse().unwrap()).collect();
        Seeds::new(&seeds, Names { server })
    }

    #[tokio::test]
    async fn an_srv_record_leads_to_every_address_of_every_target() {
        let zone = Zone::default();
        *zone.lock() = vec![
            ("a.mesh.test", 8445, Ipv4Addr::new(192, 0, 2, 1)),
            ("b.mesh.test", 9445, Ipv4Addr::new(192, 0, 2, 2)),
        ];
        let mut tasks = JoinSet::new();
        let server = serve(zone.clone(), &mut tasks).await;
        let mut seeds = seeds(&["127.0.0.1:1", &format!("srv:{SERVICE}")], Some(server));
        assert_eq!(seeds.known().addresses, ["127.0.0.1:1"], "without a look");
        assert!(seeds.look().await);
        let found = seeds.known();
        assert_eq!(found.addresses, ["127.0.0.1:1", "192.0.2.1:8445", "192.0.2.2:9445"]);
        assert_eq!(found.hosts, ["127.0.0.1:1", "a.mesh.test:8445", "b.mesh.test:9445"]);

        // A target more, and then nothing: what was known stays.
        zone.lock().push(("c.mesh.test", 1, Ipv4Addr::new(192, 0, 2, 3)));
        seeds.look().await;
        assert_eq!(seeds.known().addresses.len(), 4);
        zone.lock().clear();
        seeds.look().await;
        assert_eq!(seeds.known().addresses.len(), 4);
    }

    #[tokio::test]
    async fn a_name_that_appears_later_is_told_of_without_being_asked_for() {
        let (zone, mut tasks) = (Zone::default(), JoinSet::new());
        let server = serve(zone.clone(), &mut tasks).await;
        let seeds = seeds(&[&format!("srv:{SERVICE}")], Some(server));
        let (tell, mut told) = watch::channel(seeds.known());
        tasks.spawn(seeds.run(tell, StdRng::seed_from_u64(1)));
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!told.has_changed().unwrap(), "nothing is no news");
        zone.lock().push(("a.mesh.test", 8445, Ipv4Addr::new(192, 0, 2, 1)));
        let changed = tokio::time::timeout(Duration::from_secs(20), told.changed()).await;
        changed.expect("it is never found").unwrap();
        assert_eq!(told.borrow().addresses, ["192.0.2.1:8445"]);
    }

    #[tokio::test]
    async fn hosts_are_looked_up_and_addresses_are_bounded() {
        let mut localhost = seeds(&["localhost:8445", "127.0.0.1:8445"], None);
        assert!(localhost.look().await);
        let found = localhost.known();
        let v4 = found.addresses.iter().filter(|address| *address == "127.0.0.1:8445").count();
        assert_eq!(v4, 1, "{found:?}");
        let many: Vec<_> = (1..=100).map(|port| format!("127.0.0.1:{port}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert_eq!(seeds(&many, None).known().addresses.len(), ADDRESSES_MAX);
    }

    #[tokio::test]
    async fn a_name_that_is_not_found_is_no_seed_yet() {
        let mut tasks = JoinSet::new();
        let server = serve(Zone::default(), &mut tasks).await;
        let mut seeds = seeds(&["srv:_x._udp.mesh.test"], Some(server));
        assert!(!seeds.look().await);
        assert_eq!(seeds.known(), Found::default());
    }
}
