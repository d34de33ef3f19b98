//! A rank as its device thread sees it: calls one at a time, and control messages to look at in between.
//!
//! | consumes | waits for | unblocked by | bounded by |
//! |---|---|---|---|
//! | [`Job`]s, batches already pulled | the next call | the driver, or the end of the connection | `INBOX` jobs |
//! | stop and version flags ([`Control`]) | nothing | - | one flag each |
//!
//! The thread that owns the device runs [`Rank::run`](crate::Rank::run), which calls a [`Worker`]. A long verb asks
//! [`Control::check`] between its steps. A handler that panics poisons the rank: the panic is the answer, and the rank
//! ends, because nobody knows in which state the device is.

use crate::error::{Cause, RankFailure};
use crate::tasks::panic_message;
use crate::verbs::{Health, Metrics, Request, Statistics};
use arrow::array::{Array, ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tangelo_core::{Batch, Column, FailureKind};
use tokio::sync::mpsc;

/// Jobs that wait with their batches.
pub(crate) const INBOX: usize = 2;

/// Where a call comes from and how long it may take.
#[derive(Clone, Debug)]
pub struct Context {
    /// This global rank.
    pub rank: usize,
    /// The role that is to act.
    pub role: String,
    /// The training step.
    pub step: u64,
    /// The call's name in every log.
    pub trace: String,
    /// When nobody waits any more.
    pub deadline: Instant,
    /// Whether this rank's columns and numbers are collected; others may leave them out.
    pub answers: bool,
}

/// A call that is ready to run.
#[derive(Debug)]
pub struct Job {
    /// Where it comes from.
    pub context: Context,
    /// What to do.
    pub request: Request,
    /// The rows of the request's batch, where it has one.
    pub batch: Option<Batch>,
    pub(crate) call: u64,
    pub(crate) reply: Reply,
}

impl Job {
    /// The rows of the request's batch.
    ///
    /// # Errors
    /// The verb has none.
    pub fn batch(&self) -> Result<&Batch, WorkerError> {
        let none = || WorkerError::new(FailureKind::Internal, format!("{} carries no batch", self.request.name()));
        self.batch.as_ref().ok_or_else(none)
    }
}

/// Takes a finished job back to the network side.
#[derive(Debug)]
pub(crate) struct Reply {
    pub finished: mpsc::Sender<Finished>,
    pub up: crate::link::UpSender,
}

/// A finished job.
#[derive(Debug)]
pub(crate) struct Finished {
    pub call: u64,
    pub context: Context,
    pub request: Request,
    pub up: crate::link::UpSender,
    pub result: Result<Output, RankFailure>,
}

impl Job {
    /// Hands the result over. There is room for every job that can be under way, so this never waits.
    fn finish(self, result: Result<Output, RankFailure>) {
        let Job { context, request, call, reply, .. } = self;
        let finished = Finished { call, context, request, up: reply.up, result };
        if reply.finished.try_send(finished).is_err() {
            crate::error::log("an answer could not be sent: the connection is gone");
        }
    }
}

/// What a verb makes.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Numbers of this rank's part.
    pub metrics: Metrics,
    /// Columns that stay here, under a handle that the driver gets.
    pub columns: Option<NewColumns>,
    /// Anything else, by agreement between driver and worker.
    pub detail: Value,
}

impl Output {
    /// Only numbers.
    pub fn metrics(metrics: Metrics) -> Output {
        Output { metrics, ..Output::default() }
    }

    /// Only columns.
    pub fn columns(columns: NewColumns) -> Output {
        Output { columns: Some(columns), ..Output::default() }
    }
}

/// Columns that a verb made.
#[derive(Clone, Debug)]
pub struct NewColumns {
    pub(crate) records: RecordBatch,
    pub(crate) columns: Vec<Column>,
    /// For each row, the row of the argument that it came from.
    pub(crate) origins: Vec<u32>,
}

