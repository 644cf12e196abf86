//! What can go wrong between two ends, and which gRPC status it becomes: one exhaustive map for h2 and h3.

use std::sync::Arc;

use tonic::{Code, Status};

use crate::h3::Code as H3Code;

/// Why a call failed below gRPC. [`TransportError::is_retry_safe`] says whether the other end can have seen it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TransportError {
    /// No connection could be made. Nothing was sent.
    #[error("cannot connect to {target}: {reason}")]
    Dial {
        /// Whom we tried to reach.
        target: String,
        /// What the network or TLS said.
        reason: String,
    },
    /// Every connection to the target is full and no other may be opened. Nothing was sent.
    #[error("every connection to {target} is at its limit of calls")]
    Full {
        /// Whom we tried to reach.
        target: String,
    },
    /// The connection ended under the call.
    #[error("the connection ended: {0}")]
    Closed(String),
    /// Over a link came what is no frame, or one that is longer than may be: no other end that keeps the rules sends it.
    #[error("the connection ended: {0}")]
    BadFrame(&'static str),
    /// Nothing came over the connection for so long, with calls in flight, that it was given up.
    #[error("nothing came over the connection for {0:?}; it was given up")]
    Silent(std::time::Duration),
    /// The other end reset the call over HTTP/3.
    #[error("the other end reset the call with {0}")]
    ResetH3(H3Code),
    /// The other end reset the call over HTTP/2.
    #[error("the other end reset the call with {}", .0.description())]
    ResetH2(h2::Reason),
    /// The other end broke the rules of HTTP in this call.
    #[error("the other end sent a malformed message: {0}")]
    Malformed(&'static str),
    /// The other end's header section is longer than we accept.
    #[error("the header section is longer than {limit_bytes} bytes")]
    HeadersTooLong {
        /// The bound it broke, in bytes as RFC 9114 §4.2.2 counts them.
        limit_bytes: usize,
    },
    /// The head of our own request is longer than the other end accepts. Nothing was sent.
    #[error(
        "the request's header section is longer than the {limit_bytes} bytes the other end accepts"
    )]
    RequestTooLong {
        /// The bound it broke, in bytes as RFC 9114 §4.2.2 counts them.
        limit_bytes: usize,
    },
    /// Nobody read what the other end sent for so long that it was dropped to spare the other calls.
    #[error("nobody read the stream for {0:?}; it was given up so that other calls go on")]
    Unread(std::time::Duration),
    /// The caller went away.
    #[error("the caller cancelled")]
    Cancelled(#[source] CancelSource),
}

/// The cause of a cancellation as HTTP/2 spells it, so that hyper resets the stream with CANCEL.
#[derive(Clone, Debug)]
pub struct CancelSource(Arc<h2::Error>);

impl std::fmt::Display for CancelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for CancelSource {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

impl TransportError {
    /// The caller went away.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::Cancelled(CancelSource(Arc::new(h2::Reason::CANCEL.into())))
    }

    /// Whether the other end certainly did not begin the call.
    #[must_use]
    pub fn is_retry_safe(&self) -> bool {
        match self {
            Self::Dial { .. } | Self::Full { .. } => true,
            Self::ResetH3(code) => *code == H3Code::REQUEST_REJECTED,
            Self::ResetH2(reason) => *reason == h2::Reason::REFUSED_STREAM,
            Self::Closed(_)
            | Self::BadFrame(_)
            | Self::Silent(_)
            | Self::Malformed(_)
            | Self::HeadersTooLong { .. }
            | Self::RequestTooLong { .. }
            | Self::Unread(_)
            | Self::Cancelled(_) => false,
        }
    }

    /// Whether the other end is there and turned the call away before it began it: it drains, or its limit is reached.
    #[must_use]
    pub fn is_rejection(&self) -> bool {
        matches!(self, Self::ResetH3(_) | Self::ResetH2(_)) && self.is_retry_safe()
    }

    /// The gRPC status code of this failure: gRPC over HTTP/2 ("HTTP2 Transport Mapping") and proposal G2 for HTTP/3.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Dial { .. } | Self::Closed(_) | Self::Silent(_) => Code::Unavailable,
            Self::Full { .. }
            | Self::HeadersTooLong { .. }
            | Self::RequestTooLong { .. }
            | Self::Unread(_) => Code::ResourceExhausted,
            Self::ResetH3(code) => match *code {
                H3Code::EXCESSIVE_LOAD => Code::ResourceExhausted,
                H3Code::REQUEST_REJECTED => Code::Unavailable,
                H3Code::REQUEST_CANCELLED => Code::Cancelled,
                _ => Code::Internal,
            },
            Self::ResetH2(reason) => match *reason {
                h2::Reason::REFUSED_STREAM => Code::Unavailable,
                h2::Reason::CANCEL => Code::Cancelled,
                h2::Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
                h2::Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
                _ => Code::Internal,
            },
            Self::BadFrame(_) | Self::Malformed(_) => Code::Internal,
            Self::Cancelled(_) => Code::Cancelled,
        }
    }

    /// Finds the transport's own error behind a status, if there is one.
    #[must_use]
    pub fn of(status: &Status) -> Option<&Self> {
        let mut source = std::error::Error::source(status);
        while let Some(error) = source {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(found);
            }
            source = error.source();
        }
        None
    }

    /// What hyper says of an HTTP/2 call or connection.
    pub(crate) fn from_hyper(error: &hyper::Error) -> Self {
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            if let Some(h2) = cause.downcast_ref::<h2::Error>() {
                return match h2.reason() {
                    Some(reason) if h2.is_reset() => Self::ResetH2(reason),
                    // GOAWAY for streams the other end did not begin counts as refused (RFC 9113 §6.8).
                    Some(h2::Reason::NO_ERROR) if h2.is_go_away() => {
                        Self::ResetH2(h2::Reason::REFUSED_STREAM)
                    }
                    _ => Self::Closed(h2.to_string()),
                };
            }
            source = cause.source();
        }
        if error.is_canceled() {
            return Self::Closed("the connection closed before the call was sent".into());
        }
        Self::Closed(error.to_string())
    }

    /// What quinn says when a read fails.
    pub(crate) fn from_read(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(code) => Self::ResetH3(code.into()),
            quinn::ReadError::ConnectionLost(error) => Self::from_connection(&error),
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => Self::Malformed("the stream is closed"),
        }
    }

    /// What quinn says when a connection is gone.
    pub(crate) fn from_connection(error: &quinn::ConnectionError) -> Self {
        Self::Closed(error.to_string())
    }
}

impl From<TransportError> for Status {
    fn from(error: TransportError) -> Self {
        let mut status = Self::new(error.code(), error.to_string());
        status.set_source(Arc::new(error));
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http3_codes_map_as_the_grpc_proposal_says() {
        for (code, want) in [
            (0x107, Code::ResourceExhausted),
            (0x10b, Code::Unavailable),
            (0x10c, Code::Cancelled),
            (0x102, Code::Internal),
            (0x100, Code::Internal),
            (0xdead, Code::Internal),
        ] {
            assert_eq!(TransportError::ResetH3(H3Code(code)).code(), want, "{code:#x}");
        }
        assert!(TransportError::ResetH3(H3Code(0x10b)).is_retry_safe());
        assert!(!TransportError::ResetH3(H3Code(0x10c)).is_retry_safe());
    }

    #[test]
    fn a_status_remembers_its_transport_error() {
        let status = Status::from(TransportError::cancelled());
        assert_eq!(status.code(), Code::Cancelled);
        assert!(matches!(TransportError::of(&status), Some(TransportError::Cancelled(_))));
    }
}
