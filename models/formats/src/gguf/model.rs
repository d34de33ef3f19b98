//! A GGUF model in Hugging Face's terms: the architecture from its keys, and the names of its tensors.
//!
//! Architectures `llama` (Llama, SmolLM2, Mistral), `qwen2` and `qwen3`. Where keys are silent llama.cpp's defaults
//! hold. llama.cpp stores the rows of q and k of `llama` models in another order (rotary pairs next to each other);
//! [`Stored::interleaved`] marks them.

use super::{Gguf, value::tensor_values};
use crate::error::{FormatError, Result};
use crate::weights::Stored;
use std::collections::HashMap;
use tangelo_configs::model::{EMBEDDING, FINAL_NORM, Family, HeadSpec, LM_HEAD};
use tangelo_configs::{AttentionSpec, BlockSpec, FeedForwardSpec, MixerSpec, ModelSpec, RopeScaling, RopeSpec};

/// Factors by which rotary frequencies are divided, one per pair: Llama 3.1's stretching.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The parts of a block, by llama.cpp's and by Hugging Face's name.
const BLOCK_NAMES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Which of the families a file's architecture is.
fn architecture(gguf: &Gguf) -> Result<(&str, Family)> {
    let key = "general.architecture";
    let name = gguf.needed(key, gguf.string(key))?;
    let family = match name {
        "llama" if gguf.get("llama.attention.sliding_window").is_some() => Family::Mistral,
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        _ => {
            let detail = format!("its architecture is {name}; supported are llama (also Mistral), qwen2 and qwen3");
            return Err(FormatError::unsupported(gguf.path(), detail));
        }
    };
    Ok((name, family))
}

/// The keys of an architecture: `llama.block_count` and so on.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn size(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        // Some models list a value per layer; here all must be equal.
        let found = match self.gguf.get(&key) {
            Some(value) if value.kind() == "a list" => Some(self.same_in_all_layers(&key)?),
            _ => self.gguf.integer(&key)?.map(|n| n as f64),
        };
        match found {
            None => Ok(None),
            Some(n) if n >= 1.0 && n <= f64::from(u32::MAX) && n.fract() == 0.0 => Ok(Some(n as usize)),
            Some(n) => Err(FormatError::damaged(self.gguf.path(), format!("key {key} is {n}, expected a size"))),
        }
    }

    fn same_in_all_layers(&self, key: &str) -> Result<f64> {
        let list = self.gguf.floats(key)?.unwrap_or_default();
        match list.as_slice() {
            [first, rest @ ..] if rest.iter().all(|n| n == first) => Ok(*first),
            _ => {
                let detail = format!("key {key} differs between layers, which is not supported");
                Err(FormatError::unsupported(self.gguf.path(), detail))
            }
        }
    }

    fn needed(&self, name: &str) -> Result<usize> {
        self.gguf.needed(&self.key(name), self.size(name))
    }

    fn float(&self, name: &str) -> Result<Option<f64>> {
        self.gguf.float(&self.key(name))
    }
}

/// The architecture that a file's keys and tensors describe.
pub(crate) fn spec(gguf: &Gguf) -> Result<ModelSpec> {
    let (name, family) = architecture(gguf)?;
    let keys = Keys { gguf, architecture: name };
    refuse_what_is_not_modelled(&keys)?;
    let has = |tensor: &str| gguf.tensors.iter().any(|t| t.name == tensor);
    let hidden_size = keys.needed("embedding_length")?;
    let attention = attention(&keys, hidden_size)?;
    let block = BlockSpec {
        mixer: MixerSpec::Attention(attention),
        feed_forward: FeedForwardSpec {
            intermediate_size: keys.needed("feed_forward_length")?,
            bias: has("blk.0.ffn_down.bias"),
        },
    };
    let num_layers = keys.needed("block_count")?;
    if num_layers > gguf.tensors.len() {
        let detail = format!("{} is {num_layers}, with {} tensors", keys.key("block_count"), gguf.tensors.len());
        return Err(FormatError::damaged(gguf.path(), detail));
    }
    let rms_norm_eps = "attention.layer_norm_rms_epsilon";
    Ok(ModelSpec {
        family,
        vocab_size: vocab_size(gguf)?,
        hidden_size,
        rms_norm_eps: gguf.needed(&keys.key(rms_norm_eps), keys.float(rms_norm_eps))?,
        tie_word_embeddings: !has("output.weight"),
        head: HeadSpec::Vocabulary,
        max_position_embeddings: keys.needed("context_length")?,
        // Not stored: what every family's configuration assumes.
        initializer_range: 0.02,
        bos_token_id: token_id(gguf, "tokenizer.ggml.bos_token_id")?,
        eos_token_ids: token_id(gguf, "tokenizer.ggml.eos_token_id")?.into_iter().collect(),
        blocks: vec![block; num_layers],
    })
}

fn attention(keys: &Keys<'_>, hidden_size: usize) -> Result<AttentionSpec> {
    let gguf = keys.gguf;
    let has = |tensor: &str| gguf.tensors.iter().any(|t| t.name == tensor);
    let num_heads = keys.needed("attention.head_count")?;
    let head_dim = keys.size("attention.key_length")?.unwrap_or(hidden_size / num_heads);
    let values = keys.size("attention.value_length")?.unwrap_or(head_dim);
    let rotated = keys.size("rope.dimension_count")?.unwrap_or(head_dim);
    if head_dim == 0 || head_dim % 2 != 0 || rotated != head_dim || values != head_dim {
        let detail = format!(
            "heads of {head_dim} (keys) and {values} (values), {rotated} of them rotated; supported are equal even sizes"
        );
        return Err(FormatError::unsupported(gguf.path(), detail));
    }
    Ok(AttentionSpec {
        num_heads,
        num_kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(num_heads),
        head_dim,
        qkv_bias: has("blk.0.attn_q.bias"),
        output_bias: has("blk.0.attn_output.bias"),
        qk_norm: has("blk.0.attn_q_norm.weight"),
        sliding_window: keys.size("attention.sliding_window")?,
        rope: RopeSpec {
            theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
            scaling: rope_scaling(keys, head_dim)?,
        },
    })
}

