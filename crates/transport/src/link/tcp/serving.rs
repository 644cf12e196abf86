//! The serving end of links over TCP: handshakes, and the one request of a connection.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use base::clock;
use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{Method, Request, Response, StatusCode};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsStream};

use super::{
    Drivers, H2, HEADER_BYTES_MAX, PIECES_BUDGET, SEND_BYTES_MAX, TcpLink, Unstarted, WINDOW_BYTES,
    certificates, path, tune,
};
use crate::{
    link::{
        DONE_WITHIN, LINK_ALPN, NoLink,
        connection::{Connection, Heard},
    },
    server::{self, is_refusal},
};

/// Links over TCP that are served or end at the same time; one more is refused. What uses links has closer bounds.
const DRIVERS_MAX: usize = 4096;
/// Streams that are opened in spite of our SETTINGS before the connection is closed.
const REFUSALS_MAX: usize = 8;
/// How long whoever asked for something else may take to read the answer.
const ANSWERED_WITHIN: Duration = Duration::from_secs(1);

/// The serving end.
#[derive(Debug)]
pub(in crate::link) struct TcpPort {
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    /// What is spoken, and at which path.
    served: Vec<(Vec<u8>, String)>,
    drivers: Drivers,
}

impl TcpPort {
    /// Serves the protocols of `tls`; within a tokio runtime.
    pub(in crate::link) fn new(
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
    pub(in crate::link) async fn accept(self: &Arc<Self>) -> Option<TcpIncoming> {
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
pub(in crate::link) struct TcpIncoming {
    stream: TcpStream,
    pub(in crate::link) remote: SocketAddr,
    port: Arc<TcpPort>,
}

impl TcpIncoming {
    /// Does the handshakes of TLS and HTTP/2, and reads the one request.
    pub(in crate::link) async fn accept(self) -> Result<TcpLink, NoLink> {
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

/// Listens at `address` beside UDP: port 0 takes any port free for both.
pub(in crate::link) fn bind(
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
