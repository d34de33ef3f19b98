//! One save after another: what waits, what is kept, what fails alone.

use super::*;
use proptest::prelude::*;
use std::fs;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Instant;

#[test]
fn the_caller_waits_for_the_copy_only_and_for_the_save_before() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let (release, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let mut options = options(folder.path(), 0, 1);
    options.observer = Some(Arc::new(move |event| {
        if event.stage == SaveStage::ShardStarted {
            gate.lock().unwrap().recv().unwrap();
        }
    }));
    let mut saver = Saver::start(options).unwrap();
    let fill = |saver: &mut Saver, step| {
        let mut snapshot = saver.begin(state(step));
        Truth::new(seed, step).fill(&mut snapshot, 0, &Layout::rows(1), &StateKind::ALL);
        snapshot
    };
    let first = fill(&mut saver, 1);
    saver.save(first).unwrap();
    assert!(saver.poll().unwrap().is_none(), "the writer stands at the gate");
    assert!(complete_steps(folder.path()).unwrap().is_empty());
    // The second save waits for the first, which goes on 400 ms from now.
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        release.send(()).unwrap();
        release.send(()).unwrap();
    });
    let second = fill(&mut saver, 2);
    let waited = saver.save(second).unwrap();
    assert!(waited >= Duration::from_millis(100), "{waited:?}");
    opener.join().unwrap();
    let reports = saver.finish().unwrap();
    assert_eq!(reports.iter().map(|report| report.step).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(reports[1].path, folder.path().join("step-00000002"));
    for step in [1, 2] {
        let checkpoint = find_usable(folder.path(), Some(step)).unwrap().checkpoint.unwrap();
        Truth::new(seed, step).check(&checkpoint, &Layout::rows(1), &StateKind::ALL);
    }
}

#[test]
fn a_lazy_copy_is_fenced_off_from_the_update() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let mut saver = Saver::start(options(folder.path(), 0, 1)).unwrap();
    saver.reserve(3 * model().num_parameters());
    let weights = Arc::new(Mutex::new(Truth::new(seed, 1)));
    for step in 1..4 {
        let (snapshot, shared) = (saver.begin(state(step)), weights.clone());
        saver
            .save_lazily(snapshot, move |snapshot| {
                std::thread::sleep(Duration::from_millis(150));
                shared.lock().unwrap().fill(snapshot, 0, &Layout::rows(1), &StateKind::ALL);
            })
            .unwrap();
        let stalled = saver.fence();
        assert!(stalled >= Duration::from_millis(20), "{stalled:?}");
        assert!(saver.fence() < Duration::from_millis(100), "the second fence is free");
        // The update: had the copy not been done, the checkpoint would hold the next step's values.
        *weights.lock().unwrap() = Truth::new(seed, step + 1);
    }
    saver.finish().unwrap();
    for step in 1..4 {
        let checkpoint = find_usable(folder.path(), Some(step)).unwrap().checkpoint.unwrap();
        Truth::new(seed, step).check(&checkpoint, &Layout::rows(1), &StateKind::ALL);
    }
    let snapshot = saver.begin(state(9));
    saver.save_lazily(snapshot, |_| panic!("planted")).unwrap();
    saver.fence();
    assert!(matches!(saver.finish(), Err(CheckpointError::ThreadDied)));
}

#[test]
fn a_synchronous_save_is_complete_when_it_returns() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let mut saver = Saver::start(SaverOptions { asynchronous: false, ..options(folder.path(), 0, 1) }).unwrap();
    let mut snapshot = saver.begin(state(4));
    Truth::new(seed, 4).fill(&mut snapshot, 0, &Layout::rows(1), &StateKind::ALL);
    saver.save(snapshot).unwrap();
    check_newest(folder.path(), seed, 4, 0);
    assert_eq!(saver.poll().unwrap().map(|report| report.step), Some(4));
}

#[test]
fn the_newest_and_milestones_are_kept() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let retention = Retention { keep_latest_k: 2, keep_every: 40 };
    save(folder.path(), seed, &[10, 20, 30, 40, 50, 60, 70], Layout::rows(2), |o| o.retention = retention);
    assert_eq!(complete_steps(folder.path()).unwrap(), [40, 60, 70]);
    assert_eq!(names(folder.path()).len(), 3, "{:?}", names(folder.path()));
}

proptest! {
    #[test]
    fn pruning_rules(steps in proptest::collection::btree_set(0u64..200, 1..20), k in 0usize..5, every in 0u64..7) {
        let steps: Vec<u64> = steps.into_iter().collect();
        let doomed = Retention { keep_latest_k: k, keep_every: every }.prunable(&steps);
        for (age, step) in steps.iter().rev().enumerate() {
            let milestone = every > 0 && step % every == 0;
            prop_assert_eq!(doomed.contains(step), k > 0 && age >= k && !milestone, "step {}", step);
        }
        prop_assert!(!doomed.contains(steps.last().unwrap()));
    }
}

#[test]
fn what_was_resumed_from_outlives_every_save_but_a_complete_one() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let one = Retention { keep_latest_k: 1, keep_every: 0 };
    save(folder.path(), seed, &[10], Layout::rows(1), |_| {});
    // Rank 1 never appears: the save fails, step 10 stays.
    let mut options = options(folder.path(), 0, 2);
    options = SaverOptions { attempt: "b".to_owned(), resumed_from: Some(10), retention: one, ..options };
    options.rank_deadline = Duration::from_millis(50);
    let mut saver = Saver::start(options).unwrap();
    let mut snapshot = saver.begin(state(20));
    Truth::new(seed, 20).fill(&mut snapshot, 0, &Layout::rows(2), &StateKind::ALL);
    saver.save(snapshot).unwrap();
    let error = saver.finish().unwrap_err();
    assert!(matches!(error, CheckpointError::MissingRank { rank: 1, step: 20, .. }), "{error}");
    assert_eq!(names(folder.path()), ["step-00000010"]);
    check_newest(folder.path(), seed, 10, 0);
    drop(saver);
    save(folder.path(), seed, &[20], Layout::rows(2), |o| {
        o.resumed_from = Some(10);
        o.retention = one;
    });
    assert_eq!(names(folder.path()), ["step-00000020"]);
}

