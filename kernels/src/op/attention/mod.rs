//! Causal attention over packed documents, with grouped keys and values and an optional sliding window.
//!
//! On a CPU the method is FlashAttention-2's in fp32 tiles, cut at fixed positions of the document: a query's output has
//! the same bits computed alone with a cache as among all queries, with any number of threads. No score matrix and no
//! mask exist beyond a tile.
#![allow(unsafe_code)]

mod fused;
pub mod paged;
pub mod reference;
pub mod spans;

pub use paged::{PagedBatch, PagedKv};

use tch::Tensor;

use crate::{ffi, op::has_cpu_kernels};

/// Causal attention within each document.
///
/// `q [T, H, hd]`, `k` and `v` `[T, K, hd]` with H a multiple of K; query head `h` reads key head `h / (H / K)`.
/// `cu_seqlens` holds the documents' bounds: 0, ..., T. Token `i` of a document sees tokens `j <= i` of it, with a
/// window also `i - j < window` (Mistral's convention: the token itself counts). Gives `[T, H, hd]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64, window: Option<i64>) -> Tensor {
    check_documents(q, cu_seqlens);
    let window = window_or_all(window, k);
    if !has_cpu_kernels(q) {
        return fused::attention(q, k, v, cu_seqlens, scale, window);
    }
    // SAFETY: all pointers outlive the call; the bounds' length is given.
    let [out] = ffi::produce(|[out]| unsafe {
        ffi::tangelo_attention(
            ffi::borrow(q),
            ffi::borrow(k),
            ffi::borrow(v),
            cu_seqlens.as_ptr(),
            cu_seqlens.len(),
            scale,
            window,
            out,
        )
    });
    out
}

/// Attention of the last `Tq` tokens of one document over all its `Tk` tokens: `q [Tq, H, hd]`, `k`, `v`
/// `[Tk, K, hd]`. For generation; no gradients.
pub fn attention_with_past(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, window: Option<i64>) -> Tensor {
    let window = window_or_all(window, k);
    tch::no_grad(|| {
        if !has_cpu_kernels(q) {
            return fused::attention_with_past(q, k, v, scale, window);
        }
        // SAFETY: all pointers outlive the call.
        let [out] = ffi::produce(|[out]| unsafe {
            ffi::tangelo_attention_with_past(ffi::borrow(q), ffi::borrow(k), ffi::borrow(v), scale, window, out)
        });
        out
    })
}

/// The window in keys; every key where there is none.
fn window_or_all(window: Option<i64>, k: &Tensor) -> i64 {
    let window = window.unwrap_or_else(|| k.size()[0].max(1));
    assert!(window > 0, "attention: a window of {window} tokens");
    window
}

fn check_documents(q: &Tensor, cu_seqlens: &[i64]) {
    let rising = cu_seqlens.windows(2).all(|pair| pair[0] < pair[1]);
    assert!(
        cu_seqlens.len() > 1 && cu_seqlens[0] == 0 && rising && cu_seqlens.last() == Some(&q.size()[0]),
        "attention: document bounds must rise from 0 to the number of tokens {}, found {cu_seqlens:?}",
        q.size()[0]
    );
}
