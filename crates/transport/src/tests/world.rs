//! A world for tests: real sockets on loopback, one server, one pool, all in one runtime.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body as _, Frame};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};

use crate::{
    Channel, Dialer, Lessor, Limits, Listener, PeerTls, Pool, QuicKeys, Server, ServerTls, Target,
    Via, Worker,
};

/// Long enough for a loaded machine; a test that waits so long has failed.
pub(super) const LONG: Duration = Duration::from_secs(20);

type Reply = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// The handler of a test server.
#[derive(Clone)]
pub(super) struct Handler(Arc<dyn Fn(Request<Body>) -> Reply + Send + Sync>);

impl Handler {
    pub(super) fn new<F>(handle: impl Fn(Request<Body>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self(Arc::new(move |request| {
            let reply = handle(request);
            Box::pin(async move { Ok(reply.await) })
        }))
    }
}

impl tower::Service<Request<Body>> for Handler {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Reply;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Reply {
        (self.0)(request)
    }
}

/// Which way calls go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    H3,
    H2,
    H2c,
}

pub(super) const WAYS: [Way; 3] = [Way::H3, Way::H2, Way::H2c];

/// A server and a pool that calls it.
pub(super) struct World {
    pub(super) address: SocketAddr,
    pub(super) pool: Pool,
    pub(super) server: Worker,
    pub(super) client: Worker,
    certificate: CertificateDer<'static>,
    way: Way,
}

pub(super) fn worker() -> Worker {
    Worker::new(0, 1, CancellationToken::new(), CancellationToken::new())
}

impl World {
    pub(super) fn new(way: Way, handler: Handler) -> Self {
        Self::with(way, Limits::clients(), Limits::peers(), handler)
    }

    /// A server whose connections are leased.
    pub(super) fn leasing(
        way: Way,
        serving: Limits,
        handler: Handler,
        lessor: Arc<dyn Lessor>,
    ) -> Self {
        Self::made(way, serving, Limits::peers(), handler, Some(lessor))
    }

    pub(super) fn with(way: Way, serving: Limits, calling: Limits, handler: Handler) -> Self {
        Self::made(way, serving, calling, handler, None)
    }

    fn made(
        way: Way,
        serving: Limits,
        calling: Limits,
        handler: Handler,
        lessor: Option<Arc<dyn Lessor>>,
    ) -> Self {
        let certified =
            rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".into()])
                .unwrap();
        let certificate = certified.cert.der().clone();
        let key = PrivateKeyDer::Pkcs8(certified.signing_key.serialize_der().into());
        let tls = match way {
            Way::H2c => ServerTls::Plaintext,
            Way::H2 | Way::H3 => ServerTls::Tls(Box::new(server_tls(certificate.clone(), key))),
        };
        let mut listener =
            Listener::bind((Ipv4Addr::LOCALHOST, 0).into(), 1, way == Way::H3).unwrap();
        let address = listener.address();
        let (server, client) = (worker(), worker());
        let port = listener.port(0).unwrap();
        let serve = Server::new(serving, tls, QuicKeys::random(), handler, 1);
        let serve = match lessor {
            Some(lessor) => serve.with_lessor(lessor),
            None => serve,
        };
        let on = server.clone();
        server.tasks.spawn(async move { serve.serve(on, port).await.unwrap() });
        let drain = server.drain.clone();
        server.tasks.spawn(async move { listener.accept(drain).await.unwrap() });
        let pool = Pool::new(Dialer::new(&client, &QuicKeys::random(), calling).unwrap());
        Self { address, pool, server, client, certificate, way }
    }

    pub(super) fn target(&self, name: &str) -> Target {
        let authority = self.address.to_string().parse().unwrap();
        match self.way {
            Way::H2c => Target::plaintext(name, authority),
            Way::H2 | Way::H3 => Target::peer(name, authority, PeerTls::new(self.client_tls())),
        }
    }

    /// The server, called over leased connections.
    pub(super) fn leased(&self, name: &str, lessor: Arc<dyn Lessor>) -> Target {
        let authority = self.address.to_string().parse().unwrap();
        let via = if self.way == Way::H2 { Via::H2 } else { Via::H3 };
        Target::server(name, authority, PeerTls::leased(self.client_tls(), lessor), via, None)
    }

