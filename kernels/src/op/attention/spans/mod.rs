//! Attention a part of the keys at a time, for context parallelism: keys of other ranks arrive chunk by chunk (ring) or
//! all at once (all-gather), in chunks of documents that need not be neighbours (zigzag).
//!
//! Forward, each call merges further keys into a running softmax; backward, each call adds what its keys contribute,
//! from the final output and log-sum-exp. There is no graph, no score matrix beyond a tile, and no communication.
//!
//! Invariants: sums run in an order that the spans alone fix, whatever the number of threads. A row that has seen
//! nothing yet has an output of exactly zero and a log-sum-exp of minus infinity, and never makes a NaN. Sums are kept
//! in fp32 (float64 for float64), so that merging many parts in bf16 costs no precision.
//!
//! The merge is that of Ring Attention (Liu, Zaharia & Abbeel 2023) on FlashAttention-2's tiles (Dao 2023).
#![allow(unsafe_code)]

pub mod reference;

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::ffi::{self, AttentionSpan};
use crate::op::{accumulate_kind, has_cpu_kernels};

/// Some queries, and the keys of the same document that they may see.
///
/// Query `i` of the span is at position `p = offset + i` of the document, counted from the span's first key. It sees
/// key `j` of the span if `j <= p`, and with a window if also `p - j < window`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Rows of `q`.
    pub queries: Range<i64>,
    /// Rows of `k` and `v`.
    pub keys: Range<i64>,
    /// Document position of the first query minus that of the first key. It may exceed the number of keys (all of them
    /// precede the queries), and may be negative (the first queries see nothing).
    pub offset: i64,
}

impl Span {
    /// The same span without the queries that see nothing and the keys that nobody sees, if anything remains.
    fn trimmed(&self, window: i64) -> Option<Span> {
        let (mut queries, mut keys, mut offset) = (self.queries.clone(), self.keys.clone(), self.offset);
        if queries.is_empty() || keys.is_empty() {
            return None;
        }
        queries.start += (-offset).max(0);
        offset = offset.max(0);
        let too_far = (offset + 1).saturating_sub(window).max(0);
        keys.start += too_far;
        offset -= too_far;
        keys.end = keys.end.min(keys.start + offset + (queries.end - queries.start));
        // The last query that sees the last key.
        let last_position = (keys.end - keys.start - 1).saturating_add(window - 1);
        queries.end = queries.end.min(queries.start.saturating_add(last_position - offset + 1));
        (!queries.is_empty() && !keys.is_empty()).then_some(Span { queries, keys, offset })
    }
}

/// Attention under way: the softmax over the keys seen so far.
#[derive(Debug)]
pub struct Running {
    /// `[Tq, H, hd]` in fp32 (float64 for float64): the output, normalised; 0 where nothing was seen yet.
    pub out: Tensor,
    /// `[H, Tq]` in fp32 (float64 for float64): the logarithm of the sum of exponentials of scaled scores; minus
    /// infinity where nothing was seen yet.
    pub lse: Tensor,
}

impl Running {
    /// Nothing seen yet by the queries `q [Tq, H, hd]`.
    pub fn new(q: &Tensor) -> Running {
        let (num_queries, heads, dim) = q.size3().expect("attention: queries must be [Tq, H, hd]");
        let options = (accumulate_kind(q), q.device());
        let out = Tensor::zeros([num_queries, heads, dim], options);
        Running { out, lse: Tensor::full([heads, num_queries], f64::NEG_INFINITY, options) }
    }
}

/// Merges the keys of `spans` into `running`.
///
/// `q [Tq, H, hd]`, `k` and `v` `[Tk, K, hd]` of one type, H a multiple of K; query head `h` reads key head
/// `h / (H / K)`. Spans may share queries or keys, but no query may see a key twice. `scale` multiplies scores;
/// `window` is in tokens, the query's own included. Panics where a span lies outside `q` or `k`.
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &[Span],
    scale: f64,
    window: Option<i64>,
    running: &mut Running,
) {
    check(q, k, v, spans, window);
    check_sums("the running output", &running.out, &q.size(), q);
    check_sums("the running log-sum-exp", &running.lse, &lse_shape(q), q);
    tch::no_grad(|| {
        if !has_cpu_kernels(q) {
            return reference::attend(q, k, v, spans, scale, window, running);
        }
        let (trimmed, window) = for_kernels(spans, window);
        // SAFETY: all pointers outlive the call, which checks the spans; their number is given.
        ffi::check(unsafe {
            ffi::tangelo_attend(
                ffi::borrow(q),
                ffi::borrow(k),
                ffi::borrow(v),
                trimmed.as_ptr(),
                trimmed.len(),
                scale,
                window,
                ffi::borrow(&running.out),
                ffi::borrow(&running.lse),
            )
        });
    });
}

