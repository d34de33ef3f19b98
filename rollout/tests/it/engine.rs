//! When samples end, what requests are refused, and who holds memory.

use crate::common::*;
use expect_test::{Expect, expect};
use std::collections::HashSet;
use tangelo_configs::{EngineConfig, SamplingParams};
use tangelo_models::Model;
use tangelo_rollout::{Completion, Engine, FinishReason, Request, RolloutError, TextStream};
use tch::Kind;

fn model() -> Model {
    seed_freshly();
    random_model(&specs().swap_remove(0).1, Kind::Float)
}

fn engine(model: &Model) -> Engine {
    Engine::new(model, &options(64, 512, 16), &[250], None).expect("an engine")
}

fn one(model: &Model, sampling: SamplingParams) -> Vec<Completion> {
    let request = Request { id: 5, prompt: vec![1, 2, 3], sampling, seed: 9 };
    generate(&mut engine(model), model, &[request])
}

fn sampling(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() }
}

#[test]
fn samples_end_at_stop_tokens_and_at_their_length() {
    let model = model();
    let whole = one(&model, sampling(60));
    assert_eq!((whole[0].ids.len(), whole[0].finish_reason), (60, FinishReason::Length));
    let stop = whole[0].ids[20];
    let first = whole[0].ids.iter().position(|&id| id == stop).unwrap();
    let stopped = one(&model, SamplingParams { stop_token_ids: vec![stop], ..sampling(60) });
    assert_eq!(stopped[0].ids, whole[0].ids[..=first]);
    assert_eq!((stopped[0].finish_reason, &stopped[0].versions), (FinishReason::Stop, &vec![0; first + 1]));
    assert_eq!(stopped[0].logprobs, whole[0].logprobs[..=first]);
    // Until then a stop token is not even drawn.
    let later = one(&model, SamplingParams { stop_token_ids: vec![stop], min_tokens: 40, ..sampling(60) });
    assert!(later[0].ids.len() >= 40 && !later[0].ids[..40].contains(&stop));
    // The model's longest sequence is a bound too.
    let longest = one(&model, sampling(10_000));
    assert_eq!((longest[0].ids.len(), longest[0].finish_reason), (512 - 3, FinishReason::Length));
}

/// Token `i` is the text `<i>`.
struct Named;

impl TextStream for Named {
    fn push(&mut self, id: u32) -> Result<String, String> {
        Ok(format!("<{id}>"))
    }
}

#[test]
fn samples_end_at_stop_texts() {
    let model = model();
    let whole = one(&model, sampling(60));
    let (a, b) = (whole[0].ids[30], whole[0].ids[31]);
    let first = whole[0].ids.windows(2).position(|pair| pair == [a, b]).unwrap();
    let stop = vec!["never".into(), format!("{a}><{b}")];
    let request = Request { id: 5, prompt: vec![1, 2, 3], sampling: SamplingParams { stop, ..sampling(60) }, seed: 9 };
    let source = || Box::new(Named) as Box<dyn TextStream>;
    let mut engine = Engine::new(&model, &options(4, 512, 16), &[250], Some(Box::new(source))).unwrap();
    let stopped = generate(&mut engine, &model, &[request]);
    // A pair whose first number ends in `a`'s digits is a match too, but never a later one.
    assert!(stopped[0].ids.len() <= first + 2 && stopped[0].finish_reason == FinishReason::Stop);
    assert_eq!(stopped[0].ids, whole[0].ids[..stopped[0].ids.len()]);
}

