//! Asking engines and peers what they declare, on the control runtime: one task per engine, and one for all peers.
//!
//! An engine is asked when it is up, again when it comes back, and now and then. Of the peers that say they have the same
//! services one is asked for their declarations.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use base::clock;
use inference::{Collector, Reflected};
use proto::grpc::reflection::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tokio::task::JoinSet;
use tonic::{
    Code, Request, Status, client::Grpc, codegen::http::uri::PathAndQuery, metadata::MetadataMap,
};
use tonic_prost::ProstCodec;
use transport::Channel;

use crate::{
    catalog::Catalog,
    engines::Engine,
    peers::{Askable, Peers},
    services::{REFLECTION, REFLECTION_METHOD},
};

/// How often what is known of engines and peers is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long a server may take to say everything, and to end its answer then.
const WITHIN: Duration = Duration::from_secs(10);
const END_WITHIN: Duration = Duration::from_secs(1);
/// An engine that stays up is asked again after this: it may have been replaced unseen.
const AGAIN: Duration = Duration::from_secs(60);
/// Who says that it has changed, and has the same services, is asked again no sooner than this.
const SAME_AGAIN: Duration = Duration::from_secs(2);
/// Different sets of services that are asked about; of further ones only the names are known.
const SETS_MAX: usize = 64;
/// After a failure that may pass, doubling up to [`AGAIN`].
const RETRY: Duration = Duration::from_secs(2);

/// Keeps what engine `index` reflects, for ever.
pub(crate) async fn engine(
    index: usize,
    engine: Arc<Engine>,
    channel: Channel,
    catalog: Arc<Catalog>,
) {
    let mut retry = RETRY;
    loop {
        while !engine.is_healthy() {
            tokio::time::sleep(LOOK).await;
        }
        // Read first: one that comes back meanwhile is asked again.
        let returns = engine.returns();
        let wait = match reflect(&channel, &MetadataMap::new()).await {
            Ok(reflected) => {
                tracing::debug!(engine = %engine.name, services = ?reflected.services, "an engine reflects");
                catalog.engine_reflects(index, reflected);
                retry = RETRY;
                AGAIN
            }
            Err(error) if error.code() == Code::Unimplemented => {
                catalog.engine_reflects(index, Reflected::default());
                AGAIN
            }
            Err(error) => {
                tracing::debug!(engine = %engine.name, %error, "an engine could not be asked what it declares");
                doubling(&mut retry)
            }
        };
        let mut waited = Duration::ZERO;
        while waited < wait && engine.returns() == returns {
            tokio::time::sleep(LOOK).await;
            waited += LOOK;
        }
    }
}

/// Keeps what peers reflect, for ever. Who says that it has the same services as another is not asked: it declares the same.
pub(crate) async fn peers(peers: Peers, catalog: Arc<Catalog>) {
    let (mut asks, mut asking) =
        (Asks::default(), JoinSet::<(Arc<[String]>, Option<Reflected>)>::new());
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            _ = look.tick() => {}
            Some(asked) = asking.join_next() => {
                let Ok((services, asked)) = asked else { continue };
                asks.answered(&services, asked.is_some(), clock::now());
                if let Some(reflected) = asked {
                    catalog.peer_reflects(services, reflected);
                }
                continue;
            }
        }
        let sets = peers.board().reflecting();
        catalog.keep_peers(|services| sets.contains_key(services));
        for (services, place) in asks.due(&sets, clock::now()) {
            let channel = peers.channel(place);
            asking.spawn(async move { (services, ask_peer(channel).await) });
        }
    }
}

/// What a peer reflects; `None`: it cannot be asked.
async fn ask_peer(channel: Option<Channel>) -> Option<Reflected> {
    let channel = channel?;
    match reflect(&channel, &MetadataMap::new()).await {
        Ok(reflected) => Some(reflected),
        Err(error) => {
            let peer = channel.target().name();
            tracing::debug!(peer, %error, "a peer could not be asked what it declares");
            None
        }
    }
}

