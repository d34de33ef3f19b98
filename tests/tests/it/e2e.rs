//! Whole runs with the real binaries: resume, layouts, faults, export.

use crate::job::{Job, Run, assert_losses_agree, assert_same_files, finish, layout, tangelo};
use crate::support;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tangelo_core::env;
use tangelo_observe::records::EventKind;
use tangelo_observe::{EventRecord, Metric};

const STEPS: usize = 20;

fn assert_learned(run: &Run) {
    let losses = run.losses();
    assert_eq!(losses.iter().map(|l| l.0).collect::<Vec<_>>(), (1..=STEPS as u64).collect::<Vec<_>>());
    let (first, last) = (losses[0].1, losses[STEPS - 1].1);
    // An untrained model of 320 tokens starts near ln 320 = 5.8.
    assert!((5.0..7.0).contains(&first) && last < first - 0.5, "loss {first} -> {last}");
}

/// N + M steps equal N, stop, M: every tensor of the checkpoint (weights, both moments) and every loss, to the bit.
fn check_resume(ranks: usize, dtype: &str, sets: &[&str]) {
    let job = Job::new(support::fresh_seed());
    let dtype = format!("training.mixed_precision_param={dtype:?}");
    let sets = [&["--set", &dtype], sets].concat();
    let whole = job.run("whole", ranks, &sets);
    assert_learned(&whole);
    job.run("parts", ranks, &[&sets[..], &["--set", "training.steps=7"]].concat());
    let parts = job.run("parts", ranks, &sets);
    assert_same_files(&parts.checkpoint(STEPS), &whole.checkpoint(STEPS), "resumed and undisturbed");
    assert_eq!(parts.losses(), whole.losses());
}

#[test]
fn one_process_resumes_bitwise_in_fp32() {
    check_resume(1, "float32", &[]);
}

#[test]
fn one_process_resumes_bitwise_in_bf16() {
    check_resume(1, "bfloat16", &[]);
}

#[test]
fn three_processes_resume_bitwise_in_fp32() {
    check_resume(3, "float32", &[]);
}

#[test]
fn three_processes_resume_bitwise_in_bf16() {
    check_resume(3, "bfloat16", &[]);
}

const MUON: [&str; 2] = ["--set", "optimizer.name=Muon"];

#[test]
fn muon_resumes_bitwise_in_fp32() {
    check_resume(2, "float32", &[&MUON[..], &["--set", "parallelism.tensor_parallel_degree=2"]].concat());
}

#[test]
fn muon_resumes_bitwise_in_bf16() {
    check_resume(3, "bfloat16", &[&MUON[..], &["--set", "parallelism.zero_parameter_degree=3"]].concat());
}

#[test]
fn muon_does_not_depend_on_zero_scopes() {
    let job = Job::new(support::fresh_seed());
    let run = |name: &str, degree: &str| job.run(name, 2, &[&MUON[..], &["--set", degree]].concat());
    let zero = run("zero", "parallelism.zero_optimizer_degree=2");
    let plain = run("plain", "parallelism.zero_optimizer_degree=1");
    assert_learned(&zero);
    assert_eq!(zero.losses(), plain.losses(), "ZeRO-1 and plain data parallel");
}

#[test]
fn layouts_agree() {
    let job = Job::new(support::fresh_seed());
    let export = ["--set", "checkpoint.last_save_in_hf=true"];
    let one = job.run("one", 1, &export).losses();
    for ranks in [2, 3] {
        let zero = job.run(&format!("zero-{ranks}"), ranks, &export);
        assert_losses_agree(&zero.losses(), &one, &format!("{ranks} ranks"));
        let plain = [&export[..], &["--set", "parallelism.zero_optimizer_degree=1"]].concat();
        let plain = job.run(&format!("plain-{ranks}"), ranks, &plain);
        assert_eq!(zero.losses(), plain.losses(), "ZeRO-1 and plain data parallel over {ranks} ranks");
        assert!(zero.exported() == plain.exported(), "ZeRO-1 and plain data parallel export other weights");
    }
}

#[test]
fn hybrid_layouts_of_real_processes_agree_with_one() {
    let job = Job::new(support::fresh_seed());
    let one = job.run("one", 1, &[]).losses();
    for (ranks, words) in [
        (2, "tp=2"),
        (2, "cp=2 rotate='ring'"),
        (2, "pp=2"),
        (2, "dp=2 weights=2"),
        (4, "cp=4 head=2 rotate='allgather'"),
        (4, "tp=2 pp=2"),
        (4, "dp=2 cp=2 head=2 weights=4"),
        (4, "tp=2 cp=2 rotate='ring'"),
    ] {
        let sets = layout(words);
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let found = job.run(&words.replace([' ', '\''], "-"), ranks, &sets).losses();
        assert_losses_agree(&found, &one, words);
    }
}

