//! An `rlhf` job resolved: the plan of every role, and where it lives.

use super::check::{Sections, has};
use super::{OldLogprobs, PlacementConfig, Rlhf, Role, RoleModel, Roles, Rollout};
use crate::check::Found;
use crate::defaults::CRITIC_LR;
use crate::job::{ComputeType, DeviceChoice, JobConfig, JobType, Model, Parallelism};
use crate::model::HeadSpec;
use crate::resolve::resolve_role;
use crate::reward::RewardFunction;
use crate::{Algorithm, ConfigError, ModelAssets, Plan, Prompts, Resources, Reward};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use tangelo_core::Group;

/// A resolved `rlhf` job.
#[derive(Clone, Debug, PartialEq)]
pub struct JobPlan {
    /// The policy's plan; its configuration holds every section of the job.
    pub policy: Plan,
    others: BTreeMap<Role, Plan>,
    world_size: usize,
}

/// Fills in the sections of an `rlhf` job and looks for what is wrong with them; they are wrong where another job has them.
/// The number of ranks that the sections of every job are about: those of `role`; none where it has no ranks.
pub(crate) fn resolve_sections(
    found: &mut Found,
    config: &mut JobConfig,
    role: Role,
    resources: &Resources,
) -> Option<usize> {
    if config.job.kind != JobType::Rlhf {
        refuse_sections(found, config);
        return Some(resources.world_size);
    }
    fill_in(config, resources);
    let placement = filled(&config.placement);
    let roles = filled(&config.roles);
    let sections = Sections {
        rlhf: filled(&config.rlhf),
        rollout: filled(&config.rollout),
        placement,
        prompts: filled(&config.prompts),
        reward: filled(&config.reward),
        algorithm: filled(&config.algorithm),
        models: [(Role::Reference, &roles.reference), (Role::Critic, &roles.critic), (Role::Reward, &roles.reward)],
    };
    let is_placed = sections.find_wrong(found, config, resources.world_size);
    is_placed.then(|| placement.ranks_of(role, resources.world_size).1.len())
}

/// Every section is there, paths are absolute, and what depends on other keys has its value.
fn fill_in(config: &mut JobConfig, resources: &Resources) {
    let (rlhf, rollout) = (config.rlhf.get_or_insert_default(), config.rollout.get_or_insert_default());
    rlhf.validation.max_tokens.get_or_insert(rollout.sampling.max_tokens);
    config.placement.get_or_insert_default();
    let (prompts, reward) = (config.prompts.get_or_insert_default(), config.reward.get_or_insert_default());
    let (algorithm, roles) = (config.algorithm.get_or_insert_default(), config.roles.get_or_insert_default());
    resolve_paths(prompts, reward, roles, resources);
    if has(Role::Critic, algorithm, reward) {
        roles.critic.lr.get_or_insert(CRITIC_LR);
    }
}

fn refuse_sections(found: &mut Found, config: &JobConfig) {
    let present = [
        ("rlhf", config.rlhf.is_some()),
        ("algorithm", config.algorithm.is_some()),
        ("rollout", config.rollout.is_some()),
        ("prompts", config.prompts.is_some()),
        ("reward", config.reward.is_some()),
        ("roles", config.roles.is_some()),
        ("placement", config.placement.is_some()),
    ];
    let there: Vec<&str> = present.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
    found.require(there.is_empty(), || {
        format!(
            "`job.type` is not \"rlhf\", but the job has [{}]; set type = \"rlhf\" in [job], or remove the sections",
            there.join("], [")
        )
    });
}

fn resolve_paths(prompts: &mut Prompts, reward: &mut Reward, roles: &mut Roles, resources: &Resources) {
    for pattern in prompts.files.iter_mut().chain(&mut prompts.validation_files) {
        *pattern = resources.absolute_pattern(pattern);
    }
    for part in &mut reward.parts {
        if let RewardFunction::Python { path, .. } = &mut part.function {
            *path = resources.absolute(path);
        }
    }
    for role in [&mut roles.reference, &mut roles.critic, &mut roles.reward] {
        role.hf_assets_path.iter_mut().for_each(|path| *path = resources.absolute(path));
    }
}

