//! A training step as data: what a rank computes and communicates, in order.
//!
//! The trainer interprets a [`Program`]; the prover walks the very same one for every rank without devices, and counts
//! its [`Call`]s. Nothing here knows sizes, tensors or communicators: what an instruction moves is worked out beside it
//! (`tangelo-planner`), how it is done by its interpreter (`tangelo-trainer`).
//!
//! ```text
//!   values     x  the residual stream, [tokens of this rank, D]
//!              w  what is being worked on: [h], [q, k, v], [o] or nothing
//!   gradients  of x and w, on the way back
//! ```
//!
//! A block is cut into [`Part`]s; a run of parts without communication between is one local graph.

use crate::layout::part_range;
use crate::pipeline::Pass;
use crate::topology::Group;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

/// A part of the model whose weights are gathered, freed, reduced and updated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Unit {
    /// The token embedding.
    Embedding,
    /// A block, by layer.
    Block(usize),
    /// The final norm and the head's own weights.
    Head,
}

/// A part of a block, in order of computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Part {
    /// w = norm(x).
    InputNorm,
    /// w = q, k and v of w, positions applied.
    Qkv,
    /// w = attention of w.
    Attend,
    /// w = output projection of w.
    Output,
    /// x = x + w.
    AttentionResidual,
    /// w = norm(x).
    PostNorm,
    /// w = feed-forward of w.
    FeedForward,
    /// x = x + w.
    FeedForwardResidual,
}

impl Part {
    /// Every part, in order.
    pub const ALL: [Part; 8] = [
        Part::InputNorm,
        Part::Qkv,
        Part::Attend,
        Part::Output,
        Part::AttentionResidual,
        Part::PostNorm,
        Part::FeedForward,
        Part::FeedForwardResidual,
    ];
}

/// Neighbouring parts that run as one local graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Parts {
    /// The first.
    pub first: Part,
    /// The last, included.
    pub last: Part,
}

impl Parts {
    /// The whole block.
    pub const BLOCK: Parts = Parts { first: Part::InputNorm, last: Part::FeedForwardResidual };

    /// Whether `part` is among them.
    pub fn contains(self, part: Part) -> bool {
        self.first <= part && part <= self.last
    }
}

/// What ranks give each other between the parts of a block. Applied to `w` forward, to its gradients backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Exchange {
    /// Each tensor rank's tokens, from all of them.
    GatherSequence,
    /// The sum over tensor ranks, of which each keeps its tokens.
    ScatterSequence,
    /// From some tokens of all heads to all tokens of some heads.
    TokensToHeads,
    /// Back.
    HeadsToTokens,
}

