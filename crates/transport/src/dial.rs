//! Making connections: QUIC first, TCP beside it when QUIC takes long, because some networks drop UDP.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http::uri::Authority;
use rustls::pki_types::{CertificateDer, ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;

use crate::{
    Lease, Lessor, Limits, QuicKeys, TransportError, Worker, channel::Connection, h3, http2, quic,
};

/// A TCP connection on which nothing came for so long is probed this often.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
/// Where probes, or what is sent, are not acknowledged for so long, or the other end takes no more for as long, the connection is dead.
/// The kernel would wait for a quarter of an hour, and sends no probes while anything else waits.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(20);

/// Whom to call.
#[derive(Clone, Debug)]
pub struct Target {
    name: Arc<str>,
    authority: Authority,
    tls: Option<PeerTls>,
    via: Via,
    server_name: Option<Arc<str>>,
}

/// Which transport a target with TLS is called over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Via {
    /// Whichever works, QUIC first.
    #[default]
    Either,
    /// HTTP/3 over QUIC alone.
    H3,
    /// HTTP/2 over TCP alone.
    H2,
}

/// TLS towards a peer, made by the caller. ALPN is set here.
#[derive(Clone, Debug)]
pub struct PeerTls {
    config: Box<rustls::ClientConfig>,
    lessor: Option<Arc<dyn Lessor>>,
}

impl PeerTls {
    /// With connections that may be used for ever.
    #[must_use]
    pub fn new(config: rustls::ClientConfig) -> Self {
        Self { config: Box::new(config), lessor: None }
    }

    /// With connections that may be used as long as `lessor` says.
    #[must_use]
    pub fn leased(config: rustls::ClientConfig, lessor: Arc<dyn Lessor>) -> Self {
        Self { config: Box::new(config), lessor: Some(lessor) }
    }

    /// The configuration, without ALPN.
    #[must_use]
    pub fn config(&self) -> &rustls::ClientConfig {
        &self.config
    }

    fn lease(&self, certificates: &[CertificateDer<'static>]) -> Lease {
        self.lessor.as_ref().map_or_else(Lease::unlimited, |lessor| lessor.lease(certificates))
    }
}

impl Target {
    /// A node: h3 over QUIC, h2 over TLS where UDP is blocked. `name` is for messages, `authority` is `host:port`.
    #[must_use]
    pub fn peer(name: &str, authority: Authority, tls: PeerTls) -> Self {
        Self { name: name.into(), authority, tls: Some(tls), via: Via::Either, server_name: None }
    }

    /// A server with TLS, called over one transport. `server_name` is the name its certificate must have; `None`: the host
    /// of `authority`.
    #[must_use]
    pub fn server(
        name: &str,
        authority: Authority,
        tls: PeerTls,
        via: Via,
        server_name: Option<&str>,
    ) -> Self {
        let server_name = server_name.map(Arc::from);
        Self { via, server_name, ..Self::peer(name, authority, tls) }
    }

    /// A server that speaks HTTP/2 without TLS (h2c).
    #[must_use]
    pub fn plaintext(name: &str, authority: Authority) -> Self {
        Self { name: name.into(), authority, tls: None, via: Via::H2, server_name: None }
    }

    /// The name, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `host:port`.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Whether QUIC is worth another try while TCP is in use.
    pub(crate) fn prefers_quic(&self) -> bool {
        self.via == Via::Either
    }

    /// The name its certificate must have.
    fn tls_name(&self) -> &str {
        self.server_name.as_deref().unwrap_or_else(|| host(&self.authority))
    }

