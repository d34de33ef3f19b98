//! A checked Arrow record batch: the one thing that flows from the data pipeline through a training step.
//!
//! One row is one packed sequence. Per-token columns are ragged lists that all have the row's number of tokens;
//! per-sequence columns are plain. [`Batch::new`] checks every declared column once, so that nobody downstream asks
//! again. Columns that a job does not need are absent, never filled with zeros.

use arrow::array::{Array, ArrayRef, AsArray, Float32Array, GenericListArray, Int64Array, RecordBatch, UInt32Array};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Float32Type, Int64Type, Schema, UInt32Type};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use thiserror::Error;

/// A column a batch may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Column {
    /// u32 per token: the input ids.
    Tokens,
    /// u32 per token: the id to predict; 0 where the weight is 0.
    Targets,
    /// u32 per token: position within its document.
    Positions,
    /// u32 per token: which document of the row it belongs to, ascending from 0. Attention never crosses it.
    SeqId,
    /// f32 per token: weight of the token in the cross-entropy; 0 leaves it out.
    CeWeight,
    /// f32 per token: advantage.
    Advantage,
    /// f32 per token: 1 where the target was chosen by the policy and counts, 0 elsewhere (prompts, tool output).
    LossMask,
    /// f32 per token: the target's log-probability under the policy before the update, as the trainer computes it.
    OldLogprob,
    /// f32 per token: the target's log-probability as the engine that sampled it reported it.
    RolloutLogprob,
    /// f32 per token: weight that corrects for the distance between the engine's policy and the trainer's.
    ImportanceWeight,
    /// f32 per token: log-probability under the reference.
    RefLogprob,
    /// f32 per token: the critic's value.
    Value,
    /// f32 per token: the return.
    Return,
    /// f32 per token: reward for the target.
    TokenReward,
    /// f32 per token: entropy of the distribution that the target was drawn from.
    Entropy,
    /// f32 per sequence: reward.
    Reward,
    /// i64 per sequence: the global sample index it came from.
    SampleIndex,
    /// i64 per sequence: the group of completions of one prompt.
    GroupId,
    /// i64 per sequence: pairs a chosen with a rejected sequence.
    PairId,
    /// i64 per sequence: version of the policy that generated it.
    PolicyVersion,
}

impl Column {
    /// Every column.
    pub const ALL: [Column; 20] = [
        Column::Tokens,
        Column::Targets,
        Column::Positions,
        Column::SeqId,
        Column::CeWeight,
        Column::Advantage,
        Column::LossMask,
        Column::OldLogprob,
        Column::RolloutLogprob,
        Column::ImportanceWeight,
        Column::RefLogprob,
        Column::Value,
        Column::Return,
        Column::TokenReward,
        Column::Entropy,
        Column::Reward,
        Column::SampleIndex,
        Column::GroupId,
        Column::PairId,
        Column::PolicyVersion,
    ];

