//! What members say and do, and what the board then says of them.

use std::{collections::BTreeMap, time::Duration};

use balance::{Place, Server, Standing};
use base::{Load, NodeName, RegionName};
use membership::{
    Candidate, Card, Descriptor, EngineDescriptor, Event, Facts, LoadFrame, NodeId, Peer,
    RegionOffer, RegionView,
};

use super::*;
use crate::{model::Wanted, offer::Ask};

const MS: Duration = Duration::from_millis(1);
const RTT: Duration = Duration::from_millis(10);

fn ask() -> Ask {
    let wanted = Wanted::Model("llama".parse().unwrap());
    Ask { path: "/inference.GRPCInferenceService/ModelInfer".into(), wanted }
}

fn name(node: &str, region: &str) -> PeerName {
    PeerName { node: node.parse().unwrap(), region: region.parse().unwrap() }
}

fn id(board: &Board, node: &str, region: &str) -> NodeId {
    board.id(&name(node, region))
}

fn card(board: &Board, node: &str, region: &str, epoch: u64, address: &str) -> Event {
    let facts = Facts {
        epoch,
        bump: 0,
        peers: address.into(),
        gossip: address.into(),
        zone: None,
        descriptor: [0; 32],
        release: "1".into(),
        protocol_max: 2,
    };
    let PeerName { node, region } = name(node, region);
    let id = board.id(&PeerName { node: node.clone(), region: region.clone() });
    Event::Member(Arc::new(Card { id, node, region, facts, signed: [].into() }))
}

fn descriptor(models: &[&str], engine_id: Option<&str>) -> Arc<Descriptor> {
    let engine = EngineDescriptor {
        name: "gpu-0".parse().unwrap(),
        protocol: "kserve-v2".into(),
        models: models.iter().map(|model| model.parse().unwrap()).collect(),
        services: vec![],
        id: engine_id.map(|id| id.parse().unwrap()),
        slots: Some(64),
    };
    Arc::new(Descriptor { version: 1, engines: vec![engine] })
}

fn load(in_flight: u32, sequence: u64) -> LoadFrame {
    LoadFrame {
        epoch: 1,
        sequence,
        descriptor_version: 1,
        sample_age: Duration::ZERO,
        next: 200 * MS,
        draining: false,
        engines: vec![Load { in_flight, slots: Some(64), ..Load::default() }],
        arrivals: vec![],
    }
}

fn described(id: NodeId, descriptor: Arc<Descriptor>) -> Event {
    Event::Described { id, epoch: 1, descriptor }
}

/// A member of region us that serves llama and has said how pressed it is.
fn joined(board: &Board, node: &str) -> NodeId {
    let id = id(board, node, "us");
    board.apply(&card(board, node, "us", 1, &format!("{node}.test:8444")));
    board.apply(&Event::Reachable { id, is: true });
    board.apply(&described(id, descriptor(&["llama"], None)));
    board.apply(&Event::Load { id, frame: Box::new(load(4, 1)), rtt: RTT });
    id
}

fn servers(board: &Board) -> Vec<Server> {
    board.servers(&ask()).into_iter().map(|(server, _)| server).collect()
}

fn standings(board: &Board) -> Vec<Standing> {
    servers(board).into_iter().map(|server| server.standing).collect()
}

fn place(server: &Server) -> (usize, Option<usize>) {
    match server.place {
        Place::Peer { node, engine } => (node, engine),
        own @ Place::Own(_) => panic!("{own:?}"),
    }
}

fn address_of(board: &Board, place: usize) -> Option<String> {
    board.state.lock().get(place)?.address.as_ref().map(ToString::to_string)
}

fn candidate(node: &str, free: u32) -> Candidate {
    let peers = format!("{node}.test:8444");
    Candidate { node: node.parse::<NodeName>().unwrap(), peers, free, slots: 64 }
}

