//! Who breaks the rules, and is not listened to for a while.
//!
//! What cannot be a mistake costs a minute at once; what may be one counts, and five within a minute cost the same. Each
//! further time costs twice as much, up to an hour.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{NodeId, Peer};

const STRIKES_MAX: u32 = 5;
const WINDOW: Duration = Duration::from_secs(60);
const QUARANTINE: Duration = Duration::from_secs(60);
const QUARANTINE_MAX: Duration = Duration::from_secs(3600);
/// A quarantine was over just now for so long.
const JUST_OVER: Duration = Duration::from_secs(3);
/// A node that behaved for so long has a clean record.
const CLEAN_AFTER: Duration = Duration::from_secs(2 * 3600);
/// Nodes remembered.
const RECORDS_MAX: usize = 1024;
/// New ids one node may bring in a minute.
const NEW_IDS_MAX: u32 = 2048;
/// Cards one node may name and not have, in a minute.
const UNANSWERED_MAX: u32 = 32;
/// Who calls others down that were just heard may be mistaken about so many of them in a minute, and say so so often: one death is
/// passed on up to sixteen times, and whoever shuns a node, and answers another, makes the one say so to the other.
const FALSE_DOWN_NODES: usize = 3;
const FALSE_DOWNS: u32 = 32;
/// Cards of this node that one node may call down in a minute.
const CARDS_DOWN: u32 = 5;
/// A relay gives itself more slots than its descriptor for so long at most, if that has changed: its card may come as late as that.
const OVERCLAIM: Duration = Duration::from_secs(15);
/// Who has not done so for as long has stopped.
const OVERCLAIM_GAP: Duration = Duration::from_secs(5);
/// Cards that are not believed count once in this: whoever trusts another authority brings many at once.
const DISBELIEF: Duration = Duration::from_secs(5);

/// What a node did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offence {
    /// It cannot have been a mistake.
    Lie,
    /// It may have been one.
    Strike,
}

/// Everybody's record.
#[derive(Debug, Default)]
pub(crate) struct Strikes {
    records: BTreeMap<NodeId, Record>,
}

#[derive(Debug)]
struct Record {
    peer: Peer,
    strikes: Count,
    new_ids: Count,
    unanswered: Count,
    false_downs: Count,
    cards_down: Count,
    victims: Vec<NodeId>,
    disbelieved: Option<Instant>,
    /// When it began to claim too much, and when it last did.
    overclaims: Option<(Instant, Instant)>,
    /// The end of the quarantine, how long it was, and why.
    quarantine: Option<(Instant, Duration, String)>,
}

/// How often something happened within a minute.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    since: Option<Instant>,
    number: u32,
}

impl Count {
    fn more(&mut self, now: Instant) -> u32 {
        if self.since.is_none_or(|since| now >= since + WINDOW) {
            *self = Self { since: Some(now), number: 0 };
        }
        self.number = self.number.saturating_add(1);
        self.number
    }
}

impl Strikes {
    /// Node `peer` did something. Returns until when it is in quarantine, if that begins now.
    pub(crate) fn commit(
        &mut self,
        now: Instant,
        peer: &Peer,
        offence: Offence,
        why: &str,
    ) -> Option<Instant> {
        let record = self.record(now, peer)?;
        if record.is_quarantined(now) {
            return None;
        }
        let strikes = record.strikes.more(now);
        if offence == Offence::Strike && strikes < STRIKES_MAX {
            return None;
        }
        let before = record.quarantine.as_ref().map(|(.., length, _)| *length);
        let length = before.map_or(QUARANTINE, |before| (before * 2).min(QUARANTINE_MAX));
        record.strikes = Count::default();
        record.quarantine = Some((now + length, length, why.to_owned()));
        Some(now + length)
    }

    pub(crate) fn is_quarantined(&self, now: Instant, id: NodeId) -> bool {
        self.records.get(&id).is_some_and(|record| record.is_quarantined(now))
    }

    /// Whether anybody is in quarantine, or was until just now.
    pub(crate) fn is_anybody_out(&self, now: Instant) -> bool {
        let lately = |(until, ..): &(Instant, Duration, String)| now < *until + JUST_OVER;
        self.records.values().any(|record| record.quarantine.as_ref().is_some_and(lately))
    }

    /// Who is in quarantine, how long yet, and why.
    pub(crate) fn quarantined(&self, now: Instant) -> Vec<(Peer, Duration, String)> {
        let shown = |record: &Record| {
            let (until, _, why) = record.quarantine.as_ref()?;
            (now < *until).then(|| (record.peer.clone(), *until - now, why.clone()))
        };
        self.records.values().filter_map(shown).collect()
    }