    /// The column's name in the record batch.
    pub const fn name(self) -> &'static str {
        match self {
            Column::Tokens => "tokens",
            Column::Targets => "targets",
            Column::Positions => "positions",
            Column::SeqId => "seq_id",
            Column::CeWeight => "ce_weight",
            Column::Advantage => "advantage",
            Column::LossMask => "loss_mask",
            Column::OldLogprob => "old_logprob",
            Column::RolloutLogprob => "rollout_logprob",
            Column::ImportanceWeight => "importance_weight",
            Column::RefLogprob => "ref_logprob",
            Column::Value => "value",
            Column::Return => "return",
            Column::TokenReward => "token_reward",
            Column::Entropy => "entropy",
            Column::Reward => "reward",
            Column::SampleIndex => "sample_index",
            Column::GroupId => "group_id",
            Column::PairId => "pair_id",
            Column::PolicyVersion => "policy_version",
        }
    }

    /// Whether there is one value per token (a list per row) rather than one per sequence.
    pub const fn per_token(self) -> bool {
        !matches!(self, Column::Reward | Column::SampleIndex | Column::GroupId | Column::PairId | Column::PolicyVersion)
    }

    /// The Arrow type of one value.
    pub const fn value_type(self) -> DataType {
        match self {
            Column::Tokens | Column::Targets | Column::Positions | Column::SeqId => DataType::UInt32,
            Column::SampleIndex | Column::GroupId | Column::PairId | Column::PolicyVersion => DataType::Int64,
            _ => DataType::Float32,
        }
    }

    /// The Arrow type of the column.
    pub fn data_type(self) -> DataType {
        if self.per_token() {
            DataType::LargeList(Arc::new(Field::new("item", self.value_type(), false)))
        } else {
            self.value_type()
        }
    }
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is wrong with a record batch that was to become a [`Batch`].
#[derive(Clone, Debug, Error, PartialEq)]
pub enum BatchError {
    /// A column is of a name this project does not know.
    #[error("unknown batch column `{0}`; known are tokens, targets, positions, seq_id, ce_weight and the RL columns")]
    Unknown(String),
    /// A column has the wrong type.
    #[error("column `{column}` has type {found}, expected {expected}")]
    Type {
        /// The column.
        column: Column,
        /// Its Arrow type.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A column has nulls.
    #[error("column `{0}` has nulls; write a weight of 0 to leave a token out")]
    Nulls(Column),
    /// A required column is absent.
    #[error("column `{0}` is absent but needed")]
    Missing(Column),
    /// A per-token column has another number of tokens in a row than `tokens` has.
    #[error("row {row}: column `{column}` has {found} tokens, `tokens` has {expected}")]
    Ragged {
        /// The column.
        column: Column,
        /// The row.
        row: usize,
        /// Tokens in it.
        found: usize,
        /// Tokens in `tokens`.
        expected: usize,
    },
    /// Arrow refused.
    #[error("{0}")]
    Arrow(String),
}

/// A checked record batch. Cheap to clone: columns are shared.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    records: RecordBatch,
}

impl Batch {
    /// Checks names, types, nulls and that per-token columns agree in length row by row.
    pub fn new(records: RecordBatch) -> Result<Batch, BatchError> {
        let batch = Batch { records };
        let lengths = batch.row_lengths()?;
        for field in batch.records.schema().fields() {
            let column = Column::ALL.into_iter().find(|c| c.name() == field.name());
            let column = column.ok_or_else(|| BatchError::Unknown(field.name().clone()))?;
            batch.check_column(column, &lengths)?;
        }
        Ok(batch)
    }

