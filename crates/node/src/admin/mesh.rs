//! What the mesh looks like from here, in the words of the admin port.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use base::{Load, NodeName, RegionName};
use identity::CertificateSummary;
use membership::{Card, Liveness, MemberStatus, Peer, RegionOffer, RegionView, Status, Transport};
use prost::Message as _;
use proto::isobar::{
    admin::v1::{
        self as wire, GetMeshReply, LinkTransport, Member, MemberState, NodeLoad, Own, Quarantine,
    },
    mesh::v1::SignedCard,
};
use rustls::pki_types::CertificateDer;

/// What the node knows besides membership.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) own: Own,
    /// The loads of the engines of each node that said them.
    pub(super) loads: BTreeMap<(RegionName, NodeName), Vec<Load>>,
    pub(super) attempts: Vec<(RegionName, u64)>,
    /// What regions have, as routing knows it.
    pub(super) views: Vec<RegionView>,
}

/// The reply.
pub(super) fn reply(status: &Status, known: Known, now: Instant) -> GetMeshReply {
    let Known { own, loads, attempts, views } = known;
    let quarantined = |peer: &Peer| status.quarantined.iter().find(|(who, ..)| who == peer);
    let quarantine = |peer: &Peer| quarantined(peer).map(|(_, left, why)| quarantine(*left, why));
    let known = status.members.iter().map(|status| {
        let loads = loads.get(&(status.peer.region.clone(), status.peer.node.clone()));
        let load = loads.filter(|loads| !loads.is_empty()).map(|loads| load(loads));
        Member { load, quarantine: quarantine(&status.peer), ..member(status) }
    });
    // Who was thrown out before anything else was known of it is named too.
    let is_other = |peer: &&Peer| !status.members.iter().any(|member| member.peer == **peer);
    let others = status.quarantined.iter().map(|(peer, ..)| peer).filter(is_other);
    let others = others
        .map(|peer| Member { quarantine: quarantine(peer), ..named(peer, Liveness::Unknown) });
    let mut members: Vec<Member> = known.chain(others).collect();
    members.sort_by(|a, b| (&a.region, &a.node).cmp(&(&b.region, &b.node)));
    let attempts = attempts
        .into_iter()
        .map(|(region, attempts)| wire::RegionAttempts { region: region.to_string(), attempts });
    GetMeshReply {
        own: Some(Own { is_relay: status.is_relay, ..own }),
        members,
        regions: regions(status, &views, now),
        relays: status.relays.iter().map(ToString::to_string).collect(),
        subscribers: u32::try_from(status.subscribers).unwrap_or(u32::MAX),
        attempts: attempts.collect(),
    }
}

/// Several engines together.
pub(super) fn load(loads: &[Load]) -> NodeLoad {
    let total = Load::total(loads.iter().copied());
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    NodeLoad {
        engines: count(loads.len()),
        in_flight: total.in_flight,
        queued: total.queued,
        slots: total.slots.unwrap_or(0),
        unusable: count(loads.iter().filter(|load| load.unusable).count()),
    }
}

fn named(peer: &Peer, state: Liveness) -> Member {
    Member {
        node: peer.node.to_string(),
        region: peer.region.to_string(),
        state: self::state(state).into(),
        ..Member::default()
    }
}

fn member(status: &MemberStatus) -> Member {
    let (transport, rtt) = status.link.unzip();
    let transport = match transport {
        None => LinkTransport::Unspecified,
        Some(Transport::Quic) => LinkTransport::Quic,
        Some(Transport::Tcp) => LinkTransport::Tcp,
    };
    let linked = Member {
        epoch: status.epoch,
        protocol: status.protocol.unwrap_or(0),
        transport: transport.into(),
        rtt_us: rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
        is_subscribed: status.subscribed,
        is_subscriber: status.subscriber,
        load_age_ms: status.heard.map(millis),
        ..named(&status.peer, status.state)
    };
    let Some(card) = &status.card else { return linked };
    let facts = &card.facts;
    Member {
        zone: facts.zone.as_ref().map(ToString::to_string).unwrap_or_default(),
        bump: facts.bump.into(),
        release: facts.release.clone(),
        peers: facts.peers.clone(),
        gossip: facts.gossip.clone(),
        certificate_not_after_s: certificate_end(card).unwrap_or(0),
        ..linked
    }
}

