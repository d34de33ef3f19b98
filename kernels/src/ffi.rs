//! The border to the C++ shim: declarations, and the conversions that make a call from Rust safe.
//!
//! Invariants: a tensor passed in is borrowed for the call; a tensor that comes back is owned by Rust; a C++
//! exception arrives as a message and leaves as a panic, like every non-`f_` operation of tch. The device thread
//! contains panics. Deliberately absent: any logic.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};

use tch::Tensor;

/// An `at::Tensor*` that the shim borrows; null where a tensor is optional and absent.
pub(crate) type TensorRef = *const c_void;
/// An `at::Tensor*` that the shim gave away.
pub(crate) type TensorOut = *mut c_void;
type Message = *mut c_char;

unsafe extern "C" {
    fn tangelo_free(message: Message);
    pub(crate) fn tangelo_backward(outputs: *const TensorRef, grads: *const TensorRef, count: usize) -> Message;
    pub(crate) fn tangelo_grad(
        outputs: *const TensorRef,
        grads: *const TensorRef,
        num_outputs: usize,
        inputs: *const TensorRef,
        num_inputs: usize,
        results: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_storage_resize(tensor: TensorRef, num_bytes: i64) -> Message;
    pub(crate) fn tangelo_version(tensor: TensorRef, version: *mut i64) -> Message;
    pub(crate) fn tangelo_set_version(tensor: TensorRef, version: i64) -> Message;
    pub(crate) fn tangelo_linear(
        x: TensorRef,
        weight: TensorRef,
        bias: TensorRef,
        weight_grad: TensorRef,
        bias_grad: TensorRef,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_embedding(
        ids: TensorRef,
        table: TensorRef,
        main_grad: TensorRef,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_rms_norm(
        x: TensorRef,
        weight: TensorRef,
        eps: f64,
        main_grad: TensorRef,
        out: *mut TensorOut,
    ) -> Message;
}

/// The pointer behind `tensor`, valid while the borrow lives.
pub(crate) fn borrow(tensor: &Tensor) -> TensorRef {
    tensor.as_ptr().cast()
}

/// [`borrow`], or null.
pub(crate) fn borrow_option(tensor: Option<&Tensor>) -> TensorRef {
    tensor.map_or(std::ptr::null(), borrow)
}

/// The pointers behind `tensors`, valid while the borrows live.
pub(crate) fn borrow_all(tensors: &[&Tensor]) -> Vec<TensorRef> {
    tensors.iter().map(|tensor| borrow(tensor)).collect()
}

/// Panics with the shim's message, if there is one.
#[track_caller]
pub(crate) fn check(message: Message) {
    if message.is_null() {
        return;
    }
    // SAFETY: a non-null message is a NUL-terminated string made by strdup, and ours to free once.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        tangelo_free(message);
        text
    };
    panic!("{text}");
}

/// Calls the shim for `N` result tensors.
#[track_caller]
pub(crate) fn produce<const N: usize>(call: impl FnOnce(&mut [TensorOut; N]) -> Message) -> [Tensor; N] {
    let mut results = [std::ptr::null_mut(); N];
    check(call(&mut results));
    results.map(adopt)
}

/// Takes ownership of a tensor the shim gave away.
pub(crate) fn adopt(pointer: TensorOut) -> Tensor {
    assert!(!pointer.is_null(), "the shim returned no tensor");
    // SAFETY: the shim gives away pointers made by `new at::Tensor`, which is what tch's tensors own and delete.
    unsafe { Tensor::from_ptr(pointer.cast()) }
}
