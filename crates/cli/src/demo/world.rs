//! A mesh on this machine: engines and nodes as processes of their own, relays for the distance between regions.
//!
//! Every process holds a pipe of ours as its standard input and ends when that is closed: nothing outlives this process,
//! however it ends.

use std::{
    fs,
    io::SeekFrom,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context as _;
use base::clock;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
};

use super::relay::{Relay, Relays};

/// The regions, and how much of what its engines can do each asks for.
pub(crate) const REGIONS: [(&str, f64); 3] = [("eu", 1.30), ("us", 0.40), ("ap", 0.40)];
pub(crate) const NODES_PER_REGION: usize = 2;
pub(crate) const ENGINES_PER_NODE: usize = 2;
pub(crate) const SLOTS: u32 = 8;
pub(crate) const STEP: Duration = Duration::from_millis(5);
pub(crate) const MODEL: &str = "demo";
const TRUST_DOMAIN: &str = "demo.isobar";
/// Round trips between regions, in milliseconds, and inside one.
const ROUND_TRIPS_MS: [[u64; 3]; 3] = [[2, 80, 150], [80, 2, 120], [150, 120, 2]];
/// How long a process may take to say that it is ready, and all of them to know each other.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// Longest page of metrics that is read.
const PAGE_BYTES_MAX: u64 = 1 << 20;

/// Every process that was started, and the relays: whoever holds this ends them, however far the start has come.
#[derive(Clone, Debug, Default)]
pub(crate) struct Started(Arc<Mutex<Running>>);

#[derive(Debug, Default)]
struct Running {
    processes: Vec<Child>,
    relays: Option<Relays>,
}

impl Started {
    /// Keeps a process; returns its number.
    fn keep(&self, child: Child) -> usize {
        let processes = &mut self.0.lock().processes;
        processes.push(child);
        processes.len() - 1
    }

    /// Kills a process, as a power cut would. It is waited for at the end.
    fn kill(&self, number: usize) -> anyhow::Result<()> {
        let mut running = self.0.lock();
        let child = running.processes.get_mut(number).context("there is no such process")?;
        child.start_kill().context("a process cannot be killed")
    }

    /// How a process has ended, if it has.
    fn ended(&self, number: usize) -> Option<ExitStatus> {
        self.0.lock().processes.get_mut(number)?.try_wait().ok().flatten()
    }

    /// Ends everything, and waits until it has ended.
    pub(crate) async fn stop(&self) {
        let running = std::mem::take(&mut *self.0.lock());
        for mut child in running.processes {
            // It may have ended before.
            drop(child.kill().await);
        }
        drop(running.relays);
    }
}

/// A process of ours.
#[derive(Debug)]
struct Process {
    started: Started,
    number: usize,
    /// What it said when it was ready.
    ready: Value,
}

/// A simulated GPU server.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) name: String,
    pub(crate) region: usize,
    pub(crate) grpc: SocketAddr,
    process: Process,
}

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) region: usize,
    pub(crate) clients: SocketAddr,
    metrics: SocketAddr,
    process: Process,
}

/// Everything that runs.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) engines: Vec<Engine>,
    pub(crate) nodes: Vec<Node>,
}

/// The way from one region to one node: for calls and for gossip.
#[derive(Debug)]
struct Way {
    peers: SocketAddr,
    gossip: SocketAddr,
    to_peers: Arc<OnceLock<SocketAddr>>,
    to_gossip: Arc<OnceLock<SocketAddr>>,
}

