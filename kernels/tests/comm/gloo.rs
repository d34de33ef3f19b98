//! Ranks as processes: this test binary starts itself again for every rank.

use super::local::run_ranks;
use super::suite;
use super::{faults, positions};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use tangelo_kernels::comm::{Background, CommError, Communicator, Store, StoreOptions, gloo};
use tch::{Device, Kind, Tensor};

const SCENARIO: &str = "TANGELO_TEST_SCENARIO";
const RANK: &str = "TANGELO_TEST_RANK";
const SIZE: &str = "TANGELO_TEST_SIZE";
const PORT: &str = "TANGELO_TEST_PORT";
const HOST_STORE: &str = "TANGELO_TEST_HOST_STORE";
const FOLDER: &str = "TANGELO_TEST_FOLDER";
const TIMEOUT_MS: &str = "TANGELO_TEST_TIMEOUT_MS";

/// Ranks under way. They are killed when this is dropped, so a failing test leaves none behind.
pub struct Ranks {
    pub children: Vec<Child>,
    pub folder: tempfile::TempDir,
    /// Serves the ranks, as torchrun's agent would, or is a client of rank 0's.
    pub store: Store,
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            _ = child.kill();
            _ = child.wait();
        }
    }
}

impl Ranks {
    pub fn start(scenario: &str, size: usize, timeout: Duration, host_store: bool) -> Ranks {
        let options = StoreOptions { host: "127.0.0.1".into(), port: 0, serve: true, timeout: Duration::from_secs(30) };
        let store = Store::open(&options).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let port = if host_store { free_port() } else { store.port() };
        let start = |rank: usize| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "gloo::rank_process", "--nocapture", "--test-threads=1"])
                .env(SCENARIO, scenario)
                .env(RANK, rank.to_string())
                .env(SIZE, size.to_string())
                .env(PORT, port.to_string())
                .env(HOST_STORE, host_store.to_string())
                .env(FOLDER, folder.path())
                .env(TIMEOUT_MS, timeout.as_millis().to_string())
                .spawn()
                .unwrap()
        };
        let children = (0..size).map(start).collect();
        let store = match host_store {
            true => Store::open(&StoreOptions { port, serve: false, ..options }).unwrap(),
            false => store,
        };
        Ranks { children, folder, store }
    }

    /// Waits for a rank to end well.
    pub fn join(&mut self, rank: usize, patience: Duration) {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.children[rank].try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < patience, "rank {rank} still runs after {patience:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "rank {rank}: {status}");
    }

    /// What a rank left behind.
    pub fn answer(&self, rank: usize) -> Vec<u8> {
        std::fs::read(self.folder.path().join(format!("rank-{rank}"))).unwrap()
    }

    pub fn text(&self, rank: usize) -> String {
        String::from_utf8(self.answer(rank)).unwrap()
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One rank of a scenario; does nothing when run as a test like the others.
#[test]
fn rank_process() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    let variable = |name: &str| std::env::var(name).unwrap();
    let rank: usize = variable(RANK).parse().unwrap();
    tch::set_num_threads(1);
    let options = gloo::GlooOptions {
        rank,
        size: variable(SIZE).parse().unwrap(),
        master_addr: "127.0.0.1".into(),
        master_port: variable(PORT).parse().unwrap(),
        host_store: rank == 0 && variable(HOST_STORE) == "true",
        prefix: "test/0".into(),
        init_timeout: Duration::from_secs(60),
        timeout: Duration::from_millis(variable(TIMEOUT_MS).parse().unwrap()),
        interface: None,
    };
    let comm = gloo::connect(&options).unwrap();
    let answer = run_scenario(&scenario, comm, &options);
    let path = Path::new(&variable(FOLDER)).join(format!("rank-{rank}"));
    std::fs::write(path, answer).unwrap();
}

fn run_scenario(scenario: &str, comm: Communicator, options: &gloo::GlooOptions) -> Vec<u8> {
    match scenario.split_once(':').unwrap_or((scenario, "")) {
        ("suite", seed) => suite::run(&comm, seed.parse().unwrap()).0,
        ("work", _) => work_until_it_fails(&comm, options).to_string().into_bytes(),
        ("mismatch", _) => mismatch(&comm).to_string().into_bytes(),
        ("abort", _) => abort(comm).into_bytes(),
        ("stream", _) => stream_until_it_fails(&comm, options).to_string().into_bytes(),
        ("latency", _) => latency(&comm).into_bytes(),
        ("mesh", _) => positions::work_in_a_mesh(&comm, Path::new(&std::env::var(FOLDER).unwrap())).into_bytes(),
        ("beside", _) => faults::work_beside_a_call(&comm, options).into_bytes(),
        _ => panic!("no scenario {scenario}"),
    }
}

