//! Two ends over real sockets, and peers that break rules.
#![expect(
    clippy::disallowed_methods,
    reason = "a test's runtime ends with the test, and its tasks with it"
)]

mod hostile;
mod lease;
mod limits;
mod quiet;
mod world;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Response;
use http_body::Frame;
use tokio::sync::mpsc;
use tonic::{Code, body::Body};
use world::{Gone, Handler, LONG, WAYS, Way, World, collect, echo, fed, full, next, request, soon};

use crate::{Limits, TransportError};

#[tokio::test]
async fn a_unary_call_returns_body_and_trailers() {
    for way in WAYS {
        let world = World::new(way, echo());
        for size in [0usize, 1, 4_095, 4_096, 70_000, 3 << 20] {
            let data = Bytes::from(vec![7; size]);
            let reply =
                soon(world.channel().send(request("/p.S/M", full(data.clone())))).await.unwrap();
            assert_eq!(reply.headers()["content-type"], "application/grpc");
            let (got, trailers) = collect(reply.into_body()).await.unwrap();
            assert!(got == data, "{way:?} {size}");
            assert_eq!(trailers["grpc-status"], "0");
        }
    }
}

#[tokio::test]
async fn messages_cross_one_by_one_in_both_directions() {
    for way in WAYS {
        let world = World::new(way, echo());
        let (feed, body) = fed();
        let reply = soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap();
        let mut body = reply.into_body();
        for round in 0..100u8 {
            feed.send(Ok(Frame::data(Bytes::from(vec![round; 10])))).await.unwrap();
            let got = next(&mut body).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(got, vec![round; 10], "{way:?}");
        }
        drop(feed);
        let (rest, trailers) = collect(body).await.unwrap();
        assert!(rest.is_empty());
        assert_eq!(trailers["grpc-status"], "0");
    }
}

#[tokio::test]
async fn dropping_a_waiting_call_drops_the_handler() {
    for way in WAYS {
        let (began, mut has_begun) = mpsc::channel(1);
        let (gone, mut is_gone) = mpsc::channel(1);
        let world = World::new(
            way,
            Handler::new(move |request| {
                let (began, gone) = (began.clone(), Gone(gone.clone()));
                async move {
                    let _held = (request, gone);
                    began.send(()).await.unwrap();
                    std::future::pending().await
                }
            }),
        );
        for upload_is_open in [false, true] {
            let (feed, open) = fed();
            let body = if upload_is_open { open } else { full("x") };
            let channel = world.channel();
            let call = tokio::spawn(async move { channel.send(request("/p.S/M", body)).await });
            soon(has_begun.recv()).await.unwrap();
            call.abort();
            soon(is_gone.recv()).await.unwrap();
            drop(feed);
        }
    }
}

#[tokio::test]
async fn dropping_a_reply_body_ends_the_servers_stream_and_the_upload() {
    for way in WAYS {
        let (gone, mut is_gone) = mpsc::channel(1);
        let world = World::new(
            way,
            Handler::new(move |request| {
                let gone = Gone(gone.clone());
                async move {
                    let (feed, body) = fed();
                    tokio::spawn(async move {
                        let _held = (request, gone);
                        while feed.send(Ok(Frame::data(Bytes::from_static(b"token")))).await.is_ok()
                        {
                        }
                    });
                    Response::new(body)
                }
            }),
        );
        let (feed, body) = fed();
        let reply = soon(world.channel().send(request("/p.S/Stream", body))).await.unwrap();
        let mut body = reply.into_body();
        next(&mut body).await.unwrap().unwrap();
        drop(body);
        soon(is_gone.recv()).await.unwrap();
        soon(feed.closed()).await;
    }
}

#[tokio::test]
async fn a_cut_upload_is_an_error_at_the_server_never_an_end() {
    for way in WAYS {
        let (outcome, mut outcomes) = mpsc::channel(1);
        let world = World::new(
            way,
            Handler::new(move |request| {
                let outcome = outcome.clone();
                async move {
                    let (feed, reply) = fed();
                    tokio::spawn(async move {
                        let ended = collect(request.into_body()).await.map(|_| ());
                        outcome.send(ended).await.unwrap();
                        drop(feed);
                    });
                    Response::new(reply)
                }
            }),
        );
        let (feed, body) = fed();
        let reply = soon(world.channel().send(request("/p.S/Up", body))).await.unwrap();
        feed.send(Ok(Frame::data(Bytes::from_static(b"half of a mess")))).await.unwrap();
        feed.send(Err(TransportError::cancelled().into())).await.unwrap();
        let ended = soon(outcomes.recv()).await.unwrap();
        assert_eq!(ended.unwrap_err().code(), Code::Cancelled, "{way:?}");
        drop(reply);
    }
}

