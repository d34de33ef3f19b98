//! Muon (Jordan et al. 2024): momentum whose every matrix is made orthogonal before it is applied, as
//! `torch.optim.Muon` computes it, except that a CPU orthogonalises in fp32.
//!
//! A step has three parts, because they need different things: [`momentum_update`] is elementwise and runs on any shard;
//! [`newton_schulz`] needs the whole matrix; [`apply_update`] is elementwise again and takes any slice of the matrix.
//!
//! Invariants: the elementwise parts are chains of single rounded operations, so an element's bits do not depend on how
//! a buffer was cut. Deliberately absent: which parameters are matrices, and who gathers them.
#![allow(unsafe_code)]

pub mod reference;

use tch::{Kind, Tensor};

use crate::ffi;

/// How the learning rate follows the shape `[r, c]` of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdjustLr {
    /// Times `sqrt(max(1, r / c))`: Jordan's.
    Original,
    /// Times `0.2 sqrt(max(r, c))`, which gives updates the root mean square of AdamW's, so that its learning rate and
    /// weight decay can be kept (Liu et al. 2025, "Muon is Scalable for LLM Training").
    MatchRmsAdamW,
}

impl AdjustLr {
    /// The learning rate of a matrix `[r, c]`.
    pub fn adjusted(self, lr: f64, [rows, columns]: [i64; 2]) -> f64 {
        let (rows, columns) = (rows as f64, columns as f64);
        match self {
            AdjustLr::Original => lr * (rows / columns).max(1.0).sqrt(),
            AdjustLr::MatchRmsAdamW => lr * 0.2 * rows.max(columns).sqrt(),
        }
    }
}

/// Hyperparameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    /// Learning rate of this step, before [`Muon::adjust_lr`].
    pub lr: f64,
    /// Decay of the momentum, which gathers `1 - momentum` of each gradient.
    pub momentum: f64,
    /// Whether the update looks ahead: the gradient moved `momentum` of the way to the momentum.
    pub nesterov: bool,
    /// Weight decay coefficient; multiplied by the learning rate as given, not adjusted.
    pub weight_decay: f64,
    /// Newton-Schulz iterations; 5 as a rule.
    pub ns_steps: usize,
    /// The least norm a matrix is divided by; 1e-7 as a rule.
    pub eps: f64,
    /// How the learning rate follows the shape.
    pub adjust_lr: AdjustLr,
    /// Multiplies the gradient first (clipping); 1 for none.
    pub grad_scale: f64,
}

/// Moves `momentum` towards `grad`, both of one shape (a matrix or any part of it) and fp32, and gives what is to be
/// orthogonalised, of that shape: elementwise.
pub fn momentum_update(momentum: &Tensor, grad: &Tensor, options: &Muon) -> Tensor {
    assert_eq!(momentum.size(), grad.size(), "muon: momentum and gradient differ in shape");
    tch::no_grad(|| {
        let grad = if options.grad_scale == 1.0 { grad.shallow_clone() } else { grad * options.grad_scale };
        momentum.shallow_clone().copy_(&lerp(momentum, &grad, 1.0 - options.momentum));
        if options.nesterov { lerp(&grad, momentum, options.momentum) } else { momentum.copy() }
    })
}

/// The point `weight` of the way from `start` to `end`, from the nearer of the two as `torch.lerp`, but with every
/// operation rounded: fused ones would round the ends of a buffer differently from its middle.
fn lerp(start: &Tensor, end: &Tensor, weight: f64) -> Tensor {
    let way = end - start;
    if weight < 0.5 { way * weight + start } else { end - way * (1.0 - weight) }
}

/// Coefficients of the odd quintic `a x + b x^3 + c x^5` that drives singular values towards 1 (Jordan et al. 2024).
pub const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];

/// `m [r, c]` with its singular values moved near 1 (about 0.7 to 1.2 after 5 steps, for those above some hundredths
/// of the norm), its singular vectors kept: `[r, c]`.
///
/// The norm is at least `eps`. On a CPU the work and the result are in fp32, on CUDA in bf16; float64 stays float64.
pub fn newton_schulz(m: &Tensor, steps: usize, eps: f64) -> Tensor {
    assert_eq!(m.dim(), 2, "muon: Newton-Schulz takes a matrix, found {:?}", m.size());
    tch::no_grad(|| {
        if !m.device().is_cuda() && m.kind() != Kind::Double {
            // SAFETY: the pointers outlive the call.
            let [out] = ffi::produce(|[out]| unsafe {
                ffi::tangelo_newton_schulz(ffi::borrow(m), steps, eps, COEFFICIENTS.as_ptr(), out)
            });
            return out;
        }
        reference::newton_schulz(m, steps, eps)
    })
}

/// Applies `update` to `master` (fp32), both the same slice of a matrix of `shape`: weight decay, then the update at
/// the adjusted learning rate. Writes the rounded master weights to `model_copy`, of the slice's shape: elementwise.
pub fn apply_update(master: &Tensor, update: &Tensor, model_copy: Option<&Tensor>, shape: [i64; 2], options: &Muon) {
    assert_eq!(master.size(), update.size(), "muon: master weights and update differ in shape");
    let lr = options.adjust_lr.adjusted(options.lr, shape);
    tch::no_grad(|| {
        let mut master = master.shallow_clone();
        let _ = master.g_mul_scalar_(1.0 - options.lr * options.weight_decay);
        master -= update.to_kind(master.kind()) * lr;
        if let Some(copy) = model_copy {
            copy.shallow_clone().copy_(&master);
        }
    });
}

/// A whole step of one matrix `[r, c]`: `master`, `momentum` (fp32) and `model_copy` change in place.
pub fn muon_step(master: &Tensor, momentum: &Tensor, grad: &Tensor, model_copy: Option<&Tensor>, options: &Muon) {
    let (rows, columns) = master.size2().expect("muon: master weights must be a matrix");
    let update = newton_schulz(&momentum_update(momentum, grad, options), options.ns_steps, options.eps);
    apply_update(master, &update, model_copy, [rows, columns], options);
}
