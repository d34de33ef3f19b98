//! The gated activation of Llama's feed-forward (Shazeer 2020): `silu(gate) * up`.

pub mod reference;

use tch::Tensor;

/// `silu(gate) * up` for `gate_up [..., 2F]`, the gate in the first half; gives `[..., F]`.
///
/// Computed in fp32 and rounded once. Backward recomputes the activation from `gate_up`, the only tensor kept.
pub fn swiglu(gate_up: &Tensor) -> Tensor {
    reference::swiglu(gate_up)
}
