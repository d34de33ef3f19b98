//! A Hugging Face `config.json` as a [`ModelSpec`], and back.
//!
//! Reads what transformers 4 and 5 write for LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and
//! Qwen3ForCausalLM, and for their ...ForSequenceClassification and ...ForTokenClassification with one label; an absent key means what transformers' configuration class makes of it. Writes version 5's keys,
//! and `rope_theta` and `rope_scaling` beside `rope_parameters` so that older readers see the same model.
//! Dropout is not read: it does not act in inference, and training here has none.

use crate::check::MAX_LAYERS;
use crate::model::Family;
use crate::{
    AttentionSpec, BlockSpec, ConfigError, FeedForwardSpec, HeadSpec, MixerSpec, ModelSpec, RopeScaling, RopeSpec,
};
use serde_json::{Map, Value, json};
use tangelo_core::DType;

/// The version of transformers whose format is written.
const TRANSFORMERS_VERSION: &str = "5.17.0";

/// What a family is called in config.json, and what its configuration class assumes for absent keys.
struct FamilyTraits {
    family: Family,
    model_type: &'static str,
    /// What its architectures begin with.
    class: &'static str,
    max_position_embeddings: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    /// `sliding_window` where the key is absent.
    sliding_window: Option<usize>,
}

const FAMILIES: [FamilyTraits; 4] = [
    FamilyTraits {
        family: Family::Llama,
        model_type: "llama",
        class: "Llama",
        max_position_embeddings: 2048,
        num_key_value_heads: None,
        head_dim: None,
        sliding_window: None,
    },
    FamilyTraits {
        family: Family::Mistral,
        model_type: "mistral",
        class: "Mistral",
        max_position_embeddings: 131_072,
        num_key_value_heads: Some(8),
        head_dim: None,
        sliding_window: Some(4096),
    },
    FamilyTraits {
        family: Family::Qwen2,
        model_type: "qwen2",
        class: "Qwen2",
        max_position_embeddings: 32_768,
        num_key_value_heads: Some(32),
        head_dim: None,
        sliding_window: Some(4096),
    },
    FamilyTraits {
        family: Family::Qwen3,
        model_type: "qwen3",
        class: "Qwen3",
        max_position_embeddings: 32_768,
        num_key_value_heads: Some(32),
        head_dim: Some(128),
        sliding_window: Some(4096),
    },
];

fn traits_of(family: Family) -> &'static FamilyTraits {
    &FAMILIES[match family {
        Family::Llama => 0,
        Family::Mistral => 1,
        Family::Qwen2 => 2,
        Family::Qwen3 => 3,
    }]
}

/// The architecture that a config.json describes.
///
/// # Errors
/// [`ConfigError::HfConfig`] names the key whose value is missing, of the wrong type, or not supported.
pub fn from_json(config: &Value) -> Result<ModelSpec, ConfigError> {
    let keys = Keys(config.as_object().ok_or_else(|| unsupported("(the whole file)", config, "a JSON object"))?);
    let (traits, head) = family(&keys)?;
    refuse_what_is_not_modelled(&keys)?;
    let (hidden_size, num_heads) = (keys.needed("hidden_size")?, keys.needed("num_attention_heads")?);
    let num_layers = keys.needed("num_hidden_layers")?;
    if num_layers > MAX_LAYERS {
        let expected = format!("at most {MAX_LAYERS}");
        return Err(unsupported("num_hidden_layers", &json!(num_layers), &expected));
    }
    let max_position_embeddings = keys.usize_or("max_position_embeddings", traits.max_position_embeddings)?;
    let default_head_dim = traits.head_dim.unwrap_or(hidden_size / num_heads);
    let biased = matches!(traits.family, Family::Llama | Family::Qwen3) && keys.bool_or("attention_bias", false)?;
    let attention = AttentionSpec {
        num_heads,
        num_kv_heads: keys.usize_or("num_key_value_heads", traits.num_key_value_heads.unwrap_or(num_heads))?,
        head_dim: keys.usize_or("head_dim", default_head_dim)?,
        qkv_bias: biased || traits.family == Family::Qwen2,
        output_bias: biased,
        qk_norm: traits.family == Family::Qwen3,
        sliding_window: None,
        rope: rope(&keys, max_position_embeddings)?,
    };
    let feed_forward = FeedForwardSpec {
        intermediate_size: keys.needed("intermediate_size")?,
        bias: traits.family == Family::Llama && keys.bool_or("mlp_bias", false)?,
    };
    let windows = windows(&keys, traits, num_layers)?;
    let block = |sliding_window| BlockSpec {
        mixer: MixerSpec::Attention(AttentionSpec { sliding_window, ..attention }),
        feed_forward,
    };
    Ok(ModelSpec {
        family: traits.family,
        vocab_size: keys.needed("vocab_size")?,
        hidden_size,
        rms_norm_eps: keys.f64_or("rms_norm_eps", 1e-6)?,
        tie_word_embeddings: keys.bool_or("tie_word_embeddings", false)? && head == HeadSpec::Vocabulary,
        head,
        max_position_embeddings,
        initializer_range: keys.f64_or("initializer_range", 0.02)?,
        bos_token_id: keys.token_ids("bos_token_id", traits)?.first().copied(),
        eos_token_ids: keys.token_ids("eos_token_id", traits)?,
        blocks: windows.into_iter().map(block).collect(),
    })
}

