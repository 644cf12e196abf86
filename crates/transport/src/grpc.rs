//! What gRPC adds to HTTP: statuses in trailers, and deadlines over headers and body.
//!
//! A gRPC reply that ends without `grpc-status`, or breaks off, is never passed on as a clean end: [`ending`] gives it a
//! status that says what happened.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use base::Deadline;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Response, StatusCode, header};
use http_body::{Body as _, Frame, SizeHint};
use tonic::{Code, Status, body::Body};

/// The name of the status field in headers and trailers.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// The name of the timeout field in requests.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Whether a message is gRPC, by its `content-type`.
#[must_use]
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
        .is_some_and(|rest| rest.is_empty() || rest[0] == b'+' || rest[0] == b';')
}

/// The status in headers or trailers; `None` when there is none or it is not a number of gRPC.
#[must_use]
pub fn status_code(headers: &HeaderMap) -> Option<Code> {
    headers.get(GRPC_STATUS).map(|value| Code::from_bytes(value.as_bytes()))
}

/// A reply that is nothing but a status ("Trailers-Only").
#[must_use]
pub fn refusal(status: &Status) -> Response<Body> {
    status.clone().into_http()
}

/// The status of an expired deadline.
#[must_use]
pub fn deadline_exceeded() -> Status {
    Status::deadline_exceeded("the deadline of the call passed")
}

/// Waits for `reply`, at most until `deadline`.
///
/// # Errors
/// DEADLINE_EXCEEDED; `reply` was dropped, which cancels the call below.
pub async fn until<T>(
    deadline: Option<Deadline>,
    reply: impl Future<Output = T>,
) -> Result<T, Status> {
    match deadline {
        None => Ok(reply.await),
        Some(deadline) => tokio::time::timeout_at(deadline.instant().into(), reply)
            .await
            .map_err(|_| deadline_exceeded()),
    }
}

/// What wants to know how a call ended. Called once, with the status the caller sees.
pub trait OnEnd: Send + Unpin {
    /// The call is over.
    fn ended(&mut self, code: Code);
}

impl OnEnd for () {
    fn ended(&mut self, _: Code) {}
}

/// Makes sure that a reply ends with a status and in time, and tells `on_end` how it did.
///
/// Dropped before its end, the call was cancelled by its caller.
pub fn ending<H>(
    reply: Response<Body>,
    deadline: Option<Deadline>,
    from: &'static str,
    mut on_end: H,
) -> Response<Body>
where
    H: OnEnd + 'static,
{
    let (mut head, body) = reply.into_parts();
    let grpc = is_grpc(&head.headers);
    if let Some(code) = status_code(&head.headers)
        && (grpc || body.is_end_stream())
    {
        // Trailers-Only: the head is the end. Passing on a body that has yet to say so would make the last hop send an
        // empty DATA frame, which gRPC clients refuse.
        on_end.ended(code);
        head.headers.remove(header::CONTENT_LENGTH);
        return Response::from_parts(head, Body::empty());
    }
    if !grpc && head.status != StatusCode::OK {
        // gRPC over HTTP/2, "HTTP to gRPC status code mapping": callers map the HTTP status themselves.
        on_end.ended(code_of_http(head.status));
        return Response::from_parts(head, body);
    }
    // The trailers may be replaced, so a length of the whole message would no longer hold.
    if grpc {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    let body = Ending {
        body,
        expiry: deadline.map(|d| Box::pin(tokio::time::sleep_until(d.instant().into()))),
        grpc,
        from,
        on_end: Some(on_end),
        done: false,
    };
    Response::from_parts(head, Body::new(body))
}

fn code_of_http(status: StatusCode) -> Code {
    match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    }
}

struct Ending<H: OnEnd> {
    body: Body,
    expiry: Option<Pin<Box<tokio::time::Sleep>>>,
    grpc: bool,
    from: &'static str,
    on_end: Option<H>,
    done: bool,
}

impl<H: OnEnd> Ending<H> {
    fn end(&mut self, code: Code) {
        self.done = true;
        // What is left below is cancelled now, not when the last reference to this body goes.
        self.body = Body::empty();
        if let Some(mut on_end) = self.on_end.take() {
            on_end.ended(code);
        }
    }

    /// Ends a reply that broke off: for gRPC with a status, otherwise with an error, which resets the stream.
    fn break_off(&mut self, status: Status) -> Result<Frame<Bytes>, Status> {
        self.end(status.code());
        if !self.grpc {
            return Err(status);
        }
        let mut trailers = HeaderMap::new();
        match status.add_header(&mut trailers) {
            Ok(()) => Ok(Frame::trailers(trailers)),
            Err(unwritable) => Err(unwritable),
        }
    }
}

impl<H: OnEnd> http_body::Body for Ending<H> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.done {
            return Poll::Ready(None);
        }
        if let Some(expiry) = &mut self.expiry
            && expiry.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(self.break_off(deadline_exceeded())));
        }
        match std::task::ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    let code = status_code(trailers);
                    if code.is_none() && self.grpc {
                        let status = missing_status(self.from);
                        return Poll::Ready(Some(self.break_off(status)));
                    }
                    self.end(code.unwrap_or(Code::Ok));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(status)) => Poll::Ready(Some(self.break_off(status))),
            None if self.grpc => {
                let status = missing_status(self.from);
                Poll::Ready(Some(self.break_off(status)))
            }
            None => {
                self.end(Code::Ok);
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.done
    }

    fn size_hint(&self) -> SizeHint {
        if self.grpc { SizeHint::default() } else { self.body.size_hint() }
    }
}

impl<H: OnEnd> Drop for Ending<H> {
    fn drop(&mut self) {
        if let Some(mut on_end) = self.on_end.take() {
            on_end.ended(Code::Cancelled);
        }
    }
}

fn missing_status(from: &str) -> Status {
    Status::internal(format!("the reply of the {from} ended without a grpc-status"))
}

/// What is left of a call's time, as a `grpc-timeout` value.
#[must_use]
pub fn remaining(deadline: Deadline, now: std::time::Instant) -> http::HeaderValue {
    // At least a nanosecond: zero would read as no time at all before the next hop can say so itself.
    let left = deadline.remaining(now).max(Duration::from_nanos(1));
    http::HeaderValue::try_from(base::format_grpc_timeout(left))
        .unwrap_or_else(|_| http::HeaderValue::from_static("1n"))
}
