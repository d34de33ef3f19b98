//! Files, orders and limits, as a job asks for them.

use super::*;
use crate::prompts::{Message, PromptInput};
use arrow::array::{
    ArrayRef, Int32Array, ListBuilder, RecordBatch, StringArray, StringBuilder, StructArray, StructBuilder,
};
use arrow::datatypes::{DataType, Field, Fields};
use expect_test::{Expect, expect};
use parquet::arrow::ArrowWriter;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A token per character of what is said.
struct Characters;

impl RenderPrompt for Characters {
    fn render(&self, input: &PromptInput) -> std::result::Result<Vec<u32>, String> {
        Ok(match input {
            PromptInput::Text(text) => text.chars().map(u32::from).collect(),
            PromptInput::Messages(messages) => messages.iter().flat_map(|m| m.content.chars().map(u32::from)).collect(),
        })
    }
}

fn open(toml: &str, need_ground_truth: bool) -> Result<(PromptLoader, LoadReport)> {
    let config: Prompts = toml::from_str(toml).unwrap();
    PromptLoader::open(&config, LoaderOptions { need_ground_truth }, Arc::new(Characters))
}

fn user(content: &str) -> PromptInput {
    PromptInput::Messages(vec![Message { role: "user".into(), content: content.into() }])
}

fn write(folder: &TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn check_error(toml: &str, folder: &Path, expected: Expect) {
    let error = open(toml, true).err().expect("it is refused").to_string();
    expected.assert_eq(&error.replace(folder.to_str().unwrap(), "DIR"));
}

fn lines(count: usize) -> String {
    (0..count).map(|i| format!("{{\"question\": \"q{i}\", \"answer\": \"so\\n#### {i},000\"}}\n")).collect()
}

#[test]
fn gsm8k_lines_become_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "train.jsonl", &lines(3));
    let toml = format!(
        "files = ['{file}']\nanswer_after = '####'\nshuffle = false\nprompt_suffix = ' Think.'\nsystem_prompt = 'Be short.'\ndata_source = 'openai/gsm8k'"
    );
    let (loader, report) = open(&toml, true).unwrap();
    assert_eq!((report.to_string().as_str(), loader.len()), ("3 prompts to train on, 0 for validation", 3));
    let found = loader.at(4).unwrap();
    let messages = [("system", "Be short."), ("user", "q1 Think.")]
        .map(|(role, content)| Message { role: role.into(), content: content.into() });
    assert_eq!(found.prompt.input, PromptInput::Messages(messages.into()));
    assert_eq!((&found.prompt.ground_truth, found.prompt.index), (&json!("1000"), 1));
    assert_eq!(found.prompt.data_source, "openai/gsm8k");
    let (loader, _) = open(&format!("files = ['{file}']\nchat = false\nshuffle = false"), false).unwrap();
    assert_eq!(loader.at(0).unwrap().prompt.input, PromptInput::Text("q0".into()));
    assert_eq!(loader.at(0).unwrap().prompt.data_source, "train");
}

/// A file as verl's preprocessing writes it.
fn verl_parquet(path: &Path, questions: &[&str]) {
    let fields =
        Fields::from(vec![Field::new("role", DataType::Utf8, true), Field::new("content", DataType::Utf8, true)]);
    let mut prompts = ListBuilder::new(StructBuilder::from_fields(fields, 1));
    for question in questions {
        let message = prompts.values();
        message.field_builder::<StringBuilder>(0).unwrap().append_value("user");
        message.field_builder::<StringBuilder>(1).unwrap().append_value(question);
        message.append(true);
        prompts.append(true);
    }
    let text = |values: Vec<String>| -> ArrayRef { Arc::new(StringArray::from(values)) };
    let repeated = |value: &str| text(vec![value.to_owned(); questions.len()]);
    let numbered: Vec<String> = (0..questions.len()).map(|i| format!("{i}")).collect();
    let field = |name: &str, kind| Arc::new(Field::new(name, kind, true));
    let reward: ArrayRef = Arc::new(StructArray::from(vec![
        (field("style", DataType::Utf8), repeated("rule")),
        (field("ground_truth", DataType::Utf8), text(numbered)),
    ]));
    let index: ArrayRef = Arc::new(Int32Array::from_iter_values(0..questions.len() as i32));
    let extra: ArrayRef = Arc::new(StructArray::from(vec![
        (field("index", DataType::Int32), index),
        (field("split", DataType::Utf8), repeated("train")),
    ]));
    let batch = RecordBatch::try_from_iter(vec![
        ("data_source", repeated("openai/gsm8k")),
        ("prompt", Arc::new(prompts.finish()) as ArrayRef),
        ("ability", repeated("math")),
        ("reward_model", reward),
        ("extra_info", extra),
    ])
    .unwrap();
    let mut writer = ArrowWriter::try_new(fs::File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn verls_parquet_is_read_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.parquet");
    verl_parquet(&path, &["one?", "two?"]);
    let (loader, _) = open(&format!("files = ['{}']\nshuffle = false", path.display()), true).unwrap();
    let prompt = loader.at(1).unwrap().prompt;
    assert_eq!((&prompt.input, &prompt.ground_truth), (&user("two?"), &json!("1")));
    assert_eq!(
        (prompt.data_source.as_str(), &prompt.extra_info),
        ("openai/gsm8k", &json!({"index": 1, "split": "train"}))
    );
}

#[test]
fn json_arrays_and_compressed_lines_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "a.json", r#"[{"prompt": "p", "ground_truth": {"a": [1]}}]"#);
    let (loader, _) = open(&format!("files = ['{file}']"), true).unwrap();
    assert_eq!(loader.at(0).unwrap().prompt.ground_truth, json!({"a": [1]}));
    let path = folder.path().join("b.jsonl.zst");
    fs::write(&path, zstd::encode_all(lines(2).as_bytes(), 3).unwrap()).unwrap();
    assert_eq!(open(&format!("files = ['{}']", path.display()), true).unwrap().0.len(), 2);
}

