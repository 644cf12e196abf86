//! Packets of SWIM byte by byte, as docs/wire.md has them: a fixed layout, big endian, every length checked.

use bytes::{Buf, BufMut};
use foca::{Codec, Header, Identity, Member, Message, State};

use crate::{NodeId, Pair, SWIM_BYTES_MAX};

const PAIR_BYTES: usize = 26;
/// A pair, its incarnation, its state.
const UPDATE_BYTES: usize = PAIR_BYTES + 3;
/// Kind, probe number, source, its incarnation, destination.
const HEADER_BYTES: usize = 2 + PAIR_BYTES + 2 + PAIR_BYTES;
const COUNT_BYTES: usize = 2;

/// Why bytes are no packet. Whoever sent them is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SwimError {
    /// It ends too early, or has bytes too many.
    #[error("a SWIM packet of the wrong length")]
    Length,
    /// No such kind of message, or state.
    #[error("a SWIM packet of an unknown kind")]
    Kind,
}

/// A packet, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) header: Header<Pair>,
    pub(crate) updates: Vec<Member<Pair>>,
}

impl Packet {
    pub(crate) fn read(mut bytes: &[u8]) -> Result<Self, SwimError> {
        if bytes.len() > SWIM_BYTES_MAX {
            return Err(SwimError::Length);
        }
        let header = read_header(&mut bytes)?;
        let count = match (has_updates(&header.message), bytes.len()) {
            (_, 0) => 0,
            (true, COUNT_BYTES..) => usize::from(bytes.get_u16()),
            _ => return Err(SwimError::Length),
        };
        if count * UPDATE_BYTES != bytes.len() {
            return Err(SwimError::Length);
        }
        let updates = (0..count).map(|_| read_member(&mut bytes)).collect::<Result<_, _>>()?;
        Ok(Self { header, updates })
    }

    /// As bytes. What came in fits what goes out: there are never more updates than were read, or than fit.
    pub(crate) fn write(&self) -> Vec<u8> {
        let room = HEADER_BYTES + PAIR_BYTES + COUNT_BYTES + self.updates.len() * UPDATE_BYTES;
        let mut bytes = Vec::with_capacity(room);
        write_header(&self.header, &mut bytes);
        if has_updates(&self.header.message) {
            bytes.put_u16(u16::try_from(self.updates.len()).unwrap_or(0));
            self.updates.iter().for_each(|update| write_member(update, &mut bytes));
        }
        bytes
    }
}

/// The same packet for another. `None`: it is no gossip.
pub(crate) fn readdressed(packet: &[u8], to: Pair) -> Option<Vec<u8>> {
    if !is_gossip(packet) {
        return None;
    }
    let mut bytes = packet.to_vec();
    let mut place = bytes.get_mut(HEADER_BYTES - PAIR_BYTES..HEADER_BYTES)?;
    write_pair(to, &mut place);
    Some(bytes)
}

/// The incarnation a packet gives its sender.
pub(crate) fn own_incarnation(packet: &[u8]) -> Option<u16> {
    let mut bytes = packet.get(2 + PAIR_BYTES..2 + PAIR_BYTES + 2)?;
    Some(bytes.get_u16())
}

impl Identity for Pair {
    type Addr = NodeId;

    /// Never by itself: a new pair needs a new card.
    fn renew(&self) -> Option<Self> {
        None
    }

    fn addr(&self) -> NodeId {
        self.id
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        (self.epoch, self.bump) > (adversary.epoch, adversary.bump)
    }
}

/// How foca reads and writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout;

impl Codec<Pair> for Layout {
    type Error = SwimError;

    fn encode_header(
        &mut self,
        header: &Header<Pair>,
        mut buf: impl BufMut,
    ) -> Result<(), SwimError> {
        if buf.remaining_mut() < HEADER_BYTES + PAIR_BYTES {
            return Err(SwimError::Length);
        }
        write_header(header, &mut buf);
        Ok(())
    }

    fn decode_header(&mut self, mut buf: impl Buf) -> Result<Header<Pair>, SwimError> {
        read_header(&mut buf)
    }

    fn encode_member(
        &mut self,
        member: &Member<Pair>,
        mut buf: impl BufMut,
    ) -> Result<(), SwimError> {
        if buf.remaining_mut() < UPDATE_BYTES {
            return Err(SwimError::Length);
        }
        write_member(member, &mut buf);
        Ok(())
    }

