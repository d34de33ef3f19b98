//! A step's rollouts: round after round of prompts, until there are as many groups worth training on as a step has.
//!
//! ```text
//!   Collector::roll -> completions without a reward, completions left alone: left out
//!                   -> filter_groups::select (dynamic sampling): groups without differences left out, and another round
//!                      where too few are left
//! ```
//!
//! Invariants: rounds are bounded by `max_num_gen_batches`, and a signal is seen between two; a group is of one round.

use crate::collect::{LeftOut, Rollout, Rollouts};
use crate::error::{DriverError, Result};
use crate::session::Session;
use std::collections::{BTreeMap, BTreeSet};
use tangelo_algo::filter_groups::{self, Selection};
use tangelo_configs::algorithm::FilterGroups;
use tangelo_control::{Reading, RemoteBatch};

/// The next step's rollouts; `None` where a signal came before there were enough groups, and then the next prompt is the
/// one that it was.
///
/// # Errors
/// Whatever a rank reports; a reward whose `on_error` is `stop`; too many rounds without groups worth training on; nothing
/// left to learn from.
pub async fn gather(s: &mut Session) -> Result<Option<Rollouts>> {
    let begin = s.state.position;
    let wanted = s.settings.train_batch_size;
    let filter = s.course.algorithm.settings().filter_groups.clone();
    let least = if s.course.compares_group { 2 } else { 1 };
    let mut gathered = Gathered { filter, wanted, least, parts: s.least_groups, ..Gathered::default() };
    loop {
        let mut round = s.collector.next_round(&s.team, &mut s.state, &s.clock).await?;
        round.leave_out(LeftOut::Alone, &alone(&round.rollouts, least))?;
        let values = s.collector.judged(&s.team, &mut round, &s.state.algorithm, &s.clock).await?;
        let kept = round.batch.clone();
        let selection = gathered.add(round, &values)?;
        if !selection.generate_more || !gathered.filter.enable {
            return gathered.finish(&selection.kept).map(Some);
        }
        s.tracker.phase(&gathered.report(s.state.step, selection.kept.len()));
        if s.stop.is_set() {
            s.state.position = begin;
            return Ok(None);
        }
        let flat: BTreeSet<i64> = selection.flat.into_iter().collect();
        let used: Vec<usize> = (0..kept.num_rows()).filter(|&row| !flat.contains(&kept.rows()[row].group)).collect();
        s.team.cluster.drop_unused(&kept, &kept.select(&used)?).await?;
    }
}

/// Groups with fewer than `least` completions.
fn alone(rollouts: &[Rollout], least: usize) -> Vec<i64> {
    let mut sizes: BTreeMap<i64, usize> = BTreeMap::new();
    rollouts.iter().for_each(|r| *sizes.entry(r.group).or_default() += 1);
    sizes.into_iter().filter(|&(_, size)| size < least).map(|(group, _)| group).collect()
}

/// Rounds so far.
#[derive(Debug, Default)]
struct Gathered {
    filter: FilterGroups,
    /// Groups of a step.
    wanted: usize,
    /// Completions that a group must have.
    least: usize,
    /// Groups without which some rank of a role would have nothing to do.
    parts: usize,
    rounds: usize,
    /// Of all rounds, by row: its group and what it is judged by.
    values: Vec<(i64, f64)>,
    all: Rollouts,
}

impl Gathered {
    /// Takes a round; what differs in nothing goes at once.
    fn add(&mut self, mut round: Rollouts, values: &[(i64, f64)]) -> Result<Selection> {
        self.rounds += 1;
        self.values.extend(values);
        let selection = filter_groups::select(&self.filter, &self.values, self.wanted, self.rounds);
        let failed = selection.is_err() && self.values.is_empty();
        if let Ok(selection) = &selection {
            round.leave_out(LeftOut::Flat, &selection.flat)?;
        }
        self.all.append(round)?;
        if failed { Err(self.nothing()) } else { Ok(selection?) }
    }

    /// What is learnt from.
    fn finish(mut self, kept: &[i64]) -> Result<Rollouts> {
        let kept: BTreeSet<i64> = kept.iter().copied().collect();
        let surplus: BTreeSet<i64> = self.all.rollouts.iter().map(|r| r.group).filter(|g| !kept.contains(g)).collect();
        self.all.leave_out(LeftOut::Surplus, &surplus.into_iter().collect::<Vec<_>>())?;
        if self.all.rollouts.is_empty() {
            return Err(self.nothing());
        }
        self.check_left(kept.len())?;
        let metrics = &mut self.all.told.metrics;
        metrics.add("train/num_gen_batches", Reading::Sum(self.rounds as f64));
        for rollout in &self.all.left_out {
            let why = rollout.left_out.map_or("", LeftOut::name);
            metrics.add(&format!("rollout/left_out/{why}"), Reading::Sum(1.0));
        }
        Ok(self.all)
    }

    fn check_left(&self, groups: usize) -> Result<()> {
        let (least, asked) = (self.parts, self.wanted);
        if groups >= least {
            return Ok(());
        }
        Err(DriverError::Prompts(format!(
            "{groups} of this step's {asked} prompts are left to learn from, for the others have no answer that could be \
             scored, but {least} data-parallel ranks want one each; mend the reward, or raise `rlhf.train_batch_size`"
        )))
    }

    fn report(&self, step: u64, groups: usize) -> String {
        let bound = self.filter.max_num_gen_batches;
        let of = if bound > 0 { format!(" of at most {bound}") } else { String::new() };
        let batches = if self.rounds == 1 { "batch" } else { "batches" };
        format!(
            "step {step}: {groups} of {} groups differ in their rewards after {} {batches}{of}; generating more",
            self.wanted, self.rounds
        )
    }

    /// There is nothing to learn from.
    fn nothing(&self) -> DriverError {
        let left_out = &self.all.left_out;
        let count = left_out.len();
        let failed = left_out.iter().find_map(|r| r.scored.error.as_ref());
        match failed {
            Some(error) => DriverError::Rewards(format!(
                "no group of this step has {} completions with a reward; all {count} were left out, and the first error \
                 is: {error}. Mend the reward, or set on_error = \"zero\"",
                self.least
            )),
            None => DriverError::Internal(format!("a step without completions; {count} were left out")),
        }
    }
}

impl Rollouts {
    /// Moves these groups to what is not learnt from.
    fn leave_out(&mut self, why: LeftOut, groups: &[i64]) -> Result<()> {
        let groups: BTreeSet<i64> = groups.iter().copied().collect();
        if self.rollouts.iter().any(|r| groups.contains(&r.group)) {
            let of_these: Vec<bool> = self.rollouts.iter().map(|r| groups.contains(&r.group)).collect();
            self.leave_out_rows(why, &of_these)?;
        }
        Ok(())
    }

    /// With those of a later round.
    fn append(&mut self, later: Rollouts) -> Result<()> {
        self.batch = RemoteBatch::concat(&[std::mem::take(&mut self.batch), later.batch])?;
        self.rollouts.extend(later.rollouts);
        self.left_out.extend(later.left_out);
        self.told.merge(later.told);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
