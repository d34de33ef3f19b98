//! Muon against its definition in float64: singular values through the scalar polynomial.

use tangelo_kernels::op::muon::{self, AdjustLr, COEFFICIENTS, Muon};
use tch::{Device, Kind, Tensor};

use crate::common::*;

const OPTIONS: Muon = Muon {
    lr: 0.02,
    momentum: 0.95,
    nesterov: true,
    weight_decay: 0.1,
    ns_steps: 5,
    eps: 1e-7,
    adjust_lr: AdjustLr::Original,
    grad_scale: 0.7,
};

const SHAPES: [[i64; 2]; 6] = [[48, 48], [30, 70], [70, 30], [1, 17], [17, 1], [65, 64]];

/// `m` with every singular value sent through the polynomial, in float64.
fn through_singular_values(m: &Tensor, steps: usize, eps: f64) -> Tensor {
    let wide = m.to_kind(Kind::Double);
    let (u, values, v) = (&wide / wide.norm().clamp_min(eps)).svd(true, true);
    let [a, b, c] = COEFFICIENTS;
    let polynomial = |s: Tensor| &s * a + s.pow_tensor_scalar(3) * b + s.pow_tensor_scalar(5) * c;
    let values = (0..steps).fold(values, |s, _| polynomial(s));
    (u * values).matmul(&v.tr())
}

/// A matrix whose singular values are spread evenly from `low` to 1, times `size`.
fn spread([rows, columns]: [i64; 2], low: f64, size: f64) -> Tensor {
    let (u, _, v) = random(&[rows, columns], Kind::Double).svd(true, true);
    let values = Tensor::linspace(low, 1.0, rows.min(columns), (Kind::Double, Device::Cpu));
    (u * values * size).matmul(&v.tr()).to_kind(Kind::Float)
}

#[test]
fn newton_schulz_is_a_polynomial_of_singular_values() {
    seed_freshly();
    for shape in SHAPES {
        let m = random(&shape, Kind::Float);
        let expected = through_singular_values(&m, 5, 1e-7);
        // Small singular values grow by up to 3.4445 a step, and so do the rounding errors of fp32 beside them.
        assert_close("fp32", &muon::newton_schulz(&m, 5, 1e-7), &expected, 1e-4);
        assert_close("plain fp32", &muon::reference::newton_schulz(&m, 5, 1e-7), &expected, 1e-4);
        let wide = muon::newton_schulz(&m.to_kind(Kind::Double), 5, 1e-7);
        assert_eq!(wide.kind(), Kind::Double);
        assert_close("float64", &wide, &expected, 1e-12);
        assert_eq!(muon::newton_schulz(&m.to_kind(Kind::BFloat16), 5, 1e-7).kind(), Kind::Float);
    }
}

#[test]
fn newton_schulz_makes_orthogonal_matrices() {
    seed_freshly();
    for (shape, size) in SHAPES.into_iter().zip([1.0, 1e-4, 1e4, 3.0, 1.0, 1e-2]) {
        let values = muon::newton_schulz(&spread(shape, 0.1, size), 5, 1e-7).to_kind(Kind::Double).svd(true, true).1;
        let (least, most) = (values.min().double_value(&[]), values.max().double_value(&[]));
        assert!(0.6 < least && most < 1.3, "{shape:?}: singular values from {least} to {most}");
    }
    let nothing = muon::newton_schulz(&Tensor::zeros([4, 6], (Kind::Float, Device::Cpu)), 5, 1e-7);
    assert_eq!(nothing.abs().sum(Kind::Float).double_value(&[]), 0.0);
}

/// Master weights, momentum, gradient and the model's copy.
fn buffers(shape: [i64; 2]) -> [Tensor; 4] {
    let [master, momentum, grad] = [(); 3].map(|()| random(&shape, Kind::Float));
    [master, momentum * 0.1, grad, Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu))]
}

/// One step by its definition in float64: new master weights and momentum.
fn expected([master, momentum, grad, _]: &[Tensor; 4], shape: [i64; 2], options: &Muon) -> [Tensor; 2] {
    let [master, momentum, grad] = [master, momentum, grad].map(|x| x.to_kind(Kind::Double));
    let grad = grad * options.grad_scale;
    let momentum = momentum * options.momentum + &grad * (1.0 - options.momentum);
    let update =
        if options.nesterov { grad * (1.0 - options.momentum) + &momentum * options.momentum } else { momentum.copy() };
    let (rows, columns) = (shape[0] as f64, shape[1] as f64);
    let factor = match options.adjust_lr {
        AdjustLr::Original => (rows / columns).max(1.0).sqrt(),
        AdjustLr::MatchRmsAdamW => 0.2 * rows.max(columns).sqrt(),
    };
    let update = through_singular_values(&update, options.ns_steps, options.eps);
    [master * (1.0 - options.lr * options.weight_decay) - update * options.lr * factor, momentum]
}

#[test]
fn a_step_matches_float64() {
    seed_freshly();
    for shape in SHAPES {
        for (nesterov, momentum, adjust_lr) in
            [(true, 0.95, AdjustLr::Original), (false, 0.95, AdjustLr::MatchRmsAdamW), (true, 0.3, AdjustLr::Original)]
        {
            let options = Muon { nesterov, momentum, adjust_lr, ..OPTIONS };
            let ours = buffers(shape);
            let [master, momentum] = expected(&ours, shape, &options);
            let plain = [0, 1, 2, 3].map(|i: usize| ours[i].copy());
            muon::muon_step(&ours[0], &ours[1], &ours[2], Some(&ours[3]), &options);
            assert_close("momentum", &ours[1], &momentum, 1e-6);
            // The update is exact to 1e-4 and moves weights of size 1 by some hundredths.
            assert_close("master", &ours[0], &master, 1e-5);
            assert_same_bits("the model's copy", &ours[3], &ours[0].to_kind(Kind::BFloat16));
            muon::reference::muon_step(&plain[0], &plain[1], &plain[2], Some(&plain[3]), &options);
            assert_close("the reference's momentum", &plain[1], &momentum, 1e-6);
            assert_close("the reference's master", &plain[0], &master, 1e-5);
        }
    }
}

#[test]
fn parts_of_a_step_do_not_depend_on_cuts() {
    seed_freshly();
    let shape = [37, 53];
    let whole = buffers(shape);
    let parts = [0, 1, 2, 3].map(|i: usize| whole[i].copy());
    muon::muon_step(&whole[0], &whole[1], &whole[2], Some(&whole[3]), &OPTIONS);
    tch::set_num_threads(2);
    // The momentum is cut anywhere in the flat buffer, the update into rows.
    let flat = |x: &Tensor, start: i64, length: i64| x.view(-1).narrow(0, start, length);
    let cuts = [(0, 5), (5, 600), (605, 1), (606, 37 * 53 - 606)];
    let pieces = cuts.map(|(start, length)| {
        muon::momentum_update(&flat(&parts[1], start, length), &flat(&parts[2], start, length), &OPTIONS)
    });
    let update = Tensor::cat(&pieces, 0).view(shape);
    tch::set_num_threads(1);
    let update = muon::newton_schulz(&update, OPTIONS.ns_steps, OPTIONS.eps);
    for (start, length) in [(0, 1), (1, 20), (21, 16)] {
        let rows = |x: &Tensor| x.narrow(0, start, length);
        muon::apply_update(&rows(&parts[0]), &rows(&update), Some(&rows(&parts[3])), shape, &OPTIONS);
    }
    for (name, i) in [("master", 0), ("momentum", 1), ("copy", 3)] {
        assert_same_bits(name, &whole[i], &parts[i]);
    }
}
