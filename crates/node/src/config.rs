//! The configuration file of a node: its keys, their defaults, and what each may hold.
//!
//! The comment of a field is what `isobar schema` prints and what an error shows as allowed, so that the three never
//! differ. Every key has a default except what names an engine or a peer.

mod identity;
mod load;
mod policy;
mod values;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    path::PathBuf,
    time::Duration,
};

use base::{EngineName, ModelName, NodeName, RegionName, TrustDomain, ZoneName};
use inference::Protocol;
use schemars::JsonSchema;
use serde::Deserialize;

pub use identity::{AuthorityConfig, IdentityConfig, IdentitySource};
pub use load::{ConfigError, Fault, Place};
pub use policy::{
    AccessConfig, AllowConfig, CertificateName, Claim, Glob, JwksSource, JwtConfig, KeyHash,
    ServiceGlob, TenantClaim, TenantConfig,
};
pub use values::{
    BufferBytes, EngineUrl, HealthKind, Host, HostPort, Latitude, Longitude, MethodPattern,
    SeedAddress, Share, Timeout, ValueError,
};

/// The trust domain of a mesh that has not been given one.
pub const DEFAULT_TRUST_DOMAIN: &str = "mesh.internal";
/// Engines, and listed peers, one node may have.
const ENTRIES_MAX: usize = 1024;
/// Seeds one node may have.
const SEEDS_MAX: usize = 64;

/// The configuration of `isobar node`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "isobar node configuration")]
pub struct Config {
    /// This node: who and where it is.
    pub node: NodeConfig,
    /// The addresses it listens on.
    #[serde(default)]
    pub listen: ListenConfig,
    /// The certificate for clients.
    #[serde(default)]
    pub tls: TlsConfig,
    /// The mesh it belongs to.
    #[serde(default)]
    pub mesh: MeshConfig,
    /// Where the node's certificate for the mesh comes from.
    #[serde(default)]
    pub identity: IdentityConfig,
    /// The authority it holds, if it does.
    #[serde(default)]
    pub authority: AuthorityConfig,
    /// How calls are routed.
    #[serde(default)]
    pub routing: RoutingConfig,
    /// What is logged of calls.
    #[serde(default)]
    pub log: LogConfig,
    /// The engines (GPU servers) behind this node, one table each, at most 1,024.
    #[serde(default, rename = "engine")]
    pub engines: Vec<EngineConfig>,
    /// How callers say who they are.
    #[serde(default)]
    pub access: AccessConfig,
    /// On whose behalf clients call, one table each, at most 1,024.
    #[serde(default, rename = "tenant")]
    pub tenants: Vec<TenantConfig>,
    /// What tenants may call, one table each, at most 1,024; nothing else may be called.
    #[serde(default)]
    pub allow: Vec<AllowConfig>,
}

/// Who and where a node is.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Name of the node, unique in the mesh: 1 to 63 characters of a-z, 0-9 and `-`. Default: the host name up to its
    /// first dot, in lower case.
    #[schemars(extend("x-isobar-default" = "the host name"))]
    pub name: NodeName,
    /// Region of the node: 1 to 63 characters of a-z, 0-9 and `-`. Nodes of a region are a few milliseconds apart.
    /// Default "default".
    #[serde(default = "default_region")]
    pub region: RegionName,
    /// Zone inside the region, what fails together: 1 to 63 characters of a-z, 0-9 and `-`. Default: none.
    #[serde(default)]
    pub zone: Option<ZoneName>,
    /// Where other nodes reach this one: a host name or an IP address such as "gpu-1.example"; the ports are those of
    /// `listen`. Default: the address that `listen.peers` and `listen.gossip` name, or where they listen on all, the one from
    /// which this machine calls others.
    #[serde(default)]
    pub address: Option<Host>,
    /// Where on earth the node is, a table { lat = 50.1, lon = 8.7 }. Default: unknown.
    #[serde(default)]
    pub position: Option<Position>,
    /// Directory of what the node keeps, relative to the working directory; its identity is in `identity/` there.
    /// Default ".isobar".
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// How long calls in progress may go on after the node was told to stop: a duration such as "120s", "2m" or "1500ms",
    /// up to 24 hours. Default "120s".
    #[serde(default = "default_drain_timeout")]
    pub drain_timeout: Timeout,
    /// How many bytes of requests the whole process may hold back, to look at their front or to send them again: a whole
    /// number from 16777216 (16 MiB). Above it new calls are refused as busy. Default 268435456.
    #[serde(default)]
    pub buffer_bytes: BufferBytes,
}

