//! Calls beside their rank's work, shifts, channels and many groups at once, on whatever back end.

use super::suite::{Results, as_bits, bits, counts, part, plain_sum, values};
use std::time::Duration;
use tangelo_kernels::comm::channel::{self, ChannelEnd, Receiver, Sender};
use tangelo_kernels::comm::{Background, Communicator, Pending};
use tangelo_kernels::device;
use tch::{Device, Kind, Tensor};

pub fn run(comm: &Communicator, seed: u64, results: &mut Results) {
    shift(comm, seed, results);
    many_groups(comm, seed, results);
    calls_in_order(comm, seed, results);
    beside_work(comm);
    what_the_thread_frees_is_not_counted_on(comm);
    pipeline(comm, results);
    invalid_arguments(comm);
}

fn zeros(count: usize) -> Tensor {
    Tensor::zeros([count as i64], (Kind::Float, Device::Cpu))
}

/// Around the ring in both directions, with sizes of which some are 0 and some travel apart from their header.
fn shift(comm: &Communicator, seed: u64, results: &mut Results) {
    let size = comm.size();
    for case in 0..6 {
        let lengths = counts(seed, 1000 + case, size, 4000);
        let step = 1 + case as usize % size.max(2);
        let (to, from) = ((comm.rank() + step) % size, (comm.rank() + step * (size - 1)) % size);
        let send = Tensor::from_slice(&values(seed, 1000 + case, comm.rank(), lengths[comm.rank()]));
        let receive = zeros(lengths[from]);
        comm.shift(&send, to, &receive, from).unwrap();
        assert_eq!(bits(&receive), as_bits(&values(seed, 1000 + case, from, lengths[from])), "shift by {step}");
        results.keep(&receive);
    }
}

/// Fifteen groups, as a hybrid job opens them, at once and one by one.
fn many_groups(comm: &Communicator, seed: u64, results: &mut Results) {
    let rank = comm.rank() as u32;
    let names: Vec<String> = (0..15).map(|index| format!("group-{index}")).collect();
    let splits: Vec<(&str, Option<u32>, i64)> = (names.iter().enumerate())
        .map(|(index, name)| {
            let color = rank / (1 + index as u32 % 3);
            let is_member = index % 5 != 4 || !comm.rank().is_multiple_of(2);
            (name.as_str(), is_member.then_some(color), if index % 2 == 0 { i64::from(rank) } else { -i64::from(rank) })
        })
        .collect();
    let before = comm.stats().num_calls;
    let at_once = comm.split_many(&splits).unwrap();
    assert_eq!(comm.stats().num_calls, before + 1);
    let one_by_one: Vec<_> = splits.iter().map(|&(name, color, key)| comm.split(name, color, key).unwrap()).collect();
    assert_eq!(at_once.len(), 15);
    // All groups are used in turns: their messages must not meet.
    for (index, (group, other)) in at_once.iter().zip(&one_by_one).enumerate() {
        assert_eq!(group.as_ref().map(Communicator::ranks), other.as_ref().map(Communicator::ranks));
        for group in group.iter().chain(other) {
            assert_eq!(group.name(), format!("{}/group-{index}", comm.name()));
            let inputs: Vec<Vec<f32>> = group.ranks().iter().map(|&r| values(seed, 1100, r, 50)).collect();
            let tensor = Tensor::from_slice(&inputs[group.rank()]);
            group.all_reduce(&tensor).unwrap();
            assert_eq!(bits(&tensor), as_bits(&plain_sum(&inputs, false)));
            results.keep(&tensor);
        }
    }
    assert!(comm.split_many(&[]).unwrap().is_empty());
}

