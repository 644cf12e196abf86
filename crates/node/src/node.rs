//! Putting a node together: ports, workers, the control side, and the way down.
//!
//! Workers carry calls; the control side, on the caller's runtime, accepts TCP connections for them, checks engines, keeps the
//! node's certificate and serves metrics. Other nodes are spoken with on a thread of its own (`gossip`).

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use balance::RetryBudget;
use base::{NodeName, RegionName, clock};
use http::{HeaderValue, uri::Authority};
use identity::{ClientFacing, ClientRoots, ExpectedPeer, Identity, IdentityError, SpiffeId};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use transport::{
    Dialer, LINK_ALPN, Limits, Links, Listener, PeerTls, Pool, Port, QuicKeys, Server, ServerTls,
    Target, Worker, Workers, grpc::Overdue,
};

use crate::{
    access::{Access, AccessError},
    admin::{Admin, Place},
    arrivals::Arrivals,
    buffers::Buffers,
    catalog::{Catalog, Scope},
    checks, collect,
    config::{Config, IdentityConfig, IdentitySource, MethodPattern, PeerConfig},
    egress::{self, Egress},
    engines::{Engine, Engines},
    gossip::{self, Enrolment, Gossip, MeshHandle, Thread, Voice},
    health::Health,
    hop::Pseudonym,
    ingress::{self, Ingress},
    metrics::{Metrics, Security},
    orca::NodeReport,
    own::{self, EpochError},
    peers::{Board, Listed, MakeTarget, PeerName, Peers},
    probes::Probes,
    rca::{self, Reports},
    readiness::Readiness,
    record::{AccessLog, LogWriter},
    reflection::Reflection,
    refusal::Who,
    renewal::{self, Renewals, Renewer, Source},
    router::Router,
    scrape::Scrape,
    seeds::{Found, Names, Seeds},
    services::Services,
    shares,
    signer::{Contact, Signer},
    trust::{self, ClientGate, Gate, Trust},
};

/// How many workers a node runs. One, until the sockets of a port carry a filter that sends each QUIC packet to the worker
/// its connection identifier names: without it, a connection that changes its address would reach the wrong one.
const WORKERS: u8 = 1;

/// How long peers and load balancers are given to hear that the node drains: a frame leaves within 50 ms.
const HEARD_WITHIN: Duration = Duration::from_millis(300);
/// How long the control side is given to end, and the gossip port, which says good-bye.
const GOOD_BYE: Duration = Duration::from_secs(2);
const GOSSIP_GOOD_BYE: Duration = Duration::from_secs(3);
/// The number under which the control side dials: no worker has it.
const CHECKING: u8 = 0xfe;
/// What makes the renewal's own random numbers.
const RENEWING: u64 = 0x7265_6e65_7761_6c00;
/// And those of looking up seeds.
const SEEKING: u64 = 0x7365_6564_7300_0000;

/// Why a node cannot start. Nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A port cannot be bound.
    #[error(
        "cannot listen on {address} (`listen.{what}`): stop what holds the port, or choose another"
    )]
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
    /// What is said of who may call cannot be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A worker cannot start.
    #[error("a worker cannot start: {0}")]
    Worker(String),
    /// Which process of its node this is cannot be told.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// Nothing can be said to other nodes.
    #[error("this node cannot speak to others: {0}")]
    Gossip(String),
    /// Two processes have one name, and this is the earlier one. Others do not listen to it any more.
    #[error(
        "another process is {node} too, started at {since}, and others listen to the later one: this one stops. \
         Stop the other, or give one of the two another node.name and its own certificate"
    )]
    Superseded {
        /// Who.
        node: String,
        /// When the other started, by its clock.
        since: String,
    },
}

/// The certificate of the ports for clients.
#[derive(Debug)]
pub struct ClientCertificate {
    /// What is shown.
    pub shown: ClientFacing,
    /// Files of the certificate and its key, which are watched; `None`: the node's certificate of the mesh.
    pub files: Option<(PathBuf, PathBuf)>,
}

/// Who a node is, and what it shows.
#[derive(Debug)]
pub struct Credentials {
    /// Towards the mesh.
    pub identity: Identity,
    /// Towards clients.
    pub certificate: ClientCertificate,
    /// The authority it holds.
    pub signer: Option<Signer>,
    /// Whether nobody renews the identity: a development CA's is good for a year.
    pub is_fixed: bool,
}

