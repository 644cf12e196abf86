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
//! ```
//!
//! A running node holds an [`Authority`] and opens it anew when [`Authority::has_changed`]; commands change the
//! directory meanwhile, under a lock of the file system. Everything here reads or writes files: call it where blocking
//! is allowed.

mod audit;
mod csr;
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
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base::{NodeName, RegionName, TrustDomain};
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub(crate) use self::issuing::fingerprint;
use self::{
    csr::requested_key,
    issuing::{Issuing, Terms},
    place::{Place, Seen, Settings},
    store::Kept,
};
pub use self::{
    csr::{CsrError, make_key, make_request},
    refusal::{Ask, Refusal},
    rotation::Rotated,
    store::{Redemption, TokenScope, TokenStatus},
};
use crate::{
    IdentityError, Revocations, Revoked, Role, SignedRevocations, SpiffeId, Token,
    certificate::{peer_id, validity},
    dev::random,
    files,
    revocation::milliseconds,
};

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
        self.issuing.certify(&key, Terms { id, ips, life, revoked_at }, now)
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

    /// Makes a token that is good for `scope`; its text can only be had from the result. Tokens that expired a day ago are
    /// forgotten.
    ///
    /// # Errors
    /// The scope is refused, there are 4,096 tokens, or the directory cannot be written.
    pub fn issue_token(&self, scope: &TokenScope, now: SystemTime) -> Result<Token, IdentityError> {
        scope.check()?;
        let expires = (now + scope.ttl).duration_since(UNIX_EPOCH).unwrap_or_default();
        // Rounded up: a token of one second is good for one second.
        let expires =
            Duration::from_secs(expires.as_secs() + u64::from(expires.subsec_nanos() > 0));
        let token = Token {
            id: random()?,
            secret: random()?,
            trust_domain: self.trust_domain().clone(),
            root_fingerprint: self.root_fingerprint(),
            names: scope.names.clone(),
            region: scope.region.clone(),
            role: scope.role,
            expires_at: UNIX_EPOCH + expires,
            seeds: scope.seeds.clone(),
        };
        let _lock = self.place.lock()?;
        store::sweep(&self.place, now)?;
        store::write(&self.place, &token.id(), &Kept::new(&token, scope.uses, now))?;
        let who = store::describe(&token);
        let entry = audit::Entry { event: "token", outcome: "done", who, ..Default::default() };
        audit::record(&self.place, &audit::Entry { token: Some(token.id()), ..entry }, now);
        Ok(token)
    }

    /// The tokens it knows, in the order in which they end.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn tokens(&self) -> Result<Vec<TokenStatus>, IdentityError> {
        store::list(&self.place)
    }

    /// Lets in whoever holds a token. The use is taken on disk before anything is signed, so a token is never good once
    /// too often, whatever happens; of several that redeem one at once, in whichever process, as many get a certificate
    /// as it has uses.
    ///
    /// # Errors
    /// Why not.
    pub fn redeem(
        &self,
        ask: &Ask<'_>,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let token = ask.token.parse::<Token>().map_err(|_| Refusal::Tampered);
        let known = token.as_ref().ok().map(Token::id);
        let outcome = token.and_then(|token| self.redeem_token(&token, ask, now));
        let who = self.node_id(ask.region, ask.name).to_string();
        let entry =
            audit::Entry { event: "join", outcome: label(&outcome), who, ..Default::default() };
        let remote = Some(ask.remote.to_string());
        let why = outcome.as_ref().err().map(ToString::to_string);
        let entry = audit::Entry { token: known, remote, why: why.as_deref(), ..entry };
        audit::record(&self.place, &entry, now);
        outcome
    }

    fn redeem_token(
        &self,
        token: &Token,
        ask: &Ask<'_>,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        self.check_mesh(&token.trust_domain)?;
        let lock = self.place.lock()?;
        let mut kept = store::read(&self.place, token)?.ok_or(Refusal::Unknown)?;
        kept.admit(token, ask, now)?;
        let id = self.node_id(ask.region, ask.name);
        let revoked_at = self.list()?.revoked_at(&id);
        if let Some(at) = revoked_at
            && kept.issued_at() <= at
        {
            return Err(Refusal::Revoked { id, at });
        }
        let key = requested_key(ask.csr)?;
        self.issuing.check_ending(self.life(), now)?;
        kept.take_use(ask, now);
        store::write(&self.place, &token.id(), &kept)?;
        drop(lock);
        let terms = Terms { id: &id, ips: ask.ips, life: self.life(), revoked_at };
        Ok(self.issuing.certify(&key, terms, now)?)
    }

    /// The next certificate for a node whose `current` one the connection has proven.
    ///
    /// # Errors
    /// Why not: for one, the current certificate is revoked.
    pub fn renew(
        &self,
        current: &CertificateDer<'_>,
        csr: &[u8],
        ips: &[IpAddr],
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let id = peer_id(std::slice::from_ref(current))?;
        let outcome = self.renew_as(&id, current, csr, ips, now);
        let why = outcome.as_ref().err().map(ToString::to_string);
        let who = id.to_string();
        let entry =
            audit::Entry { event: "renew", outcome: label(&outcome), who, ..Default::default() };
        audit::record(&self.place, &audit::Entry { why: why.as_deref(), ..entry }, now);
        outcome
    }

    fn renew_as(
        &self,
        id: &SpiffeId,
        current: &CertificateDer<'_>,
        csr: &[u8],
        ips: &[IpAddr],
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        self.check_mesh(&id.trust_domain)?;
        if id.role != Role::Node {
            return Err(Refusal::WrongRole(id.clone()));
        }
        let revoked_at = self.list()?.revoked_at(id);
        let (from, _) = validity(current)?;
        if let Some(at) = revoked_at
            && from <= at
        {
            return Err(Refusal::Revoked { id: id.clone(), at });
        }
        let key = requested_key(csr)?;
        let terms = Terms { id, ips, life: self.life(), revoked_at };
        Ok(self.issuing.certify(&key, terms, now)?)
    }

    /// Who is not believed, as it was when this authority was opened.
    #[must_use]
    pub fn revocations(&self) -> &SignedRevocations {
        &self.revocations
    }

    /// Who is not believed, as it is on disk now.
    ///
    /// # Errors
    /// The list cannot be read.
    pub fn revoked(&self) -> Result<Revocations, IdentityError> {
        self.list()
    }

    /// Excludes a member from now on; gives the version of the new list. The list is on disk, and
    /// [`Self::has_changed`] for whoever holds it open.
    ///
    /// # Errors
    /// The member is of another mesh, the list is full, or it cannot be written.
    pub fn revoke(&self, id: &SpiffeId, now: SystemTime) -> Result<u64, IdentityError> {
        if id.trust_domain != *self.trust_domain() {
            let ours = self.trust_domain().clone();
            return Err(IdentityError::ForeignPeer { found: id.clone(), ours });
        }
        let _lock = self.place.lock()?;
        let mut list = self.list()?;
        let at = UNIX_EPOCH + Duration::from_millis(milliseconds(now));
        list.add(id.clone(), Revoked { at, forget_at: at + self.forget_after(id.role) });
        let version = self.publish(list, now)?;
        let entry = audit::Entry { event: "revoke", outcome: "done", ..Default::default() };
        audit::record(&self.place, &audit::Entry { who: id.to_string(), ..entry }, now);
        Ok(version)
    }

    /// Takes in what another authority of the mesh has revoked; whether there was anything new. The caller has verified
    /// the list ([`SignedRevocations::verify`]).
    ///
    /// # Errors
    /// The list is full, or it cannot be written.
    pub fn adopt(&self, other: &Revocations, now: SystemTime) -> Result<bool, IdentityError> {
        let _lock = self.place.lock()?;
        let ours = self.list()?;
        if ours.covers(other, now) {
            return Ok(false);
        }
        self.publish(ours.merge(other), now)?;
        Ok(true)
    }

    /// Whether something in the directory is not what was opened: the issuing certificate, the roots, the settings or
    /// the revocations. It looks at six files and reads none.
    #[must_use]
    pub fn has_changed(&self) -> bool {
        self.place.seen() != self.seen
    }

    /// Gives the list its next version, signs it and writes it. Under the lock.
    fn publish(&self, mut list: Revocations, now: SystemTime) -> Result<u64, IdentityError> {
        list.forget(now);
        list.version = list.version.saturating_add(1).max(milliseconds(now) / 1_000);
        let signed = sign_list(&list, &self.settings, &self.issuing, now)?;
        files::replace_durably(&self.place.revoked(), files::PUBLIC, signed.encode())?;
        Ok(list.version)
    }

    /// A command may have excluded somebody a moment ago.
    fn list(&self) -> Result<Revocations, IdentityError> {
        Ok(read_list(&self.place)?.map(|signed| signed.claimed().clone()).unwrap_or_default())
    }

    fn check_mesh(&self, found: &TrustDomain) -> Result<(), Refusal> {
        let ours = self.trust_domain();
        if found == ours {
            return Ok(());
        }
        Err(Refusal::WrongMesh { found: found.clone(), ours: ours.clone() })
    }

    fn node_id(&self, region: &RegionName, name: &NodeName) -> SpiffeId {
        SpiffeId {
            trust_domain: self.trust_domain().clone(),
            role: Role::Node,
            region: region.clone(),
            name: name.clone(),
        }
    }

    fn longest(&self, role: Role) -> Duration {
        match role {
            Role::Node | Role::Authority => self.life() * 2,
            Role::Client | Role::Operator => ISSUED_LIFE_MAX,
        }
    }

    /// When no certificate that was issued before is valid any more.
    fn forget_after(&self, role: Role) -> Duration {
        self.longest(role)
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

fn label<T>(outcome: &Result<T, Refusal>) -> &'static str {
    outcome.as_ref().err().map_or("done", Refusal::label)
}

