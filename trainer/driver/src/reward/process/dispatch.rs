//! Which call goes to which process, and when a process has failed: decisions without processes or clocks.
//!
//! A process is timed by its oldest call, from when it was sent or became the oldest: for one that answers in order that
//! is the call's own time, for others it is no shorter. A late call fails, and the others of its process are sent again.
//! Where a process dies, each of its calls is sent again alone, so that only the guilty one fails: a process that
//! somebody killed costs no call its answer.
//!
//! Invariants: every call ends: answered, failed, or given up with all others after [`Limits::max_failures`] failures
//! with no answer in between; a process holds at most [`Limits::calls_in_flight`] calls.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The first restart is at once, each further one in a row waits twice as long, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// What a pool may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub processes: usize,
    pub calls_in_flight: usize,
    pub timeout: Duration,
    /// How long a process may take to say that it is ready.
    pub startup: Duration,
    /// Failures in a row after which every call that waits is given up.
    pub max_failures: u32,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    Start(usize),
    /// End the process; its calls are dealt with already.
    Stop(usize),
    Send(usize, u64),
    Fail(u64, Failure),
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// No answer in time.
    TimedOut,
    /// The process ended during the call.
    Died(String),
    /// The program fails whatever it is given.
    Unusable(String),
}

#[derive(Clone, Debug)]
enum Slot {
    Down { not_before: Option<Instant> },
    Starting { since: Instant },
    Up(Up),
}

#[derive(Clone, Debug)]
struct Up {
    /// In the order sent.
    in_flight: VecDeque<u64>,
    oldest_since: Instant,
    /// Its only call is one that a process died with.
    alone: bool,
    answered: bool,
}

/// The state of a pool.
#[derive(Clone, Debug)]
pub(super) struct Dispatch {
    limits: Limits,
    slots: Vec<Slot>,
    waiting: VecDeque<u64>,
    /// Calls that were under way when a process died.
    suspects: VecDeque<u64>,
    failures: u32,
    /// Every process is started once, calls or none.
    started: usize,
}

impl Dispatch {
    pub fn new(limits: Limits) -> Dispatch {
        Dispatch {
            limits,
            slots: vec![Slot::Down { not_before: None }; limits.processes],
            waiting: VecDeque::new(),
            suspects: VecDeque::new(),
            failures: 0,
            started: 0,
        }
    }

    pub fn call(&mut self, id: u64) {
        self.waiting.push_back(id);
    }

    /// A process can take calls.
    pub fn ready(&mut self, slot: usize, now: Instant) {
        if matches!(self.slots[slot], Slot::Starting { .. }) {
            let up = Up { in_flight: VecDeque::new(), oldest_since: now, alone: false, answered: false };
            self.slots[slot] = Slot::Up(up);
        }
    }

