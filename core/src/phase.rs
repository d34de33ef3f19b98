//! What a rank is doing within a step, by one word: in reports about failures, and where tests plant a fault.

use crate::program::Instruction;
use std::fmt;

/// A phase of a step. Phases may come several times in a step, in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Phase {
    /// The whole batch's tokens are counted.
    Count = 1,
    /// Weights come together.
    Gather = 2,
    /// Tokens become values, and the way back.
    Embed = 3,
    /// A block computes, forward or backward.
    Block = 4,
    /// Tensor or head ranks exchange tokens.
    Exchange = 5,
    /// Keys and values go round.
    Ring = 6,
    /// Values or gradients go from stage to stage.
    Pipeline = 7,
    /// The loss.
    Loss = 8,
    /// Gradients are summed.
    Reduce = 9,
    /// The norm of the gradient.
    Norm = 10,
    /// Weights change.
    Update = 11,
    /// New weights go where they are used.
    Publish = 12,
    /// Numbers about the step are collected.
    Metrics = 13,
    /// A checkpoint is handed over.
    Save = 14,
}

impl Phase {
    /// Every phase, in the order of their codes.
    pub const ALL: [Phase; 14] = [
        Phase::Count,
        Phase::Gather,
        Phase::Embed,
        Phase::Block,
        Phase::Exchange,
        Phase::Ring,
        Phase::Pipeline,
        Phase::Loss,
        Phase::Reduce,
        Phase::Norm,
        Phase::Update,
        Phase::Publish,
        Phase::Metrics,
        Phase::Save,
    ];

    /// The phase that an instruction belongs to.
    pub fn of(instruction: Instruction) -> Phase {
        use Instruction as I;
        match instruction {
            I::CountTokens => Phase::Count,
            I::StartGather(_) | I::FinishGather(_) | I::Release(_) => Phase::Gather,
            I::Embed(_) | I::EmbedBackward(_) => Phase::Embed,
            I::Stash(_) | I::Restore(_) | I::Block { .. } => Phase::Block,
            I::BlockBackward { .. } | I::ResidualBackward(_) => Phase::Block,
            I::Exchange { .. } => Phase::Exchange,
            I::RingAttend { .. } | I::RingAttendBackward { .. } => Phase::Ring,
            I::Receive(..) | I::Send(..) => Phase::Pipeline,
            I::Loss { .. } | I::ShareLoss => Phase::Loss,
            I::OpenGradient(_) | I::StartReduce(_) | I::FinishReduce(_) | I::SumReplicated => Phase::Reduce,
            I::StartBucket(_) | I::SumBucket(_) | I::FinishBucket(_) => Phase::Reduce,
            I::Norm => Phase::Norm,
            I::UpdateMatrices(_) | I::Update => Phase::Update,
            I::PublishBucket(_) => Phase::Publish,
        }
    }

    /// Its word.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Count => "count",
            Phase::Gather => "gather",
            Phase::Embed => "embed",
            Phase::Block => "block",
            Phase::Exchange => "exchange",
            Phase::Ring => "ring",
            Phase::Pipeline => "pipeline",
            Phase::Loss => "loss",
            Phase::Reduce => "reduce",
            Phase::Norm => "norm",
            Phase::Update => "update",
            Phase::Publish => "publish",
            Phase::Metrics => "metrics",
            Phase::Save => "save",
        }
    }

    /// The phase of this name.
    pub fn named(name: &str) -> Option<Phase> {
        Phase::ALL.into_iter().find(|phase| phase.name() == name)
    }

    /// The phase of this code; `None` for 0, which stands for no phase.
    pub fn from_code(code: u8) -> Option<Phase> {
        Phase::ALL.get(usize::from(code).checked_sub(1)?).copied()
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a rank is: in which step, and in which phase of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The step, from 1.
    pub step: u64,
    /// The phase, where the step is past its beginning.
    pub phase: Option<Phase>,
}

impl fmt::Display for Moment {
    /// `in phase ring of step 3`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.phase {
            Some(phase) => write!(f, "in phase {phase} of step {}", self.step),
            None => write!(f, "at the beginning of step {}", self.step),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_lead_back() {
        for phase in Phase::ALL {
            assert_eq!((Phase::from_code(phase as u8), Phase::named(phase.name())), (Some(phase), Some(phase)));
        }
        assert_eq!((Phase::from_code(0), Phase::from_code(15), Phase::named("lunch")), (None, None, None));
    }
}
