//! Checks of a communicator on the device it runs on, for `tangelo-worker gpu-check` and for machines with real
//! networks: every call against sums made on the CPU.

use super::{CommError, CommOptions, Communicator, Store, StoreOptions, local, nccl};
use std::time::{Duration, Instant};
use tangelo_core::hash::normal;
use tch::{Device, Kind, Tensor};

/// One check that was made.
#[derive(Clone, Debug)]
pub struct CheckResult {
    /// What was checked.
    pub name: String,
    /// What was found: a measurement or a reason to skip, or what is wrong.
    pub outcome: Result<String, String>,
}

/// What rank `rank` puts in: a fixed pattern with magnitudes from 0.1 to 10^4, in fp32.
fn pattern(rank: usize, count: usize) -> Tensor {
    let values: Vec<f32> =
        (0..count as u64).map(|i| (normal(rank as u64, i) * 10f64.powi((i % 6) as i32 - 1)) as f32).collect();
    Tensor::from_slice(&values)
}

fn expect(what: &str, found: &Tensor, wanted: &Tensor) -> Result<(), String> {
    let found = found.to_device(Device::Cpu).view(-1);
    // Sums in one order have one result: nothing to tolerate.
    if found == wanted.to_kind(found.kind()).view(-1) { Ok(()) } else { Err(format!("{what}: wrong values")) }
}

/// Runs every call on the communicator's device and compares with sums in rank order made on the CPU, bit for bit.
/// All ranks must call it.
pub fn check_calls(comm: &Communicator) -> Result<(), String> {
    for count in [3, 1000, 300_001] {
        check_reductions(comm, count)?;
        check_moves(comm, count)?;
    }
    let text = |error: CommError| error.to_string();
    let greetings = comm.all_gather_bytes(format!("rank {}", comm.rank()).as_bytes()).map_err(text)?;
    if greetings.iter().enumerate().any(|(rank, bytes)| *bytes != format!("rank {rank}").into_bytes()) {
        return Err("all_gather_bytes: wrong bytes".into());
    }
    let half = comm.split("half", Some((comm.rank() % 2) as u32), 0).map_err(text)?;
    half.map_or(Ok(()), |half| half.barrier()).and_then(|()| comm.barrier()).map_err(text)
}

/// Uneven parts that add up to `count`, some of them empty where there are several ranks.
fn uneven(count: usize, size: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = (0..size).map(|rank| if rank % 2 == 1 { 0 } else { count / (rank + 2) / 2 }).collect();
    counts[size - 1] += count - counts.iter().sum::<usize>();
    counts
}

fn check_reductions(comm: &Communicator, count: usize) -> Result<(), String> {
    let text = |error: CommError| error.to_string();
    for kind in [Kind::Float, Kind::BFloat16] {
        let inputs: Vec<Tensor> = (0..comm.size()).map(|rank| pattern(rank, count).to_kind(kind)).collect();
        let mut sum = inputs[0].to_kind(Kind::Float).copy();
        for input in &inputs[1..] {
            sum += input.to_kind(Kind::Float);
        }
        let mine = inputs[comm.rank()].to_device(comm.device());
        let reduced = mine.copy();
        comm.all_reduce(&reduced).map_err(text)?;
        expect(&format!("all_reduce of {count} {kind:?}"), &reduced, &sum)?;

        let counts = uneven(count, comm.size());
        let at: usize = counts[..comm.rank()].iter().sum();
        let own = Tensor::zeros([counts[comm.rank()] as i64], (kind, comm.device()));
        comm.reduce_scatter(&own, &mine, &counts).map_err(text)?;
        let wanted = sum.narrow(0, at as i64, own.numel() as i64);
        expect(&format!("reduce_scatter of {count} {kind:?}"), &own, &wanted)?;
        let all = Tensor::zeros([count as i64], (kind, comm.device()));
        comm.all_gather_into(&all, &own, &counts).map_err(text)?;
        expect(&format!("all_gather_into of {count} {kind:?}"), &all, &sum)?;
    }
    Ok(())
}

fn check_moves(comm: &Communicator, count: usize) -> Result<(), String> {
    let text = |error: CommError| error.to_string();
    let mine = || pattern(comm.rank(), count).to_device(comm.device());
    let gathered = comm.all_gather(&mine()).map_err(text)?;
    let wanted = Tensor::cat(&(0..comm.size()).map(|rank| pattern(rank, count)).collect::<Vec<_>>(), 0);
    expect(&format!("all_gather of {count}"), &gathered, &wanted)?;
    let root = comm.size() - 1;
    let shared = mine();
    comm.broadcast(&shared, root).map_err(text)?;
    expect(&format!("broadcast of {count}"), &shared, &pattern(root, count))?;
    if comm.size() == 1 {
        return Ok(());
    }
    let (next, before) = ((comm.rank() + 1) % comm.size(), (comm.rank() + comm.size() - 1) % comm.size());
    let received = mine().zeros_like();
    // Somebody must receive first.
    if comm.rank() == 0 {
        comm.recv(&received, before).and_then(|()| comm.send(&mine(), next)).map_err(text)?;
    } else {
        comm.send(&mine(), next).and_then(|()| comm.recv(&received, before)).map_err(text)?;
    }
    expect(&format!("send and recv of {count}"), &received, &pattern(before, count))?;
    let received = mine().zeros_like();
    comm.shift(&mine(), next, &received, before).map_err(text)?;
    expect(&format!("shift of {count}"), &received, &pattern(before, count))
}

