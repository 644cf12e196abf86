//! Where a node's certificate comes from, and whether it issues those of others.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;

use identity::IdentityFiles;

/// Where the node's certificate for the mesh comes from.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct IdentityConfig {
    /// Who renews the certificate: "mesh" (this node, at an authority in `mesh.seeds` or at its own `authority`), "files"
    /// (somebody else, such as cert-manager: the files are watched) or "spire" (a SPIRE agent, over the Workload API).
    /// Default "mesh".
    pub source: IdentitySource,
    /// File of the roots to believe, PEM; only with `source = "files"`. Default: identity/ca.pem in `node.state_dir`.
    pub ca: Option<PathBuf>,
    /// File of the node's certificate and its intermediates, PEM, own first; only with `source = "files"`. Default:
    /// identity/cert.pem in `node.state_dir`.
    pub cert: Option<PathBuf>,
    /// File of the key of the certificate, PEM, readable by its owner only; only with `source = "files"`. Default:
    /// identity/key.pem in `node.state_dir`.
    pub key: Option<PathBuf>,
    /// Where the SPIRE agent listens, such as "unix:///run/spire/agent.sock"; only with `source = "spire"`. Default: what
    /// SPIFFE_ENDPOINT_SOCKET in the environment says.
    pub socket: Option<String>,
}

/// Who renews a node's certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IdentitySource {
    /// The node itself, at an authority of the mesh.
    #[default]
    Mesh,
    /// Somebody else, who replaces files.
    Files,
    /// A SPIRE agent.
    Spire,
}

impl IdentityConfig {
    /// The directory in which a node keeps what is its own.
    #[must_use]
    pub fn dir(state_dir: &Path) -> PathBuf {
        state_dir.join("identity")
    }

    /// The files the identity is read from.
    #[must_use]
    pub fn files(&self, state_dir: &Path) -> IdentityFiles {
        let own = IdentityFiles::in_dir(&Self::dir(state_dir));
        IdentityFiles {
            ca: self.ca.clone().unwrap_or(own.ca),
            cert: self.cert.clone().unwrap_or(own.cert),
            key: self.key.clone().unwrap_or(own.key),
        }
    }
}

/// The authority this node holds.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AuthorityConfig {
    /// Directory of the mesh's issuing key, made by `isobar ca init`: its `authority` directory. With it this node signs
    /// certificates, for others at its gossip port and for itself. Default: none, it asks an authority in `mesh.seeds`.
    pub dir: Option<PathBuf>,
}
