//! Frames that come: whether they are taken, what they are, and what it costs to break a rule.

use std::time::{Duration, Instant};

use super::{Event, Mesh, Peer, card::ALL_COMES, relay::is_fellow};
use crate::{
    Frame, Judge, NodeId, WireError, decode,
    strikes::{Offence, Passage},
};

impl<J: Judge> Mesh<J> {
    /// A frame came.
    pub(super) fn hear(&mut self, now: Instant, from: NodeId, bytes: &bytes::Bytes, rtt: Duration) {
        let Self { links, relaying, relay, .. } = self;
        let Some(link) = links.up.get_mut(&from) else { return };
        let is_answer = link.asked_all.is_some_and(|(at, _)| now < at + ALL_COMES)
            && link.expected >= bytes.len();
        let weight = if is_answer { 0 } else { bytes.len() };
        link.expected -= if is_answer { bytes.len() } else { 0 };
        (link.heard, link.rtt) = (now, rtt);
        let may_more = || {
            is_answer
                || relaying.is_relay()
                || relaying.is_of_ours(from)
                || is_fellow(relay.as_ref(), from)
        };
        match link.rate.take(now, weight, may_more) {
            Passage::Taken => {}
            Passage::Dropped => return,
            Passage::Struck => {
                return self.strike(now, from, Offence::Strike, "more than it may send");
            }
        }
        let is_legacy = link.is_legacy();
        match decode(bytes) {
            Ok(frame) if is_legacy => self.hear_legacy(now, from, frame),
            Ok(frame) => self.hear_frame(now, from, frame),
            Err(WireError::Unknown) => {}
            Err(error) => self.strike(now, from, Offence::Strike, &error.to_string()),
        }
    }

    fn hear_frame(&mut self, now: Instant, from: NodeId, frame: Frame) {
        match frame {
            Frame::Swim(pool, packet) => self.hear_swim(now, from, pool, &packet),
            Frame::Load(frame) => self.hear_load(now, from, frame),
            Frame::Cards(pool, cards) => self.hear_cards(now, from, pool, &cards),
            Frame::CardsAsk(pool, nodes) => self.hear_cards_ask(now, from, pool, &nodes),
            Frame::CardsCompare(sums) => self.hear_cards_compare(now, from, &sums),
            Frame::DescriptorsAsk(hashes) => self.hear_descriptors_ask(now, from, &hashes),
            Frame::Descriptors(bodies) => self.hear_descriptors(now, &bodies),
            Frame::Subscribe(wanted) => self.hear_subscribe(now, from, wanted),
            Frame::NotSubscribed(wait) => self.not_subscribed(now, from, wait),
            Frame::Digest(digest) => self.hear_digest(now, from, digest),
            // Hellos and revocations are the business of whoever makes the links.
            Frame::Hello(_) | Frame::Revocations(_) | Frame::Descriptor(_) => {}
        }
    }

    /// A node that is linked broke a rule.
    pub(super) fn strike(&mut self, now: Instant, id: NodeId, offence: Offence, why: &str) {
        if let Some(link) = self.links.get(id) {
            let peer = link.peer.clone();
            self.convict(now, &peer, offence, why);
        }
    }

    pub(super) fn convict(&mut self, now: Instant, peer: &Peer, offence: Offence, why: &str) {
        let Some(until) = self.strikes.commit(now, peer, offence, why) else { return };
        self.drop_link(peer.id);
        drop(self.links.done(peer.id));
        self.close(peer.id, format!("not listened to for a while: {why}"));
        let (peer, why) = (peer.clone(), why.to_owned());
        self.event(Event::Quarantined { peer, until, why });
    }
}
