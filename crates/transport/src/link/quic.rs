//! Links over QUIC: a short frame is a datagram, which may be lost; a longer one, or one that must arrive, is a unidirectional
//! stream of its own.

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use base::clock;
use bytes::{Bytes, BytesMut};
use quinn::{
    AckFrequencyConfig, ConnectionError, TransportConfig,
    crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
};
use tokio::sync::Mutex;

use super::{DONE_WITHIN, FRAME_BYTES_MAX, IDLE, KEEP_ALIVE, NoLink, TOO_LONG, UNENDED, closed};
use crate::{TransportError, quic};

/// Unidirectional streams the other end may have open.
const STREAMS: u32 = 16;
/// Bytes of datagrams held for a reader that is late; older ones are dropped.
const DATAGRAMS_HELD_BYTES: usize = 64 << 10;
/// What is believed of the way to somebody who has not answered yet: a first packet that is lost is sent again after three
/// times as long, well before TCP is dialled instead or the dial is given up.
const RTT_FIRST: std::time::Duration = std::time::Duration::from_millis(100);

pub(super) fn transport_config() -> TransportConfig {
    // Frames are few and far between: an acknowledgement that waits for a second one only wakes the node once more.
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(0u32.into());
    let mut config = TransportConfig::default();
    config
        .ack_frequency_config(Some(acks))
        .initial_rtt(RTT_FIRST)
        .max_concurrent_bidi_streams(0u32.into())
        .max_concurrent_uni_streams(STREAMS.into())
        .stream_receive_window((FRAME_BYTES_MAX as u32).into())
        .receive_window((STREAMS * FRAME_BYTES_MAX as u32).into())
        .datagram_receive_buffer_size(Some(DATAGRAMS_HELD_BYTES))
        .datagram_send_buffer_size(DATAGRAMS_HELD_BYTES)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(quinn::IdleTimeout::try_from(IDLE).ok());
    config
}

/// The serving end.
pub(super) fn server_config(
    mut tls: rustls::ServerConfig,
    transport: Arc<TransportConfig>,
) -> io::Result<quinn::ServerConfig> {
    tls.max_early_data_size = 0;
    let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(transport);
    Ok(server)
}

/// The dialling end.
pub(super) fn client_config(
    mut tls: rustls::ClientConfig,
    transport: Arc<TransportConfig>,
) -> Result<quinn::ClientConfig, String> {
    tls.enable_early_data = false;
    let crypto = QuicClientConfig::try_from(tls).map_err(|error| error.to_string())?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport);
    Ok(config)
}

/// Does the handshake another node began.
pub(super) async fn accept(incoming: quinn::Incoming) -> Result<QuicLink, NoLink> {
    let failed = |error: ConnectionError| NoLink {
        why: error.to_string(),
        is_refusal: quic::is_refusal(&error),
    };
    let connecting = incoming.accept().map_err(failed)?;
    match tokio::time::timeout(DONE_WITHIN, connecting).await {
        Ok(connected) => connected.map(QuicLink::new).map_err(failed),
        Err(_) => Err(NoLink::failed("the handshake took too long")),
    }
}

/// Whether a handshake failed for what one of both ends showed or speaks: over TCP it would be the same.
pub(super) fn is_final(error: &ConnectionError) -> bool {
    match error {
        ConnectionError::TransportError(error) => quic::is_alert(error.code.into()),
        ConnectionError::ConnectionClosed(close) => quic::is_alert(close.error_code.into()),
        _ => false,
    }
}

/// A link over QUIC. Cloneable.
#[derive(Clone, Debug)]
pub(super) struct QuicLink {
    pub(super) connection: quinn::Connection,
    /// The frame that is being read, so that whoever gives up reading it loses nothing.
    coming: Arc<Mutex<Option<Coming>>>,
}

#[derive(Debug)]
struct Coming {
    stream: quinn::RecvStream,
    bytes: BytesMut,
    until: Instant,
}

impl QuicLink {
    pub(super) fn new(connection: quinn::Connection) -> Self {
        Self { connection, coming: Arc::default() }
    }

