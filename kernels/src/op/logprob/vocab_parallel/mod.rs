//! Drawing tokens where each rank holds some rows of the head.
//!
//! A draw takes [`logits`], [`contend`], an all-gather of eight numbers a draw, and [`elect`]. Filters look at a row as a
//! whole: for those the logits themselves are gathered and joined, [`draw`] takes the token, and [`logprobs`] says how
//! likely the model found it.
//!
//! Invariants: every rank elects the same token and the same bits; log-probabilities are those of [`distribution::merge`]
//! over the same ranks, which training and scoring read. The noise of a token is the one that [`super::sample`] uses, so the
//! cut decides nothing but how sums are grouped. Deliberately absent: communication.
#![allow(unsafe_code)]

pub mod reference;

use super::{Draw, Drawn, as_rows};
use crate::ffi;
use crate::op::distribution::{self, TokenStats};
use crate::op::{accumulate_kind, has_cpu_kernels, linear};
use tch::{Device, Kind, Tensor};

/// Numbers of a contender: the token (-1 where this rank's are all banned), how far it leads (comparable between ranks), its
/// logit; the largest logit here and the sum of `exp(logit - largest)`; the winner's, the largest and the sum at the draw's
/// temperature, without banned tokens.
pub const CONTENDER_WIDTH: usize = ffi::CONTENDER_WIDTH;

const TOKEN: usize = 0;
const LEAD: usize = 1;
const LOGIT: usize = 2;
/// The sum follows, as it does [`TEMPERED_LARGEST`].
const LARGEST: usize = 3;
const TEMPERED: usize = 5;
const TEMPERED_LARGEST: usize = 6;

/// Logits `[R, V_l]` of `hidden [R, D]` under this rank's rows of the head, `[V_l, D]`, in their type.
pub fn logits(hidden: &Tensor, head_weight: &Tensor) -> Tensor {
    if head_weight.size()[0] == 0 {
        return Tensor::zeros([hidden.size()[0], 0], (hidden.kind(), hidden.device()));
    }
    tch::no_grad(|| linear(hidden, head_weight, None, None, None))
}

