//! What every check starts from: the configuration, and the node's own identity as far as it can be used.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base::clock;
use identity::{IdentityFiles, NodeIdentity, Revocations, Role, SpiffeId};
use node::{
    config::{Config, IdentityConfig, IdentitySource},
    spire,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer},
};

use crate::setup::identity_files;

/// Who gives the node its certificates for the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A development CA.
    Dev,
    /// The authority this node holds.
    Authority,
    /// An authority of the mesh, once with a token and then with the certificate before.
    Mesh,
    /// Somebody else, who puts them into files.
    Files,
    /// A SPIRE agent.
    Spire,
}

/// What the checks know from the start.
pub(super) struct Facts {
    pub(super) config: Config,
    /// The files of the node's identity.
    pub(super) paths: IdentityFiles,
    pub(super) source: Source,
    /// How long an answer is waited for.
    pub(super) timeout: Duration,
    pub(super) now: SystemTime,
    /// `None`: it cannot be used, which the checks of certificates say.
    pub(super) own: Option<Own>,
    /// Why the SPIRE agent gave none.
    pub(super) agent_error: Option<String>,
    /// Who is revoked, as the node kept it.
    pub(super) revocations: Revocations,
}

/// The node's own identity, whether or not it is valid.
pub(super) struct Own {
    pub(super) chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    pub(super) roots: Vec<CertificateDer<'static>>,
}

impl Facts {
    pub(super) async fn gather(config: Config, dev_ca: Option<&Path>, timeout: Duration) -> Self {
        let paths = identity_files(&config, dev_ca);
        let source = source(&config, dev_ca);
        let (own, agent_error) = match source {
            Source::Spire => asked(&config, timeout).await,
            _ => (Own::read(&paths), None),
        };
        let now = clock::wall();
        let revocations = own.as_ref().and_then(|own| kept_revocations(&config, own, now));
        let revocations = revocations.unwrap_or_default();
        Self { paths, source, timeout, now, own, agent_error, revocations, config }
    }

    /// Whether the identity comes from a development CA.
    pub(super) fn is_dev(&self) -> bool {
        self.source == Source::Dev
    }

    /// How messages call the node's own certificate.
    pub(super) fn own_subject(&self) -> String {
        match self.source {
            Source::Spire => "certificate of the SPIRE agent".to_owned(),
            _ => self.paths.cert.display().to_string(),
        }
    }

    /// The id the configuration gives this node.
    pub(super) fn id(&self) -> SpiffeId {
        id(&self.config)
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

fn id(config: &Config) -> SpiffeId {
    SpiffeId {
        trust_domain: config.mesh.trust_domain.clone(),
        role: Role::Node,
        region: config.node.region.clone(),
        name: config.node.name.clone(),
    }
}

/// As `isobar node` decides it.
fn source(config: &Config, dev_ca: Option<&Path>) -> Source {
    match config.identity.source {
        _ if dev_ca.is_some() => Source::Dev,
        _ if config.authority.dir.is_some() => Source::Authority,
        IdentitySource::Mesh => Source::Mesh,
        IdentitySource::Files => Source::Files,
        IdentitySource::Spire => Source::Spire,
    }
}

/// What the SPIRE agent gives, or why it gives nothing.
async fn asked(config: &Config, timeout: Duration) -> (Option<Own>, Option<String>) {
    let wanted = id(config);
    let fetching = spire::fetch(config.identity.socket.as_deref(), &wanted);
    match tokio::time::timeout(timeout, fetching).await {
        Ok(Ok(identity)) => (Some(Own::of(&identity)), None),
        Ok(Err(error)) => (None, Some(error.to_string())),
        Err(_) => (None, Some(format!("the SPIRE agent does not answer within {timeout:?}"))),
    }
}

/// Whom the node knows to be revoked: what it kept, as far as an authority of its mesh signed it.
fn kept_revocations(config: &Config, own: &Own, now: SystemTime) -> Option<Revocations> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(own.roots.iter().cloned());
    let lists = node::kept_revocations(&IdentityConfig::dir(&config.node.state_dir));
    lists
        .iter()
        .filter_map(|list| list.verify(&roots, &config.mesh.trust_domain, now).ok())
        .reduce(|one, other| one.merge(&other))
}

impl Own {
    fn of(identity: &NodeIdentity) -> Self {
        let (chain, key) = identity.server_cert();
        Self { chain, key, roots: identity.trusted().to_vec() }
    }

    fn read(paths: &IdentityFiles) -> Option<Self> {
        let (chain, key) = identity::load_server_cert(&paths.cert, &paths.key).ok()?;
        Some(Self { chain, key, roots: identity::read_certificates(&paths.ca).ok()? })
    }
}