fn zeros(count: i64) -> Tensor {
    Tensor::zeros([count], (Kind::Float, Device::Cpu))
}

/// Reduces in turns small and large, and tells the test when it is under way.
fn work_until_it_fails(comm: &Communicator, options: &gloo::GlooOptions) -> CommError {
    let store = store_of(options);
    for step in 0..1_000_000 {
        let result = comm.all_reduce(&zeros(if step % 2 == 0 { 100 } else { 200_000 }));
        if let Err(error) = result {
            return error;
        }
        if step == 5 {
            store.add("working", 1).unwrap();
        }
    }
    panic!("nothing failed");
}

/// Rank 1 sends 64 MiB after 64 MiB to rank 0.
fn stream_until_it_fails(comm: &Communicator, options: &gloo::GlooOptions) -> CommError {
    let tensor = zeros(16 << 20);
    for step in 0..1_000_000 {
        if let Err(error) = if comm.rank() == 1 { comm.send(&tensor, 0) } else { comm.recv(&tensor, 1) } {
            return error;
        }
        if step == 2 {
            store_of(options).add("working", 1).unwrap();
        }
    }
    panic!("nothing failed");
}

fn store_of(options: &gloo::GlooOptions) -> Store {
    let timeout = Duration::from_secs(20);
    let (host, port) = (options.master_addr.clone(), options.master_port);
    Store::open(&StoreOptions { host, port, serve: false, timeout }).unwrap()
}

fn mismatch(comm: &Communicator) -> CommError {
    comm.barrier().unwrap();
    // 40 KB against 80 KB: the longer one must not be written into the shorter one's tensor.
    let count = if comm.rank() == 1 { 20_000 } else { 10_000 };
    comm.broadcast(&zeros(count), 0).and_then(|()| comm.barrier()).unwrap_err()
}

fn abort(comm: Communicator) -> String {
    if comm.rank() == 0 {
        return comm.recv(&zeros(1), 1).unwrap_err().to_string();
    }
    let handle = comm.abort_handle();
    let aborter = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        handle.abort("the user asked");
    });
    let error = comm.recv(&zeros(1), 0).unwrap_err();
    aborter.join().unwrap();
    error.to_string()
}

/// Medians of an all-reduce, for docs/LOG.md; the test that runs this prints them and judges nothing.
fn latency(comm: &Communicator) -> String {
    let median = |count: i64, repeats: usize| {
        let tensor = zeros(count);
        let mut seconds: Vec<f64> = (0..repeats)
            .map(|_| {
                comm.barrier().unwrap();
                let begin = Instant::now();
                comm.all_reduce(&tensor).unwrap();
                begin.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        seconds[repeats / 2] * 1e3
    };
    let small = median(16, 51);
    let medium = median(100_000, 21);
    let large = median(16 << 20, 5);
    let background = Background::new(comm.split("background", Some(0), 0).unwrap().unwrap());
    let tensor = zeros(16);
    let seconds = (0..51).map(|_| {
        comm.barrier().unwrap();
        let begin = Instant::now();
        background.start_all_reduce(tensor.shallow_clone()).wait().unwrap();
        begin.elapsed().as_secs_f64()
    });
    let mut seconds: Vec<f64> = seconds.collect();
    seconds.sort_by(f64::total_cmp);
    let beside = seconds[25] * 1e3;
    format!(
        "{} ranks: 64 B {small:.3} ms, in the background {beside:.3} ms, 400 KB {medium:.2} ms, 64 MiB {large:.0} ms",
        comm.size()
    )
}

#[test]
fn every_call_gives_the_same_bits_as_between_threads() {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    for size in 2..=4 {
        let patience = Duration::from_secs(60);
        // Rank 0 serves the store itself in one of the three runs.
        let mut ranks = Ranks::start(&format!("suite:{seed}"), size, patience, size == 3);
        let between_threads = run_ranks(size, patience, |comm| suite::run(&comm, seed).0);
        for (rank, want) in between_threads.iter().enumerate() {
            ranks.join(rank, patience);
            assert!(ranks.answer(rank) == *want, "rank {rank} of {size} got other bits than a thread");
        }
    }
}

#[test]
fn latency_is_measured() {
    let patience = Duration::from_secs(60);
    let mut ranks = Ranks::start("latency", 2, patience, false);
    (0..2).for_each(|rank| ranks.join(rank, patience));
    println!("gloo, {}", ranks.text(0));
    let local = run_ranks(2, patience, |comm| latency(&comm));
    println!("local, {}", local[0]);
}
