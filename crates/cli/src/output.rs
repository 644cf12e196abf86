//! Results go to standard output, everything else to standard error.

use std::io::{self, Write as _};

use serde_json::Value;

/// Prints a result for people and flushes it: another program may wait for it.
pub(crate) fn text(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Prints a result as exactly one JSON object, over several lines.
pub(crate) fn json(value: &Value) -> io::Result<()> {
    text(&serde_json::to_string_pretty(value)?)
}

/// Prints a result as exactly one JSON object, on one line.
pub(crate) fn json_line(value: &Value) -> io::Result<()> {
    text(&value.to_string())
}

/// Says something beside the result.
pub(crate) fn note(text: &str) {
    // Without standard error there is nobody left to tell.
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// Prints an error and its causes.
pub(crate) fn error(error: &anyhow::Error) {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Some errors repeat their cause in their own words.
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    note(&format!("error: {text}"));
}
