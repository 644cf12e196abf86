//! The heap of events, and what each of them does.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BinaryHeap, HashMap},
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use base::RegionName;
use bytes::Bytes;
use membership::{Input, Mesh, Output, Own, Pair, Seed};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{
    Config, Outcome,
    crew::{Done, Task},
    fault::{Act, Plan},
    host::{Host, Process},
    links::{LinkRef, Links},
    load::{Engine, Serving},
    measure::Measures,
    network::{MS, Nanos, Network, SECOND, SHORTEST_WAY},
    toy::{self, Toy},
    wires::Dial,
};

/// How often the load of an engine changes.
const STEP: Nanos = 200 * MS;
/// Timers are no finer.
const TICK: Nanos = MS;
/// The epoch of the first process of the first node: a time in milliseconds, as in life.
const EPOCH: u64 = 1_795_000_000_000;
/// Cards a node keeps on its disk.
const KEPT: usize = 64;

#[derive(Debug)]
pub(super) enum What {
    Frame {
        link: LinkRef,
        side: usize,
        bytes: Bytes,
    },
    Tick {
        host: u32,
        life: u32,
    },
    Sample {
        host: u32,
        life: u32,
    },
    Step {
        host: u32,
        life: u32,
    },
    Jump {
        host: u32,
        life: u32,
    },
    Dialled(Box<Dial>),
    Failed {
        dial: Box<Dial>,
        why: &'static str,
    },
    /// This end may have heard nothing for too long.
    Idle {
        link: LinkRef,
        side: usize,
    },
    /// The other end of this end said good-bye.
    Closed {
        link: LinkRef,
        side: usize,
        why: Box<str>,
    },
    Act(Act),
    /// This node says good-bye.
    Leave {
        host: u32,
    },
    Lie {
        host: u32,
    },
    Warm,
    Probe,
    Check,
    /// Whether this node was right to hold that one down.
    Recheck {
        host: u32,
        life: u32,
        about: u32,
    },
}

impl What {
    /// Whether it is done when all machines have heard what they were to hear before, and alone.
    fn is_alone(&self) -> bool {
        !matches!(
            self,
            Self::Frame { .. }
                | Self::Tick { .. }
                | Self::Sample { .. }
                | Self::Step { .. }
                | Self::Jump { .. }
                | Self::Dialled(_)
                | Self::Failed { .. }
                | Self::Idle { .. }
                | Self::Closed { .. }
        )
    }
}

#[derive(Debug)]
struct Timed {
    at: Nanos,
    sequence: u64,
    what: What,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The earliest is the greatest: that is what a heap gives first.
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.sequence).cmp(&(self.at, self.sequence))
    }
}

/// Everything.
#[derive(Debug)]
pub(super) struct World {
    pub(super) config: Config,
    pub(super) plan: Plan,
    pub(super) now: Nanos,
    heap: BinaryHeap<Timed>,
    /// What machines are to be told next.
    pub(super) tasks: Vec<Task>,
    sequence: u64,
    pub(super) origin: Instant,
    pub(super) hosts: Vec<Host>,
    /// The second host of a node, by node.
    pub(super) doubles: BTreeMap<u32, u32>,
    /// Hosts by their address.
    pub(super) addresses: HashMap<String, u32>,
    pub(super) regions: Vec<RegionName>,
    pub(super) links: Links,
    pub(super) network: Network,
    pub(super) rng: StdRng,
    pub(super) measures: Measures,
    /// The newest pair of each node that anybody was told of.
    pub(super) pairs: Vec<Option<Pair>>,
    pub(super) captured: Vec<Bytes>,
    pub(super) story: Vec<String>,
}

impl World {
    pub(super) fn new(config: &Config) -> Self {
        let mut rng = StdRng::seed_from_u64(config.seed);
        let plan = Plan::new(config, &mut StdRng::from_rng(&mut rng));
        let network = Network::new(config.regions, plan.loss, StdRng::from_rng(&mut rng));
        let regions = (0..config.regions).filter_map(|r| format!("r{r}").parse().ok()).collect();
        let mut world = Self {
            config: config.clone(),
            measures: Measures::new(config),
            plan,
            now: 0,
            heap: BinaryHeap::new(),
            tasks: vec![],
            sequence: 0,
            origin: base::clock::now(),
            hosts: vec![],
            doubles: BTreeMap::new(),
            addresses: HashMap::new(),
            regions,
            links: Links::default(),
            network,
            rng,
            pairs: vec![None; config.nodes as usize],
            captured: vec![],
            story: vec![],
        };
        for node in 0..config.nodes {
            world.add_host(node);
        }
        world
    }

