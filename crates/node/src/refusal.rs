//! Why a node does not do what it was asked, and the one map from that to a gRPC status.
//!
//! Every refusal says who refuses and why: in words, and as `isobar.node.v1.Refusal` in `grpc-status-details-bin`.

use http::{Response, StatusCode};
use prost::Message as _;
use proto::{
    google::rpc,
    isobar::node::v1::{self as wire, RefusalReason},
};
use tonic::{Code, Status, body::Body};
use transport::{TransportError, grpc};

use crate::hop::Loop;

/// The type of the detail in `grpc-status-details-bin`, as google.protobuf.Any names it.
const REFUSAL_TYPE: &str = "type.googleapis.com/isobar.node.v1.Refusal";

/// Why.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The caller speaks something else than gRPC. Its fault.
    #[error("this port speaks gRPC: send content-type application/grpc")]
    NotGrpc,
    /// The caller's `grpc-timeout` cannot be read. Its fault.
    #[error(transparent)]
    Timeout(#[from] base::TimeoutError),
    /// The call came back. The configuration is at fault; no engine has seen the call.
    #[error("the call has crossed {} already: does the url of an engine lead back into the mesh?", .0.via)]
    Loop(Loop),
    /// No engine known here serves what was asked for. No engine has seen the call.
    #[error("no engine of this node serves {what}")]
    NoEngine {
        /// The model, or the method where no model was named.
        what: String,
    },
    /// Every engine that serves it runs as many calls as it may. No engine has seen the call; later there may be room.
    #[error("every slot of the engines that serve {what} is taken")]
    Full {
        /// The model, or the method where no model was named.
        what: String,
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

impl Refusal {
    fn code(&self) -> Code {
        match self {
            Self::NotGrpc | Self::Timeout(_) => Code::InvalidArgument,
            Self::Loop(_) => Code::FailedPrecondition,
            Self::NoEngine { .. } => Code::NotFound,
            Self::Full { .. } => Code::ResourceExhausted,
            Self::Transport { error, .. } => error.code(),
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
            Self::NotGrpc | Self::Timeout(_) => RefusalReason::Unspecified,
            Self::Loop(_) => RefusalReason::Loop,
            Self::NoEngine { .. } => RefusalReason::NoEngine,
            Self::Full { .. } => RefusalReason::EngineFull,
            Self::Transport { to_peer: true, error, .. } if error.is_retry_safe() => {
                RefusalReason::PeerUnreachable
            }
            Self::Transport { .. } | Self::Broken { .. } => RefusalReason::Unspecified,
            Self::Deadline => RefusalReason::Deadline,
        }
    }

    fn target(&self) -> String {
        match self {
            Self::NoEngine { what } | Self::Full { what } => what.clone(),
            Self::Transport { target, .. } => target.clone(),
            Self::NotGrpc
            | Self::Timeout(_)
            | Self::Loop(_)
            | Self::Broken { .. }
            | Self::Deadline => String::new(),
        }
    }

    /// The status a caller gets, and the code for the books.
    pub(crate) fn status(&self, who: &Who) -> Status {
        let message = format!("{who}: {self}");
        let detail = wire::Refusal {
            reason: self.reason().into(),
            node: who.node.clone(),
            region: who.region.clone(),
            target: self.target(),
        };
        let details = rpc::Status {
            code: self.code().into(),
            message: message.clone(),
            details: vec![prost_types::Any {
                type_url: REFUSAL_TYPE.to_owned(),
                value: detail.encode_to_vec(),
            }],
        };
        Status::with_details(self.code(), message, details.encode_to_vec().into())
    }

    /// The reply a caller gets.
    pub(crate) fn response(&self, who: &Who) -> Response<Body> {
        if let Self::NotGrpc = self {
            // PROTOCOL-HTTP2: what is not gRPC is answered with 415, so that plain HTTP clients understand.
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return response;
        }
        grpc::refusal(&self.status(who))
    }

    /// The gRPC code of the reply.
    pub(crate) fn outcome(&self) -> Code {
        self.code()
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
        let status = Refusal::Full { what: "model llama".into() }.status(&who);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().starts_with("isobar node a (eu): every slot"), "{status}");
        let details = rpc::Status::decode(status.details()).unwrap();
        assert_eq!(details.code, 8);
        let refusal = wire::Refusal::decode(&details.details[0].value[..]).unwrap();
        assert_eq!(refusal.reason(), RefusalReason::EngineFull);
        assert_eq!((refusal.node.as_str(), refusal.region.as_str()), ("a", "eu"));
        assert_eq!(refusal.target, "model llama");
        assert_eq!(details.details[0].type_url, REFUSAL_TYPE);
    }
}
