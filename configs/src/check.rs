//! Rules on values: each alone, then together. Every message shows the numbers and says what to do.
//!
//! Each function collects everything that is wrong before it fails, so that a user sees it all at once.

use crate::architecture::family_name;
use crate::job::{DataSource, JobConfig, JobType, Model, Optimizer, OptimizerName, Parallelism, RecomputeMode};
use crate::model::Family;
use crate::{ConfigError, MixerSpec, ModelSpec, RopeScaling};

/// The largest integer that TOML can hold.
const MAX_TOML_INTEGER: u64 = i64::MAX as u64;

// Bounds far above anything of use, so that no product of sizes overflows.
const MAX_RANKS: usize = 1 << 20;
const MAX_STEPS: usize = 1 << 40;
const MAX_SEQUENCES: usize = 1 << 24;
const MAX_TOKENS: usize = 1 << 32;
const MAX_VOCABULARY: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 12;
/// `torch.optim.Muon`'s bound.
const MAX_NEWTON_SCHULZ_STEPS: usize = 99;
/// Blocks of a model.
pub(crate) const MAX_LAYERS: usize = 1 << 12;

/// Bounds of single values and rules between sections that need no architecture.
pub(crate) fn check_values(found: &mut Found, c: &JobConfig) {
    training(found, c);
    schedule(found, c);
    optimizer(found, c);
    parallelism(found, &c.parallelism);
    data(found, c);
    chat(found, c);
    recompute(found, c);
    saving(found, c);
    validation(found, c);
    model_keys(found, &c.model);
    found.at_least("metrics.log_freq", c.metrics.log_freq, 1);
    found.at_least("comm.init_timeout_seconds", c.comm.init_timeout_seconds as usize, 1);
    found.at_least("comm.train_timeout_seconds", c.comm.train_timeout_seconds as usize, 1);
    found.require(c.debug.seed <= MAX_TOML_INTEGER, || {
        format!("`debug.seed` = {} is above {MAX_TOML_INTEGER}, the largest integer of a TOML file", c.debug.seed)
    });
}

/// Whether every degree is a number of ranks, so that their product means something.
pub(crate) fn degrees_are_sound(p: &Parallelism) -> bool {
    let mut found = Found::default();
    parallelism(&mut found, p);
    found.is_empty()
}

fn training(found: &mut Found, c: &JobConfig) {
    let t = &c.training;
    found.within("training.local_batch_size", t.local_batch_size, 1, MAX_SEQUENCES);
    found.within("training.seq_len", t.seq_len, 2, MAX_TOKENS);
    found.within("training.steps", t.steps, 1, MAX_STEPS);
    found.within("training.num_threads", t.num_threads, 0, MAX_RANKS);
    let tokens = t.local_batch_size.saturating_mul(t.seq_len);
    found.require(tokens <= MAX_TOKENS, || {
        format!(
            "`training.local_batch_size` {} x `training.seq_len` {} = {tokens} tokens at once, above {MAX_TOKENS}",
            t.local_batch_size, t.seq_len
        )
    });
    found.require(t.global_batch_size == -1 || (1..=MAX_TOKENS as i64).contains(&t.global_batch_size), || {
        format!(
            "`training.global_batch_size` = {}; it is a number of sequences, or -1 for `training.local_batch_size` \
             times the data-parallel size",
            t.global_batch_size
        )
    });
    found.not_negative("training.max_norm", t.max_norm);
}

