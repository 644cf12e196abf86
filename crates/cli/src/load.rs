//! Load: when calls are made, and what became of them. `bench` and `demo` drive it.
//!
//! Open loop: calls are made when they are due, whatever became of earlier ones, and a latency runs from the moment the
//! call was due. A server that stalls is then charged for everybody it kept waiting ("coordinated omission", G. Tene).

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use rand::{RngExt as _, rngs::StdRng};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// Longest latency told apart, in microseconds: an hour.
const LONGEST_US: u64 = 3_600_000_000;
/// Calls that are due and not yet taken; beyond it the clockwork waits, and their latency still runs.
const DUE_MAX: usize = 1024;
/// The clockwork wakes no more often; calls due in between are told together.
const WAKES_APART: Duration = Duration::from_micros(200);
/// A clockwork that sleeps looks up this often whether anybody still wants to know.
const MOMENT: Duration = Duration::from_millis(50);
/// Servers told apart in what is printed.
const SERVED_BY_MAX: usize = 256;

/// When calls are due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arrivals {
    /// Like independent users: exponential gaps
    Poisson,
    /// Equal gaps
    Even,
}

impl Arrivals {
    /// The gap before the next call at `rate` calls per second.
    pub(crate) fn gap(self, rate: f64, rng: &mut StdRng) -> Duration {
        let mean = 1.0 / rate;
        match self {
            Self::Even => Duration::from_secs_f64(mean),
            // 1 - U is never 0, so the logarithm is finite.
            Self::Poisson => Duration::from_secs_f64(-mean * (1.0 - rng.random::<f64>()).ln()),
        }
    }
}

/// Says when calls are due, from a thread of its own: a runtime's timers are a millisecond coarse. The thread ends with it.
#[derive(Debug)]
pub(crate) struct Clockwork {
    /// Taken when it is dropped.
    due: Option<mpsc::Receiver<Instant>>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Clockwork {
    /// Says when each of `due` has come.
    pub(crate) fn start(
        due: impl Iterator<Item = Instant> + Send + 'static,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(DUE_MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || tell(due, &sender, &stopped);
        let thread = thread::Builder::new().name("clockwork".to_owned()).spawn(run)?;
        Ok(Self { due: Some(receiver), stop, thread: Some(thread) })
    }

    /// Waits until calls are due, at most `limit` of them, and adds when each was; `false`: there are no more.
    pub(crate) async fn next(&mut self, due: &mut Vec<Instant>, limit: usize) -> bool {
        match &mut self.due {
            Some(receiver) => receiver.recv_many(due, limit).await > 0,
            None => false,
        }
    }
}

impl Drop for Clockwork {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It may wait for somebody to listen.
        self.due = None;
        if let Some(thread) = self.thread.take() {
            // It wakes within a moment; if it panicked, the calls it did not tell of are missing from what is printed.
            drop(thread.join());
        }
    }
}

fn tell(due: impl Iterator<Item = Instant>, to: &mpsc::Sender<Instant>, stopped: &AtomicBool) {
    let mut woke = base::clock::now();
    for at in due {
        // Waking for each would cost more than a call does, where there are many.
        if at > woke {
            let until = at.max(woke + WAKES_APART);
            while !stopped.load(Ordering::Relaxed) && wait_until(until) {}
            woke = base::clock::now();
        }
        if stopped.load(Ordering::Relaxed) || to.blocking_send(at).is_err() {
            return;
        }
    }
}

/// Sleeps towards `until`, for a moment at most; whether there is more to sleep.
#[expect(clippy::disallowed_methods, reason = "a thread that does nothing else")]
fn wait_until(until: Instant) -> bool {
    let left = until.saturating_duration_since(base::clock::now());
    thread::sleep(left.min(MOMENT));
    left > MOMENT
}

/// Latencies.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Default for Latencies {
    #[expect(clippy::expect_used, reason = "the bounds are constants")]
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, LONGEST_US, 3).expect("bounds in the right order"))
    }
}

impl Latencies {
    pub(crate) fn record(&mut self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(LONGEST_US);
        self.0.saturating_record(us.max(1));
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0 += &other.0;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The latency below which the share `quantile` lies, in seconds; `None` without any.
    pub(crate) fn quantile_s(&self, quantile: f64) -> Option<f64> {
        (!self.is_empty()).then(|| self.0.value_at_quantile(quantile) as f64 / 1e6)
    }

    /// The usual percentiles, in seconds.
    pub(crate) fn json(&self) -> Value {
        if self.is_empty() {
            return Value::Null;
        }
        json!({
            "p50": self.quantile_s(0.5),
            "p90": self.quantile_s(0.9),
            "p99": self.quantile_s(0.99),
            "p999": self.quantile_s(0.999),
            "max": self.quantile_s(1.0),
            "mean": self.0.mean() / 1e6,
        })
    }
}

/// What became of one call.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// `Err`: the status, or what was wrong with the answer, in a word or two.
    pub(crate) result: Result<(), Wrong>,
    /// When the first message, or token, came.
    pub(crate) first: Option<Instant>,
    pub(crate) ended: Instant,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) served_by: Option<String>,
}