fn refuse_what_is_not_modelled(keys: &Keys<'_>) -> Result<()> {
    let experts = keys.gguf.integer(&keys.key("expert_count"))?.unwrap_or(0);
    if experts > 0 {
        let detail = format!("is a mixture of {experts} experts; dense models are supported");
        return Err(FormatError::unsupported(keys.gguf.path(), detail));
    }
    Ok(())
}

fn vocab_size(gguf: &Gguf) -> Result<usize> {
    let embedding = gguf.tensors.iter().find(|t| t.name == "token_embd.weight").map(|t| t.shape.as_slice());
    match embedding {
        Some([rows, _]) => Ok(*rows),
        _ => Err(FormatError::damaged(gguf.path(), "it has no matrix token_embd.weight")),
    }
}

pub(crate) fn token_id(gguf: &Gguf, key: &str) -> Result<Option<u32>> {
    let Some(id) = gguf.integer(key)? else { return Ok(None) };
    let id = u32::try_from(id).map_err(|_| FormatError::damaged(gguf.path(), format!("{key} is {id}, no token id")))?;
    Ok(Some(id))
}

/// Stretching of rotary frequencies, from keys or, for Llama 3.1's, from the table of factors stored in its stead.
fn rope_scaling(keys: &Keys<'_>, head_dim: usize) -> Result<Option<RopeScaling>> {
    let gguf = keys.gguf;
    let kind = gguf.string(&keys.key("rope.scaling.type"))?.unwrap_or("none");
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    let linear = match kind {
        "none" | "linear" => factor.filter(|&f| f != 1.0 && f != 0.0).map(|factor| RopeScaling::Linear { factor }),
        _ => {
            let detail = format!("{} is {kind}; supported are none and linear", keys.key("rope.scaling.type"));
            return Err(FormatError::unsupported(gguf.path(), detail));
        }
    };
    let factors = gguf.tensors.iter().find(|t| t.name == ROPE_FACTORS);
    let Some(factors) = factors else { return Ok(linear) };
    let Some(encoding) = factors.encoding.filter(|_| factors.shape == [head_dim / 2]) else {
        let detail = format!("{ROPE_FACTORS} of shape {:?}, expected [{}]", factors.shape, head_dim / 2);
        return Err(FormatError::damaged(gguf.path(), detail));
    };
    let values = tensor_values(encoding, &gguf.bytes()[factors.bytes.clone()]);
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    llama3_scaling(&values, theta).map(Some).ok_or_else(|| {
        let detail = format!("{ROPE_FACTORS} holds factors that are not Llama 3.1's kind of stretching");
        FormatError::unsupported(gguf.path(), detail)
    })
}

/// The stretching whose factors are `values`. The file does not hold its four numbers: the factor is the largest value,
/// the others are those that every published Llama 3.x uses; the result must give the stored factors back.
fn llama3_scaling(values: &[f32], theta: f64) -> Option<RopeScaling> {
    let factor = f64::from(values.iter().copied().fold(1.0, f32::max));
    let (low, high, original) = (1.0, 4.0, 8192);
    let head_dim = 2 * values.len();
    let expected = |pair: usize| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * pair as f64 / head_dim as f64);
        let turns = original as f64 / wavelength;
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    // The file's factors are f32 values of an f32 computation.
    let same = values.iter().enumerate().all(|(i, &v)| (f64::from(v) / expected(i) - 1.0).abs() < 1e-4);
    same.then_some(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    })
}

/// The tensors under Hugging Face's names; those without a counterpart keep their own.
pub(crate) fn tensors(gguf: &Gguf) -> Result<HashMap<String, Stored>> {
    let (name, _) = architecture(gguf)?;
    let keys = Keys { gguf, architecture: name };
    let hidden_size = keys.needed("embedding_length")?;
    let head_dim = attention(&keys, hidden_size)?.head_dim;
    let mut all = HashMap::new();
    for tensor in gguf.tensors.iter().filter(|t| t.name != ROPE_FACTORS) {
        let renamed = hugging_face_name(&tensor.name).unwrap_or_else(|| tensor.name.clone());
        let rotary = renamed.contains(".self_attn.q_proj.") || renamed.contains(".self_attn.k_proj.");
        let stored = Stored {
            file: 0,
            bytes: tensor.bytes.clone(),
            shape: tensor.shape.clone(),
            encoding: tensor.encoding,
            type_name: tensor.type_name.clone(),
            interleaved: (name == "llama" && rotary).then_some(head_dim),
        };
        if all.insert(renamed, stored).is_some() {
            return Err(FormatError::damaged(gguf.path(), format!("tensor {} is listed twice", tensor.name)));
        }
    }
    Ok(all)
}

fn hugging_face_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some(EMBEDDING.into()),
        "output_norm.weight" => return Some(FINAL_NORM.into()),
        "output.weight" => return Some(LM_HEAD.into()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = part.split_once('.')?;
    let (_, renamed) = BLOCK_NAMES.iter().find(|(theirs, _)| *theirs == part)?;
    (layer.bytes().all(|b| b.is_ascii_digit())).then(|| format!("model.layers.{layer}.{renamed}.{kind}"))
}
