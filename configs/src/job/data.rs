//! `[data]` of a job file: where tokens come from, what of them is trained, how they are packed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The column with the text, unless told otherwise.
pub const DEFAULT_TEXT_COLUMN: &str = "text";

/// `[data]` (our own section): where tokens come from and how they are packed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// What to read; each is prepared (tokenised) once and mixed by weight.
    pub sources: Vec<DataSource>,
    /// tokenizer.json, a folder that holds one, or a GGUF file. Default: in `model.hf_assets_path`.
    pub tokenizer: Option<PathBuf>,
    /// Train a byte-level BPE of this many tokens on the sources first, and use it (our own key); 0: off. It is kept
    /// as tokenizer.json in `prepared_folder`.
    pub train_tokenizer_vocab: usize,
    /// Where token shards are kept. Default: `prepared` in the run folder.
    pub prepared_folder: Option<PathBuf>,
    /// How documents are laid into sequences. Default: `concat` for text, `best_fit` for conversations.
    pub packing: Option<Packing>,
    /// Positions restart at each document and attention never crosses it.
    pub document_mask: bool,
    /// Part of each source's documents held out for validation, chosen by hash of the document's index whatever the
    /// seed; of a corpus of one document, its tail.
    pub validation_fraction: f64,
    /// Tokens per shard file.
    pub shard_tokens: usize,
    /// Only `job.type` = "sft" and "rlhf": a file with the Jinja template that turns a conversation into text. Default: the
    /// tokenizer's own.
    pub chat_template: Option<PathBuf>,
    /// Only `job.type` = "sft" and "rlhf": the name of one of the tokenizer's templates, where it has several (such as
    /// `tool_use`). Default: `default`.
    pub chat_template_name: Option<String>,
    /// Only `job.type` = "sft": of messages, train what the assistant says, the end of its turns included; else every
    /// token. Default: true.
    pub assistant_only_loss: Option<bool>,
    /// Only `job.type` = "sft": of prompts and completions, train the completion; else every token. Default: true.
    pub completion_only_loss: Option<bool>,
    /// Only `job.type` = "sft": what becomes of a conversation of more than `training.seq_len` tokens. Default:
    /// `truncate`.
    pub overlong: Option<Overlong>,
}

/// One source of text, of conversations or of prepared tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataSource {
    /// Names it in metrics and its folder of shards; the path's last part where absent. Characters other than letters,
    /// digits, `-`, `_` and `.` become `-`.
    pub name: Option<String>,
    /// Globs of text files, .jsonl(.gz|.zst), .parquet or .arrow; or one folder made by `tangelo data prepare`.
    pub paths: Vec<String>,
    /// The column with the text; `text` where absent.
    pub text_column: Option<String>,
    /// Share of the sequences that come from here, relative to the other sources'. Default: by its number of sequences.
    pub weight: Option<f64>,
    /// Only `job.type` = "sft": what a row is. Default: `auto`.
    pub format: Option<DataFormat>,
    /// Only `job.type` = "sft": the column with the list of messages. Default: `messages`, or `conversations` where
    /// that is there.
    pub messages_column: Option<String>,
    /// Only `job.type` = "sft": the column with the prompt. Default: `prompt`.
    pub prompt_column: Option<String>,
    /// Only `job.type` = "sft": the column with the completion. Default: `completion`.
    pub completion_column: Option<String>,
    /// Only `job.type` = "sft": a prompt and a completion that are plain text become a message of the user and one of
    /// the assistant, which the chat template renders; else they are trained as they are. Default: false.
    pub as_messages: Option<bool>,
}

impl DataSource {
    /// The keys that only conversations have, and whether each is set.
    pub(crate) fn chat_keys(&self) -> [(&'static str, bool); 5] {
        [
            ("format", self.format.is_some()),
            ("messages_column", self.messages_column.is_some()),
            ("prompt_column", self.prompt_column.is_some()),
            ("completion_column", self.completion_column.is_some()),
            ("as_messages", self.as_messages.is_some()),
        ]
    }
}

/// What a row of chat data is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DataFormat {
    /// Whichever of the others the row's columns fit.
    #[default]
    Auto,
    /// A list of messages with `role` and `content`.
    Messages,
    /// A prompt and a completion: texts, or lists of messages.
    PromptCompletion,
    /// A list of messages with `from` (human, gpt, system, tool) and `value`.
    Sharegpt,
}

/// What becomes of a conversation that is longer than a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// Its first tokens are kept; it is left out where none of them is trained.
    #[default]
    Truncate,
    /// It is left out.
    Drop,
}

/// How documents are laid into sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Documents end to end, cut every `seq_len` tokens.
    #[default]
    Concat,
    /// Best-fit decreasing; documents longer than a sequence are split, nothing is dropped (arXiv 2404.10830).
    BestFit,
}

impl Default for Data {
    fn default() -> Data {
        Data {
            sources: Vec::new(),
            tokenizer: None,
            train_tokenizer_vocab: 0,
            prepared_folder: None,
            packing: None,
            document_mask: true,
            validation_fraction: 0.005,
            shard_tokens: 1 << 26,
            chat_template: None,
            chat_template_name: None,
            assistant_only_loss: None,
            completion_only_loss: None,
            overlong: None,
        }
    }
}

impl Data {
    /// Where the tokenizer lies: in `prepared_folder` where one is trained, else what `tokenizer` names.
    pub fn tokenizer_path(&self) -> Option<PathBuf> {
        if self.train_tokenizer_vocab == 0 {
            return self.tokenizer.clone();
        }
        self.prepared_folder.as_ref().map(|folder| folder.join("tokenizer.json"))
    }

    /// The keys that only conversations have, and whether each is set.
    pub(crate) fn chat_keys(&self) -> [(&'static str, bool); 5] {
        [
            ("chat_template", self.chat_template.is_some()),
            ("chat_template_name", self.chat_template_name.is_some()),
            ("assistant_only_loss", self.assistant_only_loss.is_some()),
            ("completion_only_loss", self.completion_only_loss.is_some()),
            ("overlong", self.overlong.is_some()),
        ]
    }
}
