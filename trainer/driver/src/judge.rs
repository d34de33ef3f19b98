//! What a reward model reads: prompt and answer, whole, in its own tokens.
//!
//! Where the reward model's tokenizer is the policy's, these are the ids as they were drawn. Else the conversation, the
//! answer its last turn, is written by the reward model's own chat template and tokenised anew, as verl does where
//! `reward_model.model.input_tokenizer` is set; plain prompts are continued as text. Like transformers'
//! sequence classification, the model answers at the last token that is no padding.
//!
//! Deliberately absent: cutting what is too long. A part of an answer is another answer.

use crate::collect::Rollout;
use crate::error::{DriverError, Result};
use crate::prompts::ChatRenderer;
use serde_json::Value;
use std::path::Path;
use tangelo_configs::{ConfigError, JobPlan, Role};
use tangelo_core::batch::{per_sequence_i64, ragged_u32};
use tangelo_core::{Batch, Column};
use tangelo_formats::chat::TemplateChoice;
use tangelo_formats::tokenizer::{self, TokenizerAssets};

/// Writes for the reward model.
pub struct Judge {
    /// Its tokenizer with its chat template, where it is another than the policy's.
    own: Option<ChatRenderer>,
    /// The longest row that it reads, tokens.
    max_tokens: usize,
    /// What fills rows up in its own training, where its config.json says.
    padding: Option<u32>,
}

impl Judge {
    /// Of the job's reward model; `None` where it has none.
    ///
    /// # Errors
    /// A tokenizer of its own that cannot be read, or that has no chat template where prompts are conversations.
    pub fn new(job: &JobPlan, policy: &TokenizerAssets) -> Result<Option<Judge>> {
        let Some(plan) = job.plan(Role::Reward) else { return Ok(None) };
        let Some(folder) = &plan.config.model.hf_assets_path else { return Ok(None) };
        let max_tokens = plan.model.max_position_embeddings;
        let own = own_renderer(job, folder, policy)?;
        Ok(Some(Judge { own, max_tokens, padding: padding(folder) }))
    }

    /// The rows that the reward model reads, in the order of `answers`.
    ///
    /// # Errors
    /// A row that is too long, a conversation that the template refuses.
    pub fn batch(&self, answers: &[Rollout]) -> Result<Batch> {
        let rows = answers.iter().map(|answer| self.row(answer)).collect::<Result<Vec<_>>>()?;
        Ok(Batch::from_columns(vec![
            (Column::Tokens, ragged_u32(&rows)),
            (
                Column::Positions,
                ragged_u32(&rows.iter().map(|row| (0..row.len() as u32).collect()).collect::<Vec<_>>()),
            ),
            (Column::SeqId, ragged_u32(&rows.iter().map(|row| vec![0; row.len()]).collect::<Vec<_>>())),
            (Column::GroupId, per_sequence_i64(answers.iter().map(|answer| answer.group).collect())),
        ])?)
    }

    fn row(&self, answer: &Rollout) -> Result<Vec<u32>> {
        let prompt = &answer.prompt.prompt;
        let refused = |reason: String| DriverError::Reward {
            part: "model".into(),
            reason: format!("prompt {} of `{}`: {reason}", prompt.index, prompt.data_source),
        };
        let mut row = match &self.own {
            None => [answer.prompt.tokens.as_slice(), &answer.completion].concat(),
            Some(own) => own.render_answered(&prompt.input, &answer.text).map_err(refused)?,
        };
        let padded = |id: &u32| Some(*id) == self.padding;
        let kept = row.iter().rposition(|id| !padded(id)).map_or(row.len(), |last| last + 1);
        row.truncate(kept);
        if row.is_empty() || row.len() > self.max_tokens {
            return Err(refused(format!(
                "with its answer it has {} tokens for the reward model, which reads 1 to {} \
                 (max_position_embeddings); lower `prompts.max_prompt_length` or `rollout.sampling.max_tokens`",
                row.len(),
                self.max_tokens
            )));
        }
        Ok(row)
    }
}

/// The renderer of a reward model whose tokenizer is not the policy's. One without a tokenizer has the policy's.
fn own_renderer(job: &JobPlan, folder: &Path, policy: &TokenizerAssets) -> Result<Option<ChatRenderer>> {
    // A file is a GGUF, which has one inside.
    if !folder.is_file() && !folder.join("tokenizer.json").is_file() {
        return Ok(None);
    }
    let named =
        |e: String| DriverError::Config(ConfigError::Values(vec![format!("`roles.reward.hf_assets_path`: {e}")]));
    let own = tokenizer::load(folder).map_err(|e| named(e.to_string()))?;
    if own.tokenizer.get_vocab(true) == policy.tokenizer.get_vocab(true) {
        return Ok(None);
    }
    let renderer = ChatRenderer::new(own, TemplateChoice::default())?;
    if job.prompts().chat && !renderer.has_template() {
        let theirs = job.policy.config.data.tokenizer_path().unwrap_or_default();
        return Err(named(format!(
            "the tokenizer in {} is another than the policy's, {}, so conversations are written anew for the reward \
             model, and it has no chat template to write them with. Put the one it was trained with into its folder \
             (chat_template.jinja), choose a reward model with the policy's tokenizer, or set `prompts.chat` = false",
            folder.display(),
            theirs.display()
        )));
    }
    Ok(Some(renderer))
}

/// `pad_token_id` of a folder's config.json.
fn padding(folder: &Path) -> Option<u32> {
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).ok()?).ok()?;
    config.get("pad_token_id")?.as_u64().and_then(|id| u32::try_from(id).ok())
}
