//! Figures of a run.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    Config,
    fault::Plan,
    host::Bits,
    network::{Nanos, SECOND},
};

/// Kinds of frames by the number of their field.
const KINDS: [&str; 16] = [
    "other",
    "hello",
    "descriptor",
    "load",
    "revocations",
    "swim",
    "cards_ask",
    "cards",
    "descriptors_ask",
    "descriptors",
    "subscribe",
    "not_subscribed",
    "digest",
    "cards_compare",
    "keep_alive",
    "handshake",
];
/// What goes over the wire that is no frame.
pub(super) const KEPT_ALIVE: u8 = 14 << 3;
pub(super) const HANDSHAKE: u8 = 15 << 3;

/// Examples kept of what should not be.
const EXAMPLES: usize = 10;

/// Something that must always hold did not.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Violation {
    /// When, in seconds of simulated time.
    pub at_s: f64,
    /// What makes it happen again.
    pub seed: u64,
    /// What.
    pub what: String,
}

/// What was measured. `None`: there was nothing to measure.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Nodes in all.
    pub nodes: u32,
    /// Regions.
    pub regions: u32,
    /// The seed.
    pub seed: u64,
    /// What went wrong.
    pub fault: String,
    /// Simulated time.
    pub seconds: f64,
    /// Packets lost, in percent.
    pub loss_percent: f64,
    /// Age of the load of an engine that is not idle, as routing sees it: median.
    pub load_age_p50_ms: Option<f64>,
    /// The same, 99th percentile.
    pub load_age_p99_ms: Option<f64>,
    /// Age of what is known of another region, 99th percentile.
    pub digest_age_p99_ms: Option<f64>,
    /// From a death until another node of the region holds the node down: median over all of them.
    pub detect_p50_s: Option<f64>,
    /// The same, 99th percentile.
    pub detect_p99_s: Option<f64>,
    /// How often a node was held down that ran and could be heard, both for a while.
    pub false_downs: u64,
    /// Bytes per second an ordinary node sent or received, whichever is more: mean.
    pub bytes_per_s_per_node: Option<f64>,
    /// From the end of the last fault until every node's view of its region was true.
    pub convergence_after_heal_s: Option<f64>,
    /// Machines that panicked.
    pub panics: u64,
    /// False downs that were not put right within 5 s.
    pub permanent_false_downs: u64,
    /// Nodes of a region that had not noticed a death by the end.
    pub undetected: u64,
    /// From the start of the last node until every node's view of its region was true.
    pub convergence_after_join_s: Option<f64>,
    /// In what a view differed from the truth when they were last compared, if it did.
    pub disagreement: Option<String>,
    /// Age of what is known of another region: median.
    pub digest_age_p50_ms: Option<f64>,
    /// Age of what relays say of a node's own region, 99th percentile.
    pub own_digest_age_p99_ms: Option<f64>,
    /// Looks at another region of which nothing was known.
    pub digests_missing: u64,
    /// How far a region's free slots are from what is said of them, in percent of its slots: 99th percentile.
    pub digest_error_p99_percent: Option<f64>,
    /// Bytes per second a relay sent or received, whichever is more: mean.
    pub relay_bytes_per_s: Option<f64>,
    /// Bytes per second of the ordinary node that sent or received most.
    pub bytes_per_s_worst: Option<f64>,
    /// What of that is which kind of frame: bytes sent per second and node, all nodes together.
    pub bytes_per_s_by_frame: BTreeMap<&'static str, f64>,
    /// Suspicions, all nodes together.
    pub suspicions: u64,
    /// Liars that were put into quarantine, counted by each that did.
    pub quarantines: u64,
    /// Honest nodes that were put into quarantine by honest nodes.
    pub false_quarantines: u64,
    /// Processes that found a later one of their name.
    pub superseded: u64,
    /// Load frames taken in.
    pub load_frames: u64,
    /// Events on the heap.
    pub events: u64,
    /// What must always hold and did not, counted.
    pub violations: u64,
    /// Some of the false downs and false quarantines.
    pub examples: Vec<String>,
}

