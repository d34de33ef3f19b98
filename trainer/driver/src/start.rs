//! From a resolved job to a session: prompts, rewards and algorithm are opened first, for their errors are the
//! cheapest; then the driver listens, everybody meets, and the run goes on from where its newest checkpoint is.

use crate::clock::Clock;
use crate::collect::{Collector, CollectorParts};
use crate::error::{DriverError, Result};
use crate::prompts::{ChatRenderer, LoaderOptions, PromptLoader};
use crate::recipe::{self, Outcome};
use crate::reward::{RewardOptions, RewardPipeline};
use crate::session::{Checkpoints, Session, Stop};
use crate::state::{self, DriverState};
use crate::team::Team;
use crate::tracker::{Tracker, TrackerOptions};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tangelo_algo::Algorithm;
use tangelo_configs::{JobPlan, Plan, Role};
use tangelo_control::{Agent, Cluster, Deadlines, Driver, DriverOptions, Meeting, Placement, RolePlace};
use tangelo_core::hash::hash_bytes;
use tangelo_formats::chat::TemplateChoice;
use tangelo_formats::tokenizer::{self, TokenizerAssets};
use tangelo_observe::{ProgressEvent, ProgressWriter};

/// The most that the driver's own batches (prompts, rewards) may take.
const STORE_LIMIT_BYTES: usize = 2 << 30;

/// Where a driver runs, and whom it tells.
pub struct StartOptions {
    /// Name of the run.
    pub run_id: String,
    /// Name or address by which this node is reached.
    pub host: String,
    /// Nodes of the job; this is the first.
    pub num_nodes: usize,
    /// Where progress goes; the launcher waits for [`ProgressEvent::Listening`] on it.
    pub progress: ProgressWriter,
    /// Whether somebody asked to stop.
    pub stop: Stop,
    /// Where others see how far the run is.
    pub current_step: Arc<AtomicU64>,
}

/// What is opened before anybody is waited for.
struct Opened {
    algorithm: Box<dyn Algorithm>,
    loader: PromptLoader,
    rewards: RewardPipeline,
    tokenizer: TokenizerAssets,
    fingerprint: String,
}

/// Runs a job to its end.
///
/// # Errors
/// The first failure of anybody.
pub async fn run(job: &JobPlan, mut options: StartOptions) -> Result<Outcome> {
    options.progress.send(&ProgressEvent::Phase { name: "reading prompts".into() });
    let opened = open(job)?;
    let driver = listen(job, &mut options).await?;
    // The agent of this node lives in the driver's process. It ends with the connection to the driver.
    let agent = Agent::start(&driver.member(0)).await?;
    let agent = tokio::spawn(agent.run());
    options.progress.send(&ProgressEvent::Phase { name: "waiting for the ranks to build their models".into() });
    let patience = Duration::from_secs(job.policy.config.comm.init_timeout_seconds);
    let cluster = driver.assemble(placement(job), patience).await?;
    let mut session = session(job, cluster.clone(), opened, options).await?;
    let outcome = recipe::run(&mut session).await;
    drop(session);
    // Ranks end with the driver's connection; after a failure the launcher ends those that do not see it.
    meeting(job).close(outcome.is_ok());
    if outcome.is_ok() {
        cluster.shutdown().await?;
    }
    agent.abort();
    outcome
}

fn meeting(job: &JobPlan) -> Meeting {
    Meeting::new(&job.policy.config.job.dump_folder)
}

fn open(job: &JobPlan) -> Result<Opened> {
    let algorithm = tangelo_algo::algorithm(job.algorithm(), job.limits())?;
    let tokenizer = tokenizer_of(&job.policy)?;
    let logs = job.policy.config.job.dump_folder.join("logs");
    let rewards = RewardPipeline::start(job.reward(), &RewardOptions { log_folder: Some(logs) })?;
    let renderer = Arc::new(ChatRenderer::new(tokenizer.clone(), template_choice(job))?);
    let options = LoaderOptions { need_ground_truth: rewards.needs_ground_truth() };
    let (loader, report) = PromptLoader::open(job.prompts(), options, renderer)?;
    tangelo_observe::stderr_line(&report);
    check_counts(job, report.num_train, report.num_validation)?;
    let fingerprint = fingerprint(job, &loader)?;
    Ok(Opened { algorithm, loader, rewards, tokenizer, fingerprint })
}

/// Fewer prompts than a step asks would be asked several times in one batch, and fewer of the validation than ranks that
/// generate would leave some idle.
fn check_counts(job: &JobPlan, training: u64, validation: u64) -> Result<()> {
    let (asked, replicas) = (job.rlhf().train_batch_size, job.generation_replicas());
    if training < asked as u64 {
        return Err(DriverError::Prompts(format!(
            "there are {training} prompts to train on, fewer than a step asks (`rlhf.train_batch_size` = {asked}): some would \
             be asked twice at once; add prompts or lower it"
        )));
    }
    if (1..replicas as u64).contains(&validation) {
        return Err(DriverError::Prompts(format!(
            "the validation has {validation} prompts, but {replicas} ranks generate, each at least one; raise \
             `prompts.validation_size`, or set it to 0"
        )));
    }
    Ok(())
}

/// What the order of prompts is a function of.
fn fingerprint(job: &JobPlan, loader: &PromptLoader) -> Result<String> {
    let text = serde_json::to_vec(job.prompts()).map_err(|e| DriverError::Internal(e.to_string()))?;
    Ok(format!("{:016x}", hash_bytes(loader.len(), &text)))
}

