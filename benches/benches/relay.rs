//! What does a node cost a call? CPU per call of each node on the way, for the two ways a call can go.
//!
//! `cargo bench -p benches --bench relay`. Client, nodes and engine are processes of their own, so each one's processor
//! time is its own. "one node": client, h2 with TLS, node, h2c, engine. "two nodes": client, h2 with TLS, node a, h3 on
//! QUIC with mutual TLS, node b, h2c, engine. Runs of both alternate; medians are printed.
#![expect(clippy::print_stdout, reason = "the table is the result")]

use std::{
    convert::Infallible,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use base::clock;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full};
use identity::{ClientFacing, DevCa, ExpectedPeer, Identity};
use node::{ClientCertificate, Credentials, Node, config::Config};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use transport::{
    Channel, Dialer, Limits, Listener, PeerTls, Pool, QuicKeys, Server, ServerTls, Target, Worker,
};

const ROUNDS: usize = 5;
const AT_ONCE: usize = 16;
const CALLS: usize = 8_000;
const BYTES: usize = 64;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments.iter().skip(1).map(String::as_str).collect::<Vec<_>>()[..] {
        ["engine"] => runtime.block_on(engine()),
        ["node", dir, name] => runtime.block_on(run_node(Path::new(dir), name)),
        _ => measure(&runtime),
    }
}

fn worker() -> Worker {
    Worker::new(0, 1, CancellationToken::new(), CancellationToken::new())
}

fn identity(dir: &Path, name: &str) -> anyhow::Result<Identity> {
    let ca = DevCa::open_or_create(&dir.join("ca"), &"bench.example".parse()?, clock::wall())?;
    let node = ca.node(&"bench".parse()?, &name.parse()?, &[], clock::wall())?;
    Ok(Identity::new(node))
}

/// Echoes a call and ends it with OK.
#[derive(Clone)]
struct Echo;

impl tower::Service<Request<Body>> for Echo {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(async move {
            let body = request.into_body().with_trailers(async {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                Some(Ok(trailers))
            });
            let mut response = Response::new(Body::new(body));
            let grpc = HeaderValue::from_static("application/grpc");
            response.headers_mut().insert("content-type", grpc);
            Ok(response)
        })
    }
}

async fn engine() -> anyhow::Result<()> {
    let mut listener = Listener::bind("127.0.0.1:0".parse()?, 1, false)?;
    let port = listener.port(0).context("no port")?;
    println!("{}", listener.address());
    let limits = Limits::peers();
    let server = Server::new(limits, ServerTls::Plaintext, QuicKeys::random(), Echo, 1);
    let worker = worker();
    let (served, accepted) =
        tokio::join!(server.serve(worker.clone(), port), listener.accept(worker.drain.clone()));
    served?;
    Ok(accepted?)
}

async fn run_node(dir: &Path, name: &str) -> anyhow::Result<()> {
    let mut config = Config::load(&dir.join(format!("{name}.toml")), &[])?;
    config.open_for_development();
    let identity = identity(dir, name)?;
    let shown = ClientFacing::Mesh(identity.clone());
    let certificate = ClientCertificate { shown, files: None };
    let credentials = Credentials { identity, certificate, signer: None, is_fixed: true };
    let node = Node::start(&config, credentials).await?;
    let addresses = node.addresses();
    println!("{} {} {}", addresses.clients, addresses.peers, addresses.gossip);
    std::future::pending().await
}

/// A process of this program, killed when dropped, and the first line it printed.
struct Started(Child, String);

impl Started {
    fn new(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().context("no output")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        Ok(Self(child, line.trim().to_owned()))
    }

    /// What a node printed: for clients, for peers, for gossip.
    fn addresses(&self) -> anyhow::Result<[&str; 3]> {
        let addresses: Vec<_> = self.1.split(' ').collect();
        addresses.try_into().map_err(|_| anyhow::anyhow!("a node printed {:?}", self.1))
    }

