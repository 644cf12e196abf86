//! Which services does a server offer, and how are they declared? gRPC server reflection, from the asking side.
//!
//! A machine without IO: it says what to ask next, and is told the answers, one at a time. What comes out is, for each
//! service, the file that declares it with all it imports. A node answers for several engines, whose files may have the same
//! names and differ: files that clash are kept apart. A service whose files are incomplete, or one too many, is listed
//! without declarations; the others are none the worse for it.
//!
//! v1 and v1alpha differ in their path alone; the messages here are those of v1. Source: gRPC
//! `grpc/reflection/v1/reflection.proto`.

use std::collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry};

use proto::grpc::reflection::v1::{
    ServerReflectionRequest, ServerReflectionResponse, server_reflection_request::MessageRequest,
    server_reflection_response::MessageResponse,
};

use crate::declarations::{DeclarationError, Declarations, Header};

/// Services one server may offer; those beyond are not asked for.
const SERVICES_MAX: usize = 4096;
/// Files, and bytes of all of them, that are kept of one server.
const FILES_MAX: usize = 4096;
const BYTES_MAX: usize = 4 << 20;
/// Questions one server is asked; what it has not said by then is not known.
const QUESTIONS_MAX: usize = 10_000;
/// What begins the names of the services reflection itself is made of.
const OWN: &str = "grpc.reflection.";
/// Status codes.
const NOT_FOUND: i32 = 5;
const UNIMPLEMENTED: i32 = 12;

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reflected {
    /// Its services, sorted: all it lists, declared or not.
    pub services: Vec<String>,
    /// Their declarations: in each group, files that fit together.
    pub declarations: Vec<Declarations>,
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
}

/// Asks a server for everything it declares.
#[derive(Clone, Debug, Default)]
pub struct Collector {
    is_listed: bool,
    /// Services that have not been asked for.
    open: VecDeque<String>,
    asked: Option<MessageRequest>,
    service: Closure,
    /// Files that came by name: what a server calls so, whichever service asks.
    by_name: BTreeMap<String, Vec<u8>>,
    by_name_bytes: usize,
    services: Vec<String>,
    groups: Vec<BTreeMap<String, Vec<u8>>>,
    bytes: usize,
    files: usize,
    questions: usize,
}

/// The files of the service that is being asked for.
#[derive(Clone, Debug, Default)]
struct Closure {
    files: BTreeMap<String, Vec<u8>>,
    missing: BTreeSet<String>,
}