impl NewColumns {
    /// Columns whose rows are those of the argument, in its order.
    ///
    /// # Errors
    /// Columns of different lengths or of the wrong type.
    pub fn new(columns: Vec<(Column, ArrayRef)>) -> Result<NewColumns, WorkerError> {
        let rows = columns.first().map_or(0, |(_, array)| array.len() as u32);
        NewColumns::with_origins(columns, (0..rows).collect())
    }

    /// Columns of new rows: row i came from row `origins[i]` of the argument.
    ///
    /// # Errors
    /// Columns of different lengths or of the wrong type.
    pub fn with_origins(columns: Vec<(Column, ArrayRef)>, origins: Vec<u32>) -> Result<NewColumns, WorkerError> {
        let wrong = |what: String| WorkerError::new(FailureKind::Internal, what);
        for (column, array) in &columns {
            let (found, expected) = (array.data_type(), column.data_type());
            if !found.equals_datatype(&expected) {
                return Err(wrong(format!("made column `{column}` of type {found}, expected {expected}")));
            }
            if array.len() != origins.len() {
                return Err(wrong(format!("made column `{column}` of {} rows for {}", array.len(), origins.len())));
            }
        }
        let field = |(c, a): &(Column, ArrayRef)| Field::new(c.name(), a.data_type().clone(), false);
        let schema = Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()));
        let names = columns.iter().map(|(column, _)| *column).collect();
        let arrays = columns.into_iter().map(|(_, array)| array).collect();
        let records = RecordBatch::try_new(schema, arrays).map_err(|e| wrong(e.to_string()))?;
        Ok(NewColumns { records, columns: names, origins })
    }

    /// All columns of a batch of new rows.
    ///
    /// # Errors
    /// Another number of rows than origins.
    pub fn of_batch(batch: &Batch, origins: Vec<u32>) -> Result<NewColumns, WorkerError> {
        let has = |column: &Column| batch.records().column_by_name(column.name()).cloned();
        NewColumns::with_origins(Column::ALL.iter().filter_map(|c| Some((*c, has(c)?))).collect(), origins)
    }
}

/// Why a verb failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerError(pub(crate) RankFailure);

impl WorkerError {
    /// Of this kind; the kind decides the exit code, and `Peer` says that another rank is to blame.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> WorkerError {
        WorkerError(RankFailure { cause: Cause::Handler, kind, message: message.into() })
    }
}

impl std::fmt::Display for WorkerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for WorkerError {}

/// What a rank does with calls. One object serves all roles of the rank; [`Context::role`] says whose model is meant.
pub trait Worker {
    /// Runs one verb to its end, looking at `control` between its steps where it is long.
    ///
    /// # Errors
    /// Whatever went wrong; the driver's call fails with it.
    fn call(&mut self, job: &Job, control: &Control) -> Result<Output, WorkerError>;
}

impl<F: FnMut(&Job, &Control) -> Result<Output, WorkerError>> Worker for F {
    fn call(&mut self, job: &Job, control: &Control) -> Result<Output, WorkerError> {
        self(job, control)
    }
}

struct Running {
    call: u64,
    verb: String,
    trace: String,
    since: Instant,
}

#[derive(Default)]
struct State {
    /// Calls received and not begun.
    waiting: HashSet<u64>,
    /// Those of them that nobody waits for any more.
    cancelled: HashSet<u64>,
    running: Option<Running>,
    stop: Option<RankFailure>,
    poisoned: Option<String>,
    numbers: BTreeMap<String, f64>,
    done: u64,
}

/// What a device thread looks at between the steps of a verb.
#[derive(Clone, Default)]
pub struct Control {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    version: Arc<AtomicU64>,
}

impl Control {
    /// Fails once the running verb is to stop: an admin call said so, or nobody waits for it any more. Costs one atomic
    /// read. A verb that has something to give may also return it early.
    ///
    /// # Errors
    /// Why to stop.
    pub fn check(&self) -> Result<(), WorkerError> {
        if !self.stop.load(Ordering::Acquire) {
            return Ok(());
        }
        let stop = self.lock().stop.clone();
        Err(WorkerError(stop.unwrap_or_else(|| RankFailure::new(Cause::Aborted, "told to stop"))))
    }

