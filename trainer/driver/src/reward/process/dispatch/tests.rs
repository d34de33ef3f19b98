//! The decisions of a pool, at times that the tests choose.

use super::*;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

struct Pool {
    dispatch: Dispatch,
    start: Instant,
    now: Instant,
}

impl Pool {
    fn new(processes: usize, calls_in_flight: usize) -> Pool {
        let limits = Limits { processes, calls_in_flight, timeout: 10 * SECOND, startup: 60 * SECOND, max_failures: 8 };
        let now = Instant::now();
        let mut pool = Pool { dispatch: Dispatch::new(limits), start: now, now };
        let started = pool.tick();
        assert_eq!(started, (0..processes).map(Action::Start).collect::<Vec<_>>());
        (0..processes).for_each(|slot| pool.dispatch.ready(slot, now));
        pool
    }

    fn calls(&mut self, ids: std::ops::Range<u64>) -> Vec<Action> {
        ids.for_each(|id| self.dispatch.call(id));
        self.tick()
    }

    fn tick(&mut self) -> Vec<Action> {
        self.dispatch.tick(self.now)
    }

    fn at(&mut self, seconds: u32) -> Vec<Action> {
        self.now = self.start + seconds * SECOND;
        self.tick()
    }

    fn answered(&mut self, slot: usize, id: u64) -> Vec<Action> {
        assert!(self.dispatch.answered(slot, id, self.now), "{slot} {id}");
        self.tick()
    }

    /// The process ends, and is up again where it is wanted.
    fn dies(&mut self, slot: usize) -> Vec<Action> {
        let mut actions = self.dispatch.ended(slot, "boom", self.now);
        self.now += 5 * SECOND;
        actions.extend(self.tick());
        self.dispatch.ready(slot, self.now);
        actions.extend(self.tick());
        actions
    }
}

#[test]
fn calls_are_spread_and_bounded() {
    let mut pool = Pool::new(2, 2);
    let sent: Vec<Action> = [(0, 0), (1, 1), (0, 2), (1, 3)].map(|(slot, id)| Action::Send(slot, id)).into();
    assert_eq!(pool.calls(0..6), sent);
    assert_eq!(pool.answered(1, 3), [Action::Send(1, 4)]);
    assert_eq!(pool.answered(1, 1), [Action::Send(1, 5)]);
    assert!(!pool.dispatch.answered(1, 1, pool.now) && !pool.dispatch.answered(0, 99, pool.now));
}

#[test]
fn a_late_call_fails_and_the_others_are_sent_again() {
    let mut pool = Pool::new(1, 3);
    pool.calls(0..3);
    assert_eq!(pool.at(9), []);
    // In order: each answer starts the next one's time.
    assert_eq!(pool.answered(0, 0), []);
    assert_eq!(pool.at(18), []);
    let actions = pool.at(19);
    assert_eq!(actions, [Action::Stop(0), Action::Fail(1, Failure::TimedOut), Action::Start(0)]);
    pool.dispatch.ready(0, pool.now);
    assert_eq!(pool.tick(), [Action::Send(0, 2)]);
    assert_eq!(pool.dispatch.next_deadline(), Some(pool.start + 29 * SECOND));
}

#[test]
fn answers_out_of_order_do_not_lengthen_the_oldest() {
    let mut pool = Pool::new(1, 3);
    pool.calls(0..3);
    pool.at(9);
    pool.answered(0, 2);
    pool.answered(0, 1);
    assert!(pool.at(10).contains(&Action::Fail(0, Failure::TimedOut)));
}

#[test]
fn a_death_is_blamed_on_the_call_that_is_alone() {
    let mut pool = Pool::new(1, 3);
    pool.calls(0..4);
    // Three were under way: each again, alone.
    assert_eq!(pool.dies(0), [Action::Start(0), Action::Send(0, 0)]);
    assert_eq!(pool.answered(0, 0), [Action::Send(0, 1)]);
    let actions = pool.dies(0);
    assert_eq!(actions, [Action::Fail(1, Failure::Died("boom".into())), Action::Start(0), Action::Send(0, 2)]);
    // With no suspect left, calls go on side by side.
    assert_eq!(pool.answered(0, 2), [Action::Send(0, 3)]);
    assert_eq!(pool.calls(5..7), [Action::Send(0, 5), Action::Send(0, 6)]);
}

