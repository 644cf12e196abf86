//! The load of a demo: the same arrivals for both arms, and what became of each call.
//!
//! A region asks for a share of what its engines can do, in Poisson arrivals; half the calls are unary, half are streams of
//! tokens. A client knows the engines of its region, or the nodes, and takes turns among them. When a node does not answer
//! at all it asks another, as gRPC clients with a retry policy do.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use base::clock;
use bytes::Bytes;
use http::uri::PathAndQuery;
use prost::Message as _;
use proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
    ModelStreamInferResponse, infer_parameter::ParameterChoice,
    model_infer_request::InferInputTensor,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tonic::{Code, metadata::MetadataMap};
use transport::Channel;

use super::world::{ENGINES_PER_NODE, MODEL, NODES_PER_REGION, REGIONS, SLOTS, STEP};
use crate::{
    caller::{self, Method},
    load::{Arrivals, Latencies},
};

/// Tokens of an answer: log-normal.
const TOKENS_MEDIAN: f64 = 40.0;
const TOKENS_SIGMA: f64 = 0.6;
const TOKENS_MAX: f64 = 200.0;
/// How long a call may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often a client asks another node when one does not answer at all.
const OTHERS_MAX: usize = 2;
/// Rates are over this long.
const RATE_OVER: Duration = Duration::from_secs(2);

/// A call to be made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Arrival {
    /// After the start.
    pub(crate) at: Duration,
    pub(crate) region: usize,
    pub(crate) is_stream: bool,
    pub(crate) tokens: u32,
    /// Tells prompts apart.
    pub(crate) number: u32,
}

/// The mean of the tokens that are asked for.
fn tokens_mean() -> f64 {
    // The cap takes a little off the mean of a log-normal distribution.
    TOKENS_MEDIAN * (TOKENS_SIGMA * TOKENS_SIGMA / 2.0).exp()
}

/// Calls per second the engines of a region can bear: all slots taken, a step twice as long as an empty one.
fn capacity() -> f64 {
    let engines = (NODES_PER_REGION * ENGINES_PER_NODE) as f64;
    // A short prompt is taken in by the step that yields the first token.
    engines * f64::from(SLOTS) / (2.0 * STEP.as_secs_f64() * tokens_mean())
}

/// Every call of `duration`, in order.
pub(crate) fn arrivals(seed: u64, duration: Duration) -> Vec<Arrival> {
    let mut all = Vec::new();
    for (region, (_, demand)) in REGIONS.iter().enumerate() {
        let mut rng = StdRng::seed_from_u64(seed ^ ((region as u64 + 1) << 32));
        let mut at = Duration::ZERO;
        loop {
            at += Arrivals::Poisson.gap(demand * capacity(), &mut rng);
            if at >= duration {
                break;
            }
            let is_stream = rng.random::<bool>();
            all.push(Arrival { at, region, is_stream, tokens: tokens(&mut rng), number: 0 });
        }
    }
    all.sort_by_key(|arrival| arrival.at);
    for (number, arrival) in (0..).zip(&mut all) {
        arrival.number = number;
    }
    all
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 200")]
fn tokens(rng: &mut StdRng) -> u32 {
    // Box-Muller; 1 - U is never 0.
    let (u, v) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
    let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    (TOKENS_MEDIAN * (TOKENS_SIGMA * normal).exp()).clamp(1.0, TOKENS_MAX) as u32
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Ok,
    /// Refused: no room.
    Busy,
    /// A stream that broke off after its first token.
    Cut,
    /// Anything else.
    Failed,
}

/// What became of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub(crate) region: usize,
    pub(crate) class: Class,
    /// From when the call was due to its first token; streams only.
    pub(crate) first_token: Option<Duration>,
    pub(crate) ended: Instant,
    /// Whether another node than the one called served it.
    pub(crate) forwarded: bool,
}

/// Somebody a client may call.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) channel: Channel,
    /// `NODE.REGION`, when it is a node.
    pub(crate) node: Option<String>,
}

/// Makes one call, which was due at `due`, with the servers in the order in which they are tried.
pub(crate) async fn call(arrival: Arrival, due: Instant, servers: Vec<Server>) -> Done {
    let mut attempts = servers.into_iter().take(1 + OTHERS_MAX).peekable();
    loop {
        let Some(server) = attempts.next() else {
            return done(arrival, Class::Failed, None);
        };
        let (ended, tokens) = attempt(arrival, &server.channel).await;
        let first_token = ended
            .first_message
            .filter(|_| arrival.is_stream)
            .map(|first| first.saturating_duration_since(due));
        let code = ended.status.code();
        let is_silent = ended.head.is_none() && ended.trailers.is_empty();
        let class = match code {
            Code::Ok if tokens == arrival.tokens => Class::Ok,
            Code::ResourceExhausted if ended.messages == 0 => Class::Busy,
            Code::Ok | Code::DeadlineExceeded => Class::Failed,
            _ if arrival.is_stream && tokens > 0 => Class::Cut,
            // The node itself did not answer: the client asks another, if it knows one.
            _ if is_silent && server.node.is_some() && attempts.peek().is_some() => continue,
            _ => Class::Failed,
        };
        if class == Class::Failed {
            let message = ended.status.message();
            tracing::error!(?arrival, ?code, message, tokens, "a call failed");
        }
        let forwarded = match (&server.node, ended.served_by()) {
            (Some(called), Some(by)) => by.split('/').next() != Some(called),
            _ => false,
        };
        return Done { forwarded, ..done(arrival, class, first_token) };
    }
}

fn done(arrival: Arrival, class: Class, first_token: Option<Duration>) -> Done {
    Done {
        region: arrival.region,
        class,
        first_token: first_token.filter(|_| class != Class::Busy),
        ended: clock::now(),
        forwarded: false,
    }
}

