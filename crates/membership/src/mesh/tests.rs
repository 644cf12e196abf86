//! What the machine does among others, in a network in memory.

mod liars;
mod missed;
mod world;

use base::Load;
use foca::{Header, Member, Message, State};
use rand::Rng as _;

use super::*;
use crate::{Facts, Pair, encode_card, swim::Packet};
use world::{MS, S, World, descriptor, id_of, sign};

fn mesh_of(n: usize) -> World {
    let mut world = World::new(1);
    for i in 0..n {
        world.add(&format!("eu/n{i}"));
    }
    world
}

fn all(n: usize) -> Vec<usize> {
    (0..n).collect()
}

fn check(world: &World) {
    for node in &world.nodes {
        let Some(mesh) = &node.mesh else { continue };
        assert!(mesh.region.is_true(), "{}: the mirror is not what foca believes", node.name);
        assert!(mesh.relay.as_ref().is_none_or(Members::is_true), "{}", node.name);
    }
}

fn pair(world: &World, at: usize) -> Pair {
    world.mesh(at).card.pair()
}

/// What node `from` would say to node `to`.
fn gossip(world: &World, from: usize, to: usize, updates: Vec<Member<Pair>>) -> Frame {
    let header = Header {
        src: pair(world, from),
        src_incarnation: 0,
        dst: pair(world, to),
        message: Message::Gossip,
    };
    Frame::Swim(Pool::Region, Packet { header, updates }.write())
}

fn is_down(id: NodeId) -> impl Fn(&Event) -> bool {
    move |event| matches!(event, Event::Down { id: down, .. } if *down == id)
}

fn false_downs(world: &World, but: &[usize]) -> usize {
    let down = |event: &Event| matches!(event, Event::Down { id, .. } if !but.iter().any(|b| world.id(*b) == *id));
    world.nodes.iter().flat_map(|node| &node.events).filter(|(_, event)| down(event)).count()
}

fn quarantined(world: &World, at: usize) -> Vec<(NodeId, String)> {
    let status = world.mesh(at).status(world.now);
    status.quarantined.into_iter().map(|(peer, _, why)| (peer.id, why)).collect()
}

#[test]
fn two_nodes_find_each_other_and_say_how_pressed_they_are() {
    let mut world = mesh_of(2);
    world.run(5 * S);
    assert!(world.converged(&[0, 1]));
    let other = world.id(1);
    let is_load = |event: &Event| matches!(event, Event::Load { id, .. } if *id == other);
    let is_described = |event: &Event| matches!(event, Event::Described { id, descriptor: d, .. } if *id == other && **d == descriptor("n1"));
    assert!(world.when(0, is_described).is_some());
    assert!(world.when(0, is_load).is_some());
    check(&world);
}

#[test]
fn three_nodes_that_know_one_seed_find_each_other() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    assert!(world.converged(&all(3)));
    assert_eq!(world.links.len(), 3);
    check(&world);
}

#[test]
fn forty_nodes_find_each_other_while_packets_are_lost() {
    let mut world = mesh_of(40);
    world.loss = 0.1;
    world.run(20 * S);
    assert!(world.converged(&all(40)));
    world.run(15 * S);
    assert!(world.converged(&all(40)));
    assert_eq!(false_downs(&world, &[]), 0);
    assert_eq!(
        world
            .nodes
            .iter()
            .map(|n| n.mesh.as_ref().unwrap().strikes.quarantined(world.now).len())
            .sum::<usize>(),
        0
    );
    check(&world);
}

#[test]
fn a_dead_node_is_unreachable_at_once_and_down_within_five_seconds() {
    let mut world = mesh_of(6);
    world.run(10 * S);
    let (died, id) = (world.now, world.id(3));
    world.kill(3);
    world.run(8 * S);
    for at in [0, 1, 2, 4, 5] {
        let unreachable =
            |event: &Event| matches!(event, Event::Reachable { id: who, is: false } if *who == id);
        assert!(world.when(at, unreachable).unwrap() - died < 10 * MS);
        let down = world.when(at, is_down(id)).unwrap();
        assert!(down - died < 5 * S, "{:?}", down - died);
    }
    assert_eq!(false_downs(&world, &[3]), 0);
    check(&world);
}

#[test]
fn a_node_that_starts_again_is_taken_back() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    world.kill(2);
    world.run(S);
    world.start(2, 101, &[0]);
    world.run(5 * S);
    assert!(world.converged(&all(4)));
    world.kill(2);
    world.run(20 * S);
    assert_eq!(world.sees(0, 2), Liveness::Down);
    world.start(2, 102, &[0]);
    world.run(5 * S);
    assert!(world.converged(&all(4)));
    check(&world);
}

