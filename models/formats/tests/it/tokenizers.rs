//! Finding tokenizers, what they say of themselves, and decoding as tokens come.

use crate::common::{GgufFile, Value, fresh_seed, smollm2};
use std::path::Path;
use tangelo_core::hash::mix64;
use tangelo_formats::ChatTemplate;
use tangelo_formats::chat::TemplateChoice;
use tangelo_formats::tokenizer::{self, StreamDecoder, TokenizerAssets};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Bytes as tokens, then the named special tokens.
fn bytes_and(special: &[&str]) -> Tokenizer {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort();
    let vocabulary: tokenizers::models::bpe::Vocab =
        alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), id as u32)).collect();
    let mut tokenizer = Tokenizer::new(BPE::new(vocabulary, vec![]));
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.add_special_tokens(special.iter().map(|s| AddedToken::from(*s, true))).unwrap();
    tokenizer
}

fn text_of(found: &TokenizerAssets, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|id| found.token(*id).unwrap()).collect()
}

fn write(folder: &Path, name: &str, text: &str) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join(name), text).unwrap();
}

#[test]
fn ends_of_documents_come_from_the_files_that_know() {
    let json = bytes_and(&["<s>", "</s>", "<|eot_id|>", "<|end_of_text|>"]).to_string(false).unwrap();
    let check = |files: &[(&str, &str)], bos: Option<&str>, eos: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "tokenizer.json", &json);
        files.iter().for_each(|(name, text)| write(folder.path(), name, text));
        let found = tokenizer::load(folder.path()).unwrap();
        assert_eq!(found.bos_token_id.and_then(|id| found.token(id)).as_deref(), bos, "{files:?}");
        assert_eq!(text_of(&found, &found.eos_token_ids), eos, "{files:?}");
        found
    };
    check(&[], Some("<s>"), &["<|end_of_text|>"]);
    let own = ("tokenizer_config.json", r#"{"bos_token": null, "eos_token": {"content": "<|eot_id|>"}}"#);
    check(&[own], None, &["<|eot_id|>"]);
    // Ids 256 to 259 are the special tokens.
    let generation = ("generation_config.json", r#"{"bos_token_id": 256, "eos_token_id": [257, 258]}"#);
    check(&[own, generation], Some("<s>"), &["<|eot_id|>", "</s>"]);
    check(&[generation], Some("<s>"), &["</s>", "<|eot_id|>"]);
    check(&[("config.json", r#"{"eos_token_id": 258}"#)], Some("<s>"), &["<|eot_id|>"]);
    check(&[("config.json", r#"{"eos_token_id": 100000}"#)], Some("<s>"), &["<|end_of_text|>"]);
    let templates = r#"{"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    let found = check(&[("tokenizer_config.json", templates)], Some("<s>"), &["<|end_of_text|>"]);
    assert_eq!(found.chat_template.as_deref(), Some("d"));
    let jinja = ("chat_template.jinja", "{{ messages }}");
    let found = check(&[("tokenizer_config.json", templates), jinja], Some("<s>"), &["<|end_of_text|>"]);
    assert_eq!(found.chat_template.as_deref(), Some("{{ messages }}"));
}

#[test]
fn tokenizers_are_found_where_runs_and_models_keep_them() {
    let json = bytes_and(&["</s>"]).to_string(false).unwrap();
    for place in ["", "tokenizer", "prepared", "export"] {
        let run = tempfile::tempdir().unwrap();
        let step = run.path().join("checkpoint/step-00000100");
        std::fs::create_dir_all(&step).unwrap();
        let message = tokenizer::load(&step).unwrap_err().to_string();
        assert!(message.contains("holds no tokenizer; expected a tokenizer.json"), "{message}");
        write(&run.path().join(place), "tokenizer.json", &json);
        for path in [run.path(), &step, &run.path().join(place).join("tokenizer.json")] {
            assert_eq!(tokenizer::load(path).unwrap().vocab_size(), 257);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "tokenizer.model", "");
    let message = tokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.model (SentencePiece) is not read"), "{message}");
    write(folder.path(), "tokenizer.json", "{}");
    let message = tokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json is damaged"), "{message}");
}

#[test]
fn saving_and_loading_keeps_everything() {
    let mut tokenizer = bytes_and(&["<s>", "</s>", "<pad>"]);
    tokenizer
        .with_truncation(Some(tokenizers::TruncationParams { max_length: 3, ..Default::default() }))
        .unwrap()
        .with_padding(Some(tokenizers::PaddingParams::default()));
    let mut first = TokenizerAssets::from_tokenizer(tokenizer).unwrap();
    first.chat_template = Some("{{ bos_token }}".into());
    assert_eq!(first.tokenizer.encode("abcdefgh", true).unwrap().len(), 8, "neither cut nor padded");
    let folder = tempfile::tempdir().unwrap();
    first.save(folder.path()).unwrap();
    let second = tokenizer::load(folder.path()).unwrap();
    assert_eq!(first.to_json(), second.to_json());
    assert_eq!(
        (first.bos_token_id, &first.eos_token_ids, first.pad_token_id, &first.chat_template, first.add_bos),
        (second.bos_token_id, &second.eos_token_ids, second.pad_token_id, &second.chat_template, second.add_bos),
    );
}

/// Feeds ids one by one and checks what comes out against decoding all at once.
fn check_stream(found: &TokenizerAssets, ids: &[u32]) {
    let mut decoder = StreamDecoder::new(&found.tokenizer, false);
    let mut pieces: Vec<String> = ids.iter().filter_map(|id| decoder.push(*id).unwrap()).collect();
    pieces.extend(decoder.finish().unwrap());
    assert_eq!(pieces.concat(), found.tokenizer.decode(ids, false).unwrap());
}

#[test]
fn streams_emit_whole_characters_and_the_whole_text() {
    let found = TokenizerAssets::from_tokenizer(bytes_and(&["</s>"])).unwrap();
    let text = "naïve 日本語 👩‍👩‍👧 \u{FFFD} e\u{301} </s> end";
    let ids = found.tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    check_stream(&found, &ids);
    let mut decoder = StreamDecoder::new(&found.tokenizer, true);
    let four = found.tokenizer.encode("👩", false).unwrap().get_ids().to_vec();
    let pieces: Vec<_> = four.iter().map(|id| decoder.push(*id).unwrap()).collect();
    assert_eq!(pieces, [None, None, None, Some("👩".to_owned())]);
    assert_eq!(decoder.push(found.eos_token_ids[0]).unwrap(), None, "special tokens have no text here");
    assert_eq!(decoder.push(u32::MAX).unwrap(), None, "nor have ids that no token has");
    assert_eq!(decoder.finish().unwrap(), None);
}

#[test]
fn streams_of_bytes_that_form_no_characters_still_flow() {
    let found = TokenizerAssets::from_tokenizer(bytes_and(&[])).unwrap();
    let seed = fresh_seed();
    for round in 0..50 {
        let ids: Vec<u32> = (0..40).map(|i| (mix64(seed ^ (round * 64 + i)) % 256) as u32).collect();
        let mut decoder = StreamDecoder::new(&found.tokenizer, false);
        let (mut pieces, mut silent) = (String::new(), 0);
        for id in &ids {
            let piece = decoder.push(*id).unwrap();
            silent = if piece.is_some() { 0 } else { silent + 1 };
            assert!(silent < 8, "nothing came out for {silent} tokens");
            pieces.extend(piece);
        }
        pieces.extend(decoder.finish().unwrap());
        // Where a run of broken bytes is cut decides how many U+FFFD stand for it; sound characters are all there.
        let sound = |text: &str| text.chars().filter(|c| *c != '\u{FFFD}').collect::<String>();
        let whole = found.tokenizer.decode(&ids, false).unwrap();
        assert_eq!(sound(&pieces), sound(&whole));
    }
}

#[test]
fn sentencepiece_vocabularies_merge_by_score_and_fall_back_to_bytes() {
    let mut tokens: Vec<(String, f32, i32)> =
        [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)].map(|(t, s, k)| (t.to_owned(), s, k)).to_vec();
    tokens.extend((0..=255).map(|b| (format!("<0x{b:02X}>"), 0.0, 6)));
    let pieces = [("\u{2581}", -9.0), ("a", -8.0), ("b", -7.0), ("c", -6.0), ("bc", -1.0), ("ab", -2.0)];
    tokens.extend(pieces.map(|(t, s)| (t.to_owned(), s, 1)));
    // As in Llama 2: runs of spaces come last of all, whatever their ids.
    tokens.push(("\u{2581}\u{2581}".into(), -1e9, 1));
    tokens.push(("\u{2581}a".into(), -3.0, 1));
    let mut file = GgufFile::default();
    file.key("tokenizer.ggml.model", Value::Text("llama".into()));
    file.key("tokenizer.ggml.tokens", Value::Texts(tokens.iter().map(|t| t.0.clone()).collect()));
    file.key("tokenizer.ggml.scores", Value::F32s(tokens.iter().map(|t| t.1).collect()));
    file.key("tokenizer.ggml.token_type", Value::I32s(tokens.iter().map(|t| t.2).collect()));
    file.key("tokenizer.ggml.bos_token_id", Value::U32(1)).key("tokenizer.ggml.eos_token_id", Value::U32(2));
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("t.gguf"), file.bytes()).unwrap();
    let found = tokenizer::load(folder.path()).unwrap();
    let tokens = |text: &str| found.tokenizer.encode(text, true).unwrap().get_tokens().to_vec();
    // "bc" has a better score than "ab"; a space goes in front, a start token before it.
    assert_eq!(tokens("abc"), ["<s>", "\u{2581}a", "bc"]);
    assert_eq!(tokens("é b"), ["<s>", "\u{2581}", "<0xC3>", "<0xA9>", "\u{2581}", "b"]);
    assert_eq!(tokens(" a   b"), ["<s>", "\u{2581}", "\u{2581}a", "\u{2581}\u{2581}", "\u{2581}", "b"]);
    assert_eq!(tokens("b</s>"), ["<s>", "\u{2581}", "b", "</s>"]);
    assert!(found.add_bos);
    let ids = found.tokenizer.encode("ab é c", false).unwrap().get_ids().to_vec();
    assert_eq!(found.tokenizer.decode(&ids, true).unwrap(), "ab é c");
    check_stream(&found, &ids);
}

#[test]
fn the_frame_and_the_words_of_a_byte_level_vocabulary_are_kept() {
    let mut tokens: Vec<String> = vec!["<|begin_of_text|>".into(), "<|end_of_text|>".into(), "<|eot_id|>".into()];
    let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort();
    tokens.extend(alphabet);
    tokens.extend(["12", "123", "\u{120}1"].map(str::to_owned));
    let kinds = (0..tokens.len()).map(|i| if i < 3 { 3 } else { 1 }).collect();
    let mut file = GgufFile::default();
    file.key("tokenizer.ggml.model", Value::Text("gpt2".into()));
    file.key("tokenizer.ggml.tokens", Value::Texts(tokens));
    file.key("tokenizer.ggml.token_type", Value::I32s(kinds));
    file.key("tokenizer.ggml.merges", Value::Texts(["\u{120} 1", "1 2", "12 3"].map(str::to_owned).to_vec()));
    file.key("tokenizer.ggml.bos_token_id", Value::U32(0)).key("tokenizer.ggml.eos_token_id", Value::U32(1));
    file.key("tokenizer.ggml.eot_token_id", Value::U32(2));
    let folder = tempfile::tempdir().unwrap();
    let load = |pre: &str| {
        let mut file = file.clone();
        file.key("tokenizer.ggml.pre", Value::Text(pre.into()));
        std::fs::write(folder.path().join("t.gguf"), file.bytes()).unwrap();
        tokenizer::load(folder.path())
    };
    let check = |pre: &str, expected: &[&str]| {
        let found = load(pre).unwrap();
        assert_eq!(found.tokenizer.encode("1234 12", true).unwrap().get_tokens(), expected, "{pre}");
        assert_eq!(found.eos_token_ids, [1, 2]);
        found
    };
    assert!(!check("gpt-2", &["123", "4", "\u{120}1", "2"]).add_bos);
    check("smollm", &["1", "2", "3", "4", "\u{120}", "1", "2"]);
    check("qwen2", &["1", "2", "3", "4", "\u{120}", "1", "2"]);
    assert!(check("llama-bpe", &["<|begin_of_text|>", "123", "4", "\u{120}", "12"]).add_bos);
    let message = load("tekken").unwrap_err().to_string();
    assert!(message.contains("cuts words as tekken; supported are default, gpt-2"), "{message}");
}

#[test]
fn smollm2_streams_its_own_text() {
    let Some(path) = smollm2() else { return };
    let found = tokenizer::load(&path).unwrap();
    assert_eq!(found.vocab_size(), 49152);
    assert_eq!((found.bos_token_id, &found.eos_token_ids[..], found.add_bos), (Some(1), &[2][..], false));
    assert!(found.chat_template.as_ref().unwrap().contains("SmolLM"));
    let text = "fn main() { println!(\"12 日本 🦀\"); }\n<|im_end|>";
    check_stream(&found, found.tokenizer.encode(text, true).unwrap().get_ids());
}

#[test]
fn one_of_several_chat_templates_is_chosen_by_its_name() {
    let load = |files: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), bytes_and(&["</s>"]).to_string(false).unwrap()).unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        tokenizer::load(folder.path()).unwrap()
    };
    let choose = |found: &TokenizerAssets, name: &str| {
        let choice = TemplateChoice { file: None, name: Some(name) };
        ChatTemplate::choose(choice, found).map(|t| t.unwrap().text().to_owned()).map_err(|e| e.to_string())
    };
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    let listed = load(&[("tokenizer_config.json", list)]);
    assert_eq!((choose(&listed, "tool_use").unwrap(), choose(&listed, "default").unwrap()), ("t".into(), "d".into()));
    assert_eq!(ChatTemplate::choose(TemplateChoice::default(), &listed).unwrap().unwrap().text(), "d");
    let refused = |found: &TokenizerAssets, name: &str, why: &str| {
        let said = choose(found, name).unwrap_err();
        let expected =
            format!("`data.chat_template_name` = \"{name}\": the tokenizer has no chat template of that name; {why}");
        assert_eq!(said, expected);
    };
    refused(&listed, "tools", "it has default, tool_use");
    // As files of their own, and the tokenizer's own is the default.
    let filed = load(&[("chat_template.jinja", "own"), ("additional_chat_templates/rag.jinja", "r")]);
    assert_eq!((choose(&filed, "rag").unwrap(), choose(&filed, "default").unwrap()), ("r".into(), "own".into()));
    let single = load(&[("chat_template.jinja", "own")]);
    refused(&single, "default", "it has one, without a name: remove `data.chat_template_name`");
    refused(&load(&[]), "default", "it has none: set `data.chat_template` to a file with one");
}
