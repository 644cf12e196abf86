//! Which tokens an authority has handed out, what they are good for, and who has used them.
//!
//! `tokens/<id>.json`, one file a token, holds the hash of the token's text and never the text: whoever reads the
//! directory can join nothing with it.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{SHA256, digest},
};
use base::{NodeName, RegionName};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use super::{
    issuing::text,
    place::Place,
    refusal::{Ask, Refusal},
};
use crate::{
    IdentityError, NamePattern, Role, Token, files,
    revocation::milliseconds,
    token::{SEEDS_MAX, is_seed},
};

/// Most tokens that are kept.
const TOKENS_MAX: usize = 4_096;
/// Most uses of one token.
const USES_MAX: u32 = 1_024;
/// Shortest and longest time a token is good for.
const TTL: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(7 * 24 * 60 * 60));
/// How long an expired token is still recognised.
const KEEP_EXPIRED: Duration = Duration::from_secs(24 * 60 * 60);
/// The file of a token has at most [`USES_MAX`] redemptions of about 200 bytes.
const FILE_MAX_BYTES: usize = 512 * 1024;

/// What a token shall be good for.
#[derive(Clone, Debug)]
pub struct TokenScope {
    /// Who may join with it.
    pub names: NamePattern,
    /// How many may; 1 unless `names` is a pattern, 1,024 at most.
    pub uses: u32,
    /// Where they are.
    pub region: RegionName,
    /// What they become: only nodes join.
    pub role: Role,
    /// How long it is good, from 1 second to 7 days.
    pub ttl: Duration,
    /// Where it can be redeemed, as host:port, at most 16; may be empty.
    pub seeds: Vec<String>,
}

impl TokenScope {
    /// Whether a token may say so.
    pub(crate) fn check(&self) -> Result<(), IdentityError> {
        let refused = |why: &str| Err(IdentityError::Scope(why.into()));
        match self.role {
            Role::Node => {}
            Role::Authority => {
                return refused(
                    "no token makes an authority: it needs the issuing key, which no token carries; \
                     copy the directory of an authority to that machine and name it in [authority]",
                );
            }
            Role::Client | Role::Operator => {
                return refused(
                    "only nodes join with a token: use `isobar ca issue` for clients and operators",
                );
            }
        }
        let most = if self.names.only_name().is_some() { 1 } else { USES_MAX };
        if self.uses == 0 || self.uses > most {
            return refused(
                "a token for one name has one use, and one for a pattern has 1 to 1,024",
            );
        }
        if self.ttl < TTL.0 || self.ttl > TTL.1 {
            return refused("a token is good for 1s to 7d: 10m suits most uses");
        }
        if self.seeds.len() > SEEDS_MAX || !self.seeds.iter().all(is_seed) {
            return refused("a token names at most 16 seeds, each as HOST:PORT");
        }
        Ok(())
    }
}

/// A use of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redemption {
    /// Who joined.
    pub name: NodeName,
    /// When, in whole milliseconds.
    pub at: SystemTime,
    /// From which address.
    pub remote: String,
}

/// A token as its authority knows it.
#[derive(Clone, Debug)]
pub struct TokenStatus {
    /// Under which it is kept.
    pub id: String,
    /// Who may join with it.
    pub names: NamePattern,
    /// Where.
    pub region: RegionName,
    /// When it was made.
    pub issued_at: SystemTime,
    /// The moment from which it is refused.
    pub expires_at: SystemTime,
    /// How many more may join with it.
    pub uses_left: u32,
    /// Who has.
    pub redemptions: Vec<Redemption>,
}

/// One file.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Kept {
    /// The directory it was made in: what is found in a copy of that was not made there.
    origin: Origin,
    /// SHA-256 of the text, in hexadecimal.
    sha256: String,
    names: String,
    region: RegionName,
    role: String,
    issued_at_ms: u64,
    expires_at_s: u64,
    uses_left: u32,
    redemptions: Vec<Used>,
}

