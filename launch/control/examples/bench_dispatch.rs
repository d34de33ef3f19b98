//! Measures the control plane on one machine: an empty verb down the tree and back, batches from worker to worker, and
//! what of it goes through the driver. Prints a table; `docs/control.md` has one with its method.
//!
//! `cargo run --release -p tangelo-control --example bench_dispatch`

// A measurement that cannot run has nothing to say but why.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tangelo_control::verbs::mesh;
use tangelo_control::*;
use tangelo_core::batch::{per_sequence_i64, ragged_f32, ragged_u32};
use tangelo_core::{Batch, Column, LossSpec};

const RANKS_PER_AGENT: usize = 8;

fn options(num_nodes: usize, world_size: usize) -> DriverOptions {
    DriverOptions {
        job: "bench".into(),
        secret: Secret::generate().unwrap(),
        host: "127.0.0.1".into(),
        num_nodes,
        world_size,
        store_limit_bytes: 4 << 30,
        deadlines: Deadlines::default(),
    }
}

fn rank_options(rank: usize, role: &str, index: usize, size: usize) -> RankOptions {
    let seat = Seat { index, size, answers: true };
    let meshes = [mesh::TRAIN, mesh::GENERATE].map(|name| (name.to_owned(), seat));
    let seats = Seats::from([(role.to_owned(), BTreeMap::from(meshes))]);
    RankOptions { rank, seats, store_limit_bytes: 4 << 30 }
}

fn nothing(_: &Job, _: &Control) -> Result<Output, WorkerError> {
    Ok(Output::default())
}

/// Milliseconds of CPU that this process has used, all threads; Linux counts hundredths of seconds.
fn cpu_ms() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    let ticks = after_name.split_whitespace().skip(11).take(2).map(|field| field.parse::<f64>().unwrap());
    ticks.sum::<f64>() * 10.0
}

/// A job whose ranks do nothing: as tasks of their agent's, or each behind a socket of its own.
async fn idle_job(agents: usize, sockets: bool) -> Cluster {
    let world_size = agents * RANKS_PER_AGENT;
    let driver = Driver::listen(options(agents, world_size)).await.unwrap();
    for node in 0..agents {
        let member = driver.member(node);
        let of_node = node * RANKS_PER_AGENT..(node + 1) * RANKS_PER_AGENT;
        let options = of_node.map(|rank| rank_options(rank, "policy", rank, world_size));
        let (agent, ranks) = if sockets {
            let mut ranks = Vec::new();
            for options in options {
                ranks.push(Rank::start(&member, options).await.unwrap());
            }
            (Agent::start(&member).await.unwrap(), ranks)
        } else {
            Rank::simulated(&member, options.collect()).await.unwrap()
        };
        ranks.into_iter().for_each(|rank| drop(tokio::spawn(rank.run_as_task(nothing))));
        tokio::spawn(agent.run());
    }
    driver.assemble(Placement::colocated(&["policy"], world_size), Duration::from_secs(60)).await.unwrap()
}

