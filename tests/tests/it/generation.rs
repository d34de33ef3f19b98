//! The engine on a real model: greedy tokens against transformers, and log-probabilities against the training forward pass.

use crate::parity::load;
use crate::support;
use tangelo_configs::{EngineConfig, SamplingParams};
use tangelo_kernels::op;
use tangelo_models::{Model, PackContext};
use tangelo_rollout::{Completion, Engine, Request};
use tch::{Device, Kind, Tensor};

const NUM_TOKENS: usize = 16;

/// Sixty-four different beginnings.
fn prompts() -> Vec<String> {
    let subjects = ["France", "a river", "the moon", "seven", "music", "my sister", "an old house", "copper"];
    let around = [
        ("The capital of", " is"),
        ("Once upon a time there was", " who"),
        ("Q: What do you know about", "?\nA:"),
        ("def describe(x):\n    # tells about", "\n"),
        ("In one word,", ":"),
        ("1. Apples\n2.", "\n3."),
        ("She wrote a letter about", ", and then"),
        ("The opposite of", ""),
    ];
    around.iter().flat_map(|(a, b)| subjects.iter().map(move |s| format!("{a} {s}{b}"))).collect()
}

/// What golden.py says about a prompt.
#[derive(serde::Deserialize)]
struct Answer {
    ids: Vec<u32>,
    greedy: Vec<u32>,
}

fn generate(model: &Model, prompts: &[Vec<u32>], sampling: &SamplingParams) -> Vec<Completion> {
    let config = EngineConfig { max_num_seqs: 64, kv_memory_mib: 512, ..EngineConfig::default() };
    let mut engine = Engine::new(model, &config, &[], None).expect("an engine");
    for (id, prompt) in prompts.iter().enumerate() {
        let (id, prompt, sampling) = (id as u64, prompt.clone(), sampling.clone());
        engine.add(Request { id, prompt, sampling, seed: id }).expect("a good request");
    }
    let mut completions = engine.run(model).expect("the engine runs");
    completions.sort_by_key(|c| (c.request, c.index));
    completions
}

/// The largest difference between log-probabilities of the engine and of whole forward passes, over all tokens.
fn largest_difference(model: &Model, prompts: &[Vec<u32>], completions: &[Completion]) -> f32 {
    let (mut tokens, mut positions, mut bounds) = (Vec::new(), Vec::new(), vec![0]);
    for c in completions {
        tokens.extend(prompts[c.request as usize].iter().chain(&c.ids));
        positions.extend(0..(tokens.len() - bounds[bounds.len() - 1] as usize) as u32);
        bounds.push(tokens.len() as i64);
    }
    let pack = PackContext::new(&tokens, &positions, bounds.clone(), Device::Cpu);
    let targets: Vec<i64> = tokens[1..].iter().chain(&tokens[..1]).map(|&id| i64::from(id)).collect();
    let hidden = model.hidden(&pack);
    let all = op::token_logprobs(&hidden, &model.head().weight.value, &Tensor::from_slice(&targets), 1.0, 256);
    let all = Vec::<f32>::try_from(all).expect("floats");
    let differences = completions.iter().zip(&bounds[1..]).flat_map(|(c, &end)| {
        let of_completion = &all[end as usize - 1 - c.ids.len()..end as usize - 1];
        c.logprobs.iter().zip(of_completion).map(|(a, b)| (a - b).abs())
    });
    differences.fold(0.0, f32::max)
}

#[test]
fn greedy_tokens_equal_transformers_and_logprobs_equal_training() {
    let (Some(python), Some(file)) = (support::python(), support::smollm2()) else { return };
    let out = tempfile::tempdir().unwrap();
    let (out, texts) = (out.path().join("answers.json"), prompts());
    let count = NUM_TOKENS.to_string();
    let fixed = ["continue", file.to_str().unwrap(), out.to_str().unwrap(), &count];
    let arguments: Vec<&str> = fixed.into_iter().chain(texts.iter().map(String::as_str)).collect();
    support::run_script(&python, "golden.py", &arguments);
    let answers: Vec<Answer> = serde_json::from_str(&std::fs::read_to_string(out).unwrap()).unwrap();
    assert_eq!(answers.len(), 64);
    let ids: Vec<Vec<u32>> = answers.iter().map(|a| a.ids.clone()).collect();
    let model = load(&file, false);
    let greedy = SamplingParams { temperature: 0.0, max_tokens: NUM_TOKENS, ..SamplingParams::default() };
    let found = generate(&model, &ids, &greedy);
    for ((text, answer), completion) in texts.iter().zip(&answers).zip(&found) {
        assert_eq!(completion.ids, answer.greedy, "{text:?}");
    }
    assert_eq!(largest_difference(&model, &ids, &found), 0.0, "fp32");
    let half = as_bf16(&model);
    let sampled = SamplingParams { n: 2, max_tokens: NUM_TOKENS, ..SamplingParams::default() };
    let found = generate(&half, &ids[..24], &sampled);
    assert_eq!(largest_difference(&half, &ids, &found), 0.0, "bf16");
}

fn as_bf16(model: &Model) -> Model {
    let half = Model::zeros(model.spec(), Kind::BFloat16, Device::Cpu, false);
    for (from, to) in model.units().iter().zip(half.units()) {
        tch::no_grad(|| to.flat().shallow_clone().copy_(from.flat()));
    }
    half
}
