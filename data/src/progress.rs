//! What long work tells whoever shows it.

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
