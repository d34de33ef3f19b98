//! Which tokens start and end documents, and the chat template: read from the files beside a `tokenizer.json`.

use super::TOKENIZER_CONFIG;
use crate::error::{FormatError, Result};
use crate::weights::{CONFIG, read_json};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::Tokenizer;

/// Names of tokens that end a document, by how surely they do, for tokenizers that come without a word about it.
const EOS_NAMES: [&str; 8] =
    ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"];
const BOS_NAMES: [&str; 4] = ["<|begin_of_text|>", "<s>", "<bos>", "<|bos|>"];
const PAD_NAMES: [&str; 3] = ["<pad>", "<|pad|>", "[PAD]"];

/// The one that is taken where nobody chooses.
const DEFAULT_TEMPLATE: &str = "default";
/// Where transformers keeps the templates that have names, one file each.
const TEMPLATE_FOLDER: &str = "additional_chat_templates";

/// A special token, as files name it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Id(u32),
    Text(String),
}

/// What files say of special tokens.
#[derive(Clone, Debug, Default)]
pub(super) struct SpecialTokens {
    pub bos: Option<Token>,
    /// All that end a document, the tokenizer's own first.
    pub eos: Vec<Token>,
    pub pad: Option<Token>,
    pub chat_template: Option<String>,
    /// Templates that have names, by name.
    pub named_templates: BTreeMap<String, String>,
    /// Whether silence means that there is none, rather than that names must tell.
    pub complete: bool,
}

/// Special tokens as ids of a tokenizer.
pub(super) struct Ids {
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
}

impl SpecialTokens {
    /// What the files in `folder` say: the tokenizer's own configuration first, then how the model is to generate.
    pub fn beside(folder: &Path) -> Result<SpecialTokens> {
        let mut found = SpecialTokens::default();
        if let Some(config) = optional_json(&folder.join(TOKENIZER_CONFIG))? {
            found.bos = token(config.get("bos_token"));
            found.eos.extend(token(config.get("eos_token")));
            found.pad = token(config.get("pad_token"));
            found.named_templates = config.get("chat_template").map(named_templates).unwrap_or_default();
            let only = config.get("chat_template").and_then(Value::as_str).map(str::to_owned);
            found.chat_template = only.or_else(|| found.named_templates.get(DEFAULT_TEMPLATE).cloned());
            // A `null` there says that the tokenizer has none.
            found.complete = config.get("bos_token").is_some() && config.get("eos_token").is_some();
        }
        let jinja = folder.join("chat_template.jinja");
        if jinja.is_file() {
            let text = std::fs::read_to_string(&jinja).map_err(FormatError::io("read", &jinja))?;
            found.chat_template = Some(text);
        }
        found.named_templates.extend(template_files(&folder.join(TEMPLATE_FOLDER))?);
        if let (Some(text), false) = (&found.chat_template, found.named_templates.is_empty()) {
            found.named_templates.entry(DEFAULT_TEMPLATE.to_owned()).or_insert_with(|| text.clone());
        }
        for name in ["generation_config.json", CONFIG] {
            if let Some(config) = optional_json(&folder.join(name))? {
                found.bos = found.bos.or_else(|| token(config.get("bos_token_id")));
                found.pad = found.pad.or_else(|| token(config.get("pad_token_id")));
                match config.get("eos_token_id") {
                    Some(Value::Array(list)) => found.eos.extend(list.iter().filter_map(|id| token(Some(id)))),
                    one => found.eos.extend(token(one)),
                }
            }
        }
        Ok(found)
    }

    /// The ids of `tokenizer`; a token it lacks is left out, and names decide where files are silent.
    pub fn resolve(&self, tokenizer: &Tokenizer) -> Ids {
        let id = |token: &Token| match token {
            Token::Id(id) => tokenizer.id_to_token(*id).map(|_| *id),
            Token::Text(text) => tokenizer.token_to_id(text),
        };
        let by_name = |names: &[&str]| names.iter().find_map(|name| tokenizer.token_to_id(name));
        let mut eos: Vec<u32> = Vec::new();
        for id in self.eos.iter().filter_map(id) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        if eos.is_empty() && !self.complete {
            eos.extend(by_name(&EOS_NAMES));
        }
        let silent = |names: &[&str]| if self.complete { None } else { by_name(names) };
        Ids {
            bos: self.bos.as_ref().and_then(id).or_else(|| silent(&BOS_NAMES)),
            pad: self.pad.as_ref().and_then(id).or_else(|| silent(&PAD_NAMES)),
            eos,
        }
    }
}

/// A token from an id, a text, or an object with its text.
fn token(value: Option<&Value>) -> Option<Token> {
    match value? {
        Value::Number(id) => Some(Token::Id(u32::try_from(id.as_u64()?).ok()?)),
        Value::String(text) => Some(Token::Text(text.clone())),
        object => Some(Token::Text(object.get("content")?.as_str()?.to_owned())),
    }
}

/// Of a list of templates with names, all.
fn named_templates(value: &Value) -> BTreeMap<String, String> {
    let text = |item: &Value, key: &str| Some(item.get(key)?.as_str()?.to_owned());
    let pair = |item: &Value| Some((text(item, "name")?, text(item, "template")?));
    value.as_array().into_iter().flatten().filter_map(pair).collect()
}

/// The `.jinja` files of a folder, by their names without the ending.
fn template_files(folder: &Path) -> Result<BTreeMap<String, String>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(BTreeMap::new()) };
    let mut found = BTreeMap::new();
    for path in entries.flatten().map(|entry| entry.path()).filter(|p| p.extension().is_some_and(|e| e == "jinja")) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        found.insert(name, std::fs::read_to_string(&path).map_err(FormatError::io("read", &path))?);
    }
    Ok(found)
}

fn optional_json(path: &Path) -> Result<Option<Value>> {
    if path.is_file() { read_json(path).map(Some) } else { Ok(None) }
}
