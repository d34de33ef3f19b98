//! The reductions in plain operations.

use tch::{Kind, Tensor};

use crate::op::accumulate_kind;

/// See [`super::chunk_square_sums`].
pub fn chunk_square_sums(flat: &Tensor, chunk_len: usize) -> Vec<f64> {
    let (total, chunk_len) = (flat.numel() as i64, chunk_len as i64);
    (0..total)
        .step_by(chunk_len as usize)
        .map(|start| {
            let chunk = flat.narrow(0, start, chunk_len.min(total - start)).to_kind(Kind::Double);
            chunk.square().sum(Kind::Double).double_value(&[])
        })
        .collect()
}

/// See [`super::all_finite`].
pub fn all_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) != 0
}

/// See [`super::sum_in_rank_order`].
pub fn sum_in_rank_order(parts: &[Tensor]) -> Tensor {
    let (first, rest) = parts.split_first().expect("sum_in_rank_order needs at least one part");
    let kind = accumulate_kind(first);
    let mut sum = first.to_dtype(kind, false, true);
    for part in rest {
        sum += part.to_kind(kind);
    }
    sum
}
