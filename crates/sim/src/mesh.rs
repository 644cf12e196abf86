//! What becomes of a mesh of thousands of nodes when networks lose, cut and delay, and nodes die, stop and lie?
//!
//! The production machines, [`membership::Mesh`] and [`membership::View`], on one heap of events: no sockets, no clock, and as
//! many threads as the caller's pool has. The same [`Config`] has the same [`Outcome`], to the last digit.
//!
//! - `fault`: what can go wrong, and when. `acts`: how it is done.
//! - `world`: the heap, and processes. `host`: one machine and its process.
//! - `wires`: links and frames. `links`: which there are. `network`: who hears whom, and when.
//! - `toy`: certificates and signatures without cryptography. `load`: the engines. `liar`: nodes that break the rules.
//! - `news`: what nodes are told. `check`: what must always hold. `measure`: figures.

mod acts;
mod check;
mod crew;
mod fault;
mod host;
mod liar;
mod links;
mod load;
mod measure;
mod network;
mod news;
mod toy;
mod wires;
mod world;

#[cfg(test)]
mod tests;

use std::time::Duration;

pub use fault::{Fault, FaultError};
pub use measure::{Report, Violation};

/// Above so many nodes a run is short unless asked otherwise, and takes gigabytes.
pub const LARGE: u32 = 2_000;

/// What is simulated.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Nodes in all.
    pub nodes: u32,
    /// Regions they are spread over evenly.
    pub regions: u32,
    /// Models: node *n* serves the *n*-th of them, around and around.
    pub models: u32,
    /// What every draw follows from.
    pub seed: u64,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// Simulated time; `None`: 90 s; for more than 2,000 nodes 30 s, or 13 s where nothing goes wrong.
    pub time: Option<Duration>,
    /// Share of packets that are lost, 0 to 1. [`Fault::Loss`] sets it too.
    pub loss: f64,
    /// A node whose news is told line by line in [`Outcome::story`].
    pub watch: Option<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            nodes: 100,
            regions: 1,
            models: 1,
            seed: 1,
            faults: vec![],
            time: None,
            loss: 0.01,
            watch: None,
        }
    }
}

/// A configuration that cannot be simulated. The fault is with whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl Config {
    /// Simulated time.
    #[must_use]
    pub fn duration(&self) -> Duration {
        let is_calm = self.faults.iter().all(|fault| *fault == Fault::Join);
        let usual_s = match (self.nodes > LARGE, is_calm) {
            (false, _) => 90,
            (true, false) => 30,
            // Long enough to join, and to see that figures are fresh.
            (true, true) => 13,
        };
        self.time.unwrap_or(const { Duration::from_secs(1) } * usual_s)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError(what));
        if self.nodes < 2 || self.nodes > 100_000 {
            return wrong(format!("nodes must be 2 to 100,000, not {}", self.nodes));
        }
        if self.regions == 0 || self.regions > self.nodes.min(256) {
            return wrong(format!(
                "regions must be 1 to 256 and at most as many as nodes, not {}",
                self.regions
            ));
        }
        if self.models == 0 || self.models > 64 {
            return wrong(format!("models must be 1 to 64, not {}", self.models));
        }
        if !(0.0..=0.5).contains(&self.loss) {
            return wrong("loss must be 0 to 50 percent".to_owned());
        }
        let time = self.duration();
        if !(Duration::from_secs(10)..=Duration::from_secs(86_400)).contains(&time) {
            return wrong(format!("time must be 10 s to a day, not {} s", time.as_secs()));
        }
        Ok(())
    }
}

/// What became of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The figures.
    pub report: Report,
    /// What did not hold, in order; the first hundred.
    pub violations: Vec<Violation>,
    /// What the watched node was told and told others.
    pub story: Vec<String>,
}

/// Runs a mesh from its first node to the end.
///
/// # Errors
/// [`ConfigError`]: nothing was run.
pub fn run(config: &Config) -> Result<Outcome, ConfigError> {
    config.check()?;
    Ok(world::World::new(config).run())
}
