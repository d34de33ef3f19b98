//! From a resolved job to a session: prompts, rewards and algorithm are opened first, for their errors are the
//! cheapest; then the driver listens, everybody meets, and the run goes on from where its newest checkpoint is.

use crate::clock::Clock;
use crate::collect::{Collector, CollectorParts};
use crate::course::Course;
use crate::error::{DriverError, Result};
use crate::judge::Judge;
use crate::prompts::{ChatRenderer, LoaderOptions, PromptLoader};
use crate::recipe::{self, Outcome};
use crate::reward::{RewardOptions, RewardPipeline};
use crate::session::{Checkpoints, Session, Stop};
use crate::state::{self, DriverState};
use crate::team::Team;
use crate::tracker::{Tracker, TrackerOptions};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tangelo_algo::Algorithm;
use tangelo_configs::{JobPlan, Plan, Role};
use tangelo_control::{Agent, Cluster, Deadlines, Driver, DriverOptions, Meeting, Placement, RolePlace};
use tangelo_core::FailureKind;
use tangelo_formats::chat::TemplateChoice;
use tangelo_formats::tokenizer::{self, TokenizerAssets};
use tangelo_observe::{ProgressEvent, ProgressWriter, stderr_line};

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
    /// How often the job was restarted.
    pub restart_count: usize,
}

