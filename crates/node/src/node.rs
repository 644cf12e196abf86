//! Putting a node together: ports, workers, the control side, and the way down.
//!
//! Workers carry calls; the control side, on the caller's runtime, accepts TCP connections for them and serves metrics.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base::{NodeName, RegionName};
use http::HeaderValue;
use identity::{ExpectedPeer, IdentityError, NodeIdentity};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;
use transport::{
    Dialer, Limits, Listener, PeerTls, Pool, Port, QuicKeys, Server, ServerTls, Target, Worker,
    Workers,
};

use crate::{
    admin::Admin,
    config::Config,
    egress::{self, Egress},
    engines::{Engine, Engines},
    hop::Pseudonym,
    ingress::{self, Ingress},
    metrics::Metrics,
    model::ModelFinder,
    peers::Peers,
    refusal::Who,
};

/// How many workers a node runs. One, until the sockets of a port carry a filter that sends each QUIC packet to the worker
/// its connection identifier names: without it, a connection that changes its address would reach the wrong one.
const WORKERS: u8 = 1;

/// Why a node cannot start. Nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A port cannot be bound.
    #[error("cannot listen on {address} for {what} (`listen.{what}`): {source}")]
    Listen {
        /// The key of `[listen]`.
        what: &'static str,
        /// The address asked for.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A worker cannot start.
    #[error("a worker cannot start: {0}")]
    Worker(String),
}

/// The certificate of the ports for clients.
#[derive(Debug)]
pub struct ClientCertificate {
    /// The certificate and what leads to its root, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

/// The addresses a node really listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// h2 and h3 for clients.
    pub clients: SocketAddr,
    /// h3 and h2 for peers.
    pub peers: SocketAddr,
    /// h2c, where configured.
    pub plaintext: Option<SocketAddr>,
    /// Metrics.
    pub metrics: SocketAddr,
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    addresses: Addresses,
    drain_timeout: Duration,
    ready: Arc<AtomicBool>,
    workers: Workers,
    control: JoinSet<()>,
    control_drain: CancellationToken,
}

impl Node {
    /// Starts a node and returns when it takes calls.
    ///
    /// # Errors
    /// [`NodeError`]; whatever was started is stopped again.
    pub async fn start(
        config: &Config,
        identity: &NodeIdentity,
        certificate: ClientCertificate,
    ) -> Result<Self, NodeError> {
        let plan = Plan::new(config, identity, certificate)?;
        let listen = &config.listen;
        let mut ports = Ports {
            clients: bind("clients", listen.clients, true)?,
            peers: bind("peers", listen.peers, true)?,
            plaintext: match listen.plaintext {
                Some(address) => Some(bind("plaintext", address, false)?),
                None => None,
            },
        };
        let admin =
            Admin { metrics: plan.metrics.clone(), ready: Arc::new(AtomicBool::new(false)) };
        let metrics = Admin::bind(listen.metrics).await.map_err(|source| NodeError::Listen {
            what: "metrics",
            address: listen.metrics,
            source,
        })?;
        let addresses = Addresses {
            clients: ports.clients.address(),
            peers: ports.peers.address(),
            plaintext: ports.plaintext.as_ref().map(Listener::address),
            metrics: metrics.local_addr().unwrap_or(listen.metrics),
        };

        let (started, mut starts) = mpsc::channel(WORKERS.into());
        let shares: Vec<_> = (0..WORKERS).map(|worker| Mutex::new(ports.share(worker))).collect();
        let (plan, shares) = (Arc::new(plan), Arc::new(shares));
        let workers = Workers::start(WORKERS, move |worker| {
            let (plan, shares, started) = (plan.clone(), shares.clone(), started.clone());
            async move {
                let share = shares[usize::from(worker.index)].lock().take();
                let outcome = match share {
                    Some(share) => plan.run(worker, share, addresses, &started).await,
                    None => Err(io::Error::other("its ports were taken by another")),
                };
                if let Err(error) = outcome {
                    // Nobody listens any more when the node started before the worker failed.
                    if let Err(unheard) = started.send(Err(error.to_string())).await {
                        tracing::error!(error = ?unheard.0, "a worker ended");
                    }
                }
            }
        })
        .map_err(|error| NodeError::Worker(error.to_string()))?;
        for _ in 0..WORKERS {
            if let Some(Err(error)) = starts.recv().await {
                workers.stop();
                return Err(NodeError::Worker(error));
            }
        }

        let control_drain = CancellationToken::new();
        let mut control = JoinSet::new();
        for listener in ports.into_listeners() {
            let drain = control_drain.clone();
            control.spawn(async move {
                if let Err(error) = listener.accept(drain).await {
                    tracing::error!(%error, "a port accepts no more TCP connections");
                }
            });
        }
        let ready = admin.ready.clone();
        // The metrics port stays up while the node drains: that is when it is looked at.
        control.spawn(admin.serve(metrics, CancellationToken::new()));
        ready.store(true, Ordering::Relaxed);
        let drain_timeout = config.node.drain_timeout.into();
        Ok(Self { addresses, drain_timeout, ready, workers, control, control_drain })
    }

