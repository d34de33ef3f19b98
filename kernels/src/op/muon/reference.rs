//! Muon in plain operations.

use tch::{Kind, Tensor};

use super::{COEFFICIENTS, Muon};

/// See [`super::newton_schulz`].
pub fn newton_schulz(m: &Tensor, steps: usize, eps: f64) -> Tensor {
    let kind = match m.kind() {
        Kind::Double => Kind::Double,
        _ if m.device().is_cuda() => Kind::BFloat16,
        _ => Kind::Float,
    };
    let [a, b, c] = COEFFICIENTS;
    let tall = m.size()[0] > m.size()[1];
    let turned = |x: &Tensor| if tall { x.tr() } else { x.shallow_clone() };
    let mut x = turned(&m.to_kind(kind));
    x = &x / x.norm().clamp_min(eps);
    for _ in 0..steps {
        let gram = x.matmul(&x.tr());
        let update = &gram * b + gram.matmul(&gram) * c;
        x = &x * a + update.matmul(&x);
    }
    turned(&x)
}

/// See [`super::muon_step`].
pub fn muon_step(master: &Tensor, momentum: &Tensor, grad: &Tensor, model_copy: Option<&Tensor>, options: &Muon) {
    let (mut master, mut momentum) = (master.shallow_clone(), momentum.shallow_clone());
    let grad = grad * options.grad_scale;
    let _ = momentum.lerp_(&grad, 1.0 - options.momentum);
    let ahead = if options.nesterov { grad.lerp(&momentum, options.momentum) } else { momentum };
    let update = newton_schulz(&ahead, options.ns_steps, options.eps).to_kind(master.kind());
    let (rows, columns) = master.size2().expect("a matrix");
    let _ = master.g_mul_scalar_(1.0 - options.lr * options.weight_decay);
    master -= update * options.adjust_lr.adjusted(options.lr, [rows, columns]);
    if let Some(copy) = model_copy {
        copy.shallow_clone().copy_(&master);
    }
}