/// One thing that a rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Instruction {
    /// The whole batch's tokens and loss weight, from all ranks that read rows.
    CountTokens,
    /// Asks for a unit's weights.
    StartGather(Unit),
    /// Waits for them.
    FinishGather(Unit),
    /// Gives their memory back.
    Release(Unit),
    /// Makes room for a unit's gradients of one micro-batch.
    OpenGradient(Unit),
    /// Sends a unit's gradients of one micro-batch to the ranks that keep them.
    StartReduce(Unit),
    /// Waits for the sum and adds it to what this rank keeps.
    FinishReduce(Unit),
    /// Takes a micro-batch's rows and makes `x` of its tokens.
    Embed(usize),
    /// The embedding's gradient, from that of `x`.
    EmbedBackward(usize),
    /// Takes a micro-batch's rows and `x` (or its gradient) from the stage before (after).
    Receive(Pass, usize),
    /// Gives `x` (or its gradient) to the stage after (before).
    Send(Pass, usize),
    /// Keeps `x`, to begin again from it.
    Stash(usize),
    /// Begins again from the `x` kept last.
    Restore(usize),
    /// Runs parts of a block; with a graph where `keep`.
    Block {
        /// Which block.
        layer: usize,
        /// Which parts.
        parts: Parts,
        /// Which micro-batch.
        micro_batch: usize,
        /// Whether backward will follow this run.
        keep: bool,
    },
    /// Goes back through the graph kept last.
    BlockBackward {
        /// Which block.
        layer: usize,
        /// Which micro-batch.
        micro_batch: usize,
    },
    /// Back through `x + w` alone: the gradient of `x` is that of `w`, too, and nothing has to be kept, or run again, for it.
    ResidualBackward(usize),
    /// Attention whose keys and values come from the ranks of the ring.
    RingAttend {
        /// Which block.
        layer: usize,
        /// Which micro-batch.
        micro_batch: usize,
        /// Whether backward will follow this run.
        keep: bool,
    },
    /// Its backward.
    RingAttendBackward {
        /// Which block.
        layer: usize,
        /// Which micro-batch.
        micro_batch: usize,
    },
    /// Gives and takes parts of `w`, or of its gradients.
    Exchange {
        /// What.
        exchange: Exchange,
        /// Of the values or of the gradients.
        pass: Pass,
        /// Which block.
        layer: usize,
        /// Which micro-batch.
        micro_batch: usize,
    },
    /// Final norm, head and loss; with the gradient of `x` where training.
    Loss {
        /// Which micro-batch.
        micro_batch: usize,
        /// Whether gradients are made.
        train: bool,
    },
    /// Sends the kept gradients of a bucket's units to the ranks that own their states, or, where the scope of states is
    /// that of gradients, asks for their sum over the scope's replicas.
    StartBucket(usize),
    /// Where both is to be done: waits for the first, asks for the second.
    SumBucket(usize),
    /// Waits for what was asked last; then this rank has the sums of what it owns.
    FinishBucket(usize),
    /// The loss, from all ranks.
    ShareLoss,
    /// Sums the gradients of weights that several ranks of the model hold.
    SumReplicated,
    /// The global norm of the gradient.
    Norm,
    /// Muon's update of the hidden matrices of a bucket's units that this rank owns, clipped; nothing where loss or norm is
    /// not finite.
    ///
    /// Where tensor parallelism cuts matrices, one all-gather over [`Group::Tensor`] in fp32 makes the updates of all of
    /// them whole. A tensor rank's count is the sum, over the matrices of the bucket whose states it owns, of the elements
    /// of its part; a part that several tensor ranks hold (of k and v) is sent by the first of them only. All ranks of the
    /// group own parts of the same matrices; where these are none, nothing is called.
    UpdateMatrices(usize),
    /// Clips and updates what else this rank owns with AdamW, unless loss or norm is not finite.
    Update,
    /// Gives the new weights of some units to the ranks that hold them.
    PublishBucket(usize),
}

impl Instruction {
    /// The same for the first micro-batch: what it communicates does not depend on which one it is for.
    pub fn of_any_micro_batch(self) -> Instruction {
        use Instruction as I;
        match self {
            I::Embed(_) => I::Embed(0),
            I::EmbedBackward(_) => I::EmbedBackward(0),
            I::Receive(pass, _) => I::Receive(pass, 0),
            I::Send(pass, _) => I::Send(pass, 0),
            I::Stash(_) => I::Stash(0),
            I::Restore(_) => I::Restore(0),
            I::ResidualBackward(_) => I::ResidualBackward(0),
            I::Block { layer, parts, keep, .. } => I::Block { layer, parts, micro_batch: 0, keep },
            I::BlockBackward { layer, .. } => I::BlockBackward { layer, micro_batch: 0 },
            I::RingAttend { layer, keep, .. } => I::RingAttend { layer, micro_batch: 0, keep },
            I::RingAttendBackward { layer, .. } => I::RingAttendBackward { layer, micro_batch: 0 },
            I::Exchange { exchange, pass, layer, .. } => I::Exchange { exchange, pass, layer, micro_batch: 0 },
            I::Loss { train, .. } => I::Loss { micro_batch: 0, train },
            other => other,
        }
    }
}

/// One rank's share of a training step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Forward and backward of all micro-batches, and the sum of their gradients over ranks.
    pub pass: Vec<Instruction>,
    /// Clip, update, publish.
    pub update: Vec<Instruction>,
    /// Forward only, of one micro-batch (number 0).
    pub evaluate: Vec<Instruction>,
    /// The units that each bucket reduces and publishes, as a range of the rank's units.
    pub buckets: Vec<Range<usize>>,
}

impl Program {
    /// Forward and backward of one micro-batch through a whole model on one rank, with a block for each of `again`:
    /// whether it keeps only its input and runs again.
    pub fn alone(again: &[bool]) -> Vec<Instruction> {
        let block = |layer, keep| Instruction::Block { layer, parts: Parts::BLOCK, micro_batch: 0, keep };
        let mut list = vec![Instruction::CountTokens, Instruction::Embed(0)];
        for (layer, &again) in again.iter().enumerate() {
            list.extend(again.then_some(Instruction::Stash(0)));
            list.push(block(layer, !again));
        }
        list.push(Instruction::Loss { micro_batch: 0, train: true });
        for (layer, &again) in again.iter().enumerate().rev() {
            if again {
                list.extend([Instruction::Restore(0), block(layer, true)]);
            }
            list.push(Instruction::BlockBackward { layer, micro_batch: 0 });
        }
        list.extend([Instruction::EmbedBackward(0), Instruction::ShareLoss]);
        list
    }
}

