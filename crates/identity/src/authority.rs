//! The certificate authority of a mesh: who may sign, what it signs for whom, and who is excluded.
//!
//! ```text
//! DIR/root.pem, DIR/root.key            the root and its key (0600), which belongs on a medium in a safe
//! DIR/authority/issuer.pem, issuer.key  what signs: a certificate under the root with its intermediates, its key (0600)
//! DIR/authority/roots.pem               the roots that nodes are to believe: one, or two while the root changes
//! DIR/authority/authority.toml          the trust domain, and how long certificates live
//! DIR/authority/tokens/<id>.json        join tokens: hash, scope, uses (0600)
//! DIR/authority/revoked.pb              who is not believed any more, signed
//! DIR/authority/audit.log               what was done for whom
//! DIR/authority/refused.log             what was refused whom
//! ```
//!
//! A running node holds an [`Authority`] and opens it anew when [`Authority::has_changed`]; commands change the
//! directory meanwhile, under a lock of the file system. Everything here reads or writes files: call it where blocking
//! is allowed.

mod admission;
mod audit;
mod csr;
mod exclusion;
mod issuing;
mod make;
mod place;
mod refusal;
mod rotation;
mod store;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    net::IpAddr,
    path::Path,
    time::{Duration, SystemTime},
};

use base::{NodeName, RegionName, TrustDomain};
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub use self::{
    csr::CsrError,
    refusal::{Ask, Refusal},
    rotation::Rotated,
    store::{Redemption, TokenScope, TokenStatus},
};
use self::{
    csr::requested_key,
    exclusion::current_list,
    issuing::{Issuing, Terms},
    place::{Place, Seen, Settings},
};
pub(crate) use self::{
    csr::{make_key, make_request},
    issuing::fingerprint,
};
use crate::{IdentityError, Role, SignedRevocations, SpiffeId, certificate::validity};

/// Longest life of a certificate that is not a node's: clients and operators get theirs by hand.
const ISSUED_LIFE_MAX: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// The online part of a mesh's authority: signs certificates, hands out and redeems tokens, excludes members.
pub struct Authority {
    place: Place,
    settings: Settings,
    issuing: Issuing,
    revocations: SignedRevocations,
    seen: Seen,
}

/// What an authority is made of, for people.
#[derive(Clone, Debug)]
pub struct AuthorityStatus {
    /// The root of the issuing certificate and all others that nodes believe: fingerprint (SHA-256) and end.
    pub roots: Vec<([u8; 32], SystemTime)>,
    /// The issuing certificate: fingerprint (SHA-256) and end.
    pub issuer: ([u8; 32], SystemTime),
    /// Nothing is signed for longer: the earliest end of the issuing certificate, its intermediates and its root.
    pub until: SystemTime,
}

impl Authority {
    /// Opens the authority in `dir` (`DIR/authority`, or `DIR` with that in it).
    ///
    /// # Errors
    /// A file is missing, damaged or of another mesh; the key is open to other users or belongs to another certificate;
    /// the issuing certificate is not one, has expired, or is not vouched for by a root; the directory cannot be written.
    pub fn open(dir: &Path, now: SystemTime) -> Result<Self, IdentityError> {
        let place = Place::find(dir)?;
        let _lock = place.lock()?;
        let mut seen = place.seen();
        let settings = place.read_settings()?;
        let issuing = Issuing::open(&place, &settings, now)?;
        let revocations = current_list(&place, &settings, &issuing, now)?;
        seen.revoked = place.seen().revoked;
        Ok(Self { place, settings, issuing, revocations, seen })
    }

