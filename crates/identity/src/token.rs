//! What a join token is: one line of text with which its holder joins a mesh as somebody, once or a few times.
//!
//! ```text
//! isobar-join-1.<base64url of: length of the payload, payload, first 4 bytes of its SHA-256>
//! ```
//!
//! The checksum is for people: a text that was cut or mistyped is recognised where it was pasted. What makes a token
//! good is that the authority knows the hash of the whole text.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};
use base::{NodeName, RegionName, TrustDomain};
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use prost::Message as _;
use proto::isobar::mesh::v1::JoinToken;

use crate::{IdentityError, Role};

const KIND: &str = "isobar-join-";
const VERSION: &str = "1";
const CHECKSUM_BYTES: usize = 4;
/// Longest text that is looked at.
const TEXT_MAX_BYTES: usize = 8 * 1024;
/// Most places a token may name.
pub(crate) const SEEDS_MAX: usize = 16;
/// Longest place: a DNS name and a port.
const SEED_MAX_BYTES: usize = 262;
/// Around the year 9800: later moments cannot be written as text.
const LATEST_S: u64 = 247_000_000_000;
/// Longest pattern: as long as the longest name.
const PATTERN_MAX_BYTES: usize = 63;

/// Who may join: a name, or a pattern in which `*` stands for any characters, none included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern(String);

impl NamePattern {
    /// Whether `name` is meant.
    #[must_use]
    pub fn matches(&self, name: &NodeName) -> bool {
        glob(self.0.as_bytes(), name.as_str().as_bytes())
    }

    /// The name, unless this is a pattern.
    #[must_use]
    pub fn only_name(&self) -> Option<NodeName> {
        self.0.parse().ok()
    }

    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&NodeName> for NamePattern {
    fn from(name: &NodeName) -> Self {
        Self(name.as_str().into())
    }
}

impl FromStr for NamePattern {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if !text.contains('*') {
            let name = text.parse::<NodeName>();
            return name
                .map(|name| Self::from(&name))
                .map_err(|e| IdentityError::Scope(e.to_string()));
        }
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'*';
        if !(1..=PATTERN_MAX_BYTES).contains(&text.len()) || !text.bytes().all(fits) {
            return Err(IdentityError::Scope(
                "a name pattern is 1 to 63 characters of a-z, 0-9, `-` and `*`, such as gpu-*"
                    .into(),
            ));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `text` is `pattern`. Each star is tried at its earliest place first, and only the last one is tried again:
/// no pattern takes more than |pattern| × |text| steps.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(byte) if *byte == text[t] => (p, t) = (p + 1, t + 1),
            _ => {
                let Some((after, from)) = star else { return false };
                star = Some((after, from + 1));
                (p, t) = (after, from + 1);
            }
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Why a text is no token. The text is never repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Something else was given.
    #[error(
        "this is not a join token: a token is one line that begins with isobar-join-1. and comes from `isobar ca token`"
    )]
    NotAToken,
    /// The end is missing.
    #[error("the join token is cut short: copy the whole line")]
    Truncated,
    /// A character is not what it was.
    #[error("the join token is damaged: copy it again, whole and unchanged")]
    Damaged,
    /// Made by a later isobar.
    #[error(
        "the join token is of a newer kind than this isobar knows: update isobar on this machine"
    )]
    Newer,
}

/// A join token. Whoever has its text can use it, so neither `Debug` nor an error shows it; [`Self::reveal`] does.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub(crate) id: [u8; 16],
    pub(crate) secret: [u8; 32],
    pub(crate) trust_domain: TrustDomain,
    pub(crate) root_fingerprint: [u8; 32],
    pub(crate) names: NamePattern,
    pub(crate) region: RegionName,
    pub(crate) role: Role,
    pub(crate) expires_at: SystemTime,
    pub(crate) seeds: Vec<String>,
}

impl Token {
    /// The text, to be handed to whoever shall join and to nobody else.
    #[must_use]
    pub fn reveal(&self) -> String {
        let payload = self.payload().encode_to_vec();
        // Names and seeds are bounded: this holds whatever they are, and `FromStr` notices if it ever does not.
        let length = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
        let bytes = [length.as_slice(), &payload, &checksum(&payload)].concat();
        format!("{KIND}{VERSION}.{}", BASE64URL_NOPAD.encode(&bytes))
    }

    /// Under which the authority keeps it: safe to show, in hexadecimal.
    #[must_use]
    pub fn id(&self) -> String {
        HEXLOWER.encode(&self.id)
    }

