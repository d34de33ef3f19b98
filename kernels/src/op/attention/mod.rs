//! Causal attention over packed documents, with grouped keys and values and an optional sliding window.

pub mod reference;

use tch::Tensor;

/// Causal attention within each document.
///
/// `q [T, H, hd]`, `k` and `v` `[T, K, hd]` with H a multiple of K; query head `h` reads key head `h / (H / K)`.
/// `cu_seqlens` holds the documents' bounds: 0, ..., T. Token `i` of a document sees tokens `j <= i` of it, with a
/// window also `i - j < window` (Mistral's convention: the token itself counts). Gives `[T, H, hd]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64, window: Option<i64>) -> Tensor {
    check_documents(q, cu_seqlens);
    reference::attention(q, k, v, cu_seqlens, scale, window)
}

/// Attention of the last `Tq` tokens of one document over all its `Tk` tokens: `q [Tq, H, hd]`, `k`, `v`
/// `[Tk, K, hd]`. For generation; no gradients.
pub fn attention_with_past(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, window: Option<i64>) -> Tensor {
    tch::no_grad(|| reference::attention_with_past(q, k, v, scale, window))
}

fn check_documents(q: &Tensor, cu_seqlens: &[i64]) {
    let rising = cu_seqlens.windows(2).all(|pair| pair[0] < pair[1]);
    assert!(
        cu_seqlens.len() > 1 && cu_seqlens[0] == 0 && rising && cu_seqlens.last() == Some(&q.size()[0]),
        "attention: document bounds must rise from 0 to the number of tokens {}, found {cu_seqlens:?}",
        q.size()[0]
    );
}