    pub(super) fn remote(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    pub(super) fn protocol(&self) -> Vec<u8> {
        let data = self.connection.handshake_data().map(|d| d.downcast::<HandshakeData>());
        data.and_then(Result::ok).and_then(|data| data.protocol).unwrap_or_default()
    }

    pub(super) async fn send(&self, frame: Bytes) -> Result<(), TransportError> {
        if self.connection.max_datagram_size().is_some_and(|most| frame.len() <= most) {
            return self.connection.send_datagram(frame).map_err(closed);
        }
        self.send_whole(frame).await
    }

    pub(super) async fn send_whole(&self, frame: Bytes) -> Result<(), TransportError> {
        let mut stream = self.connection.open_uni().await.map_err(closed)?;
        stream.write_chunk(frame).await.map_err(closed)?;
        stream.finish().map_err(closed)
    }

    pub(super) async fn receive(&self) -> Result<Bytes, TransportError> {
        tokio::select! {
            datagram = self.connection.read_datagram() => datagram.map_err(closed),
            whole = self.receive_whole() => whole,
        }
    }

    /// The next frame that comes as a stream.
    pub(super) async fn receive_whole(&self) -> Result<Bytes, TransportError> {
        let mut coming = self.coming.lock().await;
        if coming.is_none() {
            let stream = self.connection.accept_uni().await.map_err(closed)?;
            let until = clock::now() + DONE_WITHIN;
            *coming = Some(Coming { stream, bytes: BytesMut::new(), until });
        }
        let Some(frame) = coming.as_mut() else { return Err(closed(UNENDED)) };
        let read = tokio::time::timeout_at(frame.until.into(), frame.read()).await;
        *coming = None;
        match read {
            Ok(read) => read,
            Err(_) => Err(closed(UNENDED)),
        }
    }

    pub(super) async fn ask(&self, question: Bytes) -> Result<Bytes, TransportError> {
        let asking = async {
            let (mut send, mut receive) =
                self.connection.open_bi().await.map_err(|e| e.to_string())?;
            send.write_chunk(question).await.map_err(|e| e.to_string())?;
            send.finish().map_err(|e| e.to_string())?;
            receive.read_to_end(FRAME_BYTES_MAX).await.map_err(|e| e.to_string())
        };
        match asking.await {
            Ok(answer) => Ok(answer.into()),
            // What ended the link says more than that the stream is gone.
            Err(error) => Err(match self.connection.close_reason() {
                Some(reason) => closed(reason),
                None => closed(error),
            }),
        }
    }

    pub(super) async fn asked(
        &self,
        bytes_max: usize,
    ) -> Result<(Bytes, quinn::SendStream), TransportError> {
        self.connection.set_max_concurrent_bi_streams(1u32.into());
        let (send, mut receive) = self.connection.accept_bi().await.map_err(closed)?;
        let question = receive.read_to_end(bytes_max).await.map_err(closed)?;
        Ok((question.into(), send))
    }

    pub(super) fn close(&self, reason: &str) {
        self.connection.close(1u32.into(), reason.as_bytes());
    }
}

impl Coming {
    /// May be given up and taken up again.
    async fn read(&mut self) -> Result<Bytes, TransportError> {
        loop {
            match self.stream.read_chunk(FRAME_BYTES_MAX, true).await {
                Ok(Some(chunk)) if self.bytes.len() + chunk.bytes.len() > FRAME_BYTES_MAX => {
                    return Err(TransportError::BadFrame(TOO_LONG));
                }
                Ok(Some(chunk)) => self.bytes.extend_from_slice(&chunk.bytes),
                Ok(None) => return Ok(std::mem::take(&mut self.bytes).freeze()),
                Err(error) => return Err(closed(error)),
            }
        }
    }
}

/// Sends the answer to a question, and waits until the other end has it.
pub(super) async fn answer(
    send: &mut quinn::SendStream,
    answer: Bytes,
) -> Result<(), TransportError> {
    send.write_chunk(answer).await.map_err(closed)?;
    send.finish().map_err(closed)?;
    send.stopped().await.map(drop).map_err(closed)
}
