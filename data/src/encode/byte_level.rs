//! Byte-level BPE without the library's bookkeeping of offsets and strings.
//!
//! Text is cut into words by [`Splitter`]; the tokens of a word are remembered per thread, and a word that is new is
//! given to the library's own BPE model. So every token comes from the library; what is saved is cutting by regular
//! expression, normalised strings, offsets and a string per token. Applies only where the tokenizer is of this kind
//! and the text holds none of its added tokens; everything else takes the library's way.

use super::split::Splitter;
use aho_corasick::AhoCorasick;
use serde_json::Value;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use tokenizers::{Model, ModelWrapper, Tokenizer};
use xxhash_rust::xxh3::Xxh3Default;

/// Longer words are not remembered.
const MAX_REMEMBERED_BYTES: usize = 64;
/// Words remembered before starting afresh.
const MAX_REMEMBERED_WORDS: usize = 1 << 18;

/// A byte-level BPE tokenizer, as data.
pub(super) struct ByteLevel {
    splitter: Splitter,
    /// The text is in normal form C; for ASCII that is nothing.
    ascii_only: bool,
    added_tokens: Option<AhoCorasick>,
    /// The character that stands for each byte in the vocabulary.
    alphabet: [char; 256],
}

/// Words and their tokens. Made for one tokenizer.
#[derive(Default)]
pub(super) struct Memory {
    words: HashMap<Box<str>, (u32, u32), BuildHasherDefault<Xxh3Default>>,
    tokens: Vec<u32>,
    mapped: String,
}

impl ByteLevel {
    /// Recognises a tokenizer whose words this module can cut; the others are left to the library.
    pub(super) fn recognise(tokenizer: &Tokenizer) -> Option<ByteLevel> {
        let json: Value = serde_json::from_str(&tokenizer.to_string(false).ok()?).ok()?;
        let ascii_only = match &json["normalizer"] {
            Value::Null => false,
            normalizer if normalizer["type"] == "NFC" => true,
            _ => return None,
        };
        let model = &json["model"];
        let plain = |key: &str| model[key].is_null() || model[key] == "";
        let dropout = model["dropout"].as_f64().unwrap_or(0.0);
        let prefixed = !plain("continuing_subword_prefix") || !plain("end_of_word_suffix");
        if model["type"] != "BPE" || dropout != 0.0 || prefixed {
            return None;
        }
        let splitter = splitter_of(&json["pre_tokenizer"])?;
        let added = json["added_tokens"].as_array().cloned().unwrap_or_default();
        let contents: Vec<&str> = added.iter().filter_map(|token| token["content"].as_str()).collect();
        let added_tokens = if contents.is_empty() { None } else { Some(AhoCorasick::new(&contents).ok()?) };
        Some(ByteLevel { splitter, ascii_only, added_tokens, alphabet: alphabet() })
    }

    /// Appends the tokens of `text`; false (and nothing appended) where the library has to do it.
    pub(super) fn encode(
        &self,
        model: &ModelWrapper,
        text: &str,
        memory: &mut Memory,
        out: &mut Vec<u32>,
    ) -> tokenizers::Result<bool> {
        if self.ascii_only && !text.is_ascii() {
            return Ok(false);
        }
        if self.added_tokens.as_ref().is_some_and(|tokens| tokens.is_match(text)) {
            return Ok(false);
        }
        let (start, mut failed) = (out.len(), None);
        let split = self.splitter.split(text, |word| {
            if let Err(error) = self.encode_word(model, word, memory, out) {
                failed = Some(error);
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if split.is_err() {
            out.truncate(start);
        }
        Ok(split.is_ok())
    }

    /// Calls `word` with each word of `text`, as the vocabulary spells it. False where it cannot tell.
    fn encode_word(
        &self,
        model: &ModelWrapper,
        word: &str,
        memory: &mut Memory,
        out: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        if let Some(&(start, end)) = memory.words.get(word) {
            out.extend_from_slice(&memory.tokens[start as usize..end as usize]);
            return Ok(());
        }
        memory.mapped.clear();
        memory.mapped.extend(word.bytes().map(|b| self.alphabet[b as usize]));
        let first = out.len();
        out.extend(model.tokenize(&memory.mapped)?.iter().map(|token| token.id));
        if word.len() <= MAX_REMEMBERED_BYTES {
            memory.remember(word, &out[first..]);
        }
        Ok(())
    }
}

impl Memory {
    fn remember(&mut self, word: &str, tokens: &[u32]) {
        if self.words.len() >= MAX_REMEMBERED_WORDS {
            self.words.clear();
            self.tokens.clear();
        }
        let start = self.tokens.len() as u32;
        self.tokens.extend_from_slice(tokens);
        self.words.insert(word.into(), (start, self.tokens.len() as u32));
    }
}

/// How a pre-tokenizer cuts text, if it is one of the known byte-level ones.
fn splitter_of(pre_tokenizer: &Value) -> Option<Splitter> {
    let byte_level = |value: &Value| {
        let bare = value["type"] == "ByteLevel" && value["add_prefix_space"] == false;
        bare.then(|| value["use_regex"].as_bool().unwrap_or(true))
    };
    if let Some(with_regex) = byte_level(pre_tokenizer) {
        return with_regex.then_some(Splitter::Gpt2);
    }
    let [first, second] = pre_tokenizer["pretokenizers"].as_array()?.as_slice() else { return None };
    match (first["type"].as_str()?, byte_level(second)?) {
        ("Digits", true) if first["individual_digits"] == true => Some(Splitter::Gpt2SingleDigits),
        ("Split", false) if first["behavior"] == "Isolated" && first["invert"] == false => {
            Splitter::of_expression(first["pattern"]["Regex"].as_str()?)
        }
        _ => None,
    }
}

/// GPT-2's spelling of bytes as visible characters: printable ones stand for themselves, the others follow from
/// U+0100 on.
pub(crate) fn alphabet() -> [char; 256] {
    let mut invisible = 0;
    std::array::from_fn(|byte| {
        let visible = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        invisible += u32::from(!visible);
        let code = if visible { byte as u32 } else { 0xFF + invisible };
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    })
}
