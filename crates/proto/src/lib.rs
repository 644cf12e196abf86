//! The wire types: what `proto/` says, as Rust. Modules mirror the packages.
//!
//! Everything but [`FILE_DESCRIPTOR_SET`] and the `Debug` of what holds a secret is generated. Conversions, checks and meaning live with the crates that use
//! the types; maps are ordered, so that equal messages have equal bytes.
#![expect(
    unused_qualifications,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    reason = "generated code; if a generator stops earning one of these, the build says so"
)]

/// Every declaration below as a serialized `google.protobuf.FileDescriptorSet`, imports included and comments left out:
/// what server reflection answers from.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// KServe v2 (the Open Inference Protocol) with Triton's extensions.
pub mod inference {
    tonic::include_proto!("inference");
}

/// Types the mesh speaks of its own.
pub mod isobar {
    /// Operators.
    pub mod admin {
        /// What operators ask a node.
        pub mod v1 {
            tonic::include_proto!("isobar.admin.v1");
        }
    }

    /// The mesh.
    pub mod mesh {
        /// What nodes tell each other over the gossip port, and how they come by their certificates.
        pub mod v1 {
            use std::fmt;

            tonic::include_proto!("isobar.mesh.v1");

            /// Without the token.
            impl fmt::Debug for Join {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    let mut shown = f.debug_struct("Join");
                    shown.field("node", &self.node).field("region", &self.region);
                    shown.finish_non_exhaustive()
                }
            }

            /// Without the secret.
            impl fmt::Debug for JoinToken {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    let mut shown = f.debug_struct("JoinToken");
                    shown.field("names", &self.names).field("region", &self.region);
                    shown.finish_non_exhaustive()
                }
            }
        }
    }

    /// Nodes.
    pub mod node {
        /// What a node says of a call.
        pub mod v1 {
            tonic::include_proto!("isobar.node.v1");
        }
    }

    /// Services that exist to be called through a mesh under test.
    pub mod test {
        /// All four kinds of method.
        pub mod v1 {
            tonic::include_proto!("isobar.test.v1");
        }
    }
}

/// gRPC's own services.
pub mod grpc {
    /// Health checks.
    pub mod health {
        /// The only version.
        pub mod v1 {
            tonic::include_proto!("grpc.health.v1");
        }
    }

    /// Server reflection.
    pub mod reflection {
        /// The stable version.
        pub mod v1 {
            tonic::include_proto!("grpc.reflection.v1");
        }

        /// The draft, which many clients still try first.
        pub mod v1alpha {
            tonic::include_proto!("grpc.reflection.v1alpha");
        }
    }
}

/// Types shared by Google's APIs and gRPC.
pub mod google {
    /// Statuses with details.
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

/// ORCA load reports.
pub mod xds {
    /// Messages.
    pub mod data {
        /// Load.
        pub mod orca {
            /// The version in use.
            pub mod v3 {
                tonic::include_proto!("xds.data.orca.v3");
            }
        }
    }

    /// Services.
    pub mod service {
        /// Load, out of band.
        pub mod orca {
            /// The version in use.
            pub mod v3 {
                tonic::include_proto!("xds.service.orca.v3");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn the_descriptor_set_holds_every_service_with_its_methods() {
        let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
        let mut services: Vec<(String, usize)> = set
            .file
            .iter()
            .flat_map(|file| {
                file.service.iter().map(|service| {
                    (format!("{}.{}", file.package(), service.name()), service.method.len())
                })
            })
            .collect();
        services.sort();
        let want = [
            ("grpc.health.v1.Health", 3),
            ("grpc.reflection.v1.ServerReflection", 1),
            ("grpc.reflection.v1alpha.ServerReflection", 1),
            ("inference.GRPCInferenceService", 20),
            ("isobar.admin.v1.Admin", 2),
            ("isobar.test.v1.Kinds", 5),
            ("xds.service.orca.v3.OpenRcaService", 1),
        ];
        assert_eq!(services, want.map(|(name, methods)| (name.to_owned(), methods)));
    }

    #[test]
    fn the_descriptor_set_is_closed_under_imports() {
        let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
        for file in &set.file {
            for import in &file.dependency {
                assert!(set.file.iter().any(|other| other.name() == import), "{import}");
            }
        }
    }

    #[test]
    fn a_token_is_never_printed() {
        use isobar::mesh::v1::{EnrolRequest, Join, JoinToken, enrol_request::Ask};

        let join = Join { token: "hush".to_owned(), node: "b".to_owned(), ..Join::default() };
        let shown = format!("{:?}", EnrolRequest { ask: Some(Ask::Join(join)) });
        assert!(shown.contains("\"b\"") && !shown.contains("hush"), "{shown}");
        let token = JoinToken { secret: vec![42; 32], ..JoinToken::default() };
        assert!(!format!("{token:?}").contains("42"));
    }

    #[test]
    fn generated_services_answer_to_their_paths_on_the_wire() {
        assert_eq!(
            inference::grpc_inference_service_server::SERVICE_NAME,
            "inference.GRPCInferenceService"
        );
        assert_eq!(isobar::test::v1::kinds_server::SERVICE_NAME, "isobar.test.v1.Kinds");
    }

    #[test]
    fn a_refusal_travels_in_the_details_of_a_status() {
        use isobar::node::v1::{Refusal, RefusalReason};

        let refusal = Refusal {
            reason: RefusalReason::EngineFull.into(),
            node: "b".to_owned(),
            region: "eu".to_owned(),
            target: "gpu-0".to_owned(),
        };
        let any = prost_types::Any {
            type_url: "type.googleapis.com/isobar.node.v1.Refusal".to_owned(),
            value: refusal.encode_to_vec(),
        };
        let status =
            google::rpc::Status { code: 8, message: "full".to_owned(), details: vec![any] };
        let back = google::rpc::Status::decode(status.encode_to_vec().as_slice()).unwrap();
        assert_eq!(Refusal::decode(back.details[0].value.as_slice()), Ok(refusal));
    }
}
