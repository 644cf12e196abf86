//! What an authority did for whom, and what it refused whom: one JSON object a line, without secrets.
//!
//! `audit.log` says what was done, `refused.log` what was not. Strangers can cause refusals, as many as they like, so
//! these are kept apart: they push out nothing but each other. Each record is bounded: at 8 MiB it becomes
//! `audit.log.1` or `refused.log.1`, in the place of the one before.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{issuing::text, place::Place};
use crate::{IdentityError, SpiffeId, files};

const MAX_BYTES: u64 = 8 * 1024 * 1024;
/// The outcome of what was not refused.
pub(crate) const DONE: &str = "done";
/// Events that hand somebody a certificate.
const ISSUING: [&str; 3] = ["join", "renew", "issue"];

/// Of those that find a record full, one puts it aside.
static WRITING: Mutex<()> = Mutex::new(());

/// One thing done or refused.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Entry<'a> {
    pub(crate) event: &'static str,
    /// [`DONE`], or the label of the refusal.
    pub(crate) outcome: &'static str,
    pub(crate) who: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remote: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) why: Option<&'a str>,
}

#[derive(Serialize)]
struct Line<'a> {
    at: String,
    #[serde(flatten)]
    entry: &'a Entry<'a>,
}

/// Best effort: a full disk must not keep a mesh from renewing its certificates. Whoever answers also logs.
pub(crate) fn record(place: &Place, entry: &Entry<'_>, now: SystemTime) {
    let path = if entry.outcome == DONE { place.audit() } else { place.refused() };
    let Ok(mut line) = serde_json::to_vec(&Line { at: text(now), entry }) else { return };
    line.push(b'\n');
    let _writing = WRITING.lock();
    if let Ok(mut file) = open(&path) {
        drop(file.write_all(&line));
    }
}

/// A record with room for a line. A command may write to it too, so that the lock on the file comes with a second look
/// at who has the name: what another process has put aside meanwhile is not put aside again.
fn open(path: &Path) -> io::Result<File> {
    let file = append(path)?;
    drop(file.lock());
    let held = file.metadata()?;
    if held.len() <= MAX_BYTES {
        return Ok(file);
    }
    if fs::metadata(path).is_ok_and(|named| named.ino() == held.ino()) {
        fs::rename(path, before(path))?;
    }
    append(path)
}

fn append(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new().create(true).append(true).mode(files::SECRET).open(path)
}

/// Where a record goes that is full.
fn before(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// Whether the record says that `id` was given a certificate. It goes back some ten thousand lines.
pub(crate) fn has_issued(place: &Place, id: &SpiffeId) -> Result<bool, IdentityError> {
    #[derive(Deserialize)]
    struct Found {
        event: String,
        outcome: String,
        who: String,
    }
    let id = id.to_string();
    let says_so = |line: &str| {
        line.contains(&id)
            && serde_json::from_str::<Found>(line).is_ok_and(|found| {
                found.who == id && found.outcome == DONE && ISSUING.contains(&found.event.as_str())
            })
    };
    for path in [place.audit(), before(&place.audit())] {
        if !files::exists(&path)? {
            continue;
        }
        let file = File::open(&path).map_err(files::failed("read", &path))?;
        // What is no text was not written here.
        if BufReader::new(file).lines().map_while(Result::ok).any(|line| says_so(&line)) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, thread, time::UNIX_EPOCH};

    use super::*;

    fn entry(outcome: &'static str, who: &str) -> Entry<'static> {
        Entry { event: "join", outcome, who: who.into(), ..Default::default() }
    }

    fn lines(path: &Path) -> usize {
        fs::read_to_string(path).unwrap_or_default().lines().count()
    }

    fn fill(path: &Path) {
        let line = format!("{{{}}}\n", " ".repeat(1_021));
        fs::write(path, line.repeat(8 * 1024 + 1)).unwrap();
    }

    #[test]
    fn refusals_push_out_nothing_that_was_done() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::at(dir.path().into());
        record(&place, &entry(DONE, "a"), UNIX_EPOCH);
        for _ in 0..2 {
            fill(&place.refused());
            record(&place, &entry("tampered", "b"), UNIX_EPOCH);
        }
        assert_eq!((lines(&place.audit()), lines(&place.refused())), (1, 1));
        assert!(!before(&place.audit()).exists() && before(&place.refused()).exists());
        assert!(fs::read_to_string(place.refused()).unwrap().contains("\"who\":\"b\""));
    }

    #[test]
    fn of_many_that_find_a_record_full_one_puts_it_aside() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::at(dir.path().into());
        for round in 1..=4 {
            fill(&place.audit());
            let start = Barrier::new(8);
            thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        start.wait();
                        record(&place, &entry(DONE, "a"), UNIX_EPOCH);
                    });
                }
            });
            assert_eq!(lines(&place.audit()), 8, "{round}");
            assert_eq!(lines(&before(&place.audit())), 8 * 1024 + 1, "{round}");
        }
    }
}
