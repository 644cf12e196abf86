//! QUIC endpoints: sockets, connection identifiers that name their worker, and transport parameters from [`Limits`].

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use quinn::{ConnectionId, ConnectionIdGenerator};
use quinn::{
    EndpointConfig, IdleTimeout, TransportConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rand::Rng as _;
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Limits, h3};

/// What we ask the kernel to hold per socket and direction, in bytes. quinn never sets it, and the default drops packets.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Our connection identifiers: one byte for the worker, the rest random.
const CONNECTION_ID_BYTES: usize = 8;

/// The keys all workers of a node share, so that a packet for any of them is understood by each: stateless reset and
/// address validation.
#[derive(Clone, Debug, Default)]
pub struct QuicKeys {
    endpoint: EndpointConfig,
}

impl QuicKeys {
    /// Fresh random keys.
    #[must_use]
    pub fn random() -> Self {
        Self::default()
    }

    /// The endpoint configuration of one worker.
    pub(crate) fn endpoint(&self, worker: u8) -> EndpointConfig {
        let mut config = self.endpoint.clone();
        config.cid_generator(move || Box::new(WorkerIds { worker }));
        config
    }
}

/// Connection identifiers whose first byte is the worker that owns them.
#[derive(Debug)]
struct WorkerIds {
    worker: u8,
}

impl ConnectionIdGenerator for WorkerIds {
    #[expect(clippy::disallowed_methods, reason = "identifiers must not be guessable")]
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; CONNECTION_ID_BYTES];
        rand::rng().fill_bytes(&mut bytes);
        bytes[0] = self.worker;
        ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// What the kernel really gave a socket, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketBuffers {
    /// Receive buffer.
    pub receive_bytes: usize,
    /// Send buffer.
    pub send_bytes: usize,
}

impl SocketBuffers {
    /// Whether the kernel gave less than QUIC at full speed needs.
    #[must_use]
    pub fn are_short(self) -> bool {
        self.receive_bytes.min(self.send_bytes) < SOCKET_BUFFER_BYTES
    }
}

/// Binds a UDP socket for QUIC. `shared`: other workers bind the same port (SO_REUSEPORT).
///
/// # Errors
/// What the kernel says, for instance that the address is in use.
pub fn bind_udp(
    address: SocketAddr,
    shared: bool,
) -> io::Result<(std::net::UdpSocket, SocketBuffers)> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_port(shared)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // The kernel may give less than asked for; what it gave is reported, not an error.
    drop(socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES));
    drop(socket.set_send_buffer_size(SOCKET_BUFFER_BYTES));
    let buffers = SocketBuffers {
        receive_bytes: socket.recv_buffer_size()?,
        send_bytes: socket.send_buffer_size()?,
    };
    socket.bind(&address.into())?;
    Ok((socket.into(), buffers))
}

/// An endpoint of `worker` that only dials, on a port of its own, for both families where the machine has both.
pub(crate) fn dialing_endpoint(keys: &QuicKeys, worker: u8) -> io::Result<quinn::Endpoint> {
    let any6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let any4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let (socket, _) = bind_udp(any6, false).or_else(|_| bind_udp(any4, false))?;
    endpoint(keys, worker, None, socket)
}

/// An endpoint of `worker` on `socket`.
pub(crate) fn endpoint(
    keys: &QuicKeys,
    worker: u8,
    server: Option<quinn::ServerConfig>,
    socket: std::net::UdpSocket,
) -> io::Result<quinn::Endpoint> {
    quinn::Endpoint::new(keys.endpoint(worker), server, socket, Arc::new(quinn::TokioRuntime))
}

/// The serving end: TLS from the caller, bounds from `limits`.
///
/// # Errors
/// When `tls` lacks the cipher suite QUIC starts with (TLS13_AES_128_GCM_SHA256).
pub(crate) fn server_config(
    mut tls: rustls::ServerConfig,
    limits: &Limits,
) -> io::Result<quinn::ServerConfig> {
    tls.alpn_protocols = vec![b"h3".to_vec()];
    // 0-RTT may be replayed, and a replayed inference is a second inference.
    tls.max_early_data_size = 0;
    let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport_config(limits)));
    config.max_incoming(limits.handshakes.max(1));
    Ok(config)
}

/// The calling end.
///
/// # Errors
/// When `tls` lacks the cipher suite QUIC starts with (TLS13_AES_128_GCM_SHA256).
pub(crate) fn client_config(
    mut tls: rustls::ClientConfig,
    limits: &Limits,
) -> io::Result<quinn::ClientConfig> {
    tls.alpn_protocols = vec![b"h3".to_vec()];
    tls.enable_early_data = false;
    let crypto = QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = transport_config(limits);
    // The server of a call never opens streams towards us but its control streams.
    transport.max_concurrent_bidi_streams(0u32.into());
    config.transport_config(Arc::new(transport));
    Ok(config)
}

fn transport_config(limits: &Limits) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(limits.first_streams().into())
        .max_concurrent_uni_streams(h3::UNI_STREAMS.into())
        .stream_receive_window(limits.stream_window_bytes.into())
        .receive_window(limits.connection_window_bytes.into())
        .send_window(limits.send_window_bytes.into())
        .max_idle_timeout(IdleTimeout::try_from(limits.idle_timeout).ok())
        // DATAGRAM stays off on data ports: its buffers are fixed before the peer is known.
        .datagram_receive_buffer_size(None);
    config
}

/// The certificates the other end of a connection showed, its own first.
pub(crate) fn certificates(connection: &quinn::Connection) -> Vec<CertificateDer<'static>> {
    let identity = connection.peer_identity().map(|i| i.downcast::<Vec<CertificateDer<'static>>>());
    identity.and_then(Result::ok).map(|certificates| *certificates).unwrap_or_default()
}

/// Whether a handshake failed because this end did not accept what the other showed (a TLS alert of ours), not because of the
/// network or the other end.
pub(crate) fn is_refusal(error: &quinn::ConnectionError) -> bool {
    match error {
        quinn::ConnectionError::TransportError(error) => is_alert(error.code.into()),
        _ => false,
    }
}

/// Whether a code is an alert of TLS: the error 0x100 and its number (RFC 9001 §4.8).
pub(crate) fn is_alert(code: u64) -> bool {
    (0x100..0x200).contains(&code)
}
