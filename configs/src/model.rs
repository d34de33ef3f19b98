//! An architecture as data.
//!
//! A model is an embedding, a list of blocks (a mixer and a feed-forward each), a final norm and a head. Parameters
//! are named as Hugging Face names them and listed in execution order, the order in which weights are laid out.

use serde::{Deserialize, Serialize};
use tangelo_core::{DType, ParamMeta, Unit};

/// Model families; each is a set of choices below plus a Hugging Face `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama 2 and 3.x, SmolLM2.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms on the heads of q and k.
    Qwen3,
}

/// How rotary frequencies are stretched for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// Every frequency divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Stretch of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching, tokens.
        original_max_position_embeddings: usize,
    },
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeSpec {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Stretching, if any.
    pub scaling: Option<RopeScaling>,
}

/// Grouped-query attention.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// Query heads (H).
    pub num_heads: usize,
    /// Key and value heads (K); divides H.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Biases on q, k and v (Qwen2).
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub output_bias: bool,
    /// RMS norm of each q and k head before RoPE (Qwen3).
    pub qk_norm: bool,
    /// A token attends to this many tokens, itself included; `None`: to all before it in its document.
    pub sliding_window: Option<usize>,
    /// Position embedding.
    pub rope: RopeSpec,
}

/// What mixes tokens in a block.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MixerSpec {
    /// Softmax attention.
    Attention(AttentionSpec),
}

/// The feed-forward half of a block: SwiGLU.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FeedForwardSpec {
    /// Width of the hidden layer.
    pub intermediate_size: usize,
    /// Biases on all three projections.
    pub bias: bool,
}

/// One block: norm, mixer, norm, feed-forward, each half added to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockSpec {
    /// What mixes tokens.
    pub mixer: MixerSpec,
    /// The feed-forward half.
    pub feed_forward: FeedForwardSpec,
}

/// What a model makes of its last hidden states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum HeadSpec {
    /// Logits over the vocabulary.
    #[default]
    Vocabulary,
    /// One number a token: a critic's value, a reward model's score.
    Scalar {
        /// Whether a number is added, as in transformers' ...ForTokenClassification.
        #[serde(default)]
        bias: bool,
    },
}

/// A decoder-only language model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Family: decides `model_type` and `architectures` of an exported config.json.
    pub family: Family,
    /// Vocabulary size (V): rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream (D).
    pub hidden_size: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// The head shares the embedding's weight. Never true of a scalar head.
    pub tie_word_embeddings: bool,
    /// What the head gives.
    #[serde(default)]
    pub head: HeadSpec,
    /// Longest sequence the model is meant for, tokens.
    pub max_position_embeddings: usize,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// Id that starts a document, if the tokenizer has one.
    pub bos_token_id: Option<u32>,
    /// Ids that end a document.
    pub eos_token_ids: Vec<u32>,
    /// The blocks, first to last (L).
    pub blocks: Vec<BlockSpec>,
}

/// How tensor parallelism cuts a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorCut {
    /// Not: every rank holds it and sees some of the tokens (or heads) it is used for, so its gradient is a partial sum.
    Whole,
    /// Along `dim`, by query heads.
    Heads {
        /// The tensor's dim.
        dim: usize,
    },
    /// Along dim 0, by key and value heads; ranks beyond their number share one.
    KeyHeads,
    /// Along `dim`, by units of the feed-forward's hidden layer.
    Features {
        /// The tensor's dim.
        dim: usize,
    },
    /// Along dim 0, by ids; parts need not be even.
    Vocabulary,
}

/// The name of the embedding's weight, and of a tied head's.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The name of an untied head's weight.
pub const LM_HEAD: &str = "lm_head.weight";
/// The names of a scalar head's weight and bias.
pub const SCORE: &str = "score.weight";
/// See [`SCORE`].
pub const SCORE_BIAS: &str = "score.bias";
/// The name of the final norm's weight.
pub const FINAL_NORM: &str = "model.norm.weight";

impl ModelSpec {
    /// The parameters of the embedding.
    pub fn embedding_parameters(&self, dtype: DType) -> Vec<ParamMeta> {
        vec![meta(EMBEDDING, &[self.vocab_size, self.hidden_size], dtype)]
    }