fn region(region: &str, sampled: Instant, free: u32, candidates: Vec<Candidate>) -> Event {
    region_of(region, sampled, vec![offer("llama", free, candidates)])
}

fn offer(model: &str, free: u32, candidates: Vec<Candidate>) -> RegionOffer {
    RegionOffer {
        model: Some(model.parse().unwrap()),
        protocol: "kserve-v2".into(),
        free,
        slots: 128,
        drain_rate: 8.0,
        wait: (Duration::ZERO, Duration::ZERO),
        kv_free: None,
        candidates,
    }
}

fn region_of(region: &str, sampled: Instant, offers: Vec<RegionOffer>) -> Event {
    let region: RegionName = region.parse().unwrap();
    Event::Region(Arc::new(RegionView { region, sampled, offers }))
}

#[test]
fn what_relays_say_of_thousands_of_models_is_remembered_up_to_a_bound() {
    let board = Board::of_test(&[]);
    // However long this takes, it is not too old.
    let now = clock::now() + Duration::from_secs(60);
    for round in 0..10 {
        let candidates: Vec<_> = (0..8).map(|n| candidate(&format!("c-{round}-{n}"), 8)).collect();
        let offers = (0..1_000).map(|m| offer(&format!("m-{round}-{m}"), 64, candidates.clone()));
        board.apply(&region_of("eu", now, offers.collect()));
    }
    let ask = |model: &str| Ask {
        path: "/inference.GRPCInferenceService/ModelInfer".to_owned(),
        wanted: Wanted::Model(model.parse().unwrap()),
    };
    assert_eq!(board.servers(&ask("m-0-1")).len(), 8);
    assert_eq!(board.servers(&ask("m-0-999")).len(), 0, "a node is named for no more than 512");
    assert_eq!(board.servers(&ask("m-9-1")).len(), 0, "nor is a region for more than 8,192");
    board.apply(&region_of("ap", now, vec![offer("m-9-1", 64, vec![candidate("e", 8)])]));
    assert_eq!(board.servers(&ask("m-9-1")).len(), 1, "which leaves room for others");
    // What is not said again makes room.
    let later = now + Duration::from_secs(4);
    board.state.lock().sweep(later);
    board.apply(&region_of("eu", later, vec![offer("m-9-1", 64, vec![candidate("d", 8)])]));
    assert_eq!(board.servers(&ask("m-9-1")).len(), 1);
}

#[test]
fn a_listed_peer_is_tried_until_it_is_heard_and_keeps_the_address_it_is_listed_with() {
    let board = Board::of_test(&["b", "c"]);
    assert_eq!(board.unknown(&[], true), None, "it will speak");
    assert_eq!(board.unknown(&[], false), Some(0));
    assert_eq!(board.unknown(&[Place::Peer { node: 0, engine: None }], false), Some(1));
    assert!(board.may_serve(&ask()) && board.has_undescribed());
    let b = id(&board, "b", "us");
    board.apply(&card(&board, "b", "us", 1, "elsewhere.test:1"));
    assert_eq!(address_of(&board, 0).as_deref(), Some("b.test:8444"));
    board.apply(&Event::Reachable { id: b, is: true });
    board.apply(&described(b, descriptor(&["llama"], None)));
    board.apply(&Event::Load { id: b, frame: Box::new(load(4, 1)), rtt: RTT });
    assert_eq!(board.unknown(&[], false), Some(1));
    assert_eq!(place(&servers(&board)[0]), (0, Some(0)));
    assert!(board.has_models());
}