#[test]
fn an_epoch_has_every_prompt_once_in_an_order_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "a.jsonl", &lines(50));
    let (loader, _) = open(&format!("files = ['{file}']\nseed = 5"), true).unwrap();
    let order = |epoch: u64| -> Vec<u64> {
        loader.batch(epoch * 50, 50).unwrap().iter().map(|found| found.prompt.index).collect()
    };
    let (first, second) = (order(0), order(1));
    assert_ne!(first, second);
    for mut epoch in [first.clone(), second] {
        epoch.sort_unstable();
        assert_eq!(epoch, (0..50).collect::<Vec<_>>());
    }
    // A resumed run knows the position only.
    assert_eq!(loader.batch(17, 5).unwrap().iter().map(|f| f.prompt.index).collect::<Vec<_>>(), first[17..22]);
    let (other, _) = open(&format!("files = ['{file}']\nseed = 6"), true).unwrap();
    assert_ne!(first, other.batch(0, 50).unwrap().iter().map(|f| f.prompt.index).collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn what_is_held_out_is_not_trained_on(count in 2usize..60, share in 0.0f64..1.0, seed: u32) {
        let folder = tempfile::tempdir().unwrap();
        let file = write(&folder, "a.jsonl", &lines(count));
        let size = ((count - 1) as f64 * share) as usize;
        let toml = format!("files = ['{file}']\nvalidation_size = {size}\nseed = {seed}");
        let (loader, report) = open(&toml, true).unwrap();
        let mut all: Vec<u64> = loader.batch(0, loader.len() as usize).unwrap().iter().map(|f| f.prompt.index).collect();
        let validation = loader.validation().unwrap();
        prop_assert_eq!((validation.len(), report.num_train as usize), (size, count - size));
        all.extend(validation.iter().map(|f| f.prompt.index));
        all.sort_unstable();
        prop_assert_eq!(all, (0..count as u64).collect::<Vec<_>>());
    }
}

#[test]
fn long_prompts_are_dropped_cut_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let line = |text: &str| json!({"prompt": text, "answer": "1"}).to_string() + "\n";
    let text = line("abcdefgh") + &line("abc") + &line("12345678");
    let file = write(&folder, "a.jsonl", &text);
    let base = format!("files = ['{file}']\nmax_prompt_length = 4\nshuffle = false\n");
    let (loader, report) = open(&format!("{base}overlong = 'drop'"), true).unwrap();
    expect!["1 prompts to train on, 0 for validation; 2 too long and left out: DIR/a.jsonl:1 (8 tokens), DIR/a.jsonl:3 (8 tokens)"]
        .assert_eq(&report.to_string().replace(folder.path().to_str().unwrap(), "DIR"));
    assert_eq!(loader.at(0).unwrap().prompt.index, 1);
    let (loader, _) = open(&format!("{base}overlong = 'truncate_left'"), true).unwrap();
    assert_eq!(loader.at(0).unwrap().tokens, "efgh".chars().map(u32::from).collect::<Vec<_>>());
    check_error(
        &base,
        folder.path(),
        expect![[
            r#"2 of 3 prompts are longer than `prompts.max_prompt_length` = 4 tokens: DIR/a.jsonl:1 (8 tokens), DIR/a.jsonl:3 (8 tokens); raise it, or set `prompts.overlong` = "drop" or "truncate_left""#
        ]],
    );
    check_error(
        &base.replace("= 4", "= 2").replace("shuffle", "overlong = 'drop'\nshuffle"),
        folder.path(),
        expect![[
            r#"3 of 3 prompts are longer than `prompts.max_prompt_length` = 2 tokens: DIR/a.jsonl:1 (8 tokens), DIR/a.jsonl:2 (3 tokens), DIR/a.jsonl:3 (8 tokens); raise it, or set `prompts.overlong` = "truncate_left""#
        ]],
    );
    check_error(
        "generator = { type = 'arithmetic' }\nmax_prompt_length = 3",
        folder.path(),
        expect![[
            r#"prompt 77760 of `arithmetic` has 16 tokens, above `prompts.max_prompt_length` = 3; raise it or set `prompts.overlong` = "truncate_left""#
        ]],
    );
}

