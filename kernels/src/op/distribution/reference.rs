//! The head's distribution in plain operations.

use super::{Chunk, HeadRows};
use crate::op::accumulate_kind;
use tch::{Kind, Tensor};

/// See [`super::chunk`].
pub fn chunk(hidden: &Tensor, head: HeadRows<'_>, targets: &Tensor, temperature: f64) -> Chunk {
    let (kind, tokens) = (accumulate_kind(hidden), hidden.size()[0]);
    let logits = hidden.matmul(&head.weight.tr());
    if head.weight.size()[0] == 0 {
        let stats = Tensor::full([tokens, 4], f64::NEG_INFINITY, (kind, hidden.device()));
        let _ = stats.narrow(1, 1, 2).fill_(0.0);
        return Chunk { logits, stats };
    }
    let tempered = logits.to_kind(kind) / temperature;
    let largest = tempered.amax([1i64].as_slice(), true);
    let below = &tempered - &largest;
    let e = below.exp();
    let sum = |t: &Tensor| t.sum_dim_intlist([1i64].as_slice(), true, kind);
    let (here, row) = held_rows(targets, head);
    let at_target = tempered.gather(1, &row, false).masked_fill(&here.logical_not(), f64::NEG_INFINITY);
    let stats = Tensor::cat(&[largest, sum(&e), sum(&(e * below)), at_target], 1);
    Chunk { logits, stats }
}

/// Which targets have their row here, `[C, 1]`, and which row that is (0 where it is elsewhere).
fn held_rows(targets: &Tensor, head: HeadRows<'_>) -> (Tensor, Tensor) {
    let row = targets.unsqueeze(1) - head.start;
    let here = row.ge(0).logical_and(&row.lt(head.weight.size()[0]));
    let row = row * here.to_kind(Kind::Int64);
    (here, row)
}

/// See [`super::gradients`].
pub fn gradients(
    chunk: Chunk,
    hidden: &Tensor,
    head: HeadRows<'_>,
    targets: &Tensor,
    temperature: f64,
    rows: &Tensor,
) -> Tensor {
    if chunk.logits.numel() == 0 {
        return hidden.zeros_like();
    }
    let kind = accumulate_kind(hidden);
    let column = |i: i64| rows.narrow(1, i, 1);
    let logprobs = chunk.logits.to_kind(kind) / temperature - column(0) - column(1);
    let (a, b) = (column(3) / temperature, column(4) / temperature);
    let part = -(logprobs.exp() * (&a + &b * (logprobs + column(2))));
    let (here, row) = held_rows(targets, head);
    let part = part.scatter_add(1, &row, &(a * here.to_kind(kind)));
    let nothing = column(3).eq(0.0).logical_and(&column(4).eq(0.0));
    let part = part.masked_fill(&nothing, 0.0).to_kind(hidden.kind());
    if let Some(main) = head.main_grad {
        let _ = main.shallow_clone().g_add_(&part.transpose(0, 1).matmul(hidden).to_kind(main.kind()));
    }
    part.matmul(head.weight)
}
