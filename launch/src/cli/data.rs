//! `tangelo data` on the command line.

use clap::{Args, Subcommand};
use std::num::NonZeroUsize;
use std::path::PathBuf;

/// Commands about data.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Train a byte-level BPE tokenizer on text
    Tokenizer(TokenizerArgs),
    /// Tokenise text into memory-mapped shards, in parallel; goes on where it stopped
    Prepare(PrepareArgs),
    /// Say what a folder of shards holds, and show documents
    Inspect(InspectArgs),
}

/// Arguments of `tangelo data tokenizer`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo data tokenizer 'src/**/*.rs' docs --vocab-size 8192 --output tokenizer.json
  tangelo data tokenizer corpus.jsonl.zst --text-column content --max-bytes 50000000 -o tokenizer.json")]
pub struct TokenizerArgs {
    /// Files, folders or globs: text, .jsonl(.gz|.zst), .parquet or .arrow.
    #[arg(required = true, value_name = "FILES")]
    pub paths: Vec<String>,
    /// Where to write it.
    #[arg(long, short, value_name = "FILE", default_value = "tokenizer.json")]
    pub output: PathBuf,
    /// Ids in all, the 256 bytes and the special tokens included.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub vocab_size: usize,
    /// Bytes of text to learn from at most, taken evenly from all files.
    #[arg(long, value_name = "BYTES", default_value_t = 100_000_000)]
    pub max_bytes: u64,
    /// The column with the text, in files that have columns.
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub text_column: String,
    /// Show warnings and errors only.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `tangelo data prepare`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo data prepare 'corpus/*.parquet' --tokenizer tokenizer.json --output prepared/corpus
  tangelo data prepare src docs --tokenizer SmolLM2-135M.gguf -o prepared/code --threads 4

The folder can be named in data.sources.paths of a job. `tangelo run` does this by itself for sources of text.")]
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
    #[arg(long, value_name = "NAME", default_value = "text")]
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
  tangelo data inspect prepared/corpus
  tangelo data inspect prepared/corpus --document 12 --max-tokens 200
  tangelo data inspect prepared/corpus --json | jq .tokens")]
pub struct InspectArgs {
    /// A folder made by `tangelo data prepare`, or one that holds several, such as RUN/prepared.
    pub folder: PathBuf,
    /// Show this document's text and tokens, counted from 0.
    #[arg(long, value_name = "I")]
    pub document: Option<u64>,
    /// Tokens to show at most.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_tokens: usize,
    /// Print the manifest as JSON.
    #[arg(long)]
    pub json: bool,
}
