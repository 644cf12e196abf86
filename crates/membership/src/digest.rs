//! What a region has of each model, as one of its relays sums it up for everybody else.

use std::time::{Duration, Instant};

use base::RegionName;
use rand::Rng;

use crate::{Card, Descriptor, Digest, LoadFrame};

/// What a relay knows of one member of its region, itself included.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample<'a> {
    pub(crate) card: &'a Card,
    pub(crate) descriptor: &'a Descriptor,
    pub(crate) frame: &'a LoadFrame,
    /// How old the figures are: since they were taken.
    pub(crate) age: Duration,
}

/// Sums up a region.
#[derive(Debug)]
pub(crate) struct Digester {
    region: RegionName,
    epoch: u64,
}

impl Digester {
    /// The digester of a relay's process `epoch`. Make it anew when the node becomes a relay again, with `sequence` going on.
    pub(crate) fn new(region: RegionName, epoch: u64) -> Self {
        Self { region, epoch }
    }

    /// When [`Self::sum`] is due: twice a second.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// Sums up all members that are alive, this one included.
    pub(crate) fn sum<'a>(&mut self, now: Instant, members: impl IntoIterator<Item = Sample<'a>>) {
        drop((now, members));
    }

    /// The parts of one digest, with candidates drawn for one receiver.
    pub(crate) fn digests(&mut self, now: Instant, rng: &mut impl Rng) -> Vec<Digest> {
        let _ = (now, rng, &self.region, self.epoch);
        vec![]
    }
}
