//! The other nodes: what is known of them, shared by all workers, and channels to them per worker.

mod board;
mod entry;
mod hearsay;
mod news;
mod questions;
mod state;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use base::clock;
use http::{HeaderMap, Request, Response};
use identity::{Identity, SpiffeId};
use parking_lot::Mutex;
use tonic::body::Body;
use transport::{Channel, Pool, TransportError};

use self::board::{At, Over};
pub(crate) use self::{
    board::{Board, Listed, MakeTarget, PeerName},
    questions::{Acquaintance, Askable},
};
use crate::offer::Ask;

/// The peers of a node, as one worker calls them. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    board: Arc<Board>,
    /// Where channels come from; `None`: nobody is called.
    pool: Option<Pool>,
    channels: Arc<Mutex<Channels>>,
    /// What this node shows them; `None`: nothing that ends.
    own: Option<Identity>,
}

/// By the place of a peer: which way its channel goes, and the channel. Those of peers that are gone, or have moved, are dropped
/// with the next one made.
type Channels = BTreeMap<usize, (u64, Channel)>;

/// A call to a peer in progress.
#[derive(Debug)]
pub(crate) struct PeerCall {
    board: Arc<Board>,
    channel: Channel,
    at: At,
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
        let Self { at, engine, began, counted, .. } = *self;
        self.board.ended(Over { at, engine, began, counted });
    }
}

impl PeerCall {
    /// The place of the peer.
    pub(crate) fn index(&self) -> usize {
        self.at.place
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

    /// The peer began to answer.
    pub(crate) fn answered(&self) {
        self.board.answered(self.at);
    }

    /// The peer answered to the end, whatever it said.
    pub(crate) fn replied(&self) {
        self.board.replied(self.at);
    }

    /// The peer answered that no engine that suits the call has room.
    pub(crate) fn busy(&self) {
        self.board.busy(self.at, &self.suited);
    }

    /// The peer did not answer as it should. `cut_off`: nothing comes from it at all.
    pub(crate) fn broken(&self, cut_off: bool) {
        self.board.broken(self.at, clock::now(), cut_off);
    }

    /// The call ran at an engine of the peer.
    pub(crate) fn ran(&mut self) {
        self.counted = true;
    }

    /// The reply reported the load of the engine that served it.
    pub(crate) fn learn(&mut self, engine: &str, trailers: &HeaderMap) {
        self.counted &= !self.board.learn(self.at, engine, trailers);
    }
}

impl Peers {
    /// Those of `board`, called through `pool`.
    pub(crate) fn new(board: Arc<Board>, pool: Pool) -> Self {
        Self { board, pool: Some(pool), channels: Arc::default(), own: None }
    }

    /// Of node `own`, which forwards to nobody here.
    pub(crate) fn none(own: SpiffeId) -> Self {
        let make = MakeTarget(Box::new(|_, _| Err("nobody is called".to_owned())));
        let board = Arc::new(Board::new(own, vec![], make));
        Self { board, pool: None, channels: Arc::default(), own: None }
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

    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// Whether the model of a call decides which of them serves it.
    pub(crate) fn depend_on_model(&self) -> bool {
        self.board.has_models()
    }

    /// Begins a call to the peer at `place`, for the sake of its engine `engine` if its engines are known; `None`: it is gone.
    pub(crate) fn begin(&self, place: usize, engine: Option<usize>, ask: &Ask) -> Option<PeerCall> {
        let (way, channel) = self.way(place)?;
        let began = clock::now();
        let begun = self.board.began(place, way, engine, ask, began)?;
        let at = At { place, generation: begun.generation };
        let (board, suited) = (self.board.clone(), begun.suited);
        Some(PeerCall { board, channel, at, engine, began, counted: false, suited })
    }

    /// A channel to the peer at `place`; `None`: it is gone.
    pub(crate) fn channel(&self, place: usize) -> Option<Channel> {
        self.way(place).map(|(_, channel)| channel)
    }

    fn way(&self, place: usize) -> Option<(u64, Channel)> {
        let pool = self.pool.as_ref()?;
        let way = self.board.way(place)?;
        let mut channels = self.channels.lock();
        if let Some((known, channel)) = channels.get(&place)
            && *known == way
        {
            return Some((way, channel.clone()));
        }
        let target = self.board.target(place, way)?;
        channels.retain(|place, (way, channel)| {
            let leads_there = self.board.way(*place) == Some(*way);
            if !leads_there {
                pool.forget(channel);
            }
            leads_there
        });
        let channel = pool.channel(target);
        channels.insert(place, (way, channel.clone()));
        Some((way, channel))
    }
}

#[cfg(test)]
mod tests {
    use membership::{Card, Event, Facts, NodeId};
    use tokio_util::sync::CancellationToken;
    use transport::{Dialer, Limits, QuicKeys, Target, Worker};

    use super::*;

    fn pool() -> Pool {
        let worker = Worker::new(1, 1, CancellationToken::new(), CancellationToken::new());
        Pool::new(Dialer::new(&worker, &QuicKeys::random(), Limits::peers()).unwrap())
    }

    /// Member b of region us, at this address.
    fn member(board: &Board, epoch: u64, address: &str) -> Event {
        let name = PeerName { node: "b".parse().unwrap(), region: "us".parse().unwrap() };
        let facts = Facts {
            epoch,
            bump: 0,
            peers: address.into(),
            gossip: address.into(),
            zone: None,
            descriptor: [0; 32],
            release: "1".into(),
            protocol_max: 2,
        };
        let (id, signed) = (board.id(&name), [].into());
        Event::Member(Arc::new(Card { id, node: name.node, region: name.region, facts, signed }))
    }

    #[tokio::test]
    async fn channels_follow_those_who_move_and_end_with_those_who_go() {
        let own = "spiffe://mesh.test/node/eu/a".parse().unwrap();
        let make = |peer: &PeerName, address| Ok(Target::plaintext(peer.node.as_str(), address));
        let board = Arc::new(Board::new(own, vec![], MakeTarget(Box::new(make))));
        let peers = Peers::new(board.clone(), pool());
        board.apply(&member(&board, 1, "old.test:1"));
        let address = |peers: &Peers| peers.channel(0).map(|c| c.target().authority().to_string());
        assert_eq!(address(&peers).as_deref(), Some("old.test:1"));
        board.apply(&member(&board, 2, "new.test:1"));
        assert_eq!(address(&peers).as_deref(), Some("new.test:1"));
        assert_eq!(peers.channels.lock().len(), 1);
        let Event::Member(card) = member(&board, 3, "new.test:1") else { return };
        let id: NodeId = card.id;
        board.apply(&Event::Forgotten(id));
        assert_eq!(address(&peers), None);
    }

    #[test]
    fn a_node_that_forwards_to_nobody_calls_nobody() {
        let peers = Peers::none("spiffe://mesh.test/node/eu/a".parse().unwrap());
        assert!(peers.channel(0).is_none() && peers.board().unknown(&[], false).is_none());
    }
}
