//! Critics and reward models against transformers' classes with one label: what they say of every token, and that what we
//! write is to transformers what it was before.

use crate::support;
use std::path::Path;
use tangelo_configs::HeadSpec;
use tangelo_core::DType;
use tangelo_formats::Weights;
use tangelo_formats::writer::{MAX_SHARD_BYTES, convert};
use tangelo_models::{Model, PackContext};
use tangelo_trainer::init::from_source;
use tch::{Device, Kind, Tensor};

/// ||ours - theirs|| / ||theirs||: two fp32 implementations through two or three blocks of small width, some 1e-6 each.
const MAX_ERROR: f64 = 1e-5;

#[test]
fn scalar_heads_of_every_family_equal_transformers() {
    let Some(python) = support::python() else { return };
    let (folder, seed) = (tempfile::tempdir().unwrap(), support::fresh_seed());
    let out = folder.path().to_str().unwrap();
    support::run_script(&python, "scalar_heads.py", &["make", out, &seed.to_string()]);
    let cases: Vec<String> =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("cases.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 5);
    for case in &cases {
        let error = check(&folder.path().join(case), case.contains("token"));
        println!("{case}: {error:.1e}");
        assert!(error <= MAX_ERROR, "seed {seed}, {case}: values off by {error:.1e}");
    }
    support::run_script(&python, "scalar_heads.py", &["same", out]);
}

/// How far values are off; writes the model again.
fn check(case: &Path, has_bias: bool) -> f64 {
    let weights = Weights::open(&case.join("model")).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(weights.spec().head, HeadSpec::Scalar { bias: has_bias });
    convert(&weights, &case.join("export"), DType::F32, MAX_SHARD_BYTES, None).unwrap();
    let model = Model::zeros(weights.spec(), Kind::Float, Device::Cpu, false);
    model.units().iter().for_each(|unit| from_source(unit, &weights, &mut |_, _| {}).unwrap());
    let golden = Tensor::read_safetensors(case.join("golden.safetensors")).unwrap();
    let of = |name: &str| golden.iter().find(|(n, _)| n == name).unwrap().1.shallow_clone();
    let ids: Vec<u32> = Vec::<i64>::try_from(of("ids")).unwrap().into_iter().map(|id| id as u32).collect();
    let found = model.head().values(&model.hidden(&PackContext::single(&ids, Device::Cpu)));
    ((found - of("values")).norm() / of("values").norm()).double_value(&[])
}
