//! The commands that need tensors: parsed here, done by `tangelo-worker`.

use clap::{ArgGroup, Args, ValueEnum};
use std::path::{Path, PathBuf};
use tangelo_configs::job::{ComputeType, DeviceChoice, ExportType};
use tangelo_configs::requests::{EvalRequest, ExportRequest, GenerateRequest, ModelRequest, ScoreRequest};

/// What every command that runs a model takes.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A run folder (its newest checkpoint), a checkpoint, a Hugging Face folder or a GGUF file.
    pub model: PathBuf,
    /// Where to run: CUDA if there is a GPU, else the CPU.
    #[arg(long, value_enum, default_value_t = Device::Auto, help_heading = "Model")]
    pub device: Device,
    /// Type of weights and activations: bfloat16 on a GPU, float32 on a CPU.
    #[arg(long, value_enum, default_value_t = DType::Auto, help_heading = "Model")]
    pub dtype: DType,
    /// CPU threads; 0 for all cores.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Model")]
    pub threads: usize,
    /// The worker binary to use instead of the one beside `tangelo`.
    #[arg(long, hide = true, value_name = "PATH")]
    pub worker_binary: Option<PathBuf>,
}

impl ModelArgs {
    fn request(&self) -> ModelRequest {
        ModelRequest {
            model: self.model.clone(),
            device: match self.device {
                Device::Auto => DeviceChoice::Auto,
                Device::Cpu => DeviceChoice::Cpu,
                Device::Cuda => DeviceChoice::Cuda,
            },
            dtype: match self.dtype {
                DType::Auto => ComputeType::Auto,
                DType::Float32 => ComputeType::Float32,
                DType::Bfloat16 => ComputeType::Bfloat16,
            },
            num_threads: self.threads,
        }
    }
}

/// Where to run.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Device {
    /// CUDA if there is a GPU, else the CPU
    Auto,
    /// The CPU
    Cpu,
    /// The first GPU
    Cuda,
}

/// Type of weights and activations.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DType {
    /// bfloat16 on a GPU, float32 on a CPU
    Auto,
    /// IEEE binary32
    Float32,
    /// bfloat16
    Bfloat16,
}

/// Arguments of `tangelo generate`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("what").required(true).args(["prompt", "prompt_ids"])))]
#[command(after_long_help = "\
Examples:
  tangelo generate runs/my-run --prompt 'fn main() {' --max-new-tokens 100
  tangelo generate model.gguf -p 'Once upon a time' --temperature 0.8 --seed 7
  tangelo generate runs/my-sft --chat -p 'What is 17 + 25?'
  tangelo generate hf-folder --prompt-ids 1,450,4996 --json | jq .logprobs

Greedy (temperature 0) unless told otherwise. The same arguments give the same text.")]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue.
    #[arg(long, short)]
    prompt: Option<String>,
    /// The prompt is what the user says (or a JSON list of messages): render it with the model's chat template.
    #[arg(long, requires = "prompt")]
    chat: bool,
    /// Token ids to continue, separated by commas or spaces.
    #[arg(long, value_name = "IDS", value_parser = parse_ids)]
    prompt_ids: Option<Ids>,
    /// Tokens to generate at most.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128)]
    max_new_tokens: usize,
    /// Sampling temperature; 0 takes the likeliest token.
    #[arg(long, short, value_name = "T", default_value = "0", value_parser = parse_temperature, help_heading = "Sampling")]
    temperature: f64,
    /// Sample from the K likeliest tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Sampling")]
    top_k: usize,
    /// Sample from the likeliest tokens whose probabilities add up to P.
    #[arg(long, value_name = "P", default_value = "1", value_parser = parse_probability, help_heading = "Sampling")]
    top_p: f64,
    /// Seed of the sampling.
    #[arg(long, value_name = "SEED", default_value_t = 0, help_heading = "Sampling")]
    seed: u64,
    /// Go on past an end-of-text token.
    #[arg(long, help_heading = "Sampling")]
    ignore_eos: bool,
    /// Print one JSON object with ids and log-probabilities at the end instead of text.
    #[arg(long)]
    json: bool,
    /// Recompute the whole sequence for every token: slow, for checking the cache.
    #[arg(long, hide_short_help = true)]
    no_cache: bool,
}

impl GenerateArgs {
    /// As the worker wants it.
    pub fn request(&self) -> GenerateRequest {
        GenerateRequest {
            model: self.model.request(),
            prompt: self.prompt.clone(),
            chat: self.chat,
            prompt_ids: self.prompt_ids.as_ref().map(|ids| ids.0.clone()),
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            ignore_eos: self.ignore_eos,
            json: self.json,
            no_cache: self.no_cache,
        }
    }

    /// The worker named by the user.
    pub fn worker(&self) -> Option<&Path> {
        self.model.worker_binary.as_deref()
    }
}