fn schedule(found: &mut Found, c: &JobConfig) {
    let s = &c.lr_scheduler;
    if let Some(total) = s.total_steps {
        found.within("lr_scheduler.total_steps", total, 1, MAX_STEPS);
    }
    found.within("lr_scheduler.warmup_steps", s.warmup_steps, 0, MAX_STEPS);
    let total = s.total_steps.unwrap_or(c.training.steps);
    let total_name = if s.total_steps.is_some() { "lr_scheduler.total_steps" } else { "training.steps" };
    found.require(s.warmup_steps <= total, || {
        format!(
            "`lr_scheduler.warmup_steps` = {} > `{total_name}` = {total}: the warm-up would never end; lower it to {} \
             or so",
            s.warmup_steps,
            total.div_ceil(10)
        )
    });
    found.unit("lr_scheduler.min_lr_factor", s.min_lr_factor);
    if let Some(ratio) = s.decay_ratio {
        found.unit("lr_scheduler.decay_ratio", ratio);
        let decay = (total as f64 * ratio).round() as usize;
        found.require(s.warmup_steps > total || s.warmup_steps + decay <= total, || {
            format!(
                "`lr_scheduler.warmup_steps` {} + decay {decay} (= {total_name} {total} x `lr_scheduler.decay_ratio` \
                 {ratio}) = {} > {total} steps; lower one of them",
                s.warmup_steps,
                s.warmup_steps + decay
            )
        });
    }
    found.require(c.training.steps <= total || s.min_lr_factor > 0.0 || s.decay_ratio == Some(0.0), || {
        format!(
            "`training.steps` = {} > `lr_scheduler.total_steps` = {total}: the last {} steps would have a learning rate \
             of 0; raise `lr_scheduler.total_steps` or set `lr_scheduler.min_lr_factor`",
            c.training.steps,
            c.training.steps - total
        )
    });
}

fn optimizer(found: &mut Found, c: &JobConfig) {
    let o = &c.optimizer;
    found.not_negative("optimizer.lr", o.lr);
    found.not_negative("optimizer.weight_decay", o.weight_decay);
    found.require(o.eps.is_finite() && o.eps > 0.0, || format!("`optimizer.eps` = {}; it must be above 0", o.eps));
    for (key, beta) in [("optimizer.beta1", o.beta1), ("optimizer.beta2", o.beta2)] {
        found.require((0.0..1.0).contains(&beta), || format!("`{key}` = {beta}; it must be in [0, 1)"));
    }
    muon(found, o);
}

fn muon(found: &mut Found, o: &Optimizer) {
    let momentum = o.muon_momentum;
    found.require((0.0..1.0).contains(&momentum), || {
        format!("`optimizer.muon_momentum` = {momentum}; it must be in [0, 1)")
    });
    found.within("optimizer.muon_ns_steps", o.muon_ns_steps, 1, MAX_NEWTON_SCHULZ_STEPS);
    let default = Optimizer::default();
    for (key, changed) in [
        ("muon_momentum", momentum != default.muon_momentum),
        ("muon_nesterov", o.muon_nesterov != default.muon_nesterov),
        ("muon_ns_steps", o.muon_ns_steps != default.muon_ns_steps),
        ("muon_adjust_lr", o.muon_adjust_lr != default.muon_adjust_lr),
    ] {
        found.require(o.name == OptimizerName::Muon || !changed, || {
            format!(
                "`optimizer.{key}` is set, but `optimizer.name` = \"{}\" does not read it; set `optimizer.name` = \
                 \"Muon\" or remove the key",
                o.name
            )
        });
    }
}

fn parallelism(found: &mut Found, p: &Parallelism) {
    found.require(p.gradient_bucket_mb > 0.0, || {
        format!("`parallelism.gradient_bucket_mb` = {}; it is a size above 0, in MiB", p.gradient_bucket_mb)
    });
    found.within("parallelism.data_parallel_replicate_degree", p.data_parallel_replicate_degree, 1, MAX_RANKS);
    for (key, degree) in [
        ("parallelism.data_parallel_shard_degree", p.data_parallel_shard_degree),
        ("parallelism.zero_parameter_degree", p.zero_parameter_degree),
        ("parallelism.zero_gradient_degree", p.zero_gradient_degree),
        ("parallelism.zero_optimizer_degree", p.zero_optimizer_degree),
    ] {
        found.require(degree == -1 || (1..=MAX_RANKS as i64).contains(&degree), || {
            format!("`{key}` = {degree}; it is a number of ranks, or -1 for all that are left")
        });
    }
    for (key, degree) in [
        ("parallelism.tensor_parallel_degree", p.tensor_parallel_degree),
        ("parallelism.pipeline_parallel_degree", p.pipeline_parallel_degree),
        ("parallelism.context_parallel_degree", p.context_parallel_degree),
        ("parallelism.context_parallel_head_degree", p.context_parallel_head_degree),
    ] {
        found.within(key, degree, 1, MAX_RANKS);
    }
}

