//! Jobs of `job.type = "rlhf"`: how completions are drawn in training and validation, whose log-probabilities count, and keys
//! that nothing would read.

use crate::rl_jobs::{self, JOB};
use tangelo_configs::{ConfigError, JobPlan};

fn plan(sets: &[&str]) -> Result<JobPlan, ConfigError> {
    rl_jobs::plan(JOB, &[&["training.device=cpu"], sets].concat(), 1)
}

/// Each word is in what is said.
fn check(sets: &[&str], words: &[&str]) {
    let said = plan(sets).expect_err("it is to be refused").to_string();
    words.iter().for_each(|word| assert!(said.contains(word), "{sets:?}: no {word:?} in {said}"));
}

#[test]
fn the_engine_is_exact_only_where_it_draws_from_all_tokens() {
    let check = |sets: &[&str], reason: Option<&str>| {
        let job = plan(sets).unwrap();
        let found = job.engine_is_exact();
        assert_eq!(job.trusts_engine(), reason.is_none(), "{sets:?}");
        match reason {
            None => assert_eq!(found, Ok(()), "{sets:?}"),
            Some(reason) => assert!(found.clone().unwrap_err().contains(reason), "{sets:?}: {found:?}"),
        }
    };
    check(&[], None);
    check(&["rollout.sampling.temperature=0.7", "rollout.sampling.ignore_eos=true"], None);
    check(&["rollout.sampling.top_p=0.9"], Some("top_p"));
    // What would end a sample has no probability for the first tokens, so the others have more.
    check(&["rollout.sampling.min_tokens=1"], Some("min_tokens"));
}

#[test]
fn validation_draws_as_training_does_but_for_what_it_says() {
    let drawn = |sets: &[&str]| {
        let job = plan(sets).unwrap();
        job.rlhf().validation.over(&job.rollout().sampling)
    };
    let sets =
        ["rollout.sampling.stop=[\"\\n\"]", "rollout.sampling.stop_token_ids=[7]", "rollout.sampling.ignore_eos=true"];
    let found = drawn(&sets);
    assert_eq!((found.n, found.temperature, found.max_tokens), (1, 0.0, 16));
    assert_eq!((found.stop, found.stop_token_ids, found.ignore_eos), (vec!["\n".to_owned()], vec![7], true));
    let found = drawn(&["rlhf.validation.n=4", "rlhf.validation.temperature=0.6", "rlhf.validation.max_tokens=30"]);
    assert_eq!((found.n, found.temperature, found.max_tokens), (4, 0.6, 30));
    // Its answers must fit beside a prompt too.
    check(
        &["rlhf.validation.max_tokens=33"],
        &["rlhf.validation.max_tokens` 33", "129 tokens", "training.seq_len` 128"],
    );
    check(&["rollout.sampling.max_tokens=33"], &["rollout.sampling.max_tokens` 33"]);
    check(&["rlhf.validation.n=2"], &["rlhf.validation.n", "temperature 0"]);
}

#[test]
fn weights_need_two_log_probabilities() {
    let (grpo, corrects) = ("algorithm.type=grpo", "algorithm.rollout_correction.rollout_is=token");
    assert!(plan(&[grpo, corrects]).is_ok());
    check(&[grpo, corrects, "rlhf.old_logprobs=rollout"], &["rollout_is", "rlhf.old_logprobs", "recompute"]);
}

#[test]
fn keys_that_nothing_reads_are_refused() {
    check(&["metrics.log_freq=5"], &["`metrics.log_freq` is set", "every step"]);
    check(&["roles.reference.lr=1e-5"], &["`roles.reference.lr` is set"]);
    let sets = ["validation.enable=true", "data.validation_fraction=0.1"];
    check(&sets, &["`validation.enable` is set", "rlhf.test_freq"]);
}
