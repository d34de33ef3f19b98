//! The calls of a rank: their order, deadlines, statistics and errors. What a call does is in `run`.

mod run;

use super::backend::{AbortHandle, Backend, Call, Failure, Lane, SubGroup, Transfer};
use super::error::{CommError, CommErrorKind, Operation};
use super::reduce::{ReduceOp, accumulation_kind};
use run::{Run, parts};
use std::cell::{Cell, RefCell};
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tangelo_core::hash;
use tch::{Device, Kind, Tensor};

/// Up to this many bytes an all-reduce is one exchange of whole tensors instead of two of parts: same bits, half the
/// round trips.
const SMALL_ALL_REDUCE_BYTES: usize = 16 << 10;

/// How long a communicator waits, and where its tensors live.
#[derive(Clone, Debug)]
pub struct CommOptions {
    /// Deadline of every call.
    pub timeout: Duration,
    /// Deadline for the ranks to meet.
    pub init_timeout: Duration,
    /// Where all tensors of all calls live.
    pub device: Device,
}

impl Default for CommOptions {
    fn default() -> CommOptions {
        CommOptions { timeout: Duration::from_secs(300), init_timeout: Duration::from_secs(120), device: Device::Cpu }
    }
}

/// What a communicator and all groups split from it did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CommStats {
    /// Calls made.
    pub num_calls: u64,
    /// Bytes this rank sent to others, without headers.
    pub bytes_sent: u64,
    /// Seconds spent inside calls, waiting included.
    pub seconds: f64,
}

#[derive(Default)]
struct Counters {
    calls: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

/// One rank's end of a group. See the [module](super) for what all calls have in common.
///
/// Counts are in elements. Tensors must be contiguous, on the communicator's device, and of fp32, bf16, fp16, fp64,
/// int64, int32, uint8 or bool. Output tensors are written through shared handles, as libtorch does.
pub struct Communicator {
    /// `None` where the group is this rank alone.
    backend: Option<RefCell<Box<dyn Backend>>>,
    name: String,
    rank: usize,
    /// Global ranks of the group.
    ranks: Vec<usize>,
    options: CommOptions,
    /// Deadline of the next calls in milliseconds; shared with all groups split from the same communicator.
    timeout_ms: Arc<AtomicU64>,
    sequence: Cell<u64>,
    /// Point-to-point calls so far, per peer: sends, receives.
    pair_sequences: RefCell<Vec<[u64; 2]>>,
    /// The first group id that no group of this rank uses; shared by all its groups.
    next_group: Arc<AtomicU64>,
    counters: Arc<Counters>,
    failed: RefCell<Option<CommErrorKind>>,
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator").field("rank", &self.rank()).field("ranks", &self.ranks()).finish_non_exhaustive()
    }
}

impl Communicator {
    /// A group of one: every call is a copy or nothing.
    pub fn single() -> Communicator {
        Communicator::new(None, "world", 0, vec![0], CommOptions::default())
    }

    /// A group of one on the given device.
    pub fn single_on(device: Device) -> Communicator {
        Communicator::new(None, "world", 0, vec![0], CommOptions { device, ..CommOptions::default() })
    }

    pub(crate) fn new(
        backend: Option<Box<dyn Backend>>,
        name: &str,
        rank: usize,
        ranks: Vec<usize>,
        options: CommOptions,
    ) -> Communicator {
        assert!(rank < ranks.len() && (backend.is_some() || ranks.len() == 1));
        Communicator {
            backend: backend.map(RefCell::new),
            name: name.to_owned(),
            rank,
            pair_sequences: RefCell::new(vec![[0; 2]; ranks.len()]),
            ranks,
            timeout_ms: Arc::new(AtomicU64::new(milliseconds(options.timeout))),
            options,
            sequence: Cell::new(0),
            next_group: Arc::new(AtomicU64::new(1)),
            counters: Arc::default(),
            failed: RefCell::new(None),
        }
    }

    /// This rank within the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks in the group.
    pub fn size(&self) -> usize {
        self.ranks.len()
    }

