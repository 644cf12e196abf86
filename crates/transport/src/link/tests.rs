//! Links over real sockets, on both transports.
#![expect(
    clippy::disallowed_methods,
    reason = "a test's runtime ends with the test, and its tasks with it"
)]

mod hostile;

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, AtomicU16, Ordering},
    time::Instant,
};

use base::clock;
use http::{Request, uri::Authority};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    RootCertStore,
    pki_types::{PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
};
use tokio_rustls::TlsConnector;

use super::*;

/// Long enough for a loaded machine; a test that waits so long has failed.
const LONG: Duration = Duration::from_secs(20);
const ENROL: &[u8] = b"isobar-enrol/1";
const BOTH: [LinkTransport; 2] = [LinkTransport::Quic, LinkTransport::Tcp];

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("it takes too long")
}

/// An authority, and two ends it certified.
struct World {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl World {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), root }
    }

    fn certified(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let params = CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        (vec![certificate], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        roots
    }

    /// Asks for a certificate; whoever has none is let in all the same, as an authority lets in who joins.
    fn server_tls(&self) -> rustls::ServerConfig {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots().into(), provider())
            .allow_unauthenticated()
            .build()
            .unwrap();
        let (chain, key) = self.certified();
        let mut tls = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        tls.alpn_protocols = vec![LINK_ALPN.to_vec(), ENROL.to_vec()];
        tls
    }

    fn client_tls(&self) -> rustls::ClientConfig {
        let (chain, key) = self.certified();
        self.believing().with_client_auth_cert(chain, key).unwrap()
    }

    fn stranger_tls(&self, protocol: &[u8]) -> rustls::ClientConfig {
        let mut tls = self.believing().with_no_client_auth();
        tls.alpn_protocols = vec![protocol.to_vec()];
        tls
    }

    fn believing(
        &self,
    ) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
        rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(self.roots())
    }

    fn serving(&self) -> (Links, Authority) {
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let links = Links::bind(address, self.server_tls(), &QuicKeys::random()).unwrap();
        let authority = links.address().unwrap().to_string().parse().unwrap();
        (links, authority)
    }

    /// Both ends of a link: who dialled, who accepted.
    async fn linked(&self, transport: LinkTransport) -> Pair {
        let (links, authority) = self.serving();
        let dialling = Links::dialing(&QuicKeys::random()).unwrap();
        let dialled = dialling.dial_over(&authority, self.client_tls(), transport);
        let accepted = async { links.accept().await.unwrap().accept().await };
        let (dialled, accepted) = soon(async { tokio::join!(dialled, accepted) }).await;
        Pair { a: dialled.unwrap(), b: accepted.unwrap(), _links: (dialling, links) }
    }

    /// A bare HTTP/2 connection to the port, for peers that break rules.
    async fn raw(&self, to: &Authority, tls: rustls::ClientConfig) -> Raw {
        let mut stream = self.raw_tls(to, tls).await.unwrap();
        stream.flush().await.unwrap();
        let (requests, connection) = h2::client::handshake(stream).await.unwrap();
        let over = tokio::spawn(async move { connection.await.map_err(|e| e.to_string()) });
        Raw { requests: requests.ready().await.unwrap(), over }
    }

    async fn raw_tls(
        &self,
        to: &Authority,
        mut tls: rustls::ClientConfig,
    ) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(to.as_str()).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        TlsConnector::from(Arc::new(tls)).connect(name, stream).await
    }
}

struct Raw {
    requests: h2::client::SendRequest<Bytes>,
    over: tokio::task::JoinHandle<Result<(), String>>,
}

impl Raw {
    /// Asks for `path`; the status, and the stream.
    async fn post(&mut self, path: &str) -> (u16, h2::SendStream<Bytes>, h2::RecvStream) {
        let uri = format!("https://127.0.0.1{path}");
        let request = Request::post(uri).body(()).unwrap();
        let (response, send) = self.requests.send_request(request, false).unwrap();
        let response = soon(response).await.unwrap();
        (response.status().as_u16(), send, response.into_body())
    }
}

