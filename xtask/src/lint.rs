//! What must be clean before tests are worth running.

use std::process::Command;

use crate::run::{cargo, root, step, target};

const CARGO_DENY: &str = "0.20.2";

pub(crate) fn lint() -> anyhow::Result<()> {
    step("formatting", cargo().args(["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    step("clippy", cargo().args(clippy))?;
    step(
        "documentation",
        cargo().args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    dependencies()
}

/// Bans, licences and sources of everything we depend on.
fn dependencies() -> anyhow::Result<()> {
    let tools = target().join("tools");
    let deny = tools.join("bin/cargo-deny");
    let version = Command::new(&deny).arg("--version").output();
    let installed =
        version.is_ok_and(|out| out.stdout.trim_ascii().ends_with(CARGO_DENY.as_bytes()));
    if !installed {
        step(
            "cargo-deny",
            cargo()
                .args([
                    "install",
                    "cargo-deny",
                    "--locked",
                    "--force",
                    "--version",
                    CARGO_DENY,
                    "--root",
                ])
                .arg(&tools),
        )?;
    }
    step(
        "dependencies",
        Command::new(deny).current_dir(root()).args(["check", "bans", "licenses", "sources"]),
    )
}
