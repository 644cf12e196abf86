//! Who may call what: tenants, how they are known, and what they are allowed.
//!
//! These types stand apart from what describes a node, because policy is to become one signed document for all nodes.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use base::TenantName;
use http::Uri;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, SeqAccess, Visitor},
};

use super::{
    Config, ENTRIES_MAX,
    values::{Timeout, ValueError, is_host},
};

/// How often keys are read again, at most.
const REFRESH_MIN: Duration = Duration::from_secs(1);
/// Issuers of tokens, at most.
const ISSUERS_MAX: usize = 16;
/// Longest text of a glob, a claim or a name of a certificate.
const TEXT_BYTES_MAX: usize = 512;
/// Between an issuer and the value of a claim.
const ISSUER_END: char = '#';
/// How a tenant's keys are hashed.
const HASH_REMEDY: &str = "it is not 64 hex digits: write the SHA-256 of the key, never the key itself, \
                           as `printf %s \"$KEY\" | sha256sum` prints it";
/// What the tenant of everybody is called with `--dev`.
const EVERYBODY: &str = "anonymous";

/// How callers say who they are, besides the keys and certificates of tenants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AccessConfig {
    /// The tenant of callers who show nothing: the name of a `[[tenant]]`. Default: none, such callers are refused.
    pub anonymous: Option<TenantName>,
    /// Whose tokens (JWT) are believed, one table each, at most 16.
    pub jwt: Vec<JwtConfig>,
}

/// An issuer of tokens.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JwtConfig {
    /// What the claim `iss` of its tokens must equal: a text of 1 to 512 bytes without `#`, such as `https://login.example`.
    /// Required.
    pub issuer: Claim,
    /// What the claim `aud` of its tokens must contain: a text of 1 to 512 bytes such as "isobar". Required.
    pub audience: Claim,
    /// Where its public keys are, a JWK set: a file, or a URL such as `https://login.example/keys.json`; http only on this
    /// machine. Read again when a token names a key it lacks, every ten seconds at most. Required.
    pub jwks: JwksSource,
    /// The claim that names the tenant: a text of 1 to 512 bytes. Default "sub".
    #[serde(default = "default_claim")]
    pub tenant_claim: Claim,
    /// How often `jwks` is read again: a duration such as "5m", from 1 s to 24 hours. Default "5m".
    #[serde(default = "default_refresh")]
    pub refresh: Timeout,
}

/// A tenant: on whose behalf clients call.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantConfig {
    /// Name of the tenant: 1 to 63 characters of a-z, 0-9 and `-`. Required.
    pub name: TenantName,
    /// SHA-256 of its API keys, never a key itself: 64 hex digits, or a list of such; `printf %s "$KEY" | sha256sum` prints
    /// it. Default: none.
    #[serde(default, deserialize_with = "one_or_many")]
    #[schemars(with = "OneOrMany", extend("writeOnly" = true))]
    pub api_key_sha256: Vec<KeyHash>,
    /// Names in its client certificates, a list of URIs such as "spiffe://mesh.example/client/eu/search" or DNS names;
    /// needs `tls.client_ca`. Default: none.
    #[serde(default)]
    pub certificates: Vec<CertificateName>,
    /// Values of the tenant claim of its tokens, a list of texts of 1 to 512 bytes such as "search-app"; with the issuer
    /// before it, `https://login.example#search-app`, where there are several or the value has a `#` in it. Needs
    /// `[[access.jwt]]`. Default: none, no token is this tenant's.
    #[serde(default)]
    pub jwt: Vec<TenantClaim>,
}

/// What tenants may call. Nothing else may be called.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AllowConfig {
    /// For whom: the name of a `[[tenant]]`, in which `*` stands for any characters. Required.
    pub tenant: Glob,
    /// Models that may be called, a list of names in which `*` stands for any characters; calls in which no model can be
    /// read are then not covered. Default: any model, and calls that name none.
    #[serde(default)]
    pub models: Option<Vec<Glob>>,
    /// Services that may be called, a list of "package.Service" or "package.Service/Method" in which `*` stands for any
    /// characters. Default: any.
    #[serde(default)]
    pub services: Option<Vec<ServiceGlob>>,
}

