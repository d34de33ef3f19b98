//! Prompts from Parquet, Arrow and JSON files.
//!
//! Invariant: prompts come in the order of the files as `prompts.files` names them, globs sorted, and of the rows in
//! each. A set of prompts is small beside the text that a model was trained on: all of it is held in memory.

use super::Prompt;
use super::columns::{Columns, prompt_of};
use super::json::value_at;
use crate::error::{DriverError, Result};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use tangelo_configs::Prompts;
use tangelo_data::DataError;
use tangelo_data::source::{Compression, FileKind, SourceFile, discover};

/// A prompt and where it stands.
#[derive(Clone, Debug)]
pub(super) struct FilePrompt {
    pub prompt: Prompt,
    /// `file:row`, for messages.
    pub place: String,
}

/// All prompts of the files that `patterns` name.
pub(super) fn read_all(patterns: &[String], config: &Prompts, need_ground_truth: bool) -> Result<Vec<FilePrompt>> {
    let mut found = Vec::new();
    for file in discover(patterns)? {
        let mut reader = RowReader { file: &file, config, need_ground_truth, row: 0, found: &mut found };
        reader.read()?;
    }
    for (index, prompt) in found.iter_mut().enumerate() {
        prompt.prompt.index = index as u64;
    }
    if found.is_empty() {
        return Err(DriverError::Prompts(format!("no prompts in {}: the files have no rows", patterns.join(", "))));
    }
    Ok(found)
}

struct RowReader<'a> {
    file: &'a SourceFile,
    config: &'a Prompts,
    need_ground_truth: bool,
    row: u64,
    found: &'a mut Vec<FilePrompt>,
}

impl RowReader<'_> {
    fn read(&mut self) -> Result<()> {
        match self.file.kind {
            FileKind::JsonLines => self.json(),
            FileKind::Parquet => self.parquet(),
            FileKind::Arrow => self.arrow(),
            FileKind::Text => Err(self.wrong("prompts are read from .parquet, .arrow and .jsonl files; this is none")),
        }
    }

    /// JSON lines, or one array of objects.
    fn json(&mut self) -> Result<()> {
        let text = read_text(self.file)?;
        if text.trim_start().starts_with('[') {
            let rows: Vec<Value> = serde_json::from_str(&text).map_err(|e| self.wrong(e))?;
            return rows.into_iter().try_for_each(|row| {
                self.row += 1;
                self.json_row(row)
            });
        }
        for line in text.lines() {
            self.row += 1;
            if !line.trim().is_empty() {
                let row = serde_json::from_str(line).map_err(|e| self.row_error(format!("not JSON: {e}")))?;
                self.json_row(row)?;
            }
        }
        Ok(())
    }

    fn json_row(&mut self, row: Value) -> Result<()> {
        let Value::Object(row) = row else {
            return Err(self.row_error("expected a JSON object with a prompt in it".into()));
        };
        let names: Vec<&str> = row.keys().map(String::as_str).collect();
        let columns = Columns::choose(self.config, &names).map_err(|reason| self.row_error(reason))?;
        self.push(&row, &columns)
    }

    fn parquet(&mut self) -> Result<()> {
        let file = self.open()?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file)
            .map_err(|e| self.wrong(format!("not a readable Parquet file: {e}")))?;
        let columns = self.choose(builder.schema())?;
        let mask = ProjectionMask::roots(builder.parquet_schema(), indices(builder.schema(), &columns));
        let reader = builder.with_projection(mask).build().map_err(|e| self.wrong(e))?;
        self.batches(reader, &columns)
    }

    fn arrow(&mut self) -> Result<()> {
        let bad = |e: ArrowError| self.wrong(format!("not a readable Arrow IPC file or stream: {e}"));
        match arrow::ipc::reader::FileReader::try_new_buffered(self.open()?, None) {
            Ok(reader) => {
                let columns = self.choose(&reader.schema())?;
                self.batches(reader, &columns)
            }
            // Hugging Face `datasets` writes streams.
            Err(_) => {
                let input = BufReader::new(self.open()?);
                let reader = arrow::ipc::reader::StreamReader::try_new(input, None).map_err(bad)?;
                let columns = self.choose(&reader.schema())?;
                self.batches(reader, &columns)
            }
        }
    }

    fn choose(&self, schema: &SchemaRef) -> Result<Columns> {
        let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        Columns::choose(self.config, &names).map_err(|reason| self.wrong(reason))
    }

    fn batches(
        &mut self,
        batches: impl Iterator<Item = std::result::Result<RecordBatch, ArrowError>>,
        columns: &Columns,
    ) -> Result<()> {
        for batch in batches {
            let batch = batch.map_err(|e| self.wrong(e))?;
            let schema = batch.schema();
            let wanted = indices(&schema, columns);
            for row in 0..batch.num_rows() {
                self.row += 1;
                let mut object = Map::new();
                for &index in &wanted {
                    let name = schema.field(index).name();
                    let value = value_at(batch.column(index), row)
                        .map_err(|e| self.row_error(format!("column `{name}` cannot be read: {e}")))?;
                    object.insert(name.clone(), value);
                }
                self.push(&object, columns)?;
            }
        }
        Ok(())
    }

    fn push(&mut self, row: &Map<String, Value>, columns: &Columns) -> Result<()> {
        let name = self.file.path.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.split('.').next().unwrap_or(&name);
        let prompt = prompt_of(row, columns, self.config, self.need_ground_truth, stem)
            .map_err(|reason| self.row_error(reason))?;
        self.found.push(FilePrompt { prompt, place: format!("{}:{}", self.file.path.display(), self.row) });
        Ok(())
    }

    fn open(&self) -> Result<File> {
        File::open(&self.file.path).map_err(|error| io_error(&self.file.path, error))
    }

    fn wrong(&self, reason: impl std::fmt::Display) -> DriverError {
        DriverError::Data(DataError::File { path: self.file.path.clone(), reason: reason.to_string() })
    }

    fn row_error(&self, reason: String) -> DriverError {
        DriverError::Row { path: self.file.path.clone(), row: self.row, reason }
    }
}

/// The columns of a schema that are read.
fn indices(schema: &SchemaRef, columns: &Columns) -> Vec<usize> {
    let read = columns.read();
    let fields = schema.fields().iter().enumerate();
    fields.filter(|(_, field)| read.contains(&field.name().as_str())).map(|(index, _)| index).collect()
}

fn io_error(path: &Path, error: std::io::Error) -> DriverError {
    DriverError::Data(DataError::Io { action: "read", path: path.to_owned(), error })
}

fn read_text(file: &SourceFile) -> Result<String> {
    let failed = |error| io_error(&file.path, error);
    let input = BufReader::new(File::open(&file.path).map_err(failed)?);
    let mut input: Box<dyn Read> = match file.compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => Box::new(zstd::Decoder::with_buffer(input).map_err(failed)?),
    };
    let mut text = String::new();
    input.read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}
