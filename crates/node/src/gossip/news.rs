//! What the log says of the others: who came, who went, and why. The machine calls them by id; people call them by name.

use std::collections::BTreeMap;

use base::{NodeName, RegionName, clock};
use membership::{Event, NodeId, Peer, Transport};

/// Names that are kept: more nodes than a mesh has.
const NAMES_MAX: usize = 20_000;

/// Tells the log.
#[derive(Debug, Default)]
pub(super) struct Teller {
    names: BTreeMap<NodeId, Known>,
}

/// A node that the log has spoken of.
#[derive(Debug)]
struct Known {
    node: NodeName,
    region: RegionName,
    /// Whether the log calls it a member, neither down nor gone.
    is_member: bool,
}

impl Teller {
    pub(super) fn link_up(&mut self, peer: &Peer, transport: Transport) {
        self.know(peer.id, &peer.node, &peer.region);
        let over = match transport {
            Transport::Quic => "QUIC",
            Transport::Tcp => "TCP",
        };
        tracing::debug!(peer = %peer.node, region = %peer.region, over, "a gossip link works");
    }

    pub(super) fn link_down(&self, id: NodeId, why: &str) {
        let Some(Known { node, region, .. }) = self.names.get(&id) else { return };
        tracing::debug!(peer = %node, %region, why, "a gossip link ended");
    }

    /// News from the machine.
    pub(super) fn tell(&mut self, event: &Event) {
        match event {
            Event::Member(card) => {
                self.know(card.id, &card.node, &card.region);
                self.member(card.id);
            }
            Event::Legacy { peer, .. } => {
                self.know(peer.id, &peer.node, &peer.region);
                tracing::info!(peer = %peer.node, region = %peer.region, "a peer of an older release is linked");
            }
            Event::Reachable { id, is } => self.reachable(*id, *is),
            Event::Down { id, left } => self.down(*id, *left),
            Event::Forgotten(id) => drop(self.names.remove(id)),
            Event::Suspected { id, is } => {
                let Some(Known { node, region, .. }) = self.names.get(id) else { return };
                let said = if *is { "a node is suspected" } else { "a node is suspected no more" };
                tracing::debug!(%node, %region, said);
            }
            Event::Quarantined { peer, until, why } => {
                let for_s = until.saturating_duration_since(clock::now()).as_secs();
                tracing::warn!(node = %peer.node, region = %peer.region, why, for_s, "a node broke the rules: it is not listened to for a while");
            }
            Event::Superseded { .. } => {}
            Event::Note(note) => tracing::info!("{note}"),
            Event::Described { id, descriptor, .. } => {
                let Some(Known { node, region, .. }) = self.names.get(id) else { return };
                let (version, engines) = (descriptor.version, descriptor.engines.len());
                tracing::debug!(%node, %region, version, engines, "a node said what it serves");
            }
            Event::Load { .. } | Event::Region(_) | Event::Parted(_) => {}
        }
    }

    fn know(&mut self, id: NodeId, node: &NodeName, region: &RegionName) {
        if self.names.len() < NAMES_MAX && !self.names.contains_key(&id) {
            let known = Known { node: node.clone(), region: region.clone(), is_member: false };
            self.names.insert(id, known);
        }
    }

    fn member(&mut self, id: NodeId) {
        let Some(Known { node, region, is_member }) = self.names.get_mut(&id) else { return };
        if !std::mem::replace(is_member, true) {
            tracing::info!(%node, %region, "a node is a member");
        }
    }

    fn reachable(&self, id: NodeId, is: bool) {
        let Some(Known { node, region, .. }) = self.names.get(&id) else { return };
        if is {
            tracing::info!(%node, %region, "a node is reachable");
        } else {
            tracing::info!(%node, %region, "a node is not reachable");
        }
    }

    fn down(&mut self, id: NodeId, left: bool) {
        let Some(Known { node, region, is_member }) = self.names.get_mut(&id) else { return };
        *is_member = false;
        if left {
            tracing::info!(%node, %region, "a node has left");
        } else {
            tracing::warn!(%node, %region, "a node is down");
        }
    }
}
