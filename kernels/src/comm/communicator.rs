//! The calls of a rank: their order, deadlines, statistics and errors. What a call does is in `run`; new groups are in
//! `groups`.

mod groups;
mod run;
mod shared;

pub(crate) use shared::Shared;

use super::backend::{AbortHandle, Backend, Call, Failure, Lane, Transfer};
use super::error::{CommError, CommErrorKind, Operation};
use super::position::{Recorder, Tracker};
use super::reduce::{ReduceOp, accumulation_kind};
use run::{Run, parts};
use std::cell::{Cell, RefCell};
use std::panic::Location;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tangelo_core::program::SMALL_ALL_REDUCE_BYTES;
use tangelo_core::{Moment, Phase, hash};
use tch::{Device, Kind, Tensor};

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
    /// Seconds that calls were under way, waiting for the peers included. Calls at the same time count each.
    pub seconds: f64,
    /// Seconds that the rank itself stood still for them: all of a call's, or, of a call in the
    /// [`Background`](super::Background), those spent waiting for its end.
    pub exposed_seconds: f64,
}

/// A call that was made, as [`Communicator::record_calls`] notes it. Ranks are within the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallRecord {
    /// Name of the group.
    pub group: String,
    /// What was called.
    pub operation: Operation,
    /// Bytes per element.
    pub element_bytes: usize,
    /// Elements: per rank for all-gather and reduce-scatter, to each rank for all-to-all, else one number.
    pub counts: Vec<usize>,
    /// What comes in, where that is not said by `counts`: from each rank of an all-to-all, for a shift.
    pub counts_in: Vec<usize>,
    /// The other rank of a send or receive; where a shift goes to.
    pub peer: Option<usize>,
}

