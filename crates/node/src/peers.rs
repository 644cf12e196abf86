//! The listed peers, as one worker calls them.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use balance::{Candidate, two_choices};
use http::{Request, Response};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use tonic::body::Body;
use transport::Channel;

use crate::refusal::Refusal;

/// The peers of a node. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    peers: Arc<[Peer]>,
    rng: Arc<Mutex<StdRng>>,
}

#[derive(Debug)]
struct Peer {
    channel: Channel,
    in_flight: Arc<AtomicU32>,
}

/// A call to a peer in progress.
#[derive(Debug)]
pub(crate) struct PeerCall {
    channel: Channel,
    in_flight: Arc<AtomicU32>,
}

impl Drop for PeerCall {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl PeerCall {
    /// Makes the call.
    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Body>, Refusal> {
        self.channel.send(request).await.map_err(|error| Refusal::Transport {
            target: self.channel.target().name().to_owned(),
            to_peer: true,
            error,
        })
    }
}

impl Peers {
    pub(crate) fn new(channels: impl Iterator<Item = Channel>, rng: StdRng) -> Self {
        let peers = channels.map(|channel| Peer { channel, in_flight: Arc::default() }).collect();
        Self { peers, rng: Arc::new(Mutex::new(rng)) }
    }

    /// The less busy of two peers drawn at random; `None` without peers.
    pub(crate) fn choose(&self) -> Option<PeerCall> {
        let candidates: Vec<_> = self
            .peers
            .iter()
            .map(|peer| Candidate {
                in_flight: peer.in_flight.load(Ordering::Relaxed),
                slots: None,
            })
            .collect();
        let chosen = two_choices(&candidates, &mut *self.rng.lock())?;
        let peer = &self.peers[chosen];
        peer.in_flight.fetch_add(1, Ordering::Relaxed);
        Some(PeerCall { channel: peer.channel.clone(), in_flight: peer.in_flight.clone() })
    }
}