/// A long row of different calls, all started before the first is waited for.
fn calls_in_order(comm: &Communicator, seed: u64, results: &mut Results) {
    let (rank, size) = (comm.rank(), comm.size());
    let background = Background::new(comm.split("background", Some(0), 0).unwrap().unwrap());
    assert_eq!((background.rank(), background.size(), background.ranks()), (rank, size, comm.ranks()));
    let counts = counts(seed, 1200, size, 3000);
    let total: usize = counts.iter().sum();
    let inputs: Vec<Vec<f32>> = (0..size).map(|rank| values(seed, 1200, rank, total)).collect();
    let sum = plain_sum(&inputs, false);
    let mine = Tensor::from_slice(&inputs[rank]);
    let mut outputs: Vec<(Tensor, Vec<u32>)> = Vec::new();
    let mut pending: Vec<Pending> = Vec::new();
    for round in 0..8 {
        let (whole, own, all) = (mine.copy(), zeros(counts[rank]), zeros(total));
        let (shifted, before) = (zeros(total), (rank + size - 1) % size);
        pending.push(background.start_reduce_scatter(own.shallow_clone(), mine.shallow_clone(), counts.clone()));
        // Takes what the call before left.
        pending.push(background.start_all_gather_into(all.shallow_clone(), own.shallow_clone(), counts.clone()));
        pending.push(background.start_all_reduce(whole.shallow_clone()));
        pending.push(background.start_shift(mine.shallow_clone(), (rank + 1) % size, shifted.shallow_clone(), before));
        if round == 7 {
            let wanted = [&sum[part(&counts, rank)], &sum, &sum, &inputs[before]].map(as_bits);
            outputs.extend([own, all, whole, shifted].into_iter().zip(wanted));
        }
    }
    // Others of the same rank go on meanwhile.
    comm.barrier().unwrap();
    pending.into_iter().rev().for_each(|pending| _ = pending.wait().unwrap());
    for (output, wanted) in outputs {
        assert_eq!(bits(&output), wanted);
        results.keep(&output);
    }
}

/// Rank 0's call is under way until rank 0 has done something else: only then do the others come.
fn beside_work(comm: &Communicator) {
    let background = Background::new(comm.split("late", Some(0), 0).unwrap().unwrap());
    let tensor = Tensor::from_slice(&[comm.rank() as f32; 100]);
    if comm.rank() > 0 {
        comm.barrier().unwrap();
        background.start_all_reduce(tensor).wait().unwrap();
        return;
    }
    let before = comm.stats();
    let pending = background.start_all_reduce(tensor.shallow_clone());
    let work = Tensor::ones([50, 50], (Kind::Float, Device::Cpu));
    for _ in 0..20 {
        _ = work.matmul(&work);
        std::thread::sleep(Duration::from_millis(1));
        assert!(comm.size() == 1 || !pending.is_done());
    }
    comm.barrier().unwrap();
    let stood_still = pending.wait().unwrap().as_secs_f64();
    let after = comm.stats();
    assert_eq!(bits(&tensor)[0], ((0..comm.size()).sum::<usize>() as f32).to_bits());
    // Another group's time is in neither: the barrier's is in both.
    let (under_way, exposed) = (after.seconds - before.seconds, after.exposed_seconds - before.exposed_seconds);
    assert!(exposed >= stood_still && under_way >= exposed - stood_still);
}

struct Stage {
    size: usize,
    rank: usize,
    from_before: Option<Receiver>,
    to_next: Option<Sender>,
    from_next: Option<Receiver>,
    to_before: Option<Sender>,
}

/// Elements of what stages send: more than travels with a header.
const ACTIVATION: usize = 20_000;
const MICROBATCHES: usize = 9;

impl Stage {
    fn open(comm: &Communicator) -> Stage {
        let forward = (1..comm.size()).map(|stage| (stage - 1, stage));
        let pairs: Vec<(usize, usize)> = forward.flat_map(|(from, to)| [(from, to), (to, from)]).collect();
        let before = comm.stats().num_calls;
        let ends = channel::open(comm, &pairs).unwrap();
        assert_eq!(comm.stats().num_calls, before + 1);
        let mut stage = Stage {
            size: comm.size(),
            rank: comm.rank(),
            from_before: None,
            to_next: None,
            from_next: None,
            to_before: None,
        };
        for ((from, to), end) in pairs.into_iter().zip(ends) {
            assert_eq!(end.is_some(), [from, to].contains(&comm.rank()));
            match end {
                Some(ChannelEnd::Sender(sender)) => {
                    assert_eq!(sender.peer(), comm.ranks()[to]);
                    *(if to > from { &mut stage.to_next } else { &mut stage.to_before }) = Some(sender);
                }
                Some(ChannelEnd::Receiver(receiver)) => {
                    assert_eq!(receiver.peer(), comm.ranks()[from]);
                    *(if to > from { &mut stage.from_before } else { &mut stage.from_next }) = Some(receiver);
                }
                None => {}
            }
        }
        stage
    }

