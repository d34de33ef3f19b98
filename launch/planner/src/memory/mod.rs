//! Memory of the rank with the most, predicted item by item.
//!
//! Every item is a documented sum, so that a measurement can be laid beside it and the difference has a place. With e
//! bytes per element of parameters and activations (4 or 2); P parameters of one tensor rank of the stage, U of its
//! largest block; weights cut over p ranks, gradients over g, states over z; T tokens per micro-batch, of which a rank
//! has T_o in its residual stream (cut over cp and tp), T_c in its products (cp) and T_a in attention (ring); F
//! micro-batches in flight at once in the stage's schedule:
//!
//! | item | bytes |
//! |---|---|
//! | parameters | e P / p |
//! | main gradients | 4 P / g, always fp32 |
//! | master weights | 4 P / z where e = 2, else the parameters themselves |
//! | optimizer states | 8 P / z; 4 for matrices under Muon |
//! | activations | F times the sum over the stage's blocks of [`saved_bytes`] |
//! | inputs | F T_c times the bytes of ids, positions, targets, weight and rotary angles |
//! | gathered weights | e P where p > 1 and weights are kept for the pass |
//! | head and loss | final norm in, out and their gradients: 4 e D T_o, with tp 2 e D T_c gathered; a chunk of C tokens: C V / tp (e + 8 + e); the head's chunk gradient e D V / tp where e = 2 |
//! | whole head | e (and 4, where gradients are cut) times its parameters, those of a tied embedding included; e U of the last block |
//! | backward of a block | gradients alive at once, a recomputed part's own activations, a weight gradient where e = 2; buffers of the exchange of heads and of the ring |
//! | whole blocks | 2 e U: this one and the next; 4 (2 U + U / g): gradients made, sent and arriving; a tied embedding's |
//! | whole embedding | e (2 E + U): as it arrives, unpacked, the first block; or 4 (2 E + E / g) |
//! | leaving buckets | of several, the largest of kept gradients in fp32: sent, received and summed, beside backward |
//! | collectives | the largest bucket of kept gradients twice (sent, received) in fp32; of kept and owned weights |
//! | matrices | Muon's: 4 of the largest matrix and 2 of its smaller side squared, in fp32; what tensor ranks give each other |
//! | checkpoint copy | 12 P / z (weights and moments in fp32), held by the host while files are written |
//!
//! The peak is what persists plus the largest of what comes and goes: the loss, or the backward of a block, with all
//! activations kept; the embedding, with those of the other micro-batches in flight; or what follows backward. Of all
//! stages, the one with the highest peak is shown. Scopes are taken to cut evenly (they do but for a few chunks of rows);
//! matrices that Muon owns whole are counted where most of them lie.

mod activations;
mod units;

pub use activations::RankTokens;

use crate::program;
use crate::table::{Align, Table, bytes, count};
pub use activations::forward_bytes;
use activations::{LocalBlock, distribution_bytes, input_bytes, loss_bytes};
use std::ops::Range;
use tangelo_configs::Plan;
use tangelo_configs::job::{AsyncMode, DeviceChoice, OptimizerName, Recompute};
use tangelo_core::pipeline::most_in_flight;
use tangelo_core::{Group, Level};
use units::StageUnits;

/// Tokens whose logits exist at once; the trainer's choice.
pub const LOSS_CHUNK_TOKENS: usize = 512;

/// Predicted bytes of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The stage of the rank.
    pub stage: usize,
    /// Elements of parameters that it computes with.
    pub num_parameters: u64,
    /// Parameters in their type.
    pub parameters: u64,
    /// Gradients in fp32.
    pub gradients: u64,
    /// fp32 copies of parameters of a smaller type.
    pub master_weights: u64,
    /// AdamW's two moments, Muon's momentum, in fp32.
    pub optimizer_states: u64,
    /// Micro-batches whose activations are kept at once.
    pub in_flight: u64,
    /// Kept by blocks from forward to backward, for all micro-batches in flight.
    pub activations: u64,
    /// Ids, positions, targets, weights and rotary angles of all micro-batches in flight.
    pub inputs: u64,
    /// Weights that are gathered once for the pass.
    pub gathered_weights: u64,
    /// Final norm, one chunk of logits and their gradients.
    pub loss: u64,
    /// Weights and gradients of the head, where they are cut and now whole.
    pub whole_head: u64,
    /// What the backward of one block needs beside what was kept.
    pub backward: u64,
    /// Weights and gradients of the blocks at work, where they are cut and now whole.
    pub whole_blocks: u64,
    /// Likewise of the embedding.
    pub whole_embedding: u64,
    /// Buckets of gradients on their way while backward goes on.
    pub leaving: u64,
    /// Activations and inputs that are still kept when the first of them leaves.
    pub kept_then: u64,
    /// Buffers of collectives; none for one rank.
    pub collectives: u64,
    /// What Muon needs to make matrices orthogonal.
    pub matrices: u64,
    /// Copy of weights and states from which an asynchronous checkpoint is written; in host memory.
    pub checkpoint_copy: u64,
    /// Whether the device is the host, so that the copy counts.
    pub on_host: bool,
}