    pub(super) fn run(mut self) -> Outcome {
        for (at, act) in std::mem::take(&mut self.plan.acts) {
            self.push(at, What::Act(act));
        }
        self.push(self.plan.warm, What::Warm);
        self.push(self.plan.warm, What::Probe);
        self.push(self.plan.joined, What::Check);
        while let Some(first) =
            self.heap.peek().map(|next| next.at).filter(|at| *at <= self.plan.end)
        {
            self.run_until((first + SHORTEST_WAY).min(self.plan.end + 1));
        }
        self.now = self.plan.end;
        self.finish()
    }

    /// What happens before `until`, within which nobody hears of anybody.
    fn run_until(&mut self, until: Nanos) {
        while self.heap.peek().is_some_and(|next| next.at < until)
            && let Some(Timed { at, what, .. }) = self.heap.pop()
        {
            self.now = at;
            self.measures.events += 1;
            if what.is_alone() {
                self.work();
                self.now = at;
            }
            self.happen(what);
        }
        self.work();
    }

    pub(super) fn push(&mut self, at: Nanos, what: What) {
        self.sequence += 1;
        self.heap.push(Timed { at: at.max(self.now), sequence: self.sequence, what });
    }

    pub(super) fn host(&self, host: u32) -> Option<&Host> {
        self.hosts.get(host as usize)
    }

    pub(super) fn host_mut(&mut self, host: u32) -> Option<&mut Host> {
        self.hosts.get_mut(host as usize)
    }

    pub(super) fn process(&mut self, host: u32) -> Option<&mut Process> {
        self.host_mut(host)?.process.as_deref_mut()
    }

