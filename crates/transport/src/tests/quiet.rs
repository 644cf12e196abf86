//! Long waits and silence: what a quiet call, a dead way and a connection that is told to end look like to both ends.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Response;
use http_body::Frame;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Notify, mpsc},
};
use tonic::Code as Grpc;

use super::{
    hostile::{End, HEAD, end_of, exchange, frame, headers},
    world::{self, Handler, Way, World, collect, echo, fed, full, next, request, soon},
};
use crate::{Acknowledge, Limits, Progress, TransportError, h3::Code};

/// Carries UDP between a client and `server` until it is cut.
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    cut: Arc<AtomicBool>,
    mute: Arc<AtomicBool>,
}

impl Relay {
    pub(super) async fn new(server: SocketAddr) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        back.connect(server).await.unwrap();
        let address = front.local_addr().unwrap();
        let relay = Self { address, cut: Arc::default(), mute: Arc::default() };
        let (cut, mute) = (relay.cut.clone(), relay.mute.clone());
        tokio::spawn(async move {
            let (mut there, mut here) = (vec![0; 1 << 16], vec![0; 1 << 16]);
            let mut client = None;
            loop {
                let sent = tokio::select! {
                    Ok((length, from)) = front.recv_from(&mut there) => {
                        client = Some(from);
                        if cut.load(Ordering::Relaxed) { continue }
                        back.send(&there[..length]).await
                    }
                    Ok(length) = back.recv(&mut here) => match client {
                        Some(client)
                            if !cut.load(Ordering::Relaxed) && !mute.load(Ordering::Relaxed) =>
                        {
                            front.send_to(&here[..length], client).await
                        }
                        _ => continue,
                    },
                };
                if sent.is_err() {
                    return;
                }
            }
        });
        relay
    }

    /// Nothing comes back any more.
    pub(super) fn mute(&self) {
        self.mute.store(true, Ordering::Relaxed);
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }
}

/// A channel that leads through a relay.
async fn through_relay(world: &World) -> (Relay, crate::Channel) {
    let relay = Relay::new(world.address).await;
    let tls = crate::PeerTls::new(world.client_tls());
    let target = crate::Target::peer("b", relay.address.to_string().parse().unwrap(), tls);
    let channel = world.pool.channel(target);
    (relay, channel)
}

#[tokio::test]
async fn a_dead_connection_is_given_up_although_its_calls_were_before() {
    let world = World::new(Way::H3, echo());
    let (relay, channel) = through_relay(&world).await;
    drop(soon(channel.send(request("/p.S/M", full("x")))).await.unwrap());
    relay.cut();
    let call = || channel.send(request("/p.S/M", full("x")));
    assert!(tokio::time::timeout(Duration::from_millis(250), call()).await.is_err());
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The next one is not sent there: nobody can be dialled.
    let error = soon(call()).await.unwrap_err();
    assert!(!matches!(error, TransportError::Silent(_)), "{error}");
}

#[tokio::test]
async fn a_dead_http2_connection_is_given_up_although_each_of_its_calls_was_before() {
    let world = World::new(Way::H2, echo());
    let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = front.local_addr().unwrap();
    let cut = Arc::new(AtomicBool::new(false));
    let (opened, mut opens) = mpsc::unbounded_channel();
    let (server, is_cut) = (world.address, cut.clone());
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            let (mut client, _) = front.accept().await.unwrap();
            opened.send(()).unwrap();
            if is_cut.load(Ordering::Relaxed) {
                held.push(client);
                continue;
            }
            let is_cut = is_cut.clone();
            tokio::spawn(async move {
                let mut server = TcpStream::connect(server).await.unwrap();
                let cut = async {
                    while !is_cut.load(Ordering::Relaxed) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                    () = cut => std::future::pending().await,
                }
            });
        }
    });
    let channel = world.pool.channel(world.at("b", relay));
    let call = || channel.send(request("/p.S/M", full("x")));
    drop(soon(call()).await.unwrap());
    assert_eq!(opens.recv().await, Some(()));
    cut.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(100)).await;
    soon(async {
        while opens.try_recv().is_err() {
            let reply = tokio::time::timeout(Duration::from_millis(250), call()).await;
            assert!(!matches!(reply, Ok(Ok(_))));
        }
    })
    .await;
}

