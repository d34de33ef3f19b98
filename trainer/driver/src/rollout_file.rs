//! Every rollout of a step as a Parquet file: what was asked and answered, what it was worth, what was learnt from it.

use crate::collect::Rollout;
use arrow::array::{
    ArrayRef, Float32Builder, Float64Array, Float64Builder, Int64Array, ListBuilder, MapBuilder, RecordBatch,
    StringArray, StringBuilder, UInt32Builder, UInt64Array,
};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The rollouts of a step.
pub struct RolloutFile<'a> {
    /// The step.
    pub step: u64,
    /// In the order of the batch.
    pub rollouts: &'a [Rollout],
    /// Of each rollout, the advantage of every completion token.
    pub advantages: &'a [Vec<f32>],
}

/// The file of a step.
pub fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:08}.parquet"))
}

/// Writes `folder/step-00000001.parquet`, whole or not at all.
///
/// # Errors
/// The folder or the file cannot be written.
pub fn write(folder: &Path, file: &RolloutFile<'_>) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let other = |e: parquet::errors::ParquetError| std::io::Error::other(e);
    let batch = records(file).map_err(std::io::Error::other)?;
    let (target, partial) = (path(folder, file.step), path(folder, file.step).with_extension("parquet.partial"));
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(File::create(&partial)?, batch.schema(), Some(properties)).map_err(other)?;
    writer.write(&batch).map_err(other)?;
    writer.close().map_err(other)?;
    fs::rename(partial, target)
}

fn records(file: &RolloutFile<'_>) -> Result<RecordBatch, arrow::error::ArrowError> {
    let all = file.rollouts;
    let text =
        |of: &dyn Fn(&Rollout) -> String| -> ArrayRef { Arc::new(StringArray::from_iter_values(all.iter().map(of))) };
    let ids = |of: &dyn Fn(&Rollout) -> Vec<u32>| -> ArrayRef {
        let mut lists = ListBuilder::new(UInt32Builder::new());
        all.iter().for_each(|r| lists.append_value(of(r).into_iter().map(Some)));
        Arc::new(lists.finish())
    };
    RecordBatch::try_from_iter([
        ("step", Arc::new(UInt64Array::from(vec![file.step; all.len()])) as ArrayRef),
        ("group", Arc::new(Int64Array::from_iter_values(all.iter().map(|r| r.group)))),
        ("prompt_index", Arc::new(UInt64Array::from_iter_values(all.iter().map(|r| r.prompt.prompt.index)))),
        ("data_source", text(&|r| r.prompt.prompt.data_source.clone())),
        ("prompt", text(&|r| r.prompt.prompt.text())),
        ("completion", text(&|r| r.text.clone())),
        ("ground_truth", text(&|r| r.prompt.prompt.ground_truth_text())),
        ("prompt_ids", ids(&|r| r.prompt.tokens.clone())),
        ("completion_ids", ids(&|r| r.completion.clone())),
        ("reward", Arc::new(Float64Array::from_iter_values(all.iter().map(|r| r.scored.total)))),
        ("reward_parts", parts(all)?),
        ("reward_error", text(&|r| r.scored.error.clone().unwrap_or_default())),
        ("policy_version", Arc::new(UInt64Array::from(vec![file.step - 1; all.len()]))),
        ("advantages", advantages(file)),
    ])
}

fn parts(rollouts: &[Rollout]) -> Result<ArrayRef, arrow::error::ArrowError> {
    let mut maps = MapBuilder::new(None, StringBuilder::new(), Float64Builder::new());
    for rollout in rollouts {
        for (name, value) in &rollout.scored.parts {
            maps.keys().append_value(name);
            maps.values().append_value(*value);
        }
        maps.append(true)?;
    }
    Ok(Arc::new(maps.finish()))
}

fn advantages(file: &RolloutFile<'_>) -> ArrayRef {
    let mut lists = ListBuilder::new(Float32Builder::new());
    file.advantages.iter().for_each(|row| lists.append_value(row.iter().copied().map(Some)));
    Arc::new(lists.finish())
}
