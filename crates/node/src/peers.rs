//! The other nodes: what is known of them, shared by all workers, and a channel to each per worker.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use balance::{Breaker, Place, Server, Standing};
use base::{EngineName, Load, NodeName, RegionName, clock};
use http::{HeaderMap, Request, Response};
use identity::Identity;
use membership::{Descriptor, LoadFrame, Presence, View};
use parking_lot::Mutex;
use tonic::body::Body;
use transport::{Channel, TransportError};

use crate::{
    offer::{Ask, Has, Offer},
    orca,
};

/// What is known of the other nodes: filled by the gossip port and by replies, read by every worker.
#[derive(Debug)]
pub(crate) struct Board {
    names: Vec<PeerName>,
    state: Mutex<State>,
    /// Whether any of them serves models by name.
    has_models: AtomicBool,
}

/// Who a peer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerName {
    pub(crate) node: NodeName,
    pub(crate) region: RegionName,
}

#[derive(Debug)]
struct State {
    view: View,
    peers: Vec<Peer>,
}

#[derive(Clone, Debug, Default)]
struct Peer {
    /// What each of its engines serves; `None`: something we do not know.
    offers: Vec<Option<Offer>>,
    engines: Vec<EngineName>,
    /// The services each of its engines reflects.
    services: Vec<Vec<String>>,
    breaker: Breaker,
    /// Calls of this node in progress there.
    in_flight: u32,
}

impl Peer {
    /// Whether its engine with this load may be sent calls.
    fn standing(&self, presence: Presence, load: &Load, now: Instant) -> Standing {
        match presence {
            Presence::Present if !self.breaker.allows(now) => Standing::Ejected,
            // Its node knows better, and is asked when there is nobody else.
            Presence::Present if load.unusable => Standing::Ejected,
            Presence::Present => Standing::Usable,
            Presence::Draining | Presence::Silent | Presence::Unknown => Standing::Down,
        }
    }
}

/// What metrics say of a peer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PeerFigures {
    pub(crate) present: bool,
    pub(crate) ejected: bool,
    pub(crate) in_flight: u32,
    pub(crate) heard: Option<Duration>,
}

impl Board {
    pub(crate) fn new(names: Vec<PeerName>) -> Self {
        let state =
            State { view: View::new(names.len()), peers: vec![Peer::default(); names.len()] };
        Self { names, state: Mutex::new(state), has_models: AtomicBool::new(false) }
    }

    pub(crate) fn names(&self) -> &[PeerName] {
        &self.names
    }

    /// Peer `index` said what it serves.
    pub(crate) fn describe(&self, index: usize, epoch: u64, descriptor: Descriptor) {
        let offers: Vec<_> = descriptor.engines.iter().map(Offer::of_peer).collect();
        let engines = descriptor.engines.iter().map(|engine| engine.name.clone()).collect();
        let sorted = |mut services: Vec<String>| {
            services.sort();
            services
        };
        let services = descriptor.engines.iter().map(|e| sorted(e.services.clone())).collect();
        let mut state = self.state.lock();
        if state.view.describe(index, epoch, descriptor) {
            let peer = &mut state.peers[index];
            (peer.offers, peer.engines, peer.services) = (offers, engines, services);
            let has_models = |offer: &Offer| !offer.models.is_empty();
            let any = state.peers.iter().flat_map(|p| &p.offers).flatten().any(has_models);
            self.has_models.store(any, Ordering::Relaxed);
        }
    }

    /// Peer `index` said how pressed it is.
    pub(crate) fn frame(&self, index: usize, frame: &LoadFrame, rtt: Duration) {
        let mut state = self.state.lock();
        let now = clock::now();
        let was_out = matches!(
            state.view.presence(index, now),
            Presence::Silent | Presence::Unknown | Presence::Draining
        );
        if state.view.frame(index, frame, rtt, now) && was_out && !frame.draining {
            // It is there again, perhaps as a new process: what was ejected is not this.
            state.peers[index].breaker.replied();
            let name = &self.names[index];
            tracing::info!(peer = %name.node, region = %name.region, "a peer speaks");
        }
    }

