//! Which services does a server offer, and how are they declared? gRPC server reflection, from the asking side.
//!
//! A machine without IO: it says what to ask next, and is told the answers, one at a time. What comes out is a closed
//! `FileDescriptorSet`: every file with all it imports. v1 and v1alpha differ in their path alone; the messages here are
//! those of v1. Source: gRPC `grpc/reflection/v1/reflection.proto`.

use std::collections::{BTreeMap, VecDeque};

use prost::Message as _;
use prost_types::FileDescriptorProto;
use proto::grpc::reflection::v1::{
    ServerReflectionRequest, ServerReflectionResponse, server_reflection_request::MessageRequest,
    server_reflection_response::MessageResponse,
};

/// Services one server may offer.
const SERVICES_MAX: usize = 1024;
/// Files, and bytes of all of them, one server may declare.
const FILES_MAX: usize = 4096;
const BYTES_MAX: usize = 8 << 20;
/// What begins the names of the services reflection itself is made of.
const OWN: &str = "grpc.reflection.";
/// NOT_FOUND, as an error code of reflection.
const NOT_FOUND: i32 = 5;

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reflected {
    /// Its services, sorted: all it lists, declared or not.
    pub services: Vec<String>,
    /// Their declarations: a serialized `google.protobuf.FileDescriptorSet`, as the server sent them, options we do not
    /// know included.
    pub files: Vec<u8>,
}

/// Why a server's word cannot be used. The server is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReflectionError {
    /// It answered something else than was asked.
    #[error("an answer to another question")]
    OutOfTurn,
    /// It answered with an error.
    #[error("the server answers {code}: {message}")]
    Refused {
        /// A gRPC status code.
        code: i32,
        /// The server's words.
        message: String,
    },
    /// A file that is no file.
    #[error("a declaration that cannot be read: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// More than anybody declares.
    #[error(
        "more than {SERVICES_MAX} services, {FILES_MAX} files or {BYTES_MAX} bytes of declarations"
    )]
    TooMuch,
}

/// Asks a server for everything it declares.
#[derive(Clone, Debug)]
pub struct Collector {
    open: VecDeque<MessageRequest>,
    asked: Option<MessageRequest>,
    reflected: Reflected,
    files: BTreeMap<String, Vec<u8>>,
    bytes: usize,
}

impl Default for Collector {
    fn default() -> Self {
        Self {
            open: VecDeque::from([MessageRequest::ListServices(String::new())]),
            asked: None,
            reflected: Reflected::default(),
            files: BTreeMap::new(),
            bytes: 0,
        }
    }
}

impl Collector {
    /// The next question; `None`: everything is known. A question that was not answered is asked again.
    pub fn next_request(&mut self) -> Option<ServerReflectionRequest> {
        let next = self.asked.take().or_else(|| self.open.pop_front())?;
        self.asked = Some(next.clone());
        Some(ServerReflectionRequest { host: String::new(), message_request: Some(next) })
    }

    /// The answer to it.
    ///
    /// # Errors
    /// [`ReflectionError`]; nothing more should be asked of this server.
    pub fn answer(&mut self, response: ServerReflectionResponse) -> Result<(), ReflectionError> {
        let asked = self.asked.take().ok_or(ReflectionError::OutOfTurn)?;
        match (asked, response.message_response.ok_or(ReflectionError::OutOfTurn)?) {
            (MessageRequest::ListServices(_), MessageResponse::ListServicesResponse(list)) => {
                self.listed(list.service.into_iter().map(|service| service.name).collect())
            }
            (
                MessageRequest::FileContainingSymbol(_) | MessageRequest::FileByFilename(_),
                MessageResponse::FileDescriptorResponse(files),
            ) => self.declared(files.file_descriptor_proto),
            (asked, MessageResponse::ErrorResponse(error)) => {
                self.refused(&asked, error.error_code, error.error_message)
            }
            _ => Err(ReflectionError::OutOfTurn),
        }
    }

    /// The server ended the stream with a status instead of answering: some do so for what they do not know.
    ///
    /// # Errors
    /// [`ReflectionError::Refused`] when that is not to be expected.
    pub fn ended(&mut self, code: i32, message: &str) -> Result<(), ReflectionError> {
        match self.asked.take() {
            Some(asked) => self.refused(&asked, code, message.to_owned()),
            None => Ok(()),
        }
    }

