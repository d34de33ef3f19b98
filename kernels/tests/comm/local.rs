//! Ranks as threads.

use super::suite;
use std::time::Duration;
use tangelo_kernels::comm::{CommErrorKind, CommOptions, Communicator, local};
use tch::{Device, Kind, Tensor};

/// Runs every rank on a thread of its own and returns their answers in rank order.
pub fn run_ranks<R: Send>(size: usize, timeout: Duration, body: impl Fn(Communicator) -> R + Sync) -> Vec<R> {
    let options = CommOptions { timeout, ..CommOptions::default() };
    let group = local::group(size, &options);
    let body = &body;
    std::thread::scope(|scope| {
        let threads: Vec<_> = group.into_iter().map(|comm| scope.spawn(move || body(comm))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

const PATIENCE: Duration = Duration::from_secs(60);

fn zeros(count: i64) -> Tensor {
    Tensor::zeros([count], (Kind::Float, Device::Cpu))
}

fn fresh_seed() -> u64 {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    seed
}

#[test]
fn every_call_for_one_to_five_ranks() {
    let seed = fresh_seed();
    for size in 1..=5 {
        run_ranks(size, PATIENCE, |comm| suite::run(&comm, seed));
    }
}

#[test]
fn one_rank_alone_needs_no_back_end() {
    let seed = fresh_seed();
    suite::run(&Communicator::single(), seed);
}

#[test]
fn a_mismatch_fails_everybody_and_names_both_calls() {
    let errors = run_ranks(3, PATIENCE, |comm| {
        comm.barrier().unwrap();
        let result = if comm.rank() == 1 { comm.broadcast(&zeros(4), 0) } else { comm.all_reduce(&zeros(4)) };
        result.unwrap_err()
    });
    for error in errors {
        assert!(matches!(error.kind, CommErrorKind::Mismatch(_)), "{error}");
        for part in ["all_reduce #1", "broadcast #1", "local.rs:"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}

#[test]
fn sizes_and_types_must_agree() {
    let check = |tensor: fn(usize) -> Tensor| {
        let errors = run_ranks(2, PATIENCE, |comm| comm.all_reduce(&tensor(comm.rank())).unwrap_err());
        assert!(errors.iter().all(|error| matches!(error.kind, CommErrorKind::Mismatch(_))), "{errors:?}");
    };
    check(|rank| zeros(4 + rank as i64));
    check(|rank| if rank == 0 { zeros(4) } else { zeros(4).to_kind(Kind::BFloat16) });
}

#[test]
fn a_rank_that_panics_or_leaves_is_named() {
    let errors = run_ranks(3, PATIENCE, |comm| {
        if comm.rank() == 2 {
            drop(comm);
            return None;
        }
        let first = comm.all_reduce(&zeros(10)).unwrap_err();
        let later = comm.barrier().unwrap_err();
        assert!(later.to_string().contains("an earlier call failed"), "{later}");
        Some(first)
    });
    // Rank 0 or 1 may see the other one leave after it saw rank 2 leave.
    assert!(errors.iter().flatten().any(|error| error.culprit() == Some(2)), "{errors:?}");
    assert!(errors.iter().flatten().all(|error| error.is_peer_failure()));
}

#[test]
fn a_rank_that_never_comes_runs_into_the_deadline() {
    let over = std::sync::Barrier::new(2);
    let errors = run_ranks(2, PATIENCE, |comm| {
        comm.set_timeout(Duration::from_millis(100));
        let error = (comm.rank() == 0).then(|| comm.send(&zeros(10), 1).unwrap_err());
        over.wait();
        error
    });
    let error = errors[0].as_ref().unwrap();
    assert!(matches!(error.kind, CommErrorKind::Timeout { rank: Some(1), .. }), "{error}");
    assert!(error.to_string().starts_with("rank 0, group world: send #0 at "), "{error}");
}

#[test]
fn an_abort_ends_a_waiting_rank() {
    let errors = run_ranks(2, PATIENCE, |comm| {
        if comm.rank() == 1 {
            let handle = comm.abort_handle();
            let aborter = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                handle.abort("the user asked");
            });
            let error = comm.recv(&zeros(1), 0).unwrap_err();
            aborter.join().unwrap();
            assert!(matches!(comm.barrier().unwrap_err().kind, CommErrorKind::Aborted(_)));
            return error;
        }
        comm.recv(&zeros(1), 1).unwrap_err()
    });
    assert!(matches!(&errors[1].kind, CommErrorKind::Aborted(reason) if reason == "the user asked"), "{}", errors[1]);
    assert_eq!(errors[0].culprit(), Some(1), "{}", errors[0]);
}