/// What algorithms must know of generation.
pub(super) fn limits(rollout: &Rollout) -> crate::algorithm::Limits {
    let sampling = &rollout.sampling;
    crate::algorithm::Limits { max_response_tokens: sampling.max_tokens, samples_per_prompt: sampling.n }
}

/// A section that [`resolve_sections`] has filled in.
fn filled<T>(section: &Option<T>) -> &T {
    section.as_ref().unwrap_or_else(|| unreachable!("an rlhf job is resolved before it is planned"))
}

impl JobPlan {
    /// The roles of the job whose policy's plan is `policy`, in a job of `resources.world_size` ranks.
    ///
    /// # Errors
    /// A role whose degrees do not fit its pool, or whose model does not fit the policy's.
    pub fn new(policy: Plan, resources: &Resources, assets: &dyn ModelAssets) -> Result<JobPlan, ConfigError> {
        let mut job = JobPlan { policy, others: BTreeMap::new(), world_size: resources.world_size };
        let mut found = Found::default();
        for role in [Role::Reference, Role::Critic, Role::Reward] {
            if job.has(role) {
                let plan = found.take(job.role_plan(role, resources, assets))?;
                job.others.extend(plan.map(|plan| (role, plan)));
            }
        }
        job.check_shares(&mut found);
        found.result()?;
        Ok(job)
    }

    /// Every data-parallel part of a role has a prompt to work on: answers to one are never split.
    fn check_shares(&self, found: &mut Found) {
        let (rlhf, most) = (self.rlhf(), self.rlhf().train_batch_size);
        for (role, plan) in self.others.iter().chain([(&Role::Policy, &self.policy)]) {
            let learns = matches!(role, Role::Policy | Role::Critic) && rlhf.ppo_mini_batch_size > 0;
            let (key, prompts) = match learns {
                true => ("rlhf.ppo_mini_batch_size", rlhf.ppo_mini_batch_size),
                false => ("rlhf.train_batch_size", most),
            };
            let parts = plan.data_parallel_size;
            found.require(prompts >= parts, || {
                format!(
                    "`{key}` = {prompts} prompts for the {parts} data-parallel parts of the {role}: answers to a prompt stay \
                     together, so each part wants one at least; raise it to {parts}, or share the model over more ranks"
                )
            });
        }
        let replicas = self.generation_replicas();
        found.require(most >= replicas, || {
            format!(
                "`rlhf.train_batch_size` = {most} prompts for {replicas} ranks that generate by themselves: answers to a \
                 prompt stay together, so each wants one at least; raise it to {replicas}, or start fewer ranks"
            )
        });
    }

    /// Ranks, or groups of them, that generate with a whole model.
    pub fn generation_replicas(&self) -> usize {
        (self.ranks(Role::Rollout).len() / self.rollout().tensor_parallel_degree.max(1)).max(1)
    }

    /// Data-parallel parts of the role with the most.
    pub fn most_parts(&self) -> usize {
        let parts = self.others.values().chain([&self.policy]).map(|plan| plan.data_parallel_size);
        parts.max().unwrap_or(1)
    }

    /// The job that `config` asks for: its policy's plan, and all that [`JobPlan::new`] adds.
    ///
    /// # Errors
    /// Of the policy as [`resolve`](crate::resolve::resolve), else of the other roles; each with its place.
    pub fn resolve(config: JobConfig, resources: &Resources, assets: &dyn ModelAssets) -> Result<JobPlan, ConfigError> {
        let places = config.places.clone();
        let policy = crate::resolve::resolve(config, resources, assets)?;
        JobPlan::new(policy, resources, assets).map_err(|error| places.locate(error))
    }

