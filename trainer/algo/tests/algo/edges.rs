//! Batches and settings at the edge of what makes sense, and beyond it.

use crate::make::{Sequence, algorithm, batch, column, score};
use expect_test::{Expect, expect};
use std::collections::BTreeSet;
use tangelo_algo::{AlgoError, Limits, Merged, Role, State, Statistics};
use tangelo_configs::Algorithm as Config;
use tangelo_configs::preset::ALGORITHMS;
use tangelo_core::{Aggregation, Column, KlEstimator, LossComponent};

fn written(toml: &str, rows: &[Sequence], of: Column) -> Vec<Vec<f32>> {
    let algorithm = algorithm(toml);
    column(&score(&*algorithm, &algorithm.initial_state(), &[batch(rows)]).unwrap(), of)
}

fn check(toml: &str, rows: &[Sequence], expected: &[&[f32]]) {
    assert_eq!(written(toml, rows, Column::Advantage), expected, "{toml}");
}

#[test]
fn groups_of_one_and_groups_without_differences() {
    let alone = [Sequence::plain(1, 2.0, "011")];
    check("type = 'rloo'", &alone, &[&[0.0, 2.0, 2.0]]);
    check("type = 'grpo'\nnorm_adv_by_std = false", &alone, &[&[0.0, 2.0, 2.0]]);
    let single = (2.0 / (1.0 + 1e-6)) as f32;
    check("type = 'grpo'", &alone, &[&[0.0, single, single]]);
    // 0.1 three times has a mean that is not 0.1 in plain f64 sums; the advantage is 0 nevertheless.
    let equal: Vec<Sequence> = ["1", "11", "101"].map(|mask| Sequence::plain(1, 0.1, mask)).to_vec();
    for toml in ["type = 'grpo'", "type = 'rloo'", "type = 'grpo'\nnorm_adv_by_std = false"] {
        check(toml, &equal, &[&[0.0], &[0.0, 0.0], &[0.0, 0.0, 0.0]]);
    }
}

#[test]
fn completions_without_policy_tokens_count_in_baselines_and_get_nothing() {
    let rows = [Sequence::plain(1, 1.0, "000"), Sequence::plain(1, 0.0, "01")];
    check("type = 'rloo'", &rows, &[&[0.0, 0.0, 0.0], &[0.0, -1.0]]);
    let nobody = [Sequence::plain(1, 1.0, "00")];
    check("type = 'ppo'", &nobody, &[&[0.0, 0.0]]);
    check("type = 'ppo'", &[], &[]);
}

#[test]
fn one_token_or_no_variance_whitens_to_zero() {
    check("type = 'ppo'", &[Sequence::plain(1, 5.0, "001")], &[&[0.0, 0.0, 0.0]]);
    let same = [Sequence::plain(1, 0.3, "01"), Sequence::plain(2, 0.3, "1")];
    check("type = 'ppo'", &same, &[&[0.0, 0.0], &[0.0]]);
}

#[test]
fn what_the_mask_hides_is_not_read() {
    // Tool output between two policy tokens: values there are no numbers, and the reward is on the last policy token.
    let hole = |value: f32| Sequence {
        value: vec![value, 0.5, value, 0.25, value],
        old: vec![value, -1.0, value, -1.0, value],
        ..Sequence::plain(1, 1.0, "01010")
    };
    let ppo = "type = 'ppo'\ngamma = 0.9\nlam = 0.8";
    assert_eq!(written(ppo, &[hole(f32::NAN)], Column::Return), written(ppo, &[hole(7.0)], Column::Return));
    assert_eq!(written(ppo, &[hole(f32::NAN)], Column::TokenReward), [[0.0, 0.0, 0.0, 1.0, 0.0]]);
}

fn error(toml: &str, rows: &[Sequence], expected: Expect) {
    let algorithm = algorithm(toml);
    let Err(error) = score(&*algorithm, &algorithm.initial_state(), &[batch(rows)]) else {
        panic!("{toml} accepts it")
    };
    expected.assert_eq(&error.to_string());
}

