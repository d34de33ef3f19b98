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
            && byte_level
                .encode(tokenizer.get_model(), text, &mut scratch.memory, out)
                .map_err(|e| self.failed(e))?
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
    split::cl100k(MAX_DIGITS_EXPRESSION)
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
