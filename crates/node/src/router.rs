//! Who takes the next attempt of a call, and whether there may be one.

use std::{sync::Arc, time::Duration};

use balance::{Place, RetryBudget, Server, Standing, choose};
use base::{Load, clock};
use parking_lot::Mutex;
use rand::rngs::StdRng;

use crate::{
    engines::{Engines, Slot},
    model::Wanted,
    offer::{Ask, Has},
    peers::{PeerCall, Peers},
    readiness::Readiness,
    refusal::Refusal,
};

/// Attempts one call may have beyond the first.
pub(crate) const RETRIES_MAX: u32 = 2;
/// How often a call that waits for the node to know the mesh looks whether somebody takes it.
const LOOK: Duration = Duration::from_millis(50);

/// Chooses engines and peers for one worker's calls. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Router {
    pub(crate) engines: Engines,
    pub(crate) peers: Peers,
    pub(crate) readiness: Readiness,
    rng: Arc<Mutex<StdRng>>,
    budget: Arc<Mutex<RetryBudget>>,
}

/// Who answers a call. It holds the place of the call there until the call ends.
#[derive(Debug)]
pub(crate) enum Route {
    /// An engine of this node.
    Engine(Slot, Place),
    /// A peer, which chooses among its own.
    Peer(PeerCall),
}

impl Route {
    /// A piece of the answer passes.
    pub(crate) fn saw(&mut self, data: &[u8]) {
        if let Self::Engine(slot, _) = self {
            slot.saw(data);
        }
    }

    pub(crate) fn place(&self) -> Place {
        match self {
            Self::Engine(_, place) => *place,
            Self::Peer(call) => Place::Peer { node: call.index(), engine: None },
        }
    }
}

impl Router {
    /// A router; `budget` is shared by the workers of a node.
    pub(crate) fn new(
        engines: Engines,
        peers: Peers,
        readiness: Readiness,
        rng: StdRng,
        budget: Arc<Mutex<RetryBudget>>,
    ) -> Self {
        Self { engines, peers, readiness, rng: Arc::new(Mutex::new(rng)), budget }
    }

    /// Whether the model of a call decides who serves it. It may, as long as it is not known who there is.
    pub(crate) fn depends_on_model(&self) -> bool {
        !self.readiness.is_acquainted()
            || self.engines.depend_on_model()
            || self.peers.depend_on_model()
    }

    /// A call came.
    pub(crate) fn arrived(&self) {
        self.budget.lock().request(clock::now());
    }

    /// Whether the node's budget has a retry: asked before somebody is chosen for one.
    pub(crate) fn has_retry(&self) -> bool {
        self.budget.lock().has(clock::now())
    }

    /// Takes a retry out of the node's budget.
    pub(crate) fn take_retry(&self) -> bool {
        self.budget.lock().take(clock::now())
    }

