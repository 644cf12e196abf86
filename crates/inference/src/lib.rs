//! What does a call ask for? The protocols engines speak, and the one thing a node reads from a body: the model's name.
//!
//! Nothing here does IO or keeps a body. A caller pushes the bytes it relays past a [`ModelReader`] and routes as soon
//! as the reader knows; decoding messages into types is deliberately absent.

mod fields;
mod inflate;
mod protocol;
mod reader;

pub use protocol::{Protocol, UnknownProtocol, is_idempotent, kserve_model_field};
pub use reader::{Encoding, ModelReader, Progress, ReadError};