/// A place on earth.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Latitude in degrees north, -90 to 90.
    pub lat: Latitude,
    /// Longitude in degrees east, -180 to 180.
    pub lon: Longitude,
}

/// The addresses a node listens on.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ListenConfig {
    /// For clients, h2 over TCP and h3 over UDP: an address and port such as "0.0.0.0:8443" or `[::]:8443`; port 0 takes
    /// any. Default "0.0.0.0:8443".
    pub clients: SocketAddr,
    /// For other nodes, h3 over UDP and h2 over TCP with mutual TLS: an address and port such as "0.0.0.0:8444"; port 0
    /// takes any. Default "0.0.0.0:8444".
    pub peers: SocketAddr,
    /// For other nodes to say how pressed they are, QUIC over UDP and, where that is blocked, HTTP/2 over TCP, with mutual TLS:
    /// an address and port such as "0.0.0.0:8445"; port 0 takes any. Default "0.0.0.0:8445".
    pub gossip: SocketAddr,
    /// For operators, gRPC: an address and port such as "127.0.0.1:9090"; port 0 takes any. On an address that is not loopback
    /// only a certificate of the mesh with the role operator is let in. Default "127.0.0.1:9090".
    pub admin: SocketAddr,
    /// For clients without TLS (h2c): an address and port such as "127.0.0.1:8080"; port 0 takes any. Who may call
    /// is the same as with TLS, but keys and tokens are open to whoever listens on the way. Default: off.
    pub plaintext: Option<SocketAddr>,
    /// For /metrics, /livez, /readyz and /room over plain HTTP: an address and port such as "127.0.0.1:9464"; port 0 takes any.
    /// Default "127.0.0.1:9464".
    pub metrics: SocketAddr,
}

/// The certificate for clients.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// File of the certificate for `listen.clients` and what leads to its root, PEM, leaf first; goes with `tls.key`.
    /// Default: the node's own certificate with a development CA, otherwise none, which is an error.
    pub cert: Option<PathBuf>,
    /// File of the private key of `tls.cert`, PEM. Default: as `tls.cert`.
    pub key: Option<PathBuf>,
    /// File of the authorities whose certificates clients may show at `listen.clients`, PEM; one that is shown must be good,
    /// and whose it is says `tenant.certificates`. Default: none, clients are asked for no certificate.
    pub client_ca: Option<PathBuf>,
}

/// The mesh a node belongs to.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MeshConfig {
    /// Trust domain of the mesh's certificates: 1 to 255 characters of a-z, 0-9, `-`, `_` and `.`. Default
    /// "mesh.internal".
    pub trust_domain: TrustDomain,
    /// Nodes to begin with, by their `listen.gossip`: a list of hosts and ports such as ["seed.example:8445"], at most 64, or
    /// names of SRV records such as ["srv:_isobar-gossip._udp.mesh.example"]. Every address of a name is a seed, at most 64 in
    /// all, and names are looked up again every minute. One seed that runs is enough to find everybody. Those that hold the
    /// authority renew this node's certificate. Default: none.
    pub seeds: Vec<SeedAddress>,
    /// Peers this node always links with, one table each, at most 1,024. Others are found through them and the seeds.
    #[serde(rename = "peer")]
    pub peers: Vec<PeerConfig>,
}