    fn role_plan(&self, role: Role, resources: &Resources, assets: &dyn ModelAssets) -> Result<Plan, ConfigError> {
        let mut config = self.policy.config.clone();
        let own = self.role_model(role);
        if let Some(path) = &own.hf_assets_path {
            config.model = Model { hf_assets_path: Some(path.clone()), ..Model::default() };
            config.checkpoint.initial_load_path = Some(path.clone());
            config.checkpoint.initial_load_in_hf = true;
            // What a reward model reads is written in its own tokens, where it has a tokenizer.
            if role == Role::Reward && assets.vocab_size(path).is_ok() {
                config.data.tokenizer = Some(path.clone());
            }
        }
        if matches!(role, Role::Critic | Role::Reward) && config.model.head.is_none() {
            config.model.head = Some(HeadSpec::Scalar { bias: false });
        }
        if let Some(lr) = own.lr {
            config.optimizer.lr = lr;
        }
        config.parallelism = match &own.parallelism {
            Some(own) => own.clone(),
            None if self.shares_pool(role, Role::Policy) => config.parallelism,
            None => Parallelism::default(),
        };
        let plan = resolve_role(config, role, &Resources { world_size: self.world_size, ..resources.clone() }, assets);
        let plan = plan.map_err(|e| of_role(role, own.parallelism.is_some(), e))?;
        self.check_vocabulary(role, &plan, assets)?;
        Ok(plan)
    }

    /// Fails where a role reads other ids than the policy writes.
    fn check_vocabulary(&self, role: Role, plan: &Plan, assets: &dyn ModelAssets) -> Result<(), ConfigError> {
        let (policy, own) = (&self.policy.model, &plan.model);
        let paths = [&self.policy.config.model.hf_assets_path, &plan.config.model.hf_assets_path];
        let sizes = paths.map(|path| path.as_deref().and_then(|p| assets.vocab_size(p).ok()));
        let differs = matches!(sizes, [Some(a), Some(b)] if a != b);
        if role == Role::Reward && sizes[1].is_some() {
            return Ok(());
        }
        if policy.vocab_size <= own.vocab_size && !differs {
            return Ok(());
        }
        let told = |size: Option<usize>, model: usize| size.unwrap_or(model);
        Err(ConfigError::Values(vec![format!(
            "`roles.{role}.hf_assets_path`: its tokenizer has {} ids, the policy's {}: role {role} reads the policy's ids, \
             so both must share a tokenizer",
            told(sizes[1], own.vocab_size),
            told(sizes[0], policy.vocab_size)
        )]))
    }

    fn role_model(&self, role: Role) -> &RoleModel {
        let roles = filled(&self.policy.config.roles);
        match role {
            Role::Critic => &roles.critic,
            Role::Reward => &roles.reward,
            Role::Policy | Role::Rollout | Role::Reference => &roles.reference,
        }
    }

    /// The plan of a role that has a model of its own; generation has the policy's.
    pub fn plan(&self, role: Role) -> Option<&Plan> {
        match role {
            Role::Policy => Some(&self.policy),
            Role::Rollout => None,
            Role::Reference | Role::Critic | Role::Reward => self.others.get(&role),
        }
    }

    /// Whether the job has the role.
    pub fn has(&self, role: Role) -> bool {
        has(role, self.algorithm(), self.reward())
    }

    /// The roles of the job.
    pub fn roles(&self) -> Vec<Role> {
        Role::ALL.into_iter().filter(|&role| self.has(role)).collect()
    }

    /// The global ranks that a role lives on.
    pub fn ranks(&self, role: Role) -> Range<usize> {
        self.placement().ranks_of(role, self.world_size).1
    }

    /// The pool that a role lives on.
    pub fn pool(&self, role: Role) -> String {
        self.placement().ranks_of(role, self.world_size).0
    }

    /// Whether two roles live on the same ranks.
    pub fn shares_pool(&self, a: Role, b: Role) -> bool {
        self.pool(a) == self.pool(b)
    }

