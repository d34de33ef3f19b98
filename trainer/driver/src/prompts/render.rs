//! Prompts as the policy reads them: the tokenizer's own chat template, or the text as it stands.

use super::{Message, PromptInput, RenderPrompt};
use crate::error::{DriverError, Result};
use serde_json::{Value, json};
use tangelo_formats::chat::{ChatTemplate, RenderOptions, TemplateChoice};
use tangelo_formats::tokenizer::TokenizerAssets;

/// A tokenizer with its chat template, where it has one.
pub struct ChatRenderer {
    tokenizer: TokenizerAssets,
    template: Option<ChatTemplate>,
}

impl ChatRenderer {
    /// With the template that is chosen, or else the tokenizer's own.
    ///
    /// # Errors
    /// A template that cannot be read or is none.
    pub fn new(tokenizer: TokenizerAssets, choice: TemplateChoice<'_>) -> Result<ChatRenderer> {
        let template = ChatTemplate::choose(choice, &tokenizer).map_err(|e| DriverError::Prompts(e.to_string()))?;
        Ok(ChatRenderer { tokenizer, template })
    }

    /// Whether conversations can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The ids of a prompt with its answer: a conversation whose last turn it is, or a text that goes on.
    ///
    /// # Errors
    /// In words, what the template or the tokenizer refused.
    pub fn render_answered(&self, input: &PromptInput, answer: &str) -> std::result::Result<Vec<u32>, String> {
        match input {
            PromptInput::Text(text) => self.encode(&format!("{text}{answer}"), true),
            PromptInput::Messages(messages) => {
                let answer = Message { role: "assistant".into(), content: answer.into() };
                self.conversation(&[messages.as_slice(), &[answer]].concat(), false)
            }
        }
    }

    /// The ids of a conversation; with `open`, as far as the assistant's next turn.
    fn conversation(&self, messages: &[Message], open: bool) -> std::result::Result<Vec<u32>, String> {
        let template = self.template.as_ref().ok_or(
            "the tokenizer has no chat template: set `data.chat_template` to a file with one, or `prompts.chat` = false \
             to continue prompts as plain text",
        )?;
        let messages: Vec<Value> = messages.iter().map(|m| json!({ "role": m.role, "content": m.content })).collect();
        let options = RenderOptions { add_generation_prompt: open, ..RenderOptions::default() };
        let rendered = template.render(&messages, &options).map_err(|e| e.to_string())?;
        // The template writes the special tokens itself.
        self.encode(&rendered.text, false)
    }

    fn encode(&self, text: &str, special_tokens: bool) -> std::result::Result<Vec<u32>, String> {
        let encoded = self.tokenizer.tokenizer.encode_fast(text, special_tokens).map_err(|e| e.to_string())?;
        Ok(encoded.get_ids().to_vec())
    }
}

impl RenderPrompt for ChatRenderer {
    fn render(&self, input: &PromptInput) -> std::result::Result<Vec<u32>, String> {
        match input {
            PromptInput::Text(text) => self.encode(text, true),
            PromptInput::Messages(messages) => self.conversation(messages, true),
        }
    }
}