struct Pair {
    /// Who dialled.
    a: Link,
    /// Who accepted.
    b: Link,
    _links: (Links, Links),
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn frame(fill: u8, bytes: usize) -> Bytes {
    vec![fill; bytes].into()
}

#[tokio::test]
async fn frames_go_both_ways() {
    let world = World::new();
    for transport in BOTH {
        let Pair { a, b, .. } = world.linked(transport).await;
        for (from, to) in [(&a, &b), (&b, &a)] {
            assert_eq!(from.transport(), transport);
            assert_eq!(from.protocol(), LINK_ALPN);
            assert_eq!(from.certificates().len(), 1, "{transport}");
            for bytes in [0, 1, 1000, 5000, 65_536] {
                from.send(frame(3, bytes)).await.unwrap();
                assert!(
                    soon(to.receive()).await.unwrap() == frame(3, bytes),
                    "{transport} {bytes}"
                );
                from.send_whole(frame(4, bytes)).await.unwrap();
                assert!(soon(to.receive_whole()).await.unwrap() == frame(4, bytes));
            }
            assert!(from.rtt() < Duration::from_secs(1), "{:?}", from.rtt());
        }
        assert_eq!(a.remote().ip().to_canonical(), b.remote().ip().to_canonical());
    }
}

#[tokio::test]
async fn many_long_frames_arrive_in_a_row_although_the_reader_is_late() {
    let world = World::new();
    for transport in BOTH {
        let Pair { a, b, .. } = world.linked(transport).await;
        let sending = async {
            for number in 0..100u8 {
                a.send_whole(frame(number, FRAME_BYTES_MAX)).await.unwrap();
            }
        };
        let receiving = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let mut came = Vec::new();
            while came.len() < 100 {
                // Whoever gives up reading loses nothing.
                let received = tokio::time::timeout(Duration::from_micros(300), b.receive()).await;
                let Ok(received) = received else { continue };
                let received = received.unwrap();
                assert_eq!(received.len(), FRAME_BYTES_MAX);
                came.push(received[0]);
            }
            // Over QUIC each is a stream of its own.
            if transport == LinkTransport::Quic {
                came.sort_unstable();
            }
            assert!(came.into_iter().eq(0..100), "{transport}");
        };
        soon(async { tokio::join!(sending, receiving) }).await;
    }
}

#[tokio::test]
async fn datagrams_between_do_not_cost_a_whole_frame() {
    let world = World::new();
    for transport in BOTH {
        let Pair { a, b, .. } = world.linked(transport).await;
        let sending = async {
            for number in 0..20u8 {
                a.send_whole(frame(number, 60_000)).await.unwrap();
                for _ in 0..20 {
                    a.send(frame(0, 100)).await.unwrap();
                }
            }
        };
        let receiving = async {
            let mut whole = 0;
            while whole < 20 {
                whole += usize::from(b.receive().await.unwrap().len() == 60_000);
            }
        };
        soon(async { tokio::join!(sending, receiving) }).await;
    }
}

#[tokio::test]
async fn a_question_has_an_answer_also_without_a_certificate() {
    let world = World::new();
    for transport in BOTH {
        let (links, authority) = world.serving();
        let dialling = Links::dialing(&QuicKeys::random()).unwrap();
        let asking = async {
            let tls = world.stranger_tls(ENROL);
            let link = dialling.dial_over(&authority, tls, transport).await.unwrap();
            let answer = link.ask(frame(1, 500)).await.unwrap();
            link.close("done");
            answer
        };
        let answering = async {
            let link = links.accept().await.unwrap().accept().await.unwrap();
            assert_eq!(link.protocol(), ENROL);
            assert!(link.certificates().is_empty());
            let (question, answer) = link.asked(1000, LONG).await.unwrap();
            assert_eq!(question, frame(1, 500));
            let sent = answer.send(frame(2, 60_000)).await;
            assert!(sent.is_ok(), "{transport} {sent:?}");
        };
        let (answer, ()) = soon(async { tokio::join!(asking, answering) }).await;
        assert_eq!(answer, frame(2, 60_000));
    }
}

#[tokio::test]
async fn an_answer_nobody_takes_and_a_question_that_is_too_long_are_errors() {
    let world = World::new();
    for transport in BOTH {
        let (links, authority) = world.serving();
        let dialling = Links::dialing(&QuicKeys::random()).unwrap();
        for (bytes_max, says) in [(1000, "hung up"), (10, "")] {
            let asking = async {
                let tls = world.stranger_tls(ENROL);
                let link = dialling.dial_over(&authority, tls, transport).await.unwrap();
                let hurried = Duration::from_millis(100);
                let _unanswered = tokio::time::timeout(hurried, link.ask(frame(1, 500))).await;
                link.close("hung up");
                soon(link.closed()).await;
            };
            let answering = async {
                let link = links.accept().await.unwrap().accept().await.unwrap();
                match link.asked(bytes_max, LONG).await {
                    Ok((_, answer)) => {
                        soon(link.closed()).await;
                        answer.send(frame(2, 10)).await.unwrap_err()
                    }
                    Err(error) => error,
                }
            };
            let ((), error) = soon(async { tokio::join!(asking, answering) }).await;
            let says = if transport == LinkTransport::Tcp { says } else { "ended" };
            assert!(error.to_string().contains(says), "{transport} {error}");
        }
    }
}

