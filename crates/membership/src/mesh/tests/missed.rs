//! News that never comes: what a node does about it.

use foca::{Header, Member, Message, State, Timer};

use super::{
    super::*,
    mesh_of,
    world::{MS, S, Toy, World},
};
use crate::{decode, swim::Packet};

/// Nodes that have found each other.
fn grown(n: usize) -> World {
    let mut world = mesh_of(n);
    world.run(10 * S);
    world
}

/// The cards a node has sent since the last look.
fn cards_sent(mesh: &mut Mesh<Toy>) -> Vec<Vec<u8>> {
    let sent = std::iter::from_fn(|| mesh.poll_output());
    let frames = sent.filter_map(|output| match output {
        Output::Send { bytes, .. } => decode(&bytes).ok(),
        _ => None,
    });
    frames
        .filter_map(|f| if let Frame::Cards(_, cards) = f { Some(cards) } else { None })
        .flatten()
        .collect()
}

#[test]
fn whoever_knows_something_else_gets_the_cards_of_that_part() {
    let mut world = grown(12);
    let sums = world.mesh(0).sums(4);
    assert!((1..12).all(|other| world.mesh(other).sums(4) == sums), "all know the same");
    let (now, from) = (world.now + 11 * S, world.id(1));
    let mesh = world.nodes[0].mesh.as_mut().unwrap();
    let mut of_parts = [0; 4];
    for id in mesh.region.all().map(|(id, _)| id).chain([mesh.own.id]) {
        of_parts[usize::from(id.0[1]) % 4] += 1;
    }
    mesh.hear_cards_compare(now, from, &sums);
    assert_eq!(cards_sent(mesh).len(), 0);
    let part = of_parts.iter().position(|count| *count > 0).unwrap();
    let mut other = sums;
    other[part] ^= 1;
    mesh.hear_cards_compare(now + S, from, &other);
    assert_eq!(cards_sent(mesh).len(), 0, "it has just been compared");
    mesh.hear_cards_compare(now + 3 * S, from, &other);
    assert_eq!(cards_sent(mesh).len(), of_parts[part]);
    mesh.hear_cards_compare(now + 6 * S, from, &other);
    assert_eq!(cards_sent(mesh).len(), 0, "it has just been given some");
}

#[test]
fn a_node_that_was_missed_is_known_soon() {
    let mut world = grown(12);
    let id = world.id(5);
    // They do not hear each other, so that nobody but the others can tell.
    world.part(&[0], &[5]);
    world.run(2 * S);
    let mesh = world.nodes[0].mesh.as_mut().unwrap();
    let pair = mesh.region.seen(id).unwrap().pair(id);
    mesh.region.apply(Member::down(pair), false);
    mesh.region.timer(Timer::RemoveDown(pair));
    mesh.settle(world.now, Pool::Region);
    assert!(mesh.cards.get(id).is_none());
    let forgotten = world.now;
    world.run(7 * S);
    let is_member = |event: &Event| matches!(event, Event::Member(card) if card.id == id);
    let known =
        world.nodes[0].events.iter().filter(|(at, event)| *at > forgotten && is_member(event));
    assert_eq!(known.count(), 1);
}

/// A machine that knows three others, of which it hears two: the third was called suspect, and then nobody said anything more.
#[test]
fn whoever_stays_suspected_is_looked_after() {
    let mut world = grown(4);
    let (pairs, hello) = ([1, 2, 3].map(|i| world.mesh(i).card.pair()), world.hello(1));
    let peer = world.nodes[1].peer();
    let start = world.now;
    let mesh = world.nodes[0].mesh.as_mut().unwrap();
    let [one, _, third] = pairs;
    // It does not probe by itself.
    mesh.hold = Some(start + 3600 * S);
    let why = "it is gone".to_owned();
    mesh.doubts.has_blamed(start, third.id);
    mesh.handle(start, Input::LinkDown { id: third.id, why });
    let header =
        Header { src: one, src_incarnation: 0, dst: mesh.card.pair(), message: Message::Gossip };
    let packet = Packet { header, updates: vec![Member::new(third, 0, State::Suspect)] }.write();
    let said = encode(&Frame::Swim(Pool::Region, packet));
    mesh.handle(start, Input::Frame { from: one.id, bytes: said.into(), rtt: MS });
    assert_eq!(mesh.region.seen(third.id).unwrap().state, State::Suspect);
    let mut down = None;
    for step in 1..300 {
        let now = start + step * 100 * MS;
        // The other goes on speaking, so that this one is not alone.
        let bytes = encode(&Frame::Hello(hello.clone())).into();
        mesh.handle(now, Input::Frame { from: peer.id, bytes, rtt: MS });
        while let Some(output) = mesh.poll_output() {
            match output {
                Output::Dial(target) => {
                    mesh.handle(now, Input::DialFailed { target, why: "no answer".to_owned() });
                }
                Output::Event(Event::Down { id, .. }) if id == third.id => {
                    down.get_or_insert(now);
                }
                _ => {}
            }
        }
    }
    let after = down.expect("it is down in the end") - start;
    assert!(after > 3 * S && after < 15 * S, "{after:?}");
}

/// It knows best: one who has died would be said to live by whoever heard it last.
#[test]
fn whoever_is_suspected_is_told_so_by_those_it_is_linked_with_and_answers_for_itself() {
    let mut world = grown(6);
    let (third, state) = (world.id(3), |world: &World, at: usize| {
        let seen = *world.mesh(at).region.seen(world.id(3)).unwrap();
        (seen.state, seen.incarnation)
    });
    let mesh = world.nodes[0].mesh.as_mut().unwrap();
    let pair = mesh.region.seen(third).unwrap().pair(third);
    mesh.region.apply(Member::new(pair, 0, State::Suspect), false);
    mesh.settle(world.now, Pool::Region);
    assert_eq!(state(&world, 0), (State::Suspect, 0));
    // Sooner than anybody is probed.
    world.run(200 * MS);
    assert!([0, 1, 2, 4, 5].iter().all(|at| state(&world, *at) == (State::Alive, 1)));
    world.kill(3);
    world.run(2 * S);
    assert!([0, 1, 2, 4, 5].iter().all(|at| state(&world, *at) == (State::Suspect, 1)));
}

#[test]
fn whoever_is_suspected_again_and_again_is_told_once_a_second() {
    let mut world = grown(4);
    let (start, third) = (world.now, world.id(3));
    let mesh = world.nodes[0].mesh.as_mut().unwrap();
    let pair = mesh.region.seen(third).unwrap().pair(third);
    let told = |mesh: &mut Mesh<Toy>, now: Instant, incarnations: std::ops::Range<u16>| {
        for incarnation in incarnations {
            mesh.region.apply(Member::new(pair, incarnation, State::Suspect), false);
            mesh.settle(now, Pool::Region);
        }
        let sent = std::iter::from_fn(|| mesh.poll_output());
        let said = sent.filter_map(|output| match output {
            Output::Send { to, bytes, .. } if to == third => decode(&bytes).ok(),
            _ => None,
        });
        let is_doubt =
            |update: &Member<crate::Pair>| *update.id() == pair && update.state() == State::Suspect;
        let warns = |packet: &Packet| packet.updates.iter().any(is_doubt);
        said.filter(|frame| {
            matches!(frame, Frame::Swim(_, packet) if Packet::read(packet).is_ok_and(|p| warns(&p)))
        })
        .count()
    };
    assert_eq!(told(mesh, start, 0..10), 1);
    assert_eq!(told(mesh, start + 999 * MS, 10..20), 0);
    assert_eq!(told(mesh, start + S, 20..30), 1);
}