#[test]
fn who_alone_said_that_it_serves_a_call_is_waited_for_a_minute_when_it_is_gone() {
    let board = Board::of_test(&[]);
    board.apply(&card(&board, "b", "us", 1, "b.test:1"));
    let b = id(&board, "b", "us");
    board.apply(&described(b, descriptor(&["llama"], None)));
    board.apply(&Event::Load { id: b, frame: Box::new(load(4, 1)), rtt: RTT });
    for left in [false, true] {
        board.apply(&Event::Down { id: b, left });
        let known_after = |seconds| {
            let (mut known, now) = (0, clock::now() + Duration::from_secs(seconds));
            board.state.lock().get(0).unwrap().servers(0, &ask(), now, |_, _| known += 1);
            known
        };
        assert_eq!([0, 58, 61].map(known_after), [1, 1, 0]);
        board.apply(&card(&board, "b", "us", 2 + u64::from(left), "b.test:1"));
        assert_eq!(known_after(61), 1, "it is back");
    }
}

#[test]
fn a_listed_peer_that_speaks_before_it_says_what_it_serves_is_still_tried() {
    let board = Board::of_test(&["a"]);
    let id = id(&board, "a", "us");
    board.apply(&card(&board, "a", "us", 1, "a.test:8444"));
    board.apply(&Event::Reachable { id, is: true });
    board.apply(&Event::Load { id, frame: Box::new(load(4, 1)), rtt: RTT });
    assert_eq!((servers(&board), board.unknown(&[], false)), (vec![], Some(0)));
    board.apply(&described(id, descriptor(&["llama"], None)));
    assert_eq!((servers(&board).len(), board.unknown(&[], false)), (1, None));
}

#[test]
fn a_member_is_a_server_while_it_can_be_reached_and_is_alive() {
    let board = Board::of_test(&[]);
    let b = joined(&board, "b");
    assert_eq!(servers(&board)[0].free, 60.0);
    assert_eq!(standings(&board), [Standing::Usable]);
    let changes: [(Event, Standing); 7] = [
        (Event::Suspected { id: b, is: true }, Standing::Usable),
        (Event::Reachable { id: b, is: false }, Standing::Down),
        (Event::Reachable { id: b, is: true }, Standing::Usable),
        (Event::Down { id: b, left: false }, Standing::Down),
        (card(&board, "b", "us", 1, "b.test:8444"), Standing::Down),
        (card(&board, "b", "us", 2, "b.test:8444"), Standing::Usable),
        (Event::Down { id: b, left: true }, Standing::Down),
    ];
    for (event, want) in changes {
        board.apply(&event);
        assert_eq!(standings(&board), [want], "{event:?}");
    }
    assert!(!board.may_serve(&ask()), "it has left");
    board.apply(&Event::Forgotten(b));
    assert!(servers(&board).is_empty() && !board.has_models());
}

#[test]
fn a_member_in_quarantine_is_out_until_it_is_reached_again() {
    let board = Board::of_test(&[]);
    let b = joined(&board, "b");
    let PeerName { node, region } = name("b", "us");
    let until = clock::now() + Duration::from_secs(60);
    let peer = Peer { id: b, node, region };
    board.apply(&Event::Quarantined { peer, until, why: "it lied".into() });
    board.apply(&Event::Load { id: b, frame: Box::new(load(4, 2)), rtt: RTT });
    assert_eq!(standings(&board), [Standing::Down]);
    board.apply(&Event::Reachable { id: b, is: true });
    assert_eq!(standings(&board), [Standing::Usable]);
}

#[test]
fn a_forgotten_peer_that_is_listed_is_unknown_again_and_its_calls_in_progress_do_no_harm() {
    let board = Arc::new(Board::of_test(&["b"]));
    let b = joined(&board, "b");
    let (place, engine) = place(&servers(&board)[0]);
    let way = board.way(place).unwrap();
    let now = clock::now();
    let begun = board.began(place, way, engine, &ask(), now).unwrap();
    let at = super::super::board::At { place, generation: begun.generation };
    board.apply(&Event::Forgotten(b));
    assert_eq!(board.unknown(&[], false), Some(0));
    let begun = board.began(place, way, None, &ask(), now).unwrap();
    assert_ne!(begun.generation, at.generation);
    let over = super::super::board::Over { at, engine, began: now, counted: true };
    board.ended(over);
    board.broken(at, now, true);
    assert_eq!(board.state.lock().get(place).unwrap().in_flight, 1);
}

