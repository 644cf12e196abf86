//! Why a node does not do what it was asked, and the one map from that to a gRPC status.
//!
//! Every refusal says who refuses and why: in words, and as `isobar.node.v1.Refusal` in `grpc-status-details-bin`.

use std::time::Duration;

use base::{Load, TenantName};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use prost::Message as _;
use proto::{
    google::rpc,
    isobar::node::v1::{self as wire, RefusalReason},
};
use tonic::{Code, Status, body::Body};
use transport::{TransportError, grpc};

use crate::hop::{self, Loop};

/// The types of the details in `grpc-status-details-bin`, as google.protobuf.Any names them.
const REFUSAL_TYPE: &str = "type.googleapis.com/isobar.node.v1.Refusal";
const RETRY_TYPE: &str = "type.googleapis.com/google.rpc.RetryInfo";
/// When a caller may come again, in milliseconds (gRFC A6).
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// Why.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The caller speaks something else than gRPC. Its fault.
    #[error("this port speaks gRPC: send content-type application/grpc")]
    NotGrpc,
    /// The caller speaks gRPC over HTTP/1.1. Its fault.
    #[error("gRPC needs HTTP/2 or HTTP/3")]
    NotOverHttp1,
    /// The caller's `grpc-timeout` cannot be read. Its fault.
    #[error(transparent)]
    Timeout(#[from] base::TimeoutError),
    /// The caller shows more than one credential. Its fault.
    #[error(
        "the call shows more than one credential: send `authorization` or `x-api-key`, and that once"
    )]
    TwoCredentials,
    /// The caller does not say who it is, or not so that it can be believed. Its fault; no engine has seen the call.
    #[error("{why}")]
    Unauthenticated {
        /// What is wrong, and what to do.
        why: String,
    },
    /// The caller's tenant may not call this. No engine has seen the call.
    #[error("tenant {tenant} may not call {what}: only what [[allow]] names may be called")]
    NotAllowed {
        /// On whose behalf it calls.
        tenant: TenantName,
        /// The model, or the method.
        what: String,
    },
    /// The request does not say which model it is for. The caller's fault; no engine has seen the call.
    #[error("the request cannot be routed: {why}")]
    Unreadable {
        /// What is wrong with it.
        why: String,
    },
    /// The call came back. The configuration is at fault; no engine has seen the call.
    #[error("the call has crossed {} already: does the url of an engine lead back into the mesh?", .0.via)]
    Loop(Loop),
    /// No engine known here serves what was asked for. No engine has seen the call.
    #[error("no engine this node knows of serves {what}")]
    NoEngine {
        /// The model, or the method where no model was named.
        what: String,
    },
    /// Every engine that serves it runs as many calls as it may. No engine has seen the call; later there may be room.
    #[error("every slot of the engines that serve {what} is taken")]
    Full {
        /// The model, or the method where no model was named.
        what: String,
        /// When there is probably room again.
        retry_after: Duration,
    },
    /// An attempt failed, and every other engine that serves it runs as many calls as it may. An engine has seen the call only if
    /// the method may run twice; later there may be room.
    #[error("{failed}, and every slot of the other engines that serve {what} is taken")]
    NoOther {
        /// The model, or the method where no model was named.
        what: String,
        /// What became of the attempt.
        failed: String,
        /// Whether an engine may have seen the call.
        may_have_run: bool,
        /// When there is probably room again.
        retry_after: Duration,
    },
    /// Engines serve it, and all of them fail. No engine has seen the call; later one may be back.
    #[error("the engines that serve {what} fail or cannot be reached")]
    Unusable {
        /// The model, or the method where no model was named.
        what: String,
    },
    /// Peers refuse this node, whose certificate has ended. No engine has seen the call; the node's operator must act.
    #[error(
        "the certificate of this node has ended on {until}, so its peers refuse it: its operator must see to its renewal, or join it anew"
    )]
    CertificateEnded {
        /// When.
        until: String,
    },
    /// This node holds back as many bytes as it may. No engine has seen the call; later there may be room.
    #[error("this node holds back as many bytes of requests as node.buffer_bytes allows")]
    NoMemory,
    /// Too many of the calls that come from peers are second attempts. No engine has seen the call.
    #[error("too many of the calls that come to this node are retries")]
    TooManyRetries,
    /// A peer was sent the call and said nothing in time. It may have begun it, if the method may run twice.
    #[error("{target} did not acknowledge the call in time")]
    Unacknowledged {
        /// Which peer.
        target: String,
    },
    /// An engine or a peer did not answer as it should.
    #[error("{target}: {error}")]
    Transport {
        /// Which engine or peer.
        target: String,
        /// Whether the other end is a node.
        to_peer: bool,
        /// What happened.
        error: TransportError,
    },
    /// An engine, or a proxy before it, answered with an HTTP status instead of gRPC.
    #[error("{target} answered with HTTP status {status}")]
    Http {
        /// Which engine.
        target: String,
        /// The status.
        status: StatusCode,
    },
    /// The request broke off before it could be routed. The caller went away, or its connection did.
    #[error("the request broke off: {message}")]
    Broken {
        /// What it broke off with.
        code: Code,
        /// In words.
        message: String,
    },
    /// The caller's time is over. An engine may have begun.
    #[error("the deadline of the call passed")]
    Deadline,
}

