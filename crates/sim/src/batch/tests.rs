//! Does the batch keep its times, bounds and order? In virtual time.

use super::*;

const STEP: Duration = Duration::from_millis(10);
const FULL_STEP: Duration = Duration::from_millis(20);

/// A batch in virtual time, polled whenever it asks to be.
struct World {
    batch: Batch,
    now: Instant,
    start: Instant,
}

impl World {
    fn new(slots: u32, queue: u32) -> Self {
        let now = base::clock::now();
        let batch = Batch::new(BatchConfig { slots, queue, step: STEP });
        Self { batch, now, start: now }
    }

    fn arrive(&mut self, prefill_steps: u32, tokens: u32) -> Result<RequestId, Busy> {
        self.batch.arrive(self.now, Work { prefill_steps, tokens })
    }

    /// Runs until `until` after the start; what came, and when.
    fn run(&mut self, until: Duration) -> Vec<(Duration, Output)> {
        let mut seen = Vec::new();
        while let Some(due) = self.batch.next_deadline().filter(|due| *due <= self.start + until) {
            self.now = self.now.max(due);
            let at = self.now - self.start;
            seen.extend(self.batch.poll(self.now).map(|output| (at, output)));
        }
        self.now = self.start + until;
        seen
    }

    fn run_out(&mut self) -> Vec<(Duration, Output)> {
        let seen = self.run(Duration::from_secs(3_600));
        assert_eq!(self.batch.next_deadline(), None, "an idle batch asks for nothing");
        seen
    }

    fn load(&self) -> (u32, u32) {
        let figures = self.batch.figures();
        (figures.running, figures.waiting)
    }
}

fn tokens_of(id: RequestId, seen: &[(Duration, Output)]) -> Vec<Duration> {
    let of_id = |(at, output): &(Duration, Output)| match output {
        Output::Token { id: of, .. } if *of == id => Some(*at),
        _ => None,
    };
    seen.iter().filter_map(of_id).collect()
}

