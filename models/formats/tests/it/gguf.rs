//! GGUF models: names, row order, architecture, and what is refused.

use crate::common::{GgufFile, Value, fresh_seed, gguf_model, read_all, spec, values};
use std::path::PathBuf;
use tangelo_configs::model::Family;
use tangelo_configs::{MixerSpec, ModelSpec, RopeScaling};
use tangelo_core::DType;
use tangelo_core::hash::hash_bytes;
use tangelo_formats::{Encoding, Weights};

const FAMILIES: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

fn write(file: &GgufFile) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    (folder, path)
}

fn refused(file: &GgufFile, expected: &str) {
    let message = Weights::open(&write(file).1).unwrap_err().to_string();
    assert!(message.contains(expected), "{message}\nlacks {expected}");
}

/// The attention of block 0, to be changed.
fn attention(spec: &mut ModelSpec) -> &mut tangelo_configs::AttentionSpec {
    let MixerSpec::Attention(a) = &mut spec.blocks[0].mixer;
    a
}

#[test]
fn every_family_reads_back_under_hugging_faces_names_and_order() {
    let seed = fresh_seed();
    for (family, tied) in FAMILIES.into_iter().zip([true, false, true, false]) {
        let spec = spec(family, tied, seed);
        let (folder, path) = write(&gguf_model(&spec, seed));
        for path in [path.as_path(), folder.path()] {
            let weights = Weights::open(path).unwrap();
            assert_eq!(*weights.spec(), spec);
            for meta in spec.parameters(DType::F32) {
                let expected = values(seed, &meta.name, 0..meta.num_elements());
                assert_eq!(read_all(&weights, &meta.name), expected, "{family:?} {}", meta.name);
            }
        }
    }
}

#[test]
fn any_range_of_permuted_rows_is_right() {
    let seed = fresh_seed();
    let spec = spec(Family::Llama, true, seed);
    let (_folder, path) = write(&gguf_model(&spec, seed));
    let weights = Weights::open(&path).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    for start in 0..32 {
        for end in start..=32 {
            let mut out = vec![f32::NAN; (end - start) * 32];
            weights.read_f32(name, start..end, &mut out).unwrap();
            assert_eq!(out, values(seed, name, start * 32..end * 32), "{start}..{end}");
        }
    }
}

#[test]
fn quantised_rows_alone_are_rows_of_the_whole() {
    let seed = fresh_seed();
    let spec = spec(Family::Llama, true, seed);
    for (kind, encoding) in [(8, Encoding::Q8_0), (2, Encoding::Q4_0), (3, Encoding::Q4_1)] {
        let mut file = gguf_model(&spec, seed);
        for (name, shape, number, bytes) in file.tensors.iter_mut().filter(|t| t.1.len() == 2) {
            let blocks = shape.iter().product::<usize>() / 32;
            *number = kind;
            // Any bytes are valid blocks; a small scale keeps clear of NaN and infinity.
            *bytes = (0..blocks * encoding.block_bytes()).map(|i| random_byte(seed, name, i, encoding)).collect();
        }
        let (_folder, path) = write(&file);
        let weights = Weights::open(&path).unwrap();
        for meta in weights.metas().iter().filter(|m| m.shape.len() == 2) {
            assert_eq!(weights.encoding(&meta.name), Some(encoding));
            let (whole, width) = (read_all(&weights, &meta.name), meta.shape[1]);
            let middle = meta.shape[0] / 3..meta.shape[0] / 2;
            let mut out = vec![f32::NAN; middle.len() * width];
            weights.read_f32(&meta.name, middle.clone(), &mut out).unwrap();
            assert_eq!(out, whole[middle.start * width..middle.end * width], "{}", meta.name);
        }
    }
}

fn random_byte(seed: u64, name: &str, i: usize, encoding: Encoding) -> u8 {
    let byte = hash_bytes(seed ^ i as u64, name.as_bytes()) as u8;
    let halves = if encoding == Encoding::Q4_1 { 4 } else { 2 };
    let at = i % encoding.block_bytes();
    // The high byte of a half: an exponent field below 31.
    if at < halves && at % 2 == 1 { byte & 0xBB } else { byte }
}