/// When a caller may come again, where nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// What a caller is told to wait for a slot, at least and at most.
const SLOT_AFTER_MIN: Duration = Duration::from_millis(50);
const SLOT_AFTER_MAX: Duration = Duration::from_secs(10);
/// How much of what a caller sent is repeated to it.
const SHOWN_CHARS_MAX: usize = 200;
/// Longest message of a refusal.
const MESSAGE_CHARS_MAX: usize = 600;

impl Refusal {
    /// Whether another node might have taken the call.
    pub(crate) fn is_for_want_of_others(&self) -> bool {
        matches!(
            self,
            Self::NoEngine { .. }
                | Self::Full { .. }
                | Self::Unusable { .. }
                | Self::Unreadable { .. }
        )
    }

    /// Every slot is taken at engines with these loads.
    pub(crate) fn full(what: String, loads: &[Load]) -> Self {
        let drain_rate: f64 = loads.iter().map(|load| load.drain_rate).sum();
        // One slot is free again after as long as one call takes to end.
        let retry_after = if drain_rate > 0.0 {
            Duration::from_secs_f64((1.0 / drain_rate).min(SLOT_AFTER_MAX.as_secs_f64()))
                .max(SLOT_AFTER_MIN)
        } else {
            RETRY_AFTER
        };
        Self::Full { what, retry_after }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotGrpc
            | Self::NotOverHttp1
            | Self::Timeout(_)
            | Self::TwoCredentials
            | Self::Unreadable { .. } => Code::InvalidArgument,
            Self::Unauthenticated { .. } => Code::Unauthenticated,
            Self::NotAllowed { .. } => Code::PermissionDenied,
            Self::Loop(_) => Code::FailedPrecondition,
            Self::NoEngine { .. } => Code::NotFound,
            Self::Full { .. } | Self::NoOther { .. } | Self::NoMemory | Self::TooManyRetries => {
                Code::ResourceExhausted
            }
            Self::Unusable { .. } | Self::Unacknowledged { .. } | Self::CertificateEnded { .. } => {
                Code::Unavailable
            }
            // Whoever cancelled, it was not the caller.
            Self::Transport { error, .. } if error.code() == Code::Cancelled => Code::Unavailable,
            Self::Transport { error, .. } => error.code(),
            Self::Http { status, .. } if is_busy(*status) => Code::ResourceExhausted,
            Self::Http { .. } => Code::Unavailable,
            Self::Broken { code, .. } => *code,
            Self::Deadline => Code::DeadlineExceeded,
        }
    }

    /// A request whose body failed before it could be routed.
    pub(crate) fn broken_request(status: &Status) -> Self {
        Self::Broken { code: status.code(), message: status.message().to_owned() }
    }

    fn reason(&self) -> RefusalReason {
        match self {
            Self::NotGrpc | Self::NotOverHttp1 | Self::Timeout(_) => RefusalReason::Unspecified,
            Self::Unreadable { .. } | Self::TwoCredentials => RefusalReason::Unreadable,
            Self::Unauthenticated { .. } => RefusalReason::Unauthenticated,
            Self::NotAllowed { .. } => RefusalReason::NotAllowed,
            Self::Loop(_) => RefusalReason::Loop,
            Self::NoEngine { .. } => RefusalReason::NoEngine,
            Self::Full { .. } | Self::NoOther { .. } | Self::TooManyRetries => {
                RefusalReason::EngineFull
            }
            Self::Unusable { .. } => RefusalReason::Unusable,
            Self::CertificateEnded { .. } => RefusalReason::CertificateEnded,
            Self::NoMemory => RefusalReason::NoMemory,
            Self::Unacknowledged { .. } => RefusalReason::Unacknowledged,
            Self::Transport { to_peer: true, error, .. } if error.is_retry_safe() => {
                RefusalReason::PeerUnreachable
            }
            Self::Transport { .. } | Self::Http { .. } | Self::Broken { .. } => {
                RefusalReason::Unspecified
            }
            Self::Deadline => RefusalReason::Deadline,
        }
    }

    /// The label in the books.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::NotGrpc | Self::NotOverHttp1 => "protocol",
            Self::Timeout(_) | Self::Unreadable { .. } | Self::TwoCredentials => "unreadable",
            Self::Unauthenticated { .. } => "unauthenticated",
            Self::NotAllowed { .. } => "not_allowed",
            Self::Loop(_) => "loop",
            Self::NoEngine { .. } => "no_engine",
            Self::Full { .. } | Self::NoOther { .. } => "full",
            Self::Unusable { .. } => "unusable",
            Self::CertificateEnded { .. } => "certificate_ended",
            Self::NoMemory => "no_memory",
            Self::TooManyRetries => "too_many_retries",
            Self::Unacknowledged { .. } => "unacknowledged",
            Self::Transport { .. } => "transport",
            Self::Http { .. } => "http",
            Self::Broken { .. } => "broken_request",
            Self::Deadline => "deadline",
        }
    }

    fn target(&self) -> String {
        match self {
            Self::NoEngine { what }
            | Self::Full { what, .. }
            | Self::NoOther { what, .. }
            | Self::Unusable { what }
            | Self::NotAllowed { what, .. } => shown(what, SHOWN_CHARS_MAX),
            Self::Transport { target, .. }
            | Self::Http { target, .. }
            | Self::Unacknowledged { target } => target.clone(),
            Self::NotGrpc
            | Self::NotOverHttp1
            | Self::Timeout(_)
            | Self::TwoCredentials
            | Self::Unauthenticated { .. }
            | Self::Unreadable { .. }
            | Self::Loop(_)
            | Self::CertificateEnded { .. }
            | Self::NoMemory
            | Self::TooManyRetries
            | Self::Broken { .. }
            | Self::Deadline => String::new(),
        }
    }

    /// When the caller may come again; `None`: coming again does not help, or is the caller's own affair.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Full { retry_after, .. } | Self::NoOther { retry_after, .. } => {
                Some(*retry_after)
            }
            Self::NoMemory | Self::TooManyRetries | Self::Unusable { .. } => Some(RETRY_AFTER),
            Self::Http { status, .. } if is_busy(*status) => Some(RETRY_AFTER),
            _ => None,
        }
    }

    /// Whether certainly no engine has seen the call.
    fn is_unseen(&self) -> bool {
        match self {
            Self::Transport { error, .. } => error.is_retry_safe(),
            Self::NoOther { may_have_run, .. } => !may_have_run,
            Self::Http { .. } | Self::Unacknowledged { .. } | Self::Deadline => false,
            _ => true,
        }
    }

    /// The status a caller gets.
    pub(crate) fn status(&self, who: &Who) -> Status {
        let message = format!("{who}: {}", shown(&self.to_string(), MESSAGE_CHARS_MAX));
        let detail = wire::Refusal {
            reason: self.reason().into(),
            node: who.node.clone(),
            region: who.region.clone(),
            target: self.target(),
        };
        let mut details = vec![any(REFUSAL_TYPE, &detail)];
        if let Some(wait) = self.retry_after() {
            let retry_delay = prost_types::Duration::try_from(wait).ok();
            details.push(any(RETRY_TYPE, &rpc::RetryInfo { retry_delay }));
        }
        let details = rpc::Status { code: self.code().into(), message: message.clone(), details };
        Status::with_details(self.code(), message, details.encode_to_vec().into())
    }

    /// The reply a caller gets.
    pub(crate) fn response(&self, who: &Who) -> Response<Body> {
        let http = match self {
            // PROTOCOL-HTTP2: what is not gRPC is answered with 415, so that plain HTTP clients understand.
            Self::NotGrpc => Some(StatusCode::UNSUPPORTED_MEDIA_TYPE),
            Self::NotOverHttp1 => Some(StatusCode::UPGRADE_REQUIRED),
            _ => None,
        };
        if let Some(status) = http {
            let mut response = Response::new(Body::new(
                http_body_util::Full::from(format!("{self}\n")).map_err(|n| match n {}),
            ));
            *response.status_mut() = status;
            let kind = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            return response;
        }
        let mut response = grpc::refusal(&self.status(who));
        let headers = response.headers_mut();
        let flags = [
            (self.is_unseen(), hop::REFUSED),
            (matches!(self, Self::Full { .. } | Self::NoMemory), hop::FULL),
            (matches!(self, Self::Transport { .. }), hop::BROKEN),
        ];
        let flags: Vec<&str> = flags.iter().filter(|(is, _)| *is).map(|(_, flag)| *flag).collect();
        if let Ok(flags) = HeaderValue::try_from(flags.join(", "))
            && !flags.is_empty()
        {
            headers.insert(hop::FLAGS, flags);
        }
        if let Some(wait) = self.retry_after() {
            let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            headers.insert(PUSHBACK, ms.into());
        }
        response
    }
}

