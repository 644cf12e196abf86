//! Which engine or peer gets the next attempt, and what attempts say about engines and peers.
//!
//! Pure: facts in, a choice out. Time and randomness are arguments, so that a simulation drives the same code as a node.
//!
//! - [`Engine`] is one engine of this node: room, health, breaker, times. One per node, behind one lock.
//! - [`choose`] picks a server from what is known of all of them.
//! - [`Outcome`] is what an attempt came to: busy is not broken.
//! - [`share`] says how many slots of an engine several nodes front are this node's.
//! - [`RetryBudget`] bounds how many attempts are retries.

mod average;
mod breaker;
mod budget;
mod engine;
mod health;
mod outcome;
mod pressure;
mod route;
mod share;

pub use breaker::Breaker;
pub use budget::RetryBudget;
pub use engine::{Engine, Said, Ticket};
pub use health::{Health, HealthChange, HealthConfig, Verdict};
pub use outcome::Outcome;
pub use route::{Fit, Place, Server, Standing, choose};
pub use share::{Owner, share};
