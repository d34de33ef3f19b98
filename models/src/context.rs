//! What a forward pass over packed tokens needs beside weights: where documents begin, and rotary angles.

use std::ops::Range;
use tangelo_configs::{RopeScaling, RopeSpec};
use tch::{Device, Kind, Tensor};

/// Angle per position for each pair of a head's coordinates.
///
/// Frequencies and angles are taken in f32 whatever the model's type, as published checkpoints were trained.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Radians per position, `[head_dim / 2]`.
    pub inverse_frequencies: Vec<f32>,
}

impl RopeTable {
    /// The table for heads of width `head_dim`. Su et al. 2021 (arXiv 2104.09864); stretching per [`RopeScaling`].
    pub fn new(rope: &RopeSpec, head_dim: usize) -> RopeTable {
        let exponents: Vec<f32> = (0..head_dim / 2).map(|i| (2 * i) as f32 / head_dim as f32).collect();
        // libtorch's own power function, so that frequencies equal those of the Python implementations to the bit.
        let wavelengths = Tensor::pow_scalar(rope.theta, &Tensor::from_slice(&exponents));
        let base = Vec::<f32>::try_from(wavelengths.reciprocal()).expect("a one-dimensional f32 tensor");
        RopeTable { inverse_frequencies: base.into_iter().map(|f| stretch(f, rope.scaling.as_ref())).collect() }
    }

    /// Cosines and sines of `positions` (`[T]`, i64), each `[T, head_dim / 2]`, f32.
    pub fn angles(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let inverse = Tensor::from_slice(&self.inverse_frequencies).to_device(positions.device());
        let angles = positions.to_kind(Kind::Float).unsqueeze(1) * inverse.unsqueeze(0);
        (angles.cos(), angles.sin())
    }
}

fn stretch(frequency: f32, scaling: Option<&RopeScaling>) -> f32 {
    match scaling {
        None => frequency,
        Some(&RopeScaling::Linear { factor }) => frequency / factor as f32,
        Some(&RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => {
            let original = original_max_position_embeddings as f64;
            let wavelength = std::f32::consts::TAU / frequency;
            let (low, high) = (low_freq_factor, high_freq_factor);
            if f64::from(wavelength) > original / low {
                frequency / factor as f32
            } else if f64::from(wavelength) < original / high {
                frequency
            } else {
                let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
                (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
            }
        }
    }
}

/// Where documents lie in the packed tokens of one micro-batch. T tokens, documents end to end.
#[derive(Debug)]
pub struct PackContext {
    /// Input ids, `[T]`, i64, on the model's device.
    pub tokens: Tensor,
    /// Position of each token within its document, `[T]`, i64.
    pub positions: Tensor,
    /// Borders of documents in the whole pack, of which a rank may hold a part: from 0 to T, strictly ascending.
    pub cu_seqlens: Vec<i64>,
    /// Of each document the tokens of the pack that go before its own, which other documents share; nothing where none
    /// does. Positions count them.
    pub prefixes: Vec<Range<i64>>,
}

impl PackContext {
    /// From ids, positions and borders on the host; the only host-to-device copies of a forward pass.
    pub fn new(tokens: &[u32], positions: &[u32], cu_seqlens: Vec<i64>, device: Device) -> PackContext {
        assert_eq!(cu_seqlens.last().copied(), Some(tokens.len() as i64), "documents do not cover the tokens");
        PackContext::part(tokens, positions, cu_seqlens, device)
    }

    /// This rank's tokens of a pack whose documents begin at `cu_seqlens`.
    pub fn part(tokens: &[u32], positions: &[u32], cu_seqlens: Vec<i64>, device: Device) -> PackContext {
        assert_eq!(tokens.len(), positions.len());
        let upload = |v: &[u32]| {
            let wide: Vec<i64> = v.iter().map(|&x| i64::from(x)).collect();
            Tensor::from_slice(&wide).to_device(device)
        };
        PackContext { tokens: upload(tokens), positions: upload(positions), cu_seqlens, prefixes: Vec::new() }
    }

    /// The same pack, in which documents begin with tokens that they share: see [`PackContext::prefixes`].
    pub fn with_prefixes(self, prefixes: Vec<Range<i64>>) -> PackContext {
        PackContext { prefixes, ..self }
    }

    /// One document.
    pub fn single(tokens: &[u32], device: Device) -> PackContext {
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        PackContext::new(tokens, &positions, vec![0, tokens.len() as i64], device)
    }

    /// T.
    pub fn num_tokens(&self) -> usize {
        self.tokens.size()[0] as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_high_and_stretches_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let plain = RopeTable::new(&RopeSpec { theta: 5e5, scaling: None }, 128);
        let scaled = RopeTable::new(&RopeSpec { theta: 5e5, scaling: Some(scaling) }, 128);
        assert_eq!(plain.inverse_frequencies[0], scaled.inverse_frequencies[0]);
        let (last, stretched) = (plain.inverse_frequencies[63], scaled.inverse_frequencies[63]);
        assert!((stretched * 8.0 / last - 1.0).abs() < 1e-6, "{stretched} {last}");
    }
}
