//! Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): which groups are worth training on, and whether more
//! prompts must be generated. A pure decision: the driver generates, asks, and does what it is told.

use crate::AlgoError;
use crate::group::is_flat;
use crate::row::{self, Row};
use crate::settings::Settings;
use crate::state::State;
use crate::statistics::Moments;
use std::collections::BTreeMap;
use tangelo_configs::algorithm::{FilterGroups, FilterMetric};
use tangelo_core::{Batch, Column};

/// What to do with the groups generated so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Groups to train on, ascending, at most as many as are wanted.
    pub kept: Vec<i64>,
    /// Groups whose rewards are all equal.
    pub flat: Vec<i64>,
    /// Groups that differ but are more than are wanted.
    pub surplus: Vec<i64>,
    /// Whether another batch of prompts must be generated first.
    pub generate_more: bool,
}

/// The settings under which a row is judged: no weights, which come later, and the distance from the reference only where
/// it counts.
fn judging(settings: &Settings) -> Settings {
    let mut settings = settings.clone();
    if settings.filter_groups.metric == FilterMetric::SeqReward {
        settings.reward.use_kl_in_reward = false;
    }
    settings.rollout_correction = Default::default();
    settings
}

/// The columns that [`values`] reads.
pub fn columns(settings: &Settings) -> Vec<Column> {
    row::columns(&judging(settings))
}

/// Each row's group and the reward that [`FilterGroups::metric`] asks for. `seq_final_reward` with KL in the reward
/// needs the log-probabilities of policy and reference.
pub fn values(shard: &Batch, settings: &Settings, state: &State) -> Result<Vec<(i64, f64)>, AlgoError> {
    let settings = judging(settings);
    let value = |row: &Row| match settings.filter_groups.metric {
        FilterMetric::SeqReward => row.score,
        FilterMetric::SeqFinalReward => row.reward,
    };
    let rows = row::rows(shard, &settings, state, &row::columns(&settings))?;
    Ok(rows.iter().map(|row| (row.sample.group, value(row))).collect())
}

/// Chooses among all completions generated for this step, in `batches` batches of prompts, in any order. Single
/// completions are kept: nothing says that they teach nothing.
pub fn select(
    filter: &FilterGroups,
    values: &[(i64, f64)],
    wanted: usize,
    batches: usize,
) -> Result<Selection, AlgoError> {
    let mut groups: BTreeMap<i64, Moments> = BTreeMap::new();
    values.iter().for_each(|&(group, value)| groups.entry(group).or_default().add(value));
    let ids = |flat: bool| {
        let of_kind = groups.iter().filter(move |(_, moments)| (filter.enable && is_flat(moments)) == flat);
        of_kind.map(|(&group, _)| group).collect::<Vec<i64>>()
    };
    let (flat, mut kept) = (ids(true), ids(false));
    let surplus = kept.split_off(kept.len().min(wanted));
    let generate_more = kept.len() < wanted;
    let bound = filter.max_num_gen_batches;
    if filter.enable && generate_more && bound > 0 && batches >= bound {
        return Err(AlgoError::TooFewGroups { kept: kept.len(), wanted, batches });
    }
    Ok(Selection { kept, flat, surplus, generate_more })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(enable: bool, wanted: usize, batches: usize, expected: expect_test::Expect) {
        let filter = FilterGroups { enable, metric: FilterMetric::SeqReward, max_num_gen_batches: 2 };
        // Group 3 differs, 5 is all right, 1 is all wrong, 9 is single, 7 differs.
        let values = [(3, 1.0), (5, 1.0), (3, 0.0), (5, 1.0), (1, 0.0), (9, 1.0), (7, 0.5), (1, 0.0), (7, 0.25)];
        let mut reversed = values;
        reversed.reverse();
        let found = select(&filter, &values, wanted, batches);
        assert_eq!(found, select(&filter, &reversed, wanted, batches));
        expected.assert_eq(&match found {
            Ok(Selection { kept, flat, surplus, generate_more }) => {
                format!("kept {kept:?} flat {flat:?} surplus {surplus:?} more {generate_more}")
            }
            Err(error) => error.to_string(),
        });
    }

    #[test]
    fn groups_that_differ_are_kept() {
        use expect_test::expect;
        check(true, 3, 1, expect!["kept [3, 7, 9] flat [1, 5] surplus [] more false"]);
        check(true, 2, 1, expect!["kept [3, 7] flat [1, 5] surplus [9] more false"]);
        check(true, 4, 1, expect!["kept [3, 7, 9] flat [1, 5] surplus [] more true"]);
        check(
            true,
            4,
            2,
            expect![
                "3 of 4 groups differ in their rewards after 2 generated batches, the bound of `algorithm.filter_groups.max_num_gen_batches`; the prompts are too easy or too hard for this policy"
            ],
        );
        check(false, 5, 9, expect!["kept [1, 3, 5, 7, 9] flat [] surplus [] more false"]);
    }
}
