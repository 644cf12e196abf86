//! Server reflection: which services there are and how they are declared, so that grpcurl and its like need no proto files.
//!
//! v1 and v1alpha differ in their path alone; one handler answers both. Clients are told of the whole mesh, peers of the
//! engines here. Source: gRPC `grpc/reflection/v1/reflection.proto`.

use std::{future::Ready, sync::Arc};

use futures_util::{StreamExt as _, stream::BoxStream};
use prost_reflect::{DescriptorPool, FileDescriptor};
use proto::grpc::reflection::v1::{
    ErrorResponse, ExtensionNumberResponse, ExtensionRequest, FileDescriptorResponse,
    ListServiceResponse, ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming, server::StreamingService};

use crate::catalog::{Catalog, Scope};

/// Longest name that is looked up.
const NAME_BYTES_MAX: usize = 1024;

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
            MessageRequest::FileByFilename(name) => {
                self.file(name, |pool| pool.get_file_by_name(name))
            }
            MessageRequest::FileContainingSymbol(name) => {
                self.file(name, |pool| file_of_symbol(pool, name))
            }
            MessageRequest::FileContainingExtension(ExtensionRequest {
                containing_type,
                extension_number,
            }) => self.file(containing_type, |pool| {
                let number = u32::try_from(*extension_number).ok()?;
                let extension = pool.get_message_by_name(containing_type)?.get_extension(number)?;
                Some(extension.parent_file())
            }),
            MessageRequest::AllExtensionNumbersOfType(name) => {
                let numbers = self.catalog.find(self.scope, |pool| {
                    let message = pool.get_message_by_name(name)?;
                    Some(
                        message
                            .extensions()
                            .filter_map(|e| i32::try_from(e.number()).ok())
                            .collect(),
                    )
                });
                let extension_number = numbers.ok_or_else(|| not_found(name))?;
                let base_type_name = name.clone();
                Ok(MessageResponse::AllExtensionNumbersResponse(ExtensionNumberResponse {
                    base_type_name,
                    extension_number,
                }))
            }
        }
    }

    fn file(
        &self,
        name: &str,
        look: impl Fn(&DescriptorPool) -> Option<FileDescriptor>,
    ) -> Result<MessageResponse, (Code, String)> {
        if name.len() > NAME_BYTES_MAX {
            return Err((Code::InvalidArgument, "the name is too long".to_owned()));
        }
        let file = self.catalog.find(self.scope, look).ok_or_else(|| not_found(name))?;
        let file_descriptor_proto = vec![file.encode_to_vec()];
        Ok(MessageResponse::FileDescriptorResponse(FileDescriptorResponse {
            file_descriptor_proto,
        }))
    }
}

fn not_found(name: &str) -> (Code, String) {
    let shown: String = name.chars().take(100).collect();
    (Code::NotFound, format!("nobody in the mesh declares {shown}"))
}

/// The file that declares a service, method, message, field, enum or extension.
fn file_of_symbol(pool: &DescriptorPool, name: &str) -> Option<FileDescriptor> {
    let name = name.strip_prefix('.').unwrap_or(name);
    pool.get_service_by_name(name)
        .map(|service| service.parent_file())
        .or_else(|| pool.get_message_by_name(name).map(|message| message.parent_file()))
        .or_else(|| pool.get_enum_by_name(name).map(|values| values.parent_file()))
        .or_else(|| pool.get_extension_by_name(name).map(|extension| extension.parent_file()))
        .or_else(|| {
            let (parent, member) = name.rsplit_once('.')?;
            let service = pool.get_service_by_name(parent);
            let method = service.and_then(|s| s.methods().find(|m| m.name() == member));
            let field = || pool.get_message_by_name(parent)?.get_field_by_name(member);
            method
                .map(|method| method.parent_file())
                .or_else(|| field().map(|field| field.parent_message().parent_file()))
        })
}
