//! What the mesh looks like, as one JSON object. Units are in the names; what is not known is null.

use std::time::{SystemTime, UNIX_EPOCH};

use proto::isobar::admin::v1::{
    GetMeshReply, LinkTransport, Member, MemberState, NodeLoad, Own, Region, RegionOffer,
};
use serde_json::{Value, json};

pub(super) fn mesh(mesh: &GetMeshReply, now: SystemTime) -> Value {
    let members = &mesh.members;
    let named = |is: fn(&Member) -> bool| {
        let names = members.iter().filter(|member| is(member));
        names.map(|m| json!({ "node": m.node, "region": m.region })).collect::<Vec<_>>()
    };
    let attempts = mesh.attempts.iter();
    let attempts = attempts.map(|a| json!({ "region": a.region, "attempts": a.attempts }));
    json!({
        "node": mesh.own.as_ref().map(|own| self::own(own, now)),
        "members": members.iter().map(|m| member(m, now)).collect::<Vec<_>>(),
        "regions": mesh.regions.iter().map(region).collect::<Vec<_>>(),
        "relays": mesh.relays,
        "subscriptions": {
            "to": named(|member| member.is_subscribed),
            "from": named(|member| member.is_subscriber),
            "subscribers": mesh.subscribers,
        },
        "suspicions": named(|member| member.state() == MemberState::Suspect),
        "quarantined": named(|member| member.quarantine.is_some()),
        "attempts": attempts.collect::<Vec<_>>(),
    })
}

fn own(own: &Own, now: SystemTime) -> Value {
    let certificate = own.certificate.as_ref();
    let until = certificate.map(|certificate| certificate.not_after_s);
    json!({
        "id": own.id,
        "node": own.node,
        "region": own.region,
        "zone": known(&own.zone),
        "epoch": own.epoch,
        "release": own.release,
        "protocol": own.protocol,
        "draining": own.is_draining,
        "relay": own.is_relay,
        "certificate_serial": certificate.map(|certificate| &certificate.serial),
        "certificate_not_after_s": until,
        "certificate_left_s": until.map(|until| left_s(until, now)),
        "load": own.load.as_ref().map(load),
    })
}

fn member(member: &Member, now: SystemTime) -> Value {
    let until = Some(member.certificate_not_after_s).filter(|until| *until > 0);
    let quarantine = member.quarantine.as_ref();
    json!({
        "node": member.node,
        "region": member.region,
        "zone": known(&member.zone),
        "state": state(member.state()),
        "protocol": Some(member.protocol).filter(|version| *version > 0),
        "release": known(&member.release),
        "epoch": member.epoch,
        "bump": member.bump,
        "certificate_not_after_s": until,
        "certificate_left_s": until.map(|until| left_s(until, now)),
        "peers": known(&member.peers),
        "gossip": known(&member.gossip),
        "transport": transport(member.transport()),
        "rtt_ms": member.rtt_us.map(rtt_ms),
        "subscribed": member.is_subscribed,
        "subscriber": member.is_subscriber,
        "load_age_ms": member.load_age_ms,
        "load": member.load.as_ref().map(load),
        "quarantine": quarantine.map(|q| json!({ "left_ms": q.left_ms, "why": q.why })),
    })
}

fn load(load: &NodeLoad) -> Value {
    json!({
        "engines": load.engines,
        "in_flight": load.in_flight,
        "queued": load.queued,
        "slots": load.slots,
        "unusable": load.unusable,
    })
}

fn region(region: &Region) -> Value {
    let models = region.offers.iter().map(offer).collect::<Vec<_>>();
    json!({ "region": region.region, "age_ms": region.age_ms, "models": models })
}

fn offer(offer: &RegionOffer) -> Value {
    json!({
        "model": known(&offer.model),
        "protocol": offer.protocol,
        "free": offer.free,
        "slots": offer.slots,
        "drain_rate_per_s": offer.drain_rate_per_s,
        "wait_p50_ms": offer.wait_p50_ms,
        "wait_p90_ms": offer.wait_p90_ms,
        "kv_free": offer.kv_free,
        "candidates": offer.candidates,
    })
}

/// A text that is not empty.
fn known(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

pub(super) fn state(state: MemberState) -> &'static str {
    match state {
        MemberState::Unspecified => "unknown",
        MemberState::Alive => "alive",
        MemberState::Suspect => "suspect",
        MemberState::Down => "down",
        MemberState::Left => "left",
    }
}

pub(super) fn transport(transport: LinkTransport) -> Option<&'static str> {
    match transport {
        LinkTransport::Unspecified => None,
        LinkTransport::Quic => Some("quic"),
        LinkTransport::Tcp => Some("tcp"),
    }
}

pub(super) fn rtt_ms(us: u64) -> f64 {
    std::time::Duration::from_micros(us).as_secs_f64() * 1e3
}

/// Seconds until a moment; below zero: it has passed.
pub(super) fn left_s(until_s: u64, now: SystemTime) -> i64 {
    let now_s = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (until, now) = (i64::try_from(until_s), i64::try_from(now_s));
    until.unwrap_or(i64::MAX).saturating_sub(now.unwrap_or(i64::MAX))
}
