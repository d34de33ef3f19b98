//! Tokens/s of ours and of PyTorch's DDP and FSDP2 over Gloo, one thread a rank, on the same cores.
//!
//! The sides take turns within a round. One and two ranks are pinned to a core each, so every rank is a process of its
//! own: ours a launcher for each, as on several nodes. Four ranks share the two cores.

use super::super::inputs::{Inputs, LOCAL_BATCH_SIZE, SEQ_LEN, last_json, step_seconds};
use super::super::table::{Row, column, counted, median, records};
use super::Options;
use super::ranks::run_together;
use anyhow::{Context, Result};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

const RANKS: [usize; 3] = [1, 2, 4];
/// The first two of the machine.
const CORES: usize = 2;
/// As Tangelo and the peers' script call them.
const TYPES: [(&str, &str); 2] = [("float32", "fp32"), ("bfloat16", "bf16")];

/// How model states lie on the ranks.
#[derive(Clone, Copy)]
enum Sharding {
    /// Every rank has all of them.
    Replicated,
    /// Every rank has a part of weights, gradients and optimizer states.
    Sharded,
}

/// What both sides train in a turn.
#[derive(Clone, Copy)]
struct Case {
    ranks: usize,
    /// Tangelo's and the script's name of the type.
    dtype: (&'static str, &'static str),
    sharding: Sharding,
}

impl Case {
    fn all() -> Vec<Case> {
        let mut cases = Vec::new();
        for ranks in RANKS {
            for dtype in TYPES {
                cases.extend([Sharding::Replicated, Sharding::Sharded].map(|sharding| Case { ranks, dtype, sharding }));
            }
        }
        cases
    }

    fn names(&self) -> [String; 2] {
        let (ours, theirs) = match self.sharding {
            Sharding::Replicated => ("tangelo data parallel", if self.ranks == 1 { "torch" } else { "torch DDP" }),
            Sharding::Sharded => ("tangelo ZeRO", "torch FSDP2"),
        };
        let ranks = if self.ranks == 1 { "1 rank".to_owned() } else { format!("{} ranks", self.ranks) };
        [ours, theirs].map(|side| format!("{side}, {ranks}, {}", self.dtype.1))
    }

    /// What the peers' script puts around the model.
    fn wrapper(&self) -> &'static str {
        match self.sharding {
            Sharding::Replicated if self.ranks == 1 => "none",
            Sharding::Replicated => "ddp",
            Sharding::Sharded => "fsdp2",
        }
    }

    fn settings(&self) -> Vec<String> {
        let keys: &[&str] = match self.sharding {
            Sharding::Replicated => &["data_parallel_replicate_degree"],
            Sharding::Sharded => &["zero_parameter_degree", "zero_gradient_degree", "zero_optimizer_degree"],
        };
        let degrees = keys.iter().map(|key| format!("parallelism.{key}={}", self.ranks));
        degrees.chain(["training.num_threads=1".to_owned()]).collect()
    }

    /// Launchers of ours: one a rank where each is pinned, one for all where they share the cores.
    fn nodes(&self) -> usize {
        if self.ranks <= CORES { self.ranks } else { 1 }
    }

    /// The cores of a rank, as taskset takes them.
    fn cores(&self, rank: usize) -> String {
        if self.ranks <= CORES { rank.to_string() } else { format!("0-{}", CORES - 1) }
    }

    fn tokens_per_second(&self, step_seconds: &[f64]) -> f64 {
        (self.ranks * LOCAL_BATCH_SIZE * SEQ_LEN) as f64 / median(counted(step_seconds))
    }
}

/// Two rows a case, ours first.
pub fn measure(inputs: &Inputs, options: &Options) -> Result<Vec<Row>> {
    let config = inputs.peer_config(&options.flavor)?;
    let cases = Case::all();
    let row = |name| Row { name, unit: "tokens/s", values: Vec::new() };
    let mut rows: Vec<Row> = cases.iter().flat_map(Case::names).map(row).collect();
    for round in 0..options.turns.rounds {
        println!("    round {} of {}", round + 1, options.turns.rounds);
        for (case, rows) in cases.iter().zip(rows.chunks_mut(2)) {
            rows[0].values.push(our_turn(inputs, options, case).with_context(|| rows[0].name.clone())?);
            rows[1].values.push(their_turn(inputs, options, case, &config).with_context(|| rows[1].name.clone())?);
            let [ours, theirs] = [&rows[0], &rows[1]].map(|row| row.values[round]);
            println!("    {:<38} {ours:>8.0} tokens/s, {theirs:>8.0} {}", rows[0].name, rows[1].name);
        }
    }
    Ok(rows)
}

fn our_turn(inputs: &Inputs, options: &Options, case: &Case) -> Result<f64> {
    let job = inputs.job(&options.flavor, case.dtype.0, options.turns.steps, &case.settings())?;
    let nodes = case.nodes();
    let endpoint = format!("127.0.0.1:{}", free_port()?);
    let launcher = |node: usize| {
        let mut command = pinned(inputs, case, node, &[]);
        command.arg(inputs.binary()).args(["run", "--quiet"]).args(&job);
        command.args(["--nproc-per-node", &(case.ranks / nodes).to_string()]);
        if nodes > 1 {
            command.args(["--nnodes", &nodes.to_string(), "--node-rank", &node.to_string()]);
            command.args(["--rdzv-endpoint", &endpoint]);
        }
        command
    };
    let mut commands: Vec<Command> = (0..nodes).map(launcher).collect();
    run_together(&mut commands, &inputs.folder)?;
    Ok(case.tokens_per_second(&column(&records(&inputs.run())?, "step_seconds")))
}

fn their_turn(inputs: &Inputs, options: &Options, case: &Case, config: &Path) -> Result<f64> {
    let port = free_port()?;
    let rank = |rank| {
        let world = [format!("RANK={rank}"), format!("WORLD_SIZE={}", case.ranks), format!("MASTER_PORT={port}")];
        let mut command = pinned(inputs, case, rank, &world);
        command.args(["MASTER_ADDR=127.0.0.1", "HF_HUB_OFFLINE=1", "TQDM_DISABLE=1"]);
        command.arg(inputs.repo.python()).arg("tests/python/bench_parallel.py").arg(config);
        command.args([case.dtype.1, case.wrapper()]);
        command.args([options.turns.steps, SEQ_LEN, LOCAL_BATCH_SIZE].map(|number| number.to_string()));
        command
    };
    let mut commands: Vec<Command> = (0..case.ranks).map(rank).collect();
    let answer = last_json(&run_together(&mut commands, &inputs.folder)?)?;
    Ok(case.tokens_per_second(&step_seconds(&answer)))
}

/// `taskset` and `env`, up to the program: one thread, on a rank's cores. By words, so that it can be typed again.
fn pinned(inputs: &Inputs, case: &Case, rank: usize, variables: &[String]) -> Command {
    let mut command = inputs.repo.command("taskset");
    command.args(["-c", &case.cores(rank), "env", "OMP_NUM_THREADS=1"]).args(variables);
    command
}

/// A port of this machine that was free a moment ago.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("no free port")?;
    Ok(listener.local_addr().context("no free port")?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ranks_tokens_count() {
        let case = Case { ranks: 4, dtype: TYPES[0], sharding: Sharding::Sharded };
        assert_eq!(case.tokens_per_second(&[9.0, 9.0, 2.0, 2.0]), 2048.0);
    }
}