#[tokio::test]
async fn a_connection_on_which_nothing_comes_is_given_up_within_seconds() {
    let world = World::new(Way::H3, echo());
    let (relay, channel) = through_relay(&world).await;
    let (_feed, body) = fed();
    let mut streaming = soon(channel.send(request("/p.S/Bidi", body))).await.unwrap().into_body();
    relay.cut();
    let started = base::clock::now();
    let unary = soon(channel.send(request("/p.S/M", full("x")))).await.unwrap_err();
    let stream = next(&mut streaming).await.unwrap().unwrap_err();
    assert!(base::clock::now() - started < Duration::from_secs(5));
    assert!(matches!(unary, TransportError::Silent(_)), "{unary}");
    assert!(!unary.is_retry_safe() && unary.code() == Grpc::Unavailable);
    assert_eq!(stream.code(), Grpc::Unavailable, "{stream}");
}

#[tokio::test]
async fn a_quiet_call_of_a_client_that_never_pings_outlives_the_idle_timeout() {
    let limits = Limits {
        idle_timeout: Duration::from_millis(600),
        ping_interval: Duration::from_millis(100),
        ..Limits::clients()
    };
    let slow = Handler::new(|request| async {
        let body = collect(request.into_body()).await.unwrap().0;
        tokio::time::sleep(Duration::from_millis(1_800)).await;
        Response::new(full(body))
    });
    let world = World::with(Way::H3, limits, Limits::peers(), slow);
    let connection = world.raw().await;
    let end = exchange(&connection, &[headers(&HEAD), frame(0, b"late")], true).await;
    let End::Answered(bytes) = end else { panic!("{end:?}") };
    assert!(bytes.ends_with(b"late"));
}

#[tokio::test]
async fn a_reset_found_while_nobody_reads_is_still_an_error_when_somebody_does() {
    let limits = Limits { unread_timeout: Duration::from_millis(100), ..Limits::clients() };
    let (outcome, mut outcomes) = mpsc::channel(1);
    let world = World::with(
        Way::H3,
        limits,
        Limits::peers(),
        Handler::new(move |request| {
            let outcome = outcome.clone();
            async move {
                let mut body = request.into_body();
                next(&mut body).await.unwrap().unwrap();
                // Long enough for several sweeps over unread streams.
                tokio::time::sleep(Duration::from_millis(600)).await;
                outcome.send(collect(body).await.map(|_| ())).await.unwrap();
                Response::new(full("done"))
            }
        }),
    );
    let connection = world.raw().await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&headers(&HEAD)).await.unwrap();
    send.write_all(&frame(0, b"half")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    send.reset(Code::REQUEST_CANCELLED.into()).unwrap();
    let ended = soon(outcomes.recv()).await.unwrap();
    assert_eq!(ended.unwrap_err().code(), Grpc::Cancelled);
    assert!(matches!(end_of(&mut recv).await, End::Answered(_)));
}

#[tokio::test]
async fn a_tcp_connection_that_says_nothing_is_closed_and_delays_no_drain() {
    for way in [Way::H2c, Way::H2] {
        let limits = Limits { handshake_timeout: Duration::from_millis(300), ..Limits::clients() };
        let world = World::with(way, limits, Limits::peers(), echo());
        let mut silent = TcpStream::connect(world.address).await.unwrap();
        assert_eq!(soon(silent.read(&mut [0; 16])).await.unwrap(), 0, "{way:?}");

        let world = World::new(way, echo());
        let mut silent = TcpStream::connect(world.address).await.unwrap();
        // The server has accepted it once it has answered a later one.
        collect(
            soon(world.channel().send(request("/p.S/M", full("x")))).await.unwrap().into_body(),
        )
        .await
        .unwrap();
        world.pool.close();
        world.server.drain.cancel();
        world.server.tasks.close();
        soon(world.server.tasks.wait()).await;
        assert_eq!(soon(silent.read(&mut [0; 16])).await.unwrap_or(0), 0);
    }
}