    /// The addresses it listens on.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Takes no new call, finishes those in progress within the drain timeout or until `at_once`, and stops.
    pub async fn drain(mut self, at_once: impl Future<Output = ()>) {
        self.ready.store(false, Ordering::Relaxed);
        self.control_drain.cancel();
        self.workers.drain();
        let stopper = self.workers.stopper();
        let mut joined = tokio::task::spawn_blocking(move || self.workers.join());
        tokio::select! {
            _ = &mut joined => {}
            () = async {
                tokio::select! {
                    () = tokio::time::sleep(self.drain_timeout) => {
                        tracing::warn!("calls are still in progress after the drain timeout; ending them");
                    }
                    () = at_once => {}
                }
            } => {
                stopper.cancel();
                if let Err(error) = joined.await {
                    tracing::error!(%error, "the workers did not end cleanly");
                }
            }
        }
        self.control.shutdown().await;
    }
}

fn bind(what: &'static str, address: SocketAddr, udp: bool) -> Result<Listener, NodeError> {
    let listener = Listener::bind(address, WORKERS, udp).map_err(|source| NodeError::Listen {
        what,
        address,
        source,
    })?;
    if let Some(buffers) = listener.buffers.filter(|buffers| buffers.are_short()) {
        tracing::warn!(
            what,
            receive_bytes = buffers.receive_bytes,
            send_bytes = buffers.send_bytes,
            "the kernel gives UDP sockets less than 4 MiB: raise net.core.rmem_max and wmem_max"
        );
    }
    Ok(listener)
}

/// The bound ports of a node.
struct Ports {
    clients: Listener,
    peers: Listener,
    plaintext: Option<Listener>,
}

/// One worker's share of them.
struct Share {
    clients: Port,
    peers: Port,
    plaintext: Option<Port>,
}

impl Ports {
    fn share(&mut self, worker: u8) -> Option<Share> {
        Some(Share {
            clients: self.clients.port(worker)?,
            peers: self.peers.port(worker)?,
            plaintext: self.plaintext.as_mut().and_then(|listener| listener.port(worker)),
        })
    }

    fn into_listeners(self) -> impl Iterator<Item = Listener> {
        [self.clients, self.peers].into_iter().chain(self.plaintext)
    }
}

/// Everything a worker needs to build its part of the node.
struct Plan {
    own: Pseudonym,
    who: Who,
    metrics: Metrics,
    models: ModelFinder,
    engines: Arc<[Arc<Engine>]>,
    peers: Vec<Target>,
    clients_tls: rustls::ServerConfig,
    peers_tls: rustls::ServerConfig,
    keys: QuicKeys,
    seed: u64,
}

