//! How pressed a server is, in the trailers of every reply: ORCA (xds.data.orca.v3), so that clients and proxies of others
//! understand it too.
//!
//! Between nodes the report speaks of the engine that served the call, and the ingress takes its figures into its view.
//! To clients it speaks of the node: what they balance over is nodes.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use base::Load;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use prost::Message as _;
use proto::xds::data::orca::v3::OrcaLoadReport;
use tonic::metadata::{BinaryMetadataValue, MetadataMap, MetadataValue};

/// The trailer.
pub(crate) const REPORT: HeaderName = HeaderName::from_static("endpoint-load-metrics-bin");
/// Our figures beside the standard ones.
const IN_FLIGHT: &str = "isobar.in_flight";
const SLOTS: &str = "isobar.slots";
/// A report longer than this is not ours.
const BYTES_MAX: usize = 4096;
/// The node's own report is made anew after this.
const FRESH_FOR: Duration = Duration::from_millis(100);

/// The report of one engine.
pub(crate) fn of_engine(load: &Load) -> HeaderValue {
    let mut figures = BTreeMap::from([(IN_FLIGHT.to_owned(), f64::from(load.in_flight))]);
    if let Some(slots) = load.slots {
        figures.insert(SLOTS.to_owned(), f64::from(slots));
    }
    value(&OrcaLoadReport { named_metrics: figures, ..report(load) })
}

fn report(load: &Load) -> OrcaLoadReport {
    OrcaLoadReport {
        application_utilization: load.utilisation(),
        rps_fractional: load.drain_rate,
        ..OrcaLoadReport::default()
    }
}

fn value(report: &OrcaLoadReport) -> HeaderValue {
    let encoded: BinaryMetadataValue = MetadataValue::from_bytes(&report.encode_to_vec());
    HeaderValue::from_bytes(encoded.as_encoded_bytes())
        .unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// What a peer's reply says of the engine that served it, on top of what was known of that engine.
pub(crate) fn read(trailers: &HeaderMap, known: Load) -> Option<Load> {
    let encoded = trailers.get(REPORT).filter(|value| value.len() <= BYTES_MAX)?;
    let report = OrcaLoadReport::decode(decoded(encoded)?).ok()?;
    let figure = |name: &str| report.named_metrics.get(name).copied().and_then(whole);
    let in_flight = figure(IN_FLIGHT)?;
    let drain_rate = Load::rate(report.rps_fractional);
    Some(Load { in_flight, slots: figure(SLOTS), drain_rate, ..known })
}

/// The report of several engines together.
pub(crate) fn of_all(load: &Load) -> HeaderValue {
    value(&report(load))
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

/// The bytes of a `-bin` value.
fn decoded(encoded: &HeaderValue) -> Option<Bytes> {
    let headers = HeaderMap::from_iter([(REPORT, encoded.clone())]);
    MetadataMap::from_headers(headers).get_bin(REPORT.as_str())?.to_bytes().ok()
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
        let made = value(&report(&loads()));
        *last = Some((now, made.clone()));
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_an_engine_comes_back_as_its_load() {
        let load = Load { in_flight: 7, slots: Some(64), drain_rate: 12.5, ..Load::default() };
        let trailers = HeaderMap::from_iter([(REPORT, of_engine(&load))]);
        assert_eq!(read(&trailers, Load::default()), Some(load));
    }

    #[test]
    fn what_is_no_report_of_ours_says_nothing() {
        let other = value(&OrcaLoadReport { cpu_utilization: 0.5, ..OrcaLoadReport::default() });
        let odd = OrcaLoadReport {
            named_metrics: BTreeMap::from([(IN_FLIGHT.to_owned(), f64::NAN)]),
            ..OrcaLoadReport::default()
        };
        for value in
            [other, value(&odd), HeaderValue::from_static("%%%"), HeaderValue::from_static("")]
        {
            let trailers = HeaderMap::from_iter([(REPORT, value)]);
            assert_eq!(read(&trailers, Load::default()), None);
        }
    }
}
