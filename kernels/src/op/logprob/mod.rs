//! Log-probabilities of given tokens, and the drawing of tokens, from hidden states and the vocabulary head.
//!
//! Invariants: a token's log-probability depends on its hidden state, the head and the temperature alone, to the bit on a
//! CPU: whatever the chunk, the batch, and whether it was given or drawn. A draw depends beside that on its key alone, not
//! on a generator's state. Logits are rounded to the hidden state's type first, as in transformers; all after is fp32.
#![allow(unsafe_code)]

pub mod reference;
pub mod vocab_parallel;

use tangelo_core::hash::mix64;
use tch::{Kind, Tensor};

use crate::{ffi, op::has_cpu_kernels};

/// Log-probability of each target under the distribution at `temperature` (above 0): `hidden [T, D]`,
/// `head_weight [V, D]`, `targets [T]` (int64) give `[T]` in fp32 (float64 for float64). A chunk's logits take
/// `chunk_tokens * V` elements. No gradients.
pub fn token_logprobs(
    hidden: &Tensor,
    head_weight: &Tensor,
    targets: &Tensor,
    temperature: f64,
    chunk_tokens: i64,
) -> Tensor {
    if !has_cpu_kernels(hidden) {
        return tch::no_grad(|| reference::token_logprobs(hidden, head_weight, targets, temperature, chunk_tokens));
    }
    // SAFETY: all pointers outlive the call.
    let [out] = ffi::produce(|[out]| unsafe {
        ffi::tangelo_token_logprobs(
            ffi::borrow(hidden),
            ffi::borrow(head_weight),
            ffi::borrow(targets),
            temperature,
            chunk_tokens,
            out,
        )
    });
    out
}

/// A token to be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw<'a> {
    /// Which hidden state.
    pub row: usize,
    /// Logits are divided by it; 0 asks for the likeliest token, the first of equal ones.
    pub temperature: f64,
    /// Of what `min_p` leaves, the k likeliest tokens (of equal ones, the first); 0: all.
    pub top_k: usize,
    /// Of what `top_k` leaves, the fewest likeliest tokens whose probabilities reach this share; 1: all.
    pub top_p: f64,
    /// Tokens at least this probable, as a fraction of the likeliest; 0: all.
    pub min_p: f64,
    /// What the draw's chance is a function of; see [`draw_key`].
    pub key: [u32; 2],
    /// Tokens never to be drawn.
    pub banned: &'a [i64],
}

/// A token that was drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the model, at temperature 1: what [`token_logprobs`] says.
    pub logprob: f32,
    /// Its log-probability under the distribution that was drawn from; 0 for the likeliest token.
    pub sampling_logprob: f32,
}

/// The key of the draw at `position` of sample `sample` of a request.
pub fn draw_key(seed: u64, sample: u64, position: u64) -> [u32; 2] {
    let bits = mix64(mix64(mix64(seed).wrapping_add(sample)).wrapping_add(position));
    [bits as u32, (bits >> 32) as u32]
}

/// Draws tokens from `hidden [R, D]` under `head_weight [V, D]`; several draws may share a row.
///
/// The draw is an exponential race (Gumbel-max): the noise of a token is a function of (key, token) alone.
pub fn sample(hidden: &Tensor, head_weight: &Tensor, draws: &[Draw<'_>]) -> Vec<Drawn> {
    if !has_cpu_kernels(hidden) {
        return tch::no_grad(|| {
            let kind = if hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            let logits = hidden.linear(head_weight, None::<&Tensor>).to_kind(kind);
            draws.iter().map(|draw| reference::draw(&logits.get(draw.row as i64), draw)).collect()
        });
    }
    let asked = as_rows(draws);
    let mut sampled = vec![ffi::SampledToken::default(); draws.len()];
    // SAFETY: all pointers outlive the call; `sampled` has room for one token per draw.
    ffi::check(unsafe {
        ffi::tangelo_sample(
            ffi::borrow(hidden),
            ffi::borrow(head_weight),
            asked.as_ptr(),
            asked.len(),
            sampled.as_mut_ptr(),
        )
    });
    sampled.into_iter().map(Drawn::from).collect()
}

impl Draw<'_> {
    /// Whether the filters may drop some of `vocabulary` tokens: then the whole row decides, and not each token for itself.
    pub fn is_filtered(&self, vocabulary: usize) -> bool {
        self.temperature > 0.0 && (self.top_p < 1.0 || self.min_p > 0.0 || (self.top_k > 0 && self.top_k < vocabulary))
    }
}

impl From<ffi::SampledToken> for Drawn {
    fn from(s: ffi::SampledToken) -> Drawn {
        Drawn { token: s.token as u32, logprob: s.logprob as f32, sampling_logprob: s.sampling_logprob as f32 }
    }
}

fn as_rows(draws: &[Draw<'_>]) -> Vec<ffi::SampleRow> {
    let as_row = |draw: &Draw<'_>| ffi::SampleRow {
        row: draw.row as i64,
        top_k: draw.top_k as i64,
        temperature: draw.temperature,
        top_p: draw.top_p,
        min_p: draw.min_p,
        key: draw.key,
        banned: draw.banned.as_ptr(),
        num_banned: draw.banned.len() as i64,
    };
    draws.iter().map(as_row).collect()
}
