//! Parquet and Arrow IPC: the text is one column of record batches.

use super::Documents;
use crate::error::{DataError, IoContext, Result};
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Schema};
use arrow::error::ArrowError;
use arrow::ipc::reader::{FileReader, StreamReader};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Rows decoded at once: few, because a row may be a book.
const BATCH_ROWS: usize = 64;

/// How far the file was read, in bytes, after each batch.
enum Extent {
    /// Rows there are in all, and the file's size.
    Rows { total: u64, bytes: u64 },
    /// Unknown until the end: the position is counted elsewhere.
    Counted,
}

/// Documents of a file of record batches.
pub(super) struct ColumnarDocuments {
    path: PathBuf,
    batches: Box<dyn Iterator<Item = std::result::Result<RecordBatch, ArrowError>> + Send>,
    /// The text column of the current batch, as LargeUtf8, and the next row of it.
    current: Option<(ArrayRef, usize)>,
    column: usize,
    rows_read: u64,
    extent: Extent,
    progress: Arc<AtomicU64>,
}

impl Documents for ColumnarDocuments {
    fn next_document(&mut self) -> Result<Option<String>> {
        loop {
            if let Some((texts, row)) = &mut self.current
                && *row < texts.len()
            {
                let strings = texts.as_string::<i64>();
                let text = if strings.is_null(*row) { String::new() } else { strings.value(*row).to_string() };
                *row += 1;
                return Ok(Some(text));
            }
            let Some(batch) = self.batches.next() else { return Ok(None) };
            let batch = batch.map_err(|e| DataError::file(&self.path, format!("cannot decode: {e}")))?;
            self.advance(batch.num_rows());
            let texts = cast(batch.column(self.column), &DataType::LargeUtf8);
            let texts = texts.map_err(|e| DataError::file(&self.path, format!("text column is not text: {e}")))?;
            self.current = Some((texts, 0));
        }
    }
}

impl ColumnarDocuments {
    fn advance(&mut self, rows: usize) {
        self.rows_read += rows as u64;
        if let Extent::Rows { total, bytes } = self.extent {
            let done = (bytes as u128 * self.rows_read as u128 / total.max(1) as u128) as u64;
            self.progress.store(done, Ordering::Relaxed);
        }
    }
}

/// The text column's index, if its type holds text.
fn text_column(path: &Path, schema: &Schema, column: &str) -> Result<usize> {
    let Ok(index) = schema.index_of(column) else {
        let found: Vec<String> = schema.fields().iter().map(|f| f.name().clone()).collect();
        return Err(DataError::Column { path: path.into(), column: column.into(), found: found.join(", ") });
    };
    let mut kind = schema.field(index).data_type();
    if let DataType::Dictionary(_, values) = kind {
        kind = values;
    }
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Ok(index),
        other => Err(DataError::file(path, format!("column `{column}` is {other}, not text (Utf8 or LargeUtf8)"))),
    }
}

/// Documents of a Parquet file. Only the text column is decoded, [`BATCH_ROWS`] rows at a time.
pub(super) fn parquet(path: &Path, column: &str, progress: &Arc<AtomicU64>) -> Result<ColumnarDocuments> {
    let file = File::open(path).at("open", path)?;
    let bytes = file.metadata().at("look at", path)?.len();
    let bad = |e: &dyn std::fmt::Display| DataError::file(path, format!("not a readable Parquet file: {e}"));
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| bad(&e))?;
    let index = text_column(path, builder.schema(), column)?;
    let total = builder.metadata().file_metadata().num_rows().max(0) as u64;
    let mask = ProjectionMask::roots(builder.parquet_schema(), [index]);
    let reader = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build().map_err(|e| bad(&e))?;
    Ok(documents(path, Box::new(reader), 0, Extent::Rows { total, bytes }, progress))
}

/// Documents of an Arrow IPC file or stream (as Hugging Face `datasets` writes); told apart by the file's magic.
pub(super) fn arrow(path: &Path, column: &str, progress: &Arc<AtomicU64>) -> Result<ColumnarDocuments> {
    let mut file = File::open(path).at("open", path)?;
    let mut magic = [0u8; 6];
    let count = file.read(&mut magic).at("read", path)?;
    file.seek(SeekFrom::Start(0)).at("seek in", path)?;
    let bad = |e: ArrowError| DataError::file(path, format!("not a readable Arrow IPC file or stream: {e}"));
    if &magic[..count] == b"ARROW1" {
        let bytes = file.metadata().at("look at", path)?.len();
        let reader = FileReader::try_new_buffered(file, None).map_err(bad)?;
        let index = text_column(path, &reader.schema(), column)?;
        let total = reader.num_batches() as u64;
        let mut found = documents(path, Box::new(reader), index, Extent::Counted, progress);
        // Progress by batches: their sizes are alike in practice.
        let (progress, mut done) = (progress.clone(), 0u64);
        found.batches = Box::new(found.batches.inspect(move |_| {
            done += 1;
            progress.store((bytes as u128 * done as u128 / total.max(1) as u128) as u64, Ordering::Relaxed);
        }));
        return Ok(found);
    }
    let counted = super::Counted { inner: file, count: progress.clone() };
    let reader = StreamReader::try_new(BufReader::new(counted), None).map_err(bad)?;
    let index = text_column(path, &reader.schema(), column)?;
    Ok(documents(path, Box::new(reader), index, Extent::Counted, progress))
}

fn documents(
    path: &Path,
    batches: Box<dyn Iterator<Item = std::result::Result<RecordBatch, ArrowError>> + Send>,
    column: usize,
    extent: Extent,
    progress: &Arc<AtomicU64>,
) -> ColumnarDocuments {
    let progress = progress.clone();
    ColumnarDocuments { path: path.into(), batches, current: None, column, rows_read: 0, extent, progress }
}