/// The addresses a node really listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// h2 and h3 for clients.
    pub clients: SocketAddr,
    /// h3 and h2 for peers.
    pub peers: SocketAddr,
    /// What nodes say of themselves.
    pub gossip: SocketAddr,
    /// h2c, where configured.
    pub plaintext: Option<SocketAddr>,
    /// Metrics.
    pub metrics: SocketAddr,
    /// For operators.
    pub admin: SocketAddr,
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    addresses: Addresses,
    drain_timeout: Duration,
    readiness: Readiness,
    workers: Workers,
    control: Control,
    mesh: MeshHandle,
    own: String,
}

/// What runs beside the workers: on the caller's runtime, and the gossip port on its thread.
#[derive(Debug)]
struct Control {
    tasks: JoinSet<()>,
    /// Told when the gossip port has ended.
    gossip: Option<oneshot::Receiver<()>>,
    /// Ends the acceptors of TCP connections.
    drain: CancellationToken,
    /// Ends the gossip port.
    stop: CancellationToken,
    log: LogWriter,
    /// The connections of health checks.
    checking: Worker,
    pool: Pool,
}

impl Node {
    /// Starts a node and returns when it takes calls.
    ///
    /// # Errors
    /// [`NodeError`]; whatever was started is stopped again.
    pub async fn start(config: &Config, credentials: Credentials) -> Result<Self, NodeError> {
        let Credentials { identity, certificate, signer, is_fixed } = credentials;
        let signer = signer.map(Arc::new);
        let kept = IdentityConfig::dir(&config.node.state_dir).join(trust::KEPT);
        let trust = Arc::new(Trust::new(identity, (!is_fixed).then_some(kept)));
        let (plan, log) = Plan::new(config, &trust, &certificate, signer.clone())?;
        let listen = &config.listen;
        let mut ports = Ports {
            clients: bind("clients", listen.clients, true)?,
            peers: bind("peers", listen.peers, true)?,
            plaintext: match listen.plaintext {
                Some(address) => Some(bind("plaintext", address, false)?),
                None => None,
            },
        };
        let failed = |what, address| move |source| NodeError::Listen { what, address, source };
        let tls = gossip_tls(trust.identity(), signer.as_deref())?;
        let thread = Thread::new().map_err(|error| NodeError::Gossip(error.to_string()))?;
        let links = thread
            .enter(|| Links::bind(listen.gossip, tls, &plan.keys))
            .map_err(failed("gossip", listen.gossip))?;
        let metrics =
            Scrape::bind(listen.metrics).await.map_err(failed("metrics", listen.metrics))?;
        let for_operators = bind("admin", listen.admin, false)?;
        let addresses = Addresses {
            clients: ports.clients.address(),
            peers: ports.peers.address(),
            gossip: links.address().map_err(failed("gossip", listen.gossip))?,
            plaintext: ports.plaintext.as_ref().map(Listener::address),
            metrics: metrics.local_addr().unwrap_or(listen.metrics),
            admin: for_operators.address(),
        };

        let seeds = Seeds::new(&config.mesh.seeds, Names::default());
        let found = watch::Sender::new(seeds.known());
        let heard = found.subscribe();
        let port = gossip_port(config, &plan, links.clone(), addresses, heard)?;
        let (gossip, mesh) = port.prepare().map_err(NodeError::Gossip)?;
        let plan = Arc::new(plan);
        let workers = start_workers(&plan, &mut ports, addresses).await?;
        let mut control = Control::new(&plan, log)?;
        for listener in ports.into_listeners() {
            let drain = control.drain.clone();
            control.tasks.spawn(async move {
                if let Err(error) = listener.accept(drain).await {
                    tracing::error!(%error, "a port accepts no more TCP connections");
                }
            });
        }
        let readiness = plan.readiness.clone();
        let router = control.watch_engines(&plan);
        let scrape =
            Scrape { metrics: plan.metrics.clone(), probes: Probes { router, tells_room: true } };
        // The metrics port stays up while the node drains: that is when it is looked at.
        control.tasks.spawn(scrape.serve(metrics, CancellationToken::new()));
        let admin = Admin {
            trust: plan.trust.clone(),
            renewals: plan.renewals.clone(),
            is_authority: plan.signer.is_some(),
            mesh: mesh.clone(),
            place: Place {
                zone: config.node.zone.clone(),
                epoch: plan.epoch,
                draining: readiness.draining().clone(),
            },
            engines: plan.engines.clone(),
            board: plan.board.clone(),
            arrivals: plan.arrivals.clone(),
        };
        control.tasks.spawn(admin.serve(for_operators, control.stop.clone()));
        for task in plan.access.tasks() {
            control.tasks.spawn(task);
        }
        if let (Some(roots), Some(path)) = (&plan.client_roots, &config.tls.client_ca) {
            control.tasks.spawn(renewal::watch_client_roots(roots.clone(), path.clone()));
        }
        if let ClientCertificate { shown: ClientFacing::Own(served), files: Some(files) } =
            certificate
        {
            control.tasks.spawn(renewal::watch_client_certificate(served, files));
        }
        let trust = plan.trust.clone();
        control.tasks.spawn(async move { trust.judge_offers().await });
        if !is_fixed {
            control.keep_identity(&plan, config, links, found.subscribe());
        }
        control.tasks.spawn(seeds.run(found, StdRng::seed_from_u64(plan.seed ^ SEEKING)));
        let running = thread.run(gossip.run(control.stop.clone()));
        control.gossip = Some(running.map_err(|error| NodeError::Gossip(error.to_string()))?);
        control.get_acquainted(&plan, config);
        let drain_timeout = config.node.drain_timeout.into();
        let own = plan.trust.identity().id().to_string();
        Ok(Self { addresses, drain_timeout, readiness, workers, control, mesh, own })
    }