#[test]
fn a_place_goes_to_another_only_after_a_rest() {
    let (mut state, now) = (State::default(), clock::now());
    let of = |n: u8| NodeId([n; 16]);
    let who = name("b", "us");
    assert_eq!(state.entry(of(1), &who, now).unwrap().0, 0);
    let generation = state.get(0).unwrap().generation;
    state.remove(0, now);
    assert_eq!(state.entry(of(2), &who, now + 29_999 * MS).unwrap().0, 1);
    assert_eq!(state.entry(of(3), &who, now + 30_000 * MS).unwrap().0, 0);
    assert!(state.at(super::super::board::At { place: 0, generation }).is_none());
}

#[test]
fn who_relays_name_is_a_server_as_far_as_its_region_has_room_less_what_was_sent_there() {
    let board = Board::of_test(&[]);
    let now = clock::now();
    let (roomy, scarce) = (candidate("c", 40), candidate("d", 8));
    board.apply(&region("ap", now, 20, vec![roomy, scarce]));
    let mut free: Vec<f64> = servers(&board).iter().map(|server| server.free).collect();
    free.sort_by(f64::total_cmp);
    assert_eq!(free, [8.0, 20.0]);
    assert_eq!(standings(&board), [Standing::Usable; 2]);
    let (place, engine) = place(&servers(&board)[0]);
    let before = servers(&board)[0].free;
    let (way, sent) = (board.way(place).unwrap(), clock::now());
    let begun = board.began(place, way, engine, &ask(), sent).unwrap();
    assert_eq!(servers(&board)[0].free, before - 1.0);
    assert_eq!(begun.suited, [engine.unwrap()]);
    // It refused: no room, until a later digest says otherwise.
    let at = super::super::board::At { place, generation: begun.generation };
    board.busy(at, &begun.suited);
    assert!(servers(&board)[0].free < 1.0);
    board.apply(&region("ap", clock::now(), 20, vec![candidate("c", 40), candidate("d", 8)]));
    assert!(servers(&board)[0].free >= 8.0);
    assert_eq!(address_of(&board, place).unwrap().split_once(':').unwrap().1, "8444");
    assert!(board.has("llama") && board.has_models());
}

#[test]
fn what_relays_say_counts_for_three_seconds() {
    for (age_ms, want) in [(900, 20.0), (2_000, 10.0), (3_001, 0.0)] {
        let board = Board::of_test(&[]);
        let sampled = clock::now() - age_ms * MS;
        board.apply(&region("ap", sampled, 20, vec![candidate("c", 40)]));
        let free = servers(&board).first().map_or(0.0, |server| server.free);
        assert!((free - want).abs() < 1.0, "{age_ms}: {free}");
    }
}

#[test]
fn what_a_member_says_itself_comes_before_what_relays_say() {
    let board = Board::of_test(&[]);
    joined(&board, "b");
    board.apply(&region("us", clock::now(), 128, vec![candidate("b", 1), candidate("c", 1)]));
    let free: Vec<f64> = servers(&board).iter().map(|server| server.free).collect();
    assert_eq!(free, [60.0, 1.0]);
}

#[test]
fn relays_are_not_believed_about_who_was_lost_unless_they_say_so_much_later() {
    let board = Board::of_test(&[]);
    let b = joined(&board, "b");
    board.state.lock().of(b).unwrap().1.view = membership::View::default();
    board.apply(&Event::Reachable { id: b, is: false });
    let lost = clock::now();
    board.apply(&region("us", lost + 4_000 * MS, 20, vec![candidate("b", 9)]));
    assert!(servers(&board).is_empty());
    board.apply(&region("us", lost + 6_000 * MS, 20, vec![candidate("b", 9)]));
    assert_eq!(standings(&board), [Standing::Usable]);
    board.apply(&Event::Down { id: b, left: false });
    assert!(servers(&board).is_empty());
}

