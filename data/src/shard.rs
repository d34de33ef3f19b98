//! Token shards: Arrow IPC files that are mapped into memory, never decoded.
//!
//! A shard is an Arrow file of record batches with one row per document: `tokens` (LargeList of u16 where the
//! vocabulary fits, else u32; the list offsets are the document offsets), `source_file` (index into the manifest's
//! files), `source_document` (which document of it) and `text_bytes`; of conversations also `trained` (LargeList of
//! Boolean with the same offsets: whether each token is to be learnt). Beside it lies `shard-00000.json`, written after
//! the shard itself: a shard without a matching record does not count.
//!
//! Invariants: a document lies in one shard; shards are never changed once published.

use crate::error::{DataError, IoContext, Result};
use crate::files;
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, GenericListArray, RecordBatch, UInt16Array, UInt32Array, UInt64Array,
};
use arrow::buffer::{BooleanBuffer, Buffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt16Type, UInt32Type};
use arrow::error::ArrowError;
use arrow::ipc::convert::try_fb_to_schema;
use arrow::ipc::reader::{FileDecoder, read_footer_length};
use arrow::ipc::root_as_footer;
use arrow::ipc::writer::FileWriter;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tangelo_formats::Map;
use xxhash_rust::xxh3::Xxh3Default;

/// Tokens gathered before a record batch is written.
const BATCH_TOKENS: usize = 1 << 20;

/// Where in the sources a shard ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Index of the file in the manifest.
    pub file: usize,
    /// Documents of it that were read, empty ones included.
    pub document: u64,
}

/// What is known of a finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    /// File name within the folder.
    pub file: String,
    /// Documents (rows).
    pub documents: u64,
    /// Tokens, eos and bos included.
    pub tokens: u64,
    /// Bytes of text they were made from.
    pub text_bytes: u64,
    /// Empty documents passed over on the way.
    pub empty_documents: u64,
    /// Size of the file.
    pub size_bytes: u64,
    /// XXH3 of the file, hexadecimal.
    pub xxh3: String,
    /// Where tokenisation goes on after it.
    pub end: Cursor,
    /// Of conversations: what is trained of them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub chat: Option<ChatCounts>,
}

/// What became of conversations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatCounts {
    /// Tokens that are to be learnt: targets of the loss.
    pub trained_tokens: u64,
    /// Conversations that were cut to the length of a sequence.
    pub truncated: u64,
    /// Conversations that were too long and were left out.
    pub dropped: u64,
}

impl ChatCounts {
    /// The sum.
    pub(crate) fn plus(self, other: ChatCounts) -> ChatCounts {
        ChatCounts {
            trained_tokens: self.trained_tokens + other.trained_tokens,
            truncated: self.truncated + other.truncated,
            dropped: self.dropped + other.dropped,
        }
    }
}

impl ShardRecord {
    /// Checks the shard's file against this record: its size, and its bytes where `checksum` asks for it.
    pub(crate) fn verify(&self, folder: &Path, checksum: bool) -> Result<()> {
        let path = folder.join(&self.file);
        let again = "the command that made the folder (`tangelo data prepare` or `tangelo run`) again";
        let damaged = |what: String| {
            DataError::prepared(&path, format!("{what}; the shard is damaged: remove it and run {again}"))
        };
        let absent = |e| DataError::prepared(&path, format!("cannot be read ({e}); run {again}"));
        let size = path.metadata().map_err(absent)?.len();
        if size != self.size_bytes {
            return Err(damaged(format!("{size} bytes, expected {}", self.size_bytes)));
        }
        if checksum {
            let found = files::hex(files::checksum(&path)?);
            if found != self.xxh3 {
                return Err(damaged(format!("checksum {found}, expected {}", self.xxh3)));
            }
        }
        Ok(())
    }
}

/// Name of the `index`-th shard.
pub(crate) fn shard_name(index: usize) -> String {
    format!("shard-{index:05}.arrow")
}

/// Name of its record.
pub(crate) fn record_name(index: usize) -> String {
    format!("shard-{index:05}.json")
}