/// The config.json of `model` with weights of type `dtype`, as transformers 5.17 writes it.
pub fn to_json(model: &ModelSpec, dtype: DType) -> Value {
    let traits = traits_of(model.family);
    let num_layers = model.blocks.len();
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("architectures", json!([format!("{}{}", traits.class, suffix(model.head))]));
    put("model_type", json!(traits.model_type));
    put("vocab_size", json!(model.vocab_size));
    put("hidden_size", json!(model.hidden_size));
    put("num_hidden_layers", json!(num_layers));
    put("hidden_act", json!("silu"));
    put("max_position_embeddings", json!(model.max_position_embeddings));
    put("initializer_range", json!(model.initializer_range));
    put("rms_norm_eps", json!(model.rms_norm_eps));
    put("tie_word_embeddings", json!(model.tie_word_embeddings));
    put("attention_dropout", json!(0.0));
    put("use_cache", json!(true));
    put("bos_token_id", json!(model.bos_token_id));
    put("eos_token_id", one_or_many(&model.eos_token_ids));
    if let Some(block) = model.blocks.first() {
        let MixerSpec::Attention(a) = &block.mixer;
        put("intermediate_size", json!(block.feed_forward.intermediate_size));
        put("num_attention_heads", json!(a.num_heads));
        put("num_key_value_heads", json!(a.num_kv_heads));
        // Qwen2's class has no such key; its model reads one all the same where it is there.
        if model.family != Family::Qwen2 || a.head_dim * a.num_heads != model.hidden_size {
            put("head_dim", json!(a.head_dim));
        }
        if matches!(model.family, Family::Llama | Family::Qwen3) {
            put("attention_bias", json!(a.output_bias));
        }
        if model.family == Family::Llama {
            put("mlp_bias", json!(block.feed_forward.bias));
        }
        let rope = rope_json(&a.rope);
        put("rope_theta", json!(a.rope.theta));
        put("rope_scaling", if a.rope.scaling.is_some() { rope_scaling_json(&a.rope) } else { Value::Null });
        put("rope_parameters", rope);
    }
    write_windows(model, &mut put);
    if model.head != HeadSpec::Vocabulary {
        put("id2label", json!({"0": "LABEL_0"}));
        put("label2id", json!({"LABEL_0": 0}));
    }
    put("dtype", json!(dtype_name(dtype)));
    put("transformers_version", json!(TRANSFORMERS_VERSION));
    Value::Object(map)
}

/// The generation_config.json of `model`: where a document starts and ends.
pub fn generation_config(model: &ModelSpec) -> Value {
    let mut map = Map::new();
    map.insert("_from_model_config".into(), json!(true));
    if let Some(bos) = model.bos_token_id {
        map.insert("bos_token_id".into(), json!(bos));
    }
    if !model.eos_token_ids.is_empty() {
        map.insert("eos_token_id".into(), one_or_many(&model.eos_token_ids));
    }
    map.insert("transformers_version".into(), json!(TRANSFORMERS_VERSION));
    Value::Object(map)
}

/// What architectures end with.
fn suffix(head: HeadSpec) -> &'static str {
    match head {
        HeadSpec::Vocabulary => "ForCausalLM",
        HeadSpec::Scalar { bias: false } => "ForSequenceClassification",
        HeadSpec::Scalar { bias: true } => "ForTokenClassification",
    }
}

/// The family and head of an architecture's name.
fn architecture(name: &str) -> Option<(&'static FamilyTraits, HeadSpec)> {
    let heads = [HeadSpec::Vocabulary, HeadSpec::Scalar { bias: false }, HeadSpec::Scalar { bias: true }];
    FAMILIES.iter().find_map(|traits| {
        let rest = name.strip_prefix(traits.class)?;
        heads.into_iter().find(|&head| rest == suffix(head)).map(|head| (traits, head))
    })
}