#[tokio::test]
async fn admission_is_acknowledged_before_the_reply_over_h3_and_never_over_h2() {
    for way in [Way::H3, Way::H2c] {
        let wait = Arc::new(Notify::new());
        let held = wait.clone();
        let world = World::new(
            way,
            Handler::new(move |request| {
                let held = held.clone();
                async move {
                    if let Some(acknowledge) = request.extensions().get::<Acknowledge>() {
                        acknowledge.send();
                    }
                    held.notified().await;
                    Response::new(full("reply"))
                }
            }),
        );
        let (progress, mut watching) = Progress::new();
        let mut call = request("/p.S/M", full("x"));
        call.extensions_mut().insert(progress);
        let channel = world.channel();
        let reply = tokio::spawn(async move { channel.send(call).await });
        soon(watching.admitted()).await;
        assert!(!reply.is_finished(), "{way:?}");
        assert_eq!(watching.is_acknowledged(), way == Way::H3, "{way:?}");
        wait.notify_one();
        let reply = soon(reply).await.unwrap().unwrap();
        assert_eq!(reply.status(), 200);
        assert_eq!(collect(reply.into_body()).await.unwrap().0, b"reply");
    }
}

#[tokio::test]
async fn an_empty_first_piece_crosses_as_a_signal() {
    let (first, mut firsts) = mpsc::channel(1);
    let world = World::new(
        Way::H3,
        Handler::new(move |request| {
            let first = first.clone();
            async move {
                let mut body = request.into_body();
                let frame = next(&mut body).await.unwrap().unwrap();
                first.send(frame.into_data().unwrap()).await.unwrap();
                Response::new(body)
            }
        }),
    );
    let (feed, body) = fed();
    let channel = world.channel();
    let reply = tokio::spawn(async move { channel.send(request("/p.S/M", body)).await });
    feed.send(Ok(Frame::data(Bytes::new()))).await.unwrap();
    assert!(soon(firsts.recv()).await.unwrap().is_empty());
    drop(feed);
    let reply = soon(reply).await.unwrap().unwrap();
    assert!(collect(reply.into_body()).await.unwrap().0.is_empty());
}

#[tokio::test]
async fn drain_is_announced_with_the_first_stream_that_is_not_served() {
    let world = World::new(Way::H3, echo());
    let connection = world.raw().await;
    let (mut held, mut reply) = connection.open_bi().await.unwrap();
    held.write_all(&headers(&HEAD)).await.unwrap();
    held.write_all(&frame(0, b"a")).await.unwrap();
    soon(reply.read_chunk(1, true)).await.unwrap();
    // The control stream: type 0, SETTINGS, later GOAWAY (0x07) of two bytes at most.
    let mut control = soon(connection.accept_uni()).await.unwrap();
    world.server.drain.cancel();
    let mut said = Vec::new();
    while !said.ends_with(&[0x07, 0x01, 0x04]) {
        let chunk = soon(control.read_chunk(64, true)).await.unwrap().expect("no end");
        said.extend_from_slice(&chunk.bytes);
        assert!(said.len() < 64, "{said:02x?}");
    }
    assert_eq!(said[0], 0, "{said:02x?}");
    // What comes later was not begun, and is told so.
    let late = exchange(&connection, &[headers(&HEAD)], true).await;
    assert_eq!(late, End::Reset(Code::REQUEST_REJECTED.0));
    held.finish().unwrap();
    assert!(matches!(end_of(&mut reply).await, End::Answered(_)));
}