    /// A server at `address`, called as this one would be.
    pub(super) fn at(&self, name: &str, address: SocketAddr) -> Target {
        let via = if self.way == Way::H2 { Via::H2 } else { Via::H3 };
        let tls = PeerTls::new(self.client_tls());
        Target::server(name, address.to_string().parse().unwrap(), tls, via, None)
    }

    pub(super) fn channel(&self) -> Channel {
        self.pool.channel(self.target("server"))
    }

    pub(super) fn client_tls(&self) -> rustls::ClientConfig {
        client_tls(self.certificate.clone())
    }

    /// A bare QUIC connection to the server, for peers that break rules.
    pub(super) async fn raw(&self) -> quinn::Connection {
        let endpoint = crate::quic::dialing_endpoint(&QuicKeys::random(), 9).unwrap();
        let config = crate::quic::client_config(self.client_tls(), &Limits::peers()).unwrap();
        let connection =
            endpoint.connect_with(config, self.address, "localhost").unwrap().await.unwrap();
        // The endpoint lives as long as something of it is in use.
        self.client.tasks.spawn(async move { endpoint.wait_idle().await });
        connection
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A QUIC server that nothing of ours serves, and TLS to call it with.
pub(super) fn bare_server() -> (quinn::Endpoint, PeerTls) {
    let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let certificate = certified.cert.der().clone();
    let key = PrivateKeyDer::Pkcs8(certified.signing_key.serialize_der().into());
    let tls = server_tls(certificate.clone(), key);
    let config = crate::quic::server_config(tls, &Limits::peers()).unwrap();
    let (socket, _) = crate::bind_udp((Ipv4Addr::LOCALHOST, 0).into(), false).unwrap();
    let endpoint = crate::quic::endpoint(&QuicKeys::random(), 0, Some(config), socket).unwrap();
    (endpoint, PeerTls::new(client_tls(certificate)))
}

fn client_tls(certificate: CertificateDer<'static>) -> rustls::ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

fn server_tls(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> rustls::ServerConfig {
    rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap()
}

/// A body fed by a channel, so that a test decides when each piece comes.
pub(super) struct Fed(mpsc::Receiver<Result<Frame<Bytes>, Status>>);

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0.poll_recv(cx)
    }
}

pub(super) type Feed = mpsc::Sender<Result<Frame<Bytes>, Status>>;

pub(super) fn fed() -> (Feed, Body) {
    let (feed, frames) = mpsc::channel(1);
    (feed, Body::new(Fed(frames)))
}

pub(super) fn request(path: &str, body: Body) -> Request<Body> {
    Request::builder()
        .method("POST")
        .uri(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap()
}

pub(super) fn full(data: impl Into<Bytes>) -> Body {
    Body::new(http_body_util::Full::new(data.into()))
}

/// Data and trailers of a whole body.
pub(super) async fn collect(mut body: Body) -> Result<(Vec<u8>, HeaderMap), Status> {
    let (mut data, mut trailers) = (Vec::new(), HeaderMap::new());
    while let Some(frame) = next(&mut body).await {
        match frame?.into_data() {
            Ok(piece) => data.extend_from_slice(&piece),
            Err(frame) => trailers = frame.into_trailers().unwrap(),
        }
    }
    Ok((data, trailers))
}

/// The next frame, within [`LONG`].
pub(super) async fn next(body: &mut Body) -> Option<Result<Frame<Bytes>, Status>> {
    soon(std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx))).await
}

/// A future that must be done within [`LONG`].
pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("it takes too long")
}

/// Echoes the request's body and ends with `grpc-status: 0`.
pub(super) fn echo() -> Handler {
    Handler::new(|request| async move {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let body = http_body_util::BodyExt::with_trailers(request.into_body(), async move {
            Some(Ok(trailers))
        });
        Response::builder()
            .header("content-type", "application/grpc")
            .body(Body::new(body))
            .unwrap()
    })
}

/// Resolves when dropped: shows that a handler, or a body, is gone.
pub(super) struct Gone(pub(super) mpsc::Sender<()>);

impl Drop for Gone {
    fn drop(&mut self) {
        // Nobody listens any more: then nobody waits for it.
        let _unheard = self.0.try_send(());
    }
}