#[test]
fn a_killed_process_costs_its_call_nothing() {
    let mut pool = Pool::new(1, 1);
    assert_eq!(pool.calls(0..2), [Action::Send(0, 0)]);
    assert_eq!(pool.dies(0), [Action::Start(0), Action::Send(0, 0)]);
    assert_eq!(pool.answered(0, 0), [Action::Send(0, 1)]);
    // The next one is as innocent as the first, and guilty when its process dies again.
    assert_eq!(pool.dies(0), [Action::Start(0), Action::Send(0, 1)]);
    assert_eq!(pool.dies(0), [Action::Fail(1, Failure::Died("boom".into()))]);
    assert!(!pool.dispatch.is_busy());
}

#[test]
fn a_program_that_never_works_is_given_up() {
    let mut pool = Pool::new(1, 1);
    pool.calls(0..20);
    let mut failed = Vec::new();
    // Every call is tried twice.
    for _ in 0..16 {
        failed.extend(pool.dies(0).into_iter().filter(|action| matches!(action, Action::Fail(..))));
    }
    assert_eq!(failed.len(), 20);
    let unusable = Failure::Unusable("8 failures in a row; the last: boom".into());
    assert_eq!(failed.iter().filter(|action| matches!(action, Action::Fail(_, f) if *f == unusable)).count(), 12);
    // It is tried again when it is called again.
    pool.now += 5 * SECOND;
    assert!(pool.calls(20..21).contains(&Action::Send(0, 20)) || pool.dispatch.is_busy());
}

#[test]
fn an_idle_process_is_started_again_when_it_is_needed() {
    let mut pool = Pool::new(1, 1);
    pool.calls(0..1);
    pool.answered(0, 0);
    assert_eq!(pool.dispatch.ended(0, "left", pool.now), []);
    assert_eq!(pool.at(3), []);
    assert_eq!(pool.calls(1..2), [Action::Start(0)]);
    assert_eq!(pool.at(62), []);
    // It was not ready in time.
    assert_eq!(pool.at(63), [Action::Stop(0), Action::Start(0)]);
}

proptest! {
    /// Whatever happens, each call ends exactly once, and none is forgotten.
    #[test]
    fn every_call_ends_once(processes in 1usize..4, in_flight in 1usize..4, events in proptest::collection::vec((0u8..6, 0usize..4), 1..200)) {
        let mut pool = Pool::new(processes, in_flight);
        let mut sent: Vec<(usize, u64)> = Vec::new();
        let mut ended = std::collections::HashMap::new();
        let mut next = 0;
        let mut act = |pool: &mut Pool, actions: Vec<Action>, sent: &mut Vec<(usize, u64)>| {
            for action in actions {
                match action {
                    Action::Start(slot) => pool.dispatch.ready(slot, pool.now),
                    Action::Stop(slot) => sent.retain(|(s, _)| *s != slot),
                    Action::Send(slot, id) => sent.push((slot, id)),
                    Action::Fail(id, _) => *ended.entry(id).or_insert(0) += 1,
                }
            }
        };
        let mut answers = 0;
        for (kind, slot) in events {
            pool.now += SECOND;
            let actions = match kind {
                0..=2 => { next += 1; pool.calls(next - 1..next) }
                3 if !sent.is_empty() => {
                    let (slot, id) = sent.remove(slot % sent.len());
                    answers += 1;
                    pool.answered(slot, id)
                }
                4 => {
                    let slot = slot % processes;
                    sent.retain(|(s, _)| *s != slot);
                    pool.dispatch.ended(slot, "boom", pool.now)
                }
                _ => pool.tick(),
            };
            act(&mut pool, actions, &mut sent);
        }
        // From now on nothing is ever answered.
        for _ in 0..4000 {
            pool.now += SECOND;
            let actions = pool.tick();
            act(&mut pool, actions, &mut sent);
            if !pool.dispatch.is_busy() { break; }
        }
        prop_assert!(!pool.dispatch.is_busy());
        prop_assert!(ended.values().all(|count| *count == 1));
        prop_assert_eq!(ended.len() + answers, next as usize);
    }
}
