//! Which sequences compute which tokens in a step: a function of its own state, with no clock and no tensors.
//!
//! Prompts and generated tokens are the same to it: a sequence has tokens that are known and tokens that are computed, and
//! a step closes the gap within one budget of tokens. A prompt longer than the budget is computed in pieces; a preempted
//! sequence has its generated tokens computed again like a prompt.
//!
//! Policies: first come, first served. Sequences that run come before those that wait, the oldest first; where blocks run
//! out the newest is preempted and goes to the front of those that wait. So the oldest always moves on, and every sequence
//! ends as long as each fits into memory alone, which [`Scheduler::fits`] asks before it is added.

use crate::blocks::{BlockCopy, BlockManager, blocks_for};
use std::collections::{HashMap, VecDeque};

/// A sequence's name within an engine.
pub type SequenceId = u64;

/// Bounds of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Tokens computed in one step.
    pub max_num_batched_tokens: usize,
}

/// Tokens of one sequence to be computed in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// The sequence.
    pub id: SequenceId,
    /// Tokens that were computed before.
    pub start: usize,
    /// Tokens to be computed.
    pub num_tokens: usize,
    /// Whether all its tokens are computed then, so that the next can be drawn.
    pub up_to_date: bool,
}

/// Why a step does no more than it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoppedBy {
    /// There is no more to do.
    Idle,
    /// The budget of tokens.
    TokenBudget,
    /// `max_num_seqs`.
    Slots,
    /// Too few free blocks to let another sequence in, or to keep all that run.
    Memory,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// What to compute, the oldest sequence first.
    pub work: Vec<Work>,
    /// Blocks to be copied first.
    pub copies: Vec<BlockCopy>,
    /// Sequences whose blocks were taken away, the newest first.
    pub preempted: Vec<SequenceId>,
    /// Sequences that came in.
    pub admitted: Vec<SequenceId>,
    /// Why there is no more.
    pub stopped_by: StoppedBy,
}

#[derive(Clone, Debug)]
struct Entry {
    num_tokens: usize,
    num_computed: usize,
    /// Samples that will be forked off when the first token is drawn.
    forks: usize,
    table: Vec<u32>,
}

impl Entry {
    fn slots(&self) -> usize {
        1 + self.forks
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockManager,
    entries: HashMap<SequenceId, Entry>,
    waiting: VecDeque<SequenceId>,
    /// In the order of admission.
    running: Vec<SequenceId>,
}

impl Scheduler {
    /// With `num_blocks` blocks of memory.
    pub fn new(limits: Limits, num_blocks: usize) -> Scheduler {
        let (entries, waiting) = (HashMap::new(), VecDeque::new());
        Scheduler { limits, blocks: BlockManager::new(num_blocks), entries, waiting, running: Vec::new() }
    }

    /// Whether a sequence of `num_tokens` can be computed when it is alone.
    pub fn fits(&self, num_tokens: usize) -> bool {
        blocks_for(num_tokens) <= self.blocks.num_blocks()
    }

    /// A new sequence of `num_tokens` known tokens, of which `samples` will be generated; it waits.
    pub fn add(&mut self, id: SequenceId, num_tokens: usize, samples: usize) {
        assert!(num_tokens > 0 && samples > 0 && samples <= self.limits.max_num_seqs, "sequence {id}");
        let entry = Entry { num_tokens, num_computed: 0, forks: samples - 1, table: Vec::new() };
        assert!(self.entries.insert(id, entry).is_none(), "sequence {id} is there already");
        self.waiting.push_back(id);
    }

    /// Another sequence with the same tokens and blocks as `parent`, which is up to date; it runs.
    pub fn fork(&mut self, parent: SequenceId, child: SequenceId) {
        let entry = self.entry(parent);
        assert!(entry.forks > 0 && entry.num_computed == entry.num_tokens, "sequence {parent} cannot be forked now");
        entry.forks -= 1;
        let mut copy = Entry { forks: 0, ..entry.clone() };
        copy.table = self.blocks.fork(&copy.table);
        assert!(self.entries.insert(child, copy).is_none(), "sequence {child} is there already");
        self.running.push(child);
    }

    /// A token of a sequence was drawn.
    pub fn append(&mut self, id: SequenceId) {
        self.entry(id).num_tokens += 1;
    }

    /// A sequence is over; its blocks are free.
    pub fn finish(&mut self, id: SequenceId) {
        let mut entry = self.entries.remove(&id).unwrap_or_else(|| panic!("no sequence {id}"));
        self.blocks.release(&mut entry.table);
        self.running.retain(|&other| other != id);
        self.waiting.retain(|&other| other != id);
    }

