//! Help, errors and exit codes, as a user reads them.

use crate::fake::{Job, Said, tangelo};
use expect_test::{Expect, expect, expect_file};
use std::time::{Duration, Instant};

fn said(arguments: &[&str]) -> Said {
    tangelo().args(arguments).env("COLUMNS", "100").output().unwrap().into()
}

fn said_in(folder: &std::path::Path, arguments: &[&str]) -> Said {
    tangelo().args(arguments).current_dir(folder).output().unwrap().into()
}

#[test]
fn help_of_every_command() {
    expect_file!["help/tangelo.txt"].assert_eq(&said(&["--help"]).stdout);
    let commands = ["run", "replay", "check", "export", "generate", "score", "eval", "report", "schema", "completions"];
    let nested = ["tokenizer", "prepare", "inspect"].map(|verb| vec!["data", verb]);
    for words in commands.map(|c| vec![c]).into_iter().chain(nested) {
        let help = said(&[&words[..], &["--help"]].concat());
        assert_eq!((help.code, help.stderr.as_str()), (Some(0), ""), "{words:?}");
        assert!(help.stdout.contains("Examples:"), "{words:?} shows no example");
        for line in help.stdout.lines() {
            // Examples are not wrapped.
            assert!(line.chars().count() <= 120, "{words:?}: {line}");
        }
        expect_file![format!("help/{}.txt", words.join("-"))].assert_eq(&help.stdout);
    }
}

#[test]
fn help_is_there_at_once() {
    // The goal is 50 ms for the release build; one of many of this build, on a machine that does other things.
    let is_fast = (0..50).any(|_| {
        let begun = Instant::now();
        assert_eq!(said(&["--help"]).code, Some(0));
        begun.elapsed() < Duration::from_millis(50)
    });
    assert!(is_fast, "none of fifty took less than 50 ms");
}

fn check(arguments: &[&str], code: i32, expected: Expect) {
    let said = said(arguments);
    assert_eq!(said.code, Some(code), "{said:?}");
    expected.assert_eq(&said.stderr);
}

