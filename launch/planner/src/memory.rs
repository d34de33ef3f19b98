//! Memory of one rank, predicted item by item.
//!
//! Every item is a documented sum, so that a measurement can be laid beside it and the difference has a place. With e
//! bytes per element of parameters and activations (4 or 2), P parameters, Z ranks in the ZeRO-1 scope, T tokens per
//! micro-batch:
//!
//! | item | bytes |
//! |---|---|
//! | parameters | e P |
//! | main gradients | 4 P, always fp32 |
//! | master weights | 4 P / Z where e = 2, else the parameters themselves |
//! | AdamW's moments | 8 P / Z |
//! | activations | T times the sum over blocks of [`saved_bytes_per_token`] |
//! | inputs | T times the bytes of ids, positions, targets, weight and rotary angles |
//! | head and loss | final norm in, out and their gradients: 4 e D T; a chunk of C tokens: C V (e + 8 + e); the head's chunk gradient e V D where e = 2 |
//! | backward of a block | gradients alive at once, a recomputed block's own activations, a weight gradient where e = 2 |
//! | collectives | the largest bucket of gradients twice (sent, received) in fp32 |
//! | checkpoint copy | 12 P / Z (weights and moments in fp32), held by the host while files are written |
//!
//! The peak is what persists plus the largest of what comes and goes: the loss with all activations kept, the backward
//! of a block with all activations kept, or the collectives after backward.

use crate::table::{Align, Table, bytes, count};
use tangelo_configs::job::{AsyncMode, DeviceChoice, Recompute};
use tangelo_configs::{BlockSpec, MixerSpec, Plan};
use tangelo_core::DType;

/// Tokens whose logits exist at once; the trainer's choice.
pub const LOSS_CHUNK_TOKENS: usize = 512;

pub use crate::program::BUCKET_ELEMENTS;

/// Predicted bytes of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Parameters in their type.
    pub parameters: u64,
    /// Gradients in fp32.
    pub gradients: u64,
    /// fp32 copies of parameters of a smaller type.
    pub master_weights: u64,
    /// AdamW's two moments in fp32.
    pub optimizer_states: u64,
    /// Kept by blocks from forward to backward, for one micro-batch.
    pub activations: u64,
    /// Ids, positions, targets, weights and rotary angles of one micro-batch.
    pub inputs: u64,
    /// Final norm, one chunk of logits and their gradients.
    pub loss: u64,
    /// What the backward of one block needs beside what was kept.
    pub backward: u64,
    /// Buffers of collectives; none for one rank.
    pub collectives: u64,
    /// Copy of weights and states from which an asynchronous checkpoint is written; in host memory.
    pub checkpoint_copy: u64,
    /// Whether the device is the host, so that the copy counts.
    pub on_host: bool,
}

/// Predicts the memory of the rank with the most.
pub fn predict(plan: &Plan) -> Memory {
    let (model, training) = (&plan.model, &plan.config.training);
    let e = plan.compute_dtype().size_bytes() as u64;
    let all = model.num_parameters() as u64;
    let owned = all.div_ceil(plan.topology.scopes.states as u64);
    let tokens = (training.local_batch_size * training.seq_len) as u64;
    let layers = 0..model.blocks.len();
    let asynchronous = plan.config.checkpoint.enable && plan.config.checkpoint.async_mode == AsyncMode::Async;
    Memory {
        parameters: e * all,
        gradients: 4 * all,
        master_weights: if e == 4 { 0 } else { 4 * owned },
        optimizer_states: 8 * owned,
        activations: times(tokens, layers.map(|layer| saved_bytes_per_token(plan, layer)).sum()),
        inputs: times(tokens, input_bytes_per_token(plan)),
        loss: loss_bytes(plan, tokens, e),
        backward: backward_bytes(plan, tokens, e),
        collectives: collective_bytes(plan),
        checkpoint_copy: if asynchronous { 12 * owned } else { 0 },
        on_host: training.device == DeviceChoice::Cpu,
    }
}

