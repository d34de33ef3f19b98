//! The batches that a process holds for others.
//!
//! Memory is bounded: what does not fit is refused, nothing is evicted, because somebody still has the handle. Every
//! shard is owned by the step whose call made it: it goes when it is dropped or when that step ends. The names of the
//! last dropped ones are kept, so that whoever comes too late is told when and why it went.

use crate::error::{Cause, RankFailure};
use crate::remote::ShardId;
use arrow::array::RecordBatch;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Names of dropped shards that are remembered.
const REMEMBERED: usize = 4096;

struct Held {
    records: RecordBatch,
    bytes: usize,
    step: u64,
    trace: String,
}

#[derive(Default)]
struct Inner {
    held: HashMap<u64, Held>,
    /// (serial, how it went), oldest first.
    dropped: VecDeque<(u64, String)>,
    bytes: usize,
    next: u64,
}

/// A bounded store of shards.
pub(crate) struct Store {
    holder: u32,
    limit_bytes: usize,
    inner: Mutex<Inner>,
}

impl Store {
    pub fn new(holder: u32, limit_bytes: usize) -> Store {
        Store { holder, limit_bytes, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock; if something did, the map is still whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a shard for the step.
    pub fn put(&self, records: RecordBatch, step: u64, trace: &str) -> Result<ShardId, RankFailure> {
        let bytes = records.get_array_memory_size();
        let mut inner = self.lock();
        if inner.bytes + bytes > self.limit_bytes {
            return Err(RankFailure::new(
                Cause::StoreFull,
                format!(
                    "a batch of {bytes} bytes does not fit: {} batches hold {} of at most {} bytes",
                    inner.held.len(),
                    inner.bytes,
                    self.limit_bytes
                ),
            ));
        }
        let serial = inner.next;
        inner.next += 1;
        inner.bytes += bytes;
        inner.held.insert(serial, Held { records, bytes, step, trace: trace.to_owned() });
        Ok(ShardId { holder: self.holder, serial })
    }

    /// The shard of this name.
    pub fn get(&self, id: ShardId) -> Result<RecordBatch, RankFailure> {
        let inner = self.lock();
        if let Some(held) = inner.held.get(&id.serial).filter(|_| id.holder == self.holder) {
            return Ok(held.records.clone());
        }
        let known = inner.dropped.iter().find(|(serial, _)| *serial == id.serial && id.holder == self.holder);
        let what = match known {
            Some((_, how)) => how.clone(),
            None if id.holder != self.holder => "this process never held it".into(),
            None if id.serial >= inner.next => "it was never made".into(),
            None => format!("it was dropped before the last {REMEMBERED} that were"),
        };
        Err(RankFailure::new(Cause::UnknownHandle, format!("{id} is not here: {what}")))
    }

    /// Drops these; those that are not here are ignored.
    pub fn drop_shards(&self, ids: &[ShardId], during_step: u64) {
        let mut inner = self.lock();
        for id in ids.iter().filter(|id| id.holder == self.holder) {
            inner.remove(id.serial, &format!("dropped by the driver during step {during_step}"));
        }
    }

    /// Drops every shard made in this step or before.
    pub fn end_step(&self, step: u64) {
        let mut inner = self.lock();
        let mut ended: Vec<u64> = inner.held.iter().filter(|(_, h)| h.step <= step).map(|(&s, _)| s).collect();
        ended.sort_unstable();
        for serial in ended {
            inner.remove(serial, &format!("dropped at the end of step {step}"));
        }
    }

    /// Shards held, and their bytes.
    pub fn usage(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.held.len(), inner.bytes)
    }
}

impl Inner {
    fn remove(&mut self, serial: u64, how: &str) {
        let Some(held) = self.held.remove(&serial) else { return };
        self.bytes -= held.bytes;
        if self.dropped.len() == REMEMBERED {
            self.dropped.pop_front();
        }
        self.dropped.push_back((serial, format!("made in step {} by {}, {how}", held.step, held.trace)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};
    use tangelo_core::Column;
    use tangelo_core::batch::{Batch, ragged_u32};

    fn records(tokens: usize) -> RecordBatch {
        let rows = vec![vec![7; tokens]];
        Batch::from_columns(vec![(Column::Tokens, ragged_u32(&rows))]).unwrap().records().clone()
    }

    fn check<T: std::fmt::Debug>(result: Result<T, RankFailure>, expected: Expect) {
        expected.assert_eq(&result.unwrap_err().message);
    }

    #[test]
    fn who_comes_too_late_is_told_when_it_went() {
        let store = Store::new(3, 1 << 20);
        let first = store.put(records(4), 8, "t-1").unwrap();
        let second = store.put(records(4), 9, "t-2").unwrap();
        store.drop_shards(&[second], 9);
        store.end_step(8);
        check(
            store.get(first),
            expect!["batch 0 of rank 3 is not here: made in step 8 by t-1, dropped at the end of step 8"],
        );
        check(
            store.get(second),
            expect!["batch 1 of rank 3 is not here: made in step 9 by t-2, dropped by the driver during step 9"],
        );
        check(store.get(ShardId { holder: 3, serial: 9 }), expect!["batch 9 of rank 3 is not here: it was never made"]);
        check(
            store.get(ShardId { holder: 1, serial: 0 }),
            expect!["batch 0 of rank 1 is not here: this process never held it"],
        );
        assert_eq!(store.usage(), (0, 0));
    }

    #[test]
    fn memory_is_bounded_and_given_back() {
        let size = records(1000).get_array_memory_size();
        let store = Store::new(0, 2 * size);
        let kept = store.put(records(1000), 1, "a").unwrap();
        store.put(records(1000), 1, "b").unwrap();
        let full = store.put(records(1000), 1, "c").unwrap_err();
        assert_eq!(full.cause, Cause::StoreFull);
        assert!(full.message.contains("2 batches hold"), "{}", full.message);
        store.drop_shards(&[kept], 1);
        store.put(records(1000), 1, "c").unwrap();
    }

    #[test]
    fn a_bounded_number_of_names_is_remembered() {
        let store = Store::new(0, usize::MAX);
        let ids: Vec<ShardId> = (0..REMEMBERED + 1).map(|_| store.put(records(1), 1, "t").unwrap()).collect();
        store.drop_shards(&ids, 1);
        check(
            store.get(ids[0]),
            expect!["batch 0 of rank 0 is not here: it was dropped before the last 4096 that were"],
        );
    }
}
