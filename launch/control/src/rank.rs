//! A rank as the network sees it: it takes calls, pulls their batches, and keeps what they make.
//!
//! The work lane is read in order: a call's batch is pulled while the call before it runs, then the call waits in the
//! inbox of the device thread ([`crate::worker`]). While the inbox is full the lane is not read, and the driver's calls
//! wait: that is the back-pressure. The admin lane is answered at once, whatever the device does. A rank has one
//! driver: a second work lane is refused, and the end of the first ends the rank.

use crate::agent::{Agent, LocalRanks, json};
use crate::error::{Cause, ControlError, RankFailure};
use crate::flight::{Puller, Shelf};
use crate::host::{Host, Port, Services, serve};
use crate::link::{Frames, Node, UpSender};
use crate::registry::{LOCAL, Membership, RankEntry, Registration, Seats, number, register};
use crate::remote::Row;
use crate::secret::Guard;
use crate::store::Store;
use crate::tasks::Tasks;
use crate::traffic::Traffic;
use crate::verbs::{Admin, Answer, Made, Request, Statistics};
use crate::wire::{Down, Kind, Lane, RankAnswer, Up};
use crate::worker::{Context, Control, Finished, INBOX, Job, NewColumns, Output, Worker, execute};
use arrow::array::AsArray;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tangelo_core::{Batch, Column, env};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

/// How long an ending rank waits for its last answers to be taken.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a rank ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ended {
    Shutdown,
    Lost(String),
}

/// What a rank needs beside its membership.
#[derive(Clone, Debug)]
pub struct RankOptions {
    /// Global rank.
    pub rank: usize,
    /// What it registers: role -> mesh -> seat.
    pub seats: Seats,
    /// The most that batches held for others may take, bytes.
    pub store_limit_bytes: usize,
}

impl RankOptions {
    /// The rank of `RANK`.
    ///
    /// # Errors
    /// `RANK` is not set or no number.
    pub fn from_env(seats: Seats, store_limit_bytes: usize) -> Result<RankOptions, ControlError> {
        Ok(RankOptions { rank: number(env::RANK)?, seats, store_limit_bytes })
    }
}

pub(crate) struct RankNode {
    rank: u32,
    address: String,
    control: Control,
    store: Arc<Store>,
    puller: Puller,
    traffic: Arc<Traffic>,
    guard: Guard,
    /// Taken by the one work lane.
    intake: Mutex<Option<mpsc::Sender<Job>>>,
    ended: watch::Sender<Option<Ended>>,
    /// The driver said that the job is over: it may go now.
    over: AtomicBool,
}

/// A rank that serves. The thread that owns the device calls [`Rank::run`].
pub struct Rank {
    node: Arc<RankNode>,
    inbox: mpsc::Receiver<Job>,
    tasks: Arc<Tasks>,
    host: Option<Host>,
    runtime: Handle,
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Tasks hold what holds them.
        self.tasks.abort();
    }
}

impl Rank {
    /// Binds a free port, registers with the driver, serves from then on.
    ///
    /// # Errors
    /// No port, no driver, or a driver that refuses.
    pub async fn start(member: &Membership, options: RankOptions) -> Result<Rank, ControlError> {
        let port = Port::bind(&member.host).await?;
        let address = port.address.clone();
        let (mut rank, guard) = Rank::build(member, &options, address.clone())?;
        let (store, traffic) = (rank.node.store.clone(), rank.node.traffic.clone());
        let shelf = Some(Shelf { store, traffic });
        let services = Services { node: Some(rank.node.clone()), shelf, registrar: None };
        rank.host = Some(serve(port, services, guard, &rank.tasks));
        let entry = RankEntry { rank: options.rank, address, seats: options.seats };
        let new = Registration { job: member.job.clone(), node: member.node, agent: None, ranks: vec![entry] };
        register(member, &new).await?;
        Ok(rank)
    }

