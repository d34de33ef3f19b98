//! Collectives that run while their rank computes.
//!
//! ```text
//!   device thread                        thread "comm <group>", owner of the communicator
//!   start_*(tensors) -- queue (64) ----> call, in the order of submission
//!        Pending     <---- slot -------- tensors let go, then the answer
//! ```
//!
//! | thread | waits for | unblocked by | bounded by |
//! |---|---|---|---|
//! | device thread in `start_*` | room in the queue | the thread, one call on | the deadline of the call under way |
//! | device thread in `Pending::wait` | one answer | the thread | the deadlines of the calls before it, and its own |
//! | the thread | a call; the peers | submission, drop; as every call | the call's deadline |
//! | `Drop` | the thread | the calls that were submitted | their deadlines; aborted after a failure or in a panic |
//!
//! Invariants:
//! 1. Calls are made in the order of their submission, so members that submit the same calls make the same calls.
//! 2. After a failed call all later ones fail at once, as of every communicator: a drop waits for one deadline at most.
//! 3. A `Pending` may be dropped: the tensors live until the call is done.
//!
//! Absent on purpose: splitting (groups are made before their communicators move here), and cancelling one call.

use super::backend::AbortHandle;
use super::communicator::{Caller, Communicator};
use super::error::{CommError, CommErrorKind, Operation};
use super::position::Tracker;
use crate::device::Counting;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::Tensor;

/// Calls that may wait for their turn.
const QUEUE_LENGTH: usize = 64;

type Job = Box<dyn FnOnce(&Communicator) + Send>;

/// Runs the calls of one communicator on a thread of its own, in order. A group of one has no thread: its calls run
/// where they are submitted.
///
/// Until [`Pending::wait`] comes back, outputs must not be read, nor inputs written. Shapes, counts and errors are those of
/// the [`Communicator`]'s call of the same name; errors come with `wait`.
pub struct Background {
    worker: Worker,
    name: String,
    rank: usize,
    ranks: Vec<usize>,
    tracker: Arc<Tracker>,
    abort: AbortHandle,
}

enum Worker {
    Inline(Box<Communicator>),
    Thread {
        /// `None` once closed.
        queue: Option<SyncSender<Job>>,
        thread: Option<JoinHandle<()>>,
    },
    /// The thread could not be started.
    Absent(String),
}

impl Background {
    /// Makes every call where it is submitted, before `start_*` comes back.
    pub fn inline(comm: Communicator) -> Background {
        Background::over(comm, |comm| Worker::Inline(Box::new(comm)))
    }

    /// Gives the communicator to a thread. Where none can be started, every call says so.
    pub fn new(comm: Communicator) -> Background {
        if comm.size() == 1 { Background::inline(comm) } else { Background::over(comm, spawn) }
    }

