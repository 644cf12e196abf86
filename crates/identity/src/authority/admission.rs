//! Who gets a certificate from a running authority: whoever redeems a token, and nodes that renew.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base::{NodeName, RegionName, TrustDomain};
use rustls::pki_types::CertificateDer;

use super::{
    Ask, Authority, Refusal, TokenScope, TokenStatus, audit,
    csr::requested_key,
    issuing::Terms,
    store::{self, Kept, Origin},
};
use crate::{
    IdentityError, Role, SpiffeId, Token,
    certificate::{peer_id, validity},
    dev::random,
};

impl Authority {
    /// Makes a token that is good for `scope`, and in this directory only, not in a copy of it; its text can only be had
    /// from the result. Tokens that expired a day ago are forgotten.
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
        let kept = Kept::new(&token, scope.uses, Origin::of(&self.place)?, now);
        store::write(&self.place, &token.id(), &kept)?;
        let who = store::describe(&token);
        let entry =
            audit::Entry { event: "token", outcome: audit::DONE, who, ..Default::default() };
        audit::record(&self.place, &audit::Entry { token: Some(token.id()), ..entry }, now);
        Ok(token)
    }

    /// The tokens that were made in this directory, in the order in which they end.
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
        kept.admit(token, ask, Origin::of(&self.place)?, now)?;
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
}

fn label<T>(outcome: &Result<T, Refusal>) -> &'static str {
    outcome.as_ref().err().map_or(audit::DONE, Refusal::label)
}
