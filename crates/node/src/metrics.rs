//! What a node counts, as OpenMetrics. Labels come from closed sets only.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64},
    },
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tonic::Code;
use transport::grpc::OnEnd;

use crate::engines::Engine;

/// Which way a call crossed this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// From a client.
    Ingress,
    /// From a peer.
    Egress,
}

impl Side {
    fn label(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// Where an attempt went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    /// An engine of this node.
    Engine,
    /// A peer.
    Peer,
}

impl To {
    fn label(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Peer => "peer",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    side: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SideLabels {
    side: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    to: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineLabels {
    engine: String,
}

/// The books of a node, shared by its workers. Cloneable.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Arc<Mutex<Registry>>,
    calls: Family<CallLabels, Counter<u64, AtomicU64>>,
    in_flight: Family<SideLabels, Gauge<i64, AtomicI64>>,
    attempts: Family<AttemptLabels, Counter<u64, AtomicU64>>,
    engine_in_flight: Family<EngineLabels, Gauge<i64, AtomicI64>>,
    engines: Arc<[Arc<Engine>]>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    pub(crate) fn new(engines: Arc<[Arc<Engine>]>) -> Self {
        let mut registry = Registry::with_prefix("isobar");
        let (calls, in_flight) = (Family::default(), Family::default());
        let (attempts, engine_in_flight) = (Family::default(), Family::default());
        registry.register("calls", "Calls that ended, by side and gRPC code", calls.clone());
        registry.register("calls_in_flight", "Calls in progress, by side", in_flight.clone());
        registry.register("attempts", "Attempts sent to an engine or a peer", attempts.clone());
        let help = "Calls in progress at an engine of this node";
        registry.register("engine_calls_in_flight", help, engine_in_flight.clone());
        let registry = Arc::new(Mutex::new(registry));
        Self { registry, calls, in_flight, attempts, engine_in_flight, engines }
    }

    /// Counts a call as in progress until its end is told.
    pub(crate) fn begin(&self, side: Side) -> Counted {
        let in_flight = self.in_flight.get_or_create(&SideLabels { side: side.label() }).clone();
        in_flight.inc();
        Counted { calls: self.calls.clone(), in_flight, side, ended: false }
    }

    /// Counts an attempt.
    pub(crate) fn attempt(&self, to: To) {
        self.attempts.get_or_create(&AttemptLabels { to: to.label() }).inc();
    }

    /// Everything, in the OpenMetrics text format.
    pub(crate) fn render(&self) -> Result<String, fmt::Error> {
        for engine in self.engines.iter() {
            let labels = EngineLabels { engine: engine.name.to_string() };
            self.engine_in_flight.get_or_create(&labels).set(engine.in_flight().into());
        }
        let mut out = String::new();
        text::encode(&mut out, &self.registry.lock())?;
        Ok(out)
    }
}

/// A call in the books. One dropped without a word was cancelled by its caller.
pub(crate) struct Counted {
    calls: Family<CallLabels, Counter<u64, AtomicU64>>,
    in_flight: Gauge<i64, AtomicI64>,
    side: Side,
    ended: bool,
}

impl OnEnd for Counted {
    fn ended(&mut self, code: Code) {
        if !std::mem::replace(&mut self.ended, true) {
            self.in_flight.dec();
            let labels = CallLabels { side: self.side.label(), code: name(code) };
            self.calls.get_or_create(&labels).inc();
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.ended(Code::Cancelled);
    }
}

/// The code as gRPC's own metrics spell it (gRFC A66).
fn name(code: Code) -> &'static str {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_counted_once_however_it_ends() {
        let metrics = Metrics::new(Arc::new([]));
        metrics.begin(Side::Ingress).ended(Code::Ok);
        drop(metrics.begin(Side::Ingress));
        let open = metrics.begin(Side::Egress);
        metrics.attempt(To::Peer);
        let text = metrics.render().unwrap();
        for line in [
            r#"isobar_calls_total{side="ingress",code="OK"} 1"#,
            r#"isobar_calls_total{side="ingress",code="CANCELLED"} 1"#,
            r#"isobar_calls_in_flight{side="ingress"} 0"#,
            r#"isobar_calls_in_flight{side="egress"} 1"#,
            r#"isobar_attempts_total{to="peer"} 1"#,
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        drop(open);
    }
}