#[test]
fn a_node_that_drains_says_so_and_one_that_leaves_is_gone_at_once() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    let id = world.id(1);
    world.input(1, Input::Drain);
    world.run(100 * MS);
    let draining = |event: &Event| matches!(event, Event::Load { id: who, frame, .. } if *who == id && frame.draining);
    assert!(world.when(0, draining).is_some());
    world.input(1, Input::Leave);
    world.run(S);
    for at in [0, 2, 3] {
        assert_eq!(world.sees(at, 1), Liveness::Left);
        let left =
            |event: &Event| matches!(event, Event::Down { id: who, left: true } if *who == id);
        assert!(world.when(at, left).is_some());
    }
    world.kill(1);
    world.run(5 * S);
    assert_eq!(false_downs(&world, &[1]), 0);
    check(&world);
}

#[test]
fn a_partition_that_heals_converges() {
    let mut world = mesh_of(8);
    world.run(10 * S);
    world.part(&[0, 1, 2, 3], &[4, 5, 6, 7]);
    world.run(60 * S);
    assert_eq!(world.sees(0, 5), Liveness::Down);
    assert_eq!(world.sees(6, 2), Liveness::Down);
    world.heal();
    let healed = world.now;
    while !world.converged(&all(8)) && world.now < healed + 40 * S {
        world.run(S);
    }
    assert!(world.now <= healed + 30 * S, "{:?}", world.now - healed);
    check(&world);
}

#[test]
fn a_node_that_was_cut_off_calls_nobody_down_and_comes_back() {
    let mut world = mesh_of(6);
    world.run(10 * S);
    world.part(&[5], &all(5));
    world.run(15 * S);
    assert_eq!(world.sees(0, 5), Liveness::Down);
    assert!((0..5).all(|at| world.sees(5, at) != Liveness::Down));
    world.heal();
    world.run(15 * S);
    assert!(world.converged(&all(6)));
    check(&world);
}

#[test]
fn a_node_that_was_cut_off_for_long_brings_no_news_of_deaths() {
    let mut world = mesh_of(6);
    world.run(10 * S);
    world.part(&[5], &all(5));
    world.run(90 * S);
    assert!((0..5).all(|at| world.sees(5, at) == Liveness::Down));
    world.heal();
    world.run(20 * S);
    assert!(world.converged(&all(6)));
    for at in 0..5 {
        assert_eq!(quarantined(&world, at), []);
        let downs = world.nodes[at].events.iter().filter(|(_, e)| matches!(e, Event::Down { .. }));
        assert_eq!(downs.count(), 1);
    }
    check(&world);
}

#[test]
fn an_incarnation_that_was_raised_by_a_liar_is_refuted() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    let victim = pair(&world, 2);
    for incarnation in [60, 120] {
        for to in [0, 3] {
            let frame = gossip(&world, 1, to, vec![Member::new(victim, incarnation, State::Alive)]);
            world.forge(1, to, &frame);
        }
    }
    let frame = gossip(&world, 1, 0, vec![Member::new(victim, 120, State::Suspect)]);
    world.forge(1, 0, &frame);
    assert_eq!(world.sees(0, 2), Liveness::Suspect);
    world.run(10 * S);
    assert_eq!(false_downs(&world, &[]), 0);
    assert_eq!(world.sees(0, 2), Liveness::Alive);
    assert_eq!(pair(&world, 2).bump, 1);
    assert_eq!((quarantined(&world, 0), quarantined(&world, 2)), (vec![], vec![]));
    check(&world);
}

#[test]
fn a_node_that_is_not_listened_to_does_not_knock_all_the_time() {
    let mut world = mesh_of(3);
    world.run(10 * S);
    let lie = gossip(&world, 2, 0, vec![]);
    world.forge(1, 0, &lie);
    assert_eq!(quarantined(&world, 0).len(), 1);
    let dials = world.dials;
    world.run(30 * S);
    assert!(world.dials - dials < 20, "{} dials in 30 s", world.dials - dials);
    world.run(60 * S);
    assert!(world.converged(&all(3)), "a minute later it is one of them again");
}

#[test]
fn who_cannot_reach_one_other_does_not_make_it_die() {
    let mut world = mesh_of(6);
    world.run(10 * S);
    world.part(&[1], &[2]);
    world.run(120 * S);
    assert_eq!(false_downs(&world, &[]), 0);
    assert_eq!(quarantined(&world, 0), []);
    world.heal();
    world.run(15 * S);
    assert!(world.converged(&all(6)));
}

#[test]
fn a_new_descriptor_reaches_everybody_without_anybody_going_down() {
    let mut world = mesh_of(5);
    world.run(5 * S);
    let id = world.id(2);
    world.input(2, Input::Describe(Descriptor { version: 2, ..descriptor("other") }));
    world.run(3 * S);
    let is_new = |event: &Event| matches!(event, Event::Described { id: who, descriptor: d, .. } if *who == id && d.version == 2);
    assert!([0, 1, 3, 4].iter().all(|at| world.when(*at, is_new).is_some()));
    assert_eq!(pair(&world, 2).bump, 1);
    assert_eq!(false_downs(&world, &[]), 0);
    check(&world);
}

