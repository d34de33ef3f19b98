//! A job in one process, and workers that do next to nothing.

use std::collections::BTreeMap;
use std::thread::JoinHandle;
use std::time::Duration;
use tangelo_control::verbs::mesh;
use tangelo_control::*;
use tangelo_core::batch::{per_sequence_i64, ragged_f32, ragged_u32};
use tangelo_core::{Batch, Column};

pub const PATIENCE: Duration = Duration::from_secs(20);
pub const STORE_BYTES: usize = 1 << 30;

/// One part of each batch per rank of the pool; all answer.
pub fn data_parallel(placement: &Placement, rank: usize) -> Seats {
    let mut seats = Seats::new();
    for (role, place) in &placement.roles {
        let Some(index) = placement.pools[&place.pool].iter().position(|&r| r == rank) else { continue };
        let seat = Seat { index, size: place.ranks, answers: true };
        let meshes = [mesh::TRAIN, mesh::GENERATE].map(|mesh| (mesh.to_owned(), seat));
        seats.insert(role.clone(), BTreeMap::from(meshes));
    }
    seats
}

pub type BoxedWorker = Box<dyn Worker + Send>;

/// A running job; `ranks_per_node` ranks on each node.
pub struct TestJob {
    pub cluster: Cluster,
    pub ranks: Vec<JoinHandle<Result<(), ControlError>>>,
    pub agents: Vec<tokio::task::JoinHandle<Result<(), ControlError>>>,
}

pub fn options(num_nodes: usize, world_size: usize) -> DriverOptions {
    DriverOptions {
        job: "test".into(),
        secret: Secret::generate().unwrap(),
        host: "127.0.0.1".into(),
        num_nodes,
        world_size,
        store_limit_bytes: STORE_BYTES,
        deadlines: Deadlines { verb: PATIENCE, admin: PATIENCE },
    }
}

impl TestJob {
    pub async fn start(
        placement: Placement,
        num_nodes: usize,
        seats: impl Fn(&Placement, usize) -> Seats,
        worker: impl Fn(usize) -> BoxedWorker,
    ) -> TestJob {
        let world_size: usize = placement.pools.values().map(Vec::len).sum();
        let driver = Driver::listen(options(num_nodes, world_size)).await.unwrap();
        let mut agents = Vec::new();
        for node in 0..num_nodes {
            let agent = Agent::start(&driver.member(node)).await.unwrap();
            agents.push(tokio::spawn(agent.run()));
        }
        let mut ranks = Vec::new();
        for rank in 0..world_size {
            let member = driver.member(rank * num_nodes / world_size);
            let seats = seats(&placement, rank);
            let options = RankOptions { rank, seats, store_limit_bytes: STORE_BYTES };
            let started = Rank::start(&member, options).await.unwrap();
            let mut worker = worker(rank);
            ranks.push(std::thread::spawn(move || started.run(&mut *worker)));
        }
        let cluster = driver.assemble(placement, PATIENCE).await.unwrap();
        TestJob { cluster, ranks, agents }
    }

    /// All ranks of one role on one node, split over data.
    pub async fn of(world_size: usize, worker: impl Fn(usize) -> BoxedWorker) -> TestJob {
        TestJob::start(Placement::colocated(&["policy"], world_size), 1, data_parallel, worker).await
    }

    pub fn policy(&self) -> WorkerGroup {
        self.cluster.group("policy").unwrap()
    }

    /// Ends the job and returns how each rank ended.
    pub async fn end(self) -> Vec<Result<(), ControlError>> {
        self.cluster.shutdown().await.unwrap();
        for agent in self.agents {
            agent.await.unwrap().unwrap();
        }
        self.ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    }
}

/// A worker from a closure.
pub fn worker(call: impl FnMut(&Job, &Control) -> Result<Output, WorkerError> + Send + 'static) -> BoxedWorker {
    Box::new(call)
}

/// Does what each verb says, with arithmetic in place of a model.
pub fn toy() -> BoxedWorker {
    worker(|job, _| match &job.request {
        Request::Generate { sampling, .. } => complete(job.batch()?, sampling.params.n, job.context.rank),
        Request::Forward { outputs, .. } => {
            let tokens = rows(job.batch()?, Column::Tokens);
            let made = outputs.iter().map(|&column| {
                let factor = column as u32 as f32;
                let values: Vec<Vec<f32>> =
                    tokens.iter().map(|row| row.iter().map(|&t| t as f32 * factor).collect()).collect();
                (column, ragged_f32(&values))
            });
            Ok(Output::columns(NewColumns::new(made.collect())?))
        }
        Request::ForwardBackward { .. } => {
            let batch = job.batch()?;
            let mut metrics = Metrics::default();
            let sum = batch.u32_values(Column::Tokens).unwrap().iter().sum::<u32>();
            metrics.add("loss", Reading::Mean { sum: f64::from(sum), weight: batch.num_tokens() as f64 });
            metrics.add("sequences", Reading::Sum(batch.num_sequences() as f64));
            Ok(Output::metrics(metrics))
        }
        Request::Publish { version } => {
            Ok(Output { detail: (*version + job.context.rank as u64).into(), ..Output::default() })
        }
        _ => Ok(Output::default()),
    })
}

/// `n` rows for each prompt: the prompt's tokens, then the number of the completion as many times.
fn complete(prompts: &Batch, n: usize, rank: usize) -> Result<Output, WorkerError> {
    let (tokens, groups) = (rows(prompts, Column::Tokens), prompts.i64_values(Column::GroupId).unwrap());
    let (mut completed, mut origins, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    for (row, prompt) in tokens.iter().enumerate() {
        for i in 1..=n {
            completed.push([prompt.clone(), vec![1000 * i as u32 + rank as u32; i]].concat());
            origins.push(row as u32);
            ids.push(groups[row]);
        }
    }
    let columns = vec![(Column::Tokens, ragged_u32(&completed)), (Column::GroupId, per_sequence_i64(ids))];
    Ok(Output::columns(NewColumns::with_origins(columns, origins)?))
}

/// Token rows of a batch.
pub fn rows(batch: &Batch, column: Column) -> Vec<Vec<u32>> {
    let values = batch.u32_values(column).unwrap();
    let mut rest = &values[..];
    let mut rows = Vec::new();
    for length in batch.row_lengths().unwrap() {
        let (row, more) = rest.split_at(length);
        rows.push(row.to_vec());
        rest = more;
    }
    rows
}

/// Prompts of different lengths; row i has group 10 + i and tokens i.
pub fn prompts(n: usize) -> Batch {
    let tokens: Vec<Vec<u32>> = (0..n).map(|i| vec![i as u32; i % 5 + 1]).collect();
    Batch::from_columns(vec![
        (Column::Tokens, ragged_u32(&tokens)),
        (Column::GroupId, per_sequence_i64((0..n as i64).map(|i| 10 + i).collect())),
    ])
    .unwrap()
}