    /// Ranks of the job.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// `[rlhf]`
    pub fn rlhf(&self) -> &Rlhf {
        filled(&self.policy.config.rlhf)
    }

    /// `[rollout]`
    pub fn rollout(&self) -> &Rollout {
        filled(&self.policy.config.rollout)
    }

    /// `[algorithm]`
    pub fn algorithm(&self) -> &Algorithm {
        filled(&self.policy.config.algorithm)
    }

    /// `[prompts]`
    pub fn prompts(&self) -> &Prompts {
        filled(&self.policy.config.prompts)
    }

    /// `[reward]`
    pub fn reward(&self) -> &Reward {
        filled(&self.policy.config.reward)
    }

    /// `[placement]`
    pub fn placement(&self) -> &PlacementConfig {
        filled(&self.policy.config.placement)
    }

    /// What the algorithm must know of generation.
    pub fn limits(&self) -> crate::algorithm::Limits {
        limits(self.rollout())
    }

    /// Type of weights and activations in generation.
    pub fn rollout_dtype(&self) -> ComputeType {
        match self.rollout().dtype {
            ComputeType::Auto => self.policy.config.training.mixed_precision_param,
            given => given,
        }
    }

    /// Whether the engine's log-probabilities are taken for the trainer's.
    pub fn trusts_engine(&self) -> bool {
        match self.rlhf().old_logprobs {
            OldLogprobs::Auto => self.engine_is_exact().is_ok(),
            OldLogprobs::Rollout => true,
            OldLogprobs::Recompute => false,
        }
    }

    /// Whether the engine's log-probabilities are the trainer's to the bit, or why they are not.
    ///
    /// # Errors
    /// In words, what differs between generation and training.
    pub fn engine_is_exact(&self) -> Result<(), String> {
        let (training, topology) = (&self.policy.config.training, &self.policy.topology);
        let (tp, gen_tp) = (topology.size(Group::Tensor), self.rollout().tensor_parallel_degree);
        let sampling = &self.rollout().sampling;
        let reasons = [
            (training.device == DeviceChoice::Cuda, "kernels of a GPU depend on the batch".to_owned()),
            (
                self.rollout_dtype() != training.mixed_precision_param,
                format!(
                    "generation computes in {:?}, training in {:?}",
                    self.rollout_dtype(),
                    training.mixed_precision_param
                ),
            ),
            (tp != gen_tp, format!("training has {tp} tensor ranks, generation {gen_tp}")),
            (
                topology.size(Group::Ring) * topology.size(Group::Heads) > 1,
                "context parallelism sums in another order".to_owned(),
            ),
            (sampling.cuts_unlikely_tokens(), "top_k, top_p or min_p cut the distribution".to_owned()),
            (sampling.min_tokens > 0, "min_tokens keeps tokens that end a sample from being drawn".to_owned()),
        ];
        reasons.into_iter().find(|(differs, _)| *differs).map_or(Ok(()), |(_, reason)| Err(reason))
    }

    /// Where the run's checkpoints go; each role has a folder there.
    pub fn checkpoint_folder(&self) -> std::path::PathBuf {
        let config = &self.policy.config;
        config.job.dump_folder.join(&config.checkpoint.folder)
    }
}

/// Says of which role a plan cannot be made, by the keys that the role has them under.
fn of_role(role: Role, has_own_degrees: bool, error: ConfigError) -> ConfigError {
    let told = |message: String| {
        let message = match has_own_degrees {
            true => message.replace("`parallelism.", &format!("`roles.{role}.parallelism.")),
            false => message,
        };
        format!("role {role}: {message}")
    };
    match error {
        ConfigError::Values(messages) => ConfigError::Values(messages.into_iter().map(told).collect()),
        other => other,
    }
}

/// The folder of a role's checkpoints in the run's checkpoint folder.
pub fn role_folder(checkpoints: &Path, role: &str) -> std::path::PathBuf {
    checkpoints.join(role)
}
