//! The plain operation, differentiable through autograd.

use tch::Tensor;

/// The rows `ids` of `table`.
pub fn embedding(ids: &Tensor, table: &Tensor) -> Tensor {
    Tensor::embedding(table, ids, -1, false, false)
}
