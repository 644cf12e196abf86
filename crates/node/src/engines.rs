//! This node's engines: the machine of each, shared by all workers, and a channel to it per worker.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use balance::{HealthChange, Outcome, Place, Server, Standing, Ticket};
use base::{EngineName, Load, clock};
use http::{HeaderMap, Request, Response};
use inference::Reflected;
use membership::EngineDescriptor;
use parking_lot::Mutex;
use rand::Rng;
use tonic::body::Body;
use transport::{Channel, Target, TransportError};

use crate::{
    config::{EngineConfig, HealthConfig},
    offer::{Ask, Has, Offer},
    orca,
    steps::Steps,
};

/// One engine, shared by all workers: its machine is one, never split.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) name: EngineName,
    pub(crate) target: Target,
    pub(crate) offer: Offer,
    pub(crate) health: HealthConfig,
    /// What all nodes that front it call it; `None`: this node alone fronts it.
    pub(crate) id: Option<EngineName>,
    /// Its slots in all.
    pub(crate) slots: Option<NonZeroU32>,
    machine: Mutex<balance::Engine>,
    /// How often it has come back from failing its health checks.
    returns: AtomicU32,
    reflected: Mutex<Arc<Reflected>>,
}

impl Engine {
    pub(crate) fn new(config: &EngineConfig, rng: &mut impl Rng) -> Self {
        let name = format!("engine {}", config.name);
        let (now, health) = (clock::now(), config.health.machine());
        // Others may front it, and do not know of this node yet.
        let is_shared = config.id.is_some() && config.slots.is_some();
        let slots = if is_shared { Some(NonZeroU32::MIN) } else { config.slots };
        Self {
            target: Target::plaintext(&name, config.url.authority()),
            name: config.name.clone(),
            offer: Offer { protocol: config.protocol, models: config.models.clone() },
            health: config.health.clone(),
            id: config.id.clone(),
            slots: config.slots,
            machine: Mutex::new(balance::Engine::new(slots, health, now, rng)),
            returns: AtomicU32::new(0),
            reflected: Mutex::default(),
        }
    }

    /// How pressed it is.
    pub(crate) fn load(&self) -> Load {
        self.machine.lock().load(clock::now())
    }

    /// Whether it passes its health checks.
    pub(crate) fn is_healthy(&self) -> bool {
        self.machine.lock().is_healthy()
    }

    /// Whether it may be sent calls.
    pub(crate) fn standing(&self) -> Standing {
        self.machine.lock().standing(clock::now())
    }

    /// What others need to know of it, but for its services.
    pub(crate) fn describe(&self) -> EngineDescriptor {
        EngineDescriptor {
            name: self.name.clone(),
            protocol: self.offer.protocol.to_string(),
            models: self.offer.models.clone(),
            services: Vec::new(),
            id: self.id.clone(),
            slots: self.slots.map(NonZeroU32::get),
        }
    }

    /// So many of its slots are this node's from now on. Returns whether that is news.
    pub(crate) fn set_share(&self, share: NonZeroU32) -> bool {
        self.machine.lock().set_slots(Some(share))
    }

    /// How often it has come back from failing its health checks: each time it may be another one.
    pub(crate) fn returns(&self) -> u32 {
        self.returns.load(Ordering::Relaxed)
    }

    /// What it reflects.
    pub(crate) fn reflected(&self) -> Arc<Reflected> {
        self.reflected.lock().clone()
    }

    /// It reflects this; returns what it did before.
    pub(crate) fn reflect(&self, reflected: Reflected) -> Arc<Reflected> {
        std::mem::replace(&mut *self.reflected.lock(), Arc::new(reflected))
    }

    /// How long until its next health check.
    pub(crate) fn check_in(&self) -> Duration {
        self.machine.lock().next_check().saturating_duration_since(clock::now())
    }

    /// A health check ended; `Err` says why it failed.
    pub(crate) fn checked(&self, result: Result<(), String>, rng: &mut impl Rng) {
        let change = self.machine.lock().checked(clock::now(), result.is_ok(), rng);
        match (change, result) {
            (Some(HealthChange::Left), Err(error)) => {
                tracing::warn!(engine = %self.name, error, "an engine failed its health checks and leaves");
            }
            (Some(HealthChange::Returned), _) => {
                self.returns.fetch_add(1, Ordering::Relaxed);
                tracing::info!(engine = %self.name, "an engine passes its health checks again and returns slowly");
            }
            (_, Err(error)) => tracing::debug!(engine = %self.name, error, "a health check failed"),
            (_, Ok(())) => {}
        }
    }

