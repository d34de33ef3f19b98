//! Log-probabilities and draws in plain operations.

use std::ops::Range;
use tch::{Device, Kind, Tensor};

use super::{Draw, Drawn};
use crate::op::accumulate_kind;

/// See [`super::token_logprobs`].
pub fn token_logprobs(
    hidden: &Tensor,
    head_weight: &Tensor,
    targets: &Tensor,
    temperature: f64,
    chunk_tokens: i64,
) -> Tensor {
    let kind = accumulate_kind(hidden);
    let num_tokens = hidden.size()[0];
    if num_tokens == 0 {
        return Tensor::zeros([0], (kind, hidden.device()));
    }
    let parts: Vec<Tensor> = chunks(num_tokens, chunk_tokens)
        .map(|(start, length)| {
            let part = |x: &Tensor| x.narrow(0, start, length);
            let logits = part(hidden).linear(head_weight, None::<&Tensor>).to_kind(kind) / temperature;
            logits.log_softmax(-1, kind).gather(1, &part(targets).unsqueeze(1), false).squeeze_dim(1)
        })
        .collect();
    Tensor::cat(&parts, 0)
}

/// Starts and lengths of the chunks of `num_tokens`.
pub(crate) fn chunks(num_tokens: i64, chunk_tokens: i64) -> impl Iterator<Item = (i64, i64)> {
    assert!(chunk_tokens > 0, "chunk_tokens must be positive");
    (0..num_tokens).step_by(chunk_tokens as usize).map(move |start| (start, chunk_tokens.min(num_tokens - start)))
}

/// Exponential variables of a key and each of `tokens`, in float64: the same function of (key, token) as the kernels'.
pub fn race_times(tokens: Range<i64>, key: [u32; 2], device: Device) -> Tensor {
    let word = |x: Tensor| x.bitwise_and(0xffff_ffff_i64);
    let mixed = |mut x: Tensor| {
        for (shift, factor) in [(16, 0x7feb_352d_i64), (15, 0x846c_a68b)] {
            let shifted = x.bitwise_right_shift(&Tensor::from(shift).to_device(device));
            x = word(x.bitwise_xor_tensor(&shifted) * factor);
        }
        let shifted = x.bitwise_right_shift(&Tensor::from(16_i64).to_device(device));
        x.bitwise_xor_tensor(&shifted)
    };
    let tokens = Tensor::arange_start(tokens.start, tokens.end, (Kind::Int64, device));
    let first = mixed(tokens.bitwise_xor(i64::from(key[0])));
    let bits = mixed(word(first + i64::from(key[1])));
    let u = (bits.to_kind(Kind::Double) + 0.5) / (1u64 << 32) as f64;
    -(-u).log1p()
}

/// One draw from the logits `[V]` of its row (fp32 or float64).
pub fn draw(logits: &Tensor, asked: &Draw<'_>) -> Drawn {
    let (vocabulary, kind) = (logits.size()[0], logits.kind());
    let logprobs = logits.log_softmax(-1, kind);
    let allowed = if asked.banned.is_empty() {
        logits.shallow_clone()
    } else {
        let banned = Tensor::from_slice(asked.banned).to_device(logits.device());
        logits.index_fill(0, &banned, f64::NEG_INFINITY)
    };
    let (token, sampling_logprob) = if asked.temperature == 0.0 {
        (allowed.argmax(0, false).int64_value(&[]), 0.0)
    } else {
        let tempered = (allowed / asked.temperature).to_kind(Kind::Double).softmax(-1, Kind::Double);
        let kept = keep(&tempered, asked);
        let speeds = &kept / race_times(0..vocabulary, asked.key, logits.device());
        let token = speeds.argmax(0, false).int64_value(&[]);
        (token, (kept.double_value(&[token]) / kept.sum(Kind::Double).double_value(&[])).ln())
    };
    Drawn {
        token: token as u32,
        logprob: logprobs.double_value(&[token]) as f32,
        sampling_logprob: sampling_logprob as f32,
    }
}

/// Probabilities `[V]` with those that the filters drop set to zero; not normalised again.
fn keep(probabilities: &Tensor, asked: &Draw<'_>) -> Tensor {
    let (sorted, order) = probabilities.sort_stable(true, 0, true);
    let mut kept = if asked.min_p > 0.0 {
        let least = sorted.double_value(&[0]) * asked.min_p;
        sorted.where_self(&sorted.ge(least), &sorted.zeros_like())
    } else {
        sorted
    };
    let vocabulary = kept.size()[0];
    if asked.top_k > 0 && (asked.top_k as i64) < vocabulary {
        let _ = kept.narrow(0, asked.top_k as i64, vocabulary - asked.top_k as i64).zero_();
    }
    if asked.top_p < 1.0 {
        // A token stays while those before it have not reached the share.
        let before = kept.cumsum(0, Kind::Double) - &kept;
        let enough = kept.sum(Kind::Double) * asked.top_p;
        kept = kept.where_self(&before.lt_tensor(&enough), &kept.zeros_like());
    }
    probabilities.zeros_like().scatter(0, &order, &kept)
}
