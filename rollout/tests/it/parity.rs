//! The engine's log-probabilities have the bits of the training forward pass, and its tokens depend on nothing else.

use crate::common::*;
use tangelo_configs::{EngineConfig, SamplingParams};
use tangelo_rollout::{Completion, Engine, Request};
use tch::Kind;

/// Compares with training, and returns the completions and how often a sequence was preempted.
fn check(
    model: &tangelo_models::Model,
    requests: &[Request],
    config: &EngineConfig,
    temperature: f64,
) -> (Vec<Completion>, u64) {
    let mut engine = Engine::new(model, config, &[250], None).expect("an engine");
    let completions = generate(&mut engine, model, requests);
    let samples: usize = requests.iter().map(|r| r.sampling.n).sum();
    assert_eq!(completions.len(), samples);
    for (at, field) in [(1.0, 0), (temperature, 1)] {
        for (c, expected) in completions.iter().zip(trained_logprobs(model, requests, &completions, at)) {
            let found = if field == 0 { &c.logprobs } else { &c.sampling_logprobs };
            assert_eq!(found, &expected, "request {}, sample {}, {config:?}", c.request, c.index);
        }
    }
    assert_eq!(engine.num_blocks(), engine.free_blocks(), "every block was given back");
    (completions, engine.stats().num_preempted)
}

/// Batches, pieces of prompts, forks and preemption: the same samples, the same bits.
#[test]
fn logprobs_are_those_of_training_to_the_bit() {
    seed_freshly();
    for (name, spec) in specs() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let model = random_model(&spec, kind);
            let sampling = SamplingParams { n: 3, max_tokens: 40, temperature: 0.8, ..SamplingParams::default() };
            let requests = requests(&prompts(5, 150, 250), &sampling);
            let (expected, _) = check(&model, &requests, &options(64, 8192, 64), 0.8);
            for (max_num_seqs, tokens) in [(3, 3), (7, 16), (64, 77)] {
                let (found, _) = check(&model, &requests, &options(max_num_seqs, tokens, 64), 0.8);
                assert_eq!(found, expected, "{name} {kind:?}: {max_num_seqs} sequences, {tokens} tokens a step");
            }
            let mut reversed = requests.clone();
            reversed.reverse();
            assert_eq!(check(&model, &reversed, &options(5, 100, 64), 0.8).0, expected, "{name} {kind:?}: reversed");
        }
    }
}

#[test]
fn a_token_at_a_time_and_many_sequences_at_once_are_the_same() {
    seed_freshly();
    let (_, spec) = specs().swap_remove(0);
    for kind in [Kind::Float, Kind::BFloat16] {
        let model = random_model(&spec, kind);
        let sampling = SamplingParams { max_tokens: 30, ..SamplingParams::default() };
        let requests = requests(&prompts(64, 40, 250), &sampling);
        let (expected, _) = check(&model, &requests, &options(64, 8192, 64), 1.0);
        for slots in [1, 2, 7] {
            assert_eq!(
                check(&model, &requests, &options(slots, slots, 64), 1.0).0,
                expected,
                "{kind:?}: {slots} slots"
            );
        }
        for (request, expected) in requests.iter().zip(&expected).take(5) {
            let alone = check(&model, std::slice::from_ref(request), &options(1, 64, 64), 1.0).0;
            assert_eq!(&alone[0], expected, "{kind:?}: alone");
        }
    }
}

#[test]
fn preemption_changes_nothing() {
    seed_freshly();
    let (_, mut spec) = specs().swap_remove(3);
    spec.max_position_embeddings = 400;
    for kind in [Kind::Float, Kind::BFloat16] {
        let model = random_model(&spec, kind);
        let sampling = SamplingParams { n: 4, max_tokens: 230, ignore_eos: true, ..SamplingParams::default() };
        let requests = requests(&prompts(8, 100, 250), &sampling);
        let (expected, none) = check(&model, &requests, &options(64, 8192, 256), 1.0);
        let (found, some) = check(&model, &requests, &options(64, 500, 1), 1.0);
        assert_eq!(none, 0);
        assert!(some > 0, "the memory was too large to preempt anything");
        assert_eq!(found, expected, "{kind:?}");
    }
}
