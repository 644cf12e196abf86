//! What the mesh looks like from here, for people and for the next start.

use std::{sync::Arc, time::Instant};

use foca::State;

use super::{Liveness, MemberStatus, Mesh, Peer, Status, link::peer_of};
use crate::{Card, Judge, NodeId, pool::Seen};

impl<J: Judge> Mesh<J> {
    /// Cards to keep for the next start, signed, at most `most`: those of nodes that are alive, and of those of other regions
    /// that are linked where this node is not among their relays.
    #[must_use]
    pub fn cards(&self, most: usize) -> Vec<Arc<Card>> {
        let is_alive = |card: &&Arc<Card>| {
            let members = self.members(self.pool_of(&card.region));
            match members {
                Some(members) => members.is_active(card.id),
                None => self.links.is_up(card.id),
            }
        };
        let (mut near, far): (Vec<_>, Vec<_>) = self
            .cards
            .all()
            .filter(is_alive)
            .cloned()
            .partition(|card| card.region == self.own.region);
        near.truncate(most.saturating_sub(far.len().min(most / 4)));
        near.into_iter().chain(far).take(most).collect()
    }

    /// What the mesh looks like from here.
    #[must_use]
    pub fn status(&self, now: Instant) -> Status {
        let mut members: Vec<_> = self
            .cards
            .all()
            .map(|card| self.member_status(now, Some(Arc::clone(card)), peer_of(card)))
            .chain(
                self.links
                    .up
                    .values()
                    .filter(|link| self.cards.get(link.peer.id).is_none())
                    .map(|link| self.member_status(now, None, link.peer.clone())),
            )
            .collect();
        members.sort_by(|a, b| a.peer.node.cmp(&b.peer.node));
        let name = |id: &NodeId| {
            if *id == self.own.id {
                return Some(self.own.node.clone());
            }
            self.cards.get(*id).map(|card| card.node.clone())
        };
        Status {
            members,
            relays: self.relaying.ours().iter().filter_map(name).collect(),
            is_relay: self.relaying.is_relay(),
            subscribers: self.subscribers.len(),
            regions: self.regions.ages(now),
            quarantined: self.strikes.quarantined(now),
        }
    }

    fn member_status(&self, now: Instant, card: Option<Arc<Card>>, peer: Peer) -> MemberStatus {
        let link = self.links.get(peer.id);
        let seen = self.members(self.pool_of(&peer.region)).and_then(|m| m.seen(peer.id));
        let state = match seen {
            // Of those of other regions only relays are watched in a pool: that there is a link says enough.
            None if link.is_some_and(|link| link.reachable) => Liveness::Alive,
            _ if card.is_none() && link.is_some() => Liveness::Alive,
            None => Liveness::Unknown,
            Some(Seen { left: true, .. }) if peer.region != self.own.region => Liveness::Unknown,
            Some(Seen { left: true, .. }) => Liveness::Left,
            Some(Seen { state: State::Alive, .. }) => Liveness::Alive,
            Some(Seen { state: State::Suspect, .. }) => Liveness::Suspect,
            Some(Seen { state: State::Down, .. }) => Liveness::Down,
        };
        let epoch = card.as_ref().map(|card| card.facts.epoch);
        MemberStatus {
            state,
            epoch: epoch.or_else(|| link.map(|link| link.epoch)).unwrap_or(0),
            link: link.map(|link| (link.transport, link.rtt)),
            protocol: link.map(|link| link.protocol),
            subscribed: link.is_some_and(|link| link.subscribed || link.is_legacy()),
            heard: link.and_then(|link| link.load).map(|(_, at)| now.saturating_duration_since(at)),
            subscriber: self.subscribers.contains(&peer.id),
            card,
            peer,
        }
    }
}
