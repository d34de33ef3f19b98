//! What is written does not depend on how the batch was dealt, ordered or padded: not by one bit.

use crate::formulas::sequences;
use crate::make::{Sequence, algorithm, batch, column, score};
use proptest::prelude::*;
use std::collections::BTreeMap;
use tangelo_core::Column;

/// Settings that together use every statistic.
fn settings() -> impl Strategy<Value = String> {
    let algorithm = prop::sample::select(ALGORITHMS.to_vec());
    let correction = prop::sample::select(vec!["none", "token", "sequence"]);
    (algorithm, any::<bool>(), correction, any::<bool>(), any::<bool>()).prop_map(
        |(algorithm, kl, level, norm, filter)| {
            format!(
                "{algorithm}\n[reward]\nuse_kl_in_reward = {kl}\nkl_penalty = 'k3'\noverlong_filter = {filter}\n\
             kl_ctrl = {{ type = 'adaptive', kl_coef = 0.07 }}\n\
             overlong_buffer = {{ enable = true, len = 60, penalty_factor = 0.3 }}\n\
             [rollout_correction]\nrollout_is = '{level}'\nrollout_is_threshold = 1.2\n\
             rollout_is_batch_normalize = {norm}"
            )
        },
    )
}

const ALGORITHMS: &[&str] = &[
    "type = 'grpo'",
    "type = 'grpo'\nnorm_adv_by_std = false",
    "type = 'rloo'",
    "type = 'ppo'\ngamma = 0.97\nlam = 0.9",
    "type = 'reinforce_plus_plus'\ngamma = 0.97",
    "type = 'reinforce_plus_plus'\nbaseline = true",
];

/// Bits of every written column, by sample; and of the metrics and the state that follow.
type Bits = (BTreeMap<(i64, Column), Vec<u32>>, BTreeMap<String, u64>, String);

fn bits(toml: &str, shards: &[Vec<Sequence>]) -> Bits {
    let algorithm = algorithm(toml);
    let batches: Vec<_> = shards.iter().map(|rows| batch(rows)).collect();
    let outcome = score(&*algorithm, &algorithm.initial_state(), &batches).unwrap();
    let mut columns = BTreeMap::new();
    for name in algorithm.writes() {
        for (row, values) in shards.iter().flatten().zip(column(&outcome, name)) {
            let marked = row.tokens();
            assert!(
                (0..values.len()).all(|t| marked.contains(&t) || values[t].to_bits() == 0),
                "{name} beside the mask"
            );
            columns.insert((row.index, name), marked.iter().map(|&t| values[t].to_bits()).collect());
        }
    }
    let metrics = outcome.metrics.into_iter().map(|(name, value)| (name, value.to_bits())).collect();
    (columns, metrics, serde_json::to_string(&outcome.next).unwrap())
}

/// Rows in the order that `keys` sort into, padded, dealt to shards as `keys` say.
fn dealt(rows: &[Sequence], keys: &[(u64, usize, usize)]) -> Vec<Vec<Sequence>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&row| keys[row % keys.len()].0.wrapping_mul(row as u64 * 2 + 1));
    let mut shards = vec![Vec::new(); 4];
    for row in order {
        let (_, shard, padding) = keys[row % keys.len()];
        shards[shard].push(rows[row].clone().padded(padding));
    }
    shards
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_dealing_gives_the_same_bits(
        toml in settings(),
        rows in sequences(),
        keys in prop::collection::vec((any::<u64>(), 0usize..4, 0usize..5), 16),
    ) {
        let whole = bits(&toml, std::slice::from_ref(&rows));
        prop_assert_eq!(bits(&toml, &dealt(&rows, &keys)), whole, "{}", toml);
    }
}
