//! Whole runs of reinforcement learning with a small random policy: driver, ranks, rewards, checkpoints.

use crate::job::{Job, finish, processes_of, tangelo};
use crate::support;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use tangelo_observe::NamedRecord;
use tangelo_observe::records::read_lines;

const JOB: &str = r#"
[job]
type = "rlhf"
[model]
name = "llama"
vocab_size = 320
hidden_size = 48
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 128
rope_theta = 10000.0
rms_norm_eps = 1e-5
tie_word_embeddings = true
[data]
tokenizer = "FOLDER/tokenizer.json"
[training]
device = "cpu"
mixed_precision_param = "float32"
num_threads = 1
seq_len = 96
steps = 4
[optimizer]
lr = 3e-3
weight_decay = 0.01
[lr_scheduler]
warmup_steps = 0
decay_ratio = 0.0
[checkpoint]
interval = 2
[rollout.sampling]
n = 4
max_tokens = 8
[rlhf]
train_batch_size = 6
ppo_mini_batch_size = 0
ppo_max_token_len_per_rank = 256
[prompts]
chat = false
generator = { type = "arithmetic", operators = ["+"], max = 9 }
max_prompt_length = 64
validation_size = 5
[[reward.parts]]
type = "regex"
pattern = "[a-m]"
"#;

/// A folder with a tokenizer and a job.
pub fn job() -> Job {
    let job = Job::new(support::fresh_seed());
    let text = JOB.replace("FOLDER", &job.path("").display().to_string());
    std::fs::write(job.path("rl.toml"), text).unwrap();
    job
}

pub fn command(job: &Job, run: &str, ranks: usize, sets: &[&str]) -> Command {
    let mut command = tangelo(&["run"]);
    command.arg(job.path("rl.toml")).args(["--nproc-per-node", &ranks.to_string()]);
    command.args(["--set", &format!("job.dump_folder={:?}", job.path(run).display().to_string())]);
    sets.iter().for_each(|set| _ = command.args(["--set", set]));
    command
}

/// Runs to a good end; the numbers of each step.
pub fn run(job: &Job, name: &str, ranks: usize, sets: &[&str]) -> BTreeMap<u64, BTreeMap<String, f64>> {
    let (code, text) = finish(&mut command(job, name, ranks, sets));
    assert_eq!(code, Some(0), "{name} with {ranks} ranks, {sets:?}:\n{text}");
    metrics(&job.path(name))
}

pub fn metrics(run: &Path) -> BTreeMap<u64, BTreeMap<String, f64>> {
    let mut steps: BTreeMap<u64, BTreeMap<String, f64>> = BTreeMap::new();
    for record in read_lines(&run.join("metrics.jsonl"), NamedRecord::from_json).unwrap() {
        steps.entry(record.step).or_default().extend(record.values);
    }
    steps
}

/// Numbers that do not tell of time, memory, bytes or processes.
pub fn of_learning(step: &BTreeMap<String, f64>) -> BTreeMap<&str, u64> {
    let learnt = |name: &str| {
        ["actor/", "critic/", "response_length/", "rollout_corr/", "reward/", "val-core/"]
            .iter()
            .any(|begin| name.starts_with(begin))
            && !name.ends_with("seconds")
            && !name.ends_with("restarts")
    };
    step.iter().filter(|(name, _)| learnt(name)).map(|(name, value)| (name.as_str(), value.to_bits())).collect()
}

