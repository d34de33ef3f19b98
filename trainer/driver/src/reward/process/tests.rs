//! What becomes of the processes themselves.

use super::*;
use crate::reward::testing::sample;
use serde_json::json;
use std::process::Command;

/// Reads calls for ever; its own child sleeps with every pipe open.
const WITH_A_CHILD: &str = "sleep 1000 & echo $! > \"$0\"; while read -r _; do :; done";

fn function(script: &str, argument: &Path) -> RewardFunction {
    RewardFunction::Command {
        command: vec!["/bin/sh".into(), "-c".into(), script.into(), argument.display().to_string()],
        timeout_seconds: 0.3,
        processes: 1,
        calls_in_flight: 1,
    }
}

fn is_alive(pid: &str) -> bool {
    // A zombie has a folder but no memory.
    std::fs::read_to_string(format!("/proc/{pid}/statm")).is_ok_and(|text| !text.starts_with("0 "))
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn read_pid(path: &Path) -> String {
    wait_until("the script wrote its child's number", || {
        std::fs::read_to_string(path).is_ok_and(|t| t.ends_with('\n'))
    });
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

#[test]
fn a_dropped_pool_leaves_nobody_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pid");
    let pool = ProcessPool::start("test", &function(WITH_A_CHILD, &path), None).unwrap().unwrap();
    let pid = read_pid(&path);
    assert!(is_alive(&pid));
    drop(pool);
    wait_until("the child of the process is gone", || !is_alive(&pid));
}

#[test]
fn a_late_call_takes_its_processes_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pid");
    let pool = ProcessPool::start("test", &function(WITH_A_CHILD, &path), None).unwrap().unwrap();
    let pid = read_pid(&path);
    let (reply, answers) = channel();
    pool.submit(0, payload(&sample("a", json!("b")), false), reply);
    let done = answers.recv_timeout(Duration::from_secs(20)).unwrap();
    let Err(CallError::Call(error)) = done.result else { panic!("{:?}", done.result) };
    assert!(error.starts_with("no answer within `timeout_seconds` = 0.3; the process was ended"), "{error}");
    wait_until("the child of the process is gone", || !is_alive(&pid));
}

/// The guard ends a group when the process that holds its pipe is gone, however that came about.
#[test]
fn the_guard_ends_a_group_that_lost_its_driver() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pid");
    let launch = Launch {
        program: "/bin/sh".into(),
        arguments: ["-c", "sleep 1000 & echo $! > \"$0\"; sleep 1000"]
            .iter()
            .map(OsString::from)
            .chain([path.clone().into()])
            .collect(),
        says_ready: false,
        key: "command",
        log: None,
    };
    let (events, _receiver) = channel();
    let mut process = Process::start(&launch, 0, 1, &events).unwrap();
    let pid = read_pid(&path);
    // What the kernel does with the pipes of a dead process.
    process.lose_guard_pipe();
    wait_until("the group is gone", || !is_alive(&pid) && process.has_ended());
    assert!(process.end(Duration::ZERO).starts_with("the process ended (signal SIGKILL)"));
}

fn has_python() -> bool {
    let found = Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: there is no python3");
    }
    found
}

/// The wrapper's module is compiled from what is in this binary, and ends with its stdin though a call is under way.
#[test]
fn a_python_process_that_loses_stdin_ends() {
    if !has_python() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (script, path) = (folder.path().join("slow.py"), folder.path().join("pid"));
    let text = format!(
        "import os, time\ndef compute_score(**_):\n    open({path:?}, 'w').write(f'{{os.getpid()}}\\n')\n    while True: pass\n"
    );
    std::fs::write(&script, text).unwrap();
    let mut child = Command::new("python3")
        .args(["-c", PYTHON_WRAPPER, script.to_str().unwrap(), "compute_score", "{}"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let call = payload(&sample("a", json!("b")), true);
    std::io::Write::write_all(&mut stdin, wire::request(1, &call).as_bytes()).unwrap();
    let pid = read_pid(&path);
    drop(stdin);
    wait_until("the busy process ended", || !is_alive(&pid));
    child.wait().unwrap();
}