impl Process {
    async fn start(
        started: &Started,
        name: &str,
        dir: &Path,
        arguments: &[String],
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("this program cannot be found again")?;
        let log = dir.join(format!("{name}.log"));
        let mut said = fs::File::options().create_new(true).read(true).write(true).open(&log)?;
        let mut child = Command::new(program)
            .args(arguments)
            .args(["--json", "--exit-with-stdin"])
            .env_clear()
            .env("ISOBAR_LOG", "warn")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(said.try_clone()?)
            // Ctrl-C is for us; whoever hears it ends the others.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let out = child.stdout.take().context("no output")?;
        let number = started.keep(child);
        let mut line = String::new();
        let reading = BufReader::new(out).take(PAGE_BYTES_MAX);
        let read = async {
            tokio::pin!(reading);
            reading.read_line(&mut line).await
        };
        let read = tokio::time::timeout(READY_WITHIN, read).await;
        let ready = match read {
            Ok(Ok(1..)) => serde_json::from_str(&line).ok(),
            _ => None,
        };
        let Some(ready) = ready else {
            let mut why = String::new();
            std::io::Seek::seek(&mut said, SeekFrom::Start(0))?;
            std::io::Read::read_to_string(&mut said, &mut why)?;
            let ended = started.ended(number);
            let ended = ended.map_or_else(|| "it says nothing".to_owned(), |s| s.to_string());
            anyhow::bail!("{name} did not start ({ended}): {}", why.trim());
        };
        Ok(Self { started: started.clone(), number, ready })
    }

    fn address(&self, what: &str) -> anyhow::Result<SocketAddr> {
        let address = self.ready["listen"][what].as_str().context("no address")?;
        address.parse().with_context(|| format!("`{address}` is no address"))
    }

    fn kill(&self) -> anyhow::Result<()> {
        self.started.kill(self.number)
    }
}

impl World {
    /// Starts everything and returns when every node knows how pressed every other is. What it needs on disk is in `dir`.
    pub(crate) async fn start(dir: &Path, started: &Started) -> anyhow::Result<Self> {
        let engines = start_engines(dir, started).await?;
        let (ways, relays) = ways()?;
        let relays = Relays::run(relays).context("the relays cannot start")?;
        started.0.lock().relays = Some(relays);
        let nodes = start_nodes(dir, started, &engines, &ways).await?;
        for (to, node) in nodes.iter().enumerate() {
            for way in ways.iter().map(|from| &from[to]) {
                let set = [(&way.to_peers, "peers"), (&way.to_gossip, "gossip")];
                for (cell, what) in set {
                    let address = node.process.address(what)?;
                    cell.set(address)
                        .map_err(|_| anyhow::anyhow!("a relay leads there already"))?;
                }
            }
        }
        let world = Self { engines, nodes };
        world.acquainted().await?;
        Ok(world)
    }

