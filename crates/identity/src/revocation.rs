//! Who is not believed any more, and how every node comes to know it for certain.
//!
//! A certificate is revoked if the list names its id and it begins at or before the moment of the revocation: whoever
//! is let in again gets one that begins later. An entry is kept until all certificates issued before have expired.
//!
//! The list travels signed by a member of the role `authority`, with its chain, so that it can be handed on by anybody
//! and kept on disk. The chain is judged at the moment at which the list says it was signed, not now: an authority that
//! was away for longer than its certificate lives must not make the revoked welcome again.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base::TrustDomain;
use prost::Message;
use proto::isobar::mesh::v1 as wire;
use rcgen::{KeyPair, SigningKey as _};
use rustls::{RootCertStore, pki_types::CertificateDer};
use webpki::EndEntityCert;

use crate::{
    Role, SpiffeId,
    certificate::{Side, peer_id, unix_time, verify_chain},
    tls,
};

/// Longest list with its signature, encoded.
pub const REVOCATIONS_MAX_BYTES: usize = 48 * 1024;
/// Most members on a list.
pub const REVOCATIONS_MAX: usize = 1_024;
const CHAIN_MAX: usize = 8;
/// Room for the signature (72 bytes), and for tags and lengths.
const FRAME_BYTES: usize = 256;
/// Around the year 9800: later moments cannot be written as text.
const LATEST_MS: u64 = 247_000_000_000_000;
/// What is signed begins with this, so that the signature is good for nothing else.
const CONTEXT: &[u8] = b"isobar revocations 1\0";
/// How far the version of a list may be ahead of the second in which it is signed: far more than an authority ever has
/// to say, and little enough that the clock catches up.
const VERSION_AHEAD: u64 = 24 * 60 * 60;
/// How far the clocks of a mesh may be apart.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

/// Why a list is not believed or cannot be made. Nothing has changed; a retry alone does not help.
#[derive(Debug, thiserror::Error)]
pub enum RevocationError {
    /// Not a list.
    #[error("the list of revocations is damaged: {0}")]
    Damaged(&'static str),
    /// For somebody else.
    #[error("the list of revocations is for the trust domain `{found}`, not `{ours}`")]
    OtherMesh {
        /// For whom.
        found: TrustDomain,
        /// Who we are.
        ours: TrustDomain,
    },
    /// A clock is wrong.
    #[error(
        "the list of revocations was signed {0:?} from now: check the clocks of the authority and this machine"
    )]
    FromTheFuture(Duration),
    /// Our roots do not vouch for the signer.
    #[error(
        "whoever signed the list of revocations is not vouched for by the roots of this mesh: {0}"
    )]
    Untrusted(webpki::Error),
    /// Somebody else signed it.
    #[error("the list of revocations is signed by {0}, which is no authority of this mesh")]
    NotAnAuthority(String),
    /// It was changed after it was signed.
    #[error("the signature of the list of revocations does not fit it")]
    Forged,
    /// There is no room for another entry.
    #[error(
        "the list of revocations is full ({entries} members): \
         wait until older entries are forgotten, or exclude everybody at once with a new root, `isobar ca rotate`"
    )]
    Full {
        /// How many members there would be.
        entries: usize,
    },
    /// The key refused.
    #[error("the list of revocations cannot be signed: {0}")]
    Sign(rcgen::Error),
}

/// When a member ceased to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// Certificates that begin at or before this moment (in whole milliseconds) are not believed.
    pub at: SystemTime,
    /// When the entry is not needed any more.
    pub forget_at: SystemTime,
}

/// Who is not believed any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations {
    pub(crate) version: u64,
    pub(crate) entries: BTreeMap<SpiffeId, Revoked>,
}

