//! Prompts by position: epoch after epoch, each in an order of its own.
//!
//! Invariant: the prompt at a position is a function of (set, options, position); skipping, resuming and reading in
//! another order change nothing. Deliberately absent: prefetching; a prompt takes microseconds beside its completion.

use super::files::{FilePrompt, read_all};
use super::generator::{Part, prompt_at};
use super::{Prompt, RenderPrompt, TokenizedPrompt};
use crate::error::{DriverError, Result};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use tangelo_configs::Prompts;
use tangelo_configs::prompts::{Overlong, PromptGenerator};
use tangelo_core::hash::{hash_bytes, mix64};
use tangelo_data::order::Permutation;

/// Places named in messages about prompts that are too long.
const MAX_NAMED: usize = 3;
/// Held-out prompts of a generator are looked for this many times as often as they are wanted, as some repeat.
const MAX_DRAWS_PER_TASK: u64 = 20;
/// Fixed, so that what is held out of files does not depend on the seed.
const SALT: u64 = 0x0A5B_1E55;

/// What the job says beyond `[prompts]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoaderOptions {
    /// The reward compares with a ground truth: a row without one is an error.
    pub need_ground_truth: bool,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Prompts read, of training and validation.
    pub num_read: u64,
    /// Prompts that were too long and left out.
    pub num_dropped: u64,
    /// The first of these, as `file:row (tokens)`.
    pub first_dropped: Vec<String>,
    /// Prompts in an epoch.
    pub num_train: u64,
    /// Prompts of the validation set.
    pub num_validation: u64,
    /// How many the job asked for, where it asked for more than there are.
    pub num_validation_asked: Option<u64>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} prompts to train on, {} for validation", self.num_train, self.num_validation)?;
        if let Some(asked) = self.num_validation_asked {
            write!(f, " (`prompts.validation_size` = {asked}, and there are no more)")?;
        }
        if self.num_dropped > 0 {
            let first = self.first_dropped.join(", ");
            write!(f, "; {} too long and left out: {first}", self.num_dropped)?;
            f.write_str(if self.num_dropped > self.first_dropped.len() as u64 { ", ..." } else { "" })?;
        }
        Ok(())
    }
}

/// The prompts of a job.
pub struct PromptLoader {
    source: Source,
    validation: Vec<Arc<Prompt>>,
    config: Prompts,
    renderer: Arc<dyn RenderPrompt>,
}

enum Source {
    Files(Vec<Arc<Prompt>>),
    Generator(PromptGenerator),
}

impl PromptLoader {
    /// Reads the files, looks at every prompt's length, and sets validation prompts apart.
    ///
    /// # Errors
    /// Files that cannot be read or lack columns, rows without ground truth, prompts over the limit where
    /// `prompts.overlong` is `error`, an empty set.
    pub fn open(
        config: &Prompts,
        options: LoaderOptions,
        renderer: Arc<dyn RenderPrompt>,
    ) -> Result<(PromptLoader, LoadReport)> {
        config.check()?;
        let mut report = LoadReport::default();
        let mut read = |patterns: &[String]| -> Result<Vec<Arc<Prompt>>> {
            let rows = read_all(patterns, config, options.need_ground_truth)?;
            report.num_read += rows.len() as u64;
            within_limit(rows, config, renderer.as_ref(), &mut report)
        };
        let mut validation = match config.validation_files.as_slice() {
            [] => Vec::new(),
            patterns => read(patterns)?,
        };
        if config.validation_size > 0 {
            validation.truncate(config.validation_size);
        }
        let source = match &config.generator {
            Some(generator) => {
                if config.validation_files.is_empty() {
                    validation = held_out_tasks(generator, config)?;
                }
                Source::Generator(generator.clone())
            }
            None => {
                let mut prompts = read(&config.files)?;
                if config.validation_files.is_empty() && config.validation_size > 0 {
                    (prompts, validation) = hold_out(prompts, config.validation_size)?;
                }
                Source::Files(prompts)
            }
        };
        let loader = PromptLoader { source, validation, config: config.clone(), renderer };
        report.num_train = loader.len();
        report.num_validation = loader.validation.len() as u64;
        let asked = config.validation_size as u64;
        report.num_validation_asked = (asked > report.num_validation).then_some(asked);
        loader.at(0)?;
        Ok((loader, report))
    }

