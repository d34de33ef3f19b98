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
    pub(crate) fn tangelo_embedding_backward(ids: TensorRef, grad: TensorRef, main_grad: TensorRef) -> Message;
    pub(crate) fn tangelo_rms_norm(
        x: TensorRef,
        weight: TensorRef,
        eps: f64,
        main_grad: TensorRef,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_add_rms_norm(
        x: TensorRef,
        residual: TensorRef,
        weight: TensorRef,
        eps: f64,
        main_grad: TensorRef,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_rope(x: TensorRef, cos: TensorRef, sin: TensorRef, out: *mut TensorOut) -> Message;
    pub(crate) fn tangelo_qkv_rope(
        qkv: TensorRef,
        cos: TensorRef,
        sin: TensorRef,
        num_heads: i64,
        num_kv_heads: i64,
        head_dim: i64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_swiglu(gate_up: TensorRef, out: *mut TensorOut) -> Message;
    pub(crate) fn tangelo_attention(
        q: TensorRef,
        k: TensorRef,
        v: TensorRef,
        bounds: *const i64,
        num_bounds: usize,
        prefixes: *const i64,
        scale: f64,
        window: i64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_attention_with_past(
        q: TensorRef,
        k: TensorRef,
        v: TensorRef,
        scale: f64,
        window: i64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_attend(
        q: TensorRef,
        k: TensorRef,
        v: TensorRef,
        spans: *const AttentionSpan,
        num_spans: usize,
        scale: f64,
        window: i64,
        out: TensorRef,
        lse: TensorRef,
    ) -> Message;
    pub(crate) fn tangelo_attend_backward(
        q: TensorRef,
        k: TensorRef,
        v: TensorRef,
        out: TensorRef,
        dout: TensorRef,
        lse: TensorRef,
        spans: *const AttentionSpan,
        num_spans: usize,
        scale: f64,
        window: i64,
        dq: TensorRef,
        dk: TensorRef,
        dv: TensorRef,
    ) -> Message;
    pub(crate) fn tangelo_page_floats(type_of: TensorRef, head_dim: i64, out: *mut i64) -> Message;
    pub(crate) fn tangelo_mapped_floats(floats: i64, out: *mut TensorOut) -> Message;
    pub(crate) fn tangelo_paged_attention(
        q: TensorRef,
        k: TensorRef,
        v: TensorRef,
        pages: TensorRef,
        sequences: *const PagedSequence,
        num_sequences: usize,
        tables: *const i32,
        num_entries: usize,
        scale: f64,
        window: i64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_sample(
        hidden: TensorRef,
        head: TensorRef,
        asked: *const SampleRow,
        count: usize,
        out: *mut SampledToken,
    ) -> Message;
    pub(crate) fn tangelo_draw(
        logits: TensorRef,
        asked: *const SampleRow,
        count: usize,
        out: *mut SampledToken,
    ) -> Message;
    pub(crate) fn tangelo_contend(
        logits: TensorRef,
        start: i64,
        asked: *const SampleRow,
        count: usize,
        out: *mut [f64; CONTENDER_WIDTH],
    ) -> Message;
    pub(crate) fn tangelo_token_logprobs(
        hidden: TensorRef,
        head: TensorRef,
        targets: TensorRef,
        temperature: f64,
        chunk: i64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_cross_entropy(
        hidden: TensorRef,
        head: TensorRef,
        targets: TensorRef,
        weights: TensorRef,
        inverse_total_weight: f64,
        main_grad: TensorRef,
        chunk: i64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_cross_entropy_loss(
        hidden: TensorRef,
        head: TensorRef,
        targets: TensorRef,
        weights: TensorRef,
        chunk: i64,
        loss_sum: *mut f64,
    ) -> Message;
    pub(crate) fn tangelo_local_logits(
        hidden: TensorRef,
        head: TensorRef,
        targets: TensorRef,
        start: i64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_chunk_gradients(
        logits: TensorRef,
        hidden: TensorRef,
        head: TensorRef,
        targets: TensorRef,
        start: i64,
        lse: TensorRef,
        scales: TensorRef,
        main_grad: TensorRef,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_distribution(
        hidden: TensorRef,
        head: TensorRef,
        targets: TensorRef,
        start: i64,
        inverse_temperature: f64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_distribution_gradients(
        logits: TensorRef,
        hidden: TensorRef,
        head: TensorRef,
        targets: TensorRef,
        start: i64,
        inverse_temperature: f64,
        rows: TensorRef,
        main_grad: TensorRef,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_newton_schulz(
        m: TensorRef,
        steps: usize,
        eps: f64,
        coefficients: *const f64,
        out: *mut TensorOut,
    ) -> Message;
    pub(crate) fn tangelo_adamw(
        master: TensorRef,
        exp_avg: TensorRef,
        exp_avg_sq: TensorRef,
        grad: TensorRef,
        copy: TensorRef,
        begin: i64,
        end: i64,
        arguments: *const AdamWArguments,
    ) -> Message;
    pub(crate) fn tangelo_chunk_square_sums(flat: TensorRef, chunk: i64, sums: *mut f64) -> Message;
    fn tangelo_cpu_kernels_name() -> *const c_char;
}

/// Hyperparameters as the shim reads them; the same layout as its `AdamWArguments`.
#[repr(C)]
pub(crate) struct AdamWArguments {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub step: f64,
    pub grad_scale: f64,
}

/// A span of queries and keys as the shim reads it; the same layout as its `AttentionSpan`.
#[repr(C)]
pub(crate) struct AttentionSpan {
    pub first_query: i64,
    pub num_queries: i64,
    pub first_key: i64,
    pub num_keys: i64,
    pub offset: i64,
}

/// New tokens of a sequence as the shim reads them; the same layout as its `PagedSequence`.
#[repr(C)]
pub(crate) struct PagedSequence {
    pub first_row: i64,
    pub num_rows: i64,
    pub offset: i64,
    pub first_page: i64,
}

/// A draw as the shim reads it; the same layout as its `SampleRow`.
#[repr(C)]
pub(crate) struct SampleRow {
    pub row: i64,
    pub top_k: i64,
    pub temperature: f64,
    pub top_p: f64,
    pub min_p: f64,
    pub key: [u32; 2],
    pub banned: *const i64,
    pub num_banned: i64,
}

/// What was drawn; the same layout as the shim's `SampledToken`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct SampledToken {
    pub token: i64,
    pub logprob: f64,
    pub sampling_logprob: f64,
}

/// Numbers of the shim's `Contender`.
pub(crate) const CONTENDER_WIDTH: usize = 8;

/// The instruction set the CPU kernels use here: `avx512`, `avx2` or `generic`. The environment variable
/// `TANGELO_CPU_KERNELS` asks for a lesser one.
pub fn cpu_kernels_name() -> &'static str {
    // SAFETY: the shim returns a NUL-terminated string with static lifetime.
    unsafe { CStr::from_ptr(tangelo_cpu_kernels_name()) }.to_str().unwrap_or("unknown")
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
