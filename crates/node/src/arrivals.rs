//! How many calls come from the nodes of each region? First attempts alone: retries say nothing of how many callers there are.
//!
//! Who calls is read from the certificate of the connection, once per connection. Regions beyond the bound are not counted.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use base::RegionName;
use http::Extensions;
use identity::peer_id;
use lru::LruCache;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use transport::CallInfo;

/// Regions that are counted. A mesh has some twenty.
const REGIONS_MAX: usize = 64;
/// Connections whose region is remembered; one that was not used longest is read anew.
const CONNECTIONS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(511);

type Count = Arc<AtomicU64>;

/// Attempts since the process began. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Arrivals {
    regions: Mutex<BTreeMap<RegionName, Count>>,
    /// By the address of a connection's certificates.
    connections: Mutex<LruCache<usize, Connection>>,
}

/// One connection.
#[derive(Debug)]
struct Connection {
    /// Kept, so that no others can have their address.
    _shown: Arc<[CertificateDer<'static>]>,
    /// Where its attempts are counted; `None`: nowhere.
    count: Option<Count>,
}

impl Default for Arrivals {
    fn default() -> Self {
        let connections = Mutex::new(LruCache::new(CONNECTIONS_MAX));
        Self { regions: Mutex::default(), connections }
    }
}

impl Arrivals {
    /// A first attempt came, with what the transport says of it.
    pub(crate) fn came(&self, about: &Extensions) {
        let Some(info) = about.get::<CallInfo>().filter(|info| !info.certificates.is_empty())
        else {
            return;
        };
        let shown = &info.certificates;
        let connection = Arc::as_ptr(shown).cast::<u8>().addr();
        let mut connections = self.connections.lock();
        let connection = connections.get_or_insert(connection, || Connection {
            count: self.count_of(shown),
            _shown: shown.clone(),
        });
        if let Some(count) = &connection.count {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many came from each region, by name.
    pub(crate) fn arrivals(&self) -> Vec<(RegionName, u64)> {
        let regions = self.regions.lock();
        let count = |(region, count): (&RegionName, &Count)| {
            (region.clone(), count.load(Ordering::Relaxed))
        };
        regions.iter().map(count).collect()
    }

    fn count_of(&self, shown: &[CertificateDer<'_>]) -> Option<Count> {
        // The handshake has judged them: what cannot be read is a bug, and not the caller's loss.
        let region = peer_id(shown).ok()?.region;
        let mut regions = self.regions.lock();
        let is_counted = regions.len() < REGIONS_MAX || regions.contains_key(&region);
        is_counted.then(|| regions.entry(region).or_default().clone())
    }
}

#[cfg(test)]
mod tests {
    use identity::DevCa;
    use transport::Protocol;

    use super::*;

    fn connection(certificates: Vec<CertificateDer<'static>>) -> Extensions {
        let mut about = Extensions::new();
        about.insert(CallInfo {
            remote: "127.0.0.1:1".parse().unwrap(),
            protocol: Protocol::H3,
            certificates: certificates.into(),
        });
        about
    }

    fn counts(arrivals: &Arrivals) -> Vec<(String, u64)> {
        arrivals.arrivals().into_iter().map(|(region, count)| (region.to_string(), count)).collect()
    }

    #[test]
    fn attempts_are_counted_by_the_region_of_the_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let (domain, now) = ("mesh.test".parse().unwrap(), base::clock::wall());
        let ca = DevCa::open_or_create(dir.path(), &domain, now).unwrap();
        let from = |region: &str, name: &str| {
            ca.node(&region.parse().unwrap(), &name.parse().unwrap(), &[], now).unwrap();
            let path = dir.path().join("nodes").join(region).join(name).join("cert.pem");
            connection(identity::read_certificates(&path).unwrap())
        };
        let arrivals = Arrivals::default();
        let (a, b, c) = (from("eu", "a"), from("us", "b"), from("eu", "c"));
        for about in [&a, &b, &a, &c, &a] {
            arrivals.came(about);
        }
        assert_eq!(counts(&arrivals), [("eu".to_owned(), 4), ("us".to_owned(), 1)]);
        for region in 0..2 * REGIONS_MAX {
            arrivals.regions.lock().entry(format!("r{region}").parse().unwrap()).or_default();
        }
        arrivals.came(&from("asia", "d"));
        arrivals.came(&a);
        assert!(!counts(&arrivals).iter().any(|(region, _)| region == "asia"));
        assert!(counts(&arrivals).contains(&("eu".to_owned(), 5)));
    }

    #[test]
    fn a_call_without_a_readable_certificate_is_nobodys() {
        let arrivals = Arrivals::default();
        arrivals.came(&Extensions::new());
        arrivals.came(&connection(vec![]));
        arrivals.came(&connection(vec![CertificateDer::from(vec![1, 2, 3])]));
        assert_eq!(arrivals.arrivals(), []);
    }
}
