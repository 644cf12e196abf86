//! Calls over HTTP/2 with as little work for each as there can be. In a closed loop a bench and its server take turns, and
//! what a call costs this end is in every figure: through the layers that other commands use it is three times as much.
//!
//! HTTP/2 is the `h2` crate's; what is here is a connection that is opened again when it breaks, and gRPC's framing.

use std::{
    cell::RefCell,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use base::clock;
use bytes::{Bytes, BytesMut};
use h2::{RecvStream, client::SendRequest};
use http::{HeaderMap, Method, Request, Response, Uri, Version, header};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_util::task::TaskTracker;
use tonic::Code;
use transport::grpc;

use super::subject::Grpc;
use crate::{
    caller::SERVED_BY,
    load::{Outcome, Wrong},
    target::Whom,
};

/// How long dialling may take, and how long after a failure the next dial comes: a dead server is not hammered.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
const REDIAL_AFTER: Duration = Duration::from_millis(100);
/// Bytes the server may send ahead, for one call and for all.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Longest message that is read.
const MESSAGE_BYTES_MAX: usize = 256 << 20;

/// One connection of one thread.
#[derive(Debug)]
pub(super) struct Connection {
    whom: Whom,
    head: Request<()>,
    sender: RefCell<Option<SendRequest<Bytes>>>,
    /// When the server may be dialled again.
    dial: tokio::sync::Mutex<Instant>,
    tasks: TaskTracker,
}

/// What came of an answer.
struct Seen<F> {
    on: F,
    buffer: BytesMut,
    messages: u64,
    first: Option<Instant>,
    served_by: Option<String>,
}

impl Connection {
    /// Connects.
    pub(super) async fn open(grpc: &Grpc, tasks: &TaskTracker) -> anyhow::Result<Self> {
        let whom = grpc.whom.clone();
        let uri = Uri::builder()
            .scheme(whom.protocol.scheme())
            .authority(whom.authority.clone())
            .path_and_query(grpc.method.path.clone())
            .build()?;
        let mut head = Request::new(());
        *head.method_mut() = Method::POST;
        *head.uri_mut() = uri;
        *head.version_mut() = Version::HTTP_2;
        let mut headers = grpc.method.metadata.clone().into_headers();
        headers.insert(header::CONTENT_TYPE, "application/grpc".parse()?);
        headers.insert(header::TE, "trailers".parse()?);
        if let Some(deadline) = grpc.method.deadline {
            // At most eight digits: milliseconds are enough for a day.
            let ms = deadline.as_millis().clamp(1, 99_999_999);
            headers.insert(grpc::GRPC_TIMEOUT, format!("{ms}m").parse()?);
        }
        *head.headers_mut() = headers;
        let opened = Self {
            whom,
            head,
            sender: RefCell::new(None),
            dial: tokio::sync::Mutex::new(clock::now()),
            tasks: tasks.clone(),
        };
        let sender = opened.connect().await?;
        opened.sender.replace(Some(sender));
        Ok(opened)
    }

    /// Makes a call with `body`, whose messages are framed; hands each message of the answer to `on`.
    pub(super) async fn call(
        &self,
        body: Bytes,
        limit: Duration,
        on: impl FnMut(&Bytes),
    ) -> Outcome {
        let mut seen =
            Seen { on, buffer: BytesMut::new(), messages: 0, first: None, served_by: None };
        let result = {
            // Pinned here: it is large, and would be moved at each turn.
            let attempt = std::pin::pin!(self.attempt(body, &mut seen));
            let ended = tokio::time::timeout(limit, attempt).await;
            ended.unwrap_or_else(|_| Err(status(Code::DeadlineExceeded)))
        };
        let Seen { messages, first, served_by, .. } = seen;
        Outcome { result, first, ended: clock::now(), messages, bytes: 0, served_by }
    }

    async fn attempt<F: FnMut(&Bytes)>(
        &self,
        body: Bytes,
        seen: &mut Seen<F>,
    ) -> Result<(), Wrong> {
        let mut sender = self.sender().await?;
        let (response, mut upload) =
            sender.send_request(self.head.clone(), false).map_err(|e| broken(&e))?;
        upload.send_data(body, true).map_err(|error| broken(&error))?;
        let response = response.await.map_err(|error| broken(&error))?;
        let (head, mut body) = answer(response)?.into_parts();
        if let Some(by) = head.headers.get(SERVED_BY).and_then(|by| by.to_str().ok()) {
            seen.served_by = Some(by.to_owned());
        }
        if let Some(code) = grpc::status_code(&head.headers) {
            return ended(code);
        }
        while let Some(data) = body.data().await {
            let data = data.map_err(|error| broken(&error))?;
            // The window is only smaller for what could not be given back.
            drop(body.flow_control().release_capacity(data.len()));
            seen.data(data)?;
        }
        let trailers = body.trailers().await.map_err(|error| broken(&error))?;
        let code = trailers.as_ref().and_then(|trailers: &HeaderMap| grpc::status_code(trailers));
        if !seen.buffer.is_empty() {
            return Err(Wrong::Answer("an answer that ends in the middle of a message".to_owned()));
        }
        code.map_or_else(|| Err(Wrong::Answer("an answer without a status".to_owned())), ended)
    }

    /// The connection, when it takes another call; opened again if it broke.
    async fn sender(&self) -> Result<SendRequest<Bytes>, Wrong> {
        let sender = self.sender.borrow().clone();
        if let Some(sender) = sender
            && let Ok(ready) = sender.ready().await
        {
            return Ok(ready);
        }
        let mut next = self.dial.lock().await;
        // Another call may have opened it meanwhile.
        let sender = self.sender.borrow().clone();
        if let Some(sender) = sender
            && let Ok(ready) = sender.ready().await
        {
            return Ok(ready);
        }
        tokio::time::sleep_until((*next).into()).await;
        *next = clock::now() + REDIAL_AFTER;
        let dialled = self.connect().await.map_err(|_| status(Code::Unavailable))?;
        self.sender.replace(Some(dialled.clone()));
        dialled.ready().await.map_err(|error| broken(&error))
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Bytes>> {
        let dialling = async {
            let authority = &self.whom.authority;
            let host = authority.host().trim_start_matches('[').trim_end_matches(']');
            let port = authority.port_u16().context("no port")?;
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            let Some(tls) = &self.whom.tls else { return self.greet(stream).await };
            let mut config = tls.config().clone();
            config.alpn_protocols = vec![b"h2".to_vec()];
            let name = self.whom.server_name.as_deref().unwrap_or(host).to_owned();
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            let stream = connector.connect(ServerName::try_from(name)?, stream).await?;
            self.greet(stream).await
        };
        let dialled = tokio::time::timeout(DIAL_TIMEOUT, dialling).await;
        dialled
            .unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {DIAL_TIMEOUT:?}")))
            .with_context(|| format!("cannot reach {}", self.whom.authority))
    }

    async fn greet<I>(&self, stream: I) -> anyhow::Result<SendRequest<Bytes>>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .handshake(stream)
            .await?;
        // It ends with its last sender; what broke it is told to the calls.
        self.tasks.spawn(async move { drop(connection.await) });
        Ok(sender)
    }
}

impl<F: FnMut(&Bytes)> Seen<F> {
    /// Takes in a piece of the answer: a flag, a length of four bytes, a message, and so on.
    fn data(&mut self, data: Bytes) -> Result<(), Wrong> {
        // Mostly a piece is a message, and need not be copied.
        let mut data = data;
        if self.buffer.is_empty() {
            while let Some(whole) = whole(&data)? {
                let message = data.split_to(whole).slice(PREFIX..);
                self.message(&message);
            }
        }
        self.buffer.extend_from_slice(&data);
        while let Some(whole) = whole(&self.buffer)? {
            let message = self.buffer.split_to(whole).freeze().slice(PREFIX..);
            self.message(&message);
        }
        Ok(())
    }

    fn message(&mut self, message: &Bytes) {
        self.messages += 1;
        self.first.get_or_insert_with(clock::now);
        (self.on)(message);
    }
}

/// What leads a message.
const PREFIX: usize = 5;

/// How long the first message is with its prefix, if it is all there.
fn whole(data: &[u8]) -> Result<Option<usize>, Wrong> {
    let Some(([flag, length @ ..], rest)) = data.split_first_chunk::<PREFIX>() else {
        return Ok(None);
    };
    if *flag != 0 {
        return Err(Wrong::Answer("a compressed message, which was not asked for".to_owned()));
    }
    let length = u32::from_be_bytes(*length) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(Wrong::Answer(format!("a message of {length} bytes")));
    }
    Ok((rest.len() >= length).then_some(PREFIX + length))
}

