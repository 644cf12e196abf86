//! Links where UDP is blocked: the same frames over one HTTP/2 stream on TCP, with the same TLS at both ends.
//!
//! A connection serves exactly one request, `POST` to the path of a protocol ([`path`]), and that stream is the link. It is
//! HTTP/2 to whatever lies between (ALPN `h2`); which certificate it would be shown the dialler says by offering the link's
//! own protocol beside it, as it does over QUIC.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use base::clock;
use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{Method, Request, Response, StatusCode, uri::Authority};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    DONE_WITHIN, LINK_ALPN, NoLink,
    driver::{Connection, Driver, Heard, Pulse},
    pipe::{End, Parting, Pipe},
};
use crate::{
    dial,
    server::{self, is_refusal},
};

/// Links over TCP that are served or end at the same time; one more is refused. What uses links has closer bounds.
const DRIVERS_MAX: usize = 4096;
/// Bytes the other end may have under way that nobody has read. More than a frame, or none would ever be whole.
const WINDOW_BYTES: u32 = 256 << 10;
/// Bytes that are handed to the connection before they are written.
const SEND_BYTES_MAX: usize = 32 << 10;
/// Bytes of the one request's headers.
const HEADER_BYTES_MAX: u32 = 4 << 10;
/// What small pieces of data cost may be owed so far (`h2`: 256 bytes a piece, less what is in it).
const PIECES_BUDGET: usize = 1 << 20;
/// Streams that are opened in spite of our SETTINGS before the connection is closed.
const REFUSALS_MAX: usize = 8;
/// How long whoever asked for something else may take to read the answer.
const ANSWERED_WITHIN: Duration = Duration::from_secs(1);
const H2: &[u8] = b"h2";

/// The path at which a protocol is spoken; `None`: it is not spoken over TCP.
///
/// `isobar/1`, which is frames both ways, is `/isobar.mesh.v1.Link/Frames`. `isobar-enrol/1`, as every protocol
/// `isobar-WORD/VERSION`, is one question and its answer: `/isobar.mesh.v1.Enrol/Ask`.
pub(super) fn path(protocol: &[u8]) -> Option<String> {
    let (name, version) = std::str::from_utf8(protocol).ok()?.split_once('/')?;
    version.parse::<u16>().ok()?;
    match name.strip_prefix("isobar")? {
        "" => Some(format!("/isobar.mesh.v{version}.Link/Frames")),
        word => {
            let word = word.strip_prefix('-')?;
            let (first, rest) = (word.get(..1)?.to_ascii_uppercase(), word.get(1..)?);
            Some(format!("/isobar.mesh.v{version}.{first}{rest}/Ask"))
        }
    }
}

/// The tasks that drive links. Cloneable.
#[derive(Clone, Debug, Default)]
pub(super) struct Drivers {
    tasks: TaskTracker,
    pub(super) stop: CancellationToken,
}

impl Drivers {
    /// Ends all links and waits until the other ends know.
    pub(super) async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Begins to drive a link.
    fn start(
        &self,
        mut connection: Connection,
        (send, mut body): (SendStream<Bytes>, RecvStream),
        link: Unstarted,
    ) -> Result<TcpLink, String> {
        let ping = connection.ping_pong().ok_or("the connection is in use already")?;
        let pulse = Pulse::new(ping, link.heard);
        let pipe = Arc::new(Pipe::new(body.flow_control().clone(), link.rtt));
        let driver = Driver::new(connection, (send, body), pipe.clone(), pulse);
        self.tasks.spawn(driver.run(self.stop.clone()));
        let Unstarted { protocol, remote, certificates, .. } = link;
        Ok(TcpLink { pipe, protocol, remote, certificates })
    }
}

/// What is known of a link before it is driven.
struct Unstarted {
    heard: Arc<parking_lot::Mutex<std::time::Instant>>,
    rtt: Duration,
    protocol: Vec<u8>,
    remote: SocketAddr,
    certificates: Vec<CertificateDer<'static>>,
}

/// A link over TCP. Whoever drops it closes it.
#[derive(Debug)]
pub(super) struct TcpLink {
    pub(super) pipe: Arc<Pipe>,
    pub(super) protocol: Vec<u8>,
    pub(super) remote: SocketAddr,
    pub(super) certificates: Vec<CertificateDer<'static>>,
}

impl TcpLink {
    /// Closes the link and says why.
    pub(super) fn close(&self, reason: &str) {
        self.pipe.end(End::new("closed", Parting::Say(reason.to_owned())));
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.close("");
    }
}

/// The serving end.
#[derive(Debug)]
pub(super) struct TcpPort {
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    /// What is spoken, and at which path.
    served: Vec<(Vec<u8>, String)>,
    drivers: Drivers,
}

impl TcpPort {
    /// Serves the protocols of `tls`; within a tokio runtime.
    pub(super) fn new(
        listener: std::net::TcpListener,
        mut tls: rustls::ServerConfig,
        drivers: Drivers,
    ) -> std::io::Result<Self> {
        let protocols = std::mem::replace(&mut tls.alpn_protocols, vec![H2.to_vec()]);
        let served = protocols.into_iter().filter_map(|p| path(&p).map(|path| (p, path)));
        let (listener, served) = (TcpListener::from_std(listener)?, served.collect());
        Ok(Self { listener, tls: Arc::new(tls), served, drivers })
    }

