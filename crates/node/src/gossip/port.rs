//! The gossip port: who may come in, how many at once, and to what end: a link between nodes, or a certificate.
//!
//! Whoever has no certificate yet may speak to a node that holds the authority, to get one, and to nobody else (`signer`).

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use membership::{Hello, LINKS_MAX, Peer};
use tokio::{sync::oneshot, task::JoinSet};
use transport::{Incoming, Link, Links};

use crate::{
    signer::{Caller, Contact, Signer},
    throttle::Places,
    trust::Port as TrustPort,
};

use super::link::{Common, News};

/// Handshakes in progress at most, and above how many the other end must first prove its address.
const HANDSHAKES_MAX: usize = 512;
const PROVE_ABOVE: usize = 16;
/// Strangers who may ask for a certificate at once, and as many nodes. Further ones are turned down.
const ENROLMENTS_MAX: usize = 32;
/// Of them, those of one address; and handshakes in progress of one.
const ENROLMENTS_OF_ONE: usize = 8;
const HANDSHAKES_OF_ONE: usize = 32;
/// How long another process of this node's name is given to hear who answers it.
const TOLD_WITHIN: Duration = Duration::from_millis(500);

/// The authority behind a gossip port.
#[derive(Clone, Debug)]
pub(crate) struct Enrolment {
    pub(crate) signer: Arc<Signer>,
    pub(crate) contact: Contact,
}

/// What those who come in need.
#[derive(Debug)]
struct Port {
    common: Common,
    enrolment: Option<Enrolment>,
    /// Handshakes in progress; whoever has yet to say hello takes no place any more.
    shaking: Places,
    /// Links that were made here.
    linked: Places,
    /// Strangers who ask, those who have asked too often, and nodes that renew: none takes the others' places.
    enrolling: Places,
    turning_away: Places,
    renewing: Places,
}

/// Lets others in until the port is closed.
pub(super) async fn accept(links: Links, common: Common, enrolment: Option<Enrolment>) {
    let port = Arc::new(Port {
        common,
        enrolment,
        shaking: Places::new(HANDSHAKES_MAX, HANDSHAKES_OF_ONE),
        linked: Places::new(LINKS_MAX + HANDSHAKES_MAX, LINKS_MAX + HANDSHAKES_MAX),
        enrolling: Places::new(ENROLMENTS_MAX, ENROLMENTS_OF_ONE),
        turning_away: Places::new(ENROLMENTS_MAX, ENROLMENTS_MAX),
        renewing: Places::new(ENROLMENTS_MAX, ENROLMENTS_MAX),
    });
    let mut serving = JoinSet::new();
    loop {
        let incoming = tokio::select! {
            incoming = links.accept() => incoming,
            Some(_) = serving.join_next() => continue,
        };
        let Some(incoming) = incoming else { return };
        if serving.len() >= LINKS_MAX + HANDSHAKES_MAX + 3 * ENROLMENTS_MAX {
            incoming.refuse();
            continue;
        }
        // Who makes up addresses takes no place from those who have one.
        let under_way = serving.len().saturating_sub(port.linked.taken());
        let incoming = if under_way >= PROVE_ABOVE {
            let Some(proved) = incoming.proved() else { continue };
            proved
        } else {
            incoming
        };
        serving.spawn(port.clone().serve(incoming));
    }
}

impl Port {
    /// Serves whoever dialled: another node, until its link ends, or somebody who wants a certificate.
    async fn serve(self: Arc<Self>, incoming: Incoming) {
        let (trust, remote) = (&self.common.trust, incoming.remote());
        let link = {
            let Some(_place) = self.shaking.take(remote.ip()) else { return incoming.refuse() };
            match incoming.accept().await {
                Ok(link) => link,
                Err(error) if error.is_refusal => {
                    return trust.turned_away(TrustPort::Gossip, remote, &error.why);
                }
                Err(error) => return tracing::debug!(%error, %remote, "a gossip handshake failed"),
            }
        };
        if link.protocol() == identity::ENROL_ALPN {
            return self.enrol(&link, remote).await;
        }
        match self.common.greeted(&link).await {
            Ok((peer, hello)) if self.common.is_own(&peer) => self.tell_twin(&link, &hello).await,
            Ok(greeted) => self.link(&link, remote, greeted).await,
            Err(why) => {
                // Who hangs up before it said anything was turned away by nobody: of two links that race, one does.
                if link.closed().now_or_never().is_none() {
                    trust.turned_away(TrustPort::Gossip, remote, &why);
                }
                link.close(&why);
            }
        }
    }

    async fn link(&self, link: &Link, remote: SocketAddr, greeted: (Peer, Hello)) {
        let node = greeted.0.node.clone();
        let Some(_place) = self.linked.take(remote.ip()) else {
            tracing::warn!(%node, "a link was turned down: there are {LINKS_MAX} already");
            return link.close("too many links");
        };
        if let Err(why) = self.common.clone().serve(link, greeted, None).await {
            tracing::debug!(%node, why, "a link is not needed");
            link.close(&why);
        }
    }

    /// Tells another process with this node's certificate of this one, so that the older of both knows.
    async fn tell_twin(&self, link: &Link, hello: &Hello) {
        if hello.epoch == self.common.epoch {
            return link.close("this node itself");
        }
        let (answer, answered) = oneshot::channel();
        let twin = News::Twin { epoch: hello.epoch, answer: Some(answer) };
        if self.common.news.send(twin).await.is_ok()
            && let Ok(own) = answered.await
            && link.send_whole(self.common.first(own)).await.is_ok()
        {
            drop(tokio::time::timeout(TOLD_WITHIN, link.closed()).await);
        }
        link.close("another process of this node's name");
    }

    /// Serves somebody who wants a certificate. `remote` is where the handshake proved it to be.
    async fn enrol(&self, link: &Link, remote: SocketAddr) {
        let served = match &self.enrolment {
            Some(enrolment) => self.serve_enrolment(link, remote, enrolment).await,
            None => Err("this node holds no authority".to_owned()),
        };
        let Err(why) = served else { return link.close("done") };
        if link.certificates().is_empty() {
            self.common.trust.turned_away(TrustPort::Gossip, remote, &why);
        } else {
            tracing::debug!(why, %remote, "a renewal came to nothing");
        }
        link.close(&why);
    }

    async fn serve_enrolment(
        &self,
        link: &Link,
        remote: SocketAddr,
        Enrolment { signer, contact }: &Enrolment,
    ) -> Result<(), String> {
        let address = remote.ip().to_canonical();
        let who = signer.admit(&link.certificates(), address);
        let places = match who {
            Caller::Node => &self.renewing,
            Caller::Stranger => &self.enrolling,
            Caller::Limited => &self.turning_away,
        };
        let place = places.take(address);
        let _place = place.ok_or_else(|| "too many enrolments at once".to_owned())?;
        signer.serve(link, address, who, contact).await
    }
}