/// Width of a token in shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    /// Vocabularies of up to 65,536.
    U16,
    /// Larger ones.
    U32,
}

impl TokenType {
    /// The narrowest type that holds every id below `vocab_size`.
    pub fn for_vocabulary(vocab_size: usize) -> TokenType {
        if vocab_size <= 1 << 16 { TokenType::U16 } else { TokenType::U32 }
    }

    /// Bytes per token.
    pub fn size_bytes(self) -> usize {
        if self == TokenType::U16 { 2 } else { 4 }
    }

    fn data_type(self) -> DataType {
        if self == TokenType::U16 { DataType::UInt16 } else { DataType::UInt32 }
    }
}

fn schema(token_type: TokenType, masked: bool) -> SchemaRef {
    let list = |name, kind| Field::new(name, DataType::LargeList(Arc::new(Field::new("item", kind, false))), false);
    let mut fields = vec![
        list("tokens", token_type.data_type()),
        Field::new("source_file", DataType::UInt32, false),
        Field::new("source_document", DataType::UInt64, false),
        Field::new("text_bytes", DataType::UInt32, false),
    ];
    fields.extend(masked.then(|| list("trained", DataType::Boolean)));
    Arc::new(Schema::new(fields))
}

/// A file that hashes what is written to it.
struct HashedFile {
    file: BufWriter<File>,
    hasher: Xxh3Default,
    size_bytes: u64,
}

impl Write for HashedFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size_bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Writes one shard.
pub(crate) struct ShardWriter {
    folder: PathBuf,
    index: usize,
    partial: PathBuf,
    token_type: TokenType,
    masked: bool,
    writer: FileWriter<HashedFile>,
    pending: Pending,
    record: ShardRecord,
}

/// Documents that are not in a record batch yet.
#[derive(Default)]
struct Pending {
    tokens: Vec<u32>,
    trained: Vec<bool>,
    offsets: Vec<i64>,
    source_file: Vec<u32>,
    source_document: Vec<u64>,
    text_bytes: Vec<u32>,
}

impl ShardWriter {
    /// Starts the `index`-th shard of `folder`; `masked` where it says which tokens are trained.
    pub(crate) fn create(folder: &Path, index: usize, token_type: TokenType, masked: bool) -> Result<ShardWriter> {
        let partial = folder.join(format!("{}.partial", shard_name(index)));
        let file = BufWriter::with_capacity(1 << 20, File::create(&partial).at("create", &partial)?);
        let file = HashedFile { file, hasher: Xxh3Default::new(), size_bytes: 0 };
        let writer = FileWriter::try_new(file, &schema(token_type, masked)).map_err(|e| write_error(e, &partial))?;
        let record = ShardRecord {
            file: shard_name(index),
            documents: 0,
            tokens: 0,
            text_bytes: 0,
            empty_documents: 0,
            size_bytes: 0,
            xxh3: String::new(),
            end: Cursor::default(),
            chat: masked.then(ChatCounts::default),
        };
        let pending = Pending { offsets: vec![0], ..Pending::default() };
        Ok(ShardWriter { folder: folder.into(), index, partial, token_type, masked, writer, pending, record })
    }

    /// Tokens so far.
    pub(crate) fn num_tokens(&self) -> u64 {
        self.record.tokens
    }

    /// Appends a document that was the `at.document`-th (counted from 0) of file `at.file`. `trained` has an entry for
    /// each token of a masked shard, and none otherwise.
    pub(crate) fn push(&mut self, tokens: &[u32], trained: &[bool], text_bytes: usize, at: Cursor) -> Result<()> {
        assert_eq!(trained.len(), if self.masked { tokens.len() } else { 0 }, "one entry per token");
        self.pending.tokens.extend_from_slice(tokens);
        self.pending.trained.extend_from_slice(trained);
        self.pending.offsets.push(self.pending.tokens.len() as i64);
        self.pending.source_file.push(at.file as u32);
        self.pending.source_document.push(at.document);
        self.pending.text_bytes.push(text_bytes as u32);
        self.record.documents += 1;
        self.record.tokens += tokens.len() as u64;
        self.record.text_bytes += text_bytes as u64;
        self.record.end = Cursor { file: at.file, document: at.document + 1 };
        if self.pending.tokens.len() >= BATCH_TOKENS { self.flush_batch() } else { Ok(()) }
    }

