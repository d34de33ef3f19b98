//! Ranks that die, stop or hang in a phase of a step, in hybrid layouts of real processes: the run ends in time with a
//! message that names rank, phase and collective, nothing is left behind but whole checkpoints, and a restart goes on
//! from the newest.
//!
//! `TANGELO_TEST_FAULTS=all` runs every fault in every phase that a layout has, some ten minutes; else a choice is run in
//! which, together with the restarts, every phase occurs.

use crate::job::{Job, Running, assert_same_files, finish, layout, newest_checkpoint, processes_of};
use crate::support;
use std::process::Command;
use tangelo_core::env;

/// A layout of four ranks, and the faults planted in it.
struct Layout {
    words: &'static str,
    /// The phases that its steps have, but those of [`EVERYWHERE`].
    phases: &'static [&'static str],
    /// Those of the ordinary tests.
    chosen: &'static [&'static str],
}

/// The phases of every step that saves.
const EVERYWHERE: [&str; 7] = ["count", "block", "loss", "norm", "update", "metrics", "save"];
const KINDS: [&str; 3] = ["kill", "stop", "hang"];

const LAYOUTS: [Layout; 3] = [
    Layout {
        words: "tp=2 cp=2 rotate='ring' weights=2",
        phases: &["gather", "embed", "exchange", "ring", "reduce"],
        chosen: &["stop/ring", "kill/exchange", "hang/gather", "stop/update", "kill/count"],
    },
    Layout {
        words: "pp=2 dp=2 weights=2",
        phases: &["gather", "embed", "pipeline", "reduce"],
        chosen: &["stop/pipeline", "kill/loss", "kill/save", "stop/embed", "kill/metrics"],
    },
    Layout {
        words: "dp=2 cp=2 head=2 weights=2",
        phases: &["gather", "embed", "exchange", "reduce", "publish"],
        chosen: &["hang/exchange", "stop/reduce", "kill/norm", "kill/block"],
    },
];

/// The step in which faults strike; it saves, and so do those before it with even numbers. A save waits for the one
/// before, so that of step 2 is complete.
const STEP: u64 = 6;
/// Short steps of two micro-batches or more, and deadlines that a busy machine keeps.
const SHORT: [&str; 6] = [
    "training.local_batch_size=1",
    "training.global_batch_size=4",
    "training.steps=8",
    "lr_scheduler.total_steps=8",
    "checkpoint.interval=2",
    "comm.train_timeout_seconds=8",
];
/// `tangelo run` of a layout.
fn command(job: &Job, run: &str, words: &str, arguments: &[&str]) -> Command {
    let mut command = job.command(run, 4, &["--grace-seconds", "4"]);
    command.args(SHORT.iter().flat_map(|set| ["--set", set])).args(layout(words)).args(arguments);
    command
}

/// A fault of `kind` in `phase`: the run ends, says who, where and in which collective, and leaves what it saved.
fn check_fault(job: &Job, words: &str, kind: &str, phase: &str, rank: usize) {
    let run = format!("{kind}-{phase}-{rank}-{}", words.replace([' ', '\'', '='], "-"));
    let mut tangelo = command(job, &run, words, &[]);
    tangelo.env(env::FAULT, format!("{kind}@{STEP}:{rank}/{phase}"));
    let (code, said) = Running::start(tangelo, job.path(&format!("{run}.log"))).finish();
    println!("---- {words}: {kind} in {phase}\n{said}");
    assert!(code.is_some_and(|code| code != 0), "{run}: {code:?}\n{said}");
    let how = if kind == "kill" { "was ended by SIGKILL" } else { "hung" };
    let first = format!("rank {rank} failed first in phase {phase} of step {STEP}: it {how}");
    assert!(said.contains(&first), "{run}: not {first:?} in\n{said}");
    // Who waits for it, and in what.
    let behind = format!("rank {rank} is behind, in phase {phase} of step {STEP}: rank");
    let collective = said.lines().find(|line| line.contains(&behind));
    assert!(collective.is_some_and(|line| line.contains(" for it in ")), "{run}: no collective is named in\n{said}");
    assert_eq!(processes_of(&job.path(&run)), Vec::<String>::new(), "{run} left processes");
    let newest = newest_checkpoint(&job.path(&run));
    assert!([2, 4, 6].contains(&newest), "{run}: the newest checkpoint is of step {newest}");
}

#[test]
fn a_rank_that_fails_in_a_phase_is_named_with_phase_and_collective() {
    let job = Job::new(support::fresh_seed());
    prepare(&job);
    let all = support::all_faults();
    let mut faults = Vec::new();
    for layout in &LAYOUTS {
        let phases = layout.phases.iter().chain(&EVERYWHERE);
        let product = phases.flat_map(|phase| KINDS.map(|kind| (kind, *phase)));
        let chosen = layout.chosen.iter().map(|fault| fault.split_once('/').unwrap());
        let faults_here: Vec<_> = if all { product.collect() } else { chosen.collect() };
        faults.extend(faults_here.into_iter().map(|(kind, phase)| (layout.words, kind, phase)));
    }
    // Most of a stopped rank's run is waiting: three at a time keep the cores busy.
    let next = std::sync::Mutex::new(faults.into_iter().enumerate());
    let work = || {
        while let Some((index, (words, kind, phase))) = { next.lock().unwrap().next() } {
            let rank = match phase {
                // Only the first stage of a pipeline has the embedding, only the last the loss.
                "embed" => 1,
                "loss" => 3,
                _ => 1 + index % 3,
            };
            check_fault(&job, words, kind, phase, rank);
        }
    };
    std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(work))));
}

#[test]
fn a_restart_after_a_kill_in_a_phase_ends_as_if_nothing_had_happened() {
    let job = Job::new(support::fresh_seed());
    for (layout, phase) in LAYOUTS.iter().zip(["ring", "pipeline", "publish"]) {
        let name = layout.words.replace([' ', '\'', '='], "-");
        let (code, said) = finish(&mut command(&job, &name, layout.words, &[]));
        assert_eq!(code, Some(0), "{said}");
        let run = format!("{name}-{phase}");
        let mut tangelo = command(&job, &run, layout.words, &["--max-restarts", "1", "--restart-backoff-ms", "50"]);
        let (code, said) = finish(tangelo.env(env::FAULT, format!("kill@{STEP}:2/{phase}")));
        assert_eq!(code, Some(0), "{run}: {said}");
        let first = format!("rank 2 failed first in phase {phase} of step {STEP}: it was ended by SIGKILL");
        assert!(said.contains(&first), "{run}: {said}");
        let (undisturbed, restarted) = (job.finished(&name), job.finished(&run));
        assert_eq!(restarted.losses(), undisturbed.losses(), "{run}");
        assert_same_files(&restarted.checkpoint(8), &undisturbed.checkpoint(8), &run);
    }
}

/// So that runs beside one another need not.
fn prepare(job: &Job) {
    job.run("prepared", 1, &["--set", "training.steps=1", "--set", "lr_scheduler.total_steps=4"]);
}