/// One attempt, and how many tokens it brought.
async fn attempt(arrival: Arrival, channel: &Channel) -> (caller::Ended, u32) {
    let path = if arrival.is_stream {
        "/inference.GRPCInferenceService/ModelStreamInfer"
    } else {
        "/inference.GRPCInferenceService/ModelInfer"
    };
    let method = Method {
        path: PathAndQuery::from_static(path),
        metadata: MetadataMap::new(),
        deadline: Some(DEADLINE),
    };
    let request = tokio_stream::once(request(arrival));
    let mut tokens = 0;
    let ended = caller::call(channel, &method, request, |message| {
        tokens += tokens_of(&message, arrival.is_stream);
        ControlFlow::Continue(())
    })
    .await;
    (ended, tokens)
}

fn request(arrival: Arrival) -> Bytes {
    let prompt = format!("Say something of call {}.", arrival.number);
    let contents =
        InferTensorContents { bytes_contents: vec![prompt.into_bytes()], ..Default::default() };
    let input = InferInputTensor {
        name: "text_input".to_owned(),
        datatype: "BYTES".to_owned(),
        shape: vec![1],
        contents: Some(contents),
        ..Default::default()
    };
    let tokens = ParameterChoice::Int64Param(arrival.tokens.into());
    let max_tokens = InferParameter { parameter_choice: Some(tokens) };
    let request = ModelInferRequest {
        model_name: MODEL.to_owned(),
        parameters: [("max_tokens".to_owned(), max_tokens)].into(),
        inputs: vec![input],
        ..Default::default()
    };
    request.encode_to_vec().into()
}

/// How many tokens a message brings: words, for this engine.
fn tokens_of(message: &Bytes, is_stream: bool) -> u32 {
    let answer = if is_stream {
        let part = ModelStreamInferResponse::decode(message.clone()).ok();
        part.filter(|part| part.error_message.is_empty()).and_then(|part| part.infer_response)
    } else {
        ModelInferResponse::decode(message.clone()).ok()
    };
    let texts = answer.into_iter().flat_map(|answer| answer.outputs);
    let texts = texts.filter_map(|output| output.contents).flat_map(|c| c.bytes_contents);
    let words = texts.map(|text| String::from_utf8_lossy(&text).split_whitespace().count());
    u32::try_from(words.sum::<usize>()).unwrap_or(u32::MAX)
}

/// What is known of the calls of one region, or of all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) in_flight: u64,
    pub(crate) calls: u64,
    pub(crate) ok: u64,
    pub(crate) busy: u64,
    pub(crate) cut: u64,
    pub(crate) failed: u64,
    pub(crate) forwarded: u64,
    pub(crate) first_token: Latencies,
    recent: VecDeque<Instant>,
}

impl Figures {
    pub(crate) fn began(&mut self) {
        self.in_flight += 1;
    }

    pub(crate) fn ended(&mut self, done: &Done) {
        self.in_flight -= 1;
        self.calls += 1;
        let count = match done.class {
            Class::Ok => &mut self.ok,
            Class::Busy => &mut self.busy,
            Class::Cut => &mut self.cut,
            Class::Failed => &mut self.failed,
        };
        *count += 1;
        self.forwarded += u64::from(done.forwarded);
        if let Some(first) = done.first_token {
            self.first_token.record(first);
        }
        self.recent.push_back(done.ended);
    }

    /// Takes in what is known of another region, but for its rate.
    pub(crate) fn add(&mut self, other: &Self) {
        self.in_flight += other.in_flight;
        self.calls += other.calls;
        self.ok += other.ok;
        self.busy += other.busy;
        self.cut += other.cut;
        self.failed += other.failed;
        self.forwarded += other.forwarded;
        self.first_token.add(&other.first_token);
    }

    /// Calls that ended per second, lately.
    pub(crate) fn per_second(&mut self, now: Instant) -> f64 {
        while self.recent.front().is_some_and(|at| now.saturating_duration_since(*at) > RATE_OVER) {
            self.recent.pop_front();
        }
        self.recent.len() as f64 / RATE_OVER.as_secs_f64()
    }

    /// Share of the calls that were refused.
    pub(crate) fn busy_share(&self) -> f64 {
        self.busy as f64 / self.calls.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(200);

    #[test]
    fn arrivals_are_the_same_for_a_seed_and_in_order() {
        let all = arrivals(7, Duration::from_secs(5));
        assert_eq!(all, arrivals(7, Duration::from_secs(5)));
        assert_ne!(all, arrivals(8, Duration::from_secs(5)));
        assert!(all.is_sorted_by_key(|arrival| arrival.at));
        assert!(all.iter().zip(0..).all(|(arrival, number)| arrival.number == number));
    }

    #[test]
    fn each_region_asks_for_its_share_of_what_it_can_do() {
        let all = arrivals(1, LONG);
        for (region, (_, demand)) in REGIONS.iter().enumerate() {
            let calls = all.iter().filter(|arrival| arrival.region == region);
            let steps: f64 = calls.map(|call| f64::from(call.tokens)).sum();
            let engines = (NODES_PER_REGION * ENGINES_PER_NODE) as f64;
            let possible =
                LONG.as_secs_f64() * engines * f64::from(SLOTS) / (2.0 * STEP.as_secs_f64());
            let asked = steps / possible;
            assert!((asked / demand - 1.0).abs() < 0.06, "region {region}: {asked}");
        }
        let streams = all.iter().filter(|arrival| arrival.is_stream).count();
        assert!((0.45..0.55).contains(&(streams as f64 / all.len() as f64)));
    }
}
