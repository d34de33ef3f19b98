//! The commands that this binary does by itself, apart from `run`.

mod data;

pub use data::data;

use crate::cli::{CheckArgs, Cli, CompletionsArgs, ReportArgs, SchemaArgs};
use crate::error::LaunchError;
use crate::run::Terminal;
use clap::CommandFactory;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};
use tangelo_configs::job::JobType;
use tangelo_configs::{JobPlan, ModelAssets, ModelSpec, Plan, Resources, Role, SpecialTokens, resolve};
use tangelo_formats::Assets;
use tangelo_observe::files;
use tangelo_planner::check::section;

/// Prints, and lets a reader that stopped reading (`| head`) end the command quietly.
pub fn print(text: &str) -> Result<(), LaunchError> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(LaunchError::io("write to", "stdout")(e)),
        _ => Ok(()),
    }
}

/// Where a command of some minutes shows how far it is.
pub fn terminal(quiet: bool) -> Terminal {
    Terminal::new(quiet, Duration::from_secs(5))
}

/// `tangelo completions`
pub fn completions(arguments: &CompletionsArgs) -> Result<(), LaunchError> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "tangelo", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// `tangelo check`
pub fn check(arguments: &CheckArgs) -> Result<(), LaunchError> {
    let world_size = arguments.world_size.get();
    let local = arguments.nproc_per_node.map_or(MOST_RANKS_OF_A_NODE, usize::from).min(world_size);
    let config = resolve::load(&arguments.job, &arguments.set)?;
    let resources = Resources::of_this_machine(world_size, local)?;
    if config.job.kind == JobType::Rlhf {
        return check_roles(&JobPlan::resolve(config, &resources, &AssetsToCheck)?);
    }
    let plan = resolve::resolve(config, &resources, &AssetsToCheck)?;
    warn_of_tokenizer(&plan);
    print(&tangelo_planner::render_check(&plan))?;
    print(&first_conversations(&plan))?;
    schedule("schedule", &plan)
}

/// An `rlhf` job: what it costs, and the schedules of the roles that learn.
fn check_roles(job: &JobPlan) -> Result<(), LaunchError> {
    warn_of_tokenizer(&job.policy);
    print(&tangelo_planner::rlhf::render(job))?;
    // Files may not be there yet: `run` will complain of them.
    let prompts = match tangelo_driver::preview::first_prompt(job) {
        Ok(first) => first,
        Err(error) => format!("no prompt can be shown: {error}\n"),
    };
    print(&format!("\n{}", section("prompts", &prompts)))?;
    for role in job.roles().into_iter().filter(|role| matches!(role, Role::Policy | Role::Critic)) {
        let Some(plan) = tangelo_planner::rlhf::update_plan(job, role) else { continue };
        schedule(&format!("schedule of an update of the {role}"), &plan)?;
    }
    Ok(())
}

/// Proves that ranks understand each other, and says what they communicate.
fn schedule(title: &str, plan: &Plan) -> Result<(), LaunchError> {
    let begin = Instant::now();
    let proof = tangelo_planner::prove(plan).map_err(|mismatch| LaunchError::Internal(mismatch.to_string()))?;
    print(&tangelo_planner::render_schedule(title, plan, &proof, begin.elapsed()))
}

fn warn_of_tokenizer(plan: &Plan) {
    if let Some(path) = plan.config.data.tokenizer.as_deref().filter(|path| AssetsToCheck.may_lack(path)) {
        let shown = path.display();
        Terminal::new(false, Duration::ZERO).warn(&format!(
            "the tokenizer {shown} is not there: whether its ids fit the model's vocabulary was not checked; `tangelo \
             run` needs it"
        ));
    }
}

/// What a job that trains conversations would learn of the first of each source; why it cannot be said where files are
/// not there yet or wrong, which `run` will complain of.
fn first_conversations(plan: &Plan) -> String {
    match tangelo_data::preview(&plan.config) {
        Ok(all) if all.is_empty() => String::new(),
        Ok(all) => all.iter().map(|first| format!("\n{first}")).collect::<String>() + "\n",
        Err(error) => format!("\nno conversation can be shown: {error}\n\n"),
    }
}

/// Ranks of a node where it is not said.
const MOST_RANKS_OF_A_NODE: usize = 8;

/// What lies on the disk, but for a tokenizer: a plan can be looked at before its model is downloaded.
struct AssetsToCheck;

impl ModelAssets for AssetsToCheck {
    fn model_spec(&self, path: &Path) -> Result<ModelSpec, String> {
        Assets.model_spec(path)
    }

    fn vocab_size(&self, tokenizer: &Path) -> Result<usize, String> {
        Assets.vocab_size(tokenizer)
    }

    fn special_tokens(&self, tokenizer: &Path) -> Result<SpecialTokens, String> {
        Assets.special_tokens(tokenizer)
    }

    fn may_lack(&self, tokenizer: &Path) -> bool {
        !tokenizer.exists()
    }
}

/// `tangelo report`
pub fn report(arguments: &ReportArgs) -> Result<(), LaunchError> {
    let run = &arguments.run;
    if !run.join(files::CONFIG).is_file() && !run.join(files::METRICS).is_file() {
        return Err(LaunchError::Input(format!(
            "{} is not a run folder: it has neither {} nor {}; name the folder that `tangelo run` wrote \
             (job.dump_folder)",
            run.display(),
            files::CONFIG,
            files::METRICS
        )));
    }
    let path = arguments.output.clone().unwrap_or_else(|| run.join(files::REPORT));
    tangelo_observe::report::write_to(run, &path).map_err(LaunchError::io("write", &path))?;
    print(&format!("{}\n", path.display()))
}

/// `tangelo schema`
pub fn schema(arguments: &SchemaArgs) -> Result<(), LaunchError> {
    if !arguments.flavors {
        let schema = serde_json::to_string_pretty(&tangelo_configs::schema());
        return print(&(schema.map_err(|e| LaunchError::Internal(e.to_string()))? + "\n"));
    }
    let flavors = tangelo_configs::flavors()?;
    let width = flavors.iter().map(|f| f.name.len()).max().unwrap_or(0);
    let line = |f: &tangelo_configs::flavor::Flavor| {
        format!("{:<width$}  {:>7}  {}\n", f.name, crate::run::short_count(f.num_parameters as f64), f.description)
    };
    print(&flavors.iter().map(line).collect::<String>())
}
