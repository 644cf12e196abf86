//! What must always hold, looked at again and again: views agree with the truth, figures are fresh, machines survive any bytes.

use std::time::Duration;

use bytes::Bytes;
use membership::{Input, Liveness, MemberStatus, Target};
use rand::{Rng as _, RngExt as _};
use rayon::prelude::*;

use super::{
    Outcome,
    load::SLOTS,
    measure::Violation,
    network::{MS, Nanos, SECOND},
    news::seconds,
    toy,
    world::{What, World},
};

/// How often figures are taken.
const PROBE: Nanos = 10 * MS;
/// Loads looked at each time.
const PROBED: usize = 8;
/// Views agree with the truth so long after everything has healed.
const CONVERGES: Nanos = 30 * SECOND;
/// A subscription so young may have brought nothing yet.
const YOUNG: Nanos = 2 * SECOND;
/// A process so young has no figures of regions yet.
const NEW: Nanos = 10 * SECOND;
/// Members a node may know beyond those there are.
const STRANGERS: usize = 16;
const VIOLATIONS: usize = 100;
/// Nodes and rounds of the last storm.
const STORM: (u32, u32) = (40, 60);

impl World {
    pub(super) fn violated(&mut self, what: String) {
        self.measures.violated += 1;
        if self.measures.violations.len() < VIOLATIONS {
            let (at_s, seed) = (seconds(self.now), self.config.seed);
            self.measures.violations.push(Violation { at_s, seed, what });
        }
    }

