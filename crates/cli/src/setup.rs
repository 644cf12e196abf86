//! What `isobar node` and `isobar check` read alike: the environment, and where a node's identity lies.

use std::path::{Path, PathBuf};

use node::config::Config;

use crate::log;

/// What environment variables that set keys of the configuration begin with.
const ENVIRONMENT: &str = "ISOBAR_";

/// The environment variables that set keys of the configuration.
pub(crate) fn environment() -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| name.starts_with(ENVIRONMENT) && name != log::VARIABLE)
        .map(|(name, value)| (name, value.to_string_lossy().into_owned()))
        .collect()
}

/// The files of a node's identity.
#[derive(Clone, Debug)]
pub(crate) struct IdentityPaths {
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl IdentityPaths {
    /// Where they lie when no development CA is given.
    pub(crate) fn of_state(config: &Config) -> Self {
        let dir = config.node.state_dir.join("identity");
        Self { ca: dir.join("ca.pem"), cert: dir.join("cert.pem"), key: dir.join("key.pem") }
    }

    /// Where the development CA in `dir` keeps them.
    pub(crate) fn of_dev_ca(dir: &Path, config: &Config) -> Self {
        let (region, name) = (config.node.region.as_str(), config.node.name.as_str());
        let node = dir.join("nodes").join(region).join(name);
        Self { ca: dir.join("ca.pem"), cert: node.join("cert.pem"), key: node.join("key.pem") }
    }
}
