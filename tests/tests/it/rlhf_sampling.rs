//! What a step of reinforcement learning learns from: dynamic sampling, rewards that fail, and checkpoints that are gone on
//! from when something is wrong with them.

use crate::job::{Job, finish};
use crate::rlhf::{command, job, metrics, of_learning, run};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const GRPO: &str = "algorithm.type=\"grpo\"";
const FILTER: &str = "algorithm.filter_groups.enable=true";

/// Every message of the run's events.
fn events(run: &Path) -> String {
    std::fs::read_to_string(run.join("events.jsonl")).unwrap()
}

#[test]
fn groups_without_differences_are_replaced() {
    let job = job();
    // Every answer of this job has the reward 0 or 1: many groups of four are all right or all wrong.
    let steps =
        run(&job, "filtered", 1, &[GRPO, FILTER, "algorithm.filter_groups.max_num_gen_batches=40", "training.steps=3"]);
    let mut batches = 0.0;
    for step in 1..=3 {
        let values = &steps[&step];
        let number = |name: &str| values.get(name).copied().unwrap_or(0.0);
        assert_eq!(values["critic/groups/flat_ratio"], 0.0, "step {step}: {values:?}");
        // Six groups of four are learnt from; numbers of generation are of everything that was generated.
        let left_out = number("rollout/left_out/flat") + number("rollout/left_out/surplus");
        assert_eq!(24.0 + left_out, 24.0 * values["train/num_gen_batches"], "step {step}: {values:?}");
        let longest = 8.0 * (24.0 + left_out);
        let learnt = values["response_length/mean"] * 24.0;
        let generated = values["rollout/generated_tokens"];
        assert!(generated >= learnt && generated <= longest && (left_out == 0.0 || generated > learnt), "step {step}");
        batches += values["train/num_gen_batches"];
    }
    assert!(batches > 3.0, "no group was replaced, so nothing was tested: {steps:?}");
}

#[test]
fn the_reward_after_punishment_decides_where_it_is_asked_for() {
    let job = job();
    // Only the length of an answer makes a difference: its score is always 1.
    let always = "reward.parts=[{ type = \"regex\", pattern = \".*\" }]";
    let shaped = "algorithm.reward={ use_kl_in_reward = true, overlong_buffer = { enable = true, len = 7 } }";
    let sets = [GRPO, FILTER, always, shaped, "training.steps=1", "rlhf.val_before_train=false"];
    let (code, text) = finish(&mut command(
        &job,
        "score",
        1,
        &[&sets[..], &["algorithm.filter_groups.max_num_gen_batches=1"]].concat(),
    ));
    assert!(code == Some(3) && text.contains("0 of 6 groups differ"), "{code:?}: {text}");
    let by_final =
        ["algorithm.filter_groups.metric=\"seq_final_reward\"", "algorithm.filter_groups.max_num_gen_batches=40"];
    let steps = run(&job, "final", 1, &[&sets[..], &by_final].concat());
    assert!(steps[&1]["critic/rewards/max"] > steps[&1]["critic/rewards/min"], "{:?}", steps[&1]);
}

/// A reward that tells answers apart; where a file lies beside it, only those of the validation and of six batches.
const SOON_BLIND: &str = r#"
import os

FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "blind")
calls = 0

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    global calls
    calls += 1
    if calls > 5 + 6 * 24 and os.path.exists(FILE):
        return 1.0
    return float(sum(map(ord, solution_str)) % 5)
"#;

fn part(job: &Job, text: &str, more: &str) -> String {
    std::fs::write(job.path("reward.py"), text).unwrap();
    let path = job.path("reward.py").display().to_string();
    format!("reward.parts=[{{ type = \"python\", path = {path:?}, processes = 1{more} }}]")
}

/// Waits until `is_so`, while the run is under way.
fn wait(child: &mut Child, what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(120) && child.try_wait().unwrap().is_none(), "never {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_signal_ends_a_search_that_finds_nothing() {
    let job = job();
    let reward = part(&job, SOON_BLIND, "");
    let sets = [GRPO, FILTER, "algorithm.filter_groups.max_num_gen_batches=0", &reward, "training.steps=8"];
    let whole = run(&job, "whole", 1, &sets);
    // After six batches the policy cannot do better or worse, and the search for a group worth learning from has no end.
    std::fs::write(job.path("blind"), "").unwrap();
    let log = std::fs::File::create(job.path("log")).unwrap();
    let mut command = command(&job, "parts", 1, &sets);
    let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).stdin(Stdio::null()).spawn().unwrap();
    let parts = job.path("parts");
    let said = |text: &str| std::fs::read_to_string(job.path("log")).unwrap().contains(text);
    wait(&mut child, "a report", || said("after 9 batches; generating more"));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let status = child.wait().unwrap();
    let log = std::fs::read_to_string(job.path("log")).unwrap();
    // 128 and the signal's number: the same command goes on. The step is given up; the one before is saved, whole.
    assert!(status.code() == Some(130) && log.contains("stopped by a signal after step"), "{status}: {log}");
    let last = *metrics(&parts).keys().max().unwrap();
    assert!(last > 0 && parts.join(format!("checkpoint/driver-{last:08}.json")).is_file(), "step {last}: {log}");
    std::fs::remove_file(job.path("blind")).unwrap();
    let resumed = run(&job, "parts", 1, &sets);
    for step in last + 1..=8 {
        assert_eq!(of_learning(&resumed[&step]), of_learning(&whole[&step]), "step {step} after {last}");
    }
}

