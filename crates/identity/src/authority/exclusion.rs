//! Whom an authority excludes, and how its list is kept.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{
    Authority, TokenStatus, audit, certify_new_key,
    issuing::{Issuing, Terms},
    place::{Place, Settings},
};
use crate::{
    IdentityError, Revocations, Revoked, Role, SignedRevocations, SpiffeId, files,
    revocation::milliseconds,
};

impl Authority {
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
        let (outcome, who) = (audit::DONE, id.to_string());
        let entry = audit::Entry { event: "revoke", outcome, who, ..Default::default() };
        audit::record(&self.place, &entry, now);
        Ok(version)
    }

    /// Whether a certificate, or a token for its name alone, was made for `id` here, as far back as the records go: a
    /// member that is to be excluded and is not known may be misspelt, or known at another copy of this authority.
    ///
    /// # Errors
    /// A record cannot be read.
    pub fn has_issued_to(&self, id: &SpiffeId) -> Result<bool, IdentityError> {
        let meant = |token: &TokenStatus| {
            token.region == id.region
                && (token.names.only_name().as_ref() == Some(&id.name)
                    || token.redemptions.iter().any(|used| used.name == id.name))
        };
        let joined = id.role == Role::Node && self.tokens()?.iter().any(meant);
        Ok(joined || audit::has_issued(&self.place, id)?)
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

    /// Gives the list its next version, signs it and writes it. Under the lock.
    fn publish(&self, mut list: Revocations, now: SystemTime) -> Result<u64, IdentityError> {
        list.forget(now);
        list.raise_version(now);
        let signed = sign_list(&list, &self.settings, &self.issuing, now)?;
        files::replace_durably(&self.place.revoked(), files::PUBLIC, signed.encode())?;
        Ok(list.version)
    }

    /// A command may have excluded somebody a moment ago.
    pub(super) fn list(&self) -> Result<Revocations, IdentityError> {
        Ok(read_list(&self.place)?.map(|signed| signed.claimed().clone()).unwrap_or_default())
    }

    /// When no certificate that was issued before is valid any more.
    fn forget_after(&self, role: Role) -> Duration {
        self.longest(role)
    }
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
pub(super) fn current_list(
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
    if kept.is_under(issuer) && list.len() == entries && kept.can_be_superseded() {
        return Ok(kept);
    }
    list.raise_version(now);
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