#[test]
fn relays_say_nothing_of_this_node_and_fill_no_more_than_their_part_of_the_board() {
    let board = Board::of_test(&[]);
    let now = clock::now();
    board.apply(&region("eu", now, 20, vec![candidate("a", 9)]));
    assert!(servers(&board).is_empty(), "this node is a");
    for i in 0..300 {
        board.apply(&region("ap", now, 20, vec![candidate(&format!("n{i}"), 9)]));
    }
    assert_eq!(servers(&board).len(), 256);
    // Those of which nothing is said any more make room.
    let mut state = board.state.lock();
    assert!(!state.make_room(now + 2_000 * MS) && state.make_room(now + 4_000 * MS));
    assert_eq!(state.places.len(), 255);
}

#[test]
fn where_a_region_is_full_that_is_known_although_nobody_there_is() {
    let board = Board::of_test(&[]);
    board.apply(&region("ap", clock::now(), 0, vec![]));
    let loads = board.regions(&ask());
    assert_eq!((loads[0].free(), loads[0].drain_rate), (0, 8.0));
    assert_eq!(board.have("llama"), [(crate::offer::Has::Yes, Standing::Usable)]);
}

#[test]
fn who_moves_is_reached_another_way() {
    let board = Board::of_test(&[]);
    joined(&board, "b");
    let (place, _) = place(&servers(&board)[0]);
    let way = board.way(place).unwrap();
    board.apply(&card(&board, "b", "us", 2, "b.test:8444"));
    assert_eq!(board.way(place), Some(way));
    board.apply(&card(&board, "b", "us", 3, "new.test:8444"));
    assert_ne!(board.way(place), Some(way));
    assert!(board.began(place, way, None, &ask(), clock::now()).is_none());
}

#[test]
fn a_node_of_version_1_is_greeted_by_its_process_and_needs_no_card() {
    let board = Board::of_test(&["b"]);
    let PeerName { node, region } = name("b", "us");
    let peer = Peer { id: id(&board, "b", "us"), node, region };
    board.apply(&Event::Legacy { peer: peer.clone(), epoch: 1 });
    board.apply(&Event::Reachable { id: peer.id, is: true });
    board.apply(&described(peer.id, descriptor(&["llama"], None)));
    board.apply(&Event::Load { id: peer.id, frame: Box::new(load(4, 1)), rtt: RTT });
    assert_eq!(standings(&board), [Standing::Usable]);
    // Its clock went back.
    board.apply(&Event::Legacy { peer, epoch: 0 });
    assert!(servers(&board).is_empty());
}

#[test]
fn a_node_knows_how_pressed_others_are_once_it_has_heard_of_each_engine_and_region() {
    let board = Board::of_test(&[]);
    let is_current = || board.acquaintance().is_current;
    assert!(is_current(), "there is nobody");
    board.apply(&card(&board, "b", "eu", 1, "b.test:1"));
    let b = id(&board, "b", "eu");
    board.apply(&described(b, descriptor(&["llama"], None)));
    assert!(!is_current());
    board.apply(&Event::Reachable { id: b, is: true });
    board.apply(&Event::Load { id: b, frame: Box::new(load(4, 1)), rtt: RTT });
    assert!(is_current());
    board.apply(&card(&board, "c", "us", 1, "c.test:1"));
    assert!(!is_current());
    board.apply(&region("us", clock::now(), 0, vec![]));
    assert!(is_current());
    // One that is gone says nothing any more.
    board.apply(&card(&board, "d", "eu", 1, "d.test:1"));
    let d = id(&board, "d", "eu");
    board.apply(&described(d, descriptor(&["llama"], None)));
    assert!(!is_current());
    board.apply(&Event::Down { id: d, left: false });
    assert!(is_current());
}