#[derive(Debug, Default)]
pub(super) struct Measures {
    nodes: u32,
    regions: u32,
    pub(super) events: u64,
    pub(super) panics: u64,
    pub(super) load_frames: u64,
    /// In microseconds.
    pub(super) load_ages: Vec<u32>,
    pub(super) digest_ages: Vec<u32>,
    pub(super) own_digest_ages: Vec<u32>,
    pub(super) digests_missing: u64,
    /// In thousandths.
    pub(super) digest_errors: Vec<u32>,
    /// In milliseconds.
    detections: Vec<u32>,
    /// Who has died, when, and who has noticed.
    crashed: BTreeMap<u32, (Nanos, Bits)>,
    pub(super) false_downs: u64,
    pub(super) permanent_false_downs: u64,
    pub(super) suspicions: u64,
    pub(super) quarantines: u64,
    pub(super) false_quarantines: u64,
    pub(super) superseded: u64,
    /// How long after joining, and after the last fault, all views were true.
    pub(super) join_agreed: Option<Nanos>,
    pub(super) heal_agreed: Option<Nanos>,
    /// The first node that may disagree, and in what one did.
    pub(super) doubtful: u32,
    pub(super) disagreement: String,
    /// What each host had sent and received when the mesh was warm.
    pub(super) bytes: Vec<(u64, u64)>,
    pub(super) rates: Vec<(f64, f64)>,
    /// Bytes sent since the mesh was warm, by the first byte of the frame.
    pub(super) kinds: [u64; KINDS.len()],
    pub(super) relay_rates: Vec<(f64, f64)>,
    pub(super) violated: u64,
    pub(super) violations: Vec<Violation>,
    /// What follows is the storm: figures do not count any more, panics do.
    pub(super) is_over: bool,
    downs: Vec<String>,
    quarantined: Vec<String>,
}

impl Measures {
    pub(super) fn new(config: &Config) -> Self {
        Self { nodes: config.nodes, regions: config.regions, ..Self::default() }
    }

    /// A frame was sent that takes so many bytes on the wire.
    pub(super) fn sent(&mut self, first: u8, bytes: u64) {
        let kind = usize::from(first >> 3);
        let kind = if kind < KINDS.len() { kind } else { 0 };
        if let Some(sum) = self.kinds.get_mut(kind) {
            *sum += bytes;
        }
    }

    pub(super) fn crashed(&mut self, node: u32, now: Nanos) {
        self.crashed.entry(node).or_insert_with(|| (now, Bits::new(self.nodes)));
    }

    /// A node was held down by another. Returns whether it is dead.
    pub(super) fn noticed(&mut self, about: u32, by: u32, now: Nanos) -> bool {
        let Some((since, noticed)) = self.crashed.get_mut(&about) else { return false };
        if about % self.regions == by % self.regions && noticed.set(by, true) {
            self.detections.push(u32::try_from((now - *since) / 1_000_000).unwrap_or(u32::MAX));
        }
        true
    }

    pub(super) fn note_down(&mut self, what: String) {
        note(&mut self.downs, what);
    }

    pub(super) fn note_quarantine(&mut self, what: String) {
        note(&mut self.quarantined, what);
    }

    /// How many that live have not noticed a death.
    pub(super) fn undetected(&self, is_alive: impl Fn(u32) -> bool) -> u64 {
        let one = |(node, (_, noticed)): (&u32, &(Nanos, Bits))| {
            let others = (node % self.regions..self.nodes).step_by(self.regions as usize);
            others.filter(|other| is_alive(*other) && !noticed.has(*other)).count() as u64
        };
        self.crashed.iter().map(one).sum()
    }