/// When the certificate ends that vouches for a card.
fn certificate_end(card: &Card) -> Option<u64> {
    let signed = SignedCard::decode(&*card.signed).ok()?;
    let certificate = CertificateDer::from(signed.certificates.into_iter().next()?);
    Some(super::seconds(CertificateSummary::of(&certificate).ok()?.until))
}

fn state(state: Liveness) -> MemberState {
    match state {
        Liveness::Unknown => MemberState::Unspecified,
        Liveness::Alive => MemberState::Alive,
        Liveness::Suspect => MemberState::Suspect,
        Liveness::Down => MemberState::Down,
        Liveness::Left => MemberState::Left,
    }
}

fn quarantine(left: Duration, why: &str) -> Quarantine {
    Quarantine { left_ms: millis(left), why: why.to_owned() }
}

/// Every region of which there is a digest, with what it has where that is known.
fn regions(status: &Status, views: &[RegionView], now: Instant) -> Vec<wire::Region> {
    let viewed = views.iter().map(|view| region(view, now));
    let is_other =
        |(name, _): &&(RegionName, Duration)| !views.iter().any(|view| view.region == *name);
    let others = status.regions.iter().filter(is_other).map(|(name, age)| wire::Region {
        region: name.to_string(),
        age_ms: millis(*age),
        offers: vec![],
    });
    let mut regions: Vec<wire::Region> = viewed.chain(others).collect();
    regions.sort_by(|a, b| a.region.cmp(&b.region));
    regions
}

fn region(view: &RegionView, now: Instant) -> wire::Region {
    wire::Region {
        region: view.region.to_string(),
        age_ms: millis(now.saturating_duration_since(view.sampled)),
        offers: view.offers.iter().map(offer).collect(),
    }
}

