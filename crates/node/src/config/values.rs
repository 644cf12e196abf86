//! Values with a meaning: parsed once, never checked again.

use std::{
    borrow::Cow,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
    time::Duration,
};

use http::uri::{Authority, PathAndQuery, Uri};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};

/// The longest duration a key may ask for.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Why a text is not the value a key wants. The fault is in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(Cow<'static, str>);

impl ValueError {
    pub(super) fn new(why: &'static str) -> Self {
        Self(why.into())
    }
}

/// A host, by name or address, and a port.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HostPort(Authority);

impl HostPort {
    /// As part of a URI.
    #[must_use]
    pub fn authority(&self) -> Authority {
        self.0.clone()
    }
}

impl FromStr for HostPort {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (host, port) =
            text.rsplit_once(':').ok_or_else(|| ValueError::new("it has no port"))?;
        if text.contains('@') {
            return Err(ValueError::new("it names a user"));
        }
        if !is_host(host) {
            return Err(ValueError::new("its host is no DNS name, IPv4 address or [IPv6 address]"));
        }
        let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number || !port.parse::<u16>().is_ok_and(|port| port > 0) {
            return Err(ValueError::new("its port is not 1 to 65535"));
        }
        text.parse().map(Self).map_err(|_| ValueError::new("it is not a host and a port"))
    }
}

/// A DNS name (RFC 1035 §2.3.4, and `_`) or an IP address as a URL spells it.
pub(super) fn is_host(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.strip_suffix(']').is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok());
    }
    if host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return host.parse::<Ipv4Addr>().is_ok();
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    host.len() <= 253 && host.split('.').all(is_label)
}

/// A host alone, by name or address.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Host(String);

impl Host {
    /// As a URL spells it, with a port.
    #[must_use]
    pub fn with_port(&self, port: u16) -> String {
        format!("{}:{port}", self.0)
    }
}

impl FromStr for Host {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let host = match text.parse::<Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => text.to_owned(),
        };
        if is_host(&host) {
            Ok(Self(host))
        } else {
            Err(ValueError::new("it is no DNS name, IPv4 address or IPv6 address, without a port"))
        }
    }
}

/// Where nodes to begin with are found: at a host and port, or at those an SRV record names.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum SeedAddress {
    /// There.
    At(HostPort),
    /// Where the SRV record of this name says (RFC 2782).
    Srv(String),
}

impl SeedAddress {
    /// What an SRV record is marked with.
    const SRV: &str = "srv:";
}

impl FromStr for SeedAddress {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let Some(name) = text.strip_prefix(Self::SRV) else { return text.parse().map(Self::At) };
        let is_service = name.starts_with('_')
            && name.split('.').nth(1).is_some_and(|part| part.starts_with('_'));
        if is_service && is_host(name) {
            Ok(Self::Srv(name.to_owned()))
        } else {
            Err(ValueError::new(
                "it names no SRV record: write \"srv:_isobar-gossip._udp.\" and a domain",
            ))
        }
    }
}

/// Where an engine is reached: `http://host:port`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EngineUrl(HostPort);

impl EngineUrl {
    /// Host and port.
    #[must_use]
    pub fn authority(&self) -> Authority {
        self.0.authority()
    }
}

impl FromStr for EngineUrl {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        // A `Uri` drops fragments without a word.
        if text.contains('#') {
            return Err(ValueError::new("it has a fragment"));
        }
        let uri: Uri = text.parse().map_err(|_| ValueError::new("it is not a URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(ValueError::new(
                    "engines are reached without TLS (h2c), not over https",
                ));
            }
            _ => return Err(ValueError::new("it does not begin with http://")),
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(ValueError::new("it has a path, and gRPC brings its own"));
        }
        let authority = uri.authority().map_or("", Authority::as_str);
        authority.parse().map(Self)
    }
}

/// A duration of more than nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timeout(Duration);

impl From<Duration> for Timeout {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl From<Timeout> for Duration {
    fn from(timeout: Timeout) -> Self {
        timeout.0
    }
}

impl FromStr for Timeout {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let duration = humantime::parse_duration(text)
            .map_err(|error| ValueError(format!("it is not a duration: {error}").into()))?;
        if duration.is_zero() || duration > TIMEOUT_MAX {
            return Err(ValueError::new("it is not between a moment and 24 hours"));
        }
        Ok(Self(duration))
    }
}

