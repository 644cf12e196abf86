//! Links between nodes for what is not a call: short frames, on a port and a runtime of their own, so that a data plane at
//! its limit delays none of them.
//!
//! A link runs over QUIC or, where UDP is blocked, over one HTTP/2 stream on TCP. Its frames are the same on both; over QUIC
//! they may come in another order than they were sent in. What is in a frame is not known here.
//!
//! ```text
//!   Links ── dial ───> race: QUIC, TCP ──┐
//!     └───── accept ─> Incoming ─────────┴─> Link ─┬─ quic: datagrams and streams
//!                                                  └─ pipe <─> driver: the one stream, pings, good-bye
//! ```

mod connection;
mod driver;
mod pipe;
mod pulse;
mod quic;
mod race;
mod tcp;
#[cfg(test)]
mod tests;

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use quinn::TransportConfig;
use rustls::pki_types::CertificateDer;

use crate::{QuicKeys, TransportError, quic as endpoints};

/// What both ends of a link speak.
pub const LINK_ALPN: &[u8] = b"isobar/1";
/// Longest frame that is read.
const FRAME_BYTES_MAX: usize = 64 << 10;
/// A link on which nothing comes for so long is gone; something is asked for when half of it is over. QUIC counts from when it
/// asked, so that whoever dies is noticed after both together at the latest.
const IDLE: Duration = Duration::from_millis(1000);
const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// A dial, a handshake, or a frame that has begun, must be done within this.
const DONE_WITHIN: Duration = Duration::from_secs(5);
/// The connection identifiers of this endpoint begin with this: no worker has it.
const CONTROL: u8 = 0xff;
const TOO_LONG: &str = "a frame is longer than 65536 bytes";
const UNENDED: &str = "a frame did not end in time";
const UNREAD: &str = "the other end does not read";

/// What a link runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkTransport {
    /// QUIC, over UDP.
    Quic,
    /// HTTP/2, over TCP.
    Tcp,
}

impl fmt::Display for LinkTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        })
    }
}

/// The port of a node's links. Cloneable.
#[derive(Clone, Debug)]
pub struct Links {
    endpoint: quinn::Endpoint,
    config: Arc<TransportConfig>,
    tcp: Option<Arc<tcp::TcpPort>>,
    drivers: tcp::Drivers,
    memory: race::Memory,
}

impl Links {
    /// Binds `address` for UDP and TCP, port 0 any that is free for both, and serves links with `tls`, which speaks
    /// [`LINK_ALPN`] and whatever else it says. Within a tokio runtime.
    ///
    /// Over TCP a protocol is chosen by the path of the request: `isobar/1` is spoken at `/isobar.mesh.v1.Link/Frames`, and
    /// `isobar-WORD/1` at `/isobar.mesh.v1.Word/Ask`; any other protocol is not spoken over TCP.
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
        let config = Arc::new(quic::transport_config());
        let server = quic::server_config(tls.clone(), config.clone())?;
        let (listener, socket) = tcp::bind(address)?;
        let endpoint = endpoints::endpoint(keys, CONTROL, Some(server), socket)?;
        let drivers = tcp::Drivers::default();
        let tcp = tcp::TcpPort::new(listener, tls, drivers.clone())?;
        let memory = race::Memory::default();
        Ok(Self { endpoint, config, tcp: Some(Arc::new(tcp)), drivers, memory })
    }

    /// Only dials, from a port of its own.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dialing(keys: &QuicKeys) -> io::Result<Self> {
        let endpoint = endpoints::dialing_endpoint(keys, CONTROL)?;
        let config = Arc::new(quic::transport_config());
        let (drivers, memory) = Default::default();
        Ok(Self { endpoint, config, tcp: None, drivers, memory })
    }

    /// The address really bound, for UDP and TCP alike.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The next link another node begins; `None` when the port is closed. Its handshake is still to be done.
    pub async fn accept(&self) -> Option<Incoming> {
        let over_tcp = async {
            match &self.tcp {
                Some(port) => port.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            incoming = self.endpoint.accept() => incoming.map(|i| Incoming(Came::Quic(Box::new(i)))),
            incoming = over_tcp => incoming.map(|i| Incoming(Came::Tcp(i))),
        }
    }

    /// Begins a link with the node at `authority` (`host:port`), over QUIC or, where it does not answer, TCP. It speaks
    /// [`LINK_ALPN`] unless `tls` says something else.
    ///
    /// # Errors
    /// [`TransportError::Dial`] when nobody answers there, or not who was expected.
    pub async fn dial(
        &self,
        authority: &http::uri::Authority,
        tls: rustls::ClientConfig,
    ) -> Result<Link, TransportError> {
        self.race(authority, tls, None).await
    }

    /// As [`Self::dial`], over one transport.
    ///
    /// # Errors
    /// As [`Self::dial`].
    pub async fn dial_over(
        &self,
        authority: &http::uri::Authority,
        tls: rustls::ClientConfig,
        transport: LinkTransport,
    ) -> Result<Link, TransportError> {
        self.race(authority, tls, Some(transport)).await
    }

    async fn race(
        &self,
        authority: &http::uri::Authority,
        mut tls: rustls::ClientConfig,
        only: Option<LinkTransport>,
    ) -> Result<Link, TransportError> {
        if tls.alpn_protocols.is_empty() {
            tls.alpn_protocols = vec![LINK_ALPN.to_vec()];
        }
        race::within(authority, async {
            race::Race::new(self, authority, tls).await?.run(only).await
        })
        .await
    }

    /// Closes every link and waits until the other ends can know, at most a second.
    pub async fn close(&self) {
        self.endpoint.close(0u32.into(), b"stopped");
        let over = async { tokio::join!(self.endpoint.wait_idle(), self.drivers.close()) };
        drop(tokio::time::timeout(Duration::from_secs(1), over).await);
    }
}

