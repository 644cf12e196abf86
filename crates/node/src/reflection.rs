//! Server reflection: which services there are and how they are declared, so that grpcurl and its like need no proto files.
//!
//! v1 and v1alpha differ in their path alone; one handler answers both. Clients are told of the whole mesh, peers of the
//! engines here. A file comes with all it imports, from the same engine: files of one name may differ between engines.
//! Source: gRPC `grpc/reflection/v1/reflection.proto`.

use std::{future::Ready, sync::Arc};

use futures_util::{StreamExt as _, stream::BoxStream};
use inference::Declarations;
use proto::grpc::reflection::v1::{
    ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse,
    ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming, server::StreamingService};

use crate::catalog::{Catalog, Scope};

/// What is repeated of a name nobody knows.
const SHOWN_CHARS_MAX: usize = 100;

/// Answers reflection. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Reflection {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) scope: Scope,
    /// Ends streams that would otherwise stay open.
    pub(crate) drain: CancellationToken,
}

impl StreamingService<ServerReflectionRequest> for Reflection {
    type Response = ServerReflectionResponse;
    type ResponseStream = BoxStream<'static, Result<ServerReflectionResponse, Status>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<ServerReflectionRequest>>) -> Self::Future {
        let reflection = self.clone();
        let drained = self.drain.clone().cancelled_owned();
        let answers = request
            .into_inner()
            .map(move |question| question.map(|question| reflection.respond(question)))
            .take_until(drained);
        std::future::ready(Ok(Response::new(answers.boxed())))
    }
}

impl Reflection {
    fn respond(&self, question: ServerReflectionRequest) -> ServerReflectionResponse {
        let answer = match &question.message_request {
            Some(asked) => self.answer(asked),
            None => Err((Code::InvalidArgument, "the request asks for nothing".to_owned())),
        };
        let answer = answer.unwrap_or_else(|(code, error_message)| {
            MessageResponse::ErrorResponse(ErrorResponse { error_code: code.into(), error_message })
        });
        ServerReflectionResponse {
            valid_host: question.host.clone(),
            original_request: Some(question),
            message_response: Some(answer),
        }
    }

    fn answer(&self, asked: &MessageRequest) -> Result<MessageResponse, (Code, String)> {
        match asked {
            MessageRequest::ListServices(_) => {
                let names = self.catalog.services(self.scope).into_iter();
                let service = names.map(|name| ServiceResponse { name }).collect();
                Ok(MessageResponse::ListServicesResponse(ListServiceResponse { service }))
            }
            MessageRequest::FileByFilename(name) => self.files(name, |all| all.file(name)),
            MessageRequest::FileContainingSymbol(name) => self.files(name, |all| all.symbol(name)),
            MessageRequest::FileContainingExtension(of) => self.files(&of.containing_type, |all| {
                all.extension(&of.containing_type, of.extension_number)
            }),
            MessageRequest::AllExtensionNumbersOfType(name) => {
                let numbers = self.catalog.find(self.scope, |all| all.extension_numbers(name));
                Ok(MessageResponse::AllExtensionNumbersResponse(ExtensionNumberResponse {
                    base_type_name: name.clone(),
                    extension_number: numbers.ok_or_else(|| not_found(name))?,
                }))
            }
        }
    }

    fn files(
        &self,
        name: &str,
        look: impl Fn(&Declarations) -> Option<Vec<Vec<u8>>>,
    ) -> Result<MessageResponse, (Code, String)> {
        let file_descriptor_proto =
            self.catalog.find(self.scope, look).ok_or_else(|| not_found(name))?;
        Ok(MessageResponse::FileDescriptorResponse(FileDescriptorResponse {
            file_descriptor_proto,
        }))
    }
}

fn not_found(name: &str) -> (Code, String) {
    let shown: String = name.chars().take(SHOWN_CHARS_MAX).collect();
    (Code::NotFound, format!("nobody in the mesh declares {shown}"))
}