#[test]
fn later_checkpoints_of_an_abandoned_course_are_set_aside_not_deleted() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    save(folder.path(), seed, &[10, 20, 30], Layout::rows(1), |_| {});
    save(folder.path(), seed + 1, &[15], Layout::rows(1), |o| {
        o.attempt = "b".to_owned();
        o.resumed_from = Some(10);
    });
    check_newest(folder.path(), seed + 1, 15, 0);
    let aside = ["step-00000010", "step-00000015", "step-00000020.superseded-b", "step-00000030.superseded-b"];
    assert_eq!(names(folder.path()), aside);
    let old = Checkpoint::open(&folder.path().join(aside[3]), Verify::Full).unwrap();
    Truth::new(seed, 30).check(&old, &Layout::rows(1), &StateKind::ALL);
}

#[test]
fn saving_a_step_again_replaces_it() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    save(folder.path(), seed, &[10], Layout::rows(1), |_| {});
    save(folder.path(), seed + 1, &[10], Layout::rows(2), |o| o.resumed_from = Some(10));
    check_newest(folder.path(), seed + 1, 10, 0);
    assert_eq!(names(folder.path()), ["step-00000010"]);
}

#[test]
fn a_rank_that_fails_is_named_by_rank_0_and_the_next_save_succeeds() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    save(folder.path(), seed, &[10], Layout::rows(2), |_| {});
    // Something in the way of rank 1's file makes its save of step 20 fail.
    let partial = folder.path().join("step-00000020.attempt-1.partial");
    fs::create_dir_all(partial.join("rank-00001.safetensors")).unwrap();
    let results = save_with(folder.path(), seed, &[20], Layout::rows(2), |o| o.resumed_from = Some(10));
    let messages: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert!(messages[0].contains("rank 1 could not write its part"), "{messages:?}");
    assert!(messages[0].contains("rank-00001.safetensors"), "{messages:?}");
    assert_eq!(complete_steps(folder.path()).unwrap(), [10]);
    save(folder.path(), seed, &[30], Layout::rows(2), |o| o.resumed_from = Some(10));
    check_newest(folder.path(), seed, 30, 0);
    assert_eq!(names(folder.path()), ["step-00000010", "step-00000030"]);
}

#[test]
fn tensors_with_holes_never_become_a_checkpoint() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let truth = Truth::new(seed, 5);
    let mut saver = Saver::start(options(folder.path(), 0, 1)).unwrap();
    let mut snapshot = saver.begin(state(5));
    truth.fill(&mut snapshot, 0, &Layout::rows(1), &[StateKind::Param]);
    let meta = &truth.metas[0];
    let half = IndexBox::new([0..meta.shape[0] - 1, 0..meta.shape[1]]);
    snapshot.push(StateKind::ExpAvg, meta, &half, |_| Ok::<(), CheckpointError>(())).unwrap();
    saver.save(snapshot).unwrap();
    let message = saver.finish().unwrap_err().to_string();
    assert!(
        message.contains("exp_avg") && message.contains(&meta.name) && message.contains("held by no source"),
        "{message}"
    );
    assert!(names(folder.path()).is_empty());
}

#[test]
fn an_ending_process_does_not_wait_for_dead_peers() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let mut saver = Saver::start(options(folder.path(), 0, 2)).unwrap();
    let mut snapshot = saver.begin(state(5));
    Truth::new(seed, 5).fill(&mut snapshot, 0, &Layout::rows(2), &StateKind::ALL);
    saver.save(snapshot).unwrap();
    let started = Instant::now();
    drop(saver);
    // The deadline for rank 1 is a minute.
    assert!(started.elapsed() < Duration::from_secs(30));
    assert!(names(folder.path()).is_empty());
}

#[test]
fn an_error_surfaces_at_the_next_call_which_goes_on() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    fs::create_dir_all(folder.path().join("step-00000001.attempt-1.partial/rank-00000.safetensors")).unwrap();
    let mut saver = Saver::start(options(folder.path(), 0, 1)).unwrap();
    for step in [1, 2] {
        let mut snapshot = saver.begin(state(step));
        Truth::new(seed, step).fill(&mut snapshot, 0, &Layout::rows(1), &StateKind::ALL);
        let result = saver.save(snapshot);
        assert_eq!(result.is_err(), step == 2, "{result:?}");
    }
    assert_eq!(saver.finish().unwrap().len(), 1);
    check_newest(folder.path(), seed, 2, 0);
}

#[test]
fn an_observer_that_panics_is_an_error_not_a_hang() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path(), 0, 1);
    options.observer = Some(Arc::new(|_| panic!("planted")));
    let mut saver = Saver::start(options).unwrap();
    let mut snapshot = saver.begin(state(5));
    Truth::new(1, 5).fill(&mut snapshot, 0, &Layout::rows(1), &StateKind::ALL);
    saver.save(snapshot).unwrap();
    assert!(matches!(saver.finish(), Err(CheckpointError::ThreadDied)));
    let snapshot = saver.begin(state(6));
    assert!(matches!(saver.save(snapshot), Err(CheckpointError::ThreadDied)));
}
