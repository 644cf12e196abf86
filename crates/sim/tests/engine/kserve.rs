//! KServe v2, health and reflection over gRPC.

use futures_util::{StreamExt as _, stream};
use proto::{
    grpc::{
        health::v1::{
            HealthCheckRequest, HealthListRequest, health_check_response::ServingStatus,
            health_client::HealthClient,
        },
        reflection::{v1, v1alpha},
    },
    inference::{
        ModelConfigRequest, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest,
        ModelStatisticsRequest, ModelStreamInferResponse, RepositoryIndexRequest,
        ServerLiveRequest, ServerMetadataRequest, ServerReadyRequest,
        SystemSharedMemoryStatusRequest, infer_parameter::ParameterChoice,
    },
};
use sim::words::Words;
use tokio::sync::mpsc;
use tonic::{Code, Streaming};

use crate::world::{ENDLESS, World, infer, soon, text_of};

const SERVICES: [&str; 4] = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
];

/// Everything a stream says, as text and whether it was the last of its request.
async fn tokens(mut stream: Streaming<ModelStreamInferResponse>) -> Vec<(String, bool)> {
    let mut tokens = Vec::new();
    while let Some(message) = soon(stream.message()).await.unwrap() {
        assert_eq!(message.error_message, "");
        let response = message.infer_response.unwrap();
        assert_eq!((response.id.as_str(), response.model_name.as_str()), ("id of the call", "sim"));
        let last = &response.parameters["triton_final_response"].parameter_choice;
        let is_last = *last == Some(ParameterChoice::BoolParam(true));
        tokens.push((text_of(&response), is_last));
    }
    tokens
}

fn expected(prompt: &str, count: u32) -> Vec<(String, bool)> {
    let words = Words::after(prompt);
    (0..count).map(|index| (words.token(index), index + 1 == count)).collect()
}

#[tokio::test]
async fn a_unary_call_gets_as_many_tokens_as_it_asked_for() {
    let world = World::new(2, 1);
    let response = soon(world.kserve().model_infer(infer("hello there", 7))).await.unwrap();
    let response = response.into_inner();
    assert_eq!(text_of(&response), Words::after("hello there").text(7));
    assert_eq!((response.id.as_str(), response.model_version.as_str()), ("id of the call", "1"));
    let default = ModelInferRequest { parameters: [].into(), ..infer("hello", 1) };
    let response = soon(world.kserve().model_infer(default)).await.unwrap();
    assert_eq!(text_of(response.get_ref()).split(' ').count(), 64);
}

#[tokio::test]
async fn a_stream_answers_each_request_token_by_token_in_order() {
    let world = World::new(2, 1);
    let requests = stream::iter([infer("one", 5), infer("two", 1), infer("three", 3)]);
    let stream = soon(world.kserve().model_stream_infer(requests)).await.unwrap().into_inner();
    let want = [expected("one", 5), expected("two", 1), expected("three", 3)].concat();
    assert_eq!(tokens(stream).await, want);
}

#[tokio::test]
async fn a_request_of_a_stream_that_is_wrong_leaves_the_stream_alive_the_first_too() {
    let world = World::new(2, 1);
    let other = ModelInferRequest { model_name: "other".to_owned(), ..infer("x", 1) };
    let empty = ModelInferRequest { inputs: vec![], ..infer("x", 1) };
    let requests = stream::iter([other.clone(), infer("one", 1), empty, other, infer("two", 1)]);
    let mut stream = soon(world.kserve().model_stream_infer(requests)).await.unwrap().into_inner();
    let mut errors = Vec::new();
    while let Some(message) = soon(stream.message()).await.unwrap() {
        assert_eq!(message.infer_response.unwrap().id, "id of the call");
        errors.push(message.error_message);
    }
    let model = "model `other` is not served here: ask for `sim`";
    let input = "send the prompt in an input `text_input` of datatype BYTES; there is none";
    assert_eq!(errors, [model, "", input, model, ""]);
}

