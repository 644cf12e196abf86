//! Frames to bytes and back: `proto/isobar/mesh/v1/mesh.proto`, with every bound checked on the way in.

use std::time::Duration;

use base::{EngineName, Load, ModelName, NodeName, RegionName, TrustDomain, ZoneName};
use prost::Message as _;
use proto::isobar::mesh::v1::{self as wire, frame::Body};

use crate::{Candidate, Facts, NodeId, RegionOffer};

/// The version of the protocol we speak.
pub const PROTOCOL_VERSION: u32 = 2;
/// The version before, which is understood too.
pub(crate) const PROTOCOL_OLDEST: u32 = 1;
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
/// Longest packet of SWIM.
pub(crate) const SWIM_BYTES_MAX: usize = 1134;
/// Longest signed card: three certificates and a few addresses.
pub const CARD_BYTES_MAX: usize = 12 << 10;
/// Longest encoded descriptor: a frame holds it and what is around it.
pub(crate) const DESCRIPTOR_BYTES_MAX: usize = STREAM_BYTES_MAX - 64;
/// Nodes or descriptors one frame may ask for.
pub(crate) const ASKED_MAX: usize = 256;
/// Parts into which a region is taken apart when two nodes compare what they know.
pub(crate) const PARTS_OF_REGION_MAX: usize = 1024;
/// Regions one load frame may count attempts of.
pub(crate) const ARRIVALS_MAX: usize = 64;
/// Models of one digest frame, candidates of one model, and frames of one digest.
pub(crate) const OFFERS_MAX: usize = 64;
pub(crate) const CANDIDATES_MAX: usize = 8;
pub(crate) const PARTS_MAX: u32 = 64;
/// Longest host and port.
const ADDRESS_BYTES_MAX: usize = 262;
/// Longest name of a release or a protocol.
const WORD_BYTES_MAX: usize = 64;
/// No engine has more slots, and what is claimed beyond is not believed.
pub const SLOTS_MAX: u32 = 1 << 20;
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
    /// An engine that has more slots than any can have.
    #[error("an engine of {0} slots: none has more than {SLOTS_MAX}")]
    Slots(u32),
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
    /// A packet of SWIM.
    Swim(Pool, Vec<u8>),
    /// Asks for the cards of these nodes, or where there are none of the whole pool.
    CardsAsk(Pool, Vec<NodeId>),
    /// What its sender knows of its region, part by part: asks for the cards it does not.
    CardsCompare(Vec<u64>),
    /// Signed cards, encoded.
    Cards(Pool, Vec<Vec<u8>>),
    /// Asks for descriptors by their SHA-256.
    DescriptorsAsk(Vec<[u8; 32]>),
    /// Descriptors, encoded.
    Descriptors(Vec<Vec<u8>>),
    /// Load frames are wanted, or not any more.
    Subscribe(bool),
    /// Load frames will not come, and it is of no use to ask again for so long.
    NotSubscribed(Duration),
    /// What a region has.
    Digest(Digest),
}

/// A set of nodes that watch each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pool {
    /// The nodes of a region.
    Region,
    /// The relays of all regions.
    Relays,
}

/// What a region has, as one of its relays sums it up.
#[derive(Clone, Debug, PartialEq)]
pub struct Digest {
    /// The relay that made it; `None`: whoever sent it.
    pub relay: Option<NodeId>,
    /// The region it is about.
    pub region: RegionName,
    /// The relay's process.
    pub epoch: u64,
    /// Counts up with every digest within an epoch.
    pub sequence: u64,
    /// How old the figures were when the frame left.
    pub age: Duration,
    /// Which part of the digest this is, and how many there are.
    pub part: (u32, u32),
    /// One per model.
    pub offers: Vec<RegionOffer>,
}

impl Digest {
    /// Whether its candidates have more than the region they are of.
    pub(crate) fn contradicts_itself(&self) -> bool {
        let is_more = |offer: &RegionOffer| {
            let (mut free, mut slots) = (0_u64, 0_u64);
            for candidate in &offer.candidates {
                free += u64::from(candidate.free);
                slots += u64::from(candidate.slots);
            }
            // What cannot be counted stands for more.
            let is_above = |parts, all| all < u32::MAX && parts > u64::from(all);
            is_above(free, offer.free) || is_above(slots, offer.slots)
        };
        self.offers.iter().any(is_more)
    }
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
    /// Its card, signed and encoded; `None`: it speaks version 1.
    pub card: Option<Vec<u8>>,
}

