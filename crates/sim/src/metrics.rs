//! What an engine counts, under the names vLLM uses: <https://docs.vllm.ai/en/stable/usage/metrics/>.

use std::{
    fmt,
    sync::atomic::{AtomicI64, AtomicU64},
    time::Duration,
};

use base::ModelName;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::batch::Figures;

type Count = Counter<u64, AtomicU64>;

/// Upper bounds of the buckets of the time to the first token, in seconds: vLLM's.
const FIRST_TOKEN_BOUNDS_S: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2_560.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    finished_reason: &'static str,
}

/// A call that yielded all tokens it asked for: a simulated model never stops by itself.
const LENGTH: Reason = Reason { finished_reason: "length" };
/// A call whose caller went away.
const ABORT: Reason = Reason { finished_reason: "abort" };

/// The books of one engine.
pub(crate) struct Metrics {
    registry: Registry,
    running: Gauge<i64, AtomicI64>,
    waiting: Gauge<i64, AtomicI64>,
    cache_usage: Gauge<f64, AtomicU64>,
    prompt_tokens: Count,
    generation_tokens: Count,
    ended: Family<Reason, Count>,
    prefix_queries: Count,
    prefix_hits: Count,
    first_token: Histogram,
    refused: Count,
}

/// What has been counted so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) finished: u64,
    pub(crate) cancelled: u64,
    pub(crate) refused: u64,
    pub(crate) tokens: u64,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("totals", &self.totals()).finish_non_exhaustive()
    }
}

impl Metrics {
    pub(crate) fn new(model: &ModelName) -> Self {
        let labels = [
            // Which of the engines of a server: vLLM numbers them, and here there is one.
            ("engine".into(), "0".into()),
            ("model_name".into(), model.to_string().into()),
        ];
        let mut metrics = Self {
            registry: Registry::with_labels(labels.into_iter()),
            running: Gauge::default(),
            waiting: Gauge::default(),
            cache_usage: Gauge::default(),
            prompt_tokens: Count::default(),
            generation_tokens: Count::default(),
            ended: Family::default(),
            prefix_queries: Count::default(),
            prefix_hits: Count::default(),
            first_token: Histogram::new(FIRST_TOKEN_BOUNDS_S),
            refused: Count::default(),
        };
        // A scraper sees them at zero before the first call.
        for reason in [LENGTH, ABORT] {
            drop(metrics.ended.get_or_create(&reason));
        }
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        let help = "Requests in a slot of the batch";
        registry.register("vllm:num_requests_running", help, self.running.clone());
        let help = "Requests that wait for a slot";
        registry.register("vllm:num_requests_waiting", help, self.waiting.clone());
        let help = "Share of the memory for keys and values in use: here, of the slots";
        registry.register("vllm:kv_cache_usage_perc", help, self.cache_usage.clone());
        let help = "Tokens of prompts taken in";
        registry.register("vllm:prompt_tokens", help, self.prompt_tokens.clone());
        let help = "Tokens generated";
        registry.register("vllm:generation_tokens", help, self.generation_tokens.clone());
        let help = "Requests that ended, by why";
        registry.register("vllm:request_success", help, self.ended.clone());
        let help = "Tokens of prompts looked up in the prefix cache";
        registry.register("vllm:prefix_cache_queries", help, self.prefix_queries.clone());
        let help = "Tokens of prompts found in the prefix cache";
        registry.register("vllm:prefix_cache_hits", help, self.prefix_hits.clone());
        let help = "Time from a request to its first token";
        registry.register("vllm:time_to_first_token_seconds", help, self.first_token.clone());
        let help = "Requests refused for want of room; vLLM has no such metric";
        registry.register("sim:requests_refused", help, self.refused.clone());
    }

    /// A prompt was taken in, of which the cache held `cached` tokens.
    pub(crate) fn admitted(&self, prompt_tokens: u32, cached: u32) {
        self.prompt_tokens.inc_by(prompt_tokens.into());
        self.prefix_queries.inc_by(prompt_tokens.into());
        self.prefix_hits.inc_by(cached.into());
    }

