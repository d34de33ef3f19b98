//! The model against transformers, in fp32, with a float64 run as the truth (tests/python/golden.py makes both).

use crate::support;
use std::collections::HashMap;
use std::path::Path;
use tangelo_core::DType;
use tangelo_core::batch::{ragged_f32, ragged_u32};
use tangelo_core::{Batch, Column};
use tangelo_formats::writer::{MAX_SHARD_BYTES, convert};
use tangelo_formats::{Weights, tokenizer};
use tangelo_models::Model;
use tangelo_trainer::alone::Alone;
use tch::{Device, Kind, Tensor};

/// Two correct fp32 implementations differ from the truth by different roundings of the same size; one that is off by
/// more than this factor has lost precision somewhere. By how much one run is off is luck, on either side: the largest
/// logit error of one and the same function spreads over a factor of three with the order of its hidden units (ours
/// over transformers', of one run each, 130 draws: 0.3 to 3.4, geometric mean 0.97). So transformers' error is the
/// largest over several such orders, and the mean over all models has a limit of its own.
const MAX_ERROR_RATIO: f64 = 2.0;
/// Of the geometric mean, over all models, of our logit error over transformers' mean one. 130 draws have a mean of 1
/// and a factor of 1.6 as standard deviation; so ten have one of 1.16, and 1.6 is three of those.
const MAX_MEAN_ERROR_RATIO: f64 = 1.6;
/// fp32 gradients of models this small are some 1e-6 off (transformers' own are 1e-6 to 4e-6); a missing or doubled
/// term is off by far more. A draw whose softmax is all but saturated leaves q and k a gradient of differences of
/// nearly equal numbers, which no fp32 computation has to 1e-5: there transformers' own error, 6e-5 in one draw of
/// some hundred, is the measure, by the same factor as for logits; so in some of SmolLM2's layers (2e-4 on thirty tokens, both).
const MAX_GRADIENT_ERROR: f64 = 1e-5;
/// The mean of some 50 losses near 7, each with a few roundings of 1e-7 relative.
const MAX_LOSS_ERROR: f64 = 1e-5;

pub type Golden = HashMap<String, Tensor>;

pub fn golden(path: &Path) -> Golden {
    Tensor::read_safetensors(path).expect("golden.py writes safetensors").into_iter().collect()
}

/// The weights of a folder or file, in fp32, with gradient buffers where `trained`.
pub fn load(path: &Path, trained: bool) -> Model {
    let weights = Weights::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let model = Model::zeros(weights.spec(), Kind::Float, Device::Cpu, trained);
    for meta in weights.metas() {
        let mut values = vec![0f32; meta.num_elements()];
        weights.read_f32(&meta.name, 0..meta.shape[0], &mut values).expect("a listed tensor can be read");
        let mut view = model.weight(&meta.name).expect("the model has what the file lists").value;
        let shape: Vec<i64> = meta.shape.iter().map(|&n| n as i64).collect();
        tch::no_grad(|| view.copy_(&Tensor::from_slice(&values).reshape(shape)));
    }
    model
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    Vec::<i64>::try_from(tensor).expect("ids are i64").into_iter().map(|id| id as u32).collect()
}

