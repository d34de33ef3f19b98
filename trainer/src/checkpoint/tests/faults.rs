//! Kills and full disks: the test binary runs itself as a child that saves, and meets its end.

use super::*;
use nix::sys::signal::{Signal, raise};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::Arc;

/// What the child is to do, `folder|seed|stage|rank`; unset in an ordinary test run.
const ORDERS: &str = "TANGELO_TEST_CHECKPOINT_CHILD";

/// The child's part; without orders there is nothing to do.
#[test]
fn child_saves() {
    let Ok(orders) = std::env::var(ORDERS) else { return };
    let [folder, seed, stage, rank] = orders.split('|').collect::<Vec<_>>()[..] else { panic!("{orders}") };
    let (folder, seed, rank) = (Path::new(folder), seed.parse().unwrap(), rank.parse::<usize>().unwrap());
    match stage {
        "full" => fill_the_disk(folder, seed),
        "train" => train(folder, seed),
        "limited" => {
            let [result] = &mut save_with(folder, seed, &[20], Layout::rows(1), |o| o.resumed_from = Some(10))[..]
            else {
                panic!()
            };
            println!("child: {}", result.as_ref().unwrap_err());
        }
        stage => save(folder, seed, &[20], Layout::rows(2), |o| {
            o.attempt = "killed".to_owned();
            o.resumed_from = Some(10);
            o.retention = Retention { keep_latest_k: 1, keep_every: 0 };
            let stage = stage.to_owned();
            o.observer = Some(Arc::new(move |event| {
                if format!("{:?}", event.stage) == stage && event.rank == rank {
                    raise(Signal::SIGKILL).unwrap();
                }
            }));
        }),
    }
}

fn child(prefix: &[&str], folder: &Path, seed: u64, stage: &str, rank: usize) -> Output {
    child_command(prefix, folder, seed, stage, rank).output().unwrap()
}

fn child_command(prefix: &[&str], folder: &Path, seed: u64, stage: &str, rank: usize) -> Command {
    let program = std::env::current_exe().unwrap();
    let path = module_path!().split_once("::").unwrap().1;
    let mut words: Vec<&std::ffi::OsStr> = prefix.iter().map(|word| word.as_ref()).collect();
    let test = format!("{path}::child_saves");
    words.extend([program.as_os_str(), test.as_ref(), "--exact".as_ref(), "--nocapture".as_ref()]);
    let orders = format!("{}|{seed}|{stage}|{rank}", folder.display());
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env(ORDERS, orders);
    command
}

/// Steps of the toy run below.
const STEPS: u64 = 40;

/// A toy update: every bit of the result depends on the step and on every update before.
fn update(truth: &mut Truth, step: u64) {
    for value in truth.values.values_mut().flatten() {
        *value = f32::from_bits(mix64(u64::from(value.to_bits()) << 32 | step) as u32);
    }
}

/// A toy run of two ranks that goes on from what the folder holds and saves after every step.
fn train(folder: &Path, seed: u64) {
    let found = find_usable(folder, None).unwrap();
    let resumed_from = found.checkpoint.as_ref().map(Checkpoint::step);
    let mut truth = Truth::new(seed, 0);
    if let Some(checkpoint) = &found.checkpoint {
        for ((kind, name), values) in &mut truth.values {
            let meta = truth.metas.iter().find(|meta| meta.name == *name).unwrap();
            checkpoint.read(*kind, name, &IndexBox::full(&meta.shape), values).unwrap();
        }
    }
    let start = |rank| {
        let (attempt, retention) = (std::process::id().to_string(), Retention { keep_latest_k: 2, keep_every: 0 });
        Saver::start(SaverOptions { attempt, resumed_from, retention, ..options(folder, rank, 2) }).unwrap()
    };
    let mut savers: Vec<Saver> = (0..2).map(start).collect();
    for step in resumed_from.unwrap_or(0) + 1..=STEPS {
        update(&mut truth, step);
        for (rank, saver) in savers.iter_mut().enumerate() {
            let mut snapshot = saver.begin(state(step));
            truth.fill(&mut snapshot, rank, &Layout::rows(2), &StateKind::ALL);
            saver.save(snapshot).unwrap();
        }
    }
    savers.iter_mut().for_each(|saver| drop(saver.finish().unwrap()));
}

