//! Contenders in plain operations.

use super::super::reference::race_times;
use super::{CONTENDER_WIDTH, Draw};
use crate::op::accumulate_kind;
use tch::{Kind, Tensor};

/// See [`super::contend`].
pub fn contend(logits: &Tensor, start: i64, draws: &[Draw<'_>]) -> Tensor {
    let wide = logits.to_kind(accumulate_kind(logits));
    let found: Vec<f64> = draws.iter().flat_map(|draw| one(&wide.get(draw.row as i64), start, draw)).collect();
    let shape = [draws.len() as i64, CONTENDER_WIDTH as i64];
    Tensor::from_slice(&found).view(shape).to_device(logits.device())
}

/// One draw among the logits `[V_l]`.
fn one(logits: &Tensor, start: i64, asked: &Draw<'_>) -> [f64; CONTENDER_WIDTH] {
    let width = logits.size()[0];
    let [largest, sum] = normaliser(logits);
    let nobody = [-1.0, f64::NEG_INFINITY, f64::NEG_INFINITY, largest, sum, f64::NEG_INFINITY, f64::NEG_INFINITY, 0.0];
    let mut banned: Vec<i64> = asked.banned.iter().map(|&id| id - start).filter(|id| (0..width).contains(id)).collect();
    banned.sort_unstable();
    banned.dedup();
    if banned.len() as i64 == width {
        return nobody;
    }
    let allowed = logits.index_fill(0, &Tensor::from_slice(&banned).to_device(logits.device()), f64::NEG_INFINITY);
    if asked.temperature == 0.0 {
        let token = allowed.argmax(0, false).int64_value(&[]);
        let logit = logits.double_value(&[token]);
        return [(start + token) as f64, logit, logit, largest, sum, nobody[5], nobody[6], nobody[7]];
    }
    let tempered = allowed / asked.temperature;
    let [tempered_largest, tempered_sum] = normaliser(&tempered);
    let weights = (tempered.to_kind(Kind::Double) - tempered_largest).exp();
    let speeds = weights / race_times(start..start + width, asked.key, logits.device());
    let token = speeds.argmax(0, false).int64_value(&[]);
    let lead = speeds.double_value(&[token]).ln() + tempered_largest;
    let (logit, own) = (logits.double_value(&[token]), tempered.double_value(&[token]));
    [(start + token) as f64, lead, logit, largest, sum, own, tempered_largest, tempered_sum]
}

/// The largest (minus infinity of none), and the sum of `exp(logit - largest)`.
fn normaliser(logits: &Tensor) -> [f64; 2] {
    if logits.numel() == 0 {
        return [f64::NEG_INFINITY, 0.0];
    }
    let largest = logits.max();
    let sum = (logits - &largest).exp().sum(logits.kind());
    [largest.double_value(&[]), sum.double_value(&[])]
}
