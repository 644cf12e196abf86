//! Which protocol does an engine speak, and where does a request of it name its model?

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::Deserialize;

/// What an engine speaks.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// KServe v2 (the Open Inference Protocol) over gRPC, with Triton's extensions.
    #[default]
    KserveV2,
    /// Any gRPC service; its messages are never looked into.
    Grpc,
}

impl Protocol {
    const ALL: [Self; 2] = [Self::KserveV2, Self::Grpc];

    /// The protocol as the configuration spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::KserveV2 => "kserve-v2",
            Self::Grpc => "grpc",
        }
    }

    /// The number of the string field that names the model in requests of the method at `path`; `None` when such
    /// requests name no model.
    #[must_use]
    pub fn model_field(self, path: &str) -> Option<u32> {
        match self {
            Self::KserveV2 => kserve_model_field(path),
            Self::Grpc => None,
        }
    }
}

impl FromStr for Protocol {
    type Err = UnknownProtocol;

    fn from_str(text: &str) -> Result<Self, UnknownProtocol> {
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.as_str() == text)
            .ok_or_else(|| UnknownProtocol { text: text.chars().take(SHOWN_CHARS_MAX).collect() })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that is no protocol. The fault is with whoever wrote it; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a protocol: write kserve-v2 or grpc")]
pub struct UnknownProtocol {
    text: String,
}

/// How much of a wrong text an error repeats.
const SHOWN_CHARS_MAX: usize = 40;

/// The number of the string field that names the model, for the methods of `inference.GRPCInferenceService`; `None`
/// for every other path.
///
/// `TraceSetting` may carry a model too, but asks about the server, so it is not routed by model.
#[must_use]
pub fn kserve_model_field(path: &str) -> Option<u32> {
    match path.strip_prefix("/inference.GRPCInferenceService/")? {
        "ModelInfer" | "ModelStreamInfer" | "ModelReady" | "ModelMetadata" | "ModelConfig"
        | "ModelStatistics" => Some(1),
        "RepositoryModelLoad" | "RepositoryModelUnload" => Some(2),
        _ => None,
    }
}

/// Whether the method at `path` may run twice without harm: inference and questions of KServe v2, health checks and
/// reflection. Loading, unloading and settings may not.
#[must_use]
pub fn is_idempotent(path: &str) -> bool {
    if let Some(method) = path.strip_prefix("/inference.GRPCInferenceService/") {
        return matches!(
            method,
            "ServerLive"
                | "ServerReady"
                | "ServerMetadata"
                | "ModelReady"
                | "ModelMetadata"
                | "ModelInfer"
                | "ModelStreamInfer"
                | "ModelConfig"
                | "ModelStatistics"
                | "RepositoryIndex"
                | "SystemSharedMemoryStatus"
                | "CudaSharedMemoryStatus"
        );
    }
    [
        "/grpc.health.v1.Health/",
        "/grpc.reflection.v1.ServerReflection/",
        "/grpc.reflection.v1alpha.ServerReflection/",
    ]
    .into_iter()
    .any(|service| path.starts_with(service))
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn the_configuration_and_from_str_spell_a_protocol_alike() {
        for protocol in Protocol::ALL {
            assert_eq!(protocol.to_string().parse(), Ok(protocol));
            assert_eq!(
                serde_json::from_value::<Protocol>(protocol.as_str().into()).unwrap(),
                protocol
            );
        }
        let schema = serde_json::to_string(&schemars::schema_for!(Protocol)).unwrap();
        assert!(
            Protocol::ALL.iter().all(|protocol| schema.contains(protocol.as_str())),
            "{schema}"
        );
    }

    #[test]
    fn another_protocol_is_refused_with_the_allowed_ones() {
        let error = "KServe".parse::<Protocol>().unwrap_err();
        assert_eq!(error.to_string(), "`KServe` is not a protocol: write kserve-v2 or grpc");
        assert!("x".repeat(10_000).parse::<Protocol>().unwrap_err().to_string().len() < 100);
    }

    #[test]
    fn every_method_that_names_a_model_is_read_where_its_declaration_says() {
        let set = FileDescriptorSet::decode(proto::FILE_DESCRIPTOR_SET).unwrap();
        let files: Vec<_> = set.file.iter().filter(|file| file.package() == "inference").collect();
        let mut methods = 0;
        for method in files.iter().flat_map(|file| &file.service).flat_map(|s| &s.method) {
            let request = files
                .iter()
                .flat_map(|file| &file.message_type)
                .find(|message| method.input_type() == format!(".inference.{}", message.name()))
                .unwrap();
            let name_is_model = method.name().starts_with("Model");
            let declared = request
                .field
                .iter()
                .find(|field| {
                    field.name() == "model_name" || (name_is_model && field.name() == "name")
                })
                .filter(|_| method.name() != "TraceSetting")
                .map(|field| field.number().unsigned_abs());
            let path = format!("/inference.GRPCInferenceService/{}", method.name());
            assert_eq!(Protocol::KserveV2.model_field(&path), declared, "{path}");
            assert_eq!(Protocol::Grpc.model_field(&path), None, "{path}");
            methods += 1;
        }
        assert_eq!(methods, 20);
    }

    #[test]
    fn what_changes_an_engine_is_not_idempotent() {
        let set = FileDescriptorSet::decode(proto::FILE_DESCRIPTOR_SET).unwrap();
        let files = set.file.iter().filter(|file| file.package() == "inference");
        let methods = files.flat_map(|file| &file.service).flat_map(|s| &s.method);
        let changing: Vec<_> = methods
            .map(|method| method.name())
            .filter(|name| !is_idempotent(&format!("/inference.GRPCInferenceService/{name}")))
            .collect();
        let want = [
            "RepositoryModelLoad",
            "RepositoryModelUnload",
            "SystemSharedMemoryRegister",
            "SystemSharedMemoryUnregister",
            "CudaSharedMemoryRegister",
            "CudaSharedMemoryUnregister",
            "TraceSetting",
            "LogSettings",
        ];
        assert_eq!(changing, want);
        assert!(is_idempotent("/grpc.health.v1.Health/Check"));
        assert!(!is_idempotent("/p.S/M") && !is_idempotent("/grpc.health.v1.HealthX/Check"));
    }

    #[test]
    fn other_services_name_no_model() {
        for path in
            ["", "/", "/other.Service/ModelInfer", "inference.GRPCInferenceService/ModelInfer"]
        {
            assert_eq!(kserve_model_field(path), None, "{path}");
        }
    }
}