impl Hello {
    /// The version both ends speak: the lower of the two newest.
    #[must_use]
    pub fn version(&self) -> Option<u32> {
        let (oldest, newest) = self.protocol;
        let version = newest.min(PROTOCOL_VERSION);
        (version >= oldest.max(PROTOCOL_OLDEST)).then_some(version)
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
    /// What several nodes that front the same engine all call it; `None`: nobody else fronts it.
    pub id: Option<EngineName>,
    /// Its slots in all; `None`: not known.
    pub slots: Option<u32>,
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
    /// Attempts that came since the process began, by the region of the node they came from.
    pub arrivals: Vec<(RegionName, u64)>,
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
            card: hello.card.as_ref().and_then(|card| wire::SignedCard::decode(&**card).ok()),
        }),
        Frame::Revocations(signed) => Body::Revocations(signed.clone()),
        Frame::Descriptor(descriptor) => Body::Descriptor(descriptor_to_wire(descriptor)),
        Frame::Load(load) => Body::Load(wire::Load {
            epoch: load.epoch,
            sequence: load.sequence,
            descriptor_version: load.descriptor_version,
            sample_age_ms: whole(load.sample_age.as_millis()),
            next_ms: whole(load.next.as_millis()),
            draining: load.draining,
            engines: load.engines.iter().map(load_to_wire).collect(),
            arrivals: load
                .arrivals
                .iter()
                .map(|(region, n)| wire::Arrivals { region: region.to_string(), attempts: *n })
                .collect(),
        }),
        Frame::Swim(pool, packet) => {
            Body::Swim(wire::Swim { pool: pool_to_wire(*pool), packet: packet.clone() })
        }
        Frame::CardsCompare(sums) => Body::CardsCompare(wire::CardsCompare { sums: sums.clone() }),
        Frame::CardsAsk(pool, nodes) => Body::CardsAsk(wire::CardsAsk {
            pool: pool_to_wire(*pool),
            nodes: nodes.iter().map(|node| node.0.to_vec()).collect(),
        }),
        Frame::Cards(pool, cards) => Body::Cards(wire::Cards {
            pool: pool_to_wire(*pool),
            cards: cards.iter().filter_map(|c| wire::SignedCard::decode(&**c).ok()).collect(),
        }),
        Frame::DescriptorsAsk(hashes) => Body::DescriptorsAsk(wire::DescriptorsAsk {
            sha256: hashes.iter().map(|hash| hash.to_vec()).collect(),
        }),
        Frame::Descriptors(descriptors) => {
            Body::Descriptors(wire::Descriptors { descriptors: descriptors.clone() })
        }
        Frame::Subscribe(wanted) => Body::Subscribe(wire::Subscribe { wanted: *wanted }),
        Frame::NotSubscribed(wait) => {
            Body::NotSubscribed(wire::NotSubscribed { wait_ms: whole(wait.as_millis()) })
        }
        Frame::Digest(digest) => Body::Digest(digest_to_wire(digest)),
    };
    wire::Frame { body: Some(body) }.encode_to_vec()
}

/// A descriptor as bytes: what its hash is of.
#[must_use]
pub fn encode_descriptor(descriptor: &Descriptor) -> Vec<u8> {
    descriptor_to_wire(descriptor).encode_to_vec()
}

/// Reads a descriptor.
///
/// # Errors
/// [`WireError`].
pub(crate) fn decode_descriptor(bytes: &[u8]) -> Result<Descriptor, WireError> {
    if bytes.len() > DESCRIPTOR_BYTES_MAX {
        return Err(WireError::TooLong(bytes.len()));
    }
    descriptor_from_wire(&wire::Descriptor::decode(bytes)?)
}

/// The facts of a card as bytes: what is signed.
#[must_use]
pub fn encode_card(facts: &Facts) -> Vec<u8> {
    wire::Card {
        epoch: facts.epoch,
        bump: facts.bump.into(),
        peers: facts.peers.clone(),
        gossip: facts.gossip.clone(),
        zone: facts.zone.as_ref().map(ToString::to_string).unwrap_or_default(),
        descriptor_sha256: facts.descriptor.to_vec(),
        release: facts.release.clone(),
        protocol_max: facts.protocol_max,
    }
    .encode_to_vec()
}

