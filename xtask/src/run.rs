//! Running commands, and where things lie.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

/// The top of the checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("."))
}

/// Where cargo builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root());
    cargo
}

/// Runs a command to its end, under a heading.
pub(crate) fn step(heading: &str, command: &mut Command) -> anyhow::Result<()> {
    say(&format!("\n== {heading}\n"));
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    anyhow::ensure!(status.success(), "{heading}: {status}");
    Ok(())
}

/// Says something on standard error.
pub(crate) fn say(text: &str) {
    // Without standard error there is nobody left to tell.
    drop(io::stderr().lock().write_all(text.as_bytes()));
}
