//! The plain operation, differentiable through autograd.

use tch::{Kind, Tensor};

use crate::op::accumulate_kind;

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dim.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let wide = x.to_kind(accumulate_kind(x));
    let mean = wide.square().mean_dim([-1i64].as_slice(), true, None::<Kind>);
    weight * (&wide * (mean + eps).rsqrt()).to_kind(x.kind())
}
