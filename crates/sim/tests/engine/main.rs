//! Does a simulated engine behave on real sockets?
//!
//! - [`world`]: an engine, and clients of it.
//! - [`kserve`]: KServe v2, health and reflection over gRPC.
//! - [`openai`]: OpenAI's API and the metrics over HTTP.
//! - [`faults`]: faults, garbage, stopping and dying.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a failure is a failed test")]

mod faults;
mod kserve;
mod openai;
mod world;
