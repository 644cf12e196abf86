//! How a mesh changes its root while traffic flows, in three steps of one command.
//!
//! ```text
//!             (1) roots.pem: old, new    (2) issuer.pem: under new     (3) roots.pem: new
//!   at rest ─────────────────────▶ added ─────────────────────▶ replaced ─────────────────▶ at rest
//! ```
//!
//! Between two steps lies a full life of certificates: by then every node has renewed, so that all of them believe the
//! new root before anybody shows a certificate under it, and nobody shows one under the old root when it goes.
//!
//! Where a rotation stands is read from the files themselves, each of which appears in one step; `rotation.toml` only
//! holds when. So a step that was cut short is finished by running the command again. What comes next lies beside what
//! it shall replace: `root.next.*`, and in the online part `issuer.next.*`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{
    Authority, audit,
    issuing::{fingerprint, text},
    make::{Root, make_issuer, pem_of},
    place::{Place, Settings},
};
use crate::{
    IdentityError, files,
    node::{Paths, check_key, check_life},
};

const ROOT_REMEDY: &str = "bring the root's certificate back to where `isobar ca init` made it; \
                           if the root is somebody else's, put their new issuer.pem, issuer.key and roots.pem in place";
const ROOT_KEY_REMEDY: &str =
    "bring the root's key back to where `isobar ca init` made it for a moment";
const NEXT_REMEDY: &str = "restore it, it belongs to the rotation under way";

/// What a step of a rotation did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rotated {
    /// Nodes will believe the new root too as they renew.
    RootAdded {
        /// When the next step may be done.
        next_at: SystemTime,
    },
    /// Certificates are issued under the new root.
    IssuerReplaced {
        /// When the next step may be done.
        next_at: SystemTime,
    },
    /// Nodes will cease to believe the old root as they renew.
    RootRemoved,
}

impl Authority {
    /// Does the next step of changing the root of the authority in `dir`. `hurry` does it although certificates are
    /// about that were issued before the last step: nodes that have not renewed since are cut off.
    ///
    /// # Errors
    /// It is too early, the root's certificate is elsewhere, or something cannot be written.
    pub fn rotate(dir: &Path, hurry: bool, now: SystemTime) -> Result<Rotated, IdentityError> {
        let rotation = Rotation::find(dir)?;
        let _lock = rotation.place.lock()?;
        let done = rotation.step(hurry, now)?;
        let who = match done {
            Rotated::RootAdded { .. } => "root added",
            Rotated::IssuerReplaced { .. } => "issuer replaced, under the next root",
            Rotated::RootRemoved => "old root removed",
        };
        let who = who.into();
        let entry =
            audit::Entry { event: "rotate", outcome: audit::DONE, who, ..Default::default() };
        audit::record(&rotation.place, &entry, now);
        Ok(done)
    }

    /// Gives the authority in `dir` another issuing certificate under the same root, whose key it takes. Nothing has to
    /// be waited for: nodes are shown the issuing certificate with each certificate.
    ///
    /// # Errors
    /// The root or its key is elsewhere, the root is being changed, or something cannot be written.
    pub fn rotate_issuer(dir: &Path, now: SystemTime) -> Result<(), IdentityError> {
        let rotation = Rotation::find(dir)?;
        let _lock = rotation.place.lock()?;
        if files::exists(&rotation.next_root())? {
            return Err(IdentityError::Scope(
                "the root is being changed, which changes the issuing certificate too: \
                 finish that first, `isobar ca rotate`"
                    .into(),
            ));
        }
        rotation.replace_issuer_only(now)?;
        let who = "issuer replaced, under the same root".into();
        let entry =
            audit::Entry { event: "rotate", outcome: audit::DONE, who, ..Default::default() };
        audit::record(&rotation.place, &entry, now);
        Ok(())
    }
}

/// Both parts of an authority.
struct Rotation {
    /// Where the root is.
    dir: PathBuf,
    place: Place,
    settings: Settings,
}

/// When the last step was done.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Stamp {
    step: u8,
    at_s: u64,
}

/// Where a rotation stands.
enum State {
    /// At rest, or the first step was cut short.
    Begin,
    Added,
    Replaced,
    /// The last step was cut short.
    Finish,
}

impl Rotation {
    fn find(dir: &Path) -> Result<Self, IdentityError> {
        let place = Place::find(dir)?;
        let settings = place.read_settings()?;
        let inside = place.dir() == dir;
        let dir = if inside { dir.join("..") } else { dir.into() };
        Ok(Self { dir, place, settings })
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root.pem")
    }

