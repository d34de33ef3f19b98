//! The first error wins, with everything one needs to know; others are cancelled.

use crate::support::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tangelo_control::*;
use tangelo_core::FailureKind;

/// The message without its trace id, which differs from run to run.
fn message(error: &ControlError) -> String {
    let text = error.to_string();
    text.rsplit_once(" [trace").map_or(text.clone(), |(text, _)| text.to_owned())
}

/// 8 ranks on 2 nodes, of which some fail in their own way; the others wait until they are told to stop.
async fn check(fail: fn(usize) -> Option<Result<Output, WorkerError>>, expected: expect_test::Expect) -> CallFailure {
    let healthy = (0..8).filter(|&rank| fail_is_none(fail, rank)).count();
    let (begun, stopped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counters = (begun.clone(), stopped.clone());
    let make = move |rank: usize| {
        let ((begun, stopped), is_healthy) = (counters.clone(), fail_is_none(fail, rank));
        worker(move |_, control| {
            let begin = Instant::now();
            if !is_healthy {
                // A rank that has not begun when the first error comes never begins, and is not told to stop.
                while begun.load(Ordering::SeqCst) < healthy && begin.elapsed() < PATIENCE {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            if let Some(result) = fail(rank) {
                return result;
            }
            begun.fetch_add(1, Ordering::SeqCst);
            while begin.elapsed() < PATIENCE {
                if let Err(stop) = control.check() {
                    stopped.fetch_add(1, Ordering::SeqCst);
                    return Err(stop);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(Output::default())
        })
    };
    let job = TestJob::start(Placement::colocated(&["policy"], 8), 2, data_parallel, make).await;
    job.cluster.begin_step(7);
    let begin = Instant::now();
    let error = job.policy().within(Duration::from_secs(4)).optim_step(0.1).await.unwrap_err();
    expected.assert_eq(&message(&error));
    assert!(begin.elapsed() < PATIENCE / 2, "the error came after {:?}", begin.elapsed());
    while stopped.load(Ordering::SeqCst) < healthy {
        assert!(begin.elapsed() < PATIENCE, "{} of {healthy} ranks were told", stopped.load(Ordering::SeqCst));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    error.call().unwrap().clone()
}

fn fail_is_none(fail: fn(usize) -> Option<Result<Output, WorkerError>>, rank: usize) -> bool {
    std::panic::catch_unwind(|| fail(rank).is_none()).unwrap_or(false)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_error_wins_and_the_others_are_cancelled() {
    let one = |rank: usize| {
        (rank == 5).then(|| Err(WorkerError::new(FailureKind::Device, "CUDA out of memory: 3 GiB asked, 1 GiB free")))
    };
    let failure = check(
        one,
        expect_test::expect![
            "rank 5 (node 1) failed in policy.optim_step of step 7: CUDA out of memory: 3 GiB asked, 1 GiB free; the rank's log has the details"
        ],
    )
    .await;
    assert_eq!((failure.failure.kind.exit_code(), failure.failure.cause), (4, Cause::Handler));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_blames_a_peer_is_not_the_culprit() {
    let fail = |rank: usize| match rank {
        0..=3 => Some(Err(WorkerError::new(FailureKind::Peer, "rank 6 left the collective"))),
        6 => {
            std::thread::sleep(Duration::from_millis(60));
            Some(Err(WorkerError::new(FailureKind::Data, "shard 3 is torn")))
        }
        _ => None,
    };
    let failure = check(
        fail,
        expect_test::expect![
            "rank 6 (node 1) failed in policy.optim_step of step 7: shard 3 is torn; the rank's log has the details"
        ],
    )
    .await;
    assert_eq!(failure.failure.kind, FailureKind::Data);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_is_an_answer() {
    let fail = |rank: usize| {
        assert!(rank != 2, "index out of range");
        None
    };
    let failure = check(
        fail,
        expect_test::expect![
            "rank 2 (node 0) failed in policy.optim_step of step 7: its handler panicked: index out of range; this is a bug; the rank's log has the backtrace"
        ],
    )
    .await;
    assert_eq!((failure.failure.cause, failure.failure.kind.exit_code()), (Cause::Panic, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_panic_a_rank_refuses_and_ends() {
    let job = TestJob::of(1, |_| worker(|_, _| panic!("broken"))).await;
    let policy = job.policy();
    policy.optim_step(0.1).await.unwrap_err();
    let error = policy.optim_step(0.1).await.unwrap_err();
    assert!(matches!(error.call().unwrap().failure.cause, Cause::Panic | Cause::Lost), "{error}");
    let rank = job.ranks.into_iter().next().unwrap().join().unwrap().unwrap_err();
    expect_test::expect!["rank 0: broken; this is a bug; the rank's log has the backtrace"]
        .assert_eq(&rank.to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_does_not_answer_meets_the_deadline() {
    let stuck = |rank: usize| {
        worker(move |_, control: &Control| {
            let begin = Instant::now();
            while rank % 3 == 1 && begin.elapsed() < PATIENCE && control.check().is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(Output::default())
        })
    };
    let job = TestJob::start(Placement::colocated(&["policy"], 8), 2, data_parallel, stuck).await;
    let error = job.policy().within(Duration::from_secs(2)).optim_step(0.1).await.unwrap_err();
    expect_test::expect![
        "rank 1 (node 0) failed in policy.optim_step of step 0: it did not answer within 2s, neither did ranks [4, 7]; it hangs, is stopped, or needs a longer deadline for this verb"
    ]
    .assert_eq(&message(&error));
    assert_eq!(error.kind().exit_code(), 5);
    // They were told to stop, and go on with the next call.
    let health = job.policy().health().await.unwrap();
    assert_eq!(health.len(), 8);
    assert!(job.end().await.iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_end_when_their_driver_is_gone() {
    let job = TestJob::of(2, |_| toy()).await;
    drop(job.cluster);
    for rank in job.ranks {
        let error = tokio::task::spawn_blocking(move || rank.join().unwrap()).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("the connection to the node agent is gone"), "{error}");
        assert_eq!(error.kind().exit_code(), 5);
    }
}