    /// Prompts in an epoch.
    pub fn len(&self) -> u64 {
        match &self.source {
            Source::Files(prompts) => prompts.len() as u64,
            Source::Generator(generator) => generator.size() as u64,
        }
    }

    /// Never: an empty set is refused.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The epoch that a position lies in, from 0.
    pub fn epoch(&self, position: u64) -> u64 {
        position / self.len().max(1)
    }

    /// The prompt at a position; positions go on through the epochs.
    ///
    /// # Errors
    /// A generated prompt over the limit, or one that the template refuses.
    pub fn at(&self, position: u64) -> Result<TokenizedPrompt> {
        let (epoch, place) = (self.epoch(position), position % self.len().max(1));
        let key = mix64(mix64(self.config.seed).wrapping_add(epoch));
        let index = if self.config.shuffle { Permutation::new(self.len(), key).at(place) } else { place };
        let prompt = match &self.source {
            Source::Files(prompts) => prompts[index as usize].clone(),
            Source::Generator(generator) => Arc::new(prompt_at(generator, &self.config, Part::Train, index)?),
        };
        self.tokenize(prompt)
    }

    /// A number that another set of prompts, or another order, does not have: of what the prompts say and are compared with,
    /// not of where they lie. Validation prompts do not count.
    pub fn fingerprint(&self) -> u64 {
        let hash = |value: &Value| hash_bytes(0, value.to_string().as_bytes());
        let (shuffle, seed) = (self.config.shuffle, self.config.seed);
        let cut = (self.config.overlong == Overlong::TruncateLeft).then_some(self.config.max_prompt_length);
        match &self.source {
            Source::Files(prompts) => {
                let one =
                    |p: &Arc<Prompt>| hash(&json!([p.index, p.input, p.ground_truth, p.data_source, p.extra_info]));
                let hashes: Vec<u64> = prompts.par_iter().map(one).collect();
                hashes.into_iter().fold(hash(&json!([shuffle, seed, cut])), |all, one| mix64(all ^ one))
            }
            Source::Generator(generator) => {
                let (prefix, suffix) = (&self.config.system_prompt, &self.config.prompt_suffix);
                hash(&json!([shuffle, seed, cut, generator, self.config.chat, self.config.data_source, prefix, suffix]))
            }
        }
    }

    /// `count` prompts from `position` on; the next batch starts at `position + count`.
    ///
    /// # Errors
    /// As [`PromptLoader::at`].
    pub fn batch(&self, position: u64, count: usize) -> Result<Vec<TokenizedPrompt>> {
        (position..position + count as u64).map(|position| self.at(position)).collect()
    }

    /// The validation set, in a fixed order.
    ///
    /// # Errors
    /// As [`PromptLoader::at`].
    pub fn validation(&self) -> Result<Vec<TokenizedPrompt>> {
        self.validation.iter().map(|prompt| self.tokenize(prompt.clone())).collect()
    }

    fn tokenize(&self, prompt: Arc<Prompt>) -> Result<TokenizedPrompt> {
        let refused = |reason| {
            DriverError::Prompts(format!(
                "prompt {} of `{}` cannot be rendered: {reason}",
                prompt.index, prompt.data_source
            ))
        };
        let mut tokens = self.renderer.render(&prompt.input).map_err(refused)?;
        let limit = self.config.max_prompt_length;
        if tokens.len() > limit && self.config.overlong != Overlong::TruncateLeft {
            return Err(DriverError::Prompts(format!(
                "prompt {} of `{}` has {} tokens, above `prompts.max_prompt_length` = {limit}; raise it or set \
                 `prompts.overlong` = \"truncate_left\"",
                prompt.index,
                prompt.data_source,
                tokens.len()
            )));
        }
        tokens.drain(..tokens.len().saturating_sub(limit));
        Ok(TokenizedPrompt { prompt, tokens })
    }
}

