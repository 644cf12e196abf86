//! Making the calls of a bench: threads, each with its share of connections and calls.
//!
//! Every thread connects first; the time counts from when all have.

use std::{
    cell::RefCell,
    sync::{
        Barrier, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use base::clock;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use rand::{SeedableRng as _, rngs::StdRng};
use rustix::time::{ClockId, clock_gettime};
use tokio::runtime::Runtime;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use transport::Channel;

use super::{
    Options,
    connection::Connection,
    runtime,
    subject::{Grpc, Http, Subject},
};
use crate::{
    Failure,
    load::{Clockwork, Outcome, Tally},
    openai::OpenAi,
    target::{Caller, Protocol},
};

/// How long calls in progress may go on once the bench was told to stop.
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// Calls that are due at once and taken in one go.
const DUE_AT_ONCE: usize = 256;

/// When calls are made: the same for all threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) start: Instant,
    /// From when on they count.
    pub(super) counted: Instant,
    /// `None`: the number of calls decides.
    end: Option<Instant>,
}

impl Plan {
    fn new(options: &Options) -> Self {
        let start = clock::now();
        let counted = start + options.warmup;
        let end = options.calls.is_none().then(|| counted + options.duration);
        Self { start, counted, end }
    }
}

/// What all threads share.
#[derive(Debug)]
pub(super) struct Run<'a> {
    options: &'a Options,
    subject: &'a Subject,
    /// Where threads wait for each other once they have connected, or failed to.
    connected: Barrier,
    has_failed: AtomicBool,
    plan: OnceLock<(Plan, Duration)>,
    /// Calls that may still begin.
    left: AtomicU64,
    stop: CancellationToken,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) plan: Plan,
    pub(super) tally: Tally,
    /// Processor time of this process.
    pub(super) used: Duration,
    /// Whether it was told to stop before its end.
    pub(super) is_cut_short: bool,
}

impl<'a> Run<'a> {
    /// `stop` ends it early.
    pub(super) fn new(options: &'a Options, subject: &'a Subject, stop: CancellationToken) -> Self {
        Self {
            options,
            subject,
            connected: Barrier::new(options.threads as usize),
            has_failed: AtomicBool::new(false),
            plan: OnceLock::new(),
            left: AtomicU64::new(options.calls.unwrap_or(u64::MAX)),
            stop,
        }
    }

    /// Makes all calls.
    pub(super) fn drive(&self) -> Result<Ran, Failure> {
        // Made here, where a failure leaves no thread that waits for the others.
        let runtimes = (0..self.options.threads).map(|_| runtime());
        let runtimes = runtimes.collect::<anyhow::Result<Vec<_>>>()?;
        let outcomes: Vec<anyhow::Result<Tally>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..)
                .zip(runtimes)
                .map(|(index, runtime)| {
                    scope.spawn(move || Share { run: self, index }.run(runtime))
                })
                .collect();
            let panicked = |_| Err(anyhow::anyhow!("a thread panicked"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        });
        let mut tally = Tally::default();
        // A thread that failed says why; the others only stopped.
        for outcome in outcomes {
            tally.merge(outcome?);
        }
        let (plan, before) = *self.plan.get_or_init(|| (Plan::new(self.options), processor_time()));
        let used = processor_time().saturating_sub(before);
        let is_cut_short = self.stop.is_cancelled();
        Ok(Ran { plan, tally, used, is_cut_short })
    }

    /// Whether another call may begin at `now`; it counts.
    fn take(&self, plan: &Plan, now: Instant) -> bool {
        let take = |left: u64| left.checked_sub(1);
        plan.end.is_none_or(|end| now < end)
            && !self.stop.is_cancelled()
            && self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

/// Processor time of this process so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// What one thread does.
#[derive(Clone, Copy)]
struct Share<'a> {
    run: &'a Run<'a>,
    index: u32,
}

