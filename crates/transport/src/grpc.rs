//! What gRPC adds to HTTP: statuses in trailers, and deadlines over headers and body.
//!
//! A gRPC reply that ends without `grpc-status`, or breaks off, is never passed on as a clean end: [`ending`] gives it a
//! status that says what happened.

use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use base::Deadline;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Response, StatusCode, header};
use http_body::{Body as _, Frame, SizeHint};
use parking_lot::Mutex;
use tonic::{Code, Status, body::Body};

use crate::TransportError;

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

/// A code as gRPC spells it, in metrics too (gRFC A66).
#[must_use]
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
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

/// What wants to know how a call ended.
pub trait OnEnd: Send + Unpin {
    /// A piece of the body passes. Called for gRPC alone, and for every piece: it has to be cheap.
    fn data(&mut self, _data: &Bytes) {}

    /// The trailers of the reply are about to be sent: what this node has to add or take away. Not called for a reply
    /// that is nothing but a head.
    fn trailers(&mut self, _trailers: &mut HeaderMap) {}

    /// The call is over. Called once.
    fn ended(&mut self, end: End<'_>);
}

/// How a call ended.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The status the caller sees.
    pub code: Code,
    /// The trailers it came with, if the reply had any.
    pub trailers: Option<&'a HeaderMap>,
    /// Whether the reply broke off: whoever sent it did not end it, and nobody here made it.
    pub broke_off: bool,
}

impl End<'_> {
    /// A call that ended with `code` and no trailers.
    #[must_use]
    pub fn with(code: Code) -> Self {
        Self { code, trailers: None, broke_off: false }
    }
}

impl OnEnd for () {
    fn ended(&mut self, _: End<'_>) {}
}

/// Replies that may outlive their deadline unnoticed: while the way to the caller is blocked nobody polls their body.
/// One per worker. Cloneable.
#[derive(Clone, Debug, Default)]
pub struct Overdue(Arc<Mutex<Vec<Watched>>>);

/// A reply and its deadline.
type Watched = (Instant, Weak<Mutex<dyn Expire>>);

/// A reply is ended from outside when its deadline passed so long ago: its own timer comes first.
const OVERDUE_AFTER: Duration = Duration::from_millis(250);

trait Expire: fmt::Debug + Send {
    fn expire(&mut self);
}

impl Overdue {
    fn watch<H: OnEnd + 'static>(&self, deadline: Deadline, reply: &Arc<Mutex<Reply<H>>>) {
        // The type is forgotten before the reference is weakened: a weak reference cannot change its own.
        let reply: Arc<Mutex<dyn Expire>> = reply.clone();
        let mut replies = self.0.lock();
        // Ended replies go when the list would grow: amortised constant work.
        if replies.len() == replies.capacity() {
            replies.retain(|(_, reply)| reply.strong_count() > 0);
        }
        replies.push((deadline.instant(), Arc::downgrade(&reply)));
    }

    fn sweep(&self, now: Instant) {
        let mut overdue = Vec::new();
        self.0.lock().retain(|(deadline, reply)| {
            let is_overdue = now >= *deadline + OVERDUE_AFTER;
            overdue.extend(reply.upgrade().filter(|_| is_overdue));
            !is_overdue && reply.strong_count() > 0
        });
        for reply in overdue {
            reply.lock().expire();
        }
    }

    /// Ends overdue replies, for ever.
    pub async fn run(&self) -> Infallible {
        loop {
            tokio::time::sleep(OVERDUE_AFTER).await;
            self.sweep(base::clock::now());
        }
    }
}