/// Whose call it is: where it was made, and in which phase of a step.
#[derive(Clone, Copy)]
pub(crate) struct Caller {
    pub site: &'static Location<'static>,
    pub phase: Option<Phase>,
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
    sequence: Cell<u64>,
    /// Point-to-point calls so far, per peer: sends, receives.
    pair_sequences: RefCell<Vec<[u64; 2]>>,
    shared: Arc<Shared>,
    tracker: Arc<Tracker>,
    /// Whose calls these are, where it is not the one who makes them.
    caller: Cell<Option<Caller>>,
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
        let shared = Arc::new(Shared::new(options.timeout));
        Communicator::assemble(backend, 0, name, rank, ranks, options, shared)
    }

    fn assemble(
        backend: Option<Box<dyn Backend>>,
        id: u32,
        name: &str,
        rank: usize,
        ranks: Vec<usize>,
        options: CommOptions,
        shared: Arc<Shared>,
    ) -> Communicator {
        assert!(rank < ranks.len() && (backend.is_some() || ranks.len() == 1));
        Communicator {
            backend: backend.map(RefCell::new),
            name: name.to_owned(),
            rank,
            pair_sequences: RefCell::new(vec![[0; 2]; ranks.len()]),
            tracker: Arc::new(Tracker::new(Arc::clone(&shared), id, name, &ranks)),
            ranks,
            options,
            sequence: Cell::new(0),
            shared,
            caller: Cell::new(None),
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
        self.shared.stats()
    }

    /// Notes from now on every call that moves tensors, of this communicator and of all split from the same one: what
    /// was predicted can be laid beside what was done. The calls of one group are in order.
    pub fn record_calls(&self) {
        _ = self.shared.calls_made.set(Mutex::default());
    }

    /// The calls noted since the last time.
    pub fn take_recorded_calls(&self) -> Vec<CallRecord> {
        let lock =
            |calls: &Mutex<Vec<CallRecord>>| std::mem::take(&mut *calls.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.calls_made.get().map(lock).unwrap_or_default()
    }

    fn note_call(&self, operation: Operation, kind: Kind, counts: &[usize], counts_in: &[usize], peer: Option<usize>) {
        let Some(calls) = self.shared.calls_made.get() else { return };
        calls.lock().unwrap_or_else(PoisonError::into_inner).push(CallRecord {
            group: self.name.clone(),
            operation,
            element_bytes: kind.elt_size_in_bytes(),
            counts: counts.to_vec(),
            counts_in: counts_in.to_vec(),
            peer,
        });
    }

    /// Sets the deadline of later calls, of this communicator and of all split from the same one: the first step may
    /// take longer than the others.
    pub fn set_timeout(&self, timeout: Duration) {
        self.shared.set_timeout(timeout);
    }

    /// Writes from now on where this rank is in its calls, of this communicator and of all split from the same one,
    /// into a file of its own that outlives the rank: see [`tangelo_core::position`]. What was in the file is lost. A
    /// file that was given before stays.
    #[track_caller]
    pub fn record_positions(&self, path: &Path) -> std::io::Result<()> {
        if self.shared.recorder.set(Recorder::create(path)?).is_ok() {
            self.tracker.opened(Location::caller());
        }
        Ok(())
    }

    pub(super) fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Says which step and which phase of it this rank is in, for this communicator and all split from the same one:
    /// errors carry it, and the file of [`Communicator::record_positions`] where there is one.
    pub fn enter(&self, moment: Moment) {
        if self.shared.set_moment(moment)
            && let Some(recorder) = self.shared.recorder.get()
        {
            recorder.write_moment(moment);
        }
    }

    /// Makes calls for somebody else, whose call site they get.
    pub(super) fn on_behalf_of<R>(&self, caller: Caller, body: impl FnOnce() -> R) -> R {
        let before = self.caller.replace(Some(caller));
        let result = body();
        self.caller.set(before);
        result
    }

    /// The error of a call that panicked, after which the communicator is of no more use.
    pub(super) fn panicked(&self, operation: Operation, text: &str) -> CommError {
        let failure = Failure::backend(format!("panicked: {text}"));
        let call = self.describe(operation, Kind::Uint8, 0);
        self.note_failure(&failure.kind);
        self.error(&call, failure)
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
        self.note_call(Operation::AllReduce, tensor.kind(), &[tensor.numel()], &[], None);
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
            let counts = vec![input.numel(); run.size()];
            self.note_call(Operation::AllGather, input.kind(), &counts, &[], None);
            run.all_gather(&output, &input, &counts)?;
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
        self.note_call(Operation::AllGather, input.kind(), counts, &[], None);
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
        self.note_call(Operation::ReduceScatter, input.kind(), counts, &[], None);
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
        self.note_call(Operation::AllToAll, input.kind(), in_counts, out_counts, None);
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

    /// Sends one tensor to the rank `to` and receives another of the same type from the rank `from` (both within the
    /// group), at the same time. The tensors may differ in size; nothing is sent of an empty one. The peers must make
    /// the same call. Both ranks may be the same, also this one: then it is a copy.
    #[track_caller]
    pub fn shift(&self, send: &Tensor, to: usize, receive: &Tensor, from: usize) -> Result<(), CommError> {
        let sequence =
            |peer: usize, direction: usize| self.pair_sequences.borrow().get(peer).map_or(0, |pair| pair[direction]);
        self.note_call(Operation::Shift, send.kind(), &[send.numel()], &[receive.numel()], Some(to));
        let mut call = self.describe(Operation::Shift, send.kind(), 0);
        (call.lane, call.sequence, call.receive_sequence) = (Lane::PointToPoint, sequence(to, 0), sequence(from, 1));
        self.run(call, [Some(to), Some(from)], |run| {
            let (send, receive) = (run.flat("send", send)?, run.flat("receive", receive)?);
            run.expect_rank(to)?;
            run.expect_rank(from)?;
            run.expect_kind("receive", &receive, &[send.kind()])?;
            if to == run.rank() && from == run.rank() {
                run.expect_numel("receive", &receive, send.numel())?;
                return run.copy(&receive, &send);
            }
            if to == run.rank() || from == run.rank() {
                return Err(Failure::invalid("a rank that sends to itself must receive from itself, too"));
            }
            self.pair_sequences.borrow_mut()[to][0] += 1;
            self.pair_sequences.borrow_mut()[from][1] += 1;
            run.exchange(vec![Transfer { peer: to, data: send }], vec![Transfer { peer: from, data: receive }])
        })
    }

    #[track_caller]
    fn point_to_point(&self, operation: Operation, tensor: &Tensor, peer: usize) -> Result<(), CommError> {
        let direction = usize::from(operation == Operation::Receive);
        let sequence = self.pair_sequences.borrow().get(peer).map_or(0, |pair| pair[direction]);
        self.note_call(operation, tensor.kind(), &[tensor.numel()], &[], Some(peer));
        let mut call = self.describe(operation, tensor.kind(), signature(&[tensor.numel()]));
        (call.lane, call.sequence, call.receive_sequence) = (Lane::PointToPoint, sequence, sequence);
        self.run(call, [Some(peer), None], |run| {
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
            receive_sequence: self.sequence.get(),
            kind,
            signature,
            site: self.caller.get().map_or(Location::caller(), |caller| caller.site),
            started: Instant::now(),
            timeout: self.shared.timeout(),
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
        self.run(call, [None; 2], body)
    }

    /// A call, which needs the given peers where it is no collective one.
    fn run<R>(
        &self,
        call: Call,
        peers: [Option<usize>; 2],
        body: impl FnOnce(&Run) -> Result<R, Failure>,
    ) -> Result<R, CommError> {
        if let Some(kind) = self.failed.borrow().clone() {
            let hint = Some("an earlier call failed like this; a failed communicator stays failed".to_owned());
            return Err(self.error(&call, Failure { kind, hint }));
        }
        let global = |peer: usize| self.ranks.get(peer).and_then(|rank| u32::try_from(*rank).ok());
        self.tracker.enter(&call, peers.map(|peer| peer.and_then(global)));
        let run = Run { comm: self, call };
        let result = tch::no_grad(|| body(&run));
        let under_way = run.call.started.elapsed();
        self.shared.count_call(under_way);
        if !self.tracker.is_background() {
            self.shared.count_exposed(under_way);
        }
        match result {
            Ok(result) => {
                self.tracker.leave(&run.call);
                Ok(result)
            }
            Err(failure) => {
                // A call that failed stays the last one this rank was seen in.
                if matches!(failure.kind, CommErrorKind::Invalid(_)) {
                    self.tracker.leave(&run.call);
                }
                self.note_failure(&failure.kind);
                Err(self.error(&run.call, failure))
            }
        }
    }

    fn note_failure(&self, kind: &CommErrorKind) {
        // Invalid arguments were noticed before anything was sent.
        if matches!(kind, CommErrorKind::Invalid(_)) {
            return;
        }
        _ = self.shared.failure.set(kind.to_string());
        *self.failed.borrow_mut() = Some(kind.clone());
        if let Some(backend) = &self.backend {
            backend.borrow_mut().failed(kind);
        }
    }

    fn error(&self, call: &Call, failure: Failure) -> CommError {
        CommError {
            rank: self.ranks[self.rank],
            phase: self.caller.get().map_or_else(|| self.shared.phase(), |caller| caller.phase),
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

/// Equal on ranks whose numbers are equal.
fn signature(numbers: &[usize]) -> u64 {
    let bytes: Vec<u8> = numbers.iter().flat_map(|&n| (n as u64).to_le_bytes()).collect();
    hash::hash_bytes(0, &bytes)
}