    /// Counts empty documents that were passed over, and what became of conversations.
    pub(crate) fn count(&mut self, empty: u64, chat: ChatCounts) {
        self.record.empty_documents += empty;
        self.record.chat = self.record.chat.map(|before| before.plus(chat));
    }

    fn flush_batch(&mut self) -> Result<()> {
        if self.pending.source_file.is_empty() {
            return Ok(());
        }
        let pending = std::mem::replace(&mut self.pending, Pending { offsets: vec![0], ..Pending::default() });
        let batch = record_batch(pending, self.token_type, self.masked);
        batch.and_then(|batch| self.writer.write(&batch)).map_err(|e| write_error(e, &self.partial))
    }

    /// Gives the shard up and its room back.
    pub(crate) fn discard(self) {
        // Whatever is left is removed by the next preparation of the folder.
        let _ = std::fs::remove_file(&self.partial);
    }

    /// Publishes the shard, then its record. On failure the unfinished file is removed.
    pub(crate) fn finish(self) -> Result<ShardRecord> {
        let partial = self.partial.clone();
        self.publish().inspect_err(|_| {
            // Whatever is left is removed by the next preparation of the folder.
            let _ = std::fs::remove_file(&partial);
        })
    }

    fn publish(mut self) -> Result<ShardRecord> {
        self.flush_batch()?;
        self.writer.finish().map_err(|e| write_error(e, &self.partial))?;
        let file = self.writer.into_inner().map_err(|e| write_error(e, &self.partial))?;
        let inner = file.file.into_inner().map_err(|e| e.into_error()).at("write", &self.partial)?;
        inner.sync_all().at("sync", &self.partial)?;
        files::publish(&self.partial, &self.folder.join(shard_name(self.index)))?;
        self.record.size_bytes = file.size_bytes;
        self.record.xxh3 = files::hex(file.hasher.digest());
        files::write_json(&self.folder.join(record_name(self.index)), &self.record)?;
        Ok(self.record)
    }
}

fn record_batch(pending: Pending, token_type: TokenType, masked: bool) -> std::result::Result<RecordBatch, ArrowError> {
    let values: ArrayRef = match token_type {
        TokenType::U16 => Arc::new(UInt16Array::from_iter_values(pending.tokens.iter().map(|&t| t as u16))),
        TokenType::U32 => Arc::new(UInt32Array::from(pending.tokens)),
    };
    let offsets = OffsetBuffer::new(ScalarBuffer::from(pending.offsets));
    let list = |values: ArrayRef| {
        let item = Arc::new(Field::new("item", values.data_type().clone(), false));
        GenericListArray::<i64>::try_new(item, offsets.clone(), values, None).map(|list| Arc::new(list) as ArrayRef)
    };
    let mut columns: Vec<ArrayRef> = vec![
        list(values)?,
        Arc::new(UInt32Array::from(pending.source_file)),
        Arc::new(UInt64Array::from(pending.source_document)),
        Arc::new(UInt32Array::from(pending.text_bytes)),
    ];
    if masked {
        columns.push(list(Arc::new(BooleanArray::from(pending.trained)))?);
    }
    RecordBatch::try_new(schema(token_type, masked), columns)
}

fn write_error(error: ArrowError, path: &Path) -> DataError {
    match error {
        ArrowError::IoError(_, error) => DataError::Io { action: "write", path: path.into(), error },
        other => DataError::prepared(path, format!("could not write: {other}")),
    }
}

