//! The one OS thread that owns a rank's device, model and communicators.
//!
//! ```text
//!   any thread                        queue (mutex, condition variable)                 device thread
//!   submit / control  ---- job ---->  control: first | jobs: bounded, in order  ------> runs one job at a time
//!   Pending::wait     <--------------- one answer per job --------------------------------'
//! ```
//!
//! | who | consumes | waits for | unblocked by | bounded by |
//! |---|---|---|---|---|
//! | device thread | jobs, control first | a job | submit, control, close | nothing: it sleeps |
//! | submit | - | room in the queue | the thread takes a job, dies or closes | `QUEUE_LENGTH` jobs |
//! | control | - | nothing | - | `CONTROL_LENGTH` jobs, then an error |
//! | `Pending::wait` | one answer | its job | answer, panic, close | the job: deadlines are the job's business |
//! | drop | - | the running job | its end | the job; abort its communicator to hurry it |
//!
//! Invariants:
//! 1. The state is made, used and dropped on this thread; it need not be `Send`.
//! 2. A panic ends the thread's work for good: the job's submitter gets the message, and so does every later one. CUDA
//!    errors are sticky and a half-done update is worse than none, so nothing is retried here.
//! 3. Every job gets an answer: its result, or why there is none.
//! 4. The thread is joined when its handle is dropped. Jobs that had not begun are not run then.

use super::DeviceError;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;

/// Jobs that may wait; one step is one job, so a longer queue would only hide a slow device.
const QUEUE_LENGTH: usize = 8;
/// Control jobs that may wait.
const CONTROL_LENGTH: usize = 64;

type Job<S> = Box<dyn FnOnce(&mut S) -> Result<(), DeviceError> + Send>;

struct Queue<S> {
    control: VecDeque<Job<S>>,
    jobs: VecDeque<Job<S>>,
    closed: bool,
    /// The panic that ended the thread's work.
    poison: Option<DeviceError>,
}

struct Shared<S> {
    name: String,
    queue: Mutex<Queue<S>>,
    changed: Condvar,
}

impl<S> Shared<S> {
    fn lock(&self) -> MutexGuard<'_, Queue<S>> {
        // Jobs never run while the lock is held.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue<S>>) -> MutexGuard<'a, Queue<S>> {
        self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
    }

    fn closed(&self, detail: &str) -> DeviceError {
        DeviceError::Closed { thread: self.name.clone(), detail: detail.to_owned() }
    }

    /// The next job, control jobs first; `None` when closed.
    fn next(&self) -> Option<Job<S>> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            let job = queue.control.pop_front();
            if let Some(job) = job.or_else(|| queue.jobs.pop_front()) {
                self.changed.notify_all();
                return Some(job);
            }
            queue = self.wait(queue);
        }
    }

    fn poison(&self, error: DeviceError) {
        let mut queue = self.lock();
        queue.poison = Some(error);
        let waiting = (std::mem::take(&mut queue.control), std::mem::take(&mut queue.jobs));
        self.changed.notify_all();
        drop(queue);
        drop(waiting);
    }
}

/// A handle to the thread that owns a state of type `S`. It runs one job at a time; a panic ends its work for good and
/// is what every later job answers; dropping the handle joins the thread.
pub struct DeviceThread<S> {
    shared: Arc<Shared<S>>,
    handle: Option<JoinHandle<()>>,
}

/// The answer of a job, to come.
pub struct Pending<R, E> {
    receiver: Receiver<Result<R, E>>,
    /// Asked when the job vanished without an answer.
    why: Box<dyn Fn() -> DeviceError + Send>,
}

impl<R, E: From<DeviceError>> Pending<R, E> {
    /// Waits until the job has run.
    pub fn wait(self) -> Result<R, E> {
        self.receiver.recv().unwrap_or_else(|_| Err((self.why)().into()))
    }

    /// The answer, if the job has run; else this handle again.
    pub fn try_wait(self) -> Result<Result<R, E>, Pending<R, E>> {
        match self.receiver.try_recv() {
            Ok(answer) => Ok(answer),
            Err(std::sync::mpsc::TryRecvError::Empty) => Err(self),
            Err(std::sync::mpsc::TryRecvError::Disconnected) => Ok(Err((self.why)().into())),
        }
    }
}

