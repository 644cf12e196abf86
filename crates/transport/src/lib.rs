//! gRPC over HTTP/3 on QUIC, and over HTTP/2 beside it, behind one channel type and one service type.
//!
//! - A call is an `http::Request<tonic::body::Body>`, a reply an `http::Response<tonic::body::Body>`: what generated tonic
//!   clients and servers speak, and what a relay can pass on without decoding.
//! - [`Worker`]s are single-threaded runtimes that share nothing but ports; each has its own QUIC endpoint and pool.
//! - A [`Server`] serves any tower service on h2 and h3 alike; a [`Channel`] calls a [`Target`] over whichever works.
//! - Every bound is in [`Limits`].
//!
//! Sources: gRPC PROTOCOL-HTTP2, gRPC proposal G2 (HTTP/3), RFC 9114, RFC 9204, RFC 9110, RFC 9218.
//! TLS comes from the caller as `rustls` configurations: this crate does not know what an identity is.

mod channel;
mod dial;
mod error;
pub mod grpc;
pub mod h3;
mod http1;
mod http2;
mod lease;
mod limits;
mod link;
mod pool;
mod probe;
mod progress;
mod quic;
mod server;
mod unread;
mod worker;

pub use channel::Channel;
pub use dial::{Dialer, PeerTls, Target, Via};
pub use error::{CancelSource, TransportError};
pub use lease::{Lease, Lessor};
pub use limits::Limits;
pub use link::{Answer, Incoming, LINK_ALPN, Link, LinkTransport, Links, NoLink};
pub use pool::Pool;
pub use probe::{Offload, Prober, Sight, Unreached, offload, towards};
pub use progress::{Acknowledge, Progress, Watching};
pub use quic::{QuicKeys, SocketBuffers, bind_udp};
pub use server::{CallInfo, Listener, Port, Protocol, Server, ServerTls};
pub use worker::{Endpoints, Worker, Workers};

#[cfg(test)]
mod tests;
