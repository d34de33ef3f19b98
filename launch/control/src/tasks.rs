//! The tasks of a process, by name; the first that fails tells.

use crate::error::log;
use futures::FutureExt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Mutex, PoisonError};
use tokio::task::JoinSet;

type OnFailure = Box<dyn Fn(String) + Send + Sync>;

/// Named tasks that end when this is dropped. A task that fails or panics is reported once; whoever owns the set then
/// ends the process's part in the job.
pub(crate) struct Tasks {
    set: Mutex<JoinSet<()>>,
    failure: std::sync::Arc<OnFailure>,
}

impl Tasks {
    /// `on_failure` is called with what happened to which task.
    pub fn new(on_failure: impl Fn(String) + Send + Sync + 'static) -> Tasks {
        Tasks { set: Mutex::default(), failure: std::sync::Arc::new(Box::new(on_failure)) }
    }

    /// Starts a task.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = Result<(), String>> + Send + 'static) {
        let failure = self.failure.clone();
        let watched = async move {
            let outcome = match AssertUnwindSafe(task).catch_unwind().await {
                Ok(outcome) => outcome,
                Err(panic) => Err(format!("panicked: {}", panic_message(&*panic))),
            };
            if let Err(what) = outcome {
                let what = format!("task `{name}` failed: {what}");
                log(&what);
                failure(what);
            }
        };
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that ended are forgotten here, so that the set stays as small as what runs.
        while set.try_join_next().is_some() {}
        set.spawn(watched);
    }

    /// Ends all of them.
    pub fn abort(&self) {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a message".into())
}