impl<S: 'static> DeviceThread<S> {
    /// Starts the thread and waits until `init`, run on it, has made the state.
    pub fn spawn<E>(name: &str, init: impl FnOnce() -> Result<S, E> + Send + 'static) -> Result<DeviceThread<S>, E>
    where
        E: From<DeviceError> + Send + 'static,
    {
        let queue = Queue { control: VecDeque::new(), jobs: VecDeque::new(), closed: false, poison: None };
        let shared = Arc::new(Shared { name: name.to_owned(), queue: Mutex::new(queue), changed: Condvar::new() });
        let (sender, receiver) = sync_channel::<Result<(), E>>(1);
        let thread_shared = Arc::clone(&shared);
        let handle = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let answer = |answer| _ = sender.send(answer);
            match contained(&thread_shared.name, init) {
                Ok(Ok(state)) => {
                    answer(Ok(()));
                    serve(&thread_shared, state);
                }
                Ok(Err(error)) => answer(Err(error)),
                Err(panic) => answer(Err(panic.into())),
            }
        });
        let handle = handle.map_err(|error| E::from(shared.closed(&format!("cannot start: {error}"))))?;
        let thread = DeviceThread { shared, handle: Some(handle) };
        let ended = || Err(thread.shared.closed("ended without an answer").into());
        receiver.recv().unwrap_or_else(|_| ended())?;
        Ok(thread)
    }

    /// Queues a job; waits while the queue is full. The answer may be waited for, or dropped.
    pub fn submit<R, E>(&self, job: impl FnOnce(&mut S) -> Result<R, E> + Send + 'static) -> Pending<R, E>
    where
        R: Send + 'static,
        E: From<DeviceError> + Send + 'static,
    {
        let (job, pending) = self.package(job);
        let mut queue = self.shared.lock();
        while queue.poison.is_none() && !queue.closed && queue.jobs.len() >= QUEUE_LENGTH {
            queue = self.shared.wait(queue);
        }
        if queue.poison.is_none() && !queue.closed {
            queue.jobs.push_back(job);
            self.shared.changed.notify_all();
        }
        pending
    }

    /// Queues a job before all those submitted: it runs as soon as the running one ends. Never waits; an error where
    /// too many are waiting already.
    pub fn control<R, E>(&self, job: impl FnOnce(&mut S) -> Result<R, E> + Send + 'static) -> Result<Pending<R, E>, E>
    where
        R: Send + 'static,
        E: From<DeviceError> + Send + 'static,
    {
        let (job, pending) = self.package(job);
        let mut queue = self.shared.lock();
        if queue.control.len() >= CONTROL_LENGTH {
            let detail = format!("{CONTROL_LENGTH} control messages wait already: the running job takes too long");
            return Err(self.shared.closed(&detail).into());
        }
        if queue.poison.is_none() && !queue.closed {
            queue.control.push_back(job);
            self.shared.changed.notify_all();
        }
        Ok(pending)
    }

    /// Runs a job and waits for it.
    pub fn call<R, E>(&self, job: impl FnOnce(&mut S) -> Result<R, E> + Send + 'static) -> Result<R, E>
    where
        R: Send + 'static,
        E: From<DeviceError> + Send + 'static,
    {
        self.submit(job).wait()
    }

    /// The panic that ended the thread's work, if one did.
    pub fn poison(&self) -> Option<DeviceError> {
        self.shared.lock().poison.clone()
    }

    /// A job that answers through a channel, and the channel's other end.
    fn package<R, E>(&self, job: impl FnOnce(&mut S) -> Result<R, E> + Send + 'static) -> (Job<S>, Pending<R, E>)
    where
        R: Send + 'static,
        E: From<DeviceError> + Send + 'static,
    {
        let (sender, receiver) = sync_channel(1);
        let name = self.shared.name.clone();
        let job = move |state: &mut S| {
            let (answer, verdict) = match contained(&name, || job(state)) {
                Ok(answer) => (answer, Ok(())),
                Err(panic) => (Err(panic.clone().into()), Err(panic)),
            };
            _ = sender.send(answer);
            verdict
        };
        (Box::new(job), Pending { receiver, why: self.why_no_answer() })
    }

    fn why_no_answer(&self) -> Box<dyn Fn() -> DeviceError + Send> {
        let shared = Arc::clone(&self.shared);
        Box::new(move || {
            let poison = shared.lock().poison.clone();
            poison.unwrap_or_else(|| shared.closed("closed before the job ran"))
        })
    }
}

impl<S> Drop for DeviceThread<S> {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        let waiting = (std::mem::take(&mut queue.control), std::mem::take(&mut queue.jobs));
        self.shared.changed.notify_all();
        drop(queue);
        drop(waiting);
        if let Some(handle) = self.handle.take() {
            // The thread contains its panics, so there is no other error to learn of.
            _ = handle.join();
        }
    }
}

/// Runs jobs until closed or poisoned, then drops the state.
fn serve<S>(shared: &Shared<S>, mut state: S) {
    while let Some(job) = shared.next() {
        if let Err(panic) = job(&mut state) {
            shared.poison(panic);
            break;
        }
    }
    if let Err(panic) = contained(&shared.name, move || drop(state)) {
        let mut queue = shared.lock();
        queue.poison.get_or_insert(panic);
    }
}

thread_local! {
    /// Where the last panic of this thread happened.
    static PANIC_LOCATION: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs something and turns a panic into an error.
fn contained<R>(thread: &str, body: impl FnOnce() -> R) -> Result<R, DeviceError> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let location = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
            PANIC_LOCATION.with_borrow_mut(|last| *last = location);
            previous(info);
        }));
    });
    catch_unwind(AssertUnwindSafe(body)).map_err(|payload| {
        let message = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let message = message.or_else(|| payload.downcast_ref::<String>().cloned());
        DeviceError::Panicked {
            thread: thread.to_owned(),
            location: PANIC_LOCATION.with_borrow(String::clone),
            message: message.map_or_else(|| "a panic without a message".to_owned(), |text| readable(&text)),
        }
    })
}