#[test]
fn errors_say_what_to_do() {
    check(
        &["generate", "m"],
        2,
        expect![[r#"
        error: the following required arguments were not provided:
          <--prompt <PROMPT>|--prompt-ids <IDS>>

        Usage: tangelo generate <--prompt <PROMPT>|--prompt-ids <IDS>> <MODEL>

        For more information, try '--help'.
    "#]],
    );
    check(
        &["generate", "m", "--prompt-ids", "1,x"],
        2,
        expect![[r#"
        error: invalid value '1,x' for '--prompt-ids <IDS>': `x` is not a token id; expected something like 1,450,4996

        For more information, try '--help'.
    "#]],
    );
    check(
        &["generate", "m", "-p", "x", "--top-p", "0"],
        2,
        expect![[r#"
        error: invalid value '0' for '--top-p <P>': expected a probability above 0, up to 1

        For more information, try '--help'.
    "#]],
    );
    check(
        &["run", "job.toml", "--nproc-per-node", "0"],
        2,
        expect![[r#"
        error: invalid value '0' for '--nproc-per-node <N|auto>': expected a number from 1, auto, gpu or cpu

        For more information, try '--help'.
    "#]],
    );
    check(
        &["run", "job.toml", "--nnodes", "1:4"],
        2,
        expect![[r#"
        error: invalid value '1:4' for '--nnodes <N>': a range of nodes is not supported: the number of nodes is fixed while a job runs

        For more information, try '--help'.
    "#]],
    );
    check(
        &["run", "job.toml", "--rdzv-endpoint", "host"],
        2,
        expect![[r#"
        error: invalid value 'host' for '--rdzv-endpoint <HOST:PORT>': `host` is not HOST:PORT, such as 10.0.0.1:29500

        For more information, try '--help'.
    "#]],
    );
    check(
        &["check", "absent.toml"],
        2,
        expect![[r#"
        error: cannot read absent.toml: No such file or directory (os error 2)
    "#]],
    );
    check(
        &["report", "/"],
        3,
        expect![[r#"
        error: / is not a run folder: it has neither config.toml nor metrics.jsonl; name the folder that `tangelo run` wrote (job.dump_folder)
    "#]],
    );
    check(
        &["score", "m", "--worker-binary", "/absent"],
        1,
        expect![[r#"
        error: cannot find tangelo-worker, which does everything that needs tensors; looked at /absent. It is built beside tangelo by `cargo build --release` in the repository (`cargo xtask quickstart` on a fresh machine); keep the two binaries in one folder
    "#]],
    );
}

#[test]
fn requests_reach_the_worker_as_typed() {
    let job = Job::new();
    let echo = job.path("echo.sh");
    std::fs::write(&echo, "#!/bin/sh\nprintf '%s\\n' \"$@\"\n").unwrap();
    std::fs::set_permissions(&echo, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let asked = |arguments: &[&str]| {
        let said = job.finish(tangelo().args(arguments).arg("--worker-binary").arg(&echo));
        assert_eq!(said.code, Some(0), "{said:?}");
        said.stdout
    };
    expect![[r#"
        generate
        {"model":"m","device":"cpu","dtype":"auto","num_threads":0,"prompt":null,"chat":false,"prompt_ids":[1,2,3],"max_new_tokens":128,"temperature":0.5,"top_k":0,"top_p":1.0,"seed":0,"ignore_eos":false,"json":true,"no_cache":false}
    "#]].assert_eq(&asked(&[
        "generate",
        "m",
        "--prompt-ids",
        "[1, 2,3]",
        "-t",
        "0.5",
        "--json",
        "--device",
        "cpu",
    ]));
    expect![[r#"
        score
        {"model":"m","device":"auto","dtype":"float32","num_threads":0}
    "#]]
    .assert_eq(&asked(&["score", "m", "--json", "--dtype", "float32"]));
    expect![[r#"
        eval
        {"model":"m","device":"auto","dtype":"auto","num_threads":0,"paths":["a.txt","b.txt"],"text_column":null,"seq_len":64,"json":false}
    "#]].assert_eq(&asked(&["eval", "m", "a.txt", "b.txt", "--seq-len", "64"]));
    expect![[r#"
        export
        {"run":"runs/x","step":5,"output":null,"dtype":"bfloat16"}
    "#]]
    .assert_eq(&asked(&["export", "runs/x", "--format", "hf", "--dtype", "bfloat16", "--step", "5"]));
}

#[test]
fn check_prints_the_plan_and_writes_nothing() {
    let job = Job::new();
    let path = job.path("job.toml");
    let said = job.finish(tangelo().args(["check", "--world-size", "3"]).arg(&path));
    assert_eq!(said.code, Some(0), "{said:?}");
    for part in ["[model]", "global_batch_size = 24", "layers", "memory", "one step", "schedule", "every group agrees"]
    {
        assert!(said.stdout.contains(part), "{part}: {said:?}");
    }
    assert!(!job.run_folder().exists());
    let said = job.finish(tangelo().args(["check", "--set", "training.seq_length=9"]).arg(&path));
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("seq_len"), "{said:?}");
}

#[test]
fn check_does_without_a_tokenizer_where_the_vocabulary_is_known() {
    let preset = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/presets/llama-3.1-8b.toml");
    let folder = tempfile::tempdir().unwrap();
    let said = said_in(folder.path(), &["check", "--world-size", "64", preset]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.contains("warning: the tokenizer ") && said.stderr.contains("is not there"), "{said:?}");
    assert!(said.stdout.contains("vocab_size = 128256") && said.stdout.contains("64 ranks, "), "{said:?}");
    let said = said_in(folder.path(), &["check", preset, "--set", "model.flavor=tiny-4m"]);
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("`data.tokenizer` ="), "{said:?}");
}

#[test]
fn data_is_prepared_once_and_inspected() {
    let job = Job::new();
    let (text, tokenizer, folder) = (job.path("text.txt"), job.path("tokenizer.json"), job.path("prepared"));
    let prepare = || {
        let mut command = tangelo();
        command.args(["data", "prepare"]).arg(&text).arg("--tokenizer").arg(&tokenizer).arg("-o").arg(&folder);
        job.finish(&mut command)
    };
    let said = prepare();
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.contains("tokens in 1 documents"), "{said:?}");
    assert_eq!(prepare().code, Some(0));
    let said = job.finish(tangelo().args(["data", "inspect"]).arg(&folder));
    assert!(said.code == Some(0) && said.stdout.contains("every checksum right"), "{said:?}");
    let said = job.finish(tangelo().args(["data", "inspect", "--json"]).arg(&folder));
    let manifest: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(manifest["documents"], 1);
    // Other text in the same folder is refused.
    std::fs::write(&text, "something else").unwrap();
    let said = prepare();
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(said.stderr.contains("prepared with another"), "{said:?}");
    let said = job.finish(tangelo().args(["data", "inspect"]).arg(job.path("pids")));
    assert_eq!(said.code, Some(3), "{said:?}");
}

#[test]
fn conversations_are_prepared_by_hand() {
    let job = Job::new();
    let (rows, tokenizer, folder) = (job.path("chats.jsonl"), job.path("tokenizer.json"), job.path("chats"));
    std::fs::write(&rows, "{\"question\": \"two and two\", \"answer\": \"is four\"}\n").unwrap();
    let template = job.path("chat.jinja");
    std::fs::write(&template, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").unwrap();
    let prepare = |more: &[&str]| {
        let mut command = tangelo();
        command.args(["data", "prepare"]).arg(&rows).arg("--tokenizer").arg(&tokenizer).arg("-o").arg(&folder);
        job.finish(command.args(more).arg("--chat-template").arg(&template))
    };
    let columns = ["--prompt-column", "question", "--completion-column", "answer", "--as-messages"];
    let said = prepare(&[&["--chat", "--seq-len", "128"], &columns[..]].concat());
    assert_eq!(said.code, Some(0), "{said:?}");
    let said = job.finish(tangelo().args(["data", "inspect"]).arg(&folder));
    assert!(said.stdout.contains("user: two and two") && said.stdout.contains("\u{27e6}"), "{said:?}");
    let said = prepare(&[&["--chat"], &columns[..]].concat());
    assert!(said.code == Some(2) && said.stderr.contains("--seq-len <N>"), "{said:?}");
    let said = prepare(&["--seq-len", "128"]);
    assert!(said.code == Some(2) && said.stderr.contains("--chat"), "{said:?}");
}

#[test]
fn schema_flavors_and_completions() {
    let schema: serde_json::Value = serde_json::from_str(&said(&["schema"]).stdout).unwrap();
    assert!(schema["properties"]["training"].is_object(), "{schema}");
    let flavors = said(&["schema", "--flavors"]).stdout;
    assert!(flavors.lines().any(|l| l.starts_with("smollm2-135m") && l.contains("135M")), "{flavors}");
    for shell in ["bash", "zsh", "fish"] {
        let script = said(&["completions", shell]);
        assert!(script.code == Some(0) && script.stdout.contains("nproc-per-node"), "{shell}");
    }
}

#[test]
fn output_that_nobody_reads_is_no_failure() {
    for command in ["schema", "completions bash"] {
        let shell = format!("set -o pipefail; {} {command} | head -c 10", env!("CARGO_BIN_EXE_tangelo"));
        let output = std::process::Command::new("bash").args(["-c", &shell]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{command}: {output:?}");
    }
}
