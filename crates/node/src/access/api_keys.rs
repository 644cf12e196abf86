//! Whose is an API key? Only hashes are known, and how long the answer takes says nothing about them.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};

use super::Tenant;
use crate::config::TenantConfig;

/// The hashes of all keys, and whose each is.
#[derive(Default)]
pub(super) struct ApiKeys {
    hashes: Box<[[u8; 32]]>,
    tenants: Box<[Arc<Tenant>]>,
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiKeys").field("count", &self.hashes.len()).finish_non_exhaustive()
    }
}

impl ApiKeys {
    pub(super) fn new(tenants: &[(&TenantConfig, Arc<Tenant>)]) -> Self {
        let keys = tenants.iter().flat_map(|(config, tenant)| {
            config.api_key_sha256.iter().map(|hash| (*hash.bytes(), tenant.clone()))
        });
        let (hashes, tenants): (Vec<_>, Vec<_>) = keys.unzip();
        Self { hashes: hashes.into(), tenants: tenants.into() }
    }

    /// Whose `key` is. Every hash is compared to its last byte, whichever fits.
    pub(super) fn find(&self, key: &[u8]) -> Option<&Arc<Tenant>> {
        let shown = sha256(key);
        let mut found = u64::MAX;
        for (index, hash) in (0_u64..).zip(&self.hashes) {
            found.conditional_assign(&index, hash.ct_eq(&shown));
        }
        self.tenants.get(usize::try_from(found).ok()?)
    }
}

/// The SHA-256 of `data`.
pub(super) fn sha256(data: &[u8]) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, data).as_ref());
    bytes
}
