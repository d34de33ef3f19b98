//! The `[model]` section as a [`ModelSpec`]: a flavor, or assets, or every key by hand, with the keys given on top.

use crate::flavor::flavor;
use crate::job::{JobConfig, Model};
use crate::model::{Family, LM_HEAD};
use crate::resolve::{ModelAssets, SpecialTokens, TRAINED_TOKENIZER_EOS, VOCAB_MULTIPLE};
use crate::{AttentionSpec, BlockSpec, ConfigError, FeedForwardSpec, HeadSpec, MixerSpec, ModelSpec, RopeSpec};
use std::path::Path;
use tangelo_core::{DType, ParamMeta};

/// Writes every key of `config.model` and returns the architecture they describe.
pub(crate) fn resolve(config: &mut JobConfig, assets: &dyn ModelAssets) -> Result<ModelSpec, ConfigError> {
    let base = Base::of(&config.model, assets)?;
    let mut keys = over(&config.model, &base.keys)?;
    let tokenizer = match absent_tokenizer(config, &keys, assets) {
        true => Tokenizer::default(),
        false => tokenizer(config, assets)?,
    };
    if keys.vocab_size.is_none() {
        keys.vocab_size = Some(tokenizer.vocab_size.next_multiple_of(VOCAB_MULTIPLE));
    }
    let mut spec = spec_of(&keys)?;
    base.limit_windows(&mut spec);
    // The tokenizer that prepares the text decides what ends a document; the assets speak where it is silent.
    spec.bos_token_id = tokenizer.special.bos.or(base.special.bos);
    spec.eos_token_ids =
        if tokenizer.special.eos.is_empty() { base.special.eos.clone() } else { tokenizer.special.eos };
    check_vocabulary(&spec, tokenizer.vocab_size, config)?;
    config.model = keys;
    Ok(spec)
}

/// What the keys of `[model]` are laid over.
#[derive(Default)]
struct Base {
    keys: Model,
    special: SpecialTokens,
    /// Which layers have a window, where only some do.
    windowed: Option<Vec<bool>>,
}

impl Base {
    fn of(model: &Model, assets: &dyn ModelAssets) -> Result<Base, ConfigError> {
        if let Some(name) = &model.flavor {
            return Ok(Base { keys: flavor(name)?.model, ..Base::default() });
        }
        let Some(path) = &model.hf_assets_path else { return Ok(Base::default()) };
        let spec = assets.model_spec(path).map_err(|message| asset_error("model.hf_assets_path", path, message))?;
        let windowed: Vec<bool> = spec.blocks.iter().map(|b| attention(b).sliding_window.is_some()).collect();
        let mixed = windowed.contains(&true) && windowed.contains(&false);
        Ok(Base {
            keys: keys_of(&spec),
            special: SpecialTokens { bos: spec.bos_token_id, eos: spec.eos_token_ids },
            windowed: mixed.then_some(windowed),
        })
    }

    /// Takes the window from the layers that have none in the base.
    fn limit_windows(&self, spec: &mut ModelSpec) {
        let Some(windowed) = &self.windowed else { return };
        for (block, &keep) in spec.blocks.iter_mut().zip(windowed) {
            let MixerSpec::Attention(a) = &mut block.mixer;
            a.sliding_window = a.sliding_window.filter(|_| keep);
        }
    }
}

#[derive(Default)]
struct Tokenizer {
    vocab_size: usize,
    special: SpecialTokens,
}

/// Whether to resolve without the tokenizer: it is not there, the caller may do without, and the vocabulary is known.
fn absent_tokenizer(config: &JobConfig, keys: &Model, assets: &dyn ModelAssets) -> bool {
    let is_absent = |path: &Path| assets.may_lack(path);
    config.data.train_tokenizer_vocab == 0
        && keys.vocab_size.is_some()
        && config.data.tokenizer.as_deref().is_some_and(is_absent)
}

/// What the job's tokenizer says. One that is yet to be trained has the size asked for and ends documents with id 0.
fn tokenizer(config: &JobConfig, assets: &dyn ModelAssets) -> Result<Tokenizer, ConfigError> {
    let data = &config.data;
    if data.train_tokenizer_vocab > 0 {
        let special = SpecialTokens { bos: None, eos: vec![TRAINED_TOKENIZER_EOS] };
        return Ok(Tokenizer { vocab_size: data.train_tokenizer_vocab, special });
    }
    let path = data.tokenizer.as_deref().ok_or_else(|| {
        ConfigError::Values(vec![
            "no tokenizer: set `data.tokenizer` (a tokenizer.json, a folder that holds one, a GGUF file), \
             `model.hf_assets_path`, or `data.train_tokenizer_vocab`"
                .into(),
        ])
    })?;
    let failed = |message| asset_error("data.tokenizer", path, message);
    Ok(Tokenizer {
        vocab_size: assets.vocab_size(path).map_err(failed)?,
        special: assets.special_tokens(path).map_err(failed)?,
    })
}

