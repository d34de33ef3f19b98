//! Whole rewards, from a job's text to the sums, with real processes.

use super::*;
use crate::reward::testing::{sample, samples};
use expect_test::{Expect, expect};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::Command;
use tangelo_control::Reading;
use tempfile::TempDir;

/// Answers each call with the length of the line in front of its id's digits: a program in plain shell.
const SHELL: &str = r#"
while read -r line; do
    id=$(printf '%s' "$line" | sed 's/^{"id":\([0-9]*\),.*/\1/')
    case "$line" in
        *\"completion\":\"good\"*) echo "{\"id\": $id, \"score\": 1}" ;;
        *\"completion\":\"bad\"*) echo "{\"id\": $id, \"error\": \"cannot read it\"}" ;;
        *\"completion\":\"nan\"*) echo "{\"id\": $id, \"score\": NaN}" ;;
        *\"completion\":\"die\"*) echo "last words" >&2; exit 3 ;;
        *\"completion\":\"hang\"*) sleep 1000 ;;
        *\"completion\":\"noisy\"*) echo "some text"; echo "{\"id\": $id, \"score\": 0.5}" ;;
        *) echo "{\"id\": $id, \"score\": 0}" ;;
    esac
done
"#;

fn config(toml: &str) -> Reward {
    toml::from_str(toml).unwrap()
}

fn shell(folder: &TempDir, keys: &str) -> Reward {
    let script = folder.path().join("reward.sh");
    fs::write(&script, SHELL).unwrap();
    config(&format!("[[parts]]\ntype = 'command'\ncommand = ['/bin/sh', '{}']\n{keys}", script.display()))
}

fn start(config: &Reward) -> RewardPipeline {
    RewardPipeline::start(config, &RewardOptions::default()).unwrap()
}

fn totals(batch: &ScoredBatch) -> Vec<f64> {
    batch.samples.iter().map(|sample| sample.total).collect()
}

#[test]
fn parts_are_weighted_and_summed() {
    let reward = config(
        "[[parts]]\ntype = 'numeric'\n[[parts]]\ntype = 'format'\nweight = 0.5\ntags = ['answer']\n\
         [[parts]]\ntype = 'regex'\npattern = '!'\nweight = -0.25\nname = 'shouting'\n\
         [[parts]]\ntype = 'exact'\nname = 'elsewhere'\ndata_sources = ['others']",
    );
    let batch = start(&reward).score(&samples(&["#### 1", "<answer>#### 1!</answer>", "!"])).unwrap();
    assert_eq!(totals(&batch), [1.0, 1.25, -0.25]);
    assert_eq!(batch.samples[1].parts, [("numeric".into(), 1.0), ("format".into(), 1.0), ("shouting".into(), 1.0)]);
    let summary = &batch.parts[0];
    assert_eq!((summary.mean, summary.min, summary.max, summary.num_unanswered), (2.0 / 3.0, 0.0, 1.0, 1));
    assert_eq!((batch.parts[3].num_samples, batch.alarms.len()), (0, 0));
    assert!(batch.parts[0].readings().contains(&("reward/numeric/unanswered".into(), Reading::Sum(1.0))));
}

#[test]
fn a_program_in_any_language_answers() {
    let folder = tempfile::tempdir().unwrap();
    let reward = shell(&folder, "on_error = 'drop'\nprocesses = 3\ncalls_in_flight = 5");
    let pipeline = start(&reward);
    let mut completions = Vec::new();
    for _ in 0..50 {
        completions.extend(["good", "other", "noisy", "bad", "nan"]);
    }
    let batch = pipeline.score(&samples(&completions)).unwrap();
    assert_eq!(totals(&batch), [1.0, 0.0, 0.5, 0.0, 0.0].repeat(50));
    assert_eq!(batch.samples[3].error.as_deref(), Some("command: cannot read it"));
    assert_eq!(batch.samples[4].error.as_deref(), Some("command: its value is NaN, no finite number"));
    assert!(batch.samples.iter().enumerate().all(|(i, sample)| sample.dropped == (i % 5 > 2)));
    assert_eq!((batch.alarms.len(), batch.alarms[0].kind, batch.alarms[0].count), (1, AlarmKind::NonFinite, 50));
    assert_eq!((batch.parts[0].num_failed, batch.parts[0].num_restarts), (100, 0));
    // Several threads at once get their own answers.
    std::thread::scope(|scope| {
        for completion in ["good", "noisy", "other"] {
            let pipeline = &pipeline;
            scope.spawn(move || {
                let batch = pipeline.score(&samples(&[completion; 20])).unwrap();
                let expected = match completion {
                    "good" => 1.0,
                    "noisy" => 0.5,
                    _ => 0.0,
                };
                assert_eq!(totals(&batch), [expected; 20]);
            });
        }
    });
}

#[test]
fn calls_that_kill_or_hang_cost_only_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline =
        start(&shell(&folder, "on_error = 'zero'\ntimeout_seconds = 1.0\nprocesses = 2\ncalls_in_flight = 4"));
    let completions = ["good", "die", "good", "hang", "good", "good", "die", "good", "good", "good"];
    let batch = pipeline.score(&samples(&completions)).unwrap();
    for (scored, completion) in batch.samples.iter().zip(completions) {
        assert_eq!(scored.total, f64::from(completion == "good"), "{completion}: {scored:?}");
        assert_eq!(scored.error.is_none(), completion == "good", "{completion}: {scored:?}");
    }
    expect![[r#"
        command: the process ended (exit code 3); the end of its stderr:
          | last words"#]]
    .assert_eq(batch.samples[1].error.as_deref().unwrap());
    let late = batch.samples[3].error.as_deref().unwrap();
    assert!(late.starts_with("command: no answer within `timeout_seconds` = 1; the process was ended"), "{late}");
    assert!(batch.parts[0].num_restarts >= 3, "{:?}", batch.parts[0]);
    // And it goes on.
    assert_eq!(totals(&pipeline.score(&samples(&["good"])).unwrap()), [1.0]);
}

fn check_start(config: &Reward, folder: &Path, expected: Expect) {
    let error = RewardPipeline::start(config, &RewardOptions::default()).err().unwrap().to_string();
    expected.assert_eq(&error.replace(folder.to_str().unwrap(), "DIR"));
}

#[test]
fn failures_end_the_job_where_told() {
    let folder = tempfile::tempdir().unwrap();
    let score = |keys: &str, completion: &str| {
        start(&shell(&folder, keys)).score(&samples(&["good", completion])).unwrap_err().to_string()
    };
    expect![[r#"reward `command`: prompt 7 of `tests`: cannot read it. To go on without such samples set on_error = "drop" (or "zero")"#]]
        .assert_eq(&score("", "bad"));
    expect![[r#"reward `command`: prompt 7 of `tests`: its value is NaN, no finite number. To go on without such samples set on_error = "drop" (or "zero")"#]]
        .assert_eq(&score("", "nan"));
    // A program that fails whatever it is given is no matter of single samples.
    let dies =
        config("[[parts]]\ntype = 'command'\ncommand = ['/bin/sh', '-c', 'read -r _; exit 5']\non_error = 'zero'");
    let error = start(&dies).score(&samples(&["a"; 100])).unwrap_err().to_string();
    expect!["reward `command`: 8 failures in a row; the last: the process ended (exit code 5)"].assert_eq(&error);
}

#[test]
fn programs_that_do_not_start_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let command = |command: &str| config(&format!("[[parts]]\ntype = 'command'\nprocesses = 1\ncommand = {command}"));
    check_start(
        &command("['/no/such/program']"),
        folder.path(),
        expect![
            "reward `command`: cannot start `/no/such/program`: No such file or directory (os error 2): there is no such program on PATH or at this path; see `command`"
        ],
    );
    check_start(
        &command("['/bin/sh', '-c', 'echo cannot open the door >&2; exit 2']"),
        folder.path(),
        expect![[r#"
            reward `command`: the process ended (exit code 2); the end of its stderr:
              | cannot open the door"#]],
    );
    check_start(
        &config("[[parts]]\ntype = 'regex'\npattern = ''"),
        folder.path(),
        expect!["`reward.parts.0.pattern` is empty; set it, such as '\\d+'"],
    );
}

#[test]
fn zeros_in_a_row_raise_an_alarm() {
    let pipeline = start(&config("[[parts]]\ntype = 'boxed'"));
    let batch = pipeline.score(&samples(&["it is 1"; 40])).unwrap();
    expect![[r#"reward `boxed` was 0 for the last 40 samples, of which 40 had no answer to compare; for example ..."it is 1" with ground truth "1""#]]
        .assert_eq(&batch.alarms[0].to_string());
    assert!(pipeline.score(&samples(&["it is 1"; 20])).unwrap().alarms.is_empty());
    assert_eq!(pipeline.score(&samples(&["it is 1"; 20])).unwrap().alarms[0].count, 80);
}

#[test]
fn reward_models_have_their_place_in_the_sum() {
    let reward = config(
        "[[parts]]\ntype = 'numeric'\n[[parts]]\ntype = 'model'\nname = 'helpful'\nweight = 0.1\nrole = 'reward'\non_error = 'drop'",
    );
    let pipeline = start(&reward);
    assert_eq!(pipeline.model_parts().collect::<Vec<_>>(), [("helpful", "reward")]);
    let samples = samples(&["#### 1", "#### 2", "#### 1"]);
    let mut pending = pipeline.evaluate(&samples).unwrap();
    pending.set_model("helpful", &[3.0, -3.0, f64::INFINITY]).unwrap();
    let batch = pending.finish().unwrap();
    assert_eq!(totals(&batch), [1.0 + 0.1 * 3.0, -0.1 * 3.0, 0.0]);
    assert_eq!((batch.samples[2].dropped, batch.alarms[0].kind), (true, AlarmKind::NonFinite));
    expect!["reward model `helpful` gave no values"].assert_eq(&pipeline.score(&samples).unwrap_err().to_string());
    let mut pending = pipeline.evaluate(&samples).unwrap();
    assert!(pending.set_model("numeric", &[1.0; 3]).is_err() && pending.set_model("helpful", &[1.0]).is_err());
}

#[test]
fn samples_of_no_part_are_errors() {
    let pipeline = start(&config("[[parts]]\ntype = 'exact'\ndata_sources = ['gsm8k']"));
    expect!["reward `*`: no part applies to data source `tests`; add it to `data_sources` of one, or a part without `data_sources`"]
        .assert_eq(&pipeline.score(&samples(&["a"])).unwrap_err().to_string());
}

mod python {
    use super::*;

    fn has_python() -> bool {
        let found = Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success());
        if !found {
            eprintln!("skipped: there is no python3");
        }
        found
    }

    fn python(folder: &TempDir, source: &str, keys: &str) -> Reward {
        let path = folder.path().join("my_reward.py");
        fs::write(&path, source).unwrap();
        config(&format!("[[parts]]\ntype = 'python'\npath = '{}'\n{keys}", path.display()))
    }

    /// As verl's documentation shows one, with all that a function may return or do.
    const VERL: &str = r######"
import re

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    print("scoring", solution_str)
    if solution_str == "raise":
        raise ValueError("no such thing")
    if solution_str == "exit":
        raise SystemExit(1)
    if solution_str == "dict":
        return {"score": 0.5, "acc": True, "pred": "text", "length": 4}
    if solution_str == "list":
        return [0.75, "why"]
    if solution_str == "nan":
        return float("nan")
    if solution_str == "none":
        return None
    if solution_str == "bad dict":
        return {"acc": 1.0}
    assert data_source == "tests" and extra_info == {"split": "train"}
    found = re.search(r"#### (\d+)", solution_str)
    return float(found is not None and found.group(1) == ground_truth) + bonus
"######;

    #[test]
    fn a_verl_style_function_runs_unchanged() {
        if !has_python() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let reward = python(&folder, VERL, "on_error = 'zero'\narguments = { bonus = 0.25 }");
        let logs = RewardOptions { log_folder: Some(folder.path().to_owned()) };
        let pipeline = RewardPipeline::start(&reward, &logs).unwrap();
        let completions =
            ["#### 1", "dict", "list", "#### 2\n\u{2028}\u{1f60a}", "raise", "exit", "nan", "none", "bad dict"];
        let batch = pipeline.score(&samples(&completions)).unwrap();
        assert_eq!(totals(&batch), [1.25, 0.5, 0.75, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(batch.samples[1].parts[1..], [("python/acc".into(), 1.0), ("python/length".into(), 4.0)]);
        let errors: Vec<&str> = batch.samples[4..].iter().map(|s| s.error.as_deref().unwrap_or("-")).collect();
        expect![[r#"
            python: ValueError: no such thing (my_reward.py:7)
            python: SystemExit: 1 (my_reward.py:9)
            python: its value is NaN, no finite number"#]]
        .assert_eq(&errors[..3].join("\n"));
        assert!(errors[3].starts_with("python: TypeError: "), "{}", errors[3]);
        expect![[r#"python: KeyError: 'the dict that was returned has no "score"; its keys are [\'acc\']'"#]]
            .assert_eq(errors[4]);
        drop(pipeline);
        // A thread of its own carries what is printed.
        let begin = Instant::now();
        let log = || fs::read_to_string(folder.path().join("reward-python.log")).unwrap();
        while !log().contains("scoring #### 1") {
            assert!(begin.elapsed() < Duration::from_secs(10), "{}", log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn async_functions_run_together() {
        if !has_python() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let source = "import asyncio\nasync def judge(solution_str, **_):\n    await asyncio.sleep(1.0)\n    return len(solution_str)\n";
        let reward = python(&folder, source, "function = 'judge'\nprocesses = 1\ncalls_in_flight = 16");
        let pipeline = start(&reward);
        let begin = Instant::now();
        let batch = pipeline.score(&samples(&["four"; 16])).unwrap();
        assert_eq!(totals(&batch), [4.0; 16]);
        // One after the other they would take 16 s.
        assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    }

    #[test]
    fn a_function_that_hangs_or_crashes_is_restarted() {
        if !has_python() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let source = "import os, time\ndef compute_score(solution_str, **_):\n    if solution_str == 'hang':\n        while True: pass\n    if solution_str == 'crash':\n        os.abort()\n    return 1.0\n";
        let reward = python(&folder, source, "on_error = 'drop'\ntimeout_seconds = 2.0");
        let batch = start(&reward).score(&samples(&["a", "hang", "b", "crash", "c", "d"])).unwrap();
        assert_eq!(totals(&batch), [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]);
        let crashed = batch.samples[3].error.as_deref().unwrap();
        assert!(crashed.starts_with("python: the process ended (signal SIGABRT)"), "{crashed}");
    }

    #[test]
    fn files_that_cannot_be_imported_say_why() {
        if !has_python() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let check = |source: &str, keys: &str, expected: Expect| {
            check_start(&python(&folder, source, &format!("processes = 1\n{keys}")), folder.path(), expected);
        };
        check(
            "def my_score(): pass\ndef other(): pass\n",
            "",
            expect![[r#"
                reward `python`: the process ended (exit code 1); the end of its stderr:
                  | DIR/my_reward.py defines no function `compute_score`; functions there are: my_score, other"#]],
        );
        let import = python(&folder, "import no_such_module_anywhere\n", "processes = 1");
        let error = RewardPipeline::start(&import, &RewardOptions::default()).err().unwrap().to_string();
        assert!(error.ends_with("| ModuleNotFoundError: No module named 'no_such_module_anywhere'"), "{error}");
        check(
            "import time\ntime.sleep(1000)\n",
            "startup_timeout_seconds = 0.5",
            expect!["reward `python`: not ready within `startup_timeout_seconds` = 0.5; the process was ended"],
        );
        check(
            "",
            "interpreter = '/no/such/python'",
            expect![
                "reward `python`: cannot start `/no/such/python`: No such file or directory (os error 2): there is no such program on PATH or at this path; see `interpreter`"
            ],
        );
        let missing = config("[[parts]]\ntype = 'python'\npath = 'nowhere.py'");
        check_start(&missing, folder.path(), expect!["reward `python`: there is no file `nowhere.py`; see `path`"]);
    }

    #[test]
    fn a_sample_of_other_types_reaches_the_function() {
        if !has_python() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let source =
            "def compute_score(ground_truth, **_):\n    return ground_truth['target'] + len(ground_truth['numbers'])\n";
        let pipeline = start(&python(&folder, source, ""));
        let sample = sample("a", json!({"target": 9, "numbers": [1, 2, 3]}));
        assert_eq!(totals(&pipeline.score(&[sample]).unwrap()), [12.0]);
    }
}
