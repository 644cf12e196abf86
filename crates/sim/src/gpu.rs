//! The batch on the wall clock: who may generate, what comes of it, and who has gone away.
//!
//! One driver ([`Gpu::drive`]) owns time. A call holds a [`Generation`], which reads how far its request has come: one
//! number, however slowly it is read. Dropping it cancels the request.
//!
//! A server drops it when the caller goes away. Over HTTP/1.1 that has a limit, which is hyper's: it looks for the end of
//! a connection only while nothing has arrived after the request in progress. Of a caller that sends more bytes behind
//! its request and leaves, it learns when it next writes, and so at the end of a call that is not streamed.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use base::{ModelName, clock};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    batch::{Batch, BatchConfig, Busy, Figures, Output, RequestId, Work},
    engine::{Config, TOKENS_MAX},
    fault::Fault,
    metrics::Metrics,
    prefix::{PrefixCache, Prompt},
    words::Words,
};

/// How much of a name a message repeats.
const SHOWN_CHARS_MAX: usize = 100;

/// What all ports of one engine share.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) model: ModelName,
    pub(crate) metrics: Metrics,
    /// Cancelled when no call is taken any more; those in progress go on.
    pub(crate) drain: CancellationToken,
    /// Cancelled when what has not finished is given up.
    pub(crate) closed: CancellationToken,
    /// Cancelled when the engine was told to die.
    pub(crate) died: CancellationToken,
    default_tokens: u32,
    prefill_tokens_per_step: u32,
    state: Mutex<State>,
    /// Told when the deadline of the batch has changed.
    wake: Notify,
    hung: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    batch: Batch,
    prefix: PrefixCache,
    calls: HashMap<RequestId, Call>,
}

/// What the driver knows of a request.
#[derive(Debug)]
struct Call {
    arrived: Instant,
    /// Tokens it has yielded.
    progress: watch::Sender<u32>,
}

/// What a call asks for.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) model: &'a str,
    pub(crate) prompt: &'a str,
    /// How many tokens, if it says; any number, checked here.
    pub(crate) tokens: Option<i128>,
}

/// Why a call gets no (further) token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The caller's fault.
    #[error("model `{asked}` is not served here: ask for `{served}`")]
    UnknownModel { asked: String, served: ModelName },
    /// The caller's fault.
    #[error("max_tokens is a whole number from 1 to {TOKENS_MAX}, not {0}")]
    Tokens(i128),
    /// Nobody's fault; the same call may be taken later, or elsewhere now.
    #[error("server busy: no room for a request, try again in {} ms", wait_ms(*.0))]
    Busy(Busy),
    /// Nobody's fault; another server may take the call.
    #[error("the server is stopping")]
    Stopped,
}

impl Gpu {
    pub(crate) fn new(config: &Config, drain: CancellationToken) -> Self {
        let batch = BatchConfig {
            slots: config.slots,
            queue: config.queue.unwrap_or_else(|| (config.slots / 4).max(1)),
            step: config.step,
        };
        Self {
            model: config.model.clone(),
            metrics: Metrics::new(&config.model),
            drain,
            closed: CancellationToken::new(),
            died: CancellationToken::new(),
            default_tokens: config.max_tokens,
            prefill_tokens_per_step: config.prefill_tokens_per_step,
            state: Mutex::new(State {
                batch: Batch::new(batch),
                prefix: PrefixCache::new(config.cache_blocks),
                calls: HashMap::new(),
            }),
            wake: Notify::new(),
            hung: watch::Sender::new(false),
        }
    }

    /// Whether `name` is the model served.
    pub(crate) fn check_model(&self, name: &str) -> Result<(), Refusal> {
        if name == self.model.as_str() {
            return Ok(());
        }
        Err(Refusal::UnknownModel { asked: shown(name), served: self.model.clone() })
    }

    /// Begins to generate.
    pub(crate) fn generate(self: &Arc<Self>, ask: &Ask<'_>) -> Result<Generation, Refusal> {
        self.check_model(ask.model)?;
        let tokens = match ask.tokens {
            None => self.default_tokens,
            Some(tokens) => u32::try_from(tokens)
                .ok()
                .filter(|tokens| (1..=TOKENS_MAX).contains(tokens))
                .ok_or(Refusal::Tokens(tokens))?,
        };
        if self.drain.is_cancelled() {
            return Err(Refusal::Stopped);
        }
        let prompt = Prompt::new(ask.prompt);
        let (id, progress) = self.admit(&prompt, tokens).map_err(Refusal::Busy)?;
        let words = Words::after(ask.prompt);
        Ok(Generation {
            gpu: self.clone(),
            id,
            words,
            prompt_tokens: prompt.tokens(),
            tokens,
            taken: 0,
            progress,
        })
    }

    fn admit(
        &self,
        prompt: &Prompt,
        tokens: u32,
    ) -> Result<(RequestId, watch::Receiver<u32>), Busy> {
        let now = clock::now();
        let mut state = self.state.lock();
        let cached = state.prefix.cached_tokens(prompt);
        let prefill_steps = prompt.prefill_steps(cached, self.prefill_tokens_per_step);
        let before = state.batch.next_deadline();
        let admitted = state.batch.arrive(now, Work { prefill_steps, tokens });
        self.wake_if_changed(before, &state.batch);
        let id = admitted.inspect_err(|_| self.metrics.refused())?;
        // A little early: the request has yet to run. Those that come meanwhile run after it.
        state.prefix.insert(prompt);
        self.metrics.admitted(prompt.tokens(), cached);
        let (sender, progress) = watch::channel(0);
        state.calls.insert(id, Call { arrived: now, progress: sender });
        Ok((id, progress))
    }