#[tokio::test]
async fn a_stream_ends_with_a_status_when_there_is_no_room_for_a_later_request() {
    let world = World::new(1, 1);
    let (requests, later) = mpsc::channel(1);
    let requests_of = stream::unfold(later, async |mut later| Some((later.recv().await?, later)));
    requests.send(infer("one", 1)).await.unwrap();
    let stream = soon(world.kserve().model_stream_infer(requests_of)).await.unwrap();
    let mut stream = stream.into_inner();
    assert!(soon(stream.message()).await.unwrap().is_some());
    world.admin("POST", "/refuse").await;
    requests.send(infer("two", 1)).await.unwrap();
    let status = soon(stream.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
}

#[tokio::test]
async fn an_empty_stream_is_answered_with_nothing() {
    let world = World::new(1, 1);
    let stream = soon(world.kserve().model_stream_infer(stream::empty())).await.unwrap();
    assert_eq!(tokens(stream.into_inner()).await, []);
}

#[tokio::test]
async fn beyond_slots_and_queue_a_call_is_refused_with_a_time_to_come_back() {
    let world = World::new(1, 1);
    let held = |prompt| stream::iter([infer(prompt, ENDLESS)]).chain(stream::pending());
    let _first = soon(world.kserve().model_stream_infer(held("a"))).await.unwrap();
    let _second = soon(world.kserve().model_stream_infer(held("b"))).await.unwrap();
    let unary = soon(world.kserve().model_infer(infer("c", 1))).await.unwrap_err();
    let stream = soon(world.kserve().model_stream_infer(held("c"))).await.unwrap_err();
    for status in [unary, stream] {
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().starts_with("server busy: "), "{}", status.message());
        let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap();
        assert!(pushback.to_str().unwrap().parse::<u64>().unwrap() > 0);
    }
    world.until("refused", 2).await;
}

