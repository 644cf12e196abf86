//! Who a node is: its identity from a development CA, its own authority, files or a SPIRE agent; and what it shows to clients.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use base::clock;
use identity::{ClientFacing, DevCa, Identity, NodeIdentity, Role, ServedCertificate, SpiffeId};
use node::{
    ClientCertificate, Credentials, Signer,
    config::{Config, IdentityConfig, IdentitySource},
    spire,
};

use crate::Failure;

/// The credentials of a node, and where the roots that clients are to believe lie. What is made for it anew is kept on disk
/// if `keeps`.
pub(crate) async fn of(
    config: &Config,
    dev_ca: Option<&Path>,
    keeps: bool,
) -> Result<(Credentials, PathBuf), Failure> {
    let mut signer = None;
    let state_dir = &config.node.state_dir;
    let files = config.identity.files(state_dir);
    let (identity, ca) = if let Some(dir) = dev_ca {
        development(config, dir)?
    } else if let Some(dir) = &config.authority.dir {
        let (identity, opened) = own_authority(config, dir)?;
        signer = Some(opened);
        if keeps {
            identity.store(&IdentityConfig::dir(state_dir)).map_err(Failure::usage)?;
        }
        (identity, files.ca)
    } else if config.identity.source == IdentitySource::Spire {
        let found = spire::fetch(config.identity.socket.as_deref(), &wanted(config)).await;
        let identity = found.map_err(Failure::usage)?;
        if keeps {
            identity.store_roots(&IdentityConfig::dir(state_dir)).map_err(Failure::usage)?;
        }
        (identity, files.ca)
    } else {
        let identity =
            files.load().context("this node has no identity it can use").map_err(Failure::Usage)?;
        (identity, files.ca)
    };
    matches_config(&identity, config)?;
    let ca = std::path::absolute(&ca).with_context(|| format!("{}", ca.display()))?;
    let identity = Identity::new(identity);
    let certificate = for_clients(config, &identity)?;
    Ok((Credentials { identity, certificate, signer, is_fixed: dev_ca.is_some() }, ca))
}

fn development(config: &Config, dir: &Path) -> Result<(NodeIdentity, PathBuf), Failure> {
    let now = clock::wall();
    let authority =
        DevCa::open_or_create(dir, &config.mesh.trust_domain, now).map_err(Failure::usage)?;
    let (region, name) = (&config.node.region, &config.node.name);
    let identity = authority.node(region, name, &config.listen.addresses(), now);
    Ok((identity.map_err(Failure::usage)?, authority.ca_path()))
}

/// A node that holds the authority certifies itself at every start.
fn own_authority(config: &Config, dir: &Path) -> Result<(NodeIdentity, Signer), Failure> {
    let node = &config.node;
    let signer = Signer::open(dir, &node.region, &node.name).map_err(Failure::usage)?;
    if signer.trust_domain() != config.mesh.trust_domain {
        return Err(Failure::Usage(anyhow::anyhow!(
            "the authority in {} signs for {}, and mesh.trust_domain is {}: use one of the two for both",
            dir.display(),
            signer.trust_domain(),
            config.mesh.trust_domain,
        )));
    }
    let kept = IdentityConfig::dir(&node.state_dir);
    let identity = signer.own_identity(&kept, &config.listen.reachable());
    Ok((identity.map_err(Failure::usage)?, signer))
}

fn wanted(config: &Config) -> SpiffeId {
    SpiffeId {
        trust_domain: config.mesh.trust_domain.clone(),
        role: Role::Node,
        region: config.node.region.clone(),
        name: config.node.name.clone(),
    }
}

/// A node may only speak under the name its certificate gives it.
fn matches_config(identity: &NodeIdentity, config: &Config) -> Result<(), Failure> {
    let (found, configured) = (identity.id(), wanted(config));
    if *found != configured {
        return Err(Failure::Usage(anyhow::anyhow!(
            "the certificate is for {found}, and the configuration says node {} in region {} of {}: \
             set node.name, node.region and mesh.trust_domain to what the certificate says, or get another",
            configured.name,
            configured.region,
            configured.trust_domain,
        )));
    }
    Ok(())
}

/// The certificate for clients: from `[tls]`, or the node's own, which also holds for localhost and the node's name.
fn for_clients(config: &Config, identity: &Identity) -> Result<ClientCertificate, Failure> {
    let (Some(cert), Some(key)) = (&config.tls.cert, &config.tls.key) else {
        return Ok(ClientCertificate { shown: ClientFacing::Mesh(identity.clone()), files: None });
    };
    let (chain, secret) = identity::load_server_cert(cert, key).map_err(Failure::usage)?;
    let served = ServedCertificate::new(chain, secret).map_err(Failure::usage)?;
    let files = Some((cert.clone(), key.clone()));
    Ok(ClientCertificate { shown: ClientFacing::Own(served), files })
}
