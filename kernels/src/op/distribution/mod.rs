//! What the vocabulary head says of tokens (log-probabilities and entropies at a temperature), and gradients of any loss of
//! them, chunk by chunk of tokens, with the head whole or its rows cut over ranks.
//!
//! A chunk takes [`chunk`], an all-gather of its statistics where the head is cut (four numbers a token), [`merge`], the
//! loss's slopes, [`gradients`], and the sum of hidden gradients over ranks. One rank is the case without communication.
//!
//! With p the distribution and H its entropy, the gradient of the logits is
//! `(a (one hot - p) - b p (ln p + H)) / temperature` for slopes a by the target's log-probability and b by the entropy.
//!
//! Invariants: a token's numbers depend on its own row of logits alone; a token with slopes of 0 adds exactly nothing to
//! any gradient; logits are rounded to the hidden state's type first, as in transformers, everything after is fp32
//! (float64 for float64), merging float64. Ranks merge in rank order, so all find the same bits. Deliberately absent:
//! communication, and what the loss is.
#![allow(unsafe_code)]

pub mod reference;

use crate::ffi;
use crate::op::{accumulate_kind, has_cpu_kernels};
use tch::{Device, Kind, Tensor};

/// Rows of the head that this rank holds.
#[derive(Clone, Copy, Debug)]
pub struct HeadRows<'a> {
    /// `[V_l, D]`.
    pub weight: &'a Tensor,
    /// The id of the first.
    pub start: i64,
    /// Where their gradient is added, `[V_l, D]` (see [`crate::op`]); `None`: frozen.
    pub main_grad: Option<&'a Tensor>,
}

/// A chunk of C tokens under this rank's rows of the head.
#[derive(Debug)]
pub struct Chunk {
    /// `[C, V_l]`, in the hidden state's type.
    pub logits: Tensor,
    /// `[C, 4]` in fp32 (float64 for float64), of logits / temperature: the largest here (minus infinity where `V_l` is 0),
    /// the sum of `exp(logit - largest)`, that of `exp(logit - largest) (logit - largest)`, and the target's, or minus
    /// infinity where another rank holds it.
    pub stats: Tensor,
}

/// What the whole distribution says of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenStats {
    /// The largest logit / temperature.
    pub largest: f64,
    /// ln of the sum of `exp(logit - largest)`.
    pub log_sum: f64,
    /// The target's log-probability, rounded to fp32 (for fp32 and bf16 heads): what a batch can carry.
    pub logprob: f64,
    /// Entropy, nats.
    pub entropy: f64,
}

/// Logits of `hidden [C, D]` and what other ranks must know of them. `targets [C]` are int64 ids of the whole vocabulary.
pub fn chunk(hidden: &Tensor, head: HeadRows<'_>, targets: &Tensor, temperature: f64) -> Chunk {
    check(hidden, head, targets, temperature);
    tch::no_grad(|| {
        if !has_cpu_kernels(hidden) {
            return reference::chunk(hidden, head, targets, temperature);
        }
        // SAFETY: all pointers outlive the call; `out` has room for two tensors.
        let [logits, stats] = ffi::produce(|out: &mut [_; 2]| unsafe {
            ffi::tangelo_distribution(
                ffi::borrow(hidden),
                ffi::borrow(head.weight),
                ffi::borrow(targets),
                head.start,
                1.0 / temperature,
                out.as_mut_ptr(),
            )
        });
        Chunk { logits, stats }
    })
}

/// The distributions of a chunk from the statistics of all ranks, `[R, C, 4]` in rank order. A target that no rank holds
/// has a log-probability of minus infinity.
pub fn merge(all: &Tensor) -> Vec<TokenStats> {
    let size = all.size();
    assert!(
        size.len() == 3 && size[0] > 0 && size[2] == 4,
        "distribution: statistics of shape {size:?}, expected [R, C, 4]"
    );
    let rounded = all.kind() != Kind::Double;
    let flat = all.to_device(Device::Cpu).to_kind(Kind::Double).contiguous().view([-1]);
    let values = Vec::<f64>::try_from(flat).expect("a flat f64 tensor");
    let (ranks, tokens) = (size[0] as usize, size[1] as usize);
    let of = |token: usize| (0..ranks).map(move |rank| (rank * tokens + token) * 4);
    (0..tokens).map(|token| merge_one(of(token).map(|at| &values[at..at + 4]), rounded)).collect()
}

