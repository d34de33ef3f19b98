//! The proof that a plan's ranks will understand each other: all calls of all ranks, without devices.
//!
//! For each part of the programs (pass, update, evaluation), by itself:
//! 1. *agreement*: all members of every group make the same calls in the same order, with the same element size and
//!    counts that fit (what i gives j is what j takes from i);
//! 2. *pairing*: the k-th send of every channel meets a k-th receive of the same size;
//! 3. *progress*: ranks advance until all have ended. A call waits for all members; weights and gradients travel beside
//!    the computation and are waited for where they are used; a receive waits for its send; sends wait for nothing, but
//!    a pass ends only when all of them were received. (Turns of a ring are taken as waited for where they begin, which is
//!    stricter than the trainer.)
//!
//! One simulated order is enough: the calls of each group and channel have a fixed order, so what a rank is given does
//! not depend on who is faster, and a step that can end in one order ends in all. Parts may be looked at apart for the
//! same reason: ranks that all wait at the end of a part are in one of those orders.
//!
//! Ranks of one stage that stand in the same places share their list of calls, and groups whose members have the same
//! lists are compared once: 1,024 ranks take seconds. Deliberately absent: time (who waits how long), and the bound on
//! calls queued beside the computation, which programs stay far below.

mod agree;
mod mismatch;
mod progress;
mod table;

pub use mismatch::{Made, Mismatch, Wait};
pub use table::render;

use crate::program::{Sizes, build};
use crate::traffic::{NUM_KINDS, Traffic};
use std::collections::HashMap;
use tangelo_configs::Plan;
use tangelo_core::{Call, Group, Instruction, Topology};

/// Parts of a program, in the order in which they are run.
pub const PARTS: [&str; 3] = ["pass", "update", "evaluate"];

/// The part that computes nothing of micro-batches.
const UPDATE: usize = 1;

/// Shows that the ranks of `plan` understand each other.
///
/// # Errors
/// The first thing found that they would not.
pub fn prove(plan: &Plan) -> Result<Proof, Box<Mismatch>> {
    Schedule::new(plan).prove()
}

/// What a rank does that others notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Does {
    /// A call, by its place in [`Schedule::call`]'s list.
    Call(u32),
    /// Waits for the call of this number (of this part) that it started in a group beside the computation.
    Await(Group, u32),
    /// Waits until all that it sent was received.
    AwaitSent,
}

/// One of them, and the instruction (by its place in the program) that it is done for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Step {
    /// Place of the instruction.
    pub instruction: u32,
    /// What is done.
    pub does: Does,
}

/// What all ranks do.
#[derive(Clone, Debug)]
pub struct Schedule {
    topology: Topology,
    /// By stage, then by part.
    programs: Vec<[Vec<Instruction>; 3]>,
    calls: Vec<Call>,
    known: HashMap<Call, u32>,
    lists: Vec<Vec<Step>>,
    /// By rank, then by part: places in `lists`.
    ranks: Vec<[usize; 3]>,
}

/// Coordinates on which a rank's list of calls depends.
type Key = (usize, [usize; 5]);

impl Schedule {
    /// The programs of all ranks of `plan`, with sizes.
    pub fn new(plan: &Plan) -> Schedule {
        let (topology, sizes) = (plan.topology.clone(), Sizes::new(plan));
        let program = |stage| {
            let program = build(plan, stage);
            [program.pass, program.update, program.evaluate]
        };
        let programs: Vec<_> = (0..topology.num_stages()).map(program).collect();
        let mut schedule =
            Schedule { topology, programs, calls: vec![], known: HashMap::new(), lists: vec![], ranks: vec![] };
        let mut lists: HashMap<Key, usize> = HashMap::new();
        for rank in 0..schedule.num_ranks() {
            let keys = schedule.keys(rank);
            let own = std::array::from_fn(|part| {
                *lists.entry(keys[part]).or_insert_with(|| schedule.add_list(&sizes, rank, part))
            });
            schedule.ranks.push(own);
        }
        schedule
    }

    fn keys(&self, rank: usize) -> [Key; 3] {
        let index = |group| self.topology.index(group, rank);
        let (stage, tensor) = (self.topology.stage(rank), index(Group::Tensor));
        let of_sequence = |owner| [stage, tensor, index(Group::Ring), index(Group::Heads), owner];
        let [reduces, sums] = [Group::StatesOverGradients, Group::Replicas].map(|group| self.topology.size(group) > 1);
        // Sums are of what a rank owns; what is sent to owners depends on what it keeps.
        let owner = if sums { index(Group::States) } else { usize::from(reduces) * index(Group::Gradients) };
        [(0, of_sequence(owner)), (1, [stage, tensor, index(Group::States), 0, 0]), (2, of_sequence(0))]
    }

