//! A group of tensor ranks that generate together is told to stop by its driver, at any moment: both stop before the same
//! step, and go on to work together.

use super::harness::{Case, no_one_else_draws};
use crate::support;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tangelo_configs::{EngineConfig, SamplingParams};
use tangelo_control::verbs::mesh;
use tangelo_control::{
    Agent, Cause, Cluster, Deadlines, Driver, DriverOptions, Placement, Rank, RankOptions, RemoteBatch, Request,
    Sampling, Seat, Secret, WorkerGroup,
};
use tangelo_core::batch::{per_sequence_i64, ragged_u32};
use tangelo_core::{Batch, Column};
use tangelo_kernels::comm::{CommOptions, Communicator, local};
use tangelo_kernels::device;
use tangelo_planner::publish::GenerationLayout;
use tangelo_rollout::Engine;
use tangelo_trainer::init;
use tangelo_trainer::publish::generation_model;
use tangelo_trainer::rl::Generator;
use tch::{Device, Kind};

const PATIENCE: Duration = Duration::from_secs(60);
const STORE_BYTES: usize = 1 << 28;

/// One part of a small random model and its engine.
fn generator(case: &Case, comm: Communicator) -> Generator {
    let plan = case.plan();
    let layout = GenerationLayout::separate(2, 2).expect("a layout");
    let model = generation_model(None, &plan.model, &layout, comm.rank(), Kind::Float, Device::Cpu);
    let std = plan.model.initializer_range;
    no_one_else_draws(|| model.units().iter().for_each(|unit| init::from_seed(unit, case.seed(), std)));
    let options = EngineConfig { kv_memory_mib: 16, ..EngineConfig::default() };
    let engine = Engine::parallel(&model, &options, &[], None, comm).expect("an engine");
    Generator::new(model, engine, true, false)
}

/// Two ranks on threads, of which the first answers.
async fn start(case: &Case) -> (Cluster, Vec<std::thread::JoinHandle<()>>) {
    let driver = Driver::listen(DriverOptions {
        job: "test".into(),
        secret: Secret::generate().unwrap(),
        host: "127.0.0.1".into(),
        num_nodes: 1,
        world_size: 2,
        store_limit_bytes: STORE_BYTES,
        deadlines: Deadlines { verb: PATIENCE, admin: PATIENCE, ..Deadlines::default() },
    });
    let driver = driver.await.unwrap();
    tokio::spawn(Agent::start(&driver.member(0)).await.unwrap().run());
    let mut ranks = Vec::new();
    for (rank, comm) in local::group(2, &CommOptions::default()).into_iter().enumerate() {
        let seat = Seat { index: 0, size: 1, answers: rank == 0 };
        let seats = BTreeMap::from([("rollout".to_owned(), BTreeMap::from([(mesh::GENERATE.to_owned(), seat)]))]);
        let options = RankOptions { rank, seats, store_limit_bytes: STORE_BYTES };
        let started = Rank::start(&driver.member(0), options).await.unwrap();
        let case = case.clone();
        ranks.push(std::thread::spawn(move || {
            let mut generator = generator(&case, comm);
            let mut serve = move |job: &tangelo_control::Job, control: &tangelo_control::Control| match &job.request {
                Request::Generate { sampling, .. } => {
                    generator.generate(job.batch()?, sampling, control, job.context.answers)
                }
                other => panic!("{} is not asked here", other.name()),
            };
            started.run(&mut serve).expect("a rank ends well");
        }));
    }
    (driver.assemble(Placement::colocated(&["rollout"], 2), PATIENCE).await.unwrap(), ranks)
}

async fn tokens(cluster: &Cluster, rollout: &WorkerGroup, prompts: &RemoteBatch) -> Vec<u32> {
    let params = SamplingParams { n: 3, max_tokens: 8, ..SamplingParams::default() };
    let made = rollout.generate(prompts, &Sampling { params, seed: 5 }).await.expect("completions");
    let batch = made.batch.expect("rows of the rank that answers");
    let records = cluster.fetch(&batch, &[Column::Tokens]).await.expect("its tokens");
    Batch::new(records).expect("rows of tokens").u32_values(Column::Tokens).expect("the column")
}

async fn until_it_runs(rollout: &WorkerGroup) {
    let begin = Instant::now();
    while !rollout.health().await.unwrap().iter().all(|(_, health)| health.running.is_some()) {
        assert!(begin.elapsed() < PATIENCE, "generation did not begin");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_ends_generation_on_all_tensor_ranks_and_leaves_them_working() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let mut case = Case::parse("gqa", seed);
    case.set("model", &["max_position_embeddings=4096", "initializer_range=0.2"]);
    let (cluster, ranks) = start(&case).await;
    let rollout = cluster.group("rollout").unwrap();
    cluster.begin_step(1);
    let prompts = Batch::from_columns(vec![
        (Column::Tokens, ragged_u32(&[vec![1, 2, 3], vec![4], vec![5, 6]])),
        (Column::GroupId, per_sequence_i64(vec![0, 1, 2])),
    ]);
    let prompts = cluster.put(&prompts.unwrap()).unwrap();
    let expected = tokens(&cluster, &rollout, &prompts).await;
    for pause in 0..4 {
        let endless = SamplingParams { max_tokens: 4000, ignore_eos: true, ..SamplingParams::default() };
        let call = tokio::spawn({
            let (rollout, prompts) = (rollout.clone(), prompts.clone());
            async move { rollout.generate(&prompts, &Sampling { params: endless, seed: 1 }).await }
        });
        until_it_runs(&rollout).await;
        tokio::time::sleep(Duration::from_millis(7 * pause)).await;
        rollout.abort().await.unwrap();
        let error = call.await.unwrap().unwrap_err();
        // The rank that heard of it is named, not one that followed.
        assert_eq!(error.call().unwrap().failure.cause, Cause::Aborted, "{error}");
        assert_eq!(tokens(&cluster, &rollout, &prompts).await, expected, "after abort {pause}");
    }
    cluster.shutdown().await.unwrap();
    ranks.into_iter().for_each(|rank| rank.join().unwrap());
}