/// A mapped shard's record batches.
pub(crate) fn open_shard(folder: &Path, record: &ShardRecord) -> Result<Vec<RecordBatch>> {
    record.verify(folder, false)?;
    let path = folder.join(&record.file);
    let map = Map::open(&path).map_err(|e| DataError::prepared(&path, e.to_string()))?;
    let buffer = Buffer::from(Bytes::from_owner(map));
    let batches = decode(&buffer).map_err(|e| {
        DataError::prepared(&path, format!("{e}; the shard is damaged: run `tangelo data prepare` again"))
    })?;
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    if rows as u64 != record.documents {
        return Err(DataError::prepared(&path, format!("{rows} documents, expected {}", record.documents)));
    }
    Ok(batches)
}

/// Record batches of an Arrow file that share the file's memory.
fn decode(buffer: &Buffer) -> std::result::Result<Vec<RecordBatch>, String> {
    let bytes = buffer.as_slice();
    let trailer: [u8; 10] =
        bytes.len().checked_sub(10).map(|at| &bytes[at..]).and_then(|t| t.try_into().ok()).ok_or("too short")?;
    let length = read_footer_length(trailer).map_err(|e| e.to_string())?;
    let start = bytes.len().checked_sub(10 + length).ok_or("footer longer than the file")?;
    let footer = root_as_footer(&bytes[start..bytes.len() - 10]).map_err(|e| format!("bad footer: {e}"))?;
    let schema = try_fb_to_schema(footer.schema().ok_or("no schema")?).map_err(|e| e.to_string())?;
    let decoder = FileDecoder::new(Arc::new(schema), footer.version());
    let mut batches = Vec::new();
    for block in footer.recordBatches().ok_or("no record batches")? {
        let (offset, size) = (block.offset() as usize, block.metaDataLength() as usize + block.bodyLength() as usize);
        if offset.checked_add(size).is_none_or(|end| end > start) {
            return Err("a record batch lies outside the file".into());
        }
        let data = buffer.slice_with_length(offset, size);
        let batch = decoder.read_record_batch(block, &data).map_err(|e| e.to_string())?;
        batches.push(batch.ok_or("a block is no record batch")?);
    }
    Ok(batches)
}

/// Which tokens of a record batch are trained, flat as the tokens; none where the shard does not say.
pub(crate) fn trained_of_batch(batch: &RecordBatch) -> std::result::Result<Option<BooleanBuffer>, String> {
    let Some(column) = batch.column_by_name("trained") else { return Ok(None) };
    let list = column.as_list_opt::<i64>().ok_or("`trained` is no LargeList")?;
    let flat = list.values().as_boolean_opt().ok_or("`trained` is not of Booleans")?;
    Ok(Some(flat.values().clone()))
}

/// Tokens of mapped documents, in either width.
#[derive(Clone, Debug)]
pub(crate) enum Tokens {
    U16(ScalarBuffer<u16>),
    U32(ScalarBuffer<u32>),
}

impl Tokens {
    /// The flat tokens of a record batch, and the offset of each document in them.
    pub(crate) fn of_batch(batch: &RecordBatch) -> std::result::Result<(Tokens, OffsetBuffer<i64>), String> {
        let column = batch.column_by_name("tokens").ok_or("no column `tokens`")?;
        let list = column.as_list_opt::<i64>().ok_or("`tokens` is no LargeList")?;
        let values = list.values();
        let tokens = match values.data_type() {
            DataType::UInt16 => Tokens::U16(values.as_primitive::<UInt16Type>().values().clone()),
            DataType::UInt32 => Tokens::U32(values.as_primitive::<UInt32Type>().values().clone()),
            other => return Err(format!("tokens of type {other}, expected UInt16 or UInt32")),
        };
        Ok((tokens, list.offsets().clone()))
    }

    /// Appends `start..end` to `out`.
    pub(crate) fn copy(&self, start: usize, end: usize, out: &mut Vec<u32>) {
        match self {
            Tokens::U16(tokens) => out.extend(tokens[start..end].iter().map(|&t| t as u32)),
            Tokens::U32(tokens) => out.extend_from_slice(&tokens[start..end]),
        }
    }
}
