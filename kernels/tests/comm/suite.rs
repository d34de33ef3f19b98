//! What every back end must do, run by every rank; the bytes of all results come back, to compare back ends.

use super::background;
use half::bf16;
use std::ops::Range;
use tangelo_core::hash::{mix64, normal};
use tangelo_kernels::comm::{CommErrorKind, Communicator, ReduceOp};
use tch::{Device, Kind, Tensor};

/// Sizes below and above what travels with a header (4 KiB) and what an all-reduce sends whole (16 KiB). What a
/// reduction moves in several rounds (4 MiB per rank) has a check of its own.
const SIZES: [usize; 6] = [0, 1, 3, 1000, 5001, 40_003];

/// Results, in order, as bytes.
#[derive(Default)]
pub struct Results(pub Vec<u8>);

impl Results {
    pub fn keep(&mut self, tensor: &Tensor) {
        let tensor = tensor.contiguous();
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        self.0.extend(bytes);
    }
}

/// What rank `rank` puts into case `case`: every rank can work out what all others put in.
pub fn values(seed: u64, case: u64, rank: usize, count: usize) -> Vec<f32> {
    let seed = mix64(mix64(seed ^ case) ^ rank as u64);
    // Magnitudes from 1e-3 to 1e3, so that the order of a sum shows in its bits.
    (0..count as u64).map(|i| (normal(seed, i) * 10f64.powi((mix64(seed ^ i) % 7) as i32 - 3)) as f32).collect()
}

pub fn counts(seed: u64, case: u64, size: usize, limit: u64) -> Vec<usize> {
    // A third of the parts is empty.
    (0..size as u64)
        .map(|i| mix64(seed ^ mix64(case * 1000 + i)))
        .map(|random| if random % 3 == 0 { 0 } else { (random / 3 % limit) as usize })
        .collect()
}

pub fn part(counts: &[usize], rank: usize) -> Range<usize> {
    let at: usize = counts[..rank].iter().sum();
    at..at + counts[rank]
}

pub fn bits(tensor: &Tensor) -> Vec<u32> {
    Vec::<f32>::try_from(tensor.to_kind(Kind::Float).view(-1)).unwrap().into_iter().map(f32::to_bits).collect()
}

pub fn as_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Sums in rank order, in fp32, rounded once if asked.
pub fn plain_sum(inputs: &[Vec<f32>], round: bool) -> Vec<f32> {
    let mut sum = inputs[0].clone();
    for input in &inputs[1..] {
        sum.iter_mut().zip(input).for_each(|(sum, value)| *sum += value);
    }
    if round { sum.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect() } else { sum }
}

fn rounded(values: Vec<f32>) -> Vec<f32> {
    values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect()
}

/// Runs every check; panics where a result is wrong.
pub fn run(comm: &Communicator, seed: u64) -> Results {
    let mut results = Results::default();
    all_reduce(comm, seed, &mut results);
    buckets_do_not_matter(comm, seed, &mut results);
    several_rounds(comm, seed, &mut results);
    all_gather(comm, seed, &mut results);
    reduce_scatter(comm, seed, &mut results);
    all_to_all(comm, seed, &mut results);
    broadcast(comm, seed, &mut results);
    point_to_point(comm, seed, &mut results);
    bytes_and_barrier(comm);
    groups(comm, seed, &mut results);
    invalid_arguments(comm);
    statistics(comm);
    background::run(comm, seed, &mut results);
    results
}

