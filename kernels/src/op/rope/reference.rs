//! The plain operations, differentiable through autograd.

use tch::Tensor;

use crate::op::accumulate_kind;

/// Turns `x [T, heads, hd]` by `cos`, `sin` `[T, hd/2]`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let wide = x.to_kind(accumulate_kind(x));
    let halves = wide.chunk(2, -1);
    let (low, high) = (&halves[0], &halves[1]);
    let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
    Tensor::cat(&[low * &cos - high * &sin, high * &cos + low * &sin], -1).to_kind(x.kind())
}

/// Splits `qkv [T, (H + 2K) hd]` and turns q and k.
pub fn qkv_rope(
    qkv: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    num_heads: i64,
    num_kv_heads: i64,
    head_dim: i64,
) -> (Tensor, Tensor, Tensor) {
    let heads = qkv.view([-1, num_heads + 2 * num_kv_heads, head_dim]);
    let parts = heads.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], 1);
    (rope(&parts[0], cos, sin), rope(&parts[1], cos, sin), parts[2].contiguous())
}