    /// The mesh it is for.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// SHA-256 of the DER of the root under which the authority proves itself, before anything is said to it.
    #[must_use]
    pub fn root_fingerprint(&self) -> [u8; 32] {
        self.root_fingerprint
    }

    /// Who may join with it.
    #[must_use]
    pub fn names(&self) -> &NamePattern {
        &self.names
    }

    /// Where whoever joins with it is.
    #[must_use]
    pub fn region(&self) -> &RegionName {
        &self.region
    }

    /// What whoever joins with it becomes.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The moment from which it is refused, in whole seconds.
    #[must_use]
    pub fn expires_at(&self) -> SystemTime {
        self.expires_at
    }

    /// Where to redeem it, as host:port; may be empty.
    #[must_use]
    pub fn seeds(&self) -> &[String] {
        &self.seeds
    }

    fn payload(&self) -> JoinToken {
        let expires = self.expires_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        JoinToken {
            id: self.id.into(),
            secret: self.secret.into(),
            trust_domain: self.trust_domain.to_string(),
            root_fingerprint: self.root_fingerprint.into(),
            names: self.names.to_string(),
            region: self.region.to_string(),
            roles: vec![self.role.to_string()],
            expires_at_s: expires.as_secs(),
            seeds: self.seeds.clone(),
        }
    }

    /// `None`: a field is not what its name says.
    fn from_payload(payload: JoinToken) -> Option<Self> {
        let [role] = payload.roles.as_slice() else { return None };
        let seeds = payload.seeds;
        if payload.expires_at_s > LATEST_S {
            return None;
        }
        if role != Role::Node.as_str() || seeds.len() > SEEDS_MAX || !seeds.iter().all(is_seed) {
            return None;
        }
        Some(Self {
            id: payload.id.try_into().ok()?,
            secret: payload.secret.try_into().ok()?,
            trust_domain: payload.trust_domain.parse().ok()?,
            root_fingerprint: payload.root_fingerprint.try_into().ok()?,
            names: payload.names.parse().ok()?,
            region: payload.region.parse().ok()?,
            role: Role::Node,
            expires_at: UNIX_EPOCH + Duration::from_secs(payload.expires_at_s),
            seeds,
        })
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let rest = text.strip_prefix(KIND).ok_or(TokenError::NotAToken)?;
        if text.len() > TEXT_MAX_BYTES {
            return Err(TokenError::NotAToken);
        }
        let (version, body) = rest.split_once('.').ok_or(TokenError::Truncated)?;
        match version.parse::<u32>() {
            Ok(1) if version == VERSION => {}
            Ok(2..) => return Err(TokenError::Newer),
            _ => return Err(TokenError::NotAToken),
        }
        let token = decode(body)?;
        // One spelling only: the authority knows the hash of it.
        if token.reveal() == text { Ok(token) } else { Err(TokenError::Damaged) }
    }
}

/// The length in front tells a text that was cut from one that was changed.
fn decode(body: &str) -> Result<Token, TokenError> {
    let bytes = BASE64URL_NOPAD.decode(body.as_bytes());
    let bytes = bytes.or_else(|_| decode_cut(body)).map_err(|_| TokenError::Damaged)?;
    let (length, rest) = bytes.split_first_chunk::<2>().ok_or(TokenError::Truncated)?;
    let length = usize::from(u16::from_be_bytes(*length));
    if rest.len() < length + CHECKSUM_BYTES {
        return Err(TokenError::Truncated);
    }
    let (payload, checksum) = rest.split_at(length);
    if checksum != self::checksum(payload) {
        return Err(TokenError::Damaged);
    }
    let payload = JoinToken::decode(payload).map_err(|_| TokenError::Damaged)?;
    Token::from_payload(payload).ok_or(TokenError::Damaged)
}

/// What is whole of a text that ends amid a group.
fn decode_cut(body: &str) -> Result<Vec<u8>, data_encoding::DecodeError> {
    let groups = body.len() / 4 * 4;
    BASE64URL_NOPAD.decode(body.as_bytes().get(..groups).unwrap_or_default())
}

fn checksum(payload: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash = digest(&SHA256, payload);
    std::array::from_fn(|i| hash.as_ref().get(i).copied().unwrap_or_default())
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Token");
        shown.field("id", &self.id()).field("trust_domain", &self.trust_domain);
        shown.field("names", &self.names.0).field("region", &self.region);
        shown.finish_non_exhaustive()
    }
}