#[tokio::test]
async fn the_reason_of_a_close_reaches_the_other_end() {
    let world = World::new();
    for transport in BOTH {
        for dialler_closes in [true, false] {
            let Pair { a, b, _links } = world.linked(transport).await;
            let (closing, other) = if dialler_closes { (a, b) } else { (b, a) };
            other.send_whole(frame(1, 60_000)).await.unwrap();
            closing.close("seen enough: \u{e4}\n");
            let why = soon(other.closed()).await;
            assert!(why.contains("closed by peer: seen enough"), "{transport} {why}");
            assert_eq!(soon(closing.closed()).await, "closed");
            assert!(soon(other.receive()).await.is_err());
            assert!(soon(other.send(frame(1, 1))).await.is_err());
            assert!(soon(closing.send_whole(frame(1, 1))).await.is_err());
        }
    }
}

#[tokio::test]
async fn what_was_sent_before_a_close_is_still_read_over_tcp() {
    let world = World::new();
    let Pair { a, b, .. } = world.linked(LinkTransport::Tcp).await;
    for number in 0..10 {
        a.send_whole(frame(number, 10_000)).await.unwrap();
    }
    a.close("that was all");
    for number in 0..10 {
        assert!(soon(b.receive()).await.unwrap() == frame(number, 10_000));
    }
    assert!(soon(b.receive()).await.unwrap_err().to_string().contains("that was all"));
}

#[tokio::test]
async fn a_link_nobody_holds_and_a_port_that_closes_end_at_the_other_end() {
    let world = World::new();
    for transport in BOTH {
        let Pair { a, b, _links } = world.linked(transport).await;
        drop(a);
        soon(b.closed()).await;
        let Pair { a, b, _links: (_dialling, links) } = world.linked(transport).await;
        soon(links.close()).await;
        assert!(soon(a.closed()).await.contains("stopped"), "{transport}");
        soon(b.closed()).await;
        assert!(soon(links.accept()).await.is_none());
    }
}

/// Hands datagrams on both ways, or eats them.
async fn udp_proxy(server: SocketAddr) -> (Authority, Arc<AtomicBool>) {
    let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let authority = front.local_addr().unwrap().to_string().parse().unwrap();
    let (is_on, client) = (Arc::new(AtomicBool::new(true)), AtomicU16::new(0));
    let on = is_on.clone();
    tokio::spawn(async move {
        let (mut there, mut here) = ([0; 2048], [0; 2048]);
        loop {
            tokio::select! {
                Ok((bytes, from)) = front.recv_from(&mut there) => {
                    client.store(from.port(), Ordering::Relaxed);
                    if on.load(Ordering::Relaxed) {
                        let _lost = back.send_to(&there[..bytes], server).await;
                    }
                }
                Ok((bytes, _)) = back.recv_from(&mut here) => {
                    let to = (Ipv4Addr::LOCALHOST, client.load(Ordering::Relaxed));
                    if on.load(Ordering::Relaxed) {
                        let _lost = front.send_to(&here[..bytes], to).await;
                    }
                }
            }
        }
    });
    (authority, is_on)
}

