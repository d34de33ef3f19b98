//! Rows of a table, whose gradient is added to a main gradient in fp32.
#![allow(unsafe_code)]

pub mod reference;

use tch::Tensor;

use crate::ffi;

/// The rows `ids [...]` (int64) of `table [V, D]`, as `[..., D]`. Backward adds to `main_grad [V, D]`.
///
/// A tied head passes the same main gradient to the loss. Panics on an id outside the table.
pub fn embedding(ids: &Tensor, table: &Tensor, main_grad: Option<&Tensor>) -> Tensor {
    // SAFETY: all pointers outlive the call; null where absent.
    let [out] = ffi::produce(|[out]| unsafe {
        ffi::tangelo_embedding(ffi::borrow(ids), ffi::borrow(table), ffi::borrow_option(main_grad), out)
    });
    out
}