fn data(found: &mut Found, c: &JobConfig) {
    let d = &c.data;
    found.require(!d.sources.is_empty() || c.job.kind == JobType::Rlhf, || {
        "`data.sources` is empty: nothing to train on; add [[data.sources]] with paths = [\"corpus/*.txt\"]".into()
    });
    sources(found, "data.sources", &d.sources);
    sources(found, "validation.sources", &c.validation.sources);
    let name = |s: &DataSource| s.name.clone();
    for (index, source) in c.validation.sources.iter().enumerate().filter(|(_, s)| s.name.is_some()) {
        found.require(!d.sources.iter().any(|other| name(other) == name(source)), || {
            let name = source.name.as_deref().unwrap_or_default();
            format!("`validation.sources.{index}.name`: a source of `data.sources` is named \"{name}\" too")
        });
    }
    found.require((0.0..1.0).contains(&d.validation_fraction), || {
        format!("`data.validation_fraction` = {}; it must be in [0, 1)", d.validation_fraction)
    });
    found.at_least("data.shard_tokens", d.shard_tokens, 1 << 10);
    found.within("data.train_tokenizer_vocab", d.train_tokenizer_vocab, 0, MAX_VOCABULARY);
    found.require(d.train_tokenizer_vocab == 0 || d.train_tokenizer_vocab >= 257, || {
        format!(
            "`data.train_tokenizer_vocab` = {}; a byte-level tokenizer has 256 bytes and a mark for the end of a \
             document: at least 257, or 0 to train none",
            d.train_tokenizer_vocab
        )
    });
}

/// Rules of each source of a list, and between them.
fn sources(found: &mut Found, list: &str, sources: &[DataSource]) {
    for (index, source) in sources.iter().enumerate() {
        let key = format!("{list}.{index}");
        found.require(!source.paths.is_empty(), || format!("`{key}.paths` is empty: name files, folders or globs"));
        if let Some(weight) = source.weight {
            found.require(weight.is_finite() && weight > 0.0, || {
                format!("`{key}.weight` = {weight}; it must be above 0 (or remove the source)")
            });
        }
    }
    let name = |s: &DataSource| s.name.clone().unwrap_or_default();
    for (index, source) in sources.iter().enumerate().filter(|(_, s)| s.name.is_some()) {
        found.require(!sources[..index].iter().any(|other| name(other) == name(source)), || {
            format!("`{list}.{index}.name`: two sources are named \"{}\"; give each its own", name(source))
        });
    }
    let weighted = sources.iter().filter(|s| s.weight.is_some()).count();
    found.require(weighted == 0 || weighted == sources.len(), || {
        format!("`{list}`: {weighted} of {} have a `weight`; give one to all or to none", sources.len())
    });
}

