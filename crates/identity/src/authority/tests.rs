//! What an authority promises, with its directory in a temporary one and the time as an argument.

mod lists;
mod rotating;
mod signing;
mod tokens;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base::{NodeName, RegionName, TrustDomain};
use rustls::{RootCertStore, pki_types::CertificateDer};
use tempfile::TempDir;

use super::{Ask, Authority, Refusal, TokenScope, make_key, make_request};
use crate::{
    IdentityError, Role, SpiffeId,
    certificate::{Side, unix_time, validity, verify_chain},
    node::root_store,
    tls,
};

const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = HOUR.saturating_mul(24);
const REMOTE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7));

/// A mesh in a directory of its own, at a moment of its own.
struct Mesh {
    dir: TempDir,
}

impl Mesh {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Authority::init(dir.path(), &domain(), DAY, now()).unwrap();
        Self { dir }
    }

    fn open(&self, now: SystemTime) -> Authority {
        Authority::open(self.dir.path(), now).unwrap()
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }
}

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn domain() -> TrustDomain {
    "mesh.test".parse().unwrap()
}

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn region() -> RegionName {
    "eu".parse().unwrap()
}

fn id(role: Role, name: &str) -> SpiffeId {
    SpiffeId { trust_domain: domain(), role, region: region(), name: name.parse().unwrap() }
}

fn csr() -> Vec<u8> {
    make_request(&make_key().unwrap()).unwrap()
}

fn scope(names: &str, uses: u32) -> TokenScope {
    TokenScope {
        names: names.parse().unwrap(),
        uses,
        region: region(),
        role: Role::Node,
        ttl: Duration::from_secs(600),
        seeds: vec!["a.example:7440".into()],
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn store(roots: &[CertificateDer<'static>]) -> RootCertStore {
    root_store(Path::new("roots"), roots).unwrap()
}

/// Whether whoever believes `roots` believes this chain, as of `now`.
fn believed(
    chain: &[CertificateDer<'static>],
    roots: &[CertificateDer<'static>],
    now: SystemTime,
) -> bool {
    let algorithms = tls::provider().signature_verification_algorithms;
    let (leaf, rest) = chain.split_first().unwrap();
    let roots = store(roots);
    verify_chain(leaf, rest, &roots, &algorithms, Side::Client, unix_time(now)).is_ok()
}

fn begins(chain: &[CertificateDer<'static>]) -> SystemTime {
    validity(&chain[0]).unwrap().0
}

fn ends(chain: &[CertificateDer<'static>]) -> SystemTime {
    validity(&chain[0]).unwrap().1
}

/// Joins with what is usual, unless said otherwise.
fn join(
    authority: &Authority,
    token: &str,
    node: &str,
    now: SystemTime,
) -> Result<Vec<CertificateDer<'static>>, Refusal> {
    let (name, region, csr) = (name(node), region(), csr());
    let ask = Ask { token, csr: &csr, name: &name, region: &region, remote: REMOTE, ips: &[] };
    authority.redeem(&ask, now)
}

fn read_roots(path: &Path) -> Vec<CertificateDer<'static>> {
    crate::files::read_certificates(path, "").unwrap()
}

fn message(result: Result<impl Sized, IdentityError>) -> String {
    result.map(drop).unwrap_err().to_string()
}
