//! What a node must know of itself before it says a word: which process it is, and where others reach it.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::config::Config;

/// The file of the epoch, in `node.state_dir`.
const EPOCH: &str = "epoch";
/// A number of 64 bits and a line's end are shorter.
const EPOCH_BYTES_MAX: u64 = 64;

/// Why a node cannot tell which of its processes it is. Nothing was said to anybody.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// What is there is no epoch.
    #[error(
        "{path} does not hold the number of this node's last start ({why}): remove it, if this machine's clock is right; \
         the node then counts from the clock, and nobody takes it for an earlier process of itself"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It cannot be kept.
    #[error(
        "the number of this start cannot be kept in {path} ({why}): make node.state_dir a directory this process may write to. \
         Without it others could take this node for an earlier process of itself"
    )]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// The epoch of this process, greater than that of every process of this node before, whatever the clock says: it is on disk
/// before it is returned.
pub(crate) fn epoch(state_dir: &Path, now: SystemTime) -> Result<u64, EpochError> {
    let path = state_dir.join(EPOCH);
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let clock = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let unreadable = |why: String| EpochError::Unreadable { path: path.clone(), why };
    let epoch = match read(&path).map_err(unreadable)? {
        None => clock,
        Some(u64::MAX) => return Err(unreadable("no number is greater".to_owned())),
        Some(last) => clock.max(last + 1),
    };
    let unwritable = |why: String| EpochError::Unwritable { path: path.clone(), why };
    fs::create_dir_all(state_dir).map_err(|error| unwritable(error.to_string()))?;
    identity::write_file(&path, format!("{epoch}\n").as_bytes())
        .map_err(|error| unwritable(error.to_string()))?;
    Ok(epoch)
}

fn read(path: &Path) -> Result<Option<u64>, String> {
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    if !found.is_file() || found.len() > EPOCH_BYTES_MAX {
        return Err("it is something else".to_owned());
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    text.trim().parse().map(Some).map_err(|error| format!("{error}"))
}

/// Where others reach the port that was bound at `bound`: host and port.
pub(crate) fn address(config: &Config, bound: SocketAddr) -> String {
    if let Some(host) = &config.node.address {
        return host.with_port(bound.port());
    }
    let ip = if bound.ip().is_unspecified() { reached_at(config) } else { bound.ip() };
    SocketAddr::new(ip, bound.port()).to_string()
}

/// The address that leads furthest.
fn reached_at(config: &Config) -> IpAddr {
    let all = config.listen.reachable();
    let outside = all.iter().rev().find(|ip| !ip.is_loopback());
    outside.or_else(|| all.last()).copied().unwrap_or_else(|| Ipv4Addr::LOCALHOST.into())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(ms: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(ms)
    }

    #[test]
    fn each_start_has_a_greater_epoch_whatever_the_clock_says() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state/a");
        assert_eq!(epoch(&state, at(1_000)).unwrap(), 1_000);
        assert_eq!(epoch(&state, at(1_000)).unwrap(), 1_001);
        assert_eq!(epoch(&state, at(5)).unwrap(), 1_002, "a clock that was set back");
        assert_eq!(epoch(&state, at(9_000)).unwrap(), 9_000);
        assert_eq!(fs::read_to_string(state.join(EPOCH)).unwrap(), "9000\n");
    }

    #[test]
    fn what_is_no_epoch_is_said_and_left() {
        let dir = tempfile::tempdir().unwrap();
        for wrong in ["", "five", "-5", "99999999999999999999", "18446744073709551615"] {
            fs::write(dir.path().join(EPOCH), wrong).unwrap();
            let error = epoch(dir.path(), at(1)).unwrap_err().to_string();
            assert!(error.contains("remove it"), "{error}");
            assert_eq!(fs::read_to_string(dir.path().join(EPOCH)).unwrap(), wrong);
        }
        fs::write(dir.path().join(EPOCH), "1".repeat(1000)).unwrap();
        assert!(matches!(epoch(dir.path(), at(1)), Err(EpochError::Unreadable { .. })));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = epoch(&file, at(1)).unwrap_err().to_string();
        assert!(error.contains("file/epoch"), "{error}");
    }

    fn config(text: &str) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        fs::write(&path, format!("[node]\nname = \"a\"\n{text}")).unwrap();
        Config::load(&path, &[]).unwrap()
    }

    #[test]
    fn a_node_is_reached_where_it_says_or_where_it_listens() {
        let bound: SocketAddr = "192.0.2.7:9445".parse().unwrap();
        let any: SocketAddr = "0.0.0.0:9445".parse().unwrap();
        let silent = config("");
        assert_eq!(address(&silent, bound), "192.0.2.7:9445");
        let found: SocketAddr = address(&silent, any).parse().unwrap();
        assert!(!found.ip().is_unspecified() && found.port() == 9445);
        let named = config("address = \"gpu-1.example\"\n");
        assert_eq!(address(&named, bound), "gpu-1.example:9445");
        assert_eq!(address(&named, any), "gpu-1.example:9445");
        let partly = config("[listen]\nclients = \"127.0.0.1:8443\"\npeers = \"192.0.2.9:8444\"\n");
        assert_eq!(address(&partly, any), "192.0.2.9:9445", "one that another port names");
    }
}