    pub fn all_ready(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot, Slot::Up(_)))
    }

    /// Whether any call is under way or waits.
    pub fn is_busy(&self) -> bool {
        let in_flight = |slot: &Slot| matches!(slot, Slot::Up(up) if !up.in_flight.is_empty());
        !self.waiting.is_empty() || !self.suspects.is_empty() || self.slots.iter().any(in_flight)
    }

    /// An answer came; false where the process has no such call (a late one, or an invented id).
    pub fn answered(&mut self, slot: usize, id: u64, now: Instant) -> bool {
        let Slot::Up(up) = &mut self.slots[slot] else { return false };
        let Some(place) = up.in_flight.iter().position(|call| *call == id) else { return false };
        up.in_flight.remove(place);
        if place == 0 {
            up.oldest_since = now;
        }
        (up.alone, up.answered) = (false, true);
        self.failures = 0;
        true
    }

    /// A process ended, or did not start.
    pub fn ended(&mut self, slot: usize, reason: &str, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        let before = std::mem::replace(&mut self.slots[slot], Slot::Down { not_before: None });
        match before {
            Slot::Up(up) if up.in_flight.is_empty() && up.answered => {}
            Slot::Up(up) => {
                // The first death of a single call may be chance: it counts where the call is the death of a second one.
                self.failures += u32::from(up.alone || up.in_flight.len() != 1);
                if up.alone {
                    let guilty = up.in_flight.into_iter();
                    actions.extend(guilty.map(|id| Action::Fail(id, Failure::Died(reason.to_owned()))));
                } else {
                    self.suspects.extend(up.in_flight);
                }
            }
            Slot::Starting { .. } => self.failures += 1,
            Slot::Down { .. } => {}
        }
        self.slots[slot] = Slot::Down { not_before: Some(now + self.pause()) };
        self.give_up(reason, &mut actions);
        actions
    }

    fn pause(&self) -> Duration {
        match self.failures {
            0 | 1 => Duration::ZERO,
            n => FIRST_PAUSE.saturating_mul(1 << (n - 2).min(10)).min(LONGEST_PAUSE),
        }
    }

    /// Fails all that waits where nothing worked for too long.
    fn give_up(&mut self, reason: &str, actions: &mut Vec<Action>) {
        if self.failures < self.limits.max_failures {
            return;
        }
        let failures = std::mem::take(&mut self.failures);
        let text = format!("{failures} failures in a row; the last: {reason}");
        let calls = self.suspects.drain(..).chain(self.waiting.drain(..));
        actions.extend(calls.map(|id| Action::Fail(id, Failure::Unusable(text.clone()))));
    }

    /// What is due at `now`.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        for slot in 0..self.slots.len() {
            self.expire(slot, now, &mut actions);
        }
        for slot in 0..self.slots.len() {
            self.start(slot, now, &mut actions);
        }
        self.send(now, &mut actions);
        actions
    }

    fn expire(&mut self, slot: usize, now: Instant, actions: &mut Vec<Action>) {
        match &mut self.slots[slot] {
            Slot::Starting { since } if now >= *since + self.limits.startup => {
                actions.push(Action::Stop(slot));
                let reason = format!("it was not ready within {} s", self.limits.startup.as_secs_f64());
                actions.extend(self.ended(slot, &reason, now));
            }
            Slot::Up(up) if !up.in_flight.is_empty() && now >= up.oldest_since + self.limits.timeout => {
                let mut calls = std::mem::take(&mut up.in_flight);
                actions.push(Action::Stop(slot));
                if let Some(late) = calls.pop_front() {
                    actions.push(Action::Fail(late, Failure::TimedOut));
                }
                calls.into_iter().rev().for_each(|id| self.waiting.push_front(id));
                self.slots[slot] = Slot::Down { not_before: Some(now) };
                self.failures += 1;
                self.give_up(&format!("no answer within {} s", self.limits.timeout.as_secs_f64()), actions);
            }
            _ => {}
        }
    }

    fn start(&mut self, slot: usize, now: Instant, actions: &mut Vec<Action>) {
        let Slot::Down { not_before } = self.slots[slot] else { return };
        let wanted = self.started < self.slots.len() || !self.waiting.is_empty() || !self.suspects.is_empty();
        if wanted && not_before.is_none_or(|time| now >= time) {
            self.started += 1;
            self.slots[slot] = Slot::Starting { since: now };
            actions.push(Action::Start(slot));
        }
    }

    fn send(&mut self, now: Instant, actions: &mut Vec<Action>) {
        while let Some(id) = self.suspects.front().copied() {
            let Some(slot) = self.least_busy(1) else { break };
            self.suspects.pop_front();
            self.hand(slot, id, true, now, actions);
        }
        // New calls wait until the suspects have their turn, or a busy pool would never have one free.
        while self.suspects.is_empty()
            && let Some(slot) = self.least_busy(self.limits.calls_in_flight)
            && let Some(id) = self.waiting.pop_front()
        {
            self.hand(slot, id, false, now, actions);
        }
    }

    /// The process with the fewest calls, of those with fewer than `limit`.
    fn least_busy(&self, limit: usize) -> Option<usize> {
        let free = self.slots.iter().enumerate().filter_map(|(index, slot)| match slot {
            Slot::Up(up) if !up.alone && up.in_flight.len() < limit => Some((up.in_flight.len(), index)),
            _ => None,
        });
        free.min().map(|(_, index)| index)
    }

    fn hand(&mut self, slot: usize, id: u64, alone: bool, now: Instant, actions: &mut Vec<Action>) {
        let Slot::Up(up) = &mut self.slots[slot] else { return };
        if up.in_flight.is_empty() {
            up.oldest_since = now;
        }
        up.in_flight.push_back(id);
        up.alone = alone;
        actions.push(Action::Send(slot, id));
    }

    /// When something will be due.
    pub fn next_deadline(&self) -> Option<Instant> {
        let idle = self.waiting.is_empty() && self.suspects.is_empty();
        let due = self.slots.iter().filter_map(|slot| match slot {
            Slot::Down { not_before } => not_before.filter(|_| !idle),
            Slot::Starting { since } => Some(*since + self.limits.startup),
            Slot::Up(up) if up.in_flight.is_empty() => None,
            Slot::Up(up) => Some(up.oldest_since + self.limits.timeout),
        });
        due.min()
    }
}

#[cfg(test)]
mod tests;
