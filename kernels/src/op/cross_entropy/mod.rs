//! The vocabulary head and its cross-entropy in one, chunk of tokens by chunk of tokens, so that the logits of all
//! tokens never exist. The loss is the end of the graph and its normaliser is known beforehand, so gradients are
//! made in the same pass, with no graph.
//!
//! Invariants: a token of weight 0 adds exactly nothing to the loss and to every gradient; its row of the hidden
//! gradient is zero. The softmax is in fp32 (float64 for float64), the logits are rounded to the hidden state's type
//! first, as in transformers.
#![allow(unsafe_code)]

pub mod reference;
pub mod vocab_parallel;

use tch::Tensor;

use crate::{ffi, op::has_cpu_kernels};

/// What [`cross_entropy_chunked`] gives.
#[derive(Debug)]
pub struct CrossEntropy {
    /// Sum over tokens of weight times negative log-likelihood, *not* normalised: a float64 scalar.
    pub loss_sum: Tensor,
    /// `[T, D]`, in the hidden state's type: gradient of `inverse_total_weight * loss_sum`.
    pub dhidden: Tensor,
}

/// Loss and gradients of `hidden [T, D]` against `targets [T]` (int64) under `head_weight [V, D]`.
///
/// `weights [T]` (fp32) weigh tokens; `inverse_total_weight` is one over the weight of the *global* batch. The
/// gradient of the head is added to `main_grad [V, D]`; without one the head is frozen. `chunk_tokens` bounds memory:
/// a chunk's logits take `chunk_tokens * V` elements. Targets of weight 0 are never read.
pub fn cross_entropy_chunked(
    hidden: &Tensor,
    head_weight: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
    inverse_total_weight: f64,
    main_grad: Option<&Tensor>,
    chunk_tokens: i64,
) -> CrossEntropy {
    if !has_cpu_kernels(hidden) {
        let (scale, chunk) = (inverse_total_weight, chunk_tokens);
        return tch::no_grad(|| {
            reference::cross_entropy_chunked(hidden, head_weight, targets, weights, scale, main_grad, chunk)
        });
    }
    // SAFETY: all pointers outlive the call; null where absent; `out` has room for two tensors.
    let [loss_sum, dhidden] = ffi::produce(|out: &mut [_; 2]| unsafe {
        ffi::tangelo_cross_entropy(
            ffi::borrow(hidden),
            ffi::borrow(head_weight),
            ffi::borrow(targets),
            ffi::borrow(weights),
            inverse_total_weight,
            ffi::borrow_option(main_grad),
            chunk_tokens,
            out.as_mut_ptr(),
        )
    });
    CrossEntropy { loss_sum, dhidden }
}

/// The loss sum alone (see [`CrossEntropy::loss_sum`]), for evaluation.
pub fn cross_entropy_loss(
    hidden: &Tensor,
    head_weight: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
    chunk_tokens: i64,
) -> Tensor {
    if !has_cpu_kernels(hidden) {
        return tch::no_grad(|| reference::cross_entropy_loss(hidden, head_weight, targets, weights, chunk_tokens));
    }
    let mut loss_sum = 0.0;
    // SAFETY: all pointers outlive the call; `loss_sum` is writable.
    ffi::check(unsafe {
        ffi::tangelo_cross_entropy_loss(
            ffi::borrow(hidden),
            ffi::borrow(head_weight),
            ffi::borrow(targets),
            ffi::borrow(weights),
            chunk_tokens,
            &mut loss_sum,
        )
    });
    Tensor::from(loss_sum)
}