    /// A batch from columns.
    pub fn from_columns(columns: Vec<(Column, ArrayRef)>) -> Result<Batch, BatchError> {
        let fields: Vec<Field> =
            columns.iter().map(|(c, a)| Field::new(c.name(), a.data_type().clone(), false)).collect();
        let arrays = columns.into_iter().map(|(_, a)| a).collect();
        let records = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays);
        Batch::new(records.map_err(|e| BatchError::Arrow(e.to_string()))?)
    }

    /// The record batch itself.
    pub fn records(&self) -> &RecordBatch {
        &self.records
    }

    /// Number of sequences (B).
    pub fn num_sequences(&self) -> usize {
        self.records.num_rows()
    }

    /// Number of tokens over all sequences (T).
    pub fn num_tokens(&self) -> usize {
        self.u32_values(Column::Tokens).map_or(0, |v| v.len())
    }

    /// Whether the column is there.
    pub fn has(&self, column: Column) -> bool {
        self.records.column_by_name(column.name()).is_some()
    }

    /// Fails unless every column of `needed` is there.
    pub fn require(&self, needed: &[Column]) -> Result<(), BatchError> {
        needed.iter().find(|&&c| !self.has(c)).map_or(Ok(()), |&c| Err(BatchError::Missing(c)))
    }

    /// Rows `start..start + count`, sharing the columns.
    pub fn slice(&self, start: usize, count: usize) -> Batch {
        Batch { records: self.records.slice(start, count) }
    }

    /// The same with a per-token f32 column, `values` of all rows end to end; it replaces one of that name.
    ///
    /// # Errors
    /// There are more or fewer values than tokens.
    pub fn with_f32(&self, column: Column, values: Vec<f32>) -> Result<Batch, BatchError> {
        let lengths = self.row_lengths()?;
        let (found, expected) = (values.len(), lengths.iter().sum());
        if found != expected {
            return Err(BatchError::Ragged { column, row: 0, found, expected });
        }
        let array = ragged(Arc::new(Float32Array::from(values)), lengths.into_iter(), DataType::Float32);
        let schema = self.records.schema();
        let kept =
            schema.fields().iter().zip(self.records.columns()).filter(|(field, _)| field.name() != column.name());
        let (mut fields, mut arrays): (Vec<Field>, Vec<ArrayRef>) =
            kept.map(|(field, array)| (field.as_ref().clone(), array.clone())).unzip();
        fields.push(Field::new(column.name(), column.data_type(), false));
        arrays.push(array);
        let records = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays);
        Batch::new(records.map_err(|e| BatchError::Arrow(e.to_string()))?)
    }

    /// Tokens per row.
    pub fn row_lengths(&self) -> Result<Vec<usize>, BatchError> {
        let tokens = self.column(Column::Tokens)?;
        let list = tokens.as_list_opt::<i64>().ok_or_else(|| type_error(Column::Tokens, tokens))?;
        Ok((0..list.len()).map(|row| list.value_length(row) as usize).collect())
    }

    /// The values of a u32 column, rows concatenated.
    pub fn u32_values(&self, column: Column) -> Result<Vec<u32>, BatchError> {
        Ok(self.values(column)?.as_primitive_opt::<UInt32Type>().ok_or(BatchError::Missing(column))?.values().to_vec())
    }

    /// The values of an f32 column, rows concatenated.
    pub fn f32_values(&self, column: Column) -> Result<Vec<f32>, BatchError> {
        Ok(self.values(column)?.as_primitive_opt::<Float32Type>().ok_or(BatchError::Missing(column))?.values().to_vec())
    }

    /// The values of an i64 column.
    pub fn i64_values(&self, column: Column) -> Result<Vec<i64>, BatchError> {
        Ok(self.values(column)?.as_primitive_opt::<Int64Type>().ok_or(BatchError::Missing(column))?.values().to_vec())
    }

    fn column(&self, column: Column) -> Result<&ArrayRef, BatchError> {
        self.records.column_by_name(column.name()).ok_or(BatchError::Missing(column))
    }

    /// The flat values of a column, restricted to the rows of this (possibly sliced) batch.
    fn values(&self, column: Column) -> Result<ArrayRef, BatchError> {
        let array = self.column(column)?;
        let Some(list) = array.as_list_opt::<i64>() else { return Ok(array.clone()) };
        let (first, last) = (list.offsets()[0] as usize, list.offsets()[list.len()] as usize);
        Ok(list.values().slice(first, last - first))
    }

    fn check_column(&self, column: Column, lengths: &[usize]) -> Result<(), BatchError> {
        let array = self.column(column)?;
        let (found, expected) = (array.data_type(), column.data_type());
        if !found.equals_datatype(&expected) {
            return Err(type_error(column, array));
        }
        if array.null_count() > 0 || self.values(column)?.null_count() > 0 {
            return Err(BatchError::Nulls(column));
        }
        let Some(list) = array.as_list_opt::<i64>() else { return Ok(()) };
        for (row, &expected) in lengths.iter().enumerate() {
            let found = list.value_length(row) as usize;
            if found != expected {
                return Err(BatchError::Ragged { column, row, found, expected });
            }
        }
        Ok(())
    }
}

fn type_error(column: Column, array: &ArrayRef) -> BatchError {
    BatchError::Type { column, found: array.data_type().to_string(), expected: column.data_type().to_string() }
}

