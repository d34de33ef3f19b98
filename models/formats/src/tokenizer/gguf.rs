//! The tokenizer inside a GGUF file as a Hugging Face tokenizer that encodes the same.
//!
//! Two kinds: `gpt2`, byte-level BPE whose way of cutting text into words is named by `tokenizer.ggml.pre`; and `llama`,
//! SentencePiece's BPE, where the pair whose union has the best score merges first and unknown characters fall back to
//! bytes. Keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; which `pre` stands for which pattern:
//! llama.cpp's `llama-vocab.cpp`.

use super::TokenizerAssets;
use super::special::{SpecialTokens, Token};
use super::words::cl100k;
use crate::error::{BoxError, FormatError, Result};
use crate::gguf::Gguf;
use crate::gguf::model::token_id;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers, unicode::NFC};
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence as PreTokenizers, split};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

/// What stands for a space inside SentencePiece's tokens.
const SPACE: &str = "\u{2581}";

/// `tokenizer.ggml.token_type`: never part of text / given by the user, matched as a whole.
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// What Llama 3 and Qwen2 take for a run of digits.
const LLAMA3_DIGITS: &str = r"\p{N}{1,3}";
const QWEN2_DIGITS: &str = r"\p{N}";

/// How text is cut into words before BPE.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Words {
    /// GPT-2's pattern, which the byte-level pre-tokenizer knows.
    Gpt2,
    /// Digits one by one, then GPT-2's.
    DigitsGpt2,
    /// Llama 3's pattern; a word that is a token as it stands is not merged.
    Llama3,
    /// Qwen2's pattern on text in Unicode's composed form.
    Qwen2,
}

/// Names of `tokenizer.ggml.pre`. Files from before the key existed (`default`) are taken for GPT-2's.
const WORDS: [(&str, Words); 16] = [
    ("default", Words::Gpt2),
    ("gpt-2", Words::Gpt2),
    ("phi-2", Words::Gpt2),
    ("jina-es", Words::Gpt2),
    ("jina-de", Words::Gpt2),
    ("mpt", Words::Gpt2),
    ("olmo", Words::Gpt2),
    ("smollm", Words::DigitsGpt2),
    ("starcoder", Words::DigitsGpt2),
    ("refact", Words::DigitsGpt2),
    ("codeshell", Words::DigitsGpt2),
    ("llama-bpe", Words::Llama3),
    ("llama3", Words::Llama3),
    ("llama-v3", Words::Llama3),
    ("qwen2", Words::Qwen2),
    ("deepseek-r1-qwen", Words::Qwen2),
];

/// The vocabulary of a file.
struct Vocabulary {
    tokens: Vec<String>,
    /// One per token; empty where the file has none.
    types: Vec<f64>,
}

pub(super) fn load(path: &Path) -> Result<TokenizerAssets> {
    let gguf = Gguf::open(path)?;
    let vocabulary = Vocabulary::read(&gguf)?;
    let key = "tokenizer.ggml.model";
    let unusable = |e: BoxError| FormatError::damaged(path, format!("its tokenizer cannot be used: {e}"));
    let mut tokenizer = match gguf.needed(key, gguf.string(key))? {
        "gpt2" => byte_level(&gguf, &vocabulary)?.build(&vocabulary).map_err(unusable)?,
        "llama" => sentence_piece(&gguf, &vocabulary).and_then(|parts| parts.map_err(unusable))?,
        other => {
            let detail = format!("its tokenizer is of kind {other}; supported are gpt2 (byte-level BPE) and llama");
            return Err(FormatError::unsupported(path, detail));
        }
    };
    add_special_tokens(&mut tokenizer, &vocabulary).map_err(unusable)?;
    let special = special_tokens(&gguf)?;
    frame(&mut tokenizer, &gguf, &special).and_then(|framed| framed.map_err(unusable))?;
    TokenizerAssets::new(tokenizer, special).map_err(unusable)
}

impl Vocabulary {
    fn read(gguf: &Gguf) -> Result<Vocabulary> {
        let key = "tokenizer.ggml.tokens";
        if gguf.get(key).is_none() {
            return Err(FormatError::not_found(gguf.path(), "holds no tokenizer (key tokenizer.ggml.tokens)"));
        }
        let tokens = gguf.needed(key, gguf.strings(key))?;
        let types = gguf.floats("tokenizer.ggml.token_type")?.unwrap_or_default();
        if !types.is_empty() && types.len() != tokens.len() {
            let detail = format!("{} token types for {} tokens", types.len(), tokens.len());
            return Err(FormatError::damaged(gguf.path(), detail));
        }
        Ok(Vocabulary { tokens, types })
    }