#[expect(clippy::expect_used, reason = "a literal, and a test reads it")]
fn default_claim() -> Claim {
    "sub".parse().expect("a claim")
}

fn default_refresh() -> Timeout {
    Duration::from_secs(300).into()
}

/// A text tokens carry: the name of a claim, or the value of one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim(String);

impl Claim {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Claim {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        plain_text(text).map(|text| Self(text.to_owned()))
    }
}

/// A value of the claim that names the tenant, of one issuer (`issuer#value`) or of the only one (`value`).
#[derive(Clone, PartialEq, Eq)]
pub struct TenantClaim {
    issuer: Option<Claim>,
    value: Claim,
}

impl TenantClaim {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.issuer {
            Some(issuer) => write!(f, "{issuer}{ISSUER_END}{}", self.value),
            None => self.value.show(f),
        }
    }
}

impl FromStr for TenantClaim {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        // No issuer has one in its name, so the first ends it.
        let Some((issuer, value)) = text.split_once(ISSUER_END) else {
            return Ok(Self { issuer: None, value: text.parse()? });
        };
        Ok(Self { issuer: Some(issuer.parse()?), value: value.parse()? })
    }
}

fn plain_text(text: &str) -> Result<&str, ValueError> {
    if (1..=TEXT_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control) {
        Ok(text)
    } else {
        Err(ValueError::new("it is not 1 to 512 bytes without control characters"))
    }
}

/// Where the public keys of an issuer are.
#[derive(Clone, PartialEq, Eq)]
pub enum JwksSource {
    /// A file.
    File(PathBuf),
    /// Over https, or http on this machine.
    Url(Uri),
}

impl JwksSource {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Url(url) => write!(f, "{url}"),
        }
    }
}

impl FromStr for JwksSource {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let text = plain_text(text)?;
        if !text.contains("://") {
            return Ok(Self::File(Path::new(text).to_owned()));
        }
        let url: Uri = text.parse().map_err(|_| ValueError::new("it is not a URL"))?;
        let host = url.host().unwrap_or_default();
        if host.is_empty() || url.authority().is_some_and(|all| all.as_str().contains('@')) {
            return Err(ValueError::new("its URL names no host, or a user"));
        }
        match url.scheme_str() {
            Some("https") => Ok(Self::Url(url)),
            Some("http") if is_loopback(host) => Ok(Self::Url(url)),
            Some("http") => Err(ValueError::new(
                "whoever stands between could replace keys that come over http: use https",
            )),
            _ => Err(ValueError::new("it begins with neither https:// nor http://")),
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The SHA-256 of an API key. Shown nowhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(…)")
    }
}

impl FromStr for KeyHash {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let bytes = data_encoding::HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| ValueError::new(HASH_REMEDY))
    }
}

/// The schema of one hash or several.
struct OneOrMany;

impl JsonSchema for OneOrMany {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "OneOrMany".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let one = json_schema!({ "type": "string", "pattern": "^[0-9a-fA-F]{64}$" });
        json_schema!({ "anyOf": [one, { "type": "array", "items": one }] })
    }
}

/// Reads a hash or a list of them. What is neither is not repeated: it may be a key.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<KeyHash>, D::Error> {
    struct Hashes;

    impl<'de> Visitor<'de> for Hashes {
        type Value = Vec<KeyHash>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("64 hex digits, or a list of such")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            text.parse().map(|hash| vec![hash]).map_err(E::custom)
        }

        fn visit_i64<E: de::Error>(self, _: i64) -> Result<Self::Value, E> {
            Err(E::custom(HASH_REMEDY))
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
            let mut hashes = Vec::new();
            while let Some(text) = items.next_element::<toml::Value>()? {
                let text = text.as_str().unwrap_or_default();
                hashes.push(text.parse().map_err(de::Error::custom)?);
            }
            Ok(hashes)
        }
    }

    deserializer.deserialize_any(Hashes)
}

