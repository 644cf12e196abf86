//! PEM files on disk: read with errors an operator can act on, written so that nobody ever sees half of one.
//!
//! A file appears under its name in one step, complete and with its final permissions. Two files cannot appear in one
//! step, so nothing here needs them to: see [`crate::DevCa`].

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, Permissions},
    io::{self, ErrorKind, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tempfile::{NamedTempFile, PersistError};

use crate::IdentityError;

/// Permissions of a private key.
pub(crate) const SECRET: u32 = 0o600;
/// Permissions of a certificate, before the umask.
pub(crate) const PUBLIC: u32 = 0o644;

const READABLE_BY_OTHERS: u32 = 0o077;
/// The link [`replace_all`] turns, and how the directories it turns to begin.
const CURRENT: &str = "current";
const GENERATION: &str = ".identity-";

/// Every certificate of a file, at least one.
pub(crate) fn read_certificates(
    path: &Path,
    remedy: &'static str,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let pem = read(open(path, remedy)?, path)?;
    match CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(IdentityError::NoCertificate { path: path.into() }),
    }
}

/// The private key of a file that only its owner can read.
pub(crate) fn read_secret_key(
    path: &Path,
    remedy: &'static str,
) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let file = open(path, remedy)?;
    let mode = file.metadata().map_err(failed("read", path))?.permissions().mode() & 0o777;
    if mode & READABLE_BY_OTHERS != 0 {
        return Err(IdentityError::ExposedKey { path: path.into(), mode });
    }
    parse_key(file, path)
}

/// The private key of a file, whatever its permissions.
pub(crate) fn read_key(
    path: &Path,
    remedy: &'static str,
) -> Result<PrivateKeyDer<'static>, IdentityError> {
    parse_key(open(path, remedy)?, path)
}

/// Whether there is such a file; a file that cannot be looked at is an error.
pub(crate) fn exists(path: &Path) -> Result<bool, IdentityError> {
    path.try_exists().map_err(failed("look at", path))
}

/// Puts `contents` under the name `path` unless that name is taken: of several writers exactly one succeeds, and all
/// of them find its file afterwards.
pub(crate) fn write_unless_there(
    path: &Path,
    mode: u32,
    contents: &str,
) -> Result<(), IdentityError> {
    match write_aside(path, mode, contents.as_bytes())?.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(PersistError { error, .. }) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(PersistError { error, .. }) => Err(failed("create", path)(error)),
    }
}

/// Puts `contents` under the name `path`, in the place of what was there.
pub(crate) fn replace(path: &Path, mode: u32, contents: &str) -> Result<(), IdentityError> {
    let written = write_aside(path, mode, contents.as_bytes())?.persist(path);
    written.map(drop).map_err(|e| failed("replace", path)(e.error))
}

/// Like [`replace`], and on the disk when it returns: what it records has to survive a power failure.
pub(crate) fn replace_durably(
    path: &Path,
    mode: u32,
    contents: &[u8],
) -> Result<(), IdentityError> {
    let file = write_aside(path, mode, contents)?;
    file.as_file().sync_all().map_err(failed("write", path))?;
    file.persist(path).map_err(|e| failed("replace", path)(e.error))?;
    let directory = path.parent().unwrap_or(path);
    File::open(directory).and_then(|dir| dir.sync_all()).map_err(failed("write", directory))
}

