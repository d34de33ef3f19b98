//! `cargo xtask layouts`: loss curves of real processes under many layouts, against one rank.
//!
//! Three tables. fp32: 50 steps, every loss within 1e-5 of one rank's. bf16: within a bound of its own, see
//! [`BF16_BOUND`]. And 1,000 steps of ring attention, which must stay finite and beside one rank's curve: a naive merge of
//! partial results gave a peer NaN after some 500.

use crate::shell::{self, Repo};
use crate::{corpus, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// What to run.
#[derive(Args)]
pub struct Options {
    /// Steps of the long run of ring attention; 0 leaves it out.
    #[arg(long, default_value_t = 1000)]
    long_steps: usize,
    /// Keep the runs of an earlier call that are complete.
    #[arg(long)]
    keep: bool,
}

/// Sums in another order differ by some 1e-7 of a loss in every step, amplified by 50 updates at lr 1e-3.
const FP32_BOUND: f64 = 1e-5;
/// bf16 keeps 8 bits: a value is rounded by up to 2^-9 = 2e-3 wherever a layout cuts a sum (partial products, attention
/// over blocks). Over a thousand tokens' losses that averages out to some 3e-4 (measured), and does not grow, for masters
/// and sums of gradients are fp32. A wrong layout is off by 1e-2 and more within a few steps.
const BF16_BOUND: f64 = 2e-3;
/// After 1,000 updates at lr 1e-3 two curves of the same data differ by what rounding has become: measured 2.6e-3 at
/// most, at step 302, and 3e-5 at the end. A wrong merge is off by that within a few steps. A trend shows in the means of
/// the first and the last distances, which are printed.
const LONG_BOUND: f64 = 1e-2;
/// Distances that a mean is taken of.
const MEAN_STEPS: usize = 100;

/// Ranks, and what differs from one.
const LAYOUTS: [(usize, &[(&str, &str)]); 13] = [
    (2, &[]),
    (2, &[("zero_parameter_degree", "2")]),
    (4, &[("zero_gradient_degree", "2"), ("zero_optimizer_degree", "4")]),
    (2, &[("tensor_parallel_degree", "2")]),
    (4, &[("tensor_parallel_degree", "4")]),
    (2, &[CP2, ("context_parallel_head_degree", "2")]),
    (2, &[CP2, RING]),
    (2, &[CP2]),
    (4, &[("context_parallel_degree", "4"), ("context_parallel_head_degree", "2"), RING]),
    (2, &[("pipeline_parallel_degree", "2")]),
    (4, &[("pipeline_parallel_degree", "2"), ("tensor_parallel_degree", "2")]),
    (4, &[("tensor_parallel_degree", "2"), CP2, RING]),
    (4, &[("data_parallel_shard_degree", "2"), CP2, ("zero_parameter_degree", "4")]),
];
const CP2: (&str, &str) = ("context_parallel_degree", "2");
const RING: (&str, &str) = ("context_parallel_rotate_method", "'ring'");

const JOB: &str = r#"
[model]
name = "mistral"
hidden_size = 128
intermediate_size = 384
num_hidden_layers = 4
num_attention_heads = 8
num_key_value_heads = 4
sliding_window = 96
max_position_embeddings = 512
tie_word_embeddings = true

[data]
sources = [{ paths = ["CORPUS"] }]
train_tokenizer_vocab = 1000
prepared_folder = "FOLDER/prepared"
packing = "best_fit"

[training]
device = "cpu"
num_threads = 1
seq_len = 256
local_batch_size = 1
global_batch_size = 4

[optimizer]
lr = 1e-3

[lr_scheduler]
warmup_steps = 10

[checkpoint]
enable = false

[metrics]
log_freq = 1
enable_tensorboard = false
"#;

/// One run: its folder's name, ranks and settings.
struct Curve<'a> {
    name: String,
    ranks: usize,
    layout: &'a [(&'a str, &'a str)],
    steps: usize,
    kind: &'a str,
}