/// A name in a client certificate: a URI, or a DNS name in lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CertificateName(String);

impl CertificateName {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for CertificateName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let text = plain_text(text)?;
        if text.contains("://") && text.is_ascii() && !text.contains(' ') {
            Ok(Self(text.to_owned()))
        } else if is_host(text) && text.bytes().any(|b| b.is_ascii_alphabetic()) {
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err(ValueError::new("it is neither a URI nor a DNS name"))
        }
    }
}

/// A text in which `*` stands for any characters, none included.
#[derive(Clone, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    /// Whether it covers `text`.
    #[must_use]
    pub fn covers(&self, text: &str) -> bool {
        covers(&self.0, text)
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Glob {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        plain_text(text).map(|text| Self(text.to_owned()))
    }
}

/// Each part between stars where it first fits: what comes later has most room then, so nothing is tried twice.
fn covers(glob: &str, text: &str) -> bool {
    let mut parts = glob.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Services, or single methods, in which `*` stands for any characters.
#[derive(Clone, PartialEq, Eq)]
pub struct ServiceGlob(String);

impl ServiceGlob {
    /// Whether it covers the method at `path`, which is `/package.Service/Method`.
    #[must_use]
    pub fn covers(&self, path: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return false };
        if self.0.contains('/') {
            return covers(&self.0, path);
        }
        path.split_once('/').is_some_and(|(service, _)| covers(&self.0, service))
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ServiceGlob {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let is_word = |word: &str| {
            !word.is_empty()
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'*')
        };
        let (service, method) = text.split_once('/').map_or((text, None), |(s, m)| (s, Some(m)));
        let is_good = text.len() <= TEXT_BYTES_MAX
            && service.split('.').all(is_word)
            && method.is_none_or(is_word);
        if is_good {
            Ok(Self(text.to_owned()))
        } else {
            Err(ValueError::new(
                "it is no package.Service or package.Service/Method, with * for any characters",
            ))
        }
    }
}

super::values::text_value! {
    Claim "^[^\\x00-\\x1f\\x7f]{1,512}$"
    TenantClaim "^([^#\\x00-\\x1f\\x7f]{1,512}#[^\\x00-\\x1f\\x7f]{1,512}|[^#\\x00-\\x1f\\x7f]{1,512})$"
    JwksSource "^[^\\x00-\\x1f\\x7f]{1,512}$"
    CertificateName "^[^\\x00-\\x20\\x7f]{1,512}$"
    Glob "^[^\\x00-\\x1f\\x7f]{1,512}$"
    ServiceGlob "^[A-Za-z0-9_*]+(\\.[A-Za-z0-9_*]+)*(/[A-Za-z0-9_*]+)?$"
}

impl Config {
    /// Lets everybody call everything, unless the file says who may; returns sentences that say what was opened, none when
    /// nothing was.
    pub fn open_for_development(&mut self) -> Vec<String> {
        let says_nothing = self.access == AccessConfig::default()
            && self.tenants.is_empty()
            && self.allow.is_empty()
            && self.tls.client_ca.is_none();
        let (Ok(name), Ok(tenant)) = (EVERYBODY.parse::<TenantName>(), EVERYBODY.parse()) else {
            return Vec::new();
        };
        if !says_nothing {
            return Vec::new();
        }
        self.access.anonymous = Some(name.clone());
        let tenant_of_all =
            TenantConfig { name, api_key_sha256: vec![], certificates: vec![], jwt: vec![] };
        self.tenants.push(tenant_of_all);
        self.allow.push(AllowConfig { tenant, models: None, services: None });
        let opened =
            |address| format!("anybody who reaches {address} may call every model and service");
        let ports = [Some(self.listen.clients), self.listen.plaintext];
        ports.into_iter().flatten().map(opened).collect()
    }

