//! What blocks and the loss keep and need on the rank with the most tokens.

use super::{LOSS_CHUNK_TOKENS, times};
use tangelo_configs::job::{DeviceChoice, Recompute, RotateMethod};
use tangelo_configs::{HeadSpec, MixerSpec, Plan};
use tangelo_core::{Group, SequenceLayout};

/// Tokens of a micro-batch on the rank with the most.
#[derive(Clone, Copy, Debug)]
pub struct RankTokens {
    /// Of the residual stream and its norms: T / (cp tp).
    pub own: u64,
    /// Of products with weights: T / cp.
    pub context: u64,
    /// Of attention, once heads were exchanged: T / ring.
    pub attended: u64,
}

impl RankTokens {
    /// The tokens of a rank of `plan`.
    pub fn of(plan: &Plan) -> RankTokens {
        let size = |group| plan.topology.size(group);
        let training = &plan.config.training;
        let num_tokens = training.local_batch_size * training.seq_len;
        let (ring, heads, tensor) = (size(Group::Ring), size(Group::Heads), size(Group::Tensor));
        let layout = SequenceLayout { num_tokens, ring, heads, tensor };
        // The first of those that share tokens have no fewer than the others.
        let attended = (0..ring).map(|r| layout.ring_len(r)).max().unwrap_or(0) as u64;
        let context = attended.div_ceil(heads as u64);
        RankTokens { own: context.div_ceil(tensor as u64), context, attended }
    }
}

/// A block on one rank. Widths are in elements.
pub(super) struct LocalBlock<'a> {
    plan: &'a Plan,
    layer: usize,
    tokens: RankTokens,
    /// Bytes per element.
    e: u64,
    /// D.
    hidden: u64,
    /// Query heads, and their width; likewise of keys.
    query_heads: u64,
    queries: u64,
    key_heads: u64,
    keys: u64,
    /// Of attention, once heads were exchanged.
    attended_heads: u64,
    attended_queries: u64,
    attended_keys: u64,
    /// Of the feed-forward.
    features: u64,
    has_head_norms: bool,
}

