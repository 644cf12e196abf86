//! One engine as its own node knows it: exact calls in progress, room, health, and what attempts came to.
//!
//! There is one of these per engine and node, shared by all workers: counts split per worker would refuse calls while
//! another worker has room. Three things can keep calls away, and they are not the same: it has no room (`Slots`, and
//! what it says itself), it fails its health checks, or attempts were broken (its breaker). Having no room never counts
//! as failing.

use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

use base::{ASSUMED_SLOTS, Load};
use rand::Rng;

use crate::{
    Breaker, Health, HealthChange, HealthConfig, Outcome, Standing, Verdict,
    average::{Average, Rate},
    pressure::Pressure,
};

/// An engine that returns is given its slots over this time, beginning with the share [`SLOW_START_FROM`].
const SLOW_START: Duration = Duration::from_secs(30);
const SLOW_START_FROM: f64 = 0.1;
/// What an engine says of itself holds for so long.
const SAID_FOR: Duration = Duration::from_secs(10);

/// One engine's state.
#[derive(Clone, Debug)]
pub struct Engine {
    slots: Option<NonZeroU32>,
    in_flight: u32,
    health: Health,
    breaker: Breaker,
    pressure: Pressure,
    returned: Option<Instant>,
    service_time: Average,
    step_time: Average,
    ended: Rate,
    said: Option<(Instant, Said)>,
}

/// What an engine says of itself at the end of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Said {
    /// The share of its key-value cache in use, 0 to 1.
    pub kv_use: Option<f64>,
    /// Calls that wait there.
    pub queued: Option<u32>,
}

/// A slot taken: answered by one [`Engine::ended`].
#[derive(Debug)]
#[must_use = "a slot taken must be given back"]
pub struct Ticket {
    began: Instant,
}

impl Engine {
    /// An idle engine with `slots` slots; `None`: as many as come.
    pub fn new(
        slots: Option<NonZeroU32>,
        health: HealthConfig,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Self {
        Self {
            slots,
            in_flight: 0,
            health: Health::new(health, now, rng),
            breaker: Breaker::default(),
            pressure: Pressure::default(),
            returned: None,
            service_time: Average::default(),
            step_time: Average::default(),
            ended: Rate::default(),
            said: None,
        }
    }

    /// From now on it has `slots` slots here; calls in progress go on. Returns whether that is news.
    pub fn set_slots(&mut self, slots: Option<NonZeroU32>) -> bool {
        std::mem::replace(&mut self.slots, slots) != slots
    }

    /// Takes a slot; `None` when there is none. One that runs nothing is always asked, whatever it said before: whether it
    /// should be is for the router to say.
    pub fn take(&mut self, now: Instant) -> Option<Ticket> {
        let within = self.limit(now).is_none_or(|limit| self.in_flight < limit);
        if !within {
            let is_trial = (self.pressure.is_trial_due(now) || self.in_flight == 0)
                && self.base_limit(now).is_none_or(|limit| self.in_flight < limit);
            if !is_trial {
                return None;
            }
            self.pressure.trial_began(now);
        }
        self.breaker.begin(now);
        self.in_flight += 1;
        Some(Ticket { began: now })
    }

    /// The engine began to answer, and not with a failure.
    pub fn answered(&mut self, now: Instant) {
        if self.breaker.answered() {
            self.returned = Some(now);
        }
    }

    fn replied(&mut self, now: Instant) {
        if self.breaker.replied() {
            self.returned = Some(now);
        }
    }

    /// The call of `ticket` is over. `asked`: how long a busy engine wants to be left alone, if it said so.
    #[expect(clippy::needless_pass_by_value, reason = "a ticket is spent")]
    pub fn ended(
        &mut self,
        now: Instant,
        ticket: Ticket,
        outcome: Outcome,
        asked: Option<Duration>,
    ) -> bool {
        debug_assert!(self.in_flight > 0, "a slot was given back twice");
        self.in_flight = self.in_flight.saturating_sub(1);
        self.ended.event(now);
        let slots = self.slots.map_or(ASSUMED_SLOTS, NonZeroU32::get);
        match outcome {
            Outcome::Ok => {
                self.replied(now);
                self.service_time.add(now.saturating_duration_since(ticket.began));
                self.pressure.succeeded(ticket.began, slots);
                false
            }
            Outcome::Busy => {
                self.replied(now);
                self.pressure.busy(now, self.in_flight, slots, asked);
                false
            }
            Outcome::Broken => self.breaker.broken(now),
            Outcome::Caller => false,
        }
    }

    /// A streamed answer went on `steps` times, which took `took` in all.
    pub fn stepped(&mut self, steps: u32, took: Duration) {
        if let Some(step) = took.checked_div(steps) {
            self.step_time.add(step);
        }
    }

    /// It said this of itself. What it said before is forgotten.
    pub fn said(&mut self, now: Instant, said: Said) {
        self.said = Some((now, said));
    }

    /// A health check ended.
    pub fn checked(
        &mut self,
        now: Instant,
        passed: bool,
        rng: &mut impl Rng,
    ) -> Option<HealthChange> {
        let before = self.health.verdict();
        let change = self.health.checked(now, passed, rng);
        if change == Some(HealthChange::Returned) {
            self.returned = Some(now);
        }
        if before != Verdict::Up && self.health.verdict() == Verdict::Up {
            // What attempts came to while it was away says nothing about it now.
            self.breaker = Breaker::default();
        }
        change
    }

    /// When the next health check is due.
    #[must_use]
    pub fn next_check(&self) -> Instant {
        self.health.next_check()
    }

    /// Whether it passes its health checks, as far as it was checked.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.health.verdict() == Verdict::Up
    }

