//! The identity a running node has now: what it shows, what it believes of others, and how both are renewed while
//! connections live.
//!
//! Configurations made here are made once and stay good: they look at the identity of the moment in every handshake. So a
//! renewed certificate, another root or a longer list of revocations needs no new port and no new pool.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest;
use parking_lot::RwLock;
use rustls::{RootCertStore, pki_types::CertificateDer, sign::CertifiedKey};

use crate::{
    CertificateSummary, IdentityError, NodeIdentity, Revocations, Role, SpiffeId,
    certificate::peer_id, revocation::milliseconds,
};

/// The identity of a running node. Clones are the same identity.
#[derive(Clone)]
pub struct Identity(Arc<Shared>);

struct Shared {
    id: SpiffeId,
    current: RwLock<Arc<NodeIdentity>>,
    revoked: RwLock<Arc<Revocations>>,
    /// What was shown in the last handshake.
    served: RwLock<Option<Arc<NodeIdentity>>>,
}

/// How long a connection to a peer may be used, by the certificates of both ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Who the peer is.
    pub peer: SpiffeId,
    /// The first moment of the peer's certificate, for revocations.
    pub issued: SystemTime,
    /// When the first of both certificates ends.
    pub until: SystemTime,
}

impl Identity {
    /// Begins with an identity, and with nobody revoked.
    #[must_use]
    pub fn new(identity: NodeIdentity) -> Self {
        Self(Arc::new(Shared {
            id: identity.id.clone(),
            current: RwLock::new(Arc::new(identity)),
            revoked: RwLock::default(),
            served: RwLock::default(),
        }))
    }

    /// Who the node is: this never changes.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// What it shows and believes now.
    #[must_use]
    pub fn current(&self) -> Arc<NodeIdentity> {
        self.0.current.read().clone()
    }

    /// The certificate that was shown in the last handshake, which is what callers really saw.
    #[must_use]
    pub fn served(&self) -> Option<CertificateSummary> {
        self.0.served.read().as_ref().map(|identity| identity.certificate().clone())
    }

    /// Takes a newer identity from now on; connections that are open stay open.
    ///
    /// # Errors
    /// It is another node's; nothing has changed.
    pub fn replace(&self, newer: NodeIdentity) -> Result<(), IdentityError> {
        if newer.id != self.0.id {
            return Err(IdentityError::AnotherNode { found: newer.id, ours: self.0.id.clone() });
        }
        *self.0.current.write() = Arc::new(newer);
        Ok(())
    }

    /// Who is believed no more.
    #[must_use]
    pub fn revocations(&self) -> Arc<Revocations> {
        self.0.revoked.read().clone()
    }

