//! Runs a layout with one thread per rank, and one rank in float64.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tangelo_configs::resolve::{self, Resources};
use tangelo_configs::{ModelAssets, ModelSpec, Plan};
use tangelo_core::batch::{ragged_f32, ragged_u32};
use tangelo_core::hash::mix64;
use tangelo_core::{Batch, Column, Group, IndexBox, Level, LossSpec};
use tangelo_kernels::comm::{CallRecord, CommOptions, Communicator, local};
use tangelo_trainer::init::part_of;
use tangelo_trainer::optim::{Moments, OwnedState};
use tangelo_trainer::worker::TrainWorker;
use tch::{Device, Kind, Tensor};

/// Rows of a global batch: two micro-batches of one row for each of eight readers.
const ROWS: usize = 16;
const SEQ_LEN: usize = 40;
pub const VOCAB: usize = 331;
const STEPS: usize = 2;
pub const LR: f64 = 1e-2;
/// Large, so that the update is smooth where gradients vanish: with a small one it is their sign.
const EPS: f64 = 1e-2;

/// libtorch's generator is one for all threads.
pub fn no_one_else_draws<R>(draw: impl FnOnce() -> R) -> R {
    static DRAWING: Mutex<()> = Mutex::new(());
    let _alone = DRAWING.lock().unwrap_or_else(PoisonError::into_inner);
    draw()
}

/// Gradients by parameter, and what the step said.
pub struct Step {
    pub loss: f64,
    pub norm: f64,
    pub gradients: BTreeMap<String, Tensor>,
}

/// Both steps of one rank in float64.
pub struct Truth {
    pub steps: Vec<Step>,
    /// The loss of a batch that was not trained on, after them.
    pub held_out: f64,
}

/// Both steps of a layout.
pub struct Found {
    pub steps: Vec<Step>,
    /// As in [`Truth`], of every rank.
    pub held_out: Vec<f64>,
}

/// A layout of the table.
#[derive(Clone)]
pub struct Case {
    pub model: &'static str,
    /// Whether Muon updates the hidden matrices; else AdamW does.
    pub muon: bool,
    seed: u64,
    ranks: usize,
    sets: Vec<String>,
}

struct NoAssets;

impl ModelAssets for NoAssets {
    fn model_spec(&self, _: &Path) -> Result<ModelSpec, String> {
        Err("none".into())
    }
    fn vocab_size(&self, _: &Path) -> Result<usize, String> {
        Err("none".into())
    }
}

const JOB: &str = r#"
[model]
vocab_size = 331
hidden_size = 64
intermediate_size = 320
num_hidden_layers = 4
num_attention_heads = 8
head_dim = 8
max_position_embeddings = 64
[data]
sources = [{ paths = ["text"] }]
train_tokenizer_vocab = 300
[training]
device = "cpu"
mixed_precision_param = "float32"
num_threads = 1
seq_len = 40
local_batch_size = 1
global_batch_size = 16
max_norm = 0.0
[parallelism]
gradient_bucket_mb = 0.25
[optimizer]
lr = 1e-2
eps = 1e-2
beta1 = 0.0
weight_decay = 0.1
[lr_scheduler]
warmup_steps = 0
[comm]
train_timeout_seconds = 60
"#;

impl Case {
    /// From a line of the table.
    pub fn parse(line: &str, seed: u64) -> Case {
        let mut words = line.split_whitespace();
        let model =
            ["gqa", "mha", "odd", "qwen"].into_iter().find(|m| words.clone().next() == Some(m)).expect("a model");
        let mut case = Case { model, muon: false, seed, ranks: 1, sets: Vec::new() };
        match model {
            "gqa" => {
                let window = ["name='mistral'", "sliding_window=9"];
                case.set("model", &[window[0], window[1], "num_key_value_heads=4", "tie_word_embeddings=true"]);
            }
            "mha" => case.set("model", &["num_key_value_heads=8"]),
            "qwen" => case.set("model", &["name='qwen3'", "num_key_value_heads=4"]),
            _ => case.set("model", &["num_key_value_heads=2", "attention_bias=true", "mlp_bias=true"]),
        }
        words.by_ref().skip(1).for_each(|word| case.word(word));
        case
    }

    /// Sets keys of a section, over what was set before.
    pub fn set(&mut self, section: &str, keys: &[&str]) {
        self.sets.extend(keys.iter().map(|key| format!("{section}.{key}")));
    }

