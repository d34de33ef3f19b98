//! The walk of a batch: every stage of a training step, with the tensors that leave it, their shapes and bytes.

use crate::memory::{LOSS_CHUNK_TOKENS, buckets};
use crate::table::{Align, Table, bytes};
use tangelo_configs::job::{DeviceChoice, Recompute};
use tangelo_configs::{MixerSpec, Plan};
use tangelo_core::DType;

/// One thing that flows.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// What happens.
    pub stage: &'static str,
    /// What comes out of it.
    pub tensor: String,
    /// Length per dim.
    pub shape: Vec<usize>,
    /// Element type, as columns of a batch and tensors name it.
    pub dtype: &'static str,
    /// Bytes of it.
    pub num_bytes: u64,
    /// Whose it is, and how often.
    pub note: String,
}

/// The stages of one step, in order.
pub fn walk(plan: &Plan) -> Vec<Stage> {
    let mut stages = input_stages(plan);
    stages.extend(model_stages(plan));
    stages.extend(update_stages(plan));
    stages
}

fn stage(stage: &'static str, tensor: &str, shape: &[usize], dtype: &'static str, note: String) -> Stage {
    let size = match dtype {
        "i64" | "f64" => 8,
        "bf16" => 2,
        _ => 4,
    };
    let num_bytes = shape.iter().fold(size, |bytes: u64, &n| bytes.saturating_mul(n as u64));
    Stage { stage, tensor: tensor.into(), shape: shape.to_vec(), dtype, num_bytes, note }
}

fn input_stages(plan: &Plan) -> Vec<Stage> {
    let t = &plan.config.training;
    let (global, length) = (plan.global_batch_size, t.seq_len);
    let (local, micro) = (global / plan.data_parallel_size, t.local_batch_size);
    let tokens = micro * length;
    let accumulation = plan.gradient_accumulation_steps;
    let copy = if t.device == DeviceChoice::Cuda { "host to device" } else { "to tensors" };
    vec![
        stage(
            "load",
            "tokens, targets, positions, seq_id",
            &[4, local, length],
            "u32",
            format!("this rank's {local} of {global} sequences"),
        ),
        stage("load", "ce_weight", &[local, length], "f32", "0 where nothing is to be predicted".into()),
        stage("load", "sample_index", &[local], "i64", "pure function of (data, seed, step)".into()),
        stage(
            "all-reduce",
            "trained tokens",
            &[2],
            "f64",
            format!("sum over {} ranks: the loss's normaliser", plan.data_parallel_size),
        ),
        stage(
            copy,
            "tokens, positions, targets",
            &[3, tokens],
            "i64",
            format!("{accumulation} x: one micro-batch of {micro}, end to end"),
        ),
        stage(copy, "weights", &[tokens], "f32", "document borders beside it".into()),
    ]
}

fn model_stages(plan: &Plan) -> Vec<Stage> {
    let (model, t) = (&plan.model, &plan.config.training);
    let (tokens, d) = (t.local_batch_size * t.seq_len, model.hidden_size);
    let dtype = if plan.compute_dtype() == DType::BF16 { "bf16" } else { "f32" };
    let mut stages = vec![stage("embed", "x", &[tokens, d], dtype, "rows of the embedding".into())];
    if let Some(block) = model.blocks.first() {
        let MixerSpec::Attention(a) = &block.mixer;
        let (h, k, width, f) = (a.num_heads, a.num_kv_heads, a.head_dim, block.feed_forward.intermediate_size);
        let window = a.sliding_window.map_or(String::new(), |w| format!(", {w} tokens back"));
        let masked = if plan.config.data.document_mask { "within its document" } else { "within its sequence" };
        let recomputed = (0..model.blocks.len()).filter(|&layer| plan.recompute(layer) != Recompute::None).count();
        stages.extend([
            stage("block", "q", &[tokens, h, width], dtype, format!("{} x: each block", model.blocks.len())),
            stage("block", "k, v", &[2, tokens, k, width], dtype, String::new()),
            stage("block", "attention", &[tokens, h, width], dtype, format!("each token {masked}{window}")),
            stage("block", "gate, up", &[2, tokens, f], dtype, String::new()),
            stage("block", "x", &[tokens, d], dtype, format!("{recomputed} blocks run again in backward")),
        ]);
    }
    let chunk = LOSS_CHUNK_TOKENS.min(tokens);
    stages.extend([
        stage(
            "loss",
            "logits",
            &[chunk, model.vocab_size],
            dtype,
            format!("{} x: chunk by chunk", tokens.div_ceil(chunk)),
        ),
        stage("backward", "gradient of x", &[tokens, d], dtype, "block by block, last to first".into()),
    ]);
    stages
}

fn update_stages(plan: &Plan) -> Vec<Stage> {
    let all = plan.model.num_parameters();
    let (ranks, zero) = (plan.data_parallel_size, plan.topology.scopes.states);
    let owned = all.div_ceil(zero);
    let dtype = if plan.compute_dtype() == DType::BF16 { "bf16" } else { "f32" };
    let mut stages = vec![stage("backward", "main gradients", &[all], "f32", "added up over micro-batches".into())];
    if ranks > 1 {
        let verb = if zero == ranks { "reduce-scatter" } else { "all-reduce" };
        let note = format!("{verb} over {ranks} ranks, {} bucket(s)", buckets(plan).len());
        stages.push(stage("reduce", "main gradients", &[all], "f32", note));
    }
    let clip = match plan.config.training.max_norm {
        0.0 => "AdamW".into(),
        norm => format!("clipped to a global norm of {norm}, AdamW"),
    };
    stages.push(stage("update", "weights and states", &[3, owned], "f32", clip));
    if zero > 1 {
        stages.push(stage("all-gather", "weights", &[all], dtype, format!("over {zero} ranks")));
    }
    stages
}

/// The stages as a table.
pub fn render(plan: &Plan) -> String {
    use Align::{Left, Right};
    let headings = [("stage", Left), ("tensor", Left), ("shape", Left), ("type", Left), ("bytes", Right), ("", Left)];
    let mut table = Table::new(&headings);
    for s in walk(plan) {
        let shape: Vec<String> = s.shape.iter().map(usize::to_string).collect();
        table.row([
            s.stage.into(),
            s.tensor,
            format!("[{}]", shape.join(", ")),
            s.dtype.into(),
            bytes(s.num_bytes),
            s.note,
        ]);
    }
    table.render()
}
