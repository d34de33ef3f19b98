//! Rows of a batch from their pieces.

use crate::error::{DataError, Result};
use crate::pack::{PackIndex, Piece};
use crate::store::TokenStore;
use tangelo_core::batch::{per_sequence_i64, ragged_f32, ragged_u32};
use tangelo_core::{Batch, Column};

/// Rows under construction.
///
/// With a document mask, `positions` restart at each piece (so that they stay below `seq_len` however long the
/// document), `seq_id` counts the pieces of the row, and a position has weight 0 where its document ends or its target
/// is not to be learnt. Without one a row is a single sequence, trained through. Padding at the end of a row has weight
/// 0 and a `seq_id` of its own.
pub(super) struct Rows {
    seq_len: usize,
    document_mask: bool,
    tokens: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
    positions: Vec<Vec<u32>>,
    seq_ids: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
    samples: Vec<i64>,
}

/// One row under construction.
struct Row {
    tokens: Vec<u32>,
    /// The target of each position, where it has one.
    targets: Vec<Option<u32>>,
    positions: Vec<u32>,
    seq_ids: Vec<u32>,
}

impl Rows {
    pub(super) fn new(seq_len: usize, num_rows: usize, document_mask: bool) -> Rows {
        let (rows, floats) = (|| Vec::with_capacity(num_rows), Vec::with_capacity(num_rows));
        let samples = Vec::with_capacity(num_rows);
        Rows {
            seq_len,
            document_mask,
            tokens: rows(),
            targets: rows(),
            positions: rows(),
            seq_ids: rows(),
            weights: floats,
            samples,
        }
    }

    /// Adds row `row` of `index`, padded with `padding`.
    pub(super) fn push(&mut self, index: &PackIndex, row: u64, padding: u32, sample: u64) {
        let (store, pieces) = (&index.documents().store, index.pieces(row));
        let mut built = Row::with_capacity(self.seq_len);
        for (number, piece) in pieces.iter().enumerate() {
            built.push_piece(store, piece, number as u32);
        }
        if !self.document_mask {
            built.join(store, index.following(row));
        }
        self.finish_row(built, padding, sample);
    }

    /// Adds a row that trains nothing.
    pub(super) fn push_padding(&mut self, padding: u32, sample: u64) {
        self.finish_row(Row::with_capacity(self.seq_len), padding, sample);
    }

    fn finish_row(&mut self, mut row: Row, padding: u32, sample: u64) {
        let filled = row.tokens.len();
        let seq_id = row.seq_ids.last().map_or(0, |last| last + 1);
        row.tokens.resize(self.seq_len, padding);
        row.targets.resize(self.seq_len, None);
        row.positions.extend(0..(self.seq_len - filled) as u32);
        row.seq_ids.resize(self.seq_len, seq_id);
        self.weights.push(row.targets.iter().map(|t| if t.is_some() { 1.0 } else { 0.0 }).collect());
        self.targets.push(row.targets.iter().map(|t| t.unwrap_or(0)).collect());
        self.tokens.push(row.tokens);
        self.positions.push(row.positions);
        self.seq_ids.push(row.seq_ids);
        self.samples.push(sample as i64);
    }

    pub(super) fn finish(self) -> Result<Batch> {
        Batch::from_columns(vec![
            (Column::Tokens, ragged_u32(&self.tokens)),
            (Column::Targets, ragged_u32(&self.targets)),
            (Column::Positions, ragged_u32(&self.positions)),
            (Column::SeqId, ragged_u32(&self.seq_ids)),
            (Column::CeWeight, ragged_f32(&self.weights)),
            (Column::SampleIndex, per_sequence_i64(self.samples)),
        ])
        .map_err(|e| DataError::Internal(format!("a batch that does not check: {e}")))
    }
}

impl Row {
    fn with_capacity(seq_len: usize) -> Row {
        Row {
            tokens: Vec::with_capacity(seq_len + 1),
            targets: Vec::with_capacity(seq_len),
            positions: Vec::with_capacity(seq_len),
            seq_ids: Vec::with_capacity(seq_len),
        }
    }

    fn push_piece(&mut self, store: &TokenStore, piece: &Piece, seq_id: u32) {
        let first = self.tokens.len();
        let end = piece.range.end + u64::from(piece.has_next());
        store.copy(piece.document, piece.range.start..end, &mut self.tokens);
        let mut trained = Vec::new();
        store.copy_trained(piece.document, piece.range.start..end, &mut trained);
        let next = self.tokens[first + 1..].iter().zip(&trained[1..]);
        self.targets.extend(next.map(|(&token, &trained)| trained.then_some(token)));
        if !piece.has_next() {
            self.targets.push(None);
        }
        self.tokens.truncate(first + piece.len());
        self.positions.extend(0..piece.len() as u32);
        self.seq_ids.extend(std::iter::repeat_n(seq_id, piece.len()));
    }

    /// Makes one sequence of the pieces: the target at the end of a document is the next token of the row, or the
    /// first of the text that follows it.
    fn join(&mut self, store: &TokenStore, following: Option<Piece>) {
        let mut behind = Vec::new();
        if let Some(piece) = following {
            store.copy(piece.document, piece.range.start..piece.range.start + 1, &mut behind);
        }
        for at in 0..self.tokens.len() {
            self.targets[at] =
                self.targets[at].or_else(|| self.tokens.get(at + 1).copied()).or_else(|| behind.first().copied());
            self.positions[at] = at as u32;
            self.seq_ids[at] = 0;
        }
    }
}