    fn word(&mut self, word: &str) {
        self.muon |= word == "muon";
        let digits = word.find(|c: char| c.is_ascii_digit()).unwrap_or(word.len());
        let (name, number) = word.split_at(digits);
        let degree = |key: &str| vec![format!("parallelism.{key}={number}")];
        let more = match name {
            "rep" => degree("data_parallel_replicate_degree"),
            "dp" => degree("data_parallel_shard_degree"),
            "cp" => degree("context_parallel_degree"),
            "tp" => degree("tensor_parallel_degree"),
            "pp" => degree("pipeline_parallel_degree"),
            "heads" => degree("context_parallel_head_degree"),
            "ring" => vec!["parallelism.context_parallel_rotate_method='ring'".into()],
            "gpipe" => vec!["parallelism.pipeline_parallel_schedule='GPipe'".into()],
            "never" => vec!["parallelism.fsdp_reshard_after_forward='never'".into()],
            "stages" => vec![format!("parallelism.pipeline_parallel_stage_layers=[{}]", number.replace('.', ","))],
            // Without momentum the buffer is the gradient.
            "muon" => ["name='Muon'", "muon_momentum=0.0", "muon_nesterov=false"].map(|key| format!("optimizer.{key}")).into(),
            "full" => vec!["activation_checkpoint.mode='full'".into()],
            "attn" => selective("attention"),
            "ffn" => selective("feed_forward"),
            "mixed" => vec![
                "activation_checkpoint.layers=[{first=0,last=0,recompute='full'},{first=1,last=1,recompute='attention'},\
                 {first=2,last=2,recompute='feed_forward'}]"
                    .into(),
            ],
            "z" => {
                let keys = ["zero_parameter_degree", "zero_gradient_degree", "zero_optimizer_degree"];
                keys.iter().zip(number.split('.')).map(|(key, n)| format!("parallelism.{key}={n}")).collect()
            }
            other => panic!("no layout is called {other}"),
        };
        if ["rep", "dp", "cp", "tp", "pp"].contains(&name) {
            self.ranks *= number.parse::<usize>().expect("a degree");
        }
        self.sets.extend(more);
    }

    pub fn plan(&self) -> Plan {
        let config = resolve::load_str(JOB, "job.toml", &self.sets).unwrap_or_else(|e| panic!("{e}"));
        let resources = Resources {
            world_size: self.ranks,
            local_world_size: self.ranks,
            num_cores: 1,
            cuda: false,
            current_dir: "/job".into(),
            home: None,
        };
        resolve::resolve(config, &resources, &NoAssets).unwrap_or_else(|e| panic!("{:?}: {e}", self.sets))
    }

    /// Rows `rows` of the global batch of `step`: documents of 1 to 29 tokens.
    fn batch(&self, step: usize, rows: std::ops::Range<usize>) -> Batch {
        let mut columns: [Vec<Vec<u32>>; 4] = Default::default();
        let mut weights = Vec::new();
        for row in rows {
            let draw = |i: usize| mix64(self.seed ^ mix64((step * ROWS + row) as u64) ^ i as u64) as usize;
            let tokens: Vec<u32> = (0..=SEQ_LEN).map(|i| (draw(i) % VOCAB) as u32).collect();
            let (mut positions, mut ids) = (Vec::new(), Vec::new());
            for id in 0.. {
                let length = (draw(1000 + id) % 29 + 1).min(SEQ_LEN - positions.len());
                positions.extend(0..length as u32);
                ids.extend(vec![id as u32; length]);
                if positions.len() == SEQ_LEN {
                    break;
                }
            }
            let weight =
                |i: usize| if ids.get(i + 1) == Some(&ids[i]) { 0.5 + (draw(2000 + i) % 4) as f32 } else { 0.0 };
            weights.push((0..SEQ_LEN).map(weight).collect::<Vec<f32>>());
            let values = [tokens[..SEQ_LEN].to_vec(), tokens[1..].to_vec(), positions, ids];
            columns.iter_mut().zip(values).for_each(|(column, value)| column.push(value));
        }
        let [tokens, targets, positions, ids] = columns;
        let columns = vec![
            (Column::Tokens, ragged_u32(&tokens)),
            (Column::Targets, ragged_u32(&targets)),
            (Column::Positions, ragged_u32(&positions)),
            (Column::SeqId, ragged_u32(&ids)),
            (Column::CeWeight, ragged_f32(&weights)),
        ];
        Batch::from_columns(columns).expect("columns of equal lengths")
    }

    /// Both steps on all ranks.
    pub fn run(&self) -> Found {
        let parts: Vec<(Vec<RankStep>, f64)> = self.on_all_ranks(|plan, comm| self.rank(plan, comm));
        let spec = self.plan().model;
        let steps = (0..STEPS).map(|step| join(parts.iter().map(|(rank, _)| &rank[step]).collect(), &spec)).collect();
        Found { steps, held_out: parts.iter().map(|(_, loss)| *loss).collect() }
    }

