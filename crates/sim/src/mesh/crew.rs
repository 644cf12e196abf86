//! Machines that are told something at about the same time work at the same time.
//!
//! What one of them says is heard by another no sooner than the shortest way takes, so that within that time they cannot know of
//! each other. What they say is carried out one after the other, in the order of the events: the outcome is the same on
//! however many cores.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use membership::{Event, Input, Output};
use rayon::prelude::*;

use super::{host::Process, network::Nanos, world::World};

/// So few tasks are done sooner than they are shared out.
const FEW: usize = 8;

/// Something a machine is to be told.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) at: Nanos,
    pub(super) host: u32,
    /// What the clock of its host shows.
    pub(super) clock: Instant,
    pub(super) input: Input,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Done {
    /// Without the loads it was told of: those concern nobody else, and were taken in.
    pub(super) outputs: Vec<Output>,
    pub(super) loads: u64,
    pub(super) deadline: Option<Instant>,
    pub(super) has_panicked: bool,
}

/// All tasks of one host.
struct Job {
    host: u32,
    process: Box<Process>,
    todo: Vec<(usize, Instant, Input)>,
    done: Vec<(usize, Done)>,
}

impl Job {
    fn work(&mut self) {
        for (place, clock, input) in self.todo.drain(..) {
            let done = tell(&mut self.process, clock, input);
            let has_panicked = done.has_panicked;
            self.done.push((place, done));
            if has_panicked {
                break;
            }
        }
    }
}

fn tell(process: &mut Process, clock: Instant, input: Input) -> Done {
    let told = catch_unwind(AssertUnwindSafe(|| {
        let (mut outputs, mut loads) = (vec![], 0);
        process.mesh.handle(clock, input);
        while let Some(output) = process.mesh.poll_output() {
            match output {
                Output::Event(Event::Load { id, frame, rtt }) => {
                    loads += u64::from(process.load(clock, id, &frame, rtt));
                }
                output => {
                    match &output {
                        Output::Event(Event::Described { id, .. }) => process.described(*id, true),
                        Output::Event(Event::Forgotten(id)) => process.described(*id, false),
                        _ => {}
                    }
                    outputs.push(output);
                }
            }
        }
        Done { outputs, loads, deadline: process.mesh.next_deadline(), has_panicked: false }
    }));
    let panicked = |_| Done { outputs: vec![], loads: 0, deadline: None, has_panicked: true };
    told.unwrap_or_else(panicked)
}

impl World {
    /// Does what has gathered.
    pub(super) fn work(&mut self) {
        let tasks = std::mem::take(&mut self.tasks);
        if tasks.is_empty() {
            return;
        }
        let order: Vec<_> = tasks.iter().map(|task| (task.at, task.host)).collect();
        let is_much = tasks.len() >= FEW && rayon::current_num_threads() > 1;
        let mut jobs = self.share_out(tasks);
        if is_much {
            jobs.par_iter_mut().with_min_len(FEW / 2).for_each(Job::work);
        } else {
            jobs.iter_mut().for_each(Job::work);
        }
        let mut all: Vec<_> = order.iter().map(|_| None).collect();
        for job in jobs {
            if let Some(host) = self.host_mut(job.host) {
                host.process = Some(job.process);
            }
            for (place, done) in job.done {
                if let Some(slot) = all.get_mut(place) {
                    *slot = Some(done);
                }
            }
        }
        for ((at, host), done) in order.into_iter().zip(all) {
            self.now = at;
            if let Some(done) = done {
                self.carry_out(host, done);
            }
        }
    }

    /// The tasks by host, with its process.
    fn share_out(&mut self, tasks: Vec<Task>) -> Vec<Job> {
        let mut jobs: Vec<Job> = Vec::with_capacity(tasks.len());
        let mut places: HashMap<u32, usize> = HashMap::with_capacity(tasks.len());
        for (place, Task { host, clock, input, .. }) in tasks.into_iter().enumerate() {
            let known = places.get(&host).and_then(|place| jobs.get_mut(*place));
            if let Some(job) = known {
                job.todo.push((place, clock, input));
            } else if let Some(process) = self.host_mut(host).and_then(|on| on.process.take()) {
                places.insert(host, jobs.len());
                let todo = vec![(place, clock, input)];
                jobs.push(Job { host, process, todo, done: vec![] });
            }
        }
        jobs
    }
}
