//! A simulated inference server: three ports in front of one batch.
//!
//! ```text
//!   gRPC   h2c            KServe v2, health, reflection ─┐
//!   HTTP   1.1 and h2c    OpenAI, /health, /metrics ─────┼─> batch, prefix cache
//!   admin  1.1 and h2c    faults and figures ────────────┘
//! ```
//!
//! A hung engine answers nothing on the first two, calls already begun included; its connections stay open, as those of a
//! server whose GPU hangs do.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::HttpBody as _,
    extract::{Request, State},
    http,
    middleware::{self, Next},
    response::Response,
};
use base::ModelName;
use futures_util::StreamExt as _;
use http_body_util::{BodyStream, StreamBody};
use proto::{
    grpc::health::v1::health_server::HealthServer,
    inference::grpc_inference_service_server::GrpcInferenceServiceServer,
};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, service::Routes};
use tower::ServiceBuilder;
use transport::{Limits, Listener, Port, QuicKeys, Server, ServerTls, Worker};

use crate::{
    admin,
    batch::{STEP_MAX, STEP_MIN},
    gpu::Gpu,
    health::{self, Checks},
    kserve::{self, Kserve},
    openai, report,
};

/// Most tokens one request may ask for.
pub const TOKENS_MAX: u32 = 16_384;
/// Most slots, and most places in the queue.
pub const SLOTS_MAX: u32 = 65_536;
/// Most blocks the prefix cache may hold: some 100 MB.
pub const CACHE_BLOCKS_MAX: usize = 1 << 20;
/// Calls a client may have open at once on one HTTP/2 connection: a node sends all of its over one.
const H2_STREAMS: u32 = 1_024;
/// How long calls may take to finish after the engine was told to stop.
const FINISH_WITHIN: Duration = Duration::from_secs(2);
/// How long connections may then take to carry what ends them.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);

/// What an engine is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where gRPC is served. Port 0 takes any free one. Default 127.0.0.1:8001, as Triton's.
    pub grpc: SocketAddr,
    /// Where HTTP is served. Default 127.0.0.1:8000.
    pub http: SocketAddr,
    /// Where faults are injected, by anybody who can connect. Default 127.0.0.1:8002.
    pub admin: SocketAddr,
    /// The only model. Default `sim`.
    pub model: ModelName,
    /// Requests that run at once, 1 to [`SLOTS_MAX`]. Default 8. More slots make more tokens per second in all.
    pub slots: u32,
    /// Length of a step of an empty batch, 1 µs to 60 s; a full one takes twice as long. Below 1 ms tokens come in
    /// bursts, because timers are no finer. Default 20 ms: 25 tokens per second and request at full load.
    pub step: Duration,
    /// Requests that wait for a slot, at most [`SLOTS_MAX`]; beyond it calls are refused. `None`: a quarter of the slots,
    /// at least 1.
    pub queue: Option<u32>,
    /// Tokens of a prompt a request takes in per step, at least 1. Default 256.
    pub prefill_tokens_per_step: u32,
    /// Blocks of 16 tokens the prefix cache holds, at most [`CACHE_BLOCKS_MAX`]; 0 turns it off. Default 4,096.
    pub cache_blocks: usize,
    /// Tokens generated for a request that does not say how many, 1 to [`TOKENS_MAX`]. Default 64.
    pub max_tokens: u32,
}

impl Default for Config {
    #[expect(clippy::expect_used, reason = "a constant, and every test makes one")]
    fn default() -> Self {
        let port = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            grpc: port(8001),
            http: port(8000),
            admin: port(8002),
            model: "sim".parse().expect("three letters are a model's name"),
            slots: 8,
            step: Duration::from_millis(20),
            queue: None,
            prefill_tokens_per_step: 256,
            cache_blocks: 4_096,
            max_tokens: 64,
        }
    }
}

impl Config {
    fn check(&self) -> Result<(), EngineError> {
        let wrong = |key, rule: String| Err(EngineError::Config { key, rule });
        if !(1..=SLOTS_MAX).contains(&self.slots) {
            return wrong("slots", format!("1 to {SLOTS_MAX}"));
        }
        if self.queue.is_some_and(|queue| queue > SLOTS_MAX) {
            return wrong("queue", format!("0 to {SLOTS_MAX}"));
        }
        if !(STEP_MIN..=STEP_MAX).contains(&self.step) {
            return wrong("step", format!("{STEP_MIN:?} to {STEP_MAX:?}"));
        }
        if self.prefill_tokens_per_step == 0 {
            return wrong("prefill_tokens_per_step", "at least 1".to_owned());
        }
        if self.cache_blocks > CACHE_BLOCKS_MAX {
            return wrong("cache_blocks", format!("0 to {CACHE_BLOCKS_MAX}"));
        }
        if !(1..=TOKENS_MAX).contains(&self.max_tokens) {
            return wrong("max_tokens", format!("1 to {TOKENS_MAX}"));
        }
        Ok(())
    }
}