#[test]
fn another_is_not_down_because_one_node_says_so() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    for epoch in [100, 1 << 60] {
        let victim = Pair { epoch, ..pair(&world, 2) };
        for incarnation in [0, u16::MAX] {
            let frame = gossip(&world, 1, 0, vec![Member::new(victim, incarnation, State::Down)]);
            world.forge(1, 0, &frame);
        }
    }
    world.run(10 * S);
    assert_eq!(false_downs(&world, &[]), 0);
    assert!(world.converged(&all(4)));
    check(&world);
}

#[test]
fn who_calls_many_down_is_quarantined_and_named() {
    let mut world = mesh_of(12);
    world.run(10 * S);
    let victims = (2..12).map(|i| Member::down(pair(&world, i))).collect();
    let frame = gossip(&world, 1, 0, victims);
    world.forge(1, 0, &frame);
    assert_eq!(quarantined(&world, 0), [(world.id(1), "calls others down that live".to_owned())]);
    assert_eq!(world.mesh(0).links.get(world.id(1)).map(|l| l.epoch), None);
    world.run(30 * S);
    assert_eq!(false_downs(&world, &[]), 0);
    world.run(60 * S);
    assert!(world.mesh(0).links.is_up(world.id(1)), "a minute later it is heard again");
}

#[test]
fn who_speaks_for_another_is_quarantined_at_once() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    let frame = gossip(&world, 2, 0, vec![]);
    world.forge(1, 0, &frame);
    assert_eq!(quarantined(&world, 0), [(world.id(1), "speaks in the name of another".to_owned())]);
    let load = LoadFrame {
        epoch: 1 << 50,
        sequence: 1 << 50,
        descriptor_version: 1,
        sample_age: Duration::ZERO,
        next: S,
        draining: false,
        engines: vec![],
        arrivals: vec![],
    };
    world.forge(0, 2, &Frame::Load(load));
    assert_eq!(quarantined(&world, 2).len(), 1);
}

#[test]
fn a_process_whose_name_a_later_one_has_stops() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    let mut facts: Facts = world.mesh(1).card.facts.clone();
    facts.epoch += 1;
    let card = sign("eu/n1", &encode_card(&facts));
    let superseded = |event: &Event| matches!(event, Event::Superseded { epoch: 101 });
    // First somebody tells of it, then it brings the card.
    let claim = Member::alive(Pair { epoch: 101, ..pair(&world, 1) });
    let frame = gossip(&world, 0, 1, vec![claim]);
    world.forge(0, 1, &frame);
    assert!(world.when(1, superseded).is_none(), "a claim is no card");
    world.forge(0, 1, &Frame::Cards(Pool::Region, vec![card]));
    assert!(world.when(1, superseded).is_some());
}

#[test]
fn the_later_of_two_processes_of_one_name_stays() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    let twin = world.add_at("eu/n2", 200);
    world.run(10 * S);
    let superseded = |event: &Event| matches!(event, Event::Superseded { epoch: 200 });
    assert!(world.when(2, superseded).is_some());
    assert!(world.when(twin, |event| matches!(event, Event::Superseded { .. })).is_none());
    let epoch = |at: usize| world.mesh(at).cards.pair(world.id(2)).unwrap().epoch;
    assert!([0, 1, 3].iter().all(|at| epoch(*at) == 200));
    world.kill(2);
    world.run(10 * S);
    assert!(world.converged(&[0, 1, 3, twin]));
}

#[test]
fn an_incarnation_nobody_can_have_is_not_believed() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    let frame = gossip(&world, 1, 0, vec![Member::new(pair(&world, 2), u16::MAX, State::Suspect)]);
    world.forge(1, 0, &frame);
    assert_eq!(world.sees(0, 2), Liveness::Alive);
    assert_eq!(world.mesh(0).region.seen(world.id(2)).unwrap().incarnation, 0);
    let frame =
        gossip(&world, 1, 0, vec![Member::new(pair(&world, 0), u16::MAX - 1, State::Suspect)]);
    world.forge(1, 0, &frame);
    assert_eq!(world.mesh(0).region.incarnation(), 0);
    for _ in 0..5 {
        world.forge(1, 0, &frame);
    }
    assert_eq!(quarantined(&world, 0).len(), 1);
    world.run(5 * S);
    check(&world);
}

#[test]
fn a_suspected_node_says_that_it_lives() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    let frame = gossip(&world, 1, 0, vec![Member::new(pair(&world, 2), 0, State::Suspect)]);
    world.forge(1, 0, &frame);
    assert_eq!(world.sees(0, 2), Liveness::Suspect);
    world.run(3 * S);
    assert_eq!(world.sees(0, 2), Liveness::Alive);
    assert_eq!(world.mesh(0).region.seen(world.id(2)).unwrap().incarnation, 1);
    check(&world);
}