    /// The next connection; `None` when the port is closed.
    pub(super) async fn accept(self: &Arc<Self>) -> Option<TcpIncoming> {
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = self.drivers.stop.cancelled() => return None,
            };
            match accepted {
                Ok(_) if self.drivers.tasks.len() >= DRIVERS_MAX => {
                    tracing::debug!("a TCP connection was refused: there are too many links");
                }
                Ok((stream, remote)) => {
                    return Some(TcpIncoming { stream, remote, port: self.clone() });
                }
                Err(error) => {
                    // Out of descriptors, or the peer is gone already. Trying again at once would spin.
                    tracing::warn!(%error, "cannot accept a TCP connection for a link");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }

    /// The protocol of a request.
    fn protocol<B>(&self, request: &Request<B>) -> Option<&[u8]> {
        let path = request.uri().path();
        let served = self.served.iter().find(|(_, served)| served == path);
        served.filter(|_| request.method() == Method::POST).map(|(protocol, _)| protocol.as_slice())
    }
}

/// A connection another node began.
#[derive(Debug)]
pub(super) struct TcpIncoming {
    stream: TcpStream,
    pub(super) remote: SocketAddr,
    port: Arc<TcpPort>,
}

impl TcpIncoming {
    /// Does the handshakes of TLS and HTTP/2, and reads the one request.
    pub(super) async fn accept(self) -> Result<TcpLink, NoLink> {
        match tokio::time::timeout(DONE_WITHIN, self.shake()).await {
            Ok(shaken) => shaken,
            Err(_) => Err(NoLink::failed("the handshake took too long")),
        }
    }

    async fn shake(self) -> Result<TcpLink, NoLink> {
        let Self { stream, remote, port } = self;
        tune(&stream).map_err(NoLink::failed)?;
        let began = clock::now();
        let accepted = TlsAcceptor::from(port.tls.clone()).accept(stream).await;
        let stream = accepted
            .map_err(|error| NoLink { why: error.to_string(), is_refusal: is_refusal(&error) })?;
        // A round trip and some arithmetic.
        let rtt = clock::now().saturating_duration_since(began);
        let stream = TlsStream::from(stream);
        let certificates = certificates(&stream);
        let stream = Heard::new(stream);
        let heard = stream.at();
        let mut connection = builder().handshake(stream).await.map_err(NoLink::failed)?;
        let (request, respond) = match connection.accept().await {
            Some(Ok(asked)) => asked,
            Some(Err(error)) => return Err(NoLink::failed(error)),
            None => return Err(NoLink::failed("it hung up before it asked for anything")),
        };
        let protocol = port.protocol(&request).map(<[u8]>::to_vec);
        let refused = match &protocol {
            None => Some((StatusCode::NOT_FOUND, "it asked for something that is not served here")),
            Some(protocol) if protocol == LINK_ALPN && certificates.is_empty() => {
                Some((StatusCode::FORBIDDEN, "a link needs a certificate, and it showed none"))
            }
            Some(_) => None,
        };
        if let Some((status, why)) = refused {
            turn_away(connection, request, respond, status).await;
            return Err(NoLink {
                why: why.to_owned(),
                is_refusal: status == StatusCode::FORBIDDEN,
            });
        }
        let send = answer(respond).map_err(NoLink::failed)?;
        let protocol = protocol.unwrap_or_default();
        let unstarted = Unstarted { heard, rtt, protocol, remote, certificates };
        let halves = (send, request.into_body());
        let started = port.drivers.start(Connection::Server(connection), halves, unstarted);
        started.map_err(NoLink::failed)
    }
}

fn builder() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(1)
        .max_local_error_reset_streams(Some(REFUSALS_MAX))
        .max_header_list_size(HEADER_BYTES_MAX)
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_send_buffer_size(SEND_BYTES_MAX)
        .data_frame_budget(PIECES_BUDGET);
    builder
}

fn answer(mut respond: SendResponse<Bytes>) -> Result<SendStream<Bytes>, String> {
    let mut response = Response::new(());
    let grpc = http::HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
    respond.send_response(response, false).map_err(|error| error.to_string())
}

/// Answers with `status`, and lets the other end read it.
async fn turn_away(
    mut connection: h2::server::Connection<Heard, Bytes>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    status: StatusCode,
) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    drop(respond.send_response(response, true));
    drop((request, respond));
    connection.graceful_shutdown();
    let over = async { while let Some(Ok(_)) = connection.accept().await {} };
    drop(tokio::time::timeout(ANSWERED_WITHIN, over).await);
}

/// Whom to dial, and how.
#[derive(Clone, Debug)]
pub(super) struct TcpDial {
    tls: Arc<rustls::ClientConfig>,
    authority: Authority,
    protocol: Vec<u8>,
    path: String,
    drivers: Drivers,
}

