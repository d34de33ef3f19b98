//! What can be done with a finished run of reinforcement learning: a recorded step done again, its policy taken elsewhere.

use crate::job::{Job, finish, tangelo};
use crate::rlhf::{job, metrics, of_learning, run};
use crate::support;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn replay(run: &Path, step: u64, more: &[&str]) -> (Option<i32>, String) {
    finish(tangelo(&["replay", &run.display().to_string(), "--step", &step.to_string(), "--quiet"]).args(more))
}

/// The bytes of every file of a run, but of its replays.
fn contents(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut folders, mut found) = (vec![run.to_owned()], BTreeMap::new());
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true if path != run.join("replay") => folders.push(path),
                true => {}
                false => _ = found.insert(path.clone(), std::fs::read(path).unwrap()),
            }
        }
    }
    found
}

#[test]
fn a_recorded_step_done_again_has_the_same_numbers() {
    let job = job();
    let ppo = ["algorithm.type=\"ppo\"", "algorithm.reward.use_kl_in_reward=true", "rlhf.ppo_mini_batch_size=3"];
    run(&job, "ppo", 2, &ppo);
    let folder = job.path("ppo");
    let before = contents(&folder);
    for step in [1, 3] {
        let (code, said) = replay(&folder, step, &[]);
        assert_eq!(code, Some(0), "step {step}:\n{said}");
        assert!(said.contains("24 completions") && said.contains("the step is the same, bit for bit"), "{said}");
        for name in ["actor/ppo_kl", "actor/loss", "actor/grad_norm", "critic/loss", "critic/rewards/mean"] {
            let line = said.lines().find(|line| line.starts_with(&format!("{name} ")));
            assert!(line.is_some_and(|line| line.ends_with("equal")), "{name}:\n{said}");
        }
    }
    assert_eq!(before.keys().collect::<Vec<_>>(), contents(&folder).keys().collect::<Vec<_>>());
    assert!(before == contents(&folder), "a replay changed the run");
    // A step that began without a checkpoint, and one that was never done.
    for (step, why) in [(2, "no checkpoint of step 1"), (9, "no rollouts")] {
        let (code, said) = replay(&folder, step, &[]);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(why) && said.contains("Steps that can be: 1, 3"), "{said}");
    }
    // From a step that is named, the run goes the same way again.
    let first = metrics(&folder);
    let again = run(&job, "ppo", 2, &[&ppo[..], &["checkpoint.load_step=2"]].concat());
    for step in 3..=4 {
        assert_eq!(of_learning(&again[&step]), of_learning(&first[&step]), "step {step}");
    }
    // What differs is said.
    let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let wrong = metrics.replace("\"actor/grad_norm\":", "\"actor/grad_norm\":1");
    std::fs::write(folder.join("metrics.jsonl"), wrong).unwrap();
    let (code, said) = replay(&folder, 3, &["--output", &job.path("elsewhere").display().to_string()]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("DIFFERS") && said.contains("the step is NOT the same"), "{said}");
    assert!(job.path("elsewhere/replay.json").is_file());
}

#[test]
fn a_step_whose_log_probabilities_were_computed_is_done_again_from_them() {
    let job = job();
    let sets = [
        "rlhf.old_logprobs=\"recompute\"",
        "rollout.dtype=\"bfloat16\"",
        "algorithm.type=\"grpo\"",
        "algorithm.policy.use_kl_loss=true",
        "training.steps=3",
        "placement.pools=[{ name = \"train\", ranks = 2 }, { name = \"generate\", ranks = 1 }]",
        "placement.roles={ rollout = \"generate\", reference = \"generate\" }",
    ];
    run(&job, "apart", 3, &sets);
    let (code, said) = replay(&job.path("apart"), 3, &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("rollout_corr/") && said.contains("bit for bit"), "{said}");
}

/// Ids that a model continues a prompt with, greedily, and the log-probabilities of a text.
fn answers(job: &Job, model: &Path) -> (Vec<u64>, String) {
    let model = model.display().to_string();
    let common = ["--device", "cpu", "--threads", "1"];
    let asked = ["generate", &model, "--prompt-ids", "51,43,52,61", "-n", "9", "--ignore-eos", "--json"];
    let (code, said) = finish(tangelo(&asked).args(common));
    assert_eq!(code, Some(0), "{said}");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
    let ids = said["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    let text = job.path("held-out.txt");
    std::fs::write(&text, "3+4=7 and 2+2=4\n".repeat(40)).unwrap();
    let (code, eval) =
        finish(tangelo(&["eval", &model, &text.display().to_string(), "--json", "--quiet"]).args(common));
    assert_eq!(code, Some(0), "{eval}");
    let eval: serde_json::Value = serde_json::from_str(&eval).unwrap_or_else(|e| panic!("{e}: {eval}"));
    (ids, eval["loss"].to_string())
}

#[test]
fn the_policy_is_found_in_the_run_and_loads_in_transformers() {
    let job = job();
    let sets = ["algorithm.type=\"ppo\"", "training.steps=2", "checkpoint.last_save_in_hf=true"];
    run(&job, "run", 2, &sets);
    let folder = job.path("run");
    assert!(folder.join("tokenizer.json").is_file(), "the tokenizer stays with the run");
    let expected = answers(&job, &folder);
    for place in ["checkpoint", "checkpoint/policy", "checkpoint/policy/step-00000002", "export"] {
        assert_eq!(answers(&job, &folder.join(place)), expected, "{place}");
    }
    // Exported at the end of the run, by hand from the run, and from the folder of its checkpoints.
    let exported = |name: &str| std::fs::read(job.path(name).join("model.safetensors")).unwrap();
    for (place, output) in [("", "by-hand"), ("checkpoint", "from-checkpoints")] {
        let asked = [folder.join(place), job.path(output)].map(|path| path.display().to_string());
        let (code, said) = finish(&mut tangelo(&["export", &asked[0], "--output", &asked[1], "--quiet"]));
        assert_eq!(code, Some(0), "{said}");
        assert!(!said.contains("warning"), "{said}");
        assert!(job.path(output).join("tokenizer.json").is_file());
        assert!(exported(output) == exported("run/export"), "{place}");
    }
    let critic = folder.join("checkpoint/critic").display().to_string();
    let (code, said) = finish(&mut tangelo(&["export", &critic, "-o", &job.path("critic").display().to_string()]));
    assert_eq!(code, Some(0), "{said}");
    let Some(python) = support::python() else { return };
    let text = |path: PathBuf| path.display().to_string();
    let ids = format!("{:?}", expected.0);
    support::run_script(&python, "rl_export.py", &[&text(folder.join("export")), &text(job.path("critic")), &ids]);
}
