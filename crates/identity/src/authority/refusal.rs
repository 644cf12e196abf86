//! Why somebody gets no certificate, in one sentence for whoever asked and one word for whoever counts.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime},
};

use base::{NodeName, RegionName, TrustDomain};

use super::issuing::text;
use crate::{CsrError, IdentityError, NamePattern, SpiffeId};

/// How a node joins: what it says of itself, and where it said so from.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    /// The text of the token.
    pub token: &'a str,
    /// The request for a certificate (PKCS#10 in DER).
    pub csr: &'a [u8],
    /// The name it wants.
    pub name: &'a NodeName,
    /// The region it says it is in.
    pub region: &'a RegionName,
    /// Where it is seen, for the record.
    pub remote: IpAddr,
    /// The addresses its certificate shall hold for besides loopback; between peers they prove nothing.
    pub ips: &'a [IpAddr],
}

impl std::fmt::Debug for Ask<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Ask");
        shown.field("name", self.name).field("region", self.region).field("remote", &self.remote);
        shown.finish_non_exhaustive()
    }
}

/// Why a certificate is not issued. Nothing was signed. No message contains a token, a key, or a path of the authority's
/// machine; the fault is with whoever asked, except for [`Refusal::IssuerEnding`] and [`Refusal::Internal`].
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Nothing this authority ever handed out.
    #[error(
        "the token is damaged or was altered: copy it again, whole, or ask for a new one (`isobar ca token`)"
    )]
    Tampered,
    /// Not kept here.
    #[error(
        "this authority did not issue the token, or has cleaned it up since it expired: \
         use it where it was issued, or ask for a new one (`isobar ca token`)"
    )]
    Unknown,
    /// Kept here, in the copy of a directory it was made in.
    #[error(
        "the token was made at another copy of this authority, where it may have been used: \
         use it there, or ask for a new one (`isobar ca token`)"
    )]
    OtherCopy,
    /// Too late.
    #[error("the token expired on {}: ask for a new one (`isobar ca token`)", text(*.at))]
    Expired {
        /// When.
        at: SystemTime,
    },
    /// For somebody else.
    #[error(
        "the token is for the name `{wanted}`, not `{name}`: set node.name, or ask for a token for that name"
    )]
    WrongName {
        /// Who asked.
        name: NodeName,
        /// Whom it is for.
        wanted: NamePattern,
    },
    /// For elsewhere.
    #[error(
        "the token is for the region `{wanted}`, not `{region}`: set node.region, or ask for a token for that region"
    )]
    WrongRegion {
        /// Where it was used.
        region: RegionName,
        /// Where it is for.
        wanted: RegionName,
    },
    /// For another mesh.
    #[error(
        "this is for the mesh `{found}`, and this authority serves `{ours}`: use the seeds of that mesh"
    )]
    WrongMesh {
        /// For which.
        found: TrustDomain,
        /// Whose authority this is.
        ours: TrustDomain,
    },
    /// Not a node.
    #[error(
        "{0} is not a node, and only nodes renew their certificates here: have it issued anew (`isobar ca issue`)"
    )]
    WrongRole(SpiffeId),
    /// Used twice.
    #[error(
        "the token was redeemed by `{name}` on {}: if that was not you, revoke it (`isobar ca revoke`); \
         each node needs its own use of a token, ask for a new one (`isobar ca token`)",
        text(*.at)
    )]
    Replayed {
        /// By whom.
        name: NodeName,
        /// When.
        at: SystemTime,
    },
    /// Used as often as it is good for.
    #[error(
        "all {uses} uses of the token are taken{}: ask for a new one (`isobar ca token`)",
        last_use(.last.as_ref())
    )]
    UsedUp {
        /// How often it was used.
        uses: u32,
        /// Who was last, and when; `None`: it was withdrawn before anybody was.
        last: Option<(NodeName, SystemTime)>,
    },
    /// Excluded.
    #[error("{id} was revoked on {}: to let it in again, join with a token that is issued from now on", text(*.at))]
    Revoked {
        /// Who.
        id: SpiffeId,
        /// When.
        at: SystemTime,
    },
    /// Longer than any honest request.
    #[error("{}", CsrError::TooLong(*.0))]
    CsrTooLong(usize),
    /// A request that proves nothing.
    #[error(transparent)]
    CsrInvalid(CsrError),
    /// The authority needs its operator; asking again later can help.
    #[error(
        "the authority must not sign any more, its own certificate ends on {until}: ask its operator to renew it"
    )]
    IssuerEnding {
        /// When.
        until: String,
    },
    /// The authority needs its operator; asking again later can help. The cause is for its log.
    #[error(
        "the authority failed to do it: try again later, or ask its operator, whose log says why"
    )]
    Internal(#[source] IdentityError),
}

impl Refusal {
    /// One word for metrics and records.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Tampered => "tampered",
            Self::Unknown | Self::OtherCopy => "unknown",
            Self::Expired { .. } => "expired",
            Self::WrongName { .. } => "wrong_name",
            Self::WrongRegion { .. } => "wrong_region",
            Self::WrongMesh { .. } => "wrong_mesh",
            Self::WrongRole(_) => "wrong_role",
            Self::Replayed { .. } => "replayed",
            Self::UsedUp { .. } => "used_up",
            Self::Revoked { .. } => "revoked",
            Self::CsrTooLong(_) => "csr_too_long",
            Self::CsrInvalid(_) => "csr_invalid",
            Self::IssuerEnding { .. } => "issuer_ending",
            Self::Internal(_) => "internal",
        }
    }

    /// After which time asking again can help; `None`: it cannot.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::IssuerEnding { .. } => Some(Duration::from_secs(60)),
            Self::Internal(_) => Some(Duration::from_secs(5)),
            _ => None,
        }
    }
}

fn last_use(last: Option<&(NodeName, SystemTime)>) -> String {
    last.map(|(name, at)| format!(", the last by `{name}` on {}", text(*at))).unwrap_or_default()
}

impl From<CsrError> for Refusal {
    fn from(error: CsrError) -> Self {
        match error {
            CsrError::TooLong(bytes) => Self::CsrTooLong(bytes),
            other => Self::CsrInvalid(other),
        }
    }
}

impl From<IdentityError> for Refusal {
    fn from(error: IdentityError) -> Self {
        match error {
            IdentityError::Csr(error) => error.into(),
            IdentityError::IssuerEnding { until } => Self::IssuerEnding { until },
            other => Self::Internal(other),
        }
    }
}
