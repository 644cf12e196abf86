//! What it costs to lie: who can be shown to have lied is named, and nobody else is.

use foca::{Member, State};

use super::{
    super::*,
    gossip, mesh_of, pair, quarantined,
    world::{MS, S, World, descriptor, id_of, sign},
};
use crate::{EngineDescriptor, Pair, RegionOffer, SLOTS_MAX, encode_card, encode_descriptor};

/// Node 1 tells node 0 the same every 200 ms, for so many seconds or until it is not listened to. Returns for how long.
fn insist(world: &mut World, seconds: u64, frame: impl Fn(&World, u64) -> Frame) -> Duration {
    let began = world.now;
    for round in 0..5 * seconds {
        let frame = frame(world, round);
        world.forge(1, 0, &frame);
        world.run(200 * MS);
        if !quarantined(world, 0).is_empty() {
            break;
        }
    }
    world.now - began
}

/// Node 0 names node 1 for this, and nobody names anybody else.
fn assert_named(world: &World, why: &str) {
    let liar = world.id(1);
    let named = quarantined(world, 0);
    assert!(named.len() == 1 && named[0].0 == liar && named[0].1.contains(why), "{named:?}");
    for at in (1..world.nodes.len()).filter(|at| world.nodes[*at].mesh.is_some()) {
        assert!(quarantined(world, at).iter().all(|(id, _)| *id == liar));
    }
}

fn later(world: &World, at: usize) -> Pair {
    Pair { epoch: 1 << 62, ..pair(world, at) }
}

#[test]
fn who_breaks_what_no_mistake_breaks_is_named_although_its_link_is_gone() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    world.part(&[1], &[0]);
    world.run(S);
    let why = "a frame is longer than may be".to_owned();
    world.input(0, Input::Broke { peer: world.nodes[1].peer(), why });
    assert_named(&world, "longer than may be");
    world.heal();
    world.run(10 * S);
    assert!(!world.mesh(0).links.is_up(world.id(1)));
    world.run(60 * S);
    assert!(world.mesh(0).links.is_up(world.id(1)), "a minute later it is heard again");
}

#[test]
fn a_forged_card_costs_as_much_as_a_lie_and_one_that_is_doubted_does_not() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    world.forge(1, 0, &Frame::Cards(Pool::Region, vec![sign("nowhere", b"x")]));
    assert_eq!(quarantined(&world, 0), []);
    let mut card = sign("eu/n2", &encode_card(&world.mesh(2).card.facts));
    let text = String::from_utf8_lossy(&card).into_owned();
    // The address, so that the signature does not fit any more.
    let at = text.find("n2:1").map_or(0, |_| card.windows(4).position(|w| w == b"n2:1").unwrap());
    card[at] = b'm';
    world.forge(1, 0, &Frame::Cards(Pool::Region, vec![card]));
    assert_named(&world, "forged");
}

#[test]
fn who_speaks_of_a_later_process_of_this_node_shows_its_card_or_is_named() {
    for state in [State::Alive, State::Suspect, State::Down] {
        let mut world = mesh_of(3);
        world.run(5 * S);
        let took = insist(&mut world, 10, |world, _| {
            gossip(world, 1, 0, vec![Member::new(later(world, 0), 0, state)])
        });
        assert!(took < 8 * S, "{took:?}");
        assert_named(&world, "a later card of this node");
        assert_eq!(world.mesh(0).card.facts.epoch, 100);
    }
}

#[test]
fn who_speaks_of_later_processes_of_others_shows_their_cards_or_is_named() {
    for state in [State::Alive, State::Suspect, State::Down] {
        let mut world = mesh_of(8);
        world.run(5 * S);
        let took = insist(&mut world, 10, |world, _| {
            let all = (2..8).map(|at| Member::new(later(world, at), 0, state));
            gossip(world, 1, 0, all.collect())
        });
        assert!(took < 8 * S, "{took:?}");
        assert_named(&world, "later cards of other nodes");
        world.run(5 * S);
        assert!(world.converged(&[0, 2, 3, 4, 5, 6, 7]));
    }
}

