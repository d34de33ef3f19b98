//! Rules on the sections of an `rlhf` job, each alone and together. All that is wrong is found at once.

use super::{OldLogprobs, PlacementConfig, Rlhf, Role, RoleModel, Rollout, limits};
use crate::algorithm::ImportanceLevel;
use crate::check::Found;
use crate::job::{Data, JobConfig, Metrics};
use crate::nearest;
use crate::reward::RewardFunction;
use crate::{Algorithm, Prompts, Reward};
use std::collections::BTreeSet;

/// The sections, filled in.
pub(super) struct Sections<'a> {
    pub rlhf: &'a Rlhf,
    pub rollout: &'a Rollout,
    pub placement: &'a PlacementConfig,
    pub prompts: &'a Prompts,
    pub reward: &'a Reward,
    pub algorithm: &'a Algorithm,
    /// By role.
    pub models: [(Role, &'a RoleModel); 3],
}

/// Whether a job of this algorithm and reward has the role.
pub(super) fn has(role: Role, algorithm: &Algorithm, reward: &Reward) -> bool {
    match role {
        Role::Policy | Role::Rollout => true,
        Role::Reference => algorithm.needs_reference(),
        Role::Critic => algorithm.needs_critic(),
        Role::Reward => reward.parts.iter().any(|part| matches!(part.function, RewardFunction::Model { .. })),
    }
}

impl Sections<'_> {
    fn has(&self, role: Role) -> bool {
        has(role, self.algorithm, self.reward)
    }

    /// Everything that is wrong, and whether every role has ranks.
    pub(super) fn find_wrong(&self, found: &mut Found, config: &JobConfig, world_size: usize) -> bool {
        self.of_loop(found);
        self.of_generation(found);
        self.of_roles(found);
        self.prompts.find_wrong(found);
        self.reward.find_wrong(found);
        found.add(self.algorithm.check(limits(self.rollout)));
        self.lengths(found, config.training.seq_len);
        not_read(found, config);
        self.placed(found, world_size)
    }

    fn of_loop(&self, found: &mut Found) {
        let rlhf = self.rlhf;
        found.within("rlhf.train_batch_size", rlhf.train_batch_size, 1, 1 << 24);
        let mini = rlhf.ppo_mini_batch_size;
        found.require(mini == 0 || rlhf.train_batch_size.is_multiple_of(mini), || {
            format!(
                "`rlhf.ppo_mini_batch_size` = {mini} does not divide `rlhf.train_batch_size` = {}: a step's batch falls \
                 into whole mini-batches; take a divisor, or 0 for one",
                rlhf.train_batch_size
            )
        });
        let tasks = self.prompts.generator.as_ref().map_or(usize::MAX, |generator| generator.size());
        found.require(rlhf.train_batch_size <= tasks, || {
            format!(
                "`prompts.generator.size` = {tasks} is fewer than a step asks (`rlhf.train_batch_size` = {}): some would be \
                 asked twice at once; raise the one or lower the other",
                rlhf.train_batch_size
            )
        });
        found.within("rlhf.ppo_epochs", rlhf.ppo_epochs, 1, 1 << 10);
        found.within("rlhf.ppo_max_token_len_per_rank", rlhf.ppo_max_token_len_per_rank, 1, 1 << 30);
        found.require(rlhf.max_staleness == 0, || {
            format!(
                "`rlhf.max_staleness` = {}; only 0 is offered yet: rollouts of the policy that learns",
                rlhf.max_staleness
            )
        });
        found.require(rlhf.verb_timeout_seconds > 0, || {
            "`rlhf.verb_timeout_seconds` = 0: every call would be late; expected 1 or more".into()
        });
        found.require(rlhf.val_pass_reward.is_finite(), || {
            format!("`rlhf.val_pass_reward` = {} is reached by no answer; expected a number", rlhf.val_pass_reward)
        });
        found.require(rlhf.critic_warmup == 0 || self.has(Role::Critic), || {
            format!(
                "`rlhf.critic_warmup` = {}, but only `algorithm.type` = \"ppo\" has a critic; remove the key",
                rlhf.critic_warmup
            )
        });
        found.add(rlhf.validation.over(&self.rollout.sampling).problems("rlhf.validation"));
        self.correction(found);
    }

    /// Weights would correct for a distance that nobody measures.
    fn correction(&self, found: &mut Found) {
        let corrects = self.algorithm.shared().rollout_correction.rollout_is != ImportanceLevel::None;
        found.require(!corrects || self.rlhf.old_logprobs != OldLogprobs::Rollout, || {
            "`algorithm.rollout_correction.rollout_is` weighs by the trainer's log-probabilities over the engine's, but \
             `rlhf.old_logprobs` = \"rollout\" takes the engine's for both, so that every weight is 1; set it to \
             \"recompute\" or \"auto\", or rollout_is to \"none\""
                .into()
        });
    }

    fn of_generation(&self, found: &mut Found) {
        let rollout = self.rollout;
        found.within("rollout.update_weights_bucket_mb", rollout.update_weights_bucket_mb, 1, 1 << 20);
        found.within("rollout.tensor_parallel_degree", rollout.tensor_parallel_degree, 1, 1 << 10);
        found.require(rollout.sampling.temperature > 0.0, || {
            "`rollout.sampling.temperature` = 0: greedy completions of a prompt are all the same and teach nothing; set \
             1.0"
                .into()
        });
        found.add(rollout.sampling.problems("rollout.sampling"));
        found.add(rollout.engine.problems("rollout.engine"));
    }

    /// What is said of models that nobody would load, and what must be said of those that are.
    fn of_roles(&self, found: &mut Found) {
        for (role, model) in self.models {
            let why = match role {
                Role::Critic => "only `algorithm.type` = \"ppo\" has one",
                Role::Reward => "no part of `reward.parts` has type = \"model\"",
                _ => "neither `algorithm.policy.use_kl_loss` nor `algorithm.reward.use_kl_in_reward` is true",
            };
            let set = [
                ("hf_assets_path", model.hf_assets_path.is_some()),
                ("parallelism", model.parallelism.is_some()),
                ("lr", model.lr.is_some()),
            ];
            for (key, _) in set.iter().filter(|(_, is_set)| *is_set && !self.has(role)) {
                found.require(false, || {
                    format!("`roles.{role}.{key}` is set, but the job has no {role}: {why}; remove the key")
                });
            }
            found.require(role == Role::Critic || model.lr.is_none(), || {
                format!("`roles.{role}.lr` is set, but a {role} never learns; remove the key")
            });
            if let Some(lr) = model.lr {
                found.not_negative(&format!("roles.{role}.lr"), lr);
            }
            let judges = role == Role::Reward && self.has(role);
            found.require(!judges || model.hf_assets_path.is_some(), || {
                "a part of `reward.parts` has type = \"model\", but `roles.reward.hf_assets_path` names no reward model: \
                 name a folder with a sequence classifier"
                    .into()
            });
        }
    }

    fn lengths(&self, found: &mut Found, seq_len: usize) {
        let (prompt, sampling) = (self.prompts.max_prompt_length, &self.rollout.sampling);
        let answers = [
            ("rollout.sampling.max_tokens", sampling.max_tokens),
            ("rlhf.validation.max_tokens", self.rlhf.validation.over(sampling).max_tokens),
        ];
        let too_long = answers.into_iter().find(|(_, answer)| prompt.saturating_add(*answer) > seq_len);
        if let Some((key, answer)) = too_long {
            let sum = prompt.saturating_add(answer);
            found.require(false, || {
                format!(
                    "`prompts.max_prompt_length` {prompt} + `{key}` {answer} = {sum} tokens, above `training.seq_len` \
                     {seq_len}: a prompt with its answer must fit; raise seq_len or lower one of them"
                )
            });
        }
    }

    /// Pools and the roles on them. False where a role has no ranks.
    fn placed(&self, found: &mut Found, world_size: usize) -> bool {
        let (pools, mut wrong) = (&self.placement.pools, Found::default());
        let names: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
        for (role, pool) in Role::ALL.into_iter().filter_map(|role| Some((role, self.placement.roles.get(role)?))) {
            wrong.require(names.contains(&pool.as_str()), || no_pool(role, pool, &names));
        }
        let mut seen = BTreeSet::new();
        for (index, pool) in pools.iter().enumerate() {
            let key = format!("placement.pools.{index}");
            wrong.at_least(&format!("{key}.ranks"), pool.ranks, 1);
            wrong.require(seen.insert(&pool.name), || {
                format!("`{key}.name` = \"{}\"; another pool has that name: give each its own", pool.name)
            });
        }
        let total = pools.iter().fold(0, |sum: usize, pool| sum.saturating_add(pool.ranks));
        wrong.require(pools.is_empty() || total == world_size, || {
            let sizes: Vec<String> = pools.iter().map(|p| format!("{} {}", p.name, p.ranks)).collect();
            format!(
                "`placement.pools` have {total} ranks ({}), the job {world_size}: start {total} ranks or change the pools",
                sizes.join(", ")
            )
        });
        let is_sound = wrong.is_empty();
        if is_sound {
            self.filled_pools(&mut wrong, world_size);
        }
        found.add(wrong.into_messages());
        is_sound
    }

    /// Every pool has a role of this job, and generation divides its pool.
    fn filled_pools(&self, found: &mut Found, world_size: usize) {
        let ranks_of = |role| self.placement.ranks_of(role, world_size);
        let used: Vec<String> = Role::ALL.into_iter().filter(|&r| self.has(r)).map(|role| ranks_of(role).0).collect();
        for (index, pool) in self.placement.pools.iter().enumerate().filter(|(_, pool)| !used.contains(&pool.name)) {
            let named: Vec<&str> = Role::ALL
                .into_iter()
                .filter(|&role| self.placement.roles.get(role) == Some(&pool.name))
                .map(Role::name)
                .collect();
            let why = match named.as_slice() {
                [] => "name one for it in `placement.roles`, or remove the pool".to_owned(),
                roles => {
                    format!("this job has no {}; put another role there, or remove the pool", roles.join(" and no "))
                }
            };
            found.require(false, || {
                format!("`placement.pools.{index}`: pool `{}` would idle, for no role lives there: {why}", pool.name)
            });
        }
        let (degree, ranks) = (self.rollout.tensor_parallel_degree, ranks_of(Role::Rollout).1.len());
        found.require(degree == 0 || ranks.is_multiple_of(degree), || {
            format!(
                "`rollout.tensor_parallel_degree` = {degree} does not divide the {ranks} ranks that generate: {ranks} / \
                 {degree} leaves {}; choose a divisor of {ranks}",
                ranks % degree
            )
        });
    }
}

