//! Which server gets the next attempt: an engine of this node with room, else one behind a peer.
//!
//! Own counts are exact, so the least utilised own engine wins. What is known of a peer's engines is a moment old, and
//! every node knows the same: picking the best would send all nodes to the same one at once (10 % busy answers at 300 ms
//! of age). Sampling by free share spreads them as the room is spread.

use rand::{Rng, RngExt as _};

/// How well a server suits a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fit {
    /// It says that it serves what is asked for.
    Well,
    /// It may; its own error will say so if not.
    Perhaps,
    /// It says what it serves, and this is not among it.
    Unlikely,
}

/// Whether a server may be sent calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It may.
    Usable,
    /// Attempts at it were broken. Asked only when no usable server has room, and too many are ejected for each of them to
    /// be at fault.
    Ejected,
    /// It fails its health checks, drains, or is silent.
    Down,
}

/// Where a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// An engine of this node, by its number.
    Own(usize),
    /// A peer, by its number, for the sake of one of its engines. Which of them runs the call is the peer's choice.
    Peer {
        /// The peer.
        node: usize,
        /// Its engine; `None`: its engines are not known.
        engine: Option<usize>,
    },
}

impl Place {
    /// Whether both are the same engine here, or the same peer.
    #[must_use]
    pub fn is_same(self, other: Self) -> bool {
        match (self, other) {
            (Self::Own(a), Self::Own(b)) => a == b,
            (Self::Peer { node: a, .. }, Self::Peer { node: b, .. }) => a == b,
            _ => false,
        }
    }
}

/// One server that could take a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Server {
    /// Where it is.
    pub place: Place,
    /// How well it suits the call.
    pub fit: Fit,
    /// Whether it may be sent calls.
    pub standing: Standing,
    /// Share of its slots in use. Used for own engines.
    pub utilisation: f64,
    /// Free slots, less the certain the older the knowledge. Below 1: none.
    pub free: f64,
    /// Calls that have probably ended since the knowledge was taken.
    pub departures: f64,
}

/// Below this share of usable servers, ejections are ignored.
const USABLE_MIN: f64 = 0.5;
/// Ejections never take more than this share of the servers, but always may take one of several.
const EJECTED_MAX: f64 = 0.3;
/// A server without free slots is asked when so many calls have probably ended there.
const DEPARTURES_MIN: f64 = 0.5;

/// The server for the next attempt; `None`: nobody has room.
///
/// Where anybody says that it serves the call, who may serve it is not asked: it would answer with an error of its own,
/// and the caller would take it for the answer.
#[must_use]
pub fn choose(servers: &[Server], rng: &mut impl Rng) -> Option<Place> {
    let best = servers.iter().map(|server| server.fit).min()?;
    choose_among(servers, best, rng)
}

fn choose_among(servers: &[Server], fit: Fit, rng: &mut impl Rng) -> Option<Place> {
    let suited = || servers.iter().filter(move |server| server.fit == fit);
    let usable = || suited().filter(|server| server.standing == Standing::Usable);
    let ejected = || suited().filter(|server| server.standing == Standing::Ejected);
    with_room(usable, rng)
        .or_else(|| if ignores_ejections(suited()) { with_room(ejected, rng) } else { None })
        .or_else(|| idle(usable(), rng))
}

/// An own server with room, else a peer's, else a peer's where calls have probably ended.
fn with_room<'a, I: Iterator<Item = &'a Server>>(
    servers: impl Fn() -> I,
    rng: &mut impl Rng,
) -> Option<Place> {
    let own = servers()
        .filter(|server| matches!(server.place, Place::Own(_)) && server.free >= 1.0)
        .min_by(|a, b| a.utilisation.total_cmp(&b.utilisation));
    if let Some(own) = own {
        return Some(own.place);
    }
    let peers = || servers().filter(|server| matches!(server.place, Place::Peer { .. }));
    sample(peers().filter(|s| s.free >= 1.0).map(|s| (s.place, s.free)), rng).or_else(|| {
        let departed = peers().filter(|s| s.departures >= DEPARTURES_MIN);
        sample(departed.map(|s| (s.place, s.departures)), rng)
    })
}

/// A server that runs nothing and still says that it has no room. It may have refused some calls for their own sake, such
/// as those with too long a message; asking it costs less than refusing one it would take.
fn idle<'a>(servers: impl Iterator<Item = &'a Server>, rng: &mut impl Rng) -> Option<Place> {
    let idle = servers.filter(|server| server.free < 1.0 && server.utilisation <= 0.0);
    sample(idle.map(|server| (server.place, 1.0)), rng)
}

/// Whether so many servers are ejected that ejections mean nothing.
fn ignores_ejections<'a>(servers: impl Iterator<Item = &'a Server>) -> bool {
    let (mut all, mut usable, mut ejected) = (0u32, 0u32, 0u32);
    for server in servers {
        all += 1;
        match server.standing {
            Standing::Usable => usable += 1,
            Standing::Ejected => ejected += 1,
            Standing::Down => {}
        }
    }
    let most = (EJECTED_MAX * f64::from(all)).max(if all > 1 { 1.0 } else { 0.0 });
    ejected > 0 && (f64::from(usable) < USABLE_MIN * f64::from(all) || f64::from(ejected) > most)
}