    fn cancel(&self, id: RequestId) {
        let mut state = self.state.lock();
        // Otherwise it has finished, or the engine has closed.
        if state.calls.remove(&id).is_some() {
            let before = state.batch.next_deadline();
            state.batch.cancel(clock::now(), id);
            self.wake_if_changed(before, &state.batch);
            self.metrics.aborted();
        }
    }

    fn wake_if_changed(&self, before: Option<Instant>, batch: &Batch) {
        if batch.next_deadline() != before {
            self.wake.notify_one();
        }
    }

    /// Ends steps when they are due, for ever.
    pub(crate) async fn drive(&self) -> Infallible {
        loop {
            match self.deliver(clock::now()) {
                None => self.wake.notified().await,
                Some(deadline) => tokio::select! {
                    () = tokio::time::sleep_until(deadline.into()) => {}
                    () = self.wake.notified() => {}
                },
            }
        }
    }

    /// Tells each call how far it has come; when to do so again.
    fn deliver(&self, now: Instant) -> Option<Instant> {
        let mut state = self.state.lock();
        let State { batch, calls, .. } = &mut *state;
        for output in batch.poll(now) {
            match output {
                Output::Token { id, index } => {
                    let Some(call) = calls.get(&id) else { continue };
                    let first = (index == 0).then(|| now.saturating_duration_since(call.arrived));
                    self.metrics.token(first);
                    call.progress.send_replace(index + 1);
                }
                Output::Finished { id } => {
                    if calls.remove(&id).is_some() {
                        self.metrics.finished();
                    }
                }
            }
        }
        batch.next_deadline()
    }

    /// Gives up what has not finished.
    pub(crate) fn close(&self) {
        self.closed.cancel();
        self.state.lock().calls.clear();
    }

    /// Begins a fault, or ends it.
    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        let now = clock::now();
        let mut state = self.state.lock();
        match fault {
            Some(fault) => state.batch.inject(now, fault),
            None => state.batch.heal(now),
        }
        self.hung.send_replace(fault == Some(Fault::Hang));
        self.wake.notify_one();
    }

    pub(crate) fn fault(&self) -> Option<Fault> {
        self.state.lock().batch.fault()
    }

    pub(crate) fn figures(&self) -> Figures {
        self.state.lock().batch.figures()
    }

    /// Waits until the engine does not hang. One that hangs and closes refuses.
    pub(crate) async fn awake(&self) -> Result<(), Refusal> {
        let mut hung = self.hung.subscribe();
        tokio::select! {
            biased;
            // Fails only when the sender is gone, which `self` holds.
            _ = hung.wait_for(|hung| !hung) => Ok(()),
            () = self.closed.cancelled() => Err(Refusal::Stopped),
        }
    }

    /// Everything counted, in the text format.
    pub(crate) fn render_metrics(&self) -> Result<String, std::fmt::Error> {
        self.metrics.render(self.figures())
    }
}

/// The tokens of one request as they come. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Generation {
    gpu: Arc<Gpu>,
    id: RequestId,
    words: Words,
    pub(crate) prompt_tokens: u32,
    pub(crate) tokens: u32,
    taken: u32,
    progress: watch::Receiver<u32>,
}

impl Generation {
    /// The next token; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Result<String, Refusal>> {
        if self.is_done() {
            return None;
        }
        let index = self.taken;
        if self.progress.wait_for(|yielded| *yielded > index).await.is_err() {
            self.taken = self.tokens;
            return Some(Err(Refusal::Stopped));
        }
        self.taken += 1;
        Some(Ok(self.words.token(index)))
    }

    /// Whether no token was taken yet.
    pub(crate) fn is_untouched(&self) -> bool {
        self.taken == 0
    }

    /// Whether the last token was taken.
    pub(crate) fn is_done(&self) -> bool {
        self.taken == self.tokens
    }

    /// All tokens as one text, once the last has come.
    pub(crate) async fn text(mut self) -> Result<String, Refusal> {
        let last = self.tokens;
        let all = self.progress.wait_for(|yielded| *yielded == last).await.is_ok();
        if all { Ok(self.words.text(last)) } else { Err(Refusal::Stopped) }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.gpu.cancel(self.id);
    }
}

/// As much of a name as a message repeats.
pub(crate) fn shown(name: &str) -> String {
    name.chars().take(SHOWN_CHARS_MAX).collect()
}

fn wait_ms(busy: Busy) -> u64 {
    round_up(busy.retry_after, Duration::from_millis(1))
}

/// How long a refused caller is told to wait, in whole units, rounded up so that nobody comes back too early.
pub(crate) fn round_up(wait: Duration, unit: Duration) -> u64 {
    u64::try_from(wait.as_nanos().div_ceil(unit.as_nanos().max(1))).unwrap_or(u64::MAX).max(1)
}
