//! What a job would ask first, before anything is started: `tangelo check` shows it.

use crate::error::{DriverError, Result};
use crate::prompts::{ChatRenderer, LoaderOptions, PromptLoader};
use crate::reward;
use crate::start::{template_choice, tokenizer_of};
use std::sync::Arc;
use tangelo_configs::JobPlan;

/// How many prompts there are, and the first as the policy reads it, with what its answer is compared with. Programs of
/// the user are not started.
///
/// # Errors
/// As the job would fail on its prompts and on patterns of its reward.
pub fn first_prompt(job: &JobPlan) -> Result<String> {
    let tokenizer = tokenizer_of(&job.policy)?;
    let renderer = Arc::new(ChatRenderer::new(tokenizer.clone(), template_choice(job))?);
    let options = LoaderOptions { need_ground_truth: reward::needs_ground_truth(job.reward())? };
    let (loader, report) = PromptLoader::open(job.prompts(), options, renderer)?;
    let first = loader.at(0)?;
    let text = tokenizer.tokenizer.decode(&first.tokens, false);
    let text = text.map_err(|e| DriverError::Prompts(format!("the first prompt cannot be decoded: {e}")))?;
    let shown: String = text.lines().map(|line| format!("  {line}\n")).collect();
    let truth = match first.prompt.ground_truth_text() {
        none if none.is_empty() => "no ground truth".to_owned(),
        truth => format!("ground truth {truth:?}"),
    };
    let (tokens, source) = (first.tokens.len(), &first.prompt.data_source);
    Ok(format!("{report}\nthe first of `{source}`: {tokens} tokens, {truth}\n{shown}"))
}