fn offer(offer: &RegionOffer) -> wire::RegionOffer {
    wire::RegionOffer {
        model: offer.model.as_ref().map(ToString::to_string).unwrap_or_default(),
        protocol: offer.protocol.clone(),
        free: offer.free,
        slots: offer.slots,
        drain_rate_per_s: offer.drain_rate,
        wait_p50_ms: millis(offer.wait.0),
        wait_p90_ms: millis(offer.wait.1),
        kv_free: offer.kv_free,
        candidates: offer.candidates.iter().map(|candidate| candidate.node.to_string()).collect(),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use base::ASSUMED_SLOTS;
    use identity::DevCa;
    use membership::{Candidate, Facts, NodeId};

    use super::*;

    fn peer(node: &str, region: &str) -> Peer {
        let id = NodeId([u8::try_from(node.len()).unwrap(); 16]);
        Peer { id, node: node.parse().unwrap(), region: region.parse().unwrap() }
    }

    /// A card whose certificate is `certificate`; nobody here looks at its signature.
    fn card(peer: &Peer, certificate: Vec<u8>) -> Arc<Card> {
        let signed = SignedCard { certificates: vec![certificate], ..SignedCard::default() };
        Arc::new(Card {
            id: peer.id,
            node: peer.node.clone(),
            region: peer.region.clone(),
            facts: Facts {
                epoch: 7,
                bump: 3,
                peers: "b.example:8444".into(),
                gossip: "b.example:8445".into(),
                zone: Some("z1".parse().unwrap()),
                descriptor: [0; 32],
                release: "1.2.3".into(),
                protocol_max: 2,
            },
            signed: signed.encode_to_vec().into(),
        })
    }

    fn status(peer: Peer, card: Option<Arc<Card>>, state: Liveness) -> MemberStatus {
        MemberStatus {
            card,
            peer,
            epoch: 7,
            state,
            link: None,
            protocol: None,
            subscribed: false,
            heard: None,
            subscriber: false,
        }
    }

    fn known() -> Known {
        Known { own: Own::default(), loads: BTreeMap::new(), attempts: vec![], views: vec![] }
    }

    #[test]
    fn a_member_is_told_with_its_card_its_link_and_its_load() {
        let dir = tempfile::tempdir().unwrap();
        let (domain, now) = ("mesh.test".parse().unwrap(), base::clock::wall());
        let ca = DevCa::open_or_create(dir.path(), &domain, now).unwrap();
        let b = peer("b", "us");
        ca.node(&b.region, &b.node, &[], now).unwrap();
        let certificate =
            identity::read_certificates(&dir.path().join("nodes/us/b/cert.pem")).unwrap().remove(0);
        let until = super::super::seconds(CertificateSummary::of(&certificate).unwrap().until);
        let member = MemberStatus {
            link: Some((Transport::Quic, Duration::from_micros(1_500))),
            protocol: Some(2),
            subscribed: true,
            heard: Some(Duration::from_millis(80)),
            ..status(b.clone(), Some(card(&b, certificate.to_vec())), Liveness::Alive)
        };
        let loads = vec![
            Load { in_flight: 3, slots: Some(8), ..Load::default() },
            Load { in_flight: 1, queued: 2, unusable: true, ..Load::default() },
        ];
        let known = Known {
            loads: BTreeMap::from([((b.region.clone(), b.node.clone()), loads)]),
            attempts: vec![(b.region, 9)],
            views: vec![],
            ..known()
        };
        let all = Status { members: vec![member], is_relay: true, ..Status::default() };
        let reply = reply(&all, known, base::clock::now());
        assert!(reply.own.unwrap().is_relay);
        assert_eq!((reply.attempts[0].region.as_str(), reply.attempts[0].attempts), ("us", 9));
        let told = &reply.members[0];
        assert_eq!((told.state(), told.transport()), (MemberState::Alive, LinkTransport::Quic));
        assert_eq!((told.epoch, told.bump, told.zone.as_str()), (7, 3, "z1"));
        assert_eq!((told.rtt_us, told.load_age_ms), (Some(1_500), Some(80)));
        assert_eq!(told.certificate_not_after_s, until);
        let load = told.load.unwrap();
        assert_eq!((load.engines, load.in_flight, load.queued, load.unusable), (2, 4, 2, 1));
        assert_eq!(load.slots, 8 + ASSUMED_SLOTS);
    }

    #[test]
    fn who_is_in_quarantine_is_named_whether_it_is_a_member_or_not() {
        let (member, other) = (peer("b", "us"), peer("liar", "eu"));
        let quarantined =
            |peer: &Peer| (peer.clone(), Duration::from_secs(60), "it spoke for others".to_owned());
        let all = Status {
            members: vec![status(member.clone(), None, Liveness::Suspect)],
            quarantined: vec![quarantined(&member), quarantined(&other)],
            ..Status::default()
        };
        let told = reply(&all, known(), base::clock::now()).members;
        let names: Vec<_> = told.iter().map(|m| (m.node.as_str(), m.state())).collect();
        let want = [("liar", MemberState::Unspecified), ("b", MemberState::Suspect)];
        assert_eq!(names, want);
        assert!(told.iter().all(|m| m.quarantine.as_ref().unwrap().left_ms == 60_000));
        assert_eq!((told[1].certificate_not_after_s, told[1].load), (0, None));
    }

    #[test]
    fn a_card_that_holds_no_certificate_says_nothing_of_its_end() {
        let b = peer("b", "us");
        for garbage in [vec![], vec![1, 2, 3]] {
            assert_eq!(certificate_end(&card(&b, garbage)), None);
        }
    }

    #[test]
    fn regions_have_an_age_and_where_it_is_known_what_they_offer() {
        let now = base::clock::now();
        let view = RegionView {
            region: "us".parse().unwrap(),
            sampled: now,
            offers: vec![RegionOffer {
                model: Some("llama".parse().unwrap()),
                protocol: "kserve-v2".into(),
                free: 5,
                slots: 8,
                drain_rate: 2.5,
                wait: (Duration::ZERO, Duration::from_millis(120)),
                kv_free: None,
                candidates: vec![Candidate {
                    node: "b".parse().unwrap(),
                    peers: "b:8444".into(),
                    free: 5,
                    slots: 8,
                }],
            }],
        };
        let age = Duration::from_millis(400);
        let all = Status {
            regions: vec![("us".parse().unwrap(), age), ("asia".parse().unwrap(), age)],
            ..Status::default()
        };
        let known = Known { views: vec![view], ..known() };
        let told = reply(&all, known, now + age).regions;
        let ages: Vec<_> = told.iter().map(|r| (r.region.as_str(), r.age_ms)).collect();
        assert_eq!(ages, [("asia", 400), ("us", 400)]);
        let offer = &told[1].offers[0];
        assert_eq!((offer.model.as_str(), offer.free, offer.wait_p90_ms), ("llama", 5, 120));
        assert_eq!(offer.candidates, ["b"]);
    }
}
