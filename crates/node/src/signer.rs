//! A node that holds the mesh's issuing key: it opens the authority's directory, takes in what changes there, and answers
//! those who want a certificate.
//!
//! ```text
//!  1 limited      joins without a certificate are few per second, by address and in all; renewals by node
//!  2 read         one bounded question
//!  3 who          a token, or the certificate of the connection
//!  4 signed       by the authority, or refused with a sentence that says what to do
//!  5 written down every join and renewal, and every refusal: a line in the log, a number in the metrics
//! ```

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use base::{NodeName, RegionName, clock};
use http::uri::Authority as HostPort;
use identity::{
    Authority, CertificateRequest, IdentityError, NodeIdentity, Refusal, Revocations, Role,
    ServedCertificate, SpiffeId,
};
use parking_lot::{Mutex, RwLock};
use prost::Message as _;
use proto::isobar::mesh::v1::{
    EnrolReply, EnrolRequest, Issued, Join, Peer, Refused, enrol_reply::Outcome, enrol_request::Ask,
};
use rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;
use transport::Link;

use crate::{config::PeerConfig, throttle::Throttle, trust::Trust};

/// Longest question.
const QUESTION_BYTES_MAX: usize = 16 << 10;
/// How often the directory is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// What does not work is tried again after this.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// Peers a joiner is told of at most.
const PEERS_MAX: usize = 64;

/// What a node says of itself to those who join.
#[derive(Clone, Debug)]
pub(crate) struct Contact {
    pub(crate) id: SpiffeId,
    pub(crate) peers_port: u16,
    pub(crate) gossip_port: u16,
    pub(crate) peers: Vec<PeerConfig>,
}

/// The authority of a node. Shared by the port and the tasks that keep it.
#[derive(Debug)]
pub struct Signer {
    dir: PathBuf,
    region: RegionName,
    name: NodeName,
    authority: RwLock<Arc<Authority>>,
    shown: ServedCertificate,
    throttle: Mutex<Throttle>,
    counts: Counts,
}

/// Who asks for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caller {
    /// Somebody with a certificate of the mesh.
    Node,
    /// Somebody without.
    Stranger,
    /// Somebody who asks too often.
    Limited,
}

/// How enrolments ended.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) joined: AtomicU64,
    pub(crate) renewed: AtomicU64,
    refused: Mutex<std::collections::BTreeMap<&'static str, u64>>,
}

impl Signer {
    /// Opens the directory of an authority for the node `name` in `region`.
    ///
    /// # Errors
    /// The directory cannot be used; the error says why.
    pub fn open(dir: &Path, region: &RegionName, name: &NodeName) -> Result<Self, IdentityError> {
        let now = clock::wall();
        let authority = Authority::open(dir, now)?;
        let (chain, key) = authority.own(region, name, now)?;
        Ok(Self {
            dir: dir.into(),
            region: region.clone(),
            name: name.clone(),
            authority: RwLock::new(Arc::new(authority)),
            shown: ServedCertificate::new(chain, key)?,
            throttle: Mutex::new(Throttle::new(clock::now())),
            counts: Counts::default(),
        })
    }

    /// The mesh it signs for.
    #[must_use]
    pub fn trust_domain(&self) -> base::TrustDomain {
        self.authority().trust_domain().clone()
    }

    pub(crate) fn authority(&self) -> Arc<Authority> {
        self.authority.read().clone()
    }

    pub(crate) fn shown(&self) -> &ServedCertificate {
        &self.shown
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// A certificate for the node that holds the authority itself.
    ///
    /// # Errors
    /// The authority cannot sign any more.
    pub fn own_identity(&self, dir: &Path, ips: &[IpAddr]) -> Result<NodeIdentity, IdentityError> {
        let (authority, now) = (self.authority(), clock::wall());
        let id = SpiffeId {
            trust_domain: authority.trust_domain().clone(),
            role: Role::Node,
            region: self.region.clone(),
            name: self.name.clone(),
        };
        // It could let itself in again, for it has the key: whoever revoked it meant that it should not.
        if authority.revoked()?.revoked_at(&id).is_some() {
            return Err(IdentityError::Revoked { id });
        }
        let request = CertificateRequest::new()?;
        let chain = authority.sign(&id, request.csr(), ips, now)?;
        NodeIdentity::issued(dir, chain, request.into_key(), authority.roots(), now)
    }

    /// Takes in what changes in the directory and renews what is shown to joiners, until `stop`; says when the roots or the
    /// issuer are others.
    pub(crate) async fn keep(
        self: &Arc<Self>,
        trust: &Trust,
        changed: impl Fn(),
        stop: CancellationToken,
    ) {
        let mut heard = trust.revocations();
        heard.mark_changed();
        let mut shown_at = clock::wall();
        let (mut opened, mut shown) = (Said::default(), Said::default());
        while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
            let mut is_newer = false;
            if self.authority().has_changed() && opened.may_try(clock::now()) {
                is_newer = self.reopen(&mut opened).await;
            }
            let now = clock::wall();
            // A clock that was put back too.
            let is_due = now < shown_at || now >= shown_at + self.authority().life() / 2;
            if (is_newer || is_due) && shown.may_try(clock::now()) && self.show_anew(&mut shown) {
                shown_at = now;
            }
            if is_newer {
                changed();
            }
            if heard.has_changed().unwrap_or(false) {
                heard.mark_unchanged();
                if !self.adopt(trust.identity().revocations()).await {
                    heard.mark_changed();
                }
            }
            self.publish(trust);
        }
    }

