//! Getting a certificate from an authority: the first one for a token, the next ones with the one before.

use std::{path::Path, time::Duration};

use base::{NodeName, RegionName, clock};
use http::uri::Authority;
use identity::{
    CertificateRequest, Identity, IdentityError, NodeIdentity, Role, SignedRevocations, SpiffeId,
    Token,
};
use prost::Message as _;
use proto::isobar::mesh::v1::{
    EnrolReply, EnrolRequest, Issued, Join, Renew, enrol_reply::Outcome, enrol_request::Ask,
};
use rustls::{ClientConfig, pki_types::CertificateDer};
use transport::{Links, QuicKeys, TransportError};

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The authority said no. Asking again helps only after `retry_after`, if that is not zero.
    #[error("the authority at {at} refused: {why}")]
    Refused {
        /// Which authority.
        at: String,
        /// One word, for machines.
        reason: String,
        /// The authority's sentence.
        why: String,
        /// When asking again makes sense; zero: it does not.
        retry_after: Duration,
    },
    /// Nobody answered there, or not who should.
    #[error(
        "cannot reach an authority: {0}; give the gossip port (by default 8445, UDP or TCP) of a node that runs and holds the authority"
    )]
    Unreachable(#[from] TransportError),
    /// An authority took too long.
    #[error("an authority did not answer in time")]
    Silent,
    /// The answer is no certificate this node can use.
    #[error("the authority's answer cannot be used: {0}")]
    Unusable(String),
    /// The certificate is not one peers would believe, or no key can be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// There is nobody to ask.
    #[error(
        "no authority is known: set mesh.seeds to the gossip port of one, such as \"authority.example:8445\""
    )]
    NobodyToAsk,
    /// The machine gives no socket.
    #[error("cannot dial: {0}")]
    Socket(#[from] std::io::Error),
}

/// What an authority handed out.
#[derive(Debug)]
pub struct Enrolled {
    /// The identity; not yet stored.
    pub identity: NodeIdentity,
    /// Who is not believed any more.
    pub revocations: Option<SignedRevocations>,
    /// The node that answered, as a peer, with the host it was reached at.
    pub authority: KnownPeer,
}

/// A node to begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPeer {
    /// Its name.
    pub node: NodeName,
    /// Its region.
    pub region: RegionName,
    /// Where it takes calls from peers, host and port.
    pub peers: String,
    /// Where it gossips, host and port.
    pub gossip: String,
}

/// Redeems a token at the authority at `seed` for the node `name`; `dir` is where the identity will be stored.
///
/// # Errors
/// [`EnrolError`]. When the authority refused, the token may be used up.
pub async fn join(
    token: &Token,
    name: &NodeName,
    seed: &Authority,
    dir: &Path,
) -> Result<Enrolled, EnrolError> {
    let links = Links::dialing(&QuicKeys::random())?;
    let tls = identity::join_client_config(token.trust_domain(), token.root_fingerprint())?;
    let request = CertificateRequest::new()?;
    let ask = Ask::Join(Join {
        token: token.reveal(),
        csr: request.csr().to_vec(),
        node: name.to_string(),
        region: token.region().to_string(),
    });
    let id = SpiffeId {
        trust_domain: token.trust_domain().clone(),
        role: Role::Node,
        region: token.region().clone(),
        name: name.clone(),
    };
    let enrolled = enrol(&links, seed, tls, ask, request, dir).await;
    links.close().await;
    for_whom(enrolled?, &id)
}

/// Renews the certificate of `identity` at the authority at `seed`.
///
/// # Errors
/// [`EnrolError`]; the certificate at hand is as good as before.
pub(crate) async fn renew(
    links: &Links,
    identity: &Identity,
    seed: &Authority,
    dir: &Path,
) -> Result<Enrolled, EnrolError> {
    let tls = identity.renewal_client_config()?;
    let request = CertificateRequest::new()?;
    let ask = Ask::Renew(Renew { csr: request.csr().to_vec() });
    for_whom(enrol(links, seed, tls, ask, request, dir).await?, identity.id())
}

/// An answer for another node is none.
fn for_whom(enrolled: Enrolled, wanted: &SpiffeId) -> Result<Enrolled, EnrolError> {
    let found = enrolled.identity.id();
    if found != wanted {
        return Err(EnrolError::Unusable(format!("it is for {found}, and {wanted} asked")));
    }
    Ok(enrolled)
}

async fn enrol(
    links: &Links,
    seed: &Authority,
    tls: ClientConfig,
    ask: Ask,
    request: CertificateRequest,
    dir: &Path,
) -> Result<Enrolled, EnrolError> {
    let link = links.dial(seed, tls).await?;
    let answer = link.ask(EnrolRequest { ask: Some(ask) }.encode_to_vec().into()).await;
    link.close("done");
    let reply = EnrolReply::decode(answer?).map_err(|e| EnrolError::Unusable(e.to_string()))?;
    match reply.outcome {
        Some(Outcome::Issued(issued)) => enrolled(issued, request, seed, dir),
        Some(Outcome::Refused(refused)) => Err(EnrolError::Refused {
            at: seed.to_string(),
            reason: shown(&refused.reason),
            why: shown(&refused.why),
            retry_after: Duration::from_millis(refused.retry_after_ms.into()),
        }),
        None => Err(EnrolError::Unusable("it says nothing this version knows".to_owned())),
    }
}

fn enrolled(
    issued: Issued,
    request: CertificateRequest,
    seed: &Authority,
    dir: &Path,
) -> Result<Enrolled, EnrolError> {
    let unusable = |error: &dyn std::fmt::Display| EnrolError::Unusable(error.to_string());
    let der = |all: Vec<Vec<u8>>| all.into_iter().map(CertificateDer::from).collect::<Vec<_>>();
    let roots = der(issued.roots);
    let chain = der(issued.chain);
    let identity = NodeIdentity::issued(dir, chain, request.into_key(), &roots, clock::wall())?;
    let revocations = match issued.revocations.as_slice() {
        [] => None,
        bytes => Some(SignedRevocations::decode(bytes).map_err(|e| unusable(&e))?),
    };
    let at = |port: u32| format!("{}:{port}", seed.host());
    let authority = KnownPeer {
        node: issued.node.parse().map_err(|e| unusable(&e))?,
        region: issued.region.parse().map_err(|e| unusable(&e))?,
        peers: at(issued.peers_port),
        gossip: at(issued.gossip_port),
    };
    Ok(Enrolled { identity, revocations, authority })
}

/// What somebody else wrote, fit for a terminal.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(1000).collect()
}
