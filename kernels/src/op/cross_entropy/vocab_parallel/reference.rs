//! Vocabulary-parallel cross-entropy in plain operations.

use tch::{Kind, Tensor};

use super::LocalChunk;
use crate::op::accumulate_kind;

/// See [`super::local_logits`].
pub fn local_logits(hidden: &Tensor, head: &Tensor, targets: &Tensor, start: i64) -> LocalChunk {
    let (kind, tokens) = (accumulate_kind(hidden), hidden.size()[0]);
    let logits = hidden.matmul(&head.tr());
    if head.size()[0] == 0 {
        return LocalChunk { logits, stats: nothing_here(tokens, (kind, hidden.device())) };
    }
    let wide = logits.to_kind(kind);
    let largest = wide.amax([1i64].as_slice(), true);
    let sum = (&wide - &largest).exp().sum_dim_intlist([1i64].as_slice(), true, kind);
    let (here, row) = rows_of(targets, start, head.size()[0]);
    let target_logit = wide.gather(1, &row, false).masked_fill(&here.logical_not(), f64::NEG_INFINITY);
    LocalChunk { logits, stats: Tensor::cat(&[largest, sum, target_logit], 1) }
}

/// The statistics of a rank that holds no row.
fn nothing_here(tokens: i64, options: (Kind, tch::Device)) -> Tensor {
    let stats = Tensor::full([tokens, 3], f64::NEG_INFINITY, options);
    let _ = stats.select(1, 1).fill_(0.0);
    stats
}

/// See [`super::merge_stats`].
pub fn merge_stats(all: &Tensor) -> (Tensor, Tensor) {
    let column = |i: i64| all.select(2, i);
    let largest = column(0).amax([0i64].as_slice(), false);
    let mut sum = largest.zeros_like();
    for rank in 0..all.size()[0] {
        sum += (column(0).get(rank) - &largest).exp() * column(1).get(rank);
    }
    (largest + sum.log(), column(2).amax([0i64].as_slice(), false))
}

/// See [`super::chunk_gradients`].
#[allow(clippy::too_many_arguments)]
pub fn chunk_gradients(
    chunk: LocalChunk,
    hidden: &Tensor,
    head: &Tensor,
    targets: &Tensor,
    start: i64,
    lse: &Tensor,
    scales: &Tensor,
    main_grad: Option<&Tensor>,
) -> Tensor {
    let (kind, scales) = (accumulate_kind(hidden), scales.unsqueeze(1));
    let mut logits = chunk.logits;
    if head.size()[0] > 0 {
        let (here, row) = rows_of(targets, start, head.size()[0]);
        let one_hot = logits.zeros_like().to_kind(kind).scatter(1, &row, &here.to_kind(kind));
        let gradient = ((logits.to_kind(kind) - lse.unsqueeze(1)).exp() - one_hot) * &scales;
        logits.copy_(&gradient.masked_fill(&scales.eq(0.0), 0.0));
    }
    if let Some(main) = main_grad {
        let _ = main.shallow_clone().g_add_(&logits.transpose(0, 1).matmul(hidden).to_kind(main.kind()));
    }
    logits.matmul(head)
}

/// Whether each target lies in rows `start` to `start + num_rows`, and its row (any row where it does not): `[C, 1]`.
fn rows_of(targets: &Tensor, start: i64, num_rows: i64) -> (Tensor, Tensor) {
    let targets = targets.unsqueeze(1);
    let here = targets.ge(start).logical_and(&targets.lt(start + num_rows));
    (here, targets.clamp(start, start + num_rows - 1) - start)
}