/// Keys of the other kind of job would be read by nobody.
fn chat(found: &mut Found, c: &JobConfig) {
    found.require(c.data.chat_template.is_none() || c.data.chat_template_name.is_none(), || {
        "`data.chat_template` and `data.chat_template_name` are both set; remove one".into()
    });
    let lists = [("data.sources", &c.data.sources), ("validation.sources", &c.validation.sources)];
    let all =
        || lists.iter().flat_map(|(list, all)| all.iter().enumerate().map(move |(i, s)| (format!("{list}.{i}"), s)));
    if c.job.kind != JobType::Sft {
        // Prompts of reinforcement learning are rendered by a chat template too.
        let is_read = |key: &str| c.job.kind == JobType::Rlhf && key.starts_with("chat_template");
        let data = c.data.chat_keys().map(|(key, is_set)| (format!("data.{key}"), is_set && !is_read(key)));
        let each = all().flat_map(|(at, s)| s.chat_keys().map(|(key, is_set)| (format!("{at}.{key}"), is_set)));
        for (key, _) in data.into_iter().chain(each).filter(|(_, is_set)| *is_set) {
            let message = format!(
                "`{key}` is set, but `job.type` = \"{}\" reads no conversations; set `job.type` = \"sft\" or remove the \
                 key",
                if c.job.kind == JobType::Rlhf { "rlhf" } else { "pretrain" }
            );
            found.require(false, || message);
        }
        return;
    }
    for (at, _) in all().filter(|(_, source)| source.text_column.is_some()) {
        found.require(false, || {
            format!(
                "`{at}.text_column` is set, but `job.type` = \"sft\" reads conversations: name their columns with \
                 `messages_column`, or `prompt_column` and `completion_column`"
            )
        });
    }
    found.require(c.data.document_mask, || {
        "`data.document_mask` = false would let a conversation attend to the one before it in a sequence; `job.type` = \
         \"sft\" needs it true"
            .into()
    });
    found.require(c.data.train_tokenizer_vocab == 0, || {
        "`data.train_tokenizer_vocab` is set, but `job.type` = \"sft\" needs the tokenizer of the model that is tuned; \
         remove the key"
            .into()
    });
}

fn recompute(found: &mut Found, c: &JobConfig) {
    let option = &c.activation_checkpoint.selective_ac_option;
    let every = option.parse::<usize>().ok().filter(|&k| k >= 1);
    let known = every.is_some() || matches!(option.as_str(), "attention" | "feed_forward");
    found.require(known || c.activation_checkpoint.mode != RecomputeMode::Selective, || {
        format!(
            "`activation_checkpoint.selective_ac_option` = \"{option}\"; offered are a whole number k in quotes (every \
             k-th block is recomputed), \"attention\" and \"feed_forward\"; operator by operator (\"op\") is not"
        )
    });
    for (index, layers) in c.activation_checkpoint.layers.iter().enumerate() {
        found.require(layers.first <= layers.last, || {
            format!(
                "`activation_checkpoint.layers.{index}`: `first` = {} lies behind `last` = {}",
                layers.first, layers.last
            )
        });
    }
}

fn saving(found: &mut Found, c: &JobConfig) {
    let s = &c.checkpoint;
    found.at_least("checkpoint.interval", s.interval, 1);
    found.require(!s.folder.as_os_str().is_empty(), || "`checkpoint.folder` is empty".into());
    found.require(s.enable || !s.last_save_in_hf, || {
        "`checkpoint.last_save_in_hf` exports the last checkpoint, but `checkpoint.enable` = false saves none; set it \
         to true"
            .into()
    });
    found.require(s.load_step >= -1, || {
        format!("`checkpoint.load_step` = {}; it is a step, or -1 for the newest", s.load_step)
    });
    found.require(!s.initial_load_in_hf || s.initial_load_path.is_some(), || {
        "`checkpoint.initial_load_in_hf` is set, but neither `checkpoint.initial_load_path` nor \
         `model.hf_assets_path` says which model to start from"
            .into()
    });
    found.require(!s.initial_load_in_hf || s.initial_load_model_only, || {
        "`checkpoint.initial_load_in_hf` needs `checkpoint.initial_load_model_only` = true: a Hugging Face folder \
         holds no optimizer states"
            .into()
    });
}

fn validation(found: &mut Found, c: &JobConfig) {
    let v = &c.validation;
    found.at_least("validation.freq", v.freq, 1);
    found.require(v.steps == -1 || v.steps >= 1, || {
        format!("`validation.steps` = {}; it is a number of batches, or -1 for all of the held-out data", v.steps)
    });
    let own = !v.sources.is_empty();
    found.require(!v.enable || own || c.data.validation_fraction > 0.0, || {
        "`validation.enable` is set, but `data.validation_fraction` = 0 holds nothing out".into()
    });
    found.require(!own || c.data.validation_fraction == 0.0, || {
        format!(
            "`data.validation_fraction` = {} and `validation.sources` exclude each other: hold documents out, or name \
             files of their own",
            c.data.validation_fraction
        )
    });
    found.require(!own || v.enable, || {
        "`validation.sources` is set, but `validation.enable` = false: nothing is evaluated; set it to true".into()
    });
    found.require(v.sample_tokens == 0 || !v.prompts.is_empty(), || {
        format!("`validation.sample_tokens` = {}, but `validation.prompts` is empty", v.sample_tokens)
    });
    found.require(v.sample_tokens == 0 || v.enable, || {
        format!(
            "`validation.sample_tokens` = {}, but `validation.enable` = false: samples are written after evaluations; \
             set it to true",
            v.sample_tokens
        )
    });
}