    /// The mesh it serves.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.settings.trust_domain
    }

    /// How long the certificates of nodes live.
    #[must_use]
    pub fn life(&self) -> Duration {
        self.settings.life
    }

    /// The roots that nodes are to believe.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.issuing.roots
    }

    /// SHA-256 of the DER of the root over the current issuing certificate: what a token pins.
    #[must_use]
    pub fn root_fingerprint(&self) -> [u8; 32] {
        self.issuing.root_fingerprint()
    }

    /// What it is made of.
    ///
    /// # Errors
    /// A root cannot be parsed.
    pub fn status(&self) -> Result<AuthorityStatus, IdentityError> {
        let of = |certificate: &CertificateDer<'static>| {
            Ok::<_, IdentityError>((fingerprint(certificate), validity(certificate)?.1))
        };
        let Issuing { chain, root, until, .. } = &self.issuing;
        Ok(AuthorityStatus {
            roots: self.roots().iter().map(of).collect::<Result<_, _>>()?,
            issuer: of(chain.first().unwrap_or(root))?,
            until: *until,
        })
    }

    /// Certifies the key of `csr` (PKCS#10 in DER, at most 8 KiB) for a member, for the life of this authority. Names in
    /// the request are ignored; its signature proves that whoever sent it holds the key. The chain is the member's own
    /// certificate and everything below the root.
    ///
    /// A member that is revoked is let in again by this: the certificate begins after the moment of the revocation,
    /// which may be up to a second from `now`.
    ///
    /// # Errors
    /// The request is refused, the member is of another mesh, or the issuing certificate is about to end.
    pub fn sign(
        &self,
        id: &SpiffeId,
        csr: &[u8],
        ips: &[IpAddr],
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        self.sign_for(id, csr, ips, self.life(), now)
    }

    /// Like [`Self::sign`], for as long as `life`: at most 90 days, and at most twice the life of this authority for a
    /// node or an authority, so that revocations can be forgotten in time.
    ///
    /// # Errors
    /// As [`Self::sign`], or `life` is too long.
    pub fn sign_for(
        &self,
        id: &SpiffeId,
        csr: &[u8],
        ips: &[IpAddr],
        life: Duration,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        if life > self.longest(id.role) || life.is_zero() {
            let longest = self.longest(id.role).as_secs();
            return Err(IdentityError::Scope(format!(
                "a certificate of the role `{}` lives from 1s to {longest}s here",
                id.role
            )));
        }
        if id.trust_domain != *self.trust_domain() {
            let ours = self.trust_domain().clone();
            return Err(IdentityError::ForeignPeer { found: id.clone(), ours });
        }
        let key = requested_key(csr)?;
        let revoked_at = self.list()?.revoked_at(id);
        let chain = self.issuing.certify(&key, Terms { id, ips, life, revoked_at }, now)?;
        let (outcome, who) = (audit::DONE, id.to_string());
        let entry = audit::Entry { event: "issue", outcome, who, ..Default::default() };
        audit::record(&self.place, &entry, now);
        Ok(chain)
    }

    /// A certificate of the role `authority` with a key that is never on disk: what proves this authority to whoever
    /// joins. The chain goes up to the root, for those that know only its fingerprint.
    ///
    /// # Errors
    /// The issuing certificate is about to end.
    pub fn own(
        &self,
        region: &RegionName,
        name: &NodeName,
        now: SystemTime,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), IdentityError> {
        let id = SpiffeId {
            trust_domain: self.trust_domain().clone(),
            role: Role::Authority,
            region: region.clone(),
            name: name.clone(),
        };
        let revoked_at = self.list()?.revoked_at(&id);
        let terms = Terms { id: &id, ips: &[], life: self.life(), revoked_at };
        let (mut chain, key) = certify_new_key(&self.issuing, terms, now)?;
        chain.push(self.issuing.root.clone());
        Ok((chain, PrivateKeyDer::Pkcs8(key.serialize_der().into())))
    }

    /// Whether something in the directory is not what was opened: the issuing certificate, the roots, the settings or
    /// the revocations. It looks at six files and reads none.
    #[must_use]
    pub fn has_changed(&self) -> bool {
        self.place.seen() != self.seen
    }

    fn longest(&self, role: Role) -> Duration {
        match role {
            Role::Node | Role::Authority => self.life() * 2,
            Role::Client | Role::Operator => ISSUED_LIFE_MAX,
        }
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("dir", &self.place.dir())
            .field("trust_domain", self.trust_domain())
            .finish_non_exhaustive()
    }
}

fn certify_new_key(
    issuing: &Issuing,
    terms: Terms<'_>,
    now: SystemTime,
) -> Result<(Vec<CertificateDer<'static>>, KeyPair), IdentityError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    Ok((issuing.certify(&key, terms, now)?, key))
}