fn check_vocabulary(spec: &ModelSpec, tokenizer: usize, config: &JobConfig) -> Result<(), ConfigError> {
    if spec.vocab_size >= tokenizer {
        return Ok(());
    }
    let path = config.data.tokenizer_path().unwrap_or_default();
    Err(ConfigError::Values(vec![format!(
        "`model.vocab_size` = {} is less than the {tokenizer} ids of the tokenizer {}: ids {} and above would have no \
         embedding; set it to {} or more, or take another tokenizer",
        spec.vocab_size,
        path.display(),
        spec.vocab_size,
        tokenizer.next_multiple_of(VOCAB_MULTIPLE)
    )]))
}

/// The weights to start from must fit tensor by tensor.
pub(crate) fn check_initial_load(
    spec: &ModelSpec,
    config: &JobConfig,
    assets: &dyn ModelAssets,
) -> Result<(), ConfigError> {
    let load = &config.checkpoint;
    let Some(path) = load.initial_load_path.as_deref().filter(|_| load.initial_load_in_hf) else { return Ok(()) };
    let key = "checkpoint.initial_load_path";
    let theirs = assets.model_spec(path).map_err(|message| asset_error(key, path, message))?;
    let (ours, theirs) = (spec.parameters(DType::F32), theirs.parameters(DType::F32));
    let differs = |message: String| Err(asset_error(key, path, format!("the weights do not fit [model]: {message}")));
    for want in &ours {
        match theirs.iter().find(|have| have.name == want.name) {
            // A scalar head on a language model's weights starts from the seed.
            None if ModelSpec::is_scalar_head(&want.name) => {}
            None => return differs(format!("{} is not in them", want.name)),
            Some(have) if have.shape != want.shape => {
                return differs(format!("{} is {:?} there, {:?} here", want.name, have.shape, want.shape));
            }
            Some(_) => {}
        }
    }
    let is_replaced = |name: &str| name == LM_HEAD && spec.head != HeadSpec::Vocabulary;
    let has_no_place = |have: &&ParamMeta| !is_replaced(&have.name) && !ours.iter().any(|want| want.name == have.name);
    match theirs.iter().find(has_no_place) {
        Some(extra) => differs(format!("{} has no place in the model", extra.name)),
        None => Ok(()),
    }
}

/// `given` with `base` where it is silent.
fn over(given: &Model, base: &Model) -> Result<Model, ConfigError> {
    if let (Some(name), Some(family)) = (given.name, base.name)
        && name != family
    {
        let from = given.flavor.as_deref().map_or("`model.hf_assets_path`".into(), |f| format!("flavor \"{f}\""));
        return Err(ConfigError::Values(vec![format!(
            "`model.name` = \"{}\", but {from} is of family \"{}\"; leave `model.name` out",
            family_name(name),
            family_name(family)
        )]));
    }
    Model {
        name: given.name.or(base.name),
        flavor: given.flavor.clone(),
        hf_assets_path: given.hf_assets_path.clone(),
        vocab_size: given.vocab_size.or(base.vocab_size),
        hidden_size: given.hidden_size.or(base.hidden_size),
        intermediate_size: given.intermediate_size.or(base.intermediate_size),
        num_hidden_layers: given.num_hidden_layers.or(base.num_hidden_layers),
        num_attention_heads: given.num_attention_heads.or(base.num_attention_heads),
        num_key_value_heads: given.num_key_value_heads.or(base.num_key_value_heads),
        head_dim: given.head_dim.or(base.head_dim),
        max_position_embeddings: given.max_position_embeddings.or(base.max_position_embeddings),
        rope_theta: given.rope_theta.or(base.rope_theta),
        rope_scaling: given.rope_scaling.or(base.rope_scaling),
        rms_norm_eps: given.rms_norm_eps.or(base.rms_norm_eps),
        sliding_window: given.sliding_window.or(base.sliding_window),
        attention_bias: given.attention_bias.or(base.attention_bias),
        mlp_bias: given.mlp_bias.or(base.mlp_bias),
        tie_word_embeddings: given.tie_word_embeddings.or(base.tie_word_embeddings),
        head: given.head.or(base.head),
        initializer_range: given.initializer_range.or(base.initializer_range),
    }
    .with_defaults()
}

impl Model {
    /// Every key but `vocab_size`, `flavor`, `hf_assets_path` and `rope_scaling` filled in.
    fn with_defaults(mut self) -> Result<Model, ConfigError> {
        let needed = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
        ];
        let missing: Vec<String> =
            needed.iter().filter(|(_, v)| v.is_none()).map(|(key, _)| format!("`model.{key}`")).collect();
        let (Some(hidden), Some(heads), true) = (self.hidden_size, self.num_attention_heads, missing.is_empty()) else {
            return Err(ConfigError::Values(vec![format!(
                "no model: set `model.flavor` (one of {}), `model.hf_assets_path`, or {} by hand",
                crate::flavor::names().join(", "),
                missing.join(", ")
            )]));
        };
        let family = *self.name.get_or_insert(Family::Llama);
        self.num_key_value_heads.get_or_insert(heads);
        self.head_dim.get_or_insert(hidden / heads.max(1));
        self.max_position_embeddings.get_or_insert(2048);
        self.rope_theta.get_or_insert(10_000.0);
        self.rms_norm_eps.get_or_insert(1e-5);
        self.sliding_window.get_or_insert(0);
        self.attention_bias.get_or_insert(family == Family::Qwen2);
        self.mlp_bias.get_or_insert(false);
        self.tie_word_embeddings.get_or_insert(false);
        self.initializer_range.get_or_insert(0.02);
        Ok(self)
    }
}