#[test]
fn the_engines_log_probabilities_are_the_trainers() {
    let job = job();
    for dtype in ["float32", "bfloat16"] {
        let set = format!("training.mixed_precision_param={dtype:?}");
        let steps = run(&job, dtype, 1, &[&set]);
        assert_eq!(steps.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        for (step, values) in steps.iter().filter(|(step, _)| **step > 0) {
            // One update per batch, so the policy that is updated is the one that generated: every ratio is exactly 1.
            assert_eq!(values["actor/ppo_kl"], 0.0, "{dtype}, step {step}: {values:?}");
            assert_eq!(values["actor/pg_clipfrac"], 0.0, "{dtype}, step {step}");
            assert!(values["critic/score/mean"].is_finite());
            assert!(values["perf/mfu/actor"] > 0.0);
        }
        // What was learnt from: rows of every answer, with their advantages.
        assert!(job.path(dtype).join("rollouts/step-00000004.parquet").is_file());
    }
    // The pass that is left out finds the same, to the bit.
    let again = run(&job, "again", 1, &["rlhf.old_logprobs=\"recompute\""]);
    let first = metrics(&job.path("float32"));
    for step in 1..=4 {
        let (taken, computed) = (of_learning(&first[&step]), of_learning(&again[&step]));
        let differs = |(name, value): &(&&str, &u64)| computed.get(**name).is_some_and(|other| other != *value);
        assert_eq!(taken.iter().find(differs), None, "step {step}");
        assert_eq!(again[&step]["training/rollout_probs_diff_max"], 0.0, "step {step}: {:?}", again[&step]);
    }
}

/// Two ranks that generate together, in a job of the given training layout.
fn generating_together(job: &Job, name: &str, sets: &[&str]) -> BTreeMap<u64, BTreeMap<String, f64>> {
    run(job, name, 2, &[&["rollout.tensor_parallel_degree=2", "training.steps=3"], sets].concat())
}

#[test]
fn two_tensor_ranks_generate_what_two_tensor_ranks_train() {
    let job = job();
    let training = "parallelism.tensor_parallel_degree=2";
    for dtype in ["float32", "bfloat16"] {
        let dtype_set = format!("training.mixed_precision_param={dtype:?}");
        let taken = generating_together(&job, dtype, &[training, &dtype_set]);
        let again = format!("{dtype}-again");
        let computed = generating_together(&job, &again, &[training, &dtype_set, "rlhf.old_logprobs=\"recompute\""]);
        for step in 1..=3 {
            let (taken, computed) = (&taken[&step], &computed[&step]);
            assert_eq!(taken["actor/ppo_kl"], 0.0, "{dtype}, step {step}: {taken:?}");
            // The pass is left out, and finds the same to the bit where it is asked for.
            let time = "timing_s/old_log_prob";
            assert!(!taken.contains_key(time) && computed[time] > 0.0, "{dtype}, step {step}");
            assert_eq!(computed["training/rollout_probs_diff_max"], 0.0, "{dtype}, step {step}");
            for (name, value) in of_learning(taken) {
                assert!(of_learning(computed).get(name).is_none_or(|&other| other == value), "{dtype}, {step}: {name}");
            }
            assert_eq!(taken["reshard/received_bytes"], 0.0, "each rank generates with what it trains");
        }
    }
}

#[test]
fn two_tensor_ranks_generate_for_other_layouts() {
    let job = job();
    let data_parallel = generating_together(&job, "dp2", &[]);
    let apart = run(&job, "apart", 2, &["parallelism.tensor_parallel_degree=2", "training.steps=3"]);
    let pools = [
        "placement.pools=[{ name = \"train\", ranks = 1 }, { name = \"generate\", ranks = 2 }]",
        "placement.roles={ rollout = \"generate\" }",
        "rollout.tensor_parallel_degree=2",
        "training.steps=3",
    ];
    let own_ranks = run(&job, "pools", 3, &pools);
    for (name, steps) in
        [("dp2 to tp2", data_parallel), ("tp2 to whole", apart), ("one rank to two of their own", own_ranks)]
    {
        for (step, values) in steps.iter().filter(|(step, _)| **step > 0) {
            // Old log-probabilities are the trainer's: the ratio is 1, and the distance to the engine's is told.
            assert_eq!(values["actor/ppo_kl"], 0.0, "{name}, step {step}");
            let distance = values["training/rollout_probs_diff_max"];
            // Sums over ranks are grouped otherwise: fp32 rounding (6e-8) through two layers.
            assert!((0.0..1e-4).contains(&distance), "{name}, step {step}: {distance}");
            assert!(values["rollout/generated_tokens"] > 0.0);
        }
    }
}

#[test]
fn two_groups_of_tensor_ranks_generate_what_one_does() {
    let job = job();
    let sets = ["parallelism.tensor_parallel_degree=2", "rollout.tensor_parallel_degree=2", "training.steps=2"];
    let [one, two] = [("one", 2), ("two", 4)].map(|(name, ranks)| run(&job, name, ranks, &sets));
    for step in 1..=2 {
        assert_eq!(two[&step]["actor/ppo_kl"], 0.0, "step {step}");
        assert_eq!(two[&step]["reshard/received_bytes"], 0.0, "each rank generates with what it trains");
    }
    // Before the first update the weights are the same, so answers and rewards are.
    for name in ["response_length/mean", "critic/score/mean", "rollout/generated_tokens"] {
        assert_eq!(one[&1][name], two[&1][name], "{name}");
    }
}

#[test]
fn a_resumed_run_is_the_undisturbed_one() {
    let job = job();
    let sets = [
        "algorithm.type=\"ppo\"",
        "algorithm.reward.use_kl_in_reward=true",
        "algorithm.reward.kl_ctrl={ type = \"adaptive\", kl_coef = 0.05, target_kl = 1e-4, horizon = 100 }",
    ];
    let whole = run(&job, "whole", 2, &sets);
    run(&job, "parts", 2, &[&sets[..], &["training.steps=2", "lr_scheduler.total_steps=4"]].concat());
    let resumed = run(&job, "parts", 2, &[&sets[..], &["lr_scheduler.total_steps=4"]].concat());
    for step in 3..=4 {
        assert_eq!(of_learning(&resumed[&step]), of_learning(&whole[&step]), "step {step}");
    }
}

#[test]
fn roles_on_pools_of_their_own_learn_the_same() {
    let job = job();
    let together = run(&job, "together", 2, &["training.steps=2"]);
    let apart = run(
        &job,
        "apart",
        3,
        &[
            "training.steps=2",
            "placement.pools=[{ name = \"train\", ranks = 2 }, { name = \"generate\", ranks = 1 }]",
            "placement.roles={ rollout = \"generate\" }",
        ],
    );
    // The same prompts, seeds and weights: answers are the same, whoever draws them, and so is what is learnt from them and
    // then drawn by the policy that learnt.
    for step in 1..=2 {
        assert_eq!(of_learning(&together[&step]), of_learning(&apart[&step]), "step {step}");
    }
    assert!(together[&2]["actor/grad_norm"] > 0.0 && together[&1] != together[&2]);
    assert!(apart[&2]["reshard/received_bytes"] > 0.0);
    // Where training and generation want the same weights in the same type, nothing moves.
    assert!(together[&2]["reshard/shared_bytes"] > 0.0 && together[&2]["reshard/received_bytes"] == 0.0);
}

#[test]
fn a_killed_rank_is_named_and_nothing_is_left() {
    let job = job();
    // Alone, and in the middle of an answer that both ranks compute: drawing it takes most of a step.
    let together = ["rollout.tensor_parallel_degree=2", "rollout.sampling.max_tokens=32"];
    for (name, sets) in [("alone", &[][..]), ("together", &together)] {
        let folder = job.path(name);
        let mut child = under_way(&job, name, sets);
        kill(&folder, "rlhf", "RANK=1");
        let status = child.wait().unwrap();
        assert!(!status.success());
        let events = std::fs::read_to_string(folder.join("events.jsonl")).unwrap();
        assert!(events.contains("SIGKILL") && events.contains("rank 1 (policy, rollout) failed first"), "{events}");
        assert_eq!(processes_of(&folder), Vec::<String>::new());
    }
}

#[test]
fn a_signal_lets_the_step_finish_and_saves() {
    let job = job();
    let folder = job.path("stopped");
    let mut child = under_way(&job, "stopped", &[]);
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    let last = *metrics(&folder).keys().max().unwrap();
    assert!(folder.join(format!("checkpoint/driver-{last:08}.json")).is_file(), "step {last} was not saved");
    assert_eq!(processes_of(&folder), Vec::<String>::new());
    assert!(!folder.join(".job-secret").exists());
    let resumed = run(&job, "stopped", 2, &[&format!("training.steps={}", last + 1)]);
    assert!(resumed.contains_key(&(last + 1)), "{resumed:?}");
}

/// A long run on two ranks that has done a step.
fn under_way(job: &Job, name: &str, sets: &[&str]) -> std::process::Child {
    let mut child = command(job, name, 2, &[&["training.steps=2000"], sets].concat()).spawn().unwrap();
    let begin = std::time::Instant::now();
    while metrics_or_none(&job.path(name)) < 2 {
        assert!(begin.elapsed().as_secs() < 120 && child.try_wait().unwrap().is_none(), "no step was done");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    child
}

fn metrics_or_none(run: &Path) -> usize {
    if run.join("metrics.jsonl").is_file() { metrics(run).len() } else { 0 }
}

/// Kills the process of a run that has this verb and a variable of its environment.
pub fn kill(run: &Path, verb: &str, variable: &str) {
    let folder = run.display().to_string();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let words = |name: &str| {
            let bytes = std::fs::read(entry.path().join(name)).unwrap_or_default();
            bytes.split(|&b| b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect::<Vec<_>>()
        };
        let line = words("cmdline");
        let is_of_run = line.iter().any(|word| word == verb) && line.iter().any(|word| word.contains(&folder));
        if is_of_run && words("environ").iter().any(|word| word == variable) {
            assert!(Command::new("kill").arg("-9").arg(entry.file_name()).status().unwrap().success());
            return;
        }
    }
    panic!("no `{verb}` with {variable} is running");
}

#[test]
fn what_users_get_wrong_is_said() {
    let job = job();
    let check = |sets: &[&str], words: &[&str]| {
        let (code, text) = finish(&mut command(&job, "wrong", 2, sets));
        assert!(matches!(code, Some(2 | 3)), "{sets:?}: {code:?}\n{text}");
        words.iter().for_each(|word| assert!(text.contains(word), "{sets:?}: no {word:?} in\n{text}"));
    };
    check(&["placement.pools=[{ name = \"a\", ranks = 3 }]"], &["placement.pools", "3", "2"]);
    check(&["prompts.max_prompt_length=90"], &["prompts.max_prompt_length", "training.seq_len", "98"]);
    check(&["rlhf.ppo_mini_batch_size=4"], &["rlhf.ppo_mini_batch_size", "does not divide"]);
    check(&["rollout.tensor_parallel_degree=3"], &["`rollout.tensor_parallel_degree` = 3", "2 ranks"]);
    check(&["rlhf.max_staleness=1"], &["rlhf.max_staleness", "0"]);
    check(&["algorithm.type=\"rloo\"", "rollout.sampling.n=1"], &["rloo", "2"]);
    check(&["rlhf.train_batch=4"], &["rlhf.train_batch", "rlhf.train_batch_size"]);
    check(&["job.type=\"pretrain\""], &["[rlhf]", "type = \"rlhf\""]);
}
