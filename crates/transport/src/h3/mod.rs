//! HTTP/3 (RFC 9114) for gRPC, on quinn.
//!
//! Framing, QPACK and header rules are machines without IO ([`qpack`] and the private `frame` and `headers`); `connection`
//! and `stream` put them on quinn; `server` and `client` are the two ends.
//!
//! Deliberately absent: server push, a dynamic QPACK table, CONNECT and WebTransport. An error of one request is an error
//! of its stream wherever the RFC allows it.

pub(crate) mod client;
mod code;
mod connection;
mod frame;
mod headers;
pub mod qpack;
pub(crate) mod server;
mod stream;
mod varint;

pub use code::Code;
pub(crate) use connection::UNI_STREAMS;
