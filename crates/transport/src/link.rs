//! Links between nodes for what is not a call: short frames over QUIC, on a port and a runtime of their own, so that a data
//! plane at its limit delays none of them.
//!
//! A short frame is a datagram, which may be lost; a longer one, or one that must arrive, is a unidirectional stream of its
//! own. What is in a frame is not known here.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use quinn::{
    TransportConfig,
    crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
};
use rustls::pki_types::CertificateDer;

use crate::{QuicKeys, TransportError, bind_udp, dial, quic};

/// What both ends of a link speak.
pub const LINK_ALPN: &[u8] = b"isobar/1";
/// Longest frame that is read.
const FRAME_BYTES_MAX: usize = 64 << 10;
/// A link on which nothing comes for so long is closed; a frame is asked for much more often.
const IDLE: Duration = Duration::from_secs(3);
const KEEP_ALIVE: Duration = Duration::from_millis(750);
/// A handshake, or a frame that has begun, must be done within this.
const DONE_WITHIN: Duration = Duration::from_secs(5);
/// Unidirectional streams the other end may have open.
const STREAMS: u32 = 8;
/// Bytes of datagrams held for a reader that is late; older ones are dropped.
const DATAGRAMS_HELD_BYTES: usize = 64 << 10;
/// The connection identifiers of this endpoint begin with this: no worker has it.
const CONTROL: u8 = 0xff;

/// The endpoint of a node's links. Cloneable.
#[derive(Clone, Debug)]
pub struct Links {
    endpoint: quinn::Endpoint,
    config: Arc<TransportConfig>,
}

impl Links {
    /// Binds `address` and serves links with `tls`, which speaks [`LINK_ALPN`] and whatever else it says.
    ///
    /// # Errors
    /// What the kernel says, for instance that the address is in use; or that `tls` cannot serve QUIC.
    pub fn bind(
        address: SocketAddr,
        mut tls: rustls::ServerConfig,
        keys: &QuicKeys,
    ) -> io::Result<Self> {
        if tls.alpn_protocols.is_empty() {
            tls.alpn_protocols = vec![LINK_ALPN.to_vec()];
        }
        tls.max_early_data_size = 0;
        let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        let config = Arc::new(transport_config());
        server.transport_config(config.clone());
        let (socket, _) = bind_udp(address, false)?;
        let endpoint = quic::endpoint(keys, CONTROL, Some(server), socket)?;
        Ok(Self { endpoint, config })
    }

    /// Only dials, from a port of its own.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dialing(keys: &QuicKeys) -> io::Result<Self> {
        let endpoint = quic::dialing_endpoint(keys, CONTROL)?;
        Ok(Self { endpoint, config: Arc::new(transport_config()) })
    }

    /// The address really bound.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The next link another node begins; `None` when the endpoint is closed. Its handshake is still to be done.
    pub async fn accept(&self) -> Option<Incoming> {
        self.endpoint.accept().await.map(Incoming)
    }

    /// Begins a link with the node at `authority` (`host:port`). It speaks [`LINK_ALPN`] unless `tls` says something else.
    ///
    /// # Errors
    /// [`TransportError::Dial`] when nobody answers there, or not who was expected.
    pub async fn dial(
        &self,
        authority: &http::uri::Authority,
        mut tls: rustls::ClientConfig,
    ) -> Result<Link, TransportError> {
        let failed =
            |reason: String| TransportError::Dial { target: authority.to_string(), reason };
        if tls.alpn_protocols.is_empty() {
            tls.alpn_protocols = vec![LINK_ALPN.to_vec()];
        }
        tls.enable_early_data = false;
        let crypto = QuicClientConfig::try_from(tls).map_err(|error| failed(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(self.config.clone());
        let mut last = failed("its name has no address".to_owned());
        for address in dial::resolve(authority).await? {
            let connecting =
                self.endpoint.connect_with(config.clone(), address, dial::host(authority));
            let connecting = match connecting {
                Ok(connecting) => connecting,
                // An address of a family this endpoint does not have.
                Err(error) => {
                    last = failed(error.to_string());
                    continue;
                }
            };
            match tokio::time::timeout(DONE_WITHIN, connecting).await {
                Ok(Ok(connection)) => return Ok(Link(connection)),
                Ok(Err(error)) => last = failed(error.to_string()),
                Err(_) => last = failed("no answer".to_owned()),
            }
        }
        Err(last)
    }

    /// Closes every link and waits until the other ends can know, at most a second.
    pub async fn close(&self) {
        self.endpoint.close(0u32.into(), b"stopped");
        drop(tokio::time::timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await);
    }
}

fn transport_config() -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(0u32.into())
        .max_concurrent_uni_streams(STREAMS.into())
        .stream_receive_window((FRAME_BYTES_MAX as u32).into())
        .receive_window((STREAMS * FRAME_BYTES_MAX as u32).into())
        .datagram_receive_buffer_size(Some(DATAGRAMS_HELD_BYTES))
        .datagram_send_buffer_size(DATAGRAMS_HELD_BYTES)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(quinn::IdleTimeout::try_from(IDLE).ok());
    config
}