    fn add_list(&mut self, sizes: &Sizes, rank: usize, part: usize) -> usize {
        let stage = self.topology.stage(rank);
        let program = std::mem::take(&mut self.programs[stage][part]);
        let mut calls_of: HashMap<Instruction, Vec<u32>> = HashMap::new();
        let mut started: HashMap<Instruction, u32> = HashMap::new();
        let mut numbers = [0u32; Group::ALL.len()];
        let mut list = Vec::new();
        for (at, &instruction) in program.iter().enumerate() {
            let mut push = |does| list.push(Step { instruction: at as u32, does });
            if let Some(start) = self.awaits(instruction) {
                push(Does::Await(self.starts(start).expect("what is waited for was started"), started[&start]));
            }
            if let Some(group) = self.starts(instruction) {
                started.insert(instruction, numbers[group as usize]);
                numbers[group as usize] += 1;
            }
            let kind = instruction.of_any_micro_batch();
            let calls = calls_of.entry(kind).or_insert_with(|| {
                sizes.calls(kind, rank).into_iter().map(|call| intern(&mut self.calls, &mut self.known, call)).collect()
            });
            calls.iter().for_each(|&call| push(Does::Call(call)));
        }
        if self.topology.num_stages() > 1 && part != UPDATE {
            list.push(Step { instruction: program.len() as u32 - 1, does: Does::AwaitSent });
        }
        self.programs[stage][part] = program;
        self.lists.push(list);
        self.lists.len() - 1
    }

    /// The group in which an instruction starts a call beside the computation.
    fn starts(&self, instruction: Instruction) -> Option<Group> {
        match instruction {
            Instruction::StartGather(_) => Some(Group::Parameters),
            Instruction::StartReduce(_) => Some(Group::Gradients),
            Instruction::StartBucket(_) if self.topology.size(Group::StatesOverGradients) > 1 => {
                Some(Group::StatesOverGradients)
            }
            Instruction::StartBucket(_) | Instruction::SumBucket(_) => Some(Group::Replicas),
            _ => None,
        }
    }

    /// The instruction whose call an instruction waits for.
    fn awaits(&self, instruction: Instruction) -> Option<Instruction> {
        let both = [Group::StatesOverGradients, Group::Replicas].iter().all(|&group| self.topology.size(group) > 1);
        match instruction {
            Instruction::FinishGather(unit) => Some(Instruction::StartGather(unit)),
            Instruction::FinishReduce(unit) => Some(Instruction::StartReduce(unit)),
            Instruction::SumBucket(bucket) => Some(Instruction::StartBucket(bucket)),
            Instruction::FinishBucket(bucket) if both => Some(Instruction::SumBucket(bucket)),
            Instruction::FinishBucket(bucket) => Some(Instruction::StartBucket(bucket)),
            _ => None,
        }
    }

    /// Number of ranks.
    pub fn num_ranks(&self) -> usize {
        self.topology.mesh.world_size()
    }

    /// What `rank` does in a part.
    pub fn steps(&self, rank: usize, part: usize) -> &[Step] {
        &self.lists[self.ranks[rank][part]]
    }

    /// The same to be changed, for this rank only.
    pub fn steps_mut(&mut self, rank: usize, part: usize) -> &mut Vec<Step> {
        self.lists.push(self.lists[self.ranks[rank][part]].clone());
        self.ranks[rank][part] = self.lists.len() - 1;
        self.lists.last_mut().expect("a list was added")
    }

    /// A call by its place.
    pub fn call(&self, place: u32) -> &Call {
        &self.calls[place as usize]
    }

    /// The place of a call.
    pub fn place_of(&mut self, call: Call) -> u32 {
        intern(&mut self.calls, &mut self.known, call)
    }

    fn instruction(&self, rank: usize, part: usize, step: Step) -> Instruction {
        self.programs[self.topology.stage(rank)][part][step.instruction as usize]
    }

    fn made(&self, rank: usize, part: usize, step: Step) -> Made {
        let Does::Call(place) = step.does else { unreachable!("a wait is no call") };
        Made { rank, call: self.call(place).clone(), instruction: self.instruction(rank, part, step) }
    }

