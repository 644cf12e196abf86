//! What an authority signs with, and what a certificate that it signs says.

use std::{
    net::IpAddr,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};
use base::TrustDomain;
use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::place::{Place, Settings};
use crate::{
    IdentityError, Role, SpiffeId,
    certificate::{Side, lacks_to_sign, names, unix_time, validity, verify_chain},
    dev::{client_params, server_params},
    files,
    id::parse_mesh_uri,
    node::{Paths, check_key, check_life, root_store},
    tls,
};

const ISSUER_REMEDY: &str =
    "restore it, or put an issuing certificate there with its intermediates, its own first";
const ROOTS_REMEDY: &str = "restore it, or put the roots there that the nodes of the mesh believe";
const KEY_REMEDY: &str = "restore it: it is the key of issuer.pem";
/// Most certificates between a member and the root.
const CHAIN_MAX: usize = 4;
/// Certificates begin a little in the past, for peers whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

/// An issuing certificate with its key, and the roots of the mesh.
pub(crate) struct Issuing {
    /// The issuing certificate first.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) roots: Vec<CertificateDer<'static>>,
    /// The one of `roots` that vouches for `chain`.
    pub(crate) root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    /// Nothing is signed for longer.
    pub(crate) until: SystemTime,
}

/// For whom, how long and from when a certificate is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    pub(crate) id: &'a SpiffeId,
    pub(crate) ips: &'a [IpAddr],
    pub(crate) life: Duration,
    pub(crate) revoked_at: Option<SystemTime>,
}

impl Issuing {
    /// What lies in an authority's directory. The key is the one that fits: a rotation changes the certificate first.
    pub(crate) fn open(
        place: &Place,
        settings: &Settings,
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        let (ca, cert) = (place.roots(), place.issuer());
        let load = |key: &Path| {
            Self::load(Paths { ca: &ca, cert: &cert, key }, &settings.trust_domain, now)
        };
        match load(&place.issuer_key()) {
            Err(error @ (IdentityError::KeyMismatch { .. } | IdentityError::Missing { .. })) => {
                load(&place.next_issuer_key()).map_err(|_| error)
            }
            other => other,
        }
    }

    /// Judges the parts as nodes will.
    pub(crate) fn load(
        paths: Paths<'_>,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        let chain = files::read_certificates(paths.cert, ISSUER_REMEDY)?;
        let roots = files::read_certificates(paths.ca, ROOTS_REMEDY)?;
        let key = files::read_secret_key(paths.key, KEY_REMEDY)?;
        check_key(paths, &chain, &key)?;
        let until = check_authorities(paths.cert, &chain, trust_domain, now)?;
        Self::join(paths, trust_domain, chain, roots, &key, until, now)
    }

    fn join(
        paths: Paths<'_>,
        trust_domain: &TrustDomain,
        chain: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'static>,
        until: SystemTime,
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        let Some(own) = chain.first() else {
            return Err(IdentityError::NoCertificate { path: paths.cert.into() });
        };
        let issuer = Issuer::from_ca_cert_der(own, KeyPair::try_from(key)?)?;
        let root = own.clone();
        let mut found = Self { chain, roots, root, issuer, until };
        found.root = found.vouching_root(paths, trust_domain, now)?;
        let (_, root_until) = validity(&found.root)?;
        check_life(paths.ca, std::slice::from_ref(&found.root), now)?;
        found.until = found.until.min(root_until);
        Ok(found)
    }

    /// Found by trial: a certificate made here has to be believed by whoever believes that root.
    fn vouching_root(
        &self,
        paths: Paths<'_>,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let probe = self.probe(trust_domain, now)?;
        let algorithms = tls::provider().signature_verification_algorithms;
        let mut refused = webpki::Error::UnknownIssuer;
        for root in &self.roots {
            let store = root_store(paths.ca, std::slice::from_ref(root))?;
            let time = unix_time(now);
            match verify_chain(&probe, &self.chain, &store, &algorithms, Side::Server, time) {
                Ok(()) => return Ok(root.clone()),
                Err(webpki::Error::UnknownIssuer) => {}
                Err(error) => refused = error,
            }
        }
        let (cert, ca) = (paths.cert.into(), paths.ca.into());
        Err(IdentityError::Untrusted { cert, ca, source: refused })
    }

