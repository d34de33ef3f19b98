//! Parameters, FLOPs and bytes, layer by layer: of the whole model, but for what a rank keeps of a token's activations.

use crate::flops::{ForwardFlops, block_flops, head_flops};
use crate::memory::saved_bytes_per_token;
use crate::table::{Align, Table, bytes, count};
use tangelo_configs::Plan;
use tangelo_core::{DType, ParamMeta};

/// What one layer costs.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCost {
    /// Its name: `embedding`, `block 3`, `norm and head`.
    pub name: String,
    /// Its parameters; a tied head has none of its own.
    pub parameters: usize,
    /// Its weights in the plan's type.
    pub weight_bytes: u64,
    /// Forward FLOPs.
    pub flops: ForwardFlops,
    /// Activations that one rank keeps from forward to backward, per token of a micro-batch.
    pub saved_bytes_per_token: u64,
    /// Whether it, or a part of it, runs again in backward.
    pub recomputed: bool,
}

/// Every layer, in execution order.
pub fn layers(plan: &Plan) -> Vec<LayerCost> {
    let (model, dtype) = (&plan.model, plan.compute_dtype());
    let seq_len = plan.config.training.seq_len;
    let cost = |name: String, parameters: Vec<ParamMeta>, flops, saved, recomputed| {
        let parameters: usize = parameters.iter().map(ParamMeta::num_elements).sum();
        let weight_bytes = (parameters * dtype.size_bytes()) as u64;
        LayerCost { name, parameters, weight_bytes, flops, saved_bytes_per_token: saved, recomputed }
    };
    let none = ForwardFlops::default();
    let mut all = vec![cost("embedding".into(), model.embedding_parameters(dtype), none, 0, false)];
    for (layer, block) in model.blocks.iter().enumerate() {
        let flops = block_flops(model.hidden_size, block, seq_len);
        let saved = saved_bytes_per_token(plan, layer);
        all.push(cost(
            format!("block {layer}"),
            model.block_parameters(layer, dtype),
            flops,
            saved,
            plan.recompute(layer) != tangelo_configs::job::Recompute::None,
        ));
    }
    let head = if model.tie_word_embeddings { "norm and tied head" } else { "norm and head" };
    // The final norm's input and output.
    let saved = (2 * model.hidden_size * dtype.size_bytes() + DType::F32.size_bytes()) as u64;
    let tokens = (plan.config.training.local_batch_size * seq_len).max(1) as u64;
    let saved = saved * crate::memory::RankTokens::of(plan).own / tokens;
    all.push(cost(head.into(), model.head_parameters(dtype), head_flops(model), saved, false));
    all
}

/// The layers as a table; equal ones share a line.
pub fn render(plan: &Plan) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("layer", Left),
        ("parameters", Right),
        ("weights", Right),
        ("FLOPs/token", Right),
        ("kept/token", Right),
        ("", Left),
    ]);
    let all = layers(plan);
    for (first, members) in groups(&all) {
        table.row([
            label(first, &members),
            count(first.parameters as f64),
            bytes(first.weight_bytes),
            count(first.flops.causal()),
            bytes(first.saved_bytes_per_token),
            if first.recomputed { "recomputed".into() } else { String::new() },
        ]);
    }
    table.row([
        "all".into(),
        count(all.iter().map(|l| l.parameters).sum::<usize>() as f64),
        bytes(all.iter().map(|l| l.weight_bytes).sum()),
        count(all.iter().map(|l| l.flops.causal()).sum()),
        bytes(all.iter().map(|l| l.saved_bytes_per_token).sum()),
        String::new(),
    ]);
    let flops = all.iter().fold(ForwardFlops::default(), |sum, l| sum + l.flops);
    let seq_len = plan.config.training.seq_len;
    format!(
        "{}\nforward FLOPs, attention counted causally; a training step is three times that: {} per token at {seq_len} \
         tokens per sequence\n(with attention counted in full {}), {} per step over all ranks\n",
        table.render(),
        count(3.0 * flops.causal()),
        count(3.0 * flops.full()),
        count(3.0 * flops.causal() * plan.tokens_per_step() as f64),
    )
}

/// Layers that cost the same, by the first of each kind, with the places of all in the list.
fn groups(all: &[LayerCost]) -> Vec<(&LayerCost, Vec<usize>)> {
    let mut groups: Vec<(&LayerCost, Vec<usize>)> = Vec::new();
    for (place, layer) in all.iter().enumerate() {
        let same = |first: &LayerCost| LayerCost { name: first.name.clone(), ..layer.clone() } == *first;
        match groups.iter_mut().find(|(first, _)| same(first)) {
            Some((_, members)) => members.push(place),
            None => groups.push((layer, vec![place])),
        }
    }
    groups
}

/// `blocks 0 to 31 (32 x)`, or `blocks 1, 3 .. 31 (16 x)` where others stand between. Block `n` has place `n + 1`.
fn label(first: &LayerCost, members: &[usize]) -> String {
    let [start, second, .., end] = members else {
        return match members {
            [_, last] => format!("blocks {} and {} (2 x)", members[0] - 1, last - 1),
            _ => first.name.clone(),
        };
    };
    let n = members.len();
    let gaps = end - start + 1 > n;
    match gaps {
        false => format!("blocks {} to {} ({n} x)", start - 1, end - 1),
        true => format!("blocks {}, {} .. {} ({n} x)", start - 1, second - 1, end - 1),
    }
}