    /// Resolves when the node cannot go on: it is still to be drained.
    pub async fn failed(&mut self) -> NodeError {
        let Some(epoch) = self.mesh.superseded().await else {
            return NodeError::Gossip("its gossip port has ended; see the log".to_owned());
        };
        let since = UNIX_EPOCH.checked_add(Duration::from_millis(epoch));
        let since = since.map(|since| humantime::format_rfc3339_seconds(since).to_string());
        NodeError::Superseded {
            node: self.own.clone(),
            since: since.unwrap_or_else(|| "no time".to_owned()),
        }
    }

    /// The addresses it listens on.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Says that it drains, then takes no new call, finishes those in progress within the drain timeout or until
    /// `at_once`, and stops.
    pub async fn drain(self, at_once: impl Future<Output = ()>) {
        let Self { drain_timeout, readiness, workers, control, .. } = self;
        readiness.drain();
        tokio::pin!(at_once);
        // Peers and load balancers hear it before clients are told to go elsewhere.
        let heard = HEARD_WITHIN.min(drain_timeout);
        let is_hurried = tokio::select! {
            () = tokio::time::sleep(heard) => false,
            () = &mut at_once => true,
        };
        control.drain.cancel();
        workers.drain();
        let stopper = workers.stopper();
        if is_hurried {
            stopper.cancel();
        }
        let mut joined = tokio::task::spawn_blocking(move || workers.join());
        tokio::select! {
            _ = &mut joined => {}
            () = async {
                tokio::select! {
                    () = tokio::time::sleep(drain_timeout.saturating_sub(heard)) => {
                        tracing::warn!("calls are still in progress after the drain timeout; ending them");
                    }
                    () = at_once, if !is_hurried => {}
                }
            } => {
                stopper.cancel();
                if let Err(error) = joined.await {
                    tracing::error!(%error, "the workers did not end cleanly");
                }
            }
        }
        control.finish().await;
    }
}

impl Control {
    fn new(plan: &Plan, log: LogWriter) -> Result<Self, NodeError> {
        let stop = CancellationToken::new();
        let checking = Worker::new(CHECKING, WORKERS, CancellationToken::new(), stop.clone());
        let dialer = Dialer::new(&checking, &plan.keys, Limits::engines())
            .map_err(|error| NodeError::Worker(error.to_string()))?;
        Ok(Self {
            tasks: JoinSet::new(),
            gossip: None,
            drain: CancellationToken::new(),
            stop,
            log,
            checking,
            pool: Pool::new(dialer),
        })
    }

