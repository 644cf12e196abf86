//! One attempt of a call at an engine or a peer, and what it came to.
//!
//! An attempt fails only before the first byte of its answer: from then on the answer is the caller's, whatever becomes of
//! it. A failed attempt may be made again elsewhere when no engine has seen it, or when the method may run twice.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use balance::Outcome;
use base::{Deadline, clock};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use tonic::{Code, Status, body::Body};
use transport::{
    Acknowledge, Progress, TransportError, Watching,
    grpc::{self, End},
};

use crate::{
    buffers::Look,
    hop,
    record::Record,
    refusal::{self, Pushback, Refusal, Who},
    replay::Replay,
    router::Route,
};

/// What an attempt came to.
#[derive(Debug)]
pub(crate) enum Attempt {
    /// An answer has begun.
    Answered(Response<Body>),
    /// Nothing of an answer has come.
    Failed(Failed),
}

/// A failed attempt.
#[derive(Debug)]
pub(crate) struct Failed {
    /// The class of the failure.
    pub(crate) outcome: Outcome,
    /// Whether an engine may have begun the call.
    pub(crate) may_have_run: bool,
    /// What whoever failed asks of us.
    pub(crate) pushback: Pushback,
    /// Retries made further on.
    pub(crate) retries_below: u32,
    /// Whoever it was sent to is there and turned it away unread: it may be sent there once more.
    pub(crate) is_rejected: bool,
    /// What the caller gets when there is no other attempt.
    pub(crate) answer: Answer,
}

/// The last word of a failed attempt.
#[derive(Debug)]
pub(crate) enum Answer {
    /// What the engine or the peer said, to be passed on as it is.
    Reply(Response<Body>),
    /// What this node says.
    Refusal(Refusal),
}

