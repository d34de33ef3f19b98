//! Ranks as threads.

use super::suite;
use std::time::Duration;
use tangelo_kernels::comm::{Background, CommErrorKind, CommOptions, Communicator, local};
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

fn background(comm: &Communicator) -> Background {
    Background::new(comm.split("side", Some(0), 0).unwrap().unwrap())
}

#[test]
fn a_peer_lost_while_a_call_is_pending_fails_it_and_all_later_ones() {
    let errors = run_ranks(2, PATIENCE, |comm| {
        let background = background(&comm);
        if comm.rank() == 1 {
            return Vec::new();
        }
        let first_line = line!() + 1;
        let pending = background.start_all_reduce(zeros(10));
        let later = background.start_recv(zeros(10), 1);
        let errors = [later.wait().unwrap_err(), pending.wait().unwrap_err()];
        assert_eq!(errors[1].call_site.line(), first_line);
        errors.into()
    });
    let [later, first] = &errors[0][..] else { panic!("{errors:?}") };
    assert_eq!(first.culprit(), Some(1), "{first}");
    assert!(later.to_string().contains("an earlier call failed"), "{later}");
    assert!(first.call_site.file().ends_with("local.rs") && later.call_site.line() == first.call_site.line() + 1);
}

#[test]
fn a_call_in_the_background_has_its_deadline() {
    let over = std::sync::Barrier::new(2);
    let errors = run_ranks(2, PATIENCE, |comm| {
        let background = background(&comm);
        comm.set_timeout(Duration::from_millis(100));
        let error = (comm.rank() == 0).then(|| background.start_all_reduce(zeros(10)).wait().unwrap_err());
        over.wait();
        error
    });
    let error = errors[0].as_ref().unwrap();
    assert!(matches!(error.kind, CommErrorKind::Timeout { rank: Some(1), .. }), "{error}");
}

#[test]
fn calls_that_nobody_waits_for_are_made() {
    run_ranks(2, PATIENCE, |comm| {
        let (background, sum) = (background(&comm), zeros(10_000) + 1.0);
        // More than the queue holds.
        (0..100).for_each(|_| drop(background.start_all_reduce(zeros(3))));
        drop(background.start_all_reduce(sum.shallow_clone()));
        drop(background);
        assert_eq!(sum.double_value(&[9_999]), 2.0);
    });
}

#[test]
fn a_panic_or_a_failure_elsewhere_holds_no_drop_up() {
    let begin = std::time::Instant::now();
    let panicked = run_ranks(2, PATIENCE, |comm| {
        let (side, other) = (background(&comm), comm.split("other", Some(0), 0).unwrap().unwrap());
        // Each waits for what the other one never starts.
        let pending = if comm.rank() == 0 { side.start_recv(zeros(1), 1) } else { side.start_recv(zeros(1), 0) };
        if comm.rank() == 0 {
            let unwinding = std::panic::AssertUnwindSafe(move || {
                let _side = side;
                panic!("planted");
            });
            assert!(std::panic::catch_unwind(unwinding).is_err());
            return pending.wait().unwrap_err();
        }
        let error = other.barrier().unwrap_err();
        drop(side);
        error
    });
    assert!(panicked[0].to_string().contains("aborted: this rank panicked"), "{}", panicked[0]);
    assert_eq!(panicked[1].culprit(), Some(0), "{}", panicked[1]);
    assert!(begin.elapsed() < PATIENCE / 2);
}

#[test]
fn shifts_must_agree() {
    let errors = run_ranks(2, PATIENCE, |comm| {
        let other = 1 - comm.rank();
        comm.shift(&zeros(3), other, &zeros(3), other).unwrap();
        comm.shift(&zeros(0), other, &zeros(0), other).unwrap();
        comm.shift(&zeros(4), other, &zeros(5), other).unwrap_err()
    });
    for part in ["shift #2", "expects 20 bytes", "sends 16"] {
        assert!(errors.iter().all(|error| error.to_string().contains(part)), "{errors:?}");
    }
    let errors = run_ranks(2, PATIENCE, |comm| match comm.rank() {
        0 => comm.shift(&zeros(3), 1, &zeros(3), 1).unwrap_err(),
        _ => comm.recv(&zeros(3), 0).unwrap_err(),
    });
    assert!(errors.iter().all(|error| error.to_string().contains("ranks disagree")), "{errors:?}");
}

#[test]
fn splits_must_have_the_same_names() {
    let errors = run_ranks(2, PATIENCE, |comm| {
        let name = if comm.rank() == 0 { "tp" } else { "dp" };
        comm.split_many(&[(name, Some(0), 0)]).err().unwrap()
    });
    assert!(errors.iter().all(|error| matches!(error.kind, CommErrorKind::Mismatch(_))), "{errors:?}");
}
