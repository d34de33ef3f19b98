//! The reduction in plain operations.

use tch::{Kind, Tensor};

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