    /// Ranks that live in the process of their agent, as tasks: they take calls, but hold no batches for others.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub async fn simulated(member: &Membership, options: Vec<RankOptions>) -> Result<(Agent, Vec<Rank>), ControlError> {
        let mut ranks = Vec::new();
        let mut local: LocalRanks = Vec::new();
        for options in options {
            let (rank, _) = Rank::build(member, &options, LOCAL.into())?;
            local.push((options.rank as u32, rank.node.clone(), options.seats));
            ranks.push(rank);
        }
        Ok((Agent::with_ranks(member, local).await?, ranks))
    }

    fn build(member: &Membership, options: &RankOptions, address: String) -> Result<(Rank, Guard), ControlError> {
        let (rank, traffic) = (options.rank as u32, Arc::new(Traffic::default()));
        let store = Arc::new(Store::new(rank, options.store_limit_bytes));
        let (jobs, inbox) = mpsc::channel(INBOX);
        let (ended, _) = watch::channel(None);
        let guard = Guard::new(member.secret.clone(), &format!("rank {rank}"));
        let on_failure = ended.clone();
        let tasks = Arc::new(Tasks::new(move |what| {
            on_failure.send_replace(Some(Ended::Lost(what)));
        }));
        let puller = Puller::new(store.clone(), address.clone(), traffic.clone(), &member.secret)?;
        let node = Arc::new(RankNode {
            rank,
            address,
            control: Control::default(),
            store,
            puller,
            traffic,
            guard: guard.clone(),
            intake: Mutex::new(Some(jobs)),
            ended,
            over: AtomicBool::new(false),
        });
        Ok((Rank { node, inbox, tasks, host: None, runtime: Handle::current() }, guard))
    }

    /// Runs calls on this thread, which must not be one of the runtime's, until the driver says that the job is over.
    ///
    /// # Errors
    /// A panic of the worker, or the loss of the driver.
    pub fn run(mut self, worker: &mut dyn Worker) -> Result<(), ControlError> {
        let mut panic = None;
        while let Some(job) = self.inbox.blocking_recv() {
            let (finished, panicked) = execute(job, worker, &self.node.control);
            let (up, answer) = self.node.keep(finished);
            up.blocking_send(answer);
            panic = panicked;
            if panic.is_some() {
                break;
            }
        }
        let runtime = self.runtime.clone();
        runtime.block_on(self.finish(panic))
    }

    /// As [`Rank::run`], as a task: for handlers that return at once.
    ///
    /// # Errors
    /// As [`Rank::run`].
    pub async fn run_as_task(mut self, mut worker: impl Worker + Send) -> Result<(), ControlError> {
        let mut panic = None;
        while let Some(job) = self.inbox.recv().await {
            let (finished, panicked) = execute(job, &mut worker, &self.node.control);
            let (up, answer) = self.node.keep(finished);
            up.send(answer).await;
            panic = panicked;
            if panic.is_some() {
                break;
            }
        }
        self.finish(panic).await
    }

    /// Lets the last answers out, then ends.
    async fn finish(mut self, panic: Option<String>) -> Result<(), ControlError> {
        let ended = self.node.end(Ended::Lost("it ended".into()));
        self.inbox.close();
        while self.inbox.try_recv().is_ok() {}
        // The lanes end with `ended`, once what was said on them is sent.
        if let Some(host) = &mut self.host {
            host.close(LAST_WORDS).await;
        }
        let action = format!("rank {}", self.node.rank);
        let failure = match (panic, ended) {
            (Some(panic), _) => RankFailure::new(Cause::Panic, panic),
            (None, Ended::Lost(how)) => RankFailure::new(Cause::Lost, how),
            (None, Ended::Shutdown) => return Ok(()),
        };
        Err(ControlError::Peer { action, failure })
    }
}

async fn end_of(ended: &mut watch::Receiver<Option<Ended>>) {
    // An error means that the rank itself is gone.
    let _ = ended.wait_for(Option::is_some).await;
}

impl Node for RankNode {
    fn serve(self: Arc<Self>, lane: Lane, frames: Frames, up: UpSender) -> BoxFuture<'static, ()> {
        match lane {
            Lane::Work => self.work(frames, up).boxed(),
            Lane::Admin => self.admin(frames, up).boxed(),
        }
    }
}