#[test]
fn of_a_large_region_a_node_hears_some_only() {
    let board = Board::of_test(&[]);
    for number in 0..65 {
        let name = format!("n{number}");
        board.apply(&card(&board, &name, "eu", 1, "n.test:1"));
        board.apply(&described(id(&board, &name, "eu"), descriptor(&["llama"], None)));
    }
    for number in 0..32 {
        assert!(!board.acquaintance().is_current, "{number} of 32");
        let id = id(&board, &format!("n{number}"), "eu");
        board.apply(&Event::Load { id, frame: Box::new(load(4, 1)), rtt: RTT });
    }
    assert!(board.acquaintance().is_current);
}

#[test]
fn those_who_front_an_engine_are_the_living_of_this_region() {
    let board = Board::of_test(&[]);
    let gpu = "gpu".parse().unwrap();
    for (node, region) in [("b", "eu"), ("c", "eu"), ("d", "us")] {
        board.apply(&card(&board, node, region, 1, "x.test:1"));
        board.apply(&described(id(&board, node, region), descriptor(&["llama"], Some("gpu"))));
    }
    let (b, c) = (id(&board, "b", "eu"), id(&board, "c", "eu"));
    assert!(board.acquaintance().is_complete && !board.acquaintance().is_linked);
    board.apply(&card(&board, "e", "eu", 1, "x.test:1"));
    assert!(!board.acquaintance().is_complete, "what e serves is not known");
    let owners = |board: &Board| {
        let mut owners = board.owners(&gpu);
        owners.sort();
        owners
    };
    let mut both = vec![b, c];
    both.sort();
    assert_eq!(owners(&board), both);
    board.apply(&Event::Suspected { id: b, is: true });
    board.apply(&Event::Reachable { id: b, is: false });
    assert_eq!(owners(&board), both, "it may go on using it");
    board.apply(&Event::Down { id: b, left: false });
    assert_eq!(owners(&board), [c]);
    board.apply(&described(c, Arc::new(Descriptor { version: 2, engines: vec![] })));
    assert!(owners(&board).is_empty());
}

#[test]
fn metrics_name_the_listed_first_and_no_more_than_so_many() {
    let board = Board::of_test(&["zz"]);
    let (named, others) = board.figures();
    assert_eq!((named.len(), others), (1, None));
    for i in 0..300 {
        board.apply(&card(&board, &format!("n{i}"), "eu", 1, "x.test:1"));
    }
    let (named, others) = board.figures();
    assert_eq!((named.len(), named[0].0.node.as_str()), (256, "zz"));
    assert!(others.is_some_and(|others| others.heard.is_none() && others.present == 0));
}

#[test]
fn who_reflects_the_same_is_one_set_and_only_who_can_be_reached_is_asked() {
    let board = Board::of_test(&[]);
    let reflects = |services: &[&str]| {
        let mut descriptor = (*descriptor(&[], None)).clone();
        descriptor.engines[0].services = services.iter().map(ToString::to_string).collect();
        Arc::new(descriptor)
    };
    for (node, services) in [("b", &["q.S", "p.S"][..]), ("c", &["p.S", "q.S"]), ("d", &[])] {
        joined(&board, node);
        board.apply(&described(id(&board, node, "us"), reflects(services)));
    }
    let counts = |board: &Board| -> BTreeMap<Vec<String>, usize> {
        let sets = board.reflecting().into_iter();
        sets.map(|(services, askable)| (services.to_vec(), askable.len())).collect()
    };
    let both = vec!["p.S".to_owned(), "q.S".to_owned()];
    assert_eq!(counts(&board), [(both.clone(), 2)].into());
    board.apply(&Event::Reachable { id: id(&board, "b", "us"), is: false });
    assert_eq!(counts(&board), [(both.clone(), 1)].into());
    board.apply(&Event::Down { id: id(&board, "c", "us"), left: true });
    assert_eq!(counts(&board), [(both, 0)].into(), "it may come back");
}
