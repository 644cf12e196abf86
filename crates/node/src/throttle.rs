//! How many may try to join at once: those who have no certificate yet are strangers, and every one costs a signature.
//!
//! Two token buckets stand in a row, one per address and one for all: a stranger with one address cannot use up what the
//! others need. A node that renews without end has a bucket of its own. The books have a bound; who was heard longest ago is
//! forgotten first.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use lru::LruCache;
use parking_lot::Mutex;

/// Addresses remembered.
const ADDRESSES_MAX: usize = 4096;
/// Joins one address may begin at once, and per second after that.
const OF_ONE: Rate = Rate { burst: 60.0, per_second: 2.0 };
/// Joins all addresses together may begin at once, and per second after that.
const OF_ALL: Rate = Rate { burst: 200.0, per_second: 20.0 };
/// Renewals of one node: a healthy one needs two a day.
const RENEWALS: Rate = Rate { burst: 20.0, per_second: 0.5 };
/// Lines of the log about refusals.
const LINES: Rate = Rate { burst: 20.0, per_second: 5.0 };

#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: f64,
    per_second: f64,
}

/// Counts joins against their rates.
#[derive(Debug)]
pub(crate) struct Throttle {
    of_one: LruCache<IpAddr, Bucket>,
    of_all: Bucket,
    renewals: LruCache<String, Bucket>,
    lines: Bucket,
}

impl Throttle {
    /// When trying again makes sense.
    pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(5);

    pub(crate) fn new(now: Instant) -> Self {
        let most =
            std::num::NonZeroUsize::new(ADDRESSES_MAX).unwrap_or(std::num::NonZeroUsize::MIN);
        Self {
            of_one: LruCache::new(most),
            of_all: Bucket::full(OF_ALL, now),
            renewals: LruCache::new(most),
            lines: Bucket::full(LINES, now),
        }
    }

    /// Whether somebody at `remote` may try to join now.
    pub(crate) fn allows(&mut self, remote: IpAddr, now: Instant) -> bool {
        let one = self.of_one.get_or_insert_mut(network(remote), || Bucket::full(OF_ONE, now));
        one.take(OF_ONE, now) && self.of_all.take(OF_ALL, now)
    }

    /// Whether the node of a certificate may renew it now.
    pub(crate) fn allows_renewal(&mut self, node: String, now: Instant) -> bool {
        self.renewals.get_or_insert_mut(node, || Bucket::full(RENEWALS, now)).take(RENEWALS, now)
    }

    /// Whether a refusal may be logged now.
    pub(crate) fn may_say(&mut self, now: Instant) -> bool {
        self.lines.take(LINES, now)
    }
}

/// Places that are taken for a while: so many in all, and so many of one address.
#[derive(Debug)]
pub(crate) struct Places {
    taken: Mutex<Taken>,
    of_all: usize,
    of_one: usize,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by: BTreeMap<IpAddr, usize>,
}

/// One place, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    places: &'a Places,
    network: IpAddr,
}

impl Places {
    pub(crate) fn new(of_all: usize, of_one: usize) -> Self {
        Self { taken: Mutex::default(), of_all, of_one }
    }

    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.taken.lock().all
    }

    /// A place for somebody at `remote`; `None`: there is none left.
    pub(crate) fn take(&self, remote: IpAddr) -> Option<Place<'_>> {
        let network = network(remote);
        let mut taken = self.taken.lock();
        let of_one = taken.by.get(&network).copied().unwrap_or_default();
        if taken.all >= self.of_all || of_one >= self.of_one {
            return None;
        }
        taken.all += 1;
        taken.by.insert(network, of_one + 1);
        Some(Place { places: self, network })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        taken.all -= 1;
        match taken.by.get_mut(&self.network) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(taken.by.remove(&self.network)),
        }
    }
}

/// Whoever has one IPv6 address has its whole /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        v4 => v4,
    }
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Self {
        Self { tokens: rate.burst, filled: now }
    }

    fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + since * rate.per_second).min(rate.burst);
        self.filled = now;
        let has_one = self.tokens >= 1.0;
        if has_one {
            self.tokens -= 1.0;
        }
        has_one
    }
}

#[cfg(test)]
mod tests {
    use base::clock;

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn one_address_is_limited_and_the_others_are_not() {
        let now = clock::now();
        let mut throttle = Throttle::new(now);
        let allowed = (0..10_000).filter(|_| throttle.allows(address(1), now)).count();
        assert_eq!(allowed, 60);
        assert!(throttle.allows(address(2), now), "another address is not held up");
        assert!(!throttle.allows(address(1), now + Duration::from_millis(400)));
        assert!(throttle.allows(address(1), now + Duration::from_millis(1_000)));
    }

    #[test]
    fn a_node_that_renews_without_end_holds_up_itself_alone() {
        let now = clock::now();
        let mut throttle = Throttle::new(now);
        let renewed = (0..1000).filter(|_| throttle.allows_renewal("a".into(), now)).count();
        assert_eq!(renewed, 20);
        assert!(throttle.allows_renewal("b".into(), now) && throttle.allows(address(1), now));
        assert!(throttle.allows_renewal("a".into(), now + Duration::from_secs(2)));
    }

    #[test]
    fn all_together_are_limited() {
        let now = clock::now();
        let mut throttle = Throttle::new(now);
        let mut allowed = 0;
        for last in 0..200 {
            allowed += (0..50).filter(|_| throttle.allows(address(last), now)).count();
        }
        assert_eq!(allowed, 200);
    }

    #[test]
    fn places_are_few_for_one_address_and_come_back() {
        let places = Places::new(4, 2);
        let mine: Vec<_> = (0..3).map(|_| places.take(address(1))).collect();
        assert_eq!(mine.iter().flatten().count(), 2);
        let others = [places.take(address(2)), places.take(address(3)), places.take(address(4))];
        assert_eq!(others.iter().flatten().count(), 2, "four in all");
        drop((mine, others));
        assert_eq!(places.taken(), 0);
        assert!(places.taken.lock().by.is_empty() && places.take(address(1)).is_some());
    }

    #[test]
    fn a_network_of_ipv6_is_one_address_and_the_books_are_bounded() {
        let now = clock::now();
        let mut throttle = Throttle::new(now);
        let of = |net: u16, host: u16| IpAddr::from([0x2001, 0xdb8, 0, net, 0, 0, 0, host]);
        assert_eq!((0..1000).filter(|host| throttle.allows(of(1, *host), now)).count(), 60);
        for net in 2..10_000 {
            throttle.allows(of(net, 1), now);
        }
        assert_eq!(throttle.of_one.len(), ADDRESSES_MAX);
    }
}
