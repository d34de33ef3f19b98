//! From a row of chat data to tokens, and which of them are trained.
//!
//! Three kinds of rows: messages, a prompt with a completion, ShareGPT's messages. The rules are TRL's `SFTTrainer`'s:
//! - messages are rendered with the chat template and tokenised without further special tokens; trained is what the
//!   assistant says, the end of its turn included (`{% generation %}` blocks where the template has them);
//! - of a prompt and a completion the completion is trained: what follows where the ids of the prompt alone and of both
//!   part ways. Texts get the end-of-text token, lists of messages are rendered.
//!
//! A conversation longer than a sequence is cut, or left out. Invariant: tokens and mask are a function of (row,
//! tokenizer, template, options). Absent: images, and weights other than 0 and 1.

mod mask;
mod preview;
mod record;

pub(crate) use preview::marked;
pub use preview::{Preview, preview};

use crate::encode::{Scratch, TextTokenizer};
use crate::error::{DataError, Result};
use mask::Masker;
use record::{Conversation, Example};
use serde::{Deserialize, Serialize};
use tangelo_configs::job::{DataFormat, Overlong};
use tangelo_formats::ChatTemplate;
use tangelo_formats::chat::{RenderOptions, TemplateChoice};

/// How rows are read and what of them is trained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatOptions {
    /// What a row is.
    pub format: DataFormat,
    /// The column with the messages, where it is not `messages` or `conversations`.
    pub messages_column: Option<String>,
    /// The column with the prompt.
    pub prompt_column: String,
    /// The column with the completion.
    pub completion_column: String,
    /// Prompts and completions that are texts become messages.
    pub as_messages: bool,
    /// Of messages, train the assistant's only.
    pub assistant_only_loss: bool,
    /// Of prompts with completions, train the completion only.
    pub completion_only_loss: bool,
    /// Longer conversations are cut or left out, tokens.
    pub max_tokens: usize,
    /// Which of the two.
    pub overlong: Overlong,
}

impl ChatOptions {
    /// Defaults for conversations of up to `max_tokens`.
    pub fn new(max_tokens: usize) -> ChatOptions {
        ChatOptions {
            format: DataFormat::Auto,
            messages_column: None,
            prompt_column: "prompt".into(),
            completion_column: "completion".into(),
            as_messages: false,
            assistant_only_loss: true,
            completion_only_loss: true,
            max_tokens,
            overlong: Overlong::Truncate,
        }
    }
}

/// What a prepared folder keeps of how its conversations were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredChat {
    /// Version of the rules in this module.
    pub rules: u32,
    /// XXH3 of the chat template; empty where there is none.
    pub template: String,
    /// The rest.
    #[serde(flatten)]
    pub options: ChatOptions,
}

/// Raised when the same row and template give other tokens or another mask.
const RULES: u32 = 1;

/// A row as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids.
    pub tokens: Vec<u32>,
    /// Whether each is to be learnt.
    pub trained: Vec<bool>,
    /// Whether the conversation was longer and was cut.
    pub truncated: bool,
}

impl Encoded {
    /// Tokens that are the target of a position and are to be learnt: the first token is nobody's target.
    pub fn num_trained(&self) -> usize {
        self.trained.iter().skip(1).filter(|trained| **trained).count()
    }
}

/// Turns rows into tokens. Shared by threads.
pub struct ChatEncoder<'a> {
    tokenizer: &'a TextTokenizer,
    /// The template, or why there is none.
    template: std::result::Result<ChatTemplate, String>,
    masker: Masker,
    options: ChatOptions,
}