impl RankNode {
    fn take_intake(&self) -> Option<mpsc::Sender<Job>> {
        self.intake.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Ends the rank, unless it has ended for another reason: that one is returned.
    fn end(&self, why: Ended) -> Ended {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(why.clone());
            first
        });
        self.ended.borrow().clone().unwrap_or(why)
    }

    async fn work(self: Arc<Self>, mut frames: Frames, up: UpSender) {
        let Some(jobs) = self.take_intake() else {
            return self.refuse(frames, &up).await;
        };
        let mut ended = self.ended.subscribe();
        loop {
            tokio::select! {
                frame = frames.next() => match frame {
                    Some(frame) => self.take_call(frame, &jobs, &up).await,
                    None => return self.parent_gone(),
                },
                () = end_of(&mut ended) => return,
            }
        }
    }

    /// The end, as it should be once the driver has said so; what runs then may finish.
    fn parent_gone(&self) {
        if self.over.load(Ordering::Acquire) {
            self.end(Ended::Shutdown);
            return;
        }
        let lost = "the connection to the node agent is gone";
        self.control.abort(RankFailure::new(Cause::Lost, lost));
        self.end(Ended::Lost(lost.into()));
    }

    async fn refuse(&self, mut frames: Frames, up: &UpSender) {
        while let Some(frame) = frames.next().await {
            let failure = RankFailure::new(Cause::Protocol, "it has a driver already");
            up.send(self.failed(frame.call, &failure)).await;
        }
    }

    /// Makes a job of a frame, batch included, and waits for room in the inbox.
    async fn take_call(&self, frame: Down, jobs: &mpsc::Sender<Job>, up: &UpSender) {
        let call = frame.call;
        let prepared = match self.control.received(call) {
            Ok(()) => self.prepare(frame, up).await,
            Err(failure) => Err(failure),
        };
        match prepared {
            Ok(job) => {
                if jobs.send(job).await.is_err() {
                    let failure = RankFailure::new(Cause::Lost, "its device thread has ended");
                    up.send(self.failed(call, &failure)).await;
                }
            }
            Err(failure) => {
                self.control.forget(call);
                up.send(self.failed(call, &failure)).await;
            }
        }
    }

    async fn prepare(&self, frame: Down, up: &UpSender) -> Result<Job, RankFailure> {
        let body = frame.payloads.first().map_or(&[][..], |body| body);
        let request: Request = serde_json::from_slice(body)
            .map_err(|e| RankFailure::new(Cause::Protocol, format!("not a request: {e}")))?;
        let timeout = Duration::from_millis(frame.timeout_ms);
        let context = Context {
            rank: self.rank as usize,
            role: frame.role,
            step: frame.step,
            trace: frame.trace,
            deadline: Instant::now() + timeout,
            answers: frame.targets.first().is_some_and(|target| target.answers),
        };
        let batch = match request.batch() {
            None => None,
            Some(handle) => {
                let late = || RankFailure::new(Cause::Deadline, format!("pulling its batch took over {timeout:?}"));
                let records = tokio::time::timeout(timeout, self.puller.pull(handle)).await.map_err(|_| late())??;
                let batch = Batch::new(records);
                Some(batch.map_err(|e| RankFailure::new(Cause::Protocol, format!("its batch: {e}")))?)
            }
        };
        Ok(Job { context, request, batch, call: frame.call, up: up.clone() })
    }

    fn failed(&self, call: u64, failure: &RankFailure) -> Up {
        let failures = vec![RankAnswer { rank: self.rank, payload: json(failure) }];
        Up { call, failures, complete: true, ..Up::default() }
    }

    fn answered(&self, call: u64, payload: Bytes) -> Up {
        Up { call, answers: vec![RankAnswer { rank: self.rank, payload }], complete: true, ..Up::default() }
    }

    async fn admin(self: Arc<Self>, mut frames: Frames, up: UpSender) {
        let mut ended = self.ended.subscribe();
        loop {
            let frame = tokio::select! {
                frame = frames.next() => frame,
                () = end_of(&mut ended) => None,
            };
            let Some(frame) = frame else { return };
            if frame.kind() == Kind::Cancel {
                self.control.cancel(frame.call);
                continue;
            }
            let body = frame.payloads.first().map_or(&[][..], |body| body);
            let answer =
                serde_json::from_slice(body).and_then(|admin| self.administrate(admin, frame.step)).map_or_else(
                    |e| self.failed(frame.call, &RankFailure::new(Cause::Protocol, format!("not an admin call: {e}"))),
                    |payload| self.answered(frame.call, payload),
                );
            up.send(answer).await;
        }
    }

    fn administrate(&self, admin: Admin, step: u64) -> Result<Bytes, serde_json::Error> {
        match admin {
            Admin::Health => return serde_json::to_vec(&self.control.health()).map(Bytes::from),
            Admin::Statistics => return serde_json::to_vec(&self.statistics()).map(Bytes::from),
            Admin::Drop { shards } => self.store.drop_shards(&shards, step),
            Admin::EndStep { step } => self.store.end_step(step),
            Admin::SetVersion { version } => self.control.set_version(version),
            Admin::Abort => self.control.abort(RankFailure::new(Cause::Aborted, "an admin call stopped it")),
            Admin::Shutdown => self.over.store(true, Ordering::Release),
        }
        Ok(Bytes::new())
    }

    fn statistics(&self) -> Statistics {
        let mut numbers = self.control.statistics();
        let (shards, bytes) = self.store.usage();
        let traffic = self.traffic.report();
        for (name, value) in [
            ("batches_held", shards as u64),
            ("batches_held_bytes", bytes as u64),
            ("data_sent_bytes", traffic.data_sent_bytes),
            ("data_received_bytes", traffic.data_received_bytes),
            ("strangers_refused", self.guard.refused()),
        ] {
            numbers.insert(name.into(), value as f64);
        }
        numbers
    }

    /// Keeps what a job made, and says so: what, and where to.
    fn keep(&self, finished: Finished) -> (UpSender, Up) {
        let Finished { call, context, request, up, result } = finished;
        let kept = result.and_then(|output| self.keep_output(output, &context, &request));
        let encoded = kept.and_then(|answer| match answer {
            // Most answers have nothing to say; with a thousand ranks, saying so costs the driver milliseconds.
            None => Ok(Bytes::new()),
            Some(answer) if answer == Answer::default() => Ok(Bytes::new()),
            Some(answer) => serde_json::to_vec(&answer)
                .map(Bytes::from)
                .map_err(|e| RankFailure::new(Cause::Protocol, format!("its answer cannot be written: {e}"))),
        });
        let answer = encoded.map_or_else(|failure| self.failed(call, &failure), |body| self.answered(call, body));
        (up, answer)
    }

    fn keep_output(&self, output: Output, context: &Context, request: &Request) -> Result<Option<Answer>, RankFailure> {
        if !context.answers {
            return Ok(None);
        }
        let Output { metrics, columns, detail } = output;
        let made = columns.map(|columns| self.keep_columns(columns, context, request)).transpose()?;
        Ok(Some(Answer { metrics, made, detail }))
    }

    fn keep_columns(&self, new: NewColumns, context: &Context, request: &Request) -> Result<Made, RankFailure> {
        let rows = rows_of(&new, request.batch().map_or(&[], |batch| batch.rows()))?;
        let shard = self.store.put(new.records, context.step, &context.trace)?;
        Ok(Made { shard, address: self.address.clone(), columns: new.columns, rows, origins: new.origins })
    }
}

/// Tokens and group of each new row: from its own columns where it has them, else from the row it came from.
fn rows_of(new: &NewColumns, sources: &[Row]) -> Result<Vec<Row>, RankFailure> {
    let per_token = new.columns.iter().position(|column| column.per_token());
    let lengths = per_token.and_then(|at| new.records.column(at).as_list_opt::<i64>());
    let groups = new.columns.iter().position(|&column| column == Column::GroupId);
    let groups = groups.and_then(|at| {
        new.records.column(at).as_primitive_opt::<arrow::datatypes::Int64Type>().map(|array| array.values().to_vec())
    });
    let row = |(row, &origin): (usize, &u32)| {
        let source = sources.get(origin as usize).ok_or_else(|| {
            let have = sources.len();
            RankFailure::new(Cause::Protocol, format!("it made a row from row {origin} of {have}"))
        })?;
        Ok(Row {
            tokens: lengths.map_or(source.tokens, |list| list.value_length(row) as u32),
            group: groups.as_ref().map_or(source.group, |groups| groups[row]),
        })
    };
    new.origins.iter().enumerate().map(row).collect()
}
