//! The gossip port: nodes find each other there, notice who is gone, and tell what they serve and how pressed they are.
//!
//! What is said and done is decided by a machine without IO (`membership`). Here it is given sockets, certificates, the clock
//! and a thread of its own:
//!
//! ```text
//!  port ──accepts──┐                        ┌──> board, which routing reads
//!                  ├── link ──news──> driver ──> log
//!  dial ──makes────┘     <──frames──  (the machine)  <── figures and descriptor of this node, seeds, certificate, drain
//! ```
//!
//! A node speaks only about itself: what a link says is put down to the peer whose certificate it carries. What is handed on
//! carries a signature: cards their owner's, lists of revocations their authority's.

mod dial;
mod driver;
mod judge;
mod kept;
mod link;
mod news;
mod port;
mod table;
mod thread;

use std::{path::PathBuf, sync::Arc, time::Duration};

use base::clock;
use membership::{Mesh, Own, Seed, Status};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use transport::Links;

use crate::{catalog::Catalog, engines::Engine, peers::Board, seeds::Found, trust::Trust};

use self::{
    driver::{Driver, Parts},
    judge::NodeJudge,
    link::Common,
};

pub(crate) use self::{
    judge::{node_id, peer},
    kept::KEPT,
    port::Enrolment,
    thread::Thread,
};

/// What links have said and was not taken in yet; they wait when it is full.
const NEWS_MAX: usize = 512;
/// Questions for people that wait.
const ASKS_MAX: usize = 16;
/// A question for people must be answered within this.
const ANSWERED_WITHIN: Duration = Duration::from_secs(1);

/// What this node says of itself.
#[derive(Debug)]
pub(crate) struct Voice {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) engines: Arc<[Arc<Engine>]>,
    pub(crate) arrivals: Arc<crate::arrivals::Arrivals>,
    /// Cancelled when the node takes no new calls.
    pub(crate) draining: CancellationToken,
}

/// The gossip port of a node.
#[derive(Debug)]
pub(crate) struct Gossip {
    pub(crate) links: Links,
    pub(crate) own: Own,
    pub(crate) voice: Voice,
    pub(crate) board: Arc<Board>,
    pub(crate) trust: Arc<Trust>,
    /// Where nodes may be found, by the configuration.
    pub(crate) seeds: watch::Receiver<Found>,
    /// Those that are always linked.
    pub(crate) listed: Vec<Seed>,
    /// Where cards of others are kept; `None`: nowhere.
    pub(crate) kept: Option<PathBuf>,
    /// Who answers those who want a certificate; `None`: they are not let in.
    pub(crate) enrolment: Option<Enrolment>,
    pub(crate) seed: u64,
}

/// Asks a running gossip port. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct MeshHandle {
    asks: mpsc::Sender<StatusAsk>,
    superseded: watch::Receiver<Option<u64>>,
}

/// Who asks what the mesh looks like.
type StatusAsk = oneshot::Sender<Status>;

impl MeshHandle {
    /// What the mesh looks like from here; `None`: the port does not answer, for it stops or is at its limit.
    pub(crate) async fn status(&self) -> Option<Status> {
        let (ask, answer) = oneshot::channel();
        self.asks.try_send(ask).ok()?;
        tokio::time::timeout(ANSWERED_WITHIN, answer).await.ok()?.ok()
    }

    /// Resolves when another process has this node's name and is the later one, with its epoch; or with nothing when the port
    /// has ended.
    pub(crate) async fn superseded(&mut self) -> Option<u64> {
        self.superseded.wait_for(Option::is_some).await.ok().and_then(|epoch| *epoch)
    }
}

impl Gossip {
    /// Prepares a port: what it does once it is run, and how to ask it.
    ///
    /// # Errors
    /// This node's card cannot be signed.
    pub(crate) fn prepare(self) -> Result<(Prepared, MeshHandle), String> {
        let Self { links, own, voice, board, trust, seeds, listed, kept, enrolment, seed } = self;
        let judge = NodeJudge(trust.identity().clone());
        let (epoch, own_gossip) = (own.epoch, own.gossip.clone());
        let descriptor = voice.catalog.descriptor();
        let described = descriptor.version;
        let mesh = Mesh::new(own, descriptor, judge, clock::now(), seed)?;
        let (tell, news) = mpsc::channel(NEWS_MAX);
        let (ask, asks) = mpsc::channel(ASKS_MAX);
        let (superseded, told) = watch::channel(None);
        let common = Common { trust, epoch, news: tell };
        let parts = Parts {
            links: links.clone(),
            common: common.clone(),
            news,
            asks,
            voice,
            board,
            seeds,
            listed,
            kept,
            own_gossip,
            superseded,
        };
        let driver = Driver::new(mesh, parts, described);
        let prepared = Prepared { driver, links, common, enrolment };
        Ok((prepared, MeshHandle { asks: ask, superseded: told }))
    }
}

/// A gossip port that is not run yet.
pub(crate) struct Prepared {
    driver: Driver,
    links: Links,
    common: Common,
    enrolment: Option<Enrolment>,
}

impl Prepared {
    /// Speaks and listens until `stop`, then says good-bye.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self { driver, links, common, enrolment } = self;
        tokio::select! {
            () = driver.run(stop) => {}
            () = port::accept(links.clone(), common, enrolment) => {
                tracing::error!("the gossip port accepts nobody any more");
            }
        }
        links.close().await;
    }
}

#[cfg(test)]
mod tests;
