//! Parquet and Arrow IPC: a document is the text of one column of record batches, or a row as JSON.

use super::record::row_as_json;
use super::{Content, Documents};
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
    /// The current batch, and the next row of it.
    current: Option<(Rows, usize)>,
    /// `None`: whole rows.
    column: Option<usize>,
    /// Rows of the batches before, and of the current one.
    rows_read: u64,
    rows_given: u64,
    extent: Extent,
    progress: Arc<AtomicU64>,
}

/// What documents are read from.
enum Rows {
    /// The text column, as LargeUtf8.
    Texts(ArrayRef),
    Records(RecordBatch),
}

impl Rows {
    fn len(&self) -> usize {
        match self {
            Rows::Texts(texts) => texts.len(),
            Rows::Records(records) => records.num_rows(),
        }
    }

    fn document(&self, row: usize) -> std::result::Result<String, String> {
        match self {
            Rows::Texts(texts) => {
                let strings = texts.as_string::<i64>();
                Ok(if strings.is_null(row) { String::new() } else { strings.value(row).to_string() })
            }
            Rows::Records(records) => row_as_json(records, row).map(|object| object.to_string()),
        }
    }
}

impl Documents for ColumnarDocuments {
    fn next_document(&mut self) -> Result<Option<String>> {
        loop {
            if let Some((rows, row)) = &mut self.current
                && *row < rows.len()
            {
                *row += 1;
                self.rows_given += 1;
                let failed = |e| DataError::file(&self.path, format!("row {}: {e}", self.rows_given));
                return rows.document(*row - 1).map(Some).map_err(failed);
            }
            let Some(batch) = self.batches.next() else { return Ok(None) };
            let batch = batch.map_err(|e| DataError::file(&self.path, format!("cannot decode: {e}")))?;
            self.advance(batch.num_rows());
            let rows = match self.column {
                None => Rows::Records(batch),
                Some(column) => Rows::Texts(
                    cast(batch.column(column), &DataType::LargeUtf8)
                        .map_err(|e| DataError::file(&self.path, format!("text column is not text: {e}")))?,
                ),
            };
            self.current = Some((rows, 0));
        }
    }

    fn place(&self) -> u64 {
        self.rows_given
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

/// The text column's index, if its type holds text; none where rows are read whole.
fn text_column(path: &Path, schema: &Schema, content: Content) -> Result<Option<usize>> {
    let Content::Column(column) = content else { return Ok(None) };
    let Ok(index) = schema.index_of(column) else {
        let found: Vec<String> = schema.fields().iter().map(|f| f.name().clone()).collect();
        return Err(DataError::Column { path: path.into(), column: column.into(), found: found.join(", ") });
    };
    let mut kind = schema.field(index).data_type();
    if let DataType::Dictionary(_, values) = kind {
        kind = values;
    }
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Ok(Some(index)),
        other => Err(DataError::file(path, format!("column `{column}` is {other}, not text (Utf8 or LargeUtf8)"))),
    }
}

/// Documents of a Parquet file. Of text only its column is decoded, [`BATCH_ROWS`] rows at a time.
pub(super) fn parquet(path: &Path, content: Content, progress: &Arc<AtomicU64>) -> Result<ColumnarDocuments> {
    let file = File::open(path).at("open", path)?;
    let bytes = file.metadata().at("look at", path)?.len();
    let bad = |e: &dyn std::fmt::Display| DataError::file(path, format!("not a readable Parquet file: {e}"));
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| bad(&e))?;
    let index = text_column(path, builder.schema(), content)?;
    let total = builder.metadata().file_metadata().num_rows().max(0) as u64;
    let mask = match index {
        Some(index) => ProjectionMask::roots(builder.parquet_schema(), [index]),
        None => ProjectionMask::all(),
    };
    let reader = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build().map_err(|e| bad(&e))?;
    Ok(documents(path, Box::new(reader), index.map(|_| 0), Extent::Rows { total, bytes }, progress))
}

/// Documents of an Arrow IPC file or stream (as Hugging Face `datasets` writes); told apart by the file's magic.
pub(super) fn arrow(path: &Path, content: Content, progress: &Arc<AtomicU64>) -> Result<ColumnarDocuments> {
    let mut file = File::open(path).at("open", path)?;
    let mut magic = [0u8; 6];
    let count = file.read(&mut magic).at("read", path)?;
    file.seek(SeekFrom::Start(0)).at("seek in", path)?;
    let bad = |e: ArrowError| DataError::file(path, format!("not a readable Arrow IPC file or stream: {e}"));
    if &magic[..count] == b"ARROW1" {
        let bytes = file.metadata().at("look at", path)?.len();
        let reader = FileReader::try_new_buffered(file, None).map_err(bad)?;
        let index = text_column(path, &reader.schema(), content)?;
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
    let index = text_column(path, &reader.schema(), content)?;
    Ok(documents(path, Box::new(reader), index, Extent::Counted, progress))
}

fn documents(
    path: &Path,
    batches: Box<dyn Iterator<Item = std::result::Result<RecordBatch, ArrowError>> + Send>,
    column: Option<usize>,
    extent: Extent,
    progress: &Arc<AtomicU64>,
) -> ColumnarDocuments {
    let progress = progress.clone();
    ColumnarDocuments {
        path: path.into(),
        batches,
        current: None,
        column,
        rows_read: 0,
        rows_given: 0,
        extent,
        progress,
    }
}
