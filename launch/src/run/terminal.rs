//! What the user sees: a bar on a terminal, plain lines elsewhere, next to nothing with `--quiet`.
//!
//! Lines of rank 0 go where it sent them (stdout or stderr), prefixed `[rank 0]`; of other ranks only stderr is shown.
//! The bar is drawn on stderr; lines are printed above it. Warnings and errors are shown in every mode: with `--quiet`,
//! the lines of a rank's stderr that begin with `warning:` or `error:`, which is how a worker begins them.

use super::logs::Stream;
use crate::driver::{DRIVER, process_name};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tangelo_observe::{ProgressEvent, stderr_line, stdout_line};

/// How much is shown, and in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Quiet,
    Lines,
    Bar,
}

/// Handle to the terminal; clones share it.
#[derive(Clone, Debug)]
pub struct Terminal {
    mode: Mode,
    colors: bool,
    line_interval: Duration,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    bar: Option<(Shown, ProgressBar)>,
    last_line: Option<Instant>,
}

/// What the bar says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// That something goes on.
    Spinner,
    /// How much of some work is done.
    Amount,
    /// How many steps are done.
    Steps,
}

impl State {
    /// The bar of that sort, a new one in place of any other. The second is true where it is new.
    fn bar(&mut self, shown: Shown, template: impl FnOnce() -> String) -> (&ProgressBar, bool) {
        let old = self.bar.take_if(|(before, _)| *before != shown);
        if let Some((_, old)) = old {
            old.finish_and_clear();
        }
        let fresh = self.bar.is_none();
        let (_, bar) = self.bar.get_or_insert_with(|| (shown, new_bar(0, &template())));
        (bar, fresh)
    }
}

impl Terminal {
    /// A terminal for this process's stdout and stderr. Plain progress lines come at most every `line_interval`.
    pub fn new(quiet: bool, line_interval: Duration) -> Terminal {
        let on_terminal = io::stderr().is_terminal();
        let mode = match (quiet, on_terminal) {
            (true, _) => Mode::Quiet,
            (false, true) => Mode::Bar,
            (false, false) => Mode::Lines,
        };
        Terminal { mode, colors: use_colors(&io::stderr()), line_interval, state: Arc::default() }
    }

    /// A line of our own, on stderr.
    pub fn say(&self, text: &str) {
        if self.mode != Mode::Quiet {
            self.print(|| stderr_line(text));
        }
    }

    /// A line for a piece of work that begins, or a spinner.
    pub fn phase(&self, name: &str) {
        match self.mode {
            Mode::Bar => self.spin(name),
            Mode::Lines => self.say(name),
            Mode::Quiet => {}
        }
    }

    /// A warning, on stderr, in every mode.
    pub fn warn(&self, text: &str) {
        let label = self.paint("33;1", "warning:");
        self.print(|| stderr_line(format!("{label} {text}")));
    }

    /// A line that a rank wrote.
    pub fn rank_line(&self, rank: usize, stream: Stream, line: &str) {
        let shown = match (self.mode, stream) {
            (Mode::Quiet, Stream::Stderr) => line.starts_with("warning:") || line.starts_with("error:"),
            (Mode::Quiet, Stream::Stdout) => false,
            (_, Stream::Stdout) => rank == 0 || rank == DRIVER,
            (_, Stream::Stderr) => true,
        };
        match stream {
            _ if !shown => {}
            Stream::Stderr => {
                let prefix = self.paint("36", &format!("[{}]", process_name(rank)));
                self.hand_on(stream, &format!("{prefix} {line}"));
            }
            Stream::Stdout => self.hand_on(stream, &format!("[{}] {line}", process_name(rank))),
        }
    }

    /// A line of another process, to the output that it was written to, in every mode.
    pub fn hand_on(&self, stream: Stream, line: &str) {
        self.print(|| match stream {
            Stream::Stdout => stdout_line(line),
            Stream::Stderr => stderr_line(line),
        });
    }

    /// Shows progress that rank 0 reported.
    pub fn progress(&self, event: &ProgressEvent) {
        match (self.mode, event) {
            (_, ProgressEvent::Skipped { .. }) => self.warn(&line_of(event)),
            (Mode::Quiet, _) => {}
            (_, ProgressEvent::Amount { name, done, total, detail }) => self.amount(name, *done, *total, detail),
            (Mode::Bar, ProgressEvent::Step { step, steps, .. } | ProgressEvent::RlStep { step, steps, .. }) => {
                self.advance(*step, *steps, event);
            }
            (Mode::Lines, ProgressEvent::Step { step, steps, .. } | ProgressEvent::RlStep { step, steps, .. }) => {
                if self.is_line_due(*step == *steps) {
                    self.say(&line_of(event));
                }
            }
            (_, ProgressEvent::Phase { name }) => self.phase(name),
            (_, ProgressEvent::Listening { .. }) => {}
            (_, ProgressEvent::Done { .. }) => self.clear(),
            _ => self.say(&line_of(event)),
        }
    }

