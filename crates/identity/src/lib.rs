//! Who a node is, how it proves it, and whom it believes.
//!
//! A member of the mesh is a SPIFFE id in a certificate signed by the mesh's CA; host names and addresses prove nothing
//! between peers. This crate reads and makes such identities ([`NodeIdentity`], [`DevCa`]) and turns them into `rustls`
//! configurations; connections are somebody else's. Deliberately absent: revocation, which is why peers never resume a
//! session (a resumed one would skip every check made here), and TLS 1.2.

mod certificate;
mod dev;
mod error;
mod files;
mod id;
mod node;
mod tls;

pub use certificate::peer_id;
pub use dev::DevCa;
pub use error::IdentityError;
pub use id::{Role, SpiffeId};
pub use node::NodeIdentity;
pub use tls::{ExpectedPeer, client_config, client_server_config, load_server_cert};