impl Collector {
    /// The next question; `None`: everything is known. A question that was not answered is asked again.
    pub fn next_request(&mut self) -> Option<ServerReflectionRequest> {
        self.questions += 1;
        let next = match self.asked.take() {
            _ if self.questions > QUESTIONS_MAX => return None,
            Some(again) => again,
            None if !self.is_listed => MessageRequest::ListServices(String::new()),
            None => match self.service.missing.first() {
                Some(name) => MessageRequest::FileByFilename(name.clone()),
                None => MessageRequest::FileContainingSymbol(self.open.pop_front()?),
            },
        };
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
                self.listed(list.service.into_iter().map(|service| service.name).collect());
                Ok(())
            }
            (asked, MessageResponse::FileDescriptorResponse(files))
                if !matches!(asked, MessageRequest::ListServices(_)) =>
            {
                if self.declared(&asked, files.file_descriptor_proto).is_err() {
                    self.give_up();
                }
                Ok(())
            }
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
        let groups = self.groups.into_iter().map(BTreeMap::into_values);
        let declarations = groups.filter_map(|files| Declarations::new(files).ok()).collect();
        Reflected { services: self.services, declarations }
    }

    fn listed(&mut self, mut services: Vec<String>) {
        services.sort();
        services.dedup();
        services.truncate(SERVICES_MAX);
        self.open.extend(services.iter().filter(|s| !s.starts_with(OWN)).cloned());
        self.services = services;
        self.is_listed = true;
    }

    /// Files came: the one asked for, and perhaps what it imports.
    fn declared(
        &mut self,
        asked: &MessageRequest,
        files: Vec<Vec<u8>>,
    ) -> Result<(), DeclarationError> {
        let mut imports = Vec::new();
        if let MessageRequest::FileByFilename(name) = asked {
            self.service.missing.remove(name);
        }
        for bytes in files {
            let header = Header::of(&bytes)?;
            // A service that is given up leaves nothing behind; what came by name may serve the next.
            if let MessageRequest::FileByFilename(_) = asked
                && self.by_name.len() < FILES_MAX
                && self.by_name_bytes + bytes.len() <= BYTES_MAX
            {
                self.by_name_bytes += bytes.len();
                self.by_name.entry(header.name.clone()).or_insert_with(|| bytes.clone());
            }
            self.service.missing.remove(&header.name);
            imports.extend(header.imports);
            self.service.files.entry(header.name).or_insert(bytes);
        }
        self.import(imports)?;
        let size: usize = self.service.files.values().map(Vec::len).sum();
        let open = self.service.files.len() + self.service.missing.len();
        if self.bytes + size > BYTES_MAX || self.files + open > FILES_MAX {
            self.give_up();
        } else if self.service.missing.is_empty() {
            self.complete();
        }
        Ok(())
    }

    /// Takes imports from what has come before; what has not is missing.
    fn import(&mut self, mut open: Vec<String>) -> Result<(), DeclarationError> {
        while let Some(name) = open.pop() {
            if self.service.files.contains_key(&name) {
                continue;
            }
            match self.by_name.get(&name) {
                Some(bytes) => {
                    open.extend(Header::of(bytes)?.imports);
                    self.service.files.insert(name, bytes.clone());
                }
                None => drop(self.service.missing.insert(name)),
            }
        }
        Ok(())
    }

    /// The files of a service are together: they join the first group they do not clash with.
    fn complete(&mut self) {
        let closure = std::mem::take(&mut self.service).files;
        let clashes = |group: &BTreeMap<String, Vec<u8>>| {
            closure.iter().any(|(name, bytes)| group.get(name).is_some_and(|known| known != bytes))
        };
        let place = self.groups.iter().position(|group| !clashes(group));
        let place = place.unwrap_or_else(|| {
            self.groups.push(BTreeMap::new());
            self.groups.len() - 1
        });
        let group = &mut self.groups[place];
        for (name, bytes) in closure {
            if let Entry::Vacant(place) = group.entry(name) {
                self.bytes += bytes.len();
                self.files += 1;
                place.insert(bytes);
            }
        }
    }

    /// The service stays in the list, without declarations.
    fn give_up(&mut self) {
        self.service = Closure::default();
    }

    fn refused(
        &mut self,
        asked: &MessageRequest,
        code: i32,
        message: String,
    ) -> Result<(), ReflectionError> {
        match asked {
            MessageRequest::FileContainingSymbol(_) | MessageRequest::FileByFilename(_)
                if matches!(code, NOT_FOUND | UNIMPLEMENTED) =>
            {
                self.give_up();
                Ok(())
            }
            _ => Err(ReflectionError::Refused { code, message }),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::FileDescriptorProto;
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

    /// A file that declares service `p.NAME`.
    fn file(name: &str, imports: &[&str]) -> Vec<u8> {
        let service = prost_types::ServiceDescriptorProto {
            name: Some(name.to_uppercase()),
            ..Default::default()
        };
        let file = FileDescriptorProto {
            name: Some(format!("{name}.proto")),
            package: Some("p".into()),
            dependency: imports.iter().map(ToString::to_string).collect(),
            service: vec![service],
            ..Default::default()
        };
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

    fn symbol(name: &str) -> Option<MessageRequest> {
        Some(MessageRequest::FileContainingSymbol(name.into()))
    }

    fn by_name(name: &str) -> Option<MessageRequest> {
        Some(MessageRequest::FileByFilename(name.into()))
    }

    /// A collector whose server has these services.
    fn listed(names: &[&str]) -> Collector {
        let mut collector = Collector::default();
        assert!(matches!(next(&mut collector), Some(MessageRequest::ListServices(_))));
        collector.answer(services(names)).unwrap();
        collector
    }

    #[test]
    fn every_service_is_asked_for_and_every_import_once() {
        let mut collector = listed(&["p.B", "p.A", "grpc.reflection.v1.ServerReflection"]);
        assert_eq!(next(&mut collector), symbol("p.A"));
        collector.answer(files(&[file("a", &["c.proto", "d.proto"])])).unwrap();
        assert_eq!(next(&mut collector), by_name("c.proto"));
        collector.answer(files(&[file("c", &[])])).unwrap();
        assert_eq!(next(&mut collector), by_name("d.proto"));
        collector.answer(files(&[file("d", &["c.proto"])])).unwrap();
        assert_eq!(next(&mut collector), symbol("p.B"));
        collector.answer(files(&[file("b", &["d.proto"])])).unwrap();
        assert_eq!(next(&mut collector), None);
        let reflected = collector.finish();
        assert_eq!(reflected.services, ["grpc.reflection.v1.ServerReflection", "p.A", "p.B"]);
        let [declarations] = &reflected.declarations[..] else { panic!("one group") };
        assert_eq!(declarations.symbol("p.A").unwrap().len(), 3);
        assert_eq!(declarations.symbol("p.B").unwrap().len(), 3);
    }

    #[test]
    fn files_of_one_name_that_differ_are_kept_apart() {
        let mut collector = listed(&["p.A", "p.B"]);
        collector.next_request();
        let common = |more| [file("common", &[]), vec![0x62, 1, more]].concat();
        let first = [file("a", &["common.proto"]), common(b'x')];
        collector.answer(files(&first)).unwrap();
        collector.next_request();
        let second = [file("b", &["common.proto"]), common(b'y')];
        collector.answer(files(&second)).unwrap();
        assert_eq!(next(&mut collector), None);
        let reflected = collector.finish();
        let found = |symbol: &str| {
            reflected.declarations.iter().find_map(|declarations| declarations.symbol(symbol))
        };
        assert_eq!(found("p.A").unwrap(), first);
        assert_eq!(found("p.B").unwrap(), second);
    }

    #[test]
    fn a_service_without_complete_declarations_is_listed_all_the_same() {
        for ends_the_stream in [false, true] {
            let mut collector = listed(&["p.A", "p.B", "p.C"]);
            collector.next_request();
            if ends_the_stream {
                collector.ended(NOT_FOUND, "what?").unwrap();
            } else {
                collector.answer(unknown()).unwrap();
            }
            assert_eq!(next(&mut collector), symbol("p.B"));
            collector.answer(files(&[file("b", &["gone.proto"])])).unwrap();
            assert_eq!(next(&mut collector), by_name("gone.proto"));
            collector.answer(unknown()).unwrap();
            assert_eq!(next(&mut collector), symbol("p.C"));
            collector.answer(files(&[file("c", &[])])).unwrap();
            assert_eq!(next(&mut collector), None);
            let reflected = collector.finish();
            assert_eq!(reflected.services, ["p.A", "p.B", "p.C"]);
            let has = |symbol| reflected.declarations.iter().any(|d| d.symbol(symbol).is_some());
            assert_eq!((has("p.A"), has("p.B"), has("p.C")), (false, false, true));
        }
    }

    #[test]
    fn a_question_that_was_not_answered_is_asked_again() {
        let mut collector = Collector::default();
        let first = collector.next_request();
        assert_eq!(collector.next_request(), first);
    }

    #[test]
    fn a_server_without_reflection_is_an_error() {
        let mut collector = Collector::default();
        collector.next_request();
        let refused = collector.ended(UNIMPLEMENTED, "unimplemented");
        assert!(matches!(refused, Err(ReflectionError::Refused { code: UNIMPLEMENTED, .. })));
    }

    #[test]
    fn answers_out_of_turn_are_errors_and_garbage_declares_nothing() {
        let mut collector = Collector::default();
        assert_eq!(collector.answer(services(&[])), Err(ReflectionError::OutOfTurn));
        collector.next_request();
        assert_eq!(collector.answer(files(&[])), Err(ReflectionError::OutOfTurn));
        let mut collector = listed(&["p.A"]);
        collector.next_request();
        collector.answer(files(&[vec![0xff; 10]])).unwrap();
        assert_eq!(next(&mut collector), None);
        assert!(collector.finish().declarations.is_empty());
    }

    #[test]
    fn a_server_that_declares_without_end_is_asked_within_bounds() {
        let many: Vec<String> = (0..SERVICES_MAX + 10).map(|i| format!("p.S{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let mut collector = listed(&many);
        let mut questions = 0;
        while collector.next_request().is_some() {
            questions += 1;
            let imports: Vec<String> = (0..3).map(|i| format!("{questions}-{i}.proto")).collect();
            let imports: Vec<&str> = imports.iter().map(String::as_str).collect();
            collector.answer(files(&[file(&questions.to_string(), &imports)])).unwrap();
            assert!(questions <= QUESTIONS_MAX, "asked without end");
        }
        assert!(collector.bytes <= BYTES_MAX && collector.files <= FILES_MAX);
    }
}