    /// `peer` brought a node nobody knew. Returns whether it is taken.
    pub(crate) fn new_id(&mut self, now: Instant, peer: &Peer) -> bool {
        self.record(now, peer).is_some_and(|record| record.new_ids.more(now) <= NEW_IDS_MAX)
    }

    /// `peer` spoke of a node whose card it does not have. Returns whether that is too often.
    pub(crate) fn unanswered(&mut self, now: Instant, peer: &Peer) -> bool {
        self.record(now, peer).is_some_and(|record| record.unanswered.more(now) > UNANSWERED_MAX)
    }

    /// `peer` calls `victim` down, which was heard just now. Returns whether that is too often.
    pub(crate) fn false_down(&mut self, now: Instant, peer: &Peer, victim: NodeId) -> bool {
        let Some(record) = self.record(now, peer) else { return false };
        let times = record.false_downs.more(now);
        if times == 1 {
            record.victims.clear();
        }
        if !record.victims.contains(&victim) && record.victims.len() < FALSE_DOWN_NODES {
            record.victims.push(victim);
        }
        record.victims.len() >= FALSE_DOWN_NODES || times >= FALSE_DOWNS
    }

    /// `peer` calls one more card of this node down. Returns whether that is too often.
    pub(crate) fn card_down(&mut self, now: Instant, peer: &Peer) -> bool {
        self.record(now, peer).is_some_and(|record| record.cards_down.more(now) >= CARDS_DOWN)
    }

    /// `peer` brought a card that is not believed. Returns whether it counts.
    pub(crate) fn disbelieved(&mut self, now: Instant, peer: &Peer) -> bool {
        let Some(record) = self.record(now, peer) else { return false };
        let counts = record.disbelieved.is_none_or(|last| now >= last + DISBELIEF);
        if counts {
            record.disbelieved = Some(now);
        }
        counts
    }

    /// `peer` claims more than its descriptor says. Returns whether it has for so long that it cannot be a change of that.
    pub(crate) fn overclaims(&mut self, now: Instant, peer: &Peer) -> bool {
        let Some(record) = self.record(now, peer) else { return false };
        let before = record.overclaims.filter(|(_, last)| now < *last + OVERCLAIM_GAP);
        let since = before.map_or(now, |(since, _)| since);
        record.overclaims = Some((since, now));
        now >= since + OVERCLAIM
    }

    /// Forgets who has behaved for long.
    pub(crate) fn sweep(&mut self, now: Instant) {
        self.records.retain(|_, record| !record.is_clean(now));
    }

    fn record(&mut self, now: Instant, peer: &Peer) -> Option<&mut Record> {
        if self.records.len() >= RECORDS_MAX && !self.records.contains_key(&peer.id) {
            self.sweep(now);
            if self.records.len() >= RECORDS_MAX {
                return None;
            }
        }
        Some(self.records.entry(peer.id).or_insert_with(|| Record {
            peer: peer.clone(),
            strikes: Count::default(),
            new_ids: Count::default(),
            unanswered: Count::default(),
            false_downs: Count::default(),
            cards_down: Count::default(),
            victims: Vec::new(),
            disbelieved: None,
            overclaims: None,
            quarantine: None,
        }))
    }
}

impl Record {
    fn is_quarantined(&self, now: Instant) -> bool {
        self.quarantine.as_ref().is_some_and(|(until, ..)| now < *until)
    }

    fn is_clean(&self, now: Instant) -> bool {
        let counts =
            [self.strikes, self.new_ids, self.unanswered, self.false_downs, self.cards_down];
        let is_over = |count: &Count| count.since.is_none_or(|since| now >= since + WINDOW);
        counts.iter().all(is_over)
            && self.overclaims.is_none_or(|(_, last)| now >= last + OVERCLAIM_GAP)
            && self.quarantine.as_ref().is_none_or(|(until, ..)| now >= *until + CLEAN_AFTER)
    }
}

/// What one node may send: frames and bytes, each a bucket that fills with time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    frames: Bucket,
    bytes: Bucket,
    /// Frames and bytes beyond those, for who may send more.
    more: Bucket,
    more_bytes: Bucket,
    /// The last second in which there was too much.
    struck: Option<Instant>,
}

/// What is left, and when that was last looked at.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f32,
    at: Instant,
    per_s: f32,
    most: f32,
}

/// What fits: the frames of an ordinary node, and those of a relay that hands on digests, beyond that.
const FRAMES_PER_S: f32 = 200.0;
const MORE_PER_S: f32 = 1800.0;
const BYTES_PER_S: f32 = 1e6;
const MORE_BYTES_PER_S: f32 = 2e6;
/// What a relay hands on, all digests together: less than it may send, for it has more to say.
const HANDED_ON_PER_S: f32 = 1000.0;
const HANDED_ON_BYTES_PER_S: f32 = 1.5e6;
/// Two seconds of frames, four of bytes: all cards of a region come at once.
const FRAMES_BURST_S: f32 = 2.0;
const BYTES_BURST_S: f32 = 4.0;

