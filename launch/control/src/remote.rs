//! A batch whose columns stay with the workers that made them.
//!
//! A [`RemoteBatch`] is metadata: which rows there are, and where each row's columns lie. Selecting, reordering,
//! splitting, joining and concatenating change the metadata only; a worker that gets a batch as an argument pulls its
//! rows from their holders ([`crate::flight`]). Invariants: every piece covers every row; a column is in one piece.
//! Deliberately absent: reference counts. Batches are dropped explicitly, and at the end of their step
//! ([`crate::store`]).

use crate::error::ControlError;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use tangelo_core::Column;

/// The rank number that stands for the driver as a holder.
pub(crate) const DRIVER: u32 = u32::MAX;

/// Name of a stored shard, unique within the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ShardId {
    /// The rank that holds it; the driver's has a number of its own.
    pub(crate) holder: u32,
    /// Counts up per holder.
    pub(crate) serial: u64,
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.holder {
            DRIVER => write!(f, "batch {} of the driver", self.serial),
            rank => write!(f, "batch {} of rank {rank}", self.serial),
        }
    }
}

/// A stored shard and where it can be had.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shard {
    /// Its name.
    pub id: ShardId,
    /// host:port of its holder.
    pub address: String,
}

/// What the driver knows about a row without fetching it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Tokens in it.
    pub tokens: u32,
    /// The group it belongs to (completions of one prompt); groups are never split.
    pub group: i64,
}

/// Some columns of all rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Piece {
    pub columns: Vec<Column>,
    pub shards: Vec<Shard>,
    /// For each row of the batch, which of `shards` has it.
    pub shard_of: Vec<u32>,
    /// For each row of the batch, its row there.
    pub row_of: Vec<u32>,
}

impl Piece {
    fn select(&self, rows: &[usize]) -> Piece {
        let mut known: HashMap<u32, u32> = HashMap::new();
        let mut shards = Vec::new();
        let mut shard_of = Vec::with_capacity(rows.len());
        for &row in rows {
            let old = self.shard_of[row];
            let new = *known.entry(old).or_insert_with(|| {
                shards.push(self.shards[old as usize].clone());
                shards.len() as u32 - 1
            });
            shard_of.push(new);
        }
        let row_of = rows.iter().map(|&row| self.row_of[row]).collect();
        Piece { columns: self.columns.clone(), shards, shard_of, row_of }
    }

    fn append(&mut self, other: &Piece) {
        let mut known: HashMap<&Shard, u32> = HashMap::new();
        let mut shards = std::mem::take(&mut self.shards);
        let old = shards.clone();
        old.iter().enumerate().for_each(|(at, shard)| {
            known.insert(shard, at as u32);
        });
        let renamed: Vec<u32> = other
            .shards
            .iter()
            .map(|shard| {
                *known.entry(shard).or_insert_with(|| {
                    shards.push(shard.clone());
                    shards.len() as u32 - 1
                })
            })
            .collect();
        self.shard_of.extend(other.shard_of.iter().map(|&at| renamed[at as usize]));
        self.row_of.extend(&other.row_of);
        self.shards = shards;
    }
}

/// A handle to a batch: rows, and where their columns lie.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteBatch {
    rows: Vec<Row>,
    pieces: Vec<Piece>,
}

impl RemoteBatch {
    /// A whole shard.
    pub(crate) fn of_shard(shard: Shard, columns: Vec<Column>, rows: Vec<Row>) -> RemoteBatch {
        let shard_of = vec![0; rows.len()];
        let row_of = (0..rows.len() as u32).collect();
        RemoteBatch { rows, pieces: vec![Piece { columns, shards: vec![shard], shard_of, row_of }] }
    }

    /// Number of rows (sequences, B).
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// Tokens and group of each row.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Number of tokens over all rows (T).
    pub fn num_tokens(&self) -> u64 {
        self.rows.iter().map(|row| u64::from(row.tokens)).sum()
    }