    /// Begins to check the engines, to keep this node's shares of them, and to ask them and the peers what they declare; returns
    /// a router for who asks about room.
    fn watch_engines(&mut self, plan: &Plan) -> Router {
        for (index, engine) in plan.engines.iter().enumerate() {
            let channel = || self.pool.channel(engine.target.clone());
            let seed = plan.seed ^ (index as u64).rotate_right(8);
            self.tasks.spawn(checks::run(engine.clone(), channel(), seed));
            let catalog = plan.catalog.clone();
            self.tasks.spawn(collect::engine(index, engine.clone(), channel(), catalog));
        }
        let (engines, board) = (plan.engines.clone(), plan.board.clone());
        self.tasks.spawn(shares::keep(engines, board, plan.may_have_others));
        let router = plan.router(&self.pool, &self.pool, true, CHECKING);
        self.tasks.spawn(collect::peers(router.peers.clone(), plan.catalog.clone()));
        router
    }

    /// Gets to know the others, if it may hear of any.
    fn get_acquainted(&mut self, plan: &Plan, config: &Config) {
        let (readiness, board) = (plan.readiness.clone(), plan.board.clone());
        let may_hear = !config.mesh.seeds.is_empty()
            || listed(config).next().is_some()
            || config.node.state_dir.join(gossip::KEPT).exists();
        if may_hear {
            self.tasks.spawn(async move { readiness.get_acquainted(&board).await });
        } else {
            readiness.alone();
        }
    }

    /// Keeps the node's certificate good, and the authority if it holds one.
    fn keep_identity(
        &mut self,
        plan: &Plan,
        config: &Config,
        links: Links,
        found: watch::Receiver<Found>,
    ) {
        let state_dir = &config.node.state_dir;
        let hurry = Arc::new(Notify::new());
        let source = match (&plan.signer, config.identity.source) {
            (Some(signer), _) => Source::Own(signer.clone(), config.listen.reachable()),
            (None, IdentitySource::Mesh) => Source::Authorities(authorities(config), found),
            (None, IdentitySource::Files) => Source::Files,
            (None, IdentitySource::Spire) => Source::Spire(config.identity.socket.clone()),
        };
        let renewer = Renewer {
            trust: plan.trust.clone(),
            source,
            links,
            files: config.identity.files(state_dir),
            generation: identity::generation(&IdentityConfig::dir(state_dir)),
            dir: IdentityConfig::dir(state_dir),
            books: plan.renewals.clone(),
            hurry: hurry.clone(),
            rng: StdRng::seed_from_u64(plan.seed ^ RENEWING),
        };
        self.tasks.spawn(renewer.run(self.stop.clone()));
        let trust = plan.trust.clone();
        self.tasks.spawn(async move { trust.keep_lists().await });
        if let Some(signer) = plan.signer.clone() {
            let (trust, stop) = (plan.trust.clone(), self.stop.clone());
            signer.publish(&trust);
            self.tasks.spawn(async move {
                signer.keep(&trust, || hurry.notify_one(), stop).await;
            });
        }
    }

    async fn finish(mut self) {
        self.stop.cancel();
        // The gossip port says good-bye; the others only wait.
        if let Some(ended) = self.gossip.take()
            && tokio::time::timeout(GOSSIP_GOOD_BYE, ended).await.is_err()
        {
            tracing::warn!("the gossip port did not end in time");
        }
        self.tasks.shutdown().await;
        self.pool.close();
        self.checking.outgoing.close();
        drop(tokio::time::timeout(GOOD_BYE, self.checking.outgoing.wait()).await);
        let written = tokio::task::spawn_blocking(move || self.log.join());
        if tokio::time::timeout(GOOD_BYE, written).await.is_err() {
            tracing::warn!("nobody reads the access log; the rest of it is lost");
        }
    }
}

async fn start_workers(
    plan: &Arc<Plan>,
    ports: &mut Ports,
    addresses: Addresses,
) -> Result<Workers, NodeError> {
    let (started, mut starts) = mpsc::channel(WORKERS.into());
    let shares: Vec<_> = (0..WORKERS).map(|worker| Mutex::new(ports.share(worker))).collect();
    let (plan, shares) = (plan.clone(), Arc::new(shares));
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
    Ok(workers)
}