/// Where an engine really listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// gRPC.
    pub grpc: SocketAddr,
    /// HTTP.
    pub http: SocketAddr,
    /// Faults and figures.
    pub admin: SocketAddr,
}

/// Why an engine did not start. Nothing was begun.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Whoever wrote the configuration is at fault.
    #[error("{key} is {rule}")]
    Config {
        /// The field.
        key: &'static str,
        /// What it may be.
        rule: String,
    },
    /// A port cannot be bound, for instance because it is taken. It may be free later.
    #[error("cannot listen on {address} for {what}: {source}")]
    Bind {
        /// What the port is for.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// The built-in declarations of services are broken: a bug.
    #[error("cannot describe the services: {0}")]
    Reflection(Box<dyn std::error::Error + Send + Sync>),
}

/// How an engine ended.
#[derive(Debug)]
pub enum Ended {
    /// It was told to stop, and did.
    Stopped,
    /// It was told to die: the process should end at once, without a word to anybody.
    Died,
    /// Its sockets could not be used.
    Failed(io::Error),
}

/// An engine whose ports are bound.
#[derive(Debug)]
pub struct Engine {
    gpu: Arc<Gpu>,
    worker: Worker,
    grpc: Bound,
    http: Bound,
    admin: Bound,
}

impl Engine {
    /// Binds the ports. Calls are answered once [`Engine::run`] runs.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn start(config: &Config) -> Result<Self, EngineError> {
        config.check()?;
        let worker = Worker::new(0, 1, CancellationToken::new(), CancellationToken::new());
        let gpu = Arc::new(Gpu::new(config, worker.drain.clone()));
        let grpc = gated(grpc_router(&gpu)?, &gpu, kserve::stopped);
        let http = gated(openai::router(gpu.clone()), &gpu, openai::stopped);
        Ok(Self {
            grpc: Bound::new("gRPC", config.grpc, grpc)?,
            http: Bound::new("HTTP", config.http, http)?.with_http1(),
            admin: Bound::new("faults", config.admin, admin::router(gpu.clone()))?.with_http1(),
            gpu,
            worker,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        Addresses {
            grpc: self.grpc.listener.address(),
            http: self.http.listener.address(),
            admin: self.admin.listener.address(),
        }
    }

    /// Serves until `stop`, or until it is told to die, on the current-thread runtime that runs this.
    ///
    /// After `stop` calls have two seconds to finish; what is left is told that the server is stopping. A connection
    /// whose client reads nothing may outlast this: it ends with the runtime at the latest. So do connections when the
    /// engine dies, or the future is dropped.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Ended {
        let Self { gpu, worker, grpc, http, admin } = self;
        let serving = async {
            tokio::try_join!(grpc.serve(&worker), http.serve(&worker), admin.serve(&worker))
                .map(drop)
        };
        tokio::select! {
            biased;
            () = gpu.died.cancelled() => Ended::Died,
            never = gpu.drive() => match never {},
            ended = live(&gpu, &worker, serving, stop) => {
                ended.map_or_else(Ended::Failed, |()| Ended::Stopped)
            }
        }
    }
}

/// Serves, then drains, then gives up what is left.
async fn live(
    gpu: &Gpu,
    worker: &Worker,
    serving: impl Future<Output = io::Result<()>>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    tokio::pin!(serving);
    tokio::select! {
        () = stop => {}
        ended = serving.as_mut() => return ended,
    }
    worker.drain.cancel();
    serving.await?;
    // Whether they ended in time or not, the rest is the same.
    drop(tokio::time::timeout(FINISH_WITHIN, worker.finish(&[])).await);
    gpu.close();
    drop(tokio::time::timeout(CLOSE_WITHIN, worker.finish(&[])).await);
    Ok(())
}

/// A port that is bound, and what it serves.
#[derive(Debug)]
struct Bound {
    listener: Listener,
    port: Port,
    router: Router,
    http1: bool,
}

