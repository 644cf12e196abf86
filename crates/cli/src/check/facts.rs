//! What every check starts from: the configuration, and the node's own identity as far as it can be used.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base::clock;
use identity::{IdentityFiles, Role, SpiffeId};
use node::config::Config;
use rustls::{
    ClientConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
};

use crate::setup::identity_files;

/// What the checks know from the start.
pub(super) struct Facts {
    pub(super) config: Config,
    /// The files of the node's identity.
    pub(super) paths: IdentityFiles,
    pub(super) is_dev: bool,
    /// How long an answer is waited for.
    pub(super) timeout: Duration,
    pub(super) now: SystemTime,
    /// `None`: the files cannot be used, which the checks of certificates say.
    pub(super) own: Option<Own>,
}

/// The node's own identity, whether or not it is valid.
pub(super) struct Own {
    pub(super) chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    pub(super) roots: Vec<CertificateDer<'static>>,
}

impl Facts {
    pub(super) fn gather(config: Config, dev_ca: Option<&Path>, timeout: Duration) -> Self {
        let paths = identity_files(&config, dev_ca);
        let own = Own::read(&paths);
        Self { paths, is_dev: dev_ca.is_some(), timeout, now: clock::wall(), own, config }
    }

    /// The id the configuration gives this node.
    pub(super) fn id(&self) -> SpiffeId {
        SpiffeId {
            trust_domain: self.config.mesh.trust_domain.clone(),
            role: Role::Node,
            region: self.config.node.region.clone(),
            name: self.config.node.name.clone(),
        }
    }

    /// The files of the certificate for clients; `None`: the node's own, or none at all.
    pub(super) fn tls_files(&self) -> Option<(&PathBuf, &PathBuf)> {
        self.config.tls.cert.as_ref().zip(self.config.tls.key.as_ref())
    }

    /// TLS for a look at a port, with our certificate where there is one.
    pub(super) fn tls(&self) -> Result<ClientConfig, String> {
        let own = self.own.as_ref().map(|own| (own.chain.clone(), own.key.clone_key()));
        identity::observing_config(own).map_err(|error| error.to_string())
    }
}

impl Own {
    fn read(paths: &IdentityFiles) -> Option<Self> {
        let (chain, key) = identity::load_server_cert(&paths.cert, &paths.key).ok()?;
        Some(Self { chain, key, roots: identity::read_certificates(&paths.ca).ok()? })
    }
}
