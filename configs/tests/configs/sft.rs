//! Jobs of `job.type = "sft"`: what is filled in, and what is refused.

use crate::{FakeAssets, machine};
use expect_test::{Expect, expect};
use tangelo_configs::job::{DataFormat, Overlong, Packing};
use tangelo_configs::resolve::{load_str, resolve};
use tangelo_configs::{ConfigError, Plan};

const JOB: &str = r#"
[job]
type = "sft"
[model]
flavor = "debugmodel"
[data]
tokenizer = "tok"
sources = [{ paths = ["chats/*.jsonl"] }]
"#;

fn plan(job: &str, sets: &[&str]) -> Result<Plan, ConfigError> {
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    resolve(load_str(job, "job.toml", &sets)?, &machine(1), &FakeAssets::with_tokenizer("/job/tok", 300))
}

fn check(job: &str, sets: &[&str], expected: Expect) {
    expected.assert_eq(&plan(job, sets).expect_err("it is to be refused").to_string());
}

#[test]
fn defaults_are_trls() {
    let data = plan(JOB, &["data.chat_template=own.jinja"]).unwrap().config.data;
    assert_eq!((data.assistant_only_loss, data.completion_only_loss), (Some(true), Some(true)));
    assert_eq!((data.packing, data.overlong), (Some(Packing::BestFit), Some(Overlong::Truncate)));
    assert_eq!(data.chat_template.unwrap().to_str(), Some("/job/own.jinja"));
    let source = &data.sources[0];
    assert_eq!((source.format, source.as_messages), (Some(DataFormat::Auto), Some(false)));
    assert_eq!(source.text_column, None);
    let text = JOB.replace("sft", "pretrain");
    assert_eq!(plan(&text, &[]).unwrap().config.data.packing, Some(Packing::Concat));
}

#[test]
fn own_files_to_evaluate_on_leave_all_others_to_training() {
    let own =
        ["validation.enable=true", "validation.sources=[{ paths = [\"chats/x.jsonl\"] }, { paths = [\"x.jsonl\"] }]"];
    let config = plan(JOB, &own).unwrap().config;
    assert_eq!(config.data.validation_fraction, 0.0);
    let names: Vec<_> = config.validation.sources.iter().map(|s| s.name.as_deref().unwrap()).collect();
    assert_eq!(names, ["x", "x-2"]);
    assert_eq!(config.validation.sources[0].format, Some(DataFormat::Auto));
    let resolved = Plan { config: config.clone(), ..plan(JOB, &own).unwrap() }.to_toml().unwrap();
    assert_eq!(plan(&resolved, &[]).unwrap().config, config);
    check(
        JOB,
        &[own[1]],
        expect![[
            r#"--set validation.sources=[{ paths = ["chats/x.jsonl"] }, { paths = ["x.jsonl"] }]: `validation.sources` is set, but `validation.enable` = false: nothing is evaluated; set it to true"#
        ]],
    );
    check(
        JOB,
        &[own[0], own[1], "data.validation_fraction=0.1"],
        expect![
            "--set data.validation_fraction=0.1: `data.validation_fraction` = 0.1 and `validation.sources` exclude each other: hold documents out, or name files of their own"
        ],
    );
    check(
        JOB,
        &[own[0], "data.sources.0.name=a", "validation.sources=[{ name = \"a\", paths = [\"x\"] }]"],
        expect![[
            r#"--set validation.sources=[{ name = "a", paths = ["x"] }]: `validation.sources.0.name`: a source of `data.sources` is named "a" too"#
        ]],
    );
}

#[test]
fn keys_of_the_other_kind_of_job_are_refused() {
    check(
        JOB,
        &["data.sources.0.text_column=text", "data.document_mask=false"],
        expect![[r#"
        --set data.sources.0.text_column=text: `data.sources.0.text_column` is set, but `job.type` = "sft" reads conversations: name their columns with `messages_column`, or `prompt_column` and `completion_column`
        --set data.document_mask=false: `data.document_mask` = false would let a conversation attend to the one before it in a sequence; `job.type` = "sft" needs it true"#]],
    );
    check(
        JOB,
        &["data.train_tokenizer_vocab=300"],
        expect![[r#"
            --set data.train_tokenizer_vocab=300: `data.tokenizer` = "/job/tok" and `data.train_tokenizer_vocab` = 300 exclude each other: use the one or train the other
            --set data.train_tokenizer_vocab=300: `data.train_tokenizer_vocab` is set, but `job.type` = "sft" needs the tokenizer of the model that is tuned; remove the key"#]],
    );
    let text = JOB.replace("sft", "pretrain");
    check(
        &text,
        &["data.assistant_only_loss=true", "data.sources.0.prompt_column=question"],
        expect![[r#"
            --set data.assistant_only_loss=true: `data.assistant_only_loss` is set, but `job.type` = "pretrain" reads no conversations; set `job.type` = "sft" or remove the key
            --set data.sources.0.prompt_column=question: `data.sources.0.prompt_column` is set, but `job.type` = "pretrain" reads no conversations; set `job.type` = "sft" or remove the key"#]],
    );
    check(
        &JOB.replace("sft", "stf"),
        &[],
        expect![
            "job.toml:3:8: `job.type`: unknown variant `stf`, expected one of `pretrain`, `sft`, `rlhf`; did you mean `sft`?"
        ],
    );
    check(
        JOB,
        &["data.sources.0.format=share_gpt"],
        expect![
            "--set data.sources.0.format=share_gpt: `data.sources.format`: unknown variant `share_gpt`, expected one of `auto`, `messages`, `prompt_completion`, `sharegpt`; did you mean `sharegpt`?"
        ],
    );
}