    /// Everything, once there is no further question.
    #[must_use]
    pub fn finish(self) -> Reflected {
        let mut reflected = self.reflected;
        for file in self.files.into_values() {
            // Field 1 of FileDescriptorSet, as it came: decoding it would drop options we do not know.
            prost::encoding::encode_key(
                1,
                prost::encoding::WireType::LengthDelimited,
                &mut reflected.files,
            );
            prost::encoding::encode_varint(file.len() as u64, &mut reflected.files);
            reflected.files.extend(file);
        }
        reflected
    }

    fn listed(&mut self, mut services: Vec<String>) -> Result<(), ReflectionError> {
        if services.len() > SERVICES_MAX {
            return Err(ReflectionError::TooMuch);
        }
        services.sort();
        services.dedup();
        let declared = services.iter().filter(|service| !service.starts_with(OWN));
        self.open.extend(declared.cloned().map(MessageRequest::FileContainingSymbol));
        self.reflected.services = services;
        Ok(())
    }

    fn declared(&mut self, files: Vec<Vec<u8>>) -> Result<(), ReflectionError> {
        for bytes in files {
            let file = FileDescriptorProto::decode(bytes.as_slice())?;
            if self.files.contains_key(file.name()) {
                continue;
            }
            self.bytes += bytes.len();
            if self.bytes > BYTES_MAX || self.files.len() >= FILES_MAX {
                return Err(ReflectionError::TooMuch);
            }
            self.files.insert(file.name().to_owned(), bytes);
            self.open.extend(file.dependency.into_iter().map(MessageRequest::FileByFilename));
        }
        self.skip_known();
        Ok(())
    }

    /// Servers send imports with a file, or do not: what has come is not asked for.
    fn skip_known(&mut self) {
        let files = &self.files;
        let mut names = std::collections::BTreeSet::new();
        self.open.retain(|question| match question {
            MessageRequest::FileByFilename(name) => {
                !files.contains_key(name) && names.insert(name.clone())
            }
            _ => true,
        });
    }