/// All documents of a case as one row; a document's last token predicts nothing.
fn packed(golden: &Golden) -> Batch {
    let tokens = ids(&golden["ids"]);
    let (mut documents, mut positions, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for (id, length) in ids(&golden["lengths"]).into_iter().enumerate() {
        positions.extend(0..length);
        weights.extend((0..length).map(|i| if i + 1 < length { 1f32 } else { 0.0 }));
        documents.extend(vec![id as u32; length as usize]);
    }
    let targets = tokens[1..].iter().chain(&tokens[..1]).copied().collect();
    let columns = vec![
        (Column::Tokens, ragged_u32(&[tokens])),
        (Column::Targets, ragged_u32(&[targets])),
        (Column::Positions, ragged_u32(&[positions])),
        (Column::SeqId, ragged_u32(&[documents])),
        (Column::CeWeight, ragged_f32(&[weights])),
    ];
    Batch::from_columns(columns).expect("columns of equal lengths")
}

fn max_error(found: &Tensor, truth: &Tensor) -> f64 {
    (found.to_kind(Kind::Double) - truth).abs().max().double_value(&[])
}

fn relative_error(found: &Tensor, truth: &Tensor) -> f64 {
    let difference = (found.to_kind(Kind::Double) - truth).norm();
    (difference / truth.norm()).double_value(&[])
}

/// Returns our largest error over the geometric mean of transformers' largest errors.
fn check_logits(model: &Alone, golden: &Golden, faults: &mut Vec<String>) -> f64 {
    let ours = max_error(&model.logits(&packed(golden)).unwrap(), &golden["logits.f64"]);
    let errors = &golden["logit_errors"];
    let (theirs, mean) = (errors.max().double_value(&[]), errors.log().mean(Kind::Double).exp().double_value(&[]));
    println!("  logits: error {ours:.2e}, transformers' {mean:.2e} on average, at most {theirs:.2e}");
    if ours > MAX_ERROR_RATIO * theirs {
        faults.push(format!("logits off by {ours:.2e}, transformers' by {theirs:.2e}"));
    }
    ours / mean
}

/// Loss and every gradient, with nothing recomputed and with every second block recomputed.
pub fn check_gradients(alone: &Alone, batch: &Batch, golden: &Golden, faults: &mut Vec<String>) {
    let model = alone.model();
    let layers = 0..model.num_blocks();
    for recompute in [vec![false; layers.len()], layers.map(|layer| layer % 2 == 1).collect()] {
        let what = format!("recompute {recompute:?}");
        model.units().iter().filter_map(|u| u.main_grad()).for_each(|g| drop(g.shallow_clone().zero_()));
        let loss = alone.forward_backward(batch, &recompute).unwrap();
        let truth = golden["loss.f64"].double_value(&[0]);
        if (loss - truth).abs() > MAX_LOSS_ERROR {
            faults.push(format!("{what}: loss {loss}, expected {truth}"));
        }
        let mut worst = 0f64;
        for (key, truth) in golden {
            let Some(name) = key.strip_prefix("grad.") else { continue };
            let grad = model.weight(name).and_then(|w| w.grad().map(Tensor::shallow_clone));
            let error = grad.map_or(f64::INFINITY, |grad| relative_error(&grad, truth));
            worst = worst.max(error);
            let theirs = golden[&format!("grad_error.{name}")].double_value(&[0]);
            if error > MAX_GRADIENT_ERROR.max(MAX_ERROR_RATIO * theirs) {
                faults.push(format!("{what}: gradient of {name} off by {error:.1e}, transformers' by {theirs:.1e}"));
            }
        }
        println!("  {what}: loss {loss:.6}, worst gradient error {worst:.1e}");
    }
}

/// The `count` most likely tokens after `prompt`, keeping keys and values or not.
fn greedy(model: &Model, prompt: &[u32], count: usize, cached: bool) -> Vec<u32> {
    let (mut all, mut state) = (prompt.to_vec(), model.new_state());
    let mut fed = 0;
    for _ in 0..count {
        if !cached {
            (state, fed) = (model.new_state(), 0);
        }
        let logits = model.decode(&mut state, &all[fed..]);
        fed = all.len();
        all.push(logits.argmax(-1, false).int64_value(&[]) as u32);
    }
    all.split_off(prompt.len())
}

fn check_greedy(model: &Model, golden: &Golden, faults: &mut Vec<String>) {
    let (prompt, expected) = (ids(&golden["prompt"]), ids(&golden["greedy"]));
    for cached in [true, false] {
        let found = greedy(model, &prompt, expected.len(), cached);
        if found != expected {
            let same = found.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            faults.push(format!("greedy (cached: {cached}) differs from token {same} of {} on", expected.len()));
        }
    }
}

#[test]
fn random_models_of_every_family_equal_transformers() {
    let Some(python) = support::python() else { return };
    let (folder, seed) = (tempfile::tempdir().unwrap(), support::fresh_seed());
    let out = folder.path().to_str().unwrap();
    support::run_script(&python, "golden.py", &["make", out, &seed.to_string()]);
    let cases = cases(folder.path());
    assert!(cases.len() >= 10, "{cases:?}");
    let (mut faults, mut log_ratios) = (Vec::new(), Vec::new());
    for case in cases {
        println!("{case}");
        let model = Alone::new(load(&folder.path().join(&case).join("model"), true)).unwrap();
        let golden = golden(&folder.path().join(&case).join("golden.safetensors"));
        let mut found = Vec::new();
        log_ratios.push(check_logits(&model, &golden, &mut found).ln());
        check_gradients(&model, &packed(&golden), &golden, &mut found);
        check_greedy(model.model(), &golden, &mut found);
        faults.extend(found.into_iter().map(|fault| format!("{case}: {fault}")));
    }
    let ratio = (log_ratios.iter().sum::<f64>() / log_ratios.len() as f64).exp();
    println!("logit errors are {ratio:.2} of transformers'");
    if ratio > MAX_MEAN_ERROR_RATIO {
        faults.push(format!("all models: logits are off {ratio:.2} times as much as transformers'"));
    }
    assert!(faults.is_empty(), "seed {seed}:\n{}", faults.join("\n"));
    check_export(&python, folder.path());
}

/// Every model of `folder` written by us, in one file and in shards, must be to transformers what it was before.
fn check_export(python: &Path, folder: &Path) {
    for (i, case) in cases(folder).iter().enumerate() {
        let weights = Weights::open(&folder.join(case).join("model")).unwrap();
        let max_shard_bytes = if i % 2 == 0 { MAX_SHARD_BYTES } else { 30_000 };
        convert(&weights, &folder.join(case).join("export"), DType::F32, max_shard_bytes, None).unwrap();
    }
    support::run_script(python, "golden.py", &["same", folder.to_str().unwrap()]);
}

fn cases(folder: &Path) -> Vec<String> {
    serde_json::from_str(&std::fs::read_to_string(folder.join("cases.json")).unwrap()).unwrap()
}

/// What golden.py says about a prompt.
#[derive(serde::Deserialize)]
struct Answer {
    prompt: String,
    ids: Vec<u32>,
    greedy: Vec<u32>,
}

#[test]
fn a_real_quantised_model_equals_transformers() {
    let (Some(python), Some(file)) = (support::python(), support::smollm2()) else { return };
    let folder = tempfile::tempdir().unwrap();
    // Between them some thirty tokens: enough that no gradient is all rounding.
    let prompts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time there was a"];
    let arguments = [&["gguf", file.to_str().unwrap(), folder.path().to_str().unwrap()], &prompts[..]].concat();
    support::run_script(&python, "golden.py", &arguments);
    let text = std::fs::read_to_string(folder.path().join("answers.json")).unwrap();
    let answers: Vec<Answer> = serde_json::from_str(&text).unwrap();
    assert_eq!(answers.len(), prompts.len());
    let alone = Alone::new(load(&file, true)).unwrap();
    let tokenizer = tokenizer::load(&file).unwrap().tokenizer;
    let mut faults = Vec::new();
    let golden = golden(&folder.path().join("golden.safetensors"));
    check_logits(&alone, &golden, &mut faults);
    check_gradients(&alone, &packed(&golden), &golden, &mut faults);
    let model = alone.model();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    for answer in &answers {
        let ids = tokenizer.encode(answer.prompt.as_str(), true).unwrap();
        assert_eq!(ids.get_ids(), answer.ids, "{:?} is tokenised in another way", answer.prompt);
        let found = greedy(model, &answer.ids, answer.greedy.len(), true);
        assert_eq!(found, answer.greedy, "{:?}", answer.prompt);
    }
    let Answer { ids, greedy: expected, .. } = &answers[0];
    assert_eq!(greedy(model, ids, expected.len(), false), *expected, "cached and uncached differ");
}
