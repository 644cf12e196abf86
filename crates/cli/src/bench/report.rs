//! What a bench prints.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Options, drive::Ran, subject::Subject};

/// Share of its threads' time above which this end is a good part of what was measured.
const BOTTLENECK: f64 = 0.6;

/// What is printed.
pub(super) struct Report<'a> {
    pub(super) options: &'a Options,
    pub(super) subject: &'a Subject,
    pub(super) ran: &'a Ran,
}

impl Report<'_> {
    fn protocol(&self) -> &'static str {
        match self.subject {
            Subject::Grpc(grpc) => grpc.whom.protocol.as_str(),
            Subject::OpenAi { .. } => "http/1.1",
        }
    }

    /// How long what was counted took.
    fn took(&self) -> Duration {
        self.ran
            .tally
            .last
            .map_or(Duration::ZERO, |last| last.saturating_duration_since(self.ran.plan.counted))
    }

    fn per_second(&self) -> f64 {
        let took = self.took().as_secs_f64();
        if took > 0.0 { self.ran.tally.ok as f64 / took } else { 0.0 }
    }

    /// Processor time of this process per call, in seconds, and as a share of its threads' time.
    fn processor(&self) -> (f64, f64) {
        let all = self.ran.plan.start;
        let wall =
            self.ran.tally.last.map_or(Duration::ZERO, |last| last.saturating_duration_since(all));
        let time = wall.as_secs_f64() * f64::from(self.options.threads);
        let used = self.ran.used.as_secs_f64();
        let share = if time > 0.0 { used / time } else { 0.0 };
        (used / self.ran.tally.calls.max(1) as f64, share)
    }

    pub(super) fn json(&self) -> Value {
        let (per_call, share) = self.processor();
        let tally = &self.ran.tally;
        json!({
            "address": self.options.target.address,
            "method": self.options.method,
            "protocol": self.protocol(),
            "loop": if self.options.rate.is_some() { "open" } else { "closed" },
            "rate_asked": self.options.rate,
            "concurrency": self.options.rate.is_none().then_some(self.options.concurrency),
            "connections": self.options.connections,
            "duration_s": self.took().as_secs_f64(),
            "calls": tally.calls,
            "ok": tally.ok,
            "failed": tally.failed,
            "wrong": tally.wrong,
            "first_wrong": tally.first_wrong,
            "not_made": tally.not_made,
            "rate": self.per_second(),
            "messages": tally.messages,
            "bytes": tally.bytes,
            "latency_s": tally.latency.json(),
            "first_message_s": tally.first.json(),
            "served_by": tally.served_by,
            "client_cpu_s_per_call": per_call,
            "client_cpu_share": share,
            "client_is_bottleneck": share > BOTTLENECK,
            "late_s": tally.late.json(),
            "cut_short": self.ran.is_cut_short,
        })
    }

    pub(super) fn text(&self) -> String {
        let tally = &self.ran.tally;
        let how = match self.options.rate {
            Some(rate) => format!("open loop at {rate} calls/s"),
            None => format!("closed loop, {} at a time", self.options.concurrency),
        };
        let mut lines = vec![
            format!("{} over {}, {how}", self.options.method, self.protocol()),
            format!(
                "calls      {} in {:.1} s: {} ok ({:.1} per second), {} failed, {} wrong, {} not made",
                tally.calls,
                self.took().as_secs_f64(),
                tally.ok,
                self.per_second(),
                tally.calls - tally.ok - tally.wrong,
                tally.wrong,
                tally.not_made,
            ),
        ];
        for (status, count) in &tally.failed {
            lines.push(format!("           {count} × {status}"));
        }
        if let Some(why) = &tally.first_wrong {
            lines.push(format!("wrong      {why}"));
        }
        lines.push("seconds        p50      p90      p99    p99.9      max".to_owned());
        for (what, latencies) in [("first", &tally.first), ("whole", &tally.latency)] {
            let figures = [0.5, 0.9, 0.99, 0.999, 1.0].map(|q| {
                latencies.quantile_s(q).map_or_else(|| "-".to_owned(), |s| format!("{s:.4}"))
            });
            let [p50, p90, p99, p999, max] = figures;
            lines.push(format!("  {what:<8} {p50:>7}  {p90:>7}  {p99:>7}  {p999:>7}  {max:>7}"));
        }
        for (by, count) in &tally.served_by {
            lines.push(format!("served by  {by}: {count}"));
        }
        if let Some(late) = tally.late.quantile_s(0.99) {
            lines.push(format!(
                "late       99 % of the calls were made within {:.1} ms of when they were due",
                late * 1e3
            ));
        }
        if self.ran.is_cut_short {
            lines.push("cut short  it was told to stop before its end".to_owned());
        }
        let (per_call, share) = self.processor();
        lines.push(format!(
            "this end   {:.1} µs of processor per call, {:.0} % of its threads' time",
            per_call * 1e6,
            share * 100.0
        ));
        if share > BOTTLENECK {
            lines.push(
                "           that is much: some of what was measured is this end; give more --threads"
                    .to_owned(),
            );
        }
        lines.join("\n")
    }
}
