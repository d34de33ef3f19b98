//! What users get wrong about reinforcement learning, and what the real binary says to it: each message names what was
//! found, and what to do.

use crate::job::{Job, finish};
use crate::rlhf;
use expect_test::{Expect, expect};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

/// Runs the job with changed keys on so many ranks; what it complains of, with its exit code. FOLDER stands for the job's.
fn complaint(job: &Job, ranks: usize, sets: &[&str]) -> String {
    let (code, text) = finish(&mut rlhf::command(job, "wrong", ranks, sets));
    let lines = text.lines().skip_while(|line| !line.starts_with("error: "));
    let told: Vec<&str> = match text.contains("failed first") {
        true => lines.skip(1).take_while(|line| !line.starts_with("  log: ")).map(|line| &line[2..]).collect(),
        false => lines.collect(),
    };
    let folder = format!("{}/", job.path("").display()).replace("//", "/");
    format!("{}: {}\n", code.unwrap_or(-1), told.join("\n").replace(&folder, "FOLDER/"))
}

fn check(job: &Job, sets: &[&str], expected: Expect) {
    expected.assert_eq(&complaint(job, 1, sets));
}

/// Parts of the reward in TOML.
fn reward(parts: &str) -> String {
    format!("reward.parts=[{{ {parts} }}]")
}

/// A job on a file of prompts.
fn on_file(name: &str, text: &str) -> Job {
    let job = rlhf::job();
    std::fs::write(job.path(name), text).unwrap();
    let old = std::fs::read_to_string(job.path("rl.toml")).unwrap();
    let file = format!("files = [\"{}\"]", job.path(name).display());
    let (before, after) = old.split_once("generator = ").unwrap();
    let (_, after) = after.split_once('\n').unwrap();
    let text = format!("{before}{file}\n{}", after.replace("validation_size = 5", ""));
    std::fs::write(job.path("rl.toml"), text).unwrap();
    job
}

const NUMERIC: &str = "reward.parts=[{ type = \"numeric\", method = \"flexible\" }]";

