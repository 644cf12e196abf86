//! What an authority did for whom: one JSON object a line in `audit.log`, without secrets.
//!
//! The record is bounded: at 8 MiB it becomes `audit.log.1`, in the place of the one before.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, time::SystemTime};

use serde::Serialize;

use super::{issuing::text, place::Place};

const AUDIT_MAX_BYTES: u64 = 8 * 1024 * 1024;

/// One thing done or refused.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Entry<'a> {
    pub(crate) event: &'static str,
    /// `done`, or the label of the refusal.
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
    let path = place.audit();
    if fs::metadata(&path).is_ok_and(|found| found.len() > AUDIT_MAX_BYTES) {
        drop(fs::rename(&path, path.with_extension("log.1")));
    }
    let Ok(mut line) = serde_json::to_vec(&Line { at: text(now), entry }) else { return };
    line.push(b'\n');
    let mut options = fs::OpenOptions::new();
    if let Ok(mut file) = options.create(true).append(true).mode(0o600).open(&path) {
        drop(file.write_all(&line));
    }
}
