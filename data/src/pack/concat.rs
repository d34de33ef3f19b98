//! Concat-and-chunk: documents end to end, cut every `seq_len` tokens.
//!
//! Row `i` starts at token `i * seq_len` of the stream. To find it, the stream's position is kept at every
//! [`STRIDE`]th document, and the documents in between are stepped over.

use super::{Documents, Piece};

/// Documents between two kept positions.
const STRIDE: u64 = 64;

#[derive(Debug)]
pub(crate) struct Concat {
    pub(super) documents: Documents,
    seq_len: u64,
    /// Tokens before place `STRIDE * k` of the documents' order.
    positions: Vec<u64>,
    num_tokens: u64,
}

impl Concat {
    pub(super) fn new(documents: Documents, seq_len: usize) -> Concat {
        let (mut positions, mut num_tokens) = (Vec::new(), 0);
        for place in 0..documents.len() {
            if place % STRIDE == 0 {
                positions.push(num_tokens);
            }
            let (_, range) = documents.at(place);
            num_tokens += range.end - range.start;
        }
        Concat { documents, seq_len: seq_len as u64, positions, num_tokens }
    }

    /// The last token has no target, so that a row for it alone would train nothing.
    pub(super) fn num_rows(&self) -> u64 {
        self.num_tokens.saturating_sub(1).div_ceil(self.seq_len)
    }

    pub(super) fn pieces(&self, row: u64) -> Vec<Piece> {
        let start = row * self.seq_len;
        self.stream(start, (start + self.seq_len).min(self.num_tokens))
    }

    pub(super) fn piece_after(&self, row: u64) -> Option<Piece> {
        let start = (row + 1) * self.seq_len;
        if start < self.num_tokens { self.stream(start, start + 1).pop() } else { None }
    }

    /// Tokens `start..end` of the stream.
    fn stream(&self, start: u64, end: u64) -> Vec<Piece> {
        let known = self.positions.partition_point(|&position| position <= start) - 1;
        let (mut place, mut position) = (known as u64 * STRIDE, self.positions[known]);
        let mut pieces = Vec::new();
        while position < end && place < self.documents.len() {
            let (document, tokens) = self.documents.at(place);
            let length = tokens.end - tokens.start;
            let first = start.max(position) - position;
            let last = end.min(position + length).saturating_sub(position);
            if first < last {
                let range = tokens.start + first..tokens.start + last;
                pieces.push(Piece { document, range, document_end: tokens.end });
            }
            position += length;
            place += 1;
        }
        pieces
    }
}
