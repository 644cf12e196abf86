//! Frames to bytes and back: `proto/isobar/mesh/v1/mesh.proto`, with every bound checked on the way in.

use std::time::Duration;

use base::{EngineName, Load, ModelName, NodeName, RegionName, TrustDomain};
use prost::Message as _;
use proto::isobar::mesh::v1::{self as wire, frame::Body};

/// The version of the protocol we speak; the one before is understood too, once there is one.
pub const PROTOCOL_VERSION: u32 = 1;
/// Longest frame sent as a datagram: fits every path that carries QUIC.
pub const DATAGRAM_BYTES_MAX: usize = 1150;
/// Longest frame sent as a stream.
pub const STREAM_BYTES_MAX: usize = 64 << 10;
/// Longest signed list of revocations.
const REVOCATIONS_BYTES_MAX: usize = 48 << 10;
/// Engines one node may speak of.
const ENGINES_MAX: usize = 1024;
/// Models one engine may list.
const MODELS_MAX: usize = 4096;
/// Services one engine may list, and the longest name of one.
const SERVICES_MAX: usize = 1024;
const SERVICE_BYTES_MAX: usize = 256;
/// What a frame may claim about time: nobody is silent on purpose for longer.
const NEXT_MAX: Duration = Duration::from_secs(10);

/// Why bytes are no frame. The sender is at fault; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than a frame may be.
    #[error("a frame of {0} bytes: at most {STREAM_BYTES_MAX} are read")]
    TooLong(usize),
    /// Not protobuf, or not of this message.
    #[error("not a frame: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// A frame of a kind this version does not know. Skipped, not an error of the link.
    #[error("a frame of an unknown kind")]
    Unknown,
    /// A field holds what it may not.
    #[error("{field}: {why}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

fn invalid(field: &'static str, why: impl ToString) -> WireError {
    WireError::Invalid { field, why: why.to_string() }
}

/// One thing said.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// Who speaks.
    Hello(Hello),
    /// What the sender serves.
    Descriptor(Descriptor),
    /// How pressed it is.
    Load(LoadFrame),
    /// Who is not believed any more: signed, and not looked into here.
    Revocations(Vec<u8>),
}

/// The first frame of either end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The mesh.
    pub trust_domain: TrustDomain,
    /// Oldest and newest version the sender speaks.
    pub protocol: (u32, u32),
    /// The sender.
    pub node: NodeName,
    /// Its region.
    pub region: RegionName,
    /// Its process: greater after each start.
    pub epoch: u64,
    /// The version of its list of revocations; 0: it has none.
    pub revocations: u64,
    /// What is on it, in short; 0: nobody.
    pub revocations_digest: u64,
}

impl Hello {
    /// The version both ends speak: the lower of the two newest.
    #[must_use]
    pub fn version(&self) -> Option<u32> {
        let (oldest, newest) = self.protocol;
        let version = newest.min(PROTOCOL_VERSION);
        (version >= oldest.max(1)).then_some(version)
    }
}

/// What a node serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Counts up with every change within an epoch.
    pub version: u32,
    /// In the order in which load frames speak of them.
    pub engines: Vec<EngineDescriptor>,
}

/// One engine as others need to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineDescriptor {
    /// Its name at the node.
    pub name: EngineName,
    /// What it speaks, as the configuration spells it. One we do not know is kept: a newer node may use it.
    pub protocol: String,
    /// The models it serves; empty: any.
    pub models: Vec<ModelName>,
    /// The gRPC services it reflects; empty: none are known.
    pub services: Vec<String>,
}

/// How pressed a node is.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadFrame {
    /// The sender's process.
    pub epoch: u64,
    /// Counts up within an epoch.
    pub sequence: u64,
    /// The descriptor whose engines these are.
    pub descriptor_version: u32,
    /// How old the figures were when the frame left.
    pub sample_age: Duration,
    /// When the next frame comes at the latest.
    pub next: Duration,
    /// The node takes no new calls.
    pub draining: bool,
    /// One per engine.
    pub engines: Vec<Load>,
}

/// A frame as bytes.
#[must_use]
pub fn encode(frame: &Frame) -> Vec<u8> {
    let body = match frame {
        Frame::Hello(hello) => Body::Hello(wire::Hello {
            trust_domain: hello.trust_domain.to_string(),
            protocol_min: hello.protocol.0,
            protocol_max: hello.protocol.1,
            node: hello.node.to_string(),
            region: hello.region.to_string(),
            epoch: hello.epoch,
            revocations: hello.revocations,
            revocations_digest: hello.revocations_digest,
        }),
        Frame::Revocations(signed) => Body::Revocations(signed.clone()),
        Frame::Descriptor(descriptor) => Body::Descriptor(wire::Descriptor {
            version: descriptor.version,
            engines: descriptor.engines.iter().map(engine_to_wire).collect(),
        }),
        Frame::Load(load) => Body::Load(wire::Load {
            epoch: load.epoch,
            sequence: load.sequence,
            descriptor_version: load.descriptor_version,
            sample_age_ms: whole(load.sample_age.as_millis()),
            next_ms: whole(load.next.as_millis()),
            draining: load.draining,
            engines: load.engines.iter().map(load_to_wire).collect(),
        }),
    };
    wire::Frame { body: Some(body) }.encode_to_vec()
}

