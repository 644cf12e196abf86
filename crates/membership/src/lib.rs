//! Who is out there, what they serve, and how pressed they are.
//!
//! Pure: frames and time in, figures out. [`Reporter`] decides when this node says how pressed it is, [`View`] keeps what
//! others said and how old it is, [`wire`](decode) turns bytes into either and back. A node speaks only about itself; that
//! the speaker is who it says is checked where certificates are.
//!
//! So far the others are listed in the configuration. Finding them, and noticing their death by other means than silence,
//! will fill the same view.

mod report;
mod view;
mod wire;

pub use report::Reporter;
pub use view::{Presence, Seen, View};
pub use wire::{
    DATAGRAM_BYTES_MAX, Descriptor, EngineDescriptor, Frame, Hello, LoadFrame, PROTOCOL_VERSION,
    STREAM_BYTES_MAX, WireError, decode, encode, is_service,
};
