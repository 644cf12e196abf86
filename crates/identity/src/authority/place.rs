//! Where an authority keeps what it has, who may touch it when, and whether it has changed.
//!
//! Every change is made under [`Place::lock`], by whichever process; a crash leaves either what was there or what shall
//! be there.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use base::TrustDomain;
use serde::{Deserialize, Serialize};

use crate::{IdentityError, files};

const REMEDY: &str =
    "name the directory that `isobar ca init` made, or make an authority with `isobar ca init`";
const SETTINGS_HEAD: &str = "\
# `life`: how long the certificates of nodes live. A revocation is kept for twice as long, so whoever lowers it lets
# revocations be forgotten early for certificates that were issued before.
";
/// Shortest and longest life of a node's certificate.
const LIFE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(90 * 24 * 60 * 60));

/// The online part of an authority: `DIR/authority`.
#[derive(Clone, Debug)]
pub(crate) struct Place(PathBuf);

impl Place {
    /// The part below `dir`, or `dir` itself.
    pub(crate) fn find(dir: &Path) -> Result<Self, IdentityError> {
        let (inside, below) = (Self(dir.into()), Self(dir.join("authority")));
        if !files::exists(&inside.settings())? && files::exists(&below.settings())? {
            return Ok(below);
        }
        match files::exists(&inside.settings())? {
            true => Ok(inside),
            false => Err(IdentityError::Missing { path: below.settings(), remedy: REMEDY }),
        }
    }

    pub(crate) fn at(dir: PathBuf) -> Self {
        Self(dir)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.0
    }

    pub(crate) fn settings(&self) -> PathBuf {
        self.0.join("authority.toml")
    }

    pub(crate) fn issuer(&self) -> PathBuf {
        self.0.join("issuer.pem")
    }

    pub(crate) fn issuer_key(&self) -> PathBuf {
        self.0.join("issuer.key")
    }

    pub(crate) fn next_issuer(&self) -> PathBuf {
        self.0.join("issuer.next.pem")
    }

    pub(crate) fn next_issuer_key(&self) -> PathBuf {
        self.0.join("issuer.next.key")
    }

    pub(crate) fn roots(&self) -> PathBuf {
        self.0.join("roots.pem")
    }

    pub(crate) fn revoked(&self) -> PathBuf {
        self.0.join("revoked.pb")
    }

    pub(crate) fn tokens(&self) -> PathBuf {
        self.0.join("tokens")
    }

    pub(crate) fn audit(&self) -> PathBuf {
        self.0.join("audit.log")
    }

    pub(crate) fn refused(&self) -> PathBuf {
        self.0.join("refused.log")
    }

    /// Waits until nobody else changes the directory; they do not until the result is dropped.
    pub(crate) fn lock(&self) -> Result<Lock, IdentityError> {
        let path = self.0.join(".lock");
        let mut options = OpenOptions::new();
        let file = options.create(true).append(true).mode(files::SECRET).open(&path);
        let file = file.map_err(files::failed("open", &path))?;
        file.lock().map_err(files::failed("lock", &path))?;
        Ok(Lock { _file: file })
    }

    pub(crate) fn read_settings(&self) -> Result<Settings, IdentityError> {
        let path = self.settings();
        let wrong = |reason: String| IdentityError::NotAnAuthority { path: path.clone(), reason };
        let bytes = files::read_if_there(&path)?;
        let bytes = bytes.ok_or(IdentityError::Missing { path: path.clone(), remedy: REMEDY })?;
        let text = String::from_utf8(bytes).map_err(|e| wrong(e.to_string()))?;
        let written: Written = toml::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        let life = humantime::parse_duration(&written.life)
            .map_err(|e| wrong(format!("`life` is not a duration such as 24h ({e})")))?;
        check_life(life).map_err(|e| wrong(e.to_string()))?;
        Ok(Settings { trust_domain: written.trust_domain, life })
    }

    pub(crate) fn write_settings(&self, settings: &Settings) -> Result<(), IdentityError> {
        let path = self.settings();
        let life = humantime::format_duration(settings.life).to_string();
        let written = Written { trust_domain: settings.trust_domain.clone(), life };
        let text = toml::to_string(&written).map_err(|e| IdentityError::NotAnAuthority {
            path: path.clone(),
            reason: e.to_string(),
        })?;
        let text = format!("{SETTINGS_HEAD}{text}");
        files::replace_durably(&path, files::PUBLIC, text.as_bytes())
    }

    /// What a running authority has taken in, as it is now.
    pub(crate) fn seen(&self) -> Seen {
        let keys = [self.issuer_key(), self.next_issuer_key()];
        let [key, next_key] = keys.map(|path| stamp(&path));
        let [issuer, roots, settings] =
            [self.issuer(), self.roots(), self.settings()].map(|path| stamp(&path));
        Seen { parts: [issuer, key, next_key, roots, settings], revoked: stamp(&self.revoked()) }
    }
}

/// Held while the directory changes.
#[derive(Debug)]
#[must_use = "the lock ends when this is dropped"]
pub(crate) struct Lock {
    _file: File,
}

/// Which files were there: they are only ever replaced, and a file that takes the place of another is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) parts: [Stamp; 5],
    pub(crate) revoked: Stamp,
}

type Stamp = Option<(u64, u64, i64, i64)>;

fn stamp(path: &Path) -> Stamp {
    let found = fs::metadata(path).ok()?;
    Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

/// What `authority.toml` says.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) life: Duration,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Written {
    trust_domain: TrustDomain,
    life: String,
}

pub(crate) fn check_life(life: Duration) -> Result<(), IdentityError> {
    if life < LIFE.0 || life > LIFE.1 {
        return Err(IdentityError::Scope(
            "the life of certificates is between 1s and 90d: 24h suits most meshes".into(),
        ));
    }
    Ok(())
}
