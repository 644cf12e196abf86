//! Handshakes for their own sake: whether a port answers over TCP or QUIC, who is there, and how far it is. Used by
//! `isobar check`; nothing that carries calls goes through here.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use base::clock;
use quinn::{ConnectionError, crypto::rustls::QuicClientConfig};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tokio_rustls::TlsConnector;

use crate::{QuicKeys, bind_udp, link, quic};

/// The connection identifiers of a prober begin with this.
const PROBING: u8 = 0xfd;
/// How long somebody who refuses our certificate is given to say so, beyond a few round trips.
const REFUSES_WITHIN: Duration = Duration::from_millis(100);
/// How long the kernel of the other end is given to say that nobody listens.
const UNHEARD_WITHIN: Duration = Duration::from_millis(300);

/// What a handshake found.
#[derive(Clone, Debug)]
pub struct Sight {
    /// The certificates of the other end, its own first.
    pub certificates: Vec<CertificateDer<'static>>,
    /// Time to the other end and back.
    pub rtt: Duration,
    /// Bytes of a UDP payload the path is known to carry; `None` over TCP.
    pub payload_bytes: Option<u16>,
    /// What the other end said when it refused us after it had shown itself.
    pub refusal: Option<String>,
}

/// Why there was no handshake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreached {
    /// The machine answered that nobody listens.
    #[error("refused: nobody listens there")]
    Refused,
    /// Nothing came back.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// Something answered, but not so.
    #[error("{0}")]
    Failed(String),
}

/// Makes handshakes over QUIC, from a port of its own, and over TCP.
#[derive(Clone, Debug)]
pub struct Prober {
    endpoint: quinn::Endpoint,
}

impl Prober {
    /// A prober; within a tokio runtime.
    ///
    /// # Errors
    /// When no UDP socket can be bound.
    pub fn new() -> io::Result<Self> {
        Ok(Self { endpoint: quic::dialing_endpoint(&QuicKeys::random(), PROBING)? })
    }

    /// A handshake over QUIC, and good-bye.
    ///
    /// # Errors
    /// [`Unreached`].
    pub async fn quic(
        &self,
        address: SocketAddr,
        mut tls: rustls::ClientConfig,
        alpn: &[u8],
        within: Duration,
    ) -> Result<Sight, Unreached> {
        tls.alpn_protocols = vec![alpn.to_vec()];
        let failed = |error: &dyn std::fmt::Display| Unreached::Failed(error.to_string());
        let crypto = QuicClientConfig::try_from(tls).map_err(|error| failed(&error))?;
        let config = quinn::ClientConfig::new(Arc::new(crypto));
        let connecting = self
            .endpoint
            .connect_with(config, address, &address.ip().to_string())
            .map_err(|error| failed(&error))?;
        match tokio::time::timeout(within, connecting).await {
            Ok(Ok(connection)) => Ok(look(&connection).await),
            Ok(Err(ConnectionError::TimedOut)) | Err(_) => Err(unheard(address, within).await),
            Ok(Err(error)) => Err(failed(&error)),
        }
    }

    /// A handshake as a link between nodes begins with, and good-bye.
    ///
    /// # Errors
    /// [`Unreached`].
    pub async fn link(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        within: Duration,
    ) -> Result<Sight, Unreached> {
        self.quic(address, tls, link::LINK_ALPN, within).await
    }

    /// A handshake as a link begins with where UDP is blocked, and good-bye. `protocol` is what the link would speak.
    ///
    /// # Errors
    /// [`Unreached`].
    pub async fn link_over_tcp(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        protocol: &[u8],
        within: Duration,
    ) -> Result<Sight, Unreached> {
        self.tcp_offering(address, tls, &[b"h2", protocol], within).await
    }

    /// A handshake over TCP, and good-bye.
    ///
    /// # Errors
    /// [`Unreached`].
    pub async fn tcp(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        alpn: &[u8],
        within: Duration,
    ) -> Result<Sight, Unreached> {
        self.tcp_offering(address, tls, &[alpn], within).await
    }