    fn of_type(&self, kind: f64) -> impl Iterator<Item = &String> {
        let with_type = self.tokens.iter().zip(&self.types);
        with_type.filter(move |(_, t)| **t == kind).map(|(token, _)| token)
    }

    fn ids(&self) -> impl Iterator<Item = (String, u32)> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32))
    }
}

/// What a byte-level tokenizer is made of.
struct ByteLevelParts {
    words: Words,
    merges: Vec<(String, String)>,
}

fn byte_level(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<ByteLevelParts> {
    let pre = gguf.string("tokenizer.ggml.pre")?.unwrap_or("default");
    let words = WORDS.iter().find(|(name, _)| *name == pre).map(|(_, words)| *words).ok_or_else(|| {
        let known = WORDS.map(|(name, _)| name).join(", ");
        let detail = format!("its tokenizer cuts words as {pre}; supported are {known}: use a tokenizer.json instead");
        FormatError::unsupported(gguf.path(), detail)
    })?;
    let key = "tokenizer.ggml.merges";
    let lines = gguf.needed(key, gguf.strings(key))?;
    let mut merges = Vec::with_capacity(lines.len());
    for line in lines {
        // A token may be a space itself, so the separator is looked for behind the first character.
        let at = line.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let at = at.ok_or_else(|| {
            let detail = format!("{key} holds {line:?}, which is not two tokens; {} tokens", vocabulary.tokens.len());
            FormatError::damaged(gguf.path(), detail)
        })?;
        merges.push((line[..at].to_owned(), line[at + 1..].to_owned()));
    }
    Ok(ByteLevelParts { words, merges })
}

impl ByteLevelParts {
    fn build(self, vocabulary: &Vocabulary) -> std::result::Result<Tokenizer, BoxError> {
        let model = BPE::builder()
            .vocab_and_merges(vocabulary.ids().collect::<tokenizers::models::bpe::Vocab>(), self.merges)
            .ignore_merges(self.words == Words::Llama3)
            .build()?;
        let mut tokenizer = Tokenizer::new(model);
        let bytes = |pattern: bool| ByteLevel::new(false, true, pattern);
        let by_pattern = |pattern: &str| -> std::result::Result<PreTokenizers, BoxError> {
            let pattern = split::SplitPattern::Regex(pattern.to_owned());
            let split = split::Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            Ok(PreTokenizers::new(vec![split.into(), bytes(false).into()]))
        };
        match self.words {
            Words::Gpt2 => tokenizer.with_pre_tokenizer(Some(bytes(true))),
            Words::DigitsGpt2 => tokenizer
                .with_pre_tokenizer(Some(PreTokenizers::new(vec![Digits::new(true).into(), bytes(true).into()]))),
            Words::Llama3 => tokenizer.with_pre_tokenizer(Some(by_pattern(&cl100k(LLAMA3_DIGITS))?)),
            Words::Qwen2 => {
                tokenizer.with_normalizer(Some(NFC))?;
                tokenizer.with_pre_tokenizer(Some(by_pattern(&cl100k(QWEN2_DIGITS))?))
            }
        };
        tokenizer.with_decoder(Some(bytes(true)));
        tokenizer.with_post_processor(Some(ByteLevel::new(false, false, true)));
        Ok(tokenizer)
    }
}

fn sentence_piece(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<std::result::Result<Tokenizer, BoxError>> {
    let key = "tokenizer.ggml.scores";
    let scores = gguf.needed(key, gguf.floats(key))?;
    if scores.len() != vocabulary.tokens.len() {
        let detail = format!("{} scores for {} tokens", scores.len(), vocabulary.tokens.len());
        return Err(FormatError::damaged(gguf.path(), detail));
    }
    let space_in_front = gguf.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok(build_sentence_piece(vocabulary, &scores, space_in_front))
}

fn build_sentence_piece(
    vocabulary: &Vocabulary,
    scores: &[f64],
    space_in_front: bool,
) -> std::result::Result<Tokenizer, BoxError> {
    let mut builder = BPE::builder()
        .vocab_and_merges(
            vocabulary.ids().collect::<tokenizers::models::bpe::Vocab>(),
            merges_by_score(vocabulary, scores),
        )
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unknown) = vocabulary.of_type(UNKNOWN).next() {
        builder = builder.unk_token(unknown.clone());
    }
    let mut tokenizer = Tokenizer::new(builder.build()?);
    let replace = Replace::new(" ", SPACE)?;
    let mut normalizers = vec![replace.into()];
    let mut decoders = vec![Replace::new(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if space_in_front {
        normalizers.insert(0, Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers)))?;
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// Every way to put a token together from two others, best score of the result first.
fn merges_by_score(vocabulary: &Vocabulary, scores: &[f64]) -> Vec<(String, String)> {
    let ids: std::collections::HashMap<&str, usize> =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((id, l, r));
            }
        }
    }
    // Where scores are equal by ids, of the result and then of the parts, as Hugging Face's conversion orders them.
    // Adding zero makes -0 and 0 the same.
    let score = |id: usize| scores[id] + 0.0;
    merges.sort_by(|a, b| score(b.0).total_cmp(&score(a.0)).then(a.cmp(b)));
    let text = |id: usize| vocabulary.tokens[id].clone();
    merges.into_iter().map(|(_, l, r)| (text(l), text(r))).collect()
}

