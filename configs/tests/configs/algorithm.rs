//! `[algorithm]`: defaults, other names, what is refused, and that a TOML file can carry all of it.

use expect_test::{Expect, expect};
use serde_json::Value;
use tangelo_configs::Algorithm;
use tangelo_configs::algorithm::{AggregationMode, KlType, Limits};
use tangelo_configs::preset::ALGORITHMS;

const LIMITS: Limits = Limits { max_response_tokens: 512, samples_per_prompt: 8 };

fn parse(toml: &str) -> Algorithm {
    toml::from_str(toml).unwrap()
}

/// The values of verl's `_generated_ppo_trainer.yaml`, under its names.
#[test]
fn defaults_are_those_of_verl() {
    let json = serde_json::to_value(parse("type = 'ppo'")).unwrap();
    let at = |path: &str| path.split('.').fold(&json, |node, key| &node[key]).clone();
    for (path, expected) in [
        ("gamma", Value::from(1.0)),
        ("lam", 1.0.into()),
        ("critic.cliprange_value", 0.5.into()),
        ("critic.loss_agg_mode", "token-mean".into()),
        ("policy.clip_ratio_low", 0.2.into()),
        ("policy.clip_ratio_high", 0.2.into()),
        ("policy.clip_ratio_c", 3.0.into()),
        ("policy.loss_agg_mode", "token-mean".into()),
        ("policy.entropy_coeff", 0.0.into()),
        ("policy.use_kl_loss", false.into()),
        ("policy.kl_loss_coef", 0.001.into()),
        ("policy.kl_loss_type", "k3".into()),
        ("reward.use_kl_in_reward", false.into()),
        ("reward.kl_penalty", "k1".into()),
        ("reward.kl_ctrl.type", "fixed".into()),
        ("reward.kl_ctrl.kl_coef", 0.001.into()),
        ("rollout_correction.rollout_is_threshold", 2.0.into()),
        ("rollout_correction.rollout_is", "none".into()),
        ("filter_groups.enable", false.into()),
        // verl's is 0, for ever: a policy that solves all of the prompts would generate for ever.
        ("filter_groups.max_num_gen_batches", 10.into()),
    ] {
        assert_eq!(at(path), expected, "{path}");
    }
    let Algorithm::Grpo(grpo) = Algorithm::default() else { panic!("the default is GRPO") };
    assert!(grpo.norm_adv_by_std);
    let adaptive = parse("type = 'rloo'\nreward = { kl_ctrl = { type = 'adaptive' } }");
    let json = serde_json::to_value(adaptive).unwrap()["reward"]["kl_ctrl"].clone();
    assert_eq!((json["target_kl"].as_f64(), json["horizon"].as_f64()), (Some(0.1), Some(10_000.0)));
}

#[test]
fn every_name_of_an_estimator_is_known() {
    let check = |names: &[&str], expected: KlType| {
        for name in names {
            let found = parse(&format!("type = 'grpo'\npolicy = {{ kl_loss_type = '{name}' }}"));
            assert_eq!(found.shared().policy.kl_loss_type, expected, "{name}");
        }
    };
    check(&["k1", "kl"], KlType::K1);
    check(&["k1+", "kl+"], KlType::K1Plus);
    check(&["abs"], KlType::Abs);
    check(&["abs+"], KlType::AbsPlus);
    check(&["k2", "mse"], KlType::K2);
    check(&["k2+", "mse+"], KlType::K2Plus);
    check(&["k3", "low_var_kl"], KlType::K3);
    check(&["k3+", "low_var_kl+"], KlType::K3Plus);
}

#[test]
fn modes_of_aggregation_have_their_names_and_constants() {
    use tangelo_core::Aggregation;
    for (name, mode, expected) in [
        ("token-mean", AggregationMode::TokenMean, Aggregation::TokenMean),
        ("token-sum", AggregationMode::TokenSum, Aggregation::TokenSum),
        ("seq-mean-token-sum", AggregationMode::SeqMeanTokenSum, Aggregation::SeqMeanTokenSum),
        ("seq-mean-token-mean", AggregationMode::SeqMeanTokenMean, Aggregation::SeqMeanTokenMean),
        ("seq-mean-token-sum-norm", AggregationMode::SeqMeanTokenSumNorm, Aggregation::SeqMeanTokenSumNorm(512.0)),
    ] {
        assert_eq!(
            parse(&format!("type = 'rloo'\npolicy = {{ loss_agg_mode = '{name}' }}")).shared().policy.loss_agg_mode,
            mode
        );
        assert_eq!(mode.resolve(None, 512), expected);
    }
    let scaled = AggregationMode::SeqMeanTokenSumNorm.resolve(Some(100.0), 512);
    assert_eq!(scaled, Aggregation::SeqMeanTokenSumNorm(100.0));
}

#[test]
fn unknown_keys_and_types_are_refused() {
    let check = |toml: &str, expected: Expect| {
        expected.assert_eq(toml::from_str::<Algorithm>(toml).unwrap_err().message());
    };
    check(
        "type = 'grpo'\nlam = 0.9",
        expect![[
            r#"unknown field `lam`, expected one of `norm_adv_by_std`, `policy`, `reward`, `rollout_correction`, `filter_groups`"#
        ]],
    );
    check(
        "type = 'rloo'\nreward = { kl_ctrl = { type = 'fixed', horizon = 1.0 } }",
        expect!["unknown field `horizon`, expected `kl_coef`"],
    );
    check("policy = {}", expect!["missing field `type`"]);
}

#[test]
fn presets_survive_toml_and_their_lengths_are_checked() {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Job {
        algorithm: Algorithm,
    }
    for preset in ALGORITHMS {
        let job: Job = toml::from_str(preset.toml).unwrap();
        let again: Job = toml::from_str(&toml::to_string(&job).unwrap()).unwrap();
        assert_eq!(again.algorithm, job.algorithm, "{}", preset.name);
        let wrong = job.algorithm.check(LIMITS);
        // Only DAPO says lengths of its own: its buffer is longer than these completions.
        assert_eq!(wrong.len(), usize::from(preset.name == "dapo"), "{}: {wrong:?}", preset.name);
    }
}

/// Every key of every algorithm and shared table has a description.
#[test]
fn every_key_is_described() {
    fn walk(path: &str, node: &Value, found: &mut usize) {
        for (key, child) in node["properties"].as_object().into_iter().flatten() {
            let tag = child.get("const").is_some();
            assert!(tag || child["description"].as_str().is_some_and(|d| !d.is_empty()), "{path}.{key}");
            *found += 1;
        }
        for alternative in node["oneOf"].as_array().into_iter().flatten() {
            walk(path, alternative, found);
            assert!(alternative["description"].is_string(), "{path}: an alternative without a description");
        }
    }
    let schema = schemars::schema_for!(Algorithm).to_value();
    let mut keys = 0;
    walk("algorithm", &schema, &mut keys);
    for (name, definition) in schema["$defs"].as_object().unwrap() {
        walk(name, definition, &mut keys);
    }
    assert!(keys > 40, "{keys} keys");
}