impl TcpDial {
    /// To speak `protocol` with the node at `authority`.
    pub(super) fn new(
        mut tls: rustls::ClientConfig,
        authority: &Authority,
        protocol: &[u8],
        drivers: Drivers,
    ) -> Result<Self, String> {
        let path = path(protocol).ok_or("its protocol is not spoken over TCP")?;
        tls.alpn_protocols = vec![H2.to_vec(), protocol.to_vec()];
        let (authority, protocol) = (authority.clone(), protocol.to_vec());
        Ok(Self { tls: Arc::new(tls), authority, protocol, path, drivers })
    }

    /// Begins a link with whoever is at `address`.
    pub(super) async fn dial(self, address: SocketAddr) -> Result<TcpLink, String> {
        let began = clock::now();
        let stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
        let rtt = clock::now().saturating_duration_since(began);
        tune(&stream).map_err(|e| e.to_string())?;
        let name = ServerName::try_from(dial::host(&self.authority).to_owned());
        let name = name.map_err(|e| e.to_string())?;
        let connected = TlsConnector::from(self.tls.clone()).connect(name, stream).await;
        let stream = TlsStream::from(connected.map_err(|e| format!("TLS: {e}"))?);
        if stream.get_ref().1.alpn_protocol() != Some(H2) {
            return Err("what answers there does not speak HTTP/2".to_owned());
        }
        let certificates = certificates(&stream);
        let stream = Heard::new(stream);
        let heard = stream.at();
        let (connection, halves) = self.ask(stream).await?;
        let (protocol, remote) = (self.protocol, address);
        let unstarted = Unstarted { heard, rtt, protocol, remote, certificates };
        self.drivers.start(Connection::Client(connection), halves, unstarted)
    }

    /// Opens the one stream.
    async fn ask(&self, stream: Heard) -> Result<Opened, String> {
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .max_header_list_size(HEADER_BYTES_MAX)
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_send_buffer_size(SEND_BYTES_MAX)
            .data_frame_budget(PIECES_BUDGET);
        let shaken = builder.handshake(stream).await.map_err(|e| e.to_string())?;
        let (mut requests, mut connection) = shaken;
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("https://{}{}", self.authority, self.path))
            .header(http::header::CONTENT_TYPE, "application/grpc")
            .header(http::header::TE, "trailers")
            .body(())
            .map_err(|e| e.to_string())?;
        let (mut response, send) =
            requests.send_request(request, false).map_err(|e| e.to_string())?;
        let ended = tokio::select! {
            biased;
            response = &mut response => return opened(response, (connection, send)),
            ended = &mut connection => ended,
        };
        // What it answered before it hung up says more than that it did.
        match (response.await, ended) {
            (Ok(response), _) => Err(format!("it answers {} and hangs up", response.status())),
            (Err(_), Err(error)) | (Err(error), Ok(())) => Err(error.to_string()),
        }
    }
}

/// A stream is a link when the answer says so.
fn opened(
    response: Result<Response<RecvStream>, h2::Error>,
    (connection, send): (h2::client::Connection<Heard, Bytes>, SendStream<Bytes>),
) -> Result<Opened, String> {
    let response = response.map_err(|error| error.to_string())?;
    match response.status() {
        StatusCode::OK => Ok((connection, (send, response.into_body()))),
        status => Err(format!("it answers {status}")),
    }
}

/// A connection with its one stream.
type Opened = (h2::client::Connection<Heard, Bytes>, (SendStream<Bytes>, RecvStream));

/// Listens at `address` beside UDP: port 0 takes any port free for both.
pub(super) fn bind(
    address: SocketAddr,
) -> std::io::Result<(std::net::TcpListener, std::net::UdpSocket)> {
    let attempts = if address.port() == 0 { server::PORT_ATTEMPTS } else { 1 };
    let mut last = std::io::Error::other("no port was tried");
    for _ in 0..attempts {
        let tcp = server::bind_tcp(address)?;
        match crate::bind_udp(tcp.local_addr()?, false) {
            Ok((udp, _)) => return Ok((tcp, udp)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    {
        let socket = socket2::SockRef::from(stream);
        // What the other end does not acknowledge is given up, also when the link is over here.
        socket.set_tcp_user_timeout(Some(DONE_WITHIN))?;
        // What waits is to wait where it can be counted, and dropped.
        socket.set_tcp_notsent_lowat(WINDOW_BYTES / 4)?;
    }
    Ok(())
}

fn certificates(stream: &TlsStream<TcpStream>) -> Vec<CertificateDer<'static>> {
    let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
    shown.iter().cloned().map(CertificateDer::into_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_has_a_path() {
        for (protocol, expected) in [
            ("isobar/1", Some("/isobar.mesh.v1.Link/Frames")),
            ("isobar-enrol/1", Some("/isobar.mesh.v1.Enrol/Ask")),
            ("isobar-enrol/x", None),
            ("isobar-/1", None),
            ("isobars/1", None),
            ("h2", None),
        ] {
            assert_eq!(path(protocol.as_bytes()).as_deref(), expected, "{protocol}");
        }
    }
}