    /// Runs `rank` on a thread of its own for each rank.
    pub fn on_all_ranks<R: Send>(&self, rank: impl Fn(&Plan, Communicator) -> R + Sync) -> Vec<R> {
        let plan = self.plan();
        let options = CommOptions { timeout: Duration::from_secs(60), ..CommOptions::default() };
        std::thread::scope(|scope| {
            let start = |comm| scope.spawn(|| rank(&plan, comm));
            let threads: Vec<_> = local::group(self.ranks, &options).into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("a rank ends well")).collect()
        })
    }

    /// The seed of weights and batches.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The rows of `step` that the `reader`-th of the ranks that read rows gets.
    pub fn rank_batch(&self, plan: &Plan, step: usize, reader: usize) -> Batch {
        let share = ROWS / plan.data_parallel_size;
        self.batch(step, reader * share..(reader + 1) * share)
    }

    fn rank(&self, plan: &Plan, comm: Communicator) -> (Vec<RankStep>, f64) {
        let mut worker = self.worker(plan, comm);
        let steps = (0..STEPS).map(|step| self.step(plan, &mut worker, step)).collect();
        (steps, self.evaluate(plan, &worker, STEPS))
    }

    fn evaluate(&self, plan: &Plan, worker: &TrainWorker, step: usize) -> f64 {
        let batch = self.rank_batch(plan, step, plan.topology.index(Group::Batch, worker.rank()));
        let loss = worker.evaluate([Ok(batch)].into_iter(), &LossSpec::next_token());
        loss.unwrap_or_else(|e| panic!("rank {}: {e}", worker.rank()))
    }

    /// One step and one evaluation on all ranks: the calls of each, and the bytes that it sent.
    pub fn record(&self) -> Vec<(Vec<CallRecord>, u64)> {
        self.on_all_ranks(|plan, comm| {
            let mut worker = self.worker(plan, comm);
            worker.world().record_calls();
            let before = worker.world().stats().bytes_sent;
            self.step(plan, &mut worker, 0);
            self.evaluate(plan, &worker, 1);
            (worker.world().take_recorded_calls(), worker.world().stats().bytes_sent - before)
        })
    }

    pub fn worker(&self, plan: &Plan, comm: Communicator) -> TrainWorker {
        let mut worker = TrainWorker::new(plan, comm.rank(), comm, Device::Cpu).expect("a worker");
        no_one_else_draws(|| worker.start_from_seed(self.seed));
        worker
    }

    fn step(&self, plan: &Plan, worker: &mut TrainWorker, step: usize) -> RankStep {
        let rank = worker.rank();
        let batch = self.rank_batch(plan, step, plan.topology.index(Group::Batch, rank));
        let loss = worker
            .forward_backward(&batch, &LossSpec::next_token(), false)
            .unwrap_or_else(|e| panic!("rank {rank}: {e}"));
        let stats = worker.optim_step(LR, &loss).unwrap_or_else(|e| panic!("rank {rank}: {e}"));
        assert!(!stats.skipped);
        RankStep { loss: loss.loss, norm: stats.grad_norm, gradients: owned_gradients(worker) }
    }
}

fn selective(what: &str) -> Vec<String> {
    vec!["activation_checkpoint.mode='selective'".into(), format!("activation_checkpoint.selective_ac_option='{what}'")]
}

pub struct RankStep {
    pub loss: f64,
    pub norm: f64,
    pub gradients: Vec<(String, IndexBox, Tensor)>,
}

/// Without momentum (beta1 = 0), the first moment is the gradient.
pub fn owned_gradients(worker: &TrainWorker) -> Vec<(String, IndexBox, Tensor)> {
    let one = |state: &OwnedState| {
        let meta = &worker.model().units()[state.unit].spans()[state.range.param].meta;
        let indices = worker.sharding().box_at(meta, Level::States, worker.rank());
        let first = match &state.moments {
            Moments::AdamW { exp_avg, .. } => exp_avg,
            Moments::Muon { momentum } => momentum,
        };
        (meta.name.clone(), indices, first.copy())
    };
    worker.optimizer().states().iter().map(one).collect()
}