/// Runs everything, prints the tables, fails where a curve leaves its bound.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    setup::libtorch(repo)?;
    shell::step("building", || shell::run(&mut repo.cargo(&["build", "--release", "--workspace", "--bins"])))?;
    let folder = repo.target().join("layouts");
    if !options.keep && folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let text = folder.join("corpus.jsonl");
    if !text.exists() {
        corpus::write(None, &text, 1 << 20)?;
    }
    let job = JOB.replace("FOLDER", &folder.display().to_string()).replace("CORPUS", &text.display().to_string());
    fs::write(folder.join("job.toml"), job).context("cannot write the job")?;
    let mut failed = table(repo, &folder, "float32", 50, FP32_BOUND, &LAYOUTS)?;
    failed += table(repo, &folder, "bfloat16", 50, BF16_BOUND, &LAYOUTS)?;
    if options.long_steps > 0 {
        let ring: (usize, &[(&str, &str)]) = (4, &[("context_parallel_degree", "4"), RING]);
        failed += table(repo, &folder, "float32", options.long_steps, LONG_BOUND, &[ring])?;
    }
    if failed > 0 { bail!("{failed} layouts left their bound") } else { Ok(()) }
}

/// One rank and all layouts; how many left the bound.
fn table(
    repo: &Repo,
    folder: &Path,
    kind: &str,
    steps: usize,
    bound: f64,
    layouts: &[(usize, &[(&str, &str)])],
) -> Result<usize> {
    let name = |index: usize| format!("{kind}-{steps}-{index}");
    let one = Curve { name: format!("{kind}-{steps}-one"), ranks: 1, layout: &[], steps, kind };
    let expected = losses(repo, folder, &one)?;
    println!("\n{kind}, {steps} steps, one rank: {:.4} to {:.4}; bound {bound:.0e}", expected[0], expected[steps - 1]);
    let mut failed = 0;
    for (index, &(ranks, layout)) in layouts.iter().enumerate() {
        let words: Vec<String> = layout.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let words = words.join(" ");
        // A layout that fails is one of the table; the others are still of interest.
        let found = match losses(repo, folder, &Curve { name: name(index), ranks, layout, steps, kind }) {
            Ok(found) => found,
            Err(error) => {
                println!("LEFT {ranks} ranks {words:80} {error:#}");
                failed += 1;
                continue;
            }
        };
        let apart: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).collect();
        // Not a number is not within.
        let worst = apart.iter().fold(0.0, |worst: f64, d| if d.is_nan() { f64::INFINITY } else { worst.max(*d) });
        let within = worst <= bound && found.len() == expected.len();
        failed += usize::from(!within);
        println!("{} {ranks} ranks {words:80} {worst:.1e}", if within { "ok  " } else { "LEFT" });
        if steps >= 2 * MEAN_STEPS {
            let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
            let (first, last) = (mean(&apart[..MEAN_STEPS]), mean(&apart[steps - MEAN_STEPS..]));
            println!("     mean distance of the first {MEAN_STEPS} steps {first:.1e}, of the last {last:.1e}");
        }
    }
    Ok(failed)
}

/// The loss of every step of a run, made where it is not there yet.
fn losses(repo: &Repo, folder: &Path, curve: &Curve) -> Result<Vec<f64>> {
    let run = folder.join(&curve.name);
    let found = read(&run);
    if found.len() == curve.steps {
        return Ok(found);
    }
    let mut command = repo.command(repo.target().join("release/tangelo"));
    command.args(["run", "--quiet"]).arg(folder.join("job.toml"));
    command.args(["--nproc-per-node", &curve.ranks.to_string()]);
    let mut sets = vec![
        format!("job.dump_folder={:?}", run.display().to_string()),
        format!("training.steps={}", curve.steps),
        format!("training.mixed_precision_param='{}'", curve.kind),
    ];
    sets.extend(curve.layout.iter().map(|(key, value)| format!("parallelism.{key}={value}")));
    for set in &sets {
        command.args(["--set", set]);
    }
    shell::run(&mut command)?;
    let found = read(&run);
    if found.len() != curve.steps {
        bail!("{} has {} losses, expected {}", run.display(), found.len(), curve.steps);
    }
    Ok(found)
}

fn read(run: &Path) -> Vec<f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    records.filter_map(|record| record["loss"].as_f64()).collect()
}