/// Whether a text is host:port, as far as a look at it can tell.
#[expect(clippy::ptr_arg, reason = "to be handed to `all` as it is")]
pub(crate) fn is_seed(text: &String) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let visible = |b: u8| b.is_ascii_graphic();
    !host.is_empty()
        && text.len() <= SEED_MAX_BYTES
        && host.bytes().all(visible)
        && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::random;

    fn token() -> Token {
        Token {
            id: [1; 16],
            secret: [0xAB; 32],
            trust_domain: "mesh.test".parse().unwrap(),
            root_fingerprint: [3; 32],
            names: "gpu-*".parse().unwrap(),
            region: "eu".parse().unwrap(),
            role: Role::Node,
            expires_at: UNIX_EPOCH + Duration::from_secs(1_800_000_000),
            seeds: vec!["a.example:7440".into(), "[::1]:7440".into()],
        }
    }

    #[test]
    fn a_token_comes_back_from_its_text() {
        let text = token().reveal();
        assert!(text.starts_with("isobar-join-1."), "{text}");
        assert_eq!(format!(" {text}\n").parse::<Token>(), Ok(token()));
    }

    #[test]
    fn what_went_wrong_with_a_text_is_said() {
        let text = token().reveal();
        for (bad, error) in [
            (String::new(), TokenError::NotAToken),
            ("hello".into(), TokenError::NotAToken),
            ("isobar-join-x.AA".into(), TokenError::NotAToken),
            ("isobar-join-01.AA".into(), TokenError::NotAToken),
            (format!("isobar-join-1.{}", "A".repeat(TEXT_MAX_BYTES)), TokenError::NotAToken),
            ("isobar-join-1".into(), TokenError::Truncated),
            ("isobar-join-1.".into(), TokenError::Truncated),
            (text.replace("-1.", "-2."), TokenError::Newer),
            (text.replace('.', ".*"), TokenError::Damaged),
            (format!("{text}AAAA"), TokenError::Damaged),
        ] {
            assert_eq!(bad.parse::<Token>(), Err(error), "{bad}");
        }
        for cut in KIND.len() + 1..text.len() {
            assert_eq!(text[..cut].parse::<Token>(), Err(TokenError::Truncated), "{cut}");
        }
    }

    #[test]
    fn a_character_that_changed_is_noticed_wherever_it_is() {
        let text = token().reveal();
        for at in 0..text.len() {
            for other in ['A', 'b', '7', '_', '.', '='] {
                let mut changed = text.clone();
                changed.replace_range(at..=at, &other.to_string());
                assert!(changed == text || changed.parse::<Token>().is_err(), "{at} {other}");
            }
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic() {
        for length in 0..2_000 {
            let noise = random::<64>().unwrap().repeat(4);
            let body = BASE64URL_NOPAD.encode(&noise[..length % noise.len()]);
            assert!(format!("isobar-join-1.{body}").parse::<Token>().is_err());
            // With a checksum that is right.
            let length = u16::try_from(noise.len()).unwrap().to_be_bytes();
            let bytes = [length.as_slice(), &noise, &checksum(&noise)].concat();
            let body = BASE64URL_NOPAD.encode(&bytes);
            assert!(format!("isobar-join-1.{body}").parse::<Token>().is_err());
        }
    }

    #[test]
    fn a_token_is_never_shown_by_accident() {
        let token = token();
        let shown = format!("{token:?} {token:#?} {:?}", token.payload());
        let secret = BASE64URL_NOPAD.encode(&token.secret);
        assert!(!shown.contains(&secret[..8]) && !shown.contains("171"), "{shown}");
        assert!(!shown.contains(&token.reveal()), "{shown}");
    }

    #[test]
    fn patterns_mean_what_shells_mean() {
        for (pattern, name, matches) in [
            ("gpu-1", "gpu-1", true),
            ("gpu-1", "gpu-12", false),
            ("gpu-*", "gpu-12", true),
            ("gpu-*", "gpu", false),
            ("*", "a", true),
            ("*-1", "gpu-1-1", true),
            ("a*b*c", "axxbxbxc", true),
            ("a*b*c", "axxbxbx", false),
            ("**a", "ba", true),
        ] {
            let found: NamePattern = pattern.parse().unwrap();
            assert_eq!(found.matches(&name.parse().unwrap()), matches, "{pattern} {name}");
        }
        for bad in ["", "GPU-*", "gpu ?", "gpu/*", &"a".repeat(64)] {
            assert!(bad.parse::<NamePattern>().is_err(), "{bad}");
        }
    }
}
