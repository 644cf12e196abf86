//! What can go wrong with a mesh, and when does it?

use std::{collections::BTreeSet, fmt, str::FromStr};

use rand::{RngExt as _, rngs::StdRng, seq::SliceRandom as _};

use super::{
    Config,
    network::{MS, Nanos, SECOND as S},
};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// A hundredth of the nodes die, half of them with their machines.
    Crash,
    /// This share of packets is lost, 0 to 1.
    Loss(f64),
    /// Of some pairs of nodes one does not hear the other.
    Asymmetric,
    /// Nodes are cut off and back again every two seconds.
    Flap,
    /// Nodes stop for ten seconds and go on.
    Pause,
    /// Nodes are killed and come back as later processes.
    Restart,
    /// Nodes are killed and come back as processes that think they are earlier ones.
    RestartOlder,
    /// A second process has the name of a node.
    Duplicate,
    /// The clocks of nodes jump an hour ahead.
    ClockJump,
    /// The regions fall into two halves, and so does the first region in itself; later that heals.
    Partition,
    /// Nodes with good certificates say whatever hurts.
    Byzantine,
    /// All nodes start at once, from one seed.
    Join,
    /// All nodes are restarted, one after the other, with good-byes.
    Rolling,
}

/// A text that names no fault. The fault is with whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no fault: write none, crash, loss=PERCENT, asymmetric, flap, pause, restart, restart-older, duplicate, clock-jump, \
     partition, byzantine, join or rolling, or several with commas between"
)]
pub struct FaultError(String);

impl Fault {
    /// Reads several, with commas between; `none` is none.
    ///
    /// # Errors
    /// [`FaultError`].
    pub fn list(text: &str) -> Result<Vec<Self>, FaultError> {
        text.split(',').map(str::trim).filter(|one| *one != "none").map(str::parse).collect()
    }
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let wrong = || FaultError(text.to_owned());
        if let Some(percent) = text.strip_prefix("loss=") {
            let percent: f64 = percent.parse().map_err(|_| wrong())?;
            return if (0.0..=50.0).contains(&percent) {
                Ok(Self::Loss(percent / 100.0))
            } else {
                Err(wrong())
            };
        }
        NAMES.iter().find(|(name, _)| *name == text).map(|(_, fault)| *fault).ok_or_else(wrong)
    }
}

const NAMES: [(&str, Fault); 12] = [
    ("crash", Fault::Crash),
    ("asymmetric", Fault::Asymmetric),
    ("flap", Fault::Flap),
    ("pause", Fault::Pause),
    ("restart", Fault::Restart),
    ("restart-older", Fault::RestartOlder),
    ("duplicate", Fault::Duplicate),
    ("clock-jump", Fault::ClockJump),
    ("partition", Fault::Partition),
    ("byzantine", Fault::Byzantine),
    ("join", Fault::Join),
    ("rolling", Fault::Rolling),
];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, NAMES.iter().find(|(_, fault)| fault == self)) {
            (Self::Loss(share), _) => write!(f, "loss={}", share * 100.0),
            (_, Some((name, _))) => f.write_str(name),
            (_, None) => Ok(()),
        }
    }
}

/// One thing done to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Its process starts, later than the one before by this.
    Start {
        host: u32,
        later: i64,
    },
    /// A second process of this node starts, on its own machine.
    Double {
        node: u32,
    },
    /// Its process ends without a word.
    Kill {
        host: u32,
        with_machine: bool,
    },
    /// Its process says good-bye.
    Leave {
        host: u32,
    },
    /// Its process ends after good-byes.
    Stop {
        host: u32,
    },
    Pause {
        host: u32,
    },
    Resume {
        host: u32,
    },
    /// All its links are cut, or not any more.
    Isolate {
        host: u32,
        is: bool,
    },
    /// The one is not heard by the other, or is again.
    Deafen {
        from: u32,
        to: u32,
        is: bool,
    },
    /// The regions fall apart, or together again.
    Split {
        is: bool,
    },
    Jump {
        host: u32,
        lags: bool,
    },
    /// It begins to lie.
    Lie {
        host: u32,
    },
}

/// What happens when.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    pub(super) acts: Vec<(Nanos, Act)>,
    /// From when on figures count.
    pub(super) warm: Nanos,
    /// When all nodes have started.
    pub(super) joined: Nanos,
    /// When the last fault is over; `None`: there was none that leaves anything behind.
    pub(super) over: Option<Nanos>,
    /// Whether faults heal, so that it is of interest how fast the views do.
    pub(super) heals: bool,
    pub(super) end: Nanos,
    pub(super) loss: f64,
    pub(super) liars: BTreeSet<u32>,
    /// Hosts that die and come back.
    pub(super) returning: BTreeSet<u32>,
    /// Nodes everybody knows from the beginning.
    pub(super) seeds: Vec<u32>,
}

impl Plan {
    pub(super) fn new(config: &Config, rng: &mut StdRng) -> Self {
        let end = Nanos::try_from(config.duration().as_nanos()).unwrap_or(Nanos::MAX);
        let at_once = config.faults.contains(&Fault::Join);
        let joined = if at_once { 0 } else { (10 * S).min(end / 4) };
        let warm = (20 * S).min(end / 2);
        let seeds = if at_once { 1 } else { 3 };
        let seeds = spread(config.nodes, seeds);
        let mut plan =
            Self { warm, joined, end, loss: config.loss, seeds: seeds.clone(), ..Self::default() };
        for host in 0..config.nodes {
            let at = if seeds.contains(&host) { 0 } else { rng.random_range(0..=joined) };
            plan.acts.push((at, Act::Start { host, later: 0 }));
        }
        for fault in &config.faults {
            plan.add(*fault, config.nodes, rng);
        }
        plan
    }

