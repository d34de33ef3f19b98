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

use std::ops::Range;

use tch::Tensor;

use crate::{ffi, op::has_cpu_kernels};

/// Causal attention within each document.
///
/// `q [T, H, hd]`, `k` and `v` `[T, K, hd]` with H a multiple of K; query head `h` reads key head `h / (H / K)`.
/// `cu_seqlens` holds the documents' bounds: 0, ..., T. Token `i` of a document sees tokens `j <= i` of it, with a
/// window also `i - j < window` (Mistral's convention: the token itself counts). Gives `[T, H, hd]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64, window: Option<i64>) -> Tensor {
    attention_with_prefixes(q, k, v, cu_seqlens, &[], scale, window)
}

/// Causal attention within documents that may begin with tokens of others: with a prompt that several answers share.
///
/// As [`attention`]; `prefixes` has for each document the tokens of the pack that go before its own (an empty range where
/// there are none), or is empty. On a CPU a token's output has the bits that it has where the document stands whole, and what
/// the prefix's keys and values get back is summed over documents in order, in fp32.
pub fn attention_with_prefixes(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i64],
    prefixes: &[Range<i64>],
    scale: f64,
    window: Option<i64>,
) -> Tensor {
    check_documents(q, cu_seqlens, prefixes);
    let window = window_or_all(window, cu_seqlens, prefixes);
    if !has_cpu_kernels(q) {
        return fused::attention(q, k, v, cu_seqlens, prefixes, scale, window);
    }
    let flat: Vec<i64> = prefixes.iter().flat_map(|prefix| [prefix.start, prefix.end]).collect();
    let flat_or_null = if flat.is_empty() { std::ptr::null() } else { flat.as_ptr() };
    // SAFETY: all pointers outlive the call; the bounds' length is given, and fixes that of the prefixes.
    let [out] = ffi::produce(|[out]| unsafe {
        ffi::tangelo_attention(
            ffi::borrow(q),
            ffi::borrow(k),
            ffi::borrow(v),
            cu_seqlens.as_ptr(),
            cu_seqlens.len(),
            flat_or_null,
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
    let window = window_or_all(window, &[0, k.size()[0]], &[]);
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

/// The window in keys; every key of the longest document where there is none.
fn window_or_all(window: Option<i64>, cu_seqlens: &[i64], prefixes: &[Range<i64>]) -> i64 {
    let prefix = |document: usize| prefixes.get(document).map_or(0, |prefix| prefix.end - prefix.start);
    let keys = cu_seqlens.windows(2).enumerate().map(|(document, bounds)| prefix(document) + bounds[1] - bounds[0]);
    let window = window.unwrap_or_else(|| keys.max().unwrap_or(1).max(1));
    assert!(window > 0, "attention: a window of {window} tokens");
    window
}

fn check_documents(q: &Tensor, cu_seqlens: &[i64], prefixes: &[Range<i64>]) {
    let tokens = q.size()[0];
    let rising = cu_seqlens.windows(2).all(|pair| pair[0] < pair[1]);
    assert!(
        cu_seqlens.len() > 1 && cu_seqlens[0] == 0 && rising && cu_seqlens.last() == Some(&tokens),
        "attention: document bounds must rise from 0 to the number of tokens {tokens}, found {cu_seqlens:?}",
    );
    let inside = |prefix: &Range<i64>| 0 <= prefix.start && prefix.start <= prefix.end && prefix.end <= tokens;
    assert!(
        prefixes.is_empty() || (prefixes.len() + 1 == cu_seqlens.len() && prefixes.iter().all(inside)),
        "attention: there must be a prefix for each of {} documents, inside {tokens} tokens, found {prefixes:?}",
        cu_seqlens.len() - 1,
    );
}
