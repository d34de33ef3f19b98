//! `tangelo data` on the command line.

use clap::{Args, Subcommand};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use tangelo_configs::job::DEFAULT_TEXT_COLUMN;

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

The folder can be named in data.sources.paths of a job. `tangelo run` does this
by itself for sources of text.")]
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
