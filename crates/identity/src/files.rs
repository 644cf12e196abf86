//! PEM files on disk: read with errors an operator can act on, written so that nobody ever sees half of one.
//!
//! A file appears under its name in one step, complete and with its final permissions. Two files cannot appear in one
//! step, so nothing here needs them to: see [`crate::DevCa`].

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt, symlink},
    path::Path,
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
/// reached through is turned to it in one step.
pub(crate) fn replace_all(dir: &Path, files: &[(&str, u32, &str)]) -> Result<(), IdentityError> {
    create_secret_directory(dir)?;
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
    link(Path::new(fresh.file_name().unwrap_or_default()), &current)?;
    for (name, ..) in files {
        link(&Path::new(CURRENT).join(name), &dir.join(name))?;
    }
    // What nobody can reach any more; a leftover hurts nobody.
    if let Some(before) = before {
        drop(fs::remove_dir_all(dir.join(before)));
    }
    Ok(())
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