/// Which directory `tokens` is. It is the same wherever it is moved to, and none of its copies is: each of those would
/// let the same token in once more.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Origin {
    inode: u64,
    /// In nanoseconds, where the file system knows it: inodes of two machines can have one number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    born_ns: Option<u64>,
}

impl Origin {
    pub(crate) fn of(place: &Place) -> Result<Self, IdentityError> {
        let path = place.tokens();
        let found = fs::metadata(&path).map_err(files::failed("look at", &path))?;
        let born = found.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        let born_ns = born.and_then(|born| u64::try_from(born.as_nanos()).ok());
        Ok(Self { inode: found.ino(), born_ns })
    }

    fn is(self, other: Self) -> bool {
        let born = self.born_ns.zip(other.born_ns);
        self.inode == other.inode && born.is_none_or(|(one, other)| one == other)
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Used {
    name: NodeName,
    at_ms: u64,
    remote: String,
}

impl Kept {
    pub(crate) fn new(token: &Token, uses: u32, origin: Origin, now: SystemTime) -> Self {
        let expires = token.expires_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            origin,
            sha256: HEXLOWER.encode(digest(&SHA256, token.reveal().as_bytes()).as_ref()),
            names: token.names.to_string(),
            region: token.region.clone(),
            role: token.role.to_string(),
            issued_at_ms: milliseconds(now),
            expires_at_s: expires.as_secs(),
            uses_left: uses,
            redemptions: Vec::new(),
        }
    }

    pub(crate) fn issued_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.issued_at_ms)
    }

    fn expires_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.expires_at_s)
    }

    /// Whether `ask` may use the token, of which it has shown `token`, in the directory `here`.
    pub(crate) fn admit(
        &self,
        token: &Token,
        ask: &Ask<'_>,
        here: Origin,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let shown = HEXLOWER.encode(digest(&SHA256, token.reveal().as_bytes()).as_ref());
        verify_slices_are_equal(shown.as_bytes(), self.sha256.as_bytes())
            .map_err(|_| Refusal::Tampered)?;
        if !self.origin.is(here) {
            return Err(Refusal::OtherCopy);
        }
        if now >= self.expires_at() {
            return Err(Refusal::Expired { at: self.expires_at() });
        }
        if !token.names.matches(ask.name) {
            let (name, wanted) = (ask.name.clone(), token.names.clone());
            return Err(Refusal::WrongName { name, wanted });
        }
        if token.region != *ask.region {
            let (region, wanted) = (ask.region.clone(), token.region.clone());
            return Err(Refusal::WrongRegion { region, wanted });
        }
        self.has_use(ask.name)
    }

    fn has_use(&self, name: &NodeName) -> Result<(), Refusal> {
        if let Some(used) = self.redemptions.iter().find(|used| used.name == *name) {
            return Err(Refusal::Replayed { name: name.clone(), at: used.at() });
        }
        if self.uses_left > 0 {
            return Ok(());
        }
        Err(Refusal::UsedUp {
            uses: self.redemptions.len().try_into().unwrap_or(USES_MAX),
            last: self.redemptions.last().map(|used| (used.name.clone(), used.at())),
        })
    }

    pub(crate) fn take_use(&mut self, ask: &Ask<'_>, now: SystemTime) {
        self.uses_left = self.uses_left.saturating_sub(1);
        self.redemptions.push(Used {
            name: ask.name.clone(),
            at_ms: milliseconds(now),
            remote: ask.remote.to_string(),
        });
    }

    fn status(self, id: String) -> Option<TokenStatus> {
        Some(TokenStatus {
            id,
            names: self.names.parse().ok()?,
            issued_at: self.issued_at(),
            expires_at: self.expires_at(),
            region: self.region,
            uses_left: self.uses_left,
            redemptions: self
                .redemptions
                .into_iter()
                .map(|used| Redemption { at: used.at(), name: used.name, remote: used.remote })
                .collect(),
        })
    }
}

