//! What a step learns from, of rounds made up here.

use super::*;
use crate::prompts::{Prompt, PromptInput, TokenizedPrompt};
use crate::reward::Scored;
use expect_test::{Expect, expect};
use serde_json::{Value, json};
use std::sync::Arc;
use tangelo_configs::algorithm::FilterMetric;

/// Completions of a round: (group, reward), with no reward where it failed.
fn round(completions: &[(i64, Option<f64>)]) -> Rollouts {
    let rows: Vec<Value> = completions.iter().map(|(group, _)| json!({"tokens": 4, "group": group})).collect();
    let rollouts = completions.iter().map(|&(group, reward)| {
        let prompt = Prompt {
            index: group as u64,
            input: PromptInput::Text("?".into()),
            ground_truth: Value::Null,
            data_source: "tests".into(),
            extra_info: Value::Null,
        };
        let scored = Scored {
            total: reward.unwrap_or_default(),
            error: reward.is_none().then(|| "judge: it is late".into()),
            dropped: reward.is_none(),
            ..Scored::default()
        };
        let prompt = Arc::new(TokenizedPrompt { prompt: Arc::new(prompt), tokens: vec![1, 2] });
        let (completion, text) = (vec![3], String::new());
        Rollout { prompt, group, completion, text, scored, sample_index: 0, policy_version: 0, left_out: None }
    });
    let mut round = Rollouts {
        batch: serde_json::from_value(json!({"rows": rows, "pieces": []})).unwrap(),
        rollouts: rollouts.collect(),
        ..Rollouts::default()
    };
    let dropped: Vec<bool> = round.rollouts.iter().map(|r| r.scored.dropped).collect();
    round.leave_out_rows(LeftOut::NoReward, &dropped).unwrap();
    round
}

/// What a step of three groups learns from after these rounds, as the loop makes it.
fn check(enable: bool, least: usize, rounds: &[&[(i64, Option<f64>)]], expected: Expect) {
    let filter = FilterGroups { enable, metric: FilterMetric::SeqReward, max_num_gen_batches: 2 };
    let mut gathered = Gathered { filter, wanted: 3, least, ..Gathered::default() };
    let mut told = "more wanted".to_owned();
    for completions in rounds {
        let mut round = round(completions);
        let alone = alone(&round.rollouts, least);
        round.leave_out(LeftOut::Alone, &alone).unwrap();
        let values: Vec<(i64, f64)> = round.rollouts.iter().map(|r| (r.group, r.scored.total)).collect();
        match gathered.add(round, &values) {
            Ok(selection) if selection.generate_more && enable => {}
            Ok(selection) => {
                told = gathered.finish(&selection.kept).map_or_else(|e| e.to_string(), |all| show(&all));
                break;
            }
            Err(e) => {
                told = e.to_string();
                break;
            }
        }
    }
    expected.assert_eq(&told);
}

fn show(all: &Rollouts) -> String {
    let groups: Vec<i64> = all.rollouts.iter().map(|r| r.group).collect();
    assert_eq!(
        all.batch.rows().iter().map(|row| row.group).collect::<Vec<_>>(),
        groups,
        "rows and rollouts are the same"
    );
    let left_out: Vec<String> =
        all.left_out.iter().map(|r| format!("{} {}", r.group, r.left_out.unwrap().name())).collect();
    let metrics: Vec<String> = all.told.metrics.0.iter().map(|(name, r)| format!("{name} {}", r.value())).collect();
    format!("learns from {groups:?}\nleft out: {}\n{}", left_out.join(", "), metrics.join("\n"))
}

const GOOD: Option<f64> = Some(1.0);
const BAD: Option<f64> = Some(0.0);

#[test]
fn a_completion_whose_peers_have_no_reward_is_not_learnt_from() {
    let rounds: [&[(i64, Option<f64>)]; 1] = [&[(0, GOOD), (0, BAD), (1, None), (1, GOOD), (2, None), (2, None)]];
    check(
        false,
        2,
        &rounds,
        expect![[r#"
            learns from [0, 0]
            left out: 1 no_reward, 2 no_reward, 2 no_reward, 1 alone
            rollout/left_out/alone 1
            rollout/left_out/no_reward 3
            train/num_gen_batches 1"#]],
    );
    // A critic or the whole batch is a baseline for a completion alone.
    check(
        false,
        1,
        &rounds,
        expect![[r#"
            learns from [0, 0, 1]
            left out: 1 no_reward, 2 no_reward, 2 no_reward
            rollout/left_out/no_reward 3
            train/num_gen_batches 1"#]],
    );
}

#[test]
fn nothing_left_says_why() {
    check(
        false,
        2,
        &[&[(0, None), (0, GOOD), (1, None), (1, None)]],
        expect![[
            r#"no group of this step has 2 completions with a reward; all 4 were left out, and the first error is: judge: it is late. Mend the reward, or set on_error = "zero""#
        ]],
    );
    check(
        true,
        2,
        &[&[(0, None), (0, GOOD)], &[(3, None), (3, None)]],
        expect![[
            r#"no group of this step has 2 completions with a reward; all 4 were left out, and the first error is: judge: it is late. Mend the reward, or set on_error = "zero""#
        ]],
    );
}

#[test]
fn dynamic_sampling_takes_rounds_together() {
    let first: &[(i64, Option<f64>)] = &[(0, GOOD), (0, GOOD), (1, GOOD), (1, BAD), (2, BAD), (2, BAD)];
    let second: &[(i64, Option<f64>)] = &[(3, GOOD), (3, BAD), (4, BAD), (4, GOOD), (5, BAD), (5, GOOD)];
    check(
        true,
        2,
        &[first, second],
        expect![[r#"
            learns from [1, 1, 3, 3, 4, 4]
            left out: 0 flat, 0 flat, 2 flat, 2 flat, 5 surplus, 5 surplus
            rollout/left_out/flat 4
            rollout/left_out/surplus 2
            train/num_gen_batches 2"#]],
    );
    check(
        true,
        2,
        &[first, first],
        expect![
            "1 of 3 groups differ in their rewards after 2 generated batches, the bound of `algorithm.filter_groups.max_num_gen_batches`; the prompts are too easy or too hard for this policy"
        ],
    );
}
