//! config.json read and written, against transformers itself where it is installed.

use expect_test::{Expect, expect};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use tangelo_configs::hf_config::{from_json, generation_config, to_json};
use tangelo_configs::{AttentionSpec, HeadSpec, MixerSpec, ModelSpec, RopeScaling, flavors};
use tangelo_core::DType;

fn attention(spec: &ModelSpec, layer: usize) -> AttentionSpec {
    let MixerSpec::Attention(a) = &spec.blocks[layer].mixer;
    *a
}

fn attention_mut(spec: &mut ModelSpec, layer: usize) -> &mut AttentionSpec {
    let MixerSpec::Attention(a) = &mut spec.blocks[layer].mixer;
    a
}

/// Every flavor, and what no flavor has: biases, linear scaling, windows on some layers, several ends of text.
fn specs() -> Vec<(String, ModelSpec)> {
    let flavors = flavors().unwrap();
    let mut specs: Vec<_> = flavors.iter().map(|f| (f.name.to_owned(), f.spec(512).unwrap())).collect();
    let named = |name: &str| specs.iter().find(|s| s.0 == name).unwrap().1.clone();
    let (mut llama, mut qwen2, mut qwen3) = (named("debugmodel"), named("qwen2.5-0.5b"), named("qwen3-0.6b"));
    for layer in 0..llama.blocks.len() {
        llama.blocks[layer].feed_forward.bias = true;
        let a = attention_mut(&mut llama, layer);
        (a.qkv_bias, a.output_bias, a.rope.scaling) = (true, true, Some(RopeScaling::Linear { factor: 4.0 }));
    }
    (llama.bos_token_id, llama.eos_token_ids) = (Some(3), vec![5, 9]);
    for layer in 20..24 {
        attention_mut(&mut qwen2, layer).sliding_window = Some(1024);
    }
    for layer in [1, 4] {
        attention_mut(&mut qwen3, layer).sliding_window = Some(512);
    }
    let mut reward = named("smollm2-135m").with_scalar_head();
    specs.push(("critic".into(), reward.clone()));
    reward.head = HeadSpec::Scalar { bias: true };
    specs.push(("reward model".into(), reward));
    specs.extend([("llama with biases".into(), llama), ("qwen2 mixed".into(), qwen2), ("qwen3 mixed".into(), qwen3)]);
    specs
}

#[test]
fn what_is_written_reads_back() {
    for (name, spec) in specs() {
        assert_eq!(from_json(&to_json(&spec, DType::BF16)).unwrap(), spec, "{name}");
    }
}

#[test]
fn old_and_new_rope_keys_mean_the_same() {
    let old = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
        "rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    });
    let mut new = old.clone();
    new.as_object_mut().unwrap().retain(|key, _| !key.starts_with("rope"));
    new["rope_parameters"] = json!({
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512
    });
    let spec = from_json(&old).unwrap();
    assert_eq!(spec, from_json(&new).unwrap());
    assert_eq!((attention(&spec, 0).num_kv_heads, attention(&spec, 1).head_dim), (4, 16));
    assert_eq!((spec.bos_token_id, &spec.eos_token_ids[..]), (Some(1), &[2][..]));
}