#[tokio::test]
async fn a_broken_reply_is_an_error_at_the_client_never_an_end() {
    for way in WAYS {
        let world = World::new(
            way,
            Handler::new(|_| async {
                let (feed, body) = fed();
                tokio::spawn(async move {
                    feed.send(Ok(Frame::data(Bytes::from_static(b"half")))).await.unwrap();
                    feed.send(Err(tonic::Status::internal("the engine died"))).await.unwrap();
                });
                Response::new(body)
            }),
        );
        // A reset may overtake what was sent before it, the head included.
        let error = match soon(world.channel().send(request("/p.S/M", full("x")))).await {
            Ok(reply) => collect(reply.into_body()).await.unwrap_err(),
            Err(error) => error.into(),
        };
        assert_eq!(error.code(), Code::Internal, "{way:?}: {error}");
    }
}

#[tokio::test]
async fn a_server_may_answer_before_the_upload_ends() {
    for way in WAYS {
        let world = World::new(way, Handler::new(|_| async { Response::new(full("early")) }));
        let (feed, body) = fed();
        let reply = soon(world.channel().send(request("/p.S/M", body))).await.unwrap();
        let (data, _) = collect(reply.into_body()).await.unwrap();
        assert_eq!(data, b"early");
        // The upload ends too, although nobody ended it.
        soon(feed.closed()).await;
    }
}

#[tokio::test]
async fn a_slow_reader_stops_the_sender_in_both_directions() {
    for way in WAYS {
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = sent.clone();
        let world = World::new(
            way,
            Handler::new(move |request| {
                let counter = counter.clone();
                async move {
                    let (feed, body) = fed();
                    tokio::spawn(async move {
                        let _unread = request;
                        while feed
                            .send(Ok(Frame::data(Bytes::from(vec![0; 1 << 16]))))
                            .await
                            .is_ok()
                        {
                            counter.fetch_add(1 << 16, Ordering::Relaxed);
                        }
                    });
                    Response::new(body)
                }
            }),
        );
        let (feed, body) = fed();
        let mut reply =
            soon(world.channel().send(request("/p.S/M", body))).await.unwrap().into_body();
        next(&mut reply).await.unwrap().unwrap();
        let mut uploaded = 0usize;
        let blocked = |sent: usize| sent < 24 << 20;
        while tokio::time::timeout(
            Duration::from_millis(300),
            feed.send(Ok(Frame::data(Bytes::from(vec![0; 1 << 16])))),
        )
        .await
        .is_ok()
        {
            uploaded += 1 << 16;
            assert!(blocked(uploaded), "{way:?}: the uploader never waits");
        }
        let downloaded = sent.load(Ordering::Relaxed);
        assert!(blocked(downloaded), "{way:?}: {downloaded} bytes for a reader that does not read");
        assert!(downloaded > 0 && uploaded > 0);
    }
}

#[tokio::test]
async fn a_header_section_beyond_the_limit_is_refused_and_harms_nobody_else() {
    for way in WAYS {
        let world = World::new(way, echo());
        let (feed, body) = fed();
        let other = soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap();
        let mut long = request("/p.S/M", full("x"));
        long.headers_mut().insert("x-long", "v".repeat(17 << 10).parse().unwrap());
        match soon(world.channel().send(long)).await {
            Ok(reply) => assert_eq!(reply.status(), 431, "{way:?}"),
            Err(error) => assert!(
                matches!(error, TransportError::RequestTooLong { .. } | TransportError::ResetH2(_)),
                "{way:?}: {error}"
            ),
        }
        drop(feed);
        assert_eq!(collect(other.into_body()).await.unwrap().1["grpc-status"], "0", "{way:?}");
    }
}

#[tokio::test]
async fn draining_finishes_what_is_there_and_takes_nothing_new() {
    for way in WAYS {
        let world = World::new(way, echo());
        let (feed, body) = fed();
        let reply = soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap();
        world.server.drain.cancel();
        // New calls end up nowhere; how soon the client knows is up to the network, so ask until it does.
        let refused = async {
            while let Ok(reply) = world.channel().send(request("/p.S/M", full("x"))).await {
                drop(collect(reply.into_body()).await);
            }
        };
        soon(refused).await;
        feed.send(Ok(Frame::data(Bytes::from_static(b"still here")))).await.unwrap();
        drop(feed);
        let (data, trailers) = collect(reply.into_body()).await.unwrap();
        assert_eq!(data, b"still here", "{way:?}");
        assert_eq!(trailers["grpc-status"], "0");
        world.server.tasks.close();
        soon(world.server.tasks.wait()).await;
    }
}

