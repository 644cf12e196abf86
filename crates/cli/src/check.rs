//! `isobar check`: what an operator would otherwise find out at three in the morning.
//!
//! Nothing is started, written or changed. Each file below is one subject; [`all`] is their order in the report.

mod access;
mod authority;
mod certificates;
mod clock;
mod dns;
mod engines;
mod facts;
mod finding;
mod life;
mod listen;
mod peers;
mod seeds;
mod served;
mod system;
mod traps;

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;
use node::config::Config;
use transport::Prober;

use crate::{Failure, log, output, setup, target};
use facts::Facts;
use finding::{Finding, Level};

/// Options of `isobar check`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Configuration file; `conf.d/*.toml` beside it is merged
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Development CA the node takes its identity from
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = ".isobar")]
    dev_ca: Option<PathBuf>,
    /// How long an answer from elsewhere is waited for
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = target::duration)]
    timeout: Duration,
    /// Print the findings as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    log::to_stderr(tracing::Level::ERROR, options.json)?;
    let config = Config::load(&options.config, &setup::environment()).map_err(Failure::usage)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make a runtime")?;
    let found = runtime.block_on(async {
        all(&Facts::gather(config, options.dev_ca.as_deref(), options.timeout).await).await
    });
    // Names that are being looked up are not waited for.
    runtime.shutdown_background();
    let findings = found?;
    if options.json {
        output::json(&finding::json(&findings))?;
    } else {
        output::text(&finding::text(&findings))?;
    }
    let is_wrong = findings.iter().any(|finding| finding.level == Level::Error);
    if is_wrong { Err(Failure::Said) } else { Ok(()) }
}

/// Every check, in the order of the report.
async fn all(facts: &Facts) -> anyhow::Result<Vec<Finding>> {
    let prober = Prober::new().context("cannot open a UDP socket")?;
    let doors = listen::doors(&facts.config.listen);
    let (served, dns, clock, peers, seeds, engines) = tokio::join!(
        served::check(facts, &prober, &doors),
        dns::check(facts),
        clock::check(facts),
        peers::check(facts, &prober),
        seeds::check(facts, &prober),
        engines::check(facts),
    );
    prober.close().await;
    let findings = [
        certificates::check(facts),
        authority::check(facts),
        access::check(facts),
        listen::check(facts, &doors, &served),
        served.findings,
        system::check(),
        traps::check(facts),
        dns,
        clock,
        peers,
        seeds,
        engines,
    ];
    Ok(findings.into_iter().flatten().collect())
}
