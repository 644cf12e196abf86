//! What the mesh looks like, for people.

use std::time::{Duration, SystemTime};

use proto::isobar::admin::v1::{GetMeshReply, Member, MemberState, NodeLoad, Own, Region};

use super::json::{left_s, rtt_ms, state, transport};

/// What other nodes say of themselves is shown so far.
const SHOWN_CHARS_MAX: usize = 200;

pub(super) fn text(mesh: &GetMeshReply, now: SystemTime) -> String {
    let mut lines = Vec::new();
    lines.extend(mesh.own.iter().flat_map(|own| self::own(own, now)));
    lines.push(String::new());
    lines.extend(members(&mesh.members, now));
    for member in &mesh.members {
        let Some(quarantine) = &member.quarantine else { continue };
        let left = age(quarantine.left_ms);
        let why = shown(&quarantine.why);
        lines.push(format!("quarantined: {}, for {left} more: {why}", name(member)));
    }
    if !mesh.regions.is_empty() {
        lines.push(String::new());
        lines.push(format!("regions by their digests: {}", mesh.regions.len()));
        lines.extend(regions(&mesh.regions));
    }
    lines.push(String::new());
    lines.extend(rest(mesh));
    lines.join("\n")
}

fn own(own: &Own, now: SystemTime) -> Vec<String> {
    let zone = if own.zone.is_empty() { String::new() } else { format!(", zone {}", own.zone) };
    let mut what = vec![format!("release {}", own.release), format!("epoch {}", own.epoch)];
    if own.is_relay {
        what.push("a relay of its region".to_owned());
    }
    if own.is_draining {
        what.push("draining".to_owned());
    }
    let mut lines = vec![
        format!("{} ({}{zone}): {}", own.node, own.region, what.join(", ")),
        format!("  {}", own.id),
    ];
    if let Some(certificate) = &own.certificate {
        let end = end(certificate.not_after_s, now);
        lines.push(format!("  certificate {}: {end}", certificate.serial));
    }
    if let Some(load) = &own.load {
        let queued =
            if load.queued > 0 { format!(", {} wait", load.queued) } else { String::new() };
        let failing =
            if load.unusable > 0 { format!(", {} fail", load.unusable) } else { String::new() };
        let slots = slots(load);
        lines.push(format!("  engines: {}, {slots} slots in use{queued}{failing}", load.engines));
    }
    lines
}

/// One line per member, under a line that says how many there are.
fn members(members: &[Member], now: SystemTime) -> Vec<String> {
    let states = [
        MemberState::Alive,
        MemberState::Suspect,
        MemberState::Down,
        MemberState::Left,
        MemberState::Unspecified,
    ];
    let count = |wanted| members.iter().filter(|member| member.state() == wanted).count();
    let counts = states.map(|wanted| (count(wanted), state(wanted)));
    let counts = counts.into_iter().filter(|(count, _)| *count > 0);
    let counts: Vec<_> = counts.map(|(count, what)| format!("{count} {what}")).collect();
    if members.is_empty() {
        return vec!["other members: none is known".to_owned()];
    }
    let head = [
        "NODE",
        "REGION",
        "ZONE",
        "STATE",
        "PROTOCOL",
        "RELEASE",
        "GENERATION",
        "CERTIFICATE",
        "LINK",
        "RTT",
        "LOAD AGE",
        "LOAD",
        "SUBSCRIBED",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(members.iter().map(|member| row(member, now)));
    let mut lines = vec![format!("other members: {} ({})", members.len(), counts.join(", "))];
    lines.extend(table(&rows));
    lines
}

fn row(member: &Member, now: SystemTime) -> [String; 13] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let known = |text: &str| or_dash((!text.is_empty()).then(|| shown(text)));
    let quarantined = if member.quarantine.is_some() { ", quarantined" } else { "" };
    let until = Some(member.certificate_not_after_s).filter(|until| *until > 0);
    let subscribed = match (member.is_subscribed, member.is_subscriber) {
        (true, true) => "both ways",
        (true, false) => "to it",
        (false, true) => "by it",
        (false, false) => "-",
    };
    [
        shown(&member.node),
        shown(&member.region),
        known(&member.zone),
        format!("{}{quarantined}", state(member.state())),
        or_dash((member.protocol > 0).then(|| member.protocol.to_string())),
        known(&member.release),
        format!("{}.{}", member.epoch, member.bump),
        or_dash(until.map(|until| left(until, now))),
        or_dash(transport(member.transport()).map(str::to_owned)),
        or_dash(member.rtt_us.map(|us| format!("{:.1}ms", rtt_ms(us)))),
        or_dash(member.load_age_ms.map(age)),
        or_dash(member.load.as_ref().map(slots)),
        subscribed.to_owned(),
    ]
}

