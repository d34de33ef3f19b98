//! Chunked cross-entropy in plain operations.

use tch::{Kind, Tensor};

use super::CrossEntropy;
use crate::op::accumulate_kind;
use crate::op::logprob::reference::{chunks, token_logprobs};

/// See [`super::cross_entropy_chunked`].
pub fn cross_entropy_chunked(
    hidden: &Tensor,
    head_weight: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
    inverse_total_weight: f64,
    main_grad: Option<&Tensor>,
    chunk_tokens: i64,
) -> CrossEntropy {
    let kind = accumulate_kind(hidden);
    let (rows, hidden_rows, targets, weights) = weighted_rows(hidden, targets, weights);
    let mut loss_sum = Tensor::zeros([], (Kind::Double, hidden.device()));
    let dhidden = hidden.zeros_like();
    for chunk in chunks(rows.size()[0], chunk_tokens) {
        let part = |x: &Tensor| x.narrow(0, chunk.0, chunk.1);
        let (states, targets, weights) = (part(&hidden_rows), part(&targets).unsqueeze(1), part(&weights).unsqueeze(1));
        let logprobs = states.linear(head_weight, None::<&Tensor>).to_kind(kind).log_softmax(-1, kind);
        loss_sum -= (logprobs.gather(1, &targets, false) * &weights).sum(Kind::Double);
        let scale = weights.to_kind(kind) * inverse_total_weight;
        let dlogits = (logprobs.exp() * &scale).scatter_add(1, &targets, &-&scale).to_kind(hidden.kind());
        let _ = dhidden.shallow_clone().index_copy_(0, &part(&rows), &dlogits.matmul(head_weight));
        if let Some(main) = main_grad {
            let _ = main.shallow_clone().g_add_(&dlogits.transpose(0, 1).matmul(&states).to_kind(main.kind()));
        }
    }
    CrossEntropy { loss_sum, dhidden }
}

/// See [`super::cross_entropy_loss`].
pub fn cross_entropy_loss(
    hidden: &Tensor,
    head_weight: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
    chunk_tokens: i64,
) -> Tensor {
    let (_, hidden_rows, targets, weights) = weighted_rows(hidden, targets, weights);
    let logprobs = token_logprobs(&hidden_rows, head_weight, &targets, 1.0, chunk_tokens);
    -(logprobs * weights).sum(Kind::Double)
}

/// Indices, states, targets and weights of the tokens whose weight is not zero.
fn weighted_rows(hidden: &Tensor, targets: &Tensor, weights: &Tensor) -> (Tensor, Tensor, Tensor, Tensor) {
    let rows = weights.nonzero().squeeze_dim(1);
    let pick = |x: &Tensor| x.index_select(0, &rows);
    (rows.shallow_clone(), pick(hidden), pick(targets), pick(weights))
}