    /// Takes all blocks away; what ran comes first when it goes on.
    pub fn preempt_all(&mut self) -> Vec<SequenceId> {
        std::iter::from_fn(|| self.preempt_newest()).collect()
    }

    /// The blocks of a sequence, in the order of its tokens.
    pub fn table(&self, id: SequenceId) -> &[u32] {
        &self.entries[&id].table
    }

    /// Sequences that run.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The memory.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// What the next step computes; its tokens count as computed from now on.
    pub fn plan(&mut self) -> StepPlan {
        let mut plan = StepPlan {
            work: Vec::new(),
            copies: Vec::new(),
            preempted: Vec::new(),
            admitted: Vec::new(),
            stopped_by: StoppedBy::Idle,
        };
        let mut budget = self.limits.max_num_batched_tokens;
        self.plan_running(&mut plan, &mut budget);
        if plan.stopped_by == StoppedBy::Idle {
            self.admit(&mut plan, &mut budget);
        }
        if plan.stopped_by == StoppedBy::Idle && plan.work.iter().any(|work| !work.up_to_date) {
            plan.stopped_by = StoppedBy::TokenBudget;
        }
        plan
    }

    fn plan_running(&mut self, plan: &mut StepPlan, budget: &mut usize) {
        let mut next = 0;
        while let Some(&id) = self.running.get(next) {
            if *budget == 0 {
                plan.stopped_by = StoppedBy::TokenBudget;
                return;
            }
            if self.schedule(id, plan, budget) {
                next += 1;
            } else {
                plan.preempted.extend(self.preempt_newest());
                plan.stopped_by = StoppedBy::Memory;
            }
        }
    }

    fn admit(&mut self, plan: &mut StepPlan, budget: &mut usize) {
        while let Some(&id) = self.waiting.front() {
            plan.stopped_by = if *budget == 0 {
                StoppedBy::TokenBudget
            } else if !self.has_slots(id) {
                StoppedBy::Slots
            } else if !self.has_memory(id) {
                StoppedBy::Memory
            } else {
                StoppedBy::Idle
            };
            if plan.stopped_by != StoppedBy::Idle {
                return;
            }
            self.waiting.pop_front();
            self.running.push(id);
            plan.admitted.push(id);
            let scheduled = self.schedule(id, plan, budget);
            assert!(scheduled, "sequence {id} came in and has no memory");
        }
    }

    fn has_slots(&self, id: SequenceId) -> bool {
        let taken: usize = self.running.iter().map(|other| self.entries[other].slots()).sum();
        taken + self.entries[&id].slots() <= self.limits.max_num_seqs
    }

    /// Room for all its tokens, and a block for each of its samples and of those that run, which each needs within its next
    /// 64 tokens: otherwise one of them would be preempted soon. A sequence alone needs no more than its tokens.
    fn has_memory(&self, id: SequenceId) -> bool {
        let entry = &self.entries[&id];
        let soon = if self.running.is_empty() { 0 } else { self.running.len() + entry.forks };
        blocks_for(entry.num_tokens) + soon <= self.blocks.num_free()
    }

    /// Gives a sequence its share of the step, or answers that there is no memory.
    fn schedule(&mut self, id: SequenceId, plan: &mut StepPlan, budget: &mut usize) -> bool {
        let entry = self.entries.get_mut(&id).expect("a sequence that runs has an entry");
        let num_tokens = (entry.num_tokens - entry.num_computed).min(*budget);
        let (start, end) = (entry.num_computed, entry.num_computed + num_tokens);
        let Ok(copy) = self.blocks.extend(&mut entry.table, start, end) else { return false };
        entry.num_computed = end;
        *budget -= num_tokens;
        plan.copies.extend(copy);
        plan.work.push(Work { id, start, num_tokens, up_to_date: end == entry.num_tokens });
        true
    }

    fn preempt_newest(&mut self) -> Option<SequenceId> {
        let id = self.running.pop()?;
        let entry = self.entries.get_mut(&id).expect("a sequence that runs has an entry");
        self.blocks.release(&mut entry.table);
        entry.num_computed = 0;
        self.waiting.push_front(id);
        Some(id)
    }

    fn entry(&mut self, id: SequenceId) -> &mut Entry {
        self.entries.get_mut(&id).unwrap_or_else(|| panic!("no sequence {id}"))
    }
}