/// Which sets of services have been asked about, and whom.
#[derive(Debug, Default)]
struct Asks(BTreeMap<Arc<[String]>, Asked>);

#[derive(Debug)]
struct Asked {
    by: Askable,
    state: Answer,
    /// How long to wait after the next failure.
    retry: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Awaited,
    Came(Instant),
    /// It did not; another may be asked then.
    Failed(Instant),
}

impl Asks {
    /// Whom to ask now, for each set of services that should be asked about. What nobody has any more is forgotten.
    fn due(
        &mut self,
        sets: &BTreeMap<Arc<[String]>, Vec<Askable>>,
        now: Instant,
    ) -> Vec<(Arc<[String]>, usize)> {
        self.0.retain(|services, _| sets.contains_key(services));
        let mut due = Vec::new();
        for (services, askable) in sets {
            let Some(by) = self.whom(services, askable, now) else { continue };
            let retry = self.0.get(services).map_or(RETRY, |asked| asked.retry);
            self.0.insert(services.clone(), Asked { by, state: Answer::Awaited, retry });
            due.push((services.clone(), by.place));
        }
        due
    }

    /// Who is to be asked about these services now; `None`: nobody.
    fn whom(&self, services: &[String], askable: &[Askable], now: Instant) -> Option<Askable> {
        let Some(asked) = self.0.get(services) else {
            return askable.first().filter(|_| self.0.len() < SETS_MAX).copied();
        };
        match asked.state {
            Answer::Awaited => None,
            // The same names again from the one who answered: they may be declared anew.
            Answer::Came(at) if now >= at + SAME_AGAIN => askable
                .iter()
                .find(|peer| peer.id == asked.by.id && peer.described != asked.by.described)
                .copied(),
            Answer::Came(_) => None,
            Answer::Failed(next) if now >= next => {
                let another = askable.iter().find(|peer| peer.id > asked.by.id);
                another.or_else(|| askable.first()).copied()
            }
            Answer::Failed(_) => None,
        }
    }

    fn answered(&mut self, services: &[String], came: bool, now: Instant) {
        let Some(asked) = self.0.get_mut(services) else { return };
        if came {
            (asked.state, asked.retry) = (Answer::Came(now), RETRY);
        } else {
            asked.state = Answer::Failed(now + doubling(&mut asked.retry));
        }
    }
}

fn doubling(retry: &mut Duration) -> Duration {
    std::mem::replace(retry, (*retry * 2).min(AGAIN))
}

/// Asks a server for everything it reflects, by v1 or else v1alpha, within ten seconds; `metadata` goes along.
///
/// # Errors
/// UNIMPLEMENTED when it offers no reflection; otherwise what went wrong.
pub async fn reflect(channel: &Channel, metadata: &MetadataMap) -> Result<Reflected, Status> {
    let asking = async {
        match reflect_by(channel, REFLECTION[0], metadata).await {
            Err(status) if status.code() == Code::Unimplemented => {
                reflect_by(channel, REFLECTION[1], metadata).await
            }
            other => other,
        }
    };
    tokio::time::timeout(WITHIN, asking)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("it took too long")))
}

