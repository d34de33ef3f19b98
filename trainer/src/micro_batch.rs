//! From a batch's columns to micro-batches on the device: the only host-to-device copies of a step.

use crate::error::{Result, TrainError};
use std::ops::Range;
use tangelo_configs::job::RotateMethod;
use tangelo_core::{Batch, Column, Group, LossComponent, LossSpec, SequenceLayout, Topology};
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

/// Tokens of one micro-batch that this rank computes with, and what the loss reads of them.
#[derive(Debug)]
pub struct MicroBatch {
    /// Tokens and positions of this rank, document borders of all.
    pub pack: PackContext,
    /// Ids to predict, i64.
    pub targets: Tensor,
    /// Weight of each token in the loss, f32.
    pub weights: Tensor,
    /// How all tokens are cut over the ranks that share them.
    pub layout: SequenceLayout,
}

/// This rank's place among those that share a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequencePlace {
    /// In the ring.
    pub ring: usize,
    /// Among those that exchange heads.
    pub heads: usize,
    /// Among tensor ranks.
    pub tensor: usize,
}

impl SequencePlace {
    /// The place of `rank`.
    pub fn of(topology: &Topology, rank: usize) -> SequencePlace {
        let index = |group| topology.index(group, rank);
        SequencePlace { ring: index(Group::Ring), heads: index(Group::Heads), tensor: index(Group::Tensor) }
    }
}

/// Rows that a pass reads, micro-batch by micro-batch.
pub struct Rows<'a> {
    batch: &'a Batch,
    weight: Column,
    /// Multiplies the loss.
    pub coefficient: f64,
    /// Sequences per micro-batch.
    rows: usize,
    /// The first micro-batch.
    skip: usize,
    topology: &'a Topology,
    /// This rank's place.
    pub place: SequencePlace,
    /// How keys and values go round the ring.
    pub rotate_method: RotateMethod,
    device: Device,
    /// Ids are below it.
    vocab_size: usize,
}

impl<'a> Rows<'a> {
    /// A batch whose columns `loss` reads, in micro-batches of at most `rows` sequences. Ids from `vocab_size` on are refused
    /// where they are read.
    pub fn new(
        batch: &'a Batch,
        loss: &LossSpec,
        rows: usize,
        (topology, rank): (&'a Topology, usize),
        rotate_method: RotateMethod,
        vocab_size: usize,
        device: Device,
    ) -> Result<Rows<'a>> {
        batch.require(&loss.columns())?;
        batch.require(&[Column::Positions, Column::SeqId])?;
        let (weight, coefficient) = weight_column(loss)?;
        let place = SequencePlace::of(topology, rank);
        Ok(Rows { batch, weight, coefficient, rows, skip: 0, topology, place, rotate_method, device, vocab_size })
    }

    /// The same rows, of which micro-batch `index` is number 0.
    pub fn only(&self, index: usize) -> Rows<'a> {
        Rows { skip: index, ..*self }
    }

    /// Number of micro-batches.
    pub fn len(&self) -> usize {
        self.batch.num_sequences().div_ceil(self.rows)
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sum of token weights, and the number of tokens, of all rows.
    pub fn totals(&self) -> Result<[f64; 2]> {
        let weight: f64 = self.batch.f32_values(self.weight)?.iter().map(|&w| f64::from(w)).sum();
        Ok([weight, self.batch.num_tokens() as f64])
    }

    /// One micro-batch, uploaded.
    pub fn micro_batch(&self, index: usize) -> Result<MicroBatch> {
        let (start, n) = ((self.skip + index) * self.rows, self.batch.num_sequences());
        assert!(start < n, "micro-batch {index} of {} rows", n);
        let rows = self.batch.slice(start, self.rows.min(n - start));
        let layout = self.layout(rows.num_tokens());
        let own = layout.context_ranges(self.place.ring, self.place.heads);
        let (tokens, positions) = (rows.u32_values(Column::Tokens)?, rows.u32_values(Column::Positions)?);
        let (targets, weights) = (rows.u32_values(Column::Targets)?, rows.f32_values(self.weight)?);
        self.check_ids("token", tokens.iter().copied().map(Some))?;
        self.check_ids("target", targets.iter().zip(&*weights).map(|(&id, &w)| (w != 0.0).then_some(id)))?;
        let targets: Vec<i64> = pick(&targets, &own).into_iter().map(i64::from).collect();
        let borders = document_borders(&rows.row_lengths()?, &rows.u32_values(Column::SeqId)?);
        Ok(MicroBatch {
            pack: PackContext::part(&pick(&tokens, &own), &pick(&positions, &own), borders, self.device),
            targets: Tensor::from_slice(&targets).to_device(self.device),
            weights: Tensor::from_slice(&pick(&weights, &own)).to_device(self.device),
            layout,
        })
    }

    /// An id that nobody holds a row for would be a zero embedding, or a loss of infinity, under tensor parallelism.
    fn check_ids(&self, what: &str, ids: impl Iterator<Item = Option<u32>>) -> Result<()> {
        match ids.enumerate().find(|(_, id)| id.is_some_and(|id| id as usize >= self.vocab_size)) {
            Some((at, Some(id))) => Err(TrainError::Data(format!(
                "{what} {at} of a micro-batch is id {id}, but the model's vocabulary has {}: the data was prepared with \
                 another tokenizer than the model's, or a shard is damaged; prepare it again",
                self.vocab_size
            ))),
            _ => Ok(()),
        }
    }

    fn layout(&self, num_tokens: usize) -> SequenceLayout {
        let size = |group| self.topology.size(group);
        let (ring, heads, tensor) = (size(Group::Ring), size(Group::Heads), size(Group::Tensor));
        SequenceLayout { num_tokens, ring, heads, tensor }
    }
}

fn pick<T: Copy>(values: &[T], ranges: &[Range<usize>]) -> Vec<T> {
    ranges.iter().flat_map(|range| values[range.clone()].iter().copied()).collect()
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