/// Makes sure that a reply ends with a status and in time, and tells `on_end` how it did.
///
/// Dropped before its end, the call was cancelled by its caller.
pub fn ending<H>(
    reply: Response<Body>,
    deadline: Option<Deadline>,
    from: &'static str,
    mut on_end: H,
    overdue: &Overdue,
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
        on_end.ended(End::with(code));
        head.headers.remove(header::CONTENT_LENGTH);
        return Response::from_parts(head, Body::empty());
    }
    // gRPC over HTTP/2, "HTTP to gRPC status code mapping": callers map an HTTP status themselves.
    let at_end = if head.status == StatusCode::OK { Code::Ok } else { code_of_http(head.status) };
    // The trailers may be replaced, so a length of the whole message would no longer hold.
    if grpc {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    let reply = Arc::new(Mutex::new(Reply { body, on_end: Some(on_end), state: State::Running }));
    let expiry = deadline.map(|deadline| {
        overdue.watch(deadline, &reply);
        Box::pin(tokio::time::sleep_until(deadline.instant().into()))
    });
    Response::from_parts(head, Body::new(Ending { reply, expiry, grpc, from, at_end }))
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

/// What the sender of a reply and the watch over its deadline share.
struct Reply<H> {
    body: Body,
    on_end: Option<H>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    /// Ended from outside; its reader has yet to be told.
    Expired,
    Done,
}

impl<H> fmt::Debug for Reply<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("state", &self.state).finish_non_exhaustive()
    }
}

impl<H: OnEnd> Reply<H> {
    fn end(&mut self, state: State, end: End<'_>) {
        self.state = state;
        // What is left below is cancelled now, not when the last reference to this body goes.
        self.body = Body::empty();
        if let Some(mut on_end) = self.on_end.take() {
            on_end.ended(end);
        }
    }
}

impl<H: OnEnd> Expire for Reply<H> {
    fn expire(&mut self) {
        if self.state == State::Running {
            self.end(State::Expired, End::with(Code::DeadlineExceeded));
        }
    }
}

struct Ending<H: OnEnd> {
    reply: Arc<Mutex<Reply<H>>>,
    expiry: Option<Pin<Box<tokio::time::Sleep>>>,
    grpc: bool,
    from: &'static str,
    /// What a reply that is not gRPC's came to, when it ends cleanly.
    at_end: Code,
}

impl<H: OnEnd> Ending<H> {
    /// Ends a reply that broke off: for gRPC with a status, otherwise with an error, which resets the stream.
    fn break_off(
        &self,
        reply: &mut Reply<H>,
        status: Status,
        broke_off: bool,
    ) -> Result<Frame<Bytes>, Status> {
        let code = status.code();
        // What this end did to the stream says nothing about who sent it.
        let broke_off = broke_off
            && !matches!(
                TransportError::of(&status),
                Some(TransportError::Unread(_) | TransportError::Cancelled(_))
            );
        let mut trailers = HeaderMap::new();
        let written = if self.grpc { status.add_header(&mut trailers) } else { Err(status) };
        if let Some(on_end) = &mut reply.on_end {
            on_end.trailers(&mut trailers);
        }
        reply.end(State::Done, End { code, trailers: None, broke_off });
        written.map(|()| Frame::trailers(trailers))
    }
}

impl<H: OnEnd> http_body::Body for Ending<H> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let is_over =
            this.expiry.as_mut().is_some_and(|expiry| expiry.as_mut().poll(cx).is_ready());
        let shared = this.reply.clone();
        let mut reply = shared.lock();
        match reply.state {
            State::Done => return Poll::Ready(None),
            State::Running if !is_over => {}
            State::Expired | State::Running => {
                return Poll::Ready(Some(this.break_off(&mut reply, deadline_exceeded(), false)));
            }
        }
        match std::task::ready!(Pin::new(&mut reply.body).poll_frame(cx)) {
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    let code = status_code(trailers);
                    if code.is_none() && this.grpc {
                        let status = missing_status(this.from);
                        return Poll::Ready(Some(this.break_off(&mut reply, status, true)));
                    }
                    if let Some(on_end) = &mut reply.on_end {
                        on_end.trailers(trailers);
                    }
                    let code = code.unwrap_or(this.at_end);
                    let trailers = Some(&*trailers);
                    reply.end(State::Done, End { code, trailers, broke_off: false });
                } else if this.grpc {
                    if let (Some(data), Some(on_end)) = (frame.data_ref(), &mut reply.on_end) {
                        on_end.data(data);
                    }
                } else if reply.body.is_end_stream() {
                    // Its length is known, and nobody asks for what comes after it.
                    reply.end(State::Done, End::with(this.at_end));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(status)) => Poll::Ready(Some(this.break_off(&mut reply, status, true))),
            None if this.grpc => {
                let status = missing_status(this.from);
                Poll::Ready(Some(this.break_off(&mut reply, status, true)))
            }
            None => {
                reply.end(State::Done, End::with(this.at_end));
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.reply.lock().state == State::Done
    }

    fn size_hint(&self) -> SizeHint {
        if self.grpc { SizeHint::default() } else { self.reply.lock().body.size_hint() }
    }
}

