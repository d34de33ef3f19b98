//! Ranks advance until all have ended.
//!
//! ```text
//!   a rank runs until it must wait:
//!     call of a group          for the last member to make it; beside the computation for nobody
//!     wait for such a call     for the last member to start it
//!     receive                  for the send
//!     wait for what was sent   for the last receive
//!   whoever ends a wait puts the ranks that waited back on the list of those that can run
//! ```

use super::{Does, Groups, Mismatch, PARTS, Schedule, Step, Wait};
use std::collections::VecDeque;
use tangelo_core::{CallKind, Group};

/// All ranks end.
pub(super) fn check(schedule: &Schedule, groups: &Groups, part: usize) -> Result<(), Box<Mismatch>> {
    let mut run = Run::new(schedule, groups, part);
    run.advance();
    let stuck = (0..schedule.num_ranks()).find(|&rank| run.waiting[rank]);
    match stuck {
        None => Ok(()),
        Some(rank) => Err(Box::new(Mismatch::Deadlock { part: PARTS[part], waits: run.waits(rank) })),
    }
}

/// The calls of one group: how many are complete, and of the next ones how many members have made them.
#[derive(Clone, Default)]
struct Progress {
    complete: u32,
    made: VecDeque<u32>,
}

/// What was sent, and taken, in a channel.
#[derive(Clone, Copy, Default)]
struct Channel {
    sent: u32,
    taken: u32,
}

struct Run<'a> {
    schedule: &'a Schedule,
    groups: &'a Groups,
    part: usize,
    /// By kind, then by group.
    progress: Vec<Vec<Progress>>,
    /// By rank, then by kind of group: calls made.
    made: Vec<[u32; Group::ALL.len()]>,
    /// By sender: to the stage after, to the stage before.
    channels: Vec<[Channel; 2]>,
    /// By rank: steps done. A call that is waited for counts as soon as it was made.
    at: Vec<usize>,
    /// By rank: the call of the step before that must be complete before it goes on.
    waits_for: Vec<Option<(Group, u32)>>,
    waiting: Vec<bool>,
    can_run: Vec<usize>,
}