/// Reads the facts of a card.
///
/// # Errors
/// [`WireError`].
pub(crate) fn decode_card(bytes: &[u8]) -> Result<Facts, WireError> {
    if bytes.len() > CARD_BYTES_MAX {
        return Err(WireError::TooLong(bytes.len()));
    }
    let card = wire::Card::decode(bytes)?;
    let zone = match &*card.zone {
        "" => None,
        zone => Some(zone.parse::<ZoneName>().map_err(|e| invalid("zone", e))?),
    };
    Ok(Facts {
        epoch: card.epoch,
        bump: card.bump.try_into().map_err(|_| invalid("bump", "more than 65535"))?,
        peers: address("peers", card.peers)?,
        gossip: address("gossip", card.gossip)?,
        zone,
        descriptor: hash("descriptor_sha256", &card.descriptor_sha256)?,
        release: word("release", card.release)?,
        protocol_max: card.protocol_max,
    })
}

fn address(field: &'static str, text: String) -> Result<String, WireError> {
    let is_one = text.len() <= ADDRESS_BYTES_MAX
        && text.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && port.parse::<u16>().is_ok_and(|port| port > 0)
                && host.bytes().all(|b| b.is_ascii_graphic() && !b"/@?#\\".contains(&b))
        });
    if is_one { Ok(text) } else { Err(invalid(field, "no host and port")) }
}

fn word(field: &'static str, text: String) -> Result<String, WireError> {
    if is_word(&text) { Ok(text) } else { Err(invalid(field, "no short word")) }
}

/// Whether a text may name a protocol or a release.
pub(crate) fn is_word(text: &str) -> bool {
    text.len() <= WORD_BYTES_MAX && text.bytes().all(|b| b.is_ascii_graphic())
}

fn hash(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], WireError> {
    bytes.try_into().map_err(|_| invalid(field, "not 32 bytes"))
}

fn descriptor_to_wire(descriptor: &Descriptor) -> wire::Descriptor {
    wire::Descriptor {
        version: descriptor.version,
        engines: descriptor.engines.iter().map(engine_to_wire).collect(),
    }
}

fn descriptor_from_wire(descriptor: &wire::Descriptor) -> Result<Descriptor, WireError> {
    bounded("engines", descriptor.engines.len(), ENGINES_MAX)?;
    let engines = descriptor.engines.iter().map(engine_from_wire);
    Ok(Descriptor { version: descriptor.version, engines: engines.collect::<Result<_, _>>()? })
}

fn bounded(field: &'static str, count: usize, most: usize) -> Result<(), WireError> {
    if count > most { Err(invalid(field, format!("more than {most}"))) } else { Ok(()) }
}

fn pool_to_wire(pool: Pool) -> i32 {
    match pool {
        Pool::Region => wire::Pool::Region.into(),
        Pool::Relays => wire::Pool::Relays.into(),
    }
}