    /// Global ranks of the group, in group order.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Name of the group, as errors show it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where all tensors live.
    pub fn device(&self) -> Device {
        self.options.device
    }

    /// Calls, bytes and time so far, of this communicator and of all split from the same one.
    pub fn stats(&self) -> CommStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CommStats {
            num_calls: load(&self.counters.calls),
            bytes_sent: load(&self.counters.bytes),
            seconds: load(&self.counters.nanoseconds) as f64 * 1e-9,
        }
    }

    /// Sets the deadline of later calls, of this communicator and of all split from the same one: the first step may
    /// take longer than the others.
    pub fn set_timeout(&self, timeout: Duration) {
        self.timeout_ms.store(milliseconds(timeout), Ordering::Relaxed);
    }

    /// Ends this rank's calls from another thread. A group of one has nothing to end.
    pub fn abort_handle(&self) -> AbortHandle {
        match &self.backend {
            Some(backend) => backend.borrow().abort_handle(),
            None => AbortHandle::new(|_| {}),
        }
    }

    /// Replaces the tensor by its sum over the ranks.
    #[track_caller]
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<(), CommError> {
        self.all_reduce_with(tensor, ReduceOp::Sum)
    }

    /// Replaces the tensor by its sum, maximum or minimum over the ranks.
    #[track_caller]
    pub fn all_reduce_with(&self, tensor: &Tensor, op: ReduceOp) -> Result<(), CommError> {
        let signature = signature(&[tensor.numel(), op as usize]);
        self.call(Operation::AllReduce, tensor.kind(), signature, |run| {
            let flat = run.flat("tensor", tensor)?;
            let num_bytes = flat.numel() * flat.kind().elt_size_in_bytes();
            if run.size() == 1 {
                Ok(())
            } else if num_bytes <= SMALL_ALL_REDUCE_BYTES {
                run.all_reduce_small(&flat, op)
            } else {
                run.all_reduce_in_parts(&flat, op)
            }
        })
    }

    /// The ranks' tensors, all of one shape, concatenated along dim 0 in rank order (scalars are stacked).
    #[track_caller]
    pub fn all_gather(&self, input: &Tensor) -> Result<Tensor, CommError> {
        let shape = input.size();
        let signature = signature(&shape.iter().map(|&n| n as usize).collect::<Vec<_>>());
        self.call(Operation::AllGather, input.kind(), signature, |run| {
            let input = run.flat("input", input)?;
            let output = Tensor::f_empty([run.size() as i64 * input.numel() as i64], (input.kind(), input.device()))?;
            run.all_gather(&output, &input, &vec![input.numel(); run.size()])?;
            let shape: Vec<i64> = match shape.split_first() {
                Some((first, rest)) => [first * run.size() as i64].into_iter().chain(rest.iter().copied()).collect(),
                None => vec![run.size() as i64],
            };
            Ok(output.f_view(&shape[..])?)
        })
    }

    /// Writes all ranks' inputs, `counts[rank]` elements each, one after the other into `output`.
    /// The input may be this rank's part of the output.
    #[track_caller]
    pub fn all_gather_into(&self, output: &Tensor, input: &Tensor, counts: &[usize]) -> Result<(), CommError> {
        self.call(Operation::AllGather, input.kind(), signature(counts), |run| {
            let (output, input) = (run.flat("output", output)?, run.flat("input", input)?);
            run.expect_kind("output", &output, &[input.kind()])?;
            run.expect_counts("output", &output, counts)?;
            run.expect_numel("input", &input, counts[run.rank()])?;
            run.all_gather(&output, &input, counts)
        })
    }

    /// Sums the ranks' inputs and gives rank r the r-th part, of `counts[r]` elements. The output has the input's
    /// type, or fp32 where the input is of a 16-bit type (then nothing is rounded). The output may be this rank's
    /// part of the input.
    #[track_caller]
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor, counts: &[usize]) -> Result<(), CommError> {
        self.call(Operation::ReduceScatter, input.kind(), signature(counts), |run| {
            let (output, input) = (run.flat("output", output)?, run.flat("input", input)?);
            run.expect_kind("output", &output, &[input.kind(), accumulation_kind(input.kind())])?;
            run.expect_counts("input", &input, counts)?;
            run.expect_numel("output", &output, counts[run.rank()])?;
            run.reduce_scatter(&output, &input, counts, ReduceOp::Sum)
        })
    }

    /// Sends the r-th run of `in_counts[r]` elements of the input to rank r, and writes what rank r sent as the r-th
    /// run of `out_counts[r]` elements of the output.
    #[track_caller]
    pub fn all_to_all_single(
        &self,
        output: &Tensor,
        input: &Tensor,
        out_counts: &[usize],
        in_counts: &[usize],
    ) -> Result<(), CommError> {
        self.call(Operation::AllToAll, input.kind(), 0, |run| {
            let (output, input) = (run.flat("output", output)?, run.flat("input", input)?);
            run.expect_kind("output", &output, &[input.kind()])?;
            run.expect_counts("output", &output, out_counts)?;
            run.expect_counts("input", &input, in_counts)?;
            let (outputs, inputs) = (parts(&output, out_counts), parts(&input, in_counts));
            run.expect_numel("this rank's own run of the output", &outputs[run.rank()], in_counts[run.rank()])?;
            run.copy(&outputs[run.rank()], &inputs[run.rank()])?;
            run.all_to_all(&outputs, &inputs)
        })
    }

    /// Copies the tensor of rank `root` (within the group) into everybody's.
    #[track_caller]
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        self.call(Operation::Broadcast, tensor.kind(), signature(&[root, tensor.numel()]), |run| {
            run.expect_rank(root)?;
            let flat = run.flat("tensor", tensor)?;
            if flat.numel() == 0 {
                Ok(())
            } else {
                run.with_backend(|backend, call| backend.broadcast(call, &flat, root))
            }
        })
    }

    /// Sends the tensor to a peer (rank within the group), which must receive one of the same size and type; returns
    /// when the tensor may be reused, possibly not before the peer receives.
    #[track_caller]
    pub fn send(&self, tensor: &Tensor, peer: usize) -> Result<(), CommError> {
        self.point_to_point(Operation::Send, tensor, peer)
    }

    /// Receives into the tensor what the peer (rank within the group) sends.
    #[track_caller]
    pub fn recv(&self, tensor: &Tensor, peer: usize) -> Result<(), CommError> {
        self.point_to_point(Operation::Receive, tensor, peer)
    }

    /// Returns when every rank entered.
    #[track_caller]
    pub fn barrier(&self) -> Result<(), CommError> {
        self.call(Operation::Barrier, Kind::Uint8, 0, |run| {
            let token = Tensor::f_zeros([1], (Kind::Uint8, run.comm.options.device))?;
            let output = Tensor::f_zeros([run.size() as i64], (Kind::Uint8, run.comm.options.device))?;
            run.all_gather(&output, &token, &vec![1; run.size()])
        })
    }

    /// The ranks' byte strings, in rank order. For small things: errors, counts, names.
    #[track_caller]
    pub fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.call(Operation::AllGatherBytes, Kind::Uint8, 0, |run| run.all_gather_bytes(bytes))
    }

    /// New groups: ranks that give the same colour form one, ordered by key, then by rank; `None` joins no group.
    /// Every rank of this group must call it.
    #[track_caller]
    pub fn split(&self, name: &str, color: Option<u32>, key: i64) -> Result<Option<Communicator>, CommError> {
        self.call(Operation::Split, Kind::Uint8, 0, |run| {
            let (members, id) = run.agree_on_groups(color, key)?;
            if color.is_none() {
                return Ok(None);
            }
            let group = SubGroup { id, name: format!("{}/{name}", self.name), members };
            run.open_group(group).map(Some)
        })
    }

    /// A new group of the given ranks (within this group), in the given order; `None` on all others. Every rank of
    /// this group must call it with the same list.
    #[track_caller]
    pub fn group(&self, name: &str, ranks: &[usize]) -> Result<Option<Communicator>, CommError> {
        let place = ranks.iter().position(|&rank| rank == self.rank);
        self.split(name, place.map(|_| 0), place.unwrap_or(0) as i64)
    }

    #[track_caller]
    fn point_to_point(&self, operation: Operation, tensor: &Tensor, peer: usize) -> Result<(), CommError> {
        let direction = usize::from(operation == Operation::Receive);
        let sequence = self.pair_sequences.borrow().get(peer).map_or(0, |pair| pair[direction]);
        let mut call = self.describe(operation, tensor.kind(), signature(&[tensor.numel()]));
        (call.lane, call.sequence) = (Lane::PointToPoint, sequence);
        self.run(call, |run| {
            run.expect_rank(peer)?;
            if peer == run.rank() {
                return Err(Failure::invalid("a rank cannot send to itself"));
            }
            self.pair_sequences.borrow_mut()[peer][direction] += 1;
            let transfer = Transfer { peer, data: run.flat("tensor", tensor)? };
            match operation {
                Operation::Receive => run.exchange(vec![], vec![transfer]),
                _ => run.exchange(vec![transfer], vec![]),
            }
        })
    }

    #[track_caller]
    fn describe(&self, operation: Operation, kind: Kind, signature: u64) -> Call {
        Call {
            operation,
            lane: Lane::Collective,
            sequence: self.sequence.get(),
            kind,
            signature,
            site: Location::caller(),
            started: Instant::now(),
            timeout: Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed)),
            rank: self.rank,
            size: self.size(),
        }
    }

    /// One collective call.
    #[track_caller]
    fn call<R>(
        &self,
        operation: Operation,
        kind: Kind,
        signature: u64,
        body: impl FnOnce(&Run) -> Result<R, Failure>,
    ) -> Result<R, CommError> {
        let call = self.describe(operation, kind, signature);
        self.sequence.set(call.sequence + 1);
        self.run(call, body)
    }

    fn run<R>(&self, call: Call, body: impl FnOnce(&Run) -> Result<R, Failure>) -> Result<R, CommError> {
        if let Some(kind) = self.failed.borrow().clone() {
            let hint = Some("an earlier call failed like this; a failed communicator stays failed".to_owned());
            return Err(self.error(&call, Failure { kind, hint }));
        }
        let run = Run { comm: self, call };
        let result = tch::no_grad(|| body(&run));
        self.counters.calls.fetch_add(1, Ordering::Relaxed);
        self.counters.nanoseconds.fetch_add(run.call.started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result.map_err(|failure| {
            self.note_failure(&failure.kind);
            self.error(&run.call, failure)
        })
    }

    fn note_failure(&self, kind: &CommErrorKind) {
        // Invalid arguments were noticed before anything was sent.
        if matches!(kind, CommErrorKind::Invalid(_)) {
            return;
        }
        *self.failed.borrow_mut() = Some(kind.clone());
        if let Some(backend) = &self.backend {
            backend.borrow_mut().failed(kind);
        }
    }

    fn error(&self, call: &Call, failure: Failure) -> CommError {
        CommError {
            rank: self.ranks[self.rank],
            group: self.name.clone(),
            operation: call.operation,
            sequence: call.sequence,
            call_site: call.site,
            hint: failure.hint.or_else(|| default_hint(&failure.kind)),
            kind: failure.kind,
        }
    }
}

fn default_hint(kind: &CommErrorKind) -> Option<String> {
    let text = match kind {
        CommErrorKind::Timeout { .. } => {
            "a rank is stopped, far slower than the others, or in another call: see its log"
        }
        CommErrorKind::PeerLost { .. } => "the cause is in that rank's log",
        CommErrorKind::Mismatch(_) => "all ranks of a group must make the same calls in the same order",
        _ => return None,
    };
    Some(text.to_owned())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).clamp(1, 1000 * 86_400 * 365)
}

/// Equal on ranks whose numbers are equal.
fn signature(numbers: &[usize]) -> u64 {
    let bytes: Vec<u8> = numbers.iter().flat_map(|&n| (n as u64).to_le_bytes()).collect();
    hash::hash_bytes(0, &bytes)
}