#[test]
fn what_cannot_be_modelled_is_refused() {
    let base = to_json(&specs()[0].1, DType::F32);
    let check = |key: &str, value: Value, expected: Expect| {
        let mut config = base.clone();
        config[key] = value;
        expected.assert_eq(&from_json(&config).unwrap_err().to_string());
    };
    check(
        "model_type",
        json!("gpt2"),
        expect![[
            r#"config.json: `model_type` is "gpt2"; expected one of llama, mistral, qwen2, qwen3 (as `model_type`), or its ...ForCausalLM architecture"#
        ]],
    );
    check(
        "architectures",
        json!(["LlamaForQuestionAnswering"]),
        expect![[r#"config.json: `architectures` is ["LlamaForQuestionAnswering"]; expected ["LlamaForCausalLM"]"#]],
    );
    check(
        "architectures",
        json!(["LlamaForSequenceClassification"]),
        expect!["config.json: `num_labels` is 2; expected 1: a reward model or critic gives one number"],
    );
    check("hidden_act", json!("gelu"), expect![[r#"config.json: `hidden_act` is "gelu"; expected "silu""#]]);
    check("hidden_size", Value::Null, expect!["config.json: `hidden_size` is absent; expected a positive integer"]);
    check(
        "num_attention_heads",
        json!("four"),
        expect![[r#"config.json: `num_attention_heads` is "four"; expected a positive integer"#]],
    );
    check(
        "rope_scaling",
        json!({"rope_type": "yarn", "factor": 4.0}),
        expect![[r#"config.json: `rope_scaling.rope_type` is "yarn"; expected "default", "linear" or "llama3""#]],
    );
    check("rope_scaling", json!({"type": "linear"}), expect!["config.json: `factor` is absent; expected a number"]);
    check(
        "quantization_config",
        json!({"quant_method": "gptq", "bits": 4}),
        expect![[
            r#"config.json: `quantization_config` is {"quant_method":"gptq","bits":4}; expected unquantised weights (or a GGUF file)"#
        ]],
    );
    check("partial_rotary_factor", json!(0.5), expect!["config.json: `partial_rotary_factor` is 0.5; expected 1.0"]);
    check(
        "eos_token_id",
        json!("</s>"),
        expect![[r#"config.json: `eos_token_id` is "</s>"; expected a token id, a list of them, or null"#]],
    );
    let mut config = to_json(&specs().pop().unwrap().1, DType::F32);
    config["layer_types"][0] = json!("chunked_attention");
    expect![[r#"config.json: `layer_types` is "chunked_attention"; expected "full_attention" or "sliding_attention""#]]
        .assert_eq(&from_json(&config).unwrap_err().to_string());
}

#[test]
fn generation_config_says_where_text_ends() {
    let (_, spec) = specs().into_iter().find(|s| s.0 == "llama with biases").unwrap();
    expect![[r#"{"_from_model_config":true,"bos_token_id":3,"eos_token_id":[5,9],"transformers_version":"5.17.0"}"#]]
        .assert_eq(&generation_config(&spec).to_string());
}

/// Loads each config.json with transformers' AutoConfig and prints what it understood.
const READER: &str = r#"
import json, sys
from transformers import AutoConfig, GenerationConfig
answers = []
for folder in sys.argv[1:]:
    c = AutoConfig.from_pretrained(folder)
    g = GenerationConfig.from_pretrained(folder)
    c.save_pretrained(folder + "/again")
    answers.append({
        "class": type(c).__name__, "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", c.hidden_size // c.num_attention_heads),
        "max_position_embeddings": c.max_position_embeddings, "rms_norm_eps": c.rms_norm_eps,
        "initializer_range": c.initializer_range, "tie_word_embeddings": c.tie_word_embeddings,
        "attention_bias": getattr(c, "attention_bias", None), "mlp_bias": getattr(c, "mlp_bias", None),
        "rope": c.rope_parameters, "bos": c.bos_token_id, "eos": c.eos_token_id, "dtype": str(c.dtype),
        "windows": [c.sliding_window if t == "sliding_attention" else None for t in c.layer_types]
            if getattr(c, "layer_types", None) else [getattr(c, "sliding_window", None)] * c.num_hidden_layers,
        "generation_eos": g.eos_token_id, "again": json.load(open(folder + "/again/config.json")),
    })
print(json.dumps(answers))
"#;

fn expected_answer(spec: &ModelSpec) -> Value {
    let a = attention(spec, 0);
    let family = format!("{:?}", spec.family);
    let mut rope = match a.rope.scaling {
        None => json!({"rope_type": "default"}),
        Some(scaling) => serde_json::to_value(scaling).unwrap(),
    };
    rope["rope_theta"] = json!(a.rope.theta);
    let eos = match &spec.eos_token_ids[..] {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    let bias = matches!(family.as_str(), "Llama" | "Qwen3").then_some(a.output_bias);
    let windows: Vec<_> = (0..spec.blocks.len()).map(|layer| attention(spec, layer).sliding_window).collect();
    json!({
        "class": format!("{family}Config"), "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size,
        "intermediate_size": spec.blocks[0].feed_forward.intermediate_size, "num_hidden_layers": spec.blocks.len(),
        "num_attention_heads": a.num_heads, "num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim,
        "max_position_embeddings": spec.max_position_embeddings, "rms_norm_eps": spec.rms_norm_eps,
        "initializer_range": spec.initializer_range, "tie_word_embeddings": spec.tie_word_embeddings,
        "attention_bias": bias, "mlp_bias": (family == "Llama").then_some(spec.blocks[0].feed_forward.bias),
        "rope": rope, "bos": spec.bos_token_id, "eos": eos, "dtype": "torch.bfloat16", "windows": windows,
        "generation_eos": eos,
    })
}

#[test]
fn transformers_reads_the_same_and_writes_what_we_read() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    if !python.exists() {
        println!("skipped: no .venv with transformers; `cargo xtask test` makes one");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let specs = specs();
    let folders: Vec<_> = (0..specs.len()).map(|i| root.path().join(i.to_string())).collect();
    for (folder, (_, spec)) in folders.iter().zip(&specs) {
        std::fs::create_dir(folder).unwrap();
        let write = |name: &str, value: Value| std::fs::write(folder.join(name), value.to_string()).unwrap();
        write("config.json", to_json(spec, DType::BF16));
        write("generation_config.json", generation_config(spec));
    }
    let output = Command::new(python).arg("-c").arg(READER).args(&folders).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answers: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    for ((name, spec), mut answer) in specs.iter().zip(answers) {
        let again = answer.as_object_mut().unwrap().remove("again").unwrap();
        assert_eq!(answer, expected_answer(spec), "{name}");
        assert_eq!(from_json(&again).unwrap(), *spec, "{name}, as transformers writes it");
    }
}
