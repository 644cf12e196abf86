//! Links are dialled, end, and carry frames: what the sockets of `node` do for the machine, in the world of the simulation.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use membership::{
    DATAGRAM_BYTES_MAX, Input, LINKS_MAX, NodeId, STREAM_BYTES_MAX, Target, Transport, Way,
};

use super::{
    links::{End, HANDSHAKE_BYTES, IDLE, KEEP_ALIVE, KEEP_ALIVE_BYTES, LinkRef},
    measure::{HANDSHAKE, KEPT_ALIVE},
    network::{MS, Nanos, SECOND, on_wire},
    toy,
    world::{What, World},
};

/// A dial that hears nothing fails.
const DIAL_TIMEOUT: Nanos = SECOND;
/// How much later TCP is tried, or a lost packet of a handshake sent again.
const DIAL_AGAIN: Nanos = 500 * MS;
/// The first byte of frames that are looked at on their way: `Subscribe` and `NotSubscribed`.
const SUBSCRIBE: u8 = 0x52;
const NOT_SUBSCRIBED: u8 = 0x5a;
/// Frames kept to be spoiled and thrown at machines in the end.
const CAPTURED: usize = 512;

/// A link that is asked for.
#[derive(Debug)]
pub(super) struct Dial {
    host: u32,
    life: u32,
    to: u32,
    began: Nanos,
    target: Target,
}

impl World {
    pub(super) fn dial(&mut self, host: u32, target: Target) {
        let Some(on) = self.host(host) else { return };
        let life = on.life;
        let address = target.address();
        let found = self.addresses.get(address).copied();
        let to = found.unwrap_or(host);
        let dial = Box::new(Dial { host, life, to, began: self.now, target });
        let Some(other) = self.host(to) else { return };
        let way = self.network.way(on.place(host), other.place(to));
        let refused = match found {
            None => Some("no such host"),
            Some(found) if found == host => Some("that is this node"),
            Some(_) => None,
        };
        if let Some(why) = refused {
            return self.push(self.now + MS, What::Failed { dial, why });
        }
        let lost: u64 = (0..3).map(|_| u64::from(self.network.loses())).sum();
        let takes = self.network.jittered(way) * 3 + lost * DIAL_AGAIN;
        if takes >= DIAL_TIMEOUT {
            self.push(self.now + DIAL_TIMEOUT, What::Failed { dial, why: "no answer" });
        } else {
            self.push(self.now + takes, What::Dialled(dial));
        }
    }

    pub(super) fn dial_failed(&mut self, dial: Dial, why: &'static str) {
        let Dial { host, life, target, .. } = dial;
        let Some(on) = self.host(host).filter(|on| on.life == life) else { return };
        if on.paused.is_some() {
            let dial = Box::new(Dial { target, ..dial });
            return self.push(self.now + 100 * MS, What::Failed { dial, why });
        }
        self.give_soon(host, Input::DialFailed { target, why: why.to_owned() });
    }

    pub(super) fn dialled(&mut self, dial: Box<Dial>) {
        let (host, to) = (dial.host, dial.to);
        let Some(on) = self.host(host).filter(|on| on.life == dial.life) else { return };
        let Some(other) = self.host(to) else { return };
        let hears = !self.network.is_blocked(host, to) && !self.network.is_blocked(to, host);
        if !hears || !other.has_power || other.paused.is_some() || on.paused.is_some() {
            let at = dial.began + DIAL_TIMEOUT;
            return self.push(at, What::Failed { dial, why: "no answer" });
        }
        let wanted = match &dial.target {
            Target::Member { peer, .. } => Some(peer),
            Target::Seed(seed) => seed.peer.as_ref(),
        };
        let why = if other.process.is_none() {
            Some("refused: nobody listens")
        } else if wanted.is_some_and(|wanted| *wanted != other.peer()) {
            Some("another node is there")
        } else if other.node == on.node {
            Some("that has this node's name")
        } else {
            None
        };
        match why {
            Some(why) => self.dial_failed(*dial, why),
            None => self.connect(*dial),
        }
    }