/// Predicts the memory of the rank with the most.
pub fn predict(plan: &Plan) -> Memory {
    fullest(plan, |stage| predict_stage(plan, stage))
}

/// The same where the loss is a sum of components over the head's distribution, or over the values of a scalar head: an
/// update of reinforcement learning.
pub fn predict_update(plan: &Plan) -> Memory {
    let is_last = |stage: usize| stage + 1 == plan.topology.num_stages();
    let of_stage = |stage| {
        let loss = if is_last(stage) { distribution_bytes(plan, true) } else { 0 };
        Memory { loss, ..predict_stage(plan, stage) }
    };
    fullest(plan, of_stage)
}

fn fullest(plan: &Plan, of_stage: impl Fn(usize) -> Memory) -> Memory {
    // Of equal ones, the first.
    (0..plan.topology.num_stages()).map(of_stage).rev().max_by_key(Memory::total_bytes).unwrap_or_default()
}

/// Predicts the memory of the rank with the most of a stage.
pub fn predict_stage(plan: &Plan, stage: usize) -> Memory {
    let e = plan.compute_dtype().size_bytes() as u64;
    let units = StageUnits::new(plan, stage);
    let owned = units.held(Level::States);
    let buckets = program::buckets(plan, stage);
    let (leaving, left_blocks) = units.leaving(&buckets);
    let layers = plan.stage_layers[stage].clone();
    let in_flight = most_in_flight(&program::actions(plan, stage)) as u64;
    let asynchronous = plan.config.checkpoint.enable && plan.config.checkpoint.async_mode == AsyncMode::Async;
    let is_last = stage + 1 == plan.topology.num_stages();
    let saved = |layers: Range<usize>| layers.map(|layer| saved_bytes(plan, layer)).fold(0, u64::saturating_add);
    Memory {
        stage,
        num_parameters: units.total(),
        parameters: e * units.held(Level::Parameters),
        gradients: 4 * units.held(Level::Gradients),
        master_weights: if e == 4 { 0 } else { 4 * owned },
        optimizer_states: units.state_bytes(),
        in_flight,
        activations: times(in_flight, saved(layers.clone())),
        leaving,
        kept_then: saved(layers.start..layers.end - left_blocks).saturating_add(input_bytes(plan)),
        inputs: times(in_flight, input_bytes(plan)),
        gathered_weights: units.kept_whole(e),
        loss: if is_last { loss_bytes(plan) } else { 0 },
        whole_head: units.in_loss(e),
        backward: layers.clone().map(|layer| LocalBlock::new(plan, layer).backward()).max().unwrap_or(0),
        whole_blocks: units.in_backward(e),
        whole_embedding: units.in_embedding(e),
        collectives: units.collectives(&buckets, e),
        matrices: units.matrices(&buckets),
        checkpoint_copy: if asynchronous { 4 * owned + units.state_bytes() } else { 0 },
        on_host: plan.config.training.device == DeviceChoice::Cpu,
    }
}

/// Bytes that block `layer` keeps from forward to backward of a micro-batch, on the rank with the most: what its
/// operators save, but only the input of what is run again.
///
/// With D hidden, H and K heads of d, F the feed-forward's width, all of one tensor rank, elements per token:
/// - first norm: input D and output D (which the q, k, v product keeps); 4 bytes for the inverse root;
/// - attention: q, k and v after RoPE (H + 2K) d, output H d (which the output projection keeps), 4 H bytes of
///   log-sum-exp; with norms on q and k also the projection's output (H + 2K) d, of which v is a part, and
///   4 (H + K) bytes of inverse roots;
/// - second norm: input D (the residual stream) and output D (which the gate and up product keeps); 4 bytes;
/// - feed-forward: gate and up 2F, their gated product F (which the down projection keeps).
///
/// Norms are of T_o tokens, attention of T_a, the rest of T_c. What is exchanged is kept where it arrives: under tensor
/// parallelism the norms' outputs are gathered (T_c), and the sums that go into the residual stream are kept, 2 D
/// (T_o); where heads are exchanged, q, k, v and the output are those of attention's share of heads, and the output H d
/// comes back (T_c).
///
/// The block's output is the next one's input. Weights are not copied.
pub fn saved_bytes(plan: &Plan, layer: usize) -> u64 {
    LocalBlock::new(plan, layer).saved()
}

/// The same, for each token of the micro-batch.
pub fn saved_bytes_per_token(plan: &Plan, layer: usize) -> u64 {
    let tokens = plan.config.training.local_batch_size * plan.config.training.seq_len;
    saved_bytes(plan, layer) / tokens.max(1) as u64
}

/// A product that stops at 2^54 bytes, where sums of many still fit: no machine has that much.
fn times(a: u64, b: u64) -> u64 {
    a.saturating_mul(b).min(1 << 54)
}