/// A listed peer.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Name of the peer, as its certificate says it: 1 to 63 characters of a-z, 0-9 and `-`. Required.
    pub name: NodeName,
    /// Region of the peer, as its certificate says it: 1 to 63 characters of a-z, 0-9 and `-`. Required.
    pub region: RegionName,
    /// Where its `listen.peers` is reached: host and port such as "gpu-1.example:8444" or `[2001:db8::1]:8444`. Required.
    pub peers: HostPort,
    /// Where its `listen.gossip` is reached: host and port such as "gpu-1.example:8445". Without it this node does not know
    /// how pressed the peer is and sends it calls only when nobody it knows of has room. Default: none.
    #[serde(default)]
    pub gossip: Option<HostPort>,
}

/// An engine: one GPU server behind a node.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// Name of the engine, unique at this node: 1 to 63 characters of a-z, 0-9 and `-`. Required.
    pub name: EngineName,
    /// Where the engine is reached over gRPC without TLS (h2c): "http://host:port". Required.
    pub url: EngineUrl,
    /// What the engine speaks: "kserve-v2" or "grpc" (any gRPC service, never looked into). Default "kserve-v2".
    #[serde(default)]
    pub protocol: Protocol,
    /// Models the engine serves, a list of names as it spells them; other models are not sent to it. Default: empty, any
    /// model is sent and the engine's own error says what it lacks.
    #[serde(default)]
    pub models: Vec<ModelName>,
    /// How many calls the engine runs at once, a whole number from 1 to 1048576; further ones go elsewhere or are refused.
    /// Default: as many as come.
    #[serde(default)]
    pub slots: Option<NonZeroU32>,
    /// What several nodes that front the same engine all call it; they share its slots: 1 to 63 characters of a-z, 0-9 and `-`,
    /// the same at each of them, in one region. Default: none, no other node fronts it.
    #[serde(default)]
    pub id: Option<EngineName>,
    /// How the engine is checked, a table { kind = "auto", interval = "10s", timeout = "2s", failures = 3, successes = 2 }.
    #[serde(default)]
    pub health: HealthConfig,
}

/// How an engine is checked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// What a check asks: "auto" (by protocol: kserve-v2 asks ServerReady, grpc asks gRPC health), "kserve", "grpc",
    /// "http:/path" (a GET at the host and port of `url` that must answer 2xx) or "tcp" (a connection). Default "auto".
    pub kind: HealthKind,
    /// Time between checks, spread by a tenth: a duration such as "10s", from 50 ms to 24 hours. Default "10s".
    pub interval: Timeout,
    /// A check that takes longer has failed: a duration such as "2s", from 50 ms to 24 hours. Default "2s".
    pub timeout: Timeout,
    /// Failed checks in a row after which the engine leaves, a whole number from 1. Default 3.
    pub failures: NonZeroU32,
    /// Passed checks in a row after which it returns, a whole number from 1. Default 2.
    pub successes: NonZeroU32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        let balance::HealthConfig { interval, timeout, failures, successes } =
            balance::HealthConfig::default();
        Self {
            kind: HealthKind::Auto,
            interval: interval.into(),
            timeout: timeout.into(),
            failures: NonZeroU32::new(failures).unwrap_or(NonZeroU32::MIN),
            successes: NonZeroU32::new(successes).unwrap_or(NonZeroU32::MIN),
        }
    }
}

impl HealthConfig {
    /// As the machine wants it.
    pub(crate) fn machine(&self) -> balance::HealthConfig {
        balance::HealthConfig {
            interval: self.interval.into(),
            timeout: self.timeout.into(),
            failures: self.failures.get(),
            successes: self.successes.get(),
        }
    }
}

/// How calls are routed.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RoutingConfig {
    /// Methods that may run twice without harm, besides inference, health and reflection: a list of "package.Service"
    /// or "package.Service/Method", the same at every node. Such calls are tried again elsewhere when a node or engine fails before its first
    /// answer; others only when no engine has seen them. Default: none.
    pub idempotent: Vec<MethodPattern>,
}

