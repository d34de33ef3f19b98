//! The worker: one rank of a job, or one verb that needs tensors.
//!
//! `tangelo` starts it; `tangelo-worker train CONFIG.toml` also works under torchrun and srun. Other verbs take one
//! JSON argument (tangelo_configs::requests). Tensors live on the device thread; this thread waits and reports.

use std::path::Path;
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tangelo_configs::resolve::{self, Resources};
use tangelo_configs::{JobPlan, Plan};
use tangelo_kernels::device::{DeviceThread, keep_freed_memory};
use tangelo_observe::stderr_line;
use tangelo_trainer::error::{Result, TrainError, is_out_of_memory};
use tangelo_trainer::process::{RankInfo, StopFlag, die_with_supervisor, report_error};
use tangelo_trainer::{recipe, verb};

const USAGE: &str = "usage: tangelo-worker train CONFIG.toml [--set table.key=value ...]
       tangelo-worker rlhf CONFIG.toml
       tangelo-worker generate|score|eval|export REQUEST.json-text
       tangelo-worker gpu-check
This program is started by `tangelo`; see `tangelo --help`.";

fn main() {
    die_with_supervisor();
    keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let step = Arc::new(AtomicU64::new(0));
    if let Err(e) = dispatch(&arguments, &step) {
        let rank = RankInfo::from_env().map_or(0, |info| info.rank);
        report_error(rank, step.load(Ordering::Relaxed), &e);
        exit(e.kind().exit_code().into());
    }
}

fn dispatch(arguments: &[String], step: &Arc<AtomicU64>) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["train", config, sets @ ..] => train(Path::new(config), sets, step),
        ["rlhf", config] => rlhf(Path::new(config)),
        ["generate", request] => on_device(parse(request)?, |r| verb::generate::run(&r)),
        ["score", request] => on_device(parse(request)?, |r| verb::score::run(&r)),
        ["eval", request] => on_device(parse(request)?, |r| verb::eval::run(&r)),
        ["gpu-check"] => on_device((), |()| verb::gpu_check::run()),
        ["export", request] => on_device(parse(request)?, |r| verb::export::run(&r)),
        _ => Err(TrainError::Config(USAGE.into())),
    }
}

fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| TrainError::Config(format!("the request is not understood: {e}\n{USAGE}")))
}

/// Runs `job` on a device thread of its own: a panic of libtorch becomes an error.
fn on_device<T: Send + 'static, R: Send + 'static>(
    input: T,
    job: impl FnOnce(T) -> Result<R> + Send + 'static,
) -> Result<R> {
    let thread = DeviceThread::spawn("device", || Ok::<(), TrainError>(()))?;
    thread.call(move |_| job(input))
}

fn train(config: &Path, sets: &[&str], step: &Arc<AtomicU64>) -> Result<()> {
    let info = RankInfo::from_env()?;
    let stop = StopFlag::install()?;
    let plan = load_plan(config, sets, &info)?;
    let (own_plan, own_step) = (plan.clone(), step.clone());
    let outcome = on_device(info, move |info| recipe::pretrain::run(&own_plan, &info, &stop, &own_step));
    let outcome = outcome.map_err(|e| explain(e, &plan))?;
    if outcome.stopped {
        stderr_line(format!("stopped by a signal after step {}; start the same command again to go on", outcome.step));
    }
    Ok(())
}

/// Serves the driver of a reinforcement-learning job. Calls and batches travel on a runtime beside the device thread.
fn rlhf(config: &Path) -> Result<()> {
    let info = RankInfo::from_env()?;
    let config_error = |e: tangelo_configs::ConfigError| TrainError::Config(e.to_string());
    let resources = Resources::of_this_machine(info.world_size, info.local_world_size).map_err(config_error)?;
    let assets = &tangelo_formats::Assets;
    let plan = load_plan(config, &[], &info)?;
    let job = JobPlan::new(plan, &resources, assets).map_err(config_error)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| TrainError::Internal(format!("cannot start the runtime for calls: {e}")))?;
    let handle = runtime.handle().clone();
    on_device((job, info), move |(job, info)| recipe::rlhf::run(&job, &info, &handle))
}

/// Out of memory: adds what was predicted.
fn explain(error: TrainError, plan: &Plan) -> TrainError {
    match error {
        TrainError::Device(message) if is_out_of_memory(&message) => {
            let predicted = tangelo_planner::memory::predict(plan).render(plan);
            TrainError::Device(format!("{message}\npredicted memory per rank:\n{predicted}"))
        }
        other => other,
    }
}

fn load_plan(config: &Path, sets: &[&str], info: &RankInfo) -> Result<Plan> {
    let sets: Vec<String> = sets.iter().filter(|s| **s != "--set").map(|s| (*s).to_owned()).collect();
    let config_error = |e: tangelo_configs::ConfigError| TrainError::Config(e.to_string());
    let job = resolve::load(config, &sets).map_err(config_error)?;
    let resources = Resources::of_this_machine(info.world_size, info.local_world_size).map_err(config_error)?;
    resolve::resolve(job, &resources, &tangelo_formats::Assets).map_err(config_error)
}
