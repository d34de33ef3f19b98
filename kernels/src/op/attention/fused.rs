//! Attention through libtorch's own fused operator, document by document: for CUDA, and for float64.
//!
//! Without a window no mask exists. A window needs one of `Tq x Tk` booleans.

use std::ops::Range;

use tch::Tensor;

use super::reference::{behind_prefix, hidden_positions};

/// See [`super::attention_with_prefixes`]; `window` is in keys.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i64],
    prefixes: &[Range<i64>],
    scale: f64,
    window: i64,
) -> Tensor {
    let documents: Vec<Tensor> = cu_seqlens
        .windows(2)
        .enumerate()
        .map(|(document, bounds)| {
            // The prefix's queries again, although others have computed them: the operator is fast where it needs no mask.
            let [q, k, v] = [q, k, v].map(|x| behind_prefix(x, bounds, prefixes.get(document)));
            let own = bounds[1] - bounds[0];
            attention_with_past(&q, &k, &v, scale, window).narrow(0, q.size()[0] - own, own)
        })
        .collect();
    Tensor::cat(&documents, 0)
}

/// See [`super::attention_with_past`]; `window` is in keys.
pub fn attention_with_past(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, window: i64) -> Tensor {
    let (num_queries, num_keys) = (q.size()[0], k.size()[0]);
    let heads_first = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
    let whole = num_queries == num_keys && window >= num_keys;
    let mask = (!whole).then(|| {
        hidden_positions(num_queries, num_keys, num_keys - num_queries, Some(window), q.device()).logical_not()
    });
    let (q, k, v) = (heads_first(q), heads_first(k), heads_first(v));
    Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, whole, scale, true)
        .squeeze_dim(0)
        .transpose(0, 1)
        .contiguous()
}