    async fn tcp_offering(
        &self,
        address: SocketAddr,
        mut tls: rustls::ClientConfig,
        offered: &[&[u8]],
        within: Duration,
    ) -> Result<Sight, Unreached> {
        tls.alpn_protocols = offered.iter().map(|protocol| protocol.to_vec()).collect();
        let handshake = async {
            let began = clock::now();
            let stream = TcpStream::connect(address).await.map_err(unreached)?;
            let rtt = clock::now() - began;
            let name = ServerName::IpAddress(address.ip().into());
            let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await;
            Ok(look_tcp(stream.map_err(unreached)?, rtt).await)
        };
        tokio::time::timeout(within, handshake).await.unwrap_or(Err(Unreached::Silent(within)))
    }

    /// Waits until the other ends know that it is over, at most a second.
    pub async fn close(&self) {
        self.endpoint.close(0u32.into(), b"looked");
        drop(tokio::time::timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await);
    }
}

fn unreached(error: io::Error) -> Unreached {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Unreached::Refused,
        _ => Unreached::Failed(error.to_string()),
    }
}

/// A server that dislikes our certificate says so only when the handshake is over on our side (TLS 1.3).
async fn look(connection: &quinn::Connection) -> Sight {
    let wait = connection.rtt() * 3 + REFUSES_WITHIN;
    let refusal = tokio::time::timeout(wait, connection.closed()).await.ok();
    let identity = connection.peer_identity();
    let identity = identity.and_then(|i| i.downcast::<Vec<CertificateDer<'static>>>().ok());
    let path = connection.stats().path;
    connection.close(0u32.into(), b"looked");
    Sight {
        certificates: identity.map(|certificates| *certificates).unwrap_or_default(),
        rtt: path.rtt,
        payload_bytes: Some(path.current_mtu),
        refusal: refusal.map(|error| error.to_string()),
    }
}

async fn look_tcp(mut stream: tokio_rustls::client::TlsStream<TcpStream>, rtt: Duration) -> Sight {
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let certificates = certificates.iter().map(|one| one.clone().into_owned()).collect();
    let mut first = [0; 1];
    let read = tokio::time::timeout(rtt * 3 + REFUSES_WITHIN, stream.read(&mut first)).await;
    let refusal = match read {
        Ok(Err(error)) => Some(error.to_string()),
        Ok(Ok(0)) => Some("it closed the connection".to_owned()),
        Ok(Ok(_)) | Err(_) => None,
    };
    Sight { certificates, rtt, payload_bytes: None, refusal }
}

/// QUIC passes over what the kernel says of ports nobody listens on, so that is asked apart.
async fn unheard(address: SocketAddr, waited: Duration) -> Unreached {
    let any: SocketAddr =
        if address.is_ipv6() { ([0u16; 8], 0).into() } else { ([0; 4], 0).into() };
    let asked = async {
        let socket = tokio::net::UdpSocket::bind(any).await?;
        socket.connect(address).await?;
        socket.send(&[0]).await?;
        socket.recv(&mut [0; 16]).await
    };
    match tokio::time::timeout(UNHEARD_WITHIN, asked).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Unreached::Refused,
        _ => Unreached::Silent(waited),
    }
}

/// How many datagrams the kernel takes or gives at once; 1: it cannot (GSO, GRO).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    /// Sent at once.
    pub gso_segments: usize,
    /// Received at once.
    pub gro_segments: usize,
}

/// What the kernel can do for UDP.
///
/// # Errors
/// When no socket can be made.
pub fn offload() -> io::Result<Offload> {
    let (socket, _) = bind_udp(([127, 0, 0, 1], 0).into(), false)?;
    let state = quinn_udp::UdpSocketState::new((&socket).into())?;
    Ok(Offload { gso_segments: state.max_gso_segments(), gro_segments: state.gro_segments() })
}

/// A UDP socket towards `address`, which nothing is sent from.
///
/// # Errors
/// When there is no way there.
pub fn towards(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr =
        if address.is_ipv6() { ([0u16; 8], 0).into() } else { ([0; 4], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_nobody_listens_on_is_told_from_silence() {
        let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(unheard(free, Duration::ZERO).await, Unreached::Refused);
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let waited = Duration::from_secs(2);
        assert_eq!(unheard(silent.local_addr().unwrap(), waited).await, Unreached::Silent(waited));
    }

    #[test]
    fn the_kernel_says_what_it_can_do() {
        let offload = offload().unwrap();
        assert!(offload.gso_segments >= 1 && offload.gro_segments >= 1);
    }
}