    /// Both ends have said hello. Of two links between the same two processes the one dialled by the smaller id stays.
    pub(super) fn connect(&mut self, dial: Dial) {
        let (host, to) = (dial.host, dial.to);
        let Some((on, other)) = self.host(host).zip(self.host(to)) else { return };
        let (nodes, ids) = ([on.node, other.node], [on.id(), other.id()]);
        let (peers, way) =
            ([on.peer(), other.peer()], self.network.way(on.place(host), other.place(to)));
        let old = self.process(host).and_then(|process| process.links.get(&nodes[1]).copied());
        let doubled = old.and_then(|old| self.links.get(old)).is_some_and(|old| {
            let is_same =
                old.ends.iter().all(|end| end.is_up) && old.ends.iter().any(|end| end.host == to);
            is_same && (old.ends[0].host == host || ids[1] < ids[0])
        });
        if doubled {
            return self.dial_failed(dial, "doubled: there is a link already");
        }
        for (at, other) in [(host, nodes[1]), (to, nodes[0])] {
            let is_full = |links: &BTreeMap<u32, LinkRef>| {
                links.len() >= LINKS_MAX && !links.contains_key(&other)
            };
            if self.process(at).is_some_and(|process| is_full(&process.links)) {
                return self.dial_failed(dial, "too many links");
            }
        }
        let Some(hello) = self.guarded(host, |mesh, _| mesh.hello()) else { return };
        let Some(other_hello) = self.guarded(to, |mesh, _| mesh.hello()) else { return };
        self.replace(host, nodes[1]);
        self.replace(to, nodes[0]);
        let end = |host, i: usize| End { host, node: nodes[i], id: ids[i], is_up: true };
        let link = self.links.open([end(host, 0), end(to, 1)], way, self.now);
        self.measures.sent(HANDSHAKE, 2 * HANDSHAKE_BYTES);
        for (at, node) in [(host, nodes[1]), (to, nodes[0])] {
            if let Some(at) = self.host_mut(at) {
                at.sent += HANDSHAKE_BYTES;
                at.received += HANDSHAKE_BYTES;
            }
            if let Some(process) = self.process(at) {
                process.links.insert(node, link);
            }
        }
        let [peer, other_peer] = peers;
        let transport = Transport::Quic;
        let (hello, other_hello) = (Box::new(hello), Box::new(other_hello));
        let dialled =
            Input::LinkUp { peer: other_peer, hello: other_hello, transport, dialled: true };
        self.give_soon(host, dialled);
        self.give_soon(to, Input::LinkUp { peer, hello, transport, dialled: false });
    }

    /// Ends a link that a newer one takes the place of.
    fn replace(&mut self, host: u32, node: u32) {
        let Some(old) = self.process(host).and_then(|process| process.links.remove(&node)) else {
            return;
        };
        let Some(side) = self.links.get(old).map(|link| link.side(host)) else { return };
        self.say_good_bye(old, side, "replaced by a newer link");
    }

    pub(super) fn close(&mut self, host: u32, id: NodeId, why: &str) {
        let node = toy::index(id);
        let known = self.process(host).and_then(|process| process.links.get(&node).copied());
        let now = self.now;
        let Some(link) =
            known.filter(|link| self.links.get(*link).is_none_or(|link| link.is_of(now)))
        else {
            return;
        };
        let Some(process) = self.process(host) else { return };
        process.links.remove(&node);
        process.subscribed.remove(&node);
        let Some(side) = self.links.get(link).map(|link| link.side(host)) else { return };
        self.say_good_bye(link, side, why);
    }

    /// This end is no more, and tells the other.
    pub(super) fn say_good_bye(&mut self, link: LinkRef, side: usize, why: &str) {
        let Some(known) = self.links.get(link).copied() else { return };
        let (from, to) = (known.end(side).host, known.end(1 - side).host);
        self.account_silence(link);
        self.links.take_down(link, side);
        if self.network.is_blocked(from, to) || self.network.loses() {
            return self.expect_silence(link, 1 - side);
        }
        let at = (self.now + known.way).max(known.ordered[(1 - side) & 1]);
        self.push(at, What::Closed { link, side: 1 - side, why: why.into() });
    }

    /// From now on this end hears nothing: it will notice.
    pub(super) fn expect_silence(&mut self, link: LinkRef, side: usize) {
        // It was last heard up to one interval ago, and time runs from when something was asked for after that.
        let before = self.network.up_to(2 * KEEP_ALIVE);
        self.push(self.now + IDLE + KEEP_ALIVE - before, What::Idle { link, side });
    }

    pub(super) fn idle(&mut self, link: LinkRef, side: usize) {
        let Some(known) = self.links.get(link).copied().filter(|link| link.end(side).is_up) else {
            return;
        };
        let (end, other) = (known.end(side), known.end(1 - side));
        let is_paused = |host: u32| self.host(host).is_some_and(|host| host.paused.is_some());
        if is_paused(end.host) {
            return;
        }
        let hears =
            other.is_up && !is_paused(other.host) && !self.network.is_blocked(other.host, end.host);
        if !hears {
            self.lose(link, side, "nothing was heard for a second");
        }
    }

    pub(super) fn closed(&mut self, link: LinkRef, side: usize, why: Box<str>) {
        let Some(end) = self.links.get(link).map(|link| link.end(side)).filter(|end| end.is_up)
        else {
            return;
        };
        if self.host(end.host).is_some_and(|host| host.paused.is_some()) {
            return self.push(self.now + 100 * MS, What::Closed { link, side, why });
        }
        self.lose(link, side, &why);
    }