    /// Waits until every node hears every other, and its engines pass their health checks.
    async fn acquainted(&self) -> anyhow::Result<()> {
        let others = self.nodes.len() - 1;
        let deadline = clock::now() + READY_WITHIN;
        for node in &self.nodes {
            loop {
                let page = get(node.metrics, "/metrics").await?;
                let ones = |metric: &str| {
                    page.lines().filter(|l| l.starts_with(metric) && l.ends_with(" 1.0")).count()
                };
                let known = ones("isobar_peer_present{");
                let healthy = ones("isobar_engine_healthy{");
                if known == others && healthy == ENGINES_PER_NODE {
                    break;
                }
                anyhow::ensure!(
                    clock::now() < deadline,
                    "node {} knows {known} of {others} others and {healthy} of {ENGINES_PER_NODE} engines after {READY_WITHIN:?}: \
                     is this machine busy?",
                    node.name
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    /// Kills an engine, as a power cut would.
    pub(crate) fn kill_engine(&self, index: usize) -> anyhow::Result<()> {
        self.engines[index].process.kill()
    }

    /// Kills a node, as a power cut would.
    pub(crate) fn kill_node(&self, index: usize) -> anyhow::Result<()> {
        self.nodes[index].process.kill()
    }
}

async fn start_engines(dir: &Path, started: &Started) -> anyhow::Result<Vec<Engine>> {
    let per_region = NODES_PER_REGION * ENGINES_PER_NODE;
    let starting = (0..REGIONS.len() * per_region).map(|index| async move {
        let region = index / per_region;
        let name = format!("gpu-{}-{}", REGIONS[region].0, index % per_region + 1);
        let any = "127.0.0.1:0";
        let (slots, step) = (SLOTS.to_string(), format!("{}ms", STEP.as_millis()));
        let arguments = [
            "sim", "engine", "--grpc", any, "--http", any, "--admin", any, "--model", MODEL,
            "--slots", &slots, "--step", &step,
        ];
        let process = Process::start(started, &name, dir, &arguments.map(str::to_owned)).await?;
        Ok(Engine { grpc: process.address("grpc")?, name, region, process })
    });
    futures_util::future::try_join_all(starting).await
}

/// Ways from each region to each node, and the relays they are made of.
fn ways() -> anyhow::Result<(Vec<Vec<Way>>, Vec<Relay>)> {
    let mut relays = Vec::new();
    let mut ways = Vec::new();
    for round_trips in ROUND_TRIPS_MS {
        let mut from_here = Vec::new();
        for node in 0..REGIONS.len() * NODES_PER_REGION {
            let round_trip = Duration::from_millis(round_trips[node / NODES_PER_REGION]);
            let [peers, gossip] = [Relay::bind(round_trip / 2)?, Relay::bind(round_trip / 2)?];
            from_here.push(Way {
                peers: peers.address()?,
                gossip: gossip.address()?,
                to_peers: peers.to(),
                to_gossip: gossip.to(),
            });
            relays.extend([peers, gossip]);
        }
        ways.push(from_here);
    }
    Ok((ways, relays))
}

fn node_name(index: usize) -> String {
    format!("{}-{}", REGIONS[index / NODES_PER_REGION].0, index % NODES_PER_REGION + 1)
}

async fn start_nodes(
    dir: &Path,
    started: &Started,
    engines: &[Engine],
    ways: &[Vec<Way>],
) -> anyhow::Result<Vec<Node>> {
    let ca = ca_dir(dir);
    // The first makes the authority, the others find it.
    let starting = (0..REGIONS.len() * NODES_PER_REGION).map(|index| {
        let ca = ca.clone();
        async move {
            let (name, region) = (node_name(index), index / NODES_PER_REGION);
            let first = index * ENGINES_PER_NODE;
            let own = &engines[first..first + ENGINES_PER_NODE];
            let file = dir.join(format!("{name}.toml"));
            fs::write(&file, config(index, own, &ways[region]))?;
            let (file, ca) = (text(&file)?, text(&ca)?);
            let arguments = ["node", "--config", &file, "--dev-ca", &ca];
            let process =
                Process::start(started, &name, dir, &arguments.map(str::to_owned)).await?;
            let (clients, metrics) = (process.address("clients")?, process.address("metrics")?);
            anyhow::Ok(Node { name, region, clients, metrics, process })
        }
    });
    futures_util::future::try_join_all(starting).await
}

fn config(index: usize, engines: &[Engine], ways: &[Way]) -> String {
    let (name, region) = (node_name(index), REGIONS[index / NODES_PER_REGION].0);
    let mut text = format!(
        "[node]\nname = \"{name}\"\nregion = \"{region}\"\n[listen]\nclients = \"127.0.0.1:0\"\npeers = \"127.0.0.1:0\"\n\
         gossip = \"127.0.0.1:0\"\nmetrics = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\n[mesh]\ntrust_domain = \"{TRUST_DOMAIN}\"\n"
    );
    for (other, way) in ways.iter().enumerate().filter(|(other, _)| *other != index) {
        let (name, region) = (node_name(other), REGIONS[other / NODES_PER_REGION].0);
        text.push_str(&format!(
            "[[mesh.peer]]\nname = \"{name}\"\nregion = \"{region}\"\npeers = \"{}\"\ngossip = \"{}\"\n",
            way.peers, way.gossip
        ));
    }
    for engine in engines {
        text.push_str(&format!(
            "[[engine]]\nname = \"{}\"\nurl = \"http://{}\"\nprotocol = \"kserve-v2\"\nmodels = [\"{MODEL}\"]\nslots = {SLOTS}\n",
            engine.name, engine.grpc
        ));
    }
    text
}

/// Where the development CA of a world in `dir` is.
pub(crate) fn ca_dir(dir: &Path) -> PathBuf {
    dir.join("ca")
}

fn text(path: &Path) -> anyhow::Result<String> {
    Ok(path.to_str().context("a directory whose name is not UTF-8")?.to_owned())
}

/// A page over HTTP/1.1.
async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let getting = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut page = String::new();
        stream.take(PAGE_BYTES_MAX).read_to_string(&mut page).await?;
        anyhow::Ok(page)
    };
    tokio::time::timeout(READY_WITHIN, getting).await.context("a page did not come in time")?
}
