//! Who is out there, what they serve, and how pressed they are.
//!
//! Pure: frames and time in, frames, links to make and news out. [`Mesh`] is the machine behind the gossip port, [`View`]
//! keeps what others said of their load and how old it is, [`wire`](decode) turns bytes into frames and back. A node speaks
//! only about itself, but of who is alive; that the speaker is who it says is checked where certificates are ([`Judge`]).

mod card;
mod cards;
mod descriptors;
mod digest;
mod id;
mod links;
mod mesh;
mod pool;
mod regions;
mod relays;
mod report;
mod strikes;
mod subscribe;
mod swim;
mod timers;
mod view;
mod wire;

pub use card::{Card, Disbelief, Facts, Judge, Judged};
pub use id::{NodeId, Pair};
pub use links::LINKS_MAX;
pub use mesh::{
    Candidate, Event, Input, Liveness, MemberStatus, Mesh, Output, Own, Peer, RegionOffer,
    RegionView, Seed, Status, Target, Transport, Way,
};
pub use view::{Figures, Presence, Seen, View};
pub(crate) use wire::{ASKED_MAX, PROTOCOL_OLDEST, SWIM_BYTES_MAX, decode_card};
pub use wire::{
    CARD_BYTES_MAX, DATAGRAM_BYTES_MAX, Descriptor, Digest, EngineDescriptor, Frame, Hello,
    LoadFrame, PROTOCOL_VERSION, Pool, SLOTS_MAX, STREAM_BYTES_MAX, WireError, decode, encode,
    encode_card, encode_descriptor, is_service,
};
