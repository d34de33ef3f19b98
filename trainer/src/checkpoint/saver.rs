//! The saver: one thread per rank that turns snapshots into files while training goes on.

use super::commit::{Commit, SaveObserver};
use super::{CheckpointError, Retention, Snapshot, TrainState, folder};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tangelo_configs::ModelSpec;

/// What a [`Saver`] needs to know. The same on every rank but for `rank`.
#[derive(Clone)]
pub struct SaverOptions {
    /// The checkpoint folder, shared by all ranks; it is made where it is absent.
    pub folder: PathBuf,
    /// This rank.
    pub rank: usize,
    /// Ranks that write.
    pub world_size: usize,
    /// A name that no other start of this run has, made by rank 0 and broadcast: letters, digits, `-` and `_`.
    pub attempt: String,
    /// The step that this attempt resumed from: later checkpoints in the folder are set aside (all, where `None`).
    pub resumed_from: Option<u64>,
    /// What is kept.
    pub retention: Retention,
    /// Whether [`Saver::save`] returns while files are being written.
    pub asynchronous: bool,
    /// How long rank 0 waits for the others' files.
    pub rank_deadline: Duration,
    /// The resolved job, for the manifest.
    pub config_toml: String,
    /// The architecture, for the manifest.
    pub model: ModelSpec,
    /// Called at each stage of each save, on the saver thread.
    pub observer: Option<SaveObserver>,
}

/// A save that ended well.
#[derive(Clone, Debug, PartialEq)]
pub struct SaveReport {
    /// The step.
    pub step: u64,
    /// Rank 0: the complete checkpoint. Others: where rank 0 puts it.
    pub path: PathBuf,
    /// Bytes of tensors that this rank wrote.
    pub size_bytes: usize,
    /// Seconds from handing over the snapshot to the end, on the saver thread.
    pub seconds: f64,
    /// Rank 0: pruning failed. The checkpoint is complete all the same.
    pub prune_error: Option<String>,
}

type Done = (Vec<f32>, Result<SaveReport, CheckpointError>);
type Fill = Box<dyn FnOnce(&mut Snapshot) + Send>;

/// A snapshot, and what copies the state into it if that is yet to be done.
struct Job {
    snapshot: Snapshot,
    fill: Option<Fill>,
}

/// Saves snapshots on a thread of its own, one at a time.
pub struct Saver {
    jobs: Option<SyncSender<Job>>,
    copied: Receiver<()>,
    copying: bool,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    abandon: Arc<AtomicBool>,
    asynchronous: bool,
    in_flight: bool,
    waited: Duration,
    arena: Vec<f32>,
    reports: VecDeque<SaveReport>,
    error: Option<CheckpointError>,
}

