//! What a node counts, as OpenMetrics. Labels come from closed sets and configured names only.

mod security;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64},
    },
    time::Duration,
};

use balance::{Outcome, Standing};
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet, text},
    metrics::{MetricType, counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use telemetry::Latency;
use tonic::Code;
use transport::grpc;

pub(crate) use security::Security;

use crate::{engines::Engine, peers::Board, record::AccessLog};

/// Which way a call crossed this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// From a client.
    Ingress,
    /// From a peer.
    Egress,
}

impl Side {
    pub(crate) fn label(self) -> &'static str {
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
struct RefusalLabels {
    side: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    to: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    to: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineLabels {
    engine: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    peer: String,
    region: String,
}

impl PeerLabels {
    /// Those beyond the ones that are named, together.
    fn others() -> Self {
        Self { peer: "other".to_owned(), region: String::new() }
    }
}

/// Latencies as an OpenMetrics histogram.
#[derive(Debug, Default)]
struct Histogram(Latency);

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let snapshot = self.0.snapshot();
        encoder.encode_histogram::<NoLabelSet>(
            snapshot.sum_s,
            snapshot.count,
            &snapshot.buckets,
            None,
        )
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// What is counted call by call.
#[derive(Debug, Default)]
struct Books {
    calls: Family<CallLabels, Counter<u64, AtomicU64>>,
    in_flight: Family<SideLabels, Gauge<i64, AtomicI64>>,
    refusals: Family<RefusalLabels, Counter<u64, AtomicU64>>,
    attempts: Family<AttemptLabels, Counter<u64, AtomicU64>>,
    failures: Family<FailureLabels, Counter<u64, AtomicU64>>,
    retries: Counter<u64, AtomicU64>,
    /// Ingress, egress.
    duration: [Histogram; 2],
    first_byte: [Histogram; 2],
}

/// The books of a node, shared by its workers. Cloneable.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Arc<Mutex<Registry>>,
    books: Arc<Books>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    pub(crate) fn new(engines: Arc<[Arc<Engine>]>, board: Arc<Board>, log: AccessLog) -> Self {
        let mut registry = Registry::with_prefix("isobar");
        let books = Arc::new(Books::default());
        registry.register("calls", "Calls that ended, by side and gRPC code", books.calls.clone());
        registry.register("calls_in_flight", "Calls in progress, by side", books.in_flight.clone());
        let help = "Calls this node refused itself, by side and reason";
        registry.register("calls_refused", help, books.refusals.clone());
        let help = "Attempts sent to an engine or a peer";
        registry.register("attempts", help, books.attempts.clone());
        let help = "Attempts that failed before the first byte of an answer, by where and how";
        registry.register("attempts_failed", help, books.failures.clone());
        registry.register("retries", "Attempts beyond the first of a call", books.retries.clone());
        registry.register_collector(Box::new(Latencies(books.clone())));
        registry.register_collector(Box::new(State { engines, board, log }));
        Self { registry: Arc::new(Mutex::new(registry)), books }
    }

    /// Also says what identity is like.
    pub(crate) fn watch(&self, security: Security) {
        self.registry.lock().register_collector(Box::new(security));
    }

    /// A call began.
    pub(crate) fn began(&self, side: Side) {
        self.books.in_flight.get_or_create(&SideLabels { side: side.label() }).inc();
    }

    /// The first byte of an answer came.
    pub(crate) fn answered(&self, side: Side, after: Duration) {
        self.books.first_byte[side as usize].0.record(after);
    }

    /// A call ended.
    pub(crate) fn ended(&self, side: Side, code: Code, took: Duration) {
        let side_label = side.label();
        self.books.in_flight.get_or_create(&SideLabels { side: side_label }).dec();
        self.books
            .calls
            .get_or_create(&CallLabels { side: side_label, code: grpc::code_name(code) })
            .inc();
        self.books.duration[side as usize].0.record(took);
    }

    /// A call was refused.
    pub(crate) fn refused(&self, side: Side, reason: &'static str) {
        self.books.refusals.get_or_create(&RefusalLabels { side: side.label(), reason }).inc();
    }

    /// An attempt is made.
    pub(crate) fn attempt(&self, to: To) {
        self.books.attempts.get_or_create(&AttemptLabels { to: to.label() }).inc();
    }

    /// An attempt failed.
    pub(crate) fn failed(&self, to: To, outcome: Outcome) {
        let labels = FailureLabels { to: to.label(), outcome: outcome.as_str() };
        self.books.failures.get_or_create(&labels).inc();
    }

    /// A call is tried once more.
    pub(crate) fn retried(&self) {
        self.books.retries.inc();
    }

    /// Everything, in the OpenMetrics text format.
    pub(crate) fn render(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry.lock())?;
        Ok(out)
    }
}

/// The two histograms of each side.
#[derive(Debug)]
struct Latencies(Arc<Books>);