    fn probe(
        &self,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let id = format!("spiffe://{trust_domain}/authority/probe/probe").parse()?;
        let params = server_params(&id, &[], now, self.until)?;
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        Ok(params.signed_by(&key, &self.issuer)?.into())
    }

    /// Whether something of `life` can still be signed.
    pub(crate) fn check_ending(
        &self,
        life: Duration,
        now: SystemTime,
    ) -> Result<(), IdentityError> {
        match self.until.duration_since(now) {
            Ok(left) if left >= life / 10 => Ok(()),
            _ => Err(IdentityError::IssuerEnding { until: text(self.until) }),
        }
    }

    /// Certifies a key. The chain ends below the root.
    pub(crate) fn certify(
        &self,
        key: &impl PublicKeyData,
        terms: Terms<'_>,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        self.check_ending(terms.life, now)?;
        let Terms { id, ips, life, .. } = terms;
        let until = self.until.min(now + life);
        let mut params = match id.role {
            Role::Node | Role::Authority => server_params(id, ips, now, until)?,
            Role::Client | Role::Operator => client_params(id, now, until)?,
        };
        let from = begin(terms, now);
        if from >= until {
            return Err(IdentityError::Scope(format!(
                "{id} is revoked as of a later moment than a certificate would end: check this machine's clock"
            )));
        }
        params.not_before = from.into();
        let leaf = params.signed_by(key, &self.issuer)?.into();
        Ok([leaf].into_iter().chain(self.chain.iter().cloned()).collect())
    }

    /// SHA-256 of the root's DER.
    pub(crate) fn root_fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.root)
    }
}

/// A little in the past, and never within what is revoked.
fn begin(terms: Terms<'_>, now: SystemTime) -> SystemTime {
    let usual = now - CLOCK_SKEW.min(terms.life / 4);
    terms.revoked_at.map_or(usual, |at| usual.max(whole_seconds(at) + Duration::from_secs(1)))
}

fn whole_seconds(moment: SystemTime) -> SystemTime {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

/// Whether each of these may sign, now, for this mesh; until when.
fn check_authorities(
    path: &Path,
    chain: &[CertificateDer<'static>],
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<SystemTime, IdentityError> {
    let wrong = |reason: String| IdentityError::NotAnAuthority { path: path.into(), reason };
    if chain.len() > CHAIN_MAX {
        return Err(wrong(format!(
            "it holds more than {CHAIN_MAX} certificates: leave out the root"
        )));
    }
    let mut until = None;
    for certificate in chain {
        if let Some(lack) = lacks_to_sign(certificate) {
            return Err(wrong(format!("{lack}: put an issuing certificate there")));
        }
        if let Some(other) = other_mesh(certificate, trust_domain)? {
            return Err(wrong(format!(
                "it is for {other}, not for the trust domain `{trust_domain}`"
            )));
        }
        let ends = check_life(path, std::slice::from_ref(certificate), now).map_err(|e| match e {
            IdentityError::Expired { until, .. } => wrong(format!(
                "it expired on {until}: make the next one with `isobar ca rotate --issuer`, or check this machine's clock"
            )),
            other => other,
        })?;
        until = Some(until.map_or(ends, |until: SystemTime| until.min(ends)));
    }
    until.ok_or_else(|| IdentityError::NoCertificate { path: path.into() })
}

/// What else a certificate says it is for; one that names no mesh is for any.
fn other_mesh(
    certificate: &CertificateDer<'_>,
    trust_domain: &TrustDomain,
) -> Result<Option<String>, IdentityError> {
    let names = names(certificate)?;
    if names.uri_count() == 0 {
        return Ok(None);
    }
    let uri = names.only_uri()?;
    Ok((parse_mesh_uri(uri).as_ref() != Some(trust_domain)).then(|| format!("`{uri}`")))
}

pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    let hash = digest(&SHA256, certificate);
    std::array::from_fn(|i| hash.as_ref().get(i).copied().unwrap_or_default())
}

/// A moment as people write it.
pub(crate) fn text(moment: SystemTime) -> String {
    humantime::format_rfc3339_seconds(moment).to_string()
}