#[test]
fn llama_3_stretching_is_recovered_from_its_factors() {
    let mut spec = spec(Family::Llama, true, 5);
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    for block in &mut spec.blocks {
        let MixerSpec::Attention(a) = &mut block.mixer;
        (a.rope.theta, a.rope.scaling, a.head_dim) = (500_000.0, Some(scaling), 64);
    }
    let mut file = gguf_model(&spec, 5);
    // As llama.cpp's converter computes them, from the published formula in terms of wavelengths.
    let (low, high) = (8192.0, 8192.0 / 4.0);
    let factors = (0..32).map(|i| {
        let wavelength = std::f64::consts::TAU * 500_000f64.powf(2.0 * f64::from(i) / 64.0);
        let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
        let between = 1.0 / ((1.0 - smooth) / 32.0 + smooth);
        (if wavelength < high {
            1.0
        } else if wavelength > low {
            32.0
        } else {
            between
        }) as f32
    });
    let factors: Vec<f32> = factors.collect();
    file.tensor_f32("rope_freqs.weight", &[32], &factors);
    assert_eq!(*Weights::open(&write(&file).1).unwrap().spec(), spec);

    let last = file.tensors.len() - 1;
    file.tensors.remove(last);
    file.tensor_f32("rope_freqs.weight", &[32], &factors.iter().map(|f| f.sqrt()).collect::<Vec<_>>());
    refused(&file, "not Llama 3.1's kind of stretching");

    file.tensors.remove(last);
    file.key("llama.rope.scaling.type", Value::Text("linear".into())).key("llama.rope.scaling.factor", Value::F32(4.0));
    for block in &mut spec.blocks {
        let MixerSpec::Attention(a) = &mut block.mixer;
        a.rope.scaling = Some(RopeScaling::Linear { factor: 4.0 });
    }
    assert_eq!(*Weights::open(&write(&file).1).unwrap().spec(), spec);
    file.key("llama.rope.scaling.type", Value::Text("yarn".into()));
    refused(&file, "llama.rope.scaling.type is yarn; supported are none and linear");
}

#[test]
fn what_is_not_supported_is_named_with_what_is() {
    let spec = spec(Family::Llama, true, 9);
    let file = gguf_model(&spec, 9);
    let with = |key: &str, value: Value| {
        let mut file = file.clone();
        file.key(key, value);
        file
    };
    refused(&with("general.architecture", Value::Text("bert".into())), "architecture is bert; supported are llama");
    refused(&with("llama.expert_count", Value::U32(8)), "mixture of 8 experts");
    refused(&with("split.count", Value::U32(2)), "llama-gguf-split --merge");
    refused(&with("general.alignment", Value::U32(3)), "general.alignment is no power of two");
    refused(&with("llama.attention.head_count_kv", Value::I32s(vec![2, 4])), "differs between layers");
    refused(&with("llama.rope.dimension_count", Value::U32(4)), "4 of them rotated");
    refused(&with("llama.embedding_length", Value::Bool(true)), "expected a non-negative integer");
    let mut quantised = file.clone();
    quantised.tensors[1].2 = 14;
    refused(&quantised, "model.layers.0.input_layernorm.weight is of type Q6_K (ggml type 14); supported are F64, F32");
    let mut ragged = file.clone();
    ragged.tensors[1].2 = 8;
    ragged.tensors[1].1 = vec![31];
    refused(&ragged, "no whole blocks");
    let mut keyless = file;
    keyless.keys.remove("llama.block_count");
    refused(&keyless, "key llama.block_count is missing");
}

#[test]
fn old_new_and_foreign_files_are_told_apart() {
    let spec = spec(Family::Llama, true, 9);
    let good = gguf_model(&spec, 9).bytes();
    let (folder, path) = write(&GgufFile::default());
    let check = |version: [u8; 4], expected: Option<&str>| {
        let mut bytes = good.clone();
        bytes[4..8].copy_from_slice(&version);
        std::fs::write(&path, bytes).unwrap();
        let message = Weights::open(folder.path()).err().map(|e| e.to_string());
        assert!(message.as_deref().is_none_or(|m| expected.is_some_and(|e| m.contains(e))), "{message:?}");
        assert_eq!(message.is_some(), expected.is_some());
    };
    check([2, 0, 0, 0], None);
    check([1, 0, 0, 0], Some("version 1; versions 2 and 3 are supported"));
    check([0, 0, 0, 3], Some("big-endian"));
    std::fs::write(&path, b"PK\x03\x04 and so on").unwrap();
    let message = Weights::open(&path).unwrap_err().to_string();
    assert!(message.contains("a GGUF file starts with \"GGUF\""), "{message}");
    std::fs::write(folder.path().join("second.gguf"), b"").unwrap();
    let message = Weights::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("several GGUF files"), "{message}");
}

#[test]
fn heads_that_differ_from_the_architecture_are_a_mismatch() {
    let mut spec = spec(Family::Llama, true, 11);
    attention(&mut spec).num_kv_heads = 2;
    let mut file = gguf_model(&spec, 11);
    file.key("llama.attention.head_count", Value::U32(8));
    refused(&file, "self_attn.q_proj.weight: shape [32, 32], expected [64, 32]");
}