    /// Shows how far a piece of work is, such as the preparation of data: a bar, or a line from time to time.
    pub fn amount(&self, what: &str, done: u64, total: u64, detail: &str) {
        if self.mode != Mode::Bar {
            if self.mode == Mode::Lines && self.is_line_due(total > 0 && done >= total) {
                self.say(&amount_line(what, done, total, detail));
            }
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let template = || format!("{{prefix}} {} {{percent:>3}}%  {{msg}}  {{eta}} left", bar_part(self.colors));
        let (bar, _) = state.bar(Shown::Amount, template);
        bar.set_length(total);
        bar.set_prefix(what.to_owned());
        bar.set_message(detail.to_owned());
        bar.set_position(done);
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        let bar = self.state.lock().unwrap_or_else(PoisonError::into_inner).bar.take();
        if let Some((_, bar)) = bar {
            bar.finish_and_clear();
        }
    }

    /// Text in colour, where colours are wanted. `code` is the SGR code.
    pub fn paint(&self, code: &str, text: &str) -> String {
        if self.colors { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    fn advance(&self, step: u64, steps: u64, event: &ProgressEvent) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (template, message) = match event {
            // Steps of minutes, of which much is told: where the line is too short, the times of phases are cut off.
            ProgressEvent::RlStep { seconds, .. } => {
                let left = seconds.map(|seconds| format!("{} left", short_time((steps - step) as f64 * seconds)));
                let parts: Vec<String> = left.into_iter().chain(numbers_of(event)).collect();
                let color = if self.colors { ".cyan/dim" } else { "" };
                (format!("step {{pos}}/{{len}} {{bar:10{color}}} {{wide_msg}}"), parts.join("  "))
            }
            _ => {
                let template = format!("step {{pos}}/{{len}} {} {{msg}}  {{eta}} left", bar_part(self.colors));
                (template, numbers_of(event).join("  "))
            }
        };
        let (bar, fresh) = state.bar(Shown::Steps, || template);
        bar.set_length(steps);
        bar.set_message(message);
        bar.set_position(step);
        if fresh {
            // The first step of a resumed run must not count as this much work in no time.
            bar.reset_eta();
        }
    }

    fn spin(&self, phase: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (bar, fresh) = state.bar(Shown::Spinner, || "{spinner} {msg} ({elapsed})".into());
        bar.set_message(phase.to_owned());
        bar.reset_elapsed();
        if fresh {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
    }

    fn is_line_due(&self, last: bool) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last || state.last_line.is_none_or(|at| at.elapsed() >= self.line_interval);
        if due {
            state.last_line = Some(Instant::now());
        }
        due
    }

    fn print(&self, write: impl FnOnce()) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &state.bar {
            Some((_, bar)) => bar.suspend(write),
            None => write(),
        }
    }
}

/// Whether `stream` gets colours: a terminal, and the user did not set NO_COLOR.
pub fn use_colors(stream: &impl IsTerminal) -> bool {
    let unwanted = std::env::var_os(tangelo_core::env::NO_COLOR).is_some_and(|v| !v.is_empty());
    stream.is_terminal() && !unwanted
}

fn bar_part(colors: bool) -> &'static str {
    if colors { "{wide_bar:.cyan/dim}" } else { "{wide_bar}" }
}

fn new_bar(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr_with_hz(8));
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("━╸ "));
    bar
}

/// A plain line for an event.
pub fn line_of(event: &ProgressEvent) -> String {
    match event {
        ProgressEvent::Phase { name } => name.clone(),
        ProgressEvent::Amount { name, done, total, detail } => amount_line(name, *done, *total, detail),
        ProgressEvent::Step { step, steps, .. } | ProgressEvent::RlStep { step, steps, .. } => {
            let mut parts = vec![format!("step {step}/{steps}")];
            parts.extend(numbers_of(event));
            parts.join("  ")
        }
        ProgressEvent::Eval { step, loss, perplexity } => {
            format!("evaluation after step {step}: loss {}, perplexity {}", fixed(*loss, 4), fixed(*perplexity, 2))
        }
        ProgressEvent::Listening { address, .. } => format!("the driver listens at {address}"),
        ProgressEvent::Validation { step, text } => format!("validation after step {step}: {text}"),
        ProgressEvent::Saved { step } => format!("checkpoint of step {step} saved"),
        ProgressEvent::Skipped { step, reason } => format!("step {step} skipped: {reason}"),
        ProgressEvent::Done { step, steps } => format!("done with step {step} of {steps}"),
    }
}

/// `exporting 40 % 4 of 10 parameters`
fn amount_line(what: &str, done: u64, total: u64, detail: &str) -> String {
    let part = if total > 0 { format!("{:.0} %", 100.0 * done as f64 / total as f64) } else { String::new() };
    format!("{what} {part} {detail}").trim_end().to_owned()
}