/// A link another node wants to begin.
#[derive(Debug)]
pub struct Incoming(quinn::Incoming);

impl Incoming {
    /// Where it comes from.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.0.remote_address()
    }

    /// Turns it down.
    pub fn refuse(self) {
        self.0.refuse();
    }

    /// Asks the other end to prove its address first, if it has not; else gives itself back.
    #[must_use]
    pub fn proved(self) -> Option<Self> {
        self.0.retry().err().map(|error| Self(error.into_incoming()))
    }

    /// Does the handshake.
    ///
    /// # Errors
    /// [`NoLink`] when it fails or takes too long.
    pub async fn accept(self) -> Result<Link, NoLink> {
        let failed = |error: quinn::ConnectionError| NoLink {
            why: error.to_string(),
            is_refusal: quic::is_refusal(&error),
        };
        let connecting = self.0.accept().map_err(failed)?;
        match tokio::time::timeout(DONE_WITHIN, connecting).await {
            Ok(connected) => connected.map(Link).map_err(failed),
            Err(_) => {
                Err(NoLink { why: "the handshake took too long".to_owned(), is_refusal: false })
            }
        }
    }
}

/// Why a link did not come about. The other end may try again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct NoLink {
    /// In words.
    pub why: String,
    /// Whether this end did not accept what the other showed, rather than the other end or the network having failed.
    pub is_refusal: bool,
}

/// A link with another node. Cloneable.
#[derive(Clone, Debug)]
pub struct Link(quinn::Connection);