/// Bytes per token that block `layer` keeps from forward to backward: its input where it is run again, else what its
/// operators save.
///
/// With D hidden, H and K heads of d, F the feed-forward's width, elements per token:
/// - first norm: input D and output D (which the q, k, v product keeps); 4 bytes for the inverse root;
/// - attention: q, k and v after RoPE (H + 2K) d, output H d (which the output projection keeps), 4 H bytes of
///   log-sum-exp; with norms on q and k also the projection's output (H + 2K) d, of which v is a part, and
///   4 (H + K) bytes of inverse roots;
/// - second norm: input D (the residual stream) and output D (which the gate and up product keeps); 4 bytes;
/// - feed-forward: gate and up 2F, their gated product F (which the down projection keeps).
///
/// The block's output is the next one's input. Weights are not copied.
pub fn saved_bytes_per_token(plan: &Plan, layer: usize) -> u64 {
    let e = plan.compute_dtype().size_bytes();
    let d = plan.model.hidden_size;
    if plan.recompute(layer) != Recompute::None {
        (e * d) as u64
    } else {
        operators_save(&plan.model.blocks[layer], d, e)
    }
}

fn operators_save(block: &BlockSpec, hidden_size: usize, e: usize) -> u64 {
    let MixerSpec::Attention(a) = &block.mixer;
    let norms = e * 4 * hidden_size + 2 * 4;
    let (q, kv) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
    let attention = e * (q + 2 * kv + q) + 4 * a.num_heads;
    let head_norms = if a.qk_norm { e * (q + kv) + 4 * (a.num_heads + a.num_kv_heads) } else { 0 };
    let feed_forward = e * 3 * block.feed_forward.intermediate_size;
    (norms + attention + head_norms + feed_forward) as u64
}

/// Tokens, positions and targets as 64-bit ids, the weight in fp32, and the cosines and sines of d / 2 pairs in fp32.
fn input_bytes_per_token(plan: &Plan) -> u64 {
    let head_dim = plan.model.blocks.first().map_or(0, |block| {
        let MixerSpec::Attention(a) = &block.mixer;
        a.head_dim
    });
    (3 * 8 + 4 + 4 * head_dim) as u64
}

fn loss_bytes(plan: &Plan, tokens: u64, e: u64) -> u64 {
    let (v, d) = (plan.model.vocab_size as u64, plan.model.hidden_size as u64);
    // Input, output and a gradient of each; the inverse root.
    let norm = times(tokens, 4 * e * d + 4);
    // On a CPU one buffer is logits, then their gradient. On a GPU: logits, log-probabilities and probabilities in
    // fp32, and the gradient.
    let per_logit = if plan.config.training.device == DeviceChoice::Cpu { e } else { e + 4 + 4 + e };
    let chunk = tokens.min(LOSS_CHUNK_TOKENS as u64) * v * per_logit;
    norm + chunk + if e == 4 { 0 } else { e * v * d }
}

/// The most that the backward of any block needs beside what forward kept.
fn backward_bytes(plan: &Plan, tokens: u64, e: u64) -> u64 {
    let d = plan.model.hidden_size;
    let one = |(layer, block): (usize, &BlockSpec)| {
        let MixerSpec::Attention(a) = &block.mixer;
        let (q, kv, f) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, block.feed_forward.intermediate_size);
        // Gradients alive at once: of the output and the gated product with gate and up; or of the residual stream,
        // attention's output, and q, k, v before and after RoPE.
        let gradients = e * (d + 3 * f).max(2 * d + q + 2 * (q + 2 * kv)) as u64;
        let again = if plan.recompute(layer) != Recompute::None { operators_save(block, d, e as usize) } else { 0 };
        // In fp32 a product adds to the main gradient in place; in bf16 it is made first.
        let weight_gradient = if e == 4 { 0 } else { e * (d * (2 * f).max(q + 2 * kv)) as u64 };
        times(tokens, gradients + again) + weight_gradient
    };
    plan.model.blocks.iter().enumerate().map(one).max().unwrap_or(0)
}