/// Arguments of `tangelo score`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Each line of stdin is {\"ids\": [...]} or {\"text\": \"...\"}; each line of stdout
answers one, in order: {\"ids\": [...], \"logprobs\": [null, ...], \"loss\": ...}.
The first token has no log-probability; loss is minus the mean of the others,
in nats.

Examples:
  echo '{\"text\": \"The capital of France is Paris\"}' | tangelo score runs/my-run --json
  tangelo score hf-folder --json < tokens.jsonl > scores.jsonl")]
pub struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON lines in and out: the only format there is, said for clarity.
    #[arg(long)]
    json: bool,
}

impl ScoreArgs {
    /// As the worker wants it.
    pub fn request(&self) -> ScoreRequest {
        ScoreRequest { model: self.model.request() }
    }

    /// The worker named by the user.
    pub fn worker(&self) -> Option<&Path> {
        self.model.worker_binary.as_deref()
    }
}

/// Arguments of `tangelo eval`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo eval runs/my-run held-out.txt
  tangelo eval SmolLM2-135M.gguf 'docs/**/*.md' --seq-len 1024 --json
  tangelo eval hf-folder test.parquet --text-column content")]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Files or globs: text, .jsonl(.gz|.zst), .parquet or .arrow.
    #[arg(required = true, value_name = "FILES")]
    paths: Vec<String>,
    /// The column with the text, in files that have columns.
    #[arg(long, value_name = "NAME")]
    text_column: Option<String>,
    /// Tokens per sequence; 0 for the model's longest, at most 2048.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    seq_len: usize,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Show no progress.
    #[arg(long, short)]
    pub quiet: bool,
}

impl EvalArgs {
    /// As the worker wants it.
    pub fn request(&self) -> EvalRequest {
        EvalRequest {
            model: self.model.request(),
            paths: self.paths.clone(),
            text_column: self.text_column.clone(),
            seq_len: self.seq_len,
            json: self.json,
        }
    }

    /// The worker named by the user.
    pub fn worker(&self) -> Option<&Path> {
        self.model.worker_binary.as_deref()
    }
}

/// Arguments of `tangelo export`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo export runs/my-run --format hf                           # to runs/my-run/export
  tangelo export runs/my-run --step 500 --output model --dtype bfloat16

The folder loads in transformers:
AutoModelForCausalLM.from_pretrained(FOLDER)")]
pub struct ExportArgs {
    /// A run folder or a checkpoint folder.
    run: PathBuf,
    /// The format.
    #[arg(long, value_enum, default_value_t = Format::Hf)]
    format: Format,
    /// The step to export [default: the newest usable checkpoint].
    #[arg(long, value_name = "STEP")]
    step: Option<u64>,
    /// The folder to write, outside the checkpoint [default: export in the run folder].
    #[arg(long, short, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Element type of the weights.
    #[arg(long, value_enum, default_value_t = ExportDType::Float32)]
    dtype: ExportDType,
    /// Show no progress.
    #[arg(long, short)]
    pub quiet: bool,
    /// The worker binary to use instead of the one beside `tangelo`.
    #[arg(long, hide = true, value_name = "PATH")]
    worker_binary: Option<PathBuf>,
}

/// Format of an export.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Format {
    /// Hugging Face: safetensors, config.json, tokenizer
    Hf,
}

/// Element type of exported weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ExportDType {
    /// IEEE binary32
    Float32,
    /// IEEE binary16
    Float16,
    /// bfloat16
    Bfloat16,
}

impl ExportArgs {
    /// As the worker wants it.
    pub fn request(&self) -> ExportRequest {
        let Format::Hf = self.format;
        ExportRequest {
            run: self.run.clone(),
            step: self.step,
            output: self.output.clone(),
            dtype: match self.dtype {
                ExportDType::Float32 => ExportType::Float32,
                ExportDType::Float16 => ExportType::Float16,
                ExportDType::Bfloat16 => ExportType::Bfloat16,
            },
        }
    }

    /// The worker named by the user.
    pub fn worker(&self) -> Option<&Path> {
        self.worker_binary.as_deref()
    }
}

/// A list of token ids; a type of its own, because clap takes `Vec` for a repeated option.
#[derive(Clone, Debug)]
pub struct Ids(Vec<u32>);

fn parse_ids(text: &str) -> Result<Ids, String> {
    let ids = text.trim_matches(['[', ']']).split([',', ' ']).filter(|part| !part.is_empty());
    let ids: Vec<u32> = ids
        .map(|part| part.parse().map_err(|_| format!("`{part}` is not a token id; expected something like 1,450,4996")))
        .collect::<Result<_, _>>()?;
    if ids.is_empty() { Err("no ids; expected something like 1,450,4996".into()) } else { Ok(Ids(ids)) }
}

fn parse_temperature(text: &str) -> Result<f64, String> {
    in_range(text, |t| t >= 0.0, "a number from 0 (greedy) up")
}

fn parse_probability(text: &str) -> Result<f64, String> {
    in_range(text, |p| p > 0.0 && p <= 1.0, "a probability above 0, up to 1")
}

fn in_range(text: &str, fits: impl Fn(f64) -> bool, expected: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|n| n.is_finite() && fits(*n));
    number.ok_or_else(|| format!("expected {expected}"))
}