/// Panic text without libtorch's C++ stack trace.
fn readable(message: &str) -> String {
    let message = message.split("Exception raised from").next().unwrap_or(message);
    message.replace("\\n", "\n").trim_end_matches(['\n', ' ']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;
    use tch::{Device, Kind, Tensor};

    type Answer<R> = Result<R, DeviceError>;

    /// The state is not `Send`: it is made on the thread.
    fn counter() -> DeviceThread<Rc<Cell<usize>>> {
        DeviceThread::spawn("device-0", || Answer::Ok(Rc::new(Cell::new(0)))).unwrap()
    }

    #[test]
    fn jobs_run_in_order_on_one_thread() {
        let thread = counter();
        let pending: Vec<_> = (0..50)
            .map(|i| {
                thread.submit(move |count| {
                    assert_eq!(count.replace(i + 1), i);
                    Answer::Ok(std::thread::current().name().map(str::to_owned))
                })
            })
            .collect();
        assert!(pending.into_iter().all(|p| p.wait().unwrap().as_deref() == Some("device-0")));
    }

    #[test]
    fn control_runs_before_what_waits() {
        let thread = counter();
        let (open, gate) = sync_channel::<()>(1);
        let running = thread.submit(move |_| gate.recv().map_err(|_| DeviceError::Unavailable("no gate".into())));
        let queued = thread.submit(|count| Answer::Ok(count.get()));
        let control = thread.control(|count| Answer::Ok(count.replace(7))).unwrap();
        let queued = queued.try_wait().err().unwrap();
        open.send(()).unwrap();
        running.wait().unwrap();
        assert_eq!((control.wait().unwrap(), queued.wait().unwrap()), (0, 7));
    }

    #[test]
    fn a_panic_in_libtorch_reaches_the_submitter_and_poisons() {
        let thread = counter();
        let shapes = || {
            let (a, b) = ([2i64, 3], [4i64, 5]);
            let zeros = |shape: [i64; 2]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
            zeros(a).matmul(&zeros(b))
        };
        let failing = thread.submit(move |_| Answer::Ok(shapes().numel()));
        let waiting = thread.submit(|count| Answer::Ok(count.get()));
        let text = failing.wait().unwrap_err().to_string();
        for part in ["device-0", "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("stack trace") && !text.contains("\\n"), "{text}");
        for later in [waiting, thread.submit(|count| Answer::Ok(count.get()))] {
            assert_eq!(later.wait().unwrap_err().to_string(), text);
        }
        assert!(thread.poison().is_some());
    }

    #[test]
    fn an_error_is_no_panic() {
        let thread = counter();
        let error = || DeviceError::Unavailable("no such thing".into());
        assert!(thread.call(move |_| Answer::<()>::Err(error())).is_err());
        assert_eq!(thread.call(|count| Answer::Ok(count.get())).unwrap(), 0);
        let failed = DeviceThread::<()>::spawn("device-1", move || Err(error()));
        assert!(matches!(failed, Err(DeviceError::Unavailable(_))));
        let panicked = DeviceThread::<()>::spawn("device-2", || -> Answer<()> { panic!("no memory") });
        assert!(panicked.err().unwrap().to_string().contains("no memory"));
    }

    #[test]
    fn dropping_joins_and_answers_everybody() {
        static DROPPED: AtomicUsize = AtomicUsize::new(0);
        struct State;
        impl Drop for State {
            fn drop(&mut self) {
                std::thread::sleep(Duration::from_millis(20));
                DROPPED.fetch_add(1, Ordering::SeqCst);
            }
        }
        let thread = DeviceThread::spawn("device-3", || Answer::Ok(State)).unwrap();
        let (started, begun) = sync_channel(1);
        let running = thread.submit(move |_| {
            _ = started.send(());
            std::thread::sleep(Duration::from_millis(20));
            Answer::Ok(5)
        });
        let queued = thread.submit(|_| Answer::Ok(6));
        begun.recv().unwrap();
        drop(thread);
        assert_eq!(DROPPED.load(Ordering::SeqCst), 1);
        assert_eq!(running.wait().unwrap(), 5);
        assert!(matches!(queued.wait(), Err(DeviceError::Closed { .. })));
    }
}
