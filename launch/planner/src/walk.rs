//! The walk of a batch: every stage of a training step, with the tensors that leave it, their shapes and bytes, on the
//! rank with the most of each.

use crate::memory::{LOSS_CHUNK_TOKENS, RankTokens, predict};
use crate::program;
use crate::table::{Align, Table, bytes};
use tangelo_configs::job::{DeviceChoice, OptimizerName, Recompute};
use tangelo_configs::{MixerSpec, Plan};
use tangelo_core::{DType, Group};

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
    let tokens = RankTokens::of(plan).context as usize;
    let part = match plan.topology.size(Group::Heads) * plan.topology.size(Group::Ring) {
        1 => String::new(),
        ranks => format!(", 1 / {ranks} of it"),
    };
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
            format!("{accumulation} x: one micro-batch of {micro}, end to end{part}"),
        ),
        stage(copy, "weights", &[tokens], "f32", "document borders beside it".into()),
    ]
}

fn model_stages(plan: &Plan) -> Vec<Stage> {
    let (model, size) = (&plan.model, |group| plan.topology.size(group));
    let (tensor, heads) = (size(Group::Tensor), size(Group::Heads));
    let tokens = RankTokens::of(plan);
    let [own, tokens, attended] = [tokens.own, tokens.context, tokens.attended].map(|n| n as usize);
    let d = model.hidden_size;
    let dtype = if plan.compute_dtype() == DType::BF16 { "bf16" } else { "f32" };
    let mut stages = vec![stage("embed", "x", &[own, d], dtype, "rows of the embedding".into())];
    if let Some(block) = model.blocks.first() {
        let MixerSpec::Attention(a) = &block.mixer;
        let (width, f) = (a.head_dim, block.feed_forward.intermediate_size / tensor);
        let share = |n: usize| ((n / tensor).max(1) / heads).max(1);
        let (h, k) = (share(a.num_heads), share(a.num_kv_heads));
        let window = a.sliding_window.map_or(String::new(), |w| format!(", {w} tokens back"));
        let masked = if plan.config.data.document_mask { "within its document" } else { "within its sequence" };
        let recomputed = (0..model.blocks.len()).filter(|&layer| plan.recompute(layer) != Recompute::None).count();
        let each = match plan.topology.num_stages() {
            1 => "each block".into(),
            stages => format!("each block, in {stages} stages"),
        };
        stages.extend([
            stage("block", "q", &[attended, h, width], dtype, format!("{} x: {each}", model.blocks.len())),
            stage("block", "k, v", &[2, attended, k, width], dtype, String::new()),
            stage("block", "attention", &[attended, h, width], dtype, format!("each token {masked}{window}")),
            stage("block", "gate, up", &[2, tokens, f], dtype, String::new()),
            stage("block", "x", &[own, d], dtype, format!("{recomputed} blocks run again in backward")),
        ]);
    }
    let chunk = LOSS_CHUNK_TOKENS.min(tokens);
    stages.extend([
        stage(
            "loss",
            "logits",
            &[chunk, model.head_width().div_ceil(tensor)],
            dtype,
            format!("{} x: chunk by chunk", tokens.div_ceil(chunk)),
        ),
        stage("backward", "gradient of x", &[own, d], dtype, "block by block, last to first".into()),
    ]);
    stages
}

fn update_stages(plan: &Plan) -> Vec<Stage> {
    let (size, scopes) = (|group| plan.topology.size(group), plan.topology.scopes);
    let largest = predict(plan);
    let all = largest.num_parameters as usize;
    let (ranks, zero) = (size(Group::States) * size(Group::Replicas), scopes.states);
    let (kept, owned) = (all.div_ceil(scopes.gradients), all.div_ceil(zero));
    let dtype = if plan.compute_dtype() == DType::BF16 { "bf16" } else { "f32" };
    let mut stages = vec![stage("backward", "main gradients", &[kept], "f32", "added up over micro-batches".into())];
    if scopes.gradients > 1 {
        let note = format!("reduce-scatter over {} ranks, unit by unit of each micro-batch", scopes.gradients);
        stages.push(stage("reduce", "main gradients", &[all], "f32", note));
    }
    if ranks > scopes.gradients {
        let verb = if zero == ranks { "reduce-scatter" } else { "all-reduce" };
        let note = format!(
            "{verb} over {} ranks, {} bucket(s)",
            ranks / scopes.gradients,
            program::buckets(plan, largest.stage).len()
        );
        stages.push(stage("reduce", "main gradients", &[kept], "f32", note));
    }
    let (optimizer, states) = match plan.config.optimizer.name {
        OptimizerName::AdamW => ("AdamW", 3),
        OptimizerName::Muon => ("Muon for the blocks' matrices, AdamW for the rest (one state more)", 2),
    };
    let clip = match plan.config.training.max_norm {
        0.0 => optimizer.into(),
        norm => format!("clipped to a global norm of {norm}, {optimizer}"),
    };
    stages.push(stage("update", "weights and states", &[states, owned], "f32", clip));
    if zero > scopes.parameters {
        let note = format!("over {} ranks", zero / scopes.parameters);
        stages.push(stage("all-gather", "weights", &[all.div_ceil(scopes.parameters)], dtype, note));
    }
    if scopes.parameters > 1 {
        let note = format!("over {} ranks, unit by unit before use", scopes.parameters);
        stages.push(stage("all-gather", "weights", &[all], dtype, note));
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
