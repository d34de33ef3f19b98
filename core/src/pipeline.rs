//! Pipeline schedules as data: in which order a stage takes its micro-batches forward and backward.
//!
//! A schedule is a list of [`Action`]s per stage and nothing else: another schedule is another list, not another engine.

use serde::{Deserialize, Serialize};

/// Which schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PipelineSchedule {
    /// All micro-batches forward, then all backward (arXiv 1811.06965): every one's activations are kept.
    GPipe,
    /// One forward, one backward, once the pipeline is full (PipeDream-flush, arXiv 2006.09503): a stage keeps the
    /// activations of no more micro-batches than stages follow it, plus one.
    #[default]
    OneFOneB,
}

/// Which way a micro-batch passes a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Pass {
    /// Towards the loss.
    Forward,
    /// Back from it.
    Backward,
}

/// One micro-batch passes one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Action {
    /// Which way.
    pub pass: Pass,
    /// Which micro-batch, from 0.
    pub micro_batch: usize,
}

/// What `stage` of `num_stages` does with `num_micro_batches`, in order.
pub fn actions(schedule: PipelineSchedule, stage: usize, num_stages: usize, num_micro_batches: usize) -> Vec<Action> {
    let forward = |micro_batch| Action { pass: Pass::Forward, micro_batch };
    let backward = |micro_batch| Action { pass: Pass::Backward, micro_batch };
    let ahead = match schedule {
        PipelineSchedule::GPipe => num_micro_batches,
        PipelineSchedule::OneFOneB => (num_stages - 1 - stage).min(num_micro_batches),
    };
    let mut list: Vec<Action> = (0..ahead).map(forward).collect();
    for micro_batch in ahead..num_micro_batches {
        list.extend([forward(micro_batch), backward(micro_batch - ahead)]);
    }
    list.extend((num_micro_batches - ahead..num_micro_batches).map(backward));
    list
}

/// The most micro-batches whose activations a stage keeps at once.
pub fn most_in_flight(actions: &[Action]) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for action in actions {
        match action.pass {
            Pass::Forward => now += 1,
            Pass::Backward => now -= 1,
        }
        most = most.max(now);
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(actions: &[Action]) -> String {
        let one = |a: &Action| format!("{}{}", if a.pass == Pass::Forward { 'F' } else { 'B' }, a.micro_batch);
        actions.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_two_schedules() {
        assert_eq!(text(&actions(PipelineSchedule::GPipe, 0, 2, 3)), "F0 F1 F2 B0 B1 B2");
        assert_eq!(text(&actions(PipelineSchedule::OneFOneB, 0, 3, 4)), "F0 F1 F2 B0 F3 B1 B2 B3");
        assert_eq!(text(&actions(PipelineSchedule::OneFOneB, 2, 3, 4)), "F0 B0 F1 B1 F2 B2 F3 B3");
    }

    proptest! {
        #[test]
        fn every_micro_batch_goes_there_and_back_in_order(
            stages in 1usize..6, pick in 0usize..6, n in 1usize..9, gpipe in any::<bool>(),
        ) {
            let stage = pick % stages;
            let schedule = if gpipe { PipelineSchedule::GPipe } else { PipelineSchedule::OneFOneB };
            let list = actions(schedule, stage, stages, n);
            for pass in [Pass::Forward, Pass::Backward] {
                let order: Vec<usize> = list.iter().filter(|a| a.pass == pass).map(|a| a.micro_batch).collect();
                prop_assert_eq!(order, (0..n).collect::<Vec<_>>());
            }
            let most = if gpipe { n } else { (stages - stage).min(n) };
            prop_assert_eq!(most_in_flight(&list), most);
        }
    }
}