#[test]
fn numbers_that_are_none_name_the_sample() {
    let rows = |reward| [Sequence::plain(7, 0.0, "1"), Sequence::plain(8, reward, "01")];
    error(
        "type = 'grpo'",
        &rows(f32::NAN),
        expect![
            "sample 108 (group 8, row 1 of its shard): `reward` is NaN; it must be finite: look at the reward function's answer for it"
        ],
    );
    error(
        "type = 'ppo'",
        &rows(f32::NEG_INFINITY),
        expect![
            "sample 108 (group 8, row 1 of its shard): `reward` is -inf; it must be finite: look at the reward function's answer for it"
        ],
    );
    let mut row = Sequence::plain(8, 0.0, "01");
    row.value[1] = f32::INFINITY;
    error(
        "type = 'ppo'",
        std::slice::from_ref(&row),
        expect![
            "sample 108 (group 8, row 0 of its shard): `value` at token 1 is inf; it must be finite: look at the critic"
        ],
    );
    row.mask[0] = 0.5;
    error(
        "type = 'grpo'",
        &[row],
        expect!["sample 108 (group 8, row 0 of its shard): `loss_mask` at token 0 is 0.5; it must be 0 or 1"],
    );
    let huge = [Sequence::plain(8, 3e38, "1"), Sequence::plain(8, -3e38, "1")];
    error(
        "type = 'rloo'",
        &huge,
        expect![
            "sample 108 (group 8, row 0 of its shard): `advantage` becomes 6.0000000109955115e38, which 32-bit floats cannot hold; scale the reward down"
        ],
    );
}

