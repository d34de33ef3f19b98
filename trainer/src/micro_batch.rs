//! From a batch's columns to micro-batches on the device: the only host-to-device copies of a step.

use crate::error::{Result, TrainError};
use crate::executor::MicroBatch;
use tangelo_core::{Batch, Column, LossComponent, LossSpec};
use tangelo_models::PackContext;
use tch::{Device, Tensor};

/// The weight column of the one component that the executor offers today.
pub fn weight_column(loss: &LossSpec) -> Result<(Column, f64)> {
    match loss.components.as_slice() {
        [LossComponent::CrossEntropy { weight, coefficient }] => Ok((*weight, *coefficient)),
        other => {
            Err(TrainError::Config(format!("the loss has {} components; this version trains exactly 1", other.len())))
        }
    }
}

/// Cuts a batch into micro-batches of at most `rows` sequences each.
pub fn cut(batch: &Batch, loss: &LossSpec, rows: usize, device: Device) -> Result<Vec<MicroBatch>> {
    batch.require(&loss.columns())?;
    batch.require(&[Column::Positions, Column::SeqId])?;
    let n = batch.num_sequences();
    (0..n).step_by(rows).map(|start| upload(&batch.slice(start, rows.min(n - start)), loss, device)).collect()
}

fn upload(rows: &Batch, loss: &LossSpec, device: Device) -> Result<MicroBatch> {
    let (weight, _) = weight_column(loss)?;
    let cu_seqlens = document_borders(&rows.row_lengths()?, &rows.u32_values(Column::SeqId)?);
    let (tokens, positions) = (rows.u32_values(Column::Tokens)?, rows.u32_values(Column::Positions)?);
    let targets: Vec<i64> = rows.u32_values(Column::Targets)?.into_iter().map(i64::from).collect();
    Ok(MicroBatch {
        pack: PackContext::new(&tokens, &positions, cu_seqlens, device),
        targets: Tensor::from_slice(&targets).to_device(device),
        weights: Tensor::from_slice(&rows.f32_values(weight)?).to_device(device),
    })
}

/// Where documents begin in rows laid end to end: at each row, and where `seq_id` changes inside one.
fn document_borders(row_lengths: &[usize], seq_id: &[u32]) -> Vec<i64> {
    let mut borders = vec![0i64];
    let mut start = 0;
    for &length in row_lengths {
        let row = &seq_id[start..start + length];
        let inside = (1..length).filter(|&i| row[i] != row[i - 1]).map(|i| (start + i) as i64);
        borders.extend(inside);
        start += length;
        if length > 0 {
            borders.push(start as i64);
        }
    }
    borders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_are_rows_and_changes_of_document() {
        assert_eq!(document_borders(&[4, 3], &[0, 0, 1, 1, 0, 1, 2]), [0, 2, 4, 5, 6, 7]);
        assert_eq!(document_borders(&[2, 0, 2], &[0, 0, 0, 0]), [0, 2, 4]);
    }
}
