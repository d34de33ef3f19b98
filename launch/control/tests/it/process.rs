//! Ranks in processes of their own: one is killed, one is stopped.

use crate::support::*;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use tangelo_control::*;
use tangelo_core::env;

/// Set for the processes that tests start.
const WORKER: &str = "CONTROL_TEST_WORKER";

/// The rank's main, in its own process; nothing when run as a test.
#[test]
fn rank_process() {
    if std::env::var_os(WORKER).is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let rank = runtime.block_on(async {
        let seats =
            data_parallel(&Placement::colocated(&["policy"], 2), std::env::var(env::RANK).unwrap().parse().unwrap());
        let options = RankOptions::from_env(seats, STORE_BYTES).unwrap();
        Rank::start(&Membership::from_env().unwrap(), options).await.unwrap()
    });
    let mut worker = worker(|job, control| {
        let begin = Instant::now();
        while matches!(job.request, Request::Save { .. }) && begin.elapsed() < PATIENCE {
            control.check()?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Output::default())
    });
    if let Err(error) = rank.run(&mut *worker) {
        std::process::exit(error.kind().exit_code().into());
    }
}

struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            _ = child.kill();
            _ = child.wait();
        }
    }
}

/// Two ranks run a long verb; a signal strikes rank 1; the driver's error, and the exit code of rank 0 when the driver
/// is gone.
async fn check(signal: &str, timeout: Duration, expected: &str) {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    let options = options(1, 2);
    options.secret.write(&secret).unwrap();
    let driver = Driver::listen(options).await.unwrap();
    let agent = Agent::start(&driver.member(0)).await.unwrap();
    let agent = tokio::spawn(agent.run());
    let start = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process::rank_process", "--nocapture", "--test-threads=1"])
            .envs(driver.environment(0))
            .env(env::JOB_SECRET_FILE, &secret)
            .env(env::RANK, rank.to_string())
            .env(WORKER, "1")
            .spawn()
            .unwrap()
    };
    let mut ranks = Processes((0..2).map(start).collect());
    let cluster = driver.assemble(Placement::colocated(&["policy"], 2), PATIENCE).await.unwrap();
    let policy = cluster.group("policy").unwrap();
    policy.optim_step(0.1).await.unwrap();
    let long = policy.within(timeout);
    let call = tokio::spawn(async move { long.save(Path::new("anywhere")).await });
    while policy.health().await.unwrap().iter().any(|(_, health)| health.running.is_none()) {}
    let pid = ranks.0[1].id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    let begin = Instant::now();
    let error = call.await.unwrap().unwrap_err();
    assert!(error.to_string().contains(expected), "{error}");
    assert_eq!(error.kind().exit_code(), 5);
    assert!(begin.elapsed() < Duration::from_secs(8), "the driver knew after {:?}", begin.elapsed());
    drop((cluster, policy));
    agent.await.unwrap().unwrap();
    let status = tokio::task::spawn_blocking(move || ranks.0[0].wait().unwrap()).await.unwrap();
    assert_eq!(status.code(), Some(5), "a rank whose driver is gone ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_rank_is_named_at_once() {
    let expected = "rank 1 (node 0) failed in policy.save of step 0: the connection to it broke";
    check("-KILL", PATIENCE, expected).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_rank_meets_the_deadline() {
    check("-STOP", Duration::from_millis(1500), "did not answer within 1.5s").await;
}