impl<H: OnEnd> Drop for Ending<H> {
    fn drop(&mut self) {
        let mut reply = self.reply.lock();
        if reply.state == State::Running {
            reply.end(State::Done, End::with(Code::Cancelled));
        }
    }
}

fn missing_status(from: &str) -> Status {
    Status::internal(format!("the reply of the {from} ended without a grpc-status"))
}

/// What is left of a call's time, as a `grpc-timeout` value.
#[must_use]
pub fn remaining(deadline: Deadline, now: Instant) -> http::HeaderValue {
    // At least a nanosecond: zero would read as no time at all before the next hop can say so itself.
    let left = deadline.remaining(now).max(Duration::from_nanos(1));
    http::HeaderValue::try_from(base::format_grpc_timeout(left))
        .unwrap_or_else(|_| http::HeaderValue::from_static("1n"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use http::HeaderValue;
    use http_body_util::{BodyExt as _, Full};

    use super::*;

    /// Counts ends, and keeps the last code.
    #[derive(Clone, Default)]
    struct Ends(Arc<AtomicU32>, Arc<Mutex<Option<Code>>>);

    impl OnEnd for Ends {
        fn trailers(&mut self, trailers: &mut HeaderMap) {
            trailers.insert("x-added", HeaderValue::from_static("1"));
        }

        fn ended(&mut self, end: End<'_>) {
            self.0.fetch_add(1, Ordering::Relaxed);
            *self.1.lock() = Some(end.code);
        }
    }

    fn trailers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    fn reply(content_type: &'static str, body: Body) -> Response<Body> {
        Response::builder().header("content-type", content_type).body(body).unwrap()
    }

    fn data(bytes: &'static str) -> Full<Bytes> {
        Full::new(Bytes::from_static(bytes.as_bytes()))
    }

    /// What the caller gets: data and trailers, or the error; and the code `on_end` was told.
    async fn outcome(
        reply: Response<Body>,
        deadline: Option<Deadline>,
    ) -> (Result<(Bytes, HeaderMap), Code>, Option<Code>) {
        let ends = Ends::default();
        let reply = ending(reply, deadline, "engine", ends.clone(), &Overdue::default());
        let collected = reply.into_body().collect().await;
        let got = collected.map_err(|status| status.code()).map(|body| {
            let trailers = body.trailers().cloned().unwrap_or_default();
            (body.to_bytes(), trailers)
        });
        assert!(ends.0.load(Ordering::Relaxed) <= 1, "told once");
        let code = *ends.1.lock();
        (got, code)
    }

    #[tokio::test]
    async fn a_good_reply_passes_with_what_is_added_to_its_trailers() {
        let end = trailers(&[("grpc-status", "0"), ("x", "y")]);
        let body = data("hello").with_trailers(async { Some(Ok(end)) });
        let (got, code) = outcome(reply("application/grpc", Body::new(body)), None).await;
        let (bytes, got) = got.unwrap();
        assert_eq!((&bytes[..], code), (&b"hello"[..], Some(Code::Ok)));
        assert_eq!(got, trailers(&[("grpc-status", "0"), ("x", "y"), ("x-added", "1")]));
    }

    #[tokio::test]
    async fn pieces_of_a_grpc_body_are_shown_as_they_pass_and_others_are_not() {
        struct Bytes(Arc<Mutex<Vec<u8>>>);
        impl OnEnd for Bytes {
            fn data(&mut self, data: &bytes::Bytes) {
                self.0.lock().extend_from_slice(data);
            }

            fn ended(&mut self, _: End<'_>) {}
        }
        for (content_type, want) in [("application/grpc", &b"hello"[..]), ("text/plain", b"")] {
            let seen = Arc::default();
            let end = trailers(&[("grpc-status", "0")]);
            let body = data("hello").with_trailers(async { Some(Ok(end)) });
            let body = reply(content_type, Body::new(body));
            let reply = ending(body, None, "engine", Bytes(Arc::clone(&seen)), &Overdue::default());
            assert_eq!(&reply.into_body().collect().await.unwrap().to_bytes()[..], b"hello");
            assert_eq!(*seen.lock(), want, "{content_type}");
        }
    }

    #[tokio::test]
    async fn a_grpc_reply_without_a_status_gets_one_that_says_so() {
        let without = trailers(&[("x", "y")]);
        let bodies = [
            Body::new(data("hello")),
            Body::new(data("hello").with_trailers(async { Some(Ok(without)) })),
        ];
        for body in bodies {
            let (got, code) = outcome(reply("application/grpc", body), None).await;
            let (_, trailers) = got.unwrap();
            assert_eq!(trailers["grpc-status"], "13");
            assert!(trailers["grpc-message"].to_str().unwrap().contains("engine"));
            assert_eq!(code, Some(Code::Internal));
        }
    }

    #[tokio::test]
    async fn a_reply_that_is_only_a_head_ends_there_whatever_its_body_claims() {
        let mut head = reply("application/grpc", Body::new(data("")));
        head.headers_mut().insert("grpc-status", HeaderValue::from_static("8"));
        let ends = Ends::default();
        let reply = ending(head, None, "engine", ends.clone(), &Overdue::default());
        assert_eq!(*ends.1.lock(), Some(Code::ResourceExhausted));
        assert!(reply.body().is_end_stream());
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_in_mid_body_ends_the_reply_with_a_status() {
        let (_feed, never) = tokio::sync::oneshot::channel::<()>();
        let body = data("half").with_trailers(async move {
            drop(never.await);
            None
        });
        let deadline = Deadline::after(base::clock::now(), Duration::from_millis(100));
        let (got, code) = outcome(reply("application/grpc", Body::new(body)), deadline).await;
        let (bytes, trailers) = got.unwrap();
        assert_eq!(&bytes[..], b"half");
        assert_eq!(trailers["grpc-status"], "4");
        assert_eq!(code, Some(Code::DeadlineExceeded));
    }

    #[test]
    fn a_reply_nobody_polls_ends_at_its_deadline_too() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        let (ends, overdue, now) = (Ends::default(), Overdue::default(), base::clock::now());
        let deadline = Deadline::after(now, Duration::from_secs(1));
        let held = ending(
            reply("application/grpc", Body::new(data("unread"))),
            deadline,
            "engine",
            ends.clone(),
            &overdue,
        );
        overdue.sweep(now + Duration::from_secs(1));
        assert_eq!(*ends.1.lock(), None);
        overdue.sweep(now + Duration::from_secs(2));
        assert_eq!(*ends.1.lock(), Some(Code::DeadlineExceeded));
        drop(held);
        assert_eq!(ends.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn replies_that_ended_are_forgotten() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        let overdue = Overdue::default();
        let deadline = Deadline::after(base::clock::now(), Duration::from_secs(3_600));
        for _ in 0..10_000 {
            let reply = reply("application/grpc", Body::new(data("x")));
            drop(ending(reply, deadline, "engine", (), &overdue));
        }
        assert!(overdue.0.lock().len() < 64);
    }

    #[tokio::test]
    async fn replies_of_plain_http_are_counted_when_their_body_ends() {
        let mut other = reply("text/plain", Body::new(data("try later")));
        *other.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        let ends = Ends::default();
        let other = ending(other, None, "engine", ends.clone(), &Overdue::default());
        assert_eq!(*ends.1.lock(), None);
        assert_eq!(&other.into_body().collect().await.unwrap().to_bytes()[..], b"try later");
        assert_eq!(*ends.1.lock(), Some(Code::Unavailable));
    }
}
