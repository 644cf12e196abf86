//! What a node's machine tells whoever routes: kept as routing would, and held against the truth.

use std::sync::Arc;

use membership::{Card, Event, NodeId, RegionView};

use super::{
    network::{Nanos, SECOND},
    toy,
    world::{What, World},
};

/// Who was touched so lately may still be called down.
pub(super) const SETTLES: Nanos = 10 * SECOND;
/// A false judgement is put right within this.
const CORRECTED: Nanos = 5 * SECOND;
/// Lines of a story.
const STORY: usize = 50_000;

impl World {
    /// Takes news in. Returns the epoch of a later process of the same name, if that is the news.
    pub(super) fn told(&mut self, host: u32, event: Event) -> Option<u64> {
        if self.measures.is_over {
            return None;
        }
        if self.config.watch == Some(host) {
            self.tell(&event);
        }
        match event {
            Event::Member(card) => self.member(host, &card),
            Event::Described { id, .. } => self.described(host, id),
            Event::Down { id, left } => self.down(host, id, left),
            Event::Forgotten(id) => {
                if let Some(process) = self.process(host) {
                    process.known.set(toy::index(id), false);
                }
            }
            Event::Region(view) => self.region(host, &view),
            Event::Quarantined { peer, why, .. } => {
                let (on, about) = (self.node_of(host), toy::index(peer.id));
                if !self.is_liar(on) && !self.is_liar(about) {
                    self.measures.false_quarantines += 1;
                    self.measures.note_quarantine(format!("{on} of {about}: {why}"));
                } else if self.is_liar(about) {
                    self.measures.quarantines += 1;
                }
            }
            Event::Suspected { is: true, .. } => self.measures.suspicions += 1,
            Event::Superseded { epoch } => return Some(epoch),
            // Taken in where the machine said it.
            Event::Load { .. }
            | Event::Legacy { .. }
            | Event::Reachable { .. }
            | Event::Parted(_)
            | Event::Suspected { .. }
            | Event::Note(_) => {}
        }
        None
    }

    fn tell(&mut self, event: &Event) {
        if self.story.len() < STORY && !matches!(event, Event::Load { .. } | Event::Region(_)) {
            let text = match event {
                Event::Member(card) => format!("Member({}, {:?})", card.node, card.pair()),
                Event::Described { id, epoch, .. } => {
                    format!("Described({}, {epoch})", toy::index(*id))
                }
                Event::Reachable { id, is } => format!("Reachable({}, {is})", toy::index(*id)),
                Event::Down { id, left } => format!("Down({}, left: {left})", toy::index(*id)),
                Event::Suspected { id, is } => format!("Suspected({}, {is})", toy::index(*id)),
                other => format!("{other:?}"),
            };
            self.story.push(format!("{:10.4} {text}", seconds(self.now)));
        }
    }

    pub(super) fn node_of(&self, host: u32) -> u32 {
        self.host(host).map_or(host, |host| host.node)
    }

    pub(super) fn is_liar(&self, node: u32) -> bool {
        self.plan.liars.contains(&node)
    }

    fn member(&mut self, host: u32, card: &Arc<Card>) {
        let node = toy::index(card.id);
        let is_real = self.host(node).is_some_and(|real| real.id() == card.id);
        if !is_real {
            return self
                .violated(format!("node {host} knows of {}, who does not exist", card.node));
        }
        if let Some(pair) = self.pairs.get_mut(node as usize) {
            *pair = (*pair).max(Some(card.pair()));
        }
        if let Some(process) = self.process(host) {
            process.known.set(node, true);
        }
        let bound = self.config.nodes;
        if self.process(host).is_some_and(|process| process.known.count() > bound) {
            self.violated(format!("node {host} knows more than the {bound} nodes there are"));
        }
    }

    fn described(&mut self, host: u32, id: NodeId) {
        let node = toy::index(id);
        let Some(process) = self.process(host) else { return };
        if !process.known.has(node) {
            self.violated(format!("node {host} was told what {node} serves before who that is"));
        }
    }

    fn down(&mut self, host: u32, id: NodeId, left: bool) {
        let (now, about) = (self.now, toy::index(id));
        if self.measures.noticed(about, host, now) || left && !self.is_alive(about) {
            return;
        }
        if self.is_liar(about) || self.is_liar(self.node_of(host)) || !self.is_settled(host, about)
        {
            return;
        }
        self.measures.false_downs += 1;
        self.measures.note_down(format!("{host} of {about} at {:.1} s", seconds(now)));
        let life = self.host(host).map_or(0, |host| host.life);
        self.push(now + CORRECTED, What::Recheck { host, life, about });
    }

    /// Whether a process of this node runs.
    pub(super) fn is_alive(&self, node: u32) -> bool {
        let second = self.doubles.get(&node).copied();
        [Some(node), second]
            .into_iter()
            .flatten()
            .any(|host| self.host(host).is_some_and(|host| host.runs()))
    }

    /// Whether the host has good reason to think that node alive: it runs, they hear each other, and all that for a while.
    pub(super) fn is_settled(&self, host: u32, node: u32) -> bool {
        let is_old = |host: u32| {
            self.host(host).is_some_and(|on| on.runs() && self.now >= on.touched + SETTLES)
        };
        let second = self.doubles.get(&node).copied();
        [Some(node), second].into_iter().flatten().any(|other| {
            let hear =
                !self.network.is_blocked(host, other) && !self.network.is_blocked(other, host);
            is_old(host) && is_old(other) && hear
        })
    }

    fn region(&mut self, host: u32, view: &RegionView) {
        let origin = self.origin;
        let Some(region) = self.regions.iter().position(|region| *region == view.region) else {
            return;
        };
        let Some(on) = self.host_mut(host) else { return };
        let sampled = on.when(origin, view.sampled);
        let Some(process) = on.process.as_mut() else { return };
        if let Some(known) = process.regions.get_mut(region) {
            *known = Some((sampled, view.offers.iter().map(|offer| offer.free).sum()));
        }
    }
}

pub(super) fn seconds(time: Nanos) -> f64 {
    time as f64 / SECOND as f64
}
