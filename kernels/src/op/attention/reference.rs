//! Attention with explicit score matrices and masks, differentiable through autograd.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::op::accumulate_kind;

/// Document by document, [`attention_with_past`], with its prefix where there are any.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i64],
    prefixes: &[Range<i64>],
    scale: f64,
    window: Option<i64>,
) -> Tensor {
    let documents: Vec<Tensor> = cu_seqlens
        .windows(2)
        .enumerate()
        .map(|(document, bounds)| {
            let [k, v] = [k, v].map(|x| behind_prefix(x, bounds, prefixes.get(document)));
            attention_with_past(&q.narrow(0, bounds[0], bounds[1] - bounds[0]), &k, &v, scale, window)
        })
        .collect();
    Tensor::cat(&documents, 0)
}

/// Tokens of a document, `bounds` its begin and end, behind those of its prefix.
pub(super) fn behind_prefix(x: &Tensor, bounds: &[i64], prefix: Option<&Range<i64>>) -> Tensor {
    let own = x.narrow(0, bounds[0], bounds[1] - bounds[0]);
    match prefix.filter(|prefix| !prefix.is_empty()) {
        Some(prefix) => Tensor::cat(&[x.narrow(0, prefix.start, prefix.end - prefix.start), own], 0),
        None => own,
    }
}

/// Queries are the last tokens of the document that the keys span.
pub fn attention_with_past(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, window: Option<i64>) -> Tensor {
    let kind = accumulate_kind(q);
    let group = q.size()[1] / k.size()[1];
    let heads_first = |x: &Tensor| x.to_kind(kind).transpose(0, 1);
    let (queries, keys) = (heads_first(q), heads_first(&k.repeat_interleave_self_int(group, 1, None)));
    let values = heads_first(&v.repeat_interleave_self_int(group, 1, None));
    let scores = queries.matmul(&keys.transpose(1, 2)) * scale;
    let (num_queries, num_keys) = (q.size()[0], k.size()[0]);
    let hidden = hidden_positions(num_queries, num_keys, num_keys - num_queries, window, q.device());
    let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, kind);
    weights.matmul(&values).transpose(0, 1).contiguous().to_kind(q.kind())
}

/// `[Tq, Tk]`, true where the query must not look; the first query is `offset` positions behind the first key.
pub(super) fn hidden_positions(
    num_queries: i64,
    num_keys: i64,
    offset: i64,
    window: Option<i64>,
    device: Device,
) -> Tensor {
    let key = Tensor::arange(num_keys, (Kind::Int64, device)).unsqueeze(0);
    let query = (Tensor::arange(num_queries, (Kind::Int64, device)) + offset).unsqueeze(1);
    let distance = query - key;
    let future = distance.lt(0);
    match window {
        Some(window) => future.logical_or(&distance.ge(window)),
        None => future,
    }
}
