//! A node: configuration in, a running mesh node out.
//!
//! The whole path of a call is two files: `ingress` for calls from clients and `egress` for calls from peers, each
//! a list of layers in order. Everything else here serves one of those layers, or puts the parts together.

mod access;
mod admin;
mod arrivals;
mod attempt;
mod buffers;
mod catalog;
mod checks;
mod collect;
pub mod config;
mod egress;
mod engines;
mod gossip;
mod health;
mod hop;
mod ingress;
mod joining;
mod metrics;
mod model;
mod node;
mod offer;
mod orca;
mod own;
mod peers;
mod probes;
mod rca;
mod readiness;
mod record;
mod reflection;
mod refusal;
mod renewal;
mod replay;
mod router;
mod scrape;
mod seeds;
mod services;
mod shares;
mod signer;
pub mod spire;
mod steps;
mod throttle;
mod trust;

pub use access::{AccessError, KeySetError};
pub use collect::reflect;
pub use joining::{EnrolError, Enrolled, KnownPeer, join};
pub use node::{Addresses, ClientCertificate, Credentials, Node, NodeError, check_access};
pub use own::EpochError;
pub use seeds::look_up_srv;
pub use signer::Signer;
pub use trust::{keep_revocations, kept_revocations};
