//! The serving end: ports, handshakes, and one service for h2 and h3 alike.
//!
//! ```text
//!   TCP listener ── least busy worker ──> Inbox ──> TLS ──> h2 ┐
//!                                                              ├──> the service
//!   UDP socket of the worker ──────────> QUIC ───────────> h3 ┘
//! ```

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Request, Response};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::Service;

use crate::{
    Lease, Lessor, Limits, QuicKeys, SocketBuffers, Worker, bind_udp, h3, http1, http2, quic,
};

/// Accepted TCP connections that wait for their worker; beyond it accepting pauses and the kernel's backlog fills.
const INBOX: usize = 1024;
/// Connections the kernel holds until we accept them.
const BACKLOG: i32 = 1024;
/// How often a pair of a free TCP and UDP port is looked for when any port will do.
pub(crate) const PORT_ATTEMPTS: usize = 32;

/// How a call came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/3 over QUIC.
    H3,
    /// HTTP/2 over TLS.
    H2,
    /// HTTP/2 over bare TCP.
    H2c,
    /// HTTP/1.1, with TLS or without. It carries no gRPC.
    H1,
}

/// What is known of the connection a call came in on: an extension of every request.
#[derive(Clone, Debug)]
pub struct CallInfo {
    /// The other end's address.
    pub remote: SocketAddr,
    /// How it came in.
    pub protocol: Protocol,
    /// The certificates the other end authenticated with, its own first; empty when none was asked for.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

/// TLS of a port, made by the caller. ALPN is set here.
#[derive(Clone, Debug)]
pub enum ServerTls {
    /// h2 over TCP and h3 over QUIC with this configuration.
    Tls(Box<rustls::ServerConfig>),
    /// h2c over TCP: no TLS, no QUIC.
    Plaintext,
}

/// A bound port, not yet served.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    tcp: std::net::TcpListener,
    inboxes: Vec<mpsc::Sender<TcpStream>>,
    loads: Vec<Arc<AtomicUsize>>,
    ports: Vec<Option<Port>>,
    /// The socket buffers the kernel gave, when it has UDP sockets.
    pub buffers: Option<SocketBuffers>,
}

/// One worker's share of a [`Listener`].
#[derive(Debug)]
pub struct Port {
    udp: Option<std::net::UdpSocket>,
    inbox: mpsc::Receiver<TcpStream>,
    open: Arc<AtomicUsize>,
}