    /// The same as [`Self::route`]. A node that has just started gets to know the others before it refuses for want of them.
    pub(crate) async fn route_in_time(&self, ask: &Ask, tried: &[Place]) -> Result<Route, Refusal> {
        loop {
            // What is heard between the two counts.
            let is_acquainted = self.readiness.is_acquainted();
            match self.route(ask, tried) {
                Err(refusal) if refusal.is_for_want_of_others() && !is_acquainted => {}
                decided => return decided,
            }
            tokio::select! {
                () = self.readiness.acquainted() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// An engine of this node with room, else a peer with room, none of `tried`; else why not.
    pub(crate) fn route(&self, ask: &Ask, tried: &[Place]) -> Result<Route, Refusal> {
        let mut tried = tried.to_vec();
        loop {
            let mut servers = self.servers(ask);
            // They still count among those that serve it: what is full or failed is not missing.
            let was_tried = |server: &Server| tried.iter().any(|t| t.is_same(server.place));
            for (server, _) in servers.iter_mut().filter(|(server, _)| was_tried(server)) {
                server.standing = Standing::Down;
            }
            let candidates: Vec<Server> = servers.iter().map(|(server, _)| *server).collect();
            match choose(&candidates, &mut *self.rng.lock()) {
                Some(place @ Place::Own(index)) => match self.engines.take(index) {
                    Some(slot) => return Ok(Route::Engine(slot, place)),
                    // Another worker took the last slot since we looked.
                    None => tried.push(place),
                },
                Some(place @ Place::Peer { node, engine }) => {
                    self.check_certificate()?;
                    match self.peers.begin(node, engine, ask) {
                        Some(call) => return Ok(Route::Peer(call)),
                        None => tried.push(place),
                    }
                }
                None => {
                    let unknown = self.unknown(&tried);
                    // Where there are peers, that they do not let this node in says more than that they cannot be reached.
                    let is_peer = |(server, _): &(Server, Load)| {
                        matches!(server.place, Place::Peer { .. }) && !was_tried(server)
                    };
                    if unknown.is_some() || servers.iter().any(is_peer) {
                        self.check_certificate()?;
                    }
                    return unknown
                        .and_then(|index| self.peers.begin(index, None, ask))
                        .map(Route::Peer)
                        .ok_or_else(|| self.refusal(ask, &servers));
                }
            }
        }
    }

    /// A peer of which nothing is known, to be tried. Those that will speak are waited for while this node starts.
    fn unknown(&self, tried: &[Place]) -> Option<usize> {
        self.peers.board().unknown(tried, !self.readiness.is_acquainted())
    }

    /// Whether peers would let this node in.
    fn check_certificate(&self) -> Result<(), Refusal> {
        match self.peers.certificate_ended() {
            None => Ok(()),
            Some(at) => Err(Refusal::CertificateEnded {
                until: humantime::format_rfc3339_seconds(at).to_string(),
            }),
        }
    }

    fn servers(&self, ask: &Ask) -> Vec<(Server, Load)> {
        let mut servers: Vec<_> = self.engines.servers(ask).collect();
        servers.extend(self.peers.board().servers(ask));
        servers
    }

    /// The load of everything this node can reach, as one.
    pub(crate) fn all_loads(&self) -> Load {
        let loads = self.engines.loads().chain(self.peers.board().loads());
        Load::total(loads)
    }

    /// Whether a call would be sent to anybody, and how many slots are known to be free.
    pub(crate) fn room(&self, ask: &Ask) -> Result<f64, Refusal> {
        let servers = self.servers(ask);
        let best = servers.iter().map(|(server, _)| server.fit).min();
        let free: f64 = servers
            .iter()
            .filter(|(server, _)| Some(server.fit) == best && server.standing == Standing::Usable)
            .map(|(server, _)| server.free.floor())
            .sum();
        // A peer of which nothing is known is tried when nobody else has room.
        if free >= 1.0 || self.unknown(&[]).is_some() {
            Ok(free)
        } else {
            Err(self.refusal(ask, &servers))
        }
    }

    /// Whether each has a service or a model, and whether it may be sent calls.
    pub(crate) fn have(&self, name: &str) -> Vec<(Has, Standing)> {
        let mut have: Vec<_> = self.engines.have(name).collect();
        have.extend(self.peers.board().have(name));
        have
    }

    /// Hands each name of what anybody serves to `each`, and whether who does may be sent calls.
    pub(crate) fn served(&self, mut each: impl FnMut(&str, Standing)) {
        self.engines.served(&mut each);
        self.peers.board().served(each);
    }

    /// Whether there is a peer that has never said what it serves.
    pub(crate) fn has_undescribed(&self) -> bool {
        self.peers.board().has_undescribed()
    }

    /// Why nobody takes a call.
    fn refusal(&self, ask: &Ask, servers: &[(Server, Load)]) -> Refusal {
        let what = ask.what();
        let regions = self.peers.board().regions(ask);
        let Some(best) = servers.iter().map(|(server, _)| server.fit).min() else {
            return match &ask.wanted {
                Wanted::Unreadable(why) => Refusal::Unreadable { why: why.clone() },
                // A region has it, and nobody there who has room for it is known.
                _ if !regions.is_empty() => Refusal::full(what, &regions),
                // Somebody who cannot be asked may serve it.
                _ if self.peers.board().may_serve(ask) => Refusal::Unusable { what },
                Wanted::Nothing | Wanted::Model(_) => Refusal::NoEngine { what },
            };
        };
        let is_full = |server: &Server| server.fit == best && server.standing == Standing::Usable;
        let full: Vec<Load> =
            servers.iter().filter(|(server, _)| is_full(server)).map(|(_, load)| *load).collect();
        if full.is_empty() { Refusal::Unusable { what } } else { Refusal::full(what, &full) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use membership::{Event, RegionOffer, RegionView};
    use rand::SeedableRng as _;

    use super::*;

    fn router() -> Router {
        let peers = Peers::none("spiffe://mesh.test/node/eu/a".parse().unwrap());
        let budget = Arc::new(Mutex::new(RetryBudget::new(clock::now())));
        let readiness = Readiness::default();
        let rng = StdRng::seed_from_u64(1);
        Router::new(Engines::new(std::iter::empty()), peers, readiness, rng, budget)
    }

    fn ask() -> Ask {
        let wanted = Wanted::Model("llama".parse().unwrap());
        Ask { path: "/inference.GRPCInferenceService/ModelInfer".into(), wanted }
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_has_just_started_waits_before_it_refuses() {
        let router = router();
        let waits = async |router: &Router| {
            let ask = ask();
            let routed = router.route_in_time(&ask, &[]);
            tokio::time::timeout(Duration::from_secs(60), routed).await
        };
        assert!(waits(&router).await.is_err());
        router.readiness.alone();
        let refused = waits(&router).await;
        assert!(matches!(&refused, Ok(Err(Refusal::NoEngine { .. }))), "{refused:?}");
    }

    #[test]
    fn what_nobody_serves_is_not_found_and_what_a_full_region_serves_is_busy() {
        let router = router();
        let refused = router.route(&ask(), &[]);
        assert!(matches!(&refused, Err(Refusal::NoEngine { .. })), "{refused:?}");
        let offer = RegionOffer {
            model: Some("llama".parse().unwrap()),
            protocol: "kserve-v2".into(),
            free: 0,
            slots: 64,
            drain_rate: 8.0,
            wait: (Duration::ZERO, Duration::ZERO),
            kv_free: None,
            candidates: vec![],
        };
        let (region, sampled) = ("us".parse().unwrap(), clock::now());
        let view = RegionView { region, sampled, offers: vec![offer] };
        router.peers.board().apply(&Event::Region(view.into()));
        let refused = router.route(&ask(), &[]);
        assert!(
            matches!(&refused, Err(Refusal::Full { retry_after, .. })
                if *retry_after == Duration::from_millis(125)),
            "{refused:?}"
        );
    }
}