#[test]
fn who_has_the_card_of_a_node_that_is_dead_by_now_is_believed_to_have_had_it() {
    let mut world = mesh_of(8);
    world.run(5 * S);
    // Node 1 has later cards of some that node 0 has not heard of, and knows that they are dead again.
    for at in 2..8 {
        let mut facts = world.mesh(at).card.facts.clone();
        facts.epoch += 1;
        let card = sign(&world.nodes[at].name, &encode_card(&facts));
        world.kill(at);
        world.forge(0, 1, &Frame::Cards(Pool::Region, vec![card]));
    }
    let dead =
        |world: &World, at: usize| Member::down(Pair { epoch: 101, ..pair_of(world, 0, at) });
    let known = pair_of(&world, 0, 3);
    let frame = gossip(&world, 1, 0, (2..8).map(|at| dead(&world, at)).collect());
    world.forge(1, 0, &frame);
    assert!(world.mesh(0).cards.is_missed(known.id));
    world.run(S);
    assert!(!world.mesh(0).cards.is_missed(known.id), "it has shown the card");
    world.run(20 * S);
    assert_eq!((quarantined(&world, 0), quarantined(&world, 1)), (vec![], vec![]));
}

/// The card of a node as another one knows it.
fn pair_of(world: &World, at: usize, of: usize) -> Pair {
    world.mesh(at).cards.pair(world.id(of)).unwrap()
}

#[test]
fn who_calls_this_node_down_whatever_card_it_takes_is_named() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    let took =
        insist(&mut world, 60, |world, _| gossip(world, 1, 0, vec![Member::down(pair(world, 0))]));
    assert!(took < 40 * S, "{took:?}");
    assert_named(&world, "calls this node down again and again");
    world.run(5 * S);
    assert_eq!(world.sees(2, 0), Liveness::Alive);
}

/// Node 1 serves so much from now on, as its card says.
fn describe(world: &mut World, slots: Option<u32>) {
    let engine = EngineDescriptor { slots, ..descriptor("n1").engines.remove(0) };
    world.input(1, Input::Describe(Descriptor { version: 2, engines: vec![engine] }));
}

#[test]
fn whose_descriptor_is_absurd_is_named_by_whoever_reads_it_and_whoever_brings_it_is_not() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    describe(&mut world, Some(SLOTS_MAX));
    world.run(5 * S);
    assert_eq!(quarantined(&world, 0), []);
    let absurd = EngineDescriptor { slots: Some(1 << 31), ..descriptor("n1").engines.remove(0) };
    let body = encode_descriptor(&Descriptor { version: 3, engines: vec![absurd] });
    let mut facts = world.mesh(1).card.facts.clone();
    (facts.bump, facts.descriptor) = (facts.bump + 1, super::world::digest(&[&body]));
    let card = sign("eu/n1", &encode_card(&facts));
    let hello = Box::new(Hello { card: Some(card.clone()), ..world.hello(1) });
    world.kill(1);
    world.forge(2, 0, &Frame::Cards(Pool::Region, vec![card]));
    world.forge(2, 0, &Frame::Descriptors(vec![body]));
    assert_named(&world, "more slots than any can have");
    world.run(62 * S);
    assert_eq!(quarantined(&world, 0), []);
    let (peer, transport) = (world.nodes[1].peer(), Transport::Quic);
    world.input(0, Input::LinkUp { peer, hello, transport, dialled: true });
    assert_named(&world, "more slots than any can have");
    assert!(!world.mesh(0).links.is_up(world.id(1)));
}

fn candidate(node: &str, slots: u32) -> Candidate {
    Candidate { node: node.parse().unwrap(), peers: "n1:2".into(), free: slots, slots }
}

/// A digest that node 1 might send.
fn digest(world: &World, sequence: u64, slots: u32, candidates: Vec<Candidate>) -> crate::Digest {
    let offer = RegionOffer {
        model: Some("llama".parse().unwrap()),
        protocol: "kserve-v2".into(),
        free: slots,
        slots,
        drain_rate: 1.0,
        wait: (Duration::ZERO, Duration::ZERO),
        kv_free: None,
        candidates,
    };
    crate::Digest {
        relay: None,
        region: world.nodes[1].peer().region,
        epoch: 100,
        sequence: 1_000_000 + sequence,
        age: Duration::ZERO,
        part: (0, 1),
        offers: vec![offer],
    }
}