#[tokio::test]
async fn a_call_that_is_dropped_frees_its_slot() {
    let world = World::new(1, 0);
    let held = stream::iter([infer("a", ENDLESS)]).chain(stream::pending());
    let stream = soon(world.kserve().model_stream_infer(held)).await.unwrap();
    world.until("running", 1).await;
    drop(stream);
    world.until("running", 0).await;
    let mut client = world.kserve();
    let mut unary = Box::pin(client.model_infer(infer("b", ENDLESS)));
    tokio::select! {
        _ = &mut unary => panic!("16,384 tokens came at once"),
        () = world.until("running", 1) => {}
    }
    drop(unary);
    world.until("running", 0).await;
    world.until("cancelled", 2).await;
    assert!(soon(world.kserve().model_infer(infer("c", 1))).await.is_ok());
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_nobody_up() {
    let world = World::new(2, 0);
    let stream = stream::iter([infer("a", 1_000)]);
    let unread = soon(world.kserve().model_stream_infer(stream)).await.unwrap();
    assert!(soon(world.kserve().model_infer(infer("b", 20))).await.is_ok());
    world.until("finished", 2).await;
    assert_eq!(tokens(unread.into_inner()).await, expected("a", 1_000));
}

#[tokio::test]
async fn a_wrong_request_is_told_what_is_expected() {
    let world = World::new(1, 1);
    let other = ModelInferRequest { model_name: "other".to_owned(), ..infer("x", 1) };
    let version = ModelInferRequest { model_version: "2".to_owned(), ..infer("x", 1) };
    let empty = ModelInferRequest { inputs: vec![], ..infer("x", 1) };
    for (request, code, says) in [
        (other, Code::NotFound, "ask for `sim`"),
        (version, Code::NotFound, "the only version"),
        (empty, Code::InvalidArgument, "`text_input`"),
        (infer("x", 0), Code::InvalidArgument, "from 1 to 16384, not 0"),
        (infer("x", ENDLESS + 1), Code::InvalidArgument, "from 1 to 16384"),
    ] {
        let status = soon(world.kserve().model_infer(request)).await.unwrap_err();
        assert_eq!(status.code(), code);
        assert!(status.message().contains(says), "{}", status.message());
    }
}

#[tokio::test]
async fn the_server_and_its_model_describe_themselves() {
    let world = World::new(3, 1);
    let mut client = world.kserve();
    soon(client.model_infer(infer("x", 2))).await.unwrap();
    let (name, version) = ("sim".to_owned(), "1".to_owned());
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().get_ref().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().get_ref().ready);
    let ready = ModelReadyRequest { name: name.clone(), version };
    assert!(client.model_ready(ready).await.unwrap().get_ref().ready);
    let server = client.server_metadata(ServerMetadataRequest {}).await.unwrap();
    assert_eq!(server.get_ref().name, "isobar-sim");
    let metadata = ModelMetadataRequest { name: name.clone(), ..Default::default() };
    let metadata = client.model_metadata(metadata).await.unwrap();
    assert_eq!(metadata.get_ref().inputs[0].name, "text_input");
    let config = ModelConfigRequest { name: name.clone(), ..Default::default() };
    let config = client.model_config(config).await.unwrap();
    assert_eq!(config.into_inner().config.unwrap().name, "sim");
    let index = client.repository_index(RepositoryIndexRequest::default()).await.unwrap();
    assert_eq!(index.get_ref().models[0].state, "READY");
    world.until("finished", 1).await;
    let statistics = client.model_statistics(ModelStatisticsRequest::default()).await.unwrap();
    assert_eq!(statistics.get_ref().model_stats[0].inference_count, 1);
    let missing = client.system_shared_memory_status(SystemSharedMemoryStatusRequest::default());
    assert_eq!(missing.await.unwrap_err().code(), Code::Unimplemented);
    let other = ModelReadyRequest { name: "other".to_owned(), ..Default::default() };
    assert!(!client.model_ready(other).await.unwrap().get_ref().ready, "and no error");
    let other = ModelMetadataRequest { name: "other".to_owned(), ..Default::default() };
    assert_eq!(client.model_metadata(other).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn health_is_known_by_service() {
    let world = World::new(1, 1);
    let mut client = HealthClient::new(world.channel.clone());
    let request = |service: &str| HealthCheckRequest { service: service.to_owned() };
    for service in ["", "inference.GRPCInferenceService"] {
        let answer = soon(client.check(request(service))).await.unwrap();
        assert_eq!(answer.get_ref().status(), ServingStatus::Serving);
    }
    let unknown = soon(client.check(request("other"))).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let list = soon(client.list(HealthListRequest {})).await.unwrap();
    assert_eq!(list.get_ref().statuses.len(), 2);
    for (service, want) in [("", ServingStatus::Serving), ("other", ServingStatus::ServiceUnknown)]
    {
        let mut watch = soon(client.watch(request(service))).await.unwrap().into_inner();
        assert_eq!(soon(watch.message()).await.unwrap().unwrap().status(), want);
    }
}

#[tokio::test]
async fn both_reflections_list_exactly_what_is_served() {
    let world = World::new(1, 1);
    let request = v1::ServerReflectionRequest {
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(
            String::new(),
        )),
        ..Default::default()
    };
    let mut client =
        v1::server_reflection_client::ServerReflectionClient::new(world.channel.clone());
    let answers = soon(client.server_reflection_info(stream::iter([request]))).await.unwrap();
    let answer = soon(answers.into_inner().message()).await.unwrap().unwrap();
    let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
        answer.message_response
    else {
        panic!("{answer:?}");
    };
    let mut names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    names.sort();
    assert_eq!(names, SERVICES);

    use v1alpha::server_reflection_request::MessageRequest;
    let file = |symbol: &str| v1alpha::ServerReflectionRequest {
        message_request: Some(MessageRequest::FileContainingSymbol(symbol.to_owned())),
        ..Default::default()
    };
    let mut client =
        v1alpha::server_reflection_client::ServerReflectionClient::new(world.channel.clone());
    for (symbol, is_known) in
        SERVICES.map(|name| (name, true)).into_iter().chain([("isobar.test.v1.Kinds", false)])
    {
        let requests = stream::iter([file(symbol)]);
        let answers = soon(client.server_reflection_info(requests)).await.unwrap();
        let answer = soon(answers.into_inner().message()).await;
        assert_eq!(answer.is_ok(), is_known, "{symbol}: {answer:?}");
    }
}
