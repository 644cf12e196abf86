//! A SPIRE agent as the source of the node's identity, over the SPIFFE Workload API: it hands out certificate, key and roots,
//! and newer ones whenever it likes.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use base::clock;
use futures_util::StreamExt as _;
use identity::{IdentityError, NodeIdentity, SpiffeId};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use spiffe::{WorkloadApiClient, WorkloadApiError, X509Context};

/// The agent must answer within this.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Waits between connections to an agent that is gone, doubling.
const AGAIN_FIRST: Duration = Duration::from_millis(200);
const AGAIN_MAX: Duration = Duration::from_secs(30);

/// Why the agent gives this node no identity.
#[derive(Debug, thiserror::Error)]
pub enum SpireError {
    /// The agent cannot be reached, or has nothing for us.
    #[error(
        "the SPIRE agent gives no identity: {0}; check identity.socket (or SPIFFE_ENDPOINT_SOCKET), and that an entry is registered \
         for this workload"
    )]
    Agent(String),
    /// The agent knows this workload, but not as this node.
    #[error(
        "the SPIRE agent knows this workload as {found}, and the configuration says {wanted}: register that id, or change node.name and node.region"
    )]
    AnotherId {
        /// What it offers.
        found: String,
        /// What the configuration says.
        wanted: SpiffeId,
    },
    /// What the agent gave cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl From<WorkloadApiError> for SpireError {
    fn from(error: WorkloadApiError) -> Self {
        Self::Agent(error.to_string())
    }
}

/// Asks the agent for the identity of the node `wanted`, once.
///
/// # Errors
/// [`SpireError`].
pub async fn fetch(socket: Option<&str>, wanted: &SpiffeId) -> Result<NodeIdentity, SpireError> {
    let asking = async {
        let context = connect(socket).await?.fetch_x509_context().await?;
        identity(&context, wanted)
    };
    let late = || SpireError::Agent(format!("no answer within {ANSWER_WITHIN:?}"));
    tokio::time::timeout(ANSWER_WITHIN, asking).await.unwrap_or_else(|_| Err(late()))
}

/// Hands every identity the agent has for `wanted` to `take`, for ever; what goes wrong to `failed`.
pub(crate) async fn watch(
    socket: Option<&str>,
    wanted: &SpiffeId,
    take: impl Fn(NodeIdentity),
    failed: impl Fn(&SpireError),
) {
    let mut wait = AGAIN_FIRST;
    loop {
        let has_come = AtomicBool::new(false);
        let took = |identity| {
            has_come.store(true, Ordering::Relaxed);
            take(identity);
        };
        if let Err(error) = follow(socket, wanted, &took).await {
            failed(&error);
        }
        if has_come.load(Ordering::Relaxed) {
            wait = AGAIN_FIRST;
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(AGAIN_MAX);
    }
}

async fn follow(
    socket: Option<&str>,
    wanted: &SpiffeId,
    take: &impl Fn(NodeIdentity),
) -> Result<(), SpireError> {
    let late = |_| SpireError::Agent(format!("no answer within {ANSWER_WITHIN:?}"));
    let opening =
        async { Ok::<_, SpireError>(connect(socket).await?.stream_x509_contexts().await?) };
    let mut contexts = tokio::time::timeout(ANSWER_WITHIN, opening).await.map_err(late)??;
    while let Some(context) = contexts.next().await {
        take(identity(&context?, wanted)?);
    }
    Ok(())
}

async fn connect(socket: Option<&str>) -> Result<WorkloadApiClient, WorkloadApiError> {
    match socket {
        Some(socket) => WorkloadApiClient::connect_to(socket).await,
        None => WorkloadApiClient::connect_env().await,
    }
}

/// The identity among what an agent offers that is the node's.
fn identity(context: &X509Context, wanted: &SpiffeId) -> Result<NodeIdentity, SpireError> {
    let id = wanted.to_string();
    let svid = context.svids().iter().find(|svid| svid.spiffe_id().to_string() == id);
    let svid = svid.ok_or_else(|| {
        let offered = context.svids().iter().map(|svid| svid.spiffe_id().to_string());
        SpireError::AnotherId {
            found: offered.collect::<Vec<_>>().join(", "),
            wanted: wanted.clone(),
        }
    })?;
    let domain = svid.spiffe_id().trust_domain();
    let bundle = context.bundle_set().get_ref(domain);
    let bundle = bundle.ok_or_else(|| SpireError::Agent(format!("it has no roots of {domain}")))?;
    let der = |all: &[spiffe::cert::Certificate]| {
        all.iter().map(|one| CertificateDer::from(one.as_bytes().to_vec())).collect::<Vec<_>>()
    };
    let key = PrivatePkcs8KeyDer::from(svid.private_key().as_bytes().to_vec());
    // It is never stored: errors point to where it comes from.
    let from = Path::new("what the SPIRE agent gave");
    let (chain, roots) = (der(svid.cert_chain()), der(bundle.authorities()));
    Ok(NodeIdentity::issued(from, chain, PrivateKeyDer::Pkcs8(key), &roots, clock::wall())?)
}