/// An answer of gRPC, whatever its status.
fn answer(response: Response<RecvStream>) -> Result<Response<RecvStream>, Wrong> {
    if grpc::is_grpc(response.headers()) {
        Ok(response)
    } else {
        Err(Wrong::Status(format!("HTTP {}", response.status().as_u16())))
    }
}

fn ended(code: Code) -> Result<(), Wrong> {
    if code == Code::Ok { Ok(()) } else { Err(status(code)) }
}

fn status(code: Code) -> Wrong {
    Wrong::Status(grpc::code_name(code).to_owned())
}

/// What a broken connection or stream is counted as.
fn broken(error: &h2::Error) -> Wrong {
    match error.reason() {
        Some(reason) if error.is_reset() => Wrong::Status(format!("reset: {reason:?}")),
        _ => status(Code::Unavailable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(pieces: &[&[u8]]) -> Result<(Vec<Bytes>, usize), Wrong> {
        let mut found = Vec::new();
        let on = |message: &Bytes| found.push(message.clone());
        let mut seen =
            Seen { on, buffer: BytesMut::new(), messages: 0, first: None, served_by: None };
        for piece in pieces {
            seen.data(Bytes::copy_from_slice(piece))?;
        }
        let left = seen.buffer.len();
        Ok((found, left))
    }

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let bytes = b"\0\0\0\0\x03abc\0\0\0\0\0\0\0\0\0\x01d";
        for cut in 0..bytes.len() {
            let (found, left) = messages(&[&bytes[..cut], &bytes[cut..]]).unwrap();
            assert_eq!((found, left), (vec!["abc".into(), "".into(), "d".into()], 0), "{cut}");
        }
        assert_eq!(messages(&[b"\0\0\0\0\x03ab"]).unwrap(), (vec![], 7));
        assert!(messages(&[b"\x01\0\0\0\0"]).is_err() && messages(&[b"\0\xff\0\0\0"]).is_err());
    }
}
