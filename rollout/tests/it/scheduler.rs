//! The scheduler without tensors: whatever is asked of it, every sequence ends, within the bounds of every step.

use expect_test::expect;
use proptest::prelude::*;
use std::collections::HashMap;
use tangelo_kernels::op::attention::paged::BLOCK_TOKENS;
use tangelo_rollout::{Limits, Scheduler, SequenceId, StepPlan, StoppedBy};

#[derive(Clone, Copy, Debug)]
struct Ask {
    prompt: usize,
    samples: usize,
    length: usize,
    /// The step before which it is added.
    at: usize,
}

/// What a sequence should look like.
struct Model {
    computed: usize,
    known: usize,
    end: usize,
    forks: usize,
}

struct Simulation {
    scheduler: Scheduler,
    limits: Limits,
    sequences: HashMap<SequenceId, Model>,
    next: SequenceId,
    ended: usize,
}

impl Simulation {
    fn add(&mut self, ask: &Ask) {
        let samples = ask.samples.min(self.limits.max_num_seqs);
        let end = ask.prompt + ask.length;
        if !self.scheduler.fits(end) {
            return;
        }
        self.scheduler.add(self.next, ask.prompt, samples);
        self.sequences.insert(self.next, Model { computed: 0, known: ask.prompt, end, forks: samples - 1 });
        self.next += 1;
    }

    fn step(&mut self) -> StepPlan {
        let plan = self.scheduler.plan();
        for id in &plan.preempted {
            self.sequences.get_mut(id).unwrap().computed = 0;
        }
        let tokens: usize = plan.work.iter().map(|w| w.num_tokens).sum();
        assert!(tokens <= self.limits.max_num_batched_tokens);
        assert!(plan.work.len() <= self.limits.max_num_seqs);
        for work in &plan.work {
            let sequence = self.sequences.get_mut(&work.id).unwrap();
            assert_eq!(work.start, sequence.computed, "sequence {} goes on where it was", work.id);
            assert!(work.num_tokens > 0);
            sequence.computed += work.num_tokens;
            assert_eq!(work.up_to_date, sequence.computed == sequence.known);
            assert_eq!(self.scheduler.table(work.id).len(), sequence.computed.div_ceil(BLOCK_TOKENS));
        }
        let up_to_date: Vec<SequenceId> = plan.work.iter().filter(|w| w.up_to_date).map(|w| w.id).collect();
        for id in up_to_date {
            self.draw(id);
        }
        plan
    }

    fn draw(&mut self, id: SequenceId) {
        let parent = self.sequences.get_mut(&id).unwrap();
        let (computed, known, end) = (parent.computed, parent.known, parent.end);
        let mut drawn = vec![id];
        for _ in 0..std::mem::take(&mut parent.forks) {
            self.scheduler.fork(id, self.next);
            self.sequences.insert(self.next, Model { computed, known, end, forks: 0 });
            drawn.push(self.next);
            self.next += 1;
        }
        for id in drawn {
            let sequence = self.sequences.get_mut(&id).unwrap();
            sequence.known += 1;
            if sequence.known == sequence.end {
                self.scheduler.finish(id);
                self.sequences.remove(&id);
                self.ended += 1;
            } else {
                self.scheduler.append(id);
            }
        }
    }
}

fn simulate(asks: &[Ask], limits: Limits, num_blocks: usize) {
    let scheduler = Scheduler::new(limits, num_blocks);
    let mut simulation = Simulation { scheduler, limits, sequences: HashMap::new(), next: 0, ended: 0 };
    // Alone, one after another, with everything computed once more for every token.
    let bound: usize = asks.iter().map(|a| a.samples * (a.prompt + a.length) * (a.length + 1) + a.at + 2).sum();
    let mut step = 0;
    while step == 0 || !simulation.sequences.is_empty() || asks.iter().any(|a| a.at >= step) {
        asks.iter().filter(|a| a.at == step).for_each(|ask| simulation.add(ask));
        let plan = simulation.step();
        assert!(!plan.work.is_empty() || simulation.sequences.is_empty(), "nothing moves: {plan:?}");
        step += 1;
        assert!(step <= bound, "no end after {step} steps");
    }
    assert_eq!(simulation.scheduler.blocks().num_free(), num_blocks);
}

