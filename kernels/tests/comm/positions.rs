//! Files that say where ranks are: who is behind is found in them while ranks hang, and after one was killed.

use super::gloo::Ranks;
use super::local::run_ranks;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::time::{Duration, Instant};
use tangelo_core::position::{Behind, Position, Report, State, behind, decode_all};
use tangelo_kernels::comm::{Background, Communicator};
use tch::{Device, Kind, Tensor};

const PATIENCE: Duration = Duration::from_secs(60);

fn zeros(count: i64) -> Tensor {
    Tensor::zeros([count], (Kind::Float, Device::Cpu))
}

fn read(folder: &Path, rank: usize) -> Vec<Position<'static>> {
    decode_all(&std::fs::read(folder.join(format!("position-{rank}"))).unwrap_or_default())
}

fn who_is_behind(folder: &Path, size: usize, stopped: Option<usize>) -> Option<Behind> {
    let report = |rank| Report { rank, positions: read(folder, rank), moment: None, is_running: stopped != Some(rank) };
    behind(&(0..size).map(report).collect::<Vec<_>>())
}

/// The scenario of one process: pairs of ranks in rows and columns, as in a mesh of 2 x 2.
pub fn work_in_a_mesh(comm: &Communicator, folder: &Path) -> String {
    comm.record_positions(&folder.join(format!("position-{}", comm.rank()))).unwrap();
    let rank = comm.rank() as u32;
    let mut groups = comm.split_many(&[("row", Some(rank / 2), 0), ("column", Some(rank % 2), 0)]).unwrap();
    let (column, row) = (groups.pop().flatten().unwrap(), groups.pop().flatten().unwrap());
    let column = Background::new(column);
    for _ in 0..1_000_000 {
        let result = row
            .all_reduce(&zeros(100))
            .and_then(|()| column.start_all_reduce(zeros(20_000)).wait())
            .and_then(|_| comm.shift(&zeros(3), (comm.rank() + 1) % 4, &zeros(3), (comm.rank() + 3) % 4));
        if let Err(error) = result {
            return error.to_string();
        }
    }
    panic!("nothing failed");
}

/// Waits until `is_so`.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_stopped_or_killed_rank_is_behind() {
    for victim_signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        let ranks = Ranks::start("mesh", 4, PATIENCE, false);
        let folder = ranks.folder.path();
        let num_calls = |rank| read(folder, rank).iter().map(|position| position.call).max().unwrap_or(0);
        until("the ranks work", || (0..4).all(|rank| num_calls(rank) > 200));
        kill(Pid::from_raw(ranks.children[2].id() as i32), victim_signal).unwrap();
        let mut found = None;
        // The files are read one after the other while ranks may still be moving: what does not change is true.
        until("somebody is behind", || {
            let before = std::mem::replace(&mut found, who_is_behind(folder, 4, Some(2)));
            std::thread::sleep(Duration::from_millis(300));
            found.is_some() && found == before
        });
        let found = found.unwrap();
        println!("{victim_signal}: {found}");
        assert_eq!(found.rank, 2, "{found}");
        let text = found.to_string();
        assert!(text.contains("rank 2 is behind") && text.contains("positions.rs:"), "{text}");
        assert!(["all_reduce", "shift"].contains(&&*found.awaited_in.operation), "{text}");
    }
}

/// A rank that works beside a call is told from one that stands still for it.
#[test]
fn a_wait_for_the_background_shows() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run_ranks(2, PATIENCE, |comm| {
        comm.record_positions(&folder.join(format!("position-{}", comm.rank()))).unwrap();
        let background = Background::new(comm.split("side", Some(0), 0).unwrap().unwrap());
        let side =
            || read(folder, comm.rank()).into_iter().find(|position| position.group_name == "world/side").unwrap();
        assert_eq!(side().state, State::Opened);
        if comm.rank() == 1 {
            comm.barrier().unwrap();
            let late = || {
                let found = who_is_behind(folder, 2, None);
                found.is_some_and(|found| {
                    found.to_string().contains("rank 1 is behind: rank 0 waits for it in all_reduce #0")
                })
            };
            until("rank 0 stands still", late);
            background.start_all_reduce(zeros(5)).wait().unwrap();
        } else {
            let pending = background.start_all_reduce(zeros(5));
            until("the call is under way", || side().state == State::Inside);
            // Rank 1 may be waiting for this one already.
            assert!(!side().is_awaited && who_is_behind(folder, 2, None).is_none_or(|found| found.rank == 0));
            let before = comm.stats();
            std::thread::sleep(Duration::from_millis(60));
            comm.barrier().unwrap();
            let stood_still = pending.wait().unwrap();
            let after = comm.stats();
            // Only the barrier and the end of the call held this rank up, not the 60 ms; waking up again may take some of them.
            let (under_way, exposed) = (after.seconds - before.seconds, after.exposed_seconds - before.exposed_seconds);
            assert!(stood_still > Duration::ZERO && under_way >= exposed + 0.03, "{under_way} s, exposed {exposed} s");
        }
        until("the call is over", || side().state == State::Done);
        comm.barrier().unwrap();
    });
}

/// Calls of a group of one cost nothing but their records.
#[test]
fn a_record_costs_little() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, recorded) = (Communicator::single(), Communicator::single());
    recorded.record_positions(&folder.path().join("position-0")).unwrap();
    let (count, tensor) = (20_000, zeros(1));
    let microseconds = |comm: &Communicator| {
        let begin = Instant::now();
        (0..count).for_each(|_| comm.all_reduce(&tensor).unwrap());
        begin.elapsed().as_secs_f64() * 1e6 / f64::from(count)
    };
    let median = |comm: &Communicator| {
        let mut rounds: Vec<f64> = (0..5).map(|_| microseconds(comm)).collect();
        rounds.sort_by(f64::total_cmp);
        rounds[2]
    };
    let (without, with) = (median(&plain), median(&recorded));
    println!("a call of a group of one: {without:.2} us, with its two records {with:.2} us");
    // Judged loosely: the machine is shared.
    assert!(with - without < 100.0, "{with} us against {without} us");
    let last = &read(folder.path(), 0)[0];
    assert_eq!((last.call, last.sequence, last.state), (2 * 5 * 20_000, 5 * 20_000 - 1, State::Done));
}

#[test]
fn a_file_that_cannot_be_made_is_an_error_and_a_full_one_is_not() {
    let comm = Communicator::single();
    assert!(comm.record_positions(Path::new("/no-such-folder/position")).is_err());
    // Every write to it fails.
    comm.record_positions(Path::new("/dev/full")).unwrap();
    comm.barrier().unwrap();
}