    /// This end of a link is no more; the other will notice.
    pub(super) fn lose(&mut self, link: LinkRef, side: usize, why: &str) {
        let Some(known) = self.links.get(link).copied() else { return };
        let (end, other) = (known.end(side), known.end(1 - side));
        if !self.links.take_down(link, side) {
            return;
        }
        if other.is_up {
            self.expect_silence(link, 1 - side);
        }
        let (node, id) = (other.node, other.id);
        let Some(process) = self.process(end.host) else { return };
        if process.links.get(&node) == Some(&link) {
            process.links.remove(&node);
            process.subscribed.remove(&node);
            self.give_soon(end.host, Input::LinkDown { id, why: why.to_owned() });
        }
    }

    pub(super) fn send(&mut self, host: u32, to: NodeId, bytes: Bytes, way: Way) {
        let (now, node) = (self.now, toy::index(to));
        let Some(process) = self.process(host) else { return };
        let Some(link) = process.links.get(&node).copied() else { return };
        if bytes.first() == Some(&SUBSCRIBE) {
            if bytes.len() > 2 {
                process.subscribed.entry(node).or_insert(now);
            } else {
                process.subscribed.remove(&node);
            }
        }
        self.transmit(host, link, bytes, way);
    }

    /// A frame leaves a host over one of its links.
    pub(super) fn transmit(&mut self, host: u32, link: LinkRef, bytes: Bytes, way: Way) {
        self.account_silence(link);
        let most = if way == Way::Datagram { DATAGRAM_BYTES_MAX } else { STREAM_BYTES_MAX };
        if bytes.len() > most {
            return self
                .violated(format!("node {host} sent a frame of {} bytes, {way:?}", bytes.len()));
        }
        let Some(known) = self.links.get(link).copied() else { return };
        let side = 1 - known.side(host);
        let to = known.end(side).host;
        self.measures.sent(bytes.first().copied().unwrap_or(0), on_wire(bytes.len()));
        if let Some(on) = self.host_mut(host) {
            on.sent += on_wire(bytes.len());
        }
        if self.network.is_blocked(host, to) {
            return;
        }
        let mut at = self.now + self.network.jittered(known.way);
        match way {
            Way::Datagram if self.network.loses() => return,
            Way::Datagram => {}
            Way::Stream => {
                at += u64::from(self.network.losses(bytes.len())) * 2 * known.way;
                at = at.max(known.ordered[side & 1]);
                if let Some(link) = self.links.get_mut(link) {
                    link.ordered[side & 1] = at;
                }
            }
        }
        self.push(at, What::Frame { link, side, bytes });
    }

    /// Counts what kept links alive until now.
    pub(super) fn account_all(&mut self) {
        let all: Vec<_> = self.links.all().map(|(link, _)| link).collect();
        all.into_iter().for_each(|link| self.account_silence(link));
    }

    fn account_silence(&mut self, link: LinkRef) {
        let times = self.links.used(link, self.now);
        if times == 0 {
            return;
        }
        let Some(ends) = self.links.get(link).map(|link| link.ends) else { return };
        self.measures.sent(KEPT_ALIVE, 2 * times * KEEP_ALIVE_BYTES);
        for end in ends {
            if let Some(host) = self.host_mut(end.host) {
                host.sent += times * KEEP_ALIVE_BYTES;
                host.received += times * KEEP_ALIVE_BYTES;
            }
        }
    }

    pub(super) fn arrive(&mut self, link: LinkRef, side: usize, bytes: Bytes) {
        let Some(known) = self.links.get(link).filter(|link| link.end(side).is_up) else { return };
        let (host, other, rtt) = (known.end(side).host, known.end(1 - side), known.way * 2);
        let Some(on) = self.host_mut(host) else { return };
        if on.paused.is_some() {
            return on.buffer(link, bytes);
        }
        on.received += on_wire(bytes.len());
        if bytes.first() == Some(&NOT_SUBSCRIBED)
            && let Some(process) = &mut on.process
        {
            process.subscribed.remove(&other.node);
        }
        self.capture(&bytes);
        self.give_soon(
            host,
            Input::Frame { from: other.id, bytes, rtt: Duration::from_nanos(rtt) },
        );
    }

    /// Keeps a few frames of all that go by.
    fn capture(&mut self, bytes: &Bytes) {
        if self.captured.len() < CAPTURED {
            self.captured.push(bytes.clone());
        } else if self.measures.events.is_multiple_of(997) {
            let at = (self.measures.events / 997) as usize % CAPTURED;
            if let Some(slot) = self.captured.get_mut(at) {
                *slot = bytes.clone();
            }
        }
    }
}
