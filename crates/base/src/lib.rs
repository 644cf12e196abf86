//! Words every other crate uses: names, places, deadlines, and the one place that reads the clock.
//!
//! Nothing here does IO. [`clock`] is the single exception to "time is an argument": the crates of floors 2 to 4 read
//! the clock through it and hand the instant down.

pub mod clock;
mod deadline;
mod load;
mod name;

pub use deadline::{Deadline, TimeoutError, format_grpc_timeout, parse_grpc_timeout};
pub use load::{ASSUMED_SLOTS, Load};
pub use name::{
    EngineName, ModelName, NameError, NodeName, RegionName, TenantName, TrustDomain, ZoneName,
};