#[test]
fn random_kills_leave_the_bits_of_an_undisturbed_run() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let (mut kills, mut lives, mut newest) = (0, 0, 0);
    let mut complete = Duration::ZERO;
    loop {
        let started = std::time::Instant::now();
        let mut command = child_command(&[], folder.path(), seed, "train", 0);
        let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
        if kills < 5 {
            // The first life is left alone until it has saved, which shows how long a life has to be.
            while lives == 0 && complete_steps(folder.path()).unwrap().is_empty() {
                assert!(child.try_wait().unwrap().is_none(), "the first life ended before it had saved");
                std::thread::sleep(Duration::from_millis(1));
                complete = started.elapsed();
            }
            let random = mix64(seed ^ lives) as u32 as f64 / f64::from(u32::MAX);
            std::thread::sleep(complete.mul_f64(if lives == 0 { 0.0 } else { 0.5 + random }));
            child.kill().unwrap();
        }
        let status = child.wait().unwrap();
        (kills, lives) = (kills + usize::from(status.signal() == Some(9)), lives + 1);
        let found = find_usable(folder.path(), None).unwrap();
        assert!(found.warnings.is_empty(), "{:?}", found.warnings);
        let step = found.checkpoint.as_ref().unwrap().step();
        assert!(step >= newest, "step {newest} was complete, now the newest is {step}");
        newest = step;
        if status.success() {
            break;
        }
        assert_eq!(status.signal(), Some(9));
    }
    println!("{kills} kills");
    assert_eq!(newest, STEPS);
    let mut truth = Truth::new(seed, 0);
    (1..=STEPS).for_each(|step| update(&mut truth, step));
    let checkpoint = find_usable(folder.path(), None).unwrap().checkpoint.unwrap();
    truth.check(&checkpoint, &Layout::rows(1), &StateKind::ALL);
    assert_eq!(names(folder.path()).len(), 2, "{:?}", names(folder.path()));
}

#[test]
fn a_kill_at_any_stage_leaves_a_usable_newest() {
    let seed = fresh_seed();
    for (at, stage) in SaveStage::ALL.into_iter().enumerate() {
        // The first three stages happen on every rank.
        for rank in 0..if at < 3 { 2 } else { 1 } {
            let folder = tempfile::tempdir().unwrap();
            save(folder.path(), seed, &[10], Layout::rows(2), |_| {});
            let output = child(&[], folder.path(), seed, &format!("{stage:?}"), rank);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(9), "{stage:?}: the child was not killed: {stderr}");
            let mut newest = if at < 5 { 10 } else { 20 };
            if stage == SaveStage::RecordWritten && rank == 1 {
                // Rank 1's part is done: rank 0 may complete the checkpoint before the signal arrives.
                newest = *complete_steps(folder.path()).unwrap().last().unwrap();
            }
            check_newest(folder.path(), seed, newest, 0);
            assert!(newest == 20 || names(folder.path()).len() == 2, "{stage:?}: {:?}", names(folder.path()));
            // The next attempt clears up, saves the same step, and meets nothing of the killed one.
            save(folder.path(), seed, &[20, 30], Layout::rows(3), |o| {
                o.attempt = "next".to_owned();
                o.resumed_from = Some(newest);
                o.retention = Retention { keep_latest_k: 1, keep_every: 0 };
            });
            check_newest(folder.path(), seed, 30, 0);
            assert_eq!(names(folder.path()), ["step-00000030"], "{stage:?}");
        }
    }
}

