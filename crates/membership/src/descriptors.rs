//! What nodes serve, by the SHA-256 their cards name: which bodies are wanted, whom to ask, and what is handed on.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{Descriptor, Frame, NodeId};

/// SHA-256 of an encoded descriptor.
pub(crate) type Hash = [u8; 32];

/// Descriptors by their hash, each kept once however many cards name it.
#[derive(Debug, Default)]
pub(crate) struct Bodies {
    entries: BTreeMap<Hash, ()>,
}

impl Bodies {
    /// What this node serves: replaces what it served before. It is counted as named by one card.
    pub(crate) fn own(
        &mut self,
        descriptor: Descriptor,
        sha256: impl Fn(&[u8]) -> Hash,
    ) -> (Hash, Arc<Descriptor>) {
        (sha256(&crate::encode_descriptor(&descriptor)), Arc::new(descriptor))
    }

    /// One more card names `hash`; `sources` may have the body, the best first. Returns its body, if it is here already.
    /// Each call is undone by one [`Self::release`].
    pub(crate) fn want(&mut self, hash: Hash, sources: &[NodeId]) -> Option<Arc<Descriptor>> {
        let _ = (hash, sources);
        None
    }

    /// Somebody else may have the body of `hash`, which is wanted already.
    pub(crate) fn offered(&mut self, hash: &Hash, source: NodeId) {
        let _ = (hash, source);
    }

    /// One card fewer names `hash`; the last one takes the body with it.
    pub(crate) fn release(&mut self, hash: &Hash) {
        let _ = hash;
    }

    /// Whom to ask for what now, among the nodes that are linked: one [`Frame::DescriptorsAsk`] each.
    pub(crate) fn asks(
        &mut self,
        now: Instant,
        is_linked: impl Fn(NodeId) -> bool,
    ) -> Vec<(NodeId, Vec<Hash>)> {
        drop((now, is_linked));
        vec![]
    }

    /// When [`Self::asks`] is to be called, if nothing changes before.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// A body came. `None`: nobody wanted it, or it is no descriptor.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        bytes: &[u8],
        sha256: impl Fn(&[u8]) -> Hash,
    ) -> Option<(Hash, Arc<Descriptor>)> {
        drop((now, bytes, sha256));
        None
    }

    /// The body of `hash`, if it is here.
    pub(crate) fn get(&self, hash: &Hash) -> Option<&Arc<Descriptor>> {
        let _ = hash;
        None
    }

    /// What of `hashes` is here, as frames.
    pub(crate) fn answer(&self, hashes: &[Hash]) -> Vec<Frame> {
        let _ = hashes;
        vec![]
    }
}