    /// Who is believed no more, in short: two nodes that know of the same members say the same; 0: nobody.
    #[must_use]
    pub fn revocations_digest(&self) -> u64 {
        let list = self.revocations();
        if list.is_empty() {
            return 0;
        }
        let mut context = digest::Context::new(&digest::SHA256);
        for (id, revoked) in list.entries() {
            context.update(format!("{id} {}\n", milliseconds(revoked.at)).as_bytes());
        }
        let hash = context.finish();
        hash.as_ref().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// Takes a newer list of revocations; what it says of open connections is the caller's to see to. Who was on an earlier list
    /// stays revoked until all certificates of that time have ended: of two authorities each may know of one more.
    pub fn revoke(&self, newer: &Revocations, now: SystemTime) {
        let mut revoked = self.0.revoked.write();
        let mut merged = newer.merge(&revoked);
        merged.forget(now);
        *revoked = Arc::new(merged);
    }

    /// How long a connection with a peer of these certificates, its own first, may be used.
    ///
    /// # Errors
    /// The certificates are not those of a member of the mesh.
    pub fn validity(&self, peer: &[CertificateDer<'_>]) -> Result<Validity, IdentityError> {
        let id = peer_id(peer)?;
        let theirs = CertificateSummary::of(peer.first().ok_or(IdentityError::NoPeerCertificate)?)?;
        let ours = self.current().certificate().until;
        Ok(Validity { peer: id, issued: theirs.from, until: theirs.until.min(ours) })
    }

    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        self.0.current.read().roots.clone()
    }

    /// What is shown in a handshake now.
    pub(crate) fn show(&self) -> Arc<CertifiedKey> {
        let current = self.current();
        let certified = current.certified.clone();
        *self.0.served.write() = Some(current);
        certified
    }

    /// Whether a member of the mesh is one of ours, a node, and not revoked.
    pub(crate) fn judge(
        &self,
        found: SpiffeId,
        issued: SystemTime,
        role: Role,
    ) -> Result<SpiffeId, IdentityError> {
        let ours = &self.0.id.trust_domain;
        if found.trust_domain != *ours {
            return Err(IdentityError::ForeignPeer { found, ours: ours.clone() });
        }
        if found.role != role {
            return Err(match role {
                Role::Node => IdentityError::NotANode(found),
                _ => IdentityError::OtherRole { found, wanted: role },
            });
        }
        if self.revocations().revokes(&found, issued) {
            return Err(IdentityError::Revoked { id: found });
        }
        Ok(found)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("id", &self.0.id).finish_non_exhaustive()
    }
}

/// When to renew a certificate, without a clock: at half life, then again and again with growing waits while the old one is
/// good; and when to say that it cannot be renewed.
///
/// ```text
///  0              1/2                                  39/40      1
///  ├── nothing ────┼── tries, at most life/96 apart ─────┼─ alarm ─┤ expired
/// ```
///
/// Authorities that are away for 11/24 of a life, whenever they go, are back at 23/24 and asked again before the alarm; so they are
/// when the life is taken from a certificate that begins a quarter of its life before it was issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    until: SystemTime,
    life: Duration,
    next: SystemTime,
    wait: Duration,
    /// Since when tries have failed.
    failing: Option<SystemTime>,
}

/// How pressing a renewal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// The certificate is good for long enough.
    None,
    /// It ends soon, and nobody has renewed it.
    Alarm,
    /// It has ended: peers refuse this node.
    Expired,
}

impl Renewal {
    /// First wait after a failure, as a part of the life; it doubles up to [`Self::LAST_WAIT`].
    const FIRST_WAIT: u32 = 2_000;
    const LAST_WAIT: u32 = 96;
    const SHORTEST_WAIT: Duration = Duration::from_millis(100);
    const ALARM: u32 = 40;
    const SLACK: Duration = Duration::from_secs(1);

    /// For a certificate that lives from `from` until `until`.
    #[must_use]
    pub fn new(from: SystemTime, until: SystemTime) -> Self {
        let life = until.duration_since(from).unwrap_or_default();
        let mut renewal =
            Self { until, life, next: from + life / 2, wait: Duration::ZERO, failing: None };
        renewal.wait = renewal.first_wait();
        renewal
    }

    /// Whether it is time for a try. A clock that was put back must not put off the next one until after the end.
    #[must_use]
    pub fn is_due(&self, now: SystemTime) -> bool {
        let longest = if self.failing.is_some() { self.last_wait() } else { self.life / 2 };
        match self.next.duration_since(now) {
            Ok(wait) => wait.is_zero() || wait > longest + Self::SLACK,
            Err(_) => true,
        }
    }

    /// When the next try is due.
    #[must_use]
    pub fn due(&self) -> SystemTime {
        self.next
    }

