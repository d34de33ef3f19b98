//! FLOPs per token, by both conventions of counting attention.
//!
//! A product of `[T, in]` with `[in, out]` is 2 T in out FLOPs; backward is twice forward, so a training step is three
//! forwards. Norms, RoPE, activations, softmax and the embedding's gather are not counted, nor is what recomputation
//! runs again: these are the FLOPs of MFU, not of HFU.
//!
//! Attention is scores and values, 4 H d FLOPs per query and key. *Full* counts every key of the sequence (nanochat,
//! torchtitan, Megatron), *causal* half of them, which is what a causal kernel does. A sliding window bounds the keys
//! of both. Document masking lowers the real work further and is counted by neither.

use tangelo_configs::{AttentionSpec, BlockSpec, MixerSpec, ModelSpec, Plan};

/// FLOPs of training on one token, forward and backward: what MFU divides by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FlopsPerToken {
    /// Attention counted causally.
    pub causal: f64,
    /// Attention counted over all keys.
    pub full: f64,
}

/// Training FLOPs per token of `plan`'s model at its sequence length.
pub fn per_token(plan: &Plan) -> FlopsPerToken {
    let forward = forward(&plan.model, plan.config.training.seq_len);
    FlopsPerToken { causal: 3.0 * forward.causal(), full: 3.0 * forward.full() }
}

/// FLOPs of one token's forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ForwardFlops {
    /// Products with weights, the head included.
    pub matrix: f64,
    /// Attention, causal keys only.
    pub attention_causal: f64,
    /// Attention, every key of the sequence.
    pub attention_full: f64,
}

impl ForwardFlops {
    /// Attention counted causally.
    pub fn causal(&self) -> f64 {
        self.matrix + self.attention_causal
    }

    /// Attention counted over all keys.
    pub fn full(&self) -> f64 {
        self.matrix + self.attention_full
    }
}

impl std::ops::Add for ForwardFlops {
    type Output = ForwardFlops;

    fn add(self, other: ForwardFlops) -> ForwardFlops {
        ForwardFlops {
            matrix: self.matrix + other.matrix,
            attention_causal: self.attention_causal + other.attention_causal,
            attention_full: self.attention_full + other.attention_full,
        }
    }
}

/// The whole model on sequences of `seq_len` tokens.
pub fn forward(model: &ModelSpec, seq_len: usize) -> ForwardFlops {
    let blocks = model.blocks.iter().map(|block| block_flops(model.hidden_size, block, seq_len));
    blocks.fold(head_flops(model), |sum, one| sum + one)
}

/// The vocabulary head, tied or not.
pub fn head_flops(model: &ModelSpec) -> ForwardFlops {
    ForwardFlops { matrix: 2.0 * (model.head_width() * model.hidden_size) as f64, ..ForwardFlops::default() }
}

/// One block.
pub fn block_flops(hidden_size: usize, block: &BlockSpec, seq_len: usize) -> ForwardFlops {
    let MixerSpec::Attention(a) = &block.mixer;
    let projections = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim; // q and output, k and v
    let weights = hidden_size * (projections + 3 * block.feed_forward.intermediate_size);
    let per_key = 4.0 * (a.num_heads * a.head_dim) as f64;
    let (causal, full) = keys_per_query(a, seq_len as f64);
    ForwardFlops { matrix: 2.0 * weights as f64, attention_causal: per_key * causal, attention_full: per_key * full }
}

/// Keys that a query sees on average: causally (S / 2, the diagonal counted half), and by counting all.
///
/// Under a window W < S the first W queries see W / 2 on average, the others W.
fn keys_per_query(a: &AttentionSpec, seq_len: f64) -> (f64, f64) {
    match a.sliding_window.map(|w| w as f64).filter(|&w| w < seq_len) {
        None => (seq_len / 2.0, seq_len),
        Some(w) => (w - w * w / (2.0 * seq_len), w),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangelo_configs::flavor::flavor;

    #[test]
    fn smollm2_by_hand() {
        let model = flavor("smollm2-135m").unwrap().spec(0).unwrap();
        let flops = forward(&model, 2048);
        // Every matrix once: all parameters but the 61 norms of 576 (the tied embedding is the head).
        assert_eq!(flops.matrix, 2.0 * (134_515_008 - 61 * 576) as f64);
        assert_eq!(flops.attention_full, 30.0 * 4.0 * 576.0 * 2048.0);
        assert_eq!(flops.attention_causal, flops.attention_full / 2.0);
        assert_eq!(flops.full(), flops.matrix + flops.attention_full);
    }

    #[test]
    fn a_window_bounds_the_keys() {
        let model = flavor("mistral-7b").unwrap().spec(0).unwrap();
        let at = |seq_len| forward(&model, seq_len);
        assert_eq!(at(4096).attention_full, at(8192).attention_full);
        // Half the queries see 2048 on average, half 4096.
        assert_eq!(at(8192).attention_causal, 1.5 * at(4096).attention_causal);
    }
}