/// The architecture of a section whose every key is there.
fn spec_of(m: &Model) -> Result<ModelSpec, ConfigError> {
    let absent = |key: &str| ConfigError::Values(vec![format!("`model.{key}` is absent")]);
    let need = |value: Option<usize>, key: &str| value.ok_or_else(|| absent(key));
    let family = m.name.ok_or_else(|| absent("name"))?;
    let bias = m.attention_bias.unwrap_or(false);
    let head = m.head.unwrap_or_default();
    let attention = AttentionSpec {
        num_heads: need(m.num_attention_heads, "num_attention_heads")?,
        num_kv_heads: need(m.num_key_value_heads, "num_key_value_heads")?,
        head_dim: need(m.head_dim, "head_dim")?,
        qkv_bias: bias,
        output_bias: bias && family != Family::Qwen2,
        qk_norm: family == Family::Qwen3,
        sliding_window: m.sliding_window.filter(|&w| w > 0),
        rope: RopeSpec { theta: m.rope_theta.ok_or_else(|| absent("rope_theta"))?, scaling: m.rope_scaling },
    };
    let feed_forward = FeedForwardSpec {
        intermediate_size: need(m.intermediate_size, "intermediate_size")?,
        bias: m.mlp_bias.unwrap_or(false),
    };
    let block = BlockSpec { mixer: MixerSpec::Attention(attention), feed_forward };
    Ok(ModelSpec {
        family,
        vocab_size: need(m.vocab_size, "vocab_size")?,
        hidden_size: need(m.hidden_size, "hidden_size")?,
        rms_norm_eps: m.rms_norm_eps.ok_or_else(|| absent("rms_norm_eps"))?,
        tie_word_embeddings: m.tie_word_embeddings.unwrap_or(false) && head == HeadSpec::Vocabulary,
        head,
        max_position_embeddings: need(m.max_position_embeddings, "max_position_embeddings")?,
        initializer_range: m.initializer_range.ok_or_else(|| absent("initializer_range"))?,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        blocks: vec![block; need(m.num_hidden_layers, "num_hidden_layers")?],
    })
}

/// The section that describes `spec`.
fn keys_of(spec: &ModelSpec) -> Model {
    let window = spec.blocks.iter().find_map(|b| attention(b).sliding_window).unwrap_or(0);
    let first = spec.blocks.first();
    let a = first.map(attention);
    Model {
        name: Some(spec.family),
        flavor: None,
        hf_assets_path: None,
        vocab_size: Some(spec.vocab_size),
        hidden_size: Some(spec.hidden_size),
        intermediate_size: first.map(|b| b.feed_forward.intermediate_size),
        num_hidden_layers: Some(spec.blocks.len()),
        num_attention_heads: a.map(|a| a.num_heads),
        num_key_value_heads: a.map(|a| a.num_kv_heads),
        head_dim: a.map(|a| a.head_dim),
        max_position_embeddings: Some(spec.max_position_embeddings),
        rope_theta: a.map(|a| a.rope.theta),
        rope_scaling: a.and_then(|a| a.rope.scaling),
        rms_norm_eps: Some(spec.rms_norm_eps),
        sliding_window: Some(window),
        attention_bias: a.map(|a| a.qkv_bias),
        mlp_bias: first.map(|b| b.feed_forward.bias),
        tie_word_embeddings: Some(spec.tie_word_embeddings),
        head: Some(spec.head).filter(|&head| head != HeadSpec::Vocabulary),
        initializer_range: Some(spec.initializer_range),
    }
}

/// The architecture of a flavor with `vocab_size` rows, for flavors that do not say it.
pub(crate) fn flavor_spec(model: &Model, vocab_size: usize) -> Result<ModelSpec, ConfigError> {
    let mut keys = over(&Model::default(), model)?;
    keys.vocab_size.get_or_insert(vocab_size);
    spec_of(&keys)
}

pub(crate) fn family_name(family: Family) -> &'static str {
    match family {
        Family::Llama => "llama",
        Family::Mistral => "mistral",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    }
}

fn attention(block: &BlockSpec) -> &AttentionSpec {
    let MixerSpec::Attention(a) = &block.mixer;
    a
}

fn asset_error(key: &'static str, path: &Path, message: String) -> ConfigError {
    ConfigError::Assets { key, path: path.to_owned(), message }
}