fn all_reduce(comm: &Communicator, seed: u64, results: &mut Results) {
    for (case, size) in SIZES.into_iter().enumerate() {
        let inputs: Vec<Vec<f32>> = (0..comm.size()).map(|rank| values(seed, case as u64, rank, size)).collect();
        let tensor = Tensor::from_slice(&inputs[comm.rank()]);
        comm.all_reduce(&tensor).unwrap();
        assert_eq!(bits(&tensor), as_bits(&plain_sum(&inputs, false)), "all_reduce of {size}");
        results.keep(&tensor);

        let inputs: Vec<Vec<f32>> = inputs.into_iter().map(rounded).collect();
        let tensor = Tensor::from_slice(&inputs[comm.rank()]).to_kind(Kind::BFloat16);
        comm.all_reduce(&tensor).unwrap();
        assert_eq!(bits(&tensor), as_bits(&plain_sum(&inputs, true)), "all_reduce of {size} in bf16");
        results.keep(&tensor);
    }
    let counter = Tensor::from_slice(&[comm.rank() as i64 + 1, (1 << 60) + comm.rank() as i64]);
    comm.all_reduce(&counter).unwrap();
    let (n, ranks) = (comm.size() as i64, (0..comm.size() as i64).sum::<i64>());
    assert_eq!(Vec::<i64>::try_from(counter).unwrap(), [n + ranks, (n << 60).wrapping_add(ranks)]);
    let extreme = Tensor::from_slice(&[comm.rank() as f32, -(comm.rank() as f32)]);
    comm.all_reduce_with(&extreme, ReduceOp::Max).unwrap();
    assert_eq!(Vec::<f32>::try_from(extreme).unwrap(), [(n - 1) as f32, 0.0]);
    let not_a_number = Tensor::from_slice(&[if comm.rank() == 0 { f32::NAN } else { 1.0 }]);
    comm.all_reduce_with(&not_a_number, ReduceOp::Max).unwrap();
    assert!(not_a_number.double_value(&[0]).is_nan());
}

/// One tensor whole, cut at random places, and scattered unevenly: the same bits.
fn buckets_do_not_matter(comm: &Communicator, seed: u64, results: &mut Results) {
    let size = 20_000;
    let input = Tensor::from_slice(&values(seed, 100, comm.rank(), size));
    let whole = input.copy();
    comm.all_reduce(&whole).unwrap();
    let pieces = input.copy();
    let mut at = 0;
    for cut in (0..6).map(|i| mix64(seed ^ (200 + i)) as usize % 3000).chain([size]) {
        let length = cut.min(size - at);
        comm.all_reduce(&pieces.narrow(0, at as i64, length as i64)).unwrap();
        at += length;
    }
    assert_eq!(bits(&whole), bits(&pieces));
    let mut shares = counts(seed, 300, comm.size(), 4000);
    shares[comm.size() - 1] += size - shares.iter().sum::<usize>();
    let own = part(&shares, comm.rank());
    let scattered = Tensor::zeros([own.len() as i64], (Kind::Float, Device::Cpu));
    comm.reduce_scatter(&scattered, &input, &shares).unwrap();
    assert_eq!(bits(&scattered), bits(&whole.narrow(0, own.start as i64, own.len() as i64)));
    results.keep(&whole);
}

/// Parts of none, one and several rounds.
fn several_rounds(comm: &Communicator, seed: u64, results: &mut Results) {
    let round = 1 << 20;
    let counts: Vec<usize> = (0..comm.size()).map(|rank| [2 * round + 17, 0, 5, round][rank % 4]).collect();
    let (own, total) = (part(&counts, comm.rank()), counts.iter().sum::<usize>());
    // Long, so made by shifting one short run of values.
    let base: Vec<Vec<f32>> = (0..comm.size()).map(|rank| values(seed, 350, rank, 1009)).collect();
    let inputs: Vec<Vec<f32>> = base.iter().map(|base| (0..total).map(|i| base[i % base.len()]).collect()).collect();
    let output = Tensor::zeros([own.len() as i64], (Kind::Float, Device::Cpu));
    comm.reduce_scatter(&output, &Tensor::from_slice(&inputs[comm.rank()]), &counts).unwrap();
    let mine: Vec<Vec<f32>> = inputs.iter().map(|input| input[own.clone()].to_vec()).collect();
    assert!(bits(&output) == as_bits(&plain_sum(&mine, false)), "reduce_scatter of {counts:?}");
    results.keep(&output);
}

fn all_gather(comm: &Communicator, seed: u64, results: &mut Results) {
    let input = Tensor::from_slice(&values(seed, 400, comm.rank(), 12)).view([4, 3]);
    let output = comm.all_gather(&input).unwrap();
    assert_eq!(output.size(), [4 * comm.size() as i64, 3]);
    let want: Vec<f32> = (0..comm.size()).flat_map(|rank| values(seed, 400, rank, 12)).collect();
    assert_eq!(bits(&output), as_bits(&want));
    assert_eq!(comm.all_gather(&Tensor::from(7i64)).unwrap().size(), [comm.size() as i64]);
    for (case, limit) in [(401, 50), (402, 9000)] {
        let counts = counts(seed, case, comm.size(), limit);
        let want: Vec<f32> = (0..comm.size()).flat_map(|rank| values(seed, case, rank, counts[rank])).collect();
        let output = Tensor::zeros([want.len() as i64], (Kind::Float, Device::Cpu));
        let own = part(&counts, comm.rank());
        // The input as this rank's part of the output, in the second case.
        let input = Tensor::from_slice(&values(seed, case, comm.rank(), own.len()));
        let mut place = output.narrow(0, own.start as i64, own.len() as i64);
        if case == 402 {
            place.copy_(&input);
        }
        comm.all_gather_into(&output, if case == 402 { &place } else { &input }, &counts).unwrap();
        assert_eq!(bits(&output), as_bits(&want), "all_gather of {counts:?}");
        results.keep(&output);
    }
}

