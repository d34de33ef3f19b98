//! One segment in plain operations.

use super::{AdamW, AdamWState, DecaySegment};

/// Updates one segment.
pub fn adamw_segment(state: AdamWState<'_>, segment: &DecaySegment, options: &AdamW) {
    let (start, length) = (segment.range.start as i64, segment.range.len() as i64);
    let part = |x: &tch::Tensor| x.narrow(0, start, length);
    let (mut master, mut exp_avg, mut exp_avg_sq) = (part(state.master), part(state.exp_avg), part(state.exp_avg_sq));
    let grad = part(state.grad) * options.grad_scale;
    let (beta1, beta2) = (options.beta1, options.beta2);
    let step = options.step as f64;
    let _ = master.g_mul_scalar_(1.0 - options.lr * segment.weight_decay);
    exp_avg.copy_(&(&exp_avg * beta1 + &grad * (1.0 - beta1)));
    exp_avg_sq.copy_(&(&exp_avg_sq * beta2 + grad.square() * (1.0 - beta2)));
    let denominator = exp_avg_sq.sqrt() / (1.0 - beta2.powf(step)).sqrt() + options.eps;
    let step_size = options.lr / (1.0 - beta1.powf(step));
    master -= &exp_avg / denominator * step_size;
    if let Some(copy) = state.model_copy {
        part(copy).copy_(&master);
    }
}