    fn add_host(&mut self, node: u32) -> Option<u32> {
        let host = u32::try_from(self.hosts.len()).ok()?;
        let region = node % self.config.regions;
        let name = format!("n{node}").parse().ok()?;
        let region_name = self.regions.get(region as usize)?.clone();
        let address = format!("10.{}.{}.{}", region, host >> 8, host & 0xff);
        let own = Own {
            id: toy::id(node, &name),
            node: name,
            region: region_name,
            zone: format!("z{}", node / self.config.regions % 3).parse().ok(),
            trust_domain: "mesh.example".parse().ok()?,
            epoch: EPOCH,
            peers: format!("{address}:7443"),
            gossip: format!("{address}:7946"),
            release: "1.0.0".to_owned(),
        };
        let of = self.hosts.first().map(|host| &host.toy);
        let toy = Toy::new(self.config.seed, of, node, &own.node, &own.region);
        self.addresses.insert(own.gossip.clone(), host);
        self.hosts.push(Host {
            node,
            region,
            own,
            toy,
            engine: Engine::new(&mut self.rng),
            process: None,
            life: 0,
            has_power: true,
            paused: None,
            buffered: std::collections::VecDeque::new(),
            ahead: 0,
            touched: 0,
            sent: 0,
            received: 0,
            kept: vec![],
        });
        Some(host)
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Frame { link, side, bytes } => self.arrive(link, side, bytes),
            What::Tick { host, life } => self.tick(host, life),
            What::Sample { host, life } => self.sample(host, life),
            What::Step { host, life } => self.step(host, life),
            What::Jump { host, life } => self.jump(host, life),
            What::Dialled(dial) => self.dialled(dial),
            What::Failed { dial, why } => self.dial_failed(*dial, why),
            What::Idle { link, side } => self.idle(link, side),
            What::Closed { link, side, why } => self.closed(link, side, why),
            What::Act(act) => self.act(act),
            What::Leave { host } => self.give(host, Input::Leave),
            What::Lie { host } => self.lie(host),
            What::Warm => self.warm(),
            What::Probe => self.probe(),
            What::Check => self.check(),
            What::Recheck { host, life, about } => self.recheck(host, life, about),
        }
    }

    /// Asks the machine of a host something. One that panics is counted, and its process ends.
    pub(super) fn guarded<T>(
        &mut self,
        host: u32,
        ask: impl FnOnce(&mut Mesh<Toy>, Instant) -> T,
    ) -> Option<T> {
        let (origin, now) = (self.origin, self.now);
        let on = self.host_mut(host)?;
        let clock = on.clock(origin, now);
        let mesh = &mut on.process.as_mut()?.mesh;
        let answer = catch_unwind(AssertUnwindSafe(|| ask(mesh, clock)));
        answer.inspect_err(|_| self.panicked(host)).ok()
    }

    fn panicked(&mut self, host: u32) {
        self.measures.panics += 1;
        self.violated(format!("the machine of node {host} panicked"));
        self.kill(host, false);
    }

    /// Tells the machine of a host something at once.
    pub(super) fn give(&mut self, host: u32, input: Input) {
        self.give_soon(host, input);
        let now = self.now;
        self.work();
        self.now = now;
    }

    /// Tells the machine of a host something, while others are told something too.
    pub(super) fn give_soon(&mut self, host: u32, input: Input) {
        let Some(on) = self.host(host).filter(|on| on.process.is_some()) else { return };
        let (at, clock) = (self.now, on.clock(self.origin, self.now));
        self.tasks.push(Task { at, host, clock, input });
    }

    /// Does what a machine wants done.
    pub(super) fn carry_out(&mut self, host: u32, done: Done) {
        if done.has_panicked {
            return self.panicked(host);
        }
        if !self.measures.is_over {
            self.measures.load_frames += done.loads;
        }
        let mut later = None;
        for output in done.outputs {
            match output {
                Output::Send { to, bytes, way } => self.send(host, to, bytes, way),
                Output::Dial(target) => self.dial(host, target),
                Output::Close { id, why } => self.close(host, id, &why),
                Output::Event(event) => later = self.told(host, event).or(later),
            }
        }
        match later {
            Some(epoch) => self.superseded(host, epoch),
            None => self.arm(host, done.deadline),
        }
    }

    /// Sees to it that the host's machine is woken when it wants to be.
    fn arm(&mut self, host: u32, deadline: Option<Instant>) {
        let (origin, life) = (self.origin, self.host(host).map_or(0, |host| host.life));
        let Some(wanted) = deadline else { return };
        let Some(on) = self.host_mut(host) else { return };
        let wanted = on.when(origin, wanted);
        let Some(process) = on.process.as_mut() else { return };
        let at = wanted.max(process.ticked + TICK);
        if at < process.armed {
            process.armed = at;
            self.push(at, What::Tick { host, life });
        }
    }

    fn tick(&mut self, host: u32, life: u32) {
        let (origin, now) = (self.origin, self.now);
        let Some(on) = self.host_mut(host).filter(|on| on.life == life) else { return };
        let (is_paused, clock) = (on.paused.is_some(), on.clock(origin, now));
        let Some(process) = on.process.as_mut().filter(|process| process.armed <= now) else {
            return;
        };
        process.armed = Nanos::MAX;
        if is_paused {
            return;
        }
        let deadline = process.mesh.next_deadline();
        if deadline.is_some_and(|wanted| wanted <= clock) {
            process.ticked = now;
            self.give_soon(host, Input::Tick);
        } else {
            self.arm(host, deadline);
        }
    }

    /// The walk of a host's engine goes on.
    fn step(&mut self, host: u32, life: u32) {
        let (now, rng) = (self.now, &mut self.rng);
        let Some(on) = self.hosts.get_mut(host as usize).filter(|on| on.life == life) else {
            return;
        };
        let jump_at = on.engine.step(rng).then(|| now + rng.random_range(0..STEP));
        self.push(now + STEP, What::Step { host, life });
        if let Some(at) = jump_at {
            self.push(at, What::Jump { host, life });
        }
    }

    fn jump(&mut self, host: u32, life: u32) {
        let Some(on) = self.hosts.get_mut(host as usize).filter(|on| on.life == life) else {
            return;
        };
        on.engine.jump(&mut self.rng);
        self.say_loads(host);
    }

    /// A host looks at its engine, as often as its machine wants to know.
    fn sample(&mut self, host: u32, life: u32) {
        let Some(on) = self.host(host).filter(|on| on.life == life) else { return };
        let Some(process) = on.process.as_ref() else { return };
        let interval = process.mesh.sample_interval();
        let after = interval.map_or(STEP, |time| Nanos::try_from(time.as_nanos()).unwrap_or(STEP));
        self.push(self.now + after, What::Sample { host, life });
        if interval.is_some() {
            self.say_loads(host);
        }
    }

    fn say_loads(&mut self, host: u32) {
        let Some(on) = self.host(host).filter(|on| on.paused.is_none()) else { return };
        let other = self.regions.get(1).unwrap_or(&on.own.region);
        let arrivals = on.engine.arrivals(&on.own.region, other);
        let loads = vec![on.engine.load()];
        self.give_soon(host, Input::Loads { loads, arrivals });
    }

    /// Another process of this host's name is the later one: this one ends. Where it was alone, it is started again as a later.
    fn superseded(&mut self, host: u32, epoch: u64) {
        self.measures.superseded += 1;
        let Some(on) = self.host(host) else { return };
        let (node, own) = (on.node, on.own.epoch);
        self.stop(host, "another process has its name");
        let others = [Some(node), self.doubles.get(&node).copied()];
        let is_alone = others.into_iter().flatten().all(|other| {
            other == host || self.host(other).is_none_or(|other| other.process.is_none())
        });
        if is_alone {
            let later =
                i64::try_from(epoch.saturating_sub(own)).unwrap_or(i64::MAX).saturating_add(1);
            self.push(self.now + SECOND, What::Act(Act::Start { host, later }));
        }
    }

    pub(super) fn start(&mut self, host: u32, later: i64) {
        let (origin, now, seed) = (self.origin, self.now, self.rng.random());
        let (seeds, config) = (self.seeds(), &self.config);
        let Some(on) = self.hosts.get_mut(host as usize).filter(|on| on.process.is_none()) else {
            return;
        };
        on.life += 1;
        on.has_power = true;
        on.paused = None;
        on.touched = now;
        on.own.epoch = match later {
            0 => EPOCH + now / MS,
            later => on.own.epoch.saturating_add_signed(later),
        };
        let descriptor = Serving::new(config).descriptor(on.node);
        let (own, toy, clock) = (on.own.clone(), on.toy.clone(), on.clock(origin, now));
        let (life, kept) = (on.life, std::mem::take(&mut on.kept));
        let made = catch_unwind(AssertUnwindSafe(|| Mesh::new(own, descriptor, toy, clock, seed)));
        match made {
            Ok(Ok(mesh)) => {
                on.process = Some(Box::new(Process::new(mesh, config, now)));
            }
            Ok(Err(error)) => return self.violated(format!("node {host} cannot start: {error}")),
            Err(_) => return self.panicked(host),
        }
        self.guarded(host, |mesh, now| mesh.remember(now, &kept));
        self.give(host, Input::Seeds(seeds));
        let first = now + self.rng.random_range(0..STEP);
        self.push(first, What::Step { host, life });
        self.push(first, What::Sample { host, life });
    }

    fn seeds(&self) -> Vec<Seed> {
        let seeds = self.plan.seeds.iter().filter_map(|seed| self.host(*seed));
        seeds
            .map(|host| Seed { address: host.own.gossip.clone(), peer: None, is_listed: false })
            .collect()
    }

    pub(super) fn double(&mut self, node: u32) {
        let Some(host) = self.add_host(node) else { return };
        self.doubles.insert(node, host);
        let (now, epoch) = (self.now, self.host(node).map_or(EPOCH, |host| host.own.epoch));
        for of in [node, host] {
            if let Some(of) = self.host_mut(of) {
                of.own.epoch = epoch;
                of.touched = now;
            }
        }
        self.start(host, 7_000);
    }

    /// Its process ends without a word.
    pub(super) fn kill(&mut self, host: u32, with_power: bool) {
        for (link, side) in self.end_process(host, with_power) {
            self.links.take_down(link, side);
            self.expect_silence(link, 1 - side);
        }
    }

    /// Its process ends, and closes its links.
    pub(super) fn stop(&mut self, host: u32, why: &str) {
        for (link, side) in self.end_process(host, false) {
            self.say_good_bye(link, side, why);
        }
    }

    fn end_process(&mut self, host: u32, with_power: bool) -> Vec<(LinkRef, usize)> {
        let now = self.now;
        let Some(on) = self.hosts.get_mut(host as usize) else { return vec![] };
        on.touched = now;
        on.has_power &= !with_power;
        on.life += 1;
        on.paused = None;
        on.buffered.clear();
        let Some(process) = on.process.take() else { return vec![] };
        // One that has panicked may do so again.
        let kept = catch_unwind(AssertUnwindSafe(|| process.mesh.cards(KEPT))).unwrap_or_default();
        on.kept = kept.iter().map(|card| card.signed.to_vec()).collect();
        let links = process.links.values();
        links.filter_map(|link| Some((*link, self.links.get(*link)?.side(host)))).collect()
    }
}
