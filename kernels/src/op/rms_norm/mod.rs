//! Root-mean-square normalisation (Zhang & Sennrich 2019), with the roundings of transformers' `LlamaRMSNorm`: the
//! normalised value is cast to the input's type before the weight multiplies it.
#![allow(unsafe_code)]

pub mod reference;

use tch::Tensor;

use crate::ffi;

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dim of `x [..., D]`; sums in fp32 (float64 for float64).
///
/// Serves q/k norms too: `x [T, H, hd]` with `weight [hd]`. Backward adds to `main_grad [D]`; see [`crate::op`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, main_grad: Option<&Tensor>) -> Tensor {
    // SAFETY: all pointers outlive the call; null where absent.
    let [out] = ffi::produce(|[out]| unsafe {
        ffi::tangelo_rms_norm(ffi::borrow(x), ffi::borrow(weight), eps, ffi::borrow_option(main_grad), out)
    });
    out
}

/// The residual stream and its norm: returns `(rms_norm(x + residual), x + residual)`.
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
    main_grad: Option<&Tensor>,
) -> (Tensor, Tensor) {
    // SAFETY: all pointers outlive the call; null where absent; `out` has room for two tensors.
    let [normed, sum] = ffi::produce(|out: &mut [_; 2]| unsafe {
        ffi::tangelo_add_rms_norm(
            ffi::borrow(x),
            ffi::borrow(residual),
            ffi::borrow(weight),
            eps,
            ffi::borrow_option(main_grad),
            out.as_mut_ptr(),
        )
    });
    (normed, sum)
}