#[test]
fn bogus_members_cost_nothing_and_whoever_names_them_is_quarantined() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    let bogus =
        |i: usize| Member::alive(Pair { id: id_of(&format!("eu/bogus{i}")), epoch: 1, bump: 0 });
    for chunk in (0..1400).collect::<Vec<_>>().chunks(35) {
        let frame = gossip(&world, 1, 0, chunk.iter().copied().map(bogus).collect());
        world.forge(1, 0, &frame);
        world.run(20 * MS);
    }
    assert_eq!(world.mesh(0).region.all().count(), 2);
    world.run(10 * S);
    assert_eq!(quarantined(&world, 0).len(), 1);
    assert_eq!(world.mesh(0).cards.all().count(), 2);
    check(&world);
}

#[test]
fn who_claims_absurd_capacity_is_cut_to_its_descriptor_and_quarantined() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    let load = |sequence: u64| {
        Frame::Load(LoadFrame {
            epoch: 100,
            sequence,
            descriptor_version: 1,
            sample_age: Duration::ZERO,
            next: S,
            draining: false,
            engines: vec![Load { slots: Some(1 << 20), ..Load::default() }],
            arrivals: vec![],
        })
    };
    for sequence in 1000..1005 {
        world.forge(1, 0, &load(sequence));
    }
    let id = world.id(1);
    let is_more = |event: &Event| matches!(event, Event::Load { id: who, frame, .. } if *who == id && frame.engines[0].slots > Some(64));
    assert!(world.when(0, is_more).is_none());
    assert_eq!(quarantined(&world, 0).len(), 1);
}

#[test]
fn two_meshes_that_began_apart_become_one_through_a_seed_both_have() {
    let mut world = mesh_of(2);
    for name in ["eu/n2", "eu/n3"] {
        world.add(name);
    }
    // Before anything is sent: neither knows of the first two, nor they of them.
    world.cut.extend([0, 1].into_iter().flat_map(|a| [(a, 2), (2, a), (a, 3), (3, a)]));
    let seed = |at| Seed { address: format!("n{at}:1"), peer: None, is_listed: false };
    for (at, other) in [(2, 3), (3, 2)] {
        world.input(at, Input::Seeds(vec![seed(0), seed(other)]));
    }
    world.run(60 * S);
    assert!(world.converged(&[0, 1]) && world.converged(&[2, 3]));
    assert!((2..4).all(|at| world.mesh(at).cards.get(world.id(0)).is_none()));
    world.heal();
    // Each asks one of its two seeds every half minute.
    world.run(150 * S);
    assert!(world.converged(&all(4)));
}

#[test]
fn who_was_late_itself_thinks_badly_of_nobody_for_a_while() {
    for (lag, is_late) in [(99 * MS, false), (101 * MS, true)] {
        let mut world = mesh_of(2);
        world.run(10 * S);
        world.part(&[1], &[0]);
        let since = world.now;
        let mut called_down = None;
        while called_down.is_none() && world.now < since + 30 * S {
            if world.now < since + 5 * S {
                world.input(0, Input::Lagged(lag));
            }
            world.run(100 * MS);
            let is_down = matches!(world.sees(0, 1), Liveness::Down);
            called_down = is_down.then(|| world.now - since);
        }
        let after = called_down.unwrap();
        assert_eq!(after > 9 * S, is_late, "{lag:?}: {after:?}");
    }
}

#[test]
fn those_who_all_lost_each_other_find_each_other_again_without_a_seed() {
    for n in [3, 5] {
        let mut world = mesh_of(n);
        world.run(10 * S);
        world.kill(0);
        world.run(20 * S);
        for a in 1..n {
            for b in a + 1..n {
                world.part(&[a], &[b]);
            }
        }
        world.run(60 * S);
        let is_down = |at: usize, other| world.sees(at, other) == Liveness::Down;
        assert!((2..n).all(|other| is_down(1, other)), "{n}");
        world.heal();
        world.run(30 * S);
        assert!(world.converged(&(1..n).collect::<Vec<_>>()), "{n}");
        check(&world);
    }
}

#[test]
fn who_has_forgotten_everybody_while_it_was_alone_finds_them_again() {
    let mut world = mesh_of(3);
    world.run(10 * S);
    world.kill(0);
    world.run(20 * S);
    world.part(&[1], &[2]);
    world.run(2 * 3600 * S);
    assert_eq!(world.mesh(1).cards.all().count(), 0);
    world.heal();
    world.run(60 * S);
    assert!(world.converged(&[1, 2]));
}