impl Plan {
    #[expect(clippy::disallowed_methods, reason = "the one place where a node takes its seed")]
    fn new(
        config: &Config,
        identity: &NodeIdentity,
        certificate: ClientCertificate,
    ) -> Result<Self, NodeError> {
        let (name, region) = (&config.node.name, &config.node.region);
        let engines: Arc<[_]> =
            config.engines.iter().map(|engine| Arc::new(Engine::new(engine))).collect();
        let peers = config
            .mesh
            .peers
            .iter()
            .map(|peer| {
                let expect = ExpectedPeer { region: peer.region.clone(), name: peer.name.clone() };
                let tls = PeerTls(Box::new(identity.peer_client_config(&[], expect)?));
                let called = peer_name(&peer.name, &peer.region);
                Ok(Target::peer(&called, peer.peers.authority(), tls))
            })
            .collect::<Result<_, IdentityError>>()?;
        Ok(Self {
            own: Pseudonym::new(name, region, &config.mesh.trust_domain),
            who: Who { node: name.to_string(), region: region.to_string() },
            metrics: Metrics::new(engines.clone()),
            models: ModelFinder::default(),
            engines,
            peers,
            clients_tls: identity::client_server_config(certificate.chain, certificate.key, &[])?,
            peers_tls: identity.peer_server_config(&[])?,
            keys: QuicKeys::random(),
            seed: rand::rng().next_u64(),
        })
    }

    /// Runs one worker: its pool, its services, its share of the ports.
    async fn run(
        &self,
        worker: Worker,
        share: Share,
        addresses: Addresses,
        started: &mpsc::Sender<Result<(), String>>,
    ) -> io::Result<()> {
        let pool = Pool::new(Dialer::new(&worker, &self.keys, Limits::peers())?);
        let channels = self.engines.iter().map(|e| (e.clone(), pool.channel(e.target.clone())));
        let engines = Engines::new(channels);
        let rng = StdRng::seed_from_u64(self.seed ^ (u64::from(worker.index) << 32));
        let peers = Peers::new(self.peers.iter().map(|peer| pool.channel(peer.clone())), rng);
        let egress = Egress(Arc::new(egress::Parts {
            own: self.own.clone(),
            who: self.who.clone(),
            metrics: self.metrics.clone(),
            models: self.models.clone(),
            engines: engines.clone(),
        }));
        let ingress = Ingress(Arc::new(ingress::Parts {
            own: self.own.clone(),
            who: self.who.clone(),
            metrics: self.metrics.clone(),
            models: self.models.clone(),
            engines,
            peers,
            alt_svc: alt_svc(addresses.clients),
        }));

        let tls = |config: &rustls::ServerConfig| ServerTls::Tls(Box::new(config.clone()));
        let (clients, keys, seed) = (Limits::clients, || self.keys.clone(), self.seed);
        let for_clients =
            Server::new(clients(), tls(&self.clients_tls), keys(), ingress.clone(), seed);
        let for_peers = Server::new(Limits::peers(), tls(&self.peers_tls), keys(), egress, seed);
        let plaintext = async {
            let Some(port) = share.plaintext else { return Ok(()) };
            let server = Server::new(clients(), ServerTls::Plaintext, keys(), ingress, seed);
            server.serve(worker.clone(), port).await
        };
        let serving = async {
            tokio::try_join!(
                for_clients.serve(worker.clone(), share.clients),
                for_peers.serve(worker.clone(), share.peers),
                plaintext,
            )
        };
        tokio::pin!(serving);
        // Polled once, everything that can fail at the start has failed or works.
        let first = std::future::poll_fn(|cx| std::task::Poll::Ready(serving.as_mut().poll(cx)));
        let early = first.await;
        if !matches!(early, std::task::Poll::Ready(Err(_))) {
            // The receiver is the one that starts the node; if it is gone, so is the node.
            drop(started.send(Ok(())).await);
        }
        match early {
            std::task::Poll::Ready(ended) => ended?,
            std::task::Poll::Pending => serving.await?,
        };
        worker.finish(&pool).await;
        Ok(())
    }
}

/// How a peer is called in messages.
fn peer_name(name: &NodeName, region: &RegionName) -> String {
    format!("peer {name} ({region})")
}

/// RFC 7838: the same services over h3, for a day.
fn alt_svc(clients: SocketAddr) -> HeaderValue {
    HeaderValue::try_from(format!("h3=\":{}\"; ma=86400", clients.port()))
        .unwrap_or_else(|_| HeaderValue::from_static("clear"))
}
