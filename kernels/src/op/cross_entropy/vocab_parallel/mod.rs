//! The vocabulary head and its cross-entropy where each rank holds some rows of the head, chunk by chunk of tokens.
//!
//! A chunk takes two collectives, which the caller issues: [`local_logits`], all-gather of the statistics,
//! [`merge_stats`], [`chunk_gradients`], sum of the hidden gradients over ranks. The first is three numbers a token.
//! The method is Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et al. 2019) with one exchange for maximum,
//! sum and target instead of three.
//!
//! Invariants: as [`super`]: a token of scale 0 adds exactly nothing to any gradient, whatever its target and its
//! logits; the softmax is in fp32 (float64 for float64), the logits are rounded to the hidden state's type first. Ranks
//! merge statistics in rank order, so all of them get the same bits. Deliberately absent: communication.
#![allow(unsafe_code)]

pub mod reference;

use tch::{Kind, Tensor};

use crate::ffi;
use crate::op::{accumulate_kind, has_cpu_kernels};

/// A chunk of C tokens under this rank's `V_l` rows of the head.
#[derive(Debug)]
pub struct LocalChunk {
    /// `[C, V_l]`, in the hidden state's type.
    pub logits: Tensor,
    /// `[C, 3]` in fp32 (float64 for float64): the largest local logit (minus infinity where `V_l` is 0), the sum of
    /// `exp(logit - largest)`, and the target's logit, or minus infinity where another rank holds the target.
    pub stats: Tensor,
}

/// Logits of `hidden [C, D]` under `head [V_l, D]`, rows `start` to `start + V_l` of the whole head, and what the other
/// ranks must know of them. `targets [C]` are int64 ids of the whole vocabulary; one that no rank holds is no error
/// here (see [`merge_stats`]).
pub fn local_logits(hidden: &Tensor, head: &Tensor, targets: &Tensor, start: i64) -> LocalChunk {
    check(hidden, head, targets, start);
    tch::no_grad(|| {
        if !has_cpu_kernels(hidden) {
            return reference::local_logits(hidden, head, targets, start);
        }
        // SAFETY: all pointers outlive the call; `out` has room for two tensors.
        let [logits, stats] = ffi::produce(|out: &mut [_; 2]| unsafe {
            ffi::tangelo_local_logits(
                ffi::borrow(hidden),
                ffi::borrow(head),
                ffi::borrow(targets),
                start,
                out.as_mut_ptr(),
            )
        });
        LocalChunk { logits, stats }
    })
}

/// From the statistics of all ranks, `[R, C, 3]` in rank order: each token's log-sum-exp over the whole vocabulary
/// `[C]`, and its target's logit `[C]`; the negative log-likelihood is their difference.
///
/// The target's logit is minus infinity where no rank holds the target: the caller must leave out tokens of weight 0
/// before it multiplies by weights, and refuse the others.
pub fn merge_stats(all: &Tensor) -> (Tensor, Tensor) {
    let size = all.size();
    assert!(
        size.len() == 3 && size[0] > 0 && size[2] == 3,
        "cross_entropy: statistics of shape {size:?}, expected [R, C, 3]"
    );
    tch::no_grad(|| reference::merge_stats(all))
}

/// The gradients of a chunk, from its merged `lse [C]` and `scales [C]` (fp32 or `lse`'s type): each token's weight
/// times one over the weight of the global batch.
///
/// The logits become their gradients in place: `(exp(logit - lse) - [target here]) * scale`. Gives this rank's part of
/// the hidden gradient, `[C, D]` in the hidden state's type, to be summed over ranks. The gradient of the head is added
/// to `main_grad [V_l, D]` (see [`crate::op`]); without one the head is frozen. Other arguments as in [`local_logits`].
#[allow(clippy::too_many_arguments)]
pub fn chunk_gradients(
    chunk: LocalChunk,
    hidden: &Tensor,
    head: &Tensor,
    targets: &Tensor,
    start: i64,
    lse: &Tensor,
    scales: &Tensor,
    main_grad: Option<&Tensor>,
) -> Tensor {
    check(hidden, head, targets, start);
    let kind = accumulate_kind(hidden);
    let tokens = targets.size();
    assert_eq!(chunk.logits.size(), [tokens[0], head.size()[0]], "cross_entropy: logits of another chunk");
    assert!(
        lse.size() == tokens && lse.kind() == kind && scales.size() == tokens,
        "cross_entropy: log-sum-exps {:?} {:?} and scales {:?} for {} tokens; expected {kind:?}, one each",
        lse.kind(),
        lse.size(),
        scales.size(),
        tokens[0]
    );
    if let Some(main) = main_grad {
        assert!(
            main.size() == head.size() && main.is_contiguous() && main.kind() == kind,
            "cross_entropy: the main gradient must be contiguous {kind:?} of shape {:?}, found {:?} {:?}",
            head.size(),
            main.kind(),
            main.size()
        );
    }
    let scales = scales.to_kind(kind);
    tch::no_grad(|| {
        if !has_cpu_kernels(hidden) {
            return reference::chunk_gradients(chunk, hidden, head, targets, start, lse, &scales, main_grad);
        }
        // SAFETY: all pointers outlive the call; null where absent.
        let [dhidden] = ffi::produce(|[out]| unsafe {
            ffi::tangelo_chunk_gradients(
                ffi::borrow(&chunk.logits),
                ffi::borrow(hidden),
                ffi::borrow(head),
                ffi::borrow(targets),
                start,
                ffi::borrow(lse),
                ffi::borrow(&scales),
                ffi::borrow_option(main_grad),
                out,
            )
        });
        dhidden
    })
}

fn check(hidden: &Tensor, head: &Tensor, targets: &Tensor, start: i64) {
    let (states, rows) = (hidden.size(), head.size());
    assert!(
        states.len() == 2 && rows.len() == 2 && states[1] == rows[1] && hidden.kind() == head.kind(),
        "cross_entropy: hidden states {:?} {states:?} do not fit a head {:?} {rows:?}",
        hidden.kind(),
        head.kind()
    );
    assert!(
        targets.size() == states[..1] && targets.kind() == Kind::Int64,
        "cross_entropy: targets {:?} {:?}, expected Int64 [{}]",
        targets.kind(),
        targets.size(),
        states[0]
    );
    assert!(start >= 0, "cross_entropy: a head that starts at row {start}");
}