fn slots(load: &NodeLoad) -> String {
    format!("{}/{}", load.in_flight, load.slots)
}

fn regions(regions: &[Region]) -> Vec<String> {
    let mut lines = Vec::new();
    for region in regions {
        lines.push(format!("  {}, {} old", shown(&region.region), age(region.age_ms)));
        for offer in &region.offers {
            let model = if offer.model.is_empty() { "any model" } else { &offer.model };
            let (free, slots) = (offer.free, offer.slots);
            let (p50, p90) = (age(offer.wait_p50_ms), age(offer.wait_p90_ms));
            lines.push(format!(
                "    {}: {free} of {slots} slots free, a call waits {p50}, one in ten {p90} and more",
                shown(model)
            ));
        }
    }
    lines
}

/// What goes on one line each.
fn rest(mesh: &GetMeshReply) -> Vec<String> {
    let names = |is: fn(&Member) -> bool| {
        let names: Vec<_> = mesh.members.iter().filter(|m| is(m)).map(name).collect();
        list(&names)
    };
    let relays: Vec<_> = mesh.relays.iter().map(|relay| shown(relay)).collect();
    let attempts = mesh.attempts.iter().map(|a| format!("{} {}", a.attempts, shown(&a.region)));
    vec![
        format!("relays of this region: {}", list(&relays)),
        format!(
            "subscriptions: {} to others, {} of others",
            mesh.members.iter().filter(|member| member.is_subscribed).count(),
            mesh.subscribers
        ),
        format!("suspected: {}", names(|member| member.state() == MemberState::Suspect)),
        format!("attempts that came, by region: {}", list(&attempts.collect::<Vec<_>>())),
    ]
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn name(member: &Member) -> String {
    format!("{} ({})", shown(&member.node), shown(&member.region))
}

/// Columns as wide as they must be.
fn table<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("  {}", cells.collect::<Vec<_>>().join("  ")).trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// A short time.
fn age(ms: u64) -> String {
    if ms < 10_000 {
        return format!("{ms}ms");
    }
    humantime::format_duration(Duration::from_secs(ms / 1_000)).to_string()
}

/// When a certificate ends.
fn end(until_s: u64, now: SystemTime) -> String {
    let left = left(until_s, now);
    if left == "ended" { left } else { format!("{left} left") }
}

/// What is left of the life of a certificate, in its two largest units.
fn left(until_s: u64, now: SystemTime) -> String {
    let Ok(seconds @ 1..) = u64::try_from(left_s(until_s, now)) else { return "ended".to_owned() };
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m"),
        (0, hours, minutes) => format!("{hours}h {minutes}m"),
        (days, hours, _) => format!("{days}d {hours}h"),
    }
}