    /// The policy version that the driver set last.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// A number for the rank's statistics; the last of a name counts.
    pub fn record(&self, name: &str, value: f64) {
        self.lock().numbers.insert(name.to_owned(), value);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call was received; refused once the rank is poisoned.
    pub(crate) fn received(&self, call: u64) -> Result<(), RankFailure> {
        let mut state = self.lock();
        if let Some(panic) = &state.poisoned {
            return Err(RankFailure::new(Cause::Panic, format!("it panicked before: {panic}")));
        }
        state.waiting.insert(call);
        Ok(())
    }

    /// A call goes without being run.
    pub(crate) fn forget(&self, call: u64) {
        let mut state = self.lock();
        state.waiting.remove(&call);
        state.cancelled.remove(&call);
    }

    pub(crate) fn cancel(&self, call: u64) {
        let mut state = self.lock();
        if state.waiting.contains(&call) {
            state.cancelled.insert(call);
        } else if state.running.as_ref().is_some_and(|running| running.call == call) {
            self.stop_running(&mut state, RankFailure::new(Cause::Cancelled, "nobody waits for it any more"));
        }
    }

    pub(crate) fn abort(&self, failure: RankFailure) {
        let mut state = self.lock();
        if state.running.is_some() {
            self.stop_running(&mut state, failure);
        }
    }

    fn stop_running(&self, state: &mut State, failure: RankFailure) {
        state.stop = Some(failure);
        self.stop.store(true, Ordering::Release);
    }

    pub(crate) fn set_version(&self, version: u64) {
        self.version.store(version, Ordering::Release);
    }

    /// Begins a job unless it was cancelled meanwhile.
    fn begin(&self, job: &Job) -> bool {
        let mut state = self.lock();
        state.waiting.remove(&job.call);
        if state.cancelled.remove(&job.call) {
            return false;
        }
        state.stop = None;
        self.stop.store(false, Ordering::Release);
        let (role, verb) = (&job.context.role, job.request.name());
        let verb = format!("{role}.{verb}");
        state.running = Some(Running { call: job.call, verb, trace: job.context.trace.clone(), since: Instant::now() });
        true
    }

    fn end(&self, panic: Option<&str>) {
        let mut state = self.lock();
        state.running = None;
        state.done += 1;
        state.poisoned = panic.map(str::to_owned);
    }

    pub(crate) fn health(&self) -> Health {
        let state = self.lock();
        let running = state.running.as_ref();
        Health {
            running: running.map(|r| r.verb.clone()),
            running_ms: running.map_or(0, |r| r.since.elapsed().as_millis() as u64),
            trace: running.map_or_else(String::new, |r| r.trace.clone()),
            waiting: state.waiting.len(),
            poisoned: state.poisoned.clone(),
            version: self.version(),
        }
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let state = self.lock();
        let mut numbers = state.numbers.clone();
        numbers.insert("calls_done".into(), state.done as f64);
        numbers.insert("calls_waiting".into(), state.waiting.len() as f64);
        numbers
    }
}

/// Runs a job and answers it. `Err` is the panic after which the rank must end.
pub(crate) fn execute(job: Job, worker: &mut dyn Worker, control: &Control) -> Result<(), String> {
    if !control.begin(&job) {
        job.finish(Err(RankFailure::new(Cause::Cancelled, "cancelled before it began")));
        return Ok(());
    }
    // The worker is not used again after a panic.
    match std::panic::catch_unwind(AssertUnwindSafe(|| worker.call(&job, control))) {
        Ok(result) => {
            control.end(None);
            job.finish(result.map_err(|e| e.0));
            Ok(())
        }
        Err(panic) => {
            let message = panic_message(&*panic);
            control.end(Some(&message));
            job.finish(Err(RankFailure::new(Cause::Panic, format!("its handler panicked: {message}"))));
            Err(message)
        }
    }
}
