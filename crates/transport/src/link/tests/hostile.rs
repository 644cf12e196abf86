//! Strangers, and peers that break rules.

use super::*;

#[tokio::test]
async fn a_stranger_has_no_link_over_tcp() {
    let world = World::new();
    let (links, authority) = world.serving();
    let dialling = Links::dialing(&QuicKeys::random()).unwrap();
    let tls = world.stranger_tls(LINK_ALPN);
    let dialled = dialling.dial_over(&authority, tls, LinkTransport::Tcp);
    let accepted = async { links.accept().await.unwrap().accept().await };
    let (dialled, accepted) = soon(async { tokio::join!(dialled, accepted) }).await;
    let refused = accepted.unwrap_err();
    assert!(refused.is_refusal && refused.why.contains("certificate"), "{refused}");
    let error = dialled.unwrap_err().to_string();
    assert!(error.contains("403"), "{error}");
}

#[tokio::test]
async fn whoever_asks_for_something_else_is_answered_404_and_let_go() {
    let world = World::new();
    let (links, authority) = world.serving();
    for path in ["/", "/isobar.mesh.v2.Link/Frames", "/isobar.mesh.v1.Link/frames"] {
        let accepting = async { links.accept().await.unwrap().accept().await };
        let asking = async {
            let mut raw = world.raw(&authority, world.client_tls()).await;
            let (status, ..) = raw.post(path).await;
            (status, soon(raw.over).await.unwrap())
        };
        let (accepted, (status, over)) = soon(async { tokio::join!(accepting, asking) }).await;
        assert_eq!((status, over), (404, Ok(())), "{path}");
        assert!(!accepted.unwrap_err().is_refusal);
    }
}

#[tokio::test]
async fn one_connection_is_one_link() {
    let world = World::new();
    let (links, authority) = world.serving();
    let path = tcp::path(LINK_ALPN).unwrap();
    let accepting = async { links.accept().await.unwrap().accept().await.unwrap() };
    let asking = async {
        let mut raw = world.raw(&authority, world.client_tls()).await;
        let (status, send, body) = raw.post(&path).await;
        assert_eq!(status, 200);
        (raw, send, body)
    };
    let (link, (mut raw, mut send, _body)) = soon(async { tokio::join!(accepting, asking) }).await;
    for _ in 0..4 {
        let second = Request::post(format!("https://127.0.0.1{path}")).body(()).unwrap();
        // The client may know from SETTINGS that it would wait in vain.
        let Ok((response, _send)) = raw.requests.send_request(second, true) else { break };
        drop(tokio::time::timeout(Duration::from_millis(20), response).await);
    }
    send.send_data(Bytes::from_static(&[0, 0, 0, 0, 1, 9]), false).unwrap();
    assert_eq!(soon(link.receive()).await.unwrap(), frame(9, 1));
}

#[tokio::test]
async fn a_frame_that_is_too_long_closes_the_link() {
    let world = World::new();
    for transport in BOTH {
        let Pair { a, b, .. } = world.linked(transport).await;
        let sending = a.send_whole(frame(1, FRAME_BYTES_MAX + 1));
        let receiving = async {
            let error = b.receive().await.unwrap_err();
            assert!(matches!(error, TransportError::BadFrame(TOO_LONG)), "{transport} {error}");
            b.close("too long");
            // Over TCP it is closed already.
            soon(b.closed()).await;
        };
        let (_, ()) = soon(async { tokio::join!(sending, receiving) }).await;
        let why = soon(a.closed()).await;
        assert!(why.contains("long"), "{why}");
    }
}

#[tokio::test]
async fn garbage_after_tls_and_instead_of_it_ends_a_connection() {
    let world = World::new();
    let (links, authority) = world.serving();
    let accept = async || links.accept().await.unwrap().accept().await.map(drop);
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0"]
    {
        let sending = async {
            let mut stream = world.raw_tls(&authority, world.client_tls()).await.unwrap();
            stream.write_all(garbage).await.unwrap();
            stream.shutdown().await.unwrap();
            drop(stream.read_to_end(&mut Vec::new()).await);
        };
        let (accepted, ()) = soon(async { tokio::join!(accept(), sending) }).await;
        assert!(!accepted.unwrap_err().is_refusal);
        let sending = async {
            let mut stream = TcpStream::connect(authority.as_str()).await.unwrap();
            stream.write_all(garbage).await.unwrap();
            drop(stream.shutdown().await);
            drop(stream.read_to_end(&mut Vec::new()).await);
        };
        let (accepted, ()) = soon(async { tokio::join!(accept(), sending) }).await;
        assert!(accepted.is_err());
    }
    // Garbage where frames should be.
    let path = tcp::path(LINK_ALPN).unwrap();
    let accepting = async { links.accept().await.unwrap().accept().await.unwrap() };
    let asking = async {
        let mut raw = world.raw(&authority, world.client_tls()).await;
        let (_, mut send, body) = raw.post(&path).await;
        send.send_data(frame(0xff, 100), false).unwrap();
        (raw, send, body)
    };
    let (link, _held) = soon(async { tokio::join!(accepting, asking) }).await;
    assert!(soon(link.closed()).await.contains("does not begin as one"));
    for error in [link.receive().await.map(drop), link.send_whole(frame(1, 1)).await] {
        assert!(matches!(error, Err(TransportError::BadFrame(_))), "{error:?}");
    }
}

#[tokio::test]
async fn whoever_does_not_read_loses_what_may_be_lost_and_then_the_link() {
    let world = World::new();
    let (links, authority) = world.serving();
    let path = tcp::path(LINK_ALPN).unwrap();
    let accepting = async { links.accept().await.unwrap().accept().await.unwrap() };
    let asking = async {
        let mut raw = world.raw(&authority, world.client_tls()).await;
        // It answers pings, and gives no credit back.
        let (_, send, body) = raw.post(&path).await;
        (raw, send, body)
    };
    let (link, _held) = soon(async { tokio::join!(accepting, asking) }).await;
    for _ in 0..10_000 {
        link.send(frame(1, 1000)).await.unwrap();
        tokio::task::yield_now().await;
    }
    let began: Instant = clock::now();
    let whole = soon(link.send_whole(frame(1, 1000))).await.unwrap_err().to_string();
    assert!(whole.contains("does not read"), "{whole}");
    assert!(soon(link.closed()).await.contains("does not read"));
    assert!(clock::now() - began >= DONE_WITHIN / 2);
}

#[tokio::test]
async fn a_frame_that_does_not_end_and_a_half_that_does_end_the_link() {
    let world = World::new();
    let (links, authority) = world.serving();
    let path = tcp::path(LINK_ALPN).unwrap();
    for (piece, is_end, says) in [(&[0, 0][..], false, UNENDED), (&[], true, "closed by peer")] {
        let accepting = async { links.accept().await.unwrap().accept().await.unwrap() };
        let asking = async {
            let mut raw = world.raw(&authority, world.client_tls()).await;
            let (_, mut send, body) = raw.post(&path).await;
            send.send_data(Bytes::copy_from_slice(piece), is_end).unwrap();
            (raw, send, body)
        };
        let (link, _held) = soon(async { tokio::join!(accepting, asking) }).await;
        assert_eq!(soon(link.closed()).await, says);
    }
}