/// A text of somebody else: nothing of it moves a cursor, or fills a screen.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(SHOWN_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proto::isobar::admin::v1::{
        Certificate, LinkTransport, Quarantine, RegionAttempts, RegionOffer,
    };

    use super::*;

    const NOW_S: u64 = 1_000_000;

    fn mesh() -> GetMeshReply {
        let b = Member {
            node: "b".into(),
            region: "us".into(),
            state: MemberState::Alive.into(),
            epoch: 7,
            bump: 3,
            release: "1.2.3\u{1b}[2J".into(),
            protocol: 2,
            certificate_not_after_s: NOW_S + 11 * 3_600 + 120,
            transport: LinkTransport::Quic.into(),
            rtt_us: Some(12_345),
            is_subscribed: true,
            load_age_ms: Some(85),
            load: Some(NodeLoad { engines: 1, in_flight: 3, slots: 64, ..NodeLoad::default() }),
            ..Member::default()
        };
        let liar = Member {
            node: "liar".into(),
            region: "us".into(),
            state: MemberState::Suspect.into(),
            quarantine: Some(Quarantine { left_ms: 60_000, why: "it spoke for others".into() }),
            ..Member::default()
        };
        let offer = RegionOffer {
            model: "llama".into(),
            free: 5,
            slots: 8,
            wait_p90_ms: 120,
            ..RegionOffer::default()
        };
        GetMeshReply {
            own: Some(Own {
                id: "spiffe://m/node/eu/a".into(),
                node: "a".into(),
                region: "eu".into(),
                zone: "z1".into(),
                epoch: 5,
                release: "1.2.3".into(),
                is_relay: true,
                certificate: Some(Certificate { not_after_s: NOW_S, ..Certificate::default() }),
                ..Own::default()
            }),
            members: vec![b, liar],
            regions: vec![Region { region: "us".into(), age_ms: 400, offers: vec![offer] }],
            relays: vec!["a".into(), "c".into()],
            subscribers: 4,
            attempts: vec![RegionAttempts { region: "us".into(), attempts: 9 }],
        }
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(NOW_S)
    }

    #[test]
    fn everything_is_in_the_text_and_nothing_of_others_moves_the_cursor() {
        let text = text(&mesh(), now());
        for part in [
            "a (eu, zone z1): release 1.2.3, epoch 5, a relay of its region",
            ": ended",
            "other members: 2 (1 alive, 1 suspect)",
            "7.3",
            "11h 2m",
            "quic  12.3ms  85ms      3/64  to it",
            "suspect, quarantined",
            "quarantined: liar (us), for 1m more: it spoke for others",
            "  us, 400ms old",
            "llama: 5 of 8 slots free, a call waits 0ms, one in ten 120ms and more",
            "relays of this region: a, c",
            "subscriptions: 1 to others, 4 of others",
            "suspected: liar (us)",
            "attempts that came, by region: 9 us",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains('\u{1b}'));
        assert!(text.lines().all(|line| line == line.trim_end()), "{text}");
    }

    #[test]
    fn a_node_that_knows_nobody_says_so() {
        let alone = GetMeshReply { own: mesh().own, ..GetMeshReply::default() };
        let text = text(&alone, now());
        assert!(text.contains("other members: none is known"), "{text}");
        assert!(text.contains("suspected: none"), "{text}");
    }

    #[test]
    fn json_has_units_in_its_names_and_null_for_what_is_not_known() {
        let json = super::super::json::mesh(&mesh(), now());
        let (b, liar) = (&json["members"][0], &json["members"][1]);
        assert_eq!((&b["state"], &b["rtt_ms"]), (&"alive".into(), &12.345.into()));
        assert_eq!(b["certificate_left_s"], 11 * 3_600 + 120);
        assert_eq!(b["load"]["slots"], 64);
        for unknown in ["zone", "transport", "rtt_ms", "load_age_ms", "load", "protocol"] {
            assert!(liar[unknown].is_null(), "{unknown}");
        }
        assert_eq!(liar["quarantine"]["left_ms"], 60_000);
        assert_eq!(json["suspicions"][0]["node"], "liar");
        assert_eq!(json["subscriptions"]["to"][0]["node"], "b");
        assert_eq!(json["regions"][0]["models"][0]["free"], 5);
        assert_eq!(json["node"]["certificate_left_s"], 0);
    }
}
