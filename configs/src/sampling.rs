//! How tokens are drawn, and how much memory generation may take: what a user sets, with its bounds.

use crate::ConfigError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How one request's tokens are drawn. Every job and every request states it in these keys; of a model's own
/// generation_config.json only the end-of-text ids are read, for training must know the distribution that it samples from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingParams {
    /// Samples per prompt; the prompt is computed once.
    pub n: usize,
    /// Logits are divided by it; 0: the likeliest token (greedy).
    pub temperature: f64,
    /// Of what `min_p` leaves, keep the k likeliest tokens; 0: all.
    pub top_k: usize,
    /// Of what `top_k` leaves, keep the fewest likeliest tokens whose probabilities add up to this share; 1: all.
    pub top_p: f64,
    /// Keep tokens at least this probable, as a fraction of the likeliest; 0: all.
    pub min_p: f64,
    /// Tokens to generate at most; the model's longest sequence is a bound too.
    pub max_tokens: usize,
    /// Tokens to generate at least: until then nothing ends a sample, and tokens that would are not drawn.
    pub min_tokens: usize,
    /// Texts that end a sample when they appear in it; their tokens stay.
    pub stop: Vec<String>,
    /// Tokens that end a sample, beside the model's end-of-text tokens; they stay.
    pub stop_token_ids: Vec<u32>,
    /// Generate past end-of-text tokens.
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            n: 1,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_tokens: 512,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// Below it, logits divided by the temperature lose their meaning in fp32.
const MIN_TEMPERATURE: f64 = 1e-2;
const MAX_TEMPERATURE: f64 = 100.0;
const MAX_SAMPLES: usize = 1 << 14;
const MAX_TOKENS: usize = 1 << 24;
const MAX_SEQUENCES: usize = 1 << 16;

impl SamplingParams {
    /// Checks every key; `at` is where they are, such as `rollout.sampling`.
    ///
    /// # Errors
    /// Names every value that makes no sense.
    pub fn check(&self, at: &str) -> Result<(), ConfigError> {
        refuse(self.problems(at))
    }

    /// Every value that makes no sense, in words.
    pub(crate) fn problems(&self, at: &str) -> Vec<String> {
        let mut found = Problems { at, list: Vec::new() };
        found.range("n", self.n, 1, MAX_SAMPLES);
        found.range("max_tokens", self.max_tokens, 1, MAX_TOKENS);
        let t = self.temperature;
        found.require(t == 0.0 || (MIN_TEMPERATURE..=MAX_TEMPERATURE).contains(&t), || {
            format!("`{at}.temperature` is {t}; expected 0 (greedy), or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}")
        });
        found.require(self.top_p > 0.0 && self.top_p <= 1.0, || {
            format!("`{at}.top_p` is {}; expected above 0 and at most 1 (1: off)", self.top_p)
        });
        found.require((0.0..=1.0).contains(&self.min_p), || {
            format!("`{at}.min_p` is {}; expected 0 (off) to 1", self.min_p)
        });
        found.require(self.min_tokens <= self.max_tokens, || {
            format!("`{at}.min_tokens` {} is above `max_tokens` {}", self.min_tokens, self.max_tokens)
        });
        found.require(self.stop.iter().all(|text| !text.is_empty()), || {
            format!("`{at}.stop` holds an empty text, which would end every sample at once; remove it")
        });
        found.require(self.n <= 1 || t != 0.0, || {
            format!("`{at}.n` is {} with temperature 0: greedy samples are all the same; set n = 1", self.n)
        });
        found.list
    }

    /// Whether `top_k`, `top_p` or `min_p` leave tokens out.
    pub fn cuts_unlikely_tokens(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// The generation engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Memory for keys and values, MiB; 0: `kv_memory_fraction` of what is free when it is taken. No more is taken than
    /// `max_num_seqs` of the model's longest sequences need.
    pub kv_memory_mib: usize,
    /// See `kv_memory_mib`.
    pub kv_memory_fraction: f64,
    /// Sequences that are generated at once.
    pub max_num_seqs: usize,
    /// Tokens computed in one step: one per sequence that is generated, and pieces of prompts.
    pub max_num_batched_tokens: usize,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig { kv_memory_mib: 0, kv_memory_fraction: 0.4, max_num_seqs: 256, max_num_batched_tokens: 8192 }
    }
}

impl EngineConfig {
    /// Checks every key; `at` is where they are.
    ///
    /// # Errors
    /// Names every value that makes no sense.
    pub fn check(&self, at: &str) -> Result<(), ConfigError> {
        refuse(self.problems(at))
    }

    /// Every value that makes no sense, in words.
    pub(crate) fn problems(&self, at: &str) -> Vec<String> {
        let mut found = Problems { at, list: Vec::new() };
        found.range("max_num_seqs", self.max_num_seqs, 1, MAX_SEQUENCES);
        found.range("max_num_batched_tokens", self.max_num_batched_tokens, 1, MAX_TOKENS);
        found.require(self.kv_memory_fraction > 0.0 && self.kv_memory_fraction <= 0.95, || {
            format!("`{at}.kv_memory_fraction` is {}; expected above 0 and at most 0.95", self.kv_memory_fraction)
        });
        found.require(self.max_num_batched_tokens >= self.max_num_seqs, || {
            format!(
                "`{at}.max_num_batched_tokens` {} is below `max_num_seqs` {}: every sequence computes a token per step",
                self.max_num_batched_tokens, self.max_num_seqs
            )
        });
        found.list
    }
}

struct Problems<'a> {
    at: &'a str,
    list: Vec<String>,
}

impl Problems<'_> {
    fn require(&mut self, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.list.push(message());
        }
    }

    fn range(&mut self, key: &str, value: usize, low: usize, high: usize) {
        let at = self.at;
        self.require((low..=high).contains(&value), || format!("`{at}.{key}` is {value}; expected {low} to {high}"));
    }
}

fn refuse(problems: Vec<String>) -> Result<(), ConfigError> {
    if problems.is_empty() { Ok(()) } else { Err(ConfigError::Values(problems)) }
}
