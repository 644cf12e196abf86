//! The dialling end of links over TCP.

use std::{net::SocketAddr, sync::Arc};

use base::clock;
use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode, uri::Authority};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

use super::{
    Drivers, H2, HEADER_BYTES_MAX, PIECES_BUDGET, SEND_BYTES_MAX, TcpLink, Unstarted, WINDOW_BYTES,
    certificates, path, tune,
};
use crate::{
    dial,
    link::connection::{Connection, Heard},
};

/// Whom to dial, and how.
#[derive(Clone, Debug)]
pub(in crate::link) struct TcpDial {
    tls: Arc<rustls::ClientConfig>,
    authority: Authority,
    protocol: Vec<u8>,
    path: String,
    drivers: Drivers,
}

impl TcpDial {
    /// To speak `protocol` with the node at `authority`.
    pub(in crate::link) fn new(
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
    pub(in crate::link) async fn dial(self, address: SocketAddr) -> Result<TcpLink, String> {
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
