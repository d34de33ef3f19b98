//! `generate`: continues a prompt, streaming text as it comes, or one JSON object at the end.

use crate::error::{Result, TrainError};
use crate::open_model;
use crate::sample::{Sampler, logprob};
use serde_json::json;
use std::io::Write;
use tangelo_configs::requests::GenerateRequest;
use tangelo_formats::ChatTemplate;
use tangelo_formats::chat::RenderOptions;
use tangelo_formats::tokenizer::{StreamDecoder, TokenizerAssets};
use tangelo_models::Model;
use tch::{Kind, Tensor};

/// One generated token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// log of its probability under the model (not the sampling distribution).
    pub logprob: f64,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token.
    Stop,
    /// As many tokens as were asked for, or as the model is meant for.
    Length,
}

impl FinishReason {
    /// As serving engines name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// What to generate.
#[derive(Clone, Debug)]
pub struct Options {
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// At most this many.
    pub max_new_tokens: usize,
    /// Ids that end generation; they are part of the answer.
    pub stop_ids: Vec<u32>,
    /// Keep keys and values of what was seen; else the whole sequence is run for every token.
    pub cache: bool,
}

/// Continues `prompt`, calling `each` with every token as it is chosen.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    options: &Options,
    mut each: impl FnMut(Token) -> Result<()>,
) -> Result<FinishReason> {
    super::check_ids(prompt, model.spec().vocab_size)?;
    if prompt.is_empty() {
        return Err(TrainError::Data("the prompt has no tokens; give at least one".into()));
    }
    let room = model.spec().max_position_embeddings.saturating_sub(prompt.len());
    let mut state = model.new_state();
    let mut sequence = prompt.to_vec();
    let mut fresh = prompt.to_vec();
    for position in 0..options.max_new_tokens.min(room) {
        if !options.cache {
            state = model.new_state();
            fresh = sequence.clone();
        }
        let logits = to_host(&model.decode(&mut state, &fresh));
        let id = options.sampler.choose(&logits, position as u64);
        each(Token { id, logprob: logprob(&logits, id) })?;
        if options.stop_ids.contains(&id) {
            return Ok(FinishReason::Stop);
        }
        sequence.push(id);
        fresh = vec![id];
    }
    Ok(FinishReason::Length)
}

fn to_host(logits: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(logits.to_kind(Kind::Float).contiguous()).expect("a one-dimensional tensor")
}

/// The verb.
pub fn run(request: &GenerateRequest) -> Result<()> {
    let opened = open_model::open(&request.model)?;
    let (prompt, tokenizer) = match (&request.prompt, &request.prompt_ids) {
        (Some(text), None) => {
            let assets = opened.tokenizer?;
            let ids = if request.chat { chat_prompt(&assets, text)? } else { super::encode(&assets, text)? };
            (ids, Some(assets))
        }
        (None, Some(ids)) => (ids.clone(), opened.tokenizer.ok()),
        _ => return Err(TrainError::Config("give either --prompt or --prompt-ids".into())),
    };
    let stop_ids = if request.ignore_eos { Vec::new() } else { stop_ids(&opened.model, tokenizer.as_ref()) };
    let options = Options {
        sampler: Sampler {
            temperature: request.temperature,
            top_k: request.top_k,
            top_p: request.top_p,
            seed: request.seed,
        },
        max_new_tokens: request.max_new_tokens,
        stop_ids,
        cache: !request.no_cache,
    };
    if request.json {
        print_json(&opened.model, tokenizer.as_ref(), &prompt, &options)
    } else {
        stream(&opened.model, tokenizer.as_ref(), &prompt, &options)
    }
}

/// What comes before the assistant's answer to `prompt`: a message of the user, or messages as a JSON list.
pub fn chat_prompt(assets: &TokenizerAssets, prompt: &str) -> Result<Vec<u32>> {
    let messages = match serde_json::from_str(prompt) {
        Ok(serde_json::Value::Array(messages)) => messages,
        _ => vec![json!({ "role": "user", "content": prompt })],
    };
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let rendered = ChatTemplate::of(assets).and_then(|template| template.render(&messages, &options));
    let text = rendered.map_err(|e| TrainError::Data(format!("{prompt:?} as a conversation: {e}")))?.text;
    // The template writes the special tokens itself.
    let encoding = assets.tokenizer.encode_fast(text, false).map_err(|e| TrainError::Data(e.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

/// Ids that end a document: the model's and the tokenizer's.
pub fn stop_ids(model: &Model, tokenizer: Option<&TokenizerAssets>) -> Vec<u32> {
    let mut ids = model.spec().eos_token_ids.clone();
    ids.extend(tokenizer.into_iter().flat_map(|t| &t.eos_token_ids));
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn print_json(model: &Model, tokenizer: Option<&TokenizerAssets>, prompt: &[u32], options: &Options) -> Result<()> {
    let mut tokens = Vec::new();
    let finish_reason = generate(model, prompt, options, |token| {
        tokens.push(token);
        Ok(())
    })?;
    let ids: Vec<u32> = tokens.iter().map(|t| t.id).collect();
    let text =
        tokenizer.map(|t| t.tokenizer.decode(&ids, true).map_err(|e| TrainError::Data(e.to_string()))).transpose()?;
    let logprobs: Vec<f64> = tokens.iter().map(|t| t.logprob).collect();
    let answer = json!({
        "prompt_ids": prompt, "ids": ids, "logprobs": logprobs, "text": text, "finish_reason": finish_reason.as_str(),
    });
    print_line(&answer.to_string())
}

fn stream(model: &Model, tokenizer: Option<&TokenizerAssets>, prompt: &[u32], options: &Options) -> Result<()> {
    let mut out = std::io::stdout();
    let mut decoder = tokenizer.map(|t| StreamDecoder::new(&t.tokenizer, true));
    let decode_error = |e: Box<dyn std::error::Error + Send + Sync>| TrainError::Data(format!("cannot decode: {e}"));
    generate(model, prompt, options, |token| {
        let piece = match &mut decoder {
            Some(decoder) => decoder.push(token.id).map_err(decode_error)?,
            None => Some(format!("{} ", token.id)),
        };
        write_piece(&mut out, piece)
    })?;
    let rest = decoder.as_mut().map(|d| d.finish().map_err(decode_error)).transpose()?.flatten();
    write_piece(&mut out, rest)?;
    write_piece(&mut out, Some("\n".into()))
}

fn write_piece(out: &mut impl Write, piece: Option<String>) -> Result<()> {
    let Some(piece) = piece else { return Ok(()) };
    out.write_all(piece.as_bytes()).and_then(|()| out.flush()).map_err(|e| TrainError::Device(format!("stdout: {e}")))
}

/// Prints one line, at once.
pub(crate) fn print_line(line: &str) -> Result<()> {
    write_piece(&mut std::io::stdout(), Some(format!("{line}\n")))
}
