//! What is written down of a call: counts and latencies for everybody, a line in the access log for a sample.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::Instant,
};

use base::{TenantName, clock};
use http::{HeaderMap, Request};
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;
use tonic::{Code, body::Body};
use transport::{
    CallInfo, Protocol,
    grpc::{self, End},
};

use crate::metrics::{Metrics, Side};

/// Lines that wait to be written; beyond it lines are dropped and counted, so that a full pipe delays no call.
const LINES_MAX: usize = 4096;

/// The access log of a node. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct AccessLog(Option<Arc<Sampler>>);

#[derive(Debug)]
struct Sampler {
    share: f64,
    rng: Mutex<StdRng>,
    lines: SyncSender<String>,
    dropped: AtomicU64,
}

/// Writes lines until every [`AccessLog`] is gone.
#[derive(Debug)]
pub(crate) struct LogWriter(Option<JoinHandle<()>>);

impl LogWriter {
    /// Waits until everything is written. Blocks.
    pub(crate) fn join(self) {
        if let Some(thread) = self.0
            && thread.join().is_err()
        {
            tracing::error!("the writer of the access log panicked");
        }
    }
}

impl AccessLog {
    /// A log of the share `share` of all calls, and what writes it to standard error.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub(crate) fn new(share: f64, seed: u64) -> io::Result<(Self, LogWriter)> {
        if share <= 0.0 {
            return Ok((Self(None), LogWriter(None)));
        }
        let (lines, waiting) = sync_channel::<String>(LINES_MAX);
        let writer =
            std::thread::Builder::new().name("access-log".to_owned()).spawn(move || {
                for line in waiting {
                    write_whole(line.as_bytes());
                }
            })?;
        let rng = Mutex::new(StdRng::seed_from_u64(seed));
        let sampler = Sampler { share, rng, lines, dropped: AtomicU64::new(0) };
        Ok((Self(Some(Arc::new(sampler))), LogWriter(Some(writer))))
    }

    fn sample(&self) -> Option<&Arc<Sampler>> {
        let sampler = self.0.as_ref()?;
        let is_chosen = sampler.share >= 1.0 || sampler.rng.lock().random_bool(sampler.share);
        is_chosen.then_some(sampler)
    }

    /// Lines dropped because nobody took them.
    pub(crate) fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |sampler| sampler.dropped.load(Ordering::Relaxed))
    }
}

/// Writes to standard error past the lock that everybody else who logs waits for: a reader that does not read may hold up
/// this thread, and no other.
fn write_whole(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(rustix::stdio::stderr(), bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(rustix::io::Errno::INTR) => {}
            // Without standard error there is nobody left to tell.
            Err(_) => return,
        }
    }
}

/// One call in the books. Dropped without a word, it was cancelled by its caller.
#[derive(Debug)]
pub(crate) struct Record {
    metrics: Metrics,
    side: Side,
    began: Instant,
    answered: Option<Instant>,
    retries: u32,
    known: bool,
    ended: bool,
    line: Option<Line>,
}

/// What the access log says beyond figures.
#[derive(Debug)]
struct Line {
    sampler: Arc<Sampler>,
    method: String,
    remote: Option<SocketAddr>,
    protocol: &'static str,
    trace_id: Option<String>,
    model: Option<String>,
    tenant: Option<TenantName>,
    served_by: Option<String>,
    refusal: Option<&'static str>,
}

impl Record {
    /// A call began.
    pub(crate) fn begin(
        metrics: &Metrics,
        log: &AccessLog,
        side: Side,
        request: &Request<Body>,
    ) -> Self {
        metrics.began(side);
        let line = log.sample().map(|sampler| {
            let info = request.extensions().get::<CallInfo>();
            Line {
                sampler: sampler.clone(),
                method: request.uri().path().to_owned(),
                remote: info.map(|info| info.remote),
                protocol: info.map_or("", |info| protocol(info.protocol)),
                trace_id: trace_id(request.headers()),
                model: None,
                tenant: None,
                served_by: None,
                refusal: None,
            }
        });
        Self {
            metrics: metrics.clone(),
            side,
            began: clock::now(),
            answered: None,
            retries: 0,
            known: false,
            ended: false,
            line,
        }
    }

