//! Signals as messages: what the user or the scheduler sends, and the news that a child ended.

use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;
use std::sync::mpsc::{Receiver, channel};

/// Listens for SIGINT, SIGTERM, SIGHUP and SIGCHLD from now on. A signal that was ignored when this process started
/// (`nohup`, a background job of a script) stays ignored.
pub fn listen() -> io::Result<Receiver<i32>> {
    let wanted = [SIGINT, SIGTERM, SIGHUP, SIGCHLD].into_iter().filter(|&signal| !is_ignored(signal));
    let mut signals = Signals::new(wanted)?;
    let (sender, receiver) = channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        // Ends when the receiver is gone.
        let _ = signals.forever().try_for_each(|signal| sender.send(signal));
    })?;
    Ok(receiver)
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
