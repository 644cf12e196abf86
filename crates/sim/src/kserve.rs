//! KServe v2 with Triton's extensions, as far as a text model needs them. What is missing answers UNIMPLEMENTED.
//!
//! What is wrong with a request of a ModelStreamInfer is answered in the stream, as Triton does: `error_message`, and the
//! stream goes on. Unlike Triton's, a stream ends with a status, RESOURCE_EXHAUSTED or UNAVAILABLE, when there is no room
//! or the server stops: before the first answer that lets a mesh try another server, later it lets the client. A server
//! that stops finishes the request in progress and refuses those behind it; OK is only for a client that has ended its
//! side and has had all its answers.

use std::{sync::Arc, time::Duration};

use axum::http;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use proto::inference::{
    InferStatistics, ModelConfig, ModelConfigRequest, ModelConfigResponse, ModelInferRequest,
    ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest,
    ModelReadyResponse, ModelStatistics, ModelStatisticsRequest, ModelStatisticsResponse,
    ModelStreamInferResponse, RepositoryIndexRequest, RepositoryIndexResponse, ServerLiveRequest,
    ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest,
    ServerReadyResponse, StatisticDuration, grpc_inference_service_server::GrpcInferenceService,
    model_metadata_response::TensorMetadata, repository_index_response::ModelIndex,
};
use tonic::{
    Code, Request, Response, Status, Streaming, codegen::BoxStream, metadata::MetadataMap,
};

use crate::{
    gpu::{Ask, Generation, Gpu, Refusal, round_up},
    tensors::{self, BYTES, INPUT, OUTPUT, Reply, VERSION},
};

/// What the server says it is.
const SERVER: &str = "isobar-sim";
/// When a refused call may come back, in milliseconds (gRFC A6).
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct Kserve(pub(crate) Arc<Gpu>);

impl Kserve {
    fn check(&self, name: &str, version: &str) -> Result<(), Status> {
        self.0.check_model(name).map_err(|refusal| status(&refusal))?;
        if version.is_empty() || version == VERSION {
            Ok(())
        } else {
            Err(Status::not_found(format!("the only version of model `{name}` is {VERSION}")))
        }
    }

    fn begin(&self, request: &ModelInferRequest) -> Result<Running, Status> {
        self.check(&request.model_name, &request.model_version)?;
        let asked = tensors::read(request).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let model = request.model_name.as_str();
        let ask = Ask { model, prompt: asked.prompt, tokens: asked.tokens };
        let generation = self.0.generate(&ask).map_err(|refusal| status(&refusal))?;
        Ok(Running { generation, reply: Reply::to(request) })
    }
}

/// The answer to a call that a server which stops gives up.
pub(crate) fn stopped() -> http::Response<axum::body::Body> {
    status(&Refusal::Stopped).into_http()
}

/// The status of a refusal.
fn status(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        Refusal::UnknownModel { .. } => Status::not_found(message),
        Refusal::Tokens(_) => Status::invalid_argument(message),
        Refusal::Stopped => Status::unavailable(message),
        Refusal::Busy(busy) => {
            let mut metadata = MetadataMap::new();
            let wait_ms = round_up(busy.retry_after, Duration::from_millis(1));
            metadata.insert(PUSHBACK, wait_ms.into());
            Status::with_metadata(Code::ResourceExhausted, message, metadata)
        }
    }
}

/// A request that is being answered.
#[derive(Debug)]
struct Running {
    generation: Generation,
    reply: Reply,
}

impl Running {
    /// The next answer of a stream; `None` after the last.
    async fn next(&mut self) -> Option<Result<ModelStreamInferResponse, Status>> {
        let token = self.generation.next().await?.map_err(|refusal| status(&refusal));
        let is_last = self.generation.is_done();
        Some(token.map(|token| ModelStreamInferResponse {
            error_message: String::new(),
            infer_response: Some(self.reply.token(token, is_last)),
        }))
    }
}

/// A stream of requests, answered one after the other: those to come wait in the window of the connection.
struct Session {
    service: Kserve,
    requests: Streaming<ModelInferRequest>,
    running: Option<Running>,
}

impl Session {
    async fn next(mut self) -> Option<(Result<ModelStreamInferResponse, Status>, Self)> {
        self.answer().await.transpose().map(|answer| (answer, self))
    }

    async fn answer(&mut self) -> Result<Option<ModelStreamInferResponse>, Status> {
        loop {
            if let Some(running) = &mut self.running {
                match running.next().await {
                    Some(answer) => return answer.map(Some),
                    None => self.running = None,
                }
            }
            let Some(request) = self.take().await? else { return Ok(None) };
            if let Some(failure) = self.begin(&request)? {
                return Ok(Some(failure));
            }
        }
    }

