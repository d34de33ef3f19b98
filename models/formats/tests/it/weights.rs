//! Reading Hugging Face folders, written by the `safetensors` crate.

use crate::common::{fresh_seed, read_all, spec, values};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::collections::HashMap;
use std::path::Path;
use tangelo_configs::model::{EMBEDDING, Family, LM_HEAD};
use tangelo_configs::{ModelSpec, hf_config};
use tangelo_core::DType;
use tangelo_formats::{FormatError, Weights};

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}

fn rounded(dtype: Dtype, values: Vec<f32>) -> Vec<f32> {
    values
        .into_iter()
        .map(|v| match dtype {
            Dtype::F16 => f16::from_f32(v).to_f32(),
            Dtype::BF16 => bf16::from_f32(v).to_f32(),
            _ => v,
        })
        .collect()
}

fn tensors(spec: &ModelSpec, dtype: Dtype, seed: u64) -> Tensors {
    let parameters = spec.parameters(DType::F32).into_iter();
    let tensor = |meta: tangelo_core::ParamMeta| {
        let bytes = encode(dtype, &values(seed, &meta.name, 0..meta.num_elements()));
        (meta.name, dtype, meta.shape, bytes)
    };
    parameters.map(tensor).collect()
}

fn write_shard(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn write_folder(folder: &Path, spec: &ModelSpec, tensors: &Tensors, shards: usize) {
    std::fs::write(folder.join("config.json"), hf_config::to_json(spec, DType::F32).to_string()).unwrap();
    if shards == 1 {
        return write_shard(&folder.join("model.safetensors"), tensors);
    }
    let mut map = HashMap::new();
    for (i, held) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        map.extend(held.iter().map(|t| (t.0.clone(), name.clone())));
        write_shard(&folder.join(name), &held.to_vec());
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn folders_of_every_type_and_sharding_read_back() {
    let seed = fresh_seed();
    let families = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];
    for (i, dtype) in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().enumerate() {
        let spec = spec(families[i], i % 2 == 0, seed);
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &spec, &tensors(&spec, dtype, seed), 1 + i);
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(*weights.spec(), spec);
        let names: Vec<_> = weights.metas().iter().map(|m| m.name.clone()).collect();
        assert_eq!(names, spec.parameters(DType::F32).into_iter().map(|m| m.name).collect::<Vec<_>>());
        for meta in weights.metas() {
            assert_eq!(meta.dtype.to_string(), format!("{dtype:?}"));
            let expected = rounded(dtype, values(seed, &meta.name, 0..meta.num_elements()));
            assert_eq!(read_all(&weights, &meta.name), expected, "{}", meta.name);
        }
    }
}

#[test]
fn rows_alone_are_rows_of_the_whole() {
    let seed = fresh_seed();
    let spec = spec(Family::Llama, true, seed);
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &spec, &tensors(&spec, Dtype::BF16, seed), 1);
    let weights = Weights::open(folder.path()).unwrap();
    let whole = read_all(&weights, EMBEDDING);
    for rows in [0..1, 5..9, 90..96, 7..7] {
        let mut out = vec![f32::NAN; rows.len() * 32];
        weights.read_f32(EMBEDDING, rows.clone(), &mut out).unwrap();
        assert_eq!(out, whole[rows.start * 32..rows.end * 32]);
    }
    let refused = |name: &str, rows, len| {
        let error = weights.read_f32(name, rows, &mut vec![0.0; len]).unwrap_err();
        assert!(matches!(error, FormatError::Request { .. }), "{error}");
    };
    refused("no.such", 0..1, 32);
    refused(EMBEDDING, 0..1, 31);
    refused(EMBEDDING, spec.vocab_size..spec.vocab_size + 1, 32);
    #[expect(clippy::reversed_empty_ranges)]
    refused(EMBEDDING, 3..2, 0);
}

#[test]
fn every_mismatch_is_named_at_once() {
    let seed = 1;
    let spec = spec(Family::Qwen2, false, seed);
    let mut tensors = tensors(&spec, Dtype::F32, seed);
    let missing = tensors.remove(0).0;
    tensors[0].2 = vec![4, 8];
    let misshapen = tensors[0].0.clone();
    tensors.push(("model.extra".into(), Dtype::F32, vec![1], vec![0; 4]));
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &spec, &tensors, 2);
    let message = Weights::open(folder.path()).unwrap_err().to_string();
    for part in [
        format!("missing: {missing} of shape [{}, 32]", spec.vocab_size),
        format!("{misshapen}: shape [4, 8], expected [32]"),
        "unexpected: model.extra of shape [1]".into(),
    ] {
        assert!(message.contains(&part), "{message}\nlacks {part}");
    }
}

#[test]
fn what_is_derived_may_be_there_or_not() {
    let seed = fresh_seed();
    let spec = spec(Family::Llama, true, seed);
    let plain = tensors(&spec, Dtype::F32, seed);
    let mut stored = plain.clone();
    stored.push((LM_HEAD.into(), Dtype::F32, plain[0].2.clone(), plain[0].3.clone()));
    stored.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), Dtype::F32, vec![4], vec![0; 16]));
    let mut only_head = plain.clone();
    only_head[0].0 = LM_HEAD.into();
    for tensors in [plain, stored, only_head] {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &spec, &tensors, 1);
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(weights.metas().len(), spec.parameters(DType::F32).len());
        assert_eq!(read_all(&weights, EMBEDDING), values(seed, EMBEDDING, 0..spec.vocab_size * 32));
    }
}

#[test]
fn types_that_cannot_be_read_are_named_with_those_that_can() {
    let spec = spec(Family::Llama, true, 3);
    let mut tensors = tensors(&spec, Dtype::F32, 3);
    let last = tensors.len() - 1;
    tensors[last] = (tensors[last].0.clone(), Dtype::I8, tensors[last].2.clone(), vec![0; 32]);
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &spec, &tensors, 1);
    let message = Weights::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("model.norm.weight is of type I8; supported are F64, F32, F16, BF16"), "{message}");
}

#[test]
fn places_without_a_model_say_what_was_expected() {
    let folder = tempfile::tempdir().unwrap();
    let check = |expected: &str| {
        let message = Weights::open(folder.path()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    check("holds no weights; expected a folder with config.json and model.safetensors");
    std::fs::write(folder.path().join("pytorch_model.bin"), b"").unwrap();
    check("pytorch_model.bin is not read");
    std::fs::write(folder.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../b"}}"#).unwrap();
    check("gives tensor a no name of a file beside it");
    std::fs::write(folder.path().join("model.safetensors"), [0; 8]).unwrap();
    check("config.json");
    let message = Weights::open(&folder.path().join("absent")).unwrap_err().to_string();
    assert!(message.contains("does not exist"), "{message}");
}
