//! Defaults filled in, rules checked, and what errors say.

use crate::{FakeAssets, machine};
use expect_test::{Expect, expect};
use std::path::{Path, PathBuf};
use tangelo_configs::job::{ComputeType, DeviceChoice, Recompute};
use tangelo_configs::model::Family;
use tangelo_configs::resolve::{load, load_str, resolve};
use tangelo_configs::{ConfigError, MixerSpec, ModelAssets, ModelSpec, Plan, Resources, flavor, hf_config};
use tangelo_core::{Axis, DecayShape};

const JOB: &str = "[model]\nflavor = 'debugmodel'\n\
    [data]\ntokenizer = 'tok'\nsources = [{ paths = ['corpus/wiki/*.txt'] }]\n\
    [training]\nlocal_batch_size = 2\nseq_len = 64\nsteps = 1000\n";

fn tokenizer() -> FakeAssets {
    FakeAssets::with_tokenizer("/job/tok", 1000)
}

fn with(sets: &[&str], resources: &Resources, assets: &FakeAssets) -> Result<Plan, ConfigError> {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    resolve(load_str(JOB, "job.toml", &sets)?, resources, assets)
}

pub fn plan(sets: &[&str], world_size: usize) -> Plan {
    with(sets, &machine(world_size), &tokenizer()).unwrap()
}

pub fn fails(sets: &[&str], world_size: usize, expected: Expect) {
    expected.assert_eq(&with(sets, &machine(world_size), &tokenizer()).unwrap_err().to_string());
}