    fn root_key(&self) -> PathBuf {
        self.dir.join("root.key")
    }

    fn next_root(&self) -> PathBuf {
        self.dir.join("root.next.pem")
    }

    fn next_root_key(&self) -> PathBuf {
        self.dir.join("root.next.key")
    }

    fn stamp_path(&self) -> PathBuf {
        self.dir.join("rotation.toml")
    }

    fn step(&self, hurry: bool, now: SystemTime) -> Result<Rotated, IdentityError> {
        match self.state()? {
            State::Begin => self.add_root(now),
            State::Added => {
                if let Some(next_at) = self.complete(1, now)? {
                    return Ok(Rotated::RootAdded { next_at });
                }
                self.check_time(hurry, now)?;
                self.replace_issuer(now)
            }
            State::Replaced => {
                files::rename_if_there(&self.place.next_issuer_key(), &self.place.issuer_key())?;
                if let Some(next_at) = self.complete(2, now)? {
                    return Ok(Rotated::IssuerReplaced { next_at });
                }
                self.check_time(hurry, now)?;
                self.remove_root()
            }
            State::Finish => self.finish(),
        }
    }

    fn state(&self) -> Result<State, IdentityError> {
        let Some(next) = self.certificate(&self.next_root())? else {
            let last = self.read_stamp()?.is_some_and(|stamp| stamp.step == 2);
            return Ok(if last { State::Finish } else { State::Begin });
        };
        let roots = self.roots()?;
        if !roots.contains(&next) {
            return Ok(State::Begin);
        }
        let issuer = files::read_if_there(&self.place.issuer())?;
        if issuer != files::read_if_there(&self.place.next_issuer())? {
            return Ok(State::Added);
        }
        Ok(match self.certificate(&self.root())? {
            Some(old) if old != next && roots.contains(&old) => State::Replaced,
            _ => State::Finish,
        })
    }

    /// Everything that comes next is made, then roots.pem changes.
    fn add_root(&self, now: SystemTime) -> Result<Rotated, IdentityError> {
        let old = self.old_root()?;
        let mut roots = self.roots()?;
        if !roots.contains(&old) {
            return Err(IdentityError::NotAnAuthority {
                path: self.root(),
                reason: "roots.pem does not hold it: bring back the root under which issuer.pem is"
                    .into(),
            });
        }
        files::remove_if_there(&self.stamp_path())?;
        files::remove_if_there(&self.place.next_issuer())?;
        let mesh = &self.settings.trust_domain;
        let root = Root::make(&self.next_root_key(), mesh, now)?;
        let issuer = make_issuer(&self.place.next_issuer_key(), &root, mesh, now)?;
        write(&self.next_root(), &root.pem)?;
        write(&self.place.next_issuer(), &issuer)?;
        roots.extend(files::read_certificates(&self.next_root(), NEXT_REMEDY)?);
        write(&self.place.roots(), &pem_of(&roots))?;
        let next_at = self.stamp(1, now)?;
        Ok(Rotated::RootAdded { next_at })
    }

    /// The key comes second: whoever opens the authority in between takes the one that fits.
    fn replace_issuer(&self, now: SystemTime) -> Result<Rotated, IdentityError> {
        let (cert, key) = (self.place.next_issuer(), self.place.next_issuer_key());
        let chain = files::read_certificates(&cert, NEXT_REMEDY)?;
        let secret = files::read_secret_key(&key, NEXT_REMEDY)?;
        check_key(Paths { ca: &cert, cert: &cert, key: &key }, &chain, &secret)?;
        let pem = files::read_if_there(&cert)?.unwrap_or_default();
        files::replace_durably(&self.place.issuer(), files::PUBLIC, &pem)?;
        files::rename_if_there(&key, &self.place.issuer_key())?;
        let next_at = self.stamp(2, now)?;
        Ok(Rotated::IssuerReplaced { next_at })
    }

    fn remove_root(&self) -> Result<Rotated, IdentityError> {
        let old = self.old_root()?;
        let mut roots = self.roots()?;
        roots.retain(|root| *root != old);
        write(&self.place.roots(), &pem_of(&roots))?;
        self.finish()
    }