/// Which chat template the job means.
pub(crate) fn template_choice(job: &JobPlan) -> TemplateChoice<'_> {
    let data = &job.policy.config.data;
    TemplateChoice { file: data.chat_template.as_deref(), name: data.chat_template_name.as_deref() }
}

pub(crate) fn tokenizer_of(plan: &Plan) -> Result<TokenizerAssets> {
    let path =
        plan.config.data.tokenizer_path().ok_or_else(|| {
            DriverError::Prompts("no tokenizer: set `data.tokenizer` or `model.hf_assets_path`".into())
        })?;
    tokenizer::load(&path).map_err(|e| DriverError::Prompts(e.to_string()))
}

async fn listen(job: &JobPlan, options: &mut StartOptions) -> Result<Driver> {
    let meeting = meeting(job);
    let secret = meeting.open()?;
    let driver = Driver::listen(DriverOptions {
        job: options.run_id.clone(),
        secret,
        host: options.host.clone(),
        num_nodes: options.num_nodes,
        world_size: job.world_size(),
        store_limit_bytes: STORE_LIMIT_BYTES,
        deadlines: deadlines(job),
    })
    .await?;
    let address = driver.address().to_owned();
    meeting.announce(&address)?;
    options.progress.send(&ProgressEvent::Listening { address, secret_file: meeting.secret_file() });
    Ok(driver)
}

/// Verbs may take as long as ranks may wait for one another at the start; generation and first steps are long.
fn deadlines(job: &JobPlan) -> Deadlines {
    let verb = Duration::from_secs(job.rlhf().verb_timeout_seconds);
    Deadlines { verb, admin: Duration::from_secs(30), by_verb: BTreeMap::new() }
}

/// The job's pools and roles.
fn placement(job: &JobPlan) -> Placement {
    let mut placement = Placement::default();
    for role in job.roles() {
        let (pool, ranks) = (job.pool(role), job.ranks(role));
        let place = RolePlace { pool: pool.clone(), ranks: ranks.len() };
        placement.pools.insert(pool, ranks.collect());
        placement.roles.insert(role.name().to_owned(), place);
    }
    placement
}

fn team(job: &JobPlan, cluster: &Cluster) -> Result<Team> {
    let group = |role: Role| cluster.group(role.name());
    let optional = |role: Role| job.has(role).then(|| group(role)).transpose();
    Ok(Team {
        cluster: cluster.clone(),
        policy: group(Role::Policy)?,
        rollout: group(Role::Rollout)?,
        reference: optional(Role::Reference)?,
        critic: optional(Role::Critic)?,
        reward_model: optional(Role::Reward)?,
        trusts_engine: job.trusts_engine(),
    })
}

async fn session(job: &JobPlan, cluster: Cluster, opened: Opened, options: StartOptions) -> Result<Session> {
    let plan = &job.policy;
    let config = &plan.config;
    let Opened { algorithm, loader, rewards, tokenizer, fingerprint } = opened;
    let team = team(job, &cluster)?;
    let folder = job.checkpoint_folder();
    let fresh = DriverState {
        step: 0,
        position: 0,
        policy_version: 0,
        algorithm: algorithm.initial_state(),
        prompts_fingerprint: fingerprint,
    };
    let state = match config.checkpoint.enable {
        true => resume(&team, &folder, fresh).await?,
        false => fresh,
    };
    let tensorboard = config.metrics.enable_tensorboard.then_some(config.metrics.save_tb_folder.as_path());
    let tracker = Tracker::new(TrackerOptions {
        run_folder: &config.job.dump_folder,
        tensorboard,
        save_rollouts: job.rlhf().save_rollouts,
        report_samples: job.rlhf().report_samples,
        steps: config.training.steps as u64,
        resumed_from: state.step,
        progress: options.progress,
    });
    let collector = Collector::new(CollectorParts {
        loader,
        rewards,
        tokenizer,
        sampling: job.rollout().sampling.clone(),
        seed: config.debug.seed,
        prompts_per_step: job.rlhf().train_batch_size,
        filter: job.algorithm().shared().filter_groups.clone(),
        least_groups: job.most_parts(),
    });
    let checkpoints = config.checkpoint.enable.then_some(Checkpoints {
        folder,
        interval: config.checkpoint.interval as u64,
        keep: config.checkpoint.keep_latest_k,
    });
    Ok(Session {
        team,
        algorithm,
        collector,
        tracker,
        state,
        steps: config.training.steps as u64,
        stop: options.stop,
        clock: Clock::default(),
        settings: job.rlhf().clone(),
        least_groups: job.most_parts(),
        temperature: job.rollout().sampling.temperature,
        schedule: plan.schedule(),
        critic_schedule: job.plan(Role::Critic).unwrap_or(plan).schedule(),
        checkpoints,
        current_step: options.current_step,
    })
}

/// Where the run's newest checkpoint is, with every learner's part of it loaded.
async fn resume(team: &Team, folder: &Path, fresh: DriverState) -> Result<DriverState> {
    let Some(&step) = DriverState::steps(folder)?.first() else { return Ok(fresh) };
    let found = DriverState::read(folder, step)?;
    if found.prompts_fingerprint != fresh.prompts_fingerprint {
        return Err(DriverError::Checkpoint(format!(
            "{} was trained on other prompts (fingerprint {}, now {}): their order would silently differ. Restore \
             [prompts] and its files, or start a new run with another job.dump_folder",
            state::path(folder, step).display(),
            found.prompts_fingerprint,
            fresh.prompts_fingerprint
        )));
    }
    team.cluster.begin_step(step);
    team.restore(folder).await?;
    team.publish(found.policy_version).await?;
    Ok(found)
}
