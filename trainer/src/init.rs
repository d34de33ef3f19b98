//! First values of parameters: from a seed, or from a pre-trained model.
//!
//! A parameter's values depend on (seed, name, full shape) alone, so every layout and world size starts equal.

use crate::error::{Result, TrainError};
use std::ops::Range;
use tangelo_core::hash::hash_bytes;
use tangelo_core::{IndexBox, ParamMeta};
use tangelo_models::UnitWeights;
use tch::{Device, Kind, Tensor};

/// Where values come from: tensors by Hugging Face's name, read row by row.
pub trait TensorSource {
    /// Fills `out` with rows `rows` (indices of dim 0) of the named tensor as fp32.
    fn read_f32(&self, meta: &ParamMeta, rows: Range<usize>, out: &mut [f32]) -> std::result::Result<(), String>;
}

/// A model without the scalar head that is wanted of it: that one starts from the seed.
pub struct WithNewHead<'a> {
    /// The rest.
    pub rest: &'a dyn TensorSource,
    /// Parameters that `rest` lacks.
    pub new: Vec<String>,
    /// Of their values.
    pub seed: u64,
    /// Standard deviation of their values.
    pub std: f64,
}

impl TensorSource for WithNewHead<'_> {
    fn read_f32(&self, meta: &ParamMeta, rows: Range<usize>, out: &mut [f32]) -> std::result::Result<(), String> {
        if !self.new.contains(&meta.name) {
            return self.rest.read_f32(meta, rows, out);
        }
        let values = initial_values(meta, self.seed, self.std).narrow(0, rows.start as i64, rows.len() as i64);
        values.contiguous().view([-1]).copy_data(out, out.len());
        Ok(())
    }
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

/// Gives every parameter of a unit its first values from `seed`: those of the full tensor, of which the part is taken that
/// this rank holds.
pub fn from_seed(unit: &UnitWeights, seed: u64, std: f64) {
    tch::no_grad(|| {
        for span in unit.spans() {
            let whole = initial_values(&span.meta, seed, std);
            unit.value(&span.meta.name).copy_(&part_of(&whole, &span.held));
        }
    });
}

/// A box of a tensor: a view.
pub fn part_of(tensor: &Tensor, indices: &IndexBox) -> Tensor {
    let cut = |view: Tensor, (dim, range): (usize, &tangelo_core::layout::Range64)| {
        view.narrow(dim as i64, range.start as i64, range.len() as i64)
    };
    indices.ranges.iter().enumerate().fold(tensor.shallow_clone(), cut)
}

/// Elements read at once: 64 MB of fp32.
const READ_ELEMENTS: usize = 16 << 20;

/// Fills a unit from a source, a few rows at a time. `also` is given the same values in fp32: where they lie in the flat
/// buffer, and the values.
pub fn from_source(unit: &UnitWeights, source: &dyn TensorSource, also: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
    for span in unit.spans() {
        let value = unit.value(&span.meta.name);
        let rows = span.held.ranges[0];
        let whole_row: usize = span.meta.shape[1..].iter().product();
        let step = (READ_ELEMENTS / whole_row.max(1)).clamp(1, rows.len().max(1));
        let mut buffer = vec![0f32; step * whole_row];
        for start in (rows.start..rows.end).step_by(step) {
            let end = (start + step).min(rows.end);
            let read = &mut buffer[..(end - start) * whole_row];
            source.read_f32(&span.meta, start..end, read).map_err(TrainError::Data)?;
            let mut columns = span.held.clone();
            columns.ranges[0] = (0..end - start).into();
            let mut shape: Vec<i64> = span.meta.shape.iter().map(|&n| n as i64).collect();
            shape[0] = (end - start) as i64;
            let part = part_of(&Tensor::from_slice(read).view(shape.as_slice()), &columns).contiguous();
            let at = start - rows.start;
            tch::no_grad(|| value.narrow(0, at as i64, (end - start) as i64).copy_(&part));
            let values = Vec::<f32>::try_from(part.view([-1])).expect("a flat f32 tensor");
            also(span.offset + at * span.row_len(), &values);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangelo_core::DType;

    /// Every value is 7.
    struct Sevens;

    impl TensorSource for Sevens {
        fn read_f32(&self, _: &ParamMeta, _: Range<usize>, out: &mut [f32]) -> std::result::Result<(), String> {
            out.fill(7.0);
            Ok(())
        }
    }

    #[test]
    fn a_head_that_is_not_there_starts_from_the_seed() {
        let meta = |name: &str| ParamMeta { name: name.into(), shape: vec![4, 5], dtype: DType::F32 };
        let source = WithNewHead { rest: &Sevens, new: vec!["score.weight".into()], seed: 3, std: 0.02 };
        let mut read = vec![0f32; 10];
        source.read_f32(&meta("model.norm.weight"), 1..3, &mut read).unwrap();
        assert_eq!(read, [7.0; 10]);
        source.read_f32(&meta("score.weight"), 1..3, &mut read).unwrap();
        let whole = initial_values(&meta("score.weight"), 3, 0.02).narrow(0, 1, 2).reshape([-1]);
        assert_eq!(read, Vec::<f32>::try_from(whole).unwrap());
    }

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