#[test]
fn forged_cards_are_not_believed() {
    let mut world = mesh_of(3);
    world.run(5 * S);
    let mut card = sign("eu/n9", &encode_card(&world.mesh(1).card.facts));
    let last = card.len() - 2;
    card[last..].fill(b'x');
    for _ in 0..6 {
        world.forge(1, 0, &Frame::Cards(Pool::Region, vec![card.clone(); 5]));
        world.run(6 * S);
    }
    assert_eq!(world.mesh(0).cards.all().count(), 2);
    assert!(world.nodes[0].events.iter().any(|(_, e)| matches!(e, Event::Quarantined { .. })));
}

#[test]
fn garbage_is_quarantined_and_no_bytes_panic() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    let mut rng = SmallRng::seed_from_u64(3);
    for _ in 0..5 {
        world.forge_bytes(1, 0, vec![0xff; 200].into());
    }
    assert_eq!(quarantined(&world, 0).len(), 1);
    let swim = |i: usize| Member::new(pair(&world, i), 1, State::Suspect);
    let kinds = [
        Message::Gossip,
        Message::Ping(1),
        Message::Ack(1),
        Message::Feed,
        Message::TurnUndead,
        Message::Announce,
        Message::PingReq { target: pair(&world, 3), probe_number: 1 },
        Message::IndirectPing { origin: pair(&world, 3), probe_number: 1 },
        Message::IndirectAck { target: pair(&world, 3), probe_number: 1 },
        Message::ForwardedAck { origin: pair(&world, 3), probe_number: 1 },
        Message::PingReq { target: pair(&world, 0), probe_number: 1 },
    ];
    let mut frames: Vec<Vec<u8>> = Vec::new();
    for message in kinds {
        for pool in [Pool::Region, Pool::Relays] {
            let (src, dst) = (pair(&world, 2), pair(&world, 0));
            let header = Header { src, src_incarnation: 0, dst, message: message.clone() };
            let updates = (0..4).map(swim).collect();
            frames.push(encode(&Frame::Swim(pool, Packet { header, updates }.write())));
        }
    }
    let card = world.mesh(3).card.signed.to_vec();
    frames.push(encode(&Frame::Cards(Pool::Region, vec![card])));
    frames.push(encode(&Frame::CardsAsk(Pool::Relays, vec![world.id(3)])));
    frames.push(encode(&Frame::Subscribe(true)));
    frames.push(encode(&Frame::Descriptors(vec![crate::encode_descriptor(&descriptor("n2"))])));
    let (peer, hello) = (world.nodes[2].peer(), world.hello(2));
    let quarantines = |world: &World| {
        world.nodes[0].events.iter().filter(|(_, e)| matches!(e, Event::Quarantined { .. })).count()
    };
    for round in 0..50_000_usize {
        let mut bytes = frames[round % frames.len()].clone();
        match round / frames.len() % 4 {
            0 => rng.fill_bytes(&mut bytes),
            1 => bytes.truncate(rng.random_range(0..bytes.len())),
            _ => {
                for _ in 0..rng.random_range(1..4) {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] ^= 1 << rng.random_range(0..8);
                }
            }
        }
        // Whoever sends this has a clean record each time, so that everything is looked at.
        let mesh = world.nodes[0].mesh.as_mut().unwrap();
        if !mesh.links.is_up(peer.id) {
            mesh.strikes = Strikes::default();
            let (peer, hello) = (peer.clone(), Box::new(hello.clone()));
            let transport = Transport::Quic;
            mesh.handle(world.now, Input::LinkUp { peer, hello, transport, dialled: true });
        }
        mesh.handle(world.now, Input::Frame { from: peer.id, bytes: bytes.into(), rtt: MS });
        while mesh.poll_output().is_some() {}
        world.now += 5 * MS;
        if round % 4 == 0 {
            mesh.handle(world.now, Input::Tick);
        }
    }
    assert!(quarantines(&world) >= 1);
    assert!(world.mesh(0).cards.all().count() <= 3);
    check(&world);
}

#[test]
fn two_regions_hear_of_each_other_by_their_relays() {
    let mut world = World::new(4);
    for i in 0..6 {
        world.add(&format!("eu/e{i}"));
    }
    for i in 0..6 {
        world.add(&format!("us/u{i}"));
    }
    world.run(30 * S);
    assert!(world.converged(&all(6)));
    assert!(world.converged(&(6..12).collect::<Vec<_>>()));
    let relays = |at: usize| world.mesh(at).status(world.now).relays;
    for at in 0..12 {
        assert_eq!(relays(at), relays(at / 6 * 6));
        assert_eq!(relays(at).len(), 3);
        let other = if at < 6 { "us" } else { "eu" };
        let of_other = |event: &Event| {
            matches!(event, Event::Region(view) if view.region.as_str() == other
                && view.offers.iter().any(|offer| offer.slots == 6 * 64 && offer.free == 6 * 61))
        };
        assert!(world.when(at, of_other).is_some(), "{at}");
        let ages = world.mesh(at).status(world.now).regions;
        assert!(ages.iter().any(|(region, age)| region.as_str() == other && *age < S), "{ages:?}");
    }
    check(&world);
}