macro_rules! text_value {
    ($($name:ident $pattern:literal)*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.show(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.show(f)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Cow::<'de, str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    )*};
}

pub(super) use text_value;

/// What a health check asks.
#[derive(Clone, PartialEq, Eq)]
pub enum HealthKind {
    /// By protocol.
    Auto,
    /// KServe v2's ServerReady.
    Kserve,
    /// gRPC health checking.
    Grpc,
    /// A GET of this path.
    Http(PathAndQuery),
    /// A TCP connection.
    Tcp,
}

impl FromStr for HealthKind {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "auto" => return Ok(Self::Auto),
            "kserve" => return Ok(Self::Kserve),
            "grpc" => return Ok(Self::Grpc),
            "tcp" => return Ok(Self::Tcp),
            _ => {}
        }
        let path =
            text.strip_prefix("http:").ok_or_else(|| ValueError::new("it is none of these"))?;
        if !path.starts_with('/') {
            return Err(ValueError::new("its path does not begin with /"));
        }
        if path.starts_with("//") {
            return Err(ValueError::new(
                "it names a host: write http:/path, host and port are those of `url`",
            ));
        }
        path.parse().map(Self::Http).map_err(|_| ValueError::new("its path is not one of a URL"))
    }
}

impl HealthKind {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Kserve => f.write_str("kserve"),
            Self::Grpc => f.write_str("grpc"),
            Self::Http(path) => write!(f, "http:{path}"),
            Self::Tcp => f.write_str("tcp"),
        }
    }
}

/// A gRPC service, or one method of it.
#[derive(Clone, PartialEq, Eq)]
pub struct MethodPattern(String);

impl MethodPattern {
    /// Whether it covers the method at `path`, which is `/package.Service/Method`.
    #[must_use]
    pub fn covers(&self, path: &str) -> bool {
        path.strip_prefix('/')
            .and_then(|path| path.strip_prefix(&*self.0))
            .is_some_and(|rest| rest.is_empty() || (rest.starts_with('/') && !self.0.contains('/')))
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for MethodPattern {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let is_word = |word: &str| {
            !word.is_empty()
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                && !word.starts_with(|c: char| c.is_ascii_digit())
        };
        let (service, method) = text.split_once('/').map_or((text, None), |(s, m)| (s, Some(m)));
        if !service.split('.').all(is_word) || !method.is_none_or(is_word) {
            return Err(ValueError::new("it is no package.Service or package.Service/Method"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A number of bytes to hold back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferBytes(usize);

impl BufferBytes {
    const LEAST: usize = 16 << 20;
    /// What a counting semaphore can count.
    const MOST: usize = 1 << 40;

    /// How many.
    #[must_use]
    pub fn get(self) -> usize {
        self.0
    }
}

impl Default for BufferBytes {
    fn default() -> Self {
        Self(256 << 20)
    }
}

impl<'de> Deserialize<'de> for BufferBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = i64::deserialize(deserializer)?;
        match usize::try_from(bytes) {
            Ok(bytes @ Self::LEAST..=Self::MOST) => Ok(Self(bytes)),
            _ => Err(de::Error::custom(format!(
                "it is not between {} and {}",
                Self::LEAST,
                Self::MOST
            ))),
        }
    }
}

impl JsonSchema for BufferBytes {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "BufferBytes".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": Self::LEAST, "maximum": Self::MOST })
    }
}

/// A share of something, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share(f64);

impl Share {
    /// As a number.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let share = f64::deserialize(deserializer)?;
        if (0.0..=1.0).contains(&share) {
            Ok(Self(share))
        } else {
            Err(de::Error::custom("it is not between 0 and 1"))
        }
    }
}

impl JsonSchema for Share {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Share".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "minimum": 0, "maximum": 1 })
    }
}

text_value! {
    HealthKind "^(auto|kserve|grpc|tcp|http:/.*)$"
    MethodPattern "^[A-Za-z0-9_.]+(/[A-Za-z0-9_]+)?$"
    Host "^[^@/]+$"
    HostPort "^[^@/]+:[0-9]{1,5}$"
    SeedAddress "^(srv:_[^@/:]+|[^@/]+:[0-9]{1,5})$"
    EngineUrl "^http://[^@/]+:[0-9]{1,5}/?$"
    Timeout "^[0-9]"
}

impl Host {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SeedAddress {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => address.show(f),
            Self::Srv(name) => write!(f, "{}{name}", Self::SRV),
        }
    }
}

impl HostPort {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

impl EngineUrl {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.0)
    }
}

