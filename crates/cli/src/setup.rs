//! What `isobar node` and `isobar check` read alike: the environment, and where a node's identity lies.

use std::path::Path;

use identity::IdentityFiles;
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

/// Where a node's identity lies: with a development CA in `dev_ca`, or where the configuration says.
pub(crate) fn identity_files(config: &Config, dev_ca: Option<&Path>) -> IdentityFiles {
    let Some(dir) = dev_ca else { return config.identity.files(&config.node.state_dir) };
    let (region, name) = (config.node.region.as_str(), config.node.name.as_str());
    let node = dir.join("nodes").join(region).join(name);
    IdentityFiles { ca: dir.join("ca.pem"), ..IdentityFiles::in_dir(&node) }
}