#[test]
fn a_region_whose_relay_dies_is_still_heard_of() {
    let mut world = World::new(4);
    for i in 0..5 {
        world.add(&format!("eu/e{i}"));
    }
    for i in 0..5 {
        world.add(&format!("us/u{i}"));
    }
    world.run(30 * S);
    let relay = world.mesh(0).relaying.ours()[0];
    let relay = (0..5).find(|at| world.id(*at) == relay).unwrap();
    world.kill(relay);
    world.run(30 * S);
    let alive: Vec<_> = (0..10).filter(|at| *at != relay).collect();
    for at in alive {
        let other = if at < 5 { "us" } else { "eu" };
        let ages = world.mesh(at).status(world.now).regions;
        assert!(
            ages.iter().any(|(region, age)| region.as_str() == other && *age < S),
            "{at} {ages:?}"
        );
    }
    for at in 5..10 {
        assert!(world.mesh(at).relay.as_ref().is_none_or(|r| !r.is_active(world.id(relay))));
    }
    check(&world);
}

#[test]
fn whichever_relay_dies_its_region_is_never_out_of_sight() {
    for rank in 0..3 {
        let mut world = World::new(rank as u64);
        world.loss = 0.01;
        for i in 0..15 {
            world.add(&format!("{}/n{i}", ["eu", "us", "ap"][i % 3]));
        }
        world.run(40 * S);
        let relay = world.mesh(0).relaying.ours()[rank];
        let relay = (0..15).find(|at| world.id(*at) == relay).unwrap();
        // It is missed only when its links are.
        world.pause(relay);
        let mut oldest = Duration::ZERO;
        for _ in 0..3_000 {
            world.run(10 * MS);
            for at in (0..15).filter(|at| *at != relay) {
                let ages = world.mesh(at).status(world.now).regions;
                oldest = ages.iter().map(|(_, age)| *age).fold(oldest, Duration::max);
            }
        }
        assert!(oldest < 1_500 * MS, "rank {rank}: {oldest:?}");
    }
}

#[test]
fn a_region_may_lose_more_relays_than_it_has_places_for() {
    let mut world = World::new(3);
    world.add("us/u0");
    for i in 0..3 {
        world.add(&format!("eu/e{i}"));
    }
    world.run(20 * S);
    for lost in 1..12 {
        world.add(&format!("eu/e{}", lost + 2));
        world.run(5 * S);
        world.kill(lost);
        world.run(25 * S);
    }
    assert_eq!(world.mesh(0).relay.as_ref().unwrap().active(), 3);
}

#[test]
fn a_region_whose_relays_start_anew_one_after_another_is_never_out_of_sight() {
    let mut world = World::new(5);
    for i in 0..6 {
        world.add(&format!("eu/n{i}"));
    }
    let lone = world.add("us/n9");
    world.run(20 * S);
    for rank in 0..3 {
        let relay = world.mesh(0).relaying.ours()[rank];
        let at = (0..6).find(|at| world.id(*at) == relay).unwrap();
        let name = format!("eu/n{at}");
        world.input(at, Input::Leave);
        let mut oldest = Duration::ZERO;
        for step in 0..600 {
            world.run(10 * MS);
            match step {
                30 => world.kill(at),
                100 => drop(world.add(&name)),
                _ => {}
            }
            let ages = world.mesh(lone).status(world.now).regions;
            oldest = ages.iter().map(|(_, age)| *age).fold(oldest, Duration::max);
        }
        assert!(oldest < 1_200 * MS, "rank {rank}: {oldest:?}");
        world.run(20 * S);
    }
}

#[test]
fn the_first_word_of_a_region_is_of_all_it_has() {
    for seed in 0..20 {
        let mut world = World::new(seed);
        for i in 0..1 + seed % 3 {
            world.add(&format!("eu/n{i}"));
        }
        world.run(seed as u32 * 200 * MS);
        let lone = world.add("us/n9");
        world.run(10 * S);
        let views = world.nodes[lone].events.iter().filter_map(|(at, event)| match event {
            Event::Region(view) if view.region.as_str() == "eu" => Some((at, view)),
            _ => None,
        });
        let views: Vec<_> = views.collect();
        let (at, last) = views.last().unwrap();
        let slots = |view: &RegionView| view.offers.iter().map(|o| o.slots).sum::<u32>();
        assert!(slots(last) > 0, "{last:?}");
        for (when, view) in &views {
            assert_eq!(slots(view), slots(last), "seed {seed}, {:?} before", **at - **when);
        }
    }
}

