//! The serving end of an HTTP/3 connection.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use http::{Request, Response, StatusCode};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::{Service, ServiceExt as _};

use super::{
    Code,
    connection::{Connection, Side},
    frame::Frame,
    headers,
    stream::{Cut, Incoming, Receiver, Sender},
};
use crate::{Acknowledge, CallInfo, Lease, Limits, TransportError};

/// Serves one connection until it ends, or until `drain` or the end of its lease and then the last call in progress.
pub(crate) async fn serve<S>(
    quic: quinn::Connection,
    limits: Arc<Limits>,
    info: CallInfo,
    service: S,
    drain: CancellationToken,
    lease: Lease,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send,
{
    let connection = Connection::new(quic.clone(), limits.clone(), Side::Server);
    let mut calls = JoinSet::new();
    let mut granted = limits.first_streams();
    let next_stream = AtomicU64::new(0);
    let upkeep = connection.run();
    tokio::pin!(upkeep);
    let (mut draining, mut announced) = (false, false);
    // Both run beside the rest, so that late streams are refused meanwhile.
    let announce = async { connection.send_goaway(next_stream.load(Ordering::Relaxed)).await };
    let linger = connection.linger();
    // Made once: each costs a lock to begin and another to end.
    let (drained, over, withdrawn) = (drain.cancelled(), lease.over(), lease.withdrawn());
    tokio::pin!(announce, linger, drained, over, withdrawn);
    loop {
        tokio::select! {
            () = &mut upkeep => return,
            stream = quic.accept_bi() => {
                let Ok((send, recv)) = stream else { return };
                let sender = Sender::new(send, connection.clone(), Code::INTERNAL_ERROR);
                if draining {
                    // §5.2: not begun, so the client may try it elsewhere.
                    drop(Receiver::new(recv, connection.clone(), Code::REQUEST_REJECTED));
                    sender.reset(Code::REQUEST_REJECTED);
                    continue;
                }
                next_stream.store(u64::from(recv.id()) + 4, Ordering::Relaxed);
                sender.set_urgency(3);
                let call = serve_call(connection.clone(), sender, recv, info.clone(), service.clone());
                calls.spawn(call);
                if calls.len() * 4 > granted as usize * 3 && granted < limits.streams {
                    granted = granted.saturating_mul(2).min(limits.streams);
                    quic.set_max_concurrent_bi_streams(granted.into());
                }
            }
            Some(ended) = calls.join_next() => {
                if let Err(error) = ended && error.is_panic() {
                    tracing::error!(%error, "a handler panicked; its call was reset");
                }
            }
            // First no stream is begun any more, then the first that was not is announced.
            () = &mut drained, if !draining => draining = true,
            () = &mut over, if !draining => draining = true,
            () = &mut withdrawn => {
                quic.close(Code::NO_ERROR.into(), b"the certificate was withdrawn");
                return;
            }
            () = &mut announce, if draining && !announced => announced = true,
            () = &mut linger, if announced && calls.is_empty() => {
                quic.close(Code::NO_ERROR.into(), b"drained");
                return;
            }
        }
    }
}

/// Serves one request stream.
async fn serve_call<S>(
    connection: Arc<Connection>,
    mut sender: Sender,
    recv: quinn::RecvStream,
    info: CallInfo,
    service: S,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    // Until the reply has been sent: a quiet call is not an idle connection.
    let _in_flight = connection.begin();
    let mut receiver = Receiver::new(recv, connection.clone(), Code::NO_ERROR);
    let deadline = connection.limits.handshake_timeout;
    let head = match tokio::time::timeout(deadline, read_head(&mut receiver)).await {
        Ok(Ok(head)) => head,
        Ok(Err(TransportError::HeadersTooLong { .. })) => {
            return refuse(&connection, sender, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE).await;
        }
        Ok(Err(TransportError::Malformed(reason))) => {
            tracing::debug!(reason, remote = %info.remote, "malformed request");
            receiver.stop(Code::MESSAGE_ERROR);
            return sender.reset(Code::MESSAGE_ERROR);
        }
        Ok(Err(_)) => return sender.reset(Code::REQUEST_CANCELLED),
        Err(_) => {
            receiver.stop(Code::REQUEST_INCOMPLETE);
            return sender.reset(Code::REQUEST_INCOMPLETE);
        }
    };
    let Ok(content_length) = headers::content_length(head.headers()) else {
        receiver.stop(Code::MESSAGE_ERROR);
        return sender.reset(Code::MESSAGE_ERROR);
    };
    if let Some(urgency) = urgency(head.headers()) {
        sender.set_urgency(urgency);
    }
    let body = Incoming::new(receiver, content_length, Code::NO_ERROR, None, None);
    let mut request = head.map(|()| Body::new(body));
    request.extensions_mut().insert(info);
    let acknowledge = Acknowledge::default();
    request.extensions_mut().insert(acknowledge.clone());

    let stopped = sender.stopped();
    tokio::pin!(stopped);
    let handled = {
        let acknowledging = async {
            acknowledge.wanted().await;
            // A caller that is gone is noticed by `stopped`.
            drop(sender.send_interim(headers::interim(StatusCode::EARLY_HINTS)).await);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            // The caller went away: dropping the handler is the cancellation. Looked at first, so that what breaks off
            // with it is not taken for a failure.
            () = &mut stopped => None,
            response = service.oneshot(request) => Some(response),
            () = acknowledging => None,
        }
    };
    let Some(Ok(response)) = handled else { return sender.reset(Code::REQUEST_CANCELLED) };
    let outcome = tokio::select! {
        outcome = respond(&connection, &mut sender, response) => outcome,
        () = &mut stopped => return sender.reset(Code::REQUEST_CANCELLED),
    };
    match outcome {
        // Sent is not delivered: a connection that is closed now would take the rest along.
        Ok(()) => sender.delivered().await,
        Err(Cut::Stopped | Cut::Lost) => sender.reset(Code::REQUEST_CANCELLED),
        Err(Cut::Body(status)) => {
            tracing::debug!(%status, "a reply broke off; the stream is reset");
            sender.reset(Code::INTERNAL_ERROR);
        }
        Err(Cut::TooLong) => {
            tracing::debug!("the reply's header section is longer than the client accepts");
            sender.reset(Code::INTERNAL_ERROR);
        }
    }
}

async fn read_head(receiver: &mut Receiver) -> Result<Request<()>, TransportError> {
    match receiver.frame().await? {
        Some(Frame::Headers(section)) => {
            headers::decode_request(&section, receiver.section_limit())
                .map_err(|error| receiver.section_error(error))
        }
        Some(Frame::HeadersTooLong) => {
            Err(TransportError::HeadersTooLong { limit_bytes: receiver.section_limit() })
        }
        Some(_) => Err(receiver.out_of_order()),
        None => Err(TransportError::Malformed("a stream without a request")),
    }
}

async fn respond(
    connection: &Connection,
    sender: &mut Sender,
    response: Response<Body>,
) -> Result<(), Cut> {
    let (head, body) = response.into_parts();
    let section = headers::encode_response(&head, connection.peer_section_limit())
        .map_err(|_| Cut::TooLong)?;
    sender.send(headers::frame(&section), body).await
}

async fn refuse(connection: &Connection, mut sender: Sender, status: StatusCode) {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    if respond(connection, &mut sender, response).await.is_err() {
        sender.reset(Code::REQUEST_REJECTED);
    }
}

/// RFC 9218 §4.1: the urgency in a `priority` field, 0 (most urgent) to 7.
fn urgency(headers: &http::HeaderMap) -> Option<u8> {
    let text = headers.get("priority")?.to_str().ok()?;
    let value = text.split(',').find_map(|member| member.trim().strip_prefix("u="))?;
    value.parse().ok().filter(|urgency| *urgency <= 7)
}