    /// Its columns, in the order they came.
    pub fn columns(&self) -> Vec<Column> {
        self.pieces.iter().flat_map(|piece| piece.columns.iter().copied()).collect()
    }

    /// Whether it has the column.
    pub fn has(&self, column: Column) -> bool {
        self.pieces.iter().any(|piece| piece.columns.contains(&column))
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Every shard it needs, once.
    pub fn shards(&self) -> Vec<Shard> {
        let mut all: Vec<Shard> = self.pieces.iter().flat_map(|piece| piece.shards.iter().cloned()).collect();
        all.sort_by_key(|shard| shard.id);
        all.dedup();
        all
    }

    /// These rows, in this order; a row may come several times.
    ///
    /// # Errors
    /// A row that is not there.
    pub fn select(&self, rows: &[usize]) -> Result<RemoteBatch, ControlError> {
        if let Some(row) = rows.iter().find(|&&row| row >= self.rows.len()) {
            let have = self.rows.len();
            return Err(ControlError::Batch(format!("row {row} was selected from a batch of {have} rows")));
        }
        let pieces = self.pieces.iter().map(|piece| piece.select(rows)).collect();
        Ok(RemoteBatch { rows: rows.iter().map(|&row| self.rows[row]).collect(), pieces })
    }

    /// With these columns only: what is not needed does not travel. `optional` ones are left out where absent.
    ///
    /// # Errors
    /// A column of `needed` that is absent.
    pub fn narrow(&self, needed: &[Column], optional: &[Column]) -> Result<RemoteBatch, ControlError> {
        if let Some(absent) = needed.iter().find(|&&column| !self.has(column)) {
            let have: Vec<&str> = self.columns().into_iter().map(Column::name).collect();
            return Err(ControlError::Batch(format!(
                "column `{absent}` is needed but this batch has only {}; run the verb that makes it first",
                have.join(", ")
            )));
        }
        let wanted = |column: &Column| needed.contains(column) || optional.contains(column);
        Ok(RemoteBatch { rows: self.rows.clone(), pieces: self.keep(wanted) })
    }

    fn keep(&self, wanted: impl Fn(&Column) -> bool) -> Vec<Piece> {
        let mut pieces = self.pieces.clone();
        pieces.iter_mut().for_each(|piece| piece.columns.retain(&wanted));
        pieces.retain(|piece| !piece.columns.is_empty());
        pieces
    }

    /// With the columns of `other`, whose rows are the same in the same order. Where both have a column, `other`'s
    /// counts.
    ///
    /// # Errors
    /// Different numbers of rows, or rows of different groups.
    pub fn join(&self, other: &RemoteBatch) -> Result<RemoteBatch, ControlError> {
        let groups = |batch: &RemoteBatch| batch.rows.iter().map(|row| row.group).collect::<Vec<_>>();
        if groups(self) != groups(other) {
            return Err(ControlError::Batch(format!(
                "columns of {} rows cannot be joined to a batch of {} rows: they are not the same rows in the same \
                 order",
                other.num_rows(),
                self.num_rows()
            )));
        }
        let mut pieces = self.keep(|column| !other.has(*column));
        pieces.extend(other.pieces.iter().cloned());
        Ok(RemoteBatch { rows: self.rows.clone(), pieces })
    }

    /// The rows of all of them, one batch after the other.
    ///
    /// # Errors
    /// Batches of different columns.
    pub fn concat(batches: &[RemoteBatch]) -> Result<RemoteBatch, ControlError> {
        let mut batches = batches.iter().filter(|batch| batch.num_rows() > 0);
        let Some(first) = batches.next() else { return Ok(RemoteBatch::default()) };
        let mut whole = first.clone();
        for batch in batches {
            if whole.piece_columns() != batch.piece_columns() {
                return Err(ControlError::Batch(format!(
                    "batches of different columns cannot be one batch: {:?} and {:?}",
                    whole.piece_columns(),
                    batch.piece_columns()
                )));
            }
            whole.rows.extend(&batch.rows);
            whole.pieces.iter_mut().zip(&batch.pieces).for_each(|(piece, more)| piece.append(more));
        }
        Ok(whole)
    }

    fn piece_columns(&self) -> Vec<Vec<&'static str>> {
        self.pieces.iter().map(|piece| piece.columns.iter().map(|c| c.name()).collect()).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Rows 0..n of a shard of this holder; the group of row i is `first + i`.
    pub(crate) fn shard(holder: u32, columns: &[Column], first: i64, n: usize) -> RemoteBatch {
        let shard = Shard { id: ShardId { holder, serial: 7 }, address: format!("host{holder}:1") };
        let rows = (0..n).map(|i| Row { tokens: 10 + i as u32, group: first + i as i64 }).collect();
        RemoteBatch::of_shard(shard, columns.to_vec(), rows)
    }

    /// Where each row's column comes from: (holder, row there).
    fn sources(batch: &RemoteBatch, column: Column) -> Vec<(u32, u32)> {
        let piece = batch.pieces.iter().find(|piece| piece.columns.contains(&column)).unwrap();
        let at = |(&shard, &row): (&u32, &u32)| (piece.shards[shard as usize].id.holder, row);
        piece.shard_of.iter().zip(&piece.row_of).map(at).collect()
    }

    #[test]
    fn joined_columns_come_from_different_holders() {
        let tokens = shard(0, &[Column::Tokens, Column::Value], 0, 3);
        let joined = tokens.join(&shard(4, &[Column::Value], 0, 3)).unwrap();
        assert_eq!(joined.columns(), [Column::Tokens, Column::Value]);
        assert_eq!(sources(&joined, Column::Value), [(4, 0), (4, 1), (4, 2)]);
        let picked = joined.select(&[2, 0]).unwrap();
        assert_eq!(sources(&picked, Column::Tokens), [(0, 2), (0, 0)]);
        assert_eq!(picked.narrow(&[Column::Value], &[Column::Reward]).unwrap().shards().len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let check = |result: Result<RemoteBatch, ControlError>, expected: expect_test::Expect| {
            expected.assert_eq(&result.unwrap_err().to_string());
        };
        let batch = shard(0, &[Column::Tokens], 0, 3);
        check(batch.select(&[3]), expect_test::expect!["row 3 was selected from a batch of 3 rows"]);
        check(
            batch.narrow(&[Column::Value], &[]),
            expect_test::expect![
                "column `value` is needed but this batch has only tokens; run the verb that makes it first"
            ],
        );
        check(
            batch.join(&shard(0, &[Column::Value], 5, 3)),
            expect_test::expect![
                "columns of 3 rows cannot be joined to a batch of 3 rows: they are not the same rows in the same order"
            ],
        );
        check(
            RemoteBatch::concat(&[batch.clone(), shard(1, &[Column::Value], 0, 1)]),
            expect_test::expect![[r#"batches of different columns cannot be one batch: [["tokens"]] and [["value"]]"#]],
        );
    }

    proptest! {
        /// Rows keep their sources through any cuts and joins.
        #[test]
        fn cutting_and_putting_together_is_the_identity(cuts in prop::collection::vec(0usize..20, 0..4), n in 1usize..20) {
            let batch = shard(3, &[Column::Tokens], 0, n);
            let mut edges: Vec<usize> = cuts.into_iter().map(|cut| cut.min(n)).chain([0, n]).collect();
            edges.sort_unstable();
            let part = |edge: &[usize]| batch.select(&(edge[0]..edge[1]).collect::<Vec<_>>()).unwrap();
            let parts: Vec<_> = edges.windows(2).map(part).collect();
            prop_assert_eq!(RemoteBatch::concat(&parts).unwrap(), batch);
        }
    }
}
