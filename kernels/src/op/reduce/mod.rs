//! Reductions whose bits do not depend on threads or layout: square sums for the clip norm, the finite check, and the
//! sum of ranks' contributions.
#![allow(unsafe_code)]

pub mod reference;

use tch::{Device, Kind, Tensor};

use crate::{ffi, op::has_cpu_kernels};

/// The square sum of each chunk of `chunk_len` elements of `flat [n]` (the last may be shorter), in float64.
///
/// Each chunk is summed in one fixed order, so a rank that holds whole chunks finds the same values as one that holds
/// everything.
pub fn chunk_square_sums(flat: &Tensor, chunk_len: usize) -> Vec<f64> {
    assert!(chunk_len > 0, "chunk_len must be positive");
    if flat.device() != Device::Cpu || flat.kind() != Kind::Float || !flat.is_contiguous() {
        return tch::no_grad(|| reference::chunk_square_sums(flat, chunk_len));
    }
    let mut sums = vec![0.0; flat.numel().div_ceil(chunk_len)];
    // SAFETY: the pointer outlives the call; `sums` has room for one number per chunk.
    ffi::check(unsafe { ffi::tangelo_chunk_square_sums(ffi::borrow(flat), chunk_len as i64, sums.as_mut_ptr()) });
    sums
}

/// Whether every element is finite.
pub fn all_finite(tensor: &Tensor) -> bool {
    if !has_cpu_kernels(tensor) || !tensor.is_contiguous() {
        return tch::no_grad(|| reference::all_finite(tensor));
    }
    let mut finite = false;
    // SAFETY: the pointer outlives the call; `finite` is writable.
    ffi::check(unsafe { ffi::tangelo_all_finite(ffi::borrow(tensor), &mut finite) });
    finite
}

/// `parts[0] + parts[1] + ...` elementwise in fp32 (float64 for float64), in that order.
pub fn sum_in_rank_order(parts: &[Tensor]) -> Tensor {
    tch::no_grad(|| reference::sum_in_rank_order(parts))
}
