//! The calling end of an HTTP/3 connection.

use std::{sync::Arc, time::Instant};

use http::{Request, Response};
use tokio_util::task::TaskTracker;
use tonic::{Status, body::Body};

use super::{
    Code,
    connection::{Connection, InFlight, Side},
    frame::Frame,
    headers,
    stream::{AbortOnDrop, Cut, Incoming, Receiver, Sender},
};
use crate::{Lease, Limits, Progress, TransportError};

/// One connection to a server, cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    connection: Arc<Connection>,
    tasks: TaskTracker,
    lease: Lease,
}

impl Client {
    /// Speaks HTTP/3 on `quic`; upkeep and uploads run as `tasks`.
    pub(crate) fn new(
        quic: quinn::Connection,
        limits: Arc<Limits>,
        tasks: TaskTracker,
        lease: Lease,
    ) -> Self {
        let connection = Connection::new(quic, limits, Side::Client);
        let (upkeep, until) = (connection.clone(), lease.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = upkeep.run() => {}
                () = until.withdrawn() => {
                    upkeep.quic.close(Code::NO_ERROR.into(), b"the certificate was withdrawn");
                }
            }
        });
        Self { connection, tasks, lease }
    }

    /// Whether new calls may be made on it.
    pub(crate) fn is_usable(&self, now: Instant) -> bool {
        let is_open = self.connection.quic.close_reason().is_none();
        is_open && !self.connection.is_going_away() && !self.lease.is_over(now)
    }

    /// Whether another connection should take its place.
    pub(crate) fn is_old(&self, now: Instant) -> bool {
        self.lease.is_old(now)
    }

    /// Calls in progress.
    pub(crate) fn in_flight(&self) -> usize {
        self.connection.in_flight()
    }

    /// Closes the connection; calls in progress fail.
    pub(crate) fn close(&self) {
        self.connection.quic.close(Code::NO_ERROR.into(), b"no longer needed");
    }

    /// Takes a stream for a call. `None`: the server grants none within the limit of waiting.
    pub(crate) async fn open(&self) -> Result<Option<Stream>, TransportError> {
        let in_flight = self.connection.begin();
        let opened = self.connection.quic.open_bi();
        let (send, recv) =
            match tokio::time::timeout(self.connection.limits.stream_wait, opened).await {
                Ok(Ok(halves)) => halves,
                Ok(Err(error)) => return Err(TransportError::from_connection(&error)),
                Err(_) => return Ok(None),
            };
        Ok(Some(Stream {
            sender: Sender::new(send, self.connection.clone(), Code::REQUEST_CANCELLED),
            receiver: Receiver::new(recv, self.connection.clone(), Code::REQUEST_CANCELLED),
            in_flight,
            client: self.clone(),
        }))
    }
}

/// A stream nothing was sent on yet.
#[derive(Debug)]
pub(crate) struct Stream {
    sender: Sender,
    receiver: Receiver,
    in_flight: InFlight,
    client: Client,
}

/// Interim responses one call may bring.
const INTERIM_MAX: usize = 16;

impl Stream {
    /// Makes the call. Dropping the future, or the body of the response, cancels it at the server.
    pub(crate) async fn call(
        self,
        request: Request<Body>,
    ) -> Result<Response<Body>, TransportError> {
        let Self { mut sender, mut receiver, in_flight, client } = self;
        let (head, body) = request.into_parts();
        let progress = head.extensions.get::<Progress>().cloned();
        if let Some(progress) = &progress {
            progress.sent(client.connection.quic.rtt());
        }
        let limit = client.connection.peer_section_limit();
        let section =
            headers::encode_request(&head, limit).map_err(|_| TransportError::RequestTooLong {
                limit_bytes: limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(0),
            })?;
        let mut upload = Some(Box::pin(async move {
            let outcome = sender.send(headers::frame(&section), body).await;
            if let Err(Cut::Body(_) | Cut::TooLong) = &outcome {
                sender.reset(Code::REQUEST_CANCELLED);
            }
            outcome
        }));

        let mut interim = 0;
        let response = loop {
            let uploading = async {
                match upload.as_mut() {
                    Some(upload) => upload.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                outcome = uploading => {
                    upload = None;
                    upload_error(outcome)?;
                }
                head = read_head(&mut receiver) => {
                    let head = head?;
                    if let Some(progress) = &progress {
                        progress.acknowledged();
                    }
                    if !head.status().is_informational() {
                        break head;
                    }
                    interim += 1;
                    if interim > INTERIM_MAX {
                        return Err(TransportError::Malformed("too many interim responses"));
                    }
                }
            }
        };

        let content_length =
            headers::content_length(response.headers()).map_err(|e| receiver.section_error(e))?;
        // The rest of the upload goes on beside the reply, and ends with it.
        let upload = upload.map(|upload| {
            AbortOnDrop(client.tasks.spawn(async move { drop(upload.await) }).abort_handle())
        });
        let body = Incoming::new(
            receiver,
            content_length,
            Code::REQUEST_CANCELLED,
            Some(in_flight),
            upload,
        );
        Ok(response.map(|()| Body::new(body)))
    }
}

/// What the end of an upload means for the call. A server that wants no more (STOP_SENDING) may still answer, and a lost
/// connection is told better by the reading half.
fn upload_error(outcome: Result<(), Cut>) -> Result<(), TransportError> {
    match outcome {
        Ok(()) | Err(Cut::Stopped | Cut::Lost) => Ok(()),
        Err(Cut::TooLong) => Err(TransportError::Malformed("request trailers are too long")),
        Err(Cut::Body(status)) => Err(broken_request(&status)),
    }
}

fn broken_request(status: &Status) -> TransportError {
    TransportError::of(status).cloned().unwrap_or_else(TransportError::cancelled)
}

async fn read_head(receiver: &mut Receiver) -> Result<Response<()>, TransportError> {
    match receiver.frame().await? {
        Some(Frame::Headers(section)) => {
            headers::decode_response(&section, receiver.section_limit())
                .map_err(|error| receiver.section_error(error))
        }
        Some(Frame::HeadersTooLong) => {
            Err(TransportError::HeadersTooLong { limit_bytes: receiver.section_limit() })
        }
        Some(_) => Err(receiver.out_of_order()),
        None => Err(TransportError::Malformed("a stream that ended without a response")),
    }
}