#[test]
fn every_default_is_filled_in() {
    let plan = plan(&[], 4);
    expect![[r#"
        [job]
        type = "pretrain"
        dump_folder = "/job/runs/default"
        description = ""
        print_config = false

        [model]
        name = "llama"
        flavor = "debugmodel"
        vocab_size = 1024
        hidden_size = 192
        intermediate_size = 512
        num_hidden_layers = 4
        num_attention_heads = 6
        num_key_value_heads = 2
        head_dim = 32
        max_position_embeddings = 2048
        rope_theta = 10000.0
        rms_norm_eps = 0.00001
        sliding_window = 0
        attention_bias = false
        mlp_bias = false
        tie_word_embeddings = true
        initializer_range = 0.02

        [data]
        tokenizer = "/job/tok"
        train_tokenizer_vocab = 0
        prepared_folder = "/job/runs/default/prepared"
        packing = "concat"
        document_mask = true
        validation_fraction = 0.005
        shard_tokens = 67108864

        [[data.sources]]
        name = "wiki"
        paths = ["/job/corpus/wiki/*.txt"]
        text_column = "text"

        [optimizer]
        name = "AdamW"
        lr = 0.0008
        beta1 = 0.9
        beta2 = 0.95
        eps = 0.00000001
        weight_decay = 0.1
        muon_momentum = 0.95
        muon_nesterov = true
        muon_ns_steps = 5
        muon_adjust_lr = "match_rms_adamw"

        [lr_scheduler]
        warmup_steps = 200
        total_steps = 1000
        decay_ratio = 0.8
        decay_type = "linear"
        min_lr_factor = 0.0

        [training]
        local_batch_size = 2
        global_batch_size = 8
        seq_len = 64
        max_norm = 1.0
        steps = 1000
        mixed_precision_param = "float32"
        mixed_precision_reduce = "float32"
        device = "cpu"
        num_threads = 4
        max_skipped = 10

        [parallelism]
        data_parallel_replicate_degree = 1
        data_parallel_shard_degree = 4
        zero_parameter_degree = 1
        zero_gradient_degree = 1
        zero_optimizer_degree = 4
        fsdp_reshard_after_forward = "always"
        gradient_bucket_mb = 25.0
        tensor_parallel_degree = 1
        pipeline_parallel_degree = 1
        pipeline_parallel_schedule = "1F1B"
        pipeline_parallel_stage_layers = []
        context_parallel_degree = 1
        context_parallel_head_degree = 1
        context_parallel_rotate_method = "allgather"

        [activation_checkpoint]
        mode = "none"
        selective_ac_option = "2"
        layers = []

        [checkpoint]
        enable = true
        folder = "checkpoint"
        interval = 500
        initial_load_model_only = true
        initial_load_in_hf = false
        last_save_model_only = false
        last_save_in_hf = false
        export_dtype = "float32"
        async_mode = "async"
        keep_latest_k = 10
        keep_every = 0
        load_step = -1

        [validation]
        enable = false
        freq = 100
        steps = 10
        sample_tokens = 0
        prompts = []

        [metrics]
        log_freq = 10
        enable_tensorboard = true
        save_tb_folder = "tb"

        [comm]
        init_timeout_seconds = 300
        train_timeout_seconds = 100

        [debug]
        seed = 42
        deterministic = true
    "#]]
    .assert_eq(&plan.to_toml().unwrap());
    assert_eq!((plan.data_parallel_size, plan.global_batch_size), (4, 8));
    assert_eq!((plan.gradient_accumulation_steps, plan.topology.scopes.states), (1, 4));
    assert_eq!((plan.topology.mesh.world_size(), plan.topology.mesh.degree(Axis::DpShard)), (4, 4));
    assert_eq!((plan.model.bos_token_id, &plan.model.eos_token_ids[..]), (Some(1), &[999][..]));
    assert_eq!(plan.tokens_per_step(), 512);
    let schedule = plan.schedule();
    assert_eq!((schedule.total_steps, schedule.decay_steps, schedule.decay_type), (1000, 800, DecayShape::Linear));
}

#[test]
fn a_gpu_changes_device_and_type() {
    let gpu = Resources { cuda: true, ..machine(2) };
    let training = with(&[], &gpu, &tokenizer()).unwrap().config.training;
    assert_eq!((training.device, training.mixed_precision_param), (DeviceChoice::Cuda, ComputeType::Bfloat16));
    let training = with(&["training.device=cpu"], &gpu, &tokenizer()).unwrap().config.training;
    assert_eq!((training.device, training.mixed_precision_param), (DeviceChoice::Cpu, ComputeType::Float32));
}

#[test]
fn the_batch_arithmetic() {
    let plan = plan(&["training.global_batch_size=24"], 3);
    assert_eq!((plan.global_batch_size, plan.gradient_accumulation_steps), (24, 4));
    fails(
        &["training.global_batch_size=25"],
        3,
        expect![
            "--set training.global_batch_size=25: `training.global_batch_size` = 25 is not `training.local_batch_size` 2 x data-parallel size 3 = 6 sequences times a whole number of accumulation steps: 25 / 6 leaves 1; take 24 or 30, or another local batch size"
        ],
    );
    fails(
        &["training.global_batch_size=4"],
        3,
        expect![
            "--set training.global_batch_size=4: `training.global_batch_size` = 4 is not `training.local_batch_size` 2 x data-parallel size 3 = 6 sequences times a whole number of accumulation steps: 4 / 6 leaves 4; take 6, or another local batch size"
        ],
    );
    fails(
        &["training.global_batch_size=0"],
        3,
        expect![
            "--set training.global_batch_size=0: `training.global_batch_size` = 0; it is a number of sequences, or -1 for `training.local_batch_size` times the data-parallel size"
        ],
    );
}

#[test]
fn absurd_sizes_are_refused_and_overflow_nothing() {
    let huge = "9223372036854775807";
    for key in [
        "training.local_batch_size",
        "training.global_batch_size",
        "training.seq_len",
        "training.steps",
        "lr_scheduler.total_steps",
        "lr_scheduler.warmup_steps",
        "parallelism.data_parallel_replicate_degree",
        "parallelism.data_parallel_shard_degree",
        "parallelism.zero_optimizer_degree",
        "data.train_tokenizer_vocab",
        "model.vocab_size",
        "model.hidden_size",
        "model.num_hidden_layers",
        "model.head_dim",
        "model.sliding_window",
    ] {
        let error = with(&[&format!("{key}={huge}")], &machine(2), &tokenizer()).unwrap_err().to_string();
        assert!(error.contains(&format!("`{}`", key)) || error.contains("exclude each other"), "{key}: {error}");
    }
}

#[test]
fn everything_wrong_is_said_at_once() {
    let sets = [
        "optimizer.lr=-1",
        "optimizer.beta2=1.0",
        "data.validation_fraction=1",
        "validation.enable=true",
        "validation.sample_tokens=3",
        "checkpoint.interval=0",
        "checkpoint.initial_load_in_hf=true",
        "activation_checkpoint.mode=selective",
        "activation_checkpoint.selective_ac_option=op",
        "debug.seed=18446744073709551615",
    ];
    fails(
        &sets[..9],
        1,
        expect![[r#"
            --set optimizer.lr=-1: `optimizer.lr` = -1; it must be a number of at least 0
            --set optimizer.beta2=1.0: `optimizer.beta2` = 1; it must be in [0, 1)
            --set data.validation_fraction=1: `data.validation_fraction` = 1; it must be in [0, 1)
            --set activation_checkpoint.selective_ac_option=op: `activation_checkpoint.selective_ac_option` = "op"; offered are a whole number k in quotes (every k-th block is recomputed), "attention" and "feed_forward"; operator by operator ("op") is not
            --set checkpoint.interval=0: `checkpoint.interval` = 0; it must be at least 1
            --set checkpoint.initial_load_in_hf=true: `checkpoint.initial_load_in_hf` is set, but neither `checkpoint.initial_load_path` nor `model.hf_assets_path` says which model to start from
            --set validation.sample_tokens=3: `validation.sample_tokens` = 3, but `validation.prompts` is empty"#]],
    );
}

#[test]
fn sources_have_names_and_all_or_no_weights() {
    let sets = [
        "data.sources=[{paths=['a/web/*.jsonl.zst']}, {paths=['/b/web.parquet']}, {paths=['~/**/*.rs'], name='code'}]",
    ];
    let sources = plan(&sets, 1).config.data.sources;
    let names: Vec<_> = sources.iter().map(|s| s.name.as_deref().unwrap()).collect();
    assert_eq!(names, ["web", "web-2", "code"]);
    let paths: Vec<_> = sources.iter().map(|s| s.paths[0].as_str()).collect();
    assert_eq!(paths, ["/job/a/web/*.jsonl.zst", "/b/web.parquet", "/home/someone/**/*.rs"]);
    fails(
        &["data.sources=[{paths=['a'], weight=1}, {paths=['b']}, {paths=[], weight=0, name='c'}]"],
        1,
        expect![[r#"
            --set data.sources=[{paths=['a'], weight=1}, {paths=['b']}, {paths=[], weight=0, name='c'}]: `data.sources.2.paths` is empty: name files, folders or globs
            --set data.sources=[{paths=['a'], weight=1}, {paths=['b']}, {paths=[], weight=0, name='c'}]: `data.sources.2.weight` = 0; it must be above 0 (or remove the source)
            --set data.sources=[{paths=['a'], weight=1}, {paths=['b']}, {paths=[], weight=0, name='c'}]: `data.sources`: 2 of 3 have a `weight`; give one to all or to none"#]],
    );
    fails(
        &["data.sources=[]"],
        1,
        expect![[
            r#"--set data.sources=[]: `data.sources` is empty: nothing to train on; add [[data.sources]] with paths = ["corpus/*.txt"]"#
        ]],
    );
    fails(
        &["data.sources=[{paths=['a'], name='x'}, {paths=['b'], name='x'}]"],
        1,
        expect![[
            r#"--set data.sources=[{paths=['a'], name='x'}, {paths=['b'], name='x'}]: `data.sources.1.name`: two sources are named "x"; give each its own"#
        ]],
    );
}

#[test]
fn names_of_sources_are_names_of_folders() {
    let sets = ["data.sources=[{paths=['x'], name='wiki/en'}, {paths=['my text.v2.txt']}, {paths=['*.txt']}]"];
    let names = |resources: &Resources| -> Vec<String> {
        let assets = FakeAssets::with_tokenizer(&resources.absolute(Path::new("tok")).display().to_string(), 1000);
        let sources = with(&sets, resources, &assets).unwrap().config.data.sources;
        sources.into_iter().map(|s| s.name.unwrap()).collect()
    };
    assert_eq!(names(&machine(1)), ["wiki-en", "my-text", "job"]);
    assert_eq!(names(&Resources { current_dir: "/".into(), ..machine(1) })[2], "source");
}

#[test]
fn the_current_folder_stands_for_itself_in_globs() {
    let sets = ["data.sources=[{paths=['notes/*.md', 'a.txt', '/b[1]/*', '~/c?']}, {paths=['*.md']}]"];
    let here = Resources { current_dir: "/runs[1]".into(), home: Some("/home/a*b".into()), ..machine(1) };
    let assets = FakeAssets::with_tokenizer("/runs[1]/tok", 1000);
    let plan = with(&sets, &here, &assets).unwrap();
    let sources = &plan.config.data.sources;
    assert_eq!(sources[0].paths, ["/runs[[]1[]]/notes/*.md", "/runs[1]/a.txt", "/b[1]/*", "/home/a[*]b/c?"]);
    assert_eq!(sources[1].name.as_deref(), Some("runs-1-"));
    let again = resolve(load_str(&plan.to_toml().unwrap(), "again", &[]).unwrap(), &here, &assets).unwrap();
    assert_eq!(plan, again);
}

/// Assets of someone who only looks at the plan.
struct Absent;

impl ModelAssets for Absent {
    fn model_spec(&self, _: &Path) -> Result<ModelSpec, String> {
        Err("nothing there".into())
    }

    fn vocab_size(&self, _: &Path) -> Result<usize, String> {
        Err("nothing there".into())
    }

    fn may_lack(&self, _: &Path) -> bool {
        true
    }
}

#[test]
fn a_plan_can_be_looked_at_without_a_tokenizer_where_the_vocabulary_is_known() {
    let resolve_with = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        resolve(load_str(JOB, "job.toml", &sets).unwrap(), &machine(1), &Absent)
    };
    assert_eq!(resolve_with(&["model.flavor=llama-3.1-8b"]).unwrap().model.vocab_size, 128_256);
    let error = resolve_with(&[]).unwrap_err().to_string();
    assert_eq!(error, "`data.tokenizer` = \"/job/tok\": nothing there");
}

#[test]
fn errors_about_values_name_the_place_of_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    write("base.toml", "[optimizer]\nlr = -1\nbeta1 = 2\n[training]\nseq_len = 4096\n");
    let job = write(
        "job.toml",
        "include = ['base.toml']\n[optimizer]\n  beta1 = 3.0\n[model]\nflavor = 'debugmodel'\n\
         [data]\ntokenizer = 'tok'\n[[data.sources]]\npaths = ['a']\n  weight = -1\n",
    );
    let check = |sets: &[&str], expected: Expect| {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        let error = resolve(load(&job, &sets).unwrap(), &machine(1), &tokenizer()).unwrap_err().to_string();
        expected.assert_eq(&error.replace(folder.path().to_str().unwrap(), "DIR"));
    };
    check(
        &[],
        expect![[r#"
        DIR/base.toml:2:1: `optimizer.lr` = -1; it must be a number of at least 0
        DIR/job.toml:3:3: `optimizer.beta1` = 3; it must be in [0, 1)
        DIR/job.toml:10:3: `data.sources.0.weight` = -1; it must be above 0 (or remove the source)"#]],
    );
    let whole = "data.sources=[{ paths = ['a'], weight = 0 }]";
    check(
        &["optimizer.lr=1", "optimizer.beta1=-0.5", whole],
        expect![[r#"
        --set optimizer.beta1=-0.5: `optimizer.beta1` = -0.5; it must be in [0, 1)
        --set data.sources=[{ paths = ['a'], weight = 0 }]: `data.sources.0.weight` = 0; it must be above 0 (or remove the source)"#]],
    );
    check(
        &["optimizer.lr=1", "optimizer.beta1=0.5", "data.sources.0.weight=1"],
        expect![
            "DIR/base.toml:5:1: `training.seq_len` = 4096 > `model.max_position_embeddings` = 2048: positions 2048 and above are not meant for this model; lower the one or raise the other"
        ],
    );
    check(
        &["optimizer.lr=1", "optimizer.beta1=0.5", "data.sources.0.weight=1", "training.seq_len=8192"],
        expect![
            "--set training.seq_len=8192: `training.seq_len` = 8192 > `model.max_position_embeddings` = 2048: positions 2048 and above are not meant for this model; lower the one or raise the other"
        ],
    );
}

#[test]
fn the_vocabulary_comes_from_the_tokenizer_rounded_up() {
    assert_eq!(plan(&[], 1).model.vocab_size, 1024);
    assert_eq!(plan(&["model.vocab_size=1000"], 1).model.vocab_size, 1000);
    fails(
        &["model.vocab_size=999"],
        1,
        expect![
            "--set model.vocab_size=999: `model.vocab_size` = 999 is less than the 1000 ids of the tokenizer /job/tok: ids 999 and above would have no embedding; set it to 1024 or more, or take another tokenizer"
        ],
    );
    fails(
        &["data.tokenizer=elsewhere"],
        1,
        expect![[r#"`data.tokenizer` = "/job/elsewhere": no tokenizer.json there"#]],
    );

    let job = JOB.replace("tokenizer = 'tok'\n", "");
    let resolve_job = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        resolve(load_str(&job, "job.toml", &sets).unwrap(), &machine(1), &FakeAssets::default())
    };
    expect!["no tokenizer: set `data.tokenizer` (a tokenizer.json, a folder that holds one, a GGUF file), `model.hf_assets_path`, or `data.train_tokenizer_vocab`"].assert_eq(&resolve_job(&[]).unwrap_err().to_string());
    let trained = resolve_job(&["data.train_tokenizer_vocab=500"]).unwrap();
    assert_eq!((trained.model.vocab_size, &trained.model.eos_token_ids[..]), (512, &[0][..]));
    let path = trained.config.data.tokenizer_path().unwrap();
    assert_eq!(path, Path::new("/job/runs/default/prepared/tokenizer.json"));
    // From the resolved file, with the prepared data at another place.
    let moved = ["data.prepared_folder=/else".to_owned()];
    let config = load_str(&trained.to_toml().unwrap(), "config.toml", &moved).unwrap();
    let moved = resolve(config, &machine(1), &FakeAssets::default()).unwrap();
    assert_eq!(moved.config.data.tokenizer_path().unwrap(), Path::new("/else/tokenizer.json"));
    fails(
        &["data.train_tokenizer_vocab=500"],
        1,
        expect![[
            r#"--set data.train_tokenizer_vocab=500: `data.tokenizer` = "/job/tok" and `data.train_tokenizer_vocab` = 500 exclude each other: use the one or train the other"#
        ]],
    );
    fails(
        &["data.train_tokenizer_vocab=100"],
        1,
        expect![[r#"
            --set data.train_tokenizer_vocab=100: `data.tokenizer` = "/job/tok" and `data.train_tokenizer_vocab` = 100 exclude each other: use the one or train the other
            --set data.train_tokenizer_vocab=100: `data.train_tokenizer_vocab` = 100; a byte-level tokenizer has 256 bytes and a mark for the end of a document: at least 257, or 0 to train none"#]],
    );
}

#[test]
fn models_by_hand_by_flavor_and_from_assets() {
    fails(
        &["model.flavor=llama-3.2-8b"],
        1,
        expect![[
            r#"--set model.flavor=llama-3.2-8b: `model.flavor` = "llama-3.2-8b" is not known; did you mean "llama-3.2-1b"? There are debugmodel, tiny-4m, tiny-10m, smollm2-135m, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b, mistral-7b, qwen2.5-0.5b, qwen2.5-7b, qwen3-0.6b, qwen3-8b"#
        ]],
    );
    fails(
        &["model.name=qwen3"],
        1,
        expect![[
            r#"--set model.name=qwen3: `model.name` = "qwen3", but flavor "debugmodel" is of family "llama"; leave `model.name` out"#
        ]],
    );
    fails(
        &["model.num_key_value_heads=4"],
        1,
        expect![
            "--set model.num_key_value_heads=4: `model.num_attention_heads` = 6 is not a multiple of `model.num_key_value_heads` = 4: 6 / 4 leaves 2"
        ],
    );
    fails(
        &["model.head_dim=33"],
        1,
        expect!["--set model.head_dim=33: `model.head_dim` = 33; RoPE turns pairs, so it must be even and above 0"],
    );
    fails(
        &["training.seq_len=4096"],
        1,
        expect![
            "--set training.seq_len=4096: `training.seq_len` = 4096 > `model.max_position_embeddings` = 2048: positions 2048 and above are not meant for this model; lower the one or raise the other"
        ],
    );
    fails(
        &["model.sliding_window=16", "model.hidden_size=200"],
        1,
        expect![[r#"
        `model.head_dim` = 33; RoPE turns pairs, so it must be even and above 0
        --set model.hidden_size=200: `model.hidden_size` = 200 is not a multiple of `model.num_attention_heads` = 6, which transformers demands of the llama family: 200 / 6 leaves 2
        --set model.sliding_window=16: `model.sliding_window` is set, but the llama family has none; set `model.name` = "mistral" or remove it"#]],
    );

    let by_hand = "[model]\nname = 'qwen3'\nhidden_size = 96\nnum_hidden_layers = 3\n[data]\ntokenizer='tok'\nsources=[{paths=['a']}]\n";
    let resolve_text = |text: &str| resolve(load_str(text, "job.toml", &[]).unwrap(), &machine(1), &tokenizer());
    expect!["no model: set `model.flavor` (one of debugmodel, tiny-4m, tiny-10m, smollm2-135m, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b, mistral-7b, qwen2.5-0.5b, qwen2.5-7b, qwen3-0.6b, qwen3-8b), `model.hf_assets_path`, or `model.intermediate_size`, `model.num_attention_heads` by hand"].assert_eq(&resolve_text(by_hand).unwrap_err().to_string());
    let by_hand =
        by_hand.replace("hidden_size = 96", "hidden_size = 96\nintermediate_size = 128\nnum_attention_heads = 4");
    let model = resolve_text(&by_hand).unwrap().model;
    let MixerSpec::Attention(a) = &model.blocks[2].mixer;
    assert_eq!(
        (model.family, model.blocks.len(), a.num_kv_heads, a.head_dim, a.qk_norm),
        (Family::Qwen3, 3, 4, 24, true)
    );
}

/// A Qwen2 model whose last two of four layers have a window.
fn mixed_model() -> ModelSpec {
    let mut json =
        hf_config::to_json(&flavor::flavor("qwen2.5-0.5b").unwrap().spec(0).unwrap(), tangelo_core::DType::F32);
    json["num_hidden_layers"] = 4.into();
    json["use_sliding_window"] = true.into();
    json["sliding_window"] = 128.into();
    json["max_window_layers"] = 2.into();
    json.as_object_mut().unwrap().remove("layer_types");
    json["eos_token_id"] = 7.into();
    hf_config::from_json(&json).unwrap()
}

#[test]
fn assets_give_shape_tokenizer_and_weights() {
    let path = PathBuf::from("/job/assets/model");
    let mut assets = FakeAssets::default();
    assets.models.insert(path.clone(), mixed_model());
    assets.tokenizers.insert(path.clone(), 151_000);
    let job = "[model]\nhf_assets_path = 'assets/model'\n[data]\nsources = [{ paths = ['x'] }]\n[checkpoint]\ninitial_load_in_hf = true\n";
    let with = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        resolve(load_str(job, "job.toml", &sets).unwrap(), &machine(1), &assets)
    };
    let plan = with(&[]).unwrap();
    assert_eq!(plan.config.checkpoint.initial_load_path.as_deref(), Some(path.as_path()));
    assert_eq!(plan.config.data.tokenizer.as_deref(), Some(path.as_path()));
    let windows = |plan: &Plan| -> Vec<Option<usize>> {
        plan.model
            .blocks
            .iter()
            .map(|b| {
                let MixerSpec::Attention(a) = &b.mixer;
                a.sliding_window
            })
            .collect()
    };
    assert_eq!(windows(&plan), [None, None, Some(128), Some(128)]);
    assert_eq!(windows(&with(&["model.sliding_window=64"]).unwrap()), [None, None, Some(64), Some(64)]);
    assert_eq!(windows(&with(&["model.sliding_window=0"]).unwrap()), [None; 4]);
    let again = resolve(load_str(&plan.to_toml().unwrap(), "again", &[]).unwrap(), &machine(1), &assets).unwrap();
    assert_eq!(plan, again);
    expect![[r#"`checkpoint.initial_load_path` = "/job/assets/model": the weights do not fit [model]: model.layers.4.input_layernorm.weight is not in them"#]].assert_eq(&with(&["model.num_hidden_layers=5"]).unwrap_err().to_string());
    expect![[r#"`checkpoint.initial_load_path` = "/job/assets/model": the weights do not fit [model]: model.layers.0.mlp.gate_proj.weight is [4864, 896] there, [4096, 896] here"#]].assert_eq(&with(&["model.intermediate_size=4096"]).unwrap_err().to_string());
    expect![[r#"`model.hf_assets_path` = "/job/nowhere": no config.json and no GGUF file there"#]]
        .assert_eq(&with(&["model.hf_assets_path=nowhere"]).unwrap_err().to_string());
}

#[test]
fn selective_recomputation_takes_every_kth_block() {
    let marks = |sets: &[&str]| {
        let p = plan(sets, 1);
        (0..4).map(|l| p.recompute(l) != Recompute::None).collect::<Vec<_>>()
    };
    assert_eq!(marks(&[]), [false; 4]);
    assert_eq!(marks(&["activation_checkpoint.mode=full"]), [true; 4]);
    assert_eq!(marks(&["activation_checkpoint.mode=selective"]), [false, true, false, true]);
    let third = ["activation_checkpoint.mode=selective", "activation_checkpoint.selective_ac_option='3'"];
    assert_eq!(marks(&third), [false, false, true, false]);
}

#[test]
fn the_machine_is_described() {
    let here = Resources::of_this_machine(2, 2).unwrap();
    assert!(here.current_dir.is_absolute() && here.num_cores >= 1);
    assert_eq!(here.absolute(Path::new("x")), here.current_dir.join("x"));
    assert_eq!(here.absolute(Path::new("/x")), Path::new("/x"));
}
