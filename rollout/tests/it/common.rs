//! Small random models of every kind, prompts, and the log-probabilities that training computes.

use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};
use tangelo_configs::{EngineConfig, ModelSpec, SamplingParams, hf_config};
use tangelo_kernels::op;
use tangelo_models::{Model, PackContext};
use tangelo_rollout::{Completion, Engine, Request};
use tch::{Device, Kind, Tensor};

/// Seeds libtorch's generator differently from run to run, and prints with what: `TANGELO_TEST_SEED=...` repeats it.
pub fn seed_freshly() {
    let given = std::env::var("TANGELO_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    let seed = given.unwrap_or(i64::from(now) % 1_000_000);
    println!("seed {seed} (repeat with TANGELO_TEST_SEED={seed})");
    tch::manual_seed(seed);
}

/// A random number from 0 to below `limit`.
pub fn below(limit: usize) -> usize {
    Tensor::randint(limit as i64, [1], (Kind::Int64, Device::Cpu)).int64_value(&[0]) as usize
}

/// Grouped heads, biases, norms of heads, windows, tied heads, odd sizes.
pub fn specs() -> Vec<(&'static str, ModelSpec)> {
    let with = |extra: Value| {
        let mut config = json!({
            "vocab_size": 251, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
            "rope_theta": 1e4, "eos_token_id": 250
        });
        for (key, value) in extra.as_object().expect("an object") {
            config[key] = value.clone();
        }
        hf_config::from_json(&config).expect("a model of ours")
    };
    let llama = |extra: Value| {
        let mut all = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
        all.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        with(all)
    };
    vec![
        ("llama", llama(json!({"tie_word_embeddings": true}))),
        ("llama with biases", llama(json!({"attention_bias": true, "mlp_bias": true, "num_key_value_heads": 6}))),
        ("qwen2", with(json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 54}))),
        (
            "qwen3",
            with(json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 1,
                "head_dim": 20, "tie_word_embeddings": true})),
        ),
        (
            "mistral",
            with(json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 21})),
        ),
    ]
}

/// A model with random weights, and gradients like one in training.
pub fn random_model(spec: &ModelSpec, kind: Kind) -> Model {
    // Models this small gain nothing from threads, and on a busy machine each waits for the other.
    tch::set_num_threads(1);
    let model = Model::zeros(spec, kind, Device::Cpu, true);
    for unit in model.units() {
        for span in unit.spans() {
            let mut values = unit.value(&span.meta.name);
            let fresh = Tensor::randn(values.size(), (Kind::Float, Device::Cpu));
            let fresh = match values.size()[..] {
                [_] if span.meta.name.ends_with("norm.weight") => fresh * 0.1 + 1.0,
                [_] => fresh * 0.1,
                _ => fresh * 0.2,
            };
            tch::no_grad(|| values.copy_(&fresh));
        }
    }
    model
}

/// `count` prompts of 1 to `longest` tokens.
pub fn prompts(count: usize, longest: usize, vocabulary: usize) -> Vec<Vec<u32>> {
    let prompt = |_| (0..1 + below(longest)).map(|_| below(vocabulary) as u32).collect();
    (0..count).map(prompt).collect()
}

/// A request for each prompt, each with a seed of its own.
pub fn requests(prompts: &[Vec<u32>], sampling: &SamplingParams) -> Vec<Request> {
    let request = |(i, prompt): (usize, &Vec<u32>)| Request {
        id: i as u64,
        prompt: prompt.clone(),
        sampling: sampling.clone(),
        seed: 1000 + i as u64,
    };
    prompts.iter().enumerate().map(request).collect()
}

/// An engine's options: slots, tokens per step, MiB.
pub fn options(max_num_seqs: usize, max_num_batched_tokens: usize, kv_memory_mib: usize) -> EngineConfig {
    EngineConfig { max_num_seqs, max_num_batched_tokens, kv_memory_mib, ..EngineConfig::default() }
}

/// All samples of `requests`, by request and sample.
pub fn generate(engine: &mut Engine, model: &Model, requests: &[Request]) -> Vec<Completion> {
    for request in requests {
        engine.add(request.clone()).expect("a good request");
    }
    let mut completions = engine.run(model).expect("the engine runs");
    completions.sort_by_key(|c| (c.request, c.index));
    completions
}

/// The log-probabilities of each completion's tokens as a training step computes them: all sequences packed, in grad mode,
/// with main gradients, at a temperature.
pub fn trained_logprobs(
    model: &Model,
    requests: &[Request],
    completions: &[Completion],
    temperature: f64,
) -> Vec<Vec<f32>> {
    let (mut tokens, mut positions, mut targets, mut bounds) = (Vec::new(), Vec::new(), Vec::new(), vec![0]);
    for c in completions {
        let prompt = &requests.iter().find(|r| r.id == c.request).expect("its request").prompt;
        let all: Vec<u32> = prompt.iter().chain(&c.ids).copied().collect();
        positions.extend(0..all.len() as u32);
        targets.extend(all[1..].iter().chain(&all[..1]).map(|&id| i64::from(id)));
        tokens.extend(all);
        bounds.push(tokens.len() as i64);
    }
    let pack = PackContext::new(&tokens, &positions, bounds.clone(), Device::Cpu);
    let angles = model.angles(&pack.positions);
    let x = model.embed(&pack.tokens).set_requires_grad(true);
    let blocks = (0..model.num_blocks()).fold(x, |x, layer| model.block(layer, &x, &pack, &angles));
    let hidden = model.final_norm(&blocks);
    assert!(hidden.requires_grad(), "a training step makes a graph");
    let targets = Tensor::from_slice(&targets);
    let all = op::token_logprobs(&hidden.detach(), &model.head().weight.value, &targets, temperature, 300);
    let all = Vec::<f32>::try_from(all).expect("floats");
    let of = |(c, end): (&Completion, &i64)| all[*end as usize - 1 - c.ids.len()..*end as usize - 1].to_vec();
    completions.iter().zip(&bounds[1..]).map(of).collect()
}
