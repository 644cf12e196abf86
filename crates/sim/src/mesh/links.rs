//! What links are there, and what would QUIC make of them?
//!
//! A link has two ends, and each end has its own opinion: one that hears nothing for a second gives up, whatever the other thinks.

use membership::NodeId;

use super::network::{MS, Nanos};

/// An end that hears nothing for so long gives up.
pub(super) const IDLE: Nanos = 1_000 * MS;
/// A silent link is kept alive this often.
pub(super) const KEEP_ALIVE: Nanos = 500 * MS;
/// What that costs each end, sent and received.
pub(super) const KEEP_ALIVE_BYTES: u64 = 60;
/// What a handshake costs each end, sent and received.
pub(super) const HANDSHAKE_BYTES: u64 = 5_000;

#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub(super) host: u32,
    /// Of which node that is.
    pub(super) node: u32,
    pub(super) id: NodeId,
    pub(super) is_up: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    generation: u32,
    /// The first dialled. Both are up at first.
    pub(super) ends: [End; 2],
    opened: Nanos,
    /// One way, without jitter.
    pub(super) way: Nanos,
    /// When the last frame went, either way.
    pub(super) last: Nanos,
    /// When what was sent last on a stream arrives, by the end that hears it.
    pub(super) ordered: [Nanos; 2],
}

impl Link {
    pub(super) fn end(&self, side: usize) -> End {
        self.ends[side & 1]
    }

    /// Whether it was made by then: what is done late may speak of the one before.
    pub(super) fn is_of(&self, now: Nanos) -> bool {
        self.opened <= now
    }

    /// Which of its ends is at this host.
    pub(super) fn side(&self, host: u32) -> usize {
        usize::from(self.ends[0].host != host)
    }
}

/// A link as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkRef {
    slot: u32,
    generation: u32,
}

/// All links.
#[derive(Debug, Default)]
pub(super) struct Links {
    links: Vec<Link>,
    free: Vec<u32>,
}

impl Links {
    pub(super) fn open(&mut self, ends: [End; 2], way: Nanos, now: Nanos) -> LinkRef {
        let link = Link { generation: 0, ends, opened: now, way, last: now, ordered: [0; 2] };
        if let Some(slot) = self.free.pop()
            && let Some(old) = self.links.get_mut(slot as usize)
        {
            let generation = old.generation.wrapping_add(1);
            *old = Link { generation, ..link };
            return LinkRef { slot, generation };
        }
        let slot = u32::try_from(self.links.len()).unwrap_or(u32::MAX);
        self.links.push(link);
        LinkRef { slot, generation: 0 }
    }

    /// The link, unless both its ends have given up.
    pub(super) fn get(&self, at: LinkRef) -> Option<&Link> {
        self.links.get(at.slot as usize).filter(|link| link.generation == at.generation)
    }

    pub(super) fn get_mut(&mut self, at: LinkRef) -> Option<&mut Link> {
        self.links.get_mut(at.slot as usize).filter(|link| link.generation == at.generation)
    }

    /// Every link of which an end is up.
    pub(super) fn all(&self) -> impl Iterator<Item = (LinkRef, &Link)> {
        self.links
            .iter()
            .zip(0..)
            .filter(|(link, _)| link.ends.iter().any(|end| end.is_up))
            .map(|(link, slot)| (LinkRef { slot, generation: link.generation }, link))
    }

    /// One end is no more. Returns whether it was.
    pub(super) fn take_down(&mut self, at: LinkRef, side: usize) -> bool {
        let Some(link) = self.get_mut(at) else { return false };
        let was_up = std::mem::replace(&mut link.ends[side & 1].is_up, false);
        if was_up && !link.ends[1 - (side & 1)].is_up {
            link.generation = link.generation.wrapping_add(1);
            self.free.push(at.slot);
        }
        was_up
    }

    /// Something goes over the link now. Returns how often it was kept alive before.
    pub(super) fn used(&mut self, at: LinkRef, now: Nanos) -> u64 {
        let Some(link) = self.get_mut(at) else { return 0 };
        let silence = now.saturating_sub(link.last);
        link.last = now;
        silence / KEEP_ALIVE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(host: u32) -> End {
        End { host, node: host, id: NodeId([0; 16]), is_up: true }
    }

    #[test]
    fn a_link_is_gone_with_both_its_ends_and_its_slot_used_again() {
        let mut links = Links::default();
        let first = links.open([4, 5].map(end), MS, 0);
        assert_eq!(links.get(first).unwrap().side(5), 1);
        assert!(links.take_down(first, 0) && !links.take_down(first, 0));
        assert!(links.get(first).is_some());
        assert!(links.take_down(first, 1));
        assert!(links.get(first).is_none());
        let second = links.open([6, 7].map(end), MS, 0);
        assert_ne!(first, second);
        assert!(links.get(first).is_none() && !links.take_down(first, 1));
        assert_eq!(links.used(second, KEEP_ALIVE * 3 + 1), 3);
    }
}