/// Elements of each bucket of gradients, stage by stage: neighbouring units (embedding, blocks, head) until one is
/// full.
pub fn buckets(plan: &Plan) -> Vec<usize> {
    let of_stage = |stage| {
        let units = StageUnits::new(plan, stage);
        program::buckets(plan, stage).into_iter().map(move |bucket| units.elements_of(&bucket) as usize)
    };
    (0..plan.topology.num_stages()).flat_map(of_stage).collect()
}

impl Memory {
    /// Weights, gradients and optimizer states.
    pub fn persistent(&self) -> u64 {
        self.parameters + self.gradients + self.master_weights + self.optimizer_states
    }

    /// The largest of what comes and goes within a step.
    pub fn transient(&self) -> u64 {
        let micro_batches = self.activations + self.inputs;
        let others = micro_batches - micro_batches / self.in_flight.max(1);
        let block = self.backward + self.whole_blocks;
        let at_work = (self.loss + self.whole_head).max(block);
        let last = self.kept_then.min(micro_batches) + block + self.leaving;
        let pass = (micro_batches + at_work).max(others + self.whole_embedding).max(last);
        (self.gathered_weights + pass).max(self.collectives).max(self.matrices)
    }

    /// The most that the device holds at once.
    pub fn total_bytes(&self) -> u64 {
        self.persistent() + self.transient() + if self.on_host { self.checkpoint_copy } else { 0 }
    }

    /// The items, the arithmetic behind them, and the peak.
    pub fn render(&self, plan: &Plan) -> String {
        use Align::{Left, Right};
        let (dtype, scopes) = (plan.compute_dtype(), plan.topology.scopes);
        let parameters = count(self.num_parameters as f64);
        let over = |ranks: usize| if ranks == 1 { String::new() } else { format!(" / {ranks} ranks") };
        let (tokens, layers) = (RankTokens::of(plan), plan.stage_layers[self.stage].clone());
        let stages = plan.topology.num_stages();
        let here = if stages == 1 { String::new() } else { format!(" (stage {} of {stages})", self.stage) };
        let flying = if self.in_flight == 1 { String::new() } else { format!("{} x ", self.in_flight) };
        let chunk = tokens.context.min(LOSS_CHUNK_TOKENS as u64);
        let vocabulary = plan.model.head_width().div_ceil(plan.topology.size(Group::Tensor));
        let again = layers.clone().filter(|&layer| plan.recompute(layer) != Recompute::None).count();
        let mut table = Table::new(&[("memory per rank", Left), ("", Right), ("", Left)]);
        let mut row = |name: &str, n: u64, how: String| table.row([name.into(), bytes(n), how]);
        let e = dtype.size_bytes();
        row("parameters", self.parameters, format!("{parameters} x {e} B{}{here}", over(scopes.parameters)));
        row("gradients", self.gradients, format!("{parameters} x 4 B{}", over(scopes.gradients)));
        if self.master_weights > 0 {
            row("master weights", self.master_weights, format!("{parameters} x 4 B{}", over(scopes.states)));
        }
        let states = match plan.config.optimizer.name {
            OptimizerName::AdamW => format!("{parameters} x 8 B{}", over(scopes.states)),
            OptimizerName::Muon => format!("8 B, 4 B for matrices{}, where most are owned", over(scopes.states)),
        };
        row("optimizer states", self.optimizer_states, states);
        row(
            "activations",
            self.activations,
            format!("{flying}{} tokens, {again} of {} blocks recomputed", tokens.context, layers.len()),
        );
        row("inputs", self.inputs, format!("{flying}{} tokens", tokens.context));
        if self.gathered_weights > 0 {
            row("gathered weights", self.gathered_weights, "for the whole pass".into());
        }
        if self.loss > 0 {
            row("head and loss", self.loss, format!("{chunk} tokens x {vocabulary} logits at once"));
        }
        if self.whole_head > 0 {
            row("whole head", self.whole_head, "with the loss".into());
        }
        row("backward of a block", self.backward, "not at the same time as the loss".into());
        if self.whole_blocks > 0 {
            row("whole blocks", self.whole_blocks, "at work or on their way, with backward".into());
        }
        if self.whole_embedding > 0 {
            row("whole embedding", self.whole_embedding, "not at the same time as blocks".into());
        }
        if self.leaving > 0 {
            row("leaving buckets", self.leaving, "with the last micro-batch's backward".into());
        }
        row("collectives", self.collectives, "not at the same time as activations".into());
        if self.matrices > 0 {
            row("matrices", self.matrices, "made orthogonal, one by one".into());
        }
        let place = if self.on_host { "while a checkpoint is written" } else { "in host memory, not in the peak" };
        row("checkpoint copy", self.checkpoint_copy, place.into());
        row(
            "peak",
            self.total_bytes(),
            format!("{} stay, {} come and go", bytes(self.persistent()), bytes(self.transient())),
        );
        table.render()
    }
}
