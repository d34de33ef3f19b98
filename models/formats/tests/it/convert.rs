//! Writing Hugging Face folders.

use crate::common::{fresh_seed, gguf_model, read_all, spec, values, write_model};
use half::{bf16, f16};
use safetensors::SafeTensors;
use std::path::Path;
use tangelo_configs::ModelSpec;
use tangelo_configs::model::{EMBEDDING, Family, LM_HEAD};
use tangelo_core::DType;
use tangelo_formats::{FormatError, HfWriter, Weights, writer};

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_safetensors_crate_reads_what_is_written_bit_for_bit() {
    let seed = fresh_seed();
    let folder = tempfile::tempdir().unwrap();
    for (dtype, tied) in [(DType::F32, true), (DType::BF16, false), (DType::F16, true), (DType::F64, false)] {
        let spec = spec(Family::Qwen2, tied, seed);
        let target = folder.path().join(dtype.to_string());
        write_model(&target, &spec, dtype, u64::MAX, None, seed);
        assert_eq!(names(&target), ["config.json", "generation_config.json", "model.safetensors"]);
        let bytes = std::fs::read(target.join("model.safetensors")).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor(LM_HEAD).is_ok(), !tied);
        assert_eq!(tensors.len(), spec.parameters(dtype).len());
        for meta in spec.parameters(dtype) {
            let tensor = tensors.tensor(&meta.name).unwrap();
            assert_eq!((format!("{:?}", tensor.dtype()), tensor.shape()), (dtype.to_string(), &meta.shape[..]));
            let values = values(seed, &meta.name, 0..meta.num_elements());
            let expected: Vec<u8> = match dtype {
                DType::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
                DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            };
            assert_eq!(tensor.data(), expected, "{}", meta.name);
        }
    }
}

#[test]
fn shards_hold_at_most_what_was_asked_and_an_index_names_them() {
    let seed = fresh_seed();
    let spec = spec(Family::Llama, false, seed);
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model");
    let most = 9000;
    write_model(&target, &spec, DType::BF16, most, None, seed);
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(target.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 2 * spec.num_parameters());
    let shards: Vec<_> = names(&target).into_iter().filter(|n| n.ends_with(".safetensors")).collect();
    let count = shards.len();
    assert!(count > 2);
    for (i, name) in shards.iter().enumerate() {
        assert_eq!(*name, format!("model-{:05}-of-{count:05}.safetensors", i + 1));
        let bytes = std::fs::read(target.join(name)).unwrap();
        let shard = SafeTensors::deserialize(&bytes).unwrap();
        let held: usize = shard.tensors().iter().map(|(_, t)| t.data().len()).sum();
        assert!(held as u64 <= most || shard.len() == 1, "{name}: {held} bytes in {} tensors", shard.len());
        assert!(shard.names().iter().all(|n| index["weight_map"][n] == *name));
    }
    let weights = Weights::open(&target).unwrap();
    assert_eq!(*weights.spec(), spec);
    let expected: Vec<f32> = values(seed, EMBEDDING, 0..spec.vocab_size * 32);
    let expected: Vec<f32> = expected.into_iter().map(|v| bf16::from_f32(v).to_f32()).collect();
    assert_eq!(read_all(&weights, EMBEDDING), expected);
}

#[test]
fn gguf_becomes_a_folder_of_the_same_values() {
    let seed = fresh_seed();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for family in [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3] {
        let spec = spec(family, true, seed);
        std::fs::write(&path, gguf_model(&spec, seed).bytes()).unwrap();
        let target = folder.path().join(format!("{family:?}"));
        writer::convert(&Weights::open(&path).unwrap(), &target, DType::F32, u64::MAX, None).unwrap();
        let weights = Weights::open(&target).unwrap();
        assert_eq!(*weights.spec(), spec);
        for meta in weights.metas() {
            assert_eq!(read_all(&weights, &meta.name), values(seed, &meta.name, 0..meta.num_elements()));
        }
    }
}

fn start(target: &Path, spec: &ModelSpec) -> Result<HfWriter, FormatError> {
    HfWriter::create(target, spec, DType::F16, u64::MAX, None)
}

#[test]
fn what_is_there_is_kept_and_what_is_unfinished_goes() {
    let spec = spec(Family::Llama, true, 1);
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model");
    std::fs::create_dir(&target).unwrap();

    let writer = start(&target, &spec).unwrap();
    assert_eq!(names(folder.path()), [".model.lock", ".model.partial", "model"]);
    let second = start(&target, &spec).unwrap_err().to_string();
    assert!(second.contains("belongs to a running export"), "{second}");
    let missing = writer.finish().unwrap_err().to_string();
    assert!(missing.contains("was never written to"), "{missing}");
    assert_eq!(names(folder.path()), ["model"], "an unfinished model leaves nothing behind");

    // What a killed writer leaves: the hidden folder, unlocked.
    let partial = folder.path().join(".model.partial");
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("model.safetensors"), b"half").unwrap();
    write_model(&target, &spec, DType::F16, u64::MAX, None, 1);
    assert_eq!(names(folder.path()), ["model"]);

    let occupied = start(&target, &spec).unwrap_err().to_string();
    assert!(occupied.contains("already exists and is not empty; choose another path"), "{occupied}");
    std::fs::write(folder.path().join("file"), b"").unwrap();
    assert!(matches!(start(&folder.path().join("file"), &spec), Err(FormatError::Occupied { .. })));
    Weights::open(&target).unwrap();
}

#[test]
fn of_writers_to_one_folder_one_wins_and_none_harms_it() {
    let spec = spec(Family::Llama, true, 1);
    let folder = tempfile::tempdir().unwrap();
    for round in 0..10 {
        let target = folder.path().join(format!("model-{round}"));
        let convert = || -> Result<(), FormatError> {
            let mut writer = start(&target, &spec)?;
            for meta in spec.parameters(DType::F32) {
                writer.write_f32(&meta.name, &mut |_, out| {
                    out.fill(1.0);
                    Ok(())
                })?;
            }
            writer.finish()
        };
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(convert)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1, "{results:?}");
        assert!(results.iter().all(|r| matches!(r, Ok(()) | Err(FormatError::Occupied { .. }))), "{results:?}");
        assert_eq!(read_all(&Weights::open(&target).unwrap(), EMBEDDING)[..3], [1.0; 3]);
    }
    assert_eq!(names(folder.path()).len(), 10, "no lock and no unfinished folder is left");
}

#[test]
fn suppliers_names_and_values_that_do_not_fit_are_refused() {
    let spec = spec(Family::Llama, true, 1);
    let folder = tempfile::tempdir().unwrap();
    let mut writer = start(&folder.path().join("model"), &spec).unwrap();
    let mut refused = |name: &str, value: f32, expected: &str| {
        let fill = &mut |_, out: &mut [f32]| {
            out.fill(value);
            if value == 7.0 { Err("the supplier is out of stock".into()) } else { Ok(()) }
        };
        let result = writer.write_f32(name, fill);
        let message = result.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(expected), "{message}");
    };
    refused(LM_HEAD, 0.0, "has no such parameter");
    refused(EMBEDDING, 7.0, "tensor model.embed_tokens.weight: the supplier is out of stock");
    refused(EMBEDDING, 7e4, "70000 is too large for F16 (at most 65504)");
    refused(EMBEDDING, f32::INFINITY, "");
    refused(EMBEDDING, 0.0, "was written before");
    let error = HfWriter::create(&folder.path().join("x"), &spec, DType::I32, 1, None).unwrap_err().to_string();
    assert!(error.contains("weights of type I32; expected a float type"), "{error}");
}