#[test]
fn who_is_alone_in_its_region_soon_hears_of_others() {
    let mut took = Vec::new();
    for seed in 0..20 {
        let mut world = World::new(seed);
        for i in 0..3 {
            world.add(&format!("eu/n{i}"));
        }
        world.run(20 * S);
        let lone = world.add("us/n3");
        let began = world.now;
        while world.mesh(lone).links.up.is_empty() {
            world.run(10 * MS);
        }
        world.run(100 * MS);
        assert!(world.mesh(lone).relay.is_none());
        assert_eq!(
            world.mesh(lone).cards(9).len(),
            1,
            "it finds the others again without its seed"
        );
        while world.mesh(lone).status(world.now).regions.is_empty() {
            world.run(10 * MS);
            assert!(world.now < began + 10 * S, "seed {seed}");
        }
        took.push(world.now - began);
    }
    assert!(took.iter().all(|took| *took < 2 * S), "{took:?}");
}

/// What a node of version 1 said, byte by byte.
fn recorded(hex: &str) -> Vec<u8> {
    let digits: Vec<_> = hex.trim().chars().map(|c| c.to_digit(16).unwrap()).collect();
    digits.chunks(2).map(|pair| u8::try_from(pair[0] * 16 + pair[1]).unwrap()).collect()
}

struct Old {
    peer: Peer,
    hello: Box<Hello>,
    descriptor: Bytes,
    load: Bytes,
}

fn old() -> Old {
    let hello = recorded(include_str!("fixtures/version_1_hello.hex"));
    let Ok(Frame::Hello(hello)) = crate::decode(&hello) else { panic!("a hello") };
    let id = id_of("eu/old");
    Old {
        peer: Peer { id, node: hello.node.clone(), region: hello.region.clone() },
        hello: Box::new(hello),
        descriptor: recorded(include_str!("fixtures/version_1_descriptor.hex")).into(),
        load: recorded(include_str!("fixtures/version_1_load.hex")).into(),
    }
}

fn outputs(mesh: &mut Mesh<impl Judge>) -> Vec<Output> {
    std::iter::from_fn(|| mesh.poll_output()).collect()
}

#[test]
fn a_listed_node_of_version_one_is_listened_to_and_told_nothing() {
    let world = World::new(1);
    let Old { peer, hello, descriptor, load } = old();
    let (mut mesh, now, from) = (world.machine("eu/n0"), world.now, peer.id);
    let address = "old:1".to_owned();
    let seed = Seed { address, peer: Some(peer.clone()), is_listed: true };
    mesh.handle(now, Input::Seeds(vec![seed.clone()]));
    let is_dial = |output: &Output| matches!(output, Output::Dial(Target::Seed(s)) if *s == seed);
    assert!(outputs(&mut mesh).iter().any(is_dial));
    let transport = Transport::Quic;
    mesh.handle(now, Input::LinkUp { peer: peer.clone(), hello, transport, dialled: true });
    for bytes in [descriptor, load] {
        mesh.handle(now, Input::Frame { from, bytes, rtt: MS });
    }
    let load = vec![Load { in_flight: 1, ..Load::default() }];
    for second in 1..60 {
        mesh.handle(now + second * S, Input::Loads { loads: load.clone(), arrivals: vec![] });
    }
    let outputs = outputs(&mut mesh);
    assert!(
        !outputs.iter().any(|output| matches!(output, Output::Send { .. } | Output::Close { .. }))
    );
    let events: Vec<_> = outputs
        .iter()
        .filter_map(|output| match output {
            Output::Event(event) => Some(event),
            _ => None,
        })
        .collect();
    let [
        Event::Legacy { peer: who, epoch },
        Event::Reachable { is: true, .. },
        Event::Described { descriptor, .. },
        Event::Load { frame, .. },
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!((who, *epoch), (&peer, 1_795_000_000_000));
    assert_eq!(descriptor.engines[0].services, ["inference.GRPCInferenceService"]);
    assert_eq!((frame.sequence, frame.engines[0].in_flight), (9, 40));
    mesh.handle(now + 60 * S, Input::LinkDown { id: from, why: String::new() });
    let after: Vec<_> = std::iter::from_fn(|| mesh.poll_output()).collect();
    assert!(matches!(
        &after[..],
        [Output::Event(Event::Reachable { is: false, .. }), Output::Dial(_)]
    ));
}

#[test]
fn a_node_of_version_one_that_dials_is_told_what_it_was_told_before_and_no_more() {
    let world = World::new(1);
    let Old { peer, hello, .. } = old();
    let (mut mesh, now, id) = (world.machine("eu/n0"), world.now, peer.id);
    let transport = Transport::Quic;
    mesh.handle(now, Input::LinkUp { peer, hello, transport, dialled: false });
    assert!(mesh.sample_interval().is_some());
    let load = vec![Load { in_flight: 1, ..Load::default() }];
    for tick in 1..300 {
        let loads = Input::Loads { loads: load.clone(), arrivals: vec![] };
        mesh.handle(now + tick * 200 * MS, loads);
    }
    let sent = outputs(&mut mesh).into_iter().filter_map(|output| match output {
        Output::Send { to, bytes, .. } if to == id => Some(crate::decode(&bytes).unwrap()),
        _ => None,
    });
    let sent: Vec<_> = sent.collect();
    assert!(matches!(sent[0], Frame::Descriptor(_)));
    assert!(sent.len() > 250);
    assert!(sent[1..].iter().all(|frame| matches!(frame, Frame::Load(_))));
}

/// What one machine takes, in a region of a thousand: measured in a process where nothing else runs, which is this test again.
#[test]
fn a_machine_with_a_thousand_members_is_small() {
    const ALONE: &str = "MEMBERSHIP_TEST_RUNS_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return measure_memory();
    }
    let mut test = std::process::Command::new(std::env::current_exe().unwrap());
    let name = "mesh::tests::a_machine_with_a_thousand_members_is_small";
    test.args(["--exact", name, "--nocapture"]).env(ALONE, "1");
    let output = test.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("KB per machine"), "{said}");
}