#[test]
fn pretrained_weights_start_alike_in_every_layout() {
    let job = Job::new(support::fresh_seed());
    let short = ["--set", "training.steps=4", "--set", "lr_scheduler.total_steps=4"];
    let source = job.run("source", 1, &[&short[..], &["--set", "checkpoint.last_save_in_hf=true"]].concat());
    let path = format!("checkpoint.initial_load_path={:?}", source.folder.join("export").display().to_string());
    let load = [&short[..], &["--set", "checkpoint.initial_load_in_hf=true", "--set", &path]].concat();
    let losses = |dtype: &str, ranks, words: &str| {
        let mut sets = vec!["--set".to_owned(), format!("training.mixed_precision_param={dtype:?}")];
        sets.extend(if words.is_empty() { Vec::new() } else { layout(words) });
        let sets: Vec<&str> = load.iter().copied().chain(sets.iter().map(String::as_str)).collect();
        job.run(&format!("{dtype}-{}", words.replace([' ', '\''], "-")), ranks, &sets).losses()
    };
    for (dtype, layouts) in [
        ("float32", vec![(4, "tp=2 pp=2"), (2, "dp=2 weights=2"), (2, "tp=2 weights=1")]),
        // Layouts that cut no sum, for others round differently.
        ("bfloat16", vec![(2, "dp=2 weights=2"), (2, "pp=2")]),
    ] {
        let one = losses(dtype, 1, "");
        assert!(one[0].1 < source.losses()[0].1 - 1e-3, "{dtype}: it did not start from the weights of {path}");
        for (ranks, words) in layouts {
            assert_losses_agree(&losses(dtype, ranks, words), &one, &format!("{dtype} {words}"));
        }
    }
}

#[test]
fn a_run_goes_on_in_another_hybrid_layout() {
    let job = Job::new(support::fresh_seed());
    let undisturbed = job.run("undisturbed", 1, &[]).losses();
    for (ranks, words, steps) in [(4, "tp=2 pp=2", 6), (2, "cp=2 rotate='ring' weights=2", 13), (2, "pp=2", 20)] {
        let mut sets = layout(words);
        sets.extend(["--set".into(), format!("training.steps={steps}")]);
        job.run("parts", ranks, &sets.iter().map(String::as_str).collect::<Vec<_>>());
    }
    assert_losses_agree(&job.finished("parts").losses(), &undisturbed, "in parts");
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let job = Job::new(support::fresh_seed());
    let undisturbed = job.run("undisturbed", 2, &[]).losses();
    job.run("parts", 3, &["--set", "training.steps=6"]);
    job.run("parts", 1, &["--set", "training.steps=13"]);
    let parts = job.run("parts", 2, &[]).losses();
    assert_losses_agree(&parts, &undisturbed, "in parts");
}

#[test]
fn a_killed_rank_is_named_and_the_restarted_run_ends_the_same() {
    let job = Job::new(support::fresh_seed());
    let whole = job.run("whole", 2, &[]);
    let (code, text) = finish(
        job.command("killed", 2, &["--max-restarts", "1", "--restart-backoff-ms", "50"]).env(env::FAULT, "kill@7:1"),
    );
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("rank 1") && text.contains("SIGKILL"), "the culprit is not named:\n{text}");
    assert_same_files(&job.finished("killed").checkpoint(STEPS), &whole.checkpoint(STEPS), "restarted, undisturbed");
    let (code, text) = finish(job.command("lost", 2, &[]).env(env::FAULT, "kill@7:1"));
    assert!(code.is_some_and(|c| c != 0), "a lost rank without restarts is a failure:\n{text}");
}

