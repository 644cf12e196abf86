//! What can be wrong with an identity, and what to do about it.

use std::{io, path::PathBuf};

use base::TrustDomain;

use crate::{CsrError, RevocationError, Role, SpiffeId};

/// Why an identity cannot be used, made or believed. No message and no `Debug` output contains key material.
///
/// Errors that name a file are the operator's to mend, and a retry alone does not help; nothing has changed but what
/// [`IdentityError::File`] says was being written. Errors that name a peer end that handshake only.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A text is not the id of a mesh member; the fault is with whoever wrote it.
    #[error(
        "`{text}` is not a mesh id: {reason}; \
         write spiffe://<trust domain>/<node|authority|client|operator>/<region>/<name>"
    )]
    NotAnId {
        /// The text, shortened.
        text: String,
        /// Which part is wrong.
        reason: String,
    },

    /// The file system refused; a retry can help when the cause has gone.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that must exist does not.
    #[error("{path} does not exist: {remedy}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// Where it would come from.
        remedy: &'static str,
    },
    /// A file holds no certificate.
    #[error(
        "{path} holds no readable PEM certificate: \
         put `-----BEGIN CERTIFICATE-----` blocks there, a node's own certificate first"
    )]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// The machine has no roots we could believe.
    #[error(
        "this machine believes no certificate authority: say which to believe with --ca FILE, or install ca-certificates"
    )]
    NoRoots,
    /// A file holds something in a certificate's place that is none.
    #[error("{path} holds a damaged certificate ({reason}): issue it anew")]
    DamagedCertificate {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A file holds no private key.
    #[error(
        "{path} holds no readable PEM private key: \
         put an unencrypted PKCS#8, PKCS#1 or SEC1 key there"
    )]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// A private key can be read by other users of the machine.
    #[error(
        "other users can read the private key {path} (mode {mode:03o}): run `chmod 600 {path}`"
    )]
    ExposedKey {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A certificate and a key do not belong together.
    #[error("{key} is not the private key of {cert}: copy both from the same place")]
    KeyMismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// A certificate is of the future.
    #[error("{path} is valid only from {from}: check this machine's clock")]
    NotYetValid {
        /// The certificate's file.
        path: PathBuf,
        /// The first moment of its life.
        from: String,
    },
    /// A certificate is of the past.
    #[error(
        "{path} expired on {until}: get a new one with a token (`isobar ca token` at an authority, then \
         `isobar join --token TOKEN` here; if `isobar ca dev` made it, delete it and run that again), or check this machine's clock"
    )]
    Expired {
        /// The certificate's file.
        path: PathBuf,
        /// The last moment of its life.
        until: String,
    },
    /// The mesh would not believe this certificate.
    #[error("{ca} does not vouch for {cert} ({source}): use certificates of one CA")]
    Untrusted {
        /// The certificate's file.
        cert: PathBuf,
        /// The file of the trust roots.
        ca: PathBuf,
        /// Which check failed.
        source: webpki::Error,
    },
    /// A certificate is good but is not a node's.
    #[error("{path} is not the certificate of a node: {source}")]
    NotANodeCertificate {
        /// The certificate's file.
        path: PathBuf,
        /// What it lacks.
        source: Box<Self>,
    },

    /// A directory belongs to another mesh.
    #[error(
        "the development CA in {dir} is for the trust domain `{found}`, not `{wanted}`: \
         set mesh.trust_domain to `{found}`, or choose another directory"
    )]
    OtherTrustDomain {
        /// The directory of the CA.
        dir: PathBuf,
        /// The trust domain its certificate speaks for.
        found: TrustDomain,
        /// The trust domain that was asked for.
        wanted: TrustDomain,
    },
    /// A directory holds a CA, but not one made here.
    #[error(
        "{path} is not the certificate of a development CA ({reason}): choose another directory"
    )]
    NotADevCa {
        /// The CA's certificate.
        path: PathBuf,
        /// What it lacks.
        reason: String,
    },
    /// What lies in an authority's directory cannot serve as its authority; a retry alone does not help.
    #[error("{path} cannot serve the authority: {reason}")]
    NotAnAuthority {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// There is an authority where one was to be made; nothing has changed.
    #[error("{path} is there already: choose another directory for a new authority, or remove it")]
    AuthorityThere {
        /// What is in the way.
        path: PathBuf,
    },
    /// The authority must not sign any more; nothing was signed.
    #[error(
        "the issuing certificate ends on {until}: \
         make the next one with `isobar ca rotate --issuer` before anybody can join or renew"
    )]
    IssuerEnding {
        /// The last moment of its life.
        until: String,
    },
    /// A request for a certificate is refused; the fault is with whoever sent it, and nothing was signed.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// Something was asked of the authority that it does not do; nothing has changed.
    #[error("{0}")]
    Scope(String),
    /// The next step of a rotation would cut off whoever has not followed the last one; nothing has changed.
    #[error(
        "the next step may be done from {at}, when every certificate that was issued before the last step has been \
         renewed: run this again then, or add --now if no node is to be spared"
    )]
    NotYet {
        /// When.
        at: String,
    },
    /// A list of revocations cannot be used or made.
    #[error(transparent)]
    Revocation(#[from] RevocationError),
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Issue(#[from] rcgen::Error),

    /// A peer showed no certificate.
    #[error("the peer presented no certificate")]
    NoPeerCertificate,
    /// A peer's certificate cannot be parsed.
    #[error("the certificate cannot be parsed: {0}")]
    Unreadable(String),
    /// A certificate does not carry exactly one URI (X.509-SVID standard §2).
    #[error(
        "the certificate carries {found} URI names; a member of the mesh has exactly one, its SPIFFE id"
    )]
    UriNames {
        /// How many it carries.
        found: usize,
    },
    /// A member of the mesh that is not a node.
    #[error("{0} is not a node; only certificates with the role `node` are peers")]
    NotANode(SpiffeId),
    /// A member of the mesh whose role is not the one that is wanted.
    #[error("{found} does not have the role `{wanted}`")]
    OtherRole {
        /// Who it is.
        found: SpiffeId,
        /// The role it should have.
        wanted: Role,
    },
    /// An authority revoked the certificate.
    #[error("{id} was revoked: its operator must join it again with a new token")]
    Revoked {
        /// Whose certificate it was.
        id: SpiffeId,
    },
    /// Whoever answered is not under the root the token names.
    #[error(
        "who answered is not an authority of the mesh the token is for: it showed no certificate under the root {wanted}…; check the address, or make a new token if the mesh's root was changed since"
    )]
    OtherRoot {
        /// The beginning of the root's fingerprint.
        wanted: String,
    },
    /// What a node is said to say of itself is not believed, or cannot be said.
    #[error("a node's card cannot be used: {0}")]
    Card(String),
    /// A node's card is not signed with the key of the certificates that it carries and that are good.
    #[error("a node's card cannot be used: its signature does not fit it")]
    ForgedCard,
    /// A renewed identity is somebody else's.
    #[error("the new certificate is for {found}, and this node is {ours}: nothing was changed")]
    AnotherNode {
        /// Whose it is.
        found: SpiffeId,
        /// Who this node is.
        ours: SpiffeId,
    },
    /// A node of another mesh.
    #[error("{found} is not of the trust domain `{ours}`")]
    ForeignPeer {
        /// Who it is.
        found: SpiffeId,
        /// Our trust domain.
        ours: TrustDomain,
    },
    /// A node of our mesh, but not the one that was called.
    #[error("called {expected}, and {found} answered: check the address of the peer")]
    WrongPeer {
        /// Who was called.
        expected: SpiffeId,
        /// Who answered.
        found: SpiffeId,
    },

    /// The TLS library refused a certificate, a key or a setting.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}
