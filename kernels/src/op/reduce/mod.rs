//! Reductions whose bits do not depend on threads or layout: square sums for the clip norm, the finite check, and the
//! sum of ranks' contributions.

pub mod reference;

use tch::Tensor;

/// The square sum of each chunk of `chunk_len` elements of `flat [n]` (the last may be shorter), in float64.
///
/// Each chunk is summed in one fixed order, so a rank that holds whole chunks finds the same values as one that holds
/// everything.
pub fn chunk_square_sums(flat: &Tensor, chunk_len: usize) -> Vec<f64> {
    assert!(chunk_len > 0, "chunk_len must be positive");
    tch::no_grad(|| reference::chunk_square_sums(flat, chunk_len))
}

/// Whether every element is finite.
pub fn all_finite(tensor: &Tensor) -> bool {
    tch::no_grad(|| reference::all_finite(tensor))
}

/// `parts[0] + parts[1] + ...` elementwise in fp32 (float64 for float64), in that order.
pub fn sum_in_rank_order(parts: &[Tensor]) -> Tensor {
    tch::no_grad(|| reference::sum_in_rank_order(parts))
}