    /// Whether it may be sent calls.
    #[must_use]
    pub fn standing(&self, now: Instant) -> Standing {
        match self.health.verdict() {
            Verdict::Down => Standing::Down,
            Verdict::Absent => Standing::Ejected,
            Verdict::Up if self.breaker.allows(now) => Standing::Usable,
            Verdict::Up => Standing::Ejected,
        }
    }

    /// How pressed it is.
    #[must_use]
    pub fn load(&self, now: Instant) -> Load {
        let trial = u32::from(self.pressure.is_trial_due(now));
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < SAID_FOR;
        let said = self.said.filter(|(at, _)| is_fresh(*at)).map_or_else(Said::default, |s| s.1);
        Load {
            in_flight: self.in_flight,
            queued: said.queued.unwrap_or(0),
            slots: self
                .limit(now)
                .map(|limit| limit.max(self.in_flight.saturating_mul(trial) + trial)),
            service_time: self.service_time.value(),
            drain_rate: self.ended.value(now),
            unusable: self.standing(now) != Standing::Usable,
            step_time: self.step_time.value(),
            kv_use: said.kv_use,
        }
    }

    /// Calls it may run now; `None`: as many as come.
    fn limit(&self, now: Instant) -> Option<u32> {
        match (self.base_limit(now), self.pressure.ceiling()) {
            (Some(slots), Some(ceiling)) => Some(slots.min(ceiling)),
            (slots, ceiling) => slots.or(ceiling),
        }
    }