fn whole(number: u128) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn engine_to_wire(engine: &EngineDescriptor) -> wire::Engine {
    wire::Engine {
        name: engine.name.to_string(),
        protocol: engine.protocol.clone(),
        models: engine.models.iter().map(ToString::to_string).collect(),
        services: engine.services.clone(),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a rate loses digits nobody reads")]
fn load_to_wire(load: &Load) -> wire::EngineLoad {
    wire::EngineLoad {
        in_flight: load.in_flight,
        queued: load.queued,
        slots: load.slots,
        service_time_us: whole(load.service_time.as_micros()),
        drain_rate: load.drain_rate as f32,
        unusable: load.unusable,
    }
}

/// Reads a frame.
///
/// # Errors
/// [`WireError`]; [`WireError::Unknown`] is a frame of a newer node, to be skipped.
pub fn decode(bytes: &[u8]) -> Result<Frame, WireError> {
    if bytes.len() > STREAM_BYTES_MAX {
        return Err(WireError::TooLong(bytes.len()));
    }
    match wire::Frame::decode(bytes)?.body.ok_or(WireError::Unknown)? {
        Body::Hello(hello) => Ok(Frame::Hello(Hello {
            trust_domain: hello.trust_domain.parse().map_err(|e| invalid("trust_domain", e))?,
            protocol: (hello.protocol_min, hello.protocol_max),
            node: hello.node.parse().map_err(|e| invalid("node", e))?,
            region: hello.region.parse().map_err(|e| invalid("region", e))?,
            epoch: hello.epoch,
            revocations: hello.revocations,
            revocations_digest: hello.revocations_digest,
        })),
        Body::Revocations(signed) if signed.len() > REVOCATIONS_BYTES_MAX => {
            Err(invalid("revocations", format!("more than {REVOCATIONS_BYTES_MAX} bytes")))
        }
        Body::Revocations(signed) => Ok(Frame::Revocations(signed)),
        Body::Descriptor(descriptor) => {
            if descriptor.engines.len() > ENGINES_MAX {
                return Err(invalid("engines", format!("more than {ENGINES_MAX}")));
            }
            let engines = descriptor.engines.iter().map(engine_from_wire);
            let engines = engines.collect::<Result<_, _>>()?;
            Ok(Frame::Descriptor(Descriptor { version: descriptor.version, engines }))
        }
        Body::Load(load) => {
            if load.engines.len() > ENGINES_MAX {
                return Err(invalid("engines", format!("more than {ENGINES_MAX}")));
            }
            Ok(Frame::Load(LoadFrame {
                epoch: load.epoch,
                sequence: load.sequence,
                descriptor_version: load.descriptor_version,
                sample_age: Duration::from_millis(load.sample_age_ms.into()),
                next: Duration::from_millis(load.next_ms.into()).min(NEXT_MAX),
                draining: load.draining,
                engines: load.engines.iter().map(load_from_wire).collect(),
            }))
        }
    }
}

fn engine_from_wire(engine: &wire::Engine) -> Result<EngineDescriptor, WireError> {
    if engine.models.len() > MODELS_MAX {
        return Err(invalid("models", format!("more than {MODELS_MAX}")));
    }
    if engine.services.len() > SERVICES_MAX {
        return Err(invalid("services", format!("more than {SERVICES_MAX}")));
    }
    if engine.services.iter().any(|service| !is_service(service)) {
        return Err(invalid("services", "not a name of a gRPC service"));
    }
    let models = engine.models.iter().map(|model| model.parse().map_err(|e| invalid("models", e)));
    Ok(EngineDescriptor {
        name: engine.name.parse().map_err(|e| invalid("engine", e))?,
        protocol: engine.protocol.clone(),
        models: models.collect::<Result<_, _>>()?,
        services: engine.services.clone(),
    })
}

/// Whether a text may stand for a service in a descriptor: a dotted name of protobuf.
#[must_use]
pub fn is_service(text: &str) -> bool {
    text.len() <= SERVICE_BYTES_MAX
        && text.split('.').all(|part| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        })
}

fn load_from_wire(load: &wire::EngineLoad) -> Load {
    let drain_rate = Load::rate(f64::from(load.drain_rate));
    Load {
        in_flight: load.in_flight,
        queued: load.queued,
        slots: load.slots,
        service_time: Duration::from_micros(load.service_time_us.into()),
        drain_rate,
        unusable: load.unusable,
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    fn frames() -> [Frame; 4] {
        let hello = Hello {
            trust_domain: "mesh.example".parse().unwrap(),
            protocol: (1, 1),
            node: "b".parse().unwrap(),
            region: "us".parse().unwrap(),
            epoch: 1 << 60,
            revocations: 1_795_000_000,
            revocations_digest: u64::MAX,
        };
        let engine = EngineDescriptor {
            name: "gpu-0".parse().unwrap(),
            protocol: "kserve-v2".into(),
            models: vec!["llama".parse().unwrap(), "meta/Llama:fp8".parse().unwrap()],
            services: vec!["inference.GRPCInferenceService".into()],
        };
        let load = Load {
            in_flight: 40,
            queued: 3,
            slots: Some(64),
            service_time: Duration::from_micros(1_500_000),
            drain_rate: 21.5,
            unusable: true,
        };
        [
            Frame::Hello(hello),
            Frame::Descriptor(Descriptor { version: 7, engines: vec![engine] }),
            Frame::Load(LoadFrame {
                epoch: 5,
                sequence: 6,
                descriptor_version: 7,
                sample_age: Duration::from_millis(12),
                next: Duration::from_millis(200),
                draining: true,
                engines: vec![load, Load::default()],
            }),
            Frame::Revocations(vec![7; 300]),
        ]
    }

    #[test]
    fn every_frame_survives_the_round_trip() {
        for frame in frames() {
            assert_eq!(decode(&encode(&frame)), Ok(frame));
        }
    }

    #[test]
    fn a_load_frame_of_eight_engines_is_below_two_hundred_bytes() {
        let [.., Frame::Load(mut frame), _] = frames() else { unreachable!() };
        frame.engines = vec![frame.engines[0]; 8];
        frame.epoch = 1_795_000_000_000;
        assert!(encode(&Frame::Load(frame)).len() < 200);
    }

    #[test]
    fn what_breaks_a_bound_is_refused() {
        assert!(matches!(decode(&vec![0; STREAM_BYTES_MAX + 1]), Err(WireError::TooLong(_))));
        let loads =
            wire::Load { engines: vec![wire::EngineLoad::default(); 1025], ..Default::default() };
        let bytes = wire::Frame { body: Some(Body::Load(loads)) }.encode_to_vec();
        assert!(matches!(decode(&bytes), Err(WireError::Invalid { field: "engines", .. })));
        let hello = wire::Hello { trust_domain: "Mesh!".into(), ..Default::default() };
        let bytes = wire::Frame { body: Some(Body::Hello(hello)) }.encode_to_vec();
        assert!(matches!(decode(&bytes), Err(WireError::Invalid { field: "trust_domain", .. })));
        let long = wire::Frame { body: Some(Body::Revocations(vec![0; 49 << 10])) }.encode_to_vec();
        assert!(matches!(decode(&long), Err(WireError::Invalid { field: "revocations", .. })));
        let many = vec!["p.S".to_owned(); SERVICES_MAX + 1];
        for services in [many, vec!["a b".into()], vec![String::new()], vec!["x".repeat(300)]] {
            let engine = wire::Engine { name: "e".into(), services, ..Default::default() };
            let descriptor = wire::Descriptor { version: 1, engines: vec![engine] };
            let bytes = wire::Frame { body: Some(Body::Descriptor(descriptor)) }.encode_to_vec();
            assert!(matches!(decode(&bytes), Err(WireError::Invalid { field: "services", .. })));
        }
    }

    #[test]
    fn a_frame_of_a_newer_node_is_unknown_and_unknown_fields_are_skipped() {
        // Field 15 of the frame, a string.
        assert_eq!(decode(&[0x7a, 1, b'x']), Err(WireError::Unknown));
        let mut bytes = encode(&frames()[1]);
        bytes.extend([0x7a, 1, b'x']);
        assert_eq!(decode(&bytes), Ok(frames()[1].clone()));
    }

    #[test]
    fn claims_about_numbers_are_bounded() {
        let engine = wire::EngineLoad { drain_rate: f32::NAN, ..Default::default() };
        let load = wire::Load { next_ms: u32::MAX, engines: vec![engine], ..Default::default() };
        let bytes = wire::Frame { body: Some(Body::Load(load)) }.encode_to_vec();
        let Ok(Frame::Load(load)) = decode(&bytes) else { panic!("a load frame") };
        assert_eq!(load.next, NEXT_MAX);
        assert!(load.engines[0].drain_rate.abs() < f64::EPSILON);
    }

    #[test]
    fn no_bytes_panic() {
        let mut rng = StdRng::seed_from_u64(2);
        for round in 0..20_000 {
            let mut bytes = encode(&frames()[round % 4]);
            match round / 4 % 4 {
                0 => rng.fill_bytes(&mut bytes),
                1 => bytes.truncate(rng.random_range(0..bytes.len())),
                _ => {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] ^= 1 << rng.random_range(0..8);
                }
            }
            drop(decode(&bytes));
        }
    }

    #[test]
    fn versions_agree_on_the_lower_of_the_two_newest() {
        let [Frame::Hello(hello), ..] = frames() else { unreachable!() };
        for (protocol, want) in
            [((1, 1), Some(1)), ((1, 5), Some(1)), ((2, 5), None), ((0, 0), None)]
        {
            assert_eq!(Hello { protocol, ..hello.clone() }.version(), want, "{protocol:?}");
        }
    }
}