/// What is logged of calls.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Share of calls that get a line in the access log, a JSON object on standard error: a number from 0 to 1. Default 0.
    pub access: Share,
}

#[expect(clippy::expect_used, reason = "a literal, and a test reads it")]
fn default_region() -> RegionName {
    "default".parse().expect("a region name")
}

fn default_state_dir() -> PathBuf {
    ".isobar".into()
}

fn default_drain_timeout() -> Timeout {
    Timeout::from(Duration::from_secs(120))
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            clients: (Ipv4Addr::UNSPECIFIED, 8443).into(),
            peers: (Ipv4Addr::UNSPECIFIED, 8444).into(),
            gossip: (Ipv4Addr::UNSPECIFIED, 8445).into(),
            admin: (Ipv4Addr::LOCALHOST, 9090).into(),
            plaintext: None,
            metrics: (Ipv4Addr::LOCALHOST, 9464).into(),
        }
    }
}

impl ListenConfig {
    /// The particular addresses it listens on for others: a certificate can cover them too.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let all = [self.clients.ip(), self.peers.ip(), self.gossip.ip()];
        all.into_iter().filter(|address| !address.is_unspecified()).collect()
    }
}

impl ListenConfig {
    /// Those, or where it listens on all, the address from which this machine would call others: nothing is sent.
    #[must_use]
    pub fn reachable(&self) -> Vec<IpAddr> {
        let mut all = self.addresses();
        if self.clients.ip().is_unspecified() || self.peers.ip().is_unspecified() {
            all.extend(outside().or_else(beside));
        }
        all
    }
}

/// The address from which this machine would call one in a documentation network (RFC 5737, RFC 3849): any that is not on
/// this machine will do.
fn outside() -> Option<IpAddr> {
    let v4 = (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into());
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let v6 = (Ipv6Addr::UNSPECIFIED.into(), v6.into());
    [v4, v6].into_iter().find_map(|(from, to)| calling(from, to))
}

/// The address from which this machine would call others on a cable of its own, where there is no way beyond.
fn beside() -> Option<IpAddr> {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    routes.lines().skip(1).find_map(|route| {
        let mut fields = route.split_whitespace().skip(1);
        let (network, gateway) = (fields.next()?, fields.next()?);
        let network = u32::from_str_radix(network, 16).ok().filter(|network| *network != 0)?;
        // As the kernel holds it: in the order of the network.
        let [a, b, c, d] = network.to_ne_bytes();
        let first = Ipv4Addr::new(a, b, c, d.saturating_add(1));
        let is_direct = gateway.bytes().all(|digit| digit == b'0') && !first.is_loopback();
        is_direct.then(|| calling(Ipv4Addr::UNSPECIFIED.into(), first.into()))?
    })
}

/// Nothing is sent.
fn calling(from: IpAddr, to: IpAddr) -> Option<IpAddr> {
    let socket = std::net::UdpSocket::bind((from, 0)).ok()?;
    socket.connect((to, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

impl Default for MeshConfig {
    #[expect(clippy::expect_used, reason = "a literal, and a test reads it")]
    fn default() -> Self {
        let trust_domain = DEFAULT_TRUST_DOMAIN.parse().expect("a trust domain");
        Self { trust_domain, seeds: vec![], peers: vec![] }
    }
}

/// The JSON schema of the configuration file.
#[must_use]
pub fn json_schema() -> serde_json::Value {
    let mut schema = schemars::schema_for!(Config).to_value();
    // `node.name` comes from the host where it is missing, so neither it nor its table is required in the file.
    for pointer in ["/required", "/$defs/NodeConfig/required"] {
        if let Some(required) = schema.pointer_mut(pointer).and_then(|r| r.as_array_mut()) {
            required.retain(|key| key != "node" && key != "name");
        }
    }
    schema
}

#[cfg(test)]
mod tests;
