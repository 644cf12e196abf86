//! Whose is a client certificate? The handshake has judged it; its names say whose it is.

use std::{collections::HashMap, num::NonZeroUsize, sync::Arc, time::SystemTime};

use identity::{CertificateSummary, ClientNames, Identity, SpiffeId};
use lru::LruCache;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;

use super::{Tenant, api_keys::sha256};
use crate::config::TenantConfig;

/// Certificates whose names are remembered, so that a call costs a hash and no parsing.
const REMEMBERED_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Why a certificate is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CertificateError {
    #[error(
        "the client certificate is no tenant's: one of its URI or DNS names must be in `certificates` of a [[tenant]], \
         and beside a SPIFFE id its DNS names do not count"
    )]
    Unknown,
    #[error(
        "the names in the client certificate are those of several tenants: use a certificate of one"
    )]
    Ambiguous,
    #[error(
        "the client certificate has expired since the connection was made: connect again with a new one"
    )]
    Expired,
    #[error("the client certificate was revoked: ask the operator of the mesh for a new one")]
    Revoked,
}

/// Whose each name is.
#[derive(Debug)]
pub(super) struct Certificates {
    names: HashMap<String, Arc<Tenant>>,
    /// Says which members of the mesh are revoked; `None`: nobody can be.
    mesh: Option<Identity>,
    remembered: Mutex<LruCache<[u8; 32], Known>>,
}

#[derive(Clone, Debug)]
struct Known {
    tenant: Result<Arc<Tenant>, CertificateError>,
    /// Which member of a mesh it is, if it is one, and the first moment of its life.
    member: Option<(SpiffeId, SystemTime)>,
    until: SystemTime,
}

impl Certificates {
    pub(super) fn new(tenants: &[(&TenantConfig, Arc<Tenant>)], mesh: Option<Identity>) -> Self {
        let names = tenants.iter().flat_map(|(config, tenant)| {
            config.certificates.iter().map(|name| (name.as_str().to_owned(), tenant.clone()))
        });
        let remembered = Mutex::new(LruCache::new(REMEMBERED_MAX));
        Self { names: names.collect(), mesh, remembered }
    }

    /// Whose the certificate is now.
    pub(super) fn find(
        &self,
        certificate: &CertificateDer<'_>,
        now: SystemTime,
    ) -> Result<Arc<Tenant>, CertificateError> {
        let digest = sha256(certificate);
        let known = self.remembered.lock().get(&digest).cloned();
        let known = known.unwrap_or_else(|| {
            let known = self.read(certificate);
            self.remembered.lock().put(digest, known.clone());
            known
        });
        let revocations = self.mesh.as_ref().map(Identity::revocations);
        if let (Some(list), Some((id, from))) = (revocations, &known.member)
            && list.revokes(id, *from)
        {
            return Err(CertificateError::Revoked);
        }
        if now > known.until { Err(CertificateError::Expired) } else { known.tenant }
    }

    fn read(&self, certificate: &CertificateDer<'_>) -> Known {
        let Ok(ClientNames { names, until }) = ClientNames::of(certificate) else {
            let tenant = Err(CertificateError::Unknown);
            return Known { tenant, member: None, until: SystemTime::UNIX_EPOCH };
        };
        let member = names.iter().find_map(|name| name.parse::<SpiffeId>().ok());
        let from = CertificateSummary::of(certificate).map(|summary| summary.from).ok();
        let mut found = names.iter().filter_map(|name| self.names.get(name));
        let tenant = match found.next() {
            None => Err(CertificateError::Unknown),
            Some(first) if found.any(|other| other.name() != first.name()) => {
                Err(CertificateError::Ambiguous)
            }
            Some(first) => Ok(first.clone()),
        };
        Known { tenant, member: member.zip(from), until }
    }
}