    /// The scheme its requests name.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }
}

/// Makes the connections of one worker.
#[derive(Debug)]
pub struct Dialer {
    endpoint: quinn::Endpoint,
    limits: Arc<Limits>,
    tasks: TaskTracker,
}

impl Dialer {
    /// A dialer with a UDP port of its own.
    ///
    /// # Errors
    /// When no UDP socket can be bound.
    pub fn new(worker: &Worker, keys: &QuicKeys, limits: Limits) -> io::Result<Self> {
        let endpoint = quic::dialing_endpoint(keys, worker.index)?;
        worker.endpoints.add(&endpoint);
        Ok(Self { endpoint, limits: Arc::new(limits), tasks: worker.outgoing.clone() })
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Waits until what was closed is known to be closed at the other ends, at most a second.
    pub(crate) async fn closed(&self) {
        const LONGEST: Duration = Duration::from_secs(1);
        drop(tokio::time::timeout(LONGEST, self.endpoint.wait_idle()).await);
    }

    /// Connects by whatever works first.
    pub(crate) async fn dial(&self, target: &Target) -> Result<Connection, TransportError> {
        let limit = self.limits.dial_timeout;
        tokio::time::timeout(limit, self.race(target))
            .await
            .unwrap_or_else(|_| Err(failure(target, format!("no answer within {limit:?}"))))
    }

    async fn race(&self, target: &Target) -> Result<Connection, TransportError> {
        match target.via {
            Via::H2 => return self.dial_tcp(target).await,
            Via::H3 => return self.dial_quic(target).await,
            Via::Either => {}
        }
        let quic = self.dial_quic(target);
        tokio::pin!(quic);
        match tokio::time::timeout(self.limits.tcp_race_after, &mut quic).await {
            Ok(Ok(connection)) => return Ok(connection),
            // Over TCP the same cause may show again; QUIC's word is the better one.
            Ok(Err(error)) => return self.dial_tcp(target).await.map_err(|_| error),
            Err(_) => {}
        }
        let tcp = self.dial_tcp(target);
        tokio::pin!(tcp);
        let mut quic_failed = false;
        // Until TCP has failed too, its word is not known.
        let mut tcp_failed = None;
        loop {
            tokio::select! {
                connected = &mut quic, if !quic_failed => match connected {
                    Ok(connection) => return Ok(connection),
                    Err(_) => quic_failed = true,
                },
                connected = &mut tcp, if tcp_failed.is_none() => match connected {
                    Ok(connection) => return Ok(connection),
                    Err(error) => tcp_failed = Some(error),
                },
                // Who refuses TCP seldom answers QUIC, but a slow handshake may still be under way.
                () = tokio::time::sleep(self.limits.tcp_race_after * 2), if tcp_failed.is_some() => {
                    quic_failed = true;
                }
            }
            if quic_failed && let Some(error) = tcp_failed {
                return Err(error);
            }
        }
    }

    /// Connects over QUIC.
    pub(crate) async fn dial_quic(&self, target: &Target) -> Result<Connection, TransportError> {
        let Some(tls) = &target.tls else {
            return Err(failure(target, "it is not reached over QUIC"));
        };
        let config = quic::client_config(*tls.config.clone(), &self.limits)
            .map_err(|error| failure(target, error))?;
        let mut last = failure(target, "its name has no address");
        let addresses = self.resolve(target).await?;
        let share = self.share(addresses.len());
        for address in addresses {
            let connecting = self
                .endpoint
                .connect_with(config.clone(), address, target.tls_name())
                .map_err(|error| failure(target, error));
            let connected = match connecting {
                Ok(connecting) => tokio::time::timeout(share, connecting).await,
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            match connected {
                Ok(Ok(connection)) => {
                    let (limits, tasks) = (self.limits.clone(), self.tasks.clone());
                    let lease = tls.lease(&quic::certificates(&connection));
                    let client = h3::client::Client::new(connection, limits, tasks, lease);
                    return Ok(Connection::H3(client));
                }
                Ok(Err(error)) => last = failure(target, format!("QUIC: {error}")),
                Err(_) => last = failure(target, "QUIC: no answer"),
            }
        }
        Err(last)
    }

    async fn dial_tcp(&self, target: &Target) -> Result<Connection, TransportError> {
        let mut last = failure(target, "its name has no address");
        let addresses = self.resolve(target).await?;
        let share = self.share(addresses.len());
        for address in addresses {
            match tokio::time::timeout(share, self.dial_address(target, address)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => last = error,
                Err(_) => last = failure(target, "TCP: no answer"),
            }
        }
        Err(last)
    }

    async fn resolve(&self, target: &Target) -> Result<Vec<SocketAddr>, TransportError> {
        resolve(&target.authority).await.map_err(|error| match error {
            TransportError::Dial { reason, .. } => failure(target, reason),
            other => other,
        })
    }

    /// The time one of `addresses` is given, so that a dead one does not hide the others.
    fn share(&self, addresses: usize) -> Duration {
        self.limits.dial_timeout / u32::try_from(addresses.max(1)).unwrap_or(u32::MAX)
    }

    async fn dial_address(
        &self,
        target: &Target,
        address: SocketAddr,
    ) -> Result<Connection, TransportError> {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| failure(target, format!("TCP: {error}")))?;
        stream.set_nodelay(true).map_err(|error| failure(target, error))?;
        if let Err(error) = watch(&stream) {
            tracing::debug!(%error, "the kernel does not look after a TCP connection");
        }
        let (limits, tasks) = (&self.limits, &self.tasks);
        let Some(tls) = &target.tls else {
            let lease = Lease::unlimited();
            let client = http2::Client::handshake(stream, "http", limits, tasks, lease).await?;
            return Ok(Connection::H2(client));
        };
        let mut config = *tls.config.clone();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let name = ServerName::try_from(target.tls_name().to_owned())
            .map_err(|error| failure(target, error))?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .map_err(|error| failure(target, format!("TLS: {error}")))?;
        let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let shown: Vec<_> = shown.iter().cloned().map(CertificateDer::into_owned).collect();
        let lease = tls.lease(&shown);
        let client = http2::Client::handshake(stream, "https", limits, tasks, lease).await?;
        Ok(Connection::H2(client))
    }
}

fn failure(target: &Target, reason: impl std::fmt::Display) -> TransportError {
    TransportError::Dial {
        target: format!("{} at {}", target.name, target.authority),
        reason: reason.to_string(),
    }
}

/// The host of an authority as TLS and resolvers want it: an IPv6 address without its brackets.
pub(crate) fn host(authority: &Authority) -> &str {
    authority.host().trim_start_matches('[').trim_end_matches(']')
}

/// A name is looked up at every dial: the system's resolver caches, and an address may move.
pub(crate) async fn resolve(authority: &Authority) -> Result<Vec<SocketAddr>, TransportError> {
    const LOOKUP_TIMEOUT: Duration = Duration::from_secs(3);
    let failed = |reason: String| TransportError::Dial { target: authority.to_string(), reason };
    let port = authority.port_u16().ok_or_else(|| failed("it has no port".to_owned()))?;
    let lookup = tokio::net::lookup_host((host(authority), port));
    match tokio::time::timeout(LOOKUP_TIMEOUT, lookup).await {
        Ok(Ok(addresses)) => Ok(addresses.collect()),
        Ok(Err(error)) => Err(failed(format!("its name cannot be resolved: {error}"))),
        Err(_) => Err(failed("its name was not resolved in time".to_owned())),
    }
}
/// The kernel notices a dead host; HTTP/2 pings would make gRPC servers close the connection.
fn watch(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_INTERVAL);
    socket.set_tcp_keepalive(&probes)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    Ok(())
}
