//! Ranks that die, stop, disagree or are aborted: the others say so, and say who.

use super::gloo::Ranks;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::{Duration, Instant};
use tangelo_kernels::comm::{Background, Communicator, Store, StoreOptions, gloo};
use tch::{Device, Kind, Tensor};

const PATIENCE: Duration = Duration::from_secs(120);

fn start_working(size: usize, timeout: Duration, host_store: bool) -> Ranks {
    start_scenario("work", size, timeout, host_store)
}

fn start_scenario(scenario: &str, size: usize, timeout: Duration, host_store: bool) -> Ranks {
    let ranks = Ranks::start(scenario, size, timeout, host_store);
    let begin = Instant::now();
    while ranks.store.add("working", 0).unwrap() < size as i64 {
        assert!(begin.elapsed() < PATIENCE, "the ranks do not get to work");
        std::thread::sleep(Duration::from_millis(5));
    }
    ranks
}

fn signal(ranks: &Ranks, rank: usize, signal: Signal) {
    kill(Pid::from_raw(ranks.children[rank].id() as i32), signal).unwrap();
}

#[test]
fn a_sender_killed_in_the_middle_of_a_message_is_noticed_at_once() {
    // A message of 64 MiB is nearly always under way; two draws hit one.
    for delay_ms in [31, 78] {
        let mut ranks = start_scenario("stream", 2, PATIENCE, false);
        std::thread::sleep(Duration::from_millis(delay_ms));
        signal(&ranks, 1, Signal::SIGKILL);
        ranks.join(0, PATIENCE / 4);
        let text = ranks.text(0);
        assert!(text.contains("lost rank 1"), "{text}");
    }
}

#[test]
fn a_killed_rank_is_named_within_seconds() {
    for victim in [0, 2] {
        let mut ranks = start_working(3, PATIENCE, false);
        let begin = Instant::now();
        signal(&ranks, victim, Signal::SIGKILL);
        for rank in (0..3).filter(|&rank| rank != victim) {
            ranks.join(rank, PATIENCE);
            let text = ranks.text(rank);
            assert!(text.contains(&format!("lost rank {victim}")), "rank {rank}: {text}");
        }
        // A connection that closes shows at once; 2 s are spent on asking whether the lost rank left a reason, and
        // once more where one lost rank leads to another.
        assert!(begin.elapsed() < PATIENCE / 3, "{:?}", begin.elapsed());
    }
}

/// Stops one of three ranks: the others end within their deadline, and what each says `is_told`.
fn stop_a_rank(victim: usize, host_store: bool, is_told: impl Fn(&str) -> bool) {
    let timeout = Duration::from_secs(4);
    let mut ranks = start_working(3, timeout, host_store);
    let begin = Instant::now();
    signal(&ranks, victim, Signal::SIGSTOP);
    for rank in (0..3).filter(|&rank| rank != victim) {
        ranks.join(rank, PATIENCE);
        let text = ranks.text(rank);
        assert!(is_told(&text), "rank {rank}: {text}");
    }
    assert!(begin.elapsed() >= timeout && begin.elapsed() < PATIENCE / 3, "{:?}", begin.elapsed());
    signal(&ranks, victim, Signal::SIGKILL);
}

#[test]
fn a_stopped_rank_runs_the_others_into_the_deadline() {
    // Who reaches the deadline second may see the first one leave, and then repeats what that one said.
    stop_a_rank(1, false, |text| text.contains("timed out after") && text.contains("rank 1"));
}

#[test]
fn a_stopped_rank_0_that_serves_the_store_holds_nobody_up() {
    stop_a_rank(0, true, |text| text.contains("timed out after") || text.contains("lost rank"));
}

#[test]
fn a_master_without_an_address_is_named() {
    let options = gloo::GlooOptions {
        rank: 1,
        size: 2,
        // RFC 2606 keeps this name unknown.
        master_addr: "no-such-host.invalid".into(),
        master_port: 29_500,
        host_store: false,
        prefix: "test/0".into(),
        init_timeout: Duration::from_secs(1),
        timeout: PATIENCE,
        interface: None,
    };
    let error = gloo::connect(&options).err().unwrap().to_string();
    assert!(error.contains("no way to the master at no-such-host.invalid"), "{error}");
}