#[tokio::test]
async fn a_drain_waits_until_the_last_reply_is_delivered() {
    const BYTES: usize = 8 << 20;
    let serving = Limits { send_window_bytes: 64 << 20, ..Limits::clients() };
    let calling = Limits { stream_window_bytes: 64 << 10, ..Limits::peers() };
    let large = Handler::new(|_| async { Response::new(full(vec![7; BYTES])) });
    let world = World::with(Way::H3, serving, calling, large);
    let reply = soon(world.channel().send(request("/p.S/M", full("x")))).await.unwrap();
    // The server has handed everything to QUIC long before the reader takes it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.server.drain.cancel();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (data, _) = collect(reply.into_body()).await.unwrap();
    assert_eq!(data.len(), BYTES);
    world.server.tasks.close();
    soon(world.server.tasks.wait()).await;
}

#[tokio::test]
async fn a_worker_that_is_stopped_tells_the_other_end() {
    let world = World::new(Way::H3, echo());
    let connection = world.raw().await;
    exchange(&connection, &[headers(&HEAD), frame(0, b"x")], true).await;
    let started = base::clock::now();
    world.server.endpoints.close().await;
    soon(connection.closed()).await;
    assert!(base::clock::now() - started < Duration::from_secs(2));
}

#[tokio::test]
async fn urgent_replies_leave_before_others() {
    const BYTES: usize = 8 << 20;
    let both = Arc::new(tokio::sync::Barrier::new(2));
    let serving = Limits { send_window_bytes: 64 << 20, ..Limits::clients() };
    let calling = Limits { stream_window_bytes: 16 << 20, ..Limits::peers() };
    let world = World::with(
        Way::H3,
        serving,
        calling,
        Handler::new(move |_| {
            let both = both.clone();
            async move {
                both.wait().await;
                Response::new(full(vec![0; BYTES]))
            }
        }),
    );
    let call = |priority: &'static str| {
        let mut call = request("/p.S/M", full("x"));
        call.headers_mut().insert("priority", http::HeaderValue::from_static(priority));
        let channel = world.channel();
        async move { channel.send(call).await.unwrap().into_body() }
    };
    let (mut patient, mut urgent) = soon(async { tokio::join!(call("u=7"), call("u=0")) }).await;
    let (mut late, mut early) = (0, 0);
    while early < BYTES {
        tokio::select! {
            piece = next(&mut urgent) => {
                early += piece.unwrap().unwrap().into_data().unwrap().len();
            }
            piece = next(&mut patient), if late < BYTES => {
                late += piece.unwrap().unwrap().into_data().unwrap().len();
            }
        }
    }
    assert!(late < BYTES / 2, "{late} of {BYTES} bytes were sent before the urgent reply was done");
}

/// What the client makes of a server that answers a request with `reply`.
async fn answer(reply: Vec<Bytes>) -> Result<(u16, Vec<u8>), TransportError> {
    let world = World::new(Way::H3, echo());
    let (endpoint, tls) = world::bare_server();
    let address = endpoint.local_addr().unwrap();
    tokio::spawn(async move {
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        let (mut send, mut recv) = connection.accept_bi().await.unwrap();
        while let Ok(Some(_)) = recv.read_chunk(1 << 16, true).await {}
        for part in reply {
            if send.write_all(&part).await.is_err() {
                break;
            }
        }
        drop(send.finish());
        connection.closed().await;
    });
    let target = crate::Target::peer("bare", address.to_string().parse().unwrap(), tls);
    let reply = soon(world.pool.channel(target).send(request("/p.S/M", full("x")))).await?;
    let status = reply.status().as_u16();
    let (data, trailers) = collect(reply.into_body()).await.unwrap();
    assert!(trailers.is_empty());
    Ok((status, data))
}

#[tokio::test]
async fn interim_responses_are_passed_over_up_to_a_bound() {
    let interim = || headers(&[(":status", "103"), ("x", "y")]);
    let last = || vec![headers(&[(":status", "200")]), frame(0, b"end")];
    let few = [vec![interim(); 3], last()].concat();
    assert_eq!(answer(few).await.unwrap(), (200, b"end".to_vec()));
    let many = [vec![interim(); 17], last()].concat();
    assert!(matches!(answer(many).await, Err(TransportError::Malformed(_))));
}