    /// When faults begin.
    fn begin(&self) -> Nanos {
        self.warm + S
    }

    /// How long what heals lasts: what it is in life, unless the run is too short.
    fn lasts(&self, wanted: Nanos) -> Nanos {
        wanted.min(self.end.saturating_sub(self.begin()) / 3)
    }

    fn at(&mut self, at: Nanos, act: Act) {
        self.acts.push((at, act));
    }

    fn over(&mut self, at: Nanos, heals: bool) {
        self.over = self.over.max(Some(at));
        self.heals |= heals;
    }

    fn add(&mut self, fault: Fault, nodes: u32, rng: &mut StdRng) {
        let (from, until) = (self.begin(), self.begin() + self.lasts(20 * S));
        match fault {
            Fault::Loss(share) => self.loss = share,
            Fault::Join => self.heals = true,
            Fault::Crash => self.crash(nodes, rng),
            Fault::Asymmetric => {
                for _ in 0..(nodes / 50).max(2) {
                    let (from_host, to) = pair(nodes, rng);
                    self.at(from, Act::Deafen { from: from_host, to, is: true });
                    self.at(until, Act::Deafen { from: from_host, to, is: false });
                }
                self.over(until, true);
            }
            Fault::Flap => self.flap(nodes, rng, until),
            Fault::Pause => {
                let until = from + self.lasts(10 * S);
                for host in some(nodes, 100, rng) {
                    self.at(from, Act::Pause { host });
                    self.at(until, Act::Resume { host });
                }
                self.over(until, true);
            }
            Fault::Restart => self.restart(nodes, rng, 1_000_000),
            Fault::RestartOlder => self.restart(nodes, rng, -1_000_000),
            Fault::Duplicate => {
                for node in some(nodes, 200, rng) {
                    self.at(from, Act::Double { node });
                }
                self.over(from, true);
            }
            Fault::ClockJump => {
                for (i, host) in some(nodes, 100, rng).into_iter().enumerate() {
                    self.at(from, Act::Jump { host, lags: i % 2 == 1 });
                }
                self.over(from, true);
            }
            Fault::Partition => {
                self.at(from, Act::Split { is: true });
                self.at(until, Act::Split { is: false });
                self.over(until, true);
            }
            Fault::Byzantine => {
                for host in some(nodes, 50, rng) {
                    self.liars.insert(host);
                    self.at(from, Act::Lie { host });
                }
            }
            Fault::Rolling => self.rolling(nodes),
        }
    }

    fn crash(&mut self, nodes: u32, rng: &mut StdRng) {
        let (from, length) = (self.begin(), self.end.saturating_sub(self.begin()));
        let last = from + (length / 3).min(20 * S);
        for (i, host) in some(nodes, 100, rng).into_iter().enumerate() {
            let at = rng.random_range(from..=last);
            self.at(at, Act::Kill { host, with_machine: i % 2 == 0 });
        }
        self.over(last, false);
    }

    fn flap(&mut self, nodes: u32, rng: &mut StdRng, until: Nanos) {
        for host in some(nodes, 100, rng) {
            let mut at = self.begin();
            while at < until {
                self.at(at, Act::Isolate { host, is: true });
                self.at(at + 2 * S, Act::Isolate { host, is: false });
                at += 4 * S;
            }
            self.over(at, true);
        }
    }

    fn restart(&mut self, nodes: u32, rng: &mut StdRng, later: i64) {
        for host in some(nodes, 100, rng) {
            self.returning.insert(host);
            let at = self.begin() + rng.random_range(0..=self.lasts(10 * S));
            let back = at + rng.random_range(500 * MS..3 * S);
            self.at(at, Act::Kill { host, with_machine: false });
            self.at(back, Act::Start { host, later });
            self.over(back, true);
        }
    }

    fn rolling(&mut self, nodes: u32) {
        let from = self.begin();
        let length = self.end.saturating_sub(from + 35 * S).max(5 * S);
        for host in 0..nodes {
            let at = from + length * Nanos::from(host) / Nanos::from(nodes);
            self.at(at, Act::Leave { host });
            self.at(at + 2 * S, Act::Stop { host });
            self.at(at + 3 * S, Act::Start { host, later: 1_000_000 });
            self.over(at + 3 * S, true);
        }
    }
}

/// So many nodes, far from each other in the order of the nodes.
fn spread(nodes: u32, wanted: u32) -> Vec<u32> {
    let wanted = wanted.min(nodes);
    (0..wanted).map(|i| i * nodes / wanted).collect()
}

/// One in `share` nodes, and at least one.
fn some(nodes: u32, share: u32, rng: &mut StdRng) -> Vec<u32> {
    let mut all: Vec<u32> = (0..nodes).collect();
    all.shuffle(rng);
    all.truncate((nodes / share).max(1) as usize);
    all
}

fn pair(nodes: u32, rng: &mut StdRng) -> (u32, u32) {
    let from = rng.random_range(0..nodes);
    (from, (from + rng.random_range(1..nodes)) % nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_as_they_are_written() {
        let all = "crash,loss=2,restart-older,partition";
        let faults = Fault::list(all).unwrap();
        let written: Vec<_> = faults.iter().map(ToString::to_string).collect();
        assert_eq!(written.join(","), all);
        assert_eq!(Fault::list("none").unwrap(), []);
        for wrong in ["", "crsh", "loss=", "loss=51", "crash,,flap"] {
            assert!(Fault::list(wrong).unwrap_err().to_string().contains("write none, crash"));
        }
    }
}
