//! How pressed a server is, in the trailers of every reply and out of band (`rca`): ORCA (xds.data.orca.v3), so that clients
//! and proxies of others understand it too.
//!
//! Between nodes the report speaks of the engine that served the call, and the ingress takes its figures into its view.
//! To clients it speaks of the node: what they balance over is nodes. An engine's own report is read here too, for what only
//! it knows.

use std::time::{Duration, Instant};

use balance::Said;
use base::Load;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use prost::Message as _;
use proto::xds::data::orca::v3::OrcaLoadReport;
use tonic::metadata::{BinaryMetadataValue, MetadataMap, MetadataValue};

/// The trailer.
pub(crate) const REPORT: HeaderName = HeaderName::from_static("endpoint-load-metrics-bin");
/// Our figures beside the standard ones, as named metrics.
const IN_FLIGHT: &str = "isobar.in_flight";
const QUEUED: &str = "isobar.queued";
const SLOTS: &str = "isobar.slots";
const SERVICE_TIME: &str = "isobar.service_time_s";
const STEP_TIME: &str = "isobar.step_time_s";
const DRAIN_RATE: &str = "isobar.drain_rate_per_s";
/// The share of the key-value cache in use, as Triton calls it; and as vLLM does, in spite of its name 0 to 1 too.
const KV_USE: &str = "kv_cache_utilization";
const KV_USES: [&str; 2] = [KV_USE, "kv_cache_usage_perc"];
/// Calls that wait in the engine, as vLLM calls it, and as others may.
const WAITING: [&str; 3] = ["num_requests_waiting", "queue_length", "queue"];
/// A report longer than this is not ours.
const BYTES_MAX: usize = 4096;
/// The node's own report is made anew after this.
const FRESH_FOR: Duration = Duration::from_millis(100);

/// A load as ORCA says it. What is not known is left out.
pub(crate) fn report(load: &Load) -> OrcaLoadReport {
    let known = |figure: f64| (figure > 0.0).then_some(figure);
    let figures = [
        (IN_FLIGHT, Some(load.in_flight.into())),
        (QUEUED, Some(load.queued.into())),
        (SLOTS, load.slots.map(f64::from)),
        (SERVICE_TIME, known(load.service_time.as_secs_f64())),
        (STEP_TIME, known(load.step_time.as_secs_f64())),
        (DRAIN_RATE, known(load.drain_rate)),
    ];
    let named = figures.into_iter().filter_map(|(name, figure)| Some((name.to_owned(), figure?)));
    OrcaLoadReport {
        application_utilization: load.utilisation(),
        rps_fractional: load.drain_rate,
        utilization: load.kv_use.map(|used| (KV_USE.to_owned(), used)).into_iter().collect(),
        named_metrics: named.collect(),
        ..OrcaLoadReport::default()
    }
}

/// A load as the value of [`REPORT`].
pub(crate) fn value(load: &Load) -> HeaderValue {
    encoded(&report(load))
}

fn encoded(report: &OrcaLoadReport) -> HeaderValue {
    let encoded: BinaryMetadataValue = MetadataValue::from_bytes(&report.encode_to_vec());
    HeaderValue::from_bytes(encoded.as_encoded_bytes())
        .unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// What a peer's reply says of the engine that served it, on top of what was known of that engine.
pub(crate) fn read(trailers: &HeaderMap, known: Load) -> Option<Load> {
    let report = decoded(trailers)?;
    let figure = |name: &str| report.named_metrics.get(name).copied();
    let count = |name: &str| figure(name).and_then(whole);
    // An average that is left out was not taken yet; what was known of it is no worse.
    let time = |name: &str, known| {
        figure(name).and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or(known)
    };
    Some(Load {
        in_flight: count(IN_FLIGHT)?,
        queued: count(QUEUED).unwrap_or(known.queued),
        slots: count(SLOTS),
        service_time: time(SERVICE_TIME, known.service_time),
        drain_rate: Load::rate(report.rps_fractional),
        step_time: time(STEP_TIME, known.step_time),
        kv_use: kv_use(&report).or(known.kv_use),
        ..known
    })
}

/// What an engine says of itself in its trailers; `None`: nothing that anybody needs.
pub(crate) fn said(trailers: &HeaderMap) -> Option<Said> {
    let report = decoded(trailers)?;
    let queued = WAITING.iter().find_map(|name| report.named_metrics.get(*name).copied());
    let said = Said { kv_use: kv_use(&report), queued: queued.and_then(whole) };
    (said != Said::default()).then_some(said)
}

fn kv_use(report: &OrcaLoadReport) -> Option<f64> {
    let find =
        |name: &&str| report.utilization.get(*name).or_else(|| report.named_metrics.get(*name));
    let used = KV_USES.iter().find_map(find).copied();
    used.filter(|used| (0.0..=1.0).contains(used))
}

/// A count, if that is what it is.
fn whole(figure: f64) -> Option<u32> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the range was checked"
    )]
    (0.0..=f64::from(u32::MAX)).contains(&figure).then_some(figure as u32)
}