    /// Whether nobody at all may call.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.callers().next().is_none()
    }

    /// Who may call, in a sentence without an end.
    #[must_use]
    pub fn who_may_call(&self) -> String {
        let names: Vec<_> = self.callers().map(|tenant| tenant.name.as_str()).collect();
        if names.is_empty() {
            return "nobody may call: add [[tenant]] and [[allow]], or access.anonymous".to_owned();
        }
        let anonymous =
            self.access.anonymous.as_ref().filter(|name| names.contains(&name.as_str()));
        let anonymous = anonymous.map(|name| format!(" (callers who show nothing are {name})"));
        format!("{} may call{}", names.join(", "), anonymous.unwrap_or_default())
    }

    /// Tenants that may call something and can be known.
    fn callers(&self) -> impl Iterator<Item = &TenantConfig> {
        let is_known = |tenant: &TenantConfig| {
            let by_token =
                self.access.jwt.iter().any(|jwt| {
                    tenant.claims(&self.access).any(|(issuer, _)| *issuer == jwt.issuer)
                });
            let is_anonymous = self.access.anonymous.as_ref() == Some(&tenant.name);
            let by_own = !tenant.api_key_sha256.is_empty() || !tenant.certificates.is_empty();
            by_token || is_anonymous || by_own
        };
        let may_call = |tenant: &TenantConfig| {
            self.allow.iter().any(|rule| rule.tenant.covers(tenant.name.as_str()))
        };
        self.tenants.iter().filter(move |tenant| is_known(tenant) && may_call(tenant))
    }
}

/// What no single key shows: key and problem of each fault.
pub(super) fn check(config: &Config) -> Vec<(String, String)> {
    let mut faults = Faults(Vec::new());
    faults.names(config);
    faults.credentials(config);
    faults.issuers(config);
    faults.rules(config);
    let counts = [
        ("tenant", config.tenants.len(), ENTRIES_MAX),
        ("allow", config.allow.len(), ENTRIES_MAX),
        ("access.jwt", config.access.jwt.len(), ISSUERS_MAX),
    ];
    for (key, count, most) in counts {
        if count > most {
            faults.add(key, format!("{count} are more than {most}"));
        }
    }
    faults.0
}

struct Faults(Vec<(String, String)>);

impl Faults {
    fn add(&mut self, key: impl Into<String>, problem: impl Into<String>) {
        self.0.push((key.into(), problem.into()));
    }

    fn names(&mut self, config: &Config) {
        let mut names = BTreeMap::new();
        for (index, tenant) in config.tenants.iter().enumerate() {
            if names.insert(&tenant.name, index).is_some() {
                self.add(
                    format!("tenant[{index}].name"),
                    format!("two tenants are called {}", tenant.name),
                );
            }
        }
        if let Some(name) =
            config.access.anonymous.as_ref().filter(|name| !names.contains_key(name))
        {
            self.add("access.anonymous", nobody(&format!("{name}"), config));
        }
    }

    /// A credential is one tenant's.
    fn credentials(&mut self, config: &Config) {
        let (mut keys, mut certificates, mut claims) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (index, tenant) in config.tenants.iter().enumerate() {
            for hash in &tenant.api_key_sha256 {
                if let Some(other) = keys.insert(hash, &tenant.name) {
                    self.add(
                        format!("tenant[{index}].api_key_sha256"),
                        format!("{other} has one of these hashes already: each key is one tenant's, once"),
                    );
                }
            }
            for name in &tenant.certificates {
                if let Some(other) = certificates.insert(name, &tenant.name) {
                    self.add(
                        format!("tenant[{index}].certificates"),
                        format!("{name} is a certificate of {other} already"),
                    );
                }
            }
            for claim in tenant.claims(&config.access) {
                if let Some(other) =
                    claims.insert(claim, &tenant.name).filter(|o| **o != tenant.name)
                {
                    self.add(
                        format!("tenant[{index}].jwt"),
                        format!("{} stands for {other} already", claim.1),
                    );
                }
            }
            if let Some(problem) = tenant.jwt.iter().find_map(|c| no_issuer(c, &config.access)) {
                self.add(format!("tenant[{index}].jwt"), problem);
            }
            if !tenant.certificates.is_empty() && config.tls.client_ca.is_none() {
                self.add(
                    format!("tenant[{index}].certificates"),
                    "clients are asked for a certificate only with tls.client_ca: set it",
                );
            }
        }
    }