fn no_pool(role: Role, pool: &str, names: &[&str]) -> String {
    let key = format!("`placement.roles.{role}` = \"{pool}\"");
    match (names, nearest(pool, names.iter().copied())) {
        ([], _) => {
            format!("{key}, but `placement.pools` defines no pool; add {{ name = \"{pool}\", ranks = ... }} to it")
        }
        (_, Some(near)) => format!("{key}, but there is no such pool; did you mean `{near}`?"),
        (names, None) => format!("{key}, but there is no such pool; pools are {}", names.join(", ")),
    }
}

/// Keys of other kinds of job that a user could take for these ones'.
fn not_read(found: &mut Found, config: &JobConfig) {
    let validation = &config.validation;
    let set = [
        ("validation.enable", validation.enable),
        ("validation.sources", !validation.sources.is_empty()),
        ("validation.prompts", !validation.prompts.is_empty()),
        ("validation.sample_tokens", validation.sample_tokens > 0),
    ];
    for (key, _) in set.iter().filter(|(_, is_set)| *is_set) {
        found.require(false, || {
            format!(
                "`{key}` is set, but `job.type` = \"rlhf\" does not read it: name the validation set by \
                 `prompts.validation_files` or `prompts.validation_size`, and how often by `rlhf.test_freq`"
            )
        });
    }
    let (data, default) = (&config.data, Data::default());
    let set = [
        ("data.train_tokenizer_vocab", data.train_tokenizer_vocab != default.train_tokenizer_vocab),
        ("data.document_mask", data.document_mask != default.document_mask),
        ("data.validation_fraction", data.validation_fraction != default.validation_fraction),
        ("data.shard_tokens", data.shard_tokens != default.shard_tokens),
    ];
    for (key, _) in set.iter().filter(|(_, is_set)| *is_set) {
        found.require(false, || {
            format!(
                "`{key}` is set, but `job.type` = \"rlhf\" does not read it: prompts are not tokenised to shards; remove it"
            )
        });
    }
    found.require(config.metrics.log_freq == Metrics::default().log_freq, || {
        "`metrics.log_freq` is set, but `job.type` = \"rlhf\" does not read it: every step of theirs is recorded; remove it"
            .into()
    });
    found.require(config.data.sources.is_empty(), || {
        "`data.sources` is set, but `job.type` = \"rlhf\" learns from answers to `prompts.files`; remove it".into()
    });
}
