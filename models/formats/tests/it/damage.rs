//! Files that were cut short, overwritten or made up: an error or values, never a panic, whatever the bytes.

use crate::common::{GgufFile, Value, gguf_model, spec, write_model};
use proptest::prelude::*;
use std::path::Path;
use std::sync::LazyLock;
use tangelo_configs::model::Family;
use tangelo_core::DType;
use tangelo_formats::{Weights, tokenizer};

/// A sound GGUF file with a vocabulary, and how many of its bytes come before the tensors.
static GGUF: LazyLock<(Vec<u8>, usize)> = LazyLock::new(|| {
    let mut file = gguf_model(&spec(Family::Llama, true, 21), 21);
    byte_level_vocabulary(&mut file);
    let tensors: usize = file.tensors.iter().map(|t| t.3.len()).sum();
    let bytes = file.bytes();
    let header = bytes.len() - tensors;
    (bytes, header)
});

/// A sound folder: config.json and model.safetensors.
static SAFETENSORS: LazyLock<(tempfile::TempDir, Vec<u8>, usize)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), &spec(Family::Qwen3, true, 22), DType::BF16, u64::MAX, None, 22);
    let bytes = std::fs::read(folder.path().join("model/model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (folder, bytes, header)
});

fn byte_level_vocabulary(file: &mut GgufFile) {
    let tokens = ["<|endoftext|>", "a", "b", "ab", "\u{120}", "\u{120}a"].map(str::to_owned).to_vec();
    file.key("tokenizer.ggml.model", Value::Text("gpt2".into()));
    file.key("tokenizer.ggml.pre", Value::Text("smollm".into()));
    file.key("tokenizer.ggml.tokens", Value::Texts(tokens));
    file.key("tokenizer.ggml.token_type", Value::I32s(vec![3, 1, 1, 1, 1, 1]));
    file.key("tokenizer.ggml.merges", Value::Texts(vec!["a b".into(), "\u{120} a".into()]));
}

/// Opens a model and reads all of it; what comes of it does not matter.
fn read(path: &Path) -> Option<String> {
    match Weights::open(path) {
        Err(error) => Some(error.to_string()),
        Ok(weights) => {
            for meta in weights.metas() {
                let mut out = vec![0.0; meta.num_elements()];
                weights.read_f32(&meta.name, 0..meta.shape[0], &mut out).unwrap();
            }
            None
        }
    }
}

fn read_gguf(bytes: &[u8]) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    if let Ok(tokenizer) = tokenizer::load(&path) {
        tokenizer.tokenizer.encode("ab a1 \u{e9}", true).unwrap();
    }
    read(&path)
}

fn read_safetensors(bytes: &[u8]) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let config = SAFETENSORS.0.path().join("model/config.json");
    std::fs::copy(config, folder.path().join("config.json")).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    read(folder.path())
}

fn flipped(bytes: &[u8], flips: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for &(at, mask) in flips {
        let at = at % bytes.len();
        bytes[at] ^= mask;
    }
    bytes
}

#[test]
fn sound_files_read() {
    assert_eq!(read_gguf(&GGUF.0), None);
    assert_eq!(read_safetensors(&SAFETENSORS.1), None);
}

#[test]
fn lengths_that_overflow_are_refused() {
    let with = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        read_safetensors(&bytes).unwrap()
    };
    let huge = r#"{"model.norm.weight":{"dtype":"F64","shape":[4294967296,4294967296,2],"data_offsets":[0,0]}}"#;
    assert!(with(huge).contains("has 0 bytes"), "{}", with(huge));
    let far = r#"{"model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#;
    assert!(with(far).contains("lies at bytes 0..18446744073709551615"), "{}", with(far));
    let backwards = r#"{"model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#;
    assert!(with(backwards).contains("lies at bytes 8..0"), "{}", with(backwards));
    assert!(with(r#"{"x":[]}"#).contains("entry of tensor x"));
    assert!(with("{").contains("not JSON"));
    assert!(read_safetensors(&u64::MAX.to_le_bytes()).unwrap().contains("give a header of 18446744073709551615"));

    let mut counts = GGUF.0.clone();
    counts[8..24].fill(0xFF);
    assert!(read_gguf(&counts).unwrap().contains("cut short"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn a_file_cut_short_is_refused(part in 0.0f64..1.0, in_header in any::<bool>()) {
        let cut = |bytes: &[u8], header: usize| {
            let length = if in_header { header } else { bytes.len() };
            bytes[..(length as f64 * part) as usize].to_vec()
        };
        let gguf = read_gguf(&cut(&GGUF.0, GGUF.1));
        prop_assert!(gguf.is_some_and(|m| m.contains("model.gguf")));
        let safetensors = read_safetensors(&cut(&SAFETENSORS.1, SAFETENSORS.2));
        prop_assert!(safetensors.is_some_and(|m| m.contains("cut short")));
    }

    #[test]
    fn flipped_bytes_in_a_header_do_no_harm(
        flips in proptest::collection::vec((any::<usize>(), 1u8..=255), 1..4), from in 0.0f64..1.0,
    ) {
        let within = |header: usize| -> Vec<(usize, u8)> {
            // Half of the flips fall behind a random place, so that deep parts are reached with what is before intact.
            let first = (header as f64 * from) as usize;
            flips.iter().map(|&(at, mask)| (first + at % (header - first).max(1), mask)).collect()
        };
        read_gguf(&flipped(&GGUF.0, &within(GGUF.1)));
        read_safetensors(&flipped(&SAFETENSORS.1, &within(SAFETENSORS.2)));
    }

    #[test]
    fn made_up_bytes_do_no_harm(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut gguf = b"GGUF\x03\0\0\0".to_vec();
        gguf.extend(&tail);
        prop_assert!(read_gguf(&gguf).is_some());
        prop_assert!(read_safetensors(&tail).is_some());
    }
}