impl Link {
    /// The certificates of the other end, its own first.
    #[must_use]
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        quic::certificates(&self.0)
    }

    /// What both ends speak, by ALPN.
    #[must_use]
    pub fn protocol(&self) -> Vec<u8> {
        let data = self.0.handshake_data().map(|d| d.downcast::<HandshakeData>());
        data.and_then(Result::ok).and_then(|data| data.protocol).unwrap_or_default()
    }

    /// The address of the other end.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.0.remote_address()
    }

    /// How long a frame takes there and back.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.0.rtt()
    }

    /// Sends a frame that may be lost; one too long for a datagram goes as a stream.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone.
    pub async fn send(&self, frame: Bytes) -> Result<(), TransportError> {
        if self.0.max_datagram_size().is_some_and(|most| frame.len() <= most) {
            return self.0.send_datagram(frame).map_err(|e| TransportError::Closed(e.to_string()));
        }
        self.send_whole(frame).await
    }

    /// Sends a frame that arrives.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone or the other end does not read.
    pub async fn send_whole(&self, frame: Bytes) -> Result<(), TransportError> {
        let sending = async {
            let mut stream = self.0.open_uni().await.map_err(|e| e.to_string())?;
            stream.write_chunk(frame).await.map_err(|e| e.to_string())?;
            stream.finish().map_err(|e| e.to_string())
        };
        match tokio::time::timeout(DONE_WITHIN, sending).await {
            Ok(sent) => sent.map_err(TransportError::Closed),
            Err(_) => Err(TransportError::Closed("the other end does not read".to_owned())),
        }
    }

    /// The next frame, whichever way it comes.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone, or the other end begins a frame and does not end it.
    pub async fn receive(&self) -> Result<Bytes, TransportError> {
        tokio::select! {
            datagram = self.0.read_datagram() => {
                datagram.map_err(|error| TransportError::Closed(error.to_string()))
            }
            whole = self.receive_whole() => whole,
        }
    }

    /// Asks the other end one question, and waits for its answer.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone, the answer is too long or does not come.
    pub async fn ask(&self, question: Bytes) -> Result<Bytes, TransportError> {
        let asking = async {
            let (mut send, mut receive) = self.0.open_bi().await.map_err(|e| e.to_string())?;
            send.write_chunk(question).await.map_err(|e| e.to_string())?;
            send.finish().map_err(|e| e.to_string())?;
            receive.read_to_end(FRAME_BYTES_MAX).await.map_err(|e| e.to_string())
        };
        match tokio::time::timeout(DONE_WITHIN, asking).await {
            Ok(Ok(answer)) => Ok(answer.into()),
            // What ended the link says more than that the stream is gone.
            Ok(Err(error)) => Err(TransportError::Closed(match self.0.close_reason() {
                Some(reason) => reason.to_string(),
                None => error,
            })),
            Err(_) => Err(TransportError::Closed("no answer in time".to_owned())),
        }
    }

    /// Lets the other end ask one question of at most `bytes_max`, which must have come `within` so long and is to be answered.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone, the question is too long or does not come.
    pub async fn asked(
        &self,
        bytes_max: usize,
        within: Duration,
    ) -> Result<(Bytes, Answer), TransportError> {
        self.0.set_max_concurrent_bi_streams(1u32.into());
        let asked = async {
            let (send, mut receive) = self.0.accept_bi().await.map_err(|e| e.to_string())?;
            let question = receive.read_to_end(bytes_max).await.map_err(|e| e.to_string())?;
            Ok((question.into(), Answer(send)))
        };
        match tokio::time::timeout(within, asked).await {
            Ok(asked) => asked.map_err(TransportError::Closed),
            Err(_) => Err(TransportError::Closed("nothing was asked in time".to_owned())),
        }
    }

    /// The next frame that comes as a stream; those that came as datagrams wait.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub async fn receive_whole(&self) -> Result<Bytes, TransportError> {
        let closed = |error: &dyn std::fmt::Display| TransportError::Closed(error.to_string());
        let mut stream = self.0.accept_uni().await.map_err(|error| closed(&error))?;
        match tokio::time::timeout(DONE_WITHIN, stream.read_to_end(FRAME_BYTES_MAX)).await {
            Ok(Ok(frame)) => Ok(frame.into()),
            Ok(Err(error)) => Err(closed(&error)),
            Err(_) => Err(closed(&"a frame did not end in time")),
        }
    }

    /// Closes the link and says why.
    pub fn close(&self, reason: &str) {
        self.0.close(1u32.into(), reason.as_bytes());
    }

    /// Resolves when the link is gone, with the reason.
    pub async fn closed(&self) -> String {
        self.0.closed().await.to_string()
    }
}

/// The way back to whoever asked.
#[derive(Debug)]
pub struct Answer(quinn::SendStream);

impl Answer {
    /// Sends the answer, and waits until the other end has it.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the other end is gone or does not read.
    pub async fn send(mut self, answer: Bytes) -> Result<(), TransportError> {
        let sending = async {
            self.0.write_chunk(answer).await.map_err(|e| e.to_string())?;
            self.0.finish().map_err(|e| e.to_string())?;
            self.0.stopped().await.map(drop).map_err(|e| e.to_string())
        };
        match tokio::time::timeout(DONE_WITHIN, sending).await {
            Ok(sent) => sent.map_err(TransportError::Closed),
            Err(_) => Err(TransportError::Closed("the other end does not read".to_owned())),
        }
    }
}