    /// Opens the directory anew; what is there now stays in use when that fails.
    async fn reopen(&self, said: &mut Said) -> bool {
        let dir = self.dir.clone();
        // It waits for commands that change the directory meanwhile.
        let opening = tokio::task::spawn_blocking(move || Authority::open(&dir, clock::wall()));
        let opened = match opening.await {
            Ok(opened) => opened.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match opened {
            Ok(newer) => {
                tracing::info!(dir = %self.dir.display(), "the authority's directory changed");
                *self.authority.write() = Arc::new(newer);
                said.well();
                true
            }
            Err(why) => {
                if said.badly(&why, clock::now()) {
                    tracing::error!(
                        why,
                        "the authority's directory changed and cannot be used; the earlier state stays in use"
                    );
                }
                false
            }
        }
    }

    /// Takes in what other authorities revoked, so that our next list says so too. Returns whether that is done.
    async fn adopt(self: &Arc<Self>, list: Arc<Revocations>) -> bool {
        if list.is_empty() {
            return true;
        }
        let signer = self.clone();
        let adopting = move || signer.authority().adopt(&list, clock::wall());
        match tokio::task::spawn_blocking(adopting).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                tracing::error!(%error, "the authority cannot take in what another revoked");
                false
            }
            Err(error) => {
                tracing::error!(%error, "the authority failed");
                false
            }
        }
    }

    /// Hands the mesh our list of revocations when it is newer than the one that goes around.
    pub(crate) fn publish(&self, trust: &Trust) {
        let signed = self.authority().revocations().clone();
        if signed.version() > 0
            && let Err(error) = trust.adopt(signed)
        {
            tracing::error!(%error, "the authority's own list of revocations is not believed");
        }
    }

    fn show_anew(&self, said: &mut Said) -> bool {
        let shown = self.authority().own(&self.region, &self.name, clock::wall());
        match shown.and_then(|(chain, key)| self.shown.replace(chain, key)) {
            Ok(()) => {
                said.well();
                true
            }
            Err(error) => {
                let why = error.to_string();
                if said.badly(&why, clock::now()) {
                    tracing::error!(
                        why,
                        "this authority cannot sign: nobody can join or renew here"
                    );
                }
                false
            }
        }
    }

    /// Who somebody is, and whether it may ask now.
    pub(crate) fn admit(&self, certificates: &[CertificateDer<'static>], remote: IpAddr) -> Caller {
        let (mut throttle, now) = (self.throttle.lock(), clock::now());
        match identity::peer_id(certificates) {
            Ok(node) if throttle.allows_renewal(node.to_string(), now) => Caller::Node,
            Err(_) if throttle.allows(remote, now) => Caller::Stranger,
            _ => Caller::Limited,
        }
    }

    /// Serves one connection of somebody who wants a certificate, from `remote`.
    pub(crate) async fn serve(
        self: &Arc<Self>,
        link: &Link,
        remote: IpAddr,
        who: Caller,
        contact: &Contact,
    ) -> Result<(), String> {
        // The question is read whoever asks: the answer must find somebody who listens.
        let question = link.asked(QUESTION_BYTES_MAX, who.asks_within()).await;
        let (question, answer) = question.map_err(|error| error.to_string())?;
        let reply = if who == Caller::Limited {
            let why = "too many ask at once: try again in a few seconds";
            self.refused("rate_limited", remote, why);
            refusal("rate_limited", why, Throttle::RETRY_AFTER)
        } else {
            let (signer, contact) = (self.clone(), contact.clone());
            let certificates = link.certificates();
            // It writes to disk before it signs.
            let deciding = move || signer.decide(&question, &certificates, remote, &contact);
            tokio::task::spawn_blocking(deciding).await.map_err(|error| error.to_string())?
        };
        answer.send(reply.encode_to_vec().into()).await.map_err(|error| error.to_string())
    }

    fn decide(
        &self,
        question: &[u8],
        certificates: &[CertificateDer<'static>],
        remote: IpAddr,
        contact: &Contact,
    ) -> EnrolReply {
        let ask = EnrolRequest::decode(question).ok().and_then(|request| request.ask);
        match (ask, certificates.first()) {
            (Some(Ask::Join(join)), None) => self.join(&join, remote, contact),
            (Some(Ask::Renew(renew)), Some(current)) => {
                self.renew(current, &renew.csr, remote, contact)
            }
            _ => {
                let why = "the request is none that this authority knows: a token is redeemed without a certificate, \
                           and a certificate is renewed with the one before it";
                self.refused("malformed", remote, why);
                refusal("malformed", why, Duration::ZERO)
            }
        }
    }

    fn join(&self, join: &Join, remote: IpAddr, contact: &Contact) -> EnrolReply {
        let named = (join.node.parse::<NodeName>(), join.region.parse::<RegionName>());
        let (Ok(name), Ok(region)) = named else {
            let why =
                "the name or the region is none: a name is 1 to 63 characters of a-z, 0-9 and `-`";
            self.refused("malformed", remote, why);
            return refusal("malformed", why, Duration::ZERO);
        };
        let ask = identity::Ask {
            token: &join.token,
            csr: &join.csr,
            name: &name,
            region: &region,
            remote,
            // The address it was seen at, which the handshake proved to be its own.
            ips: &[remote],
        };
        match self.authority().redeem(&ask, clock::wall()) {
            Ok(chain) => {
                self.counts.joined.fetch_add(1, Ordering::Relaxed);
                tracing::info!(node = %name, %region, %remote, "a node joined");
                self.issued(&chain, contact)
            }
            Err(refused) => self.turned_down(&refused, remote),
        }
    }

    fn renew(
        &self,
        current: &CertificateDer<'_>,
        csr: &[u8],
        remote: IpAddr,
        contact: &Contact,
    ) -> EnrolReply {
        match self.authority().renew(current, csr, &[remote], clock::wall()) {
            Ok(chain) => {
                self.counts.renewed.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%remote, "a certificate was renewed");
                self.issued(&chain, contact)
            }
            Err(refused) => self.turned_down(&refused, remote),
        }
    }

    fn issued(&self, chain: &[CertificateDer<'static>], contact: &Contact) -> EnrolReply {
        let authority = self.authority();
        let der = |all: &[CertificateDer<'static>]| all.iter().map(|one| one.to_vec()).collect();
        let list = authority.revocations();
        let revocations = if list.version() > 0 { list.encode() } else { &[] };
        let issued = Issued {
            chain: der(chain),
            roots: der(authority.roots()),
            revocations: revocations.to_vec(),
            peers_port: contact.peers_port.into(),
            gossip_port: contact.gossip_port.into(),
            node: contact.id.name.to_string(),
            region: contact.id.region.to_string(),
            peers: contact.peers.iter().take(PEERS_MAX).map(peer).collect(),
        };
        EnrolReply { outcome: Some(Outcome::Issued(issued)) }
    }

    fn turned_down(&self, refused: &Refusal, remote: IpAddr) -> EnrolReply {
        let why = refused.to_string();
        self.refused(refused.label(), remote, &why);
        if let Some(cause) = std::error::Error::source(refused) {
            tracing::error!(%cause, "this authority failed");
        }
        refusal(refused.label(), &why, refused.retry_after().unwrap_or_default())
    }

    fn refused(&self, reason: &'static str, remote: IpAddr, why: &str) {
        let mut refused = self.counts.refused.lock();
        *refused.entry(reason).or_default() += 1;
        drop(refused);
        if self.throttle.lock().may_say(clock::now()) {
            tracing::warn!(%remote, reason, why, "an enrolment was refused");
        }
    }
}

impl Caller {
    /// A question must have come within this: until then it holds one of few places.
    fn asks_within(self) -> Duration {
        match self {
            Self::Node => Duration::from_secs(5),
            Self::Stranger => Duration::from_secs(2),
            Self::Limited => Duration::from_millis(300),
        }
    }
}

/// What was last said of something that does not work, so that it is said once and tried now and then.
#[derive(Debug, Default)]
struct Said {
    why: String,
    again: Option<Instant>,
}

impl Said {
    fn may_try(&self, now: Instant) -> bool {
        self.again.is_none_or(|again| now >= again)
    }

    fn well(&mut self) {
        *self = Self::default();
    }

    /// Returns whether it is news.
    fn badly(&mut self, why: &str, now: Instant) -> bool {
        self.again = Some(now + TRY_AGAIN);
        let is_news = self.why != why;
        why.clone_into(&mut self.why);
        is_news
    }
}

impl Counts {
    pub(crate) fn refused(&self) -> Vec<(&'static str, u64)> {
        self.refused.lock().iter().map(|(reason, count)| (*reason, *count)).collect()
    }
}

fn peer(peer: &PeerConfig) -> Peer {
    let text = |address: Option<HostPort>| address.map(|a| a.to_string()).unwrap_or_default();
    Peer {
        node: peer.name.to_string(),
        region: peer.region.to_string(),
        peers: peer.peers.authority().to_string(),
        gossip: text(peer.gossip.as_ref().map(|gossip| gossip.authority())),
    }
}

fn refusal(reason: &str, why: &str, retry: Duration) -> EnrolReply {
    let retry_after_ms = u32::try_from(retry.as_millis()).unwrap_or(u32::MAX);
    let refused = Refused { reason: reason.to_owned(), why: why.to_owned(), retry_after_ms };
    EnrolReply { outcome: Some(Outcome::Refused(refused)) }
}
