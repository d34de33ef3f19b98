//! The output of a rank: every byte to its log file, lines to the terminal.
//!
//! ```text
//! rank's stdout -- pipe --> thread --+--> RUN/logs/rank-00003.log (whole lines of both, as they come)
//! rank's stderr -- pipe --> thread --+--> terminal, prefixed (rank 0: both; other ranks: stderr)
//! ```
//! A thread ends when every holder of its pipe is gone. A log that cannot be written is said once; the pipe is still
//! drained, so that a full disk does not stop training.

use super::Terminal;
use crate::driver::file_stem;
use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Which of a process's two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A line longer than this is cut into several, so that output without line ends stays bounded in memory.
const LONGEST_LINE_BYTES: u64 = 1 << 16;

/// Where the logs of one attempt go.
#[derive(Clone, Debug)]
pub struct LogFolder {
    folder: PathBuf,
    attempt: usize,
}

impl LogFolder {
    /// The logs of a new attempt of `ranks`: no file of an earlier attempt is touched.
    pub fn new_attempt(run_folder: &Path, ranks: &[usize]) -> std::io::Result<LogFolder> {
        let folder = run_folder.join("logs");
        std::fs::create_dir_all(&folder)?;
        let mut logs = LogFolder { folder, attempt: 0 };
        while ranks.iter().any(|&rank| logs.path(rank).exists()) {
            logs.attempt += 1;
        }
        Ok(logs)
    }

    /// The log of a rank: `rank-00003.log`, later attempts `rank-00003.1.log` and so on.
    pub fn path(&self, rank: usize) -> PathBuf {
        self.file(rank, "log")
    }

    /// Where a rank leaves its last error.
    pub fn error_path(&self, rank: usize) -> PathBuf {
        self.file(rank, "error.json")
    }

    /// Where a rank says in which collective it is.
    pub fn position_path(&self, rank: usize) -> PathBuf {
        self.file(rank, "position")
    }

    fn file(&self, rank: usize, extension: &str) -> PathBuf {
        let name = file_stem(rank);
        match self.attempt {
            0 => self.folder.join(format!("{name}.{extension}")),
            n => self.folder.join(format!("{name}.{n}.{extension}")),
        }
    }
}

/// The threads that carry the output of one rank.
#[derive(Debug)]
pub struct Forwarder {
    threads: Vec<JoinHandle<()>>,
}

impl Forwarder {
    /// Starts carrying.
    pub fn start(
        rank: usize,
        log: &Path,
        stdout: PipeReader,
        stderr: PipeReader,
        terminal: &Terminal,
    ) -> std::io::Result<Forwarder> {
        let file = Arc::new(Mutex::new(Some(File::create(log)?)));
        let start = |pipe, stream| {
            let (file, terminal, log) = (file.clone(), terminal.clone(), log.to_owned());
            std::thread::Builder::new()
                .name(format!("log {rank}"))
                .spawn(move || carry(pipe, &file, &log, |line| terminal.rank_line(rank, stream, line)))
        };
        Ok(Forwarder { threads: vec![start(stdout, Stream::Stdout)?, start(stderr, Stream::Stderr)?] })
    }

    /// Waits for the rest of the output, but not for a stray process that keeps the pipe open.
    pub fn finish(self, patience: Duration) {
        self.threads.iter().for_each(|thread| wait_for(thread, patience));
    }
}

/// Waits for a thread, but not longer than `patience`; then it is left to end with the process.
pub fn wait_for(thread: &JoinHandle<()>, patience: Duration) {
    let deadline = Instant::now() + patience;
    while !thread.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn carry(pipe: PipeReader, log: &Mutex<Option<File>>, path: &Path, mut show: impl FnMut(&str)) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    while let Ok(1..) = (&mut reader).take(LONGEST_LINE_BYTES).read_until(b'\n', &mut line) {
        if !line.ends_with(b"\n") {
            line.push(b'\n');
        }
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(e)) = log.as_mut().map(|file| file.write_all(&line)) {
            *log = None;
            show(&format!("warning: {} cannot be written: {e}; it ends here", path.display()));
        }
        drop(log);
        show(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
        line.clear();
    }
}

/// The last lines of a log; reads only its end.
pub fn last_lines(path: &Path, count: usize) -> Vec<String> {
    const TAIL_BYTES: u64 = 16 << 10;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    };
    let tail = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&tail);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].iter().map(|line| (*line).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried(input: Vec<u8>) -> (Vec<u8>, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (reader, mut writer) = std::io::pipe().unwrap();
        let sender = std::thread::spawn(move || writer.write_all(&input).unwrap());
        let mut shown = Vec::new();
        carry(reader, &Mutex::new(Some(File::create(&path).unwrap())), &path, |line| shown.push(line.to_owned()));
        sender.join().unwrap();
        (std::fs::read(path).unwrap(), shown)
    }

    #[test]
    fn whole_lines_and_odd_bytes() {
        let (log, shown) = carried(b"one\r\n\xff two\nno end".to_vec());
        assert_eq!(log, b"one\r\n\xff two\nno end\n");
        assert_eq!(shown, ["one", "\u{fffd} two", "no end"]);
    }

    #[test]
    fn output_without_line_ends_is_cut() {
        let (log, shown) = carried(vec![b'x'; 3 * LONGEST_LINE_BYTES as usize / 2]);
        assert_eq!(shown.len(), 2);
        assert_eq!(log.len(), 3 * LONGEST_LINE_BYTES as usize / 2 + 2);
    }

    #[test]
    fn attempts_do_not_overwrite_each_other() {
        let run = tempfile::tempdir().unwrap();
        for name in ["rank-00002.log", "rank-00002.1.log", "rank-00002.2.log"] {
            let logs = LogFolder::new_attempt(run.path(), &[2, 3]).unwrap();
            assert_eq!(logs.path(2), run.path().join("logs").join(name));
            std::fs::write(logs.path(2), b"a\n\nb\nc\n").unwrap();
            assert_eq!(last_lines(&logs.path(2), 2), ["b", "c"]);
        }
        assert_eq!(last_lines(&run.path().join("absent"), 2), [""; 0]);
    }
}
