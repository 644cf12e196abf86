//! Making a link: whom to expect there, how long to wait, and what to say when it comes to nothing.

use std::time::Duration;

use http::uri::Authority;
use identity::{ExpectedPeer, IdentityError};
use membership::{Hello, NodeId, Peer, Target};
use tokio::sync::OwnedSemaphorePermit;
use transport::{Link, LinkTransport, Links};

use super::link::{Common, News};

/// A node that is known answers within this, hello and all, or is redialled. It is short: that a dial fails is how a death is
/// noticed.
const MEMBER_WITHIN: Duration = Duration::from_secs(3);
/// A seed may have several addresses, and a name.
const SEED_WITHIN: Duration = Duration::from_secs(10);
/// A link that is not needed stays open for so long: the one that is may be a little behind at the other end.
const NOT_NEEDED: Duration = Duration::from_millis(500);

/// What was dialled, and for what.
#[derive(Clone, Debug)]
pub(super) struct Dial {
    pub(super) target: Target,
    /// The node in whose old link's place it is to come, of which the machine need not know.
    pub(super) renews: Option<NodeId>,
    /// Whether only QUIC will do: there is a link over TCP.
    pub(super) to_quic: bool,
}

impl Dial {
    pub(super) fn address(&self) -> &str {
        self.target.address()
    }

    pub(super) fn expected(&self) -> Option<&Peer> {
        self.target.peer()
    }

    fn within(&self) -> Duration {
        match &self.target {
            Target::Member { .. } => MEMBER_WITHIN,
            Target::Seed(_) => SEED_WITHIN,
        }
    }
}

/// Why there is no link.
struct Failed {
    why: String,
    /// Whether this node itself answered.
    is_self: bool,
}

impl From<String> for Failed {
    fn from(why: String) -> Self {
        Self { why, is_self: false }
    }
}

impl Common {
    /// Makes a link and serves it to its end.
    pub(super) async fn dial(
        self,
        links: Links,
        hello: Hello,
        dial: Dial,
        place: OwnedSemaphorePermit,
    ) {
        let reached = tokio::time::timeout(dial.within(), self.reach(&links, hello, &dial)).await;
        let (link, greeted) = match reached.unwrap_or_else(|_| Err("no answer".to_owned().into())) {
            Ok(reached) => reached,
            Err(Failed { why, is_self }) => {
                drop(self.news.send(News::DialFailed { dial, why, is_self }).await);
                return;
            }
        };
        drop(place);
        if let Err(why) = self.clone().serve(&link, greeted, Some(dial)).await {
            tokio::time::sleep(NOT_NEEDED).await;
            link.close(&why);
        }
    }

    async fn reach(
        &self,
        links: &Links,
        hello: Hello,
        dial: &Dial,
    ) -> Result<(Link, (Peer, Hello)), Failed> {
        let address: Authority =
            dial.address().parse().map_err(|_| "its address is no host and port".to_owned())?;
        let tls = self.tls(dial).map_err(|error| error.to_string())?;
        let link = if dial.to_quic {
            links.dial_over(&address, tls, LinkTransport::Quic).await
        } else {
            links.dial(&address, tls).await
        };
        let link = link.map_err(|error| error.to_string())?;
        let greeting = async {
            link.send_whole(self.first(hello)).await.map_err(|error| error.to_string())?;
            let (peer, hello) = self.greeted(&link).await?;
            if !self.is_own(&peer) {
                return Ok((peer, hello));
            }
            if hello.epoch == self.epoch {
                let why = "this node itself answers there".to_owned();
                return Err(Failed { why, is_self: true });
            }
            self.news.send(News::Twin { epoch: hello.epoch, answer: None }).await.ok();
            Err("another process of this node's name answers there".to_owned().into())
        };
        match greeting.await {
            Ok(greeted) => Ok((link, greeted)),
            Err(failed) => {
                link.close(&failed.why);
                Err(failed)
            }
        }
    }

    fn tls(&self, dial: &Dial) -> Result<rustls::ClientConfig, IdentityError> {
        let identity = self.trust.identity();
        match dial.expected() {
            Some(peer) => {
                let expect = ExpectedPeer { region: peer.region.clone(), name: peer.node.clone() };
                identity.peer_client_config(&[], expect)
            }
            None => identity.any_peer_client_config(&[]),
        }
    }

    /// Whether a process with this node's certificate is at the other end.
    pub(super) fn is_own(&self, peer: &Peer) -> bool {
        peer.id == super::judge::node_id(self.own())
    }
}
