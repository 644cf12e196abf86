//! Which request yields a token when? A GPU that batches continuously, as a machine without IO: time is an argument.
//!
//! ```text
//!   arrive ──> slot ──┐ joins at the next boundary
//!        └───> queue ─┤
//!                     v
//!   ──┤ step ├┤ step ├┤ step ├──> every request of the step: a part of its prompt taken in, or one token more
//!
//!   length of a step = base × (1 + running / slots) × slow factor          (1)
//! ```
//!
//! The step that takes in the last part of a prompt yields the first token: `n` parts and `t` tokens take `n + t - 1`
//! steps. (1) is fixed when a step starts, but for the factor: when that changes, so does what is left of the step.
//! (1) makes a full batch half as fast per request and `slots / 2` times as fast in all as a request alone would be.
//! Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022, §4.1.
//! Deliberately absent: memory for keys and values, preemption, and prefill that slows a step down.

use std::{
    collections::{VecDeque, vec_deque},
    time::{Duration, Instant},
};

use crate::fault::Fault;

#[cfg(test)]
mod tests;

/// Steps made up for after a late [`Batch::poll`]. What is later than that is written off, as if the GPU had stood still.
const CATCH_UP_STEPS: usize = 256;
/// Outputs nobody has polled beyond which no step ends. The last step may exceed it by two for every slot.
const OUTPUTS_MAX: usize = 1 << 20;
/// What a refused request is told when nobody can know: the batch hangs or refuses everything.
const RETRY_AFTER_UNKNOWN: Duration = Duration::from_secs(1);
/// Shortest step of an empty batch.
pub(crate) const STEP_MIN: Duration = Duration::from_micros(1);
/// Longest step of an empty batch.
pub(crate) const STEP_MAX: Duration = Duration::from_secs(60);

/// How large and how fast a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchConfig {
    /// Requests that run at once; 0 counts as 1.
    pub(crate) slots: u32,
    /// Requests that wait for a slot; beyond it an arrival is [`Busy`].
    pub(crate) queue: u32,
    /// Length of a step of an empty batch, between [`STEP_MIN`] and [`STEP_MAX`]; what lies outside counts as the nearer.
    pub(crate) step: Duration,
}

/// What a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    /// Steps that take in the prompt, of which the last yields the first token; 0 counts as 1.
    pub(crate) prefill_steps: u32,
    /// Tokens it yields, one a step; 0 counts as 1.
    pub(crate) tokens: u32,
}

/// Names a request of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RequestId(u64);

/// There is no room. Nothing has changed; the same request may be taken later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room for {retry_after:?}")]
pub(crate) struct Busy {
    /// When there is room if nothing else arrives; an estimate.
    pub(crate) retry_after: Duration,
}

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// A request yielded a token.
    Token {
        /// Which request.
        id: RequestId,
        /// 0 for its first token.
        index: u32,
    },
    /// A request has yielded its last token and left its slot.
    Finished {
        /// Which request.
        id: RequestId,
    },
}

/// What a batch holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Requests in a slot.
    pub(crate) running: u32,
    /// Requests in the queue.
    pub(crate) waiting: u32,
    /// Requests that could be in a slot.
    pub(crate) slots: u32,
    /// Requests that could be in the queue.
    pub(crate) queue: u32,
    /// Steps that have ended so far.
    pub(crate) steps: u64,
}

/// A batch. See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    config: BatchConfig,
    slots: Vec<Request>,
    queue: VecDeque<Request>,
    step: Option<Step>,
    fault: Option<Fault>,
    hung_since: Option<Instant>,
    outputs: VecDeque<Output>,
    /// When the first of `outputs` was due.
    outputs_since: Option<Instant>,
    arrivals: u64,
    steps: u64,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    id: RequestId,
    /// Steps before the one that yields the first token.
    silent_left: u32,
    tokens: u32,
    yielded: u32,
    /// Whether it is part of the step in progress.
    joined: bool,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    ends: Instant,
    length: Duration,
}

