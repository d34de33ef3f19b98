//! Order, back-pressure, aborts between steps, admin calls that overtake.

use crate::support::*;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tangelo_control::*;
use tangelo_core::FailureKind;

async fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !ready() {
        assert!(begin.elapsed() < PATIENCE, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A worker that runs `optim_step` until it is told to stop or released.
fn long(started: Arc<AtomicUsize>, release: Arc<AtomicBool>) -> BoxedWorker {
    worker(move |_, control| {
        started.fetch_add(1, Ordering::SeqCst);
        let begin = Instant::now();
        while !release.load(Ordering::SeqCst) && begin.elapsed() < PATIENCE {
            control.check()?;
            control.record("token_version", control.version() as f64);
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Output::default())
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn admin_calls_overtake_and_abort_stops_between_steps() {
    let (started, release) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let job = TestJob::of(4, |_| long(started.clone(), release.clone())).await;
    let policy = job.policy();
    let call = tokio::spawn({
        let policy = policy.clone();
        async move { policy.optim_step(0.1).await }
    });
    until("the verb on every rank", || started.load(Ordering::SeqCst) == 4).await;
    policy.set_version(12).await.unwrap();
    let health = policy.health().await.unwrap();
    assert!(health.iter().all(|(_, h)| h.running.as_deref() == Some("policy.optim_step") && h.version == 12));
    // The running verb sees the new version without ending.
    let begin = Instant::now();
    while !job.cluster.statistics().await.unwrap().iter().all(|s| s.get("token_version") == Some(&12.0)) {
        assert!(begin.elapsed() < PATIENCE, "the version did not reach the running verb");
    }
    policy.abort().await.unwrap();
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(error.call().unwrap().failure.cause, Cause::Aborted, "{error}");
    // The next call is not affected.
    release.store(true, Ordering::SeqCst);
    policy.optim_step(0.1).await.unwrap();
    assert!(job.end().await.iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_wait_while_ranks_are_busy_and_keep_their_order() {
    const CALLS: usize = 400;
    let seen: Arc<Mutex<Vec<f64>>> = Arc::default();
    let release = Arc::new(AtomicBool::new(false));
    let busy = |rank: usize| {
        let (seen, release) = (seen.clone(), release.clone());
        worker(move |job, _| {
            let begin = Instant::now();
            while !release.load(Ordering::SeqCst) && begin.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(1));
            }
            if let (0, Request::OptimStep { lr }) = (rank, &job.request) {
                seen.lock().unwrap().push(*lr);
            }
            Ok(Output::default())
        })
    };
    let job = TestJob::of(2, busy).await;
    let policy = job.policy();
    let before = job.cluster.traffic().control_sent_bytes;
    // Large requests, so that sockets' buffers hold few of them.
    let name = PathBuf::from("x".repeat(1 << 20));
    let calls: Vec<_> = (0..CALLS)
        .map(|i| {
            let (policy, name) = (policy.clone(), name.clone());
            let large = i % 4 == 0;
            tokio::spawn(async move {
                if large { policy.save(&name).await.map(|_| ()) } else { policy.optim_step(i as f64).await.map(|_| ()) }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(700)).await;
    let sent = (job.cluster.traffic().control_sent_bytes - before) >> 20;
    assert!(sent < CALLS as u64 / 4 / 2, "{sent} MiB of {} were taken by ranks that take no calls", CALLS / 4);
    // The admin lane is open all the same.
    assert_eq!(policy.health().await.unwrap().len(), 2);
    release.store(true, Ordering::SeqCst);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let seen = seen.lock().unwrap().clone();
    assert_eq!(seen.len(), CALLS * 3 / 4);
    drop(seen);
    assert!(job.end().await.iter().all(Result::is_ok));
}

/// Two colocated roles called at once: all ranks see the same order, or their collectives would not fit together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_rank_of_a_pool_sees_the_same_order() {
    let seen: Arc<Mutex<Vec<Vec<String>>>> = Arc::new(Mutex::new(vec![Vec::new(); 4]));
    let note = |rank: usize| {
        let seen = seen.clone();
        worker(move |job, _| {
            seen.lock().unwrap()[rank].push(format!("{} {:?}", job.context.role, job.request));
            Ok(Output::default())
        })
    };
    let job = TestJob::start(Placement::colocated(&["policy", "critic"], 4), 2, data_parallel, note).await;
    let calls: Vec<_> = (0..40)
        .map(|i| {
            let group = job.cluster.group(["policy", "critic"][i % 2]).unwrap();
            tokio::spawn(async move { group.optim_step(i as f64).await })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let seen = seen.lock().unwrap().clone();
    assert_eq!(seen[0].len(), 40);
    assert!(seen.iter().all(|order| *order == seen[0]), "{seen:?}");
    assert!(job.end().await.iter().all(Result::is_ok));
}

/// A future that is dropped is a call that is cancelled: the running one stops, a waiting one never runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_call_is_cancelled() {
    let (started, release) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let job = TestJob::of(2, |_| long(started.clone(), release.clone())).await;
    let policy = job.policy();
    let spawn = || {
        let policy = policy.clone();
        tokio::spawn(async move { policy.optim_step(0.1).await })
    };
    let running = spawn();
    until("the first call", || started.load(Ordering::SeqCst) == 2).await;
    let waiting = spawn();
    until("the second call being sent", || job.cluster.calls_in_flight() == 2).await;
    let begin = Instant::now();
    while policy.health().await.unwrap().iter().any(|(_, h)| h.waiting == 0) {
        assert!(begin.elapsed() < PATIENCE, "the second call does not wait on the ranks");
    }
    waiting.abort();
    until("the second call ending", || job.cluster.calls_in_flight() <= 1).await;
    running.abort();
    until("the first call ending", || job.cluster.calls_in_flight() == 0).await;
    release.store(true, Ordering::SeqCst);
    policy.optim_step(0.1).await.unwrap();
    assert_eq!(started.load(Ordering::SeqCst), 4, "the cancelled call that waited was run");
    assert!(job.end().await.iter().all(Result::is_ok));
}

/// `try_join!` drops the calls that still run when one fails, also those on other pools.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_in_one_pool_stops_the_other() {
    let (started, release) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let placement = Placement::grouped(&[(&["policy"], 1), (&["critic"], 1)]);
    let make = |rank: usize| match rank {
        0 => worker(|_, _| Err(WorkerError::new(FailureKind::Data, "no such shard"))),
        _ => long(started.clone(), release.clone()),
    };
    let job = TestJob::start(placement, 1, data_parallel, make).await;
    let [policy, critic] = ["policy", "critic"].map(|role| job.cluster.group(role).unwrap());
    let late = async {
        until("the critic's call", || started.load(Ordering::SeqCst) == 1).await;
        policy.optim_step(0.1).await
    };
    let error = tokio::try_join!(critic.optim_step(0.1), late).unwrap_err();
    assert_eq!(error.call().unwrap().role, "policy");
    let begin = Instant::now();
    while critic.health().await.unwrap()[0].1.running.is_some() {
        assert!(begin.elapsed() < PATIENCE, "the critic's call was not stopped");
    }
    assert!(job.end().await.iter().all(Result::is_ok));
}
