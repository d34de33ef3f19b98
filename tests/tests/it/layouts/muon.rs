//! Muon's states: the same bits for every ZeRO scope, and of no use to another optimizer.

use super::harness::Case;
use super::moving::hand_on;
use crate::support;
use tangelo_kernels::device;
use tangelo_trainer::checkpoint::{Checkpoint, Verify};
use tangelo_trainer::{TrainWorker, persist};
use tch::Device;

#[test]
fn zero_scopes_give_the_same_bits_under_muon() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let run = |line: &str| {
        let mut case = Case::parse(line, seed);
        case.set("training", &["max_norm=0.5"]);
        case.set("optimizer", &["muon_momentum=0.9", "muon_nesterov=true"]);
        case.run()
    };
    // Within a pair gradients are summed in the same order.
    for (one, other) in [
        ("gqa muon dp4 z1.1.1", "gqa muon dp4 z1.1.4"),
        ("odd muon dp4 z1.4.4", "odd muon dp4 z4.4.4"),
        ("mha muon dp2 tp2 z1.1.1", "mha muon dp2 tp2 z1.1.2"),
    ] {
        let (found, expected) = (run(other), run(one));
        for (found, expected) in found.steps.iter().zip(&expected.steps) {
            assert_eq!([found.loss, found.norm], [expected.loss, expected.norm], "{other} and {one}");
            for (name, moment) in &found.gradients {
                assert!(moment.equal(&expected.gradients[name]), "{other} and {one}: {name}");
            }
        }
    }
}

#[test]
fn states_of_another_optimizer_are_refused() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let folder = tempfile::tempdir().unwrap();
    for (from, to, [found, expected]) in
        [("gqa muon", "gqa dp2", ["Muon", "AdamW"]), ("gqa", "gqa muon dp2", ["AdamW", "Muon"])]
    {
        let (from, to, at) = (Case::parse(from, seed), Case::parse(to, seed), folder.path().join(found));
        from.on_all_ranks(|plan, comm| hand_on(&from, plan, comm, None, &at));
        let saved = Checkpoint::open(&at.join("step-00000001"), Verify::Full).unwrap();
        to.on_all_ranks(|plan, comm| {
            let mut worker = TrainWorker::new(plan, comm.rank(), comm, Device::Cpu).unwrap();
            let message = persist::restore(&mut worker, &saved, false).unwrap_err().to_string();
            let names = format!("written with optimizer.name = \"{found}\", this job has \"{expected}\"");
            assert!(message.contains(&names) && message.contains("initial_load_model_only"), "{message}");
            persist::restore(&mut worker, &saved, true).unwrap();
        });
    }
}
