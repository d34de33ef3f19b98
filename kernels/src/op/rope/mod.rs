//! Rotary position embedding (Su et al. 2021) in Hugging Face's `rotate_half` layout: element `i` turns with element
//! `i + hd/2`. The caller computes cosines and sines once per token, in fp32 (float64 for float64 tests).
//!
//! Products and sums are in fp32 and rounded once; transformers rounds the tables and every product in bf16, so in
//! bf16 this is the closer of the two, and in fp32 both are the same.

pub mod reference;

use tch::Tensor;

/// Turns `q [T, H, hd]` and `k [T, K, hd]` by `cos`, `sin` `[T, hd/2]`.
pub fn rope(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor) -> (Tensor, Tensor) {
    (reference::rope(q, cos, sin), reference::rope(k, cos, sin))
}

/// Takes the output of a fused projection apart and turns q and k: `qkv [T, (H + 2K) hd]`, ordered q, k, v, gives
/// contiguous `q [T, H, hd]`, `k [T, K, hd]`, `v [T, K, hd]`.
pub fn qkv_rope(
    qkv: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    num_heads: i64,
    num_kv_heads: i64,
    head_dim: i64,
) -> (Tensor, Tensor, Tensor) {
    reference::qkv_rope(qkv, cos, sin, num_heads, num_kv_heads, head_dim)
}