impl Collector for Latencies {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let both = [
            ("call_duration", "Time from the head of a call to its end, by side", &self.0.duration),
            (
                "call_first_byte",
                "Time from the head of a call to the first byte of its answer, by side",
                &self.0.first_byte,
            ),
        ];
        for (name, help, sides) in both {
            let mut metric = encoder.encode_descriptor(
                name,
                help,
                Some(&Unit::Seconds),
                MetricType::Histogram,
            )?;
            for side in [Side::Ingress, Side::Egress] {
                let labels = SideLabels { side: side.label() };
                sides[side as usize].encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// What engines and peers are like at the moment of a scrape.
#[derive(Debug)]
struct State {
    engines: Arc<[Arc<Engine>]>,
    board: Arc<Board>,
    log: AccessLog,
}

impl State {
    fn engines(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        figure: impl Fn(&Engine) -> Option<f64>,
    ) -> fmt::Result {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for engine in self.engines.iter() {
            let Some(figure) = figure(engine) else { continue };
            let labels = EngineLabels { engine: engine.name.to_string() };
            metric.encode_family(&labels)?.encode_gauge(&figure)?;
        }
        Ok(())
    }
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let truth = |is_true: bool| Some(if is_true { 1.0 } else { 0.0 });
        if !self.engines.is_empty() {
            let help = "Calls in progress at an engine of this node";
            self.engines(&mut encoder, "engine_calls_in_flight", help, |engine| {
                Some(f64::from(engine.load().in_flight))
            })?;
            let help = "Calls an engine of this node may run at once now, where that is limited";
            self.engines(&mut encoder, "engine_slots", help, |e| e.load().slots.map(f64::from))?;
            let help = "Whether an engine of this node passes its health checks";
            self.engines(&mut encoder, "engine_healthy", help, |engine| {
                truth(engine.is_healthy())
            })?;
            let help = "Whether an engine of this node is ejected because calls to it broke off";
            self.engines(&mut encoder, "engine_ejected", help, |engine| {
                truth(engine.is_healthy() && engine.standing() == Standing::Ejected)
            })?;
        }
        let help = "Lines of the access log that nobody took";
        let mut dropped =
            encoder.encode_descriptor("access_log_dropped", help, None, MetricType::Counter)?;
        dropped.encode_counter::<NoLabelSet, u64, u64>(&self.log.dropped(), None)?;
        let (named, others) = self.board.figures();
        let labelled = named.into_iter().map(|(peer, figures)| {
            let (peer, region) = (peer.node.to_string(), peer.region.to_string());
            (PeerLabels { peer, region }, figures)
        });
        // No region is called nothing, so no peer is taken for the others.
        let others = others.map(|figures| (PeerLabels::others(), figures));
        let figures: Vec<_> = labelled.chain(others).collect();
        if figures.is_empty() {
            return Ok(());
        }
        let peers = [
            ("peer_present", "Whether a peer says how pressed it is, and takes calls"),
            ("peer_ejected", "Whether a peer is ejected because calls to it broke off"),
            ("peer_calls_in_flight", "Calls of this node in progress at a peer"),
            ("peer_heard_seconds", "Time since a peer last said how pressed it is"),
        ];
        for (index, (name, help)) in peers.into_iter().enumerate() {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (labels, figures) in &figures {
                let figure = match index {
                    0 => Some(f64::from(figures.present)),
                    1 => Some(f64::from(figures.ejected)),
                    2 => Some(f64::from(figures.in_flight)),
                    _ => figures.heard.map(|heard| heard.as_secs_f64()),
                };
                let Some(figure) = figure else { continue };
                metric.encode_family(labels)?.encode_gauge(&figure)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_is_in_the_text() {
        let board = Arc::new(Board::of_test(&["b"]));
        let (log, _writer) = AccessLog::new(0.0, 1).unwrap();
        let metrics = Metrics::new(Arc::new([]), board, log);
        metrics.began(Side::Ingress);
        metrics.answered(Side::Ingress, Duration::from_millis(20));
        metrics.ended(Side::Ingress, Code::Ok, Duration::from_millis(30));
        metrics.began(Side::Egress);
        metrics.attempt(To::Peer);
        metrics.failed(To::Peer, Outcome::Busy);
        metrics.retried();
        metrics.refused(Side::Ingress, "full");
        let text = metrics.render().unwrap();
        for line in [
            r#"isobar_calls_total{side="ingress",code="OK"} 1"#,
            r#"isobar_calls_in_flight{side="ingress"} 0"#,
            r#"isobar_calls_in_flight{side="egress"} 1"#,
            r#"isobar_attempts_total{to="peer"} 1"#,
            r#"isobar_attempts_failed_total{to="peer",outcome="busy"} 1"#,
            "isobar_retries_total 1",
            r#"isobar_calls_refused_total{side="ingress",reason="full"} 1"#,
            r#"isobar_call_duration_seconds_bucket{le="0.05",side="ingress"} 1"#,
            r#"isobar_call_duration_seconds_bucket{le="0.025",side="ingress"} 0"#,
            r#"isobar_call_first_byte_seconds_count{side="ingress"} 1"#,
            r#"isobar_peer_present{peer="b",region="us"} 0"#,
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("isobar_peer_heard_seconds{"), "never heard:\n{text}");
    }
}
