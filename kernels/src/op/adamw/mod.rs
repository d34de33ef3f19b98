//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019) over flat fp32 buffers, as `torch.optim.AdamW` computes
//! it. Elementwise, so a shard's result does not depend on how the buffer was cut.
#![allow(unsafe_code)]

pub mod reference;

use std::ops::Range;

use tch::{Device, Tensor};

use crate::ffi;

/// Hyperparameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Number of this step, from 1: bias correction.
    pub step: u64,
    /// Multiplies the gradient first (clipping); 1 for none.
    pub grad_scale: f64,
}

/// The buffers of one shard, each `[n]`, contiguous, updated in place.
#[derive(Clone, Copy, Debug)]
pub struct AdamWState<'a> {
    /// Master weights, fp32.
    pub master: &'a Tensor,
    /// First moment, fp32.
    pub exp_avg: &'a Tensor,
    /// Second moment, fp32.
    pub exp_avg_sq: &'a Tensor,
    /// Gradient, fp32; read only.
    pub grad: &'a Tensor,
    /// The model's own copy of the weights (bf16, or fp32), written with the rounded master weights.
    pub model_copy: Option<&'a Tensor>,
}

/// A stretch of the buffers with one weight decay. Elements in no segment are not touched.
#[derive(Clone, Debug, PartialEq)]
pub struct DecaySegment {
    /// Elements of the flat buffers.
    pub range: Range<usize>,
    /// Weight decay coefficient (0 for norms and biases).
    pub weight_decay: f64,
}

/// One step over every segment.
pub fn adamw_step(state: AdamWState<'_>, segments: &[DecaySegment], options: &AdamW) {
    assert!(options.step > 0, "adamw: steps count from 1");
    tch::no_grad(|| {
        for segment in segments {
            match state.master.device() {
                Device::Cpu => cpu_segment(state, segment, options),
                _ => reference::adamw_segment(state, segment, options),
            }
        }
    });
}

fn cpu_segment(state: AdamWState<'_>, segment: &DecaySegment, options: &AdamW) {
    let arguments = ffi::AdamWArguments {
        lr: options.lr,
        beta1: options.beta1,
        beta2: options.beta2,
        eps: options.eps,
        weight_decay: segment.weight_decay,
        step: options.step as f64,
        grad_scale: options.grad_scale,
    };
    // SAFETY: all pointers outlive the call; the shim checks types, sizes and the range.
    ffi::check(unsafe {
        ffi::tangelo_adamw(
            ffi::borrow(state.master),
            ffi::borrow(state.exp_avg),
            ffi::borrow(state.exp_avg_sq),
            ffi::borrow(state.grad),
            ffi::borrow_option(state.model_copy),
            segment.range.start as i64,
            segment.range.end as i64,
            &arguments,
        )
    });
}
