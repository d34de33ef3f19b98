//! What is asked of the policy: prompts from files or generators, in an order that one number describes.
//!
//! ```text
//! files (verl's columns, or prompt and answer) --+
//!                                                +--> Loader::at(position) -> TokenizedPrompt
//! generator (arithmetic, countdown) -------------+         ^ RenderPrompt: the tokenizer's chat template
//! ```
//!
//! Invariants: the prompt at a position is a function of (files or generator, options, seed, position), so that the
//! position is all that a checkpoint holds; validation prompts are never trained on. Deliberately absent: tokenizers
//! and templates, and any buffer of prompts.

mod columns;
mod files;
mod generator;
mod json;
mod loader;
mod render;

pub(crate) use columns::brief;
pub use loader::{LoadReport, Loader, LoaderOptions};
pub use render::ChatRenderer;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A prompt before it is rendered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PromptInput {
    /// A conversation that the policy goes on with, by its chat template.
    Messages(Vec<Message>),
    /// Text that the policy goes on with as it stands.
    Text(String),
}

/// A prompt and what is known of its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Its number in the set: rows of the files one after the other, or the generator's.
    pub index: u64,
    /// What is asked.
    pub input: PromptInput,
    /// What rewards compare with; null where nothing is known.
    pub ground_truth: Value,
    /// Where it comes from; rewards may apply to some sources only.
    pub data_source: String,
    /// Anything else that the data say of it, for the user's own rewards; null where nothing.
    pub extra_info: Value,
}

impl Prompt {
    /// What is asked, as text to show: the messages one under the other.
    pub fn text(&self) -> String {
        match &self.input {
            PromptInput::Text(text) => text.clone(),
            PromptInput::Messages(messages) => {
                messages.iter().map(|m| format!("{}: {}", m.role, m.content)).collect::<Vec<_>>().join("\n")
            }
        }
    }

    /// The ground truth as text to show; JSON where it is no text.
    pub fn ground_truth_text(&self) -> String {
        match &self.ground_truth {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }
}

/// A prompt as the policy sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizedPrompt {
    /// Where it comes from.
    pub prompt: Arc<Prompt>,
    /// Its ids, no more than `prompts.max_prompt_length`.
    pub tokens: Vec<u32>,
}

/// Makes ids of a prompt: the tokenizer with its chat template, ready for the policy's answer.
pub trait RenderPrompt: Send + Sync {
    /// The ids, whatever their number.
    ///
    /// # Errors
    /// In words, what the template or the tokenizer refused.
    fn render(&self, input: &PromptInput) -> std::result::Result<Vec<u32>, String>;
}
