//! Simulated GPUs: an inference server to try a mesh with, and the machines it is made of. Simulated meshes: thousands of nodes
//! without a socket.
//!
//! - `batch`: a GPU that batches continuously, without IO; time is an argument.
//! - `fault`: what can be wrong with it.
//! - `prefix`: which beginnings of prompts have been seen before.
//! - [`words`]: what a simulated model writes.
//! - `report`: what it says of itself in the trailers of its replies.
//! - [`engine`]: a server on real sockets: KServe v2 over gRPC, OpenAI's API over HTTP, and a port that injects faults.
//! - [`mesh`]: the machines of membership and load, on one heap of events.
//!
//! Deliberately absent: any model. Tokens are words that follow from the prompt, and prompts are cut at white space.

mod admin;
mod batch;
pub mod engine;
mod fault;
mod gpu;
mod health;
mod kserve;
pub mod mesh;
mod metrics;
mod openai;
mod prefix;
mod report;
mod tensors;
pub mod words;