    /// A service without a declaration stays in the list; a file that is missing makes the rest useless.
    fn refused(
        &self,
        asked: &MessageRequest,
        code: i32,
        message: String,
    ) -> Result<(), ReflectionError> {
        match asked {
            MessageRequest::FileContainingSymbol(_) if code == NOT_FOUND => Ok(()),
            _ => Err(ReflectionError::Refused { code, message }),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost_types::FileDescriptorSet;
    use proto::grpc::reflection::v1::{
        ErrorResponse, FileDescriptorResponse, ListServiceResponse, ServiceResponse,
    };

    use super::*;

    fn response(message: MessageResponse) -> ServerReflectionResponse {
        ServerReflectionResponse { message_response: Some(message), ..Default::default() }
    }

    fn services(names: &[&str]) -> ServerReflectionResponse {
        let service = names.iter().map(|name| ServiceResponse { name: (*name).into() }).collect();
        response(MessageResponse::ListServicesResponse(ListServiceResponse { service }))
    }

    fn file(name: &str, imports: &[&str]) -> Vec<u8> {
        let dependency = imports.iter().map(ToString::to_string).collect();
        let file =
            FileDescriptorProto { name: Some(name.into()), dependency, ..Default::default() };
        file.encode_to_vec()
    }

    fn files(files: &[Vec<u8>]) -> ServerReflectionResponse {
        let file_descriptor_proto = files.to_vec();
        let files = FileDescriptorResponse { file_descriptor_proto };
        response(MessageResponse::FileDescriptorResponse(files))
    }

    fn unknown() -> ServerReflectionResponse {
        let error = ErrorResponse { error_code: NOT_FOUND, error_message: "what?".into() };
        response(MessageResponse::ErrorResponse(error))
    }

    fn next(collector: &mut Collector) -> Option<MessageRequest> {
        collector.next_request().and_then(|request| request.message_request)
    }

    #[test]
    fn every_service_is_asked_for_and_every_import_once() {
        let mut collector = Collector::default();
        assert!(matches!(next(&mut collector), Some(MessageRequest::ListServices(_))));
        collector.answer(services(&["p.B", "p.A", "grpc.reflection.v1.ServerReflection"])).unwrap();
        assert_eq!(next(&mut collector), Some(MessageRequest::FileContainingSymbol("p.A".into())));
        collector.answer(files(&[file("a.proto", &["c.proto", "d.proto"])])).unwrap();
        assert_eq!(next(&mut collector), Some(MessageRequest::FileContainingSymbol("p.B".into())));
        let with_import = [file("b.proto", &["c.proto"]), file("c.proto", &[])];
        collector.answer(files(&with_import)).unwrap();
        assert_eq!(next(&mut collector), Some(MessageRequest::FileByFilename("d.proto".into())));
        collector.answer(files(&[file("d.proto", &[])])).unwrap();
        assert_eq!(next(&mut collector), None);
        let reflected = collector.finish();
        assert_eq!(reflected.services, ["grpc.reflection.v1.ServerReflection", "p.A", "p.B"]);
        let set = FileDescriptorSet::decode(reflected.files.as_slice()).unwrap();
        let names: Vec<_> = set.file.iter().map(FileDescriptorProto::name).collect();
        assert_eq!(names, ["a.proto", "b.proto", "c.proto", "d.proto"]);
    }

    #[test]
    fn a_service_without_a_declaration_is_listed_all_the_same() {
        for ends_the_stream in [false, true] {
            let mut collector = Collector::default();
            collector.next_request();
            collector.answer(services(&["p.A"])).unwrap();
            collector.next_request();
            if ends_the_stream {
                collector.ended(NOT_FOUND, "what?").unwrap();
            } else {
                collector.answer(unknown()).unwrap();
            }
            assert_eq!(next(&mut collector), None);
            assert_eq!(collector.finish().services, ["p.A"]);
        }
    }

    #[test]
    fn a_question_that_was_not_answered_is_asked_again() {
        let mut collector = Collector::default();
        let first = collector.next_request();
        assert_eq!(collector.next_request(), first);
    }

    #[test]
    fn a_server_without_reflection_or_with_a_hole_in_it_is_an_error() {
        let mut collector = Collector::default();
        collector.next_request();
        assert!(matches!(
            collector.ended(12, "unimplemented"),
            Err(ReflectionError::Refused { code: 12, .. })
        ));
        let mut collector = Collector::default();
        collector.next_request();
        collector.answer(services(&["p.A"])).unwrap();
        collector.next_request();
        collector.answer(files(&[file("a.proto", &["gone.proto"])])).unwrap();
        collector.next_request();
        assert!(matches!(collector.answer(unknown()), Err(ReflectionError::Refused { .. })));
    }

    #[test]
    fn answers_out_of_turn_garbage_and_floods_are_errors() {
        let mut collector = Collector::default();
        assert_eq!(collector.answer(services(&[])), Err(ReflectionError::OutOfTurn));
        collector.next_request();
        assert_eq!(collector.answer(files(&[])), Err(ReflectionError::OutOfTurn));

        let mut collector = Collector::default();
        collector.next_request();
        let many: Vec<String> = (0..2_000).map(|i| format!("p.S{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(collector.answer(services(&many)), Err(ReflectionError::TooMuch));

        let mut collector = Collector::default();
        collector.next_request();
        collector.answer(services(&["p.A"])).unwrap();
        collector.next_request();
        let garbage = files(&[vec![0xff; 10]]);
        assert!(matches!(collector.answer(garbage), Err(ReflectionError::Malformed(_))));

        let mut collector = Collector::default();
        collector.next_request();
        collector.answer(services(&["p.A"])).unwrap();
        for round in 0..2 * FILES_MAX {
            let Some(_) = collector.next_request() else { panic!("it has more to ask") };
            let next = format!("{}.proto", round + 1);
            match collector.answer(files(&[file(&format!("{round}.proto"), &[&next])])) {
                Ok(()) => {}
                Err(error) => return assert_eq!(error, ReflectionError::TooMuch),
            }
        }
        panic!("a server that declares without end is asked without end");
    }
}