fn pool_from_wire(pool: i32) -> Result<Pool, WireError> {
    match wire::Pool::try_from(pool) {
        Ok(wire::Pool::Region) => Ok(Pool::Region),
        Ok(wire::Pool::Relays) => Ok(Pool::Relays),
        Ok(wire::Pool::Unspecified) | Err(_) => Err(invalid("pool", "neither region nor relays")),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a rate loses digits nobody reads")]
fn digest_to_wire(digest: &Digest) -> wire::Digest {
    let offer = |offer: &RegionOffer| wire::Offer {
        model: offer.model.as_ref().map(ToString::to_string).unwrap_or_default(),
        protocol: offer.protocol.clone(),
        free: offer.free,
        slots: offer.slots,
        drain_rate: offer.drain_rate as f32,
        wait_p50_ms: whole(offer.wait.0.as_millis()),
        wait_p90_ms: whole(offer.wait.1.as_millis()),
        kv_free_permille: offer.kv_free.map_or(0, |free| permille(free).max(1)),
        candidates: offer.candidates.iter().map(candidate_to_wire).collect(),
    };
    wire::Digest {
        relay: digest.relay.map(|relay| relay.0.to_vec()).unwrap_or_default(),
        region: digest.region.to_string(),
        epoch: digest.epoch,
        sequence: digest.sequence,
        age_ms: whole(digest.age.as_millis()),
        part: digest.part.0,
        parts: digest.part.1,
        offers: digest.offers.iter().map(offer).collect(),
    }
}

fn candidate_to_wire(candidate: &Candidate) -> wire::Candidate {
    wire::Candidate {
        node: candidate.node.to_string(),
        peers: candidate.peers.clone(),
        free: candidate.free,
        slots: candidate.slots,
    }
}

fn candidate_from_wire(candidate: wire::Candidate) -> Result<Candidate, WireError> {
    within_slots(candidate.free, candidate.slots)?;
    Ok(Candidate {
        node: candidate.node.parse().map_err(|e| invalid("candidate", e))?,
        peers: address("candidate", candidate.peers)?,
        free: candidate.free.min(SLOTS_MAX),
        slots: candidate.slots.min(SLOTS_MAX),
    })
}

/// Candidates as they are kept: most are never looked at before newer ones come.
pub(crate) fn pack(candidates: &[Candidate]) -> Box<[u8]> {
    let packed = candidates.iter().map(|c| candidate_to_wire(c).encode_length_delimited_to_vec());
    packed.collect::<Vec<_>>().concat().into()
}

/// What [`pack`] made, one after the other.
pub(crate) fn unpack(mut bytes: &[u8]) -> impl Iterator<Item = Candidate> {
    std::iter::from_fn(move || {
        let candidate = wire::Candidate::decode_length_delimited(&mut bytes).ok()?;
        candidate_from_wire(candidate).ok()
    })
}

fn digest_from_wire(digest: wire::Digest) -> Result<Digest, WireError> {
    bounded("offers", digest.offers.len(), OFFERS_MAX)?;
    if digest.parts == 0 || digest.parts > PARTS_MAX || digest.part >= digest.parts {
        return Err(invalid("part", format!("{} of {}", digest.part, digest.parts)));
    }
    let relay = match &*digest.relay {
        [] => None,
        relay => Some(node_id("relay", relay)?),
    };
    let offers = digest.offers.into_iter().map(offer_from_wire);
    Ok(Digest {
        relay,
        region: digest.region.parse().map_err(|e| invalid("region", e))?,
        epoch: digest.epoch,
        sequence: digest.sequence,
        age: Duration::from_millis(digest.age_ms.into()),
        part: (digest.part, digest.parts),
        offers: offers.collect::<Result<_, _>>()?,
    })
}

fn offer_from_wire(offer: wire::Offer) -> Result<RegionOffer, WireError> {
    bounded("candidates", offer.candidates.len(), CANDIDATES_MAX)?;
    let model = match &*offer.model {
        "" => None,
        model => Some(model.parse().map_err(|e| invalid("model", e))?),
    };
    within_slots(offer.free, offer.slots)?;
    let candidates = offer.candidates.into_iter().map(candidate_from_wire);
    let kv = offer.kv_free_permille.min(1000);
    Ok(RegionOffer {
        model,
        protocol: word("protocol", offer.protocol)?,
        free: offer.free,
        slots: offer.slots,
        drain_rate: Load::rate(f64::from(offer.drain_rate)),
        wait: (
            Duration::from_millis(offer.wait_p50_ms.into()),
            Duration::from_millis(offer.wait_p90_ms.into()),
        ),
        kv_free: (kv > 0).then(|| f64::from(kv) / 1000.0),
        candidates: candidates.collect::<Result<_, WireError>>()?,
    })
}

fn within_slots(free: u32, slots: u32) -> Result<(), WireError> {
    if free > slots { Err(invalid("free", "more than there are slots")) } else { Ok(()) }
}

fn node_id(field: &'static str, bytes: &[u8]) -> Result<NodeId, WireError> {
    NodeId::from_slice(bytes).ok_or_else(|| invalid(field, "not 16 bytes"))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 1000")]
fn permille(share: f64) -> u32 {
    (share.clamp(0.0, 1.0) * 1000.0).round() as u32
}

fn cards_from_wire(cards: &[wire::SignedCard]) -> Result<Vec<Vec<u8>>, WireError> {
    cards.iter().map(card_from_wire).collect()
}

fn card_from_wire(card: &wire::SignedCard) -> Result<Vec<u8>, WireError> {
    let bytes = card.encode_to_vec();
    bounded("card", bytes.len(), CARD_BYTES_MAX)?;
    Ok(bytes)
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
        id: engine.id.as_ref().map(ToString::to_string).unwrap_or_default(),
        slots: engine.slots,
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
        step_time_us: whole(load.step_time.as_micros()),
        kv_use_permille: load.kv_use.map(permille),
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
            card: hello.card.as_ref().map(card_from_wire).transpose()?,
        })),
        Body::Revocations(signed) if signed.len() > REVOCATIONS_BYTES_MAX => {
            Err(invalid("revocations", format!("more than {REVOCATIONS_BYTES_MAX} bytes")))
        }
        Body::Revocations(signed) => Ok(Frame::Revocations(signed)),
        Body::Descriptor(mut descriptor) => {
            // Nodes of version 1 were not told how many slots an engine may have.
            for engine in &mut descriptor.engines {
                engine.slots = engine.slots.map(|slots| slots.min(SLOTS_MAX));
            }
            descriptor_from_wire(&descriptor).map(Frame::Descriptor)
        }
        Body::Load(load) => {
            bounded("engines", load.engines.len(), ENGINES_MAX)?;
            bounded("arrivals", load.arrivals.len(), ARRIVALS_MAX)?;
            let arrivals = load.arrivals.iter().map(|arrivals| {
                let region = arrivals.region.parse().map_err(|e| invalid("arrivals", e))?;
                Ok((region, arrivals.attempts))
            });
            Ok(Frame::Load(LoadFrame {
                epoch: load.epoch,
                sequence: load.sequence,
                descriptor_version: load.descriptor_version,
                sample_age: Duration::from_millis(load.sample_age_ms.into()),
                next: Duration::from_millis(load.next_ms.into()).min(NEXT_MAX),
                draining: load.draining,
                engines: load.engines.iter().map(load_from_wire).collect(),
                arrivals: arrivals.collect::<Result<_, WireError>>()?,
            }))
        }
        Body::Swim(swim) => {
            bounded("packet", swim.packet.len(), SWIM_BYTES_MAX)?;
            Ok(Frame::Swim(pool_from_wire(swim.pool)?, swim.packet))
        }
        Body::CardsCompare(wire::CardsCompare { sums }) => {
            bounded("sums", sums.len(), PARTS_OF_REGION_MAX)?;
            if !sums.len().is_power_of_two() {
                return Err(invalid("sums", format!("{} of them", sums.len())));
            }
            Ok(Frame::CardsCompare(sums))
        }
        Body::CardsAsk(ask) => {
            bounded("nodes", ask.nodes.len(), ASKED_MAX)?;
            let nodes = ask.nodes.iter().map(|node| node_id("nodes", node));
            Ok(Frame::CardsAsk(pool_from_wire(ask.pool)?, nodes.collect::<Result<_, _>>()?))
        }
        Body::Cards(cards) => {
            Ok(Frame::Cards(pool_from_wire(cards.pool)?, cards_from_wire(&cards.cards)?))
        }
        Body::DescriptorsAsk(ask) => {
            bounded("sha256", ask.sha256.len(), ASKED_MAX)?;
            let hashes = ask.sha256.iter().map(|bytes| hash("sha256", bytes));
            Ok(Frame::DescriptorsAsk(hashes.collect::<Result<_, _>>()?))
        }
        Body::Descriptors(all) => Ok(Frame::Descriptors(all.descriptors)),
        Body::Subscribe(subscribe) => Ok(Frame::Subscribe(subscribe.wanted)),
        Body::NotSubscribed(refused) => {
            Ok(Frame::NotSubscribed(Duration::from_millis(refused.wait_ms.into())))
        }
        Body::Digest(digest) => digest_from_wire(digest).map(Frame::Digest),
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
    if let Some(slots) = engine.slots.filter(|slots| *slots > SLOTS_MAX) {
        return Err(WireError::Slots(slots));
    }
    let models = engine.models.iter().map(|model| model.parse().map_err(|e| invalid("models", e)));
    Ok(EngineDescriptor {
        name: engine.name.parse().map_err(|e| invalid("engine", e))?,
        protocol: engine.protocol.clone(),
        models: models.collect::<Result<_, _>>()?,
        services: engine.services.clone(),
        id: match &*engine.id {
            "" => None,
            id => Some(id.parse().map_err(|e| invalid("id", e))?),
        },
        slots: engine.slots,
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
        step_time: Duration::from_micros(load.step_time_us.into()),
        kv_use: load.kv_use_permille.map(|permille| f64::from(permille.min(1000)) / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    /// One of each kind: those of version 1 first.
    fn frames() -> Vec<Frame> {
        let hello = Hello {
            trust_domain: "mesh.example".parse().unwrap(),
            protocol: (1, 1),
            node: "b".parse().unwrap(),
            region: "us".parse().unwrap(),
            epoch: 1 << 60,
            revocations: 1_795_000_000,
            revocations_digest: u64::MAX,
            card: None,
        };
        let engine = EngineDescriptor {
            name: "gpu-0".parse().unwrap(),
            protocol: "kserve-v2".into(),
            models: vec!["llama".parse().unwrap(), "meta/Llama:fp8".parse().unwrap()],
            services: vec!["inference.GRPCInferenceService".into()],
            id: Some("shared".parse().unwrap()),
            slots: Some(64),
        };
        let load = Load {
            in_flight: 40,
            queued: 3,
            slots: Some(64),
            service_time: Duration::from_micros(1_500_000),
            drain_rate: 21.5,
            unusable: true,
            step_time: Duration::from_micros(20_000),
            kv_use: Some(0.5),
        };
        let later = Hello { protocol: (1, 2), card: Some(signed(700)), ..hello.clone() };
        vec![
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
                arrivals: vec![("eu".parse().unwrap(), 7)],
            }),
            Frame::Revocations(vec![7; 300]),
            Frame::Hello(later),
            Frame::Swim(Pool::Region, vec![9; SWIM_BYTES_MAX]),
            Frame::CardsAsk(Pool::Relays, vec![NodeId([1; 16]), NodeId([2; 16])]),
            Frame::CardsCompare(vec![7; 4]),
            Frame::Cards(Pool::Relays, vec![signed(700), signed(20)]),
            Frame::DescriptorsAsk(vec![[3; 32], [4; 32]]),
            Frame::Descriptors(vec![vec![5; 300], vec![]]),
            Frame::Subscribe(true),
            Frame::Subscribe(false),
            Frame::NotSubscribed(Duration::from_secs(30)),
            Frame::Digest(Digest { relay: Some(NodeId([6; 16])), ..digest() }),
            Frame::Digest(Digest { offers: vec![], ..digest() }),
        ]
    }

    /// What looks like a signed card of about so many bytes.
    fn signed(bytes: usize) -> Vec<u8> {
        wire::SignedCard {
            card: vec![1; 40],
            signature: vec![2; 64],
            scheme: 0x0807,
            certificates: vec![vec![3; bytes / 2], vec![4; bytes / 2]],
        }
        .encode_to_vec()
    }

    fn digest() -> Digest {
        let candidate = |i| Candidate {
            node: format!("n{i}").parse().unwrap(),
            peers: format!("[2001:db8::{i}]:7700"),
            free: i,
            slots: 64,
        };
        let offer = RegionOffer {
            model: Some("llama".parse().unwrap()),
            protocol: "kserve-v2".into(),
            free: 700,
            slots: 1_000,
            drain_rate: 12.5,
            wait: (Duration::from_millis(5), Duration::from_millis(80)),
            kv_free: Some(0.25),
            candidates: (0..8).map(candidate).collect(),
        };
        let any = RegionOffer { model: None, kv_free: None, candidates: vec![], ..offer.clone() };
        Digest {
            relay: None,
            region: "eu".parse().unwrap(),
            epoch: 5,
            sequence: 6,
            age: Duration::from_millis(120),
            part: (1, 3),
            offers: vec![offer, any],
        }
    }

    fn facts() -> Facts {
        Facts {
            epoch: 1_795_000_000_000,
            bump: 65_535,
            peers: "node-7.eu.mesh.example:7700".into(),
            gossip: "[::1]:7701".into(),
            zone: Some("a".parse().unwrap()),
            descriptor: [7; 32],
            release: "0.1.0".into(),
            protocol_max: 2,
        }
    }

    #[test]
    fn every_frame_survives_the_round_trip() {
        for frame in frames() {
            assert_eq!(decode(&encode(&frame)), Ok(frame));
        }
    }

    #[test]
    fn a_load_frame_of_eight_engines_is_below_two_hundred_bytes() {
        let Frame::Load(mut frame) = frames().swap_remove(2) else { unreachable!() };
        frame.engines =
            vec![Load { kv_use: None, step_time: Duration::ZERO, ..frame.engines[0] }; 8];
        frame.arrivals.clear();
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
    fn a_node_of_version_1_has_as_many_slots_as_there_may_be() {
        let engine = wire::Engine { name: "e".into(), slots: Some(u32::MAX), ..Default::default() };
        let descriptor = wire::Descriptor { version: 1, engines: vec![engine] };
        let refused = decode_descriptor(&descriptor.encode_to_vec());
        assert_eq!(refused, Err(WireError::Slots(u32::MAX)), "the others were");
        let bytes = wire::Frame { body: Some(Body::Descriptor(descriptor)) }.encode_to_vec();
        let Ok(Frame::Descriptor(read)) = decode(&bytes) else { panic!("it is refused") };
        assert_eq!(read.engines[0].slots, Some(SLOTS_MAX));
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

    /// Changes some bytes, cuts, doubles, joins: what a frame may look like that nobody made.
    fn mutated(rng: &mut StdRng, mut bytes: Vec<u8>, other: &[u8]) -> Vec<u8> {
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..=bytes.len());
            match rng.random_range(0..6) {
                0 => bytes.truncate(at),
                1 => bytes.extend_from_within(at..),
                2 => bytes.splice(at.., other.iter().copied().skip(at)).for_each(drop),
                3 => bytes.insert(at, rng.random()),
                4 => rng.fill_bytes(&mut bytes[at..]),
                _ if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
                _ => {}
            }
        }
        bytes
    }

    #[test]
    fn no_bytes_panic_and_what_is_read_is_within_its_bounds() {
        let frames: Vec<_> = frames().iter().map(encode).collect();
        let seed = 2;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut read = 0;
        for round in 0..60_000 {
            let bytes = frames[round % frames.len()].clone();
            let other = &frames[rng.random_range(0..frames.len())];
            let bytes = mutated(&mut rng, bytes, other);
            let Ok(frame) = decode(&bytes) else { continue };
            read += 1;
            check(&frame);
            // What was read can be said again, and means the same.
            assert_eq!(decode(&encode(&frame)), Ok(frame), "seed {seed}, round {round}");
        }
        assert!(read > 5_000, "{read}");
    }

    /// Bounds of what [`decode`] lets through.
    fn check(frame: &Frame) {
        match frame {
            Frame::Hello(hello) => {
                assert!(hello.card.as_ref().is_none_or(|card| card.len() <= CARD_BYTES_MAX));
            }
            Frame::Descriptor(descriptor) => assert!(descriptor.engines.len() <= ENGINES_MAX),
            Frame::Load(load) => {
                assert!(load.engines.len() <= ENGINES_MAX && load.arrivals.len() <= ARRIVALS_MAX);
                assert!(load.next <= NEXT_MAX);
                assert!(load.engines.iter().all(|engine| engine.drain_rate.is_finite()));
            }
            Frame::Revocations(signed) => assert!(signed.len() <= REVOCATIONS_BYTES_MAX),
            Frame::Swim(_, packet) => assert!(packet.len() <= SWIM_BYTES_MAX),
            Frame::CardsAsk(_, nodes) => assert!(nodes.len() <= ASKED_MAX),
            Frame::CardsCompare(sums) => assert!(sums.len() <= PARTS_OF_REGION_MAX),
            Frame::Cards(_, cards) => {
                assert!(cards.iter().all(|card| card.len() <= CARD_BYTES_MAX));
            }
            Frame::DescriptorsAsk(hashes) => assert!(hashes.len() <= ASKED_MAX),
            Frame::Descriptors(_) | Frame::Subscribe(_) | Frame::NotSubscribed(_) => {}
            Frame::Digest(digest) => {
                assert!(digest.part.0 < digest.part.1 && digest.part.1 <= PARTS_MAX);
                assert!(digest.offers.len() <= OFFERS_MAX);
                for offer in &digest.offers {
                    assert!(offer.drain_rate.is_finite() && offer.free <= offer.slots);
                    assert!(offer.candidates.len() <= CANDIDATES_MAX);
                    assert!(offer.candidates.iter().all(|c| c.free <= c.slots));
                }
            }
        }
    }

    #[test]
    fn no_bytes_of_cards_and_descriptors_panic() {
        let Frame::Descriptor(descriptor) = frames().swap_remove(1) else { unreachable!() };
        let (card, descriptor) = (encode_card(&facts()), encode_descriptor(&descriptor));
        assert_eq!(decode_card(&card), Ok(facts()));
        let mut rng = StdRng::seed_from_u64(3);
        for _ in 0..20_000 {
            let bytes = mutated(&mut rng, card.clone(), &descriptor);
            if let Ok(facts) = decode_card(&bytes) {
                assert_eq!(decode_card(&encode_card(&facts)), Ok(facts));
            }
            let bytes = mutated(&mut rng, descriptor.clone(), &card);
            if let Ok(descriptor) = decode_descriptor(&bytes) {
                assert_eq!(decode_descriptor(&encode_descriptor(&descriptor)), Ok(descriptor));
            }
        }
    }

    /// Which field of this frame is refused.
    fn refused(body: Body) -> &'static str {
        match decode(&wire::Frame { body: Some(body) }.encode_to_vec()) {
            Err(WireError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_breaks_a_bound_of_version_two_is_refused() {
        let region = i32::from(wire::Pool::Region);
        let swim = |pool, bytes| Body::Swim(wire::Swim { pool, packet: vec![0; bytes] });
        assert_eq!(refused(swim(region, SWIM_BYTES_MAX + 1)), "packet");
        assert_eq!([refused(swim(0, 9)), refused(swim(3, 9))], ["pool"; 2]);
        let compare = |count| Body::CardsCompare(wire::CardsCompare { sums: vec![0; count] });
        assert_eq!([0, 3, 2048].map(|count| refused(compare(count))), ["sums"; 3]);
        let ask = |count, bytes| {
            Body::CardsAsk(wire::CardsAsk { pool: region, nodes: vec![vec![0; bytes]; count] })
        };
        assert_eq!([refused(ask(ASKED_MAX + 1, 16)), refused(ask(1, 17))], ["nodes"; 2]);
        let ask = |count, bytes| {
            Body::DescriptorsAsk(wire::DescriptorsAsk { sha256: vec![vec![0; bytes]; count] })
        };
        assert_eq!([refused(ask(ASKED_MAX + 1, 32)), refused(ask(1, 31))], ["sha256"; 2]);
        let long = wire::SignedCard { card: vec![0; CARD_BYTES_MAX], ..Default::default() };
        let cards = wire::Cards { pool: region, cards: vec![long.clone()] };
        assert_eq!(refused(Body::Cards(cards)), "card");
        let Frame::Hello(hello) = frames().swap_remove(0) else { unreachable!() };
        let bytes = encode(&Frame::Hello(hello));
        let Some(Body::Hello(hello)) = wire::Frame::decode(&*bytes).unwrap().body else {
            unreachable!()
        };
        assert_eq!(refused(Body::Hello(wire::Hello { card: Some(long), ..hello })), "card");
        let arrivals = vec![wire::Arrivals { region: "eu".into(), attempts: 1 }; ARRIVALS_MAX + 1];
        assert_eq!(refused(Body::Load(wire::Load { arrivals, ..Default::default() })), "arrivals");
    }

    #[test]
    fn what_breaks_a_bound_of_a_digest_is_refused() {
        let good = digest_to_wire(&digest());
        let with = |change: &dyn Fn(&mut wire::Digest)| {
            let mut digest = good.clone();
            change(&mut digest);
            refused(Body::Digest(digest))
        };
        assert_eq!(with(&|d| d.parts = 0), "part");
        assert_eq!(with(&|d| d.parts = PARTS_MAX + 1), "part");
        assert_eq!(with(&|d| d.part = 3), "part");
        assert_eq!(with(&|d| d.relay = vec![0; 15]), "relay");
        assert_eq!(with(&|d| d.region = "Eu".into()), "region");
        assert_eq!(with(&|d| d.offers = vec![d.offers[1].clone(); OFFERS_MAX + 1]), "offers");
        let candidates = |d: &mut wire::Digest, change: &dyn Fn(&mut wire::Candidate)| {
            d.offers[0].candidates.iter_mut().for_each(change);
        };
        assert_eq!(with(&|d| candidates(d, &|c| c.node.clear())), "candidate");
        assert_eq!(with(&|d| candidates(d, &|c| c.peers = "x".into())), "candidate");
        let more = |d: &mut wire::Digest| d.offers[0].candidates.push(wire::Candidate::default());
        assert_eq!(with(&more), "candidates");
        assert_eq!(with(&|d| d.offers[0].protocol = "a b".into()), "protocol");
        assert_eq!(with(&|d| d.offers[0].model = "x".repeat(513)), "model");
    }

    #[test]
    fn what_breaks_a_bound_of_a_card_is_refused() {
        let with = |change: fn(&mut wire::Card)| {
            let mut card = wire::Card::decode(&*encode_card(&facts())).unwrap();
            change(&mut card);
            match decode_card(&card.encode_to_vec()) {
                Err(WireError::Invalid { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(with(|card| card.bump = 65_536), "bump");
        assert_eq!(with(|card| card.zone = "A".into()), "zone");
        assert_eq!(with(|card| card.release = "x".repeat(65)), "release");
        assert_eq!(with(|card| card.descriptor_sha256.truncate(31)), "descriptor_sha256");
        for address in ["", "host", ":1", "host:0", "host:65536", "a b:1", "a/b:1", "u@h:1"] {
            let mut card = wire::Card::decode(&*encode_card(&facts())).unwrap();
            card.gossip = address.into();
            assert!(decode_card(&card.encode_to_vec()).is_err(), "{address}");
        }
        assert!(matches!(decode_card(&[0; CARD_BYTES_MAX + 1]), Err(WireError::TooLong(_))));
    }

    #[test]
    fn versions_agree_on_the_lower_of_the_two_newest() {
        let Frame::Hello(hello) = frames().swap_remove(0) else { unreachable!() };
        for (protocol, want) in
            [((1, 1), Some(1)), ((1, 5), Some(2)), ((3, 5), None), ((0, 0), None)]
        {
            assert_eq!(Hello { protocol, ..hello.clone() }.version(), want, "{protocol:?}");
        }
    }
}