    fn decode_member(&mut self, mut buf: impl Buf) -> Result<Member<Pair>, SwimError> {
        read_member(&mut buf)
    }
}

/// Whether a packet is gossip, which is as good for whoever gets it.
pub(crate) fn is_gossip(packet: &[u8]) -> bool {
    packet.first() == Some(&kind::GOSSIP)
}

/// Whether a packet is gossip without news.
pub(crate) fn says_nothing(packet: &[u8]) -> bool {
    is_gossip(packet) && packet.get(HEADER_BYTES..).is_none_or(|rest| rest.iter().all(|b| *b == 0))
}

mod kind {
    pub(super) const PING: u8 = 1;
    pub(super) const ACK: u8 = 2;
    pub(super) const PING_REQ: u8 = 3;
    pub(super) const INDIRECT_PING: u8 = 4;
    pub(super) const INDIRECT_ACK: u8 = 5;
    pub(super) const FORWARDED_ACK: u8 = 6;
    pub(super) const ANNOUNCE: u8 = 7;
    pub(super) const FEED: u8 = 8;
    pub(super) const GOSSIP: u8 = 9;
    pub(super) const TURN_UNDEAD: u8 = 10;
}

fn has_updates(message: &Message<Pair>) -> bool {
    !matches!(message, Message::Announce | Message::TurnUndead)
}

fn read_header(buf: &mut impl Buf) -> Result<Header<Pair>, SwimError> {
    if buf.remaining() < HEADER_BYTES {
        return Err(SwimError::Length);
    }
    let kind = buf.get_u8();
    let probe_number = buf.get_u8();
    let src = read_pair(buf)?;
    let src_incarnation = buf.get_u16();
    let dst = read_pair(buf)?;
    let message = match kind {
        kind::PING => Message::Ping(probe_number),
        kind::ACK => Message::Ack(probe_number),
        kind::PING_REQ => Message::PingReq { target: read_pair(buf)?, probe_number },
        kind::INDIRECT_PING => Message::IndirectPing { origin: read_pair(buf)?, probe_number },
        kind::INDIRECT_ACK => Message::IndirectAck { target: read_pair(buf)?, probe_number },
        kind::FORWARDED_ACK => Message::ForwardedAck { origin: read_pair(buf)?, probe_number },
        kind::ANNOUNCE => Message::Announce,
        kind::FEED => Message::Feed,
        kind::GOSSIP => Message::Gossip,
        kind::TURN_UNDEAD => Message::TurnUndead,
        _ => return Err(SwimError::Kind),
    };
    Ok(Header { src, src_incarnation, dst, message })
}

fn write_header(header: &Header<Pair>, buf: &mut impl BufMut) {
    let (kind, probe_number, other) = match header.message {
        Message::Ping(n) => (kind::PING, n, None),
        Message::Ack(n) => (kind::ACK, n, None),
        Message::PingReq { target, probe_number } => (kind::PING_REQ, probe_number, Some(target)),
        Message::IndirectPing { origin, probe_number } => {
            (kind::INDIRECT_PING, probe_number, Some(origin))
        }
        Message::IndirectAck { target, probe_number } => {
            (kind::INDIRECT_ACK, probe_number, Some(target))
        }
        Message::ForwardedAck { origin, probe_number } => {
            (kind::FORWARDED_ACK, probe_number, Some(origin))
        }
        Message::Announce => (kind::ANNOUNCE, 0, None),
        Message::Feed => (kind::FEED, 0, None),
        // There are no broadcasts of ours in foca; it never asks for this.
        Message::Gossip | Message::Broadcast => (kind::GOSSIP, 0, None),
        Message::TurnUndead => (kind::TURN_UNDEAD, 0, None),
    };
    buf.put_u8(kind);
    buf.put_u8(probe_number);
    write_pair(header.src, buf);
    buf.put_u16(header.src_incarnation);
    write_pair(header.dst, buf);
    if let Some(other) = other {
        write_pair(other, buf);
    }
}

fn read_pair(buf: &mut impl Buf) -> Result<Pair, SwimError> {
    if buf.remaining() < PAIR_BYTES {
        return Err(SwimError::Length);
    }
    let mut id = [0; 16];
    buf.copy_to_slice(&mut id);
    Ok(Pair { id: NodeId(id), epoch: buf.get_u64(), bump: buf.get_u16() })
}

