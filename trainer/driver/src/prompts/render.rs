//! Prompts as the policy reads them: the tokenizer's own chat template, or the text as it stands.

use super::{PromptInput, RenderPrompt};
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

    fn encode(&self, text: &str, special_tokens: bool) -> std::result::Result<Vec<u32>, String> {
        let encoded = self.tokenizer.tokenizer.encode_fast(text, special_tokens).map_err(|e| e.to_string())?;
        Ok(encoded.get_ids().to_vec())
    }
}

impl RenderPrompt for ChatRenderer {
    fn render(&self, input: &PromptInput) -> std::result::Result<Vec<u32>, String> {
        let messages = match input {
            PromptInput::Text(text) => return self.encode(text, true),
            PromptInput::Messages(messages) => messages,
        };
        let template = self.template.as_ref().ok_or(
            "the tokenizer has no chat template: set `data.chat_template` to a file with one, or give prompts as texts and set \
             `prompts.chat` = false, to go on with them as they stand",
        )?;
        let messages: Vec<Value> = messages.iter().map(|m| json!({ "role": m.role, "content": m.content })).collect();
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        let rendered = template.render(&messages, &options).map_err(|e| e.to_string())?;
        // The template writes the special tokens itself.
        self.encode(&rendered.text, false)
    }
}
