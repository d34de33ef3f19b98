//! Rows of a table, and their gradient, which is added to a main gradient in fp32. There is no graph: the block executor
//! knows the embedding's output gradient once the first block's backward is done.
#![allow(unsafe_code)]

pub mod reference;

use tch::Tensor;

use crate::ffi;

/// The rows `ids [...]` (int64) of `table [V, D]`, as `[..., D]`. Panics on an id outside the table.
pub fn embedding(ids: &Tensor, table: &Tensor) -> Tensor {
    tch::no_grad(|| reference::embedding(ids, table))
}

/// Adds the rows of `grad [..., D]` to the rows `ids [...]` of `main_grad [V, D]` (fp32), in the order of `ids`. A tied
/// head passes the same main gradient to the loss.
pub fn embedding_backward(ids: &Tensor, grad: &Tensor, main_grad: &Tensor) {
    // SAFETY: all pointers outlive the call; the shim checks types and shapes.
    ffi::check(unsafe { ffi::tangelo_embedding_backward(ffi::borrow(ids), ffi::borrow(grad), ffi::borrow(main_grad)) });
}
