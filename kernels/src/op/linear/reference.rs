//! The plain operation, differentiable through autograd.

use tch::Tensor;

/// `x w^T + b`.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Tensor {
    x.linear(w, bias)
}
