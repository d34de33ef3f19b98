//! An `rlhf` job resolved: the plan of every role, and where it lives.

use super::{OldLogprobs, PlacementConfig, Rlhf, Role, RoleModel, Roles, Rollout, check};
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

/// Fills in the sections of an `rlhf` job and checks them; fails where another job has them. The number of ranks that the
/// sections of every job are about: those of `role`.
pub(crate) fn resolve_sections(
    config: &mut JobConfig,
    role: Role,
    resources: &Resources,
) -> Result<usize, ConfigError> {
    if config.job.kind != JobType::Rlhf {
        return refuse_sections(config).map(|()| resources.world_size);
    }
    let rlhf = config.rlhf.get_or_insert_default();
    let rollout = config.rollout.get_or_insert_default();
    let placement = config.placement.get_or_insert_default();
    let (prompts, reward) = (config.prompts.get_or_insert_default(), config.reward.get_or_insert_default());
    let (algorithm, roles) = (config.algorithm.get_or_insert_default(), config.roles.get_or_insert_default());
    check(rlhf, rollout, placement, resources.world_size)?;
    prompts.check()?;
    reward.check()?;
    resolve_paths(prompts, reward, roles, resources);
    let limits = limits(rollout);
    let wrong = algorithm.check(limits);
    if !wrong.is_empty() {
        return Err(ConfigError::Values(wrong));
    }
    check_lengths(config.training.seq_len, prompts, rollout)?;
    Ok(placement.ranks_of(role, resources.world_size).1.len())
}

fn refuse_sections(config: &JobConfig) -> Result<(), ConfigError> {
    let present = [
        ("rlhf", config.rlhf.is_some()),
        ("algorithm", config.algorithm.is_some()),
        ("rollout", config.rollout.is_some()),
        ("prompts", config.prompts.is_some()),
        ("reward", config.reward.is_some()),
        ("roles", config.roles.is_some()),
        ("placement", config.placement.is_some()),
    ];
    let found: Vec<&str> = present.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
    if found.is_empty() {
        return Ok(());
    }
    Err(ConfigError::Values(vec![format!(
        "`job.type` is not \"rlhf\", but the job has [{}]; set type = \"rlhf\" in [job], or remove the sections",
        found.join("], [")
    )]))
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

fn check_lengths(seq_len: usize, prompts: &Prompts, rollout: &Rollout) -> Result<(), ConfigError> {
    let (prompt, answer) = (prompts.max_prompt_length, rollout.sampling.max_tokens);
    if prompt + answer <= seq_len {
        return Ok(());
    }
    Err(ConfigError::Values(vec![format!(
        "`prompts.max_prompt_length` {prompt} + `rollout.sampling.max_tokens` {answer} = {} tokens, above \
         `training.seq_len` {seq_len}: a prompt with its answer must fit; raise seq_len or lower one of them",
        prompt + answer
    )]))
}

/// What algorithms must know of generation.
fn limits(rollout: &Rollout) -> crate::algorithm::Limits {
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
        for role in [Role::Reference, Role::Critic, Role::Reward] {
            if job.has(role) {
                let plan = job.role_plan(role, resources, assets)?;
                job.others.insert(role, plan);
            }
        }
        Ok(job)
    }

    fn role_plan(&self, role: Role, resources: &Resources, assets: &dyn ModelAssets) -> Result<Plan, ConfigError> {
        let mut config = self.policy.config.clone();
        let own = self.role_model(role);
        if let Some(path) = &own.hf_assets_path {
            config.model = Model { hf_assets_path: Some(path.clone()), ..Model::default() };
            config.checkpoint.initial_load_path = Some(path.clone());
            config.checkpoint.initial_load_in_hf = true;
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
        let plan = plan.map_err(|e| of_role(role, e))?;
        self.check_vocabulary(role, &plan, assets)?;
        Ok(plan)
    }

    /// Fails where a role reads other ids than the policy writes.
    fn check_vocabulary(&self, role: Role, plan: &Plan, assets: &dyn ModelAssets) -> Result<(), ConfigError> {
        let (policy, own) = (&self.policy.model, &plan.model);
        let paths = [&self.policy.config.model.hf_assets_path, &plan.config.model.hf_assets_path];
        let sizes = paths.map(|path| path.as_deref().and_then(|p| assets.vocab_size(p).ok()));
        let differs = matches!(sizes, [Some(a), Some(b)] if a != b);
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
        let algorithm = self.algorithm();
        match role {
            Role::Policy | Role::Rollout => true,
            Role::Reference => {
                let shared = algorithm.shared();
                shared.policy.use_kl_loss || shared.reward.use_kl_in_reward
            }
            Role::Critic => matches!(algorithm, Algorithm::Ppo(_)),
            Role::Reward => {
                self.reward().parts.iter().any(|part| matches!(part.function, RewardFunction::Model { .. }))
            }
        }
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
            (
                !self.rollout().sampling.is_untruncated(),
                "top_k, top_p, min_p or min_tokens cut the distribution".to_owned(),
            ),
        ];
        reasons.into_iter().find(|(differs, _)| *differs).map_or(Ok(()), |(_, reason)| Err(reason))
    }

    /// Where the run's checkpoints go; each role has a folder there.
    pub fn checkpoint_folder(&self) -> std::path::PathBuf {
        let config = &self.policy.config;
        config.job.dump_folder.join(&config.checkpoint.folder)
    }
}

/// Says of which role a plan cannot be made.
fn of_role(role: Role, error: ConfigError) -> ConfigError {
    match error {
        ConfigError::Values(messages) => {
            ConfigError::Values(messages.into_iter().map(|message| format!("role {role}: {message}")).collect())
        }
        other => other,
    }
}

/// The folder of a role's checkpoints.
pub fn role_folder(checkpoints: &Path, role: Role) -> std::path::PathBuf {
    checkpoints.join(role.name())
}