/// A product that stops at 2^58 bytes, where sums of a few still fit: no machine has a quarter of an exbibyte.
fn times(a: u64, b: u64) -> u64 {
    a.saturating_mul(b).min(1 << 58)
}

/// The largest bucket in fp32 as it is sent, and the same again for what arrives.
fn collective_bytes(plan: &Plan) -> u64 {
    if plan.data_parallel_size == 1 {
        return 0;
    }
    2 * 4 * buckets(plan).into_iter().max().unwrap_or(0) as u64
}

/// Elements of each bucket of gradients: neighbouring units (embedding, blocks, head) until one is full.
pub fn buckets(plan: &Plan) -> Vec<usize> {
    let (model, dtype) = (&plan.model, DType::F32);
    let size = |metas: Vec<tangelo_core::ParamMeta>| metas.iter().map(|m| m.num_elements()).sum::<usize>();
    let blocks = (0..model.blocks.len()).map(|layer| size(model.block_parameters(layer, dtype)));
    let units = std::iter::once(size(model.embedding_parameters(dtype)))
        .chain(blocks)
        .chain(std::iter::once(size(model.head_parameters(dtype))));
    let mut buckets: Vec<usize> = Vec::new();
    for unit in units {
        match buckets.last_mut() {
            Some(open) if *open < BUCKET_ELEMENTS => *open += unit,
            _ => buckets.push(unit),
        }
    }
    buckets
}

impl Memory {
    /// Weights, gradients and optimizer states.
    pub fn persistent(&self) -> u64 {
        self.parameters + self.gradients + self.master_weights + self.optimizer_states
    }

    /// The largest of what comes and goes within a step.
    pub fn transient(&self) -> u64 {
        let kept = self.activations + self.inputs;
        (kept + self.loss.max(self.backward)).max(self.collectives)
    }

    /// The most that the device holds at once.
    pub fn total_bytes(&self) -> u64 {
        self.persistent() + self.transient() + if self.on_host { self.checkpoint_copy } else { 0 }
    }

    /// The items, the arithmetic behind them, and the peak.
    pub fn render(&self, plan: &Plan) -> String {
        use Align::{Left, Right};
        let dtype = plan.compute_dtype();
        let parameters = count(plan.model.num_parameters() as f64);
        let share = match plan.topology.scopes.states {
            1 => String::new(),
            ranks => format!(" / {ranks} ranks"),
        };
        let tokens = plan.config.training.local_batch_size * plan.config.training.seq_len;
        let chunk = LOSS_CHUNK_TOKENS.min(tokens);
        let again = (0..plan.model.blocks.len()).filter(|&layer| plan.recompute(layer) != Recompute::None).count();
        let mut table = Table::new(&[("memory per rank", Left), ("", Right), ("", Left)]);
        let mut row = |name: &str, n: u64, how: String| table.row([name.into(), bytes(n), how]);
        row("parameters", self.parameters, format!("{parameters} x {} B", dtype.size_bytes()));
        row("gradients", self.gradients, format!("{parameters} x 4 B"));
        if self.master_weights > 0 {
            row("master weights", self.master_weights, format!("{parameters} x 4 B{share}"));
        }
        row("optimizer states", self.optimizer_states, format!("{parameters} x 8 B{share}"));
        row(
            "activations",
            self.activations,
            format!("{tokens} tokens, {again} of {} blocks recomputed", plan.model.blocks.len()),
        );
        row("inputs", self.inputs, format!("{tokens} tokens"));
        row("head and loss", self.loss, format!("{chunk} tokens x {} logits at once", plan.model.vocab_size));
        row("backward of a block", self.backward, "not at the same time as the loss".into());
        row("collectives", self.collectives, "not at the same time as activations".into());
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
