//! One of two tensor ranks that generate together is told to stop, at any moment: both stop before the same step, and go on
//! to work together. Each rank has a driver of its own here, so that the other is never told.

use super::harness::{Case, no_one_else_draws};
use crate::support;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tangelo_configs::{EngineConfig, SamplingParams};
use tangelo_control::verbs::mesh;
use tangelo_control::{
    Agent, Cause, Cluster, Control, ControlError, Deadlines, Driver, DriverOptions, Job, Placement, Rank, RankOptions,
    RemoteBatch, Request, Sampling, Scored, Seat, Secret, WorkerGroup,
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

/// A rank on a thread, with its driver.
struct Side {
    cluster: Cluster,
    rollout: WorkerGroup,
    prompts: RemoteBatch,
    rank: std::thread::JoinHandle<()>,
}

impl Side {
    async fn start(case: &Case, comm: Communicator) -> Side {
        let driver = Driver::listen(DriverOptions {
            job: "test".into(),
            secret: Secret::generate().unwrap(),
            host: "127.0.0.1".into(),
            num_nodes: 1,
            world_size: 1,
            store_limit_bytes: STORE_BYTES,
            deadlines: Deadlines { verb: PATIENCE, admin: PATIENCE },
        });
        let driver = driver.await.unwrap();
        tokio::spawn(Agent::start(&driver.member(0)).await.unwrap().run());
        let seat = Seat { index: 0, size: 1, answers: true };
        let seats = BTreeMap::from([("rollout".to_owned(), BTreeMap::from([(mesh::GENERATE.to_owned(), seat)]))]);
        let options = RankOptions { rank: 0, seats, store_limit_bytes: STORE_BYTES };
        let started = Rank::start(&driver.member(0), options).await.unwrap();
        let case = case.clone();
        let rank = std::thread::spawn(move || {
            let mut generator = generator(&case, comm);
            let mut serve = move |job: &Job, control: &Control| match &job.request {
                Request::Generate { sampling, .. } => {
                    generator.generate(job.batch()?, sampling, control, job.context.answers)
                }
                other => panic!("{} is not asked here", other.name()),
            };
            started.run(&mut serve).expect("a rank ends well");
        });
        let cluster = driver.assemble(Placement::colocated(&["rollout"], 1), PATIENCE).await.unwrap();
        cluster.begin_step(1);
        let prompts = cluster.put(&prompts()).unwrap();
        Side { rollout: cluster.group("rollout").unwrap(), cluster, prompts, rank }
    }

    /// Asks for completions, and looks for what becomes of it later.
    fn generate(&self, sampling: &Sampling) -> tokio::task::JoinHandle<Result<Scored, ControlError>> {
        let (rollout, prompts, sampling) = (self.rollout.clone(), self.prompts.clone(), sampling.clone());
        tokio::spawn(async move { rollout.generate(&prompts, &sampling).await })
    }

    async fn tokens(&self, made: Scored) -> Vec<u32> {
        let batch = made.batch.expect("rows");
        let records = self.cluster.fetch(&batch, &[Column::Tokens]).await.expect("its tokens");
        Batch::new(records).expect("rows of tokens").u32_values(Column::Tokens).expect("the column")
    }

    async fn until_it_runs(&self) {
        let begin = Instant::now();
        while !self.rollout.health().await.unwrap().iter().all(|(_, health)| health.running.is_some()) {
            assert!(begin.elapsed() < PATIENCE, "generation did not begin");
        }
    }
}

fn prompts() -> Batch {
    Batch::from_columns(vec![
        (Column::Tokens, ragged_u32(&[vec![1, 2, 3], vec![4], vec![5, 6]])),
        (Column::GroupId, per_sequence_i64(vec![0, 1, 2])),
    ])
    .unwrap()
}

/// A few tokens of three samples: the same on both ranks.
async fn tokens(sides: &[Side; 2]) -> Vec<u32> {
    let params = SamplingParams { n: 3, max_tokens: 8, ..SamplingParams::default() };
    let calls = sides.each_ref().map(|side| side.generate(&Sampling { params: params.clone(), seed: 5 }));
    let mut found = Vec::new();
    for (side, call) in sides.iter().zip(calls) {
        found.push(side.tokens(call.await.unwrap().expect("completions")).await);
    }
    assert_eq!(found[0], found[1]);
    found.remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_of_one_tensor_rank_ends_generation_on_all_and_leaves_them_working() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let mut case = Case::parse("gqa", seed);
    case.set("model", &["max_position_embeddings=4096", "initializer_range=0.2"]);
    let options = CommOptions { timeout: Duration::from_secs(20), ..CommOptions::default() };
    let [first, second] = <[Communicator; 2]>::try_from(local::group(2, &options)).expect("two ranks");
    let (first, second) = tokio::join!(Side::start(&case, first), Side::start(&case, second));
    let sides = [first, second];
    let expected = tokens(&sides).await;
    for (told, pause) in [(0, 0), (1, 0), (0, 9), (1, 17)] {
        let params = SamplingParams { max_tokens: 4000, ignore_eos: true, ..SamplingParams::default() };
        let calls = sides.each_ref().map(|side| side.generate(&Sampling { params: params.clone(), seed: 1 }));
        sides[0].until_it_runs().await;
        sides[1].until_it_runs().await;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        sides[told].rollout.abort().await.unwrap();
        for (rank, call) in calls.into_iter().enumerate() {
            let error = call.await.unwrap().unwrap_err();
            let failure = &error.call().unwrap().failure;
            match rank == told {
                true => assert_eq!(failure.cause, Cause::Aborted, "{error}"),
                false => assert!(error.to_string().contains("another rank of its tensor group"), "{error}"),
            }
        }
        assert_eq!(tokens(&sides).await, expected, "after rank {told} was told");
    }
    for side in sides {
        side.cluster.shutdown().await.unwrap();
        side.rank.join().unwrap();
    }
}