/// Node 0 is of eu, node 1 of us, and both speak for their regions.
fn two_regions() -> World {
    let mut world = World::new(4);
    for name in ["eu/e0", "us/u0", "eu/e1", "us/u1"] {
        world.add(name);
    }
    world.run(20 * S);
    assert!((0..4).all(|at| world.mesh(at).relay.is_some()));
    assert!(world.mesh(0).links.is_up(world.id(1)));
    world
}

#[test]
fn a_relay_that_gives_itself_what_it_does_not_have_is_named() {
    let mut world = two_regions();
    let took = insist(&mut world, 30, |world, round| {
        let candidates = vec![candidate("u0", 1_000_000)];
        Frame::Digest(digest(world, round, 1_000_000, candidates))
    });
    assert!(took > 14 * S && took < 17 * S, "{took:?}");
    assert_named(&world, "gives itself more slots");
}

#[test]
fn a_relay_whose_card_is_late_is_not_named_nor_one_whose_descriptor_does_not_say() {
    let mut world = two_regions();
    insist(&mut world, 12, |world, round| {
        let candidates = vec![candidate("u0", 200_000)];
        Frame::Digest(digest(world, round, 200_000, candidates))
    });
    describe(&mut world, Some(200_000));
    world.run(3 * S);
    for slots in [Some(200_000), None] {
        describe(&mut world, slots);
        world.run(3 * S);
        insist(&mut world, 30, |world, round| {
            let candidates = vec![candidate("u0", 200_000)];
            Frame::Digest(digest(world, round, 200_000, candidates))
        });
    }
    assert_eq!(quarantined(&world, 0), []);
}

#[test]
fn a_relay_that_speaks_of_others_is_not_named_for_what_they_may_have_told_it() {
    let mut world = two_regions();
    insist(&mut world, 30, |world, round| {
        let candidates = vec![candidate("u1", 1_000_000)];
        Frame::Digest(digest(world, round, 1_000_000, candidates))
    });
    assert_eq!(quarantined(&world, 0), []);
}

#[test]
fn a_small_region_goes_by_what_its_nodes_say_and_not_by_what_one_relay_says_of_them() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    assert!(world.mesh(0).relaying.is_of_ours(world.id(1)));
    insist(&mut world, 5, |world, round| {
        let candidates = vec![candidate("nobody", 1_000_000)];
        Frame::Digest(digest(world, round, 1_000_000, candidates))
    });
    assert!(world.when(0, |event| matches!(event, Event::Region(_))).is_none());
}

#[test]
fn a_digest_of_which_a_part_is_more_than_all_is_a_lie() {
    let mut world = two_regions();
    let took = insist(&mut world, 5, |world, round| {
        let candidates = vec![candidate("u0", 40), candidate("u1", 40)];
        Frame::Digest(digest(world, round, 64, candidates))
    });
    assert!(took < 2 * S, "{took:?}");
    assert_named(&world, "whose parts are more than all");
    let mut world = two_regions();
    insist(&mut world, 5, |world, round| {
        let mut digest = digest(world, round, 64, vec![]);
        digest.offers[0].free = 65;
        Frame::Digest(digest)
    });
    assert_named(&world, "more than there are slots");
}

#[test]
fn what_is_handed_on_goes_from_another_region_into_this_one() {
    let mut world = two_regions();
    insist(&mut world, 5, |world, round| {
        // Of a relay of us, by another region's node.
        let relay = Some(world.id(3));
        Frame::Digest(crate::Digest { relay, ..digest(world, round, 64, vec![]) })
    });
    assert_named(&world, "where none is to go");
    let mut world = mesh_of(3);
    world.run(5 * S);
    insist(&mut world, 5, |world, round| {
        let relay = Some(world.id(2));
        Frame::Digest(crate::Digest { relay, ..digest(world, round, 64, vec![]) })
    });
    assert_named(&world, "where none is to go");
}

