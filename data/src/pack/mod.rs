//! How documents are laid into sequences: an index, not a copy.
//!
//! A row of `seq_len` positions is a list of pieces of documents. Invariants: with a document mask every token of the
//! split but the first of each document is the target of exactly one position; a row is a function of the documents,
//! the options and its number.

mod best_fit;
mod concat;

use crate::error::Result;
use crate::order::Permutation;
use crate::split::{HeldOut, Split};
use crate::store::TokenStore;
use std::ops::Range;
use std::sync::Arc;
use tangelo_configs::job::Packing;

/// Input tokens of one document in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) document: u64,
    /// Tokens of the document.
    pub(crate) range: Range<u64>,
    /// Where the document's tokens of this split end: a token before it may be the last position's target.
    pub(crate) document_end: u64,
}

impl Piece {
    pub(crate) fn len(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }

    /// Whether the token behind the piece belongs to the same document and split.
    pub(crate) fn has_next(&self) -> bool {
        self.range.end < self.document_end
    }
}

/// The documents of one split in a fixed, shuffled order.
#[derive(Clone, Debug)]
pub(crate) struct Documents {
    pub(crate) store: Arc<TokenStore>,
    held_out: HeldOut,
    split: Split,
    order: Permutation,
}

impl Documents {
    pub(crate) fn new(store: Arc<TokenStore>, held_out: HeldOut, split: Split, seed: u64) -> Documents {
        let order = Permutation::new(store.num_documents(), seed);
        Documents { store, held_out, split, order }
    }

    /// Number of places in the order, also of documents that are not in this split.
    pub(crate) fn len(&self) -> u64 {
        self.store.num_documents()
    }

    /// The document at a place, and its tokens in this split (maybe none).
    pub(crate) fn at(&self, place: u64) -> (u64, Range<u64>) {
        let document = self.order.at(place);
        (document, self.tokens_of(document))
    }

    /// The tokens of a document in this split.
    pub(crate) fn tokens_of(&self, document: u64) -> Range<u64> {
        self.held_out.range(document, self.store.document_len(document), self.split)
    }
}

/// The rows of one source.
#[derive(Debug)]
pub(crate) enum PackIndex {
    Concat(concat::Concat),
    BestFit(best_fit::BestFit),
}

impl PackIndex {
    pub(crate) fn new(documents: Documents, packing: Packing, seq_len: usize) -> Result<PackIndex> {
        Ok(match packing {
            Packing::Concat => PackIndex::Concat(concat::Concat::new(documents, seq_len)),
            Packing::BestFit => PackIndex::BestFit(best_fit::BestFit::new(documents, seq_len)?),
        })
    }

    /// Number of rows.
    pub(crate) fn num_rows(&self) -> u64 {
        match self {
            PackIndex::Concat(index) => index.num_rows(),
            PackIndex::BestFit(index) => index.num_rows(),
        }
    }

    /// The documents that the rows are made of.
    pub(crate) fn documents(&self) -> &Documents {
        match self {
            PackIndex::Concat(index) => &index.documents,
            PackIndex::BestFit(index) => &index.documents,
        }
    }

    /// The pieces of a row, in order.
    pub(crate) fn pieces(&self, row: u64) -> Vec<Piece> {
        match self {
            PackIndex::Concat(index) => index.pieces(row),
            PackIndex::BestFit(index) => index.pieces(row),
        }
    }

    /// The first piece of the text that follows a row, where the text goes on there.
    pub(crate) fn following(&self, row: u64) -> Option<Piece> {
        match self {
            PackIndex::Concat(index) => index.piece_after(row),
            PackIndex::BestFit(_) => None,
        }
    }
}