/// Who is let in at the gossip port.
fn gossip_tls(
    identity: &Identity,
    signer: Option<&Signer>,
) -> Result<rustls::ServerConfig, IdentityError> {
    match signer {
        Some(signer) => {
            let alpn = [LINK_ALPN, identity::ENROL_ALPN];
            identity.authority_server_config(signer.shown(), &alpn)
        }
        None => identity.peer_server_config(&[LINK_ALPN]),
    }
}

/// Who may be asked to renew where there are no seeds: every listed peer, for one of them may hold the authority.
fn authorities(config: &Config) -> Vec<Authority> {
    if config.mesh.seeds.is_empty() {
        listed(config).map(|(_, gossip)| gossip).collect()
    } else {
        Vec::new()
    }
}

/// The listed peers whose gossip ports are known.
fn listed(config: &Config) -> impl Iterator<Item = (&PeerConfig, Authority)> {
    config.mesh.peers.iter().filter_map(|peer| Some((peer, peer.gossip.as_ref()?.authority())))
}

/// The gossip port of a node. The number of this start is on disk when this returns.
fn gossip_port(
    config: &Config,
    plan: &Plan,
    links: Links,
    addresses: Addresses,
    seeds: watch::Receiver<Found>,
) -> Result<Gossip, NodeError> {
    let id = plan.trust.identity().id().clone();
    let own = membership::Own {
        id: gossip::node_id(&id),
        node: id.name.clone(),
        region: id.region.clone(),
        zone: config.node.zone.clone(),
        trust_domain: id.trust_domain.clone(),
        epoch: plan.epoch,
        peers: own::address(config, addresses.peers),
        gossip: own::address(config, addresses.gossip),
        release: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let voice = Voice {
        catalog: plan.catalog.clone(),
        engines: plan.engines.clone(),
        arrivals: plan.arrivals.clone(),
        draining: plan.readiness.draining().clone(),
    };
    let seed = |(peer, address): (&PeerConfig, Authority)| {
        let (region, name) = (peer.region.clone(), peer.name.clone());
        let id = SpiffeId { region, name, ..id.clone() };
        membership::Seed {
            address: address.to_string(),
            peer: Some(gossip::peer(&id)),
            is_listed: true,
        }
    };
    let enrolment = plan.signer.clone().map(|signer| Enrolment {
        signer,
        contact: Contact {
            id: id.clone(),
            peers_port: addresses.peers.port(),
            gossip_port: addresses.gossip.port(),
            peers: config.mesh.peers.clone(),
        },
    });
    Ok(Gossip {
        links,
        own,
        voice,
        board: plan.board.clone(),
        trust: plan.trust.clone(),
        seeds,
        listed: listed(config).map(seed).collect(),
        kept: Some(config.node.state_dir.join(gossip::KEPT)),
        enrolment,
        seed: plan.seed,
    })
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
    log: AccessLog,
    buffers: Buffers,
    budgets: [Arc<Mutex<RetryBudget>>; 2],
    idempotent: Arc<[MethodPattern]>,
    engines: Arc<[Arc<Engine>]>,
    board: Arc<Board>,
    catalog: Arc<Catalog>,
    access: Arc<Access>,
    /// Whether there are nodes this one was told of.
    may_have_others: bool,
    trust: Arc<Trust>,
    signer: Option<Arc<Signer>>,
    renewals: Arc<Renewals>,
    clients_tls: rustls::ServerConfig,
    client_roots: Option<ClientRoots>,
    /// Whether clients are shown the certificate of the mesh.
    shows_mesh: bool,
    peers_tls: rustls::ServerConfig,
    keys: QuicKeys,
    readiness: Readiness,
    arrivals: Arc<Arrivals>,
    /// One permit per stream of load reports.
    report_streams: Arc<Semaphore>,
    /// The process: greater after each start.
    epoch: u64,
    seed: u64,
}

impl Plan {
    #[expect(clippy::disallowed_methods, reason = "the one place where a node takes its seed")]
    fn new(
        config: &Config,
        trust: &Arc<Trust>,
        certificate: &ClientCertificate,
        signer: Option<Arc<Signer>>,
    ) -> Result<(Self, LogWriter), NodeError> {
        let identity = trust.identity();
        let (name, region) = (&config.node.name, &config.node.region);
        let seed = rand::rng().next_u64();
        let mut rng = StdRng::seed_from_u64(seed);
        let engines: Arc<[_]> =
            config.engines.iter().map(|engine| Arc::new(Engine::new(engine, &mut rng))).collect();
        let board = Arc::new(board(config, trust));
        let (log, writer) = AccessLog::new(config.log.access.get(), seed)
            .map_err(|error| NodeError::Worker(error.to_string()))?;
        let budget = || Arc::new(Mutex::new(RetryBudget::new(clock::now())));
        let renewals = Arc::new(Renewals::default());
        let security =
            Security { trust: trust.clone(), renewals: renewals.clone(), signer: signer.clone() };
        let (clients_tls, client_roots) = clients_tls(config, certificate)?;
        let metrics = Metrics::new(engines.clone(), board.clone(), log.clone());
        metrics.watch(security);
        let plan = Self {
            own: Pseudonym::new(name, region, &config.mesh.trust_domain),
            who: Who { node: name.to_string(), region: region.to_string() },
            metrics,
            log,
            buffers: Buffers::new(config.node.buffer_bytes.get()),
            budgets: [budget(), budget()],
            idempotent: config.routing.idempotent.iter().cloned().collect(),
            catalog: Arc::new(Catalog::new(engines.clone(), board.clone())),
            engines,
            board,
            may_have_others: !(config.mesh.seeds.is_empty() && config.mesh.peers.is_empty()),
            access: Arc::new(Access::load(config, Some(identity.clone()))?),
            clients_tls,
            client_roots,
            shows_mesh: matches!(certificate.shown, ClientFacing::Mesh(_)),
            trust: trust.clone(),
            signer,
            renewals,
            peers_tls: identity.peer_server_config(&[])?,
            keys: QuicKeys::random(),
            readiness: Readiness::default(),
            arrivals: Arc::default(),
            report_streams: Arc::new(Semaphore::new(rca::STREAMS_MAX)),
            epoch: own::epoch(&config.node.state_dir, clock::wall())?,
            seed,
        };
        Ok((plan, writer))
    }

    /// A router over this node's engines and, `with_peers`, the other nodes.
    fn router(&self, to_engines: &Pool, to_peers: &Pool, with_peers: bool, worker: u8) -> Router {
        let channels =
            self.engines.iter().map(|e| (e.clone(), to_engines.channel(e.target.clone())));
        let (peers, readiness) = if with_peers {
            let identity = self.trust.identity().clone();
            let peers = Peers::new(self.board.clone(), to_peers.clone()).shown(identity);
            (peers, self.readiness.clone())
        } else {
            (Peers::none(self.trust.identity().id().clone()), Readiness::of_one())
        };
        let budget = self.budgets[usize::from(with_peers)].clone();
        let rng = StdRng::seed_from_u64(self.seed ^ (u64::from(worker) << 32));
        Router::new(Engines::new(channels), peers, readiness, rng, budget)
    }

    fn reflection(&self, scope: Scope, worker: &Worker) -> Reflection {
        Reflection { catalog: self.catalog.clone(), scope, drain: worker.drain.clone() }
    }

    fn reports(&self, router: Router, worker: &Worker) -> Reports {
        Reports { router, streams: self.report_streams.clone(), drain: worker.drain.clone() }
    }

    /// Runs one worker: its pools, its services, its share of the ports.
    async fn run(
        &self,
        worker: Worker,
        share: Share,
        addresses: Addresses,
        started: &mpsc::Sender<Result<(), String>>,
    ) -> io::Result<()> {
        let to_engines = Pool::new(Dialer::new(&worker, &self.keys, Limits::engines())?);
        let to_peers = Pool::new(Dialer::new(&worker, &self.keys, Limits::peers())?);
        let overdue = Overdue::default();
        let here = self.router(&to_engines, &to_peers, false, worker.index);
        let egress = Egress(Arc::new(egress::Parts {
            own: self.own.clone(),
            who: self.who.clone(),
            metrics: self.metrics.clone(),
            log: self.log.clone(),
            buffers: self.buffers.clone(),
            router: here.clone(),
            idempotent: self.idempotent.clone(),
            overdue: overdue.clone(),
            services: Services {
                reflection: self.reflection(Scope::Here, &worker),
                health: None,
                reports: self.reports(here, &worker),
                drain: worker.drain.clone(),
            },
            arrivals: self.arrivals.clone(),
        }));
        let router = self.router(&to_engines, &to_peers, true, worker.index);
        let ingress = Ingress(Arc::new(ingress::Parts {
            own: self.own.clone(),
            who: self.who.clone(),
            access: self.access.clone(),
            probes: Probes { router: router.clone(), tells_room: self.access.knows_anonymous() },
            services: Services {
                reflection: self.reflection(Scope::Mesh, &worker),
                health: Some(Health { router: router.clone(), drain: worker.drain.clone() }),
                reports: self.reports(router.clone(), &worker),
                drain: worker.drain.clone(),
            },
            metrics: self.metrics.clone(),
            log: self.log.clone(),
            buffers: self.buffers.clone(),
            router,
            idempotent: self.idempotent.clone(),
            overdue: overdue.clone(),
            report: NodeReport::default(),
            alt_svc: alt_svc(addresses.clients),
        }));

        let tls = |config: &rustls::ServerConfig| ServerTls::Tls(Box::new(config.clone()));
        let (clients, keys, seed) = (Limits::clients, || self.keys.clone(), self.seed);
        let for_clients =
            Server::new(clients(), tls(&self.clients_tls), keys(), ingress.clone(), seed)
                .with_http1();
        let for_clients = if self.shows_mesh {
            for_clients.with_lessor(Arc::new(ClientGate(self.trust.identity().clone())))
        } else {
            for_clients
        };
        let gate = Gate { trust: self.trust.clone(), port: trust::Port::Peers };
        let for_peers = Server::new(Limits::peers(), tls(&self.peers_tls), keys(), egress, seed)
            .with_lessor(Arc::new(gate));
        let plaintext = async {
            let Some(port) = share.plaintext else { return Ok(()) };
            let server = Server::new(clients(), ServerTls::Plaintext, keys(), ingress, seed);
            server.with_http1().serve(worker.clone(), port).await
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
        let to_the_end = async {
            match early {
                std::task::Poll::Ready(ended) => ended?,
                std::task::Poll::Pending => serving.await?,
            };
            worker.finish(&[to_engines, to_peers]).await;
            Ok(())
        };
        tokio::select! {
            ended = to_the_end => ended,
            never = overdue.run() => match never {},
        }
    }
}

/// The TLS of the port for clients.
fn clients_tls(
    config: &Config,
    certificate: &ClientCertificate,
) -> Result<(rustls::ServerConfig, Option<ClientRoots>), IdentityError> {
    let clients = config.tls.client_ca.as_deref().map(ClientRoots::load).transpose()?;
    let tls = identity::client_server_config(&certificate.shown, &[], clients.clone())?;
    Ok((tls, clients))
}

/// Reads the files that say who may call, as a node does when it starts.
///
/// # Errors
/// [`AccessError`]: one is missing or cannot be used.
pub fn check_access(config: &Config) -> Result<(), AccessError> {
    config.tls.client_ca.as_deref().map(ClientRoots::load).transpose()?;
    Access::load(config, None).map(drop)
}

/// What is known of others at the start: the listed peers, and how anybody is called.
fn board(config: &Config, trust: &Arc<Trust>) -> Board {
    let listed = |peer: &PeerConfig| Listed {
        name: PeerName { node: peer.name.clone(), region: peer.region.clone() },
        address: peer.peers.authority(),
        has_gossip: peer.gossip.is_some(),
    };
    let listed = config.mesh.peers.iter().map(listed).collect();
    let own = trust.identity().id().clone();
    let trust = trust.clone();
    let make = move |peer: &PeerName, address: Authority| {
        let expect = ExpectedPeer { region: peer.region.clone(), name: peer.node.clone() };
        let tls = trust.identity().peer_client_config(&[], expect).map_err(|e| e.to_string())?;
        let gate = Gate { trust: trust.clone(), port: trust::Port::Peers };
        let tls = PeerTls::leased(tls, Arc::new(gate));
        Ok(Target::peer(&peer_name(&peer.node, &peer.region), address, tls))
    };
    Board::new(own, listed, MakeTarget(Box::new(make)))
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
