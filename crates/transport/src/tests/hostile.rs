//! Peers that break the rules of HTTP/3: what may end is their stream, or their connection where the RFC demands it.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};

use super::world::{Handler, Way, World, collect, echo, full, request, soon};
use crate::{
    Limits,
    h3::{Code, qpack::Encoder},
};

fn varint(out: &mut BytesMut, value: u64) {
    out.put_u64((0b11 << 62) | value);
}

/// A frame with lengths in their longest form, which readers must accept too.
pub(super) fn frame(kind: u64, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::new();
    varint(&mut out, kind);
    varint(&mut out, payload.len() as u64);
    out.put_slice(payload);
    out.freeze()
}

pub(super) fn headers(lines: &[(&str, &str)]) -> Bytes {
    let mut encoder = Encoder::new(BytesMut::new());
    for (name, value) in lines {
        encoder.line(name, value.as_bytes(), false);
    }
    frame(1, &encoder.finish())
}

pub(super) const HEAD: [(&str, &str); 5] = [
    (":method", "POST"),
    (":scheme", "https"),
    (":authority", "localhost"),
    (":path", "/p.S/M"),
    ("content-type", "application/grpc"),
];

/// How a request stream ended for its sender.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    Answered(Vec<u8>),
    Reset(u64),
    Closed(u64),
}