    /// The next request; `None` when the client has ended its side.
    async fn take(&mut self) -> Result<Option<ModelInferRequest>, Status> {
        let drain = &self.service.0.drain;
        let request = tokio::select! {
            biased;
            // A client that may have sent more, or is about to, must not take the end for an answer.
            () = drain.cancelled() => match self.requests.message().now_or_never() {
                Some(Ok(None)) => None,
                Some(_) | None => return Err(status(&Refusal::Stopped)),
            },
            request = self.requests.message() => request?,
        };
        self.service.0.awake().await.map_err(|refusal| status(&refusal))?;
        Ok(request)
    }

    /// Begins to answer a request. What is wrong with it is said in the stream; only for want of room, or at the end of
    /// the server, does the stream end.
    fn begin(
        &mut self,
        request: &ModelInferRequest,
    ) -> Result<Option<ModelStreamInferResponse>, Status> {
        match self.service.begin(request) {
            Ok(running) => {
                self.running = Some(running);
                Ok(None)
            }
            Err(status) if is_elsewhere(&status) => Err(status),
            Err(status) => Ok(Some(failure(request, &status))),
        }
    }
}

/// Whether another server may take what was refused.
fn is_elsewhere(status: &Status) -> bool {
    matches!(status.code(), Code::ResourceExhausted | Code::Unavailable)
}

fn failure(request: &ModelInferRequest, status: &Status) -> ModelStreamInferResponse {
    ModelStreamInferResponse {
        error_message: status.message().to_owned(),
        infer_response: Some(Reply::to(request).empty()),
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Kserve {
    async fn server_live(
        &self,
        _: Request<ServerLiveRequest>,
    ) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        // One that refuses is ready, and full.
        Ok(Response::new(ServerReadyResponse { ready: !self.0.drain.is_cancelled() }))
    }

    async fn model_ready(
        &self,
        request: Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let request = request.into_inner();
        // As Triton does: what is not there is not ready, and to ask for it is no error.
        let is_served = self.check(&request.name, &request.version).is_ok();
        Ok(Response::new(ModelReadyResponse { ready: is_served && !self.0.drain.is_cancelled() }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        let extensions = ["model_configuration", "model_repository", "statistics"];
        Ok(Response::new(ServerMetadataResponse {
            name: SERVER.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: extensions.map(str::to_owned).to_vec(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let request = request.into_inner();
        self.check(&request.name, &request.version)?;
        let tensor = |name: &str| TensorMetadata {
            name: name.to_owned(),
            datatype: BYTES.to_owned(),
            shape: vec![1],
        };
        Ok(Response::new(ModelMetadataResponse {
            name: request.name,
            versions: vec![VERSION.to_owned()],
            platform: SERVER.to_owned(),
            inputs: vec![tensor(INPUT)],
            outputs: vec![tensor(OUTPUT)],
        }))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        self.0.awake().await.map_err(|refusal| status(&refusal))?;
        let Running { generation, reply } = self.begin(request.get_ref())?;
        let text = generation.text().await.map_err(|refusal| status(&refusal))?;
        Ok(Response::new(reply.text(text)))
    }

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<BoxStream<ModelStreamInferResponse>>, Status> {
        let requests = request.into_inner();
        let mut session = Session { service: self.clone(), requests, running: None };
        // Until the first request is taken nothing is answered, so that whoever is refused may try elsewhere.
        let failure = match session.take().await? {
            Some(first) => session.begin(&first)?,
            None => None,
        };
        let rest = stream::unfold(session, Session::next);
        Ok(Response::new(Box::pin(stream::iter(failure.map(Ok)).chain(rest))))
    }

    async fn model_config(
        &self,
        request: Request<ModelConfigRequest>,
    ) -> Result<Response<ModelConfigResponse>, Status> {
        let request = request.into_inner();
        self.check(&request.name, &request.version)?;
        let config = ModelConfig {
            name: request.name,
            platform: SERVER.to_owned(),
            backend: SERVER.to_owned(),
            // No batch dimension: requests are batched by the server.
            max_batch_size: 0,
        };
        Ok(Response::new(ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        request: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        let request = request.into_inner();
        // No name asks for all models.
        if !request.name.is_empty() {
            self.check(&request.name, &request.version)?;
        }
        let totals = self.0.metrics.totals();
        let count = |count| Some(StatisticDuration { count, ns: 0 });
        let inference_stats = InferStatistics {
            success: count(totals.finished),
            fail: count(totals.cancelled + totals.refused),
            ..InferStatistics::default()
        };
        let statistics = ModelStatistics {
            name: self.0.model.to_string(),
            version: VERSION.to_owned(),
            inference_count: totals.finished,
            execution_count: self.0.figures().steps,
            inference_stats: Some(inference_stats),
            ..ModelStatistics::default()
        };
        Ok(Response::new(ModelStatisticsResponse { model_stats: vec![statistics] }))
    }

    async fn repository_index(
        &self,
        _: Request<RepositoryIndexRequest>,
    ) -> Result<Response<RepositoryIndexResponse>, Status> {
        let model = ModelIndex {
            name: self.0.model.to_string(),
            version: VERSION.to_owned(),
            state: "READY".to_owned(),
            reason: String::new(),
        };
        Ok(Response::new(RepositoryIndexResponse { models: vec![model] }))
    }
}