    fn over(comm: Communicator, worker: impl FnOnce(Communicator) -> Worker) -> Background {
        let (name, rank, ranks) = (comm.name().to_owned(), comm.rank(), comm.ranks().to_vec());
        let (tracker, abort) = (Arc::clone(comm.tracker()), comm.abort_handle());
        Background { worker: worker(comm), name, rank, ranks, tracker, abort }
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

    /// Starts [`Communicator::all_gather_into`].
    #[track_caller]
    pub fn start_all_gather_into(&self, output: Tensor, input: Tensor, counts: Vec<usize>) -> Pending {
        self.start(Operation::AllGather, move |comm| comm.all_gather_into(&output, &input, &counts))
    }

    /// Starts [`Communicator::reduce_scatter`].
    #[track_caller]
    pub fn start_reduce_scatter(&self, output: Tensor, input: Tensor, counts: Vec<usize>) -> Pending {
        self.start(Operation::ReduceScatter, move |comm| comm.reduce_scatter(&output, &input, &counts))
    }

    /// Starts [`Communicator::all_reduce`].
    #[track_caller]
    pub fn start_all_reduce(&self, tensor: Tensor) -> Pending {
        self.start(Operation::AllReduce, move |comm| comm.all_reduce(&tensor))
    }

    /// Starts [`Communicator::send`].
    #[track_caller]
    pub fn start_send(&self, tensor: Tensor, peer: usize) -> Pending {
        self.start(Operation::Send, move |comm| comm.send(&tensor, peer))
    }

    /// Starts [`Communicator::recv`].
    #[track_caller]
    pub fn start_recv(&self, tensor: Tensor, peer: usize) -> Pending {
        self.start(Operation::Receive, move |comm| comm.recv(&tensor, peer))
    }

    /// Starts [`Communicator::shift`].
    #[track_caller]
    pub fn start_shift(&self, send: Tensor, to: usize, receive: Tensor, from: usize) -> Pending {
        self.start(Operation::Shift, move |comm| comm.shift(&send, to, &receive, from))
    }

    #[track_caller]
    fn start(
        &self,
        operation: Operation,
        body: impl FnOnce(&Communicator) -> Result<(), CommError> + Send + 'static,
    ) -> Pending {
        let caller = Caller { site: Location::caller(), phase: self.tracker.shared.phase() };
        let site = caller.site;
        let no_answer = self.error(operation, site, "the thread of this group ended without an answer".into());
        let slot = Arc::new(Slot::default());
        let answer = Answer { slot: Arc::clone(&slot), answer: Some(no_answer) };
        // The thread may be the last to hold what the caller allocated.
        let counting = Counting::of_this_thread();
        let job: Job = Box::new(move |comm| answer.give(counting.during(|| contained(comm, operation, caller, body))));
        match &self.worker {
            Worker::Inline(comm) => job(comm),
            Worker::Thread { queue, .. } => self.submit(queue.as_ref(), job),
            Worker::Absent(detail) => slot.set(Err(self.error(operation, site, detail.clone()))),
        }
        Pending { slot, tracker: Arc::clone(&self.tracker) }
    }

    /// Waits while the queue is full. A job that is not taken answers by being dropped.
    fn submit(&self, queue: Option<&SyncSender<Job>>, job: Job) {
        if let Some(queue) = queue
            && let Err(TrySendError::Full(job)) = queue.try_send(job)
        {
            let begin = Instant::now();
            self.tracker.begin_wait();
            _ = queue.send(job);
            self.tracker.end_wait();
            self.tracker.shared.count_exposed(begin.elapsed());
        }
    }

    fn error(&self, operation: Operation, call_site: &'static Location<'static>, detail: String) -> CommError {
        CommError {
            rank: self.ranks[self.rank],
            phase: self.tracker.shared.phase(),
            group: self.name.clone(),
            operation,
            sequence: 0,
            call_site,
            kind: CommErrorKind::Backend(detail),
            hint: None,
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let Worker::Thread { queue, thread } = &mut self.worker else { return };
        // What was submitted is owed to the peers, unless this rank cannot keep up with them any more.
        if let Some(failure) = self.tracker.shared.failure.get() {
            self.abort.abort(&format!("an earlier call of this rank failed: {failure}"));
        } else if std::thread::panicking() {
            self.abort.abort("this rank panicked");
        }
        drop(queue.take());
        if let Some(thread) = thread.take() {
            // The thread contains its panics, so there is no other error to learn of.
            _ = thread.join();
        }
    }
}

fn spawn(comm: Communicator) -> Worker {
    let (queue, jobs) = sync_channel(QUEUE_LENGTH);
    comm.tracker().move_to_background();
    match std::thread::Builder::new().name(format!("comm {}", comm.name())).spawn(move || serve(&comm, &jobs)) {
        Ok(thread) => Worker::Thread { queue: Some(queue), thread: Some(thread) },
        Err(error) => Worker::Absent(format!("cannot start a thread for this group: {error}")),
    }
}

fn serve(comm: &Communicator, jobs: &Receiver<Job>) {
    let _guard = tch::no_grad_guard();
    jobs.iter().for_each(|job| job(comm));
}

/// Makes the call for the one who submitted it; a panic becomes an error. Lets go of the tensors.
fn contained(
    comm: &Communicator,
    operation: Operation,
    caller: Caller,
    body: impl FnOnce(&Communicator) -> Result<(), CommError>,
) -> Result<(), CommError> {
    comm.on_behalf_of(caller, || {
        let answer = catch_unwind(AssertUnwindSafe(|| body(comm)));
        answer.unwrap_or_else(|payload| {
            let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
            Err(comm.panicked(operation, &text.unwrap_or_default()))
        })
    })
}

/// Where the answer of a call arrives.
#[derive(Default)]
struct Slot {
    answer: Mutex<Option<Result<(), CommError>>>,
    arrived: Condvar,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Result<(), CommError>>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, answer: Result<(), CommError>) {
        *self.lock() = Some(answer);
        self.arrived.notify_all();
    }

    fn wait(&self) -> Result<(), CommError> {
        let mut answer = self.lock();
        loop {
            match answer.take() {
                Some(answer) => return answer,
                None => answer = self.arrived.wait(answer).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// The duty to answer: a job that is dropped unrun answers with the error.
struct Answer {
    slot: Arc<Slot>,
    answer: Option<CommError>,
}

impl Answer {
    fn give(mut self, answer: Result<(), CommError>) {
        self.answer = None;
        self.slot.set(answer);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(error) = self.answer.take() {
            self.slot.set(Err(error));
        }
    }
}

/// A call under way. Dropping it forgets the answer, not the call; that a call failed shows in the next one.
#[must_use = "the tensors are ready only after `wait`"]
pub struct Pending {
    slot: Arc<Slot>,
    tracker: Arc<Tracker>,
}

impl Pending {
    /// Waits until the call is done; returns how long the caller stood still.
    pub fn wait(self) -> Result<Duration, CommError> {
        let early = self.slot.lock().take();
        if let Some(Ok(())) = early {
            return Ok(Duration::ZERO);
        }
        let begin = Instant::now();
        self.tracker.begin_wait();
        let answer = early.unwrap_or_else(|| self.slot.wait());
        // After a failure the rank stays where it stood still, for those who ask later; what was refused was no call.
        if matches!(&answer, Ok(()) | Err(CommError { kind: CommErrorKind::Invalid(_), .. })) {
            self.tracker.end_wait();
        }
        let stood_still = begin.elapsed();
        self.tracker.shared.count_exposed(stood_still);
        answer.map(|()| stood_still)
    }

    /// Whether [`Pending::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.slot.lock().is_some()
    }
}
