//! What is shown: through a pipe, on a terminal, in silence.

use crate::fake::Job;
use std::process::Command;

const STEPS: &str = r#"
progress '{"event":"phase","name":"loading model"}'; sleep 0.2
for i in 1 2 3; do
    progress "{\"event\":\"step\",\"step\":$i,\"steps\":3,\"loss\":2.25,\"tokens_per_second\":12345,\"mfu\":0.5}"
    sleep 0.15
done
echo hello from the rank
progress '{"event":"saved","step":3}'
progress '{"event":"done","step":3,"steps":3}'
"#;

#[test]
fn a_pipe_gets_plain_lines() {
    let job = Job::new();
    let said = job.run(1, &["--progress-seconds", "0"], &[("FAKE", STEPS)]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let lines: Vec<&str> = said.stderr.lines().collect();
    for line in ["loading model", "step 2/3  loss 2.2500  12.3k tokens/s  MFU 50.0%", "checkpoint of step 3 saved"] {
        assert!(lines.contains(&line), "{line}: {said:?}");
    }
    assert!(!said.stderr.contains('\u{1b}') && !said.stderr.contains('\r'), "no escapes through a pipe: {said:?}");
    // Seldom enough by default: the first step and the last.
    let said = job.run(1, &[], &[("FAKE", STEPS)]);
    assert!(said.stderr.contains("step 1/3") && !said.stderr.contains("step 2/3"), "{said:?}");
    assert!(said.stderr.contains("step 3/3"), "{said:?}");
}

#[test]
fn quiet_is_silent_and_still_says_what_went_wrong() {
    let job = Job::new();
    let said = job.run(1, &["--quiet"], &[("FAKE", STEPS)]);
    assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (Some(0), "", ""));
    let said = job.run(1, &["-q"], &[("FAKE", "fail data 3 1 'shard 4 is torn'")]);
    assert!(said.stderr.contains("shard 4 is torn"), "{said:?}");
    let warns =
        r#"progress '{"event":"skipped","step":7,"reason":"loss NaN"}'; echo 'warning: no room' >&2; echo hm >&2"#;
    let said = job.run(2, &["-q"], &[("FAKE_0", warns), ("FAKE_1", "echo 'warning: slow disk' >&2")]);
    let mut lines: Vec<&str> = said.stderr.lines().collect();
    lines.sort_unstable();
    let expected = ["[rank 0] warning: no room", "[rank 1] warning: slow disk", "warning: step 7 skipped: loss NaN"];
    assert_eq!((said.code, lines.as_slice()), (Some(0), &expected[..]), "{said:?}");
}

#[test]
fn phases_of_data_work_are_shown() {
    let job = Job::new();
    let said = job.run(1, &[], &[]);
    for line in ["preparing text", "looking at source files", "tokenising"] {
        assert!(said.stderr.lines().any(|l| l == line), "{line}: {said:?}");
    }
}

#[test]
fn an_output_that_nobody_reads_ends_no_run() {
    let job = Job::new();
    let mut command = job.command(1, &["--progress-seconds", "0"]);
    let mut child = job.spawn(command.env("FAKE", format!("{STEPS} echo loud >&2; touch $HERE/ended")));
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(job.path("ended").exists() && job.read("logs/rank-00000.log").contains("loud"));
}

const VERB: &str = r#"#!/bin/sh
say() { echo "$1" > "/proc/self/fd/$TANGELO_PROGRESS_FD"; }
say '{"event":"phase","name":"loading the model"}'
say '{"event":"amount","name":"evaluating","done":5,"total":10,"detail":"7 tokens"}'
echo 'warning: odd' >&2
echo "perplexity 3"
exit 3
"#;

#[test]
fn eval_and_export_show_how_far_they_are() {
    let job = Job::new();
    let verb = job.path("verb.sh");
    std::fs::write(&verb, VERB).unwrap();
    std::fs::set_permissions(&verb, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for arguments in [&["eval", "m", "text.txt"][..], &["export", "run"]] {
        let said = |more: &[&str]| {
            job.finish(crate::fake::tangelo().args(arguments).args(more).arg("--worker-binary").arg(&verb))
        };
        let loud = said(&[]);
        assert_eq!((loud.code, loud.stdout.as_str()), (Some(3), "perplexity 3\n"), "{loud:?}");
        for line in ["loading the model", "evaluating 50 % 7 tokens", "warning: odd"] {
            assert!(loud.stderr.lines().any(|l| l == line), "{line}: {loud:?}");
        }
        let quiet = said(&["--quiet"]);
        assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("perplexity 3\n", "warning: odd\n"));
    }
}

/// On a pseudo-terminal of `script`, 100 columns wide.
fn on_terminal(job: &Job, no_color: bool) -> String {
    let run = job.command(1, &[]);
    let quoted = |text: &std::ffi::OsStr| format!("'{}'", text.to_string_lossy());
    let words: Vec<String> = std::iter::once(run.get_program()).chain(run.get_args()).map(quoted).collect();
    let inner = format!("stty cols 100; exec {}", words.join(" "));
    let mut command = Command::new("script");
    command.args(["-qec", &inner, "/dev/null"]).env("PIDS", job.path("pids")).env("FAKE", STEPS).env("TERM", "xterm");
    command.env_remove("NO_COLOR").env_remove("RANK").env_remove("WORLD_SIZE");
    if no_color {
        command.env("NO_COLOR", "1");
    }
    let output = command.stdin(std::process::Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn a_terminal_gets_a_bar_in_colours_unless_unwanted() {
    let job = Job::new();
    let text = on_terminal(&job, false);
    assert!(text.contains("loading model") && text.contains("step 2/3"), "{text}");
    assert!(text.contains("loss 2.2500") && text.contains("12.3k tokens/s") && text.contains("left"), "{text}");
    assert!(text.contains("hello from the rank") && text.contains("checkpoint of step 3 saved"), "{text}");
    assert!(text.contains("\u{1b}[36m"), "colours: {text:?}");
    let text = on_terminal(&job, true);
    assert!(text.contains("step 2/3"), "{text}");
    // Cursor movements stay; colours are `m` sequences.
    let colored = text
        .split('\u{1b}')
        .skip(1)
        .any(|s| s.trim_start_matches(|c: char| "[0123456789;".contains(c)).starts_with('m'));
    assert!(!colored, "NO_COLOR is set: {text:?}");
}
