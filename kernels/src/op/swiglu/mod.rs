//! The gated activation of Llama's feed-forward (Shazeer 2020): `silu(gate) * up`.
#![allow(unsafe_code)]

pub mod reference;

use tch::Tensor;

use crate::{ffi, op::has_cpu_kernels};

/// `silu(gate) * up` for `gate_up [..., 2F]`, the gate in the first half; gives `[..., F]`.
///
/// Computed in fp32 and rounded once. Backward recomputes the activation from `gate_up`, the only tensor kept.
pub fn swiglu(gate_up: &Tensor) -> Tensor {
    if !has_cpu_kernels(gate_up) {
        return reference::swiglu(gate_up);
    }
    // SAFETY: the pointer outlives the call.
    let [out] = ffi::produce(|[out]| unsafe { ffi::tangelo_swiglu(ffi::borrow(gate_up), out) });
    out
}