fn family(keys: &Keys<'_>) -> Result<(&'static FamilyTraits, HeadSpec), ConfigError> {
    const KNOWN: &str = "one of llama, mistral, qwen2, qwen3 (as `model_type`), or its ...ForCausalLM architecture";
    let architectures = keys.get("architectures").unwrap_or(&Value::Null);
    let name = architectures.get(0).and_then(Value::as_str);
    let (traits, head) = match keys.get("model_type") {
        Some(value) => {
            let by_type = |name: &str| FAMILIES.iter().find(|t| t.model_type == name);
            let traits = value.as_str().and_then(by_type).ok_or_else(|| unsupported("model_type", value, KNOWN))?;
            let named = name.map(|name| (name, architecture(name).filter(|(t, _)| t.model_type == traits.model_type)));
            match named {
                None => (traits, HeadSpec::Vocabulary),
                Some((_, Some((_, head)))) => (traits, head),
                Some((name, None)) => {
                    let expected = format!("[\"{}{}\"]", traits.class, suffix(HeadSpec::Vocabulary));
                    return Err(unsupported("architectures", &json!([name]), &expected));
                }
            }
        }
        None => name.and_then(architecture).ok_or_else(|| unsupported("architectures", architectures, KNOWN))?,
    };
    if head != HeadSpec::Vocabulary {
        check_labels(keys)?;
    }
    Ok((traits, head))
}

/// A classification head is a scalar one where it has one label; transformers assumes two where nothing is said.
fn check_labels(keys: &Keys<'_>) -> Result<(), ConfigError> {
    let listed = keys.get("id2label").and_then(Value::as_object).map(Map::len);
    let labels = match keys.get("num_labels") {
        Some(_) => keys.needed("num_labels")?,
        None => listed.unwrap_or(2),
    };
    if labels == 1 {
        return Ok(());
    }
    Err(unsupported("num_labels", &json!(labels), "1: a reward model or critic gives one number"))
}

fn refuse_what_is_not_modelled(keys: &Keys<'_>) -> Result<(), ConfigError> {
    match keys.get("hidden_act") {
        None => {}
        Some(Value::String(act)) if act == "silu" || act == "swish" => {}
        Some(other) => return Err(unsupported("hidden_act", other, "\"silu\"")),
    }
    if let Some(quantized) = keys.get("quantization_config") {
        return Err(unsupported("quantization_config", quantized, "unquantised weights (or a GGUF file)"));
    }
    let rotary = keys.f64_or("partial_rotary_factor", 1.0)?;
    if rotary != 1.0 {
        return Err(unsupported("partial_rotary_factor", &json!(rotary), "1.0"));
    }
    Ok(())
}

/// The attention window of each layer.
fn windows(keys: &Keys<'_>, traits: &FamilyTraits, num_layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = match keys.0.get("sliding_window") {
        Some(Value::Null) => None,
        Some(_) => Some(keys.needed("sliding_window")?),
        None => traits.sliding_window,
    };
    match traits.family {
        Family::Llama => Ok(vec![None; num_layers]),
        Family::Mistral => Ok(vec![window; num_layers]),
        Family::Qwen2 | Family::Qwen3 => {
            let used = keys.bool_or("use_sliding_window", false)?;
            let window = window.filter(|_| used);
            match keys.get("layer_types") {
                Some(types) => windows_by_type(types, window, num_layers),
                None => {
                    let first = match keys.get("max_window_layers") {
                        Some(value) if value.as_u64() == Some(0) => 0,
                        _ => keys.usize_or("max_window_layers", 28)?,
                    };
                    Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect())
                }
            }
        }
    }
}

fn windows_by_type(types: &Value, window: Option<usize>, num_layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let list = types.as_array().filter(|list| list.len() == num_layers);
    let list = list.ok_or_else(|| unsupported("layer_types", types, &format!("a list of {num_layers} types")))?;
    let one = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(unsupported("layer_types", types, "a `sliding_window` and `use_sliding_window: true` beside it"))
        }
        _ => Err(unsupported("layer_types", kind, "\"full_attention\" or \"sliding_attention\"")),
    };
    list.iter().map(one).collect()
}

fn write_windows(model: &ModelSpec, put: &mut impl FnMut(&str, Value) -> Option<Value>) {
    let windows: Vec<Option<usize>> = model
        .blocks
        .iter()
        .map(|block| {
            let MixerSpec::Attention(a) = &block.mixer;
            a.sliding_window
        })
        .collect();
    let window = windows.iter().flatten().next().copied();
    match model.family {
        Family::Llama => {}
        Family::Mistral => {
            put("sliding_window", json!(window));
        }
        Family::Qwen2 | Family::Qwen3 => {
            let name = |w: &Option<usize>| if w.is_some() { "sliding_attention" } else { "full_attention" };
            put("use_sliding_window", json!(window.is_some()));
            put("sliding_window", json!(window));
            put("max_window_layers", json!(windows.iter().take_while(|w| w.is_none()).count()));
            put("layer_types", json!(windows.iter().map(name).collect::<Vec<_>>()));
        }
    }
}

