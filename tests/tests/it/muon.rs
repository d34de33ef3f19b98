//! Muon against `torch.optim.Muon` (tests/python/muon.py): five steps of random matrices.

use crate::support;
use serde::Deserialize;
use std::collections::HashMap;
use tangelo_kernels::op::muon::{AdjustLr, Muon, muon_step};
use tch::{Kind, Tensor};

/// Of the way that weights went, against torch in float64. Weights of size 1 go some hundredths, so that their own rounding
/// (6e-8 a step) is 1e-5 of it. An orthogonalised matrix is exact to 1e-4 (kernels/tests/op/muon.rs): fp32's rounding grows
/// by up to 3.4445 in each of 5 iterations where singular values are small, and few are.
const MAX_WAY_ERROR: f64 = 1e-4;
/// Of the momentum: five rounded steps of 6e-8.
const MAX_MOMENTUM_ERROR: f64 = 1e-6;

#[derive(Deserialize)]
struct Case {
    name: String,
    shape: [i64; 2],
    lr: f64,
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
    ns_steps: usize,
    match_rms: bool,
}

#[test]
fn five_steps_equal_torch() {
    let Some(python) = support::python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    support::run_script(&python, "muon.py", &[out.to_str().unwrap(), &support::fresh_seed().to_string()]);
    let tensors: HashMap<String, Tensor> =
        Tensor::read_safetensors(out.join("tensors.safetensors")).unwrap().into_iter().collect();
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(out.join("cases.json")).unwrap()).unwrap();
    assert!(cases.len() >= 12);
    for case in cases {
        let of = |what: &str| &tensors[&format!("{}.{what}", case.name)];
        let (start, end) = (of("start").to_kind(Kind::Double), of("end"));
        let (weight, momentum) = (of("start").copy(), of("start").zeros_like());
        let options = Muon {
            lr: case.lr,
            momentum: case.momentum,
            nesterov: case.nesterov,
            weight_decay: case.weight_decay,
            ns_steps: case.ns_steps,
            eps: 1e-7,
            adjust_lr: if case.match_rms { AdjustLr::MatchRmsAdamW } else { AdjustLr::Original },
            grad_scale: 1.0,
        };
        for step in 0..5 {
            muon_step(&weight, &momentum, of(&format!("grad.{step}")), None, &options);
        }
        let way = error(&(weight.to_kind(Kind::Double) - &start), &(end - &start));
        let buffer = error(&momentum, of("momentum"));
        println!(
            "{:?} nesterov {} momentum {}: way {way:.1e}, momentum {buffer:.1e}",
            case.shape, case.nesterov, case.momentum
        );
        assert!(way <= MAX_WAY_ERROR && buffer <= MAX_MOMENTUM_ERROR, "{:?}: {way:.1e} {buffer:.1e}", case.shape);
    }
}

fn error(found: &Tensor, truth: &Tensor) -> f64 {
    ((found.to_kind(Kind::Double) - truth).norm() / truth.norm()).double_value(&[])
}