#[test]
fn seeds_and_samples_are_apart_and_repeat() {
    let model = model();
    let eight = one(&model, SamplingParams { n: 8, ..sampling(20) });
    let distinct: HashSet<&Vec<u32>> = eight.iter().map(|c| &c.ids).collect();
    assert!(distinct.len() >= 7, "random samples repeat: {distinct:?}");
    assert_eq!(eight, one(&model, SamplingParams { n: 8, ..sampling(20) }));
    assert_eq!(eight[..3], one(&model, SamplingParams { n: 3, ..sampling(20) }));
    let other = Request { id: 5, prompt: vec![1, 2, 3], sampling: sampling(20), seed: 10 };
    assert_ne!(generate(&mut engine(&model), &model, &[other])[0].ids, eight[0].ids);
    // More samples than may run at once.
    let mut narrow = Engine::new(&model, &options(3, 512, 16), &[250], None).unwrap();
    let request = Request { id: 5, prompt: vec![1, 2, 3], sampling: SamplingParams { n: 8, ..sampling(20) }, seed: 9 };
    assert_eq!(generate(&mut narrow, &model, &[request]), eight);
}

#[test]
fn greedy_takes_the_likeliest_and_says_so() {
    let model = model();
    let greedy = one(&model, SamplingParams { temperature: 0.0, ..sampling(30) });
    assert!(greedy[0].sampling_logprobs.iter().all(|&p| p == 0.0) && greedy[0].logprobs.iter().all(|&p| p < 0.0));
    let mut state = model.new_state();
    let (mut fed, mut expected) = (vec![1, 2, 3], Vec::new());
    for _ in 0..30 {
        let next = model.decode(&mut state, &fed).argmax(-1, false).int64_value(&[]) as u32;
        expected.push(next);
        fed = vec![next];
    }
    assert_eq!(greedy[0].ids, expected);
    let narrow = one(&model, SamplingParams { top_k: 1, ..sampling(30) });
    assert_eq!(narrow[0].ids, expected);
    assert!(narrow[0].sampling_logprobs.iter().all(|&p| p == 0.0));
}

#[test]
fn requests_can_be_aborted_and_weights_exchanged_between_steps() {
    let model = model();
    let mut engine = engine(&model);
    let requests = requests(&[vec![1, 2], vec![3, 4, 5], vec![6]], &SamplingParams { n: 2, ..sampling(30) });
    requests.iter().for_each(|r| engine.add(r.clone()).unwrap());
    assert_eq!(engine.abort(2).len(), 2, "before it began");
    for _ in 0..10 {
        assert!(engine.step(&model).unwrap().completions.is_empty());
    }
    let aborted = engine.abort(1);
    assert_eq!(aborted.iter().map(|c| (c.index, c.ids.len())).collect::<Vec<_>>(), [(0, 10), (1, 10)]);
    assert!(aborted.iter().all(|c| c.finish_reason == FinishReason::Abort) && engine.abort(1).is_empty());
    engine.set_version(7);
    let rest = engine.run(&model).unwrap();
    assert_eq!(rest.len(), 2);
    for completion in rest {
        assert_eq!(completion.versions, [vec![0; 10], vec![7; 20]].concat());
    }
    assert!(engine.is_idle());
    // The same weights under another version: the same tokens.
    engine.add(requests[1].clone()).unwrap();
    let again = engine.run(&model).unwrap();
    assert!(aborted.iter().all(|a| again.iter().any(|c| c.index == a.index && c.ids[..10] == a.ids)));
}

#[test]
fn memory_is_given_back_and_taken_again() {
    let model = model();
    let requests = requests(&prompts(6, 80, 250), &SamplingParams { n: 2, ..sampling(30) });
    let expected = generate(&mut engine(&model), &model, &requests);
    let mut engine = engine(&model);
    assert!(engine.kv_bytes() > 10 << 20);
    requests.iter().for_each(|r| engine.add(r.clone()).unwrap());
    let mut found = Vec::new();
    for _ in 0..7 {
        found.extend(engine.step(&model).unwrap().completions);
    }
    engine.release_kv();
    assert_eq!(engine.kv_bytes(), 0);
    assert!(matches!(engine.step(&model), Err(RolloutError::Memory(_))));
    engine.acquire_kv();
    found.extend(engine.run(&model).unwrap());
    found.sort_by_key(|c| (c.request, c.index));
    assert_eq!(found, expected);
}

