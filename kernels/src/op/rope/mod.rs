//! Rotary position embedding (Su et al. 2021) in Hugging Face's `rotate_half` layout: element `i` turns with element
//! `i + hd/2`. The caller computes cosines and sines once per token, in fp32 (float64 for float64 tests).
//!
//! Products and sums are in fp32 and rounded once; transformers rounds the tables and every product in bf16, so in
//! bf16 this is the closer of the two, and in fp32 both are the same.
#![allow(unsafe_code)]

pub mod reference;

use tch::Tensor;

use crate::{ffi, op::has_cpu_kernels};

/// Turns `q [T, H, hd]` and `k [T, K, hd]` by `cos`, `sin` `[T, hd/2]`.
pub fn rope(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor) -> (Tensor, Tensor) {
    let turn = |x: &Tensor| if has_cpu_kernels(x) { cpu_rope(x, cos, sin) } else { reference::rope(x, cos, sin) };
    (turn(q), turn(k))
}

fn cpu_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    // SAFETY: all pointers outlive the call.
    let [out] =
        ffi::produce(|[out]| unsafe { ffi::tangelo_rope(ffi::borrow(x), ffi::borrow(cos), ffi::borrow(sin), out) });
    out
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
    if !has_cpu_kernels(qkv) {
        return reference::qkv_rope(qkv, cos, sin, num_heads, num_kv_heads, head_dim);
    }
    // SAFETY: all pointers outlive the call; `out` has room for three tensors.
    let [q, k, v] = ffi::produce(|out: &mut [_; 3]| unsafe {
        ffi::tangelo_qkv_rope(
            ffi::borrow(qkv),
            ffi::borrow(cos),
            ffi::borrow(sin),
            num_heads,
            num_kv_heads,
            head_dim,
            out.as_mut_ptr(),
        )
    });
    (q, k, v)
}