/// The contents of a file; `None`: there is no such file.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, IdentityError> {
    match fs::read(path) {
        Ok(contents) => Ok(Some(contents)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// Gives a file another name, in the place of what had it; `false`: there is no such file.
pub(crate) fn rename_if_there(from: &Path, to: &Path) -> Result<bool, IdentityError> {
    done_unless_absent(fs::rename(from, to)).map_err(failed("rename", from))
}

/// Removes a file; `false`: there is no such file.
pub(crate) fn remove_if_there(path: &Path) -> Result<bool, IdentityError> {
    done_unless_absent(fs::remove_file(path)).map_err(failed("remove", path))
}

fn done_unless_absent(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Puts several files into `dir` at once: they are written into a directory of their own, and a link that all of them are
/// reached through is turned to it in one step. Nobody else does so meanwhile, where the file system knows locks.
pub(crate) fn replace_all(dir: &Path, files: &[(&str, u32, &str)]) -> Result<(), IdentityError> {
    create_secret_directory(dir)?;
    let lock = File::open(dir).and_then(|dir| dir.lock().map(|()| dir));
    let fresh = tempfile::Builder::new()
        .prefix(GENERATION)
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(dir)
        .map_err(failed("create a directory in", dir))?;
    for (name, mode, contents) in files {
        replace_durably(&fresh.path().join(name), *mode, contents.as_bytes())?;
    }
    let current = dir.join(CURRENT);
    let before = fs::read_link(&current).ok();
    let fresh = fresh.keep();
    let fresh = fresh.file_name().unwrap_or_default();
    link(Path::new(fresh), &current)?;
    for (name, ..) in files {
        link(&Path::new(CURRENT).join(name), &dir.join(name))?;
    }
    // Without the lock another one may be about to be turned to.
    sweep(dir, |name| {
        name != fresh && (lock.is_ok() || before.as_deref() == Some(Path::new(name)))
    });
    Ok(())
}

/// Removes of the directories that [`replace_all`] made in `dir` those that are `stale`, with the keys in them: the one
/// before, and what was left by whoever was cut short. A link is neither followed nor removed. One that stays hurts
/// nobody, and the next time it is tried again.
fn sweep(dir: &Path, stale: impl Fn(&OsStr) -> bool) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let ours = name.as_bytes().starts_with(GENERATION.as_bytes());
        if ours && stale(&name) && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

/// Which of the identities that were put into `dir` lies there now: another one has another name. `None`: none was put there.
#[must_use]
pub fn generation(dir: &Path) -> Option<PathBuf> {
    fs::read_link(dir.join(CURRENT)).ok()
}

/// Makes `path` a link to `target`, in the place of what was there.
fn link(target: &Path, path: &Path) -> Result<(), IdentityError> {
    if fs::read_link(path).is_ok_and(|found| found == target) {
        return Ok(());
    }
    let aside = path.with_extension("new");
    // One that an interrupted start left.
    drop(fs::remove_file(&aside));
    symlink(target, &aside).map_err(failed("create", &aside))?;
    fs::rename(&aside, path).map_err(failed("replace", path))
}

/// Blocks of PEM.
pub(crate) fn pem<'a>(label: &str, blocks: impl Iterator<Item = &'a [u8]>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    blocks.map(|der| pem::encode_config(&pem::Pem::new(label, der), config)).collect()
}

/// What PEM calls a key of this kind.
pub(crate) fn key_label(key: &PrivateKeyDer<'_>) -> &'static str {
    match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    }
}

/// Puts bytes that are no secret under the name `path` in one step, in the place of what was there.
///
/// # Errors
/// The file cannot be written; what was there before is there still.
pub fn write_file(path: &Path, contents: &[u8]) -> Result<(), IdentityError> {
    replace_durably(path, PUBLIC, contents)
}

/// Makes a public file say `contents`, touching it only when it says something else.
pub(crate) fn write_if_different(path: &Path, contents: &str) -> Result<(), IdentityError> {
    match fs::read(path) {
        Ok(found) if found == contents.as_bytes() => Ok(()),
        _ => replace(path, PUBLIC, contents),
    }
}

/// Creates a directory and its parents.
pub(crate) fn create_directory(path: &Path) -> Result<(), IdentityError> {
    fs::create_dir_all(path).map_err(failed("create", path))
}

/// Creates a directory and its parents, for the owner alone.
pub(crate) fn create_secret_directory(path: &Path) -> Result<(), IdentityError> {
    let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
    created.map_err(failed("create", path))
}

fn write_aside(path: &Path, mode: u32, contents: &[u8]) -> Result<NamedTempFile, IdentityError> {
    let directory = path.parent().unwrap_or(path);
    let mut file = tempfile::Builder::new()
        .prefix(".new-")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(directory)
        .map_err(failed("create a file in", directory))?;
    file.write_all(contents).map_err(failed("write", path))?;
    Ok(file)
}

fn open(path: &Path, remedy: &'static str) -> Result<File, IdentityError> {
    File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => IdentityError::Missing { path: path.into(), remedy },
        _ => failed("read", path)(error),
    })
}