fn certify_new_key(
    issuing: &Issuing,
    terms: Terms<'_>,
    now: SystemTime,
) -> Result<(Vec<CertificateDer<'static>>, KeyPair), IdentityError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    Ok((issuing.certify(&key, terms, now)?, key))
}

/// The list on disk. Whoever can write it can sign: it is not verified here.
fn read_list(place: &Place) -> Result<Option<SignedRevocations>, IdentityError> {
    let path = place.revoked();
    let Some(bytes) = files::read_if_there(&path)? else { return Ok(None) };
    let list = SignedRevocations::decode(&bytes).map_err(|e| IdentityError::NotAnAuthority {
        path,
        reason: format!("{e}: restore it, or whoever was revoked is welcome again"),
    })?;
    Ok(Some(list))
}

/// The list on disk if nodes that believe our roots will believe it; signed anew otherwise, with entries left out that
/// are not needed any more. Nobody revoked: version 0, which nobody needs to have.
fn current_list(
    place: &Place,
    settings: &Settings,
    issuing: &Issuing,
    now: SystemTime,
) -> Result<SignedRevocations, IdentityError> {
    let Some(kept) = read_list(place)? else {
        return sign_list(&Revocations::default(), settings, issuing, now);
    };
    let mut list = kept.claimed().clone();
    let entries = list.len();
    list.forget(now);
    let issuer = issuing.chain.first().unwrap_or(&issuing.root);
    if kept.is_under(issuer) && list.len() == entries {
        return Ok(kept);
    }
    list.version = list.version.saturating_add(1).max(milliseconds(now) / 1_000);
    let signed = sign_list(&list, settings, issuing, now)?;
    files::replace_durably(&place.revoked(), files::PUBLIC, signed.encode())?;
    Ok(signed)
}

fn sign_list(
    list: &Revocations,
    settings: &Settings,
    issuing: &Issuing,
    now: SystemTime,
) -> Result<SignedRevocations, IdentityError> {
    let id = format!("spiffe://{}/authority/mesh/revocations", settings.trust_domain).parse()?;
    // The issuing certificate may be at its end: an exclusion is signed for as long as anything can be.
    let left = issuing.until.duration_since(now).unwrap_or_default();
    let life = settings.life.min(left);
    let terms = Terms { id: &id, ips: &[], life, revoked_at: None };
    let (chain, key) = certify_new_key(issuing, terms, now)?;
    Ok(SignedRevocations::sign(list, &settings.trust_domain, &chain, &key, now)?)
}