fn merge_one<'a>(ranks: impl Iterator<Item = &'a [f64]> + Clone, rounded: bool) -> TokenStats {
    let largest = ranks.clone().map(|r| r[0]).fold(f64::NEG_INFINITY, f64::max);
    let target = ranks.clone().map(|r| r[3]).fold(f64::NEG_INFINITY, f64::max);
    let (mut sum, mut weighted) = (0.0, 0.0);
    for rank in ranks.filter(|r| r[1] != 0.0) {
        let (below, factor) = (rank[0] - largest, (rank[0] - largest).exp());
        sum += factor * rank[1];
        weighted += factor * (rank[2] + below * rank[1]);
    }
    let log_sum = sum.ln();
    let logprob = target - (log_sum + largest);
    let logprob = if rounded { f64::from(logprob as f32) } else { logprob };
    TokenStats { largest, log_sum, logprob, entropy: log_sum - weighted / sum }
}

/// Gradients of a chunk from what [`merge`] gave and the slopes of the loss, by token: by the target's log-probability, and
/// by the entropy. The logits become their gradients.
///
/// Gives this rank's part of the hidden gradient, `[C, D]` in the hidden state's type, to be summed over ranks; adds to the
/// head's main gradient.
pub fn gradients(
    chunk: Chunk,
    hidden: &Tensor,
    head: HeadRows<'_>,
    targets: &Tensor,
    temperature: f64,
    tokens: &[TokenStats],
    slopes: &[[f64; 2]],
) -> Tensor {
    check(hidden, head, targets, temperature);
    assert!(
        tokens.len() == slopes.len() && chunk.logits.size() == [tokens.len() as i64, head.weight.size()[0]],
        "distribution: {} tokens and {} slopes for logits {:?}",
        tokens.len(),
        slopes.len(),
        chunk.logits.size()
    );
    let kind = accumulate_kind(hidden);
    let row = |(t, s): (&TokenStats, &[f64; 2])| [t.largest, t.log_sum, t.entropy, s[0], s[1]];
    let rows: Vec<f64> = tokens.iter().zip(slopes).flat_map(row).collect();
    let rows = Tensor::from_slice(&rows).view([tokens.len() as i64, 5]).to_kind(kind).to_device(hidden.device());
    tch::no_grad(|| {
        if !has_cpu_kernels(hidden) {
            return reference::gradients(chunk, hidden, head, targets, temperature, &rows);
        }
        // SAFETY: all pointers outlive the call; null where absent.
        let [dhidden] = ffi::produce(|[out]| unsafe {
            ffi::tangelo_distribution_gradients(
                ffi::borrow(&chunk.logits),
                ffi::borrow(hidden),
                ffi::borrow(head.weight),
                ffi::borrow(targets),
                head.start,
                1.0 / temperature,
                ffi::borrow(&rows),
                ffi::borrow_option(head.main_grad),
                out,
            )
        });
        dhidden
    })
}

fn check(hidden: &Tensor, head: HeadRows<'_>, targets: &Tensor, temperature: f64) {
    let (states, rows) = (hidden.size(), head.weight.size());
    assert!(
        states.len() == 2 && rows.len() == 2 && states[1] == rows[1] && hidden.kind() == head.weight.kind(),
        "distribution: hidden states {:?} {states:?} do not fit a head {:?} {rows:?}",
        hidden.kind(),
        head.weight.kind()
    );
    assert!(
        targets.size() == states[..1] && targets.kind() == Kind::Int64,
        "distribution: targets {:?} {:?}, expected Int64 [{}]",
        targets.kind(),
        targets.size(),
        states[0]
    );
    assert!(temperature > 0.0 && head.start >= 0, "distribution: temperature {temperature}, start {}", head.start);
    if let Some(main) = head.main_grad {
        assert!(
            main.size() == rows && main.is_contiguous() && main.kind() == accumulate_kind(hidden),
            "distribution: the main gradient must be contiguous {:?} of shape {rows:?}, found {:?} {:?}",
            accumulate_kind(hidden),
            main.kind(),
            main.size()
        );
    }
}