fn reduce_scatter(comm: &Communicator, seed: u64, results: &mut Results) {
    for (case, limit) in [(500, 40), (501, 9000)] {
        let counts = counts(seed, case, comm.size(), limit);
        let (own, total) = (part(&counts, comm.rank()), counts.iter().sum());
        let inputs: Vec<Vec<f32>> = (0..comm.size()).map(|rank| rounded(values(seed, case, rank, total))).collect();
        let (exact, once) = (plain_sum(&inputs, false), plain_sum(&inputs, true));
        let input = Tensor::from_slice(&inputs[comm.rank()]);
        // In place: the output is this rank's part of the input.
        let place = input.narrow(0, own.start as i64, own.len() as i64);
        let halved = input.to_kind(Kind::BFloat16);
        comm.reduce_scatter(&place, &input, &counts).unwrap();
        assert_eq!(bits(&place), as_bits(&exact[own.clone()]), "reduce_scatter of {counts:?}");
        for (kind, want) in [(Kind::BFloat16, &once), (Kind::Float, &exact)] {
            let output = Tensor::zeros([own.len() as i64], (kind, Device::Cpu));
            comm.reduce_scatter(&output, &halved, &counts).unwrap();
            assert_eq!(bits(&output), as_bits(&want[own.clone()]), "reduce_scatter of bf16 into {kind:?}");
            results.keep(&output);
        }
    }
}

fn all_to_all(comm: &Communicator, seed: u64, results: &mut Results) {
    for (case, limit) in [(600, 20), (601, 3000)] {
        // Row: what each rank sends to all others.
        let table: Vec<Vec<usize>> =
            (0..comm.size()).map(|rank| counts(seed, case * 10 + rank as u64, comm.size(), limit)).collect();
        let sent = |rank: usize| values(seed, case, rank, table[rank].iter().sum());
        let received: Vec<usize> = table.iter().map(|row| row[comm.rank()]).collect();
        let want: Vec<f32> =
            (0..comm.size()).flat_map(|rank| sent(rank)[part(&table[rank], comm.rank())].to_vec()).collect();
        let output = Tensor::zeros([want.len() as i64], (Kind::Float, Device::Cpu));
        let input = Tensor::from_slice(&sent(comm.rank()));
        comm.all_to_all_single(&output, &input, &received, &table[comm.rank()]).unwrap();
        assert_eq!(bits(&output), as_bits(&want));
        results.keep(&output);
    }
}

fn broadcast(comm: &Communicator, seed: u64, results: &mut Results) {
    for root in 0..comm.size() {
        for size in SIZES {
            let tensor = Tensor::from_slice(&values(seed, 700, comm.rank(), size));
            comm.broadcast(&tensor, root).unwrap();
            assert_eq!(bits(&tensor), as_bits(&values(seed, 700, root, size)));
            results.keep(&tensor);
        }
    }
}

/// Around the ring: even ranks send first. One lap small, one large.
fn point_to_point(comm: &Communicator, seed: u64, results: &mut Results) {
    if comm.size() == 1 {
        return;
    }
    let (next, before) = ((comm.rank() + 1) % comm.size(), (comm.rank() + comm.size() - 1) % comm.size());
    for size in [5, 30_000] {
        let mine = Tensor::from_slice(&values(seed, 800, comm.rank(), size));
        let theirs = mine.zeros_like();
        if comm.rank().is_multiple_of(2) {
            comm.send(&mine, next).unwrap();
            comm.recv(&theirs, before).unwrap();
        } else {
            comm.recv(&theirs, before).unwrap();
            comm.send(&mine, next).unwrap();
        }
        assert_eq!(bits(&theirs), as_bits(&values(seed, 800, before, size)));
        results.keep(&theirs);
    }
}

