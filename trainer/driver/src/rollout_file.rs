//! Every rollout of a step as a Parquet file: what was asked and answered, what it was worth, what was learnt from it.
//!
//! Rows are in the order of the step's batch. Lists of numbers have one for each id of the completion. Invariant: with the
//! checkpoint of the step before, a file holds all that the step's update is a function of ([`read`], `crate::replay`).

use crate::collect::Rollout;
use crate::error::{DriverError, Result};
use arrow::array::{
    ArrayRef, AsArray, Float32Builder, Float64Array, Float64Builder, Int64Array, LargeListArray, ListArray,
    ListBuilder, MapBuilder, RecordBatch, StringArray, StringBuilder, UInt32Builder, UInt64Array,
};
use arrow::datatypes::{Float32Type, Float64Type, Int64Type, UInt32Type};
use arrow::error::ArrowError;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tangelo_control::{Cluster, RemoteBatch};
use tangelo_core::Column;

/// The rollouts of a step.
pub struct RolloutFile<'a> {
    /// The step.
    pub step: u64,
    /// In the order of the batch.
    pub rollouts: &'a [Rollout],
    /// What was learnt from each.
    pub learnt: &'a [Learnt],
}

/// What a step learnt from one completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Learnt {
    /// Its number among all completions of the run.
    pub sample_index: i64,
    /// The version of the weights that drew it.
    pub policy_version: i64,
    /// Log-probabilities under the distribution that its tokens were drawn from.
    pub rollout_logprobs: Vec<f32>,
    /// Log-probabilities of the policy before the update.
    pub old_logprobs: Vec<f32>,
    /// What the update was told of each token.
    pub advantages: Vec<f32>,
}

/// A completion as the file tells of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// Its prompt's group.
    pub group: i64,
    /// The prompt.
    pub prompt_ids: Vec<u32>,
    /// What was answered.
    pub completion_ids: Vec<u32>,
    /// What it was worth.
    pub reward: f64,
    /// What was learnt from it.
    pub learnt: Learnt,
}

/// What was learnt from each row of a scored batch.
///
/// # Errors
/// Columns that cannot be fetched.
pub async fn learnt(cluster: &Cluster, batch: &RemoteBatch) -> Result<Vec<Learnt>> {
    let lists = [Column::LossMask, Column::RolloutLogprob, Column::OldLogprob, Column::Advantage];
    let numbers = [Column::SampleIndex, Column::PolicyVersion];
    let records = cluster.fetch(batch, &[&lists[..], &numbers[..]].concat()).await?;
    let missing = |column: Column| DriverError::Internal(format!("a scored batch lacks the column {column}"));
    let array = |column: Column| records.column_by_name(column.name()).ok_or_else(|| missing(column));
    let list = |column: Column| array(column)?.as_list_opt::<i64>().ok_or_else(|| missing(column));
    let number = |column: Column| array(column)?.as_primitive_opt::<Int64Type>().ok_or_else(|| missing(column));
    let [mask, rollout, old, advantage] = lists.map(list);
    let (mask, rollout, old, advantage) = (mask?, rollout?, old?, advantage?);
    let (sample, version) = (number(Column::SampleIndex)?, number(Column::PolicyVersion)?);
    let marked = |of: &LargeListArray, row: usize| {
        let (values, mask) = (of.value(row), mask.value(row));
        let both =
            values.as_primitive::<Float32Type>().values().iter().zip(mask.as_primitive::<Float32Type>().values());
        both.filter(|(_, m)| **m != 0.0).map(|(value, _)| *value).collect()
    };
    let one = |row: usize| Learnt {
        sample_index: sample.value(row),
        policy_version: version.value(row),
        rollout_logprobs: marked(rollout, row),
        old_logprobs: marked(old, row),
        advantages: marked(advantage, row),
    };
    Ok((0..records.num_rows()).map(one).collect())
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

fn records(file: &RolloutFile<'_>) -> std::result::Result<RecordBatch, ArrowError> {
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
        ("sample_index", Arc::new(Int64Array::from_iter_values(file.learnt.iter().map(|l| l.sample_index)))),
        ("policy_version", Arc::new(Int64Array::from_iter_values(file.learnt.iter().map(|l| l.policy_version)))),
        ("rollout_logprobs", floats(file.learnt, |l| &l.rollout_logprobs)),
        ("old_logprobs", floats(file.learnt, |l| &l.old_logprobs)),
        ("advantages", floats(file.learnt, |l| &l.advantages)),
    ])
}