/// Hands bytes on both ways, or holds them.
fn tcp_proxy(front: TcpListener, server: SocketAddr) -> Arc<AtomicBool> {
    let is_on = Arc::new(AtomicBool::new(true));
    let on = is_on.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = front.accept().await {
            let back = TcpStream::connect(server).await.unwrap();
            let (client, back) = (client.into_split(), back.into_split());
            for (mut from, mut to) in [(client.0, back.1), (back.0, client.1)] {
                let on = on.clone();
                tokio::spawn(async move {
                    let mut bytes = [0; 4096];
                    while let Ok(read @ 1..) = from.read(&mut bytes).await {
                        while !on.load(Ordering::Relaxed) {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                        if to.write_all(&bytes[..read]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
    });
    is_on
}

#[tokio::test]
async fn a_link_whose_other_end_is_silent_is_gone_soon() {
    let world = World::new();
    for transport in BOTH {
        let (links, authority) = world.serving();
        let server = authority.as_str().parse().unwrap();
        let (through, is_on) = match transport {
            LinkTransport::Quic => udp_proxy(server).await,
            LinkTransport::Tcp => {
                let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let through = front.local_addr().unwrap().to_string().parse().unwrap();
                (through, tcp_proxy(front, server))
            }
        };
        let dialling = Links::dialing(&QuicKeys::random()).unwrap();
        let dialled = dialling.dial_over(&through, world.client_tls(), transport);
        let accepted = async { links.accept().await.unwrap().accept().await };
        let (a, b) = soon(async { tokio::join!(dialled, accepted) }).await;
        let (a, b) = (a.unwrap(), b.unwrap());
        // Idle, it lives on.
        let idle = tokio::time::timeout(IDLE * 2, async {
            tokio::select! { why = a.closed() => why, why = b.closed() => why }
        });
        assert!(idle.await.is_err(), "{transport}: a link that is good ended");
        assert!(!a.rtt().is_zero() && !b.rtt().is_zero());
        is_on.store(false, Ordering::Relaxed);
        let began = clock::now();
        for end in [&a, &b] {
            assert_eq!(soon(end.closed()).await, "timed out", "{transport}");
        }
        // A loaded machine may be late, never early.
        let took = clock::now() - began;
        let soonest = IDLE - KEEP_ALIVE - Duration::from_millis(50);
        assert!(took >= soonest, "{transport} {took:?}");
    }
}

/// Eats datagrams at the port of a TCP listener.
async fn deaf_port() -> (TcpListener, UdpSocket) {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
            return (tcp, udp);
        }
    }
}

async fn accept_all(links: Links) {
    while let Some(incoming) = links.accept().await {
        tokio::spawn(async move {
            let link = incoming.accept().await?;
            link.closed().await;
            Ok::<_, NoLink>(())
        });
    }
}

#[tokio::test]
async fn a_dial_goes_over_quic_and_where_udp_is_eaten_over_tcp() {
    let world = World::new();
    let (links, authority) = world.serving();
    tokio::spawn(accept_all(links));
    let dialling = Links::dialing(&QuicKeys::random()).unwrap();
    let link = soon(dialling.dial(&authority, world.client_tls())).await.unwrap();
    assert_eq!(link.transport(), LinkTransport::Quic);

    let (front, _eater) = deaf_port().await;
    let deaf: Authority = front.local_addr().unwrap().to_string().parse().unwrap();
    tcp_proxy(front, authority.as_str().parse().unwrap());
    for _ in 0..2 {
        let link = soon(dialling.dial(&deaf, world.client_tls())).await.unwrap();
        assert_eq!(link.transport(), LinkTransport::Tcp);
        assert_eq!(link.protocol(), LINK_ALPN);
    }
    let quic = dialling.dial_over(&deaf, world.client_tls(), LinkTransport::Quic);
    assert!(soon(quic).await.unwrap_err().to_string().contains("no answer"));
}

#[tokio::test]
async fn a_dial_comes_back_soon_where_nobody_listens_or_the_wrong_one() {
    let world = World::new();
    let dialling = Links::dialing(&QuicKeys::random()).unwrap();
    let (free, _) = deaf_port().await;
    let nobody: Authority = free.local_addr().unwrap().to_string().parse().unwrap();
    drop(free);
    let began = clock::now();
    let error = soon(dialling.dial(&nobody, world.client_tls())).await.unwrap_err().to_string();
    assert!(error.contains("QUIC: no answer; TCP: Connection refused"), "{error}");
    assert!(clock::now() - began < DONE_WITHIN);

    let (links, authority) = World::new().serving();
    tokio::spawn(accept_all(links));
    for transport in [None, Some(LinkTransport::Tcp)] {
        let dialled = soon(dialling.race(&authority, world.client_tls(), transport)).await;
        let error = dialled.unwrap_err().to_string();
        assert!(error.contains("certificate"), "{error}");
    }
}

#[tokio::test]
async fn every_address_of_a_name_is_tried() {
    let world = World::new();
    let (links, authority) = world.serving();
    tokio::spawn(accept_all(links));
    // Where `localhost` is ::1 too, nobody listens there.
    let named: Authority = format!("localhost:{}", authority.port_u16().unwrap()).parse().unwrap();
    let dialling = Links::dialing(&QuicKeys::random()).unwrap();
    for transport in BOTH {
        let dialled = dialling.dial_over(&named, world.client_tls(), transport);
        assert_eq!(soon(dialled).await.unwrap().transport(), transport);
    }
}