/// What is opened before anybody is waited for.
struct Opened {
    algorithm: Box<dyn Algorithm>,
    loader: PromptLoader,
    rewards: RewardPipeline,
    tokenizer: TokenizerAssets,
    judge: Option<Judge>,
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

pub(crate) fn meeting(job: &JobPlan) -> Meeting {
    Meeting::new(&job.policy.config.job.dump_folder)
}

fn open(job: &JobPlan) -> Result<Opened> {
    let algorithm = tangelo_algo::algorithm(job.algorithm(), job.limits())?;
    let tokenizer = tokenizer_of(&job.policy)?;
    let judge = Judge::new(job, &tokenizer)?;
    let logs = job.policy.config.job.dump_folder.join("logs");
    let rewards = RewardPipeline::start(job.reward(), &RewardOptions { log_folder: Some(logs) })?;
    let renderer = Arc::new(ChatRenderer::new(tokenizer.clone(), template_choice(job))?);
    let options = LoaderOptions { need_ground_truth: rewards.needs_ground_truth() };
    let (loader, report) = PromptLoader::open(job.prompts(), options, renderer)?;
    stderr_line(&report);
    check_counts(job, report.num_train, report.num_validation)?;
    let fingerprint = format!("{:016x}", loader.fingerprint());
    Ok(Opened { algorithm, loader, rewards, tokenizer, judge, fingerprint })
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
    let mut found = tokenizer::load(&path).map_err(|e| DriverError::Prompts(e.to_string()))?;
    if let Some(path) = &plan.config.data.chat_template {
        let text = std::fs::read_to_string(path);
        found.chat_template = Some(text.map_err(|source| DriverError::Read { path: path.clone(), source })?);
    }
    Ok(found)
}

pub(crate) async fn listen(job: &JobPlan, options: &mut StartOptions) -> Result<Driver> {
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
    if options.num_nodes > 1 {
        let (stop, meeting) = (options.stop.clone(), meeting.clone());
        tokio::spawn(async move {
            meeting.until_asked_to_stop().await;
            stop.0.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
    options.progress.send(&ProgressEvent::Listening { address, secret_file: meeting.secret_file() });
    Ok(driver)
}

/// Verbs may take as long as the job says; generation and first steps are long.
fn deadlines(job: &JobPlan) -> Deadlines {
    let verb = Duration::from_secs(job.rlhf().verb_timeout_seconds);
    Deadlines { verb, admin: Duration::from_secs(30) }
}

/// The job's pools and roles.
pub(crate) fn placement(job: &JobPlan) -> Placement {
    let mut placement = Placement::default();
    for role in job.roles() {
        let (pool, ranks) = (job.pool(role), job.ranks(role));
        let place = RolePlace { pool: pool.clone(), ranks: ranks.len() };
        placement.pools.insert(pool, ranks.collect());
        placement.roles.insert(role.name().to_owned(), place);
    }
    placement
}

pub(crate) fn team(job: &JobPlan, cluster: &Cluster) -> Result<Team> {
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
    let config = &job.policy.config;
    let Opened { algorithm, loader, rewards, tokenizer, judge, fingerprint } = opened;
    let course = Course::new(job, algorithm);
    let team = team(job, &cluster)?;
    let fresh = DriverState {
        step: 0,
        position: 0,
        policy_version: 0,
        algorithm: course.algorithm.initial_state(),
        prompts_fingerprint: fingerprint,
        skipped: 0,
    };
    // A step asked for is where the job begins; a restart goes on from the newest.
    let asked = u64::try_from(config.checkpoint.load_step).ok().filter(|_| options.restart_count == 0);
    let state = match config.checkpoint.enable {
        true => resume(&team, &job.checkpoint_folder(), fresh, asked).await?,
        false => fresh,
    };
    keep_tokenizer(&tokenizer, &config.job.dump_folder, state.step > 0)?;
    let tracker = tracker(job, state.step, options.progress);
    let collector = Collector::new(CollectorParts {
        loader,
        rewards,
        tokenizer,
        judge,
        sampling: job.rollout().sampling.clone(),
        seed: config.debug.seed,
        prompts_per_step: job.rlhf().train_batch_size,
        settings: course.algorithm.settings().clone(),
    });
    Ok(Session {
        team,
        course,
        collector,
        tracker,
        state,
        steps: config.training.steps as u64,
        stop: options.stop,
        clock: Clock::default(),
        settings: job.rlhf().clone(),
        max_skipped: config.training.max_skipped as u64,
        least_groups: job.most_parts(),
        checkpoints: checkpoints(job),
        current_step: options.current_step,
    })
}

fn tracker(job: &JobPlan, resumed_from: u64, progress: ProgressWriter) -> Tracker {
    let config = &job.policy.config;
    Tracker::new(TrackerOptions {
        run_folder: &config.job.dump_folder,
        tensorboard: config.metrics.enable_tensorboard.then_some(config.metrics.save_tb_folder.as_path()),
        save_rollouts: job.rlhf().save_rollouts,
        report_samples: job.rlhf().report_samples,
        steps: config.training.steps as u64,
        resumed_from,
        progress,
    })
}

fn checkpoints(job: &JobPlan) -> Option<Checkpoints> {
    let config = &job.policy.config.checkpoint;
    config.enable.then(|| Checkpoints {
        folder: job.checkpoint_folder(),
        interval: config.interval as u64,
        keep: config.keep_latest_k,
        keep_every: config.keep_every as u64,
    })
}

/// Keeps the tokenizer in the run folder, so that a run can be moved and still be used. One that is there already is this
/// run's only where the run goes on.
fn keep_tokenizer(tokenizer: &TokenizerAssets, run: &Path, resumes: bool) -> Result<()> {
    if resumes && run.join("tokenizer.json").exists() {
        return Ok(());
    }
    let failed = |e: tangelo_formats::FormatError| DriverError::Prompts(format!("the tokenizer cannot be kept: {e}"));
    tokenizer.save(run).map_err(failed)
}

/// Where the run's newest checkpoint is that can be read, with every learner's part of it loaded. Older ones are taken where
/// newer ones are damaged, unless a step was asked for.
async fn resume(team: &Team, folder: &Path, fresh: DriverState, asked: Option<u64>) -> Result<DriverState> {
    let roles: Vec<&str> = team.learners().map(|group| group.role()).collect();
    let mut warn = |warning| stderr_line(format!("warning: {warning}"));
    let Some(mut found) = DriverState::find(folder, &roles, asked, &mut warn)? else { return Ok(fresh) };
    check_prompts(folder, &found, &fresh)?;
    loop {
        let step = found.step;
        team.cluster.begin_step(step);
        let Err(e) = team.restore(folder).await else { break };
        let mut older = DriverState::steps(folder)?.into_iter().filter(|&older| older < step);
        let older = older.find_map(|step| DriverState::complete(folder, &roles, step).ok());
        let is_damaged = e.kind() == FailureKind::Data && asked.is_none();
        let Some(older) = older.filter(|_| is_damaged) else { return Err(e) };
        warn(format!("the checkpoint of step {step} is not used, that of step {} is: {e}", older.step));
        found = older;
    }
    DriverState::forget_after(folder, found.step)?;
    team.publish(found.policy_version).await?;
    Ok(found)
}

fn check_prompts(folder: &Path, found: &DriverState, fresh: &DriverState) -> Result<()> {
    let (before, now) = (&found.prompts_fingerprint, &fresh.prompts_fingerprint);
    if before == now {
        return Ok(());
    }
    Err(DriverError::Checkpoint(format!(
        "{} was trained on other prompts (fingerprint {before}, now {now}): their order would silently differ. Restore \
         [prompts] and its files, or start a new run with another job.dump_folder",
        state::path(folder, found.step).display()
    )))
}
