//! What the machine does among others, in a network in memory.

use std::time::Duration;

use super::{
    world::{MS, S, World, descriptor},
    *,
};

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