/// Whole gradients from what ranks own; ranks that own the same must have found the same.
pub fn join(ranks: Vec<&RankStep>, spec: &ModelSpec) -> Step {
    let mut gradients = BTreeMap::new();
    for meta in spec.parameters(tangelo_core::DType::F32) {
        let shape: Vec<i64> = meta.shape.iter().map(|&n| n as i64).collect();
        let whole = Tensor::full(shape.as_slice(), f64::NAN, (Kind::Float, Device::Cpu));
        for (_, indices, values) in ranks.iter().flat_map(|r| &r.gradients).filter(|(name, ..)| *name == meta.name) {
            let mut view = part_of(&whole, indices);
            let values = values.view_as(&view);
            let known = view.isnan().logical_not().all().int64_value(&[]) != 0;
            assert!(!known || view.equal(&values), "copies of the gradient of {} differ", meta.name);
            view.copy_(&values);
        }
        gradients.insert(meta.name, whole);
    }
    let first = ranks[0];
    assert!(ranks.iter().all(|r| r.loss == first.loss && r.norm == first.norm), "ranks found other losses or norms");
    Step { loss: first.loss, norm: first.norm, gradients }
}

impl Truth {
    /// Two steps of the whole model in float64, AdamW and Muon by their formulas.
    pub fn new(case: &Case) -> Truth {
        let of_all = |set: &&String| set.starts_with("model.") || set.starts_with("optimizer.");
        let sets = case.sets.iter().filter(of_all).cloned().collect();
        let plan = Case { ranks: 1, sets, ..*case }.plan();
        let mut worker =
            TrainWorker::with_kind(&plan, 0, Communicator::single(), Device::Cpu, Kind::Double).expect("a worker");
        worker.start_from_seed(case.seed);
        let mut second: BTreeMap<String, Tensor> = BTreeMap::new();
        let mut steps = Vec::new();
        for step in 0..STEPS {
            let batch = case.batch(step, 0..ROWS);
            let loss = worker.forward_backward(&batch, &LossSpec::next_token(), false).expect("a step");
            let mut gradients = BTreeMap::new();
            let mut square = 0.0;
            for unit in worker.model().units() {
                for span in unit.spans() {
                    let weight = unit.weight(&span.meta.name);
                    let grad = weight.grad().expect("gradients").copy();
                    square += grad.square().sum(Kind::Double).double_value(&[]);
                    match case.muon && ModelSpec::is_hidden_matrix(&span.meta.name) {
                        true => muon(&weight.value, &grad),
                        false => adamw(&span.meta.name, &weight.value, &grad, step + 1, &mut second),
                    }
                    gradients.insert(span.meta.name.clone(), grad);
                }
            }
            worker.discard_gradients();
            steps.push(Step { loss: loss.loss, norm: square.sqrt(), gradients });
        }
        let held_out = [Ok(case.batch(STEPS, 0..ROWS))].into_iter();
        Truth { steps, held_out: worker.evaluate(held_out, &LossSpec::next_token()).expect("an evaluation") }
    }
}

/// Loshchilov and Hutter, with beta1 = 0 and beta2 = 0.95.
fn adamw(name: &str, weight: &Tensor, grad: &Tensor, step: usize, second: &mut BTreeMap<String, Tensor>) {
    let beta2: f64 = 0.95;
    let v = second.remove(name).unwrap_or_else(|| grad.zeros_like()) * beta2 + grad.square() * (1.0 - beta2);
    let corrected = &v / (1.0 - beta2.powi(step as i32));
    let decay = if ModelSpec::decays(name) { 1.0 - LR * 0.1 } else { 1.0 };
    let updated = weight * decay - grad / (corrected.sqrt() + EPS) * LR;
    tch::no_grad(|| weight.shallow_clone().copy_(&updated));
    second.insert(name.to_owned(), v);
}

/// Jordan et al. 2024 without momentum: every singular value of the gradient, whose norm is made 1, goes through the odd
/// quintic five times.
fn muon(weight: &Tensor, grad: &Tensor) {
    let (u, values, v) = (grad / grad.norm()).svd(true, true);
    let quintic = |s: Tensor| &s * 3.4445 - s.pow_tensor_scalar(3) * 4.7750 + s.pow_tensor_scalar(5) * 2.0315;
    let update = (u * (0..5).fold(values, |s, _| quintic(s))).matmul(&v.tr());
    let longest = grad.size().into_iter().max().expect("a matrix") as f64;
    let updated = weight * (1.0 - LR * 0.1) - update * (LR * 0.2 * longest.sqrt());
    tch::no_grad(|| weight.shallow_clone().copy_(&updated));
}

/// ||found - truth|| / ||truth||, in float64.
pub fn relative_error(found: &Tensor, truth: &Tensor) -> f64 {
    ((found.to_kind(Kind::Double) - truth).norm() / truth.norm()).double_value(&[])
}