fn bytes_and_barrier(comm: &Communicator) {
    let text = |rank: usize| "é".repeat(rank * 3).into_bytes();
    comm.barrier().unwrap();
    let all = comm.all_gather_bytes(&text(comm.rank())).unwrap();
    assert_eq!(all, (0..comm.size()).map(text).collect::<Vec<_>>());
    assert!(comm.all_gather_bytes(&[]).unwrap().iter().all(Vec::is_empty));
}

/// Groups of groups, used in turns, and some of them by some ranks only.
fn groups(comm: &Communicator, seed: u64, results: &mut Results) {
    let parity = comm.rank() % 2;
    let half = comm.split("parity", Some(parity as u32), -(comm.rank() as i64)).unwrap().unwrap();
    let members: Vec<usize> = (0..comm.size()).filter(|rank| rank % 2 == parity).rev().collect();
    assert_eq!((half.ranks(), half.ranks()[half.rank()]), (&members[..], comm.rank()));
    let last = comm.size() - 1;
    let pair = comm.group("ends", &[last, 0]).unwrap();
    assert_eq!(pair.is_some(), comm.rank() == 0 || comm.rank() == last);
    let quarter = half.split("quarter", Some((half.rank() / 2) as u32), 0).unwrap().unwrap();
    assert_eq!(quarter.name(), "world/parity/quarter");
    let check = |group: &Communicator, case: u64, results: &mut Results| {
        let inputs: Vec<Vec<f32>> = group.ranks().iter().map(|&rank| values(seed, case, rank, 6000)).collect();
        let tensor = Tensor::from_slice(&inputs[group.rank()]);
        group.all_reduce(&tensor).unwrap();
        assert_eq!(bits(&tensor), as_bits(&plain_sum(&inputs, false)), "{} {:?}", group.name(), group.ranks());
        results.keep(&tensor);
    };
    for round in 900..903 {
        check(&quarter, round, results);
        pair.iter().filter(|_| last > 0).for_each(|pair| check(pair, round, results));
        check(comm, round, results);
        check(&half, round, results);
    }
}

fn invalid_arguments(comm: &Communicator) {
    let matrix = Tensor::zeros([3, 4], (Kind::Float, Device::Cpu));
    let bytes = Tensor::zeros([12], (Kind::Uint8, Device::Cpu));
    let wrong_counts = vec![5; comm.size()];
    let errors = [
        (comm.all_reduce(&matrix.transpose(0, 1)), "not contiguous"),
        (comm.all_gather_into(&matrix, &matrix, &wrong_counts), "counts add up to"),
        (comm.all_gather_into(&matrix, &matrix, &[1, 2, 3, 4, 5, 6]), "6 counts for output"),
        (comm.reduce_scatter(&bytes, &matrix, &wrong_counts), "expected one of"),
        (comm.broadcast(&matrix, comm.size()), "of a group of"),
        (comm.send(&matrix, comm.rank()), "to itself"),
        (comm.all_reduce(&matrix.to_kind(Kind::ComplexFloat)), "not sent"),
    ];
    for (result, want) in errors {
        let error = result.unwrap_err();
        assert!(matches!(error.kind, CommErrorKind::Invalid(_)) && error.to_string().contains(want), "{error}");
        assert_eq!(error.rank, comm.rank());
        assert!(error.call_site.file().ends_with("suite.rs"));
    }
    // Nothing was sent, so the communicator goes on.
    comm.barrier().unwrap();
}

fn statistics(comm: &Communicator) {
    let before = comm.stats();
    let tensor = Tensor::zeros([10_000], (Kind::Float, Device::Cpu));
    comm.all_reduce(&tensor).unwrap();
    let after = comm.stats();
    // Every rank sends each other one its part, then its sum to all others.
    let others = comm.size() - 1;
    let own = tangelo_core::layout::part_range(10_000, 1, comm.size(), comm.rank()).len();
    let sent = if others == 0 { 0 } else { (10_000 - own + others * own) * 4 };
    assert_eq!((after.num_calls - before.num_calls, after.bytes_sent - before.bytes_sent), (1, sent as u64));
    // The rank stood still for all of it.
    let exposed = after.exposed_seconds - before.exposed_seconds;
    assert!(exposed > 0.0 && (after.seconds - before.seconds - exposed).abs() < 1e-9);
}