#[test]
fn programs_of_the_user_that_fail() {
    let job = rlhf::job();
    let script = |name: &str, text: &str| {
        std::fs::write(job.path(name), text).unwrap();
        std::fs::set_permissions(job.path(name), PermissionsExt::from_mode(0o755)).unwrap();
        job.path(name).display().to_string()
    };
    let function = |name: &str, body: &str| {
        let signature = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    ";
        // One call after the other, so that it is always the first one that fails.
        let one = "processes = 1, calls_in_flight = 1";
        reward(&format!("type = \"python\", path = \"{}\", {one}", script(name, &format!("{signature}{body}\n"))))
    };
    check(
        &job,
        &[&function("raises.py", "return 1 / 0")],
        expect![[r#"
        3: reward `python`: prompt 0 of `arithmetic`: ZeroDivisionError: division by zero (raises.py:2). To go on without such samples set on_error = "drop" (or "zero")
    "#]],
    );
    check(
        &job,
        &[&function("crashes.py", "import os; os._exit(3)")],
        expect![[r#"
        3: reward `python`: prompt 0 of `arithmetic`: the process ended (exit code 3). To go on without such samples set on_error = "drop" (or "zero")
    "#]],
    );
    let hangs = function("hangs.py", "import time; time.sleep(1000)").replace(" }", ", timeout_seconds = 0.5 }");
    check(
        &job,
        &[&hangs],
        expect![[r#"
        3: reward `python`: prompt 0 of `arithmetic`: no answer within `timeout_seconds` = 0.5; the process was ended. To go on without such samples set on_error = "drop" (or "zero")
    "#]],
    );
    check(
        &job,
        &[&function("nan.py", "return float('nan')")],
        expect![[r#"
        3: reward `python`: prompt 0 of `arithmetic`: its value is NaN, no finite number. To go on without such samples set on_error = "drop" (or "zero")
    "#]],
    );
    check(
        &job,
        &[&function("drops.py", "return float('nan')").replace(" }", ", on_error = \"drop\" }")],
        expect![[r#"
            3: no group of this step has 2 completions with a reward; all 24 were left out, and the first error is: python: its value is NaN, no finite number. Mend the reward, or set on_error = "zero"
        "#]],
    );
    check(
        &job,
        &[&reward("type = \"python\", path = \"absent.py\"").replace("absent", "/absent")],
        expect![[r#"
        3: reward `python`: there is no file `/absent.py`; see `path`
    "#]],
    );
    let other = script("other.py", "def score(x): return 1\n");
    let said = complaint(&job, 1, &[&reward(&format!("type = \"python\", path = \"{other}\""))]);
    assert!(said.contains("FOLDER/other.py defines no function `compute_score`; functions there are: score"), "{said}");
    let junk = script("junk.sh", "#!/bin/sh\nwhile read -r line; do echo what; done\n");
    check(
        &job,
        &[&reward(&format!("type = \"command\", command = [\"{junk}\"], processes = 1, timeout_seconds = 0.5"))],
        expect![[r#"
            3: reward `command`: prompt 0 of `arithmetic`: no answer within `timeout_seconds` = 0.5; its output has lines that are no answers, the first: "what"; the process was ended. To go on without such samples set on_error = "drop" (or "zero")
        "#]],
    );
    check(
        &job,
        &[&reward("type = \"command\", command = [\"/no/such\"]")],
        expect![[r#"
        3: reward `command`: cannot start `/no/such`: No such file or directory (os error 2): there is no such program on PATH or at this path; see `command`
    "#]],
    );
    let plain = script("plain.sh", "#!/bin/sh\ncat\n");
    std::fs::set_permissions(&plain, PermissionsExt::from_mode(0o644)).unwrap();
    check(
        &job,
        &[&reward(&format!("type = \"command\", command = [\"{plain}\"]"))],
        expect![[r#"
        3: reward `command`: cannot start `FOLDER/plain.sh`: Permission denied (os error 13); see `command`
    "#]],
    );
    check(
        &job,
        &[&reward("type = \"numerc\"")],
        expect![[r#"
        2: error: --set reward.parts=[{ type = "numerc" }]: `reward.parts`: unknown variant `numerc`, expected one of `exact`, `numeric`, `boxed`, `regex`, `format`, `length`, `overlong`, `countdown`, `command`, `python`, `model`; did you mean `numeric`?
    "#]],
    );
}

#[test]
fn prompts_that_cannot_be_used() {
    let rows = |rows: &[&str]| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
    let asked = "{\"prompt\": \"1+1?\", \"answer\": \"2\"}";
    check(
        &on_file("none.jsonl", ""),
        &[NUMERIC],
        expect![[r#"
        3: no prompts in FOLDER/none.jsonl: the files have no rows
    "#]],
    );
    check(
        &on_file("few.jsonl", &rows(&[asked; 5])),
        &[NUMERIC],
        expect![[r#"
        3: there are 5 prompts to train on, fewer than a step asks (`rlhf.train_batch_size` = 6): some would be asked twice at once; add prompts or lower it
    "#]],
    );
    check(
        &on_file("untold.jsonl", &rows(&["{\"prompt\": \"1+1?\"}"; 6])),
        &[NUMERIC],
        expect![[r#"
        3: FOLDER/untold.jsonl: row 1: no ground truth: `answer` is missing or null, and the reward compares with it; set `prompts.answer_key`, or remove the row
    "#]],
    );
    let one_untold = rows(&[asked, asked, "{\"prompt\": \"2+2?\", \"answer\": null}"]);
    check(
        &on_file("null.jsonl", &one_untold),
        &[NUMERIC],
        expect![[r#"
        3: FOLDER/null.jsonl: row 3: no ground truth: `answer` is missing or null, and the reward compares with it; set `prompts.answer_key`, or remove the row
    "#]],
    );
    check(
        &on_file("broken.jsonl", &rows(&[asked, "{\"prompt\": "])),
        &[NUMERIC],
        expect![[r#"
        3: FOLDER/broken.jsonl: row 2: not JSON: EOF while parsing a value at line 1 column 11
    "#]],
    );
    let long = format!("{{\"prompt\": \"{}\", \"answer\": \"2\"}}", "1+1?".repeat(20));
    let mixed = on_file("long.jsonl", &rows(&[asked, &long, asked, asked]));
    check(
        &mixed,
        &[NUMERIC],
        expect![[r#"
        3: 1 of 4 prompts are longer than `prompts.max_prompt_length` = 64 tokens: FOLDER/long.jsonl:2 (80 tokens); raise it, or set `prompts.overlong` = "drop" or "truncate_left"
    "#]],
    );
    check(
        &mixed,
        &[NUMERIC, "prompts.overlong=\"drop\""],
        expect![[r#"
        3: there are 3 prompts to train on, fewer than a step asks (`rlhf.train_batch_size` = 6): some would be asked twice at once; add prompts or lower it
    "#]],
    );
    check(
        &on_file(
            "messages.jsonl",
            &rows(&["{\"prompt\": [{\"role\": \"user\", \"content\": \"1+1?\"}], \"answer\": \"2\"}"; 6]),
        ),
        &[NUMERIC],
        expect![[r#"
            3: FOLDER/messages.jsonl:1: the tokenizer has no chat template: set `data.chat_template` to a file with one, or `prompts.chat` = false to continue prompts as plain text
        "#]],
    );
    check(
        &on_file("text.parquet", "no Parquet"),
        &[NUMERIC],
        expect![[r#"
        3: FOLDER/text.parquet: not a readable Parquet file: Parquet error: Invalid Parquet file. Corrupt footer
    "#]],
    );
    let columns = on_file("columns.parquet", "");
    let names = ["question_text", "reply"].map(|name| (name, strings(&["1+1?"; 6])));
    write_parquet(&columns.path("columns.parquet"), names);
    check(
        &columns,
        &[NUMERIC],
        expect![[r#"
        3: FOLDER/columns.parquet: no column `prompt`; columns there are: question_text, reply; set `prompts.prompt_key` to one of them
    "#]],
    );
    check(
        &columns,
        &[NUMERIC, "prompts.prompt_key=\"question_txt\""],
        expect![[r#"
        3: FOLDER/columns.parquet: no column `question_txt`; columns there are: question_text, reply; did you mean `question_text`?
    "#]],
    );
    check(
        &columns,
        &[NUMERIC, "prompts.prompt_key=\"question_text\"", "prompts.answer_key=\"replly\""],
        expect![[r#"
        3: FOLDER/columns.parquet: no column `replly`; columns there are: question_text, reply; did you mean `reply`?
    "#]],
    );
}

fn strings(values: &[&str]) -> arrow::array::ArrayRef {
    Arc::new(arrow::array::StringArray::from(values.to_vec()))
}

fn write_parquet<const N: usize>(path: &std::path::Path, columns: [(&str, arrow::array::ArrayRef); N]) {
    let batch = arrow::array::RecordBatch::try_from_iter(columns).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn what_does_not_fit_its_ranks_is_refused_before_anything_starts() {
    let job = rlhf::job();
    let two = |sets: &[&str], expected: Expect| expected.assert_eq(&complaint(&job, 2, sets));
    two(
        &["rlhf.ppo_mini_batch_size=1"],
        expect![[r#"
        2: error: --set rlhf.ppo_mini_batch_size=1: `rlhf.ppo_mini_batch_size` = 1 prompts for the 2 data-parallel parts of the policy: answers to a prompt stay together, so each part wants one at least; raise it to 2, or share the model over more ranks
    "#]],
    );
    two(
        &["rlhf.train_batch_size=1"],
        expect![[r#"
        2: error: --set rlhf.train_batch_size=1: `rlhf.train_batch_size` = 1 prompts for the 2 data-parallel parts of the policy: answers to a prompt stay together, so each part wants one at least; raise it to 2, or share the model over more ranks
        --set rlhf.train_batch_size=1: `rlhf.train_batch_size` = 1 prompts for 2 ranks that generate by themselves: answers to a prompt stay together, so each wants one at least; raise it to 2, or start fewer ranks
    "#]],
    );
    two(
        &["prompts.validation_size=1"],
        expect![[r#"
        3: the validation has 1 prompts, but 2 ranks generate, each at least one; raise `prompts.validation_size`, or set it to 0
    "#]],
    );
    two(
        &["placement.pools=[{ name = \"a\", ranks = 1 }, { name = \"b\", ranks = 1 }]"],
        expect![[r#"
        2: error: --set placement.pools=[{ name = "a", ranks = 1 }, { name = "b", ranks = 1 }]: `placement.pools.1`: pool `b` would idle, for no role lives there: name one for it in `placement.roles`, or remove the pool
    "#]],
    );
    assert!(!job.path("wrong/rollouts").exists(), "nothing was generated");
}

#[test]
fn rewards_that_are_always_0_raise_an_alarm() {
    let job = rlhf::job();
    let (code, text) = finish(&mut rlhf::command(&job, "zero", 1, &["reward.parts=[{ type = \"boxed\" }]"]));
    assert_eq!(code, Some(0), "{text}");
    let alarm = "reward `boxed` was 0 for the last ";
    assert!(text.contains(alarm) && text.contains("had no answer to compare"), "{text}");
}