/// The report among trailers, if there is one and it can be read.
fn decoded(trailers: &HeaderMap) -> Option<OrcaLoadReport> {
    let encoded = trailers.get(REPORT).filter(|value| value.len() <= BYTES_MAX)?;
    let headers = HeaderMap::from_iter([(REPORT, encoded.clone())]);
    let bytes: Bytes =
        MetadataMap::from_headers(headers).get_bin(REPORT.as_str())?.to_bytes().ok()?;
    OrcaLoadReport::decode(bytes).ok()
}

/// The node's own report, made anew now and then: one per worker.
#[derive(Debug, Default)]
pub(crate) struct NodeReport(Mutex<Option<(Instant, HeaderValue)>>);

impl NodeReport {
    /// The report, made of `loads` when the last is too old.
    pub(crate) fn value(&self, now: Instant, loads: impl FnOnce() -> Load) -> HeaderValue {
        let mut last = self.0.lock();
        if let Some((made, value)) = &*last
            && now.saturating_duration_since(*made) < FRESH_FOR
        {
            return value.clone();
        }
        let made = value(&loads());
        *last = Some((now, made.clone()));
        made
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn trailers(report: &OrcaLoadReport) -> HeaderMap {
        HeaderMap::from_iter([(REPORT, encoded(report))])
    }

    fn named(figures: &[(&str, f64)]) -> OrcaLoadReport {
        let named_metrics = figures.iter().map(|(name, f)| ((*name).to_owned(), *f)).collect();
        OrcaLoadReport { named_metrics, ..OrcaLoadReport::default() }
    }

    fn pressed() -> Load {
        Load {
            in_flight: 7,
            queued: 2,
            slots: Some(64),
            service_time: Duration::from_millis(1_500),
            drain_rate: 12.5,
            unusable: false,
            step_time: Duration::from_millis(20),
            kv_use: Some(0.25),
        }
    }

    #[test]
    fn a_report_of_an_engine_comes_back_as_its_load() {
        let trailers = HeaderMap::from_iter([(REPORT, value(&pressed()))]);
        assert_eq!(read(&trailers, Load::default()), Some(pressed()));
    }

    #[test]
    fn a_report_names_its_figures_and_leaves_out_what_is_not_known() {
        let idle = report(&Load::default());
        assert_eq!(idle.named_metrics.keys().collect::<Vec<_>>(), [IN_FLIGHT, QUEUED]);
        assert!(idle.utilization.is_empty());
        let pressed = report(&pressed());
        assert!((pressed.application_utilization - 7.0 / 64.0).abs() < f64::EPSILON);
        assert!((pressed.named_metrics[STEP_TIME] - 0.02).abs() < f64::EPSILON);
        assert!((pressed.named_metrics[DRAIN_RATE] - 12.5).abs() < f64::EPSILON);
    }

    #[test]
    fn what_an_earlier_release_leaves_out_stays_as_it_was_known() {
        let earlier = named(&[(IN_FLIGHT, 3.0), (SLOTS, 8.0)]);
        let want = Load { in_flight: 3, slots: Some(8), drain_rate: 0.0, ..pressed() };
        assert_eq!(read(&trailers(&earlier), pressed()), Some(want));
    }

    #[test]
    fn what_is_no_report_of_ours_says_nothing() {
        let other = OrcaLoadReport { cpu_utilization: 0.5, ..OrcaLoadReport::default() };
        let odd = named(&[(IN_FLIGHT, f64::NAN)]);
        for value in [
            encoded(&other),
            encoded(&odd),
            HeaderValue::from_static("%%%"),
            HeaderValue::from_static(""),
        ] {
            let trailers = HeaderMap::from_iter([(REPORT, value)]);
            assert_eq!(read(&trailers, Load::default()), None);
        }
        let times = named(&[(IN_FLIGHT, 1.0), (SERVICE_TIME, -1.0), (STEP_TIME, f64::INFINITY)]);
        let read = read(&trailers(&times), Load::default()).unwrap();
        assert_eq!((read.service_time, read.step_time), (Duration::ZERO, Duration::ZERO));
    }

    #[test]
    fn what_engines_say_of_themselves_is_read_by_the_names_they_use() {
        let both = Said { kv_use: Some(0.4), queued: Some(3) };
        let vllm = named(&[("kv_cache_usage_perc", 0.4), ("num_requests_waiting", 3.0)]);
        assert_eq!(said(&trailers(&vllm)), Some(both));
        let triton = OrcaLoadReport {
            utilization: BTreeMap::from([(KV_USE.to_owned(), 0.4)]),
            ..named(&[("queue", 3.0)])
        };
        assert_eq!(said(&trailers(&triton)), Some(both));
        for nothing in [named(&[("other", 1.0)]), named(&[(KV_USE, 40.0), ("queue", -1.0)])] {
            assert_eq!(said(&trailers(&nothing)), None);
        }
        assert_eq!(said(&HeaderMap::new()), None);
    }
}