fn numbers_of(event: &ProgressEvent) -> Vec<String> {
    match event {
        ProgressEvent::Step { loss, tokens_per_second, mfu, memory_bytes, lr, .. } => {
            let mut parts = vec![format!("loss {}", fixed(*loss, 4))];
            parts.extend(lr.map(|v| format!("lr {v:.2e}")));
            parts.extend(tokens_per_second.map(|v| format!("{} tokens/s", short_count(v))));
            parts.extend(mfu.map(|v| format!("MFU {:.1}%", 100.0 * v)));
            parts.extend(memory_bytes.map(|v| format!("{:.2} GiB", v as f64 / (1u64 << 30) as f64)));
            parts
        }
        ProgressEvent::RlStep { reward, kl, response_length, seconds, phases, .. } => {
            let mut parts = vec![format!("reward {}", fixed(*reward, 3))];
            parts.extend(kl.map(|v| if v == 0.0 { "KL 0".to_owned() } else { format!("KL {v:.1e}") }));
            parts.extend(response_length.map(|v| format!("length {v:.0}")));
            parts.extend(seconds.map(|v| format!("{v:.1} s{}", phases_of(phases, v))));
            parts
        }
        _ => Vec::new(),
    }
}

/// `: generating 3.0, learning 8.2`, of phases that take a part of the step that can be seen; else nothing.
fn phases_of(phases: &[(String, f64)], step: f64) -> String {
    let seen = phases.iter().filter(|(_, seconds)| *seconds >= 0.01 * step);
    let seen: Vec<String> = seen.map(|(name, seconds)| format!("{name} {seconds:.1}")).collect();
    if seen.is_empty() { String::new() } else { format!(": {}", seen.join(", ")) }
}

fn fixed(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "not finite".into(), |v| format!("{v:.digits$}"))
}

/// `45 s`, `12 min`, `3.4 h`.
fn short_time(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// `950`, `12.3k`, `4.56M`.
pub fn short_count(value: f64) -> String {
    match value.abs() {
        v if v >= 1e9 => format!("{:.2}G", value / 1e9),
        v if v >= 1e6 => format!("{:.2}M", value / 1e6),
        v if v >= 1e4 => format!("{:.1}k", value / 1e3),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    fn check(event: &str, expected: Expect) {
        expected.assert_eq(&line_of(&serde_json::from_str(event).unwrap()));
    }

    #[test]
    fn plain_lines() {
        check(
            r#"{"event":"step","step":3,"steps":100,"loss":5.125,"tokens_per_second":12345.6,"mfu":0.314,"memory_bytes":1610612736,"lr":0.0003}"#,
            expect!["step 3/100  loss 5.1250  lr 3.00e-4  12.3k tokens/s  MFU 31.4%  1.50 GiB"],
        );
        check(r#"{"event":"step","step":3,"steps":100,"loss":null}"#, expect!["step 3/100  loss not finite"]);
        check(
            r#"{"event":"eval","step":9,"loss":2.5,"perplexity":12.18}"#,
            expect!["evaluation after step 9: loss 2.5000, perplexity 12.18"],
        );
        check(r#"{"event":"saved","step":9}"#, expect!["checkpoint of step 9 saved"]);
        check(r#"{"event":"phase","name":"loading model"}"#, expect!["loading model"]);
        check(
            r#"{"event":"amount","name":"exporting","done":4,"total":10,"detail":"4 of 10 parameters"}"#,
            expect!["exporting 40 % 4 of 10 parameters"],
        );
        check(
            r#"{"event":"rl_step","step":3,"steps":40,"reward":0.168,"kl":0.0131,"response_length":13.4,"seconds":62.2,"phases":[["generating",30.5],["rewards",0.01],["learning",23.7]]}"#,
            expect!["step 3/40  reward 0.168  KL 1.3e-2  length 13  62.2 s: generating 30.5, learning 23.7"],
        );
        check(
            r#"{"event":"rl_step","step":3,"steps":40,"kl":0.0,"seconds":0.5}"#,
            expect!["step 3/40  reward not finite  KL 0  0.5 s"],
        );
        check(r#"{"event":"skipped","step":9,"reason":"loss NaN"}"#, expect!["step 9 skipped: loss NaN"]);
    }

    #[test]
    fn times_are_short() {
        assert_eq!([45.2, 99.0, 700.0, 12_240.0].map(short_time), ["45 s", "99 s", "12 min", "3.4 h"]);
    }

    #[test]
    fn counts_are_short() {
        let counts = [0.4, 999.0, 9999.0, 12_345.0, 4_560_000.0, 7.8e9].map(short_count);
        assert_eq!(counts, ["0", "999", "9999", "12.3k", "4.56M", "7.80G"]);
    }
}
