//! What is logged, and how: to standard error, as `ISOBAR_LOG` asks for.

use std::io::IsTerminal as _;

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

use crate::Failure;

/// The variable that says what is logged; it is not a key of the configuration.
pub(crate) const VARIABLE: &str = "ISOBAR_LOG";

/// Logs to standard error: what `ISOBAR_LOG` asks for, by default `level` and above.
pub(crate) fn to_stderr(level: tracing::Level, as_json: bool) -> Result<(), Failure> {
    let filter = EnvFilter::builder()
        .with_default_directive(level.into())
        .with_env_var(VARIABLE)
        .from_env()
        .context("ISOBAR_LOG is not a list of directives such as info,transport=debug")
        .map_err(Failure::Usage)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if as_json {
        builder.json().init();
    } else {
        builder.init();
    }
    Ok(())
}
