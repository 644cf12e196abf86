//! What metrics say of identity: the certificate that is shown, its renewal, whom the node turned away, and what its authority
//! did.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use base::clock;
use identity::{Renewal, Urgency};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
};

use crate::{renewal::Renewals, signer::Signer, trust::Trust};

/// Where the figures come from.
#[derive(Clone, Debug)]
pub(crate) struct Security {
    pub(crate) trust: Arc<Trust>,
    pub(crate) renewals: Arc<Renewals>,
    pub(crate) signer: Option<Arc<Signer>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SerialLabels {
    serial: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PortLabels {
    port: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

impl Collector for Security {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.certificate(&mut encoder)?;
        self.trust(&mut encoder)?;
        match &self.signer {
            Some(signer) => authority(signer, &mut encoder),
            None => Ok(()),
        }
    }
}

impl Security {
    fn certificate(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let current = self.trust.identity().current();
        let certificate = current.certificate();
        let help = "When the certificate this node has for the mesh ends, in seconds since 1970";
        gauge(encoder, "certificate_expiry_timestamp_seconds", help, timestamp(certificate.until))?;
        if let Some(served) = self.trust.identity().served() {
            let help = "When the certificate this node showed last ends, in seconds since 1970, by serial number";
            let name = "certificate_served_expiry_timestamp_seconds";
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            let labels = SerialLabels { serial: served.serial };
            metric.encode_family(&labels)?.encode_gauge(&timestamp(served.until))?;
        }
        let renewal = Renewal::new(certificate.from, certificate.until);
        let is_alarm = renewal.urgency(clock::wall()) != Urgency::None;
        let help = "Whether the certificate of this node ends soon or has ended, and nobody has renewed it";
        gauge(encoder, "certificate_alarm", help, if is_alarm { 1.0 } else { 0.0 })?;
        let help = "Renewals of the certificate, by outcome";
        let done = self.renewals.done.load(Ordering::Relaxed);
        let failed = self.renewals.failed.load(Ordering::Relaxed);
        outcomes(encoder, "certificate_renewals", help, &[("done", done), ("failed", failed)])
    }

    fn trust(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let list = self.trust.identity().revocations();
        let help = "Version of the list of revocations this node has; 0: nobody was ever revoked";
        gauge(encoder, "revocations_version", help, number(list.version()))?;
        let help = "Members of the mesh on the list of revocations";
        gauge(encoder, "revocations", help, number(list.len() as u64))?;
        let help = "Connections with nodes of the mesh that a certificate keeps open";
        gauge(encoder, "mesh_connections", help, number(self.trust.connections() as u64))?;
        let help = "Handshakes of whoever is no node of the mesh, by port";
        let mut metric =
            encoder.encode_descriptor("strangers_refused", help, None, MetricType::Counter)?;
        for (port, count) in self.trust.refused() {
            let labels = PortLabels { port: port.label() };
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, u64>(&count, None)?;
        }
        Ok(())
    }
}

fn authority(signer: &Signer, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let counts = signer.counts();
    let mut all = vec![
        ("joined", counts.joined.load(Ordering::Relaxed)),
        ("renewed", counts.renewed.load(Ordering::Relaxed)),
    ];
    all.extend(counts.refused());
    let help = "Requests for a certificate at this authority, by how they ended: joined, renewed, or why not";
    outcomes(encoder, "enrolments", help, &all)
}

fn outcomes(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    counts: &[(&'static str, u64)],
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (outcome, count) in counts {
        let family = OutcomeLabels { outcome };
        metric.encode_family(&family)?.encode_counter::<NoLabelSet, u64, u64>(count, None)?;
    }
    Ok(())
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
}

fn timestamp(moment: SystemTime) -> f64 {
    moment.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "counts and seconds are far below 2^53")]
fn number(count: u64) -> f64 {
    count as f64
}
