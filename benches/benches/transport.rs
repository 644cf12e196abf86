//! What does a call between two nodes cost over HTTP/3 against HTTP/2 with TLS? CPU per call, client and server together.
//!
//! `cargo bench -p benches --bench transport`. Server and client are processes of their own on one thread each; runs of
//! both transports alternate, and the medians and their ratio are printed. Loopback flatters TCP: it loses nothing.
#![expect(clippy::print_stdout, reason = "the table is the result")]

use std::{
    convert::Infallible,
    io::{BufRead as _, BufReader},
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
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use identity::{DevCa, ExpectedPeer, Identity};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use transport::{
    Channel, Dialer, Limits, Listener, PeerTls, Pool, QuicKeys, Server, ServerTls, Target, Worker,
};

const ROUNDS: usize = 7;
const CASES: [Case; 5] = [
    Case { what: "64 B unary, 1 at a time", bytes: 64, messages: 1, at_once: 1, calls: 4_000 },
    Case { what: "64 B unary, 16 at a time", bytes: 64, messages: 1, at_once: 16, calls: 12_000 },
    Case { what: "64 B unary, 64 at a time", bytes: 64, messages: 1, at_once: 64, calls: 16_000 },
    Case { what: "4 KiB unary, 16 at a time", bytes: 4096, messages: 1, at_once: 16, calls: 8_000 },
    Case {
        what: "200-token streams, 16 at a time",
        bytes: 24,
        messages: 200,
        at_once: 16,
        calls: 160,
    },
];

struct Case {
    what: &'static str,
    bytes: usize,
    messages: usize,
    at_once: usize,
    calls: usize,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("serve") => {
            let (dir, way) = (arguments.get(2).context("no directory")?, arguments.get(3));
            runtime()?.block_on(serve(dir, way.map(String::as_str) == Some("h3")))
        }
        _ => measure(),
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn worker() -> Worker {
    Worker::new(0, 1, CancellationToken::new(), CancellationToken::new())
}

fn identity(dir: &str, name: &str) -> anyhow::Result<Identity> {
    let ca = DevCa::open_or_create(dir.as_ref(), &"bench.example".parse()?, clock::wall())?;
    let node = ca.node(&"bench".parse()?, &name.parse()?, &[], clock::wall())?;
    Ok(Identity::new(node))
}

/// Answers a call with its own first message, as often as the header `x-messages` says.
#[derive(Clone)]
struct Answer;

impl tower::Service<Request<Body>> for Answer {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(async move {
            let messages = request
                .headers()
                .get("x-messages")
                .and_then(|value| value.to_str().ok()?.parse().ok())
                .unwrap_or(1);
            let data = request.into_body().collect().await.map(|body| body.to_bytes());
            let body = Tokens {
                data: data.unwrap_or_default(),
                left: messages,
                yielded: messages == 1,
                ended: false,
            };
            let mut response = Response::new(Body::new(body));
            let grpc = http::HeaderValue::from_static("application/grpc");
            response.headers_mut().insert("content-type", grpc);
            Ok(response)
        })
    }
}

/// One message at a time, each in a turn of its own, as an engine produces tokens.
struct Tokens {
    data: Bytes,
    left: usize,
    yielded: bool,
    ended: bool,
}

impl http_body::Body for Tokens {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, tonic::Status>>> {
        if self.left > 0 {
            // Tokens never come all at once: after each, others have their turn.
            if !std::mem::replace(&mut self.yielded, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.yielded = false;
            self.left -= 1;
            return Poll::Ready(Some(Ok(http_body::Frame::data(self.data.clone()))));
        }
        if std::mem::replace(&mut self.ended, true) {
            return Poll::Ready(None);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
        Poll::Ready(Some(Ok(http_body::Frame::trailers(trailers))))
    }
}

async fn serve(dir: &str, quic: bool) -> anyhow::Result<()> {
    let tls = identity(dir, "server")?.peer_server_config(&[])?;
    let mut listener = Listener::bind("127.0.0.1:0".parse()?, 1, quic)?;
    let port = listener.port(0).context("no port")?;
    println!("{}", listener.address());
    let server =
        Server::new(Limits::peers(), ServerTls::Tls(Box::new(tls)), QuicKeys::random(), Answer, 1);
    let worker = worker();
    let (served, accepted) =
        tokio::join!(server.serve(worker.clone(), port), listener.accept(worker.drain.clone()));
    served?;
    Ok(accepted?)
}

/// A server process, killed when dropped.
struct Served(Child, String);

impl Drop for Served {
    fn drop(&mut self) {
        // It is ours and may be gone already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start(dir: &str, way: &str) -> anyhow::Result<Served> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", dir, way])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut address = String::new();
    let out = child.stdout.take().context("no output")?;
    BufReader::new(out).read_line(&mut address)?;
    Ok(Served(child, address.trim().to_owned()))
}

fn measure() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path().to_str().context("the temporary directory is not UTF-8")?;
    identity(dir, "server")?;
    let servers = [start(dir, "h3")?, start(dir, "h2")?];
    let runtime = runtime()?;
    println!("| calls | h3 CPU µs | h2+TLS CPU µs | CPU h3/h2 | h3 wall µs | h2 wall µs |");
    println!("|---|---|---|---|---|---|");
    for case in &CASES {
        let mut figures: [Vec<(f64, f64)>; 2] = [vec![], vec![]];
        for round in 0..=ROUNDS {
            for (way, server) in servers.iter().enumerate() {
                let figure = runtime.block_on(run(dir, server, case))?;
                // The first round opens connections and warms caches.
                if round > 0 {
                    figures[way].push(figure);
                }
            }
        }
        let median = |way: usize, pick: fn(&(f64, f64)) -> f64| {
            benches::median(figures[way].iter().map(pick).collect())
        };
        let (h3, h2) = (median(0, |f| f.0), median(1, |f| f.0));
        let (h3_wall, h2_wall) = (median(0, |f| f.1), median(1, |f| f.1));
        println!(
            "| {} | {h3:.1} | {h2:.1} | {:.2} | {h3_wall:.1} | {h2_wall:.1} |",
            case.what,
            h3 / h2
        );
    }
    Ok(())
}

/// CPU and wall time per call in microseconds, client and server together.
async fn run(dir: &str, server: &Served, case: &Case) -> anyhow::Result<(f64, f64)> {
    let worker = worker();
    let pool = Pool::new(Dialer::new(&worker, &QuicKeys::random(), Limits::peers())?);
    let expect = ExpectedPeer { region: "bench".parse()?, name: "server".parse()? };
    let tls = PeerTls::new(identity(dir, "client")?.peer_client_config(&[], expect)?);
    let channel = pool.channel(Target::peer("server", server.1.parse()?, tls));
    call(&channel, case).await?;

    let cpu = || -> anyhow::Result<Duration> {
        Ok(benches::cpu_of(std::process::id())? + benches::cpu_of(server.0.id())?)
    };
    let (cpu_before, wall_before) = (cpu()?, clock::now());
    let left = Arc::new(AtomicUsize::new(case.calls));
    let callers = (0..case.at_once).map(|_| {
        let (left, channel) = (left.clone(), channel.clone());
        async move {
            let next =
                || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            while next().is_ok() {
                call(&channel, case).await?;
            }
            anyhow::Ok(())
        }
    });
    let mut callers: Vec<_> = callers.map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        let mut index = 0;
        while index < callers.len() {
            match callers[index].as_mut().poll(cx) {
                Poll::Ready(Ok(())) => drop(callers.swap_remove(index)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => index += 1,
            }
        }
        if callers.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await?;
    let per_call = |time: Duration| time.as_secs_f64() * 1e6 / case.calls as f64;
    let figures = (per_call(cpu()? - cpu_before), per_call(clock::now() - wall_before));
    pool.close();
    worker.outgoing.close();
    worker.outgoing.wait().await;
    Ok(figures)
}

/// One call, its reply checked.
async fn call(channel: &Channel, case: &Case) -> anyhow::Result<()> {
    let request = Request::post("/bench.Bench/Echo")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("x-messages", case.messages)
        .body(Body::new(Full::new(Bytes::from(vec![1; case.bytes]))))?;
    let body = channel.send(request).await?.into_body().collect().await?;
    let status = body.trailers().and_then(|trailers| trailers.get("grpc-status"));
    anyhow::ensure!(status.is_some_and(|status| status == "0"), "no status");
    anyhow::ensure!(body.to_bytes().len() == case.bytes * case.messages, "wrong length");
    Ok(())
}
