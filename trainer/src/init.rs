//! First values of parameters: from a seed, or from a pre-trained model.
//!
//! A parameter's values depend on (seed, name, full shape) alone, so every layout and world size starts equal.

use crate::error::{Result, TrainError};
use std::ops::Range;
use tangelo_core::ParamMeta;
use tangelo_core::hash::hash_bytes;
use tangelo_models::Model;
use tch::{Device, Kind, Tensor};

/// Where values come from: tensors by Hugging Face's name, read row by row.
pub trait TensorSource {
    /// Fills `out` with rows `rows` (indices of dim 0) of the named tensor as fp32.
    fn read_f32(&self, meta: &ParamMeta, rows: Range<usize>, out: &mut [f32]) -> std::result::Result<(), String>;
}

/// The first values of one parameter, `shape`, fp32, on the CPU: norms 1, biases 0, the rest normal(0, std).
pub fn initial_values(meta: &ParamMeta, seed: u64, std: f64) -> Tensor {
    let shape: Vec<i64> = meta.shape.iter().map(|&n| n as i64).collect();
    let options = (Kind::Float, Device::Cpu);
    if meta.name.ends_with("norm.weight") {
        return Tensor::ones(shape.as_slice(), options);
    }
    if meta.name.ends_with(".bias") {
        return Tensor::zeros(shape.as_slice(), options);
    }
    // The generator is seeded for this parameter alone; nothing else draws between here and the next line.
    tch::manual_seed(hash_bytes(seed, meta.name.as_bytes()) as i64);
    Tensor::randn(shape.as_slice(), options) * std
}

/// Gives every parameter its first values from `seed`.
pub fn from_seed(model: &Model, seed: u64) {
    let std = model.spec().initializer_range;
    tch::no_grad(|| {
        for unit in model.units() {
            for span in unit.spans() {
                unit.weight(&span.meta.name).value.copy_(&initial_values(&span.meta, seed, std));
            }
        }
    });
}

/// Elements read at once: 64 MB of fp32.
const READ_ELEMENTS: usize = 16 << 20;

/// Fills a model from a source, a few rows at a time. `also` is given the same values in fp32: the unit, where they lie
/// in its flat buffer, and the values.
pub fn from_source(model: &Model, source: &dyn TensorSource, also: &mut dyn FnMut(usize, usize, &[f32])) -> Result<()> {
    for (index, unit) in model.units().iter().enumerate() {
        for span in unit.spans() {
            let value = unit.weight(&span.meta.name).value;
            let (rows, row_len) = (span.meta.shape[0], span.row_len());
            let step = (READ_ELEMENTS / row_len.max(1)).clamp(1, rows.max(1));
            let mut buffer = vec![0f32; step * row_len];
            for start in (0..rows).step_by(step) {
                let end = (start + step).min(rows);
                let part = &mut buffer[..(end - start) * row_len];
                source.read_f32(&span.meta, start..end, part).map_err(TrainError::Data)?;
                let mut target = value.narrow(0, start as i64, (end - start) as i64);
                tch::no_grad(|| target.copy_(&Tensor::from_slice(part).view_as(&target)));
                also(index, span.offset + start * row_len, part);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangelo_core::DType;

    #[test]
    fn values_depend_on_seed_and_name_only() {
        let meta = |name: &str| ParamMeta { name: name.into(), shape: vec![40, 50], dtype: DType::F32 };
        let a = initial_values(&meta("a.q_proj.weight"), 1, 0.02);
        let _ = initial_values(&meta("b.q_proj.weight"), 1, 0.02);
        assert!(a.equal(&initial_values(&meta("a.q_proj.weight"), 1, 0.02)));
        assert!(!a.equal(&initial_values(&meta("a.q_proj.weight"), 2, 0.02)));
        assert!(!a.equal(&initial_values(&meta("b.q_proj.weight"), 1, 0.02)));
        // 2,000 draws: the standard error of the deviation is 0.02 / sqrt(4000) = 0.0003.
        assert!((a.std(true).double_value(&[]) - 0.02).abs() < 0.0016);
    }
}