    /// The call is made on behalf of `tenant`.
    pub(crate) fn tenant(&mut self, tenant: &TenantName) {
        self.known = true;
        if let Some(line) = &mut self.line {
            line.tenant = Some(tenant.clone());
        }
    }

    /// Whether it is known on whose behalf the call is made.
    pub(crate) fn is_known(&self) -> bool {
        self.known
    }

    /// The call asks for `model`.
    pub(crate) fn model(&mut self, model: &str) {
        if let Some(line) = &mut self.line {
            line.model = Some(model.to_owned());
        }
    }

    /// The call is tried once more.
    pub(crate) fn retried(&mut self) {
        self.retries += 1;
    }

    /// How often it was tried once more.
    pub(crate) fn retries(&self) -> u32 {
        self.retries
    }

    /// An answer has begun, from `served_by`.
    pub(crate) fn answered(&mut self, served_by: Option<&http::HeaderValue>) {
        let now = clock::now();
        self.answered = Some(now);
        self.metrics.answered(self.side, now.saturating_duration_since(self.began));
        if let Some(line) = &mut self.line {
            line.served_by = served_by.and_then(|by| by.to_str().ok()).map(str::to_owned);
        }
    }

    /// The call was refused, by the label `why`.
    pub(crate) fn refused(&mut self, why: &'static str) {
        self.metrics.refused(self.side, why);
        if let Some(line) = &mut self.line {
            line.refusal = Some(why);
        }
    }

    /// The call is over.
    pub(crate) fn ended(&mut self, end: &End<'_>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let now = clock::now();
        let took = now.saturating_duration_since(self.began);
        self.metrics.ended(self.side, end.code, took);
        let Some(line) = self.line.take() else { return };
        let seconds = |until: Instant| until.saturating_duration_since(self.began).as_secs_f64();
        let text = json!({
            "timestamp_s": clock::wall().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64()),
            "access": self.side.label(),
            "method": line.method,
            "model": line.model,
            "tenant": line.tenant,
            "code": grpc::code_name(end.code),
            "broke_off": end.broke_off,
            "refusal": line.refusal,
            "served_by": line.served_by,
            "retries": self.retries,
            "first_byte_s": self.answered.map(seconds),
            "duration_s": took.as_secs_f64(),
            "remote": line.remote.map(|remote| remote.to_string()),
            "protocol": line.protocol,
            "trace_id": line.trace_id,
        });
        match line.sampler.lines.try_send(format!("{text}\n")) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                line.sampler.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.ended(&End::with(Code::Cancelled));
    }
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::H3 => "h3",
        Protocol::H2 => "h2",
        Protocol::H2c => "h2c",
        Protocol::H1 => "http/1.1",
    }
}

/// The trace a call belongs to (W3C Trace Context §3.2): version, trace, parent, flags.
fn trace_id(headers: &HeaderMap) -> Option<String> {
    let mut parts = headers.get("traceparent")?.to_str().ok()?.split('-');
    let (_version, trace) = (parts.next()?, parts.next()?);
    let is_id = trace.len() == 32 && trace.bytes().all(|b| b.is_ascii_hexdigit());
    is_id.then(|| trace.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_of_a_call_is_read_and_nothing_else_taken_for_it() {
        let trace = |value: &'static str| {
            let value = http::HeaderValue::from_static(value);
            trace_id(&HeaderMap::from_iter([(http::HeaderName::from_static("traceparent"), value)]))
        };
        let id = "0af7651916cd43dd8448eb211c80319c";
        assert_eq!(
            trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").as_deref(),
            Some(id)
        );
        for odd in ["", "00", "00-xyz-1-01", "00-0af7-b7ad-01"] {
            assert_eq!(trace(odd), None, "{odd}");
        }
    }

    #[test]
    fn a_share_of_nothing_logs_nothing_and_of_all_everything() {
        let (none, writer) = AccessLog::new(0.0, 1).unwrap();
        assert!(none.sample().is_none());
        writer.join();
        let (all, writer) = AccessLog::new(1.0, 1).unwrap();
        assert!((0..100).all(|_| all.sample().is_some()));
        let (half, half_writer) = AccessLog::new(0.5, 1).unwrap();
        let sampled = (0..1_000).filter(|_| half.sample().is_some()).count();
        assert!((400..600).contains(&sampled), "{sampled}");
        drop((all, half));
        writer.join();
        half_writer.join();
    }
}
