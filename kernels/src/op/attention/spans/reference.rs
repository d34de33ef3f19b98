//! Spans with explicit score matrices and masks.

use tch::{Kind, Tensor};

use super::super::reference::hidden_positions;
use super::{Running, Span};
use crate::op::accumulate_kind;

/// See [`super::attend`].
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &[Span],
    scale: f64,
    window: Option<i64>,
    running: &mut Running,
) {
    let group = q.size()[1] / k.size()[1];
    for span in spans {
        let scores = scores_of(q, k, span, scale, window);
        let mut out = rows_of(&running.out, &span.queries).transpose(0, 1);
        let mut lse = columns_of(&running.lse, span);
        let merged = lse.logaddexp(&scores.logsumexp([-1i64].as_slice(), false));
        let weights = exp_against(&scores, &merged.unsqueeze(-1));
        let kept = exp_against(&lse, &merged).unsqueeze(-1);
        let values = heads_first(v, &span.keys, group, scores.kind());
        out.copy_(&(&out * kept + weights.matmul(&values)));
        lse.copy_(&merged);
    }
}

/// See [`super::attend_backward`].
#[allow(clippy::too_many_arguments)]
pub fn attend_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    dout: &Tensor,
    lse: &Tensor,
    spans: &[Span],
    scale: f64,
    window: Option<i64>,
    dq: &Tensor,
    dk: &Tensor,
    dv: &Tensor,
) {
    let (kind, group) = (accumulate_kind(q), q.size()[1] / k.size()[1]);
    for span in spans {
        let scores = scores_of(q, k, span, scale, window);
        let weights = exp_against(&scores, &columns_of(lse, span).unsqueeze(-1));
        let of_queries = |x: &Tensor| heads_first(x, &span.queries, 1, kind);
        let (queries, out, dout) = (of_queries(q), of_queries(out), of_queries(dout));
        let (keys, values) = (heads_first(k, &span.keys, group, kind), heads_first(v, &span.keys, group, kind));
        let dots = (&dout * out).sum_dim_intlist([-1i64].as_slice(), true, kind);
        let dscores = &weights * (dout.matmul(&values.transpose(1, 2)) - dots) * scale;
        let of_keys = |per_head: Tensor| {
            let (heads, length, dim) = per_head.size3().expect("[H, Tk, hd]");
            let grouped = per_head.view([heads / group, group, length, dim]);
            grouped.sum_dim_intlist([1i64].as_slice(), false, kind).transpose(0, 1)
        };
        let _ = rows_of(dq, &span.queries).g_add_(&dscores.matmul(&keys).transpose(0, 1));
        let _ = rows_of(dk, &span.keys).g_add_(&of_keys(dscores.transpose(1, 2).matmul(&queries)));
        let _ = rows_of(dv, &span.keys).g_add_(&of_keys(weights.transpose(1, 2).matmul(&dout)));
    }
}

/// Scaled scores `[H, queries, keys]`, minus infinity where the query must not look.
fn scores_of(q: &Tensor, k: &Tensor, span: &Span, scale: f64, window: Option<i64>) -> Tensor {
    let (kind, group) = (accumulate_kind(q), q.size()[1] / k.size()[1]);
    let queries = heads_first(q, &span.queries, 1, kind);
    let keys = heads_first(k, &span.keys, group, kind);
    let hidden = hidden_positions(queries.size()[1], keys.size()[1], span.offset, window, q.device());
    (queries.matmul(&keys.transpose(1, 2)) * scale).masked_fill(&hidden, f64::NEG_INFINITY)
}

/// `exp(x - lse)`, and 0, not NaN, where the log-sum-exp is that of nothing.
fn exp_against(x: &Tensor, lse: &Tensor) -> Tensor {
    (x - lse.masked_fill(&lse.eq(f64::NEG_INFINITY), f64::INFINITY)).exp()
}

fn rows_of(x: &Tensor, rows: &std::ops::Range<i64>) -> Tensor {
    x.narrow(0, rows.start, rows.end - rows.start)
}

fn columns_of(lse: &Tensor, span: &Span) -> Tensor {
    lse.narrow(1, span.queries.start, span.queries.end - span.queries.start)
}

/// Rows of `[T, heads, hd]` as `[heads * group, rows, hd]`, each head repeated for its group.
fn heads_first(x: &Tensor, rows: &std::ops::Range<i64>, group: i64, kind: Kind) -> Tensor {
    rows_of(x, rows).to_kind(kind).repeat_interleave_self_int(group, 1, None).transpose(0, 1)
}
