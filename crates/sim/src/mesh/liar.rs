//! Nodes with good certificates that say whatever hurts.
//!
//! Beside their lies their machines run as all others do, so that they are members, linked and listened to until they are found out.

use std::time::Duration;

use base::Load;
use bytes::{BufMut as _, Bytes};
use membership::{
    Candidate, Descriptor, Digest, Frame, LoadFrame, NodeId, Pair, Pool, RegionOffer, Way, encode,
};
use rand::{Rng as _, RngExt as _};

use super::{
    network::{MS, Nanos},
    world::{What, World},
};

/// How often a liar lies.
const EVERY: Nanos = 50 * MS;
/// Kinds of lies.
const KINDS: u32 = 10;
/// Nodes that do not exist, and how many of them fit a packet.
const BOGUS: usize = 1_400;
const BOGUS_PER_PACKET: usize = 36;
const GOSSIP: u8 = 9;
const ALIVE: u8 = 1;
const DOWN: u8 = 3;

/// One line of a forged packet.
struct Claim {
    pair: Pair,
    incarnation: u16,
    state: u8,
}

impl World {
    /// A liar says something to one of those it is linked with.
    pub(super) fn lie(&mut self, host: u32) {
        self.push(self.now + EVERY, What::Lie { host });
        let draw: usize = self.rng.random_range(0..1 << 30);
        let Some(process) = self.process(host) else { return };
        let peers: Vec<u32> = process.links.keys().copied().collect();
        let Some(to) = peers.get(draw % peers.len().max(1)).copied() else { return };
        let victim = self.rng.random_range(0..self.config.nodes);
        let kind = self.rng.random_range(0..KINDS);
        for (frame, way) in self.lies(kind, host, to, victim) {
            self.say(host, to, frame.into(), way);
        }
    }

    fn say(&mut self, host: u32, to: u32, frame: Bytes, way: Way) {
        let link = self.process(host).and_then(|process| process.links.get(&to).copied());
        if let Some(link) = link {
            self.transmit(host, link, frame, way);
        }
    }

    fn lies(&mut self, kind: u32, host: u32, to: u32, victim: u32) -> Vec<(Vec<u8>, Way)> {
        let (own, to, victim) = (self.pair(host), self.pair(to), self.pair(victim));
        let datagram = |frame: Frame| vec![(encode(&frame), Way::Datagram)];
        match kind {
            0 => vec![(self.noise(), Way::Datagram)],
            // Down at an epoch that never was, and at the one that is.
            1 => datagram(claims(
                own,
                to,
                &[Claim {
                    pair: Pair { epoch: victim.epoch + (1 << 40), ..victim },
                    incarnation: 1,
                    state: DOWN,
                }],
            )),
            2 => datagram(claims(own, to, &[Claim { pair: victim, incarnation: 9, state: DOWN }])),
            // In the name of another, and about whoever hears it.
            3 => datagram(claims(victim, to, &[Claim { pair: own, incarnation: 1, state: ALIVE }])),
            4 => datagram(claims(
                own,
                to,
                &[Claim { pair: Pair { epoch: to.epoch + 5, ..to }, incarnation: 0, state: ALIVE }],
            )),
            5 => datagram(claims(
                own,
                to,
                &[Claim { pair: victim, incarnation: u16::MAX, state: ALIVE }],
            )),
            6 => datagram(Frame::Load(absurd(own.epoch, self.now / MS))),
            7 => self.false_digest(own.epoch),
            8 => self.bogus(own, to),
            _ => self.false_card(host),
        }
    }

    fn pair(&self, host: u32) -> Pair {
        let node = self.node_of(host);
        let known = self.pairs.get(node as usize).copied().flatten();
        let nobody = Pair { id: NodeId([7; 16]), epoch: 1, bump: 0 };
        known.unwrap_or(nobody)
    }

