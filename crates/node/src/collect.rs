//! Asking engines and peers what they declare, on the control runtime: one task each.
//!
//! An engine is asked when it is up, again when it comes back, and now and then. A peer is asked for the declarations of
//! its engines when what it says it serves has changed.

use std::{sync::Arc, time::Duration};

use inference::{Collector, Reflected};
use proto::grpc::reflection::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tonic::{
    Code, Request, Status, client::Grpc, codegen::http::uri::PathAndQuery, metadata::MetadataMap,
};
use tonic_prost::ProstCodec;
use transport::Channel;

use crate::{
    catalog::Catalog,
    engines::Engine,
    peers::Board,
    services::{REFLECTION, REFLECTION_METHOD},
};

/// How often what is known of engines and peers is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long a server may take to say everything, and to end its answer then.
const WITHIN: Duration = Duration::from_secs(10);
const END_WITHIN: Duration = Duration::from_secs(1);
/// An engine that stays up is asked again after this: it may have been replaced unseen.
const AGAIN: Duration = Duration::from_secs(60);
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

/// Keeps what peer `index` reflects, for ever.
pub(crate) async fn peer(index: usize, channel: Channel, board: Arc<Board>, catalog: Arc<Catalog>) {
    let (mut known, mut retry) = (None, RETRY);
    loop {
        tokio::time::sleep(LOOK).await;
        let described = board.described(index);
        if described == known || described.is_none() {
            continue;
        }
        let reflected = if board.has_services(index) {
            reflect(&channel, &MetadataMap::new()).await
        } else {
            Ok(Reflected::default())
        };
        match reflected {
            Ok(reflected) => {
                catalog.peer_reflects(index, reflected);
                (known, retry) = (described, RETRY);
            }
            Err(error) => {
                let peer = channel.target().name();
                tracing::debug!(peer, %error, "a peer could not be asked what it declares");
                tokio::time::sleep(doubling(&mut retry)).await;
            }
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
