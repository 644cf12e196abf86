//! `isobar demo`: a mesh of three regions on this machine, the same calls with and without it.
//!
//! ```text
//!   20 s   every region's clients call the engines of their region in turn: some drown while others idle
//!   20 s   the same calls go to the nodes of the region; an engine is killed on the way, then a node
//! ```

mod picture;
mod relay;
mod screen;
mod traffic;
mod world;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use base::clock;
use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};

use self::{
    screen::{Line, Screen},
    traffic::{Arrival, Done, Figures, Server},
    world::{ENGINES_PER_NODE, NODES_PER_REGION, REGIONS, Started, World},
};
use crate::{
    Failure,
    load::Clockwork,
    log, output,
    target::{Caller, Whom},
};

/// How long calls are made in each arm.
const ARM: Duration = Duration::from_secs(20);
/// When an engine and a node are killed in the second.
const ENGINE_DIES: Duration = Duration::from_secs(7);
const NODE_DIES: Duration = Duration::from_secs(13);
/// Which: the node is the one before the engine, so that two engines are lost in all.
const VICTIM_NODE: usize = 0;
const VICTIM_ENGINE: usize = VICTIM_NODE * ENGINES_PER_NODE;
/// Calls that are due at once and made in one go.
const DUE_AT_ONCE: usize = 64;
/// How often the table is drawn.
const DRAWN_EVERY: Duration = Duration::from_millis(250);
/// How often a frame is recorded, and a line logged.
const RECORDED_EVERY: Duration = Duration::from_secs(1);
const LOGGED_EVERY: Duration = Duration::from_secs(5);
/// Share of busy answers below which the first arm shows nothing.
const BUSY_MIN: f64 = 0.05;

/// Options of `isobar demo`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// End after the summary; without it the mesh keeps running, where a terminal watches, until Ctrl-C
    #[arg(long)]
    once: bool,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
    /// Where the random arrivals begin
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Record what is shown as a picture, an SVG
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

/// What was killed.
#[derive(Clone, Debug)]
struct Killed {
    engine: String,
    node: String,
    /// Calls, all of which may run twice, that failed since.
    failed_calls: u64,
}

/// One way to make the calls, in progress.
#[derive(Debug)]
struct Arm {
    what: &'static str,
    start: Instant,
    regions: Vec<Figures>,
    events: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    log::to_stderr(tracing::Level::ERROR, false)?;
    if let Some(file) = &options.record {
        // What is there stays until there is something better.
        let open = fs::File::options().create(true).append(true).open(file);
        open.with_context(|| format!("cannot write {}", file.display())).map_err(Failure::Usage)?;
    }
    raise_files();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make a runtime")?;
    runtime.block_on(async {
        let mut stop = Stop::new()?;
        let dir = tempfile::Builder::new().prefix("isobar-demo-").tempdir()?;
        let mut demo = Demo::new(options, dir.path());
        let shown = tokio::select! {
            shown = demo.show() => Some(shown),
            () = stop.asked() => None,
        };
        if let Some(Ok(Shown { goes_on: true })) = &shown {
            stop.asked().await;
        }
        demo.started.stop().await;
        dir.close().context("the directory of the demo cannot be removed")?;
        match shown {
            Some(shown) => shown.map(drop),
            None => Err(anyhow::anyhow!("stopped; nothing was left behind").into()),
        }
    })
}

/// Eighteen processes and their relays need more than some shells allow by default; nodes inherit it.
fn raise_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit on open files stays as it is");
    }
}

/// Being told to stop.
struct Stop([Signal; 3]);

impl Stop {
    fn new() -> anyhow::Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    async fn asked(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// What a demo came to, when it showed what it is for.
struct Shown {
    /// Whether the mesh keeps running.
    goes_on: bool,
}

struct Demo<'a> {
    options: &'a Options,
    dir: &'a Path,
    started: Started,
    screen: Screen,
    frames: Vec<Vec<Line>>,
}

impl<'a> Demo<'a> {
    fn new(options: &'a Options, dir: &'a Path) -> Self {
        let (started, screen) = (Started::default(), Screen::new());
        Self { options, dir, started, screen, frames: Vec::new() }
    }

    async fn show(&mut self) -> Result<Shown, Failure> {
        self.screen.log("starting 12 engines and 6 nodes");
        let world = World::start(self.dir, &self.started).await?;
        let ca = world::ca_dir(self.dir).join("ca.pem");
        let caller = Caller::new()?;
        let arrivals = traffic::arrivals(self.options.seed, ARM);
        let straight = straight(&world, &caller)?;
        let nodes = through_nodes(&world, &caller, &ca)?;
        let (direct, _) = self.arm("straight to the engines", &arrivals, &straight, None).await?;
        let (mesh, killed) = self.arm("through the mesh", &arrivals, &nodes, Some(&world)).await?;
        let killed = killed.context("nothing was killed")?;
        caller.close().await;
        self.tell(&direct, &mesh, &killed)?;
        verdict(&direct, &mesh, &killed)?;
        let goes_on = !self.options.once && self.screen.is_terminal() && !self.options.json;
        if goes_on {
            output::text(&go_on(&world, &ca))?;
        }
        Ok(Shown { goes_on })
    }