impl Timeout {
    fn show(self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", humantime::format_duration(self.0))
    }
}

macro_rules! degrees {
    ($($(#[$doc:meta])* $name:ident $bound:literal)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct $name(f64);

        impl $name {
            /// In degrees.
            #[must_use]
            pub fn degrees(self) -> f64 {
                self.0
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let degrees = f64::deserialize(deserializer)?;
                if (-$bound..=$bound).contains(&degrees) {
                    Ok(Self(degrees))
                } else {
                    Err(de::Error::custom(concat!("it is not between -", $bound, " and ", $bound)))
                }
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "number", "minimum": -$bound, "maximum": $bound })
            }
        }
    )*};
}

degrees! {
    /// Degrees north of the equator.
    Latitude 90.0
    /// Degrees east of Greenwich.
    Longitude 180.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_or_addresses_with_a_port() {
        for good in ["a:1", "gpu-1.example:8444", "127.0.0.1:65535", "[2001:db8::1]:8444"] {
            assert_eq!(good.parse::<HostPort>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "a",
            ":1",
            "a:",
            "a:0",
            "a:70000",
            "a:+8",
            "u@a:1",
            "a:1/x",
            "2001:db8::1",
            "a b:1",
            "a..b:1",
            "a,b:1",
            "999.1.1.1:1",
            "[zz]:1",
            "[::1:1",
        ] {
            assert!(bad.parse::<HostPort>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts_alone_are_names_or_addresses_without_a_port() {
        for (text, with_port) in [
            ("gpu-1.example", "gpu-1.example:8445"),
            ("192.0.2.7", "192.0.2.7:8445"),
            ("2001:db8::1", "[2001:db8::1]:8445"),
            ("[2001:db8::1]", "[2001:db8::1]:8445"),
        ] {
            assert_eq!(text.parse::<Host>().unwrap().with_port(8445), with_port);
        }
        for bad in ["", "a:1", "192.0.2.7:1", "a b", "a/b", "[::1]:1", "u@a"] {
            assert!(bad.parse::<Host>().is_err(), "{bad}");
        }
    }

    #[test]
    fn seeds_are_hosts_and_ports_or_names_of_srv_records() {
        for good in ["a:1", "[::1]:8445", "srv:_isobar-gossip._udp.mesh.example"] {
            assert_eq!(good.parse::<SeedAddress>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "a",
            "srv:",
            "srv:mesh.example",
            "srv:_a.example",
            "srv:_a._udp.b:1",
            "srv:_a._udp.b c",
        ] {
            assert!(bad.parse::<SeedAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn engine_urls_are_plain_http_without_a_path() {
        for good in ["http://127.0.0.1:8001", "http://gpu:1/", "http://[::1]:8001"] {
            assert!(good.parse::<EngineUrl>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "gpu:1",
            "https://gpu:1",
            "grpc://gpu:1",
            "http://gpu",
            "http://gpu:1/v1",
            "http://gpu:1/?a",
            "http://gpu:1#a",
        ] {
            assert!(bad.parse::<EngineUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_cover_a_service_or_one_method() {
        let covers =
            |pattern: &str, path: &str| pattern.parse::<MethodPattern>().unwrap().covers(path);
        assert!(covers("p.S", "/p.S/M") && covers("p.S/M", "/p.S/M"));
        assert!(
            !covers("p.S", "/p.Sx/M") && !covers("p.S/M", "/p.S/Mx") && !covers("p.S", "/q.p.S/M")
        );
        for bad in ["", "/p.S", "p.S/", "p..S", "p.S/M/N", "1p.S", "p S"] {
            assert!(bad.parse::<MethodPattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn health_kinds_are_read_and_shown_alike() {
        for good in ["auto", "kserve", "grpc", "tcp", "http:/health?full=1"] {
            assert_eq!(good.parse::<HealthKind>().unwrap().to_string(), good);
        }
        for bad in ["", "Auto", "http:", "http:health", "https:/x", "http:/a b", "http://x/y"] {
            assert!(bad.parse::<HealthKind>().is_err(), "{bad}");
        }
    }

    #[test]
    fn timeouts_have_units_and_bounds() {
        assert_eq!("1500ms".parse::<Timeout>().unwrap(), Duration::from_millis(1500).into());
        for bad in ["", "5", "0s", "-1s", "25h", "x"] {
            assert!(bad.parse::<Timeout>().is_err(), "{bad}");
        }
    }
}