impl Batch {
    /// An empty batch without a fault.
    #[must_use]
    pub(crate) fn new(config: BatchConfig) -> Self {
        let (slots, step) = (config.slots.max(1), config.step.clamp(STEP_MIN, STEP_MAX));
        Self {
            config: BatchConfig { slots, step, ..config },
            slots: Vec::new(),
            queue: VecDeque::new(),
            step: None,
            fault: None,
            hung_since: None,
            outputs: VecDeque::new(),
            outputs_since: None,
            arrivals: 0,
            steps: 0,
        }
    }

    /// Takes a request into a slot, or else the queue.
    ///
    /// # Errors
    /// [`Busy`] when both are full, or the batch refuses.
    pub(crate) fn arrive(&mut self, now: Instant, work: Work) -> Result<RequestId, Busy> {
        self.advance(now);
        if self.fault == Some(Fault::Refuse) || !self.has_room() {
            return Err(Busy { retry_after: self.room_in(now) });
        }
        let id = RequestId(self.arrivals);
        self.arrivals += 1;
        self.queue.push_back(Request {
            id,
            silent_left: work.prefill_steps.saturating_sub(1),
            tokens: work.tokens.max(1),
            yielded: 0,
            joined: false,
        });
        self.fill_slots();
        self.start_if_idle(now);
        Ok(id)
    }

    /// Forgets a request, and what of it [`Batch::poll`] has not handed out. Says whether it was there.
    pub(crate) fn cancel(&mut self, now: Instant, id: RequestId) -> bool {
        self.advance(now);
        let before = self.slots.len() + self.queue.len();
        self.slots.retain(|request| request.id != id);
        self.queue.retain(|request| request.id != id);
        self.outputs.retain(|output| output.id() != id);
        if self.outputs.is_empty() {
            self.outputs_since = None;
        }
        let was_there = self.slots.len() + self.queue.len() < before;
        self.fill_slots();
        if self.slots.is_empty() {
            self.step = None;
        }
        was_there
    }