    /// A try at `now` failed. `jitter` from 0 to 1 spreads the next one.
    pub fn failed(&mut self, now: SystemTime, jitter: f64) {
        self.failing.get_or_insert(now);
        self.next = now + self.wait.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 4.0);
        self.wait = (self.wait * 2).min(self.last_wait());
    }

    /// Since when tries have failed, if they do.
    #[must_use]
    pub fn failing_since(&self) -> Option<SystemTime> {
        self.failing
    }

    /// How long the certificate is still good.
    #[must_use]
    pub fn left(&self, now: SystemTime) -> Duration {
        self.until.duration_since(now).unwrap_or_default()
    }

    /// How pressing it is.
    #[must_use]
    pub fn urgency(&self, now: SystemTime) -> Urgency {
        if now >= self.until {
            Urgency::Expired
        } else if self.left(now) <= self.life / Self::ALARM {
            Urgency::Alarm
        } else {
            Urgency::None
        }
    }

    fn first_wait(&self) -> Duration {
        (self.life / Self::FIRST_WAIT).max(Self::SHORTEST_WAIT).min(self.last_wait())
    }

    fn last_wait(&self) -> Duration {
        (self.life / Self::LAST_WAIT).max(Self::SHORTEST_WAIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn renewal(life: Duration) -> (SystemTime, Renewal) {
        let from = SystemTime::UNIX_EPOCH + HOUR * 10_000;
        (from, Renewal::new(from, from + life))
    }

    /// Tries from half life on; the authorities are away from `gone` for `away`. When it was renewed, and whether the alarm
    /// was seen before.
    fn story(life: Duration, gone: Duration, away: Duration) -> Option<(Duration, bool)> {
        let (from, mut renewal) = renewal(life);
        let mut alarmed = false;
        for _ in 0..100_000 {
            let now = renewal.due();
            let at = now.duration_since(from).unwrap();
            if at < gone || at >= gone + away {
                return (now < from + life).then_some((at, alarmed));
            }
            alarmed |= renewal.urgency(now) != Urgency::None;
            renewal.failed(now, 0.5);
            // Between tries somebody looks too.
            alarmed |= renewal.urgency(renewal.due().min(from + life)) != Urgency::None;
            if renewal.due() > from + life {
                return None;
            }
        }
        panic!("it tries without end");
    }

    #[test]
    fn a_certificate_is_renewed_at_half_life() {
        let (from, renewal) = renewal(24 * HOUR);
        assert_eq!(renewal.due(), from + 12 * HOUR);
        assert_eq!(renewal.urgency(from + 12 * HOUR), Urgency::None);
        assert_eq!(renewal.failing_since(), None);
    }

    #[test]
    fn authorities_may_be_away_for_eleven_twenty_fourths() {
        for life in [Duration::from_secs(20), HOUR, 24 * HOUR, 24 * 365 * HOUR] {
            for gone in 0..24 {
                let (renewed, alarmed) = story(life, life * gone / 24, life * 11 / 24)
                    .unwrap_or_else(|| panic!("{gone}/24 of {life:?}"));
                assert!(renewed >= life / 2 && renewed < life, "{renewed:?} of {life:?}");
                assert!(!alarmed, "gone at {gone}/24 of {life:?}");
            }
        }
    }

    #[test]
    fn the_alarm_comes_before_the_end() {
        let (from, renewal) = renewal(24 * HOUR);
        for (after, urgency) in [
            (Duration::ZERO, Urgency::None),
            (HOUR * 12, Urgency::None),
            (HOUR * 23, Urgency::None),
            (HOUR * 235 / 10, Urgency::Alarm),
            (HOUR * 239 / 10, Urgency::Alarm),
            (HOUR * 24, Urgency::Expired),
            (HOUR * 240, Urgency::Expired),
        ] {
            assert_eq!(renewal.urgency(from + after), urgency, "{after:?}");
        }
        assert_eq!(story(24 * HOUR, 11 * HOUR, 24 * HOUR), None, "nobody renewed it");
    }

    #[test]
    fn tries_grow_apart_and_stay_bounded() {
        let (_, mut renewal) = renewal(24 * HOUR);
        let mut waits = vec![];
        for _ in 0..20 {
            let now = renewal.due();
            renewal.failed(now, 0.0);
            waits.push(renewal.due().duration_since(now).unwrap());
        }
        assert!(waits[0] < Duration::from_secs(60), "{:?}", waits[0]);
        assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!(*waits.last().unwrap(), HOUR / 4);
    }

    #[test]
    fn a_clock_that_goes_back_puts_nothing_off() {
        let (from, mut renewal) = renewal(24 * HOUR);
        assert!(!renewal.is_due(from) && renewal.is_due(from + 12 * HOUR));
        assert!(renewal.is_due(from - HOUR), "before it began");
        let ahead = from + 40 * HOUR;
        renewal.failed(ahead, 0.0);
        assert!(!renewal.is_due(ahead));
        assert!(renewal.is_due(from + HOUR), "the clock is right again");
    }

    #[test]
    fn a_certificate_that_was_never_alive_is_expired_and_due() {
        let now = SystemTime::UNIX_EPOCH + HOUR;
        let renewal = Renewal::new(now, now - HOUR / 2);
        assert_eq!(renewal.urgency(now), Urgency::Expired);
        assert!(renewal.due() <= now);
    }
}