/// One thread's way to make a call.
enum Way<'a> {
    /// HTTP/2.
    Connections(&'a Grpc, Vec<Connection>),
    /// HTTP/3.
    Channels(&'a Grpc, Vec<Channel>),
    /// HTTP/1.1.
    OpenAi(Box<OpenAi>, &'a Http),
}

impl Way<'_> {
    async fn call(&self, number: u64) -> Outcome {
        let number = usize::try_from(number).unwrap_or(0);
        match self {
            Self::Connections(grpc, connections) => {
                grpc.call_on(&connections[number % connections.len()], number).await
            }
            Self::Channels(grpc, channels) => {
                grpc.call(&channels[number % channels.len()], number).await
            }
            Self::OpenAi(client, http) => client.call(http.body.clone(), http.is_stream).await,
        }
    }
}

impl<'a> Share<'a> {
    /// This thread's part of a number that all share.
    fn part(&self, of: u64) -> u64 {
        let threads = u64::from(self.run.options.threads);
        of / threads + u64::from(u64::from(self.index) < of % threads)
    }

    fn run(self, runtime: Runtime) -> anyhow::Result<Tally> {
        let tasks = TaskTracker::new();
        let outcome = runtime.block_on(async {
            let caller = Caller::new();
            let connected = match &caller {
                Ok(caller) => self.connect(caller, &tasks).await,
                Err(_) => Err(anyhow::anyhow!("cannot open a UDP socket")),
            };
            if connected.is_err() {
                self.run.has_failed.store(true, Ordering::Relaxed);
            }
            // Nothing runs on this thread's runtime that anybody would miss.
            self.run.connected.wait();
            let way = connected?;
            if self.run.has_failed.load(Ordering::Relaxed) {
                return Ok(Tally::default());
            }
            let init = || (Plan::new(self.run.options), processor_time());
            let plan = self.run.plan.get_or_init(init).0;
            let tally = RefCell::new(Tally::default());
            let calls = async {
                match self.run.options.rate {
                    Some(rate) => self.open_loop(&way, rate, &plan, &tally).await,
                    None => {
                        self.closed_loop(&way, &plan, &tally).await;
                        Ok(())
                    }
                }
            };
            let stopped = async {
                self.run.stop.cancelled().await;
                tokio::time::sleep(STOP_WITHIN).await;
            };
            tokio::select! {
                ended = calls => ended?,
                () = stopped => {}
            }
            drop(way);
            if let Ok(caller) = caller {
                caller.close().await;
            }
            Ok(tally.into_inner())
        });
        // Idle connections end with the runtime.
        runtime.shutdown_background();
        outcome
    }

    async fn connect(&self, caller: &Caller, tasks: &TaskTracker) -> anyhow::Result<Way<'a>> {
        let options = self.run.options;
        let grpc = match self.run.subject {
            Subject::Grpc(grpc) => grpc,
            Subject::OpenAi(http) => {
                let (uri, headers) = (http.uri.clone(), http.headers.clone());
                let tls = http.tls.config().clone();
                let client = OpenAi::new(uri, headers, tls, options.limit(), tasks);
                return Ok(Way::OpenAi(Box::new(client), http));
            }
        };
        let numbers = 0..usize::try_from(self.part(options.connections.into()))?;
        if grpc.whom.protocol == Protocol::H3 {
            let channels: Vec<_> = numbers.map(|i| caller.channel(&grpc.whom, i)).collect();
            for channel in &channels {
                channel.connect().await?;
            }
            return Ok(Way::Channels(grpc, channels));
        }
        let mut connections = Vec::new();
        for _ in numbers {
            connections.push(Connection::open(grpc, tasks).await?);
        }
        Ok(Way::Connections(grpc, connections))
    }

    async fn open_loop(
        &self,
        way: &Way<'_>,
        rate: f64,
        plan: &Plan,
        tally: &RefCell<Tally>,
    ) -> anyhow::Result<()> {
        let options = self.run.options;
        let rate = rate / f64::from(options.threads);
        let mut rng = StdRng::seed_from_u64(options.seed ^ (u64::from(self.index) << 32));
        let (arrivals, end, mut next) = (options.arrivals, plan.end, plan.start);
        let share = options.calls.map_or(u64::MAX, |calls| self.part(calls));
        let due = std::iter::from_fn(move || {
            next += arrivals.gap(rate, &mut rng);
            end.is_none_or(|end| next < end).then_some(next)
        });
        let due = due.take(usize::try_from(share).unwrap_or(usize::MAX));
        let mut clockwork = Clockwork::start(due)?;
        let in_flight_max = usize::try_from(self.part(options.in_flight_max.into()))?;
        let mut number = 0;
        let mut calls = FuturesUnordered::new();
        let mut came = Vec::new();
        loop {
            tokio::select! {
                more = clockwork.next(&mut came, DUE_AT_ONCE) => {
                    if !more || self.run.stop.is_cancelled() {
                        break;
                    }
                    let now = clock::now();
                    for at in came.drain(..) {
                        let is_counted = at >= plan.counted;
                        if calls.len() >= in_flight_max {
                            tally.borrow_mut().not_made += u64::from(is_counted);
                            continue;
                        }
                        if is_counted {
                            tally.borrow_mut().late.record(now.saturating_duration_since(at));
                        }
                        number += 1;
                        calls.push(async move { (at, way.call(number).await) });
                    }
                }
                Some((at, outcome)) = calls.next() => count(plan, tally, at, outcome),
                () = self.run.stop.cancelled() => break,
            }
        }
        while let Some((at, outcome)) = calls.next().await {
            count(plan, tally, at, outcome);
        }
        Ok(())
    }

    async fn closed_loop(&self, way: &Way<'_>, plan: &Plan, tally: &RefCell<Tally>) {
        let number = RefCell::new(0);
        let mut loops: FuturesUnordered<_> = (0..self.part(self.run.options.concurrency.into()))
            .map(|_| async {
                let mut begin = clock::now();
                while self.run.take(plan, begin) {
                    let turn = number.replace_with(|number| *number + 1);
                    let outcome = way.call(turn).await;
                    let ended = outcome.ended;
                    count(plan, tally, begin, outcome);
                    begin = ended;
                }
            })
            .collect();
        while loops.next().await.is_some() {}
    }
}

fn count(plan: &Plan, tally: &RefCell<Tally>, due: Instant, outcome: Outcome) {
    if due >= plan.counted {
        tally.borrow_mut().add(due, outcome);
    }
}