fn add_special_tokens(tokenizer: &mut Tokenizer, vocabulary: &Vocabulary) -> std::result::Result<(), BoxError> {
    let added = |token: &String, special| AddedToken::from(token.clone(), special).normalized(false);
    let control: Vec<_> = [CONTROL, UNKNOWN].into_iter().flat_map(|kind| vocabulary.of_type(kind)).collect();
    tokenizer.add_special_tokens(control.into_iter().map(|token| added(token, true)))?;
    // Those that hold SentencePiece's space are found by merging: text never contains them as they stand.
    let user = vocabulary.of_type(USER_DEFINED).filter(|token| !token.contains(SPACE));
    tokenizer.add_tokens(user.map(|token| added(token, false)).collect::<Vec<_>>())?;
    Ok(())
}

fn special_tokens(gguf: &Gguf) -> Result<SpecialTokens> {
    let id = |name: &str| token_id(gguf, &format!("tokenizer.ggml.{name}_token_id"));
    let eos: Vec<Token> = [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten().map(Token::Id).collect();
    Ok(SpecialTokens {
        bos: id("bos")?.map(Token::Id),
        complete: !eos.is_empty(),
        eos,
        pad: id("padding")?.map(Token::Id),
        chat_template: gguf.string("tokenizer.chat_template")?.map(str::to_owned),
        named_templates: named_templates(gguf)?,
    })
}

/// The templates that have names, which the file lists.
fn named_templates(gguf: &Gguf) -> Result<BTreeMap<String, String>> {
    let Some(names) = gguf.strings("tokenizer.chat_templates")? else { return Ok(BTreeMap::new()) };
    let mut found = BTreeMap::new();
    for name in names {
        if let Some(text) = gguf.string(&format!("tokenizer.chat_template.{name}"))? {
            found.insert(name, text.to_owned());
        }
    }
    Ok(found)
}

/// Puts the start and end ids around texts where the file asks for it. Where it does not say, llama.cpp's defaults:
/// a start for SentencePiece and for Llama 3, no end.
fn frame(tokenizer: &mut Tokenizer, gguf: &Gguf, special: &SpecialTokens) -> Result<std::result::Result<(), BoxError>> {
    let model = gguf.string("tokenizer.ggml.model")?.unwrap_or_default();
    let pre = gguf.string("tokenizer.ggml.pre")?.unwrap_or_default();
    let llama3 = WORDS.iter().any(|(name, words)| *name == pre && *words == Words::Llama3);
    let add_bos = gguf.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(model == "llama" || llama3);
    let add_eos = gguf.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let ids = special.resolve(tokenizer);
    let named = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id).map(|token| (token, id)));
    let bos = named(ids.bos).filter(|_| add_bos);
    let eos = named(ids.eos.first().copied()).filter(|_| add_eos);
    if bos.is_none() && eos.is_none() {
        return Ok(Ok(()));
    }
    Ok(template(&bos, &eos).map(|template| {
        tokenizer.with_post_processor(Some(template));
    }))
}

type Named = Option<(String, u32)>;

fn template(bos: &Named, eos: &Named) -> std::result::Result<TemplateProcessing, BoxError> {
    let around = |sequence: &str| {
        let mut pieces = Vec::new();
        pieces.extend(bos.iter().map(|(token, _)| token.clone()));
        pieces.push(sequence.to_owned());
        pieces.extend(eos.iter().map(|(token, _)| token.clone()));
        pieces
    };
    let pair: Vec<String> = around("$A").into_iter().chain(around("$B:1")).collect();
    let tokens: Vec<(String, u32)> = [bos, eos].into_iter().flatten().cloned().collect();
    Ok(TemplateProcessing::builder().try_single(around("$A"))?.try_pair(pair)?.special_tokens(tokens).build()?)
}