#[test]
fn a_step_says_what_it_did() {
    let model = model();
    let mut engine = engine(&model);
    engine
        .add(Request { id: 1, prompt: vec![1; 100], sampling: SamplingParams { n: 4, ..sampling(3) }, seed: 0 })
        .unwrap();
    let report = engine.step(&model).unwrap();
    assert_eq!((report.num_computed, report.num_drawn, report.num_running, report.num_waiting), (100, 4, 4, 0));
    let report = engine.step(&model).unwrap();
    // The prompt's first block is shared, the second was copied for three samples of four.
    assert_eq!((report.num_computed, report.num_drawn, report.num_blocks_used), (4, 4, 5));
    assert_eq!(engine.step(&model).unwrap().completions.len(), 4);
    let stats = engine.stats();
    assert_eq!((stats.num_steps, stats.num_computed, stats.num_drawn, stats.peak_blocks_used), (3, 108, 12, 5));
    assert!(stats.tokens_per_second() > 0.0);
}

fn check_refusal(request: Request, expected: &Expect) {
    let model = model();
    let mut engine = engine(&model);
    expected.assert_eq(&engine.add(request).unwrap_err().to_string());
    assert!(engine.is_idle());
}

#[test]
fn requests_that_cannot_be_served_are_refused() {
    let good = Request { id: 3, prompt: vec![1], sampling: sampling(5), seed: 0 };
    let with = |sampling: SamplingParams| Request { sampling, ..good.clone() };
    check_refusal(
        Request { prompt: vec![], ..good.clone() },
        &expect!["request 3: the prompt has 0 tokens; the model takes 1 to 511 with room for one more"],
    );
    check_refusal(
        Request { prompt: vec![0; 512], ..good.clone() },
        &expect!["request 3: the prompt has 512 tokens; the model takes 1 to 511 with room for one more"],
    );
    check_refusal(
        Request { prompt: vec![251], ..good.clone() },
        &expect!["request 3: token 251 is outside the vocabulary of 251"],
    );
    check_refusal(
        with(SamplingParams { stop: vec!["x".into()], ..sampling(5) }),
        &expect!["request 3: stop texts need a tokenizer, and this engine has none; use `stop_token_ids`"],
    );
    check_refusal(
        with(SamplingParams { n: 0, top_p: 0.0, min_p: 2.0, temperature: -1.0, min_tokens: 6, ..sampling(5) }),
        &expect![[r#"
            `sampling.n` is 0; expected 1 to 16384
            `sampling.temperature` is -1; expected 0 (greedy), or 0.01 to 100
            `sampling.top_p` is 0; expected above 0 and at most 1 (1: off)
            `sampling.min_p` is 2; expected 0 (off) to 1
            `sampling.min_tokens` 6 is above `max_tokens` 5"#]],
    );
    check_refusal(
        with(SamplingParams { n: 4, temperature: 0.0, ..sampling(5) }),
        &expect!["`sampling.n` is 4 with temperature 0: greedy samples are all the same; set n = 1"],
    );
    let model = model();
    let mut engine = engine(&model);
    engine.add(good.clone()).unwrap();
    assert!(engine.add(good).unwrap_err().to_string().contains("another request under way has this id"));
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let model = model();
    let config = EngineConfig { max_num_seqs: 0, kv_memory_fraction: 2.0, ..EngineConfig::default() };
    let error = Engine::new(&model, &config, &[], None).unwrap_err();
    expect![[r#"
        `rollout.max_num_seqs` is 0; expected 1 to 65536
        `rollout.kv_memory_fraction` is 2; expected above 0 and at most 0.95"#]]
    .assert_eq(&error.to_string());
}

#[test]
fn diverged_weights_are_named() {
    let model = model();
    let mut value = model.weight("model.norm.weight").unwrap().value;
    let _ = tch::no_grad(|| value.fill_(f64::NAN));
    let mut engine = engine(&model);
    engine.add(Request { id: 3, prompt: vec![1, 2], sampling: sampling(5), seed: 0 }).unwrap();
    let error = engine.step(&model).unwrap_err().to_string();
    assert!(error.contains("request 3, sample 0: the logits of token 2 are not finite"), "{error}");
}