fn model_keys(found: &mut Found, m: &Model) {
    for (key, value, most) in [
        ("model.vocab_size", m.vocab_size, MAX_VOCABULARY),
        ("model.hidden_size", m.hidden_size, MAX_WIDTH),
        ("model.intermediate_size", m.intermediate_size, MAX_WIDTH),
        ("model.num_hidden_layers", m.num_hidden_layers, MAX_LAYERS),
        ("model.num_attention_heads", m.num_attention_heads, MAX_HEADS),
        ("model.num_key_value_heads", m.num_key_value_heads, MAX_HEADS),
        ("model.head_dim", m.head_dim, MAX_WIDTH),
        ("model.max_position_embeddings", m.max_position_embeddings, MAX_STEPS),
        ("model.sliding_window", m.sliding_window.filter(|&w| w > 0), MAX_STEPS),
    ] {
        if let Some(value) = value {
            found.within(key, value, 1, most);
        }
    }
}

/// Rules that need the resolved architecture.
pub(crate) fn check_with_model(c: &JobConfig, spec: &ModelSpec) -> Result<(), ConfigError> {
    let mut found = Found::default();
    model_keys(&mut found, &c.model);
    if found.0.is_empty() {
        architecture(&mut found, &c.model, spec);
    }
    let (length, longest) = (c.training.seq_len, spec.max_position_embeddings);
    found.require(length <= longest, || {
        format!(
            "`training.seq_len` = {length} > `model.max_position_embeddings` = {longest}: positions {longest} and above \
             are not meant for this model; lower the one or raise the other"
        )
    });
    let num_layers = spec.blocks.len();
    for (index, layers) in c.activation_checkpoint.layers.iter().enumerate() {
        found.require(layers.last < num_layers, || {
            format!(
                "`activation_checkpoint.layers.{index}`: `last` = {}, but the model's {num_layers} layers are 0 to {}",
                layers.last,
                num_layers - 1
            )
        });
    }
    found.result()
}

fn architecture(found: &mut Found, keys: &Model, spec: &ModelSpec) {
    let Some(block) = spec.blocks.first() else { return };
    let MixerSpec::Attention(a) = &block.mixer;
    let (heads, kv, family) = (a.num_heads, a.num_kv_heads, spec.family);
    found.require(heads.is_multiple_of(kv), || {
        format!(
            "`model.num_attention_heads` = {heads} is not a multiple of `model.num_key_value_heads` = {kv}: {heads} / \
             {kv} leaves {}",
            heads % kv
        )
    });
    found.require(a.head_dim > 0 && a.head_dim.is_multiple_of(2), || {
        format!("`model.head_dim` = {}; RoPE turns pairs, so it must be even and above 0", a.head_dim)
    });
    let d = spec.hidden_size;
    found.require(family != Family::Llama || d.is_multiple_of(heads), || {
        format!(
            "`model.hidden_size` = {d} is not a multiple of `model.num_attention_heads` = {heads}, which transformers \
             demands of the llama family: {d} / {heads} leaves {}",
            d % heads
        )
    });
    found.require(a.sliding_window.is_none() || family != Family::Llama, || {
        "`model.sliding_window` is set, but the llama family has none; set `model.name` = \"mistral\" or remove it"
            .into()
    });
    let bias = keys.attention_bias.unwrap_or(false);
    let fits = match family {
        Family::Llama | Family::Qwen3 => true,
        Family::Mistral => !bias,
        Family::Qwen2 => bias,
    };
    found.require(fits, || {
        let rule = if bias { "has no attention biases" } else { "always has biases on q, k and v" };
        format!("`model.attention_bias` = {bias}, but the {} family {rule}; remove the key", family_name(family))
    });
    found.require(!block.feed_forward.bias || family == Family::Llama, || {
        format!("`model.mlp_bias` = true, but the {} family has none; remove the key", family_name(family))
    });
    found.positive("model.rope_theta", a.rope.theta);
    found.positive("model.rms_norm_eps", spec.rms_norm_eps);
    found.unit("model.initializer_range", spec.initializer_range);
    rope_scaling(found, a.rope.scaling);
}