    /// Its slots, fewer while it has just returned.
    fn base_limit(&self, now: Instant) -> Option<u32> {
        let slots = self.slots.map(NonZeroU32::get);
        let share = self.returned.map_or(1.0, |returned| {
            let passed = now.saturating_duration_since(returned).div_duration_f64(SLOW_START);
            SLOW_START_FROM + (1.0 - SLOW_START_FROM) * passed
        });
        if share >= 1.0 {
            return slots;
        }
        let whole = f64::from(slots.unwrap_or(ASSUMED_SLOTS));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a u32, at least 1"
        )]
        Some((whole * share).max(1.0) as u32)
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    struct World {
        engine: Engine,
        now: Instant,
        rng: StdRng,
    }

    fn world(slots: u32) -> World {
        let (mut rng, now) = (StdRng::seed_from_u64(1), base::clock::now());
        let engine = Engine::new(NonZeroU32::new(slots), HealthConfig::default(), now, &mut rng);
        World { engine, now, rng }
    }

    impl World {
        fn take(&mut self) -> Ticket {
            self.engine.take(self.now).expect("a slot")
        }

        /// A call that takes no time.
        fn call(&mut self, outcome: Outcome) -> bool {
            let ticket = self.take();
            self.engine.ended(self.now, ticket, outcome, None)
        }

        fn check(&mut self, passed: bool) -> Option<HealthChange> {
            self.engine.checked(self.now, passed, &mut self.rng)
        }

        fn free(&mut self) -> usize {
            let tickets: Vec<_> =
                std::iter::from_fn(|| self.engine.take(self.now)).take(1_000).collect();
            let count = tickets.len();
            for ticket in tickets {
                self.engine.ended(self.now, ticket, Outcome::Caller, None);
            }
            count
        }
    }

    #[test]
    fn fewer_slots_end_no_call_and_more_let_more_in() {
        let mut world = world(4);
        let tickets = [world.take(), world.take(), world.take()];
        assert!(world.engine.set_slots(NonZeroU32::new(2)));
        assert!(world.engine.take(world.now).is_none());
        let load = world.engine.load(world.now);
        assert_eq!((load.in_flight, load.slots, load.free()), (3, Some(2), 0));
        for ticket in tickets {
            world.engine.ended(world.now, ticket, Outcome::Ok, None);
        }
        assert_eq!(world.free(), 2);
        assert!(world.engine.set_slots(NonZeroU32::new(5)));
        assert_eq!(world.free(), 5);
    }

    #[test]
    fn slots_run_out_and_come_back() {
        let mut world = world(2);
        let (first, second) = (world.take(), world.take());
        assert!(world.engine.take(world.now).is_none());
        world.engine.ended(world.now, first, Outcome::Ok, None);
        let third = world.take();
        assert_eq!(world.engine.load(world.now).in_flight, 2);
        for ticket in [second, third] {
            world.engine.ended(world.now, ticket, Outcome::Ok, None);
        }
        assert_eq!(world.engine.load(world.now).in_flight, 0);
    }

    #[test]
    fn without_a_limit_there_is_always_room() {
        assert_eq!(world(0).free(), 1_000);
    }

    #[test]
    fn an_engine_that_is_busy_for_long_is_never_ejected_and_gets_its_share_back() {
        let mut world = world(64);
        for _ in 0..300 {
            world.now += SECOND / 10;
            if let Some(ticket) = world.engine.take(world.now) {
                assert!(!world.engine.ended(world.now, ticket, Outcome::Busy, None));
            }
            assert_eq!(world.engine.standing(world.now), Standing::Usable);
        }
        assert!(world.free() <= 1, "no more than a trial");
        world.now += 5 * SECOND;
        for _ in 0..10 {
            world.call(Outcome::Ok);
        }
        assert_eq!(world.free(), 64);
    }

    #[test]
    fn two_broken_calls_in_a_row_eject_and_a_reply_in_the_trial_returns_it_slowly() {
        let mut world = world(60);
        assert!(!world.call(Outcome::Broken));
        assert!(world.call(Outcome::Broken));
        assert_eq!(world.engine.standing(world.now), Standing::Ejected);
        assert!(world.engine.load(world.now).unusable);
        world.now += 5 * SECOND;
        assert_eq!(world.engine.standing(world.now), Standing::Usable);
        let trial = world.take();
        assert_eq!(world.engine.standing(world.now), Standing::Ejected, "one trial at a time");
        world.engine.ended(world.now, trial, Outcome::Ok, None);
        assert_eq!(world.engine.standing(world.now), Standing::Usable);
        let mut room = vec![world.free()];
        for _ in 0..3 {
            world.now += 10 * SECOND;
            room.push(world.free());
        }
        assert_eq!(room, [6, 24, 42, 60]);
    }

    #[test]
    fn callers_that_give_up_say_nothing_about_the_engine() {
        let mut world = world(4);
        for _ in 0..100 {
            assert!(!world.call(Outcome::Caller));
        }
        assert_eq!(world.engine.standing(world.now), Standing::Usable);
        assert_eq!(world.engine.load(world.now).service_time, Duration::ZERO);
    }

    #[test]
    fn an_engine_down_by_its_checks_returns_by_itself_and_slowly() {
        let mut world = world(40);
        world.check(true);
        for _ in 0..2 {
            assert_eq!(world.check(false), None);
        }
        assert_eq!(world.check(false), Some(HealthChange::Left));
        assert_eq!(world.engine.standing(world.now), Standing::Down);
        world.check(true);
        assert_eq!(world.check(true), Some(HealthChange::Returned));
        assert_eq!(world.engine.standing(world.now), Standing::Usable);
        assert_eq!(world.free(), 4);
        world.now += SLOW_START;
        assert_eq!(world.free(), 40);
    }

    #[test]
    fn an_engine_that_has_just_started_is_not_held_to_what_was_before() {
        let mut world = world(8);
        world.check(false);
        world.call(Outcome::Broken);
        assert!(world.call(Outcome::Broken));
        world.check(true);
        assert_eq!(world.engine.standing(world.now), Standing::Usable);
        assert_eq!(world.free(), 8, "it starts with all of its slots");
    }

    #[test]
    fn step_time_is_averaged_over_streams_and_one_without_steps_says_nothing() {
        let mut world = world(8);
        world.engine.stepped(0, SECOND);
        assert_eq!(world.engine.load(world.now).step_time, Duration::ZERO);
        world.engine.stepped(50, SECOND);
        assert_eq!(world.engine.load(world.now).step_time, SECOND / 50);
        for _ in 0..100 {
            world.engine.stepped(10, SECOND);
        }
        assert!((world.engine.load(world.now).step_time.as_secs_f64() - 0.1).abs() < 0.001);
    }

    #[test]
    fn what_an_engine_says_of_itself_holds_for_a_while() {
        let mut world = world(8);
        world.engine.said(world.now, Said { kv_use: Some(0.7), queued: Some(3) });
        let load = world.engine.load(world.now + SAID_FOR / 2);
        assert_eq!((load.kv_use, load.queued), (Some(0.7), 3));
        let load = world.engine.load(world.now + SAID_FOR);
        assert_eq!((load.kv_use, load.queued), (None, 0));
    }

    #[test]
    fn service_time_and_drain_rate_come_from_calls_that_ended() {
        let mut world = world(8);
        for _ in 0..200 {
            let ticket = world.take();
            world.now += SECOND / 10;
            world.engine.ended(world.now, ticket, Outcome::Ok, None);
        }
        let load = world.engine.load(world.now);
        assert!((load.service_time.as_secs_f64() - 0.1).abs() < 0.001);
        assert!((9.0..11.0).contains(&load.drain_rate), "{}", load.drain_rate);
    }
}
