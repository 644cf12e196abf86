//! Things done to the world: how each fault is brought about.

use std::time::Duration;

use membership::Input;

use super::{
    fault::Act,
    links::LinkRef,
    network::{MS, Nanos, SECOND},
    world::{What, World},
};

/// How far a clock jumps.
const JUMP: Nanos = 3_600 * SECOND;
/// Nodes leave this long before they stop; until then they take no new calls.
const DRAIN: Nanos = SECOND;

impl World {
    pub(super) fn act(&mut self, act: Act) {
        match act {
            Act::Start { host, later } => self.start(host, later),
            Act::Double { node } => self.double(node),
            Act::Kill { host, with_machine } => {
                if !self.plan.returning.contains(&host) {
                    self.measures.crashed(host, self.now);
                }
                self.kill(host, with_machine);
            }
            Act::Leave { host } => {
                self.touch(host);
                self.give(host, Input::Drain);
                self.push(self.now + DRAIN, What::Leave { host });
            }
            Act::Stop { host } => self.stop(host, "the node stops"),
            Act::Pause { host } => self.pause(host),
            Act::Resume { host } => self.resume(host),
            Act::Isolate { host, is } => {
                self.touch(host);
                self.network.isolate(host, is);
                self.notice_cuts(is);
            }
            Act::Deafen { from, to, is } => {
                self.touch(from);
                self.touch(to);
                self.network.deafen(from, to, is);
                self.notice_cuts(is);
            }
            Act::Split { is } => self.split(is),
            Act::Jump { host, lags } => self.jump_clock(host, lags),
            Act::Lie { host } => self.push(self.now, What::Lie { host }),
        }
    }

    pub(super) fn touch(&mut self, host: u32) {
        let now = self.now;
        if let Some(host) = self.host_mut(host) {
            host.touched = now;
        }
    }

    /// Half of the regions against the others, and half of the first region against all.
    fn split(&mut self, is: bool) {
        let regions = self.config.regions;
        let half = |node: u32, region: u32| match region {
            0 => node / regions % 2 == 1,
            region => region * 2 >= regions,
        };
        let halves = self.hosts.iter().map(|host| half(host.node, host.region)).collect();
        self.network.split(if is { halves } else { vec![] });
        for host in 0..u32::try_from(self.hosts.len()).unwrap_or(0) {
            self.touch(host);
        }
        self.notice_cuts(is);
    }

    /// Something was cut: ends that hear nothing any more will notice.
    fn notice_cuts(&mut self, is: bool) {
        if !is || self.network.is_whole() {
            return;
        }
        let all: Vec<_> = self.links.all().map(|(at, link)| (at, link.ends)).collect();
        for (link, ends) in all {
            for side in 0..2 {
                let (end, other) = (ends[side & 1], ends[1 - (side & 1)]);
                if end.is_up && self.network.is_blocked(other.host, end.host) {
                    self.expect_silence(link, side);
                }
            }
        }
    }

    fn pause(&mut self, host: u32) {
        self.touch(host);
        let now = self.now;
        let Some(on) = self.host_mut(host) else { return };
        on.paused = Some(now);
        for (link, side) in self.ends_of(host) {
            self.expect_silence(link, 1 - side);
        }
    }

    /// It goes on: what waited in its socket comes first, then its links find that nothing came for long.
    fn resume(&mut self, host: u32) {
        self.touch(host);
        let now = self.now;
        let Some(on) = self.host_mut(host) else { return };
        let Some(since) = on.paused.take() else { return };
        let waiting = std::mem::take(&mut on.buffered);
        self.give(host, Input::Lagged(Duration::from_nanos(now - since)));
        for (link, bytes) in waiting {
            let Some(side) = self.links.get(link).map(|link| link.side(host)) else { continue };
            self.push(now + MS, What::Frame { link, side, bytes });
        }
        for (link, side) in self.ends_of(host) {
            self.push(now + 2 * MS, What::Idle { link, side });
        }
    }

    /// The ends of links at this host.
    fn ends_of(&mut self, host: u32) -> Vec<(LinkRef, usize)> {
        let Some(process) = self.process(host) else { return vec![] };
        let links: Vec<_> = process.links.values().copied().collect();
        links
            .into_iter()
            .filter_map(|link| Some((link, self.links.get(link)?.side(host))))
            .collect()
    }

    fn jump_clock(&mut self, host: u32, lags: bool) {
        self.touch(host);
        if let Some(on) = self.host_mut(host) {
            on.ahead += JUMP;
        }
        let jump = Duration::from_nanos(JUMP);
        self.give(host, if lags { Input::Lagged(jump) } else { Input::Tick });
    }
}