fn write_pair(pair: Pair, buf: &mut impl BufMut) {
    buf.put_slice(&pair.id.0);
    buf.put_u64(pair.epoch);
    buf.put_u16(pair.bump);
}

fn read_member(buf: &mut impl Buf) -> Result<Member<Pair>, SwimError> {
    if buf.remaining() < UPDATE_BYTES {
        return Err(SwimError::Length);
    }
    let pair = read_pair(buf)?;
    let incarnation = buf.get_u16();
    let state = match buf.get_u8() {
        1 => State::Alive,
        2 => State::Suspect,
        3 => State::Down,
        _ => return Err(SwimError::Kind),
    };
    Ok(Member::new(pair, incarnation, state))
}

fn write_member(member: &Member<Pair>, buf: &mut impl BufMut) {
    write_pair(*member.id(), buf);
    buf.put_u16(member.incarnation());
    buf.put_u8(match member.state() {
        State::Alive => 1,
        State::Suspect => 2,
        State::Down => 3,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(id: u8) -> Pair {
        Pair { id: NodeId([id; 16]), epoch: 7, bump: 1 }
    }

    fn packet(message: Message<Pair>, updates: usize) -> Packet {
        let header = Header { src: pair(1), src_incarnation: 513, dst: pair(2), message };
        let update = |i| Member::new(pair(u8::try_from(i).unwrap()), 5, State::Suspect);
        Packet { header, updates: (0..updates).map(update).collect() }
    }

    #[test]
    fn every_kind_survives_the_round_trip() {
        let n = 9;
        for (message, updates) in [
            (Message::Ping(n), 37),
            (Message::Ack(n), 0),
            (Message::PingReq { target: pair(3), probe_number: n }, 2),
            (Message::IndirectPing { origin: pair(3), probe_number: n }, 2),
            (Message::IndirectAck { target: pair(3), probe_number: n }, 2),
            (Message::ForwardedAck { origin: pair(3), probe_number: n }, 2),
            (Message::Announce, 0),
            (Message::Feed, 3),
            (Message::Gossip, 1),
            (Message::TurnUndead, 0),
        ] {
            let packet = packet(message, updates);
            let bytes = packet.write();
            assert!(bytes.len() <= SWIM_BYTES_MAX);
            assert_eq!(own_incarnation(&bytes), Some(513));
            assert_eq!(Packet::read(&bytes), Ok(packet));
        }
    }

    #[test]
    fn a_packet_is_laid_out_as_documented() {
        let bytes = packet(Message::Ping(9), 1).write();
        let mut want = vec![1, 9];
        want.extend([1; 16]);
        want.extend([0, 0, 0, 0, 0, 0, 0, 7, 0, 1, 2, 1]);
        want.extend([2; 16]);
        want.extend([0, 0, 0, 0, 0, 0, 0, 7, 0, 1, 0, 1]);
        want.extend([0; 16]);
        want.extend([0, 0, 0, 0, 0, 0, 0, 7, 0, 1, 0, 5, 2]);
        assert_eq!(bytes, want);
    }

    #[test]
    fn lengths_and_kinds_are_exact() {
        let good = packet(Message::Gossip, 2).write();
        assert_eq!(Packet::read(&good[..good.len() - 1]), Err(SwimError::Length));
        assert_eq!(Packet::read(&[&*good, &[0]].concat()), Err(SwimError::Length));
        let announce = packet(Message::Announce, 0).write();
        assert_eq!(Packet::read(&[&*announce, &[0, 0]].concat()), Err(SwimError::Length));
        assert_eq!(Packet::read(&[&[11], &good[1..]].concat()), Err(SwimError::Kind));
    }

    #[test]
    fn gossip_may_go_to_another() {
        let bytes = packet(Message::Gossip, 2).write();
        let other = Packet::read(&readdressed(&bytes, pair(9)).unwrap()).unwrap();
        assert_eq!((other.header.dst, other.updates.len()), (pair(9), 2));
        assert_eq!(readdressed(&packet(Message::Ping(1), 0).write(), pair(9)), None);
        assert!(!says_nothing(&bytes) && says_nothing(&packet(Message::Gossip, 0).write()));
        assert!(!says_nothing(&packet(Message::Ping(1), 0).write()));
    }
}