    /// The parameters of block `layer` in execution order: q, k, v lie next to each other, so do gate and up.
    pub fn block_parameters(&self, layer: usize, dtype: DType) -> Vec<ParamMeta> {
        let block = &self.blocks[layer];
        let MixerSpec::Attention(a) = &block.mixer;
        let (d, f) = (self.hidden_size, block.feed_forward.intermediate_size);
        let (q, kv) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
        let mut list: Vec<(&str, Vec<usize>)> = vec![("input_layernorm.weight", vec![d])];
        list.extend([
            ("self_attn.q_proj.weight", vec![q, d]),
            ("self_attn.k_proj.weight", vec![kv, d]),
            ("self_attn.v_proj.weight", vec![kv, d]),
        ]);
        if a.qkv_bias {
            list.extend([
                ("self_attn.q_proj.bias", vec![q]),
                ("self_attn.k_proj.bias", vec![kv]),
                ("self_attn.v_proj.bias", vec![kv]),
            ]);
        }
        if a.qk_norm {
            list.extend([("self_attn.q_norm.weight", vec![a.head_dim]), ("self_attn.k_norm.weight", vec![a.head_dim])]);
        }
        list.push(("self_attn.o_proj.weight", vec![d, q]));
        if a.output_bias {
            list.push(("self_attn.o_proj.bias", vec![d]));
        }
        list.push(("post_attention_layernorm.weight", vec![d]));
        list.extend([("mlp.gate_proj.weight", vec![f, d]), ("mlp.up_proj.weight", vec![f, d])]);
        if block.feed_forward.bias {
            list.extend([("mlp.gate_proj.bias", vec![f]), ("mlp.up_proj.bias", vec![f])]);
        }
        list.push(("mlp.down_proj.weight", vec![d, f]));
        if block.feed_forward.bias {
            list.push(("mlp.down_proj.bias", vec![d]));
        }
        list.into_iter().map(|(name, shape)| meta(&format!("model.layers.{layer}.{name}"), &shape, dtype)).collect()
    }

    /// The parameters of the final norm and, where it is not tied, the head.
    pub fn head_parameters(&self, dtype: DType) -> Vec<ParamMeta> {
        let mut list = vec![meta(FINAL_NORM, &[self.hidden_size], dtype)];
        match self.head {
            HeadSpec::Vocabulary if self.tie_word_embeddings => {}
            HeadSpec::Vocabulary => list.push(meta(LM_HEAD, &[self.vocab_size, self.hidden_size], dtype)),
            HeadSpec::Scalar { bias } => {
                list.push(meta(SCORE, &[1, self.hidden_size], dtype));
                list.extend(bias.then(|| meta(SCORE_BIAS, &[1], dtype)));
            }
        }
        list
    }

    /// Numbers that the head gives for a token: V, or 1.
    pub fn head_width(&self) -> usize {
        if self.head == HeadSpec::Vocabulary { self.vocab_size } else { 1 }
    }

    /// The same model with a scalar head in place of its own: a critic that starts from a policy. One that has a scalar
    /// head keeps it.
    pub fn with_scalar_head(mut self) -> ModelSpec {
        if self.head == HeadSpec::Vocabulary {
            self.head = HeadSpec::Scalar { bias: false };
            self.tie_word_embeddings = false;
        }
        self
    }

    /// Whether a parameter belongs to a scalar head.
    pub fn is_scalar_head(name: &str) -> bool {
        name == SCORE || name == SCORE_BIAS
    }

    /// The parameters of a unit of a model that is not cut into stages, in execution order.
    pub fn unit_parameters(&self, unit: Unit, dtype: DType) -> Vec<ParamMeta> {
        match unit {
            Unit::Embedding => self.embedding_parameters(dtype),
            Unit::Block(layer) => self.block_parameters(layer, dtype),
            Unit::Head => self.head_parameters(dtype),
        }
    }

    /// How tensor parallelism cuts a parameter.
    pub fn tensor_cut(name: &str) -> TensorCut {
        let ends = |suffixes: &[&str]| suffixes.iter().any(|s| name.ends_with(s));
        if name == EMBEDDING || name == LM_HEAD {
            TensorCut::Vocabulary
        } else if ends(&["q_proj.weight", "q_proj.bias"]) {
            TensorCut::Heads { dim: 0 }
        } else if ends(&["k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"]) {
            TensorCut::KeyHeads
        } else if name.ends_with("o_proj.weight") {
            TensorCut::Heads { dim: 1 }
        } else if ends(&["gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"]) {
            TensorCut::Features { dim: 0 }
        } else if name.ends_with("down_proj.weight") {
            TensorCut::Features { dim: 1 }
        } else {
            TensorCut::Whole
        }
    }

    /// Every parameter, in execution order.
    pub fn parameters(&self, dtype: DType) -> Vec<ParamMeta> {
        let mut all = self.embedding_parameters(dtype);
        all.extend((0..self.blocks.len()).flat_map(|layer| self.block_parameters(layer, dtype)));
        all.extend(self.head_parameters(dtype));
        all
    }

    /// Number of parameters; a tied head counts once.
    pub fn num_parameters(&self) -> usize {
        self.parameters(DType::F32).iter().map(ParamMeta::num_elements).sum()
    }

    /// Whether a parameter is a matrix between the hidden states of a block: what Muon is meant for.
    pub fn is_hidden_matrix(name: &str) -> bool {
        name.ends_with("_proj.weight")
    }

    /// Weight decay applies to matrices only: not to norms, biases or the embedding table.
    pub fn decays(name: &str) -> bool {
        ModelSpec::is_hidden_matrix(name) || name == LM_HEAD || name == SCORE
    }
}

fn meta(name: &str, shape: &[usize], dtype: DType) -> ParamMeta {
    ParamMeta { name: name.to_owned(), shape: shape.to_vec(), dtype }
}
