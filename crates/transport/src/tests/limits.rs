//! Bounds that are reached: what happens there is what `Limits` says.

use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use tokio::{io::AsyncReadExt as _, net::UdpSocket};
use tonic::Code;

use super::{
    quiet::Relay,
    world::{Way, World, collect, echo, fed, full, request, soon},
};
use crate::{Limits, PeerTls, QuicKeys, Target, TransportError};

#[tokio::test]
async fn a_target_that_never_answers_is_given_up_at_the_dial_timeout() {
    let calling = Limits {
        dial_timeout: Duration::from_millis(700),
        tcp_race_after: Duration::from_millis(100),
        ..Limits::peers()
    };
    let world = World::with(Way::H3, Limits::clients(), calling, echo());
    // Both ports take what comes and say nothing.
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let _udp = UdpSocket::bind(address).await.unwrap();
    let tls = PeerTls::new(world.client_tls());
    let target = Target::peer("mute", address.to_string().parse().unwrap(), tls);
    let started = base::clock::now();
    let error =
        soon(world.pool.channel(target).send(request("/p.S/M", full("x")))).await.unwrap_err();
    let took = base::clock::now() - started;
    assert!(took >= Duration::from_millis(600) && took < Duration::from_secs(5), "{took:?}");
    assert!(error.is_retry_safe() && error.code() == Code::Unavailable, "{error}");
    assert!(error.to_string().contains("no answer"), "{error}");
}

#[tokio::test]
async fn a_caller_that_gives_up_does_not_end_the_dial_for_the_others() {
    let world = World::new(Way::H2, echo());
    // QUIC is raced for half a second before TCP is tried: longer than the first caller waits.
    let impatient = world.channel();
    let call = impatient.send(request("/p.S/M", full("x")));
    assert!(tokio::time::timeout(Duration::from_millis(100), call).await.is_err());
    let started = base::clock::now();
    let reply = soon(world.channel().send(request("/p.S/M", full("y")))).await.unwrap();
    assert_eq!(collect(reply.into_body()).await.unwrap().0, b"y");
    assert!(base::clock::now() - started < Duration::from_millis(1_500));
}

#[tokio::test]
async fn a_quic_handshake_that_does_not_end_makes_room_after_its_time() {
    let limits = Limits {
        handshakes: 1,
        handshake_timeout: Duration::from_millis(600),
        ..Limits::clients()
    };
    let world = World::with(Way::H3, limits, Limits::peers(), echo());
    let relay = Relay::new(world.address).await;
    relay.mute();
    let endpoint = crate::quic::dialing_endpoint(&QuicKeys::random(), 9).unwrap();
    let connect = |to| {
        let config = crate::quic::client_config(world.client_tls(), &Limits::peers()).unwrap();
        endpoint.connect_with(config, to, "localhost").unwrap()
    };
    let stuck = tokio::spawn(connect(relay.address));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(soon(connect(world.address)).await.is_err(), "one handshake at a time");
    tokio::time::sleep(Duration::from_millis(800)).await;
    // The stuck client tries again and again: sooner or later somebody else comes first.
    let welcome = async { while connect(world.address).await.is_err() {} };
    soon(welcome).await;
    stuck.abort();
}

#[tokio::test]
async fn tcp_connections_beyond_the_limit_are_closed() {
    let limits = Limits { connections: 1, ..Limits::clients() };
    let world = World::with(Way::H2c, limits, Limits::peers(), echo());
    let (_feed, body) = fed();
    let held = soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap();
    let mut second = tokio::net::TcpStream::connect(world.address).await.unwrap();
    assert_eq!(soon(second.read(&mut [0; 8])).await.unwrap_or(0), 0);
    drop(held);
}

#[tokio::test]
async fn half_closed_streams_leave_no_empty_frames_on_a_connection() {
    for way in [Way::H2c, Way::H2] {
        let world = World::new(way, echo());
        // A server closes a connection that brings more than a hundred empty frames in mid-stream.
        for _ in 0..250 {
            let (feed, body) = fed();
            let reply = soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap();
            for piece in [&b""[..], b"x", b""] {
                feed.send(Ok(Frame::data(Bytes::from_static(piece)))).await.unwrap();
            }
            drop(feed);
            let (data, trailers) = collect(reply.into_body()).await.unwrap();
            assert_eq!((&data[..], &trailers["grpc-status"]), (&b"x"[..], &"0".parse().unwrap()));
        }
    }
}

#[tokio::test]
async fn a_peer_is_granted_streams_as_it_needs_them() {
    let calling = Limits { pool_connections: 1, ..Limits::peers() };
    let world = World::with(Way::H3, Limits::peers(), calling, echo());
    let mut open = Vec::new();
    // More than a fresh connection is granted, on the only connection there may be.
    for _ in 0..400 {
        let (feed, body) = fed();
        open.push((feed, soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap()));
    }
    for (feed, reply) in open {
        drop(feed);
        collect(reply.into_body()).await.unwrap();
    }
}

#[tokio::test]
async fn calls_beyond_the_streams_of_every_http2_connection_are_refused_not_queued() {
    let limits = Limits { h2_streams: 1, ..Limits::clients() };
    let world = World::with(Way::H2c, limits, Limits::peers(), echo());
    let mut open = Vec::new();
    let refused = loop {
        let (feed, body) = fed();
        match soon(world.channel().send(request("/p.S/Bidi", body))).await {
            Ok(reply) => open.push((feed, reply)),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, TransportError::Full { .. }), "{refused}");
    assert_eq!(open.len(), 16, "as many as one target may have connections");
}