/// Median, 90th percentile in milliseconds, and bytes through the driver per call.
async fn time_empty_verb(agents: usize, sockets: bool, calls: usize) {
    let cluster = idle_job(agents, sockets).await;
    let policy = cluster.group("policy").unwrap();
    for _ in 0..calls / 10 + 1 {
        policy.optim_step(0.0).await.unwrap();
    }
    let (before, cpu_before) = (cluster.traffic().total_bytes(), cpu_ms());
    let mut times_ms = Vec::new();
    for _ in 0..calls {
        let begin = Instant::now();
        policy.optim_step(0.0).await.unwrap();
        times_ms.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    times_ms.sort_by(f64::total_cmp);
    let bytes = (cluster.traffic().total_bytes() - before) / calls as u64;
    let cpu = (cpu_ms() - cpu_before) / calls as f64;
    let ranks = if sockets { "sockets" } else { "tasks" };
    let at = |part: f64| times_ms[((calls - 1) as f64 * part) as usize];
    println!(
        "| {agents} x {RANKS_PER_AGENT} | {ranks} | {calls} | {:.2} | {:.2} | {:.2} | {cpu:.2} | {bytes} |",
        times_ms[0],
        at(0.5),
        at(0.9)
    );
    cluster.shutdown().await.unwrap();
}

/// A rank that makes `rows` rows of `tokens` tokens and log-probabilities.
fn maker(tokens: usize) -> impl Worker + Send {
    move |job: &Job, _: &Control| {
        let rows = job.batch()?.num_sequences();
        let ids = ragged_u32(&vec![vec![7; tokens]; rows]);
        let logprobs = ragged_f32(&vec![vec![-1.0; tokens]; rows]);
        let columns = vec![(Column::Tokens, ids), (Column::RolloutLogprob, logprobs)];
        Ok(Output::columns(NewColumns::new(columns)?))
    }
}

/// One rank makes a batch, another pulls it; time of the pull with the call around it.
async fn time_pull(rows: usize, tokens: usize, repeats: usize) {
    let driver = Driver::listen(options(1, 2)).await.unwrap();
    let member = driver.member(0);
    tokio::spawn(Agent::start(&member).await.unwrap().run());
    let makes = Rank::start(&member, rank_options(0, "rollout", 0, 1)).await.unwrap();
    let pulls = Rank::start(&member, rank_options(1, "policy", 0, 1)).await.unwrap();
    let mut threads = vec![std::thread::spawn(move || makes.run(&mut maker(tokens)))];
    threads.push(std::thread::spawn(move || pulls.run(&mut nothing)));
    let placement = Placement::grouped(&[(&["rollout"], 1), (&["policy"], 1)]);
    let cluster = driver.assemble(placement, Duration::from_secs(60)).await.unwrap();
    let [rollout, policy] = ["rollout", "policy"].map(|role| cluster.group(role).unwrap());
    let prompts = Batch::from_columns(vec![
        (Column::Tokens, ragged_u32(&vec![vec![1]; rows])),
        (Column::GroupId, per_sequence_i64((0..rows as i64).collect())),
    ]);
    let handle = cluster.put(&prompts.unwrap()).unwrap();
    let batch = rollout.generate(&handle, &Sampling::default()).await.unwrap().batch.unwrap();
    let wanted = batch.narrow(&[Column::Tokens, Column::RolloutLogprob], &[]).unwrap();
    let request = Request::ForwardBackward { batch: wanted, loss: LossSpec::new(Vec::new()) };
    let (map, before) = (policy.mesh(mesh::TRAIN).unwrap(), cluster.traffic().total_bytes());
    let cpu_before = cpu_ms();
    let mut seconds = Vec::new();
    for _ in 0..repeats {
        let begin = Instant::now();
        policy.call(&map, Args::Same(request.clone())).await.unwrap();
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let (fastest, median) = (seconds[0], seconds[repeats / 2]);
    let bytes = (rows * tokens * 8) as f64;
    let (cpu, megabytes) = ((cpu_ms() - cpu_before) / repeats as f64, bytes / 1e6);
    let driver_bytes = (cluster.traffic().total_bytes() - before) / repeats as u64;
    println!(
        "| {rows} x {tokens} | {megabytes:.1} | {:.1} | {:.1} | {cpu:.1} | {:.2} | {:.2} | {driver_bytes} |",
        fastest * 1e3,
        median * 1e3,
        bytes / fastest / 1e9,
        bytes / median / 1e9
    );
    cluster.shutdown().await.unwrap();
    threads.into_iter().for_each(|thread| drop(thread.join().unwrap()));
}

#[tokio::main]
async fn main() {
    println!("An empty verb: dispatch to every rank and collection of every answer, ms");
    println!("| agents x ranks | ranks as | calls | fastest | median | 90 % | CPU of all | driver bytes |");
    println!("|---|---|---|---|---|---|---|---|");
    for (agents, sockets, calls) in
        [(1, false, 2000), (1, true, 1000), (16, false, 500), (16, true, 200), (128, false, 200), (128, true, 30)]
    {
        time_empty_verb(agents, sockets, calls).await;
    }
    println!("\nA batch of tokens and log-probabilities pulled by one rank from another");
    println!(
        "| rows x tokens | MB | fastest, ms | median, ms | CPU, ms | GB/s, fastest | GB/s, median | driver bytes |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (rows, tokens, repeats) in [(64, 128, 50), (1024, 1024, 20), (1024, 16384, 7)] {
        time_pull(rows, tokens, repeats).await;
    }
}
