//! Signals as messages: what the user or the scheduler sends, and the news that a child ended.
//!
//! The first signal asks to stop, which whoever works does at its next chance. While there are ranks, the supervisor
//! takes a second one as the wish to kill them; while there are none, it ends this process at once, whatever it is
//! busy with.

use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

/// The signals that came and were not taken yet.
#[derive(Debug)]
pub struct Inbox {
    /// In the order in which they came.
    pub signals: Receiver<i32>,
    has_ranks: Arc<AtomicBool>,
}

impl Inbox {
    /// Says that there are ranks from now on, or none: who looks after a second signal.
    pub fn set_ranks(&self, exist: bool) {
        self.has_ranks.store(exist, Ordering::SeqCst);
    }

    /// The next signal that asks to stop, if there is one.
    pub fn take(&self) -> Option<i32> {
        self.signals.try_iter().find(|signal| *signal != SIGCHLD)
    }
}

/// Listens for SIGINT, SIGTERM, SIGHUP and SIGCHLD from now on. A signal that was ignored when this process started
/// (`nohup`, a background job of a script) stays ignored.
pub fn listen() -> io::Result<Inbox> {
    let wanted = [SIGINT, SIGTERM, SIGHUP, SIGCHLD].into_iter().filter(|&signal| !is_ignored(signal));
    let mut signals = Signals::new(wanted)?;
    let (sender, receiver) = channel();
    let has_ranks = Arc::new(AtomicBool::new(false));
    let inbox = Inbox { signals: receiver, has_ranks: has_ranks.clone() };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut asked = false;
        // Ends when the receiver is gone.
        let _ = signals.forever().try_for_each(|signal| {
            if signal != SIGCHLD && std::mem::replace(&mut asked, true) && !has_ranks.load(Ordering::SeqCst) {
                std::process::exit(128 + signal);
            }
            sender.send(signal)
        });
    })?;
    Ok(inbox)
}

/// Whether a signal's disposition is to be ignored, from the mask in /proc/self/status.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_ignored_signal_is_seen_as_such() {
        // Rust's runtime ignores SIGPIPE at start and leaves SIGUSR1 alone.
        assert!(super::is_ignored(13));
        assert!(!super::is_ignored(10));
    }
}