    fn cpu(&self) -> anyhow::Result<Duration> {
        benches::cpu_of(self.0.id())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It is ours and may be gone already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start_node(dir: &Path, name: &str, more: &str) -> anyhow::Result<Started> {
    let any = "\"127.0.0.1:0\"";
    let config = format!(
        "[node]\nname = \"{name}\"\nregion = \"bench\"\n[listen]\nclients = {any}\npeers = {any}\ngossip = {any}\nmetrics = {any}\nadmin = {any}\n\
         [mesh]\ntrust_domain = \"bench.example\"\n{more}"
    );
    fs::write(dir.join(format!("{name}.toml")), config)?;
    Started::new(&["node", dir.to_str().context("the directory is not UTF-8")?, name])
}

fn measure(runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    identity(dir, "client")?;
    let engine = Started::new(&["engine"])?;
    let engine_key = format!(
        "[[engine]]\nname = \"echo\"\nurl = \"http://{}\"\nprotocol = \"grpc\"\n",
        engine.1
    );
    let b = start_node(dir, "b", &engine_key)?;
    let [b_clients, b_peers, b_gossip] = b.addresses()?;
    let peer = format!(
        "[[mesh.peer]]\nname = \"b\"\nregion = \"bench\"\npeers = \"{b_peers}\"\ngossip = \"{b_gossip}\"\n"
    );
    let a = start_node(dir, "a", &peer)?;
    let [a_clients, ..] = a.addresses()?;

    let ways =
        [("one node", "b", b_clients, vec![&b]), ("two nodes", "a", a_clients, vec![&a, &b])];
    let mut figures = vec![Vec::new(); ways.len()];
    for round in 0..=ROUNDS {
        for (index, (_, name, address, nodes)) in ways.iter().enumerate() {
            let before = nodes.iter().map(|n| n.cpu()).collect::<anyhow::Result<Vec<_>>>()?;
            let wall = runtime.block_on(run(dir, name, address))?;
            let after = nodes.iter().map(|n| n.cpu()).collect::<anyhow::Result<Vec<_>>>()?;
            // The first round opens connections and warms caches.
            if round > 0 {
                let cpu = after.iter().zip(before).map(|(after, before)| per_call(*after - before));
                figures[index].push((cpu.collect::<Vec<_>>(), per_call(wall)));
            }
        }
    }
    println!("| way | node CPU µs per call | wall µs per call |");
    println!("|---|---|---|");
    for ((what, _, _, nodes), figures) in ways.iter().zip(&figures) {
        let cpu: Vec<String> = (0..nodes.len())
            .map(|node| {
                let figures = figures.iter().map(|(cpu, _)| cpu[node]).collect();
                format!("{:.1}", benches::median(figures))
            })
            .collect();
        let wall = benches::median(figures.iter().map(|(_, wall)| *wall).collect());
        println!("| {what} | {} | {wall:.1} |", cpu.join(" + "));
    }
    Ok(())
}

fn per_call(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6 / CALLS as f64
}

/// Wall time of all calls. The client is a peer of the node it calls only in name: it uses the port for clients.
async fn run(dir: &Path, name: &str, address: &str) -> anyhow::Result<Duration> {
    let worker = worker();
    // Clients with QUIC would take h3; the figure is for h2, which is what clients speak today.
    let limits = Limits { tcp_race_after: Duration::ZERO, ..Limits::peers() };
    let pool = Pool::new(Dialer::new(&worker, &QuicKeys::random(), limits)?);
    let expect = ExpectedPeer { region: "bench".parse()?, name: name.parse()? };
    let tls = PeerTls::new(identity(dir, "client")?.peer_client_config(&[], expect)?);
    let channel = pool.channel(Target::peer(name, address.parse()?, tls));
    call(&channel).await?;
    let left = Arc::new(AtomicUsize::new(CALLS));
    let started = clock::now();
    let mut callers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (left, channel) = (left.clone(), channel.clone());
        callers.spawn(async move {
            let next =
                || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            while next().is_ok() {
                call(&channel).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = callers.join_next().await {
        done??;
    }
    let wall = clock::now() - started;
    pool.close();
    worker.outgoing.close();
    worker.outgoing.wait().await;
    Ok(wall)
}

/// One call, its reply checked.
async fn call(channel: &Channel) -> anyhow::Result<()> {
    let request = Request::post("/bench.Bench/Echo")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Full::new(Bytes::from(vec![1; BYTES]))))?;
    let reply = channel.send(request).await?;
    // A reply that is only a head is a refusal.
    let head = reply.headers().clone();
    let body = reply.into_body().collect().await?;
    let end = body.trailers().unwrap_or(&head);
    anyhow::ensure!(end.get("grpc-status").is_some_and(|status| status == "0"), "{end:?}");
    anyhow::ensure!(body.to_bytes().len() == BYTES, "wrong length");
    Ok(())
}