    pub(super) fn report(
        mut self,
        config: &Config,
        plan: &Plan,
        undetected: u64,
    ) -> (Report, Vec<Violation>) {
        let faults: Vec<_> = config.faults.iter().map(ToString::to_string).collect();
        let examples =
            std::mem::take(&mut self.downs).into_iter().map(|text| format!("down: {text}"));
        let quarantined = std::mem::take(&mut self.quarantined);
        let seconds = |time: Nanos| time as f64 / SECOND as f64;
        let length = seconds(plan.end.saturating_sub(plan.warm)).max(1.0) * f64::from(config.nodes);
        let kinds = KINDS.iter().zip(self.kinds).filter(|(_, bytes)| *bytes > 0);
        let report = Report {
            bytes_per_s_by_frame: kinds
                .map(|(kind, n)| (*kind, (n as f64 / length).round()))
                .collect(),
            nodes: config.nodes,
            regions: config.regions,
            seed: config.seed,
            fault: if faults.is_empty() { "none".to_owned() } else { faults.join(",") },
            seconds: seconds(plan.end),
            loss_percent: plan.loss * 100.0,
            load_age_p50_ms: rank(&mut self.load_ages, 50, 1e3),
            load_age_p99_ms: rank(&mut self.load_ages, 99, 1e3),
            digest_age_p50_ms: rank(&mut self.digest_ages, 50, 1e3),
            digest_age_p99_ms: rank(&mut self.digest_ages, 99, 1e3),
            own_digest_age_p99_ms: rank(&mut self.own_digest_ages, 99, 1e3),
            digests_missing: self.digests_missing,
            digest_error_p99_percent: rank(&mut self.digest_errors, 99, 10.0),
            detect_p50_s: rank(&mut self.detections, 50, 1e3),
            detect_p99_s: rank(&mut self.detections, 99, 1e3),
            undetected,
            false_downs: self.false_downs,
            permanent_false_downs: self.permanent_false_downs,
            bytes_per_s_per_node: mean(&self.rates),
            bytes_per_s_worst: self
                .rates
                .iter()
                .map(|(a, b)| a.max(*b))
                .reduce(f64::max)
                .map(f64::round),
            relay_bytes_per_s: mean(&self.relay_rates),
            convergence_after_heal_s: self.heal_agreed.filter(|_| plan.heals).map(seconds),
            disagreement: Some(self.disagreement).filter(|why| !why.is_empty()),
            convergence_after_join_s: self.join_agreed.map(seconds),
            panics: self.panics,
            suspicions: self.suspicions,
            quarantines: self.quarantines,
            false_quarantines: self.false_quarantines,
            superseded: self.superseded,
            load_frames: self.load_frames,
            events: self.events,
            violations: self.violated,
            examples: examples
                .chain(quarantined.into_iter().map(|text| format!("quarantine: {text}")))
                .collect(),
        };
        (report, self.violations)
    }
}

fn note(list: &mut Vec<String>, what: String) {
    if list.len() < EXAMPLES {
        list.push(what);
    }
}

/// The value at this percentile, nearest rank, in units of so many.
fn rank(values: &mut [u32], percent: usize, unit: f64) -> Option<f64> {
    values.sort_unstable();
    let at = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(at).map(|value| f64::from(*value) / unit)
}

/// The mean of what was sent or of what was received, whichever is more.
fn mean(rates: &[(f64, f64)]) -> Option<f64> {
    let (sent, received) =
        rates.iter().fold((0.0, 0.0), |(s, r), (sent, received)| (s + sent, r + received));
    (!rates.is_empty()).then(|| (sent.max(received) / rates.len() as f64).round())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let mut values: Vec<u32> = (1..=200).rev().collect();
        assert_eq!(rank(&mut values, 50, 1.0), Some(100.0));
        assert_eq!(rank(&mut values, 99, 10.0), Some(19.8));
        assert_eq!(rank(&mut [7], 99, 1.0), Some(7.0));
        assert_eq!(rank(&mut [], 50, 1.0), None);
    }
}