fn rope_scaling(found: &mut Found, scaling: Option<RopeScaling>) {
    match scaling {
        None => {}
        Some(RopeScaling::Linear { factor }) => found.factor("model.rope_scaling.factor", factor),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => {
            found.factor("model.rope_scaling.factor", factor);
            found.positive("model.rope_scaling.low_freq_factor", low_freq_factor);
            found.require(high_freq_factor > low_freq_factor, || {
                format!(
                    "`model.rope_scaling.high_freq_factor` = {high_freq_factor} must be above `low_freq_factor` = \
                     {low_freq_factor}"
                )
            });
            let key = "model.rope_scaling.original_max_position_embeddings";
            found.at_least(key, original_max_position_embeddings, 1);
        }
    }
}

/// Collects what is wrong.
#[derive(Default)]
pub(crate) struct Found(Vec<String>);

impl Found {
    pub(crate) fn require(&mut self, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.0.push(message());
        }
    }

    pub(crate) fn at_least(&mut self, key: &str, value: usize, least: usize) {
        self.require(value >= least, || format!("`{key}` = {value}; it must be at least {least}"));
    }

    pub(crate) fn within(&mut self, key: &str, value: usize, least: usize, most: usize) {
        self.require((least..=most).contains(&value), || {
            format!("`{key}` = {value}; it must be from {least} to {most}")
        });
    }

    pub(crate) fn not_negative(&mut self, key: &str, value: f64) {
        self.require(value.is_finite() && value >= 0.0, || {
            format!("`{key}` = {value}; it must be a number of at least 0")
        });
    }

    pub(crate) fn finite(&mut self, key: &str, value: f64) {
        self.require(value.is_finite(), || format!("`{key}` = {value}; it must be a finite number"));
    }

    pub(crate) fn seconds(&mut self, key: &str, value: f64, most: f64) {
        self.require(value > 0.0 && value <= most, || {
            format!("`{key}` = {value}; it is a time above 0 and at most {most}, in seconds")
        });
    }

    pub(crate) fn not_empty(&mut self, key: &str, value: &str, hint: &str) {
        self.require(!value.is_empty(), || format!("`{key}` is empty; set it, {hint}"));
    }

    pub(crate) fn positive(&mut self, key: &str, value: f64) {
        self.require(value.is_finite() && value > 0.0, || format!("`{key}` = {value}; it must be a number above 0"));
    }

    pub(crate) fn unit(&mut self, key: &str, value: f64) {
        self.require((0.0..=1.0).contains(&value), || format!("`{key}` = {value}; it must be in [0, 1]"));
    }

    fn factor(&mut self, key: &str, value: f64) {
        self.require(value.is_finite() && value >= 1.0, || format!("`{key}` = {value}; it must be at least 1"));
    }

    /// What `result` holds; values that are wrong join the others, so that a user sees them all at once.
    ///
    /// # Errors
    /// What is wrong with something else than values.
    pub(crate) fn take<T>(&mut self, result: Result<T, ConfigError>) -> Result<Option<T>, ConfigError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(ConfigError::Values(messages)) => {
                self.0.extend(messages);
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }

    pub(crate) fn add(&mut self, messages: impl IntoIterator<Item = String>) {
        self.0.extend(messages);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn into_messages(self) -> Vec<String> {
        self.0
    }

    pub(crate) fn result(self) -> Result<(), ConfigError> {
        if self.0.is_empty() { Ok(()) } else { Err(ConfigError::Values(self.0)) }
    }
}
