//! Parameters, FLOPs and bytes, layer by layer.

use crate::flops::{FlopsPerToken, block_flops, head_flops};
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
    pub flops: FlopsPerToken,
    /// Activations kept from forward to backward, per token.
    pub saved_bytes_per_token: u64,
    /// Whether it runs again in backward.
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
    let none = FlopsPerToken::default();
    let mut all = vec![cost("embedding".into(), model.embedding_parameters(dtype), none, 0, false)];
    for (layer, block) in model.blocks.iter().enumerate() {
        let flops = block_flops(model.hidden_size, block, seq_len);
        let saved = saved_bytes_per_token(plan, layer);
        all.push(cost(
            format!("block {layer}"),
            model.block_parameters(layer, dtype),
            flops,
            saved,
            plan.recomputes(layer),
        ));
    }
    let head = if model.tie_word_embeddings { "norm and tied head" } else { "norm and head" };
    // The final norm's input and output.
    let saved = (2 * model.hidden_size * dtype.size_bytes() + DType::F32.size_bytes()) as u64;
    all.push(cost(head.into(), model.head_parameters(dtype), head_flops(model), saved, false));
    all
}

/// The layers as a table; equal neighbours share a line.
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
    let mut start = 0;
    while start < all.len() {
        let first = &all[start];
        let same = |l: &&LayerCost| {
            let named = LayerCost { name: first.name.clone(), ..(**l).clone() };
            l.name.starts_with("block") && named == *first
        };
        let run = 1 + all[start + 1..].iter().take_while(same).count();
        table.row([
            if run == 1 {
                first.name.clone()
            } else {
                format!("{} to {} ({run} x)", first.name, &all[start + run - 1].name[6..])
            },
            count(first.parameters as f64),
            bytes(first.weight_bytes),
            count(first.flops.forward_causal()),
            bytes(first.saved_bytes_per_token),
            if first.recomputed { "recomputed".into() } else { String::new() },
        ]);
        start += run;
    }
    table.row([
        "all".into(),
        count(all.iter().map(|l| l.parameters).sum::<usize>() as f64),
        bytes(all.iter().map(|l| l.weight_bytes).sum()),
        count(all.iter().map(|l| l.flops.forward_causal()).sum()),
        bytes(all.iter().map(|l| l.saved_bytes_per_token).sum()),
        String::new(),
    ]);
    let flops = all.iter().fold(FlopsPerToken::default(), |sum, l| sum + l.flops);
    let seq_len = plan.config.training.seq_len;
    format!(
        "{}\nforward FLOPs, attention counted causally; a training step is three times that: {} per token at {seq_len} \
         tokens per sequence\n(with attention counted in full {}), {} per step over all ranks\n",
        table.render(),
        count(flops.training_causal()),
        count(flops.training_full()),
        count(flops.training_causal() * plan.tokens_per_step() as f64),
    )
}
