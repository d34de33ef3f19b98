//! `y = x w^T + b` whose weight gradient is added to a main gradient in fp32.
#![allow(unsafe_code)]

pub mod reference;

use tch::Tensor;

use crate::ffi;

/// `x [..., I]` times `w [O, I]` transposed, plus `bias [O]`, gives `[..., O]`.
///
/// `w` is contiguous, possibly a view of whole rows of a larger buffer (fused q, k, v; fused gate and up).
/// Backward adds `dy^T x` to `w_main_grad` and the sum of `dy` over tokens to `bias_main_grad`; see [`crate::op`].
///
/// On a CPU, in fp32 and bf16, a row's bits are the same whatever the other rows are and whether a graph is made: so
/// recomputation repeats the first pass, and training, scoring and generation with a cache agree to the bit.
pub fn linear(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    w_main_grad: Option<&Tensor>,
    bias_main_grad: Option<&Tensor>,
) -> Tensor {
    // SAFETY: all pointers outlive the call; null where absent.
    let [out] = ffi::produce(|[out]| unsafe {
        ffi::tangelo_linear(
            ffi::borrow(x),
            ffi::borrow(w),
            ffi::borrow_option(bias),
            ffi::borrow_option(w_main_grad),
            ffi::borrow_option(bias_main_grad),
            out,
        )
    });
    out
}