    /// For metrics.
    pub(crate) fn figures(&self) -> Vec<PeerFigures> {
        let state = self.state.lock();
        let now = clock::now();
        (0..self.names.len())
            .map(|index| PeerFigures {
                present: state.view.presence(index, now) == Presence::Present,
                ejected: !state.peers[index].breaker.is_closed(),
                in_flight: state.peers[index].in_flight,
                heard: state.view.heard(index, now),
            })
            .collect()
    }

    /// The load of every engine of every present peer, as far as it is known.
    pub(crate) fn loads(&self) -> Vec<Load> {
        let state = self.state.lock();
        let now = clock::now();
        (0..self.names.len())
            .filter(|index| state.view.presence(*index, now) == Presence::Present)
            .flat_map(|index| (0..state.peers[index].offers.len()).map(move |e| (index, e)))
            .filter_map(|(index, engine)| Some(state.view.seen(index, engine, now)?.load))
            .collect()
    }

    /// The loads of each peer's engines, as far as they are known.
    pub(crate) fn loads_by_peer(&self) -> Vec<(PeerName, Vec<Load>)> {
        let state = self.state.lock();
        let now = clock::now();
        let of = |index: usize, peer: &Peer| {
            let engines = 0..peer.offers.len();
            engines.filter_map(|e| Some(state.view.seen(index, e, now)?.load)).collect()
        };
        let peers = self.names.iter().zip(&state.peers).enumerate();
        peers.map(|(index, (name, peer))| (name.clone(), of(index, peer))).collect()
    }

    /// The engines of peers that suit a call.
    pub(crate) fn servers(&self, ask: &Ask) -> Vec<(Server, Load)> {
        let state = self.state.lock();
        let now = clock::now();
        let mut servers = Vec::new();
        for (index, peer) in state.peers.iter().enumerate() {
            let presence = state.view.presence(index, now);
            for (engine, offer) in peer.offers.iter().enumerate() {
                let place = Place::Peer { node: index, engine: Some(engine) };
                let services = peer.services.get(engine).map_or(&[][..], Vec::as_slice);
                let fit = offer.as_ref().and_then(|offer| offer.fit(ask, services));
                let Some(fit) = fit else { continue };
                let Some(seen) = state.view.seen(index, engine, now) else { continue };
                let standing = peer.standing(presence, &seen.load, now);
                let server = Server {
                    place,
                    fit,
                    standing,
                    utilisation: seen.load.utilisation(),
                    free: f64::from(seen.load.free()) * seen.confidence,
                    departures: seen.load.drain_rate * seen.age.as_secs_f64() * seen.confidence,
                };
                servers.push((server, seen.load));
            }
        }
        servers
    }

    /// Whether each engine of a peer has a service or a model, and whether it may be sent calls.
    pub(crate) fn have(&self, name: &str) -> Vec<(Has, Standing)> {
        let mut all = Vec::new();
        self.each(|offer, services, standing| all.push((offer.has(name, services), standing)));
        all
    }

    /// Hands each name of what engines of peers serve to `each`, and whether the engine may be sent calls.
    pub(crate) fn served(&self, mut each: impl FnMut(&str, Standing)) {
        self.each(|offer, services, standing| {
            offer.names(services).for_each(|name| each(name, standing));
        });
    }

    fn each(&self, mut each: impl FnMut(&Offer, &[String], Standing)) {
        let state = self.state.lock();
        let now = clock::now();
        for (index, peer) in state.peers.iter().enumerate() {
            let presence = state.view.presence(index, now);
            for (engine, (offer, services)) in peer.offers.iter().zip(&peer.services).enumerate() {
                let Some(offer) = offer else { continue };
                let seen = state.view.seen(index, engine, now);
                let standing = seen.map(|seen| peer.standing(presence, &seen.load, now));
                each(offer, services, standing.unwrap_or(Standing::Down));
            }
        }
    }