impl<'a> LocalBlock<'a> {
    pub(super) fn new(plan: &'a Plan, layer: usize) -> LocalBlock<'a> {
        let block = &plan.model.blocks[layer];
        let MixerSpec::Attention(a) = &block.mixer;
        let size = |group| plan.topology.size(group) as u64;
        let (tensor, heads, width) = (size(Group::Tensor), size(Group::Heads), a.head_dim as u64);
        let query_heads = a.num_heads as u64 / tensor;
        let key_heads = (a.num_kv_heads as u64 / tensor).max(1);
        let attended_heads = (query_heads / heads).max(1);
        LocalBlock {
            plan,
            layer,
            tokens: RankTokens::of(plan),
            e: plan.compute_dtype().size_bytes() as u64,
            hidden: plan.model.hidden_size as u64,
            query_heads,
            queries: query_heads * width,
            key_heads,
            keys: key_heads * width,
            attended_heads,
            attended_queries: attended_heads * width,
            attended_keys: (key_heads / heads).max(1) * width,
            features: block.feed_forward.intermediate_size as u64 / tensor,
            has_head_norms: a.qk_norm,
        }
    }

    fn is_split(&self, group: Group) -> bool {
        self.plan.topology.size(group) > 1
    }

    fn own(&self, bytes: u64) -> u64 {
        times(self.tokens.own, bytes)
    }

    fn context(&self, bytes: u64) -> u64 {
        times(self.tokens.context, bytes)
    }

    fn attended(&self, bytes: u64) -> u64 {
        times(self.tokens.attended, bytes)
    }

    /// A norm's input, its inverse root, and its output as the product after it reads it: under tensor parallelism
    /// gathered, with the scattered sum that goes into the residual stream.
    fn norm(&self) -> u64 {
        let stream = self.e * self.hidden;
        let output =
            if self.is_split(Group::Tensor) { self.context(stream) + self.own(stream) } else { self.own(stream) };
        self.own(stream + 4) + output
    }

    /// What attention, from its norm to its residual, keeps for backward.
    fn attention(&self) -> u64 {
        let inside = 2 * self.attended_queries + 2 * self.attended_keys;
        let mut bytes = self.norm() + self.attended(self.e * inside + 4 * self.attended_heads);
        if self.has_head_norms {
            bytes += self.context(self.e * (self.queries + self.keys) + 4 * (self.query_heads + self.key_heads));
        }
        if self.is_split(Group::Heads) {
            bytes += self.context(self.e * self.queries);
        }
        bytes
    }

    /// What the feed-forward, from its norm to its residual, keeps for backward.
    fn feed_forward(&self) -> u64 {
        self.norm() + self.context(self.e * 3 * self.features)
    }

    /// What is kept from forward to backward.
    pub(super) fn saved(&self) -> u64 {
        let input = self.own(self.e * self.hidden);
        match self.plan.recompute(self.layer) {
            Recompute::None => self.attention() + self.feed_forward(),
            Recompute::Full => input,
            Recompute::Attention => input + self.feed_forward(),
            Recompute::FeedForward => self.attention() + input,
        }
    }

    /// What runs again keeps that much for its own backward.
    fn again(&self) -> u64 {
        match self.plan.recompute(self.layer) {
            Recompute::None => 0,
            Recompute::Full => self.attention() + self.feed_forward(),
            Recompute::Attention => self.attention(),
            Recompute::FeedForward => self.feed_forward(),
        }
    }

    /// What backward needs beside what was kept.
    pub(super) fn backward(&self) -> u64 {
        // Gradients alive at once: of the output and the gated product with gate and up; or of the residual stream,
        // attention's output, and q, k, v before and after RoPE.
        let (e, d, qkv) = (self.e, self.hidden, self.queries + 2 * self.keys);
        let gathered = if self.is_split(Group::Tensor) { self.context(e * d) } else { 0 };
        let feed_forward = self.own(e * d) + self.context(e * 3 * self.features);
        let attention =
            self.own(e * 2 * d) + self.context(e * (self.queries + 2 * qkv)) + self.exchanged() + self.ring();
        // In fp32 a product adds to the main gradient in place; in bf16 it is made first.
        let weight_gradient = if e == 4 { 0 } else { e * d * (2 * self.features).max(qkv) };
        gathered + feed_forward.max(attention) + self.again() + weight_gradient
    }

    /// Gradients of q, k and v on their way back from the exchange of heads, sent and received.
    fn exchanged(&self) -> u64 {
        let both = 2 * self.e * (self.attended_queries + 2 * self.attended_keys);
        if self.is_split(Group::Heads) { self.attended(both) } else { 0 }
    }

    /// fp32 gradients of the queries and of this rank's keys and values, and what goes round: keys and values here and
    /// arriving, gradients made, sent and arriving; or those of all ranks at once.
    fn ring(&self) -> u64 {
        let ranks = self.plan.topology.size(Group::Ring) as u64;
        if ranks == 1 {
            return 0;
        }
        let (queries, kv) = (self.attended_queries, 2 * self.attended_keys);
        let travelling = match self.plan.config.parallelism.context_parallel_rotate_method {
            RotateMethod::Ring => (2 * self.e + 4 * ranks.min(3)) * kv,
            RotateMethod::Allgather => ranks * (self.e + 4) * kv,
        };
        self.attended(4 * (queries + kv) + travelling)
    }
}

/// Tokens, positions and targets as 64-bit ids, the weight in fp32, and the cosines and sines of d / 2 pairs in fp32.
pub(super) fn input_bytes(plan: &Plan) -> u64 {
    let head_dim = plan.model.blocks.first().map_or(0, |block| {
        let MixerSpec::Attention(a) = &block.mixer;
        a.head_dim
    });
    times(RankTokens::of(plan).context, (3 * 8 + 4 + 4 * head_dim) as u64)
}

/// Final norm, one chunk of logits, and their gradients.
pub(super) fn loss_bytes(plan: &Plan) -> u64 {
    let (tokens, e) = (RankTokens::of(plan), plan.compute_dtype().size_bytes() as u64);
    let tensor = plan.topology.size(Group::Tensor) as u64;
    let (v, d) = ((plan.model.head_width() as u64).div_ceil(tensor), plan.model.hidden_size as u64);
    // Input, output and a gradient of each; the inverse root. Under tensor parallelism, output and gradient of all.
    let gathered = if tensor > 1 { times(tokens.context, 2 * e * d) } else { 0 };
    let norm = times(tokens.own, 4 * e * d + 4) + gathered;
    // On a CPU one buffer is logits, then their gradient. On a GPU: logits, log-probabilities and probabilities in
    // fp32, and the gradient.
    let per_logit = if plan.config.training.device == DeviceChoice::Cpu { e } else { e + 4 + 4 + e };
    let chunk = tokens.context.min(LOSS_CHUNK_TOKENS as u64) * v * per_logit;
    norm + chunk + if e == 4 { 0 } else { e * v * d }
}

/// The same where the loss reads log-probabilities and entropies, or the values of a scalar head. Beside the final norm: the
/// gradient of all tokens; of a chunk of C tokens its rows and their gradient, 2 e C D, and its logits, which become their
/// gradients on a CPU; on a GPU with them fp32 copies: tempered, less the largest, exponentials, products of the two. Without
/// `gradients` none of them is made.
pub(super) fn distribution_bytes(plan: &Plan, gradients: bool) -> u64 {
    let (tokens, e) = (RankTokens::of(plan), plan.compute_dtype().size_bytes() as u64);
    let (tensor, d) = (plan.topology.size(Group::Tensor) as u64, plan.model.hidden_size as u64);
    let gathered = if tensor > 1 { times(tokens.context, 2 * e * d) } else { 0 };
    let both = if gradients { 2 } else { 1 };
    let norm = times(tokens.own, both * 2 * e * d + 4) + gathered * both / 2;
    if plan.model.head != HeadSpec::Vocabulary {
        // A value and its slope in fp32 and in 64 bits.
        return norm + times(tokens.own, 2 * (4 + 8));
    }
    let v = (plan.model.vocab_size as u64).div_ceil(tensor);
    let chunk = tokens.context.min(LOSS_CHUNK_TOKENS as u64);
    let per_logit = if plan.config.training.device == DeviceChoice::Cpu { e } else { e + 4 * 4 + e };
    norm + chunk * (v * per_logit + both * e * d) + if e == 4 || !gradients { 0 } else { e * v * d }
}

/// What a pass without gradients needs beside weights: the inputs, the stream, all that the largest block makes, and the end
/// of the model.
pub fn forward_bytes(plan: &Plan) -> u64 {
    let whole = |layer: usize| {
        let block = LocalBlock::new(plan, layer);
        block.attention() + block.feed_forward()
    };
    let blocks = (0..plan.model.blocks.len()).map(whole).max().unwrap_or(0);
    input_bytes(plan) + blocks.max(distribution_bytes(plan, false))
}