    /// Makes the calls one way.
    async fn arm(
        &mut self,
        what: &'static str,
        arrivals: &[Arrival],
        servers: &[Vec<Server>],
        world: Option<&World>,
    ) -> Result<(Figures, Option<Killed>), Failure> {
        let start = clock::now() + Duration::from_millis(100);
        let regions = vec![Figures::default(); REGIONS.len()];
        let mut arm = Arm { what, start, regions, events: Vec::new() };
        let mut killer = world.map(Killer::new);
        let due: Vec<Instant> = arrivals.iter().map(|arrival| start + arrival.at).collect();
        let mut clockwork = Clockwork::start(due.into_iter())?;
        let mut came = Vec::new();
        let mut next = arrivals.iter();
        let mut turns = vec![0; REGIONS.len()];
        let mut calls: JoinSet<Done> = JoinSet::new();
        let mut drawing = tokio::time::interval(DRAWN_EVERY);
        let (mut recorded, mut logged) = (start, start + LOGGED_EVERY);
        let mut more = true;
        while more || !calls.is_empty() {
            tokio::select! {
                is_more = clockwork.next(&mut came, DUE_AT_ONCE), if more => {
                    more = is_more;
                    for (due, arrival) in came.drain(..).zip(&mut next) {
                        let turn = &mut turns[arrival.region];
                        *turn += 1;
                        arm.regions[arrival.region].began();
                        let order = order(&servers[arrival.region], *turn);
                        calls.spawn(traffic::call(*arrival, due, order));
                    }
                }
                Some(done) = calls.join_next() => {
                    let done = done.context("a call panicked")?;
                    arm.regions[done.region].ended(&done);
                    if let Some(killer) = &mut killer {
                        killer.ended(&done);
                    }
                }
                _ = drawing.tick() => {
                    let now = clock::now();
                    if let Some(killer) = &mut killer {
                        arm.events.extend(killer.act(now.saturating_duration_since(start))?);
                    }
                    self.draw(&mut arm, now, &mut recorded, &mut logged);
                }
            }
        }
        let mut all = Figures::default();
        for figures in &arm.regions {
            all.add(figures);
        }
        Ok((all, killer.map(|killer| killer.killed)))
    }

    fn draw(&mut self, arm: &mut Arm, now: Instant, recorded: &mut Instant, logged: &mut Instant) {
        let lines = screen::table(arm, now, ARM);
        self.screen.draw(&lines);
        if now >= *logged {
            *logged += LOGGED_EVERY;
            for Line(_, text) in lines.iter().skip(2).filter(|line| !line.1.is_empty()) {
                self.screen.log(text);
            }
        }
        if self.options.record.is_some() && now >= *recorded {
            *recorded += RECORDED_EVERY;
            self.frames.push(lines);
        }
    }

    /// Says what came of it.
    fn tell(&mut self, direct: &Figures, mesh: &Figures, killed: &Killed) -> anyhow::Result<()> {
        let lines = screen::summary(direct, mesh, killed);
        if let Some(file) = &self.options.record {
            self.frames.push(lines.clone());
            fs::write(file, picture::svg(&self.frames))
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        if self.options.json {
            output::json_line(&result(direct, mesh, killed))?;
            return Ok(());
        }
        self.screen.draw(&[]);
        self.screen.keep();
        let texts: Vec<&str> = lines.iter().map(|Line(_, text)| text.as_str()).collect();
        output::text(&texts.join("\n"))?;
        Ok(())
    }
}

/// The servers in the order a client tries them: in turn.
fn order(servers: &[Server], turn: usize) -> Vec<Server> {
    let first = turn % servers.len();
    servers[first..].iter().chain(&servers[..first]).cloned().collect()
}

/// The engines of each region.
fn straight(world: &World, caller: &Caller) -> anyhow::Result<Vec<Vec<Server>>> {
    let mut servers = vec![Vec::new(); REGIONS.len()];
    for (index, engine) in world.engines.iter().enumerate() {
        let whom = Whom::plaintext(&engine.grpc.to_string())?;
        let channel = caller.channel(&whom, index);
        servers[engine.region].push(Server { channel, node: None });
    }
    Ok(servers)
}

/// The nodes of each region.
fn through_nodes(world: &World, caller: &Caller, ca: &Path) -> anyhow::Result<Vec<Vec<Server>>> {
    let mut servers = vec![Vec::new(); REGIONS.len()];
    for (index, node) in world.nodes.iter().enumerate() {
        let whom = Whom::h2(&node.clients.to_string(), ca)?;
        let channel = caller.channel(&whom, world.engines.len() + index);
        let name = format!("{}.{}", node.name, REGIONS[node.region].0);
        servers[node.region].push(Server { channel, node: Some(name) });
    }
    Ok(servers)
}

/// Kills an engine and a node when their time has come.
#[derive(Debug)]
struct Killer<'a> {
    world: &'a World,
    killed: Killed,
    engine_is_dead: bool,
    node_is_dead: bool,
}

impl<'a> Killer<'a> {
    fn new(world: &'a World) -> Self {
        let node = world.nodes[VICTIM_NODE].name.clone();
        let engine = format!("{node}/{}", world.engines[VICTIM_ENGINE].name);
        let killed = Killed { engine, node, failed_calls: 0 };
        Self { world, killed, engine_is_dead: false, node_is_dead: false }
    }