#[test]
fn rows_that_are_no_prompts_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let check = |rows: &[Value], keys: &str, expected: Expect| {
        let text: String = rows.iter().map(|row| row.to_string() + "\n").collect();
        let file = write(&folder, "a.jsonl", &text);
        check_error(&format!("files = ['{file}']\n{keys}"), folder.path(), expected);
    };
    let good = json!({"prompt": "p", "answer": "1"});
    check(
        &[good.clone(), json!({"prompt": "p", "answer": null})],
        "",
        expect![
            "DIR/a.jsonl: row 2: no ground truth: `answer` is missing or null, and the reward compares with it; set `prompts.answer_key`, or remove the row"
        ],
    );
    check(
        &[json!({"promt": "p"})],
        "",
        expect!["DIR/a.jsonl: row 1: no column `prompt`; columns there are: promt; did you mean `promt`?"],
    );
    check(
        std::slice::from_ref(&good),
        "answer_key = 'solution'",
        expect![
            "DIR/a.jsonl: row 1: no column `solution`; columns there are: prompt, answer; set `prompts.answer_key` to one of them"
        ],
    );
    check(&[good.clone(), json!({"prompt": " ", "answer": "1"})], "", expect!["DIR/a.jsonl: row 2: `prompt` is empty"]);
    check(
        &[json!({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"})],
        "",
        expect![[
            r#"DIR/a.jsonl: row 1: a message in `prompt` has a `content` that is [{"type":"image"}], not a text"#
        ]],
    );
    check(
        std::slice::from_ref(&good),
        "answer_after = '=>'",
        expect![[r#"DIR/a.jsonl: row 1: `answer` lacks "=>" (`prompts.answer_after`): it is "1""#]],
    );
    check(&[json!([1])], "", expect!["DIR/a.jsonl: row 1: expected a JSON object with a prompt in it"]);
    check(&[json!(5)], "", expect!["DIR/a.jsonl: row 1: expected a JSON object with a prompt in it"]);
    check(
        &[good],
        "validation_size = 1",
        expect![
            "`prompts.validation_size` = 1 would hold out all of the 1 prompts; lower it or name `prompts.validation_files`"
        ],
    );
    let empty = write(&folder, "empty.jsonl", "\n");
    check_error(
        &format!("files = ['{empty}']"),
        folder.path(),
        expect!["no prompts in DIR/empty.jsonl: the files have no rows"],
    );
}

#[test]
fn generated_prompts_and_their_validation_set() {
    let (loader, report) = open("generator = { type = 'arithmetic', size = 500 }\nvalidation_size = 40", true).unwrap();
    assert_eq!((report.num_train, report.num_validation, loader.epoch(1000)), (500, 40, 2));
    let validation = loader.validation().unwrap();
    let held: HashSet<String> = validation.iter().map(|f| format!("{:?}", f.prompt.input)).collect();
    assert_eq!(held.len(), 40);
    assert!(loader.batch(0, 500).unwrap().iter().all(|f| !held.contains(&format!("{:?}", f.prompt.input))));
}

#[test]
fn a_fingerprint_is_of_what_prompts_say() {
    let folder = tempfile::tempdir().unwrap();
    let text = lines(6);
    let fingerprint = |name: &str, text: &str, more: &str| {
        let file = write(&folder, name, text);
        let (loader, _) =
            open(&format!("files = ['{file}']\nanswer_after = '####'\ndata_source = 's'\n{more}"), true).unwrap();
        loader.fingerprint()
    };
    let first = fingerprint("a.jsonl", &text, "");
    assert_eq!(fingerprint("moved.jsonl", &text, "validation_files = []"), first, "the same rows elsewhere");
    // As many rows, under the same name.
    assert_ne!(fingerprint("a.jsonl", &text.replace("q3", "r3"), ""), first);
    assert_ne!(fingerprint("a.jsonl", &text.replace("#### 3", "#### 4"), ""), first);
    assert_ne!(fingerprint("a.jsonl", &text, "seed = 1"), first);
    assert_ne!(fingerprint("a.jsonl", &text, "validation_size = 2"), first, "two rows are trained on no longer");
    let generated = |toml: &str| open(toml, true).unwrap().0.fingerprint();
    let task = "generator = { type = 'arithmetic', size = 100 }";
    assert_eq!(generated(task), generated(&format!("{task}\nvalidation_size = 3")));
    assert_ne!(generated(task), generated("generator = { type = 'arithmetic', size = 100, max = 9 }"));
}