impl Revocations {
    /// Greater with every change; 0: nobody was ever revoked.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Every member that is revoked, and when.
    pub fn entries(&self) -> impl Iterator<Item = (&SpiffeId, Revoked)> {
        self.entries.iter().map(|(id, revoked)| (id, *revoked))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether everybody is believed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// When `id` was revoked, if it was.
    #[must_use]
    pub fn revoked_at(&self, id: &SpiffeId) -> Option<SystemTime> {
        self.entries.get(id).map(|revoked| revoked.at)
    }

    /// Whether a certificate of `id` that begins at `not_before` is not to be believed.
    #[must_use]
    pub fn revokes(&self, id: &SpiffeId, not_before: SystemTime) -> bool {
        self.revoked_at(id).is_some_and(|at| not_before <= at)
    }

    /// Everybody on either list, as of the later moment. The version is the greater one: whoever publishes the result
    /// as something new has to raise it.
    #[must_use]
    pub fn merge(&self, other: &Self) -> Self {
        let mut merged = self.clone();
        merged.version = self.version.max(other.version);
        for (id, revoked) in &other.entries {
            merged.add(id.clone(), *revoked);
        }
        merged
    }

    /// Whether `other` says nothing that this list does not say, leaving aside what is forgotten by `now`.
    #[must_use]
    pub fn covers(&self, other: &Self, now: SystemTime) -> bool {
        let mut needed = other.entries.iter().filter(|(_, revoked)| revoked.forget_at > now);
        needed.all(|(id, revoked)| {
            self.entries
                .get(id)
                .is_some_and(|ours| ours.at >= revoked.at && ours.forget_at >= revoked.forget_at)
        })
    }

    pub(crate) fn add(&mut self, id: SpiffeId, revoked: Revoked) {
        let entry = self.entries.entry(id).or_insert(revoked);
        entry.at = entry.at.max(revoked.at);
        entry.forget_at = entry.forget_at.max(revoked.forget_at);
    }

    /// Gives the list the version under which it is signed at `now`. It follows the clock and stays near it: see
    /// [`SignedRevocations::can_be_superseded`].
    pub(crate) fn raise_version(&mut self, now: SystemTime) {
        let second = milliseconds(now) / 1_000;
        let next = self.version.saturating_add(1).max(second);
        self.version = next.min(second.saturating_add(VERSION_AHEAD));
    }

    /// Drops what is not needed any more.
    pub(crate) fn forget(&mut self, now: SystemTime) {
        self.entries.retain(|_, revoked| revoked.forget_at > now);
    }

    fn to_wire(&self, trust_domain: &TrustDomain, now: SystemTime) -> wire::RevocationList {
        let revoked = self.entries.iter().map(|(id, revoked)| wire::Revoked {
            member: format!("{}/{}/{}", id.role, id.region, id.name),
            revoked_at_ms: milliseconds(revoked.at),
            keep_s: keep_s(*revoked),
        });
        wire::RevocationList {
            trust_domain: trust_domain.to_string(),
            version: self.version,
            signed_at_ms: milliseconds(now),
            revoked: revoked.collect(),
        }
    }

    fn from_wire(list: &wire::RevocationList, mesh: &TrustDomain) -> Result<Self, RevocationError> {
        // Versions follow the clock: one that leaves no room for the next is nobody's.
        if list.version > LATEST_MS {
            return Err(RevocationError::Damaged("its version is out of range"));
        }
        if list.revoked.len() > REVOCATIONS_MAX {
            return Err(RevocationError::Damaged("it has too many entries"));
        }
        let mut entries = BTreeMap::new();
        for one in &list.revoked {
            let id = format!("spiffe://{mesh}/{}", one.member).parse();
            let id = id.map_err(|_| RevocationError::Damaged("an entry names no member"))?;
            let at = moment(one.revoked_at_ms)?;
            let forget_at = at + Duration::from_secs(one.keep_s.into());
            entries.insert(id, Revoked { at, forget_at });
        }
        if entries.len() < list.revoked.len() {
            return Err(RevocationError::Damaged("a member is named twice"));
        }
        Ok(Self { version: list.version, entries })
    }
}

/// The list as it travels. Only [`Self::verify`] turns it into something to act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRevocations {
    encoded: Vec<u8>,
    signed: wire::SignedRevocations,
    trust_domain: TrustDomain,
    signed_at: SystemTime,
    /// What it says, whoever says so.
    claimed: Revocations,
}

impl SignedRevocations {
    /// Signs a list with the key of the first certificate of `chain`, a member of the role `authority`.
    pub(crate) fn sign(
        list: &Revocations,
        trust_domain: &TrustDomain,
        chain: &[CertificateDer<'static>],
        key: &KeyPair,
        now: SystemTime,
    ) -> Result<Self, RevocationError> {
        let bytes = list.to_wire(trust_domain, now).encode_to_vec();
        let chain: Vec<_> = chain.iter().map(|certificate| certificate.to_vec()).collect();
        let size = bytes.len() + chain.iter().map(Vec::len).sum::<usize>() + FRAME_BYTES;
        if list.len() > REVOCATIONS_MAX || size > REVOCATIONS_MAX_BYTES {
            return Err(RevocationError::Full { entries: list.len() });
        }
        let signature = key.sign(&message(&bytes)).map_err(RevocationError::Sign)?;
        let signed = wire::SignedRevocations { list: bytes, chain, signature };
        Self::decode(&signed.encode_to_vec())
    }

    /// The bytes that travel and are kept.
    #[must_use]
    pub fn encode(&self) -> &[u8] {
        &self.encoded
    }

    /// Reads what travels. Nothing is believed yet.
    ///
    /// # Errors
    /// The bytes are too many, or not a list.
    pub fn decode(bytes: &[u8]) -> Result<Self, RevocationError> {
        if bytes.len() > REVOCATIONS_MAX_BYTES {
            return Err(RevocationError::Damaged("it is longer than 48 KiB"));
        }
        let unreadable = |_| RevocationError::Damaged("it cannot be parsed");
        let signed = wire::SignedRevocations::decode(bytes).map_err(unreadable)?;
        if signed.chain.len() > CHAIN_MAX {
            return Err(RevocationError::Damaged("it has too many certificates"));
        }
        let list = wire::RevocationList::decode(signed.list.as_slice()).map_err(unreadable)?;
        let trust_domain = list.trust_domain.parse();
        let trust_domain =
            trust_domain.map_err(|_| RevocationError::Damaged("it names no trust domain"))?;
        Ok(Self {
            encoded: bytes.into(),
            signed_at: moment(list.signed_at_ms)?,
            claimed: Revocations::from_wire(&list, &trust_domain)?,
            trust_domain,
            signed,
        })
    }

    /// The mesh it claims to be for.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The version it claims: reason enough to ask for it or to leave it, not to act on it.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.claimed.version
    }

