//! How messages are declared: from proto files, from the server's reflection, or, for what everybody knows, built in.

use std::{path::PathBuf, thread};

use anyhow::Context as _;
use clap::Args;
use prost_reflect::{DescriptorPool, Kind, MessageDescriptor, MethodDescriptor, ServiceDescriptor};
use tonic::{Code, metadata::MetadataMap};
use transport::Channel;

use crate::{Failure, output};

/// Options that say where declarations come from.
#[derive(Clone, Debug, Args)]
pub(crate) struct SchemaOptions {
    /// Proto file that declares the method; without any the server is asked (reflection). May be repeated
    #[arg(long = "proto", value_name = "FILE")]
    protos: Vec<PathBuf>,
    /// Directory imports are looked for in; by default those of the files. May be repeated
    #[arg(short = 'I', long = "import-path", value_name = "DIR", requires = "protos")]
    imports: Vec<PathBuf>,
}

impl SchemaOptions {
    /// Whether any was given.
    pub(crate) fn is_given(&self) -> bool {
        !self.protos.is_empty()
    }
}

/// What can be called.
#[derive(Debug)]
pub(crate) struct Schema {
    /// The services of the server or of the files.
    services: Vec<String>,
    /// Where they are looked up, in this order.
    pools: Vec<DescriptorPool>,
    /// Why the server could not say.
    unknown: Option<String>,
}

impl Schema {
    /// Reads the files, or asks the server as the call will: with its `metadata`.
    pub(crate) async fn load(
        options: &SchemaOptions,
        channel: &Channel,
        metadata: &MetadataMap,
    ) -> Result<Self, Failure> {
        let built_in = DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET)
            .context("the built-in declarations are damaged")?;
        if !options.protos.is_empty() {
            let pool = compile(&options.protos, &options.imports).map_err(Failure::Usage)?;
            let services = pool.services().map(|service| service.full_name().to_owned()).collect();
            return Ok(Self { services, pools: vec![pool, built_in], unknown: None });
        }
        match node::reflect(channel, metadata).await {
            Ok(reflected) => {
                let groups = reflected.declarations.iter();
                let mut pools: Vec<_> =
                    groups.filter_map(|group| decoded(group.to_set())).collect();
                pools.push(built_in);
                Ok(Self { services: reflected.services, pools, unknown: None })
            }
            Err(status) => {
                let why = match status.code() {
                    Code::Unimplemented => "it offers no reflection".to_owned(),
                    _ => status.message().to_owned(),
                };
                Ok(Self { services: Vec::new(), pools: vec![built_in], unknown: Some(why) })
            }
        }
    }

    /// A service, by its whole name.
    pub(crate) fn service(&self, name: &str) -> Option<ServiceDescriptor> {
        self.pools.iter().find_map(|pool| pool.get_service_by_name(name))
    }

    /// A message everybody knows, or the server declares.
    pub(crate) fn message(&self, name: &str) -> Option<MessageDescriptor> {
        // The built-in pool knows what refusals hold.
        self.pools.iter().rev().find_map(|pool| pool.get_message_by_name(name))
    }

    /// The method `name`: package.Service/Method, or with a dot.
    pub(crate) fn method(&self, name: &str) -> Result<MethodDescriptor, Failure> {
        let name = name.trim_start_matches('/');
        let (service, method) = name
            .split_once('/')
            .or_else(|| name.rsplit_once('.'))
            .with_context(|| format!("`{name}` is no method: write package.Service/Method"))
            .map_err(Failure::Usage)?;
        let Some(found) = self.service(service) else { return Err(self.no_service(service)) };
        found.methods().find(|found| found.name() == method).ok_or_else(|| {
            let methods: Vec<_> = found.methods().map(|m| m.name().to_owned()).collect();
            Failure::Usage(anyhow::anyhow!(
                "{service} has no method {method}{}: it has {}",
                meant(method, methods.iter()),
                methods.join(", ")
            ))
        })
    }

    fn no_service(&self, service: &str) -> Failure {
        Failure::Usage(match &self.unknown {
            Some(why) => anyhow::anyhow!(
                "the server cannot be asked how {service} is declared: {why}; give the file with --proto FILE"
            ),
            None => anyhow::anyhow!(
                "nobody declares a service {service}{}: there are {}",
                meant(service, self.services.iter()),
                self.services.join(", ")
            ),
        })
    }

    /// The services, or why they are not known.
    pub(crate) fn services(&self) -> Result<&[String], Failure> {
        match &self.unknown {
            None => Ok(&self.services),
            Some(why) => Err(Failure::Failed(anyhow::anyhow!(
                "the server cannot be asked for its services: {why}"
            ))),
        }
    }
}

/// The likeliest of `known`, as an aside.
fn meant<'a>(text: &str, known: impl Iterator<Item = &'a String>) -> String {
    let near = known
        .map(|name| (strsim::jaro_winkler(text, name), name))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b));
    near.map(|(_, name)| format!(" (did you mean {name}?)")).unwrap_or_default()
}

fn compile(files: &[PathBuf], imports: &[PathBuf]) -> anyhow::Result<DescriptorPool> {
    let beside = files.iter().filter_map(|file| file.parent()).map(PathBuf::from);
    let here = if imports.is_empty() { beside.collect() } else { Vec::new() };
    let imports: Vec<PathBuf> = imports.iter().cloned().chain(here).collect();
    // An import path that is empty means the working directory.
    let imports =
        imports.into_iter().map(|p| if p.as_os_str().is_empty() { ".".into() } else { p });
    let set = protox::compile(files, imports.collect::<Vec<PathBuf>>())?;
    DescriptorPool::from_file_descriptor_set(set).context("the proto files do not fit together")
}

/// What a server declares, if it can be understood. On a thread of its own: the library panics at some declarations that
/// protoc would refuse.
fn decoded(set: Vec<u8>) -> Option<DescriptorPool> {
    let decoding = thread::Builder::new()
        .name("declarations".to_owned())
        .spawn(move || DescriptorPool::decode(set.as_slice()).map_err(|error| error.to_string()));
    let decoded = match decoding.map(thread::JoinHandle::join) {
        Ok(Ok(decoded)) => decoded,
        Ok(Err(_)) => Err("they are not what protoc would make".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    match decoded {
        Ok(pool) => Some(pool),
        Err(why) => {
            output::note(&format!("some declarations of the server cannot be used: {why}"));
            None
        }
    }
}

/// A service as proto declares it.
pub(crate) fn describe(service: &ServiceDescriptor) -> String {
    let mut text = format!("service {} {{\n", service.full_name());
    for method in service.methods() {
        let stream = |is_streaming| if is_streaming { "stream " } else { "" };
        text.push_str(&format!(
            "  rpc {}({}{}) returns ({}{});\n",
            method.name(),
            stream(method.is_client_streaming()),
            method.input().full_name(),
            stream(method.is_server_streaming()),
            method.output().full_name(),
        ));
    }
    text.push('}');
    text
}

/// What a message may hold, one field a line.
pub(crate) fn fields(message: &MessageDescriptor) -> String {
    let mut text = format!("message {} {{\n", message.full_name());
    for field in message.fields() {
        let kind = match field.kind() {
            Kind::Message(message) if !field.is_map() => message.full_name().to_owned(),
            Kind::Enum(values) => values.full_name().to_owned(),
            other => format!("{other:?}").to_lowercase(),
        };
        let kind = if field.is_map() { "map".to_owned() } else { kind };
        let many = if field.is_list() { "repeated " } else { "" };
        text.push_str(&format!("  {many}{kind} {} = {};\n", field.name(), field.number()));
    }
    text.push('}');
    text
}