impl Saver {
    /// Starts the thread. Rank 0 first removes what killed attempts left unfinished and sets aside checkpoints later
    /// than `resumed_from`: every rank must have chosen (best: been told) what to resume from before rank 0 starts.
    pub fn start(options: SaverOptions) -> Result<Saver, CheckpointError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        assert!(!options.attempt.is_empty() && options.attempt.chars().all(plain), "attempt {:?}", options.attempt);
        std::fs::create_dir_all(&options.folder).map_err(CheckpointError::io("create", &options.folder))?;
        if options.rank == 0 {
            folder::remove_stale(&options.folder, &options.attempt)?;
            folder::supersede(&options.folder, &options.attempt, options.resumed_from)?;
        }
        let (jobs, inbox) = sync_channel(1);
        let (outbox, done) = sync_channel(1);
        let (copies, copied) = sync_channel(1);
        let abandon = Arc::new(AtomicBool::new(false));
        let (asynchronous, gone, path) = (options.asynchronous, abandon.clone(), options.folder.clone());
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || serve(&options, &inbox, &copies, &outbox, &gone))
            .map_err(CheckpointError::io("start a thread for", &path))?;
        Ok(Saver {
            jobs: Some(jobs),
            copied,
            copying: false,
            done,
            thread: Some(thread),
            abandon,
            asynchronous,
            in_flight: false,
            waited: Duration::ZERO,
            arena: Vec::new(),
            reports: VecDeque::new(),
            error: None,
        })
    }

    /// Makes room for snapshots of `num_elements`, so that not even the first one waits for memory (the page
    /// faults of fresh memory take longer than the copy). Without it, room is made as the first snapshot grows.
    pub fn reserve(&mut self, num_elements: usize) {
        const PAGE_ELEMENTS: usize = 1024;
        self.wait();
        if self.arena.len() < num_elements {
            self.arena = vec![0f32; num_elements];
            self.arena.iter_mut().step_by(PAGE_ELEMENTS).for_each(|element| *std::hint::black_box(element) = 0.0);
        }
    }

    /// An empty snapshot in the memory of the one before; waits until that is written.
    pub fn begin(&mut self, state: TrainState) -> Snapshot {
        self.wait();
        Snapshot::new(state, std::mem::take(&mut self.arena))
    }

    /// Hands over a snapshot; the answer is how long this and [`Saver::begin`] waited for the save before.
    ///
    /// An error is that of an earlier save where saving is asynchronous, and this one has been started all the same:
    /// going on is a sound answer to it. Otherwise it is this save's.
    pub fn save(&mut self, snapshot: Snapshot) -> Result<Duration, CheckpointError> {
        self.hand_over(snapshot, None)
    }

    /// As [`Saver::save`], but `fill` copies the state on the saver thread, while the next step's forward and backward
    /// run: what it reads must not change until [`Saver::fence`] has returned, which belongs before every update.
    pub fn save_lazily(
        &mut self,
        snapshot: Snapshot,
        fill: impl FnOnce(&mut Snapshot) + Send + 'static,
    ) -> Result<Duration, CheckpointError> {
        self.hand_over(snapshot, Some(Box::new(fill)))
    }

    /// Waits until the state given to [`Saver::save_lazily`] has been copied; how long that took. Free where it has.
    pub fn fence(&mut self) -> Duration {
        if !std::mem::take(&mut self.copying) {
            return Duration::ZERO;
        }
        let started = Instant::now();
        if self.copied.recv().is_err() {
            self.died();
        }
        started.elapsed()
    }

    fn hand_over(&mut self, snapshot: Snapshot, fill: Option<Fill>) -> Result<Duration, CheckpointError> {
        self.wait();
        let waited = std::mem::take(&mut self.waited);
        let jobs = self.jobs.as_ref().ok_or(CheckpointError::ThreadDied)?;
        self.copying = fill.is_some();
        self.in_flight = true;
        if jobs.send(Job { snapshot, fill }).is_err() {
            self.died();
        } else if !self.asynchronous {
            self.wait();
            self.waited = Duration::ZERO;
        }
        self.error.take().map_or(Ok(waited), Err)
    }

    /// The next save that ended since the last call, without waiting; its error if it failed.
    pub fn poll(&mut self) -> Result<Option<SaveReport>, CheckpointError> {
        if self.in_flight {
            match self.done.try_recv() {
                Ok(done) => {
                    self.fence();
                    self.settle(done);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.died(),
            }
        }
        self.error.take().map_or_else(|| Ok(self.reports.pop_front()), Err)
    }

    /// Waits until nothing is being written; the reports not yet polled.
    pub fn finish(&mut self) -> Result<Vec<SaveReport>, CheckpointError> {
        self.wait();
        self.error.take().map_or_else(|| Ok(self.reports.drain(..).collect()), Err)
    }

    fn wait(&mut self) {
        if !self.in_flight {
            return;
        }
        let started = Instant::now();
        self.fence();
        if !self.in_flight {
            return;
        }
        match self.done.recv() {
            Ok(done) => self.settle(done),
            Err(_) => self.died(),
        }
        self.waited += started.elapsed();
    }

    fn settle(&mut self, (arena, result): Done) {
        self.in_flight = false;
        self.arena = arena;
        match result {
            Ok(report) => self.reports.push_back(report),
            Err(error) => self.error = Some(error),
        }
    }

    fn died(&mut self) {
        (self.in_flight, self.copying) = (false, false);
        self.jobs = None;
        self.error = Some(CheckpointError::ThreadDied);
    }
}

impl Drop for Saver {
    /// Gives up a save in flight ([`Saver::finish`] waits for it): the process is ending, its peers may be dead.
    fn drop(&mut self) {
        self.abandon.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn serve(
    options: &SaverOptions,
    inbox: &Receiver<Job>,
    copies: &SyncSender<()>,
    outbox: &SyncSender<Done>,
    abandon: &AtomicBool,
) {
    for Job { mut snapshot, fill } in inbox {
        let started = Instant::now();
        if let Some(fill) = fill {
            fill(&mut snapshot);
            if copies.send(()).is_err() {
                return;
            }
        }
        let commit = Commit { options, snapshot: &snapshot, abandon };
        let result = commit.run().map(|path| {
            let prune_error =
                (options.rank == 0).then(|| commit.prune().err()).flatten().map(|error| error.to_string());
            let (step, size_bytes) = (snapshot.state.step, snapshot.size_bytes());
            SaveReport { step, path, size_bytes, seconds: started.elapsed().as_secs_f64(), prune_error }
        });
        if outbox.send((snapshot.into_arena(), result)).is_err() {
            return;
        }
    }
}
