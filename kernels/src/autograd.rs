//! Backward with given output gradients, and the storage tricks a block executor needs.
//!
//! Invariants: nothing here keeps a tensor alive. All functions panic with libtorch's message on failure, as tch's
//! plain operations do. Deliberately absent: hooks.
#![allow(unsafe_code)]

use tch::Tensor;

use crate::ffi;

/// Runs backward from `outputs` with the gradients `grads` (same shapes), adding into the `.grad` of leaves.
pub fn backward(outputs: &[&Tensor], grads: &[&Tensor]) {
    assert_eq!(outputs.len(), grads.len(), "backward needs one gradient for each output");
    let (outputs_c, grads_c) = (ffi::borrow_all(outputs), ffi::borrow_all(grads));
    // SAFETY: both arrays hold `outputs.len()` tensor pointers that outlive the call.
    ffi::check(unsafe { ffi::tangelo_backward(outputs_c.as_ptr(), grads_c.as_ptr(), outputs.len()) });
}

/// The gradients of `inputs`, given the gradients `grads` of `outputs`; `.grad` of leaves stays as it was.
///
/// Panics if an input has no part in the outputs.
pub fn grad(outputs: &[&Tensor], inputs: &[&Tensor], grads: &[&Tensor]) -> Vec<Tensor> {
    assert_eq!(outputs.len(), grads.len(), "grad needs one gradient for each output");
    let (outputs_c, inputs_c, grads_c) = (ffi::borrow_all(outputs), ffi::borrow_all(inputs), ffi::borrow_all(grads));
    let mut results = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: the arrays hold as many pointers as the lengths say and outlive the call; `results` has room for all.
    ffi::check(unsafe {
        ffi::tangelo_grad(
            outputs_c.as_ptr(),
            grads_c.as_ptr(),
            outputs.len(),
            inputs_c.as_ptr(),
            inputs.len(),
            results.as_mut_ptr(),
        )
    });
    results.into_iter().map(ffi::adopt).collect()
}

/// Frees the storage behind `tensor` (`num_bytes` 0), or gives a freed one back its size; contents are undefined then.
///
/// A graph may go on holding the tensor while it is freed; it must be refilled, inside [`preserving_version`], before
/// the graph reads it again. Every view of the storage is affected.
pub fn storage_resize(tensor: &Tensor, num_bytes: usize) {
    let num_bytes = i64::try_from(num_bytes).expect("a storage holds fewer than 2^63 bytes");
    // SAFETY: the pointer outlives the call.
    ffi::check(unsafe { ffi::tangelo_storage_resize(ffi::borrow(tensor), num_bytes) });
}

/// Runs `refill`, then sets `tensor`'s version back, so that graphs that saved it still accept it.
///
/// Only for writing back the very values the graph saved: autograd cannot notice if they differ.
pub fn preserving_version<R>(tensor: &Tensor, refill: impl FnOnce() -> R) -> R {
    let mut version = 0;
    // SAFETY: the pointer outlives the call, `version` is writable.
    ffi::check(unsafe { ffi::tangelo_version(ffi::borrow(tensor), &mut version) });
    let result = refill();
    // SAFETY: the pointer outlives the call.
    ffi::check(unsafe { ffi::tangelo_set_version(ffi::borrow(tensor), version) });
    result
}
