//! How pressed is the engine of a node? A bounded random walk, in counts of calls alone.

use std::time::Duration;

use base::{Load, RegionName};
use membership::{Descriptor, EngineDescriptor};
use rand::{RngExt as _, rngs::StdRng};

use super::{Config, LARGE};

/// Slots of every engine.
pub(super) const SLOTS: u32 = 64;
/// How long a call takes.
const SERVICE: Duration = Duration::from_millis(1_500);
/// One engine in so many has nothing to do.
const IDLE_SHARE: u32 = 5;
/// How often a step of the walk is a jump.
const JUMPS: f64 = 0.02;

#[derive(Clone, Debug)]
pub(super) struct Engine {
    is_idle: bool,
    /// Where the walk goes back to.
    home: f64,
    utilisation: f64,
    /// Attempts from this region and from another.
    arrivals: [u64; 2],
}

impl Engine {
    pub(super) fn new(rng: &mut StdRng) -> Self {
        let home = rng.random_range(0.6..0.8);
        Self { is_idle: rng.random_ratio(1, IDLE_SHARE), home, utilisation: home, arrivals: [0; 2] }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// A fifth of a second passes. Returns whether there will be a jump before the next.
    pub(super) fn step(&mut self, rng: &mut StdRng) -> bool {
        if self.is_idle {
            return false;
        }
        let step = rng.random_range(-0.03..0.03) + (self.home - self.utilisation) * 0.1;
        self.utilisation = (self.utilisation + step).clamp(0.3, 1.0);
        self.arrivals[0] += u64::from(rng.random_range(4..9_u32));
        self.arrivals[1] += u64::from(rng.random_range(0..3_u32));
        rng.random_bool(JUMPS)
    }

    /// More than a tenth comes or goes at once.
    pub(super) fn jump(&mut self, rng: &mut StdRng) {
        let jump = rng.random_range(0.11..0.25);
        let up = self.utilisation < self.home;
        self.utilisation = (self.utilisation + if up { jump } else { -jump }).clamp(0.3, 1.0);
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 64")]
    pub(super) fn in_flight(&self) -> u32 {
        if self.is_idle { 0 } else { (self.utilisation * f64::from(SLOTS)).round() as u32 }
    }

    pub(super) fn load(&self) -> Load {
        let in_flight = self.in_flight();
        Load {
            in_flight,
            slots: Some(SLOTS),
            service_time: SERVICE,
            drain_rate: f64::from(in_flight) / SERVICE.as_secs_f64(),
            step_time: Duration::from_millis(20),
            kv_use: Some(self.utilisation * 0.9),
            ..Load::default()
        }
    }

    pub(super) fn arrivals(&self, own: &RegionName, other: &RegionName) -> Vec<(RegionName, u64)> {
        let all = [(own, self.arrivals[0]), (other, self.arrivals[1])];
        let all = all.into_iter().take(1 + usize::from(own != other));
        all.filter(|(_, n)| *n > 0).map(|(region, n)| (region.clone(), n)).collect()
    }
}

/// Who serves what: one engine of one model each, and models go around.
#[derive(Clone, Copy, Debug)]
pub(super) struct Serving {
    models: u32,
    /// In large meshes all engines are called the same, so that there are not millions of descriptors to keep.
    is_large: bool,
}

impl Serving {
    pub(super) fn new(config: &Config) -> Self {
        Self { models: config.models, is_large: config.nodes > LARGE }
    }

    pub(super) fn descriptor(self, node: u32) -> Descriptor {
        let name = if self.is_large { "gpu".to_owned() } else { format!("gpu-{node}") };
        descriptor(&name, node % self.models)
    }
}

fn descriptor(name: &str, model: u32) -> Descriptor {
    let engine = || {
        Some(EngineDescriptor {
            name: name.parse().ok()?,
            protocol: "kserve-v2".to_owned(),
            models: vec![format!("model-{model}").parse().ok()?],
            services: vec!["inference.GRPCInferenceService".to_owned()],
            id: None,
            slots: Some(SLOTS),
        })
    };
    Descriptor { version: 1, engines: engine().into_iter().collect() }
}
