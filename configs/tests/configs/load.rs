//! Files, includes, `--set`, and what errors say.

use expect_test::{Expect, expect};
use std::path::Path;
use tangelo_configs::resolve::{load, load_str};
use tangelo_configs::{ConfigError, JobConfig};

fn text(text: &str, expected: Expect) {
    expected.assert_eq(&load_str(text, "job.toml", &[]).unwrap_err().to_string());
}

fn set(set: &str) -> Result<JobConfig, ConfigError> {
    load_str("[training]\nsteps = 7\n[[data.sources]]\npaths = ['a']\n", "job.toml", &[set.to_owned()])
}

fn bad_set(argument: &str, expected: Expect) {
    expected.assert_eq(&set(argument).unwrap_err().to_string());
}

#[test]
fn unknown_keys_name_the_place_and_the_nearest_key() {
    text(
        "[training]\nlocal_batch_size = 2\nstep = 100\n\n[trainng]\nseq_len = 5\n",
        expect![[r#"
            job.toml:3:1: unknown key `training.step`; did you mean `training.steps`?
            job.toml:5:2: unknown section or key `trainng`; did you mean `training`?"#]],
    );
    text("steps = 10\n", expect!["job.toml:1:1: unknown section or key `steps`; did you mean `training.steps`?"]);
    text(
        "[optimizer]\nwarmup_steps = 3\n",
        expect!["job.toml:2:1: unknown key `optimizer.warmup_steps`; did you mean `lr_scheduler.warmup_steps`?"],
    );
    text(
        "[data]\nsources = [{ path = 'x' }]\n",
        expect!["job.toml:2:14: unknown key `data.sources.path`; did you mean `data.sources.paths`?"],
    );
    text(
        "model.rope_scaling = { rope_type = 'linear', facto = 2 }\n",
        expect!["job.toml:1:46: unknown key `model.rope_scaling.facto`; did you mean `model.rope_scaling.factor`?"],
    );
    // Known, but not of this kind of scaling.
    text(
        "[model]\nrope_scaling = { rope_type = 'linear', factor = 8, low_freq_factor = 1 }\n",
        expect![
            "job.toml:2:70: `model.rope_scaling.low_freq_factor`: unknown field `low_freq_factor`, expected `factor`"
        ],
    );
    text(
        "[comm]\nqqq = 3\n",
        expect!["job.toml:2:1: unknown key `comm.qqq`; [comm] has init_timeout_seconds, train_timeout_seconds"],
    );
}

#[test]
fn wrong_types_and_values_name_the_key() {
    text(
        "[training]\n  steps = \"many\"\n",
        expect![
            r#"job.toml:2:11: `training.steps`: invalid type: string "many", expected a whole number of at least 0"#
        ],
    );
    text(
        "[training]\nsteps = -1\n",
        expect!["job.toml:2:9: `training.steps`: invalid value: integer `-1`, expected a whole number of at least 0"],
    );
    text(
        "[activation_checkpoint]\nmode = 'ful'\n",
        expect![
            "job.toml:2:8: `activation_checkpoint.mode`: unknown variant `ful`, expected one of `none`, `selective`, `full`; did you mean `full`?"
        ],
    );
    text(
        "[[data.sources]]\npaths = 'corpus.txt'\n",
        expect![[r#"job.toml:2:9: `data.sources.paths`: invalid type: string "corpus.txt", expected a sequence"#]],
    );
    text("[training]\nsteps = 10\nsteps = 11\n", expect!["job.toml:3:1: duplicate key"]);
    text("[training\nsteps = 10\n", expect!["job.toml:1:10: unclosed table, expected `]`"]);
}

#[test]
fn set_takes_toml_values_and_bare_strings() {
    assert_eq!(set("training.steps=9").unwrap().training.steps, 9);
    assert_eq!(set("optimizer.lr = 3e-4").unwrap().optimizer.lr, 3e-4);
    assert_eq!(set("optimizer.lr=1").unwrap().optimizer.lr, 1.0);
    assert_eq!(set("job.dump_folder=runs/a=b").unwrap().job.dump_folder, Path::new("runs/a=b"));
    assert_eq!(set("job.description=7").unwrap().job.description, "7");
    assert_eq!(set("data.sources.0.paths=['x', 'y']").unwrap().data.sources[0].paths, ["x", "y"]);
    assert_eq!(set("data.sources.0.weight=2").unwrap().data.sources[0].weight, Some(2.0));
    assert_eq!(set("validation.prompts=[\"a\\n\"]").unwrap().validation.prompts, ["a\n"]);
    assert_eq!(set("training.steps=9").unwrap().training.local_batch_size, 8);
}

#[test]
fn bad_sets_say_so() {
    bad_set(
        "training.steps",
        expect!["--set training.steps: expected table.key=value, such as --set training.steps=100"],
    );
    bad_set(
        "training.step=3",
        expect!["--set training.step=3: unknown key `training.step`; did you mean `training.steps`?"],
    );
    bad_set(
        "training.steps=soon",
        expect![
            r#"--set training.steps=soon: `training.steps`: invalid type: string "soon", expected a whole number of at least 0"#
        ],
    );
    bad_set("training=3", expect!["--set training=3: `training` is a section; name a key in it: table.key=value"]);
    bad_set("data.sources.1.weight=2", expect!["--set data.sources.1.weight=2: `1` is no index into an array of 1"]);
    bad_set(
        "training.steps.x=2",
        expect![
            "--set training.steps.x=2: unknown key `training.steps.x`: `training.steps` is a value, it has no keys"
        ],
    );
}

#[test]
fn includes_are_read_first_relative_to_their_file() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    write("base/model.toml", "[model]\nflavor = 'debugmodel'\n[model.rope_scaling]\nrope_type='linear'\nfactor=2\n");
    write("base/common.toml", "include = ['model.toml']\n[training]\nsteps = 1\nseq_len = 64\n");
    let job =
        write("job.toml", "include = ['base/common.toml']\n[training]\nsteps = 2\n[data]\nsources=[{paths=['a']}]\n");
    let config = load(&job, &["training.seq_len=32".into()]).unwrap();
    assert_eq!(config.model.flavor.as_deref(), Some("debugmodel"));
    assert_eq!((config.training.steps, config.training.seq_len), (2, 32));
    assert!(config.include.is_empty() && config.model.rope_scaling.is_some());

    let wrong = write("wrong.toml", "include = ['base/typo.toml']\n");
    write("base/typo.toml", "\n[model]\nflavour = 'debugmodel'\n");
    let message = load(&wrong, &[]).unwrap_err().to_string().replace(folder.path().to_str().unwrap(), "DIR");
    expect!["DIR/base/typo.toml:3:1: unknown key `model.flavour`; did you mean `model.flavor`?"].assert_eq(&message);

    let cycle = write("a.toml", "include = ['b.toml']\n");
    write("b.toml", "include = ['base/../a.toml']\n");
    let real = folder.path().canonicalize().unwrap();
    let message = load(&cycle, &[]).unwrap_err().to_string().replace(real.to_str().unwrap(), "DIR");
    expect!["DIR/a.toml includes itself: DIR/a.toml -> DIR/b.toml -> DIR/a.toml; remove one of these includes"]
        .assert_eq(&message);

    let missing = load(&folder.path().join("none.toml"), &[]).unwrap_err();
    assert!(missing.to_string().starts_with("cannot read "), "{missing}");
}

#[test]
fn wrong_types_are_said_all_at_once() {
    text(
        "[training]\nsteps = \"many\"\nseq_len = -1\n[optimizer]\nlr = true\n[data]\nsources = [\n  { paths = ['a'] },\n  { \
         paths = 7 },\n]\n",
        expect![[r#"
            job.toml:2:9: `training.steps`: invalid type: string "many", expected a whole number of at least 0
            job.toml:3:11: `training.seq_len`: invalid value: integer `-1`, expected a whole number of at least 0
            job.toml:5:6: `optimizer.lr`: invalid type: boolean `true`, expected a number
            job.toml:9:13: `data.sources.paths`: invalid type: integer `7`, expected a sequence"#]],
    );
    // Of what depends on a `type`, each with its own.
    text(
        "[job]\ntype = 'rlhf'\n[algorithm]\ntype = 'grpo'\ngamma = 0.9\n[algorithm.policy]\nclip_ratio_low = 'a'\n\
         [[reward.parts]]\ntype = 'numerc'\n[[reward.parts]]\ntype = 'python'\n[[reward.parts]]\ntype = 'boxed'\n\
         marker = '#'\n",
        expect![[r#"
            job.toml:5:9: `algorithm.gamma`: unknown field `gamma`, expected one of `norm_adv_by_std`, `policy`, `reward`, `rollout_correction`, `filter_groups`
            job.toml:7:18: `algorithm.policy.clip_ratio_low`: invalid type: string "a", expected a number
            job.toml:9:8: `reward.parts.type`: unknown variant `numerc`, expected one of `exact`, `numeric`, `boxed`, `regex`, `format`, `length`, `overlong`, `countdown`, `command`, `python`, `model`; did you mean `numeric`?
            job.toml:10:1: `reward.parts`: missing field `path`
            job.toml:14:10: `reward.parts.marker`: unknown field `marker`, expected `format_score`"#]],
    );
    text(
        "[job]\ntype = 'rl'\n[training]\nsteps = 'a'\n",
        expect![[r#"
        job.toml:2:8: `job.type`: unknown variant `rl`, expected one of `pretrain`, `sft`, `rlhf`; did you mean `rlhf`?
        job.toml:4:9: `training.steps`: invalid type: string "a", expected a whole number of at least 0"#]],
    );
    // A kind that is not said is missing where it belongs, not at what stands below.
    text(
        "[job]\ntype = 'rlhf'\n[algorithm.policy]\nclip_ratio_low = 0.1\n[algorithm.reward]\nkl_ctrl = { kl_coef = 0.1 }\n[[reward.parts]]\nweight = 2.0\n",
        expect![[r#"
            job.toml:3:2: `algorithm`: `type` is missing; expected one of `grpo`, `ppo`, `rloo`, `reinforce_plus_plus`
            job.toml:7:1: `reward.parts`: `type` is missing; expected one of `exact`, `numeric`, `boxed`, `regex`, `format`, `length`, `overlong`, `countdown`, `command`, `python`, `model`"#]],
    );
    text(
        "[job]\ntype = 'rlhf'\n[algorithm]\ntype = 'grpo'\n[algorithm.reward]\nkl_ctrl = { kl_coef = 0.1 }\n",
        expect!["job.toml:6:11: `algorithm.reward.kl_ctrl`: `type` is missing; expected `fixed` or `adaptive`"],
    );
}