impl Used {
    fn at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.at_ms)
    }
}

fn path(place: &Place, id: &str) -> PathBuf {
    place.tokens().join(format!("{id}.json"))
}

pub(crate) fn read(place: &Place, token: &Token) -> Result<Option<Kept>, IdentityError> {
    let path = path(place, &token.id());
    files::read_if_there(&path)?.map(|bytes| parse(&bytes, path)).transpose()
}

fn parse(bytes: &[u8], path: PathBuf) -> Result<Kept, IdentityError> {
    let damaged = |reason: &str| IdentityError::NotAnAuthority {
        path: path.clone(),
        reason: format!("it is damaged ({reason}): remove it and issue another token"),
    };
    if bytes.len() > FILE_MAX_BYTES {
        return Err(damaged("it is too long"));
    }
    let kept: Kept = serde_json::from_slice(bytes).map_err(|e| damaged(&e.to_string()))?;
    // Later moments cannot be written as text.
    let latest = 247_000_000_000;
    if kept.expires_at_s > latest || kept.redemptions.iter().any(|u| u.at_ms / 1_000 > latest) {
        return Err(damaged("a time is out of range"));
    }
    Ok(kept)
}

/// On the disk when this returns.
pub(crate) fn write(place: &Place, id: &str, kept: &Kept) -> Result<(), IdentityError> {
    let path = path(place, id);
    let bytes = serde_json::to_vec_pretty(kept)
        .map_err(|e| IdentityError::NotAnAuthority { path: path.clone(), reason: e.to_string() })?;
    files::replace_durably(&path, files::SECRET, &bytes)
}

/// Makes room for another token.
pub(crate) fn sweep(place: &Place, now: SystemTime) -> Result<(), IdentityError> {
    files::create_secret_directory(&place.tokens())?;
    let mut kept = 0;
    for path in files_of(place)? {
        let token = files::read_if_there(&path)?.and_then(|bytes| parse(&bytes, path.clone()).ok());
        match token {
            Some(token) if now > token.expires_at() + KEEP_EXPIRED => {
                files::remove_if_there(&path)?;
            }
            _ => kept += 1,
        }
    }
    if kept < TOKENS_MAX {
        return Ok(());
    }
    Err(IdentityError::Scope(format!(
        "there are {kept} tokens already: wait until some have expired, or remove files from {}; \
         one token with a pattern and several uses serves a group",
        place.tokens().display()
    )))
}

/// Every token that was made here and can be read, in the order in which they end.
pub(crate) fn list(place: &Place) -> Result<Vec<TokenStatus>, IdentityError> {
    let mut found = Vec::new();
    let here = files::exists(&place.tokens())?.then(|| Origin::of(place)).transpose()?;
    for path in files_of(place)? {
        let id = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let Some(bytes) = files::read_if_there(&path)? else { continue };
        let kept =
            parse(&bytes, path).ok().filter(|kept| here.is_some_and(|it| kept.origin.is(it)));
        found.extend(kept.and_then(|kept| kept.status(id)));
    }
    found.sort_by(|a, b| (a.expires_at, &a.id).cmp(&(b.expires_at, &b.id)));
    Ok(found)
}

fn files_of(place: &Place) -> Result<Vec<PathBuf>, IdentityError> {
    let directory = place.tokens();
    if !files::exists(&directory)? {
        return Ok(Vec::new());
    }
    let failed = || files::failed("read", &directory);
    let mut paths = Vec::new();
    for entry in fs::read_dir(&directory).map_err(failed())? {
        let path = entry.map_err(failed())?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    Ok(paths)
}

/// How a token is spoken of in records.
pub(crate) fn describe(token: &Token) -> String {
    let Token { trust_domain, region, names, role, .. } = token;
    format!("spiffe://{trust_domain}/{role}/{region}/{names}, until {}", text(token.expires_at))
}