/// Who wins each draw among this rank's tokens, the first of which is `start`: `[draws, CONTENDER_WIDTH]` in float64, on the
/// logits' device. Filters are not looked at. The logits are as they were afterwards.
pub fn contend(logits: &Tensor, start: i64, draws: &[Draw<'_>]) -> Tensor {
    if !has_cpu_kernels(logits) {
        return tch::no_grad(|| reference::contend(logits, start, draws));
    }
    let asked = as_rows(draws);
    let mut found = vec![[0f64; CONTENDER_WIDTH]; draws.len()];
    // SAFETY: all pointers outlive the call; `found` has room for one contender per draw.
    ffi::check(unsafe {
        ffi::tangelo_contend(ffi::borrow(logits), start, asked.as_ptr(), asked.len(), found.as_mut_ptr())
    });
    Tensor::from_slice(found.as_flattened()).view([draws.len() as i64, CONTENDER_WIDTH as i64])
}

/// The tokens drawn, from the contenders of all ranks, `[ranks, draws, CONTENDER_WIDTH]` in rank order; `kind` is the type
/// of the logits. Panics where every token is banned.
pub fn elect(all: &Tensor, kind: Kind, draws: &[Draw<'_>]) -> Vec<Drawn> {
    let ranks = contenders(all, draws.len());
    let winners: Vec<usize> = (0..draws.len()).map(|draw| winner(&ranks, draw)).collect();
    let won = |column: usize| (0..draws.len()).map(|draw| ranks[winners[draw]][draw][column]).collect::<Vec<f64>>();
    let model = merged(&ranks, LARGEST, &won(LOGIT), kind);
    let tempered = merged(&ranks, TEMPERED_LARGEST, &won(TEMPERED), kind);
    let drawn = |((draw, token), (model, tempered)): ((&Draw<'_>, f64), (TokenStats, TokenStats))| Drawn {
        token: token as u32,
        logprob: model.logprob as f32,
        sampling_logprob: if draw.temperature == 0.0 { 0.0 } else { tempered.logprob as f32 },
    };
    draws.iter().zip(won(TOKEN)).zip(model.into_iter().zip(tempered)).map(drawn).collect()
}

/// Draws from whole rows of logits, `[R, V]`: tokens and their log-probabilities under the distributions drawn from. What the
/// model says of them is what one rank would say; see [`logprobs`]. The logits are as they were afterwards.
pub fn draw(logits: &Tensor, draws: &[Draw<'_>]) -> Vec<Drawn> {
    if !has_cpu_kernels(logits) {
        let wide = logits.to_kind(accumulate_kind(logits));
        return tch::no_grad(|| draws.iter().map(|d| super::reference::draw(&wide.get(d.row as i64), d)).collect());
    }
    let asked = as_rows(draws);
    let mut sampled = vec![ffi::SampledToken::default(); draws.len()];
    // SAFETY: all pointers outlive the call; `sampled` has room for one token per draw.
    ffi::check(unsafe { ffi::tangelo_draw(ffi::borrow(logits), asked.as_ptr(), asked.len(), sampled.as_mut_ptr()) });
    sampled.into_iter().map(Drawn::from).collect()
}

/// The model's log-probabilities, at temperature 1, of tokens with these `logits`, one for each draw of the contenders `all`.
pub fn logprobs(all: &Tensor, kind: Kind, logits: &[f64]) -> Vec<f32> {
    let ranks = contenders(all, logits.len());
    merged(&ranks, LARGEST, logits, kind).into_iter().map(|stats| stats.logprob as f32).collect()
}

type Contender = [f64; CONTENDER_WIDTH];

/// By rank and draw.
fn contenders(all: &Tensor, draws: usize) -> Vec<Vec<Contender>> {
    let size = all.size();
    let expected = [draws as i64, CONTENDER_WIDTH as i64];
    assert!(
        size.len() == 3 && size[0] > 0 && size[1..] == expected,
        "draws: contenders of shape {size:?}, expected [ranks, {draws}, {CONTENDER_WIDTH}]"
    );
    let flat = all.to_device(Device::Cpu).to_kind(Kind::Double).contiguous().view([-1]);
    let values = Vec::<f64>::try_from(flat).expect("a flat f64 tensor");
    let (numbers, _) = values.as_chunks::<CONTENDER_WIDTH>();
    numbers.chunks(draws.max(1)).map(<[Contender]>::to_vec).collect()
}

/// The rank that leads; of equal ones, that of the first token. Numbers that are none lead nobody, and show in the
/// log-probability.
fn winner(ranks: &[Vec<Contender>], draw: usize) -> usize {
    let mut best: Option<(usize, Contender)> = None;
    for (rank, contender) in ranks.iter().map(|draws| draws[draw]).enumerate().filter(|(_, c)| c[TOKEN] >= 0.0) {
        let leads =
            |b: &Contender| contender[LEAD] > b[LEAD] || contender[LEAD] == b[LEAD] && contender[TOKEN] < b[TOKEN];
        if best.is_none_or(|(_, b)| leads(&b)) {
            best = Some((rank, contender));
        }
    }
    best.expect("sample: every token is banned").0
}

/// What all ranks together say of tokens with these logits, from each one's largest logit, in `column`, and the sum after it.
fn merged(ranks: &[Vec<Contender>], column: usize, logits: &[f64], kind: Kind) -> Vec<TokenStats> {
    let of_rank = |rank: &Vec<Contender>| {
        rank.iter().zip(logits).flat_map(|(c, &logit)| [c[column], c[column + 1], 0.0, logit]).collect::<Vec<f64>>()
    };
    let flat: Vec<f64> = ranks.iter().flat_map(of_rank).collect();
    let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    distribution::merge(&Tensor::from_slice(&flat).to_kind(wide).view([ranks.len() as i64, logits.len() as i64, 4]))
}
