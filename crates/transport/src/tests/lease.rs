//! Connections that may be used for so long: replaced before their end, and ended at once when they are withdrawn.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;

use super::world::{Handler, Way, World, collect, echo, fed, full, next, request, soon};
use crate::{CallInfo, Lease, Lessor, Limits, QuicKeys};

const TLS: [Way; 2] = [Way::H3, Way::H2];

/// Grants every connection the same time, and can withdraw all.
#[derive(Debug)]
pub(super) struct Landlord {
    time: Duration,
    withdrawn: CancellationToken,
    granted: AtomicUsize,
    refused: Mutex<Vec<String>>,
}

impl Landlord {
    pub(super) fn new(time: Duration) -> Arc<Self> {
        Arc::new(Self {
            time,
            withdrawn: CancellationToken::new(),
            granted: AtomicUsize::new(0),
            refused: Mutex::default(),
        })
    }
}

impl Lessor for Landlord {
    fn lease(&self, certificates: &[CertificateDer<'static>]) -> Lease {
        // Only the end that serves shows a certificate here.
        assert!(certificates.len() <= 1);
        self.granted.fetch_add(1, Ordering::Relaxed);
        Lease::limited(base::clock::now(), self.time, self.withdrawn.clone(), Arc::new(()))
    }

    fn refused(&self, _: SocketAddr, why: &str) {
        self.refused.lock().push(why.to_owned());
    }
}

/// Echoes, and notes which connection each call came on.
fn noting(seen: &Arc<Mutex<BTreeSet<SocketAddr>>>) -> Handler {
    let seen = seen.clone();
    Handler::new(move |request| {
        let info = request.extensions().get::<CallInfo>().cloned();
        seen.lock().extend(info.map(|info| info.remote));
        let mut echo = echo();
        let reply = tower::Service::call(&mut echo, request);
        async move { reply.await.unwrap_or_else(|never| match never {}) }
    })
}

#[tokio::test]
async fn a_dialled_connection_is_replaced_before_its_end_and_its_streams_go_on() {
    for way in TLS {
        let landlord = Landlord::new(Duration::from_secs(4));
        let seen = Arc::default();
        let world = World::new(way, noting(&seen));
        let channel = world.pool.channel(world.leased("server", landlord.clone()));
        let (feed, body) = fed();
        let stream = soon(channel.send(request("/p.S/Bidi", body))).await.unwrap();
        let mut stream = stream.into_body();
        let begun = base::clock::now();
        let mut calls = 0;
        while begun.elapsed() < Duration::from_secs(7) {
            let reply = soon(channel.send(request("/p.S/M", full("x")))).await;
            let reply = reply.unwrap_or_else(|error| panic!("{way:?} call {calls}: {error}"));
            collect(reply.into_body()).await.unwrap();
            feed.send(Ok(Frame::data(Bytes::from_static(b"still")))).await.unwrap();
            let piece = next(&mut stream).await.unwrap().unwrap();
            assert_eq!(piece.into_data().unwrap(), "still", "{way:?}");
            calls += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let granted = landlord.granted.load(Ordering::Relaxed);
        assert!((3..=5).contains(&granted), "{way:?}: {granted} connections in 7 s");
        // One endpoint dials all QUIC connections, from one address.
        assert!(way == Way::H3 || seen.lock().len() == granted, "{way:?}: {seen:?}");
    }
}

#[tokio::test]
async fn a_served_connection_takes_no_call_after_its_end_and_finishes_those_it_has() {
    for way in TLS {
        let landlord = Landlord::new(Duration::from_millis(600));
        let world = World::leasing(way, Limits::clients(), echo(), landlord.clone());
        let channel = world.channel();
        let (feed, body) = fed();
        let stream = soon(channel.send(request("/p.S/Bidi", body))).await.unwrap();
        let mut stream = stream.into_body();
        assert_eq!(landlord.granted.load(Ordering::Relaxed), 1);
        tokio::time::sleep(Duration::from_millis(900)).await;
        for _ in 0..10 {
            let reply = soon(channel.send(request("/p.S/M", full("x")))).await.unwrap();
            collect(reply.into_body()).await.unwrap();
        }
        assert_eq!(landlord.granted.load(Ordering::Relaxed), 2, "{way:?}: on a new connection");
        feed.send(Ok(Frame::data(Bytes::from_static(b"still")))).await.unwrap();
        let piece = next(&mut stream).await.unwrap().unwrap();
        assert_eq!(piece.into_data().unwrap(), "still", "{way:?}");
        drop(feed);
        collect(stream).await.unwrap();
    }
}

#[tokio::test]
async fn a_withdrawn_connection_ends_at_once_with_its_calls() {
    for way in TLS {
        for serving in [true, false] {
            let landlord = Landlord::new(Duration::from_secs(3600));
            let (world, target) = if serving {
                let world = World::leasing(way, Limits::clients(), echo(), landlord.clone());
                let target = world.target("server");
                (world, target)
            } else {
                let world = World::new(way, echo());
                let target = world.leased("server", landlord.clone());
                (world, target)
            };
            let channel = world.pool.channel(target);
            let (_feed, body) = fed();
            let stream = soon(channel.send(request("/p.S/Bidi", body))).await.unwrap();
            landlord.withdrawn.cancel();
            let ended = soon(collect(stream.into_body())).await;
            assert!(
                ended.is_err(),
                "{way:?} {serving}: a call on a withdrawn connection ended well"
            );
        }
    }
}

/// A client that speaks nothing the server does; returns whether it was turned away.
async fn knock(world: &World, way: Way) -> bool {
    let mut tls = world.client_tls();
    tls.alpn_protocols = vec![b"nothing".to_vec()];
    if way == Way::H2 {
        let stream = tokio::net::TcpStream::connect(world.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(tls));
        return connector.connect("localhost".try_into().unwrap(), stream).await.is_err();
    }
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let endpoint = crate::quic::dialing_endpoint(&QuicKeys::random(), 9).unwrap();
    endpoint.connect_with(config, world.address, "localhost").unwrap().await.is_err()
}

#[tokio::test]
async fn whoever_is_turned_away_is_told_to_the_lessor() {
    for way in TLS {
        let landlord = Landlord::new(Duration::from_secs(3600));
        let world = World::leasing(way, Limits::clients(), echo(), landlord.clone());
        assert!(soon(knock(&world, way)).await);
        let told = async {
            while landlord.refused.lock().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon(told).await;
    }
}

#[tokio::test]
async fn a_client_that_turns_away_the_server_is_not() {
    for way in TLS {
        let landlord = Landlord::new(Duration::from_secs(3600));
        let world = World::leasing(way, Limits::clients(), echo(), landlord.clone());
        let other = World::new(way, echo());
        // It believes another server's certificate.
        let target = other.at("server", world.address);
        assert!(soon(world.pool.channel(target).connect()).await.is_err());
        // The next one is told: what came before would be too by then.
        assert!(soon(knock(&world, way)).await);
        let told = async {
            while landlord.refused.lock().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon(told).await;
        assert_eq!(landlord.refused.lock().len(), 1, "{way:?}");
    }
}
