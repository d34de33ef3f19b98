//! `tangelo data` on the command line.

use clap::{Args, Subcommand};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use tangelo_configs::job::{DEFAULT_TEXT_COLUMN, DataFormat};

/// Commands about data.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Train a byte-level BPE tokenizer on text
    Tokenizer(TokenizerArgs),
    /// Tokenise text into memory-mapped shards, in parallel; goes on where it stopped
    Prepare(PrepareArgs),
    /// Check a folder of shards and say what it holds
    Inspect(InspectArgs),
}

/// Arguments of `tangelo data tokenizer`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo data tokenizer 'src/**/*.rs' docs --vocab-size 8192 --output tokenizer
  tangelo data tokenizer corpus.jsonl.zst --text-column content -o code.json

`tangelo run` does this by itself where data.train_tokenizer_vocab says so.")]
pub struct TokenizerArgs {
    /// Files, folders or globs: text, .jsonl(.gz|.zst), .parquet or .arrow.
    #[arg(required = true, value_name = "FILES")]
    pub paths: Vec<String>,
    /// The folder for tokenizer.json and what belongs to it; or a file that ends in .json, for that file alone.
    #[arg(long, short, value_name = "PATH", default_value = "tokenizer")]
    pub output: PathBuf,
    /// Ids in all, the 256 bytes and the end-of-text token included; a small corpus may yield fewer.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub vocab_size: usize,
    /// Learn from about this many bytes of text at most, sampled from all files.
    #[arg(long, value_name = "BYTES", default_value_t = 128 << 20)]
    pub sample_bytes: u64,
    /// The column with the text, in files that have columns.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_TEXT_COLUMN)]
    pub text_column: String,
    /// Show warnings and errors only.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `tangelo data prepare`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo data prepare 'corpus/*.parquet' --tokenizer tokenizer -o prepared/corpus
  tangelo data prepare src docs --tokenizer model.gguf -o prepared/code

  tangelo data prepare chats.jsonl --tokenizer model.gguf --chat --seq-len 2048 -o prepared/chats
  tangelo data prepare gsm8k/train.jsonl --tokenizer model.gguf --chat --seq-len 512 \\
      --prompt-column question --completion-column answer --as-messages -o prepared/gsm8k

The folder can be named in data.sources.paths of a job. `tangelo run` does this
by itself for files of text and of conversations.")]
pub struct PrepareArgs {
    /// Files, folders or globs: text, .jsonl(.gz|.zst), .parquet or .arrow.
    #[arg(required = true, value_name = "FILES")]
    pub paths: Vec<String>,
    /// tokenizer.json, a folder that holds one, or a GGUF file.
    #[arg(long, value_name = "PATH")]
    pub tokenizer: PathBuf,
    /// The folder for shards and manifest.
    #[arg(long, short, value_name = "FOLDER")]
    pub output: PathBuf,
    /// The column with the text, in files that have columns.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_TEXT_COLUMN)]
    pub text_column: String,
    /// Tokens per shard file.
    #[arg(long, value_name = "N", default_value = "67108864")]
    pub shard_tokens: NonZeroUsize,
    /// Tokenising threads; 0 for all cores. The result does not depend on it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Start over where the folder was made from something else.
    #[arg(long)]
    pub overwrite: bool,
    /// Show warnings and errors only.
    #[arg(long, short)]
    pub quiet: bool,
    /// Conversations, one in each row.
    #[command(flatten)]
    pub chat: ChatArgs,
}

/// How `tangelo data prepare --chat` reads and masks conversations: the keys of an `sft` job, with the same defaults.
#[derive(Args, Debug)]
#[command(next_help_heading = "Conversations")]
pub struct ChatArgs {
    /// Rows are conversations (messages, ShareGPT, or a prompt with a completion): render and mask them for an `sft` job.
    #[arg(long, requires = "seq_len", conflicts_with = "text_column")]
    pub chat: bool,
    /// Tokens of the longest conversation: training.seq_len of the jobs that read the folder, or less.
    #[arg(long, value_name = "N", requires = "chat")]
    pub seq_len: Option<NonZeroUsize>,
    /// What a row is: auto, messages, prompt_completion or sharegpt.
    #[arg(long, value_name = "FORMAT", default_value = "auto", value_parser = parse_format, requires = "chat")]
    pub format: DataFormat,
    /// The column with the list of messages [default: messages, or conversations where that is there].
    #[arg(long, value_name = "NAME", requires = "chat")]
    pub messages_column: Option<String>,
    /// The column with the prompt [default: prompt].
    #[arg(long, value_name = "NAME", requires = "chat")]
    pub prompt_column: Option<String>,
    /// The column with the completion [default: completion].
    #[arg(long, value_name = "NAME", requires = "chat")]
    pub completion_column: Option<String>,
    /// A prompt and a completion that are plain text become a message of the user and one of the assistant.
    #[arg(long, requires = "chat")]
    pub as_messages: bool,
    /// Learn every token, not the assistant's messages or the completion alone.
    #[arg(long, requires = "chat")]
    pub learn_everything: bool,
    /// Leave conversations that are too long out, instead of cutting them.
    #[arg(long, requires = "chat")]
    pub drop_overlong: bool,
    /// A file with the chat template to use instead of the tokenizer's.
    #[arg(long, value_name = "FILE", requires = "chat", conflicts_with = "chat_template_name")]
    pub chat_template: Option<PathBuf>,
    /// The name of one of the tokenizer's chat templates, where it has several.
    #[arg(long, value_name = "NAME", requires = "chat")]
    pub chat_template_name: Option<String>,
}

fn parse_format(text: &str) -> Result<DataFormat, String> {
    let all = [
        ("auto", DataFormat::Auto),
        ("messages", DataFormat::Messages),
        ("prompt_completion", DataFormat::PromptCompletion),
        ("sharegpt", DataFormat::Sharegpt),
    ];
    let found = all.iter().find(|(name, _)| *name == text).map(|(_, format)| *format);
    found.ok_or_else(|| format!("expected {}", all.map(|(name, _)| name).join(", ")))
}

/// Arguments of `tangelo data inspect`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo data inspect prepared/corpus --samples 10
  tangelo data inspect prepared/corpus --json | jq .tokens")]
pub struct InspectArgs {
    /// A folder made by `tangelo data prepare`, or one that holds several, such as RUN/prepared.
    pub folder: PathBuf,
    /// Show the beginnings of this many documents, decoded.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 3)]
    pub samples: u64,
    /// Print one line of JSON for each folder.
    #[arg(long)]
    pub json: bool,
}
