//! A prepared folder, mapped: documents of tokens by number.

use crate::error::{DataError, Result};
use crate::manifest::Manifest;
use crate::shard::{Cursor, Tokens, open_shard, trained_of_batch};
use arrow::array::AsArray;
use arrow::array::RecordBatch;
use arrow::buffer::{BooleanBuffer, OffsetBuffer};
use arrow::datatypes::{UInt32Type, UInt64Type};
use std::ops::Range;
use std::path::Path;

/// The documents of a prepared folder.
#[derive(Debug)]
pub(crate) struct TokenStore {
    pub(crate) manifest: Manifest,
    blocks: Vec<Block>,
    /// Number of the first document of each block, and of all at the end.
    starts: Vec<u64>,
}

/// A record batch of a shard.
#[derive(Debug)]
struct Block {
    tokens: Tokens,
    offsets: OffsetBuffer<i64>,
    /// Whether each token is trained; all are where the shard does not say.
    trained: Option<BooleanBuffer>,
    records: RecordBatch,
}

impl TokenStore {
    /// Maps all shards. Sizes and row counts are checked, and checksums where `verify` asks for it.
    pub(crate) fn open(folder: &Path, verify: bool) -> Result<TokenStore> {
        let manifest = Manifest::read(folder)?;
        let (mut blocks, mut starts) = (Vec::new(), vec![0]);
        let mut num_documents = 0;
        for shard in &manifest.shards {
            if verify {
                shard.verify(folder, true)?;
            }
            for records in open_shard(folder, shard)? {
                let damaged = |e: String| DataError::prepared(&folder.join(&shard.file), e);
                let (tokens, offsets) = Tokens::of_batch(&records).map_err(damaged)?;
                let trained = trained_of_batch(&records).map_err(damaged)?;
                if trained.as_ref().is_some_and(|t| t.len() as i64 != offsets[offsets.len() - 1]) {
                    return Err(damaged("`trained` has not one entry per token".into()));
                }
                num_documents += records.num_rows() as u64;
                starts.push(num_documents);
                blocks.push(Block { tokens, offsets, trained, records });
            }
        }
        Ok(TokenStore { manifest, blocks, starts })
    }

    /// Number of documents.
    pub(crate) fn num_documents(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    fn find(&self, document: u64) -> (&Block, usize) {
        let block = self.starts.partition_point(|&start| start <= document) - 1;
        (&self.blocks[block], (document - self.starts[block]) as usize)
    }

    /// Tokens of a document.
    pub(crate) fn document_len(&self, document: u64) -> u64 {
        let (block, row) = self.find(document);
        (block.offsets[row + 1] - block.offsets[row]) as u64
    }

    /// Appends tokens `range` of a document to `out`.
    pub(crate) fn copy(&self, document: u64, range: Range<u64>, out: &mut Vec<u32>) {
        let (block, row) = self.find(document);
        let start = block.offsets[row] as u64;
        block.tokens.copy((start + range.start) as usize, (start + range.end) as usize, out);
    }

    /// Whether the folder says which tokens are trained: it holds conversations.
    pub(crate) fn is_masked(&self) -> bool {
        self.manifest.origin.options.chat.is_some()
    }

    /// Appends for each token in `range` of a document whether it is trained.
    pub(crate) fn copy_trained(&self, document: u64, range: Range<u64>, out: &mut Vec<bool>) {
        let (block, row) = self.find(document);
        let start = block.offsets[row] as u64;
        match &block.trained {
            Some(trained) => out.extend(range.map(|at| trained.value((start + at) as usize))),
            None => out.resize(out.len() + (range.end - range.start) as usize, true),
        }
    }

    /// Where in the sources a document was: file and number of the document in it.
    pub(crate) fn origin(&self, document: u64) -> Option<Cursor> {
        let (block, row) = self.find(document);
        let file = block.records.column_by_name("source_file")?.as_primitive_opt::<UInt32Type>()?.value(row);
        let number = block.records.column_by_name("source_document")?.as_primitive_opt::<UInt64Type>()?.value(row);
        Some(Cursor { file: file as usize, document: number })
    }
}