impl<'a> ChatEncoder<'a> {
    /// For a tokenizer with its own template, or the one that is chosen.
    ///
    /// # Errors
    /// A template that cannot be read or compiled. One that is absent is an error only of rows that need it.
    pub fn new<'t>(
        tokenizer: &'a TextTokenizer,
        template: impl Into<TemplateChoice<'t>>,
        options: ChatOptions,
    ) -> Result<ChatEncoder<'a>> {
        let (assets, choice) = (tokenizer.assets(), template.into());
        let place = choice.file.unwrap_or(tokenizer.path());
        let template = ChatTemplate::choose(choice, assets).map_err(|e| DataError::file(place, e))?.ok_or_else(|| {
            format!(
                "the tokenizer {} comes without a chat template, and the row holds messages: set data.chat_template to \
                 a file with one",
                tokenizer.path().display()
            )
        });
        Ok(ChatEncoder { tokenizer, template, masker: Masker::new(assets), options })
    }

    /// What a prepared folder keeps.
    pub fn stored(&self) -> StoredChat {
        let hash = |t: &ChatTemplate| crate::files::hex(xxhash_rust::xxh3::xxh3_64(t.text().as_bytes()));
        let template = self.template.as_ref().map(hash).unwrap_or_default();
        StoredChat { rules: RULES, template, options: self.options.clone() }
    }

    /// The template's text, where there is a template.
    pub fn template_text(&self) -> Option<&str> {
        self.template.as_ref().ok().map(ChatTemplate::text)
    }

    /// The tokens of a row (a JSON object); nothing where it is too long and left out.
    ///
    /// # Errors
    /// What is wrong with the row, without its place.
    pub fn encode(&self, row: &str, scratch: &mut Scratch) -> std::result::Result<Option<Encoded>, String> {
        let (tokens, trained) = match record::parse(row, &self.options)? {
            Example::Conversation(conversation) => self.conversation(&conversation)?,
            Example::Completion { prompt, both } => self.completion(&prompt, &both, scratch)?,
            Example::Text { prompt, completion } => self.text(&prompt, &completion, scratch)?,
        };
        let mut encoded = Encoded { tokens, trained, truncated: false };
        if encoded.num_trained() == 0 {
            return Err("none of its tokens is trained: there is no message of the assistant, or it is empty".into());
        }
        if encoded.tokens.len() > self.options.max_tokens {
            if self.options.overlong == Overlong::Drop {
                return Ok(None);
            }
            encoded.tokens.truncate(self.options.max_tokens);
            encoded.trained.truncate(self.options.max_tokens);
            encoded.truncated = true;
        }
        Ok(Some(encoded).filter(|e| e.num_trained() > 0))
    }

    fn template(&self) -> std::result::Result<&ChatTemplate, String> {
        self.template.as_ref().map_err(Clone::clone)
    }

    fn conversation(&self, conversation: &Conversation) -> Masked {
        let template = self.template()?;
        let rendered = conversation.render(template, conversation.messages.len(), false)?;
        if !self.options.assistant_only_loss {
            let tokens = self.masker.tokens(&rendered.text, &[])?.0;
            let trained = vec![true; tokens.len()];
            return Ok((tokens, trained));
        }
        let spans = if template.marks_generation() {
            rendered.generation
        } else {
            mask::assistant_spans(template, conversation, &rendered.text)?
        };
        self.masker.tokens(&rendered.text, &spans)
    }

    fn completion(&self, prompt: &Conversation, both: &Conversation, scratch: &mut Scratch) -> Masked {
        let template = self.template()?;
        let alone = prompt.render(template, prompt.messages.len(), true)?.text;
        let whole = both.render(template, both.messages.len(), false)?.text;
        let [alone, whole] = [self.ids(&alone, scratch)?, self.ids(&whole, scratch)?];
        Ok(self.after_prompt(&alone, whole))
    }

    fn text(&self, prompt: &str, completion: &str, scratch: &mut Scratch) -> Masked {
        let end = self.tokenizer.assets().token(self.tokenizer.eos()).unwrap_or_default();
        let end = if completion.ends_with(&end) { "" } else { &end };
        let start: Vec<u32> = self.tokenizer.bos().into_iter().collect();
        let alone = [start.clone(), self.ids(prompt, scratch)?].concat();
        let whole = [start, self.ids(&format!("{prompt}{completion}{end}"), scratch)?].concat();
        Ok(self.after_prompt(&alone, whole))
    }

    /// Trained is what follows the common start of both.
    fn after_prompt(&self, alone: &[u32], whole: Vec<u32>) -> (Vec<u32>, Vec<bool>) {
        let common = alone.iter().zip(&whole).take_while(|(a, b)| a == b).count();
        let first = if self.options.completion_only_loss { common } else { 0 };
        let trained = (0..whole.len()).map(|at| at >= first).collect();
        (whole, trained)
    }

    fn ids(&self, text: &str, scratch: &mut Scratch) -> std::result::Result<Vec<u32>, String> {
        let mut ids = Vec::new();
        self.tokenizer.encode_text(text, scratch, &mut ids).map_err(|e| e.to_string())?;
        Ok(ids)
    }
}

/// Tokens and which of them are trained.
type Masked = std::result::Result<(Vec<u32>, Vec<bool>), String>;

impl Conversation {
    /// The first `count` messages as text.
    fn render(
        &self,
        template: &ChatTemplate,
        count: usize,
        add_generation_prompt: bool,
    ) -> std::result::Result<tangelo_formats::chat::Rendered, String> {
        let options =
            RenderOptions { tools: self.tools.as_ref(), add_generation_prompt, variables: self.variables.as_ref() };
        template.render(&self.messages[..count], &options).map_err(|e| e.to_string())
    }
}