    fn ended(&self, ticket: Ticket, outcome: Outcome, asked: Option<Duration>, steps: &Steps) {
        let mut machine = self.machine.lock();
        let (steps, took) = steps.sum();
        machine.stepped(steps, took);
        if machine.ended(clock::now(), ticket, outcome, asked) {
            tracing::warn!(engine = %self.name, "calls to an engine broke off again and again; it is ejected for a while");
        }
    }
}

/// The engines of a node, as one worker calls them. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Engines(Arc<[(Arc<Engine>, Channel)]>);

/// A slot of an engine. Dropped without a word, its call was given up by the caller.
#[derive(Debug)]
pub(crate) struct Slot {
    engine: Arc<Engine>,
    channel: Channel,
    ticket: Option<Ticket>,
    steps: Steps,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.ended(Outcome::Caller, None);
    }
}

impl Slot {
    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Makes the call.
    pub(crate) async fn send(
        &self,
        request: Request<Body>,
    ) -> Result<Response<Body>, TransportError> {
        self.channel.send(request).await
    }

    /// The engine began to answer, and not with a failure.
    pub(crate) fn answered(&self) {
        self.engine.machine.lock().answered(clock::now());
    }

    /// The call is over; the slot is free. `asked`: how long a busy engine wants to be left alone.
    pub(crate) fn ended(&mut self, outcome: Outcome, asked: Option<Duration>) {
        if let Some(ticket) = self.ticket.take() {
            self.engine.ended(ticket, outcome, asked, &self.steps);
        }
    }

    /// A piece of the answer passes.
    pub(crate) fn saw(&mut self, data: &[u8]) {
        self.steps.saw(data, clock::now);
    }

    /// What the engine says of itself in its trailers.
    pub(crate) fn said(&self, trailers: &HeaderMap) {
        if let Some(said) = orca::said(trailers) {
            self.engine.machine.lock().said(clock::now(), said);
        }
    }

    /// How pressed the engine is once this call is over.
    pub(crate) fn load_after(&self) -> Load {
        let load = self.engine.load();
        let own = u32::from(self.ticket.is_some());
        Load { in_flight: load.in_flight.saturating_sub(own), ..load }
    }
}

impl Engines {
    pub(crate) fn new(engines: impl Iterator<Item = (Arc<Engine>, Channel)>) -> Self {
        Self(engines.collect())
    }

    /// Whether the model of a call decides which engine serves it.
    pub(crate) fn depend_on_model(&self) -> bool {
        self.0.iter().any(|(engine, _)| !engine.offer.models.is_empty())
    }

    /// The engines that suit a call.
    pub(crate) fn servers<'a>(&'a self, ask: &'a Ask) -> impl Iterator<Item = (Server, Load)> + 'a {
        let now = clock::now();
        self.0.iter().enumerate().filter_map(move |(index, (engine, _))| {
            let fit = engine.offer.fit(ask, &engine.reflected().services)?;
            let machine = engine.machine.lock();
            let (load, standing) = (machine.load(now), machine.standing(now));
            let server = Server {
                place: Place::Own(index),
                fit,
                standing,
                utilisation: load.utilisation(),
                free: f64::from(load.free()),
                departures: 0.0,
            };
            Some((server, load))
        })
    }

    /// Whether each has a service or a model, and whether it may be sent calls.
    pub(crate) fn have<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (Has, Standing)> + 'a {
        self.0.iter().map(move |(engine, _)| {
            (engine.offer.has(name, &engine.reflected().services), engine.standing())
        })
    }

    /// Hands each name of what they serve to `each`, and whether the engine may be sent calls.
    pub(crate) fn served(&self, mut each: impl FnMut(&str, Standing)) {
        for (engine, _) in self.0.iter() {
            let standing = engine.standing();
            engine.offer.names(&engine.reflected().services).for_each(|name| each(name, standing));
        }
    }

    /// A slot of engine `index`, if one is free.
    pub(crate) fn take(&self, index: usize) -> Option<Slot> {
        let (engine, channel) = self.0.get(index)?;
        let ticket = engine.machine.lock().take(clock::now())?;
        Some(Slot {
            engine: engine.clone(),
            channel: channel.clone(),
            ticket: Some(ticket),
            steps: Steps::default(),
        })
    }

    /// All of them as one: for what the node says of itself.
    pub(crate) fn loads(&self) -> impl Iterator<Item = Load> + '_ {
        self.0.iter().map(|(engine, _)| engine.load())
    }
}