    /// Whether there is a peer that has never said what it serves.
    pub(crate) fn has_undescribed(&self) -> bool {
        let state = self.state.lock();
        (0..self.names.len()).any(|index| state.view.descriptor(index).is_none())
    }

    /// Whether an engine of a peer says that it has a service or a model of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        let state = self.state.lock();
        state
            .peers
            .iter()
            .flat_map(|peer| &peer.offers)
            .flatten()
            .any(|offer| offer.is_called(name))
    }

    /// Which descriptor of peer `index` is known, by process and version.
    pub(crate) fn described(&self, index: usize) -> Option<(u64, u32)> {
        self.state.lock().view.described(index)
    }

    /// Whether an engine of peer `index` reflects services.
    pub(crate) fn has_services(&self, index: usize) -> bool {
        let state = self.state.lock();
        state.peers.get(index).is_some_and(|peer| peer.services.iter().any(|s| !s.is_empty()))
    }

    /// The peers of which nothing is known, for when nobody known can take a call: the one with fewest of our calls, whose
    /// breaker allows it if any does.
    pub(crate) fn unknown(&self, tried: &[Place]) -> Option<usize> {
        let state = self.state.lock();
        let now = clock::now();
        let was_tried = |index: usize| {
            tried.iter().any(|place| place.is_same(Place::Peer { node: index, engine: None }))
        };
        (0..self.names.len())
            .filter(|index| !was_tried(*index))
            .filter(|index| state.view.presence(*index, now) == Presence::Unknown)
            .min_by_key(|index| {
                let peer = &state.peers[*index];
                (!peer.breaker.allows(now), peer.in_flight)
            })
    }

    #[cfg(test)]
    pub(crate) fn presence(&self, index: usize) -> Presence {
        self.state.lock().view.presence(index, clock::now())
    }

    /// Whether there is a peer that has not said what it serves.
    pub(crate) fn has_unknown(&self) -> bool {
        let state = self.state.lock();
        let now = clock::now();
        (0..self.names.len()).any(|index| {
            state.view.descriptor(index).is_none()
                || state.view.presence(index, now) == Presence::Unknown
        })
    }

    /// A link to peer `index` begins, to its process `epoch`.
    pub(crate) fn greet(&self, index: usize, epoch: u64) {
        self.state.lock().view.greet(index, epoch);
    }

    /// A call begins at `now`, for the sake of engine `engine`; returns the engines of the peer that suit it.
    fn began(&self, index: usize, engine: Option<usize>, ask: &Ask, now: Instant) -> Vec<usize> {
        let mut state = self.state.lock();
        if let Some(engine) = engine {
            state.view.sent(index, engine, now);
        }
        let peer = &mut state.peers[index];
        peer.breaker.begin(now);
        peer.in_flight += 1;
        let suits = |(_, (offer, services)): &(usize, (&Option<Offer>, &Vec<String>))| {
            offer.as_ref().is_some_and(|offer| offer.fit(ask, services).is_some())
        };
        let engines = peer.offers.iter().zip(&peer.services).enumerate();
        engines.filter(suits).map(|(index, _)| index).collect()
    }

    fn ended(&self, call: &PeerCall) {
        let mut state = self.state.lock();
        if let Some(engine) = call.engine {
            state.view.ended(call.index, engine, call.began, call.counted);
        }
        let peer = &mut state.peers[call.index];
        peer.in_flight = peer.in_flight.saturating_sub(1);
    }

    fn replied(&self, index: usize) {
        self.state.lock().peers[index].breaker.replied();
    }

    fn busy(&self, index: usize, engines: &[usize]) {
        self.state.lock().view.busy(index, engines, clock::now());
    }

    fn broken(&self, index: usize, now: Instant, cut_off: bool) {
        let mut state = self.state.lock();
        if cut_off {
            state.view.cut_off(index, now);
        }
        if state.peers[index].breaker.broken(now) {
            let name = &self.names[index];
            tracing::warn!(peer = %name.node, region = %name.region, "calls to a peer broke off again and again; it is ejected for a while");
        }
    }

    /// A reply of peer `index` reported the load of its engine called `engine`. Returns whether it did.
    fn learn(&self, index: usize, engine: &str, trailers: &HeaderMap) -> bool {
        let mut state = self.state.lock();
        let engine = state.peers[index].engines.iter().position(|e| e.as_str() == engine);
        let now = clock::now();
        let known = engine.and_then(|engine| Some((engine, state.view.seen(index, engine, now)?)));
        let Some((engine, known)) = known else { return false };
        let Some(load) = orca::read(trailers, known.load) else { return false };
        state.view.reply(index, engine, load, now);
        true
    }
}