/// A ragged u32 column from its rows.
pub fn ragged_u32(rows: &[Vec<u32>]) -> ArrayRef {
    ragged(Arc::new(UInt32Array::from(rows.concat())), rows.iter().map(Vec::len), DataType::UInt32)
}

/// A ragged f32 column from its rows.
pub fn ragged_f32(rows: &[Vec<f32>]) -> ArrayRef {
    ragged(Arc::new(Float32Array::from(rows.concat())), rows.iter().map(Vec::len), DataType::Float32)
}

/// A per-sequence i64 column.
pub fn per_sequence_i64(values: Vec<i64>) -> ArrayRef {
    Arc::new(Int64Array::from(values))
}

fn ragged(values: ArrayRef, lengths: impl Iterator<Item = usize>, item: DataType) -> ArrayRef {
    let mut offsets = vec![0i64];
    offsets.extend(lengths.scan(0i64, |end, n| {
        *end += n as i64;
        Some(*end)
    }));
    let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
    Arc::new(GenericListArray::<i64>::new(Arc::new(Field::new("item", item, false)), offsets, values, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> Batch {
        Batch::from_columns(vec![
            (Column::Tokens, ragged_u32(&[vec![1, 2, 3], vec![4], vec![5, 6]])),
            (Column::CeWeight, ragged_f32(&[vec![1.0, 1.0, 0.0], vec![0.0], vec![1.0, 0.5]])),
            (Column::SampleIndex, per_sequence_i64(vec![10, 11, 12])),
        ])
        .unwrap()
    }

    #[test]
    fn slices_see_only_their_rows() {
        let part = batch().slice(1, 2);
        assert_eq!((part.num_sequences(), part.num_tokens()), (2, 3));
        assert_eq!(part.u32_values(Column::Tokens).unwrap(), [4, 5, 6]);
        assert_eq!(part.f32_values(Column::CeWeight).unwrap(), [0.0, 1.0, 0.5]);
        assert_eq!(part.i64_values(Column::SampleIndex).unwrap(), [11, 12]);
        assert_eq!(part.row_lengths().unwrap(), [1, 2]);
    }

    #[test]
    fn a_column_is_added_or_replaced() {
        let values: Vec<f32> = (0u8..3).map(f32::from).collect();
        let part = batch().slice(1, 2).with_f32(Column::Entropy, values.clone()).unwrap();
        let twice = part.with_f32(Column::Entropy, values.iter().rev().copied().collect()).unwrap();
        assert_eq!((part.num_tokens(), part.f32_values(Column::Entropy).unwrap()), (3, values));
        assert_eq!(twice.f32_values(Column::Entropy).unwrap(), [2.0, 1.0, 0.0]);
        assert_eq!(twice.u32_values(Column::Tokens).unwrap(), [4, 5, 6]);
        assert!(batch().with_f32(Column::Entropy, vec![0.0]).is_err());
    }

    #[test]
    fn bad_batches_say_what_is_wrong() {
        let check = |columns: Vec<(Column, ArrayRef)>, expected: expect_test::Expect| {
            expected.assert_eq(&Batch::from_columns(columns).unwrap_err().to_string());
        };
        let tokens = || (Column::Tokens, ragged_u32(&[vec![1, 2], vec![3]]));
        check(
            vec![tokens(), (Column::Targets, ragged_u32(&[vec![1], vec![3]]))],
            expect_test::expect!["row 0: column `targets` has 1 tokens, `tokens` has 2"],
        );
        check(
            vec![tokens(), (Column::CeWeight, ragged_u32(&[vec![1, 2], vec![3]]))],
            expect_test::expect![
                "column `ce_weight` has type LargeList(non-null UInt32), expected LargeList(non-null Float32)"
            ],
        );
        check(
            vec![(Column::SampleIndex, per_sequence_i64(vec![1]))],
            expect_test::expect!["column `tokens` is absent but needed"],
        );
        assert_eq!(batch().require(&[Column::Reward]), Err(BatchError::Missing(Column::Reward)));
    }
}