fn ask() -> impl Strategy<Value = Ask> {
    (1..300usize, 1..6usize, 1..120usize, 0..40usize).prop_map(|(prompt, samples, length, at)| Ask {
        prompt,
        samples,
        length,
        at,
    })
}

proptest! {
    #[test]
    fn every_sequence_ends(
        asks in prop::collection::vec(ask(), 1..12),
        max_num_seqs in 1..8usize,
        extra_tokens in 0..300usize,
        num_blocks in 7..30usize,
    ) {
        let limits = Limits { max_num_seqs, max_num_batched_tokens: max_num_seqs + extra_tokens };
        simulate(&asks, limits, num_blocks);
    }
}

fn scheduler(max_num_seqs: usize, max_num_batched_tokens: usize, num_blocks: usize) -> Scheduler {
    Scheduler::new(Limits { max_num_seqs, max_num_batched_tokens }, num_blocks)
}

/// What a plan says, in words.
fn words(plan: &StepPlan) -> String {
    let work = |w: &tangelo_rollout::Work| {
        format!("{}: {}+{}{}", w.id, w.start, w.num_tokens, if w.up_to_date { "!" } else { "" })
    };
    let work: Vec<String> = plan.work.iter().map(work).collect();
    format!("[{}] preempted {:?}, {:?}", work.join(", "), plan.preempted, plan.stopped_by)
}

#[test]
fn prompts_are_computed_in_pieces_beside_others() {
    let mut s = scheduler(4, 100, 100);
    s.add(1, 30, 1);
    s.add(2, 150, 1);
    expect!["[1: 0+30!, 2: 0+70] preempted [], TokenBudget"].assert_eq(&words(&s.plan()));
    s.append(1);
    s.add(3, 10, 1);
    expect!["[1: 30+1!, 2: 70+80!, 3: 0+10!] preempted [], Idle"].assert_eq(&words(&s.plan()));
}

#[test]
fn a_group_waits_for_slots_for_all_its_samples() {
    let mut s = scheduler(4, 100, 100);
    s.add(1, 10, 3);
    s.add(2, 10, 2);
    expect!["[1: 0+10!] preempted [], Slots"].assert_eq(&words(&s.plan()));
    s.fork(1, 3);
    s.fork(1, 4);
    [1, 3, 4].iter().for_each(|&id| s.append(id));
    let plan = s.plan();
    expect!["[1: 10+1!, 3: 10+1!, 4: 10+1!] preempted [], Slots"].assert_eq(&words(&plan));
    assert_eq!(plan.copies.len(), 2, "the last of three writes in place");
    s.finish(4);
    [1, 3].iter().for_each(|&id| s.append(id));
    expect!["[1: 11+1!, 3: 11+1!, 2: 0+10!] preempted [], Idle"].assert_eq(&words(&s.plan()));
}

#[test]
fn the_newest_is_preempted_and_comes_back_first() {
    let mut s = scheduler(4, 200, 4);
    s.add(1, 64, 1);
    s.add(2, 64, 1);
    s.add(3, 64, 1);
    // 1 and 2 come in: 3 would leave no block for the next tokens of those.
    expect!["[1: 0+64!, 2: 0+64!] preempted [], Memory"].assert_eq(&words(&s.plan()));
    assert_eq!(s.num_waiting(), 1);
    for _ in 0..64 {
        [1, 2].iter().for_each(|&id| s.append(id));
        let plan = s.plan();
        assert_eq!(plan.stopped_by, StoppedBy::Memory);
        assert!(plan.preempted.is_empty());
    }
    [1, 2].iter().for_each(|&id| s.append(id));
    expect!["[1: 128+1!] preempted [2], Memory"].assert_eq(&words(&s.plan()));
    s.finish(1);
    expect!["[2: 0+129!] preempted [], Memory"].assert_eq(&words(&s.plan()));
}

#[test]
fn sequences_that_never_fit_are_known_beforehand() {
    let s = scheduler(4, 200, 4);
    assert!(s.fits(256) && !s.fits(257));
}