impl Outcome {
    /// A call that brought nothing.
    pub(crate) fn failed(why: Wrong) -> Self {
        let ended = base::clock::now();
        Self { result: Err(why), first: None, ended, messages: 0, bytes: 0, served_by: None }
    }
}

/// Why a call counts as failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// It ended with this status, of gRPC or HTTP.
    Status(String),
    /// It was answered with something else than what was expected.
    Answer(String),
}

/// What became of many calls.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) latency: Latencies,
    pub(crate) first: Latencies,
    /// From when calls were due to when they were made.
    pub(crate) late: Latencies,
    pub(crate) calls: u64,
    pub(crate) ok: u64,
    /// How many ended otherwise, by status.
    pub(crate) failed: BTreeMap<String, u64>,
    /// How many were answered wrongly.
    pub(crate) wrong: u64,
    /// What was wrong first.
    pub(crate) first_wrong: Option<String>,
    /// Calls that were due and not made, because too many were in progress.
    pub(crate) not_made: u64,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) served_by: BTreeMap<String, u64>,
    /// When the last call ended.
    pub(crate) last: Option<Instant>,
}

impl Tally {
    /// Takes in a call that was due at `due`.
    pub(crate) fn add(&mut self, due: Instant, outcome: Outcome) {
        self.calls += 1;
        self.messages += outcome.messages;
        self.bytes += outcome.bytes;
        self.last = self.last.max(Some(outcome.ended));
        match outcome.result {
            // A fast failure must not make a server look fast.
            Ok(()) => {
                self.ok += 1;
                self.latency.record(outcome.ended.saturating_duration_since(due));
                if let Some(first) = outcome.first {
                    self.first.record(first.saturating_duration_since(due));
                }
            }
            Err(Wrong::Status(status)) => *self.failed.entry(status).or_default() += 1,
            Err(Wrong::Answer(why)) => {
                self.wrong += 1;
                self.first_wrong.get_or_insert(why);
            }
        }
        let Some(by) = outcome.served_by else { return };
        if self.served_by.len() < SERVED_BY_MAX || self.served_by.contains_key(&by) {
            *self.served_by.entry(by).or_default() += 1;
        }
    }

    /// Takes in what another thread counted.
    pub(crate) fn merge(&mut self, other: Self) {
        self.latency.add(&other.latency);
        self.first.add(&other.first);
        self.late.add(&other.late);
        self.calls += other.calls;
        self.ok += other.ok;
        self.wrong += other.wrong;
        self.not_made += other.not_made;
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.last = self.last.max(other.last);
        self.first_wrong = self.first_wrong.take().or(other.first_wrong);
        for (into, from) in
            [(&mut self.failed, other.failed), (&mut self.served_by, other.served_by)]
        {
            for (name, count) in from {
                *into.entry(name).or_default() += count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn gaps_make_the_rate_that_was_asked_for() {
        let mut rng = StdRng::seed_from_u64(1);
        for arrivals in [Arrivals::Even, Arrivals::Poisson] {
            let sum: Duration = (0..20_000).map(|_| arrivals.gap(500.0, &mut rng)).sum();
            let rate = 20_000.0 / sum.as_secs_f64();
            assert!((480.0..520.0).contains(&rate), "{arrivals:?}: {rate}");
        }
    }

    #[test]
    fn a_latency_runs_from_when_the_call_was_due_and_a_failure_has_none() {
        let now = base::clock::now();
        let outcome = |result| Outcome {
            result,
            first: Some(now + Duration::from_millis(40)),
            ended: now + Duration::from_millis(100),
            messages: 2,
            bytes: 10,
            served_by: Some("b.us/gpu".into()),
        };
        let mut tally = Tally::default();
        tally.add(now - Duration::from_millis(100), outcome(Ok(())));
        tally.add(now, outcome(Err(Wrong::Status("UNAVAILABLE".into()))));
        tally.add(now, outcome(Err(Wrong::Answer("no JSON".into()))));
        let mut sum = Tally::default();
        sum.merge(tally);
        assert_eq!((sum.calls, sum.ok, sum.wrong), (3, 1, 1));
        assert_eq!(sum.failed, BTreeMap::from([("UNAVAILABLE".to_owned(), 1)]));
        let [p50, first] = [&sum.latency, &sum.first].map(|l| l.quantile_s(0.5).unwrap());
        assert!((0.199..0.202).contains(&p50) && (0.139..0.142).contains(&first), "{p50} {first}");
        assert_eq!(sum.served_by["b.us/gpu"], 3);
    }

    #[tokio::test]
    async fn the_clockwork_says_when_each_has_come_and_stops_when_nobody_listens() {
        let start = base::clock::now();
        let due: Vec<_> = (0..5).map(|i| start + Duration::from_millis(i)).collect();
        let mut clockwork = Clockwork::start(due.clone().into_iter()).unwrap();
        let mut heard = Vec::new();
        while clockwork.next(&mut heard, 2).await {}
        assert_eq!(heard, due);
        assert!(base::clock::now() >= due[4]);
        let far = start + Duration::from_secs(3_600);
        drop(Clockwork::start(std::iter::once(far)).unwrap());
        drop(Clockwork::start(std::iter::repeat(start)).unwrap());
    }
}