/// Whether a frame is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passage {
    /// It is.
    Taken,
    /// It is dropped.
    Dropped,
    /// It is dropped, and that counts.
    Struck,
}

impl Rate {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            frames: Bucket::full(now, FRAMES_PER_S, FRAMES_BURST_S),
            bytes: Bucket::full(now, BYTES_PER_S, BYTES_BURST_S),
            more: Bucket::full(now, MORE_PER_S, FRAMES_BURST_S),
            more_bytes: Bucket::full(now, MORE_BYTES_PER_S, BYTES_BURST_S),
            struck: None,
        }
    }

    /// A frame of `bytes` came; what was asked for (`bytes` 0) weighs nothing. `may_more`: whether it may send as many frames
    /// as a relay, which is asked where it makes a difference.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        bytes: usize,
        may_more: impl FnOnce() -> bool,
    ) -> Passage {
        let weight = f32::from(u16::try_from(bytes).unwrap_or(u16::MAX));
        let may_more = std::cell::LazyCell::new(may_more);
        let is_light = self.bytes.has(now, weight);
        let fits = is_light || *may_more && self.more_bytes.has(now, weight);
        if fits && (self.frames.take(now, 1.0) || *may_more && self.more.take(now, 1.0)) {
            let bytes = if is_light { &mut self.bytes } else { &mut self.more_bytes };
            bytes.left -= weight;
            return Passage::Taken;
        }
        let is_new = self.struck.is_none_or(|last| now >= last + Duration::from_secs(1));
        if is_new {
            self.struck = Some(now);
            return Passage::Struck;
        }
        Passage::Dropped
    }
}

/// What a relay hands on goes through here, so that it is never more than those who hear it take, whatever the relay is sent.
#[derive(Debug)]
pub(crate) struct Outlet {
    frames: Bucket,
    bytes: Bucket,
}

impl Outlet {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            frames: Bucket::full(now, HANDED_ON_PER_S, 1.0),
            bytes: Bucket::full(now, HANDED_ON_BYTES_PER_S, 1.0),
        }
    }

    /// Whether so many frames of `bytes` each pass. `missed` and `most`: how many in a row from there did not, and from wherever it was
    /// most. When little is left, those who missed most come first: where there is too much, a part of each region's digests
    /// passes, and not all of some.
    pub(crate) fn passes(
        &mut self,
        now: Instant,
        frames: u32,
        bytes: usize,
        (missed, most): (u32, u32),
    ) -> bool {
        let weight = |number: usize| f32::from(u16::try_from(number).unwrap_or(u16::MAX));
        let frames = weight(frames as usize);
        let bytes = frames * weight(bytes);
        let share = weight(missed as usize) / weight(most.max(1) as usize);
        let reserve = 0.5 * (1.0 - share.min(1.0));
        let fits = self.frames.has(now, frames + reserve * self.frames.most)
            && self.bytes.has(now, bytes + reserve * self.bytes.most);
        if fits {
            self.frames.left -= frames;
            self.bytes.left -= bytes;
        }
        fits
    }
}

impl Bucket {
    fn full(now: Instant, per_s: f32, burst_s: f32) -> Self {
        let most = per_s * burst_s;
        Self { left: most, at: now, per_s, most }
    }

