//! What long work tells whoever shows it, and how it is stopped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// How far preparation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrepareProgress {
    /// Bytes of source files (as they lie on disk) whose text was tokenised.
    pub bytes_done: u64,
    /// Bytes of all source files.
    pub bytes_total: u64,
    /// Documents so far.
    pub documents: u64,
    /// Tokens so far.
    pub tokens: u64,
}

/// Receives progress; called from the thread that asked for the work. Every method has a silent default.
pub trait Progress {
    /// A phase begins, such as `tokenising wiki`.
    fn phase(&self, _name: &str) {}
    /// Some more was done; called a few times per second and MB.
    fn update(&self, _progress: &PrepareProgress) {}
    /// Something the user should know that is no error.
    fn warn(&self, _message: &str) {}
    /// Whether to stop. What was finished is kept, and the next run goes on from there.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Says nothing.
impl Progress for () {}

/// How often a thread that waits for others asks whether to stop.
const POLL: Duration = Duration::from_millis(50);

/// Does `work` on another thread, while this one asks whether to stop and passes it on in the flag that `work` looks
/// at: [`Progress`] belongs to one thread, and some work to many.
pub(crate) fn stoppable<R: Send>(progress: &dyn Progress, work: impl FnOnce(&AtomicBool) -> R + Send) -> R {
    let stop = AtomicBool::new(progress.cancelled());
    let (done, ended) = channel::<()>();
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Dropped at the end of the work, or when it panics: that ends the waiting.
            let _done = done;
            work(&stop)
        });
        while ended.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) {
            if progress.cancelled() {
                stop.store(true, Ordering::Relaxed);
            }
        }
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// As [`stoppable`] for work that cannot be stopped half-way: nothing where it was to stop, and then the thread is left
/// to end by itself, at the latest with the process.
pub(crate) fn abandonable<R: Send + 'static>(
    progress: &dyn Progress,
    work: impl FnOnce() -> R + Send + 'static,
) -> Option<R> {
    if progress.cancelled() {
        return None;
    }
    let (answer, ended) = channel();
    let worker = thread::spawn(move || {
        // Nobody listens any more where it was to stop.
        let _ = answer.send(work());
    });
    loop {
        match ended.recv_timeout(POLL) {
            Ok(result) => return Some(result),
            Err(RecvTimeoutError::Timeout) if progress.cancelled() => return None,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    worker.join().map_or_else(|panic| std::panic::resume_unwind(panic), |()| None)
}