    /// When to call [`Batch::poll`] next; `None` until the next arrival or change of fault.
    #[must_use]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let step = self.step.filter(|_| self.hung_since.is_none()).map(|step| step.ends);
        self.outputs_since.or(step)
    }

    /// Ends the steps that are due, and hands out what came of them, in order.
    ///
    /// Called late, it makes up for at most 256 steps, fewer when a million outputs wait; steps are as long as if it had
    /// been called in time.
    pub(crate) fn poll(&mut self, now: Instant) -> vec_deque::Drain<'_, Output> {
        self.advance(now);
        self.outputs_since = None;
        self.outputs.drain(..)
    }

    /// Begins a fault, in place of the one there was.
    pub(crate) fn inject(&mut self, now: Instant, fault: Fault) {
        self.change(now, Some(fault));
    }

    /// Ends the fault.
    pub(crate) fn heal(&mut self, now: Instant) {
        self.change(now, None);
    }

    /// The fault.
    #[must_use]
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// How full it is.
    #[must_use]
    pub(crate) fn figures(&self) -> Figures {
        let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        Figures {
            running: count(self.slots.len()),
            waiting: count(self.queue.len()),
            slots: self.config.slots,
            queue: self.config.queue,
            steps: self.steps,
        }
    }

    fn has_room(&self) -> bool {
        self.slots.len() < self.config.slots as usize
            || self.queue.len() < self.config.queue as usize
    }

    /// How long until the first request that runs ends, which makes room.
    fn room_in(&self, now: Instant) -> Duration {
        let (Some(step), None | Some(Fault::Slow(_))) = (self.step, self.fault) else {
            return RETRY_AFTER_UNKNOWN;
        };
        let steps = self.slots.iter().map(Request::steps_left).min().unwrap_or(1);
        step.ends.saturating_duration_since(now)
            + self.step_length().saturating_mul(steps.saturating_sub(1))
    }

    fn change(&mut self, now: Instant, fault: Option<Fault>) {
        self.advance(now);
        // Since then the step has stood still.
        let since = self.hung_since.take().unwrap_or(now);
        let before = self.slow_factor();
        self.fault = fault;
        let ratio = self.slow_factor() / before;
        if let Some(step) = &mut self.step {
            step.ends = now + step.ends.saturating_duration_since(since).mul_f64(ratio);
            step.length = step.length.mul_f64(ratio);
        }
        self.hung_since = (fault == Some(Fault::Hang)).then_some(now);
        self.start_if_idle(now);
    }

    /// Ends the steps that are due at `now`, within the bounds.
    fn advance(&mut self, now: Instant) {
        if self.hung_since.is_some() {
            return;
        }
        for _ in 0..CATCH_UP_STEPS {
            let Some(step) = self.step.filter(|step| step.ends <= now) else { return };
            if self.outputs.len() >= OUTPUTS_MAX {
                break;
            }
            self.end_step(step.ends);
            self.start_step(step.ends);
        }
        if let Some(step) = self.step.as_mut().filter(|step| step.ends <= now) {
            step.ends = now + step.length;
        }
    }

    fn end_step(&mut self, at: Instant) {
        self.steps += 1;
        for request in self.slots.iter_mut().filter(|request| request.joined) {
            self.outputs.extend(request.step());
            if request.is_finished() {
                self.outputs.push_back(Output::Finished { id: request.id });
            }
        }
        if !self.outputs.is_empty() {
            self.outputs_since.get_or_insert(at);
        }
        self.slots.retain(|request| !request.is_finished());
        self.fill_slots();
    }

    fn fill_slots(&mut self) {
        while self.slots.len() < self.config.slots as usize
            && let Some(request) = self.queue.pop_front()
        {
            self.slots.push(request);
        }
    }

    fn start_if_idle(&mut self, now: Instant) {
        if self.step.is_none() && self.hung_since.is_none() {
            self.start_step(now);
        }
    }

    fn start_step(&mut self, at: Instant) {
        for request in &mut self.slots {
            request.joined = true;
        }
        let length = self.step_length();
        self.step = (!self.slots.is_empty()).then(|| Step { ends: at + length, length });
    }

    /// Equation (1).
    fn step_length(&self) -> Duration {
        let figures = self.figures();
        let load = 1.0 + f64::from(figures.running) / f64::from(figures.slots);
        self.config.step.mul_f64(load * self.slow_factor())
    }

    fn slow_factor(&self) -> f64 {
        match self.fault {
            Some(Fault::Slow(factor)) => factor.into(),
            Some(Fault::Hang | Fault::Refuse) | None => 1.0,
        }
    }
}

impl Request {
    /// Takes part in a step; the token that came of it.
    fn step(&mut self) -> Option<Output> {
        if self.silent_left > 0 {
            self.silent_left -= 1;
            return None;
        }
        let index = self.yielded;
        self.yielded += 1;
        Some(Output::Token { id: self.id, index })
    }

    fn is_finished(&self) -> bool {
        self.yielded == self.tokens
    }

    /// Steps until it is finished, the one in progress included.
    fn steps_left(&self) -> u32 {
        let own = self.silent_left.saturating_add(self.tokens - self.yielded);
        own.saturating_add(u32::from(!self.joined))
    }
}

impl Figures {
    /// The share of the memory for keys and values in use: here, of the slots.
    #[must_use]
    pub(crate) fn cache_usage(&self) -> f64 {
        f64::from(self.running) / f64::from(self.slots.max(1))
    }
}

impl Output {
    /// Which request it is about.
    #[must_use]
    pub(crate) fn id(&self) -> RequestId {
        match self {
            Self::Token { id, .. } | Self::Finished { id } => *id,
        }
    }
}