    fn issuers(&mut self, config: &Config) {
        let mut pairs = BTreeMap::new();
        for (index, jwt) in config.access.jwt.iter().enumerate() {
            if pairs.insert((&jwt.issuer, &jwt.audience), index).is_some() {
                self.add(
                    format!("access.jwt[{index}].issuer"),
                    format!("{} is listed twice for {}", jwt.issuer, jwt.audience),
                );
            }
            if jwt.issuer.as_str().contains(ISSUER_END) {
                self.add(
                    format!("access.jwt[{index}].issuer"),
                    format!("{} has a {ISSUER_END} in it, which ends an issuer's name in `jwt` of a [[tenant]]", jwt.issuer),
                );
            }
            if Duration::from(jwt.refresh) < REFRESH_MIN {
                self.add(
                    format!("access.jwt[{index}].refresh"),
                    format!("{} is shorter than {REFRESH_MIN:?}", jwt.refresh),
                );
            }
        }
    }

    fn rules(&mut self, config: &Config) {
        for (index, rule) in config.allow.iter().enumerate() {
            if !config.tenants.iter().any(|tenant| rule.tenant.covers(tenant.name.as_str())) {
                self.add(format!("allow[{index}].tenant"), nobody(&rule.tenant.0, config));
            }
            let lists = [
                ("models", rule.models.as_ref().map(Vec::len)),
                ("services", rule.services.as_ref().map(Vec::len)),
            ];
            for (key, _) in lists.iter().filter(|(_, length)| *length == Some(0)) {
                self.add(
                    format!("allow[{index}].{key}"),
                    format!(
                        "it is empty, and so allows nothing: leave it out for any of the {key}"
                    ),
                );
            }
        }
    }
}

impl TenantConfig {
    /// The values of the tenant claim that mean it, each with the issuer that must say so.
    pub(crate) fn claims<'a>(
        &'a self,
        access: &'a AccessConfig,
    ) -> impl Iterator<Item = (&'a Claim, &'a Claim)> {
        let only = access.only_issuer();
        self.jwt.iter().filter_map(move |claim| {
            claim.issuer.as_ref().or(only).map(|issuer| (issuer, &claim.value))
        })
    }
}

impl AccessConfig {
    /// The one issuer whose tokens are believed, for however many audiences.
    fn only_issuer(&self) -> Option<&Claim> {
        let first = &self.jwt.first()?.issuer;
        self.jwt.iter().all(|jwt| jwt.issuer == *first).then_some(first)
    }
}

/// Why no issuer, or not just one, can make the claim.
fn no_issuer(claim: &TenantClaim, access: &AccessConfig) -> Option<String> {
    let first = match access.jwt.first() {
        Some(first) => &first.issuer,
        None => return Some("nobody's tokens are believed: add [[access.jwt]]".to_owned()),
    };
    match &claim.issuer {
        Some(issuer) if access.jwt.iter().all(|jwt| jwt.issuer != *issuer) => Some(format!(
            "{claim} is of the issuer {issuer}, whose tokens are not believed: add an [[access.jwt]], or write the issuer as \
             it stands there; a value with {ISSUER_END} in it needs its issuer before it: \"{first}{ISSUER_END}{claim}\""
        )),
        None if access.only_issuer().is_none() => Some(format!(
            "any of several issuers could say {claim}: write whose it is, as \"{first}{ISSUER_END}{claim}\""
        )),
        _ => None,
    }
}