/// Processes whose parent is `parent`.
fn children(parent: u32) -> BTreeSet<u32> {
    let numeric = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().parse::<u32>().ok();
    let pids = std::fs::read_dir("/proc").expect("Linux").flatten().filter_map(numeric);
    pids.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

fn kill(pid: u32) {
    // A process may have ended by itself in between: that is no failure of the test.
    let _ = Command::new("kill").args(["-9", &pid.to_string()]).output();
}

fn wait_until(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {seconds} s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ended(child: &mut Child) -> bool {
    child.try_wait().expect("our own child").is_some()
}

#[test]
fn five_kills_at_random_moments_change_nothing() {
    let seed = support::fresh_seed();
    let job = Job::new(seed);
    // Long enough that no kill comes too late.
    let steps = 150;
    let settings = [format!("training.steps={steps}"), format!("lr_scheduler.total_steps={steps}")];
    let saving = ["--set", &settings[0], "--set", &settings[1], "--set", "checkpoint.interval=1"];
    let whole = job.run("whole", 2, &saving);
    let mut child =
        job.spawn("killed", 2, &[&saving[..], &["--max-restarts", "20", "--restart-backoff-ms", "50"]].concat());
    let mut state = seed | 1;
    let mut kills = 0;
    while kills < 5 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        wait_until("workers start", 60, || ended(&mut child) || children(child.id()).len() == 2);
        assert!(!ended(&mut child), "the run ended after {kills} kills: it needs more steps");
        std::thread::sleep(Duration::from_millis(300 + (state >> 33) % 1500));
        let workers: Vec<u32> = children(child.id()).into_iter().collect();
        if let Some(&worker) = workers.get((state >> 40) as usize % workers.len().max(1)) {
            kill(worker);
            kills += 1;
            wait_until("the worker ends", 10, || parent_of(worker) != Some(child.id()));
        }
    }
    wait_until("the run ends", 180, || ended(&mut child));
    let log = std::fs::read_to_string(job.path("killed.log")).unwrap();
    assert!(child.wait().unwrap().success(), "{log}");
    assert_same_files(&job.finished("killed").checkpoint(steps), &whole.checkpoint(steps), "killed and undisturbed");
}

#[test]
fn a_killed_launcher_leaves_no_worker() {
    let job = Job::new(support::fresh_seed());
    let mut child =
        job.spawn("orphans", 2, &["--set", "training.steps=100000", "--set", "lr_scheduler.total_steps=100000"]);
    wait_until("workers start", 60, || {
        let log = || std::fs::read_to_string(job.path("orphans.log")).unwrap();
        assert!(!ended(&mut child), "the launcher ended before its workers started:\n{}", log());
        children(child.id()).len() == 2
    });
    let workers = children(child.id());
    std::thread::sleep(Duration::from_secs(1));
    kill(child.id());
    child.wait().unwrap();
    let alive = |pid: &u32| Path::new(&format!("/proc/{pid}")).exists();
    wait_until("workers end after their launcher", 20, || !workers.iter().any(alive));
}

#[test]
fn a_step_that_is_not_finite_is_skipped_and_counted() {
    let job = Job::new(support::fresh_seed());
    let (code, text) = finish(job.command("nan", 2, &[]).env(env::FAULT, "nan@5"));
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text.matches("step 5 skipped: loss").count(), 1, "said once:\n{text}");
    let records = job.finished("nan").records();
    let skipped: Vec<_> = records.iter().filter_map(|r| Some((r.step, r.get(Metric::SkippedSteps)?))).collect();
    assert_eq!(skipped.last(), Some(&(STEPS as u64, 1.0)), "{skipped:?}");
    let (code, text) = finish(job.command("strict", 2, &["--set", "training.max_skipped=0"]).env(env::FAULT, "nan@5"));
    assert_eq!(code, Some(2), "{text}");
    // Four steps of 12 sequences each lie before step 5.
    assert!(text.contains("samples 48 to 59"), "the samples are not named:\n{text}");
}

fn events(job: &Job, run: &str) -> Vec<(EventKind, Option<u64>)> {
    let text = std::fs::read_to_string(job.path(run).join("events.jsonl")).unwrap();
    let record = |line: &str| serde_json::from_str::<EventRecord>(line).unwrap();
    text.lines().map(record).map(|e| (e.kind, e.step)).collect()
}