/// What a call does to the ranks of its group, as communicators name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallKind {
    /// Sum, everywhere.
    AllReduce,
    /// Concatenation, everywhere.
    AllGather,
    /// Sum, each keeping a part.
    ReduceScatter,
    /// A part for each from each.
    AllToAll,
    /// To the next and from the one before.
    Shift,
    /// To one peer.
    Send,
    /// From one peer.
    Receive,
}

impl CallKind {
    /// The name, as errors and tables show it.
    pub const fn name(self) -> &'static str {
        match self {
            CallKind::AllReduce => "all_reduce",
            CallKind::AllGather => "all_gather",
            CallKind::ReduceScatter => "reduce_scatter",
            CallKind::AllToAll => "all_to_all",
            CallKind::Shift => "shift",
            CallKind::Send => "send",
            CallKind::Receive => "recv",
        }
    }
}

/// Up to this many bytes an all-reduce is one exchange of whole tensors instead of two of parts: same bits, half the
/// round trips.
pub const SMALL_ALL_REDUCE_BYTES: usize = 16 << 10;

/// One communication call of one rank, with everything its partners must agree on. Ranks in here are places in the
/// group.
///
/// Sends and receives run in channels, one for each pair of neighbouring [`Group::Stages`] and direction, so the sender
/// and the receiver name it. Counts are shared: a thousand ranks make the same call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The group it runs in.
    pub group: Group,
    /// What it does.
    pub kind: CallKind,
    /// Bytes per element.
    pub element_bytes: usize,
    /// Elements: per rank of the group for all-gather and reduce-scatter, to each rank for all-to-all, else one number.
    pub counts: Arc<[usize]>,
    /// What comes in from each rank in an all-to-all; what comes in for a shift; else nothing.
    pub counts_in: Arc<[usize]>,
    /// The other rank of a send or receive; where a shift goes to (what comes in comes from the opposite neighbour).
    pub peer: Option<usize>,
}

impl Call {
    /// Bytes that the rank at `place` of a group of `size` sends to others.
    pub fn bytes_sent(&self, place: usize, size: usize) -> usize {
        let others =
            || self.counts.iter().enumerate().filter(|(rank, _)| *rank != place).map(|(_, n)| n).sum::<usize>();
        let elements = match self.kind {
            CallKind::AllReduce => self.elements_reduced(place, size),
            CallKind::AllGather => (size - 1) * self.counts[place],
            CallKind::ReduceScatter | CallKind::AllToAll => others(),
            CallKind::Shift | CallKind::Send => self.counts[0],
            CallKind::Receive => 0,
        };
        elements * self.element_bytes
    }

    /// A small sum is made of everybody's whole tensor, a large one of a reduce-scatter and an all-gather.
    fn elements_reduced(&self, place: usize, size: usize) -> usize {
        let n = self.counts[0];
        if n * self.element_bytes <= SMALL_ALL_REDUCE_BYTES {
            return (size - 1) * n;
        }
        let own = part_range(n, 1, size, place).len();
        n - own + (size - 1) * own
    }
}

impl Hash for Call {
    /// Of long counts, the ends: equality looks at the rest.
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.group, self.kind, self.element_bytes, self.peer).hash(state);
        for counts in [&self.counts, &self.counts_in] {
            (counts.len(), counts.first(), counts.last()).hash(state);
        }
    }
}

impl fmt::Display for Call {
    /// `all_gather of 2 B x [8, 8]`, what comes in after `for`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} B x {}", self.kind.name(), self.element_bytes, Counts(&self.counts))?;
        if !self.counts_in.is_empty() {
            write!(f, " for {}", Counts(&self.counts_in))?;
        }
        Ok(())
    }
}

/// Numbers of elements; of many, the first.
struct Counts<'a>(&'a [usize]);

impl fmt::Display for Counts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [one] => write!(f, "{one}"),
            few if few.len() <= 8 => write!(f, "{few:?}"),
            many => write!(f, "[{}, {}, {}, .. {} in all]", many[0], many[1], many[2], many.len()),
        }
    }
}
