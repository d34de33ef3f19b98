//! Who failed, how it ends for the others, and what is left behind: nothing.

use crate::fake::{Job, Said, is_alive, kill, wait_until};
use nix::sys::signal::Signal;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// Ends when it is told to, like a worker that saves first.
const OBEDIENT: &str = "trap 'echo saved; exit 0' TERM INT; linger";

#[test]
fn all_ranks_end_well() {
    let job = Job::new();
    let step = r#"progress '{"event":"step","step":20,"steps":20,"loss":1.5}'"#;
    let said = job.run(3, &[], &[("FAKE_0", step)]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let config = job.run_folder().join("config.toml");
    let first_line = format!("rank 0 of 3, restart 0, told: train {}", config.display());
    assert!(said.stdout.contains(&format!("[rank 0] {first_line}")), "{said:?}");
    assert!(said.stderr.contains("[rank 0] note of rank 0") && said.stderr.contains("[rank 2] note"), "{said:?}");
    assert!(!said.stdout.contains("rank 1 of 3"), "stdout of other ranks is in their logs only: {said:?}");
    assert!(said.stderr.contains("step 20/20  loss 1.5000"), "{said:?}");
    let log = job.read("logs/rank-00001.log");
    assert!(log.contains("rank 1 of 3") && log.contains("note of rank 1"), "{log}");
    assert!(job.read("config.toml").contains("global_batch_size = 24"));
    assert!(job.read("events.jsonl").contains(r#""kind":"done""#));
    assert!(job.read("report.html").contains("<html"));
}

#[test]
fn exit_codes_are_those_of_the_first_failure() {
    let job = Job::new();
    for (kind, code) in [("config", 2), ("data", 3), ("device", 4), ("internal", 1)] {
        let fails = format!("fail {kind} {code} 7 'went wrong'");
        // The other rank notices and says so; it may well be the first to end.
        let said = job.run(2, &[], &[("FAKE_1", &fails), ("FAKE_0", "trap 'fail peer 5 7 lost' TERM; linger")]);
        assert_eq!(said.code, Some(code), "{said:?}");
        assert!(said.stderr.contains("rank 1 failed first at step 7"), "{said:?}");
        assert!(said.stderr.contains("went wrong") && said.stderr.contains("rank-00001"), "{said:?}");
    }
    let said = job.run(2, &[], &[("FAKE_0", "fail peer 5 3 'nobody answers'"), ("FAKE_1", OBEDIENT)]);
    assert_eq!(said.code, Some(5), "{said:?}");
    let said = job.run(1, &[], &[("FAKE", "echo the last words; exit 101")]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("exited with code 101") && said.stderr.contains("| the last words"), "{said:?}");
    assert!(job.all_pids().into_iter().all(|pid| !is_alive(pid)));
}

#[test]
fn a_killed_rank_is_the_culprit_though_another_speaks_first() {
    let job = Job::new();
    // Rank 0 has spoken and ended, and rank 1 has been sent SIGTERM, before rank 1 is gone.
    let lost = "await $HERE/armed; fail peer 5 4 'connection closed by rank 1'";
    let step = r#"progress '{"event":"step","step":4,"steps":20,"loss":1.5}';"#;
    let killed = "trap '' TERM; touch $HERE/armed; sleep 0.4; kill -9 $$";
    let said = job.run(2, &[], &[("FAKE_0", &format!("{step} {lost}")), ("FAKE_1", killed)]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("rank 1 failed first after step 4: it was ended by SIGKILL (9)"), "{said:?}");
    let events = job.read("events.jsonl");
    assert!(events.contains(r#""kind":"failure""#) && events.contains("SIGKILL"), "{events}");
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed_with_all_it_started() {
    let job = Job::new();
    let stubborn = "trap '' TERM; sleep 1000 & echo $! > $PIDS/child; linger";
    let fails = "await $PIDS/child; fail device 4 2 'out of memory'";
    let begun = Instant::now();
    let said = job.run(2, &["--grace-seconds", "0.3"], &[("FAKE_0", stubborn), ("FAKE_1", fails)]);
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(said.stderr.contains("out of memory"), "{said:?}");
    // 0.3 s of grace; the rest is the machine's. The child sleeps for 1000 s.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    wait_until("the child of a killed rank ends", || job.all_pids().into_iter().all(|pid| !is_alive(pid)));
    assert_eq!(job.all_pids().len(), 3);
}

#[test]
fn whom_everybody_waited_for_is_named() {
    let job = Job::new();
    let waits = "await $PIDS.ready.1; fail peer 5 9 'no answer from rank 1 for 100 s'";
    let said = job.run(2, &["--grace-seconds", "0.2"], &[("FAKE_0", waits), ("FAKE_1", "trap '' TERM; linger")]);
    assert_eq!(said.code, Some(5), "{said:?}");
    assert!(said.stderr.contains("rank 1 failed first after step 9: it hung"), "{said:?}");
    assert!(said.stderr.contains("rank 0 said: no answer from rank 1"), "{said:?}");
}

#[test]
fn a_child_that_outlives_its_rank_is_killed_and_does_not_hold_up_the_end() {
    let job = Job::new();
    let said = job.run(1, &[], &[("FAKE", "sleep 1000 & echo $! > $PIDS/child")]);
    assert_eq!(said.code, Some(0), "{said:?}");
    wait_until("the child ends", || job.all_pids().into_iter().all(|pid| !is_alive(pid)));
}

#[test]
fn signals_are_passed_on_and_the_code_says_which() {
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129)] {
        let job = Job::new();
        let child = job.spawn(job.command(2, &[]).env("FAKE", OBEDIENT));
        let pids = job.await_lingering(2);
        kill(child.id(), signal);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(job.read("logs/rank-00001.log").contains("saved"));
        assert!(job.read("events.jsonl").contains(r#""kind":"signal""#));
        assert!(!pids.into_iter().any(is_alive));
    }
}

#[test]
fn a_run_that_finished_in_spite_of_the_signal_is_a_success() {
    let job = Job::new();
    let finishes = r#"trap 'progress "{\"event\":\"done\",\"step\":20,\"steps\":20}"; exit 0' TERM; linger"#;
    let child = job.spawn(job.command(1, &[]).env("FAKE", finishes));
    job.await_lingering(1);
    kill(child.id(), Signal::SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_second_signal_kills() {
    let job = Job::new();
    let child = job.spawn(job.command(2, &[]).env("FAKE", "trap 'touch $HERE/told' INT TERM; linger"));
    let pids = job.await_lingering(2);
    kill(child.id(), Signal::SIGINT);
    wait_until("ranks are told", || job.path("told").exists());
    assert!(pids.iter().all(|pid| is_alive(*pid)), "the first signal only asks");
    kill(child.id(), Signal::SIGINT);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(!pids.into_iter().any(is_alive));
}

#[test]
fn a_rank_that_fails_while_it_is_to_end_is_a_failure() {
    let job = Job::new();
    let fails = "trap 'fail device 4 9 \"no space left\"' TERM; linger";
    let lost = "trap 'fail peer 5 9 lost' TERM; linger";
    let child = job.spawn(job.command(2, &["--max-restarts", "2"]).env("FAKE_0", lost).env("FAKE_1", fails));
    job.await_lingering(2);
    kill(child.id(), Signal::SIGTERM);
    let said: crate::fake::Said = child.wait_with_output().unwrap().into();
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(said.stderr.contains("rank 1 failed first at step 9") && said.stderr.contains("no space left"), "{said:?}");
    assert!(!said.stderr.contains("the same command goes on"), "{said:?}");
    let events = job.read("events.jsonl");
    assert!(events.contains(r#""kind":"signal""#) && events.contains(r#""kind":"failure""#), "{events}");
}

#[test]
fn a_signal_ends_the_preparation_of_data_and_a_second_one_at_once() {
    let job = Job::new();
    // Another process prepares the same data, for as long as it takes.
    std::fs::create_dir_all(job.path("run/prepared")).unwrap();
    let lock = std::fs::File::create(job.path("run/prepared/prepare.lock")).unwrap();
    lock.lock().unwrap();
    let child = job.spawn(&mut job.command(1, &[]));
    // The launcher has taken its signals over before it locks the run folder.
    wait_until("the run folder is locked", || job.path("run/.lock-node-0").exists());
    kill(child.id(), Signal::SIGINT);
    let said: crate::fake::Said = child.wait_with_output().unwrap().into();
    assert_eq!(said.code, Some(130), "{said:?}");
    assert!(said.stderr.contains("SIGINT (2) ended the preparation of data; the same command goes on"), "{said:?}");
}

#[test]
fn a_second_signal_ends_at_once_what_cannot_be_asked() {
    let job = Job::new();
    // Reading a pipe whose writer says nothing never ends.
    let path = job.path("silent.toml");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let child =
        job.spawn(crate::fake::tangelo().arg("run").arg(&path).arg("--worker-binary").arg(crate::fake::worker()));
    let mut writer = None;
    wait_until("the job is read", || {
        let mut options = std::fs::OpenOptions::new();
        writer = options.write(true).custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits()).open(&path).ok();
        writer.is_some()
    });
    kill(child.id(), Signal::SIGINT);
    std::thread::sleep(Duration::from_millis(300));
    assert!(is_alive(child.id() as i32), "the first signal only asks");
    kill(child.id(), Signal::SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{output:?}");
}

#[test]
fn a_hangup_that_nohup_ignores_stays_ignored() {
    let job = Job::new();
    let inner = job.command(1, &[]);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", r#"trap '' HUP; exec "$0" "$@""#]).arg(inner.get_program()).args(inner.get_args());
    command.env("PIDS", job.path("pids")).env("HERE", job.path("")).env("FAKE", "await $HERE/go");
    let child = job.spawn(&mut command);
    job.await_ranks(1);
    kill(child.id(), Signal::SIGHUP);
    std::fs::write(job.path("go"), "").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_killed_launcher_leaves_no_rank() {
    let job = Job::new();
    let mut child = job.spawn(job.command(2, &[]).env("FAKE", "linger"));
    let pids = job.await_lingering(2);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("ranks end after their launcher", || !pids.iter().any(|pid| is_alive(*pid)));
}

#[test]
fn failures_restart_all_ranks() {
    let job = Job::new();
    let once = "[ $TORCHELASTIC_RESTART_COUNT = 1 ] || await $PIDS/0.0; [ $TORCHELASTIC_RESTART_COUNT = 1 ] || fail internal 1 $TORCHELASTIC_RESTART_COUNT boom";
    let said = job.run(2, &["--max_restarts", "3"], &[("FAKE_1", once), ("FAKE_0", "sleep 0.1")]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.contains("boom") && said.stderr.contains("restart 1 of 3"), "{said:?}");
    assert_eq!(job.all_pids().len(), 4, "two ranks, twice");
    assert!(job.read("logs/rank-00000.1.log").contains("restart 1"));
    assert!(job.read("logs/rank-00000.log").contains("restart 0"), "earlier logs are kept");
    assert!(job.read("events.jsonl").contains(r#""kind":"restart""#));
}

#[test]
fn what_would_fail_again_is_not_restarted() {
    let job = Job::new();
    let said = job.run(1, &["--max-restarts", "5"], &[("FAKE", "fail data 3 1 'shard 4 is torn'")]);
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(said.stderr.contains("no restart: a data error does not go away"), "{said:?}");
    assert_eq!(job.all_pids().len(), 1);

    let job = Job::new();
    let said = job.run(1, &["--max-restarts", "5"], &[("FAKE", "fail internal 1 6 'index out of range'")]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("the same failure came again at step 6"), "{said:?}");
    assert_eq!(job.all_pids().len(), 2);

    let job = Job::new();
    let said = job.run(1, &["--max-restarts", "2"], &[("FAKE", "kill -9 $$")]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("all 2 restarts are used up"), "{said:?}");
    assert_eq!(job.all_pids().len(), 3);
}

#[test]
fn a_rank_of_torchrun_or_slurm_becomes_the_worker() {
    let job = Job::new();
    let command = |arguments: &[&str]| {
        let mut command = crate::fake::tangelo();
        command.arg("run").arg(job.path("job.toml")).arg("--worker-binary").arg(crate::fake::worker()).args(arguments);
        command.env("PIDS", job.path("pids"));
        command
    };
    let torchrun = [("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")];
    let shows = "echo $MASTER_ADDR:$LOCAL_RANK; exit 4";
    // The second rank of the node waits for the first to prepare the data.
    let mut second = job.spawn(command(&[]).envs(torchrun).env("MASTER_ADDR", "h").env("FAKE", shows));
    std::thread::sleep(Duration::from_millis(500));
    assert!(second.try_wait().unwrap().is_none() && job.all_pids().is_empty());
    let first = [("RANK", "0"), ("LOCAL_RANK", "0")];
    assert_eq!(job.finish(command(&[]).envs(torchrun).envs(first).env("FAKE", "exit 4")).code, Some(4));
    let said: Said = second.wait_with_output().unwrap().into();
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(said.stdout.contains("rank 1 of 2") && said.stdout.contains("h:1"), "{said:?}");
    // Rank 0 says what was asked for; the run folder is new, and nothing but the configuration is put into it.
    let elsewhere = format!("data.prepared_folder={:?}", job.path("elsewhere").display().to_string());
    let fresh = format!("job.dump_folder={:?}", job.path("fresh").display().to_string());
    let sets = ["--set", &elsewhere, "--set", &fresh, "--set", "job.print_config=true"];
    let said = job.finish(command(&sets).envs([("RANK", "0"), ("WORLD_SIZE", "1")]).env("FAKE", shows));
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(said.stderr.contains("print_config = true"), "{said:?}");
    let said = job.finish(command(&["--nproc-per-node", "2"]).envs(torchrun));
    assert_eq!(said.code, Some(2), "{said:?}");

    let slurm = [("SLURM_PROCID", "2"), ("SLURM_NTASKS", "3"), ("SLURM_STEP_ID", "0"), ("SLURM_LOCALID", "0")];
    let said = job.finish(command(&[]).envs(slurm).env("SLURM_STEP_NODELIST", "n[3-5]").env("FAKE", shows));
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(said.stdout.contains("rank 2 of 3") && said.stdout.contains("n3:0"), "{said:?}");
}

#[test]
fn two_nodes_have_consecutive_ranks_and_meet_at_the_endpoint() {
    let job = Job::new();
    let node = |rank: &str| {
        let arguments = ["--nnodes", "2", "--node_rank", rank, "--rdzv_endpoint", "127.0.0.1:29417"];
        job.run(2, &arguments, &[("FAKE_0", "sleep 0.1"), ("FAKE_3", "echo $MASTER_ADDR:$MASTER_PORT $GROUP_RANK")])
    };
    let said = [node("0"), node("1")];
    assert!(said.iter().all(|s| s.code == Some(0)), "{said:?}");
    assert!(job.read("logs/rank-00003.log").contains("127.0.0.1:29417 1"));
    assert!(job.read("logs/rank-00002.log").contains("rank 2 of 4"));
    let said = job.run(2, &["--rdzv-endpoint", "127.0.0.1:29417"], &[]);
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("--nnodes"), "{said:?}");
    let said = job.run(2, &["--nnodes", "2"], &[]);
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("--rdzv-endpoint HOST:PORT"), "{said:?}");
}

#[test]
fn a_run_folder_belongs_to_one_run() {
    let job = Job::new();
    assert_eq!(job.run(1, &[], &[]).code, Some(0));
    // No checkpoint yet: anything may change.
    assert_eq!(job.run(1, &["--set", "debug.seed=5"], &[]).code, Some(0));
    std::fs::create_dir_all(job.run_folder().join("checkpoint/step-00000004")).unwrap();
    assert_eq!(job.run(1, &["--set", "debug.seed=5", "--set", "training.steps=30"], &[]).code, Some(0));
    let said = job.run(1, &["--set", "model.hidden_size=64"], &[]);
    assert_eq!(said.code, Some(2), "{said:?}");
    for part in ["model.hidden_size: 32 -> 64", "debug.seed: 5 -> 42", "--set job.dump_folder="] {
        assert!(said.stderr.contains(part), "{part}: {said:?}");
    }

    let child = job.spawn(job.command(1, &["--set", "debug.seed=5"]).env("FAKE", OBEDIENT));
    job.await_lingering(1);
    let said = job.run(1, &["--set", "debug.seed=5"], &[]);
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("in use by another tangelo run"), "{said:?}");
    kill(child.id(), Signal::SIGTERM);
    child.wait_with_output().unwrap();
}