#[test]
fn a_mismatch_between_processes_names_both_calls() {
    let mut ranks = Ranks::start("mismatch", 2, PATIENCE, false);
    (0..2).for_each(|rank| ranks.join(rank, PATIENCE));
    let text = ranks.text(1);
    for part in [
        "ranks disagree",
        "rank 1 is in broadcast",
        "rank 0 in broadcast",
        "rank 1 expects 80000 bytes, rank 0 sends 40000",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(ranks.text(0).contains("ranks disagree"), "{}", ranks.text(0));
}

#[test]
fn an_abort_ends_a_wait_and_is_seen_by_the_peer() {
    let mut ranks = Ranks::start("abort", 2, PATIENCE, false);
    (0..2).for_each(|rank| ranks.join(rank, PATIENCE));
    assert!(ranks.text(1).contains("aborted: the user asked"), "{}", ranks.text(1));
    assert!(ranks.text(0).contains("lost rank 1: aborted: the user asked"), "{}", ranks.text(0));
}

/// Reduces in two groups at once, one of them in the background; answers with what both say.
pub fn work_beside_a_call(comm: &Communicator, options: &gloo::GlooOptions) -> String {
    let (host, port) = (options.master_addr.clone(), options.master_port);
    let store = Store::open(&StoreOptions { host, port, serve: false, timeout: PATIENCE }).unwrap();
    let zeros = |count: i64| Tensor::zeros([count], (Kind::Float, Device::Cpu));
    let background = Background::new(comm.split("side", Some(0), 0).unwrap().unwrap());
    for step in 0..1_000_000 {
        let pending = background.start_all_reduce(zeros(200_000));
        // Nobody waits for this one: dropped under way.
        drop(background.start_all_reduce(zeros(10)));
        let mine = comm.all_reduce(&zeros(300));
        let beside = pending.wait();
        if mine.is_err() || beside.is_err() {
            // Either may have got through before its connection closed, and fails now.
            let mine = mine.and_then(|()| comm.barrier()).unwrap_err();
            let beside = beside.and_then(|_| background.start_all_reduce(zeros(1)).wait()).unwrap_err();
            assert!(beside.call_site.file().ends_with("faults.rs"), "{beside}");
            return format!("{mine}\n{beside}");
        }
        if step == 5 {
            store.add("working", 1).unwrap();
        }
    }
    panic!("nothing failed");
}

#[test]
fn a_rank_killed_with_calls_in_the_background_is_named_in_all_groups() {
    let mut ranks = start_scenario("beside", 3, PATIENCE, false);
    let begin = Instant::now();
    signal(&ranks, 1, Signal::SIGKILL);
    for rank in [0, 2] {
        ranks.join(rank, PATIENCE);
        let text = ranks.text(rank);
        assert!(text.lines().count() == 2 && text.lines().all(|line| line.contains("lost rank 1")), "{rank}: {text}");
        assert!(text.contains("group world:") && text.contains("group world/side:"), "{rank}: {text}");
    }
    assert!(begin.elapsed() < PATIENCE / 3, "{:?}", begin.elapsed());
}

#[test]
fn a_rank_stopped_with_calls_in_the_background_is_named_in_all_groups() {
    let timeout = Duration::from_secs(4);
    let mut ranks = start_scenario("beside", 2, timeout, false);
    let begin = Instant::now();
    signal(&ranks, 1, Signal::SIGSTOP);
    ranks.join(0, PATIENCE);
    let text = ranks.text(0);
    // Gloo closes all connections at the first deadline: the other group must not take that for a loss.
    let is_timeout = |line: &str| line.contains("timed out after") && line.contains("waiting for rank 1");
    assert!(text.lines().count() == 2 && text.lines().all(is_timeout), "{text}");
    assert!(begin.elapsed() >= timeout && begin.elapsed() < PATIENCE / 3, "{:?}", begin.elapsed());
    signal(&ranks, 1, Signal::SIGKILL);
}