impl Answer {
    /// The reply a caller gets.
    pub(crate) fn into_reply(self, who: &Who, record: &mut Record) -> Response<Body> {
        match self {
            Self::Reply(reply) => reply,
            Self::Refusal(refusal) => {
                tracing::debug!(%refusal, "refused");
                record.refused(refusal.label());
                refusal.response(who)
            }
        }
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

/// A deadline closer than this leaves no time for another attempt.
const TIME_FOR_ANOTHER: Duration = Duration::from_millis(5);

impl Failed {
    /// Whether the call may be tried elsewhere, as far as this failure goes.
    pub(crate) fn allows_another(
        &self,
        idempotent: bool,
        replay: &Replay,
        deadline: Option<Deadline>,
    ) -> bool {
        matches!(self.outcome, Outcome::Busy | Outcome::Broken)
            && self.pushback != Pushback::Never
            && (idempotent || !self.may_have_run)
            && replay.is_whole()
            && deadline.is_none_or(|d| d.remaining(clock::now()) > TIME_FOR_ANOTHER)
    }

    /// What the caller gets, where the call could be tried elsewhere and `elsewhere` is why it is not. What an engine or a peer
    /// said is passed on; but a node that is gone is no reason to tell the caller more than that the others are busy.
    pub(crate) fn without_another(self, elsewhere: Refusal) -> Answer {
        match (self.answer, elsewhere) {
            (Answer::Refusal(failed), Refusal::Full { what, retry_after })
                if self.outcome == Outcome::Broken =>
            {
                let (failed, may_have_run) = (failed.to_string(), self.may_have_run);
                Refusal::NoOther { what, failed, may_have_run, retry_after }.into()
            }
            (Answer::Refusal(_), elsewhere @ Refusal::CertificateEnded { .. })
                if self.outcome == Outcome::Broken =>
            {
                elsewhere.into()
            }
            (answer, _) => answer,
        }
    }

    /// Whether a peer was asked and nothing came back in time.
    pub(crate) fn is_unacknowledged(&self) -> bool {
        matches!(self.answer, Answer::Refusal(Refusal::Unacknowledged { .. }))
    }

    fn refusal(outcome: Outcome, may_have_run: bool, refusal: Refusal) -> Self {
        Self {
            outcome,
            may_have_run,
            pushback: Pushback::None,
            retries_below: 0,
            is_rejected: false,
            answer: Answer::Refusal(refusal),
        }
    }
}

impl Route {
    /// Makes the attempt. `idempotent`: the method may run twice.
    pub(crate) async fn attempt(
        &mut self,
        request: Request<Body>,
        idempotent: bool,
        replay: &Replay,
    ) -> Attempt {
        match self {
            Self::Engine(slot, _) => {
                let sent = slot.send(request).await;
                let name = slot.engine().target.name().to_owned();
                let attempt = at_engine(sent, &name);
                let mut attempt = opened(attempt, &name, false, idempotent, replay).await;
                if let Attempt::Failed(failed) = &mut attempt
                    && replay.has_failed()
                {
                    failed.outcome = Outcome::Caller;
                }
                match &attempt {
                    Attempt::Answered(_) => slot.answered(),
                    // It closes a connection that is old, or full: that is no failure.
                    Attempt::Failed(failed) if failed.is_rejected => {
                        slot.ended(Outcome::Caller, None);
                    }
                    Attempt::Failed(failed) => slot.ended(failed.outcome, failed.pushback.wait()),
                }
                attempt
            }
            Self::Peer(call) => {
                let (progress, watching) = Progress::new();
                let request = prepared(request, progress, watching.clone(), idempotent);
                let sent = tokio::select! {
                    sent = call.send(request) => Some(sent),
                    () = watching.clone().overdue() => None,
                };
                let name = call.name();
                let Some(sent) = sent else {
                    call.broken(false);
                    let refusal = Refusal::Unacknowledged { target: name };
                    // A body that was held back has not been sent, so nothing can have begun.
                    return Attempt::Failed(Failed::refusal(Outcome::Broken, idempotent, refusal));
                };
                let has_answered = sent.is_ok();
                let held_back = !idempotent && !watching.is_admitted();
                let attempt = at_peer(sent, &name, held_back);
                let mut attempt = opened(attempt, &name, true, idempotent, replay).await;
                if has_answered {
                    call.answered();
                }
                if has_answered && !matches!(&attempt, Attempt::Failed(f) if !f.may_have_run) {
                    call.ran();
                }
                let Attempt::Failed(failed) = &mut attempt else { return attempt };
                if replay.has_failed() {
                    failed.outcome = Outcome::Caller;
                }
                match &failed.answer {
                    Answer::Refusal(Refusal::Transport { error, .. })
                        if failed.outcome == Outcome::Broken && !failed.is_rejected =>
                    {
                        call.broken(matches!(error, TransportError::Silent(_)));
                    }
                    Answer::Reply(reply) => {
                        call.replied();
                        // The peer itself refused: none of its engines that suit has room, not just one.
                        if hop::has_flag(reply.headers(), hop::FULL) {
                            call.busy();
                        }
                    }
                    Answer::Refusal(_) => {}
                }
                attempt
            }
        }
    }

    /// The call is over: what it says about whoever served it. `replay` is its request.
    pub(crate) fn ended(&mut self, end: &End<'_>, replay: &Replay) {
        let outcome = if replay.has_failed() { Outcome::Caller } else { outcome_of(end) };
        match self {
            Self::Engine(slot, _) => {
                let pushback = end.trailers.map_or(Pushback::None, Pushback::read);
                slot.ended(outcome, pushback.wait());
            }
            // A peer whose engine dies ends the reply with a status; one that breaks it off is failing itself.
            Self::Peer(call) if end.broke_off && outcome == Outcome::Broken => call.broken(false),
            // Not where this end or the caller stopped it.
            Self::Peer(call) if end.trailers.is_some() || outcome == Outcome::Ok => call.replied(),
            Self::Peer(_) => {}
        }
    }
}

/// Waits behind the head of an answer for its first piece, where the call may be made again: a head alone is nothing a
/// caller can use, and some servers send it long before they fail. Not while the caller may have more to say, for it may
/// wait for the head.
async fn opened(
    attempt: Attempt,
    target: &str,
    to_peer: bool,
    idempotent: bool,
    replay: &Replay,
) -> Attempt {
    let reply = match attempt {
        Attempt::Answered(reply) if idempotent && replay.is_complete() => reply,
        other => return other,
    };
    let (head, body) = reply.into_parts();
    let mut look = Look::new(body);
    let retries_below = if to_peer { hop::previous_attempts(&head.headers) } else { 0 };
    let first = std::future::poll_fn(|cx| Pin::new(&mut look.rest).poll_frame(cx)).await;
    match first {
        Some(Err(status)) => {
            let error = TransportError::of(&status).cloned();
            let error =
                error.unwrap_or_else(|| TransportError::Closed(status.message().to_owned()));
            match transport_failure(error, target, to_peer, false) {
                Attempt::Failed(failed) => Attempt::Failed(Failed { retries_below, ..failed }),
                answered @ Attempt::Answered(_) => answered,
            }
        }
        Some(Ok(frame)) => {
            let trailers = frame.trailers_ref();
            let code = trailers.and_then(grpc::status_code);
            let pushback = trailers.map_or(Pushback::None, Pushback::read);
            look.seen.push_back(frame);
            let reply = Response::from_parts(head, Body::new(look));
            match code.map(|code| Outcome::of_status(code.into())) {
                Some(outcome @ (Outcome::Busy | Outcome::Broken)) => Attempt::Failed(Failed {
                    outcome,
                    may_have_run: true,
                    pushback,
                    retries_below,
                    is_rejected: false,
                    answer: Answer::Reply(reply),
                }),
                _ => Attempt::Answered(reply),
            }
        }
        // An end without a status: the ending layer says so.
        None => Attempt::Answered(Response::from_parts(head, look.rest)),
    }
}

/// The class of a call by how its reply ended.
fn outcome_of(end: &End<'_>) -> Outcome {
    match end.code {
        // Our own deadline, or a caller that went away.
        Code::DeadlineExceeded | Code::Cancelled => Outcome::Caller,
        Code::ResourceExhausted if !end.broke_off => Outcome::Busy,
        _ if end.broke_off => Outcome::Broken,
        code => Outcome::of_status(code.into()),
    }
}

/// The call to a peer, ready to be sent: with its progress watched, and, when it may run only once, with its body held
/// back until the peer has acknowledged it.
fn prepared(
    request: Request<Body>,
    progress: Progress,
    watching: Watching,
    idempotent: bool,
) -> Request<Body> {
    let (mut head, body) = request.into_parts();
    head.extensions.insert(progress);
    if idempotent {
        return Request::from_parts(head, body);
    }
    head.headers.insert(http::header::EXPECT, hop::CONTINUE);
    Request::from_parts(head, Body::new(HeldBack::new(body, watching)))
}

fn at_engine(sent: Result<Response<Body>, TransportError>, target: &str) -> Attempt {
    let mut reply = match sent {
        Ok(reply) => reply,
        Err(error) => return transport_failure(error, target, false, false),
    };
    hop::strip(reply.headers_mut());
    if let Some(outcome) = http_outcome(&reply) {
        let refusal = Refusal::Http { target: target.to_owned(), status: reply.status() };
        return Attempt::Failed(Failed::refusal(outcome, true, refusal));
    }
    // Only a reply that is nothing but a status can fail an attempt.
    let Some(code) = only_status(&reply) else { return Attempt::Answered(reply) };
    let outcome = Outcome::of_status(code.into());
    if matches!(outcome, Outcome::Ok | Outcome::Caller) {
        return Attempt::Answered(reply);
    }
    Attempt::Failed(Failed {
        outcome,
        may_have_run: true,
        pushback: Pushback::read(reply.headers()),
        retries_below: 0,
        is_rejected: false,
        answer: Answer::Reply(reply),
    })
}

/// What an HTTP status that a proxy before an engine answers with means; `None`: it is passed on.
fn http_outcome(reply: &Response<Body>) -> Option<Outcome> {
    match reply.status() {
        _ if grpc::is_grpc(reply.headers()) => None,
        status if refusal::is_busy(status) => Some(Outcome::Busy),
        StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => Some(Outcome::Broken),
        _ => None,
    }
}

fn at_peer(sent: Result<Response<Body>, TransportError>, target: &str, held_back: bool) -> Attempt {
    let reply = match sent {
        Ok(reply) => reply,
        Err(error) => return transport_failure(error, target, true, held_back),
    };
    let Some(code) = only_status(&reply) else { return Attempt::Answered(reply) };
    let headers = reply.headers();
    let is_refused = hop::has_flag(headers, hop::REFUSED);
    let outcome = match Outcome::of_status(code.into()) {
        // Its engine failed, in a way whose status does not show it.
        _ if hop::has_flag(headers, hop::BROKEN) => Outcome::Broken,
        // Nobody there serves it, and it says so itself: somebody else may.
        Outcome::Caller if is_refused && code == Code::NotFound => Outcome::Broken,
        Outcome::Ok | Outcome::Caller => return Attempt::Answered(reply),
        outcome => outcome,
    };
    Attempt::Failed(Failed {
        outcome,
        may_have_run: !is_refused,
        // When a peer asks to come back later, it speaks for itself, and another is tried now.
        pushback: if is_refused { Pushback::None } else { Pushback::read(headers) },
        retries_below: hop::previous_attempts(headers),
        is_rejected: false,
        answer: Answer::Reply(reply),
    })
}

fn transport_failure(
    error: TransportError,
    target: &str,
    to_peer: bool,
    held_back: bool,
) -> Attempt {
    let outcome = match &error {
        TransportError::Cancelled(_)
        | TransportError::RequestTooLong { .. }
        | TransportError::Unread(_) => Outcome::Caller,
        TransportError::Full { .. } => Outcome::Busy,
        _ => Outcome::Broken,
    };
    let may_have_run = !error.is_retry_safe() && !held_back;
    let is_rejected = error.is_rejection();
    let refusal = Refusal::Transport { target: target.to_owned(), to_peer, error };
    Attempt::Failed(Failed { is_rejected, ..Failed::refusal(outcome, may_have_run, refusal) })
}

/// The status of a reply that is nothing but that ("Trailers-Only").
fn only_status(reply: &Response<Body>) -> Option<Code> {
    (reply.status() == StatusCode::OK).then(|| grpc::status_code(reply.headers())).flatten()
}

/// A request body that waits until the peer has acknowledged the call: a node that is not heard of can then have begun
/// nothing. What leads it is an empty piece, for a peer whose engine speaks first must know when it may begin.
struct HeldBack {
    body: Body,
    admitted: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl HeldBack {
    fn new(body: Body, mut watching: Watching) -> Self {
        Self { body, admitted: Some(Box::pin(async move { watching.admitted().await })) }
    }
}

impl http_body::Body for HeldBack {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(admitted) = &mut self.admitted {
            std::task::ready!(admitted.as_mut().poll(cx));
            self.admitted = None;
            return Poll::Ready(Some(Ok(Frame::data(Bytes::new()))));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.admitted.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How long a peer that holds a body back may take to send it, once its call was acknowledged.
const RELEASED_WITHIN: Duration = Duration::from_secs(10);

/// Waits until a call whose body the ingress holds back may begin: until its first piece, which is taken off. An error
/// means that the ingress has given the call up. Over HTTP/2 nothing is acknowledged, so nothing is held back.
pub(crate) async fn released(
    headers: &mut HeaderMap,
    body: &mut Body,
    acknowledge: Option<&Acknowledge>,
) -> Result<(), Refusal> {
    let is_held_back = headers.remove(http::header::EXPECT).is_some();
    let Some(acknowledge) = acknowledge else { return Ok(()) };
    acknowledge.send();
    if !is_held_back {
        return Ok(());
    }
    let first = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
    match tokio::time::timeout(RELEASED_WITHIN, first).await {
        Ok(Some(Ok(frame))) if frame.data_ref().is_some_and(Bytes::is_empty) => Ok(()),
        Ok(Some(Err(status))) => Err(Refusal::broken_request(&status)),
        Ok(Some(Ok(_)) | None) => Err(Refusal::Broken {
            code: Code::Internal,
            message: "a held-back call did not begin with an empty piece".to_owned(),
        }),
        Err(_) => Err(Refusal::Broken {
            code: Code::Unavailable,
            message: "the other node did not send the request it held back".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(attempt: Attempt) -> Failed {
        match attempt {
            Attempt::Failed(failed) => failed,
            Attempt::Answered(reply) => panic!("answered: {reply:?}"),
        }
    }

    fn reply(pairs: &[(&'static str, &'static str)]) -> Response<Body> {
        let mut reply = Response::new(Body::empty());
        for (name, value) in pairs {
            reply.headers_mut().insert(*name, http::HeaderValue::from_static(value));
        }
        reply
    }

    #[test]
    fn busy_and_unavailable_fail_an_attempt_and_other_statuses_are_answers() {
        for (status, want) in [("8", Outcome::Busy), ("14", Outcome::Broken)] {
            let failed = failed(at_engine(Ok(reply(&[("grpc-status", status)])), "e"));
            assert_eq!((failed.outcome, failed.may_have_run), (want, true));
        }
        for status in ["0", "2", "3", "5", "13"] {
            let attempt = at_engine(Ok(reply(&[("grpc-status", status)])), "e");
            assert!(matches!(attempt, Attempt::Answered(_)), "{status}");
        }
        assert!(matches!(at_engine(Ok(reply(&[])), "e"), Attempt::Answered(_)));
    }

    #[test]
    fn a_peer_that_refuses_has_run_nothing() {
        let full = reply(&[("grpc-status", "8"), ("x-isobar-flags", "refused")]);
        assert!(!failed(at_peer(Ok(full), "e", false)).may_have_run);
        let engine_full = reply(&[("grpc-status", "8"), ("grpc-previous-rpc-attempts", "2")]);
        let failed_there = failed(at_peer(Ok(engine_full), "e", false));
        assert!(failed_there.may_have_run);
        assert_eq!(failed_there.retries_below, 2);
    }

    #[test]
    fn an_engines_own_failure_behind_a_peer_is_a_failure_whatever_its_status() {
        let reset = reply(&[("grpc-status", "13"), ("x-isobar-flags", "broken")]);
        let failed = failed(at_peer(Ok(reset), "e", false));
        assert_eq!((failed.outcome, failed.may_have_run), (Outcome::Broken, true));
    }

    #[test]
    fn http_statuses_of_proxies_are_busy_or_broken() {
        for (status, want) in [
            (429, Outcome::Busy),
            (503, Outcome::Busy),
            (502, Outcome::Broken),
            (504, Outcome::Broken),
        ] {
            let mut http = reply(&[("content-type", "text/html")]);
            *http.status_mut() = StatusCode::from_u16(status).unwrap();
            assert_eq!(failed(at_engine(Ok(http), "e")).outcome, want, "{status}");
        }
        let mut other = reply(&[]);
        *other.status_mut() = StatusCode::NOT_FOUND;
        assert!(matches!(at_engine(Ok(other), "e"), Attempt::Answered(_)));
    }

    #[test]
    fn a_call_to_a_node_that_is_gone_is_busy_when_all_others_are_full() {
        let gone = || {
            let refusal = Refusal::Unacknowledged { target: "peer b (eu)".into() };
            Failed::refusal(Outcome::Broken, false, refusal)
        };
        let full =
            || Refusal::Full { what: "model m".into(), retry_after: Duration::from_millis(80) };
        let answer = gone().without_another(full());
        assert!(
            matches!(&answer, Answer::Refusal(Refusal::NoOther { may_have_run: false, retry_after, .. })
                if *retry_after == Duration::from_millis(80)),
            "{answer:?}"
        );
        // Nobody else is there at all: that the node is gone says more.
        let answer = gone().without_another(Refusal::Unusable { what: "model m".into() });
        assert!(matches!(answer, Answer::Refusal(Refusal::Unacknowledged { .. })), "{answer:?}");
        // An engine's own word is passed on.
        let failed = failed(at_peer(Ok(reply(&[("grpc-status", "14")])), "e", false));
        assert!(matches!(failed.without_another(full()), Answer::Reply(_)));
        // That no peer lets this node in is what has to be mended.
        let ended = Refusal::CertificateEnded { until: "then".into() };
        let answer = gone().without_another(ended);
        assert!(matches!(answer, Answer::Refusal(Refusal::CertificateEnded { .. })), "{answer:?}");
        let busy = Failed { outcome: Outcome::Busy, ..gone() };
        let answer = busy.without_another(full());
        assert!(matches!(answer, Answer::Refusal(Refusal::Unacknowledged { .. })), "{answer:?}");
    }

    #[test]
    fn what_callers_do_is_nobodys_failure() {
        for error in [
            TransportError::cancelled(),
            TransportError::RequestTooLong { limit_bytes: 1 },
            TransportError::Unread(Duration::from_secs(5)),
        ] {
            assert_eq!(failed(at_peer(Err(error), "e", false)).outcome, Outcome::Caller);
        }
    }

    #[test]
    fn a_peer_that_serves_nothing_of_the_kind_is_not_the_last_word() {
        let none = reply(&[("grpc-status", "5"), ("x-isobar-flags", "refused")]);
        assert_eq!(failed(at_peer(Ok(none), "e", false)).outcome, Outcome::Broken);
        let engines_own = at_peer(Ok(reply(&[("grpc-status", "5")])), "e", false);
        assert!(matches!(engines_own, Attempt::Answered(_)));
    }

    #[test]
    fn what_was_not_sent_has_not_run() {
        let dial = || TransportError::Dial { target: "x".into(), reason: "y".into() };
        assert!(!failed(at_engine(Err(dial()), "e")).may_have_run);
        let closed = || TransportError::Closed("z".into());
        assert!(failed(at_engine(Err(closed()), "e")).may_have_run);
        assert!(!failed(at_peer(Err(closed()), "e", true)).may_have_run, "its body was held back");
    }
}