pub(super) async fn end_of(recv: &mut quinn::RecvStream) -> End {
    let mut bytes = Vec::new();
    loop {
        match soon(recv.read_chunk(1 << 16, true)).await {
            Ok(Some(chunk)) => bytes.extend_from_slice(&chunk.bytes),
            Ok(None) => return End::Answered(bytes),
            Err(quinn::ReadError::Reset(code)) => return End::Reset(code.into_inner()),
            Err(quinn::ReadError::ConnectionLost(quinn::ConnectionError::ApplicationClosed(
                close,
            ))) => {
                return End::Closed(close.error_code.into_inner());
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Sends `parts` on a request stream and returns how it ends.
pub(super) async fn exchange(connection: &quinn::Connection, parts: &[Bytes], finish: bool) -> End {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    for part in parts {
        if send.write_all(part).await.is_err() {
            break;
        }
    }
    if finish {
        drop(send.finish());
    }
    end_of(&mut recv).await
}

#[tokio::test]
async fn a_malformed_request_ends_its_stream_only() {
    let world = World::new(Way::H3, echo());
    let connection = world.raw().await;
    // An innocent call on the same connection.
    let (mut innocent, mut reply) = connection.open_bi().await.unwrap();
    innocent.write_all(&headers(&HEAD)).await.unwrap();

    let with = |more: &[(&str, &str)]| headers(&[&HEAD, more].concat());
    for (parts, code) in [
        (vec![with(&[("host", "elsewhere")])], Code::MESSAGE_ERROR),
        (vec![with(&[("connection", "close")])], Code::MESSAGE_ERROR),
        (vec![with(&[("Upper", "x")])], Code::MESSAGE_ERROR),
        (vec![with(&[(":path", "/again")])], Code::MESSAGE_ERROR),
        (vec![headers(&HEAD[1..])], Code::MESSAGE_ERROR),
        (vec![with(&[("content-length", "x")])], Code::MESSAGE_ERROR),
        (vec![], Code::MESSAGE_ERROR),
    ] {
        assert_eq!(exchange(&connection, &parts, true).await, End::Reset(code.0), "{parts:?}");
    }
    innocent.write_all(&frame(0, b"hello")).await.unwrap();
    innocent.finish().unwrap();
    let End::Answered(bytes) = end_of(&mut reply).await else { panic!("the innocent call died") };
    assert!(bytes.windows(5).any(|w| w == b"hello"));
}

#[tokio::test]
async fn a_wrong_content_length_is_an_error_at_the_handler() {
    let world = World::new(
        Way::H3,
        Handler::new(|request| async move {
            let outcome = collect(request.into_body()).await;
            let text = match outcome {
                Ok(_) => "complete".to_owned(),
                Err(status) => status.message().to_owned(),
            };
            http::Response::new(full(text))
        }),
    );
    let connection = world.raw().await;
    for (length, want) in [("3", "less data"), ("1", "more data"), ("2", "complete")] {
        let head = headers(&[&HEAD[..], &[("content-length", length)]].concat());
        let End::Answered(bytes) = exchange(&connection, &[head, frame(0, b"ab")], true).await
        else {
            panic!("no answer")
        };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(text.contains(want), "{length}: {text}");
    }
}

#[tokio::test]
async fn unknown_frames_and_streams_are_skipped_without_being_held() {
    let world = World::new(Way::H3, echo());
    let connection = world.raw().await;
    let mut grease = connection.open_uni().await.unwrap();
    grease.write_all(&[0x21, 1, 2, 3]).await.unwrap();
    // An unknown frame of 24 MiB, more than the connection's window, before the data.
    let huge = Bytes::from(vec![0; 24 << 20]);
    let parts = [
        frame(0x21, b"ignored"),
        headers(&HEAD),
        frame(0x21 + 0x1f * 77, &huge),
        frame(0, b"data"),
        frame(0x21, b""),
    ];
    let End::Answered(bytes) = exchange(&connection, &parts, true).await else {
        panic!("no answer")
    };
    assert!(bytes.windows(4).any(|w| w == b"data"));
}

#[tokio::test]
async fn headers_beyond_the_limit_are_answered_with_431_without_being_held() {
    let world = World::new(Way::H3, echo());
    let connection = world.raw().await;
    let section = Bytes::from(vec![0; 8 << 20]);
    let End::Answered(bytes) = exchange(&connection, &[frame(1, &section)], false).await else {
        panic!("no answer")
    };
    assert!(bytes.windows(3).any(|w| w == b"431"), "{bytes:?}");
}

#[tokio::test]
async fn what_the_rfc_calls_connection_errors_closes_the_connection() {
    let world = World::new(Way::H3, echo());
    for (parts, code) in [
        (vec![frame(0, b"data first")], Code::FRAME_UNEXPECTED),
        (vec![headers(&HEAD), frame(4, &[])], Code::FRAME_UNEXPECTED),
        (vec![frame(1, &[0, 0, 0x80])], Code::QPACK_DECOMPRESSION_FAILED),
        (vec![headers(&HEAD), Bytes::from_static(&[0, 9, 1])], Code::FRAME_ERROR),
    ] {
        let connection = world.raw().await;
        assert_eq!(exchange(&connection, &parts, true).await, End::Closed(code.0), "{parts:?}");
    }
    for (bytes, code) in [
        (&[0x00, 0x07, 0x01, 0x00][..], Code::MISSING_SETTINGS),
        (&[0x00, 0x04, 0x02, 0x02, 0x00], Code::SETTINGS_ERROR),
        (&[0x01, 0x00], Code::STREAM_CREATION_ERROR),
        (&[0x02, 0x3f, 0xe1], Code::QPACK_ENCODER_STREAM_ERROR),
    ] {
        let connection = world.raw().await;
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(bytes).await.unwrap();
        match soon(connection.closed()).await {
            quinn::ConnectionError::ApplicationClosed(close) => {
                assert_eq!(close.error_code.into_inner(), code.0, "{bytes:?}");
            }
            other => panic!("{other}"),
        }
    }
    let connection = world.raw().await;
    let mut control = connection.open_uni().await.unwrap();
    control.write_all(&[0x00, 0x04, 0x00]).await.unwrap();
    control.finish().unwrap();
    match soon(connection.closed()).await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            assert_eq!(close.error_code.into_inner(), Code::CLOSED_CRITICAL_STREAM.0);
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_stream_that_sends_no_request_is_given_up() {
    let limits = Limits { handshake_timeout: Duration::from_millis(200), ..Limits::clients() };
    let world = World::with(Way::H3, limits, Limits::peers(), echo());
    let connection = world.raw().await;
    let end = exchange(&connection, &[Bytes::from_static(&[0x01])], false).await;
    assert_eq!(end, End::Reset(Code::REQUEST_INCOMPLETE.0));
}

#[tokio::test]
async fn more_streams_than_allowed_wait_and_are_served_in_turn() {
    let limits = Limits { streams: 2, ..Limits::clients() };
    let world = World::with(Way::H3, limits, Limits::peers(), echo());
    let connection = world.raw().await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let (mut send, recv) = connection.open_bi().await.unwrap();
        send.write_all(&headers(&HEAD)).await.unwrap();
        open.push((send, recv));
    }
    let third = tokio::time::timeout(Duration::from_millis(200), connection.open_bi()).await;
    assert!(third.is_err(), "a third stream was granted");
    for (mut send, mut recv) in open {
        send.finish().unwrap();
        end_of(&mut recv).await;
    }
    soon(connection.open_bi()).await.unwrap();
}

#[tokio::test]
async fn handshakes_beyond_the_limit_are_refused_and_above_a_share_prove_their_address() {
    let none = Limits { handshakes: 0, ..Limits::clients() };
    let world = World::with(Way::H3, none, Limits::peers(), echo());
    let endpoint = crate::quic::dialing_endpoint(&crate::QuicKeys::random(), 9).unwrap();
    let config = crate::quic::client_config(world.client_tls(), &Limits::peers()).unwrap();
    let refused = endpoint.connect_with(config, world.address, "localhost").unwrap();
    assert!(soon(refused).await.is_err());

    // Every handshake must prove its address; a real client does so without noticing.
    let retry = Limits { retry_above_handshakes: 0, ..Limits::clients() };
    let world = World::with(Way::H3, retry, Limits::peers(), echo());
    let reply = soon(world.channel().send(request("/p.S/M", full("x")))).await.unwrap();
    assert_eq!(reply.version(), http::Version::HTTP_3);
    let full_house = Limits { connections: 1, ..Limits::clients() };
    let world = World::with(Way::H3, full_house, Limits::peers(), echo());
    let _first = world.raw().await;
    let config = crate::quic::client_config(world.client_tls(), &Limits::peers()).unwrap();
    let second = endpoint.connect_with(config, world.address, "localhost").unwrap();
    assert!(soon(second).await.is_err());
}

#[tokio::test]
async fn a_client_that_resets_again_and_again_over_http2_is_cut_off() {
    let world = World::new(Way::H2c, echo());
    let stream = tokio::net::TcpStream::connect(world.address).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let running = tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    for _ in 0..500 {
        let request = http::Request::post("http://localhost/p.S/M").body(()).unwrap();
        let Ok((_, mut body)) = sender.send_request(request, false) else { break };
        body.send_reset(h2::Reason::CANCEL);
        if soon(std::future::poll_fn(|cx| sender.poll_ready(cx))).await.is_err() {
            break;
        }
    }
    let error = soon(running).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM), "{error}");
}

#[tokio::test]
async fn http2_streams_beyond_the_limit_are_refused() {
    let limits = Limits { h2_streams: 2, ..Limits::clients() };
    let world = World::with(Way::H2c, limits, Limits::peers(), echo());
    let stream = tokio::net::TcpStream::connect(world.address).await.unwrap();
    // A client that claims not to know of limits: it may open as many as it likes until the server's SETTINGS come.
    let (sender, connection) = h2::client::Builder::new()
        .initial_max_send_streams(100)
        .handshake::<_, Bytes>(stream)
        .await
        .unwrap();
    let mut sender = sender.ready().await.unwrap();
    let request = || http::Request::post("http://localhost/p.S/M").body(()).unwrap();
    // Sent in one go, before anything is heard.
    let open: Vec<_> = (0..5).map(|_| sender.send_request(request(), false).unwrap()).collect();
    tokio::spawn(connection);
    let (mut answered, mut refused) = (0, 0);
    for (reply, _upload) in open {
        match soon(reply).await {
            Ok(_) => answered += 1,
            Err(error) if error.reason() == Some(h2::Reason::REFUSED_STREAM) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((answered, refused), (2, 3));
}