impl Bound {
    fn new(what: &'static str, address: SocketAddr, router: Router) -> Result<Self, EngineError> {
        let failed = |source| EngineError::Bind { what, address, source };
        let mut listener = Listener::bind(address, 1, false).map_err(failed)?;
        let port = listener.port(0).ok_or_else(|| failed(io::Error::other("it has no share")))?;
        Ok(Self { listener, port, router, http1: false })
    }

    fn with_http1(self) -> Self {
        Self { http1: true, ..self }
    }

    /// Serves until the worker drains.
    async fn serve(self, worker: &Worker) -> io::Result<()> {
        let service = ServiceBuilder::new()
            .map_request(|request: http::Request<Body>| request.map(axum::body::Body::new))
            .map_response(|response: Response| response.map(Body::new))
            .service(self.router);
        let (limits, keys) = (limits(), QuicKeys::random());
        let server = Server::new(limits, ServerTls::Plaintext, keys, service, 0);
        let server = if self.http1 { server.with_http1() } else { server };
        let accepting = self.listener.accept(worker.drain.clone());
        tokio::try_join!(server.serve(worker.clone(), self.port), accepting).map(drop)
    }
}

/// Anybody may connect, and nodes do: they carry many calls at once, whose headers have grown on the way.
fn limits() -> Limits {
    let header_section_bytes = Limits::peers().header_section_bytes;
    Limits { h2_streams: H2_STREAMS, header_section_bytes, ..Limits::clients() }
}

fn grpc_router(gpu: &Arc<Gpu>) -> Result<Router, EngineError> {
    let descriptors =
        health::descriptors().map_err(|error| EngineError::Reflection(error.into()))?;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_file_descriptor_set(descriptors.clone())
            // It is among the descriptors.
            .include_reflection_service(false)
    };
    let broken = |error: tonic_reflection::server::Error| EngineError::Reflection(error.into());
    let routes = Routes::default()
        .add_service(GrpcInferenceServiceServer::new(Kserve(gpu.clone())))
        .add_service(HealthServer::new(Checks(gpu.clone())))
        .add_service(reflection().build_v1().map_err(broken)?)
        .add_service(reflection().build_v1alpha().map_err(broken)?);
    let reporting = middleware::from_fn_with_state(gpu.clone(), report::add);
    Ok(routes.into_axum_router().layer(reporting))
}

/// How a port says that the server stops.
type Stopped = fn() -> Response;

/// The router of a port that is silent while the engine hangs.
fn gated(router: Router, gpu: &Arc<Gpu>, stopped: Stopped) -> Router {
    router.layer(middleware::from_fn_with_state((gpu.clone(), stopped), gate))
}

async fn gate(
    State((gpu, stopped)): State<(Arc<Gpu>, Stopped)>,
    request: Request,
    next: Next,
) -> Response {
    let answering = async {
        // That it closes while it hangs is said below.
        drop(gpu.awake().await);
        let response = next.run(request).await;
        drop(gpu.awake().await);
        response
    };
    tokio::select! {
        biased;
        () = gpu.closed.cancelled() => stopped(),
        response = answering => response.map(|body| held_back(body, gpu.clone())),
    }
}

/// A body each piece of which waits until the engine does not hang, or closes. One of known length is there as a whole.
fn held_back(body: axum::body::Body, gpu: Arc<Gpu>) -> axum::body::Body {
    if body.size_hint().exact().is_some() {
        return body;
    }
    let frames = BodyStream::new(body).then(move |frame| {
        let gpu = gpu.clone();
        async move {
            drop(gpu.awake().await);
            frame
        }
    });
    axum::body::Body::new(StreamBody::new(frames))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_is_refused_with_the_allowed_ones() {
        let wrong = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert!(Config::default().check().is_ok());
        assert_eq!(wrong(|config| config.slots = 0), "slots is 1 to 65536");
        assert_eq!(wrong(|config| config.queue = Some(1 << 20)), "queue is 0 to 65536");
        assert_eq!(wrong(|config| config.step = Duration::ZERO), "step is 1µs to 60s");
        let prefill = wrong(|config| config.prefill_tokens_per_step = 0);
        assert_eq!(prefill, "prefill_tokens_per_step is at least 1");
        let blocks = wrong(|config| config.cache_blocks = usize::MAX);
        assert_eq!(blocks, "cache_blocks is 0 to 1048576");
        assert_eq!(wrong(|config| config.max_tokens = 0), "max_tokens is 1 to 16384");
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let http = taken.local_addr().unwrap();
        let config = Config { grpc: any, http, admin: any, ..Config::default() };
        let error = Engine::start(&config).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot listen on {http} for HTTP")), "{error}");
    }
}
