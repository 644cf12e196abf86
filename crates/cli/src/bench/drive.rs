//! Making the calls of a bench: threads, each with its share of connections and calls.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use base::clock;
use futures_util::{StreamExt as _, future::join_all, stream::FuturesUnordered};
use rand::{SeedableRng as _, rngs::StdRng};
use rustix::time::{ClockId, clock_gettime};
use tokio_util::task::TaskTracker;
use transport::Channel;

use super::{
    Options, runtime,
    subject::{Grpc, Http, Subject},
};
use crate::{
    Failure,
    load::{self, Outcome, Tally},
    openai::OpenAi,
    target::Caller,
};

/// When calls are made: the same for all threads.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) start: Instant,
    pub(super) counted: Instant,
    /// `None`: the number of calls decides.
    end: Option<Instant>,
    /// Calls that may still begin.
    left: AtomicU64,
}

impl Plan {
    pub(super) fn new(options: &Options) -> Self {
        let start = clock::now();
        let counted = start + options.warmup;
        Self {
            start,
            counted,
            end: options.calls.is_none().then(|| counted + options.duration),
            left: AtomicU64::new(options.calls.unwrap_or(u64::MAX)),
        }
    }

    /// Whether another call may begin at `now`; it counts.
    fn take(&self, now: Instant) -> bool {
        let take = |left: u64| left.checked_sub(1);
        self.end.is_none_or(|end| now < end)
            && self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

/// Makes all calls; returns what became of them, and the processor time that took.
pub(super) fn drive(
    options: &Options,
    subject: &Subject,
    plan: &Plan,
) -> Result<(Tally, Duration), Failure> {
    let before = processor_time();
    let outcomes: Vec<anyhow::Result<Tally>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads)
            .map(|index| scope.spawn(move || Share { options, subject, plan, index }.run()))
            .collect();
        let panicked = |_| Err(anyhow::anyhow!("a thread panicked"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    });
    let mut tally = Tally::default();
    for outcome in outcomes {
        tally.merge(outcome?);
    }
    Ok((tally, processor_time().saturating_sub(before)))
}

/// Processor time of this process so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// What one thread does.
#[derive(Clone, Copy)]
struct Share<'a> {
    options: &'a Options,
    subject: &'a Subject,
    plan: &'a Plan,
    index: u32,
}

/// One thread's way to make a call.
enum Way<'a> {
    Grpc(&'a Grpc, Vec<Channel>),
    OpenAi(Box<OpenAi>, &'a Http),
}

impl Way<'_> {
    async fn call(&self, number: u64) -> Outcome {
        match self {
            Self::Grpc(grpc, channels) => {
                let turn = usize::try_from(number).unwrap_or(0) % channels.len();
                grpc.call(&channels[turn], number).await
            }
            Self::OpenAi(client, http) => client.call(http.body.clone(), http.is_stream).await,
        }
    }
}

impl Share<'_> {
    /// This thread's part of a number that all share.
    fn part(&self, of: u32) -> u32 {
        of / self.options.threads + u32::from(self.index < of % self.options.threads)
    }

    fn run(self) -> anyhow::Result<Tally> {
        let runtime = runtime()?;
        let tasks = TaskTracker::new();
        let outcome = runtime.block_on(async {
            let caller = Caller::new()?;
            let way = match self.subject {
                Subject::Grpc(grpc) => {
                    let mut channels = Vec::new();
                    for connection in 0..self.part(self.options.connections) {
                        let channel = caller.channel(&grpc.whom, connection as usize);
                        channel.connect().await?;
                        channels.push(channel);
                    }
                    Way::Grpc(grpc, channels)
                }
                Subject::OpenAi(http) => {
                    let deadline = self.options.deadline;
                    let (uri, headers) = (http.uri.clone(), http.headers.clone());
                    let client = OpenAi::new(uri, headers, *http.tls.0.clone(), deadline, &tasks);
                    Way::OpenAi(Box::new(client), http)
                }
            };
            let tally = match self.options.rate {
                Some(rate) => self.open_loop(&way, rate).await,
                None => self.closed_loop(&way).await,
            };
            caller.close().await;
            tally
        });
        // Idle connections of the HTTP client end with the runtime.
        runtime.shutdown_background();
        outcome
    }

    async fn open_loop(&self, way: &Way<'_>, rate: f64) -> anyhow::Result<Tally> {
        let rate = rate / f64::from(self.options.threads);
        let mut rng = StdRng::seed_from_u64(self.options.seed ^ (u64::from(self.index) << 32));
        let (arrivals, end) = (self.options.arrivals, self.plan.end);
        let start = self.plan.start;
        let share = self.options.calls.map(|calls| {
            let threads = u64::from(self.options.threads);
            calls / threads + u64::from(u64::from(self.index) < calls % threads)
        });
        let mut next = start;
        let due = std::iter::from_fn(move || {
            next += arrivals.gap(rate, &mut rng);
            end.is_none_or(|end| next < end).then_some(next)
        });
        let due = due
            .take(share.map_or(usize::MAX, |share| usize::try_from(share).unwrap_or(usize::MAX)));
        let mut due = load::clockwork(due)?;
        let (mut tally, mut number) = (Tally::default(), 0);
        let mut calls = FuturesUnordered::new();
        loop {
            tokio::select! {
                at = due.recv() => match at {
                    Some(at) if calls.len() >= self.options.in_flight_max => {
                        tally.not_made += u64::from(at >= self.plan.counted);
                    }
                    Some(at) => {
                        number += 1;
                        calls.push(async move { (at, way.call(number).await) });
                    }
                    None => break,
                },
                Some((at, outcome)) = calls.next() => {
                    self.count(&mut tally, at, outcome);
                }
            }
        }
        while let Some((at, outcome)) = calls.next().await {
            self.count(&mut tally, at, outcome);
        }
        Ok(tally)
    }

    async fn closed_loop(&self, way: &Way<'_>) -> anyhow::Result<Tally> {
        let number = AtomicU64::new(0);
        let loops = (0..self.part(self.options.concurrency)).map(|_| async {
            let mut tally = Tally::default();
            let mut begin = clock::now();
            while self.plan.take(begin) {
                let outcome = way.call(number.fetch_add(1, Ordering::Relaxed)).await;
                let ended = outcome.ended;
                self.count(&mut tally, begin, outcome);
                begin = ended;
            }
            tally
        });
        let mut tally = Tally::default();
        for one in join_all(loops).await {
            tally.merge(one);
        }
        Ok(tally)
    }

    fn count(&self, tally: &mut Tally, due: Instant, outcome: Outcome) {
        if due >= self.plan.counted {
            tally.add(due, outcome);
        }
    }
}