/// The prompts that are short enough, by the policy on others.
fn within_limit(
    rows: Vec<FilePrompt>,
    config: &Prompts,
    renderer: &dyn RenderPrompt,
    report: &mut LoadReport,
) -> Result<Vec<Arc<Prompt>>> {
    let limit = config.max_prompt_length;
    if config.overlong == Overlong::TruncateLeft {
        return Ok(rows.into_iter().map(|row| Arc::new(row.prompt)).collect());
    }
    let lengths = rows.par_iter().map(|row| {
        let tokens = renderer.render(&row.prompt.input);
        tokens.map(|t| t.len()).map_err(|reason| DriverError::Prompts(format!("{}: {reason}", row.place)))
    });
    // Of several errors the first row's is told, whichever thread came first.
    let lengths: Vec<Result<usize>> = lengths.collect();
    let lengths: Vec<usize> = lengths.into_iter().collect::<Result<_>>()?;
    let long: Vec<String> = rows
        .iter()
        .zip(&lengths)
        .filter(|(_, length)| **length > limit)
        .map(|(row, length)| format!("{} ({length} tokens)", row.place))
        .collect();
    let named = long.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>();
    if config.overlong == Overlong::Error && !long.is_empty() || long.len() == rows.len() {
        let dots = if long.len() > named.len() { ", ..." } else { "" };
        return Err(DriverError::Prompts(format!(
            "{} of {} prompts are longer than `prompts.max_prompt_length` = {limit} tokens: {}{dots}; raise it, or set \
             `prompts.overlong` = \"{}truncate_left\"",
            long.len(),
            rows.len(),
            named.join(", "),
            if long.len() < rows.len() { "drop\" or \"" } else { "" }
        )));
    }
    report.num_dropped += long.len() as u64;
    let room = MAX_NAMED.saturating_sub(report.first_dropped.len());
    report.first_dropped.extend(named.into_iter().take(room));
    let kept = rows.into_iter().zip(lengths).filter(|(_, length)| *length <= limit);
    Ok(kept.map(|(row, _)| Arc::new(row.prompt)).collect())
}

/// Prompts that several batches may hold.
type Shared = Vec<Arc<Prompt>>;

/// Splits off the `size` prompts whose numbers have the smallest hashes: the same ones whatever the seed.
fn hold_out(prompts: Vec<Arc<Prompt>>, size: usize) -> Result<(Shared, Shared)> {
    if size >= prompts.len() {
        return Err(DriverError::Prompts(format!(
            "`prompts.validation_size` = {size} would hold out all of the {} prompts; lower it or name \
             `prompts.validation_files`",
            prompts.len()
        )));
    }
    let mut hashes: Vec<u64> = prompts.iter().map(|p| mix64(SALT ^ mix64(p.index))).collect();
    hashes.sort_unstable();
    // The hash is one to one, so exactly `size` numbers lie below.
    let border = hashes[size];
    Ok(prompts.into_iter().partition(|p| mix64(SALT ^ mix64(p.index)) >= border))
}

/// Distinct held-out tasks of a generator; fewer than asked for where there are no more.
fn held_out_tasks(generator: &PromptGenerator, config: &Prompts) -> Result<Vec<Arc<Prompt>>> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for index in 0..config.validation_size as u64 * MAX_DRAWS_PER_TASK {
        if found.len() == config.validation_size {
            break;
        }
        let prompt = prompt_at(generator, config, Part::HeldOut, index)?;
        if seen.insert(serde_json::to_string(&prompt.input).unwrap_or_default()) {
            found.push(Arc::new(prompt));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