impl<'a> Run<'a> {
    fn new(schedule: &'a Schedule, groups: &'a Groups, part: usize) -> Run<'a> {
        let ranks = schedule.num_ranks();
        Run {
            schedule,
            groups,
            part,
            progress: Group::ALL.iter().map(|&g| vec![Progress::default(); groups.of_kind(g).len()]).collect(),
            made: vec![[0; Group::ALL.len()]; ranks],
            channels: vec![[Channel::default(); 2]; ranks],
            at: vec![0; ranks],
            waits_for: vec![None; ranks],
            waiting: vec![false; ranks],
            can_run: (0..ranks).rev().collect(),
        }
    }

    fn advance(&mut self) {
        let schedule = self.schedule;
        while let Some(rank) = self.can_run.pop() {
            self.waiting[rank] = false;
            let steps = schedule.steps(rank, self.part);
            while self.may_go_on(rank) && self.at[rank] < steps.len() && self.does(rank, steps[self.at[rank]]) {
                self.at[rank] += 1;
            }
            self.waiting[rank] = self.at[rank] < steps.len() || self.waits_for[rank].is_some();
        }
    }

    /// Whether the call that the rank stands in is complete.
    fn may_go_on(&mut self, rank: usize) -> bool {
        let Some((group, number)) = self.waits_for[rank] else { return true };
        let complete = self.is_complete(rank, group, number);
        if complete {
            self.waits_for[rank] = None;
        }
        complete
    }

    fn is_complete(&self, rank: usize, group: Group, number: u32) -> bool {
        let of = self.groups.group_of[group as usize][rank];
        self.progress[group as usize][of].complete > number
    }

    /// Whether the step could be done.
    fn does(&mut self, rank: usize, step: Step) -> bool {
        match step.does {
            Does::Await(group, number) => self.waits_for[rank] = Some((group, number)),
            Does::AwaitSent => return self.channels[rank].iter().all(|channel| channel.sent == channel.taken),
            Does::Call(place) => {
                let call = self.schedule.call(place);
                match call.kind {
                    CallKind::Send => self.send(rank, call.peer),
                    CallKind::Receive => return self.receive(rank, call.peer),
                    _ => self.call(rank, call.group),
                }
            }
        }
        true
    }

    /// Makes the next call of a group.
    fn call(&mut self, rank: usize, group: Group) {
        let kind = group as usize;
        let (of, number) = (self.groups.group_of[kind][rank], self.made[rank][kind]);
        self.made[rank][kind] += 1;
        // A turn of the ring is waited for within its instruction.
        if !group.is_beside() || group == Group::Ring {
            self.waits_for[rank] = Some((group, number));
        }
        let members = &self.groups.members[kind][of];
        let progress = &mut self.progress[kind][of];
        let ahead = (number - progress.complete) as usize;
        if progress.made.len() <= ahead {
            progress.made.resize(ahead + 1, 0);
        }
        progress.made[ahead] += 1;
        let mut completed = false;
        while progress.made.front().is_some_and(|&made| made as usize == members.len()) {
            progress.made.pop_front();
            progress.complete += 1;
            completed = true;
        }
        if completed {
            for &member in members {
                self.wake(member, |waits_for| matches!(waits_for, Some((own, _)) if own == group));
            }
        }
    }

    fn wake(&mut self, rank: usize, concerns: impl Fn(Option<(Group, u32)>) -> bool) {
        if self.waiting[rank] && concerns(self.waits_for[rank]) {
            self.waiting[rank] = false;
            self.can_run.push(rank);
        }
    }

    /// The rank at the same place of another stage, and whether that comes after this rank's.
    fn neighbour(&self, rank: usize, peer: Option<usize>) -> (usize, bool) {
        let topology = &self.schedule.topology;
        let (own, peer) = (topology.stage(rank), peer.expect("a transfer has a peer"));
        let per_stage = self.schedule.num_ranks() / topology.num_stages();
        (rank % per_stage + peer * per_stage, peer > own)
    }

    fn send(&mut self, rank: usize, peer: Option<usize>) {
        let (to, after) = self.neighbour(rank, peer);
        self.channels[rank][usize::from(!after)].sent += 1;
        self.wake(to, |waits_for| waits_for.is_none());
    }

    fn receive(&mut self, rank: usize, peer: Option<usize>) -> bool {
        let (from, after) = self.neighbour(rank, peer);
        let channel = &mut self.channels[from][usize::from(after)];
        if channel.taken == channel.sent {
            return false;
        }
        channel.taken += 1;
        self.wake(from, |waits_for| waits_for.is_none());
        true
    }

    // ---- who waits for whom ----------------------------------------------------------------------------------------

    /// From `rank` on, who waits for whom, until one of them comes again or a rank has ended.
    fn waits(&self, rank: usize) -> Vec<Wait> {
        let mut waits: Vec<Wait> = Vec::new();
        let mut next = rank;
        while let Some(wait) = self.wait_of(next).filter(|_| waits.iter().all(|wait| wait.rank != next)) {
            next = wait.on;
            waits.push(wait);
        }
        // What led to the cycle is no part of it.
        let start = waits.iter().position(|wait| wait.rank == next).unwrap_or(0);
        waits.split_off(start)
    }

    fn wait_of(&self, rank: usize) -> Option<Wait> {
        let steps = self.schedule.steps(rank, self.part);
        if let Some((group, number)) = self.waits_for[rank] {
            let of = self.groups.group_of[group as usize][rank];
            let members = &self.groups.members[group as usize][of];
            let on = *members.iter().find(|&&member| self.made[member][group as usize] <= number)?;
            let what = format!("call {number} of {group}");
            return Some(self.wait(rank, steps[self.at[rank] - 1], what, on));
        }
        let step = *steps.get(self.at[rank])?;
        let stage = self.schedule.topology.stage(rank);
        let (what, peer) = match step.does {
            Does::Call(place) => ("to send what it receives", self.schedule.call(place).peer?),
            _ => {
                let channels = &self.channels[rank];
                let after = channels[0].sent != channels[0].taken;
                ("to receive what it sent", if after { stage + 1 } else { stage - 1 })
            }
        };
        Some(self.wait(rank, step, what.into(), self.neighbour(rank, Some(peer)).0))
    }

    fn wait(&self, rank: usize, step: Step, what: String, on: usize) -> Wait {
        Wait { rank, instruction: self.schedule.instruction(rank, self.part, step), what, on }
    }
}