    fn count(&self) -> u32 {
        u32::try_from(self.hosts.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn warm(&mut self) {
        self.account_all();
        self.measures.kinds = Default::default();
        self.measures.bytes = self.hosts.iter().map(|host| (host.sent, host.received)).collect();
    }

    /// Looks at a few figures, at random.
    pub(super) fn probe(&mut self) {
        for _ in 0..PROBED {
            self.probe_load();
        }
        self.probe_digest();
        self.push(self.now + PROBE, What::Probe);
    }

    fn probe_load(&mut self) {
        let (now, origin) = (self.now, self.origin);
        let host = self.rng.random_range(0..self.count());
        let draw: usize = self.rng.random_range(0..1 << 30);
        let Some(on) = self.host(host) else { return };
        let Some(process) = on.process.as_ref().filter(|process| !process.subscribed.is_empty())
        else {
            return;
        };
        let Some((node, since)) = process.subscribed.iter().nth(draw % process.subscribed.len())
        else {
            return;
        };
        let is_idle = self.host(*node).is_none_or(|host| host.engine.is_idle());
        if is_idle || self.is_liar(*node) || now < since + YOUNG || !self.is_settled(host, *node) {
            return;
        }
        let Some(age) = process.views.age(*node, on.clock(origin, now)) else { return };
        let age = age.unwrap_or_else(|| Duration::from_nanos(now - since));
        self.measures.load_ages.push(micros(age));
    }

    fn probe_digest(&mut self) {
        let now = self.now;
        let host = self.rng.random_range(0..self.count());
        let region = self.rng.random_range(0..self.config.regions);
        let witness = region
            + self.config.regions
                * (self.rng.random_range(0..self.config.nodes / self.config.regions));
        let Some(on) = self.host(host).filter(|on| !self.is_liar(on.node)) else { return };
        let Some(process) = on.process.as_ref() else { return };
        if now < process.started + NEW || !self.is_settled(host, witness) {
            return;
        }
        let known = process.regions.get(region as usize).copied().flatten();
        let age = now - known.map_or(process.started, |(sampled, _)| sampled).min(now);
        let is_own = on.region == region;
        match (is_own, known) {
            (true, None) => {}
            (true, Some(_)) => {
                self.measures.own_digest_ages.push(micros(Duration::from_nanos(age)));
            }
            (false, known) => {
                self.measures.digests_missing += u64::from(known.is_none());
                self.measures.digest_ages.push(micros(Duration::from_nanos(age)));
            }
        }
        if let Some((_, free)) = known
            && self.rng.random_ratio(1, 20)
        {
            self.probe_error(region, free);
        }
    }

    /// How far the free slots of a region are from what is said of them, as a share of its slots.
    fn probe_error(&mut self, region: u32, claimed: u32) {
        let alive = self.hosts.iter().filter(|host| host.region == region && host.runs());
        let (free, slots) = alive.fold((0, 0), |(free, slots), host| {
            (free + SLOTS.saturating_sub(host.engine.in_flight()), slots + SLOTS)
        });
        let error = f64::from(free.abs_diff(claimed)) / f64::from(slots.max(1));
        self.measures.digest_errors.push(permille(error));
    }

    /// Whether the views agree by now, and garbage from nobody.
    pub(super) fn check(&mut self) {
        self.garbage();
        let now = self.now;
        let over = self.plan.over.unwrap_or(Nanos::MAX);
        if now < over && self.measures.join_agreed.is_none() && self.agree() {
            self.measures.join_agreed = Some(now - self.plan.joined);
        }
        if now >= over && self.measures.heal_agreed.is_none() && self.agree() {
            self.measures.heal_agreed = Some(now - over);
        }
        let next = if self.config.nodes > super::LARGE { SECOND } else { SECOND / 4 };
        self.push(now + next, What::Check);
    }

    /// A random machine hears bytes from nobody it knows.
    fn garbage(&mut self) {
        let host = self.rng.random_range(0..self.count());
        let mut bytes = vec![0; self.rng.random_range(1..400)];
        self.rng.fill_bytes(&mut bytes);
        let mut from = [0; 16];
        self.rng.fill_bytes(&mut from);
        let (from, rtt) = (membership::NodeId(from), Duration::from_millis(1));
        if self.host(host).is_some_and(|host| host.runs()) {
            self.give(host, Input::Frame { from, bytes: bytes.into(), rtt });
        }
    }

    /// Whether the view of every node agrees with the truth. Begins with the one that did not last time.
    fn agree(&mut self) -> bool {
        let count = self.count();
        for _ in 0..count {
            let host = self.measures.doubtful % count;
            if let Some(why) = self.disagreement(host) {
                self.measures.disagreement = why;
                return false;
            }
            self.measures.doubtful = (host + 1) % count;
        }
        self.measures.disagreement.clear();
        true
    }

    /// In what the view a node has of its region differs from the truth.
    fn disagreement(&mut self, host: u32) -> Option<String> {
        let on = self.host(host).filter(|on| on.runs() && !self.is_liar(on.node))?;
        let (own, region) = (on.node, on.region);
        let status = self.guarded(host, |mesh, now| mesh.status(now))?;
        let nodes = self.config.nodes;
        if status.members.len() > nodes as usize + STRANGERS {
            let known = status.members.len();
            self.violated(format!(
                "node {host} knows {known} members where there are {nodes} nodes"
            ));
        }
        let mut seen = vec![None; nodes as usize];
        for member in &status.members {
            if let Some(seen) = seen.get_mut(toy::index(member.peer.id) as usize) {
                *seen = Some(member.state);
            }
        }
        let others = (region..nodes).step_by(self.config.regions as usize);
        others.filter(|node| *node != own && !self.is_liar(*node)).find_map(|node| {
            let state = seen.get(node as usize).copied().flatten();
            let thinks = matches!(state, Some(Liveness::Alive | Liveness::Suspect));
            (thinks != self.is_alive(node)).then(|| {
                let is = if thinks { "dead" } else { "alive" };
                format!("node {host} holds {node} to be {state:?}, which is {is}")
            })
        })
    }

    pub(super) fn recheck(&mut self, host: u32, life: u32, about: u32) {
        if self.host(host).is_none_or(|on| on.life != life) || !self.is_settled(host, about) {
            return;
        }
        let Some(status) = self.guarded(host, |mesh, now| mesh.status(now)) else { return };
        let is = |member: &&MemberStatus| toy::index(member.peer.id) == about;
        let state = status.members.iter().find(is).map(|member| member.state);
        if !matches!(state, Some(Liveness::Alive | Liveness::Suspect)) {
            self.measures.permanent_false_downs += 1;
            self.violated(format!("node {host} called {about} down, which is alive, and holds it to be {state:?} after 5 s"));
        }
    }

    /// The end: what has to hold by now, a storm of garbage, and the figures.
    pub(super) fn finish(mut self) -> Outcome {
        let since = self.plan.over.unwrap_or(self.plan.joined);
        let agreed = if self.plan.over.is_some() {
            self.measures.heal_agreed
        } else {
            self.measures.join_agreed
        };
        let late = agreed.unwrap_or_else(|| self.plan.end.saturating_sub(since));
        if late > CONVERGES || (agreed.is_none() && self.plan.end >= since + CONVERGES) {
            let why = self.measures.disagreement.clone();
            self.violated(format!(
                "{:.0} s after the last fault views still differed: {why}",
                seconds(late)
            ));
        }
        self.measure_bytes();
        let undetected = self.measures.undetected(|node| self.is_alive(node));
        self.measures.is_over = true;
        self.storm();
        let Self { measures, config, plan, story, hosts, .. } = self;
        hosts.into_par_iter().for_each(drop);
        let (report, violations) = measures.report(&config, &plan, undetected);
        Outcome { report, violations, story }
    }

    /// What ordinary nodes sent and received since the mesh was warm.
    fn measure_bytes(&mut self) {
        let length = seconds(self.plan.end.saturating_sub(self.plan.warm)).max(1.0);
        let (mut ordinary, mut relays) = (vec![], vec![]);
        self.account_all();
        for host in 0..u32::try_from(self.measures.bytes.len()).unwrap_or(0) {
            let Some(status) = self.guarded(host, |mesh, now| mesh.status(now)) else { continue };
            let Some(on) = self.host(host) else { continue };
            let Some((sent, received)) = self.measures.bytes.get(host as usize) else { continue };
            let rates =
                ((on.sent - sent) as f64 / length, (on.received - received) as f64 / length);
            if !self.is_liar(on.node) {
                if status.is_relay { relays.push(rates) } else { ordinary.push(rates) }
            }
        }
        self.measures.rates = ordinary;
        self.measures.relay_rates = relays;
    }

    /// Spoiled frames from peers that are linked, and news of links that never were. Nothing may panic.
    fn storm(&mut self) {
        let hosts = self.count().min(STORM.0);
        for host in 0..hosts {
            let Some(process) = self.process(host) else { continue };
            let peers: Vec<u32> = process.links.keys().copied().collect();
            for _ in 0..STORM.1 {
                self.storm_once(host, &peers);
            }
        }
    }

    fn storm_once(&mut self, host: u32, peers: &[u32]) {
        let draw: usize = self.rng.random_range(0..1 << 30);
        let peer = peers
            .get(draw % peers.len().max(1))
            .and_then(|node| self.host(*node))
            .map(|host| host.peer());
        let frame =
            self.captured.get(draw % self.captured.len().max(1)).cloned().unwrap_or_default();
        let Some(peer) = peer else { return };
        let bytes = self.spoil(&frame);
        let rtt = Duration::from_millis(1);
        let input = match draw % 16 {
            0 => Input::LinkDown { id: peer.id, why: "storm".to_owned() },
            1 => Input::DialFailed {
                target: Target::Member { peer, address: "10.9.9.9:1".to_owned() },
                why: "storm".to_owned(),
            },
            2 => Input::Tick,
            _ => Input::Frame { from: peer.id, bytes, rtt },
        };
        self.give(host, input);
    }

    fn spoil(&mut self, frame: &Bytes) -> Bytes {
        let mut bytes = frame.to_vec();
        if bytes.is_empty() {
            return bytes.into();
        }
        match self.rng.random_range(0..4) {
            0 => self.rng.fill_bytes(&mut bytes),
            1 => bytes.truncate(self.rng.random_range(0..bytes.len())),
            _ => {
                for _ in 0..self.rng.random_range(1..5) {
                    let at = self.rng.random_range(0..bytes.len());
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.rng.random_range(0..8);
                    }
                }
            }
        }
        bytes.into()
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive; saturates")]
fn permille(share: f64) -> u32 {
    (share * 1000.0) as u32
}