#[test]
fn digests_that_come_too_often_are_not_handed_on() {
    let mut world = two_regions();
    let candidates: Vec<_> = (0..8).map(|n| candidate(&format!("u{n}"), 8)).collect();
    for is_new in [false, true] {
        let before = world.sent;
        world.run(5 * S);
        let usual = world.sent - before;
        for round in 0..2_500 {
            let round = if is_new { 10 + round } else { 1 };
            let digest = digest(&world, round, 64, candidates.clone());
            world.forge(1, 0, &Frame::Digest(digest));
            world.run(2 * MS);
        }
        let sent = world.sent - before - usual;
        assert!(sent < usual + 25 * 1_000, "{is_new}: {sent}, usually {usual}");
    }
    assert!((0..4).all(|at| quarantined(&world, at).is_empty()));
}

#[test]
fn a_flood_is_named() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    for _ in 0..20 {
        for _ in 0..3_000 {
            let frame = Frame::CardsAsk(Pool::Region, vec![id_of("eu/nobody")]);
            world.forge(1, 0, &frame);
        }
        world.run(S);
    }
    assert_named(&world, "more than it may send");
}

#[test]
fn what_spoke_against_a_node_on_an_older_card_is_no_evidence_against_it_now() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    let (now, before) = (world.now, pair(&world, 2));
    let suspect = |world: &mut World, pair| {
        let mesh = world.nodes[0].mesh.as_mut().unwrap();
        mesh.suspect(now, Pool::Region, pair, 0, now + 10 * S);
        mesh.doubts.confirm(now, id_of("eu/n1"), (Pool::Region, pair.id), false)
    };
    assert!(suspect(&mut world, before), "what it found out itself");
    assert!(suspect(&mut world, before));
    let mut facts = world.mesh(2).card.facts.clone();
    facts.bump += 1;
    let card = sign("eu/n2", &encode_card(&facts));
    world.forge(2, 0, &Frame::Cards(Pool::Region, vec![card]));
    assert!(!suspect(&mut world, before));
}

#[test]
fn who_passes_one_death_on_is_not_named_although_another_hears_the_dead() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    let victim = Member::down(pair(&world, 2));
    for _ in 0..31 {
        let frame = gossip(&world, 1, 0, vec![victim.clone()]);
        world.forge(1, 0, &frame);
    }
    assert_eq!(quarantined(&world, 0), []);
    insist(&mut world, 20, |world, _| gossip(world, 1, 0, vec![victim.clone()]));
    assert_named(&world, "calls others down that live");
}

#[test]
fn who_is_not_listened_to_is_no_relay_until_it_is_heard_again() {
    let mut world = mesh_of(5);
    world.run(10 * S);
    let relay = (1..5).find(|at| world.mesh(0).relaying.is_of_ours(world.id(*at))).unwrap();
    let other = (1..5).find(|at| *at != relay).unwrap();
    let lie = gossip(&world, other, 0, vec![]);
    world.forge(relay, 0, &lie);
    assert_eq!(quarantined(&world, 0).len(), 1);
    world.run(2 * S);
    assert!(!world.mesh(0).relaying.is_of_ours(world.id(relay)));
    assert!(world.mesh(other).relaying.is_of_ours(world.id(relay)), "others know nothing of it");
    world.run(61 * S);
    assert!(world.mesh(0).relaying.is_of_ours(world.id(relay)));
}

#[test]
fn a_card_that_is_doubted_counts_against_nobody_who_was_asked_for_all() {
    for is_asked in [true, false] {
        let mut world = mesh_of(3);
        world.run(5 * S);
        let id = world.id(1);
        for _ in 0..6 {
            let now = world.now;
            let link = world.nodes[0].mesh.as_mut().unwrap().links.up.get_mut(&id);
            if let Some(link) = link {
                link.asked_all = is_asked.then_some((now, false));
            }
            world.forge(1, 0, &Frame::Cards(Pool::Region, vec![sign("nowhere", b"x")]));
            world.run(6 * S);
        }
        assert_eq!(quarantined(&world, 0).is_empty(), is_asked);
    }
}