    fn noise(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; self.rng.random_range(1..1_100)];
        self.rng.fill_bytes(&mut bytes);
        bytes
    }

    fn false_digest(&mut self, epoch: u64) -> Vec<(Vec<u8>, Way)> {
        let region = self.rng.random_range(0..self.regions.len());
        let Some(region) = self.regions.get(region).cloned() else { return vec![] };
        let digest = Digest {
            relay: None,
            region,
            epoch,
            sequence: self.now,
            age: Duration::ZERO,
            part: (0, 1),
            offers: false_offers(),
        };
        vec![(encode(&Frame::Digest(digest)), Way::Datagram)]
    }

    /// Hundreds of nodes that do not exist.
    fn bogus(&mut self, own: Pair, to: Pair) -> Vec<(Vec<u8>, Way)> {
        let mut packets = vec![];
        for _ in 0..BOGUS.div_ceil(BOGUS_PER_PACKET) {
            let mut made = vec![];
            for _ in 0..BOGUS_PER_PACKET {
                let mut id = [0; 16];
                self.rng.fill_bytes(&mut id);
                let pair = Pair { id: NodeId(id), epoch: 1, bump: 0 };
                made.push(Claim { pair, incarnation: 0, state: ALIVE });
            }
            packets.push((encode(&claims(own, to, &made)), Way::Datagram));
        }
        packets
    }

    /// A card that somebody else signed, changed by one bit; and a descriptor nobody asked for.
    fn false_card(&mut self, host: u32) -> Vec<(Vec<u8>, Way)> {
        let card = self.guarded(host, |mesh, _| mesh.cards(1)).unwrap_or_default();
        let Some(card) = card.first() else { return vec![] };
        let mut signed = card.signed.to_vec();
        if let Some(byte) = signed.get_mut(12) {
            *byte ^= 1;
        }
        let descriptor = membership::encode_descriptor(&Descriptor::default());
        vec![
            (encode(&Frame::Cards(Pool::Region, vec![signed])), Way::Stream),
            (encode(&Frame::Descriptors(vec![descriptor])), Way::Stream),
        ]
    }
}

/// Gossip as no machine would make it: docs/wire.md has the layout.
fn claims(from: Pair, to: Pair, claims: &[Claim]) -> Frame {
    let mut packet = vec![GOSSIP, 0];
    put(from, &mut packet);
    packet.put_u16(0);
    put(to, &mut packet);
    packet.put_u16(u16::try_from(claims.len()).unwrap_or(0));
    for claim in claims {
        put(claim.pair, &mut packet);
        packet.put_u16(claim.incarnation);
        packet.put_u8(claim.state);
    }
    Frame::Swim(Pool::Region, packet)
}

fn put(pair: Pair, packet: &mut Vec<u8>) {
    packet.put_slice(&pair.id.0);
    packet.put_u64(pair.epoch);
    packet.put_u16(pair.bump);
}

/// Room for everybody.
fn absurd(epoch: u64, sequence: u64) -> LoadFrame {
    let load = Load { slots: Some(1 << 20), drain_rate: 1e6, ..Load::default() };
    LoadFrame {
        epoch,
        sequence: sequence + (1 << 40),
        descriptor_version: 1,
        sample_age: Duration::ZERO,
        next: Duration::from_secs(10),
        draining: false,
        engines: vec![load],
        arrivals: vec![],
    }
}

fn false_offers() -> Vec<RegionOffer> {
    let offer = || {
        let candidate = Candidate {
            node: "nobody".parse().ok()?,
            peers: "10.9.9.9:7443".to_owned(),
            free: 1 << 20,
            slots: 1 << 20,
        };
        Some(RegionOffer {
            model: Some("model-0".parse().ok()?),
            protocol: "kserve-v2".to_owned(),
            free: 1 << 20,
            slots: 1 << 20,
            drain_rate: 1e6,
            wait: (Duration::ZERO, Duration::ZERO),
            kv_free: Some(1.0),
            candidates: vec![candidate],
        })
    };
    offer().into_iter().collect()
}
