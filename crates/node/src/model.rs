//! Which model a call asks for: a bounded look at the front of its body, which is then relayed as it came.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use base::ModelName;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use inference::{Encoding, ModelReader, Progress, kserve_model_field};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, body::Body};

/// Bytes of one body that are held back while its model is looked for. A name beyond them is not found.
const LOOK_BYTES: usize = 1 << 20;
/// Bytes held back in the whole process. Above it calls are routed without their model being known.
const BUDGET_BYTES: usize = 256 << 20;

/// Finds the model of calls within a budget of memory. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct ModelFinder {
    budget: Arc<Semaphore>,
    look_bytes: usize,
}

impl Default for ModelFinder {
    fn default() -> Self {
        Self { budget: Arc::new(Semaphore::new(BUDGET_BYTES)), look_bytes: LOOK_BYTES }
    }
}

impl ModelFinder {
    /// The model the call to `path` asks for, and its body with nothing missing. `None`: the method names none, or the
    /// name cannot be read; then the engine says what is wrong with it, in its own words.
    pub(crate) async fn find(
        &self,
        path: &str,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<(Option<ModelName>, Body), Status> {
        let Some(field) = kserve_model_field(path) else { return Ok((None, body)) };
        let encoding = Encoding::from_header(headers.get("grpc-encoding").map(|v| v.as_bytes()));
        let mut reader = ModelReader::new(field, encoding, self.look_bytes);
        let mut look = Look { seen: VecDeque::new(), rest: body, held: None };
        let mut held_bytes = 0;
        while *reader.progress() == Progress::NeedMore && held_bytes < self.look_bytes {
            let Some(frame) =
                std::future::poll_fn(|cx| Pin::new(&mut look.rest).poll_frame(cx)).await
            else {
                reader.end();
                break;
            };
            let frame = frame?;
            if let Some(data) = frame.data_ref() {
                reader.push(data);
                held_bytes += data.len();
                let permit = u32::try_from(data.len())
                    .ok()
                    .and_then(|bytes| self.budget.clone().try_acquire_many_owned(bytes).ok());
                let within_budget = permit.is_some();
                look.hold(permit);
                look.seen.push_back(frame);
                if !within_budget {
                    break;
                }
            } else {
                look.seen.push_back(frame);
            }
        }
        let model = match reader.into_progress() {
            Progress::Found(model) => Some(model),
            Progress::NeedMore | Progress::Absent => None,
            Progress::Unreadable(error) => {
                tracing::debug!(%error, path, "the model of a call is not known");
                None
            }
        };
        Ok((model, Body::new(look)))
    }
}

/// A body of which the front was looked at.
#[derive(Debug)]
struct Look {
    seen: VecDeque<Frame<Bytes>>,
    rest: Body,
    held: Option<OwnedSemaphorePermit>,
}

impl Look {
    fn hold(&mut self, permit: Option<OwnedSemaphorePermit>) {
        match (&mut self.held, permit) {
            (Some(held), Some(more)) => held.merge(more),
            (held, Some(more)) => *held = Some(more),
            (_, None) => {}
        }
    }
}

impl http_body::Body for Look {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(frame) = self.seen.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        self.held = None;
        Pin::new(&mut self.rest).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.seen.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let seen: u64 = self.seen.iter().filter_map(Frame::data_ref).map(|d| d.len() as u64).sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(seen));
        if let Some(upper) = rest.upper().and_then(|upper| upper.checked_add(seen)) {
            hint.set_upper(upper);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, Full};
    use prost::Message as _;
    use proto::inference::ModelInferRequest;

    use super::*;

    const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

    fn message(model: &str, tensor_bytes: usize) -> Bytes {
        let request = ModelInferRequest {
            model_name: model.into(),
            raw_input_contents: vec![Bytes::from(vec![1; tensor_bytes])],
            ..ModelInferRequest::default()
        };
        let encoded = request.encode_to_vec();
        let length = u32::try_from(encoded.len()).unwrap().to_be_bytes();
        [&[0][..], &length, &encoded].concat().into()
    }

    async fn find(finder: &ModelFinder, path: &str, data: Bytes) -> (Option<String>, Bytes) {
        let body = Body::new(Full::new(data));
        let (model, body) = finder.find(path, &HeaderMap::new(), body).await.unwrap();
        let relayed = body.collect().await.unwrap().to_bytes();
        (model.map(|model| model.to_string()), relayed)
    }

    #[tokio::test]
    async fn the_model_is_found_and_the_body_is_whole() {
        let finder = ModelFinder::default();
        for size in [0, 10, 3 << 20] {
            let data = message("llama", size);
            let (model, relayed) = find(&finder, INFER, data.clone()).await;
            assert_eq!(model.as_deref(), Some("llama"));
            assert!(relayed == data);
        }
        assert_eq!(finder.budget.available_permits(), BUDGET_BYTES, "everything was given back");
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_relayed_as_it_came() {
        let finder = ModelFinder::default();
        for data in [&b""[..], b"\x00", b"\x07garbage", b"\x00\x00\x00\x00\x05\xff\xff\xff\xff\xff"]
        {
            let (model, relayed) = find(&finder, INFER, Bytes::from_static(data)).await;
            assert_eq!(model, None);
            assert_eq!(relayed, data);
        }
    }

    #[tokio::test]
    async fn other_methods_are_not_looked_into() {
        let (model, _) = find(&ModelFinder::default(), "/p.S/M", message("llama", 1)).await;
        assert_eq!(model, None);
    }

    #[tokio::test]
    async fn without_budget_the_call_goes_on_without_its_model_known() {
        let finder = ModelFinder { budget: Arc::new(Semaphore::new(3)), look_bytes: LOOK_BYTES };
        let data = message("late", 5_000);
        let (_, relayed) = find(&finder, INFER, data.clone()).await;
        assert!(relayed == data);
        assert_eq!(finder.budget.available_permits(), 3);
    }
}