#[test]
fn statistics_of_something_else_are_refused() {
    let algorithm = algorithm("type = 'grpo'");
    let (state, shard) = (algorithm.initial_state(), batch(&[Sequence::plain(4, 1.0, "1")]));
    let check = |merged: &Merged, expected: Expect| {
        expected.assert_eq(&algorithm.apply(&shard, &state, merged).unwrap_err().to_string());
    };
    let mut merged = Merged::default();
    check(&merged, expect!["statistics of 0 rounds where 1 are needed; collect and merge every round in order"]);
    merged.push(&[Statistics::default()]);
    check(
        &merged,
        expect!["the merged statistics know nothing of group 4; merge those of every shard before applying them"],
    );
    let bare = tangelo_core::Batch::from_columns(vec![(Column::Tokens, tangelo_core::batch::ragged_u32(&[vec![1]]))]);
    let error = algorithm.statistics(&bare.unwrap(), &state, &Merged::default()).unwrap_err();
    expect!["column `loss_mask` is absent but needed"].assert_eq(&error.to_string());
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let check = |toml: &str, expected: Expect| {
        let limits = Limits { max_response_tokens: 64, samples_per_prompt: 1 };
        let Err(AlgoError::Settings(wrong)) = tangelo_algo::algorithm(&toml::from_str(toml).unwrap(), limits) else {
            panic!("{toml} is accepted");
        };
        expected.assert_eq(&wrong.join("\n"));
    };
    check(
        "type = 'rloo'\nfilter_groups = { enable = true }",
        expect![[r#"
            `algorithm.filter_groups.enable` drops groups without differences, but there is 1 completion per prompt; generate at least 2, or switch it off
            `algorithm.type` = "rloo" compares the completions of one prompt, but there is 1 per prompt; generate at least 2"#]],
    );
    check(
        "type = 'ppo'\ngamma = 1.5\npolicy = { clip_ratio_c = 1.0, loss_scale_factor = 3.0 }",
        expect![[r#"
            `algorithm.policy.clip_ratio_c` = 1; the dual clip's bound must be above 1, or 0 for none
            `algorithm.policy.loss_scale_factor` = 3 has no effect on this `algorithm.policy.loss_agg_mode`; remove it, or set the mode to "seq-mean-token-sum-norm"
            `algorithm.gamma` = 1.5; it must be in [0, 1]"#]],
    );
    check(
        "type = 'ppo'\n[reward]\nkl_penalty = 'k3+'\noverlong_buffer = { enable = true, len = 100 }\n\
         kl_ctrl = { type = 'adaptive', target_kl = 0.0 }\n\
         [rollout_correction]\nrollout_is_threshold_lower = 3.0",
        expect![[r#"
            `algorithm.reward.kl_penalty` ends in `+`, which names a gradient; a reward has none: remove the `+`
            `algorithm.reward.kl_ctrl.target_kl` = 0; it must be a number above 0
            `algorithm.reward.overlong_buffer.len` = 100; it must be from 1 to the longest completion allowed, 64 tokens
            `algorithm.rollout_correction.rollout_is_threshold_lower` = 3; it must be from 0 to `rollout_is_threshold` = 2"#]],
    );
}

/// The baseline of REINFORCE++ needs a group and knows no discount; its statistics come in two rounds.
#[test]
fn reinforce_plus_plus_with_a_baseline_has_rules_of_its_own() {
    let limits = Limits { max_response_tokens: 64, samples_per_prompt: 1 };
    let config: Config = toml::from_str("type = 'reinforce_plus_plus'\nbaseline = true\ngamma = 0.9").unwrap();
    expect![[r#"
        `algorithm.gamma` = 0.9 has no effect with `algorithm.baseline`, whose advantage is the same at every token; remove one of them
        `algorithm.type` = "reinforce_plus_plus" compares the completions of one prompt, but there is 1 per prompt; generate at least 2"#]]
    .assert_eq(&config.check(limits).join("\n"));
    let toml = "type = 'reinforce_plus_plus'\nbaseline = true";
    assert_eq!(algorithm(toml).rounds(), 2);
    // -1 on one token and 1 on two: the mean over tokens is 1/3, the variance (16/9 + 2 * 4/9) / 2 = 4/3.
    let deviation = (4.0f64 / 3.0 + 1e-8).sqrt();
    let (low, high) = ((-4.0 / 3.0 / deviation) as f32, (2.0 / 3.0 / deviation) as f32);
    let rows = [Sequence::plain(1, 0.0, "01"), Sequence::plain(1, 2.0, "11")];
    check(toml, &rows, &[&[0.0, low], &[high, high]]);
}

/// Dynamic sampling looks at rewards before or after punishment and KL, as it is told.
#[test]
fn filtering_reads_the_reward_it_is_told() {
    let check = |metric: &str, expected: [f64; 2]| {
        let algorithm = algorithm(&format!(
            "type = 'grpo'\nfilter_groups = {{ enable = true, metric = '{metric}' }}\n[reward]\n\
             use_kl_in_reward = true\nkl_ctrl = {{ type = 'fixed', kl_coef = 0.5 }}\n\
             overlong_buffer = {{ enable = true, len = 62, penalty_factor = 31.0 }}"
        ));
        let row = |mask| Sequence { old: vec![-1.0; 5], reference: vec![-1.25; 5], ..Sequence::plain(6, 1.0, mask) };
        let shard = batch(&[row("01000"), row("01111")]);
        let found = tangelo_algo::filter_groups::values(&shard, algorithm.settings(), &algorithm.initial_state());
        assert_eq!(found.unwrap(), expected.map(|value| (6, value)), "{metric}");
    };
    check("seq_reward", [1.0, 1.0]);
    // Half of 0.25 per token; of four tokens, two are in the buffer of 62 that costs 31 at its end.
    check("seq_final_reward", [1.0 - 0.125, 1.0 - 0.5 - 1.0]);
}

/// Every algorithm has a preset, and every preset is an algorithm that its check accepts.
#[test]
fn presets_are_accepted_and_none_is_missing() {
    #[derive(serde::Deserialize)]
    struct Job {
        algorithm: Config,
    }
    let mut with_preset = BTreeSet::new();
    for preset in ALGORITHMS {
        let Job { algorithm } = toml::from_str(preset.toml).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        let limits = Limits { max_response_tokens: 20_480, samples_per_prompt: 16 };
        let made = tangelo_algo::algorithm(&algorithm, limits).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        // A job makes a critic where the configuration says so; it must have something to learn, and nobody else.
        let critic = made.loss(Role::Critic, &made.initial_state());
        assert_eq!(critic.is_some(), algorithm.needs_critic(), "{}", preset.name);
        with_preset.insert(serde_json::to_value(&algorithm).unwrap()["type"].as_str().unwrap().to_owned());
    }
    let schema = schemars::schema_for!(Config).to_value();
    let kinds = schema["oneOf"].as_array().unwrap();
    let kinds: BTreeSet<String> =
        kinds.iter().map(|kind| kind["properties"]["type"]["const"].as_str().unwrap().to_owned()).collect();
    assert_eq!(with_preset, kinds);
    assert!(kinds.len() >= 3);
}

#[test]
fn roles_columns_and_losses_follow_the_settings() {
    let check = |toml: &str, expected: Expect| {
        let algorithm = algorithm(toml);
        let names = |columns: Vec<Column>| columns.iter().map(|c| c.name()).collect::<Vec<_>>().join(" ");
        let (reads, writes) = (names(algorithm.reads()), names(algorithm.writes()));
        let config: Config = toml::from_str(toml).unwrap();
        let roles = format!("critic {} reference {}", config.needs_critic(), config.needs_reference());
        expected.assert_eq(&format!("{roles}\nreads {reads}\nwrites {writes}"));
    };
    check(
        "type = 'grpo'",
        expect![[r#"
            critic false reference false
            reads tokens loss_mask reward sample_index group_id
            writes advantage token_reward"#]],
    );
    check(
        "type = 'ppo'\nreward = { use_kl_in_reward = true, overlong_filter = true }\n\
         rollout_correction = { rollout_is = 'token' }",
        expect![[r#"
            critic true reference true
            reads tokens loss_mask old_logprob rollout_logprob ref_logprob value reward sample_index group_id
            writes advantage token_reward return importance_weight loss_mask"#]],
    );

    let state = State { batches: 0, sequences: 0, kl_coef: 0.0 };
    let norm = "loss_agg_mode = 'seq-mean-token-sum-norm'";
    let toml = format!(
        "type = 'ppo'\ncritic = {{ cliprange_value = 0.0, {norm}, loss_scale_factor = 9.0 }}\n\
         policy = {{ {norm}, entropy_coeff = 0.01, use_kl_loss = true, kl_loss_type = 'low_var_kl+', clip_ratio_c = 0.0 }}"
    );
    let ppo = algorithm(&toml);
    let aggregation = Aggregation::SeqMeanTokenSumNorm(64.0);
    assert_eq!(
        ppo.loss(Role::Policy, &state).unwrap().components,
        [
            LossComponent::PolicyGradient {
                clip_low: 0.2,
                clip_high: 0.2,
                clip_dual: None,
                corrects_rollout: false,
                aggregation
            },
            LossComponent::Entropy { coefficient: 0.01, aggregation },
            LossComponent::Kl { estimator: KlEstimator::K3, straight_through: true, coefficient: 0.001, aggregation },
        ]
    );
    let aggregation = Aggregation::SeqMeanTokenSumNorm(9.0);
    assert_eq!(
        ppo.loss(Role::Critic, &state).unwrap().components,
        [LossComponent::Value { clip: f64::MAX, coefficient: 1.0, aggregation }]
    );
    assert_eq!(algorithm("type = 'rloo'").loss(Role::Critic, &state), None);
}

/// The coefficient used is the one before the batch; the one after it is in the next state, which JSON carries whole.
#[test]
fn the_coefficient_of_kl_is_state() {
    let algorithm = algorithm(
        "type = 'rloo'\n[reward]\nuse_kl_in_reward = true\nkl_penalty = 'k1'\n\
         kl_ctrl = { type = 'adaptive', kl_coef = 0.1, target_kl = 0.5, horizon = 100.0 }",
    );
    let row = |old: f32| Sequence {
        old: vec![0.0, old, old],
        reference: vec![0.0, -1.0, -1.25],
        ..Sequence::plain(1, 1.0, "011")
    };
    let (state, shard) = (algorithm.initial_state(), batch(&[row(-0.25), row(-0.5)]));
    let outcome = score(&*algorithm, &state, &[shard]).unwrap();
    // Mean KL: (0.75 + 1) / 2 = 0.875 and (0.5 + 0.75) / 2 = 0.625, together 0.75: an error of 0.5, counted as 0.2.
    let check = |name: &str, expected: f64| assert!((outcome.metrics[name] - expected).abs() < 1e-12, "{name}");
    check("actor/reward_kl_penalty", 0.75);
    check("actor/reward_kl_penalty_coeff", 0.1);
    check("critic/score/mean", 1.0);
    check("critic/rewards/mean", 1.0 - 0.1 * 1.5);
    check("prompt_length/mean", 2.0);
    check("response_length/mean", 2.0);
    check("critic/groups/flat_ratio", 0.0);
    let next: State = serde_json::from_str(&serde_json::to_string(&outcome.next).unwrap()).unwrap();
    assert_eq!(next, outcome.next);
    assert_eq!((next.batches, next.sequences), (1, 2));
    assert!((next.kl_coef - 0.1 * (1.0 + 0.2 * 2.0 / 100.0)).abs() < 1e-15);
}