    /// A request found no room.
    pub(crate) fn refused(&self) {
        self.refused.inc();
    }

    /// A token was generated, the first of its request after `first`.
    pub(crate) fn token(&self, first: Option<Duration>) {
        self.generation_tokens.inc();
        if let Some(first) = first {
            self.first_token.observe(first.as_secs_f64());
        }
    }

    /// A request yielded its last token.
    pub(crate) fn finished(&self) {
        self.ended.get_or_create(&LENGTH).inc();
    }

    /// A caller went away.
    pub(crate) fn aborted(&self) {
        self.ended.get_or_create(&ABORT).inc();
    }

    pub(crate) fn totals(&self) -> Totals {
        Totals {
            finished: self.ended.get_or_create(&LENGTH).get(),
            cancelled: self.ended.get_or_create(&ABORT).get(),
            refused: self.refused.get(),
            tokens: self.generation_tokens.get(),
        }
    }

    /// Everything, in the OpenMetrics text format.
    pub(crate) fn render(&self, figures: Figures) -> Result<String, fmt::Error> {
        self.running.set(figures.running.into());
        self.waiting.set(figures.waiting.into());
        self.cache_usage.set(figures.cache_usage());
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

/// The same in the text format Prometheus had before OpenMetrics, which is what vLLM answers with unless asked otherwise:
/// counters are called by their whole names, and there are neither units nor an end.
pub(crate) fn classic(open_metrics: &str) -> String {
    let counters: Vec<&str> = open_metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what @ ("HELP" | "TYPE")), Some(name), Some(rest))
                if counters.contains(&name) =>
            {
                text.push_str(&format!("# {what} {name}_total {rest}\n"));
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_classic_format_calls_counters_by_their_whole_names() {
        let text = "# HELP a Calls.\n# TYPE a counter\na_total{b=\"c\"} 1\n# HELP d Now.\n# TYPE d gauge\n# UNIT d seconds\nd 2\n# EOF\n";
        let want = "# HELP a_total Calls.\n# TYPE a_total counter\na_total{b=\"c\"} 1\n# HELP d Now.\n# TYPE d gauge\nd 2\n";
        assert_eq!(classic(text), want);
    }

    #[test]
    fn what_happens_is_in_the_text_under_the_names_of_vllm() {
        let metrics = Metrics::new(&"llama".parse().unwrap());
        metrics.admitted(40, 32);
        metrics.token(Some(Duration::from_millis(30)));
        metrics.token(None);
        metrics.finished();
        metrics.refused();
        let figures = Figures { running: 2, waiting: 1, slots: 8, queue: 2, steps: 9 };
        let text = metrics.render(figures).unwrap();
        for line in [
            r#"vllm:num_requests_running{engine="0",model_name="llama"} 2"#,
            r#"vllm:num_requests_waiting{engine="0",model_name="llama"} 1"#,
            r#"vllm:kv_cache_usage_perc{engine="0",model_name="llama"} 0.25"#,
            r#"vllm:prompt_tokens_total{engine="0",model_name="llama"} 40"#,
            r#"vllm:generation_tokens_total{engine="0",model_name="llama"} 2"#,
            r#"vllm:request_success_total{engine="0",model_name="llama",finished_reason="length"} 1"#,
            r#"vllm:request_success_total{engine="0",model_name="llama",finished_reason="abort"} 0"#,
            r#"vllm:prefix_cache_queries_total{engine="0",model_name="llama"} 40"#,
            r#"vllm:prefix_cache_hits_total{engine="0",model_name="llama"} 32"#,
            r#"vllm:time_to_first_token_seconds_count{engine="0",model_name="llama"} 1"#,
            r#"vllm:time_to_first_token_seconds_bucket{engine="0",model_name="llama",le="0.04"} 1"#,
            r#"sim:requests_refused_total{engine="0",model_name="llama"} 1"#,
            r#"vllm:time_to_first_token_seconds_bucket{engine="0",model_name="llama",le="2560.0"} 1"#,
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
