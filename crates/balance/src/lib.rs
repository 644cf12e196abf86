//! Which engine or peer gets the next attempt.
//!
//! Pure: counts in, a choice out. Time and randomness are arguments, so that a simulation drives the same code as a node.

mod choice;
mod slots;

pub use choice::{Candidate, least_utilised, two_choices};
pub use slots::Slots;
