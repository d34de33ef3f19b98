//! Forward and backward, block by block.
//!
//! ```text
//!  tokens -> embed -> x0 -> [block 0] -> x1 -> ... -> [block L-1] -> xL -> [norm, head, loss]
//!                     each block is its own small graph on a detached input:
//!  forward :  local graph on x_i -> keep (x_i, x_{i+1})
//!  backward:  g = dLoss/dxL;  for i = L-1..0: backward(x_{i+1}, g) -> g = x_i.grad -> drop the graph
//! ```
//!
//! Which graphs are kept is a choice per block: a block marked for recomputation keeps its input only and is run again
//! in backward. No hooks: recomputation has its place in the two plain loops below, and so will gathering and freeing
//! sharded weights, and pipeline sends. World size 1 takes the same path.
//!
//! Invariant: gradients of weights accumulate in the fp32 buffers of [`tangelo_models::UnitWeights`]; no weight has a
//! `.grad`.

use std::time::{Duration, Instant};
use tangelo_kernels::{autograd, op};
use tangelo_models::{Model, PackContext};
use tch::Tensor;

/// Tokens of one micro-batch and what the loss reads.
#[derive(Debug)]
pub struct MicroBatch {
    /// Tokens, positions, document borders.
    pub pack: PackContext,
    /// Ids to predict, `[T]`, i64.
    pub targets: Tensor,
    /// Weight of each token in the loss, `[T]`, f32.
    pub weights: Tensor,
}

/// Tokens of logits that exist at once: V = 128K in fp32 is then 256 MB.
pub const LOSS_CHUNK_TOKENS: i64 = tangelo_planner::memory::LOSS_CHUNK_TOKENS as i64;

/// What a pass over one micro-batch gives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassStats {
    /// Sum over tokens of weight * -log p(target), not normalised.
    pub loss_sum: f64,
    /// Time in the forward loop, the loss included.
    pub forward: Duration,
    /// Time in the backward loop.
    pub backward: Duration,
}

/// Runs micro-batches through a model.
#[derive(Clone, Debug)]
pub struct BlockExecutor {
    /// Per block: whether only its input is kept and it is run again in backward.
    recompute: Vec<bool>,
}

/// A block's graph, or only its input where the block is to be run again.
struct Kept {
    input: Tensor,
    output: Option<Tensor>,
}

impl BlockExecutor {
    /// An executor that runs the marked blocks again in backward.
    pub fn new(recompute: Vec<bool>) -> BlockExecutor {
        BlockExecutor { recompute }
    }

    /// Adds the gradients of `coefficient` * sum(weight * -log p(target)) to the model's gradient buffers.
    pub fn forward_backward(&self, model: &Model, batch: &MicroBatch, coefficient: f64) -> PassStats {
        let start = Instant::now();
        let pack = &batch.pack;
        let angles = model.angles(&pack.positions);
        let mut kept = Vec::with_capacity(model.num_blocks());
        let mut x = tch::no_grad(|| model.embed(&pack.tokens));
        for layer in 0..model.num_blocks() {
            let input = x.detach().set_requires_grad(true);
            let output = if self.recompute[layer] {
                x = tch::no_grad(|| model.block(layer, &input, pack, &angles));
                None
            } else {
                let output = model.block(layer, &input, pack, &angles);
                x = output.shallow_clone();
                Some(output)
            };
            kept.push(Kept { input, output });
        }
        let (loss_sum, mut gradient) = self.head(model, x, batch, coefficient);
        let forward = start.elapsed();

        let start = Instant::now();
        for (layer, Kept { input, output }) in kept.into_iter().enumerate().rev() {
            let output = output.unwrap_or_else(|| model.block(layer, &input, pack, &angles));
            autograd::backward(&[&output], &[&gradient]);
            gradient = input.grad();
        }
        tch::no_grad(|| model.embed_backward(&pack.tokens, &gradient));
        PassStats { loss_sum, forward, backward: start.elapsed() }
    }

    /// Final norm, head and loss: the loss sum and the gradient with respect to `x`.
    fn head(&self, model: &Model, x: Tensor, batch: &MicroBatch, coefficient: f64) -> (f64, Tensor) {
        let input = x.detach().set_requires_grad(true);
        let normed = model.final_norm(&input);
        let head = &model.head().weight;
        let loss = op::cross_entropy_chunked(
            &normed.detach(),
            &head.value,
            &batch.targets,
            &batch.weights,
            coefficient,
            head.grad(),
            LOSS_CHUNK_TOKENS,
        );
        autograd::backward(&[&normed], &[&loss.dhidden]);
        (loss.loss_sum.double_value(&[]), input.grad())
    }

    /// Sum over tokens of weight * -log p(target), without gradients.
    pub fn evaluate(&self, model: &Model, batch: &MicroBatch) -> f64 {
        let (hidden, head) = (model.hidden(&batch.pack), &model.head().weight.value);
        op::cross_entropy_loss(&hidden, head, &batch.targets, &batch.weights, LOSS_CHUNK_TOKENS).double_value(&[])
    }
}