/// RoPE from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).
fn rope(keys: &Keys<'_>, max_position_embeddings: usize) -> Result<RopeSpec, ConfigError> {
    // transformers 5 lets an old `rope_scaling` win over `rope_parameters`.
    let name = if keys.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
    let empty = Map::new();
    let found = match keys.get(name) {
        None => &empty,
        Some(value) => value.as_object().ok_or_else(|| unsupported(name, value, "an object or null"))?,
    };
    if found.values().any(Value::is_object) {
        return Err(unsupported(name, &json!(found), "one set of values for all layers"));
    }
    let inner = Keys(found);
    let theta = match inner.get("rope_theta") {
        Some(_) => inner.f64_or("rope_theta", 0.0)?,
        None => keys.f64_or("rope_theta", 10_000.0)?,
    };
    let rotary = inner.f64_or("partial_rotary_factor", 1.0)?;
    if rotary != 1.0 {
        return Err(unsupported("partial_rotary_factor", &json!(rotary), "1.0"));
    }
    let kind = inner.get("rope_type").or(inner.get("type"));
    let scaling = match kind.map(|k| k.as_str()) {
        None | Some(Some("default")) => None,
        Some(Some("linear")) => Some(RopeScaling::Linear { factor: inner.needed_f64("factor")? }),
        Some(Some("llama3")) => Some(RopeScaling::Llama3 {
            factor: inner.needed_f64("factor")?,
            low_freq_factor: inner.needed_f64("low_freq_factor")?,
            high_freq_factor: inner.needed_f64("high_freq_factor")?,
            original_max_position_embeddings: inner
                .usize_or("original_max_position_embeddings", max_position_embeddings)?,
        }),
        Some(_) => {
            let found = kind.unwrap_or(&Value::Null);
            return Err(unsupported(&format!("{name}.rope_type"), found, "\"default\", \"linear\" or \"llama3\""));
        }
    };
    Ok(RopeSpec { theta, scaling })
}

/// `rope_parameters`: type, stretching and base.
fn rope_json(rope: &RopeSpec) -> Value {
    let mut value = rope_scaling_json(rope);
    if let Some(map) = value.as_object_mut() {
        map.insert("rope_theta".into(), json!(rope.theta));
    }
    value
}

fn rope_scaling_json(rope: &RopeSpec) -> Value {
    match rope.scaling {
        None => json!({"rope_type": "default"}),
        Some(RopeScaling::Linear { factor }) => json!({"rope_type": "linear", "factor": factor}),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => {
            json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            })
        }
    }
}

fn one_or_many(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

/// torch's name of an element type, as config.json's `dtype` has it.
fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "float64",
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::I64 => "int64",
        DType::I32 => "int32",
        DType::U8 => "uint8",
    }
}

fn unsupported(key: &str, found: &Value, expected: &str) -> ConfigError {
    let mut found = if found.is_null() { "absent".to_owned() } else { found.to_string() };
    if let Some((end, _)) = found.char_indices().nth(80) {
        found.truncate(end);
        found.push_str("...");
    }
    ConfigError::HfConfig { key: key.to_owned(), found, expected: expected.to_owned() }
}

/// The keys of an object; null counts as absent.
struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn needed(&self, key: &str) -> Result<usize, ConfigError> {
        let value = self.get(key).unwrap_or(&Value::Null);
        usize_of(value).ok_or_else(|| unsupported(key, value, "a positive integer"))
    }

    fn usize_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        if self.get(key).is_none() { Ok(default) } else { self.needed(key) }
    }

    fn needed_f64(&self, key: &str) -> Result<f64, ConfigError> {
        let value = self.get(key).unwrap_or(&Value::Null);
        value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| unsupported(key, value, "a number"))
    }

    fn f64_or(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        if self.get(key).is_none() { Ok(default) } else { self.needed_f64(key) }
    }

    fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| unsupported(key, value, "true or false"))
    }

    /// One id or a list; an absent key means what the class assumes (Llama and Mistral: 1 and 2), null means none.
    fn token_ids(&self, key: &str, traits: &FamilyTraits) -> Result<Vec<u32>, ConfigError> {
        let one = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| unsupported(key, value, "a token id, a list of them, or null"))
        };
        match self.0.get(key) {
            None if matches!(traits.family, Family::Llama | Family::Mistral) => {
                Ok(vec![if key == "bos_token_id" { 1 } else { 2 }])
            }
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }
}

/// A positive integer, also where a tool wrote it as 4096.0.
fn usize_of(value: &Value) -> Option<usize> {
    let whole = value.as_u64().or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && *x > 0.0).map(|x| x as u64));
    whole.and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0)
}