fn measure_memory() {
    const MACHINES: usize = 40;
    let mut world = World::new(5);
    world.add("eu/n0");
    let facts = world.mesh(0).card.facts.clone();
    let cards: Vec<_> = (1..=1000)
        .map(|i| {
            let facts = Facts { gossip: format!("n{i}:1"), ..facts.clone() };
            sign(&format!("eu/m{i}"), &encode_card(&facts))
        })
        .collect();
    let now = world.now;
    let mut machines: Vec<_> = (0..MACHINES).map(|i| world.machine(&format!("eu/k{i}"))).collect();
    let (peer, hello) = (world.nodes[0].peer(), world.hello(0));
    let fill = |mesh: &mut Mesh<_>| {
        let (peer, hello) = (peer.clone(), Box::new(hello.clone()));
        let from = peer.id;
        let transport = Transport::Quic;
        mesh.handle(now, Input::LinkUp { peer, hello, transport, dialled: true });
        for batch in cards.chunks(100) {
            let bytes = encode(&Frame::Cards(Pool::Region, batch.to_vec())).into();
            mesh.handle(now, Input::Frame { from, bytes, rtt: MS });
        }
        for second in 1..20 {
            mesh.handle(now + second * S, Input::Tick);
            while mesh.poll_output().is_some() {}
        }
    };
    // The first takes what is shared.
    fill(&mut machines[0]);
    assert_eq!(machines[0].region.active(), 1001);
    let before = resident_bytes();
    machines.iter_mut().skip(1).for_each(fill);
    let each = (resident_bytes() - before) / (MACHINES - 1);
    println!("{} KB per machine", each >> 10);
    assert!(each < 300 << 10, "{each} bytes");
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn a_paused_node_comes_back_by_itself_and_calls_nobody_down() {
    let mut world = mesh_of(5);
    world.run(10 * S);
    world.pause(3);
    world.run(12 * S);
    assert_eq!(world.sees(0, 3), Liveness::Down);
    world.resume(3, 12 * S);
    world.run(10 * S);
    assert!(world.converged(&all(5)));
    assert_eq!(false_downs(&world, &[3]), 0);
    assert_eq!(quarantined(&world, 0), []);
    check(&world);
}

#[test]
fn a_node_that_moves_is_found_where_its_card_says() {
    let mut world = mesh_of(4);
    world.run(5 * S);
    world.kill(1);
    world.run(15 * S);
    assert_eq!(world.sees(2, 1), Liveness::Down);
    let moved = world.add_at("eu/n1", 101);
    world.run(5 * S);
    assert!(world.converged(&[0, 2, 3, moved]));
    let address = format!("n{moved}:1");
    assert_eq!(world.mesh(3).cards.get(world.id(1)).unwrap().facts.gossip, address);
}

#[test]
fn a_node_that_is_no_relay_any_more_leaves_their_pool_and_lives() {
    let mut world = World::new(8);
    for i in 0..3 {
        world.add(&format!("eu/e{i}"));
        world.add(&format!("us/u{i}"));
    }
    world.run(20 * S);
    assert!((0..6).all(|at| world.mesh(at).relay.as_ref().is_some_and(|r| r.active() == 5)));
    // More come, until some of those rank no more.
    let mut names = 3..;
    let is_old = |world: &World, id: &NodeId| (0..6).any(|at| world.id(at) == *id);
    while world.mesh(0).relaying.ours().iter().all(|id| is_old(&world, id)) {
        world.add(&format!("eu/e{}", names.next().unwrap()));
        world.run(3 * S);
    }
    world.run(40 * S);
    let is_relay = |at: &usize| world.mesh(*at).relay.is_some();
    let relays: Vec<_> = (0..world.nodes.len()).filter(is_relay).collect();
    assert_eq!(relays.len(), 6);
    for at in &relays {
        assert_eq!(world.mesh(*at).relay.as_ref().unwrap().active(), 5);
    }
    assert_eq!(false_downs(&world, &[]), 0);
    check(&world);
}
