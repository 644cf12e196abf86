//! The clock: against that of the peers, by the `date` of what they answer, which is exact to a second.
//!
//! A node answers what is no gRPC call with 415 before it looks at it, and HTTP puts the time beside that.

use std::time::{Duration, SystemTime};

use futures_util::{StreamExt as _, stream};
use http::Request;
use identity::{ExpectedPeer, Identity};
use node::config::PeerConfig;
use rustls::ClientConfig;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use transport::{Dialer, Limits, PeerTls, Pool, QuicKeys, Target, Via, Worker};

use super::{
    facts::Facts,
    finding::{Check, Finding},
};

/// Peers asked; more would not make it truer.
const ASKED_MAX: usize = 16;
/// What the figures cannot tell: a second of `date`, and the way.
const NOTICED: Duration = Duration::from_secs(5);
/// Certificates of the mesh begin so long before they are issued: beyond it, fresh ones are refused.
const HARMFUL: Duration = Duration::from_secs(5 * 60);

pub(super) async fn check(facts: &Facts) -> Vec<Finding> {
    let peers = facts.config.mesh.peers.iter().take(ASKED_MAX);
    let Some((worker, pool)) = caller() else { return vec![unmeasured()] };
    let asked = peers.map(|peer| ask(facts, &pool, peer));
    let heard: Vec<_> = stream::iter(asked).buffered(ASKED_MAX).collect().await;
    pool.close();
    worker.outgoing.close();
    drop(tokio::time::timeout(Duration::from_secs(1), worker.outgoing.wait()).await);
    let findings: Vec<_> = heard
        .into_iter()
        .flatten()
        .map(|(peer, theirs, ours)| {
            judge(&format!("peer {} ({})", peer.name, peer.region), theirs, ours)
        })
        .collect();
    if findings.is_empty() { vec![unmeasured()] } else { findings }
}

fn unmeasured() -> Finding {
    let what = "no peer said what time it is, so this machine's clock was compared with none";
    let remedy = "see with `timedatectl` or `chronyc tracking` that it is synchronised";
    Finding::note(Check::ClockUnmeasured, "clock", what, remedy)
}

fn caller() -> Option<(Worker, Pool)> {
    let worker = Worker::new(0, 1, CancellationToken::new(), CancellationToken::new());
    let dialer = Dialer::new(&worker, &QuicKeys::random(), Limits::engines()).ok()?;
    Some((worker, Pool::new(dialer)))
}

/// The peer's time, and ours when it was said.
async fn ask<'a>(
    facts: &Facts,
    pool: &Pool,
    peer: &'a PeerConfig,
) -> Option<(&'a PeerConfig, SystemTime, SystemTime)> {
    let tls = PeerTls::new(tls(facts, peer)?);
    let target =
        Target::server(peer.name.as_str(), peer.peers.authority(), tls, Via::H2, Some("isobar"));
    let channel = pool.channel(target);
    let asked = async {
        channel.connect().await.ok()?;
        let sent = base::clock::wall();
        let reply = channel.send(Request::get("/").body(Body::empty()).ok()?).await.ok()?;
        let took = base::clock::wall().duration_since(sent).unwrap_or_default();
        let date = reply.headers().get(http::header::DATE)?.to_str().ok()?;
        // `date` was cut to the second.
        let theirs = httpdate::parse_http_date(date).ok()? + Duration::from_millis(500);
        Some((peer, theirs, sent + took / 2))
    };
    tokio::time::timeout(facts.timeout, asked).await.ok()?
}

/// A clock that is wrong makes certificates look so; only whose they are matters here.
fn tls(facts: &Facts, peer: &PeerConfig) -> Option<ClientConfig> {
    let expect = ExpectedPeer { region: peer.region.clone(), name: peer.name.clone() };
    match facts.paths.load().map(Identity::new) {
        Ok(identity) => identity.peer_client_config(&[], expect).ok(),
        Err(_) => facts.tls().ok(),
    }
}

fn judge(subject: &str, theirs: SystemTime, ours: SystemTime) -> Finding {
    let (apart, how) = match theirs.duration_since(ours) {
        Ok(ahead) => (ahead, "ahead of"),
        Err(behind) => (behind.duration(), "behind"),
    };
    if apart < NOTICED {
        let what = format!("its clock agrees with this machine's, to {} s", NOTICED.as_secs());
        return Finding::ok(Check::ClockSkew, subject, what);
    }
    let what = format!("its clock is {} s {how} this machine's", apart.as_secs());
    let remedy = "synchronise both with NTP; if several peers say so, the wrong clock is this one";
    if apart < HARMFUL {
        return Finding::warning(Check::ClockSkew, subject, what, remedy);
    }
    Finding::error(Check::ClockSkew, subject, what, remedy)
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn clocks_apart_are_a_warning_and_then_an_error() {
        let ours = base::clock::wall();
        let level = |theirs| judge("peer b", theirs, ours).level;
        let seconds = Duration::from_secs;
        assert_eq!(level(ours + seconds(4)), Level::Ok);
        assert_eq!(level(ours - seconds(4)), Level::Ok);
        assert_eq!(level(ours + seconds(20)), Level::Warning);
        assert_eq!(level(ours - seconds(301)), Level::Error);
        assert!(judge("peer b", ours - seconds(20), ours).what.contains("20 s behind"));
    }
}