/// Median seconds of an all-reduce of fp32 values. All ranks must call it.
pub fn all_reduce_seconds(comm: &Communicator, count: usize, repeats: usize) -> Result<f64, CommError> {
    let tensor = Tensor::zeros([count as i64], (Kind::Float, comm.device()));
    let mut seconds = Vec::with_capacity(repeats);
    for _ in 0..repeats.max(1) {
        comm.barrier()?;
        let begin = Instant::now();
        comm.all_reduce(&tensor)?;
        if let Device::Cuda(index) = comm.device() {
            tch::Cuda::synchronize(index as i64);
        }
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Checks the calls and says how long an all-reduce takes. All ranks must call it.
pub fn check_and_measure(comm: &Communicator) -> Result<String, String> {
    check_calls(comm)?;
    let seconds = |count, repeats| all_reduce_seconds(comm, count, repeats).map_err(|error| error.to_string());
    let (small, large) = (seconds(16, 21)?, seconds(16 << 20, 5)?);
    Ok(format!(
        "{} ranks, right to the bit; all-reduce of 64 B {:.3} ms, of 64 MiB {:.2} ms",
        comm.size(),
        small * 1e3,
        large * 1e3
    ))
}

/// One rank of an NCCL check, for a process of its own (two processes on one GPU need different `NCCL_HOSTID`s).
/// The store listens at 127.0.0.1; rank 0 serves it.
pub fn nccl_rank(rank: usize, size: usize, device_index: usize, port: u16) -> Result<String, String> {
    let timeout = Duration::from_secs(60);
    let options = StoreOptions { host: "127.0.0.1".into(), port, serve: rank == 0, timeout };
    let store = Store::open(&options).map_err(|error| error.to_string())?;
    nccl_check(&store, rank, size, device_index, timeout)
}

fn nccl_check(store: &Store, rank: usize, size: usize, index: usize, timeout: Duration) -> Result<String, String> {
    let options =
        nccl::NcclOptions { rank, size, device_index: index, prefix: "check".into(), init_timeout: timeout, timeout };
    let comm = nccl::connect(store, &options).map_err(|error| error.to_string())?;
    check_and_measure(&comm)
}

/// Every check that this machine's GPUs allow in one process: NCCL's version, four ranks sharing the first GPU, and
/// NCCL between all GPUs where there are several.
pub fn gpu_checks() -> Vec<CheckResult> {
    let check = |name: &str, outcome| CheckResult { name: name.to_owned(), outcome };
    let num_devices = match crate::device::open_cuda() {
        Ok(num_devices) => num_devices,
        Err(error) => return vec![check("GPUs", Err(error.to_string()))],
    };
    vec![
        check("NCCL version", nccl::version().map(|version| version.to_string())),
        check("four ranks as threads on one GPU", four_on_one_gpu()),
        check("NCCL between GPUs", nccl_between(num_devices)),
    ]
}

/// Runs one thread per rank; the first error wins.
fn on_threads(ranks: Vec<impl FnOnce() -> Result<String, String> + Send>) -> Result<String, String> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(rank)).collect();
        let answers: Vec<Result<String, String>> =
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a rank panicked".into()))).collect();
        answers.into_iter().reduce(Result::and).unwrap_or_else(|| Err("no ranks".into()))
    })
}

fn four_on_one_gpu() -> Result<String, String> {
    let options = CommOptions { device: Device::Cuda(0), ..CommOptions::default() };
    let rank = |comm: Communicator| move || check_and_measure(&comm);
    on_threads(local::group(4, &options).into_iter().map(rank).collect())
}

fn nccl_between(num_devices: usize) -> Result<String, String> {
    if num_devices < 2 {
        return Ok("skipped: one GPU only".into());
    }
    let timeout = Duration::from_secs(60);
    let options = StoreOptions { host: "127.0.0.1".into(), port: 0, serve: true, timeout };
    let store = Store::open(&options).map_err(|error| error.to_string())?;
    let rank = |rank| {
        let store = store.clone();
        move || nccl_check(&store, rank, num_devices, rank, timeout)
    };
    on_threads((0..num_devices).map(rank).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checks_pass_where_the_calls_are_right() {
        for size in [1, 3] {
            let rank = |comm: Communicator| move || check_calls(&comm).map(|()| String::new());
            on_threads(local::group(size, &CommOptions::default()).into_iter().map(rank).collect()).unwrap();
        }
    }

    #[test]
    fn a_wrong_value_is_found() {
        let (found, wanted) = (Tensor::from_slice(&[1f32, 2.0]), Tensor::from_slice(&[1f32, 2.5]));
        assert!(expect("sum", &found, &wanted).unwrap_err().contains("sum"));
        assert!(expect("sum", &wanted, &wanted).is_ok());
    }

    #[test]
    fn without_a_gpu_the_reason_is_said() {
        let results = gpu_checks();
        if !crate::device::driver_present() {
            assert!(results[0].outcome.as_ref().unwrap_err().contains("no CUDA driver"));
        }
    }
}