/// A reward that has no value for answers of which `fails` is true.
fn failing(job: &Job, fails: &str) -> String {
    let text = format!(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    if {fails}:\n        raise \
         ValueError('no judge today')\n    return float(sum(map(ord, solution_str)) % 5)\n"
    );
    part(job, &text, ", on_error = \"drop\"")
}

#[test]
fn a_run_goes_on_without_the_answers_that_have_no_reward() {
    let job = job();
    // Of some prompts all answers fail, of others some.
    let reward = failing(&job, "int(ground_truth) % 7 == 0 or sum(map(ord, solution_str)) % 4 == 0");
    let sets = [&*reward, "rlhf.train_batch_size=9", "rlhf.ppo_mini_batch_size=3", "training.steps=3"];
    let steps = run(&job, "dropped", 2, &sets);
    let total = |name: &str| (1..=3).map(|step| steps[&step].get(name).copied().unwrap_or(0.0)).sum::<f64>();
    assert!(total("rollout/left_out/no_reward") > 0.0, "{steps:?}");
    let counted = total("reward/python/failed");
    assert_eq!(counted, total("rollout/left_out/no_reward"));
    let events = events(&job.path("dropped"));
    assert!(events.contains("reward `python` had no value for") && events.contains("no judge today"), "{events}");
    // With no answer left the run says why.
    let sets = [&*failing(&job, "True"), "rlhf.val_before_train=false"];
    let (code, text) = finish(&mut command(&job, "nothing", 2, &sets));
    assert!(
        code == Some(3) && text.contains("no judge today") && text.contains("all 24 were left out"),
        "{code:?}: {text}"
    );
}

#[test]
fn a_damaged_checkpoint_is_stepped_over() {
    let job = job();
    let whole = run(&job, "whole", 1, &[]);
    let parts = job.path("parts");
    run(&job, "parts", 1, &[]);
    let newest = parts.join("checkpoint/policy/step-00000004");
    let shard = std::fs::read_dir(&newest).unwrap().flatten().map(|entry| entry.path());
    let shard = shard.into_iter().find(|path| path.extension().is_some_and(|x| x == "safetensors")).unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let (code, text) = finish(&mut command(&job, "parts", 1, &[]));
    assert!(
        code == Some(0) && text.contains("the checkpoint of step 4 is not used, that of step 2 is"),
        "{code:?}: {text}"
    );
    let again = metrics(&parts);
    for step in 3..=4 {
        assert_eq!(of_learning(&again[&step]), of_learning(&whole[&step]), "step {step}");
    }
    // What the order of samples follows from may not change.
    let (code, text) = finish(&mut command(&job, "parts", 1, &["debug.seed=7", "algorithm.type=\"rloo\""]));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("debug.seed") && text.contains("algorithm.type"), "{text}");
}

#[test]
fn numbers_of_a_step_have_the_names_that_are_documented() {
    let job = job();
    let steps = run(
        &job,
        "ppo",
        1,
        &["algorithm.type=\"ppo\"", "training.steps=2", "rlhf.critic_warmup=1", "checkpoint.interval=1"],
    );
    let names =
        |step: u64| -> BTreeMap<&str, f64> { steps[&step].iter().map(|(name, v)| (name.as_str(), *v)).collect() };
    let (first, second) = (names(1), names(2));
    for name in
        ["critic/lr", "timing_s/values", "timing_s/update_critic", "timing_s/save_checkpoint", "perf/time_per_step"]
    {
        assert!(first.contains_key(name), "no {name} in {first:?}");
    }
    for name in ["actor/lr", "actor/entropy", "timing_s/update_actor"] {
        // In the first step only the critic learns.
        assert!(!first.contains_key(name) && second.contains_key(name), "{name} in {first:?} or not in {second:?}");
    }
    // The engine is trusted, so there is no pass, and nothing to compare.
    for name in ["timing_s/old_log_prob", "timing_s/ref", "rollout_corr/kl", "training/rollout_probs_diff_max"] {
        assert!(!second.contains_key(name), "{name} in {second:?}");
    }
    assert_eq!(second["training/epoch"], 0.0);
    let documented = std::fs::read_to_string(crate::support::root().join("docs/metrics.md")).unwrap();
    for name in second.keys().filter(|name| !documented.contains(&format!("`{name}`"))) {
        let described = ["reward/", "val-core/"].iter().any(|begin| name.starts_with(begin));
        let known = |end: &str| {
            name.strip_suffix(end).is_some_and(|begin| documented.contains(&format!("`{begin}/{{mean,max,min}}`")))
        };
        assert!(
            described || ["/mean", "/max", "/min"].into_iter().any(known),
            "docs/metrics.md does not tell of `{name}`"
        );
    }
}
