//! Square sums for the clip norm, whose bits do not depend on threads or layout.
#![allow(unsafe_code)]

pub mod reference;

use tch::{Device, Kind, Tensor};

use crate::ffi;

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