/// Whether an engine that answers with this HTTP status has no room, rather than failing.
pub(crate) fn is_busy(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

fn any(type_url: &str, message: &impl prost::Message) -> prost_types::Any {
    prost_types::Any { type_url: type_url.to_owned(), value: message.encode_to_vec() }
}

/// A text of whatever length, as far as it is shown.
fn shown(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// What a reply asks of whoever would try again (gRFC A6, "Pushback").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushback {
    /// Nothing.
    None,
    /// To wait so long.
    Wait(Duration),
    /// Not to try again at all.
    Never,
}

impl Pushback {
    /// What headers or trailers say. A value that cannot be read means: not at all.
    pub(crate) fn read(headers: &HeaderMap) -> Self {
        let Some(value) = headers.get(PUSHBACK) else { return Self::None };
        let ms = value.to_str().ok().and_then(|text| text.parse::<i64>().ok());
        ms.and_then(|ms| u64::try_from(ms).ok())
            .map_or(Self::Never, |ms| Self::Wait(Duration::from_millis(ms)))
    }

    /// How long an engine that says so wants to be left alone.
    pub(crate) fn wait(self) -> Option<Duration> {
        match self {
            Self::None => None,
            Self::Wait(wait) => Some(wait),
            Self::Never => Some(RETRY_AFTER),
        }
    }
}

/// Who refuses.
#[derive(Clone, Debug)]
pub(crate) struct Who {
    /// The node's name.
    pub(crate) node: String,
    /// Its region.
    pub(crate) region: String,
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "isobar node {} ({})", self.node, self.region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_who_and_why_in_words_and_in_details() {
        let who = Who { node: "a".into(), region: "eu".into() };
        let retry_after = Duration::from_millis(1_500);
        let status = Refusal::Full { what: "model llama".into(), retry_after }.status(&who);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().starts_with("isobar node a (eu): every slot"), "{status}");
        let details = rpc::Status::decode(status.details()).unwrap();
        assert_eq!(details.code, 8);
        let refusal = wire::Refusal::decode(&details.details[0].value[..]).unwrap();
        assert_eq!(refusal.reason(), RefusalReason::EngineFull);
        assert_eq!((refusal.node.as_str(), refusal.region.as_str()), ("a", "eu"));
        assert_eq!(refusal.target, "model llama");
        assert_eq!(details.details[0].type_url, REFUSAL_TYPE);
        assert_eq!(details.details[1].type_url, RETRY_TYPE);
        let retry = rpc::RetryInfo::decode(&details.details[1].value[..]).unwrap();
        let delay = retry.retry_delay.unwrap();
        assert_eq!((delay.seconds, delay.nanos), (1, 500_000_000));
    }

    #[test]
    fn a_refusal_says_when_to_come_again_and_that_nothing_ran() {
        let who = Who { node: "a".into(), region: "eu".into() };
        let full = Refusal::Full { what: "m".into(), retry_after: Duration::from_millis(120) };
        let reply = full.response(&who);
        assert_eq!(reply.headers()["grpc-retry-pushback-ms"], "120");
        assert!(hop::has_flag(reply.headers(), hop::REFUSED));
        assert!(hop::has_flag(reply.headers(), hop::FULL));
        let late = Refusal::Deadline.response(&who);
        assert!(!late.headers().contains_key(hop::FLAGS));
        assert!(!late.headers().contains_key(PUSHBACK));
    }

    #[test]
    fn whoever_failed_where_all_others_are_full_is_named_and_the_caller_may_come_again() {
        let who = Who { node: "a".into(), region: "eu".into() };
        for may_have_run in [false, true] {
            let refusal = Refusal::NoOther {
                what: "model llama".into(),
                failed: "peer b (eu) did not acknowledge the call in time".into(),
                may_have_run,
                retry_after: Duration::from_millis(70),
            };
            let reply = refusal.response(&who);
            assert_eq!(reply.headers()["grpc-status"], "8");
            assert_eq!(reply.headers()["grpc-retry-pushback-ms"], "70");
            assert_eq!(hop::has_flag(reply.headers(), hop::REFUSED), !may_have_run);
            assert!(refusal.to_string().starts_with("peer b (eu) did not"), "{refusal}");
        }
    }

    #[test]
    fn a_refusal_is_short_whatever_was_asked() {
        let who = Who { node: "a".into(), region: "eu".into() };
        let reply = Refusal::NoEngine { what: "x".repeat(16_000) }.response(&who);
        let size: usize = reply.headers().iter().map(|(n, v)| n.as_str().len() + v.len()).sum();
        assert!(size < 4_000, "{size}");
    }

    #[test]
    fn pushback_is_read_as_grpc_says() {
        for (text, want) in [
            ("250", Pushback::Wait(Duration::from_millis(250))),
            ("0", Pushback::Wait(Duration::ZERO)),
            ("-1", Pushback::Never),
            ("soon", Pushback::Never),
        ] {
            let headers = HeaderMap::from_iter([(PUSHBACK, HeaderValue::from_static(text))]);
            assert_eq!(Pushback::read(&headers), want, "{text}");
        }
        assert_eq!(Pushback::read(&HeaderMap::new()), Pushback::None);
    }
}