/// The peers of a node, as one worker calls them. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    board: Arc<Board>,
    channels: Arc<[Channel]>,
    /// What this node shows them; `None`: nothing that ends.
    own: Option<Identity>,
}

/// A call to a peer in progress.
#[derive(Debug)]
pub(crate) struct PeerCall {
    board: Arc<Board>,
    channel: Channel,
    index: usize,
    /// The engine for whose sake the peer was chosen.
    engine: Option<usize>,
    began: Instant,
    /// Whether what the peer says of itself may count the call: it ran there, and its reply brought no newer figures.
    counted: bool,
    /// The engines of the peer that suit the call.
    suited: Vec<usize>,
}

impl Drop for PeerCall {
    fn drop(&mut self) {
        self.board.ended(self);
    }
}

impl PeerCall {
    /// Which peer.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// How it is called in messages.
    pub(crate) fn name(&self) -> String {
        self.channel.target().name().to_owned()
    }

    /// Makes the call.
    pub(crate) async fn send(
        &self,
        request: Request<Body>,
    ) -> Result<Response<Body>, TransportError> {
        self.channel.send(request).await
    }

    /// The peer answered, whatever it said.
    pub(crate) fn replied(&self) {
        self.board.replied(self.index);
    }

    /// The peer answered that no engine that suits the call has room.
    pub(crate) fn busy(&self) {
        self.board.busy(self.index, &self.suited);
    }

    /// The peer did not answer as it should. `cut_off`: nothing comes from it at all.
    pub(crate) fn broken(&self, cut_off: bool) {
        self.board.broken(self.index, clock::now(), cut_off);
    }

    /// The call ran at an engine of the peer.
    pub(crate) fn ran(&mut self) {
        self.counted = true;
    }

    /// The reply reported the load of the engine that served it.
    pub(crate) fn learn(&mut self, engine: &str, trailers: &HeaderMap) {
        self.counted &= !self.board.learn(self.index, engine, trailers);
    }
}

impl Peers {
    pub(crate) fn new(board: Arc<Board>, channels: impl Iterator<Item = Channel>) -> Self {
        Self { board, channels: channels.collect(), own: None }
    }

    /// Which certificate they are shown: without a good one they need not be asked.
    pub(crate) fn shown(self, own: Identity) -> Self {
        Self { own: Some(own), ..self }
    }

    /// When the certificate they are shown ended, if it has.
    pub(crate) fn certificate_ended(&self) -> Option<SystemTime> {
        let until = self.own.as_ref()?.current().certificate().until;
        (clock::wall() > until).then_some(until)
    }

    /// A node that forwards to nobody.
    pub(crate) fn none() -> Self {
        Self { board: Arc::new(Board::new(vec![])), channels: Arc::default(), own: None }
    }

    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// Whether the model of a call decides which of them serves it.
    pub(crate) fn depend_on_model(&self) -> bool {
        self.board.has_models.load(Ordering::Relaxed)
    }

    /// Begins a call to peer `index`, for the sake of its engine `engine` if its engines are known.
    pub(crate) fn begin(&self, index: usize, engine: Option<usize>, ask: &Ask) -> Option<PeerCall> {
        let channel = self.channels.get(index)?.clone();
        let began = clock::now();
        let suited = self.board.began(index, engine, ask, began);
        let board = self.board.clone();
        Some(PeerCall { board, channel, index, engine, began, counted: false, suited })
    }
}