    /// Kills whose time has come; says so.
    fn act(&mut self, passed: Duration) -> anyhow::Result<Option<String>> {
        if passed >= ENGINE_DIES && !self.engine_is_dead {
            self.engine_is_dead = true;
            self.world.kill_engine(VICTIM_ENGINE)?;
            return Ok(Some(format!("engine {} was killed", self.killed.engine)));
        }
        if passed >= NODE_DIES && !self.node_is_dead {
            self.node_is_dead = true;
            self.world.kill_node(VICTIM_NODE)?;
            return Ok(Some(format!("node {} was killed", self.killed.node)));
        }
        Ok(None)
    }

    fn ended(&mut self, done: &Done) {
        let is_failed = self.engine_is_dead && done.class == traffic::Class::Failed;
        self.killed.failed_calls += u64::from(is_failed);
    }
}

fn result(direct: &Figures, mesh: &Figures, killed: &Killed) -> Value {
    let nodes = REGIONS.len() * NODES_PER_REGION;
    let quantile = |figures: &Figures, q| figures.first_token.quantile_s(q);
    json!({
        "nodes": nodes,
        "regions": REGIONS.len(),
        "engines": nodes * ENGINES_PER_NODE,
        "direct": {
            "calls": direct.calls,
            "ok": direct.ok,
            "busy": direct.busy,
            "failed": direct.failed + direct.cut,
            "ttft_p50_s": quantile(direct, 0.5),
            "ttft_p99_s": quantile(direct, 0.99),
        },
        "mesh": {
            "calls": mesh.calls,
            "ok": mesh.ok,
            "busy": mesh.busy,
            "failed": mesh.failed,
            "forwarded": mesh.forwarded,
            "streams_cut": mesh.cut,
            "ttft_p50_s": quantile(mesh, 0.5),
            "ttft_p99_s": quantile(mesh, 0.99),
        },
        "killed": {
            "engine": killed.engine,
            "node": killed.node,
            "failed_calls": killed.failed_calls,
        },
    })
}

/// Whether it showed what it is for.
fn verdict(direct: &Figures, mesh: &Figures, killed: &Killed) -> Result<(), Failure> {
    let (before, after) = (direct.busy_share(), mesh.busy_share());
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let why = if before < BUSY_MIN {
        format!(
            "the load is too small: straight to the engines only {} of the calls were refused, not {}",
            percent(before),
            percent(BUSY_MIN)
        )
    } else if after >= before / 10.0 {
        format!("the mesh refused {}, more than a tenth of {}", percent(after), percent(before))
    } else if killed.failed_calls > 0 {
        format!("{} calls failed that should have been tried elsewhere", killed.failed_calls)
    } else {
        return Ok(());
    };
    Err(anyhow::anyhow!(why).into())
}

/// How to go on by hand.
fn go_on(world: &World, ca: &Path) -> String {
    let program = std::env::args().next().unwrap_or_else(|| "isobar".to_owned());
    let alive = world.nodes.iter().enumerate().filter(|(index, _)| *index != VICTIM_NODE);
    let nodes: Vec<String> =
        alive.map(|(_, node)| format!("  {}   {}", node.name, node.clients)).collect();
    let address = world.nodes[VICTIM_NODE + 1].clients;
    let ca = ca.display();
    format!(
        "\nThe mesh keeps running; Ctrl-C ends it. Its nodes, for clients with TLS that believe {ca}:\n{}\n\
         Try, in another terminal:\n  {program} call {address} --ca {ca}\n  \
         {program} call {address} --ca {ca} inference.GRPCInferenceService/ModelInfer -d '{}'\n  \
         {program} bench {address} --ca {ca} --h3 inference.GRPCInferenceService/ModelReady -d '{{\"name\": \"demo\"}}' --rate 100",
        nodes.join("\n"),
        r#"{"model_name": "demo", "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": ["aGVsbG8="]}}]}"#,
    )
}