/// A link another node wants to begin.
#[derive(Debug)]
pub struct Incoming(Came);

#[derive(Debug)]
enum Came {
    Quic(Box<quinn::Incoming>),
    Tcp(tcp::TcpIncoming),
}

impl Incoming {
    /// Where it comes from.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        match &self.0 {
            Came::Quic(incoming) => incoming.remote_address(),
            Came::Tcp(incoming) => incoming.remote,
        }
    }

    /// Turns it down.
    pub fn refuse(self) {
        match self.0 {
            Came::Quic(incoming) => incoming.refuse(),
            Came::Tcp(incoming) => drop(incoming),
        }
    }

    /// Asks the other end to prove its address first, if it has not; else gives itself back. TCP has proved it.
    #[must_use]
    pub fn proved(self) -> Option<Self> {
        match self.0 {
            Came::Quic(incoming) => incoming
                .retry()
                .err()
                .map(|error| Self(Came::Quic(Box::new(error.into_incoming())))),
            Came::Tcp(_) => Some(self),
        }
    }

    /// Does the handshake. Over TCP whoever wants a link and shows no certificate is refused here; over QUIC it is the
    /// caller who must look.
    ///
    /// # Errors
    /// [`NoLink`] when it fails or takes too long.
    pub async fn accept(self) -> Result<Link, NoLink> {
        match self.0 {
            Came::Quic(incoming) => quic::accept(*incoming).await.map(Link::quic),
            Came::Tcp(incoming) => incoming.accept().await.map(Link::tcp),
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

impl NoLink {
    /// The other end or the network failed.
    fn failed(why: impl fmt::Display) -> Self {
        Self { why: why.to_string(), is_refusal: false }
    }
}

/// A link with another node. Cloneable; it is closed when the last clone is gone.
#[derive(Clone, Debug)]
pub struct Link(Way);

#[derive(Clone, Debug)]
enum Way {
    Quic(quic::QuicLink),
    Tcp(Arc<tcp::TcpLink>),
}

impl Link {
    fn quic(link: quic::QuicLink) -> Self {
        Self(Way::Quic(link))
    }

    fn tcp(link: tcp::TcpLink) -> Self {
        Self(Way::Tcp(Arc::new(link)))
    }

    /// What it runs over.
    #[must_use]
    pub fn transport(&self) -> LinkTransport {
        match &self.0 {
            Way::Quic(_) => LinkTransport::Quic,
            Way::Tcp(_) => LinkTransport::Tcp,
        }
    }

    /// The certificates of the other end, its own first.
    #[must_use]
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        match &self.0 {
            Way::Quic(link) => endpoints::certificates(&link.connection),
            Way::Tcp(link) => link.certificates.clone(),
        }
    }

    /// What both ends speak: by ALPN over QUIC, by path over TCP.
    #[must_use]
    pub fn protocol(&self) -> Vec<u8> {
        match &self.0 {
            Way::Quic(link) => link.protocol(),
            Way::Tcp(link) => link.protocol.clone(),
        }
    }

    /// The address of the other end.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        match &self.0 {
            Way::Quic(link) => link.remote(),
            Way::Tcp(link) => link.remote,
        }
    }

    /// How long a frame takes there and back.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        match &self.0 {
            Way::Quic(link) => link.connection.rtt(),
            Way::Tcp(link) => link.pipe.rtt(),
        }
    }

    /// Sends a frame that may be lost. Over QUIC one too long for a datagram goes as a stream; over TCP it is dropped when
    /// too much waits to be written already.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone.
    pub async fn send(&self, frame: Bytes) -> Result<(), TransportError> {
        match &self.0 {
            Way::Quic(link) => done(UNREAD, link.send(frame)).await,
            Way::Tcp(link) => link.pipe.offer(&frame),
        }
    }

    /// Sends a frame that arrives.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone or the other end does not read.
    pub async fn send_whole(&self, frame: Bytes) -> Result<(), TransportError> {
        match &self.0 {
            Way::Quic(link) => done(UNREAD, link.send_whole(frame)).await,
            Way::Tcp(link) => done(UNREAD, link.pipe.push(&frame)).await,
        }
    }

    /// The next frame, whichever way it comes. May be given up at any time: nothing is lost.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone, or the other end begins a frame and does not end it;
    /// [`TransportError::BadFrame`] when what it sends is none, which over TCP whoever sends may hear as well.
    pub async fn receive(&self) -> Result<Bytes, TransportError> {
        match &self.0 {
            Way::Quic(link) => link.receive().await,
            Way::Tcp(link) => link.pipe.receive().await,
        }
    }

    /// The next frame that arrives for certain; those that may be lost wait. Over TCP every frame that comes does. May be
    /// given up at any time: nothing is lost.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub async fn receive_whole(&self) -> Result<Bytes, TransportError> {
        match &self.0 {
            Way::Quic(link) => link.receive_whole().await,
            Way::Tcp(link) => link.pipe.receive().await,
        }
    }

    /// Asks the other end one question, and waits for its answer.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the link is gone, the answer is too long or does not come.
    pub async fn ask(&self, question: Bytes) -> Result<Bytes, TransportError> {
        let asking = async {
            match &self.0 {
                Way::Quic(link) => link.ask(question).await,
                Way::Tcp(link) => {
                    link.pipe.push(&question).await?;
                    let answer = link.pipe.receive().await;
                    // That is how the other end knows that we have it.
                    link.pipe.finish();
                    answer
                }
            }
        };
        done("no answer in time", asking).await
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
        let asked = async {
            match &self.0 {
                Way::Quic(link) => {
                    let (question, send) = link.asked(bytes_max).await?;
                    Ok((question, Answer(Back::Quic(send))))
                }
                Way::Tcp(link) => match link.pipe.receive().await? {
                    question if question.len() > bytes_max => Err(closed("it asks too much")),
                    question => Ok((question, Answer(Back::Tcp(link.clone())))),
                },
            }
        };
        let late = |_| Err(closed("nothing was asked in time"));
        tokio::time::timeout(within, asked).await.unwrap_or_else(late)
    }

    /// Closes the link and says why.
    pub fn close(&self, reason: &str) {
        match &self.0 {
            Way::Quic(link) => link.close(reason),
            Way::Tcp(link) => link.close(reason),
        }
    }

    /// Resolves when the link is gone, with the reason.
    pub async fn closed(&self) -> String {
        match &self.0 {
            Way::Quic(link) => link.connection.closed().await.to_string(),
            Way::Tcp(link) => link.pipe.ended().await.why,
        }
    }
}

/// The way back to whoever asked.
#[derive(Debug)]
pub struct Answer(Back);

#[derive(Debug)]
enum Back {
    Quic(quinn::SendStream),
    Tcp(Arc<tcp::TcpLink>),
}

impl Answer {
    /// Sends the answer, and waits until the other end has it.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when the other end is gone or does not read.
    pub async fn send(self, answer: Bytes) -> Result<(), TransportError> {
        let sending = async {
            match self.0 {
                Back::Quic(mut send) => quic::answer(&mut send, answer).await,
                Back::Tcp(link) => {
                    link.pipe.push(&answer).await?;
                    let end = link.pipe.ended().await;
                    if end.is_done { Ok(()) } else { Err(closed(end.why)) }
                }
            }
        };
        done(UNREAD, sending).await
    }
}

/// Within the time everything must be done in; `late` is the reason when it is not.
async fn done<T>(
    late: &str,
    work: impl Future<Output = Result<T, TransportError>>,
) -> Result<T, TransportError> {
    tokio::time::timeout(DONE_WITHIN, work).await.unwrap_or_else(|_| Err(closed(late)))
}

fn closed(why: impl fmt::Display) -> TransportError {
    TransportError::Closed(why.to_string())
}
