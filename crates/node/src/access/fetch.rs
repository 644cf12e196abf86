//! Reading the keys of an issuer: a file, or one GET over HTTP/1.1 on a connection of its own.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::rt::{Read, Write};
use hyper_util::rt::TokioIo;
use identity::IdentityError;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::config::JwksSource;

/// Longest key set.
const BYTES_MAX: usize = 1 << 20;
/// A reading takes no longer.
const WITHIN: Duration = Duration::from_secs(5);

/// Reads keys. Cloneable.
#[derive(Clone)]
pub(super) struct Fetch {
    tls: Option<TlsConnector>,
}

impl std::fmt::Debug for Fetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetch").field("tls", &self.tls.is_some()).finish()
    }
}

impl Fetch {
    /// `over_https`: with the roots this machine believes.
    pub(super) fn new(over_https: bool) -> Result<Self, IdentityError> {
        let tls = if over_https {
            let config = identity::client_config(None, None)?;
            Some(TlsConnector::from(Arc::new(config)))
        } else {
            None
        };
        Ok(Self { tls })
    }

    /// The text of a key set, or why there is none.
    pub(super) async fn read(&self, source: &JwksSource) -> Result<Bytes, String> {
        let reading = async {
            match source {
                JwksSource::Url(url) => self.get(url).await,
                JwksSource::File(path) => {
                    let path = path.clone();
                    let read = tokio::task::spawn_blocking(move || std::fs::read(path)).await;
                    let text = read.map_err(|error| error.to_string())?;
                    text.map(Bytes::from).map_err(|error| error.to_string())
                }
            }
        };
        tokio::time::timeout(WITHIN, reading)
            .await
            .unwrap_or_else(|_| Err(format!("it took longer than {WITHIN:?}")))
    }

    async fn get(&self, url: &Uri) -> Result<Bytes, String> {
        let host = url.host().unwrap_or_default();
        let is_https = url.scheme_str() == Some("https");
        let port = url.port_u16().unwrap_or(if is_https { 443 } else { 80 });
        let address = host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((address, port)).await.map_err(|e| e.to_string())?;
        if !is_https {
            return exchange(TokioIo::new(stream), url).await;
        }
        let tls = self.tls.as_ref().ok_or("there is no TLS for it")?;
        let name = ServerName::try_from(address.to_owned()).map_err(|error| error.to_string())?;
        let stream = tls.connect(name, stream).await.map_err(|error| error.to_string())?;
        exchange(TokioIo::new(stream), url).await
    }
}

/// One GET; redirects are not followed.
async fn exchange(
    stream: impl Read + Write + Unpin + Send + 'static,
    url: &Uri,
) -> Result<Bytes, String> {
    let handshake = hyper::client::conn::http1::handshake(stream).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    let host = url.authority().map_or("", |authority| authority.as_str());
    let request = Request::get(url.path_and_query().map_or("/", |path| path.as_str()))
        .header(header::HOST, host)
        .header(header::ACCEPT, "application/json")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let answer = async move {
        let reply = sender.send_request(request).await.map_err(|error| error.to_string())?;
        if reply.status() != StatusCode::OK {
            return Err(format!("HTTP status {}", reply.status()));
        }
        let body = Limited::new(reply.into_body(), BYTES_MAX).collect().await;
        body.map(|body| body.to_bytes()).map_err(|error| error.to_string())
    };
    // The connection carries the answer, and is over when the sender is dropped with it.
    let (answer, _) = futures_util::future::join(answer, connection).await;
    answer
}
