//! Processes of a reinforcement-learning run that are killed: who it was is said, the run goes on from the last complete
//! checkpoint, and what it ends with is what the undisturbed run ends with, bit for bit.

use crate::job::{Job, assert_same_files, finish, processes_of};
use crate::rlhf::{command, job, metrics, of_learning};
use std::path::Path;
use std::process::Command;
use tangelo_core::env;

/// Four ranks: two learn (beside the reference), one has the critic, one generates.
const POOLS: [&str; 9] = [
    "training.steps=5",
    "checkpoint.interval=2",
    "checkpoint.keep_latest_k=1",
    "rlhf.ppo_mini_batch_size=3",
    "algorithm.type=\"ppo\"",
    "algorithm.reward.use_kl_in_reward=true",
    "placement.pools=[{ name = \"train\", ranks = 2 }, { name = \"judge\", ranks = 1 }, { name = \"generate\", ranks = 1 }]",
    "placement.roles={ critic = \"judge\", rollout = \"generate\" }",
    "rollout.sampling.max_tokens=6",
];
const RANKS: usize = 4;

/// A reward that ends the process named by a file beside it, once, when the run is past its second step: in the middle of
/// a step, with calls under way.
const REWARD: &str = r#"
import os, signal

HERE = os.path.dirname(os.path.abspath(__file__))

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    for victim, process in (("driver", os.getppid()), ("reward", os.getpid())):
        marker = os.path.join(HERE, victim)
        if os.path.exists(marker):
            with open(marker) as file:
                metrics = file.read().strip()
            if os.path.exists(metrics) and '"step":2' in open(metrics).read():
                os.remove(marker)
                os.kill(process, signal.SIGKILL)
    return sum(c in "abcdefghijklm" for c in solution_str) / 4
"#;

fn with_reward(job: &Job) -> String {
    std::fs::write(job.path("reward.py"), REWARD).unwrap();
    // The file's own part of the sum beside the job's regular expression.
    format!(
        "reward.parts=[{{ type = \"python\", path = {:?}, processes = 1, calls_in_flight = 1 }}, \
         {{ type = \"regex\", pattern = \"[a-m]\" }}]",
        job.path("reward.py")
    )
}

/// Tensor files of a role's checkpoint.
fn weights(run: &Path, role: &str, step: u64) -> Vec<(String, Vec<u8>)> {
    let folder = run.join(format!("checkpoint/{role}/step-{step:08}"));
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())).flatten();
    let mut files: Vec<(String, Vec<u8>)> = entries
        .filter(|entry| entry.path().extension().is_some_and(|x| x == "safetensors"))
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} holds no tensors", folder.display());
    files
}

fn assert_same_end(found: &Path, expected: &Path, steps: u64) {
    let (ours, theirs) = (metrics(found), metrics(expected));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    for step in 1..=steps {
        assert_eq!(of_learning(&ours[&step]), of_learning(&theirs[&step]), "{}, step {step}", found.display());
    }
    for role in ["policy", "critic"] {
        let what = format!("{role} of {}", found.display());
        assert_same_files(&weights(found, role, steps), &weights(expected, role, steps), &what);
    }
    let state = |run: &Path| std::fs::read(run.join(format!("checkpoint/driver-{steps:08}.json"))).unwrap();
    assert_eq!(state(found), state(expected));
}

fn restarting(job: &Job, name: &str, sets: &[&str]) -> Command {
    let mut command = command(job, name, RANKS, sets);
    command.args(["--max-restarts", "1", "--restart-backoff-ms", "50"]);
    command
}

#[test]
fn a_run_with_a_killed_process_of_any_role_ends_as_if_nothing_had_happened() {
    let job = job();
    let reward = with_reward(&job);
    let sets: Vec<&str> = POOLS.iter().copied().chain([reward.as_str()]).collect();
    let (code, said) = finish(&mut command(&job, "whole", RANKS, &sets));
    assert_eq!(code, Some(0), "{said}");
    let whole = job.path("whole");
    // A rank of each pool: as a step begins, in an update, and while a checkpoint is half written: the policy's part is there,
    // the critic's is not, and the one before must not be gone yet.
    for (fault, culprit) in [
        ("kill@3:0/update", "rank 0 (policy, reference) failed first in phase update of step 3"),
        ("kill@4:1/loss", "rank 1 (policy, reference) failed first in phase loss of step 4"),
        ("kill_in_save@4:2", "rank 2 (critic) failed first in phase save of step 4"),
        ("kill@3:3", "rank 3 (rollout) failed first at the beginning of step 3"),
    ] {
        let name = fault.replace(['@', ':', '/'], "-");
        let (code, said) = finish(restarting(&job, &name, &sets).env(env::FAULT, fault));
        assert_eq!(code, Some(0), "{fault}:\n{said}");
        assert!(said.contains(&format!("{culprit}: it was ended by SIGKILL")), "{fault}:\n{said}");
        let resumed = std::fs::read_to_string(job.path(&name).join("events.jsonl")).unwrap();
        assert!(resumed.contains("went on from the checkpoint of step 2"), "{fault}:\n{resumed}");
        assert_same_end(&job.path(&name), &whole, 5);
    }
    let (code, said) = finish_with(&job, restarting(&job, "no-driver", &sets), "driver", "no-driver");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("driver failed first after step 2: it was ended by SIGKILL"), "{said}");
    assert_same_end(&job.path("no-driver"), &whole, 5);
    // A process of the reward is started anew by its pool: nobody else notices.
    let (code, said) = finish_with(&job, command(&job, "no-reward", RANKS, &sets), "reward", "no-reward");
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("failed first"), "{said}");
    assert_same_end(&job.path("no-reward"), &whole, 5);
    let restarts =
        |run: &str| metrics(&job.path(run)).values().filter_map(|s| s.get("reward/python/restarts")).sum::<f64>();
    assert_eq!((restarts("whole"), restarts("no-reward")), (0.0, 1.0));
    for name in ["whole", "no-driver", "no-reward"] {
        assert_eq!(processes_of(&job.path(name)), Vec::<String>::new(), "{name}");
    }
}

/// Runs with an order to kill `victim` after the second step of the run `name`; that it was carried out is checked.
fn finish_with(job: &Job, mut command: Command, victim: &str, name: &str) -> (Option<i32>, String) {
    std::fs::write(job.path(victim), job.path(name).join("metrics.jsonl").display().to_string()).unwrap();
    let ended = finish(&mut command);
    assert!(!job.path(victim).exists(), "nobody killed the {victim}:\n{}", ended.1);
    ended
}
