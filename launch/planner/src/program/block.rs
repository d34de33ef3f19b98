//! A block as steps, and which of them run again in backward.

use tangelo_configs::Plan;
use tangelo_configs::job::Recompute;
use tangelo_core::topology::Group as Ranks;
use tangelo_core::{Exchange, Instruction, Part, Parts, Pass};

/// One step of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Parts that run as one local graph.
    Compute(Parts),
    /// Parts of tensors given and taken.
    Exchange(Exchange),
    /// Attention over the ring.
    Ring,
}

impl Step {
    /// Its instruction on the way to the loss.
    pub fn forward(self, layer: usize, micro_batch: usize, keep: bool) -> Instruction {
        match self {
            Step::Compute(parts) => Instruction::Block { layer, parts, micro_batch, keep },
            Step::Exchange(exchange) => Instruction::Exchange { exchange, pass: Pass::Forward, layer, micro_batch },
            Step::Ring => Instruction::RingAttend { layer, micro_batch, keep },
        }
    }

    /// Its instruction on the way back: exchanges are replaced by their transposes.
    fn backward(self, layer: usize, micro_batch: usize) -> Instruction {
        match self {
            Step::Compute(_) => Instruction::BlockBackward { layer, micro_batch },
            Step::Exchange(exchange) => {
                Instruction::Exchange { exchange: transpose(exchange), pass: Pass::Backward, layer, micro_batch }
            }
            Step::Ring => Instruction::RingAttendBackward { layer, micro_batch },
        }
    }
}

/// What takes gradients back the way that values came.
fn transpose(exchange: Exchange) -> Exchange {
    match exchange {
        Exchange::GatherSequence => Exchange::ScatterSequence,
        Exchange::ScatterSequence => Exchange::GatherSequence,
        Exchange::TokensToHeads => Exchange::HeadsToTokens,
        Exchange::HeadsToTokens => Exchange::TokensToHeads,
    }
}

/// Steps that are kept, or run again, together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// In order.
    pub steps: Vec<Step>,
    /// Whether only their input is kept.
    pub again: bool,
}

impl Group {
    /// What runs again before backward: all but the last sum of tensor ranks and its addition to the residual stream, whose
    /// gradient needs no values.
    pub fn replayed(&self) -> &[Step] {
        match self.steps.as_slice() {
            [rest @ .., Step::Exchange(Exchange::ScatterSequence), Step::Compute(parts)] if is_residual(*parts) => rest,
            all => all,
        }
    }

    /// The way back, for a micro-batch.
    pub fn backward(&self, layer: usize, micro_batch: usize) -> Vec<Instruction> {
        let replayed = if self.again { self.replayed().len() } else { self.steps.len() };
        let back = |(at, step): (usize, &Step)| match step {
            Step::Compute(_) if at >= replayed => Instruction::ResidualBackward(micro_batch),
            step => step.backward(layer, micro_batch),
        };
        self.steps.iter().enumerate().rev().map(back).collect()
    }
}

fn is_residual(parts: Parts) -> bool {
    parts.first == parts.last && matches!(parts.first, Part::AttentionResidual | Part::FeedForwardResidual)
}

/// The steps of block `layer`, in order.
pub fn groups(plan: &Plan, layer: usize) -> Vec<Group> {
    let split = |group| plan.topology.size(group) > 1;
    let (tensor, heads, ring) = (split(Ranks::Tensor), split(Ranks::Heads), split(Ranks::Ring));
    let one = |part| Step::Compute(Parts { first: part, last: part });
    let given = |there: bool, exchange| there.then_some(Step::Exchange(exchange));
    let attention = [
        Some(one(Part::InputNorm)),
        given(tensor, Exchange::GatherSequence),
        Some(one(Part::Qkv)),
        given(heads, Exchange::TokensToHeads),
        Some(if ring { Step::Ring } else { one(Part::Attend) }),
        given(heads, Exchange::HeadsToTokens),
        Some(one(Part::Output)),
        given(tensor, Exchange::ScatterSequence),
        Some(one(Part::AttentionResidual)),
    ];
    let feed_forward = [
        Some(one(Part::PostNorm)),
        given(tensor, Exchange::GatherSequence),
        Some(one(Part::FeedForward)),
        given(tensor, Exchange::ScatterSequence),
        Some(one(Part::FeedForwardResidual)),
    ];
    let (attention, feed_forward) = (attention.into_iter().flatten(), feed_forward.into_iter().flatten());
    let group = |steps, again| Group { steps, again };
    match plan.recompute(layer) {
        Recompute::None => vec![group(merge(attention.chain(feed_forward)), false)],
        Recompute::Full => vec![group(merge(attention.chain(feed_forward)), true)],
        Recompute::Attention => vec![group(merge(attention), true), group(merge(feed_forward), false)],
        Recompute::FeedForward => vec![group(merge(attention), false), group(merge(feed_forward), true)],
    }
}

/// Joins neighbouring parts.
fn merge(steps: impl Iterator<Item = Step>) -> Vec<Step> {
    let mut merged: Vec<Step> = Vec::new();
    for step in steps {
        match (merged.last_mut(), step) {
            (Some(Step::Compute(open)), Step::Compute(next)) => open.last = next.last,
            _ => merged.push(step),
        }
    }
    merged
}