    /// Receives, adds this stage's number, sends on; the last one turns around.
    fn step(&self, receiver: Option<&Receiver>, sender: Option<&Sender>, start: f64) -> Tensor {
        let tensor = zeros(ACTIVATION);
        match receiver {
            Some(receiver) => receiver.recv(&tensor).unwrap(),
            None => _ = tensor.shallow_clone().fill_(start),
        }
        let sum = tensor + self.rank as f64 + 1.0;
        // Nobody waits for it: the channel keeps it until it is there.
        sender.into_iter().for_each(|sender| drop(sender.start_send(sum.shallow_clone())));
        sum
    }

    fn forward(&self, number: usize) {
        let activation = self.step(self.from_before.as_ref(), self.to_next.as_ref(), 1000.0 * number as f64);
        let wanted = (1000 * number + (1..=self.rank + 1).sum::<usize>()) as f32;
        assert_eq!(bits(&activation), vec![wanted.to_bits(); ACTIVATION]);
    }

    fn backward(&self, number: usize) -> Tensor {
        let sum = (1..=self.size).sum::<usize>() as f64;
        self.step(self.from_next.as_ref(), self.to_before.as_ref(), 1000.0 * number as f64 + sum)
    }
}

/// One forward, one backward, with as many warm-up steps as there are stages behind.
fn pipeline(comm: &Communicator, results: &mut Results) {
    let stage = Stage::open(comm);
    let warm_up = (stage.size - 1 - stage.rank).min(MICROBATCHES);
    (0..warm_up).for_each(|number| stage.forward(number));
    for number in 0..MICROBATCHES {
        if number + warm_up < MICROBATCHES {
            stage.forward(number + warm_up);
        }
        let gradient = stage.backward(number);
        let sum = |stages: std::ops::RangeInclusive<usize>| stages.sum::<usize>();
        let wanted = (1000 * number + sum(1..=stage.size) + sum(stage.rank + 1..=stage.size)) as f32;
        assert_eq!(bits(&gradient), vec![wanted.to_bits(); ACTIVATION]);
        results.keep(&gradient);
    }
}

fn invalid_arguments(comm: &Communicator) {
    let background = Background::new(comm.split("invalid", Some(0), 0).unwrap().unwrap());
    let line = line!() + 1;
    let error = background.start_all_gather_into(zeros(3), zeros(2), vec![9; comm.size()]).wait().unwrap_err();
    assert!(error.call_site.file().ends_with("background.rs") && error.call_site.line() == line, "{error}");
    assert!(error.to_string().contains("counts add up to") && error.group == "world/invalid", "{error}");
    // Nothing was sent, so it goes on.
    background.start_all_reduce(zeros(3)).wait().unwrap();
    let twice = channel::open(comm, &[(0, 0)]).err().unwrap();
    assert!(
        twice.to_string().contains("a pair of rank 0 and itself") && twice.call_site.file().ends_with("background.rs")
    );
    if comm.size() > 1 {
        let error = comm.shift(&zeros(1), comm.rank(), &zeros(1), (comm.rank() + 1) % comm.size()).unwrap_err();
        assert!(error.to_string().contains("must receive from itself"), "{error}");
    }
    let error = comm.shift(&zeros(1), 0, &zeros(1).to_kind(Kind::Double), 0).unwrap_err();
    assert!(error.to_string().contains("receive is of type"), "{error}");
}

/// A tensor that the thread lets go is counted as freed where it was allocated.
fn what_the_thread_frees_is_not_counted_on(comm: &Communicator) {
    const CALLS: usize = 64;
    let background = Background::new(comm.split("counted", Some(0), comm.rank() as i64).unwrap().unwrap());
    let (result, peak) = device::count_allocations(|| {
        (0..CALLS).try_for_each(|_| background.start_all_reduce(zeros(1000)).wait().map(drop))
    });
    result.unwrap();
    // One tensor at a time, and what its sum needs: all ranks' tensors at most, twice.
    let most = 4000 * (1 + 2 * comm.size() as u64);
    assert!(peak >= 4000 && peak <= most, "{peak} bytes, expected at most {most}");
}
