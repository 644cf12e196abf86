//! This node's engines: which of them serves a call, and a slot for it.

use std::sync::Arc;

use balance::{Candidate, Slots, least_utilised};
use base::{EngineName, ModelName};
use http::{Request, Response};
use inference::Protocol;
use parking_lot::Mutex;
use tonic::body::Body;
use transport::{Channel, Target, TransportError};

use crate::{config::EngineConfig, refusal::Refusal};

/// What begins the path of every KServe v2 method.
const KSERVE_SERVICE: &str = "/inference.GRPCInferenceService/";

/// One engine, shared by all workers: its slots are one count, never split.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) name: EngineName,
    pub(crate) target: Target,
    protocol: Protocol,
    models: Vec<ModelName>,
    slots: Mutex<Slots>,
}

impl Engine {
    pub(crate) fn new(config: &EngineConfig) -> Self {
        let name = format!("engine {}", config.name);
        Self {
            target: Target::plaintext(&name, config.url.authority()),
            name: config.name.clone(),
            protocol: config.protocol,
            models: config.models.clone(),
            slots: Mutex::new(Slots::new(config.slots)),
        }
    }

    /// Calls in progress.
    pub(crate) fn in_flight(&self) -> u32 {
        self.slots.lock().in_flight()
    }

    fn candidate(&self) -> Candidate {
        let slots = *self.slots.lock();
        Candidate { in_flight: slots.in_flight(), slots: slots.limit() }
    }

    /// How well it suits a call; `None`: not at all.
    fn suits(&self, path: &str, model: Option<&ModelName>) -> Option<Suits> {
        match (self.protocol, path.starts_with(KSERVE_SERVICE)) {
            (Protocol::KserveV2, true) => match model {
                None => Some(Suits::Well),
                Some(model) if self.models.contains(model) => Some(Suits::Well),
                // An engine that lists no models is asked: it knows best, and its own error says so.
                Some(_) if self.models.is_empty() => Some(Suits::Perhaps),
                Some(_) => None,
            },
            (Protocol::Grpc, false) => Some(Suits::Well),
            // An engine may offer more than its protocol asks for: health, reflection, services of its own.
            (Protocol::KserveV2, false) | (Protocol::Grpc, true) => Some(Suits::Perhaps),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suits {
    Perhaps,
    Well,
}

/// The engines of a node, as one worker calls them. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Engines(Arc<[(Arc<Engine>, Channel)]>);

/// A slot of an engine, given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    engine: Arc<Engine>,
    channel: Channel,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.engine.slots.lock().give_back();
    }
}

impl Slot {
    pub(crate) fn engine(&self) -> &EngineName {
        &self.engine.name
    }

    /// Makes the call.
    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Body>, Refusal> {
        self.channel.send(request).await.map_err(|error| self.refusal(error))
    }

    fn refusal(&self, error: TransportError) -> Refusal {
        let target = self.channel.target().name().to_owned();
        Refusal::Transport { target, to_peer: false, error }
    }
}

impl Engines {
    pub(crate) fn new(engines: impl Iterator<Item = (Arc<Engine>, Channel)>) -> Self {
        Self(engines.collect())
    }

    /// Whether the model of a call decides which engine serves it.
    pub(crate) fn depend_on_model(&self) -> bool {
        self.0.iter().any(|(engine, _)| !engine.models.is_empty())
    }

    /// A slot of the least utilised of the engines that suit best and have room.
    pub(crate) fn take(&self, path: &str, model: Option<&ModelName>) -> Result<Slot, Refusal> {
        let mut is_served = false;
        for wanted in [Suits::Well, Suits::Perhaps] {
            let mut suited: Vec<_> =
                self.0.iter().filter(|(e, _)| e.suits(path, model) == Some(wanted)).collect();
            is_served |= !suited.is_empty();
            // Another worker may take the last slot between the look and the taking: then the next is tried.
            while !suited.is_empty() {
                let candidates: Vec<_> = suited.iter().map(|(e, _)| e.candidate()).collect();
                let Some(least) = least_utilised(&candidates) else { break };
                let (engine, channel) = suited.swap_remove(least);
                if engine.slots.lock().take() {
                    return Ok(Slot { engine: engine.clone(), channel: channel.clone() });
                }
            }
        }
        let what = model.map_or_else(|| path.to_owned(), |model| format!("model {model}"));
        Err(if is_served { Refusal::Full { what } } else { Refusal::NoEngine { what } })
    }
}