#[test]
fn records_of_a_killed_attempt_are_not_taken_for_this_ones() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    save(folder.path(), seed, &[10], Layout::rows(2), |_| {});
    // Both ranks' files and records of step 20 lie there, whole, but of the killed attempt.
    child(&[], folder.path(), seed, "BeforeManifest", 0);
    let stale = folder.path().join("step-00000020.killed.partial");
    assert!(stale.join("rank-00001.json").exists());
    let kept = tempfile::tempdir_in(folder.path()).unwrap();
    fs::rename(&stale, kept.path().join("stale")).unwrap();
    let mut options = options(folder.path(), 0, 2);
    options = SaverOptions { attempt: "next".to_owned(), resumed_from: Some(10), ..options };
    options.rank_deadline = Duration::from_millis(50);
    let mut saver = Saver::start(options).unwrap();
    fs::rename(kept.path().join("stale"), &stale).unwrap();
    let save = |saver: &mut Saver| {
        let mut snapshot = saver.begin(state(20));
        Truth::new(seed, 20).fill(&mut snapshot, 0, &Layout::rows(2), &StateKind::ALL);
        saver.save(snapshot).unwrap();
        saver.finish().unwrap_err()
    };
    assert!(matches!(save(&mut saver), CheckpointError::MissingRank { rank: 1, .. }));
    // Even moved to where this attempt looks, the record says whose it is.
    let own = folder.path().join("step-00000020.next.partial");
    fs::create_dir(&own).unwrap();
    fs::copy(stale.join("rank-00001.json"), own.join("rank-00001.json")).unwrap();
    let error = save(&mut saver).to_string();
    assert!(error.contains("rank-00001.json is damaged") && error.contains("killed"), "{error}");
    check_newest(folder.path(), seed, 10, 0);
}

#[test]
fn a_file_size_limit_names_the_file_and_keeps_the_older_one() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    save(folder.path(), seed, &[10], Layout::rows(1), |_| {});
    // 16 blocks of 512 bytes; without the trap the signal would end the child.
    let limited = ["sh", "-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "sh"];
    let output = child(&limited, folder.path(), seed, "limited", 0);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("no space to write") && said.contains("rank-00000.safetensors"), "{said}");
    assert_eq!(names(folder.path()), ["step-00000010"]);
    check_newest(folder.path(), seed, 10, 0);
}

/// In the child, `folder` is a file system of 384 KiB: two checkpoints with every kind of state fit, not three.
fn fill_the_disk(folder: &Path, seed: u64) {
    save(folder, seed, &[10], Layout::rows(2), |_| {});
    let ballast = folder.join("ballast");
    let mut size = 1 << 20;
    while size > 512 {
        // Ever smaller pieces, until hardly anything is free.
        match fs::write(folder.join(format!("ballast/{size}")), vec![1; size]) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => fs::create_dir(&ballast).unwrap(),
            _ => size /= 2,
        }
    }
    let from_10 = |o: &mut SaverOptions| o.resumed_from = Some(10);
    for result in save_with(folder, seed, &[20], Layout::rows(2), from_10) {
        println!("child: {}", result.unwrap_err());
    }
    check_newest(folder, seed, 10, 0);
    fs::remove_dir_all(&ballast).unwrap();
    assert_eq!(complete_steps(folder).unwrap(), [10]);
    save(folder, seed, &[30], Layout::rows(2), from_10);
    check_newest(folder, seed, 30, 0);
    assert_eq!(names(folder), ["step-00000010", "step-00000030"]);
    println!("child: went on");
}

#[test]
fn a_full_disk_keeps_the_older_one_and_saving_goes_on_when_there_is_space() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let mount = format!("mount -t tmpfs -o size=384k tmpfs '{}'", folder.path().display());
    let possible = Command::new("unshare").args(["-rm", "sh", "-c", &mount]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        println!("skipped: this machine lets no user mount a tmpfs of their own");
        return;
    }
    let script = format!("{mount} && exec \"$@\"");
    let output = child(&["unshare", "-rm", "sh", "-c", &script, "sh"], folder.path(), seed, "full", 0);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("no space to write") && said.contains("child: went on"), "{said}");
}