#[test]
fn a_rank_of_another_launcher_records_what_a_launcher_would() {
    let job = Job::new(support::fresh_seed());
    // Nobody reads what it prints: that ends no run.
    let mut command = job.lone_rank("alone", &[]);
    let mut child = command.env(env::FAULT, "nan@5").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("step 5 skipped").count(), 1, "{said}");
    assert!(job.path("alone/report.html").is_file());
    let all = events(&job, "alone");
    assert_eq!(all.iter().filter(|e| matches!(e.0, EventKind::Skipped | EventKind::Warning)).count(), 1, "{all:?}");
    assert_eq!(all.last(), Some(&(EventKind::Done, Some(STEPS as u64))));

    let long = ["--set", "training.steps=100000", "--set", "lr_scheduler.total_steps=100000"];
    let mut command = job.lone_rank("stopped", &long);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("steps are recorded", 60, || job.path("stopped/metrics.jsonl").metadata().is_ok_and(|m| m.len() > 0));
    let asked = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(asked.success() && child.wait_with_output().unwrap().status.success());
    assert_eq!(events(&job, "stopped").last().map(|e| e.0), Some(EventKind::Signal));
    let page = std::fs::read_to_string(job.path("stopped/report.html")).unwrap();
    assert!(page.contains(">stopped") && !page.contains(">done"), "the report says how it ended");
}

#[test]
fn a_checkpoint_passed_over_is_an_event_and_an_export_leaves_checkpoints_alone() {
    let job = Job::new(support::fresh_seed());
    let run = job.run("run", 1, &["--set", "training.steps=8", "--set", "lr_scheduler.total_steps=8"]);
    let damaged = run.folder.join("checkpoint/step-00000008/rank-00000.safetensors");
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    job.run("run", 1, &["--set", "training.steps=8", "--set", "lr_scheduler.total_steps=8"]);
    assert!(events(&job, "run").contains(&(EventKind::Warning, Some(8))), "{:?}", events(&job, "run"));

    let checkpoint = run.folder.join("checkpoint/step-00000004");
    let entries = || std::fs::read_dir(&checkpoint).unwrap().count();
    let before = entries();
    let (code, said) = finish(tangelo(&["export"]).arg(&checkpoint));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("100 %") && run.folder.join("export/model.safetensors").is_file(), "{said}");
    assert_eq!(entries(), before);
    let held_out = job.path("text/0.txt");
    let (code, said) = finish(tangelo(&["eval"]).arg(&run.folder).arg(&held_out).args(["--seq-len", "16"]));
    assert!(code == Some(0) && said.contains("evaluating 100 %") && said.contains("perplexity"), "{said}");
}

#[test]
fn an_unknown_key_is_a_configuration_error_with_the_nearest_key() {
    let job = Job::new(support::fresh_seed());
    let (code, text) = finish(&mut job.command("typo", 1, &["--set", "training.seq_length=32"]));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("seq_len"), "{text}");
}

#[test]
fn an_exported_run_loads_in_transformers_and_scores_the_same() {
    let Some(python) = support::python() else { return };
    let job = Job::new(support::fresh_seed());
    let run = job.run("run", 2, &["--set", "training.mixed_precision_param=\"bfloat16\""]);
    let (run, exported, out) = (run.folder, job.path("hf"), job.path("logits.safetensors"));
    let text = |path: &Path| path.to_str().expect("temporary paths are UTF-8").to_owned();
    let (code, said) = finish(&mut tangelo(&["export", &text(&run), "--format", "hf", "--output", &text(&exported)]));
    assert_eq!(code, Some(0), "{said}");
    let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 250).collect();
    support::run_script(&python, "golden.py", &["logits", &text(&exported), &format!("{ids:?}"), &text(&out)]);
    let golden = tch::Tensor::read_safetensors(&out).unwrap();
    let logprobs = golden[0].1.log_softmax(-1, tch::Kind::Double);
    let scored = score(&exported, &ids);
    assert_eq!(scored.len(), ids.len());
    assert!(scored[0].is_none());
    for i in 1..ids.len() {
        let expected = logprobs.double_value(&[i as i64 - 1, i64::from(ids[i])]);
        // The same fp32 weights through another implementation; log-probabilities lie near 5.
        assert!((scored[i].unwrap() - expected).abs() < 1e-4, "token {i}: {scored:?}");
    }
}

/// `tangelo score` on one list of ids.
fn score(model: &Path, ids: &[u32]) -> Vec<Option<f64>> {
    let input = model.join("ids.jsonl");
    std::fs::write(&input, serde_json::json!({ "ids": ids }).to_string() + "\n").unwrap();
    let mut command = tangelo(&["score"]);
    command.arg(model).arg("--json").args(["--device", "cpu", "--dtype", "float32"]);
    let output = command.stdin(std::fs::File::open(input).unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}\n{said}"));
    answer["logprobs"].as_array().unwrap().iter().map(serde_json::Value::as_f64).collect()
}