    /// Shows that the ranks understand each other.
    ///
    /// # Errors
    /// The first thing found that they would not.
    pub fn prove(&self) -> Result<Proof, Box<Mismatch>> {
        let groups = Groups::new(&self.topology);
        for part in 0..PARTS.len() {
            agree::check(self, &groups, part)?;
            agree::check_channels(self, part)?;
            progress::check(self, &groups, part)?;
        }
        Ok(self.proof())
    }

    fn proof(&self) -> Proof {
        let tallies: Vec<Vec<(u32, u64)>> = self.lists.iter().map(|list| tally(list)).collect();
        let mut proof = Proof { num_ranks: self.num_ranks(), ..Proof::default() };
        let mut uses: HashMap<Group, GroupUse> = HashMap::new();
        for (rank, parts) in self.ranks.iter().enumerate() {
            let mut own: HashMap<Group, (u64, u64)> = HashMap::new();
            // Evaluation is proven, too, but no part of a step.
            let of_step = (0..=UPDATE).flat_map(|part| tallies[parts[part]].iter().map(move |tally| (part, tally)));
            for (part, &(call, times)) in of_step {
                let call = self.call(call);
                let place = self.topology.index(call.group, rank);
                let bytes = times * call.bytes_sent(place, self.topology.size(call.group)) as u64;
                let (calls, sent) = own.entry(call.group).or_default();
                (*calls, *sent) = (*calls + times, *sent + bytes);
                proof.traffic[Traffic::of(call, part == UPDATE) as usize] += bytes;
            }
            proof.num_calls += parts.iter().flat_map(|&list| &tallies[list]).map(|(_, times)| times).sum::<u64>();
            for (group, (calls, bytes)) in own {
                let size = self.topology.size(group);
                let one = uses.entry(group).or_insert(GroupUse { group, size, num_groups: 0, calls: 0, bytes: 0 });
                one.num_groups += usize::from(self.topology.index(group, rank) == 0);
                (one.calls, one.bytes) = (one.calls.max(calls), one.bytes.max(bytes));
            }
        }
        proof.groups = uses.into_values().collect();
        proof.groups.sort_by_key(|one| one.group);
        proof
    }
}

fn intern(calls: &mut Vec<Call>, known: &mut HashMap<Call, u32>, call: Call) -> u32 {
    *known.entry(call).or_insert_with_key(|call| {
        calls.push(call.clone());
        calls.len() as u32 - 1
    })
}

/// Each call of a list, and how often it is made.
fn tally(list: &[Step]) -> Vec<(u32, u64)> {
    let mut times: HashMap<u32, u64> = HashMap::new();
    for step in list {
        if let Does::Call(call) = step.does {
            *times.entry(call).or_default() += 1;
        }
    }
    times.into_iter().collect()
}

/// Every group of more than one rank.
struct Groups {
    /// By kind, then by group: members in order.
    members: Vec<Vec<Vec<usize>>>,
    /// By kind, then by rank: which group.
    group_of: Vec<Vec<usize>>,
}

impl Groups {
    fn new(topology: &Topology) -> Groups {
        let mut groups = Groups { members: Vec::new(), group_of: Vec::new() };
        for kind in Group::ALL {
            let world = topology.mesh.world_size();
            let (mut all, mut group_of) = (Vec::new(), vec![usize::MAX; world]);
            for rank in 0..world {
                if group_of[rank] == usize::MAX {
                    let members = topology.members(kind, rank);
                    members.iter().for_each(|&member| group_of[member] = all.len());
                    all.push(members);
                }
            }
            groups.members.push(all);
            groups.group_of.push(group_of);
        }
        groups
    }

    fn of_kind(&self, kind: Group) -> &[Vec<usize>] {
        &self.members[kind as usize]
    }
}

/// How the groups of one kind are used in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupUse {
    /// Which.
    pub group: Group,
    /// Ranks in each.
    pub size: usize,
    /// How many there are, of those that make calls.
    pub num_groups: usize,
    /// Calls of the rank with the most.
    pub calls: u64,
    /// Bytes sent by the rank that sends most.
    pub bytes: u64,
}

/// What was shown, and what was counted on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Ranks.
    pub num_ranks: usize,
    /// Calls of all ranks in a step and an evaluation.
    pub num_calls: u64,
    /// The groups that make calls in a step.
    pub groups: Vec<GroupUse>,
    /// Bytes sent in a step by all ranks, by [`Traffic`].
    pub traffic: [u64; NUM_KINDS],
}