/// Adds what the keys of `spans` contribute to the gradients `dq [Tq, H, hd]`, `dk` and `dv` `[Tk, K, hd]`: contiguous,
/// in fp32 (float64 for float64).
///
/// `out [Tq, H, hd]` (any float type) and `lse [H, Tq]` are the *final* ones, after all keys; `dout [Tq, H, hd]` is the
/// output's gradient in the queries' type; the rest is as in [`attend`]. Over calls that together pass every key once,
/// the sums are attention's
#[allow(clippy::too_many_arguments)]
pub fn attend_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    dout: &Tensor,
    lse: &Tensor,
    spans: &[Span],
    scale: f64,
    window: Option<i64>,
    dq: &Tensor,
    dk: &Tensor,
    dv: &Tensor,
) {
    check(q, k, v, spans, window);
    assert_eq!(out.size(), q.size(), "attend_backward: the output must have the queries' shape");
    assert_eq!(dout.size(), q.size(), "attend_backward: the output's gradient must have the queries' shape");
    assert_eq!(dout.kind(), q.kind(), "attend_backward: the output's gradient must have the queries' type");
    check_sums("the log-sum-exp", lse, &lse_shape(q), q);
    check_sums("the queries' gradient", dq, &q.size(), q);
    check_sums("the keys' gradient", dk, &k.size(), q);
    check_sums("the values' gradient", dv, &v.size(), q);
    tch::no_grad(|| {
        if !has_cpu_kernels(q) {
            return reference::attend_backward(q, k, v, out, dout, lse, spans, scale, window, dq, dk, dv);
        }
        let (trimmed, window) = for_kernels(spans, window);
        let out = out.to_kind(Kind::Float);
        // SAFETY: all pointers outlive the call, which checks the spans; their number is given.
        ffi::check(unsafe {
            ffi::tangelo_attend_backward(
                ffi::borrow(q),
                ffi::borrow(k),
                ffi::borrow(v),
                ffi::borrow(&out),
                ffi::borrow(dout),
                ffi::borrow(lse),
                trimmed.as_ptr(),
                trimmed.len(),
                scale,
                window,
                ffi::borrow(dq),
                ffi::borrow(dk),
                ffi::borrow(dv),
            )
        });
    });
}

/// Spans as the kernels take them (every query sees a key, every key has a query behind it), and the window in keys, at
/// most one beyond every distance.
fn for_kernels(spans: &[Span], window: Option<i64>) -> (Vec<AttentionSpan>, i64) {
    let reach = |span: &Span| span.offset + span.queries.end - span.queries.start;
    let longest = spans.iter().map(reach).max().unwrap_or(1).max(1);
    let window = window.map_or(longest, |window| window.min(longest));
    let mut trimmed: Vec<Span> = spans.iter().filter_map(|span| span.trimmed(window)).collect();
    // Spans that share queries become neighbours; those of the same first query stay in the caller's order.
    trimmed.sort_by_key(|span| span.queries.start);
    let spans = trimmed.iter().map(|span| AttentionSpan {
        first_query: span.queries.start,
        num_queries: span.queries.end - span.queries.start,
        first_key: span.keys.start,
        num_keys: span.keys.end - span.keys.start,
        offset: span.offset,
    });
    (spans.collect(), window)
}

fn lse_shape(q: &Tensor) -> [i64; 2] {
    [q.size()[1], q.size()[0]]
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span], window: Option<i64>) {
    let (queries, keys) = (q.size(), k.size());
    let fits = queries.len() == 3 && keys.len() == 3 && v.size() == keys && queries[2] == keys[2];
    assert!(
        fits && keys[1] > 0 && queries[1] % keys[1] == 0 && q.kind() == k.kind() && q.kind() == v.kind(),
        "attention: queries {queries:?} {:?}, keys {keys:?} {:?} and values {:?} {:?} do not fit; expected [Tq, H, hd], \
         [Tk, K, hd] twice, H a multiple of K, of one type",
        q.kind(),
        k.kind(),
        v.size(),
        v.kind(),
    );
    assert!(window.is_none_or(|window| window > 0), "attention: a window of {window:?} tokens");
    let inside = |range: &Range<i64>, length: i64| 0 <= range.start && range.start <= range.end && range.end <= length;
    for span in spans {
        assert!(
            inside(&span.queries, queries[0]) && inside(&span.keys, keys[0]),
            "attention: {span:?} lies outside {} queries and {} keys",
            queries[0],
            keys[0]
        );
    }
}

fn check_sums(name: &str, sums: &Tensor, shape: &[i64], q: &Tensor) {
    let kind = accumulate_kind(q);
    assert!(
        sums.size() == shape && sums.kind() == kind && sums.is_contiguous() && sums.device() == q.device(),
        "attention: {name} must be contiguous {kind:?} {shape:?} on {:?}, found {:?} {:?} on {:?}",
        q.device(),
        sums.kind(),
        sums.size(),
        sums.device()
    );
}

#[cfg(test)]
mod tests {
    use super::Span;

    /// Pairs of rows of `q` and `k` that see each other.
    fn pairs(span: &Span, window: i64) -> Vec<(i64, i64)> {
        let sees = |i: i64, j: i64| {
            let distance = span.offset + (i - span.queries.start) - (j - span.keys.start);
            0 <= distance && distance < window
        };
        let keys_of = |i: i64| span.keys.clone().filter(move |&j| sees(i, j)).map(move |j| (i, j));
        span.queries.clone().flat_map(keys_of).collect()
    }

    #[test]
    fn trimming_keeps_every_pair_and_no_idle_row() {
        for (num_queries, num_keys, window) in
            (0..5).flat_map(|q| (0..5).flat_map(move |k| (1..8).map(move |w| (q, k, w))))
        {
            for offset in -7..9 {
                let span = Span { queries: 3..3 + num_queries, keys: 10..10 + num_keys, offset };
                let before = pairs(&span, window);
                let Some(trimmed) = span.trimmed(window) else {
                    assert!(before.is_empty(), "{span:?} {window}");
                    continue;
                };
                assert_eq!(pairs(&trimmed, window), before, "{span:?} {window}");
                assert!(trimmed.offset >= 0, "{trimmed:?}");
                assert!(trimmed.queries.clone().all(|i| before.iter().any(|pair| pair.0 == i)), "{span:?} {window}");
                assert!(trimmed.keys.clone().all(|j| before.iter().any(|pair| pair.1 == j)), "{span:?} {window}");
            }
        }
    }
}