    /// Whether this list takes the place of `other` at a node that believes both: the greater version; of one version,
    /// which two authorities can make at once, the one that revokes more; then any order that all nodes agree on.
    #[must_use]
    pub fn supersedes(&self, other: &Self) -> bool {
        let rank = |list: &Self| (list.claimed.version, list.claimed.len());
        (rank(self), &self.encoded) > (rank(other), &other.encoded)
    }

    /// The list, if an authority of the mesh signed it. `now` only serves to refuse what would come from the future.
    ///
    /// # Errors
    /// It is for another mesh, was changed, or was signed by somebody else or under other roots.
    pub fn verify(
        &self,
        roots: &RootCertStore,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Revocations, RevocationError> {
        if self.trust_domain != *trust_domain {
            let (found, ours) = (self.trust_domain.clone(), trust_domain.clone());
            return Err(RevocationError::OtherMesh { found, ours });
        }
        if let Ok(ahead) = self.signed_at.duration_since(now)
            && ahead > CLOCK_SKEW
        {
            return Err(RevocationError::FromTheFuture(ahead));
        }
        if !self.can_be_superseded() {
            return Err(RevocationError::Damaged(
                "its version is more than a day ahead of the moment it was signed at, so that no list could follow it",
            ));
        }
        self.verify_signer(roots)?;
        Ok(self.claimed.clone())
    }

    fn verify_signer(&self, roots: &RootCertStore) -> Result<(), RevocationError> {
        let chain: Vec<_> =
            self.signed.chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let (leaf, intermediates) =
            chain.split_first().ok_or(RevocationError::Damaged("it has no certificate"))?;
        let algorithms = tls::provider().signature_verification_algorithms;
        let moment = unix_time(self.signed_at);
        verify_chain(leaf, intermediates, roots, &algorithms, Side::Server, moment)
            .map_err(RevocationError::Untrusted)?;
        match peer_id(&chain) {
            Ok(id) if id.role == Role::Authority && id.trust_domain == self.trust_domain => {}
            Ok(id) => return Err(RevocationError::NotAnAuthority(id.to_string())),
            Err(error) => return Err(RevocationError::NotAnAuthority(error.to_string())),
        }
        EndEntityCert::try_from(leaf)
            .and_then(|leaf| {
                let algorithm = webpki::aws_lc_rs::ECDSA_P256_SHA256;
                leaf.verify_signature(
                    algorithm,
                    &message(&self.signed.list),
                    &self.signed.signature,
                )
            })
            .map_err(|_| RevocationError::Forged)
    }

    /// Whether the next list of an authority whose clock is right will take the place of this one: whoever signs a list
    /// under the greatest version there is would have the last word for good.
    pub(crate) fn can_be_superseded(&self) -> bool {
        let second = milliseconds(self.signed_at) / 1_000;
        self.claimed.version <= second.saturating_add(VERSION_AHEAD)
    }

    /// What it says, whoever says so: for a list from this node's own disk, which was verified when it was stored, and to see
    /// whether it says anything new.
    #[must_use]
    pub fn claimed(&self) -> &Revocations {
        &self.claimed
    }

    /// Whether the list was signed with a certificate that `issuer` issued: first of its chain after the signer.
    pub(crate) fn is_under(&self, issuer: &CertificateDer<'_>) -> bool {
        self.signed.chain.get(1).is_some_and(|der| der.as_slice() == issuer.as_ref())
    }
}

fn message(list: &[u8]) -> Vec<u8> {
    [CONTEXT, list].concat()
}

fn moment(milliseconds: u64) -> Result<SystemTime, RevocationError> {
    if milliseconds > LATEST_MS {
        return Err(RevocationError::Damaged("a time is out of range"));
    }
    Ok(UNIX_EPOCH + Duration::from_millis(milliseconds))
}

pub(crate) fn milliseconds(moment: SystemTime) -> u64 {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis().try_into().unwrap_or(u64::MAX)
}

/// Rounded up: an entry is never forgotten early.
fn keep_s(revoked: Revoked) -> u32 {
    let kept = revoked.forget_at.duration_since(revoked.at).unwrap_or_default();
    (kept + Duration::from_nanos(999_999_999)).as_secs().try_into().unwrap_or(u32::MAX)
}
