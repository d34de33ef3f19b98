//! Long work in this process, such as preparing data, shown on the terminal.

use crate::run::{Terminal, short_count};
use std::cell::RefCell;
use tangelo_data::{PrepareProgress, Progress};

/// Shows the progress of data work, and asks `cancelled` whether to go on.
pub struct DataProgress<'a> {
    terminal: &'a Terminal,
    cancelled: &'a dyn Fn() -> bool,
    phase: RefCell<String>,
}

impl<'a> DataProgress<'a> {
    /// Work that `cancelled` may stop.
    pub fn new(terminal: &'a Terminal, cancelled: &'a dyn Fn() -> bool) -> DataProgress<'a> {
        DataProgress { terminal, cancelled, phase: RefCell::default() }
    }
}

impl Progress for DataProgress<'_> {
    fn phase(&self, name: &str) {
        // The same phase twice in a row, of a tokenizer and then of the tokens, is one to the user.
        if self.phase.replace(name.to_owned()) != name {
            self.terminal.phase(name);
        }
    }

    fn update(&self, progress: &PrepareProgress) {
        let (documents, tokens) = (short_count(progress.documents as f64), short_count(progress.tokens as f64));
        let detail = format!("{documents} documents  {tokens} tokens");
        self.terminal.amount(&self.phase.borrow(), progress.bytes_done, progress.bytes_total, &detail);
    }

    fn warn(&self, message: &str) {
        self.terminal.warn(message);
    }

    fn cancelled(&self) -> bool {
        (self.cancelled)()
    }
}
