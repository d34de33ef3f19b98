//! Checkpoints from layout to layout: what one saves, the next restores and saves again, with the same bits.

use super::harness::{Case, LR, no_one_else_draws};
use super::table;
use crate::support;
use std::collections::BTreeMap;
use std::path::Path;
use tangelo_configs::Plan;
use tangelo_core::hash::mix64;
use tangelo_core::{Group, IndexBox, LossSpec};
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::device;
use tangelo_trainer::checkpoint::{
    Checkpoint, Retention, Saver, SaverOptions, StateKind, TensorRecord, TrainState, Verify,
};
use tangelo_trainer::persist::{self, WritePlan};
use tangelo_trainer::worker::TrainWorker;
use tch::Device;

type State = BTreeMap<(StateKind, String), Vec<f32>>;

/// Each layout restores what the one before saved (the first trains a step), then saves it; the order is drawn anew every
/// time, so that over the runs every pair meets.
#[test]
fn checkpoints_move_between_layouts_bit_by_bit() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let folder = tempfile::tempdir().unwrap();
    for (model, muon) in ["gqa", "mha", "odd"].into_iter().flat_map(|model| [(model, false), (model, true)]) {
        let fits = |line: &&str| line.split(' ').next() == Some(model) && line.contains(" muon") == muon;
        let mut lines: Vec<&str> = table::LAYOUTS.lines().map(str::trim).filter(fits).collect();
        lines.sort_by_key(|line| mix64(seed ^ tangelo_core::hash::hash_bytes(1, line.as_bytes())));
        let (mut before, mut expected): (Option<Checkpoint>, Option<State>) = (None, None);
        for (hop, line) in lines.iter().enumerate() {
            let case = Case::parse(line, seed);
            let at = folder.path().join(format!("{model}-{muon}-{hop}"));
            case.on_all_ranks(|plan, comm| hand_on(&case, plan, comm, before.as_ref(), &at));
            let saved = Checkpoint::open(&at.join("step-00000001"), Verify::Full).unwrap();
            let state = everything(&saved);
            let expected = expected.get_or_insert_with(|| state.clone());
            assert!(state.keys().eq(expected.keys()), "{line}: it saved other states");
            for (key, values) in expected.iter() {
                let same = values.len() == state[key].len()
                    && values.iter().zip(&state[key]).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{line}: {key:?} is not what {:?} saved", hop.checked_sub(1).map(|h| lines[h]));
            }
            before = Some(saved);
        }
    }
}

/// One rank: restores or trains, then saves.
pub fn hand_on(case: &Case, plan: &Plan, comm: Communicator, from: Option<&Checkpoint>, to: &Path) {
    let rank = comm.rank();
    let mut worker = TrainWorker::new(plan, rank, comm, Device::Cpu).unwrap();
    match from {
        Some(checkpoint) => persist::restore(&mut worker, checkpoint, false).unwrap(),
        None => {
            no_one_else_draws(|| worker.start_from_seed(case.seed()));
            let batch = case.rank_batch(plan, 0, plan.topology.index(Group::Batch, rank));
            let loss = worker.forward_backward(&batch, &LossSpec::next_token(), false).unwrap();
            worker.optim_step(LR, &loss).unwrap();
        }
    }
    save(&worker, plan, to);
}

/// One rank's part of a checkpoint of step 1.
pub fn save(worker: &TrainWorker, plan: &Plan, to: &Path) {
    let mut saver = Saver::start(SaverOptions {
        folder: to.to_path_buf(),
        rank: worker.rank(),
        world_size: worker.world().size(),
        attempt: "test".into(),
        resumed_from: None,
        retention: Retention { keep_latest_k: 0, keep_every: 0 },
        asynchronous: true,
        rank_deadline: std::time::Duration::from_secs(60),
        config_toml: plan.to_toml().unwrap(),
        model: plan.model.clone(),
        observer: None,
    })
    .unwrap();
    let writes = WritePlan::new(plan, worker);
    persist::save(worker, &writes, &mut saver, state_after_one_step(), false).unwrap();
    saver.finish().unwrap();
}

fn state_after_one_step() -> TrainState {
    TrainState {
        step: 1,
        num_updates: 1,
        global_sample_index: 16,
        tokens_seen: 640,
        skipped_steps: 0,
        seed: 0,
        learning_rate: LR,
        loader_fingerprint: "none".into(),
    }
}

/// Every state of every parameter, whole.
fn everything(checkpoint: &Checkpoint) -> State {
    let mut state = State::new();
    for TensorRecord { kind, name, shape, .. } in &checkpoint.manifest().tensors {
        let mut values = vec![0f32; shape.iter().product()];
        checkpoint.read(*kind, name, &IndexBox::full(shape), &mut values).unwrap();
        state.insert((*kind, name.clone()), values);
    }
    state
}