fn nobody(name: &str, config: &Config) -> String {
    let known: Vec<_> = config.tenants.iter().map(|tenant| tenant.name.as_str()).take(20).collect();
    if known.is_empty() {
        format!("there is no tenant {name}: add a [[tenant]]")
    } else {
        format!("there is no tenant {name}: add a [[tenant]], or name one of {}", known.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (glob, text) in [
            ("llama", "llama"),
            ("llama-*", "llama-"),
            ("llama-*", "llama-3-8b"),
            ("*", ""),
            ("*", "anything at all"),
            ("*-8b", "llama-3-8b"),
            ("a*b*c", "abc"),
            ("a*b*c", "a-b-b-c"),
            ("*a*", "xax"),
            ("a**b", "ab"),
        ] {
            assert!(glob.parse::<Glob>().unwrap().covers(text), "{glob} {text}");
        }
        for (glob, text) in [
            ("llama", "llama-3"),
            ("llama", "Llama"),
            ("llama-*", "llama"),
            ("a*a", "a"),
            ("ab*bc", "abc"),
            ("a*b*c", "acb"),
            ("*-8b", "llama-3-8bx"),
        ] {
            assert!(!glob.parse::<Glob>().unwrap().covers(text), "{glob} {text}");
        }
    }

    #[test]
    fn services_are_covered_whole_or_by_method() {
        let covers = |glob: &str, path: &str| glob.parse::<ServiceGlob>().unwrap().covers(path);
        assert!(covers("p.S", "/p.S/M") && covers("p.S/M", "/p.S/M") && covers("p.*", "/p.q.S/M"));
        assert!(
            covers("p.S/Get*", "/p.S/GetAll")
                && covers("*", "/p.S/M")
                && covers("*/Get", "/p.S/Get")
        );
        assert!(
            !covers("p.S", "/p.Sx/M") && !covers("p.S", "/q.p.S/M") && !covers("p.S/M", "/p.S/Mx")
        );
        assert!(!covers("p.*", "/q.S/M") && !covers("*", "p.S/M") && !covers("*", "/p.S"));
        for bad in ["", "/p.S", "p.S/", "p..S", "p.S/M/N", "p S", "p.S/M N"] {
            assert!(bad.parse::<ServiceGlob>().is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_come_from_files_or_over_what_nobody_can_change() {
        for good in [
            "keys.json",
            "/etc/keys.json",
            "https://login.example/k",
            "http://127.0.0.1:1/k",
            "http://localhost/k",
            "http://[::1]:8/k",
        ] {
            assert!(good.parse::<JwksSource>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "http://login.example/k",
            "ftp://x/k",
            "https://",
            "https://u@x/k",
            "http://127.0.0.1.example/k",
        ] {
            assert!(bad.parse::<JwksSource>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_hash_is_hex_and_is_shown_nowhere() {
        let hash: KeyHash = "AB".repeat(32).parse().unwrap();
        assert_eq!(hash.bytes(), &[0xab; 32]);
        assert_eq!(format!("{hash:?}"), "KeyHash(…)");
        for bad in ["", "ab", "sk-secret-key", &"zz".repeat(32), &"ab".repeat(33)] {
            let error = bad.parse::<KeyHash>().unwrap_err().to_string();
            assert!(error.contains("sha256sum"), "{error}");
            assert!(bad.is_empty() || bad == "ab" || !error.contains(bad), "{error}");
        }
    }

    #[test]
    fn names_of_certificates_are_uris_or_hosts() {
        for good in ["spiffe://mesh.example/client/eu/search", "search.example", "localhost"] {
            assert_eq!(good.parse::<CertificateName>().unwrap().as_str(), good);
        }
        assert_eq!("Search.Example".parse::<CertificateName>().unwrap().as_str(), "search.example");
        for bad in ["", "a b", "10.0.0.1", "CN=search", "spiffe://a b"] {
            assert!(bad.parse::<CertificateName>().is_err(), "{bad}");
        }
    }
}
