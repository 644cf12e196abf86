//! Which model a call asks for: a bounded look at the front of its body, which is then relayed as it came.

use std::{pin::Pin, time::Duration};

use base::ModelName;
use http::HeaderMap;
use http_body::Body as _;
use inference::{Encoding, ModelReader, Progress, kserve_model_field};
use tonic::{Status, body::Body};

use crate::{
    buffers::{Buffers, Look, PER_CALL_BYTES, PIECE_BYTES},
    refusal::Refusal,
};

/// A model must be named within this from the first byte on: until then the call holds what all calls share. A stream may be open for
/// as long as it likes before.
const NAMED_WITHIN: Duration = Duration::from_secs(10);
const TOO_SLOW: &str = "10 s after its first byte the request has not named its model: send it sooner, or less before it";

/// What a call asks for, as far as it decides who may serve it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The method names no model.
    Nothing,
    /// A model.
    Model(ModelName),
    /// A model whose name cannot be read, and why.
    Unreadable(String),
}

/// Why the front of a body could not be looked at.
#[derive(Debug)]
pub(crate) enum LookError {
    /// The request broke off.
    Broken(Status),
    /// The process holds back as much as it may.
    NoRoom,
}

impl From<LookError> for Refusal {
    fn from(error: LookError) -> Self {
        match error {
            LookError::Broken(status) => Self::broken_request(&status),
            LookError::NoRoom => Self::NoMemory,
        }
    }
}

/// What the call to `path` asks for, and its body with nothing missing.
pub(crate) async fn find(
    path: &str,
    headers: &HeaderMap,
    body: Body,
    buffers: &Buffers,
) -> Result<(Wanted, Body), LookError> {
    let Some(field) = kserve_model_field(path) else { return Ok((Wanted::Nothing, body)) };
    let encoding = Encoding::from_header(headers.get("grpc-encoding").map(|v| v.as_bytes()));
    let mut reader = ModelReader::new(field, encoding, PER_CALL_BYTES);
    let mut look = Look::new(body);
    let mut held_bytes = 0;
    let mut late = None;
    while *reader.progress() == Progress::NeedMore && held_bytes < PER_CALL_BYTES {
        let next = std::future::poll_fn(|cx| Pin::new(&mut look.rest).poll_frame(cx));
        let next = if held_bytes == 0 {
            next.await
        } else {
            let late = late.get_or_insert_with(|| Box::pin(tokio::time::sleep(NAMED_WITHIN)));
            tokio::select! {
                next = next => next,
                () = late => {
                    return Err(LookError::Broken(Status::deadline_exceeded(TOO_SLOW)));
                }
            }
        };
        let Some(frame) = next else {
            reader.end();
            break;
        };
        let frame = frame.map_err(LookError::Broken)?;
        if let Some(data) = frame.data_ref() {
            reader.push(data);
            held_bytes += data.len() + PIECE_BYTES;
            if !buffers.take(data.len(), &mut look.held) {
                return Err(LookError::NoRoom);
            }
        }
        look.seen.push_back(frame);
    }
    let wanted = match reader.into_progress() {
        Progress::Found(model) => Wanted::Model(model),
        Progress::Absent => Wanted::Nothing,
        Progress::NeedMore => Wanted::Unreadable(format!(
            "the request names no model in its first {PER_CALL_BYTES} bytes"
        )),
        Progress::Unreadable(error) => Wanted::Unreadable(error.to_string()),
    };
    Ok((wanted, Body::new(look)))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::StreamExt as _;
    use http_body::Frame;
    use http_body_util::{BodyExt as _, Full, StreamBody};
    use prost::Message as _;
    use proto::inference::ModelInferRequest;
    use tonic::Code;

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

    fn buffers() -> Buffers {
        Buffers::new(8 << 20)
    }

    async fn find_in(path: &str, data: Bytes, buffers: &Buffers) -> (Wanted, Bytes) {
        let body = Body::new(Full::new(data));
        let (wanted, body) = find(path, &HeaderMap::new(), body, buffers).await.unwrap();
        (wanted, body.collect().await.unwrap().to_bytes())
    }

    #[tokio::test]
    async fn the_model_is_found_and_the_body_is_whole() {
        let buffers = buffers();
        for size in [0, 10, 3 << 20] {
            let data = message("llama", size);
            let (wanted, relayed) = find_in(INFER, data.clone(), &buffers).await;
            assert_eq!(wanted, Wanted::Model("llama".parse().unwrap()));
            assert!(relayed == data);
        }
        assert_eq!(buffers.left(), 8 << 20, "everything was given back");
    }

    #[tokio::test]
    async fn what_cannot_be_read_says_so_and_is_whole() {
        for data in [&b"\x00"[..], b"\x07garbage", b"\x00\x00\x00\x00\x05\xff\xff\xff\xff\xff"] {
            let (wanted, relayed) = find_in(INFER, Bytes::from_static(data), &buffers()).await;
            assert!(matches!(wanted, Wanted::Unreadable(_)), "{data:?}: {wanted:?}");
            assert_eq!(relayed, data);
        }
    }

    #[tokio::test]
    async fn other_methods_are_not_looked_into() {
        let (wanted, _) = find_in("/p.S/M", message("llama", 1), &buffers()).await;
        assert_eq!(wanted, Wanted::Nothing);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_names_no_model_in_time_holds_nothing_any_more() {
        let whole = message("late", 5_000);
        let without_name = whole.slice(..5).into_iter().chain([0x3a, 0x80, 0x40, 1, 2, 3]);
        let begun = futures_util::stream::iter([Ok(Frame::data(without_name.collect::<Bytes>()))]);
        let stalls = begun.chain(futures_util::stream::pending::<Result<_, Status>>());
        let buffers = buffers();
        let body = Body::new(StreamBody::new(stalls));
        let headers = HeaderMap::new();
        let found = find(INFER, &headers, body, &buffers);
        let found = tokio::time::timeout(NAMED_WITHIN + Duration::from_secs(1), found).await;
        let error = found.expect("it is held").unwrap_err();
        assert!(
            matches!(&error, LookError::Broken(status) if status.code() == Code::DeadlineExceeded)
        );
        assert_eq!(buffers.left(), 8 << 20);
    }

    #[tokio::test]
    async fn without_room_the_call_is_not_looked_at_and_nothing_stays_held() {
        let buffers = Buffers::new(3);
        let body = Body::new(Full::new(message("late", 5_000)));
        let found = find(INFER, &HeaderMap::new(), body, &buffers).await;
        assert!(matches!(found, Err(LookError::NoRoom)));
        assert_eq!(buffers.left(), 3);
    }
}