fn parts(rollouts: &[Rollout]) -> std::result::Result<ArrayRef, ArrowError> {
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

fn floats(learnt: &[Learnt], of: impl Fn(&Learnt) -> &Vec<f32>) -> ArrayRef {
    let mut lists = ListBuilder::new(Float32Builder::new());
    learnt.iter().for_each(|row| lists.append_value(of(row).iter().copied().map(Some)));
    Arc::new(lists.finish())
}

/// The steps whose rollouts are in `folder`, ascending.
pub fn steps(folder: &Path) -> Vec<u64> {
    let step = |name: &str| name.strip_prefix("step-")?.strip_suffix(".parquet")?.parse::<u64>().ok();
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut steps: Vec<u64> = entries.filter_map(|entry| step(&entry.file_name().to_string_lossy())).collect();
    steps.sort_unstable();
    steps
}

/// Reads the rollouts of a step, in the order of its batch.
///
/// # Errors
/// A file that cannot be read, or that lacks a column.
pub fn read(folder: &Path, step: u64) -> Result<Vec<Recorded>> {
    let path = path(folder, step);
    let file = File::open(&path).map_err(|source| DriverError::Read { path: path.clone(), source })?;
    let damaged = |what: String| DriverError::Checkpoint(format!("{}: {what}", path.display()));
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).and_then(|builder| builder.build());
    let mut rows = Vec::new();
    for batch in reader.map_err(|e| damaged(e.to_string()))? {
        let batch = batch.map_err(|e| damaged(e.to_string()))?;
        rows.extend(rows_of(&batch).map_err(|column| {
            damaged(format!("no column `{column}` as this version writes it: a step of that run cannot be replayed"))
        })?);
    }
    Ok(rows)
}

/// The rows of a record batch, or the column that is missing.
fn rows_of(batch: &RecordBatch) -> std::result::Result<Vec<Recorded>, &'static str> {
    let array = |name: &'static str| batch.column_by_name(name).ok_or(name);
    let list = |name: &'static str| array(name)?.as_list_opt::<i32>().ok_or(name);
    let number = |name: &'static str| array(name)?.as_primitive_opt::<Int64Type>().ok_or(name);
    let (group, sample, version) = (number("group")?, number("sample_index")?, number("policy_version")?);
    let (prompt, completion) = (list("prompt_ids")?, list("completion_ids")?);
    let (rollout, old, advantages) = (list("rollout_logprobs")?, list("old_logprobs")?, list("advantages")?);
    let reward = array("reward")?.as_primitive_opt::<Float64Type>().ok_or("reward")?;
    let ids = |of: &ListArray, row: usize| of.value(row).as_primitive::<UInt32Type>().values().to_vec();
    let floats = |of: &ListArray, row: usize| of.value(row).as_primitive::<Float32Type>().values().to_vec();
    let one = |row: usize| Recorded {
        group: group.value(row),
        prompt_ids: ids(prompt, row),
        completion_ids: ids(completion, row),
        reward: reward.value(row),
        learnt: Learnt {
            sample_index: sample.value(row),
            policy_version: version.value(row),
            rollout_logprobs: floats(rollout, row),
            old_logprobs: floats(old, row),
            advantages: floats(advantages, row),
        },
    };
    Ok((0..batch.num_rows()).map(one).collect())
}
