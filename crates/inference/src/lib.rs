//! What does a call ask for, and what does an engine say of itself? The protocols engines speak, the one thing a node reads
//! from a body (the model's name), and the declarations a server reflects.
//!
//! Nothing here does IO or keeps a body. A caller pushes the bytes it relays past a [`ModelReader`] and routes as soon
//! as the reader knows; decoding messages into types is deliberately absent.

mod declarations;
mod fields;
mod inflate;
mod protocol;
mod reader;
mod reflection;
mod watch;

pub use declarations::{DeclarationError, Declarations};
pub use protocol::{Protocol, UnknownProtocol, is_idempotent, kserve_model_field};
pub use reader::{Encoding, ModelReader, Progress, ReadError};
pub use reflection::{Collector, Reflected, ReflectionError};
pub use watch::ModelWatch;
