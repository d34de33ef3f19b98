//! Tokenizers: found, loaded, described and written.
//!
//! A tokenizer is Hugging Face's `tokenizer.json` wherever it came from; one inside a GGUF file is translated into it.
//! Beside it lie facts that a `tokenizer.json` does not hold: which ids start and end a document, and the template that
//! turns a conversation into text ([`chat`](crate::chat) renders it). Absent: training a tokenizer (the data room does it).
//!
//! Invariant: encoding with a loaded tokenizer never truncates or pads, whatever the file says.

mod find;
mod gguf;
mod special;
mod stream;
pub mod words;

pub use stream::StreamDecoder;

use crate::error::{FormatError, Result};
use serde_json::{Map, Value, json};
use special::SpecialTokens;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::{AddedToken, Tokenizer};

/// The file names of a folder with a tokenizer.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// A tokenizer and what is known about it.
#[derive(Clone, Debug)]
pub struct TokenizerAssets {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The id that starts a document, if there is one.
    pub bos_token_id: Option<u32>,
    /// The ids that end a document, the tokenizer's own first. Empty where nothing says which.
    pub eos_token_ids: Vec<u32>,
    /// The id that fills up short sequences, if there is one.
    pub pad_token_id: Option<u32>,
    /// Whether encoding with special tokens puts [`bos_token_id`](TokenizerAssets::bos_token_id) in front.
    pub add_bos: bool,
    /// The Jinja template that turns a conversation into text.
    pub chat_template: Option<String>,
    /// Those that the tokenizer has by name, one of which may be meant instead.
    pub named_templates: BTreeMap<String, String>,
}

/// Loads the tokenizer at `path`: a `tokenizer.json`, a folder with one (a model, a run or a checkpoint of a run), a
/// `.gguf` file, or a folder that holds one `.gguf` file. Files beside a `tokenizer.json` (`tokenizer_config.json`,
/// `generation_config.json`, `config.json`, `chat_template.jinja`) tell of special tokens and the chat template.
///
/// # Errors
/// Where there is no tokenizer, or it is damaged or of a kind that is not supported.
pub fn load(path: &Path) -> Result<TokenizerAssets> {
    match find::find(path)? {
        find::Found::Json(file) => load_json(&file),
        find::Found::Gguf(file) => gguf::load(&file),
    }
}

fn load_json(file: &Path) -> Result<TokenizerAssets> {
    let bytes = std::fs::read(file).map_err(FormatError::io("read", file))?;
    let tokenizer = Tokenizer::from_bytes(bytes)
        .map_err(|e| FormatError::damaged(file, format!("the tokenizers library cannot read it: {e}")))?;
    let folder = file.parent().unwrap_or(Path::new(""));
    TokenizerAssets::new(tokenizer, SpecialTokens::beside(folder)?).map_err(|e| FormatError::damaged(file, e))
}

impl TokenizerAssets {
    /// A tokenizer without any facts but what its own tokens tell by their names.
    ///
    /// # Errors
    /// Where the tokenizer cannot even encode an empty text.
    pub fn from_tokenizer(tokenizer: Tokenizer) -> Result<TokenizerAssets> {
        TokenizerAssets::new(tokenizer, SpecialTokens::default())
            .map_err(|e| FormatError::damaged(Path::new("tokenizer"), e))
    }

    fn new(
        mut tokenizer: Tokenizer,
        special: SpecialTokens,
    ) -> std::result::Result<TokenizerAssets, tokenizers::Error> {
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        let ids = special.resolve(&tokenizer);
        let start = tokenizer.encode_fast("", true)?.get_ids().first().copied();
        Ok(TokenizerAssets {
            add_bos: start.is_some() && start == ids.bos,
            bos_token_id: ids.bos,
            eos_token_ids: ids.eos,
            pad_token_id: ids.pad,
            chat_template: special.chat_template,
            named_templates: special.named_templates,
            tokenizer,
        })
    }

    /// One more than the largest id: the least number of rows an embedding needs.
    pub fn vocab_size(&self) -> usize {
        let largest = self.tokenizer.get_vocab(true).into_values().max();
        largest.map_or(0, |id| id as usize + 1)
    }

    /// The contents of a `tokenizer.json`, indented.
    pub fn to_json(&self) -> String {
        self.tokenizer.to_string(true).unwrap_or_else(|e| unreachable!("a tokenizer is plain data: {e}"))
    }

    /// The text of an id, also of special ones.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into a folder, made if needed.
    /// [`load`] and transformers' `AutoTokenizer` read them.
    ///
    /// # Errors
    /// Where a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(FormatError::io("make the folder", folder))?;
        let special = Value::Object(self.special_tokens());
        let files = [
            (TOKENIZER, self.to_json()),
            (TOKENIZER_CONFIG, pretty(&self.config())),
            (SPECIAL_TOKENS_MAP, pretty(&special)),
        ];
        for (name, text) in files {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(FormatError::io("write", &path))?;
        }
        Ok(())
    }

    /// The contents of tokenizer_config.json.
    fn config(&self) -> Value {
        let mut config = self.special_tokens();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        config.insert("add_bos_token".into(), json!(self.add_bos));
        // Joining words and punctuation when decoding would not give the text back.
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        config.insert("added_tokens_decoder".into(), self.added_tokens());
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".into(), json!(template));
        }
        Value::Object(config)
    }

    fn special_tokens(&self) -> Map<String, Value> {
        let named = [
            ("bos_token", self.bos_token_id),
            ("eos_token", self.eos_token_ids.first().copied()),
            ("pad_token", self.pad_token_id),
        ];
        let tokens = named.into_iter().filter_map(|(key, id)| Some((key.to_owned(), json!(self.token(id?)?))));
        tokens.collect()
    }

    fn added_tokens(&self) -> Value {
        let mut tokens: Vec<(u32, AddedToken)> = self.tokenizer.get_added_tokens_decoder().into_iter().collect();
        tokens.sort_by_key(|(id, _)| *id);
        Value::Object(tokens.into_iter().map(|(id, token)| (id.to_string(), json!(token))).collect())
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
