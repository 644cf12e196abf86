//! Who a node is, how it proves it, and whom it believes.
//!
//! A member of the mesh is a SPIFFE id in a certificate signed by the mesh's CA; host names and addresses prove nothing
//! between peers. This crate reads and makes such identities ([`NodeIdentity`], [`Authority`], [`DevCa`]) and turns them
//! into `rustls` configurations; connections are somebody else's. Deliberately absent: resumed sessions between peers,
//! which would skip every check made here, and TLS 1.2.

mod authority;
mod card;
mod certificate;
mod client;
mod dev;
mod error;
mod files;
mod id;
mod live;
mod node;
mod request;
mod revocation;
mod survey;
mod tls;
mod token;

pub use authority::{
    Ask, Authority, AuthorityStatus, CsrError, Redemption, Refusal, Rotated, TokenScope,
    TokenStatus,
};
pub use certificate::{CertificateSummary, hex_fingerprint, peer_id};
pub use client::{ClientNames, ClientRoots};
pub use dev::DevCa;
pub use error::IdentityError;
pub use files::{generation, write_file};
pub use id::{Role, SpiffeId};
pub use live::{Identity, Renewal, Urgency, Validity};
pub use node::{IdentityFiles, NodeIdentity};
pub use request::CertificateRequest;
pub use revocation::{
    REVOCATIONS_MAX, REVOCATIONS_MAX_BYTES, RevocationError, Revocations, Revoked,
    SignedRevocations,
};
pub use survey::{Described, PeerFault, describe, judge_peer, observing_config, read_certificates};
pub use tls::{
    ClientFacing, ENROL_ALPN, ExpectedPeer, ServedCertificate, client_config, client_server_config,
    join_client_config, load_server_cert,
};
pub use token::{NamePattern, Token, TokenError};