fn finished(seen: &[(Duration, Output)]) -> Vec<RequestId> {
    let is_finished = |(_, output): &&(Duration, Output)| matches!(output, Output::Finished { .. });
    seen.iter().filter(is_finished).map(|(_, output)| output.id()).collect()
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn slow(factor: f64) -> Fault {
    Fault::Slow(factor.try_into().unwrap())
}

#[test]
fn an_idle_batch_has_no_deadline() {
    assert_eq!(World::new(4, 4).batch.next_deadline(), None);
}

#[test]
fn the_last_step_of_a_prefill_yields_the_first_token_and_each_further_step_one_more() {
    let mut world = World::new(4, 0);
    let id = world.arrive(2, 3).unwrap();
    let seen = world.run_out();
    let step = STEP.mul_f64(1.25);
    let token = |index| (step * (2 + index), Output::Token { id, index });
    assert_eq!(seen, [token(0), token(1), token(2), (step * 4, Output::Finished { id })]);
}

#[test]
fn a_full_batch_yields_a_token_of_every_slot_in_a_doubled_step() {
    let mut world = World::new(8, 0);
    let ids: Vec<_> = (0..8).map(|_| world.arrive(0, 1_000).unwrap()).collect();
    // The first step began with one request.
    let first = STEP.mul_f64(1.125);
    let seen = world.run(first + FULL_STEP * 100);
    for id in &ids[1..] {
        assert_eq!(tokens_of(*id, &seen).len(), 100);
    }
    assert_eq!(world.batch.figures().steps, 101);
}

#[test]
fn a_request_joins_at_the_next_boundary() {
    let mut world = World::new(2, 0);
    let first = world.arrive(0, 10).unwrap();
    world.run(ms(4));
    let second = world.arrive(0, 1).unwrap();
    let seen = world.run_out();
    assert_eq!(tokens_of(first, &seen)[..2], [ms(15), ms(35)]);
    assert_eq!(tokens_of(second, &seen), [ms(35)]);
}

#[test]
fn beyond_slots_and_queue_an_arrival_is_busy_until_the_estimate() {
    let mut world = World::new(1, 2);
    for _ in 0..3 {
        world.arrive(2, 4).unwrap();
    }
    world.run(ms(30));
    assert_eq!(world.load(), (1, 2));
    let busy = world.arrive(0, 1).unwrap_err();
    // Five steps of 20 ms, of which 30 ms have passed.
    assert_eq!(busy.retry_after, ms(70));
    world.run(ms(99));
    assert!(world.arrive(0, 1).is_err());
    world.run(ms(100));
    assert!(world.arrive(0, 1).is_ok());
}

#[test]
fn the_queue_is_served_in_order_of_arrival() {
    let mut world = World::new(2, 6);
    let ids: Vec<_> = (0..8).map(|_| world.arrive(1, 2).unwrap()).collect();
    assert_eq!(finished(&world.run_out()), ids);
}

#[test]
fn a_cancelled_request_frees_its_slot_for_the_queue_and_yields_nothing_more() {
    let mut world = World::new(1, 1);
    let first = world.arrive(0, 100).unwrap();
    let second = world.arrive(0, 2).unwrap();
    world.run(ms(50));
    assert!(world.batch.cancel(world.now, first));
    assert_eq!(world.load(), (1, 0));
    let seen = world.run_out();
    assert_eq!(tokens_of(first, &seen), []);
    // It joins when the step ends that ran when it got the slot.
    assert_eq!(tokens_of(second, &seen), [ms(80), ms(100)]);
    assert!(!world.batch.cancel(world.now, first));
}

#[test]
fn a_cancelled_request_leaves_the_queue() {
    let mut world = World::new(1, 1);
    world.arrive(0, 100).unwrap();
    let waiting = world.arrive(0, 1).unwrap();
    assert!(world.arrive(0, 1).is_err());
    assert!(world.batch.cancel(world.now, waiting));
    assert!(world.arrive(0, 1).is_ok());
}

#[test]
fn the_last_cancellation_makes_the_batch_idle_and_drops_its_outputs() {
    let mut world = World::new(1, 0);
    let id = world.arrive(0, 100).unwrap();
    assert!(world.batch.cancel(world.now + ms(500), id));
    assert_eq!(world.batch.next_deadline(), None);
    assert_eq!(world.batch.poll(world.now + ms(600)).count(), 0);
}

#[test]
fn a_late_poll_makes_up_for_what_was_due_without_drift() {
    let mut world = World::new(1, 0);
    world.arrive(0, 1_000).unwrap();
    assert_eq!(world.batch.poll(world.start + ms(205)).count(), 10);
    assert_eq!(world.batch.next_deadline(), Some(world.start + ms(220)));
}

#[test]
fn an_arrival_after_a_missed_boundary_does_not_join_in_the_past() {
    let mut world = World::new(2, 0);
    let first = world.arrive(0, 4).unwrap();
    // Boundaries at 15 and 30 ms went by unseen.
    world.now += ms(32);
    let second = world.arrive(0, 1).unwrap();
    let due = world.batch.next_deadline();
    assert_eq!(due, Some(world.start + ms(15)), "what is ready is asked for at once");
    let seen = world.run_out();
    assert_eq!(tokens_of(first, &seen), [ms(32), ms(32), ms(45), ms(65)]);
    assert_eq!(tokens_of(second, &seen), [ms(65)]);
}

#[test]
fn what_is_later_than_the_bound_is_written_off() {
    let mut world = World::new(1, 0);
    let hour = Duration::from_secs(3_600);
    world.arrive(0, 1_000).unwrap();
    assert_eq!(world.batch.poll(world.start + hour).count(), CATCH_UP_STEPS);
    assert_eq!(world.batch.next_deadline(), Some(world.start + hour + FULL_STEP));
}

#[test]
fn a_change_of_the_slow_factor_rescales_what_is_left_of_the_step_in_progress() {
    let mut world = World::new(1, 0);
    let id = world.arrive(0, 4).unwrap();
    world.run(ms(15));
    world.batch.inject(world.now, slow(20.0));
    // 5 ms of 20 were left.
    assert_eq!(tokens_of(id, &world.run(ms(115))), [ms(115)]);
    world.run(ms(315));
    world.batch.inject(world.now, slow(2.0));
    assert_eq!(tokens_of(id, &world.run(ms(335))), [ms(335)]);
    world.run(ms(345));
    world.batch.heal(world.now);
    assert_eq!(tokens_of(id, &world.run_out()), [ms(360), ms(380)]);
}

#[test]
fn a_slow_batch_that_hangs_goes_on_as_fast_as_what_comes_after() {
    let mut world = World::new(1, 0);
    let id = world.arrive(0, 2).unwrap();
    world.batch.inject(world.now, slow(10.0));
    world.run(ms(100));
    world.batch.inject(world.now, Fault::Hang);
    world.run(ms(1_000));
    world.batch.inject(world.now, slow(4.0));
    // Half a step was left.
    assert_eq!(tokens_of(id, &world.run_out()), [ms(1_040), ms(1_120)]);
}

#[test]
fn a_hung_batch_ends_no_step_and_goes_on_where_it_stood() {
    let mut world = World::new(1, 1);
    let id = world.arrive(0, 2).unwrap();
    world.run(ms(5));
    world.batch.inject(world.now, Fault::Hang);
    assert!(world.arrive(0, 1).is_ok(), "there is room in the queue");
    assert_eq!(world.arrive(0, 1), Err(Busy { retry_after: RETRY_AFTER_UNKNOWN }));
    assert_eq!(world.batch.next_deadline(), None);
    assert_eq!(world.run(ms(1_000)), []);
    assert_eq!(world.batch.poll(world.now).count(), 0);
    world.batch.heal(world.now);
    assert_eq!(tokens_of(id, &world.run_out()), [ms(1_015), ms(1_035)]);
}

#[test]
fn what_arrives_at_an_idle_hung_batch_starts_when_it_heals() {
    let mut world = World::new(1, 0);
    world.batch.inject(world.now, Fault::Hang);
    let id = world.arrive(0, 1).unwrap();
    world.run(ms(100));
    world.batch.heal(world.now);
    assert_eq!(tokens_of(id, &world.run_out()), [ms(120)]);
}

#[test]
fn a_refusing_batch_takes_nothing_and_finishes_what_it_has() {
    let mut world = World::new(4, 4);
    let id = world.arrive(0, 2).unwrap();
    world.batch.inject(world.now, Fault::Refuse);
    assert!(world.arrive(0, 1).is_err());
    assert_eq!(finished(&world.run_out()), [id]);
    world.batch.heal(world.now);
    assert_eq!(world.batch.fault(), None);
    assert!(world.arrive(0, 1).is_ok());
}

#[test]
fn the_next_fault_replaces_the_last() {
    let mut world = World::new(1, 0);
    let id = world.arrive(0, 1).unwrap();
    world.batch.inject(world.now, Fault::Hang);
    world.run(ms(100));
    world.batch.inject(world.now, Fault::Refuse);
    assert_eq!(finished(&world.run_out()), [id]);
}

#[test]
fn no_tokens_and_no_slots_count_as_one() {
    let mut world = World::new(0, 0);
    let id = world.arrive(0, 0).unwrap();
    assert_eq!(tokens_of(id, &world.run_out()).len(), 1);
}

#[test]
fn what_nobody_polls_is_bounded_however_large_the_batch() {
    let slots = 1 << 16;
    let mut world = World::new(slots, 0);
    let ids: Vec<_> = (0..slots).map(|_| world.arrive(0, 1_000).unwrap()).collect();
    for (late, id) in (1..=3).zip(&ids) {
        world.batch.cancel(world.start + Duration::from_secs(3_600) * late, *id);
        assert!(world.batch.outputs.len() <= OUTPUTS_MAX + 2 * slots as usize);
    }
    let now = world.start + Duration::from_secs(3_600 * 3);
    assert!(world.batch.poll(now).count() > slots as usize, "several steps are made up for");
    assert!(world.batch.next_deadline().unwrap() > now, "the rest is written off");
}