/// A stream of its own for each question it answers with the end of one.
async fn reflect_by(
    channel: &Channel,
    service: &'static str,
    metadata: &MetadataMap,
) -> Result<Reflected, Status> {
    let path = PathAndQuery::try_from(format!("/{service}/{REFLECTION_METHOD}"))
        .map_err(|error| Status::internal(error.to_string()))?;
    let mut collector = Collector::default();
    while let Some(first) = collector.next_request() {
        let mut grpc = Grpc::new(channel.clone());
        let (ask, questions) = tokio::sync::mpsc::channel(1);
        let sent = ask.send(first).await;
        sent.map_err(|_| Status::internal("the questions have no taker"))?;
        let questions = tokio_stream::wrappers::ReceiverStream::new(questions);
        let mut request = Request::new(questions);
        *request.metadata_mut() = metadata.clone();
        let codec = ProstCodec::<ServerReflectionRequest, ServerReflectionResponse>::default();
        let mut answers = grpc.streaming(request, path.clone(), codec).await?.into_inner();
        loop {
            match answers.message().await {
                Ok(Some(answer)) => collector.answer(answer).map_err(bad)?,
                Ok(None) => return Err(Status::internal("it stopped answering")),
                Err(status) => {
                    collector.ended(status.code().into(), status.message()).map_err(|_| status)?;
                    break;
                }
            }
            let Some(next) = collector.next_request() else {
                // Left in the middle, the server would count a cancelled call.
                drop(ask);
                drop(tokio::time::timeout(END_WITHIN, answers.message()).await);
                break;
            };
            if ask.send(next).await.is_err() {
                return Err(Status::internal("it stopped listening"));
            }
        }
    }
    Ok(collector.finish())
}

fn bad(error: inference::ReflectionError) -> Status {
    Status::internal(error.to_string())
}

#[cfg(test)]
mod tests {
    use membership::NodeId;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn set(name: &str) -> Arc<[String]> {
        [name.to_owned()].into()
    }

    fn peer(n: u8, version: u32) -> Askable {
        Askable { place: n.into(), id: NodeId([n; 16]), described: (1, version) }
    }

    fn places(due: Vec<(Arc<[String]>, usize)>) -> Vec<usize> {
        due.into_iter().map(|(_, place)| place).collect()
    }

    #[test]
    fn of_those_with_the_same_services_one_is_asked_once() {
        let (mut asks, now) = (Asks::default(), clock::now());
        let mut sets: BTreeMap<_, _> =
            [(set("a"), vec![peer(1, 1), peer(2, 1)]), (set("b"), vec![peer(3, 1)])].into();
        assert_eq!(places(asks.due(&sets, now)), [1, 3]);
        assert!(asks.due(&sets, now).is_empty(), "they are being asked");
        asks.answered(&set("a"), true, now);
        sets.insert(set("a"), vec![peer(1, 1), peer(2, 9), peer(4, 1)]);
        assert!(asks.due(&sets, now + 100 * SECOND).is_empty(), "others have the same");
        sets.insert(set("a"), vec![peer(1, 2), peer(2, 9)]);
        assert!(asks.due(&sets, now + SECOND).is_empty(), "not so soon");
        assert_eq!(places(asks.due(&sets, now + 100 * SECOND)), [1], "it declares them anew");
    }

    #[test]
    fn where_one_does_not_answer_the_next_is_asked_later_and_later() {
        let (mut asks, mut now) = (Asks::default(), clock::now());
        let sets: BTreeMap<_, _> = [(set("a"), vec![peer(1, 1), peer(2, 1)])].into();
        for (place, wait) in [(1, 2), (2, 4), (1, 8), (2, 16), (1, 32), (2, 60), (1, 60)] {
            assert_eq!(places(asks.due(&sets, now)), [place]);
            asks.answered(&set("a"), false, now);
            assert!(asks.due(&sets, now + (wait - 1) * SECOND).is_empty());
            now += wait * SECOND;
        }
    }

    #[test]
    fn what_nobody_has_is_forgotten_and_no_more_than_so_many_sets_are_asked_about() {
        let (mut asks, now) = (Asks::default(), clock::now());
        let many = |from: usize| -> BTreeMap<_, _> {
            (from..from + 100).map(|i| (set(&format!("s{i}")), vec![peer(1, 1)])).collect()
        };
        assert_eq!(asks.due(&many(0), now).len(), SETS_MAX);
        assert!(asks.due(&many(0), now).is_empty());
        assert_eq!(asks.due(&many(1_000), now).len(), SETS_MAX);
        let nobody: BTreeMap<_, _> = [(set("a"), vec![])].into();
        assert!(asks.due(&nobody, now).is_empty() && asks.0.is_empty());
    }
}
