//! Whole jobs of `job.type = "rlhf"`: what is filled in, and that all that is wrong is said at once, with its place.

use crate::{FakeAssets, machine};
use expect_test::{Expect, expect};
use tangelo_configs::resolve::load_str;
use tangelo_configs::{ConfigError, JobPlan, Role};

pub const JOB: &str = r#"[job]
type = "rlhf"
[model]
flavor = "debugmodel"
[data]
tokenizer = "tok"
[training]
seq_len = 128
steps = 40
[rlhf]
train_batch_size = 8
ppo_mini_batch_size = 4
[rollout.sampling]
n = 4
max_tokens = 16
[prompts]
generator = { type = "arithmetic" }
max_prompt_length = 96
[[reward.parts]]
type = "numeric"
"#;

pub fn plan(job: &str, sets: &[&str], ranks: usize) -> Result<JobPlan, ConfigError> {
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    let assets = FakeAssets::with_tokenizer("/job/tok", 300);
    JobPlan::resolve(load_str(job, "job.toml", &sets)?, &machine(ranks), &assets)
}

fn check(sets: &[&str], ranks: usize, expected: Expect) {
    expected.assert_eq(&plan(JOB, sets, ranks).expect_err("it is to be refused").to_string());
}

#[test]
fn what_would_harm_a_model_that_is_there_has_defaults_of_its_own() {
    let config = plan(JOB, &[], 1).unwrap().policy.config;
    let (o, s) = (&config.optimizer, &config.lr_scheduler);
    // verl's: actor.optim and val_kwargs.
    assert_eq!((o.lr, o.beta1, o.beta2, o.weight_decay), (1e-6, 0.9, 0.999, 0.01));
    assert_eq!((s.warmup_steps, s.decay_ratio, config.training.max_norm), (0, Some(0.0), 1.0));
    let validation = config.rlhf.as_ref().unwrap().validation.clone();
    assert_eq!((validation.temperature, validation.n, validation.max_tokens), (0.0, 1, Some(16)));
    assert_eq!(config.roles.unwrap().critic.lr, None, "grpo has no critic");
    let ppo = plan(JOB, &["algorithm.type=ppo"], 1).unwrap();
    assert_eq!(ppo.plan(Role::Critic).unwrap().config.optimizer.lr, 1e-5);
    assert_eq!(ppo.policy.config.optimizer.lr, 1e-6);
    // What is said wins, wherever it is said; what stays unsaid beside it does not change.
    let said =
        plan(JOB, &["optimizer.lr=3e-4", "rlhf.validation.n=1", "algorithm.type=ppo", "roles.critic.lr=2e-4"], 1);
    let said = said.unwrap();
    assert_eq!((said.policy.config.optimizer.lr, said.policy.config.optimizer.weight_decay), (3e-4, 0.01));
    assert_eq!(said.plan(Role::Critic).unwrap().config.optimizer.lr, 2e-4);
    assert_eq!(said.policy.config.rlhf.as_ref().unwrap().validation.temperature, 0.0);
    // The resolved file shows them, and gives the same job again.
    let written = ppo.policy.to_toml().unwrap();
    for line in ["lr = 0.000001", "lr = 0.00001", "weight_decay = 0.01", "warmup_steps = 0"] {
        assert!(written.contains(line), "no {line} in {written}");
    }
    assert_eq!(plan(&written, &[], 1).unwrap(), ppo);
    // Other kinds keep theirs.
    let text = "[model]\nflavor = 'debugmodel'\n[data]\ntokenizer = 'tok'\nsources = [{ paths = ['a'] }]\n";
    assert_eq!(load_str(text, "job.toml", &[]).unwrap().optimizer.lr, 8e-4);
    assert_eq!(load_str(text, "job.toml", &["job.type=sft".into()]).unwrap().optimizer.lr, 2e-5);
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let job = JOB
        .replace("train_batch_size = 8", "train_batch_size = 9\nmax_staleness = 1")
        .replace("max_tokens = 16", "max_tokens = 64\ntop_p = 1.5")
        .replace("type = \"numeric\"", "type = \"regex\"\npattern = \"\"")
        .replace("steps = 40", "steps = 0");
    let job = job
        + r#"
[algorithm]
type = "rloo"
[algorithm.policy]
clip_ratio_c = 0.5
[roles.critic]
lr = 1e-5
[placement]
pools = [{ name = "train", ranks = 2 }, { name = "gen", ranks = 1 }]
roles = { rollout = "gne" }
[parallelism]
tensor_parallel_degree = 0
[validation]
enable = true
"#;
    let error = plan(&job, &["rollout.sampling.n=1"], 2).expect_err("it is to be refused").to_string();
    expect![[r#"
        job.toml:13:1: `rlhf.ppo_mini_batch_size` = 4 does not divide `rlhf.train_batch_size` = 9: a step's batch falls into whole mini-batches; take a divisor, or 0 for one
        job.toml:12:1: `rlhf.max_staleness` = 1; only 0 is offered yet: rollouts of the policy that learns
        job.toml:17:1: `rollout.sampling.top_p` is 1.5; expected above 0 and at most 1 (1: off)
        job.toml:30:1: `roles.critic.lr` is set, but the job has no critic: only `algorithm.type` = "ppo" has one; remove the key
        job.toml:23:1: `reward.parts.0.pattern` is empty; set it, such as '\d+'
        job.toml:28:1: `algorithm.policy.clip_ratio_c` = 0.5; the dual clip's bound must be above 1, or 0 for none
        job.toml:26:1: `algorithm.type` = "rloo" compares the completions of one prompt, but there is 1 per prompt; generate at least 2
        job.toml:20:1: `prompts.max_prompt_length` 96 + `rollout.sampling.max_tokens` 64 = 160 tokens, above `training.seq_len` 128: a prompt with its answer must fit; raise seq_len or lower one of them
        job.toml:37:1: `validation.enable` is set, but `job.type` = "rlhf" does not read it: name the validation set by `prompts.validation_files` or `prompts.validation_size`, and how often by `rlhf.test_freq`
        job.toml:33:11: `placement.roles.rollout` = "gne", but there is no such pool; did you mean `gen`?
        job.toml:32:1: `placement.pools` have 3 ranks (train 2, gen 1), the job 2: start 3 ranks or change the pools
        job.toml:9:1: `training.steps` = 0; it must be from 1 to 1099511627776
        job.toml:35:1: `parallelism.tensor_parallel_degree` = 0; it must be from 1 to 1048576"#]].assert_eq(&error);
}

#[test]
fn roles_that_do_not_fit_their_pools_are_refused() {
    let pools = "placement.pools=[{ name = \"train\", ranks = 2 }, { name = \"judge\", ranks = 1 }]";
    check(
        &[pools],
        3,
        expect![[
            r#"--set placement.pools=[{ name = "train", ranks = 2 }, { name = "judge", ranks = 1 }]: `placement.pools.1`: pool `judge` would idle, for no role lives there: name one for it in `placement.roles`, or remove the pool"#
        ]],
    );
    check(
        &[pools, "placement.roles={ critic = \"judge\" }"],
        3,
        expect![[
            r#"--set placement.pools=[{ name = "train", ranks = 2 }, { name = "judge", ranks = 1 }]: `placement.pools.1`: pool `judge` would idle, for no role lives there: this job has no critic; put another role there, or remove the pool"#
        ]],
    );
    check(
        &["placement.roles={ rollout = \"gen\" }"],
        2,
        expect![[
            r#"--set placement.roles={ rollout = "gen" }: `placement.roles.rollout` = "gen", but `placement.pools` defines no pool; add { name = "gen", ranks = ... } to it"#
        ]],
    );
    check(
        &[pools, "placement.roles={ rollout = \"judge\" }"],
        4,
        expect![[
            r#"--set placement.pools=[{ name = "train", ranks = 2 }, { name = "judge", ranks = 1 }]: `placement.pools` have 3 ranks (train 2, judge 1), the job 4: start 3 ranks or change the pools"#
        ]],
    );
    check(
        &["placement.pools=[{ name = \"a\", ranks = 1 }, { name = \"a\", ranks = 1 }]"],
        2,
        expect![[
            r#"--set placement.pools=[{ name = "a", ranks = 1 }, { name = "a", ranks = 1 }]: `placement.pools.1.name` = "a"; another pool has that name: give each its own"#
        ]],
    );
    check(
        &["rollout.tensor_parallel_degree=2"],
        3,
        expect![
            "--set rollout.tensor_parallel_degree=2: `rollout.tensor_parallel_degree` = 2 does not divide the 3 ranks that generate: 3 / 2 leaves 1; choose a divisor of 3"
        ],
    );
    // A role's own degrees are named by its own keys.
    check(
        &[
            "algorithm.type=ppo",
            pools,
            "placement.roles={ critic = \"judge\" }",
            "roles.critic.parallelism={ tensor_parallel_degree = 2 }",
        ],
        3,
        expect![
            "--set roles.critic.parallelism={ tensor_parallel_degree = 2 }: role critic: `roles.critic.parallelism.tensor_parallel_degree` = 2 ranks do not divide the job's 1: 1 / 2 leaves 1; change a degree, or start a multiple of 2 ranks"
        ],
    );
}

#[test]
fn every_part_of_a_role_has_a_prompt_to_work_on() {
    check(
        &["rlhf.ppo_mini_batch_size=2"],
        4,
        expect![
            "--set rlhf.ppo_mini_batch_size=2: `rlhf.ppo_mini_batch_size` = 2 prompts for the 4 data-parallel parts of the policy: answers to a prompt stay together, so each part wants one at least; raise it to 4, or share the model over more ranks"
        ],
    );
    check(
        &["rlhf.ppo_mini_batch_size=0", "rlhf.train_batch_size=2"],
        4,
        expect![[r#"
        --set rlhf.train_batch_size=2: `rlhf.train_batch_size` = 2 prompts for the 4 data-parallel parts of the policy: answers to a prompt stay together, so each part wants one at least; raise it to 4, or share the model over more ranks
        --set rlhf.train_batch_size=2: `rlhf.train_batch_size` = 2 prompts for 4 ranks that generate by themselves: answers to a prompt stay together, so each wants one at least; raise it to 4, or start fewer ranks"#]],
    );
    check(
        &["prompts.generator={ type = \"arithmetic\", size = 5 }"],
        1,
        expect![[
            r#"--set prompts.generator={ type = "arithmetic", size = 5 }: `prompts.generator.size` = 5 is fewer than a step asks (`rlhf.train_batch_size` = 8): some would be asked twice at once; raise the one or lower the other"#
        ]],
    );
    assert!(plan(JOB, &["rlhf.ppo_mini_batch_size=4", "parallelism.tensor_parallel_degree=2"], 2).is_ok());
}

#[test]
fn keys_that_nobody_would_read_are_refused() {
    check(
        &["roles.reference.hf_assets_path=ref"],
        1,
        expect![
            "--set roles.reference.hf_assets_path=ref: `roles.reference.hf_assets_path` is set, but the job has no reference: neither `algorithm.policy.use_kl_loss` nor `algorithm.reward.use_kl_in_reward` is true; remove the key"
        ],
    );
    check(
        &["roles.reward.hf_assets_path=rm"],
        1,
        expect![[
            r#"--set roles.reward.hf_assets_path=rm: `roles.reward.hf_assets_path` is set, but the job has no reward: no part of `reward.parts` has type = "model"; remove the key"#
        ]],
    );
    check(
        &["reward.parts=[{ type = \"model\" }]"],
        1,
        expect![[
            r#"--set reward.parts=[{ type = "model" }]: a part of `reward.parts` has type = "model", but `roles.reward.hf_assets_path` names no reward model: name a folder with a sequence classifier"#
        ]],
    );
    check(
        &["reward.parts=[{ type = \"model\", role = \"judge\" }]", "roles.reward.hf_assets_path=rm"],
        1,
        expect![[
            r#"--set reward.parts=[{ type = "model", role = "judge" }]: `reward.parts.0.role` = "judge"; a job has one reward model, the role "reward" (`roles.reward`)"#
        ]],
    );
    check(
        &["rlhf.critic_warmup=3", "data.sources=[{ paths = [\"a\"] }]"],
        1,
        expect![[r#"
        --set rlhf.critic_warmup=3: `rlhf.critic_warmup` = 3, but only `algorithm.type` = "ppo" has a critic; remove the key
        --set data.sources=[{ paths = ["a"] }]: `data.sources` is set, but `job.type` = "rlhf" learns from answers to `prompts.files`; remove it"#]],
    );
    check(
        &["algorithm.type=grpo", "algorithm.policy.use_kl_loss=true", "roles.reference.lr=1e-6"],
        1,
        expect![
            "--set roles.reference.lr=1e-6: `roles.reference.lr` is set, but a reference never learns; remove the key"
        ],
    );
}
