//! The plain operation, differentiable through autograd.

use tch::Tensor;

use crate::op::accumulate_kind;

/// `silu(gate) * up` over the halves of the last dim.
pub fn swiglu(gate_up: &Tensor) -> Tensor {
    let halves = gate_up.to_kind(accumulate_kind(gate_up)).chunk(2, -1);
    (halves[0].silu() * &halves[1]).to_kind(gate_up.kind())
}