fn read(mut file: File, path: &Path) -> Result<Vec<u8>, IdentityError> {
    let mut contents = Vec::new();
    file.read_to_end(&mut contents).map_err(failed("read", path))?;
    Ok(contents)
}

/// What the parser says is not passed on: it quotes the file.
fn parse_key(file: File, path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let pem = read(file, path)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| IdentityError::NoKey { path: path.into() })
}

pub(crate) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    move |source| IdentityError::File { action, path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, thread};

    use super::*;

    fn put(dir: &Path, contents: &str) {
        replace_all(dir, &[("key.pem", SECRET, contents), ("cert.pem", PUBLIC, contents)]).unwrap();
        assert_eq!(fs::read_to_string(dir.join("key.pem")).unwrap(), contents);
    }

    fn generations(dir: &Path) -> Vec<PathBuf> {
        let found = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        found
            .filter(|path| path.file_name().unwrap().as_bytes().starts_with(GENERATION.as_bytes()))
            .collect()
    }

    #[test]
    fn files_that_are_replaced_together_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        for contents in ["one", "two", "three"] {
            put(dir.path(), contents);
            assert_eq!(generations(dir.path()).len(), 1);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
        }
    }

    #[test]
    fn what_somebody_else_made_the_link_point_to_stays() {
        let outer = tempfile::tempdir().unwrap();
        let (dir, other) = (outer.path().join("identity"), outer.path().join(".identity-other"));
        for target in [other.clone(), "../.identity-other".into(), "mine".into(), ".".into()] {
            fs::create_dir_all(dir.join("mine")).unwrap();
            fs::create_dir_all(&other).unwrap();
            fs::write(other.join("precious"), "").unwrap();
            drop(fs::remove_file(dir.join(CURRENT)));
            symlink(&target, dir.join(CURRENT)).unwrap();
            put(&dir, "new");
            assert!(other.join("precious").exists(), "{}", target.display());
            assert!(dir.join("mine").exists(), "{}", target.display());
        }
    }

    #[test]
    fn what_was_left_by_whoever_was_cut_short_is_swept_and_nothing_else() {
        let outer = tempfile::tempdir().unwrap();
        let (dir, other) = (outer.path().join("identity"), outer.path().join("other"));
        for made in [dir.join(".identity-dead"), dir.join(".identical"), other.clone()] {
            fs::create_dir_all(&made).unwrap();
            fs::write(made.join("key.pem"), "").unwrap();
        }
        symlink(&other, dir.join(".identity-link")).unwrap();
        symlink(&other, dir.join(".identity-dead/link")).unwrap();
        fs::write(dir.join(".identity-file"), "").unwrap();
        put(&dir, "new");
        assert!(!dir.join(".identity-dead").exists());
        for kept in [".identical/key.pem", ".identity-link/key.pem", ".identity-file"] {
            assert!(dir.join(kept).exists(), "{kept}");
        }
        assert!(other.join("key.pem").exists());
    }

    #[test]
    fn those_that_replace_at_once_do_not_sweep_what_the_other_has_written() {
        let dir = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for name in ["a", "b", "c"] {
                let dir = dir.path();
                scope.spawn(move || {
                    let files = [("key.pem", SECRET, name), ("cert.pem", PUBLIC, name)];
                    (0..20).for_each(|_| replace_all(dir, &files).unwrap());
                });
            }
        });
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("key.pem"), read("cert.pem"));
        assert_eq!(generations(dir.path()).len(), 1);
    }
}