    /// Whether so much is left now.
    fn has(&mut self, now: Instant, weight: f32) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f32();
        self.left = (self.left + passed * self.per_s).min(self.most);
        self.at = self.at.max(now);
        self.left >= weight
    }

    /// Takes so much, if it is there.
    fn take(&mut self, now: Instant, weight: f32) -> bool {
        let has = self.has(now, weight);
        self.left -= if has { weight } else { 0.0 };
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Peer {
        let id = NodeId([1; 16]);
        Peer { id, node: "a".parse().unwrap(), region: "r".parse().unwrap() }
    }

    #[test]
    fn five_strikes_in_a_minute_or_one_lie_are_a_minute_and_then_twice_as_much() {
        let now = base::clock::now();
        let mut strikes = Strikes::default();
        for _ in 0..4 {
            assert_eq!(strikes.commit(now, &peer(), Offence::Strike, "x"), None);
        }
        let until = strikes.commit(now, &peer(), Offence::Strike, "x");
        assert_eq!(until, Some(now + QUARANTINE));
        assert!(strikes.is_quarantined(now, peer().id));
        let later = now + QUARANTINE;
        assert!(!strikes.is_quarantined(later, peer().id));
        let until = strikes.commit(later, &peer(), Offence::Lie, "y");
        assert_eq!(until, Some(later + 2 * QUARANTINE));
        strikes.sweep(later + Duration::from_secs(10_000));
        assert!(strikes.quarantined(later).is_empty());
    }

    #[test]
    fn what_is_claimed_counts_when_it_is_claimed_for_long() {
        let now = base::clock::now();
        let mut strikes = Strikes::default();
        let mut claim = |at: u64| strikes.overclaims(now + Duration::from_secs(at), &peer());
        assert!(!claim(0) && !claim(4) && !claim(8) && !claim(12), "its card is on the way");
        assert!(!claim(18) && !claim(22) && !claim(26) && !claim(30) && claim(33));
    }

    #[test]
    fn strikes_that_are_far_apart_do_not_add_up() {
        let now = base::clock::now();
        let mut strikes = Strikes::default();
        for i in 0..50 {
            let at = now + i * Duration::from_secs(16);
            assert_eq!(strikes.commit(at, &peer(), Offence::Strike, "x"), None);
        }
    }

    #[test]
    fn a_node_may_send_so_much_and_no_more() {
        let now = base::clock::now();
        let mut rate = Rate::new(now);
        let taken = |rate: &mut Rate, n: usize, bytes, relay| {
            (0..n).filter(|_| rate.take(now, bytes, || relay) == Passage::Taken).count()
        };
        assert_eq!(taken(&mut rate, 1000, 100, false), 400);
        assert_eq!(taken(&mut rate, 5000, 100, true), 3600, "a relay, beyond those");
        assert_eq!(taken(&mut Rate::new(now), 5000, 100, true), 4000);
        let mut rate = Rate::new(now);
        assert_eq!(taken(&mut rate, 400, 60_000, false), 66);
        assert_eq!(taken(&mut rate, 400, 60_000, true), 133, "a relay, beyond those");
        assert_eq!(rate.take(now + Duration::from_secs(1), 60_000, || false), Passage::Taken);
    }

    #[test]
    fn a_relay_may_go_on_sending_ten_times_as_much() {
        let now = base::clock::now();
        let taken = |rate: &mut Rate, at: u64, is_relay| {
            let now = now + Duration::from_secs(at);
            (0..6000).filter(|_| rate.take(now, 0, || is_relay) == Passage::Taken).count()
        };
        let mut rate = Rate::new(now);
        assert_eq!([0, 1, 11].map(|at| taken(&mut rate, at, true)), [4000, 2000, 4000]);
        assert_eq!([12, 13].map(|at| taken(&mut rate, at, false)), [200, 200], "it is none now");
    }

    #[test]
    fn whatever_a_relay_hands_on_is_less_than_it_may_send() {
        let now = base::clock::now();
        for (frames, bytes) in [(1, 1_100), (64, 1_150), (64, 20)] {
            let (mut outlet, mut rate) = (Outlet::new(now), Rate::new(now));
            for ms in 0..60_000 {
                let now = now + Duration::from_millis(ms);
                for _ in 0..if outlet.passes(now, frames, bytes, (1, 1)) { frames } else { 0 } {
                    assert_eq!(rate.take(now, bytes, || true), Passage::Taken, "{bytes} {ms}");
                }
            }
        }
    }

    #[test]
    fn where_there_is_too_much_to_hand_on_every_region_gets_its_part() {
        let began = base::clock::now();
        for (regions, parts, least) in
            [(9, 64, 40), (24, 20, 50), (40, 20, 40), (30, 64, 14), (200, 20, 7)]
        {
            let mut outlet = Outlet::new(began);
            let mut passed = vec![(0, 0); regions];
            // The digests of each come every 400 ms, always in the same order.
            for round in 0..100_u32 {
                let now = began + round * Duration::from_millis(400);
                for n in 0..regions {
                    let most = passed.iter().map(|(_, missed)| *missed).max().unwrap();
                    let (times, missed) = &mut passed[n];
                    let at = now + Duration::from_millis(n as u64);
                    let passes = outlet.passes(at, parts, 1_100, (*missed, most));
                    (*times, *missed) =
                        if passes { (*times + 1, 0) } else { (*times, *missed + 1) };
                }
            }
            let fewest = passed.iter().map(|(times, _)| *times).min().unwrap();
            assert!(fewest >= least, "{regions} {parts}: {passed:?}");
        }
    }

    #[test]
    fn excess_counts_once_a_second() {
        let now = base::clock::now();
        let mut rate = Rate::new(now);
        let all: Vec<_> = (0..1000).map(|_| rate.take(now, 0, || false)).collect();
        assert_eq!(all.iter().filter(|p| **p == Passage::Struck).count(), 1);
    }
}