impl Listener {
    /// Binds `address` for `workers` workers, with UDP beside TCP when `udp`. Port 0 takes any port free for both.
    ///
    /// # Errors
    /// What the kernel says, for instance that the address is in use.
    pub fn bind(address: SocketAddr, workers: u8, udp: bool) -> io::Result<Self> {
        let attempts = if address.port() == 0 && udp { PORT_ATTEMPTS } else { 1 };
        let mut last = io::Error::other("no port was tried");
        for _ in 0..attempts {
            let tcp = bind_tcp(address)?;
            let address = tcp.local_addr()?;
            let sockets: io::Result<Vec<_>> = (0..if udp { workers } else { 0 })
                .map(|_| bind_udp(address, workers > 1))
                .collect();
            match sockets {
                Ok(sockets) => return Ok(Self::new(address, tcp, workers, sockets)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn new(
        address: SocketAddr,
        tcp: std::net::TcpListener,
        workers: u8,
        sockets: Vec<(std::net::UdpSocket, SocketBuffers)>,
    ) -> Self {
        let buffers = sockets.first().map(|(_, buffers)| *buffers);
        let mut sockets = sockets.into_iter().map(|(socket, _)| socket);
        let mut listener =
            Self { address, tcp, inboxes: vec![], loads: vec![], ports: vec![], buffers };
        for _ in 0..workers {
            let (sender, inbox) = mpsc::channel(INBOX);
            let open = Arc::new(AtomicUsize::new(0));
            listener.inboxes.push(sender);
            listener.loads.push(open.clone());
            listener.ports.push(Some(Port { udp: sockets.next(), inbox, open }));
        }
        listener
    }

    /// The address really bound.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The share of a worker; `None` when it was taken before.
    pub fn port(&mut self, worker: u8) -> Option<Port> {
        self.ports.get_mut(usize::from(worker)).and_then(Option::take)
    }

    /// Hands each TCP connection to the least busy worker, until `drain`.
    ///
    /// # Errors
    /// When the listening socket cannot be used at all.
    pub async fn accept(self, drain: CancellationToken) -> io::Result<()> {
        let tcp = TcpListener::from_std(self.tcp)?;
        loop {
            let accepted = tokio::select! {
                accepted = tcp.accept() => accepted,
                () = drain.cancelled() => return Ok(()),
            };
            let stream = match accepted.and_then(|(stream, _)| stream.into_std()) {
                Ok(stream) => stream,
                Err(error) => {
                    // Out of descriptors, or the peer is gone already. Trying again at once would spin.
                    tracing::warn!(%error, "cannot accept a TCP connection");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            let least_busy =
                (0..self.loads.len()).min_by_key(|i| self.loads[*i].load(Ordering::Relaxed));
            if let Some(inbox) = least_busy.and_then(|i| self.inboxes.get(i))
                && inbox.send(stream).await.is_err()
            {
                return Ok(());
            }
        }
    }
}

pub(crate) fn bind_tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Serves one service on a worker's share of a port.
#[derive(Debug)]
pub struct Server<S> {
    limits: Arc<Limits>,
    tls: ServerTls,
    keys: QuicKeys,
    service: S,
    seed: u64,
    http1: bool,
    lessor: Option<Arc<dyn Lessor>>,
}

impl<S> Server<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
{
    /// A server of `service`. `seed` is for the jitter of connection ages.
    pub fn new(limits: Limits, tls: ServerTls, keys: QuicKeys, service: S, seed: u64) -> Self {
        Self { limits: Arc::new(limits), tls, keys, service, seed, http1: false, lessor: None }
    }

    /// Lets connections with TLS be used as long as `lessor` says.
    #[must_use]
    pub fn with_lessor(mut self, lessor: Arc<dyn Lessor>) -> Self {
        self.lessor = Some(lessor);
        self
    }

    /// Also serves HTTP/1.1 over TCP.
    #[must_use]
    pub fn with_http1(mut self) -> Self {
        self.http1 = true;
        self
    }

    /// Serves until `worker.drain`; connections then finish as tasks of the worker.
    ///
    /// # Errors
    /// When the sockets or the TLS configuration cannot be used.
    pub async fn serve(self, worker: Worker, mut port: Port) -> io::Result<()> {
        let Self { limits, tls, keys, service, seed, http1, lessor } = self;
        let mut rng = StdRng::seed_from_u64(seed ^ u64::from(worker.index));
        let gate = Gate { open: port.open.clone(), handshakes: Arc::default() };
        let (acceptor, endpoint) = match tls {
            ServerTls::Plaintext => (None, None),
            ServerTls::Tls(tls) => {
                let mut tcp = *tls.clone();
                tcp.alpn_protocols = vec![b"h2".to_vec()];
                if http1 {
                    tcp.alpn_protocols.push(b"http/1.1".to_vec());
                }
                let quic = match port.udp.take() {
                    Some(socket) => {
                        let config = quic::server_config(*tls, &limits)?;
                        let endpoint = quic::endpoint(&keys, worker.index, Some(config), socket)?;
                        worker.endpoints.add(&endpoint);
                        Some(endpoint)
                    }
                    None => None,
                };
                (Some(tokio_rustls::TlsAcceptor::from(Arc::new(tcp))), quic)
            }
        };
        loop {
            let incoming = async {
                match &endpoint {
                    Some(endpoint) => endpoint.accept().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(incoming) = incoming => {
                    if let Some(connecting) = gate.admit_quic(incoming, &limits) {
                        let (permit, lessor) = (gate.permit(), lessor.clone());
                        let connection = QuicConnection { connecting, permit, lessor };
                        let (limits, service) = (limits.clone(), service.clone());
                        let drain = worker.drain.clone();
                        worker.tasks.spawn(connection.serve(limits, service, drain));
                    }
                }
                Some(stream) = port.inbox.recv() => {
                    if gate.is_full(&limits) {
                        tracing::debug!("a TCP connection was refused: the port is at its limit");
                        continue;
                    }
                    let age = limits.h2_connection_age.mul_f64(rng.random_range(0.9..1.1));
                    let (acceptor, lessor) = (acceptor.clone(), lessor.clone());
                    let connection =
                        TcpConnection { acceptor, permit: gate.permit(), age, http1, lessor };
                    let (limits, service) = (limits.clone(), service.clone());
                    worker.tasks.spawn(connection.serve(stream, limits, service, worker.clone()));
                }
                () = worker.drain.cancelled() => break,
            }
        }
        // What has not begun is refused; what has begun finishes as tasks of the worker.
        if let Some(endpoint) = endpoint {
            endpoint.set_server_config(None);
            let stop = worker.stop.clone();
            worker.tasks.spawn(async move {
                tokio::select! {
                    () = endpoint.wait_idle() => {}
                    () = stop.cancelled() => {}
                }
            });
        }
        Ok(())
    }
}

/// Counts connections and handshakes against their limits.
#[derive(Clone, Debug)]
struct Gate {
    open: Arc<AtomicUsize>,
    handshakes: Arc<AtomicUsize>,
}

impl Gate {
    fn is_full(&self, limits: &Limits) -> bool {
        self.open.load(Ordering::Relaxed) >= limits.connections
            || self.handshakes.load(Ordering::Relaxed) >= limits.handshakes
    }

    /// Refuses, asks to prove the address, or admits.
    fn admit_quic(&self, incoming: quinn::Incoming, limits: &Limits) -> Option<quinn::Connecting> {
        if self.is_full(limits) {
            incoming.refuse();
            return None;
        }
        let in_progress = self.handshakes.load(Ordering::Relaxed);
        if in_progress >= limits.retry_above_handshakes && incoming.may_retry() {
            // Fails only when the address is proved already, and that was just asked.
            drop(incoming.retry());
            return None;
        }
        match incoming.accept() {
            Ok(connecting) => Some(connecting),
            Err(error) => {
                tracing::debug!(%error, "a QUIC connection could not begin");
                None
            }
        }
    }

    fn permit(&self) -> Permit {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.handshakes.fetch_add(1, Ordering::Relaxed);
        Permit { gate: self.clone(), in_handshake: true }
    }
}

/// An open connection, first in its handshake.
#[derive(Debug)]
struct Permit {
    gate: Gate,
    in_handshake: bool,
}

impl Permit {
    fn handshake_done(&mut self) {
        if std::mem::take(&mut self.in_handshake) {
            self.gate.handshakes.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.handshake_done();
        self.gate.open.fetch_sub(1, Ordering::Relaxed);
    }
}

struct QuicConnection {
    connecting: quinn::Connecting,
    permit: Permit,
    lessor: Option<Arc<dyn Lessor>>,
}

impl QuicConnection {
    async fn serve<S>(mut self, limits: Arc<Limits>, service: S, drain: CancellationToken)
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send,
    {
        let remote = self.connecting.remote_address();
        let connection = match tokio::time::timeout(limits.handshake_timeout, self.connecting).await
        {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                let lessor = self.lessor.as_deref().filter(|_| quic::is_refusal(&error));
                return refused(lessor, remote, &error);
            }
            Err(_) => return refused(None, remote, &"it took too long"),
        };
        self.permit.handshake_done();
        let certificates: Arc<[_]> = quic::certificates(&connection).into();
        let lease = lease(self.lessor.as_deref(), &certificates);
        let info = CallInfo { remote, protocol: Protocol::H3, certificates };
        h3::server::serve(connection, limits, info, service, drain, lease).await;
    }
}

/// Whether a handshake failed because this end did not accept what the other showed.
pub(crate) fn is_refusal(error: &io::Error) -> bool {
    let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    tls.is_some_and(|error| !matches!(error, rustls::Error::AlertReceived(_)))
}

/// A handshake failed.
fn refused(lessor: Option<&dyn Lessor>, remote: SocketAddr, why: &dyn std::fmt::Display) {
    match lessor {
        Some(lessor) => lessor.refused(remote, &why.to_string()),
        None => tracing::debug!(%why, %remote, "a handshake failed"),
    }
}

/// How long a connection may be used.
fn lease(lessor: Option<&dyn Lessor>, certificates: &[CertificateDer<'static>]) -> Lease {
    lessor.map_or_else(Lease::unlimited, |lessor| lessor.lease(certificates))
}

struct TcpConnection {
    acceptor: Option<tokio_rustls::TlsAcceptor>,
    permit: Permit,
    age: Duration,
    http1: bool,
    lessor: Option<Arc<dyn Lessor>>,
}

impl TcpConnection {
    async fn serve<S>(mut self, stream: TcpStream, limits: Arc<Limits>, service: S, worker: Worker)
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send + 'static,
    {
        let (stream, remote) = match accepted(stream) {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "a TCP connection was gone before it was served");
                return;
            }
        };
        let Some(acceptor) = self.acceptor.take() else {
            let info = CallInfo { remote, protocol: Protocol::H2c, certificates: Arc::default() };
            let lease = Lease::unlimited();
            return self.serve_http(stream, limits, info, service, worker, lease).await;
        };
        let accepting = tokio::time::timeout(limits.handshake_timeout, acceptor.accept(stream));
        let accepted = tokio::select! {
            accepted = accepting => accepted,
            () = worker.drain.cancelled() => return,
        };
        let stream = match accepted {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let lessor = self.lessor.as_deref().filter(|_| is_refusal(&error));
                return refused(lessor, remote, &error);
            }
            Err(_) => return refused(None, remote, &"it took too long"),
        };
        let certificates: Arc<[_]> = stream
            .get_ref()
            .1
            .peer_certificates()
            .map(|certificates| {
                certificates.iter().cloned().map(CertificateDer::into_owned).collect()
            })
            .unwrap_or_default();
        let lease = lease(self.lessor.as_deref(), &certificates);
        let info = CallInfo { remote, protocol: Protocol::H2, certificates };
        self.serve_http(stream, limits, info, service, worker, lease).await;
    }

    /// Serves whichever HTTP the client begins with. One that begins with nothing is let go.
    async fn serve_http<I, S>(
        mut self,
        stream: I,
        limits: Arc<Limits>,
        mut info: CallInfo,
        service: S,
        worker: Worker,
        lease: Lease,
    ) where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send + 'static,
    {
        let (drain, tasks) = (worker.drain, worker.tasks);
        let sniffed = tokio::select! {
            sniffed = http1::sniff(stream, limits.handshake_timeout) => sniffed,
            () = drain.cancelled() => return,
        };
        self.permit.handshake_done();
        match sniffed {
            Some((http1::Version::Http2, stream)) => {
                let until = http2::Until { age: self.age, drain, lease };
                http2::serve(stream, &limits, until, info, service, tasks).await;
            }
            Some((http1::Version::Http1, stream)) if self.http1 => {
                info.protocol = Protocol::H1;
                http1::serve(stream, &limits, info, service, drain).await;
            }
            Some((http1::Version::Http1, _)) | None => {
                tracing::debug!(remote = %info.remote, "a connection did not begin with HTTP/2");
            }
        }
    }
}

fn accepted(stream: TcpStream) -> io::Result<(tokio::net::TcpStream, SocketAddr)> {
    let remote = stream.peer_addr()?;
    stream.set_nodelay(true)?;
    Ok((tokio::net::TcpStream::from_std(stream)?, remote))
}