    /// The old root gives its names to the new one: keys first, so that the certificates tell where this stands.
    fn finish(&self) -> Result<Rotated, IdentityError> {
        if let Some(next) = self.certificate(&self.next_root())? {
            if let Some(old) = self.certificate(&self.root())?.filter(|old| *old != next) {
                let name = data_encoding::HEXLOWER.encode(&fingerprint(&old)[..4]);
                let retired = |end: &str| self.dir.join(format!("root.{name}.{end}.retired"));
                files::rename_if_there(&self.root_key(), &retired("key"))?;
                files::rename_if_there(&self.root(), &retired("pem"))?;
            }
            files::rename_if_there(&self.next_root_key(), &self.root_key())?;
            files::rename_if_there(&self.next_root(), &self.root())?;
        }
        files::remove_if_there(&self.place.next_issuer())?;
        files::remove_if_there(&self.stamp_path())?;
        Ok(Rotated::RootRemoved)
    }

    fn replace_issuer_only(&self, now: SystemTime) -> Result<(), IdentityError> {
        let root = self.old_root()?;
        let (cert, key) = (self.root(), self.root_key());
        let secret = files::read_secret_key(&key, ROOT_KEY_REMEDY)?;
        let chain = std::slice::from_ref(&root);
        check_key(Paths { ca: &cert, cert: &cert, key: &key }, chain, &secret)?;
        let until = check_life(&cert, chain, now)?;
        let root = Root::of(&root, until, &secret)?;
        let next_key = self.place.next_issuer_key();
        let pem = make_issuer(&next_key, &root, &self.settings.trust_domain, now)?;
        write(&self.place.issuer(), &pem)?;
        files::rename_if_there(&next_key, &self.place.issuer_key()).map(drop)
    }

    /// Writes down when a step was done that was cut short before it could; `None`: it was not.
    fn complete(&self, step: u8, now: SystemTime) -> Result<Option<SystemTime>, IdentityError> {
        match self.read_stamp()? {
            Some(stamp) if stamp.step == step => Ok(None),
            _ => self.stamp(step, now).map(Some),
        }
    }

    fn check_time(&self, hurry: bool, now: SystemTime) -> Result<(), IdentityError> {
        let Some(stamp) = self.read_stamp()? else { return Ok(()) };
        let next_at = self.next_at(&stamp);
        if hurry || now >= next_at {
            return Ok(());
        }
        Err(IdentityError::NotYet { at: text(next_at) })
    }

    /// When certificates that were issued before a step have ended.
    fn next_at(&self, stamp: &Stamp) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(stamp.at_s) + self.settings.life
    }

    fn stamp(&self, step: u8, now: SystemTime) -> Result<SystemTime, IdentityError> {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamp = Stamp { step, at_s: since.as_secs() + u64::from(since.subsec_nanos() > 0) };
        let damaged = |e: toml::ser::Error| self.damaged_stamp(e.to_string());
        write(&self.stamp_path(), &toml::to_string(&stamp).map_err(damaged)?)?;
        Ok(self.next_at(&stamp))
    }

    fn read_stamp(&self) -> Result<Option<Stamp>, IdentityError> {
        let Some(bytes) = files::read_if_there(&self.stamp_path())? else { return Ok(None) };
        let parsed = toml::from_slice::<Stamp>(&bytes);
        let stamp = parsed.map_err(|e| self.damaged_stamp(e.to_string()))?;
        if stamp.at_s > 247_000_000_000 {
            return Err(self.damaged_stamp("the time is out of range".into()));
        }
        Ok(Some(stamp))
    }

    fn damaged_stamp(&self, reason: String) -> IdentityError {
        let reason = format!("{reason}: remove it, and the wait for the next step begins again");
        IdentityError::NotAnAuthority { path: self.stamp_path(), reason }
    }

    fn old_root(&self) -> Result<CertificateDer<'static>, IdentityError> {
        let path = self.root();
        let found = self.certificate(&path)?;
        found.ok_or(IdentityError::Missing { path, remedy: ROOT_REMEDY })
    }

    fn roots(&self) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        files::read_certificates(&self.place.roots(), NEXT_REMEDY)
    }

    fn certificate(&self, path: &Path) -> Result<Option<CertificateDer<'static>>, IdentityError> {
        if !files::exists(path)? {
            return Ok(None);
        }
        Ok(files::read_certificates(path, NEXT_REMEDY)?.into_iter().next())
    }
}

fn write(path: &Path, pem: &str) -> Result<(), IdentityError> {
    files::replace_durably(path, files::PUBLIC, pem.as_bytes())
}