/// One of `weighted`, each with a probability in proportion to its weight.
fn sample<P: Copy>(weighted: impl Iterator<Item = (P, f64)>, rng: &mut impl Rng) -> Option<P> {
    // Reservoir sampling (Chao 1982): one pass, nothing kept.
    let mut total = 0.0;
    let mut chosen = None;
    for (place, weight) in weighted {
        if !weight.is_finite() || weight <= 0.0 {
            continue;
        }
        total += weight;
        if rng.random_range(0.0..total) < weight {
            chosen = Some(place);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn server(place: Place, free: f64) -> Server {
        Server {
            place,
            fit: Fit::Well,
            standing: Standing::Usable,
            utilisation: if free < 1.0 { 1.0 } else { 0.0 },
            free,
            departures: 0.0,
        }
    }

    fn own(i: usize, free: f64, utilisation: f64) -> Server {
        Server { utilisation, ..server(Place::Own(i), free) }
    }

    fn peer(i: usize, free: f64) -> Server {
        server(Place::Peer { node: i, engine: Some(0) }, free)
    }

    fn with(standing: Standing, server: Server) -> Server {
        Server { standing, ..server }
    }

    fn counts(servers: &[Server]) -> std::collections::BTreeMap<Option<usize>, u32> {
        let mut rng = StdRng::seed_from_u64(11);
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..10_000 {
            let place = choose(servers, &mut rng).map(|place| match place {
                Place::Own(i) => i,
                Place::Peer { node, .. } => 100 + node,
            });
            *counts.entry(place).or_default() += 1;
        }
        counts
    }

    #[test]
    fn an_own_engine_with_room_comes_first_and_the_least_utilised_of_them() {
        let servers = [own(0, 4.0, 0.5), own(1, 2.0, 0.4), own(2, 0.0, 0.0), peer(0, 60.0)];
        assert_eq!(counts(&servers), [(Some(1), 10_000)].into());
    }

    #[test]
    fn peers_are_sampled_by_their_free_slots_and_never_only_the_best() {
        let counts = counts(&[own(0, 0.0, 1.0), peer(0, 10.0), peer(1, 30.0), peer(2, 60.0)]);
        for (i, want) in [(100, 1_000u32), (101, 3_000), (102, 6_000)] {
            assert!(counts[&Some(i)].abs_diff(want) < want / 10, "{counts:?}");
        }
    }

    #[test]
    fn a_full_server_is_asked_once_calls_have_probably_ended_there() {
        let full = peer(0, 0.0);
        assert_eq!(counts(&[full]), [(None, 10_000)].into());
        let drained = Server { departures: 0.6, ..full };
        assert_eq!(counts(&[drained, peer(1, 0.0)]), [(Some(100), 10_000)].into());
    }

    #[test]
    fn who_serves_it_for_certain_comes_before_who_may() {
        let perhaps = Server { fit: Fit::Perhaps, ..own(0, 9.0, 0.0) };
        assert_eq!(counts(&[perhaps, peer(0, 1.0)]), [(Some(100), 10_000)].into());
        assert_eq!(
            counts(&[perhaps, peer(0, 0.0)]),
            [(None, 10_000)].into(),
            "full is not missing"
        );
        assert_eq!(counts(&[perhaps]), [(Some(0), 10_000)].into());
    }

    #[test]
    fn down_servers_are_out_in_panic_too() {
        let servers = [with(Standing::Down, own(0, 4.0, 0.0)), with(Standing::Down, peer(0, 4.0))];
        assert_eq!(counts(&servers), [(None, 10_000)].into());
    }

    #[test]
    fn one_of_two_may_be_ejected_and_more_than_half_may_not() {
        let out = |server| with(Standing::Ejected, server);
        let one = [out(peer(0, 4.0)), peer(1, 4.0)];
        assert_eq!(counts(&one), [(Some(101), 10_000)].into());
        let all = [out(peer(0, 4.0)), out(peer(1, 4.0))];
        assert_eq!(counts(&all).len(), 2, "ejections are ignored");
        let alone = [out(own(0, 4.0, 0.0))];
        assert_eq!(counts(&alone), [(Some(0), 10_000)].into());
    }

    #[test]
    fn ejected_servers_are_asked_only_when_no_usable_one_has_room() {
        let out = |server| with(Standing::Ejected, server);
        let servers = [out(own(0, 4.0, 0.0)), out(own(1, 4.0, 0.0)), peer(0, 1.0)];
        assert_eq!(counts(&servers), [(Some(100), 10_000)].into());
        let full = [out(own(0, 4.0, 0.0)), out(own(1, 4.0, 0.0)), peer(0, 0.0)];
        assert_eq!(counts(&full), [(Some(0), 10_000)].into());
    }

    #[test]
    fn who_runs_nothing_and_says_it_is_full_is_asked_before_a_call_is_refused() {
        let idle = Server { utilisation: 0.0, ..peer(0, 0.0) };
        assert_eq!(counts(&[idle, peer(1, 0.0)]), [(Some(100), 10_000)].into());
        assert_eq!(counts(&[idle, peer(1, 1.0)]), [(Some(101), 10_000)].into());
    }

    #[test]
    fn absurd_figures_of_a_peer_harm_nobody() {
        let absurd = Server { departures: f64::INFINITY, ..peer(0, 0.0) };
        let nan = Server { free: f64::NAN, departures: f64::NAN, ..peer(1, 0.0) };
        assert_eq!(counts(&[absurd, nan]), [(None, 10_000)].into());
        assert_eq!(counts(&[absurd, nan, peer(2, 1.0)]), [(Some(102), 10_000)].into());
    }

    #[test]
    fn ejections_take_at_most_three_in_ten() {
        let mut servers: Vec<_> = (0..10).map(|i| peer(i, 1.0)).collect();
        for server in &mut servers[..3] {
            server.standing = Standing::Ejected;
        }
        assert!(!ignores_ejections(servers.iter()));
        servers[3].standing = Standing::Ejected;
        assert!(ignores_ejections(servers.iter()));
    }
}