#[tokio::test]
async fn a_quiet_call_outlives_the_idle_timeout() {
    for way in WAYS {
        let limits = Limits {
            idle_timeout: Duration::from_millis(600),
            ping_interval: Duration::from_millis(100),
            ..Limits::clients()
        };
        let world = World::with(way, limits.clone(), limits, echo());
        let (feed, body) = fed();
        let reply = soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1_800)).await;
        drop(feed);
        assert_eq!(collect(reply.into_body()).await.unwrap().1["grpc-status"], "0", "{way:?}");
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_the_next_call_opens_another() {
    for way in WAYS {
        let limits = Limits { idle_timeout: Duration::from_millis(400), ..Limits::peers() };
        let world = World::with(way, limits.clone(), limits, echo());
        let reply = soon(world.channel().send(request("/p.S/M", full("x")))).await.unwrap();
        collect(reply.into_body()).await.unwrap();
        // Every connection is a task of the client; without one only the test's own remain.
        let closed = async {
            while !world.client.outgoing.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        soon(closed).await;
        let reply = soon(world.channel().send(request("/p.S/M", full("y")))).await.unwrap();
        assert_eq!(collect(reply.into_body()).await.unwrap().0, b"y", "{way:?}");
    }
}

#[tokio::test]
async fn where_udp_is_blocked_peers_are_reached_over_tcp() {
    let world = World::new(Way::H2, echo());
    let started = base::clock::now();
    let reply = soon(world.channel().send(request("/p.S/M", full("x")))).await.unwrap();
    assert_eq!(reply.version(), http::Version::HTTP_2);
    assert!(base::clock::now() - started < Limits::peers().dial_timeout);
    assert_eq!(collect(reply.into_body()).await.unwrap().0, b"x");
}

#[tokio::test]
async fn a_full_connection_makes_the_pool_open_another() {
    let limits = Limits { streams: 4, ..Limits::peers() };
    let world = World::with(Way::H3, limits.clone(), limits, echo());
    let mut open = Vec::new();
    for _ in 0..20 {
        let (feed, body) = fed();
        let reply = soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap();
        open.push((feed, reply));
    }
    for (feed, reply) in open {
        drop(feed);
        collect(reply.into_body()).await.unwrap();
    }
}

#[tokio::test]
async fn at_the_limit_of_connections_calls_are_refused_and_idle_ones_make_room() {
    let calling = Limits { pool_connections: 1, ..Limits::peers() };
    let world = World::with(Way::H3, Limits::peers(), calling, echo());
    let (feed, body) = fed();
    let first = soon(world.channel().send(request("/p.S/Bidi", body))).await.unwrap();
    let other = world.pool.channel(world.target("another"));
    let refused = soon(other.send(request("/p.S/M", full("x")))).await.unwrap_err();
    assert!(matches!(refused, TransportError::Full { .. }), "{refused}");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(feed);
    collect(first.into_body()).await.unwrap();
    let reply = soon(other.send(request("/p.S/M", full("x")))).await.unwrap();
    collect(reply.into_body()).await.unwrap();
}

#[tokio::test]
async fn the_connections_of_a_forgotten_target_live_as_long_as_its_channels() {
    for way in WAYS {
        let world = World::new(way, echo());
        let (old, (feed, body)) = (world.channel(), fed());
        let reply = soon(old.send(request("/p.S/Bidi", body))).await.unwrap();
        world.pool.forget(&old);
        // Under its name another may be meant now; the call goes on.
        let new = world.channel();
        world.pool.forget(&old);
        assert!(Arc::ptr_eq(world.channel().entry(), new.entry()));
        assert!(!Arc::ptr_eq(old.entry(), new.entry()));
        feed.send(Ok(Frame::data(Bytes::from_static(b"x")))).await.unwrap();
        drop(feed);
        assert_eq!(collect(reply.into_body()).await.unwrap().0, b"x", "{way:?}");
        drop(old);
        let closed = async {
            while !world.client.outgoing.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        soon(closed).await;
    }
}

#[tokio::test]
async fn streams_nobody_reads_do_not_starve_the_next_call() {
    for way in WAYS {
        let serving = Limits { unread_timeout: Duration::from_millis(500), ..Limits::clients() };
        let world = World::with(
            way,
            serving,
            Limits::peers(),
            Handler::new(|request| async move {
                if request.uri().path() == "/p.S/Stall" {
                    // Holds the body and never reads it.
                    let _held = request;
                    return std::future::pending().await;
                }
                let (data, _) = collect(request.into_body()).await.unwrap();
                Response::new(full(data))
            }),
        );
        let mut stalled = Vec::new();
        for _ in 0..32 {
            let channel = world.channel();
            stalled.push(tokio::spawn(async move {
                channel.send(request("/p.S/Stall", full(vec![1; 2 << 20]))).await
            }));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let data = vec![9; 2 << 20];
        let call = request("/p.S/M", full(data.clone()));
        let reply = soon(world.channel().send(call)).await.unwrap();
        assert!(collect(reply.into_body()).await.unwrap().0 == data, "{way:?}");
        for call in stalled {
            call.abort();
        }
    }
}

#[tokio::test]
async fn an_unreachable_target_is_a_retry_safe_error_that_names_it() {
    let world = World::new(Way::H3, echo());
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let nobody = socket.local_addr().unwrap();
    drop(socket);
    let tls = crate::PeerTls::new(world.client_tls());
    let target = crate::Target::peer("b (us)", nobody.to_string().parse().unwrap(), tls);
    let started = base::clock::now();
    let calls = (0..50).map(|_| {
        let channel = world.pool.channel(target.clone());
        tokio::spawn(async move { channel.send(request("/p.S/M", full("x"))).await })
    });
    for call in calls.collect::<Vec<_>>() {
        let error = soon(call).await.unwrap().unwrap_err();
        assert!(error.is_retry_safe());
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.to_string().contains("b (us)"), "{error}");
    }
    // Fifty callers wait for one dial, not for fifty.
    assert!(base::clock::now() - started < LONG);
}

#[tokio::test]
async fn http2_connections_drain_at_their_age() {
    let serving = Limits { h2_connection_age: Duration::from_millis(300), ..Limits::clients() };
    let world = World::with(Way::H2c, serving, Limits::peers(), echo());
    // A client that is told to go away, whatever it does.
    let stream = tokio::net::TcpStream::connect(world.address).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let told = tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    let call = http::Request::post("http://localhost/p.S/Bidi").body(()).unwrap();
    let (reply, mut upload) = sender.send_request(call, false).unwrap();
    let mut body = soon(reply).await.unwrap().into_body();
    let going_away = async {
        while std::future::poll_fn(|cx| sender.poll_ready(cx)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(going_away).await;
    // What was in progress goes on to its end.
    upload.send_data(Bytes::from_static(b"still here"), true).unwrap();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "still here");
    assert_eq!(soon(body.trailers()).await.unwrap().unwrap()["grpc-status"], "0");
    drop((body, upload, sender));
    soon(told).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_handler_that_panics_resets_its_call_only() {
    let world = World::new(
        Way::H3,
        Handler::new(|request| async move {
            assert!(request.uri().path() != "/p.S/Panic", "the test wants this");
            Response::new(request.into_body())
        }),
    );
    let error = soon(world.channel().send(request("/p.S/Panic", full("x")))).await.unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    let reply = soon(world.channel().send(request("/p.S/M", full("x")))).await.unwrap();
    collect(reply.into_body()).await.unwrap();
}

#[test]
fn workers_share_a_port() {
    use crate::{Listener, QuicKeys, Server, ServerTls, Workers};
    let mut listener = Listener::bind("127.0.0.1:0".parse().unwrap(), 2, true).unwrap();
    let ports =
        [listener.port(0), listener.port(1)].map(|port| Arc::new(parking_lot::Mutex::new(port)));
    let served: Arc<parking_lot::Mutex<std::collections::BTreeSet<String>>> = Arc::default();
    let seen = served.clone();
    let workers = Workers::start(2, move |worker| {
        let port = ports[usize::from(worker.index)].lock().take().unwrap();
        let seen = seen.clone();
        async move {
            let handler = Handler::new(move |_| {
                seen.lock().insert(std::thread::current().name().unwrap().to_owned());
                async { Response::new(Body::empty()) }
            });
            let server = Server::new(
                Limits::clients(),
                ServerTls::Plaintext,
                QuicKeys::random(),
                handler,
                1,
            );
            server.serve(worker.clone(), port).await.unwrap();
            worker.tasks.close();
            worker.tasks.wait().await;
        }
    })
    .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let address = listener.address();
        let drain = tokio_util::sync::CancellationToken::new();
        let accepting = tokio::spawn(listener.accept(drain.clone()));
        let client = world::worker();
        let mut open = Vec::new();
        for i in 0..4 {
            let dialer = crate::Dialer::new(&client, &QuicKeys::random(), Limits::peers()).unwrap();
            let pool = crate::Pool::new(dialer);
            let target =
                crate::Target::plaintext(&format!("{i}"), address.to_string().parse().unwrap());
            let channel = pool.channel(target);
            let reply = soon(channel.send(request("/p.S/M", full("x")))).await.unwrap();
            assert_eq!(reply.status(), 200);
            open.push(channel);
        }
        drain.cancel();
        soon(accepting).await.unwrap().unwrap();
        for channel in open {
            drop(channel);
        }
    });
    drop(runtime);
    workers.drain();
    workers.join();
    assert_eq!(*served.lock(), ["worker-0", "worker-1"].map(String::from).into());
}
