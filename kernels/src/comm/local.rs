//! Ranks as threads of one process, for tests, layout checks and several ranks on one GPU.
//!
//! ```text
//!   rank a                         hub (one mutex, one condition variable)                  rank b
//!   exchange: post tensors  ---->  boxes[lane, group, a -> b]: header + tensor handle ----> take, check, copy
//!             wait for all  <----  unread: ids of messages not yet copied             <---- done
//! ```
//!
//! | thread | waits for | unblocked by | bounded by |
//! |---|---|---|---|
//! | receiver | its message | post, loss of the sender, abort, mismatch | the call's deadline |
//! | sender | all its messages copied | done, loss of the receiver, abort, mismatch | the call's deadline |
//!
//! One rank may have several threads inside calls, of different groups: messages, entries and losses are kept by group.
//!
//! Invariants: a rank whose communicator is dropped (also by a panic) is lost to all that wait for it, never awaited.
//! Tensors are read by their receivers only while the sender waits inside the call. The first mismatch fails all ranks.

use super::backend::{AbortHandle, Backend, Call, Failure, Header, Lane, SubGroup, Transfer};
use super::communicator::{CommOptions, Communicator};
use super::error::CommErrorKind;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tch::Tensor;

/// A group of `size` ranks: give each communicator to a thread of its own.
pub fn group(size: usize, options: &CommOptions) -> Vec<Communicator> {
    assert!(size > 0, "a group has at least one rank");
    let hub = Arc::new(Hub::default());
    let communicator = |rank| {
        let backend = LocalBackend { hub: Arc::clone(&hub), id: 0, rank, members: (0..size).collect() };
        let backend: Option<Box<dyn Backend>> = if size > 1 { Some(Box::new(backend)) } else { None };
        Communicator::new(backend, "world", rank, (0..size).collect(), options.clone())
    };
    (0..size).map(communicator).collect()
}

/// Where a message lies: lane, group, sender, receiver (global ranks).
type Address = (Lane, u32, usize, usize);

struct Message {
    id: u64,
    header: Header,
    tensor: Tensor,
}

#[derive(Default)]
struct State {
    next_id: u64,
    boxes: HashMap<Address, VecDeque<Message>>,
    /// Messages that were posted and not yet copied.
    unread: HashSet<u64>,
    /// The collective each rank is in or was in last, by group.
    entered: HashMap<(u32, usize), Header>,
    /// Ranks that left a group.
    left: HashSet<(u32, usize)>,
    aborted: HashMap<usize, String>,
    /// Set by the first mismatch.
    failed: Option<CommErrorKind>,
}

#[derive(Default)]
struct Hub {
    state: Mutex<State>,
    changed: Condvar,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held, and every change is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct LocalBackend {
    hub: Arc<Hub>,
    id: u32,
    rank: usize,
    /// Global ranks of the group.
    members: Vec<usize>,
}

impl LocalBackend {
    fn global_rank(&self) -> usize {
        self.members[self.rank]
    }

    /// Compares this rank's call with those of the ranks that are in the same place of the sequence.
    fn enter(&self, call: &Call) -> Result<(), Failure> {
        let mine = call.header(0);
        let mut state = self.hub.lock();
        for &other in &self.members {
            if let Some(theirs) = state.entered.get(&(self.id, other))
                && theirs.sequence == mine.sequence
                && let Err(kind) = mine.check(self.global_rank(), theirs, other)
            {
                return Err(self.fail_all(state, kind));
            }
        }
        state.entered.insert((self.id, self.global_rank()), mine);
        Ok(())
    }

    fn fail_all(&self, mut state: MutexGuard<'_, State>, kind: CommErrorKind) -> Failure {
        state.failed.get_or_insert_with(|| kind.clone());
        self.hub.changed.notify_all();
        kind.into()
    }

    fn post(&self, call: &Call, sends: &[Transfer]) -> HashMap<u64, usize> {
        let mut state = self.hub.lock();
        let mut posted = HashMap::new();
        for send in sends {
            let id = state.next_id;
            state.next_id += 1;
            let to = self.members[send.peer];
            let message = Message { id, header: call.header(send.num_bytes()), tensor: send.data.shallow_clone() };
            state.boxes.entry((call.lane, self.id, self.global_rank(), to)).or_default().push_back(message);
            state.unread.insert(id);
            posted.insert(id, to);
        }
        self.hub.changed.notify_all();
        posted
    }

    fn receive(&self, call: &Call, receive: &Transfer) -> Result<(), Failure> {
        let from = self.members[receive.peer];
        let address = (call.lane, self.id, from, self.global_rank());
        let message = self.wait(call, |state| {
            let message = state.boxes.get_mut(&address).and_then(VecDeque::pop_front);
            message.ok_or(from)
        })?;
        if let Err(kind) = call.expected(receive.num_bytes()).check(self.global_rank(), &message.header, from) {
            return Err(self.fail_all(self.hub.lock(), kind));
        }
        receive.data.shallow_clone().f_copy_(&message.tensor)?;
        drop(message.tensor);
        self.hub.lock().unread.remove(&message.id);
        self.hub.changed.notify_all();
        Ok(())
    }

    /// Waits until `ready` answers; until then it names the rank that it needs.
    fn wait<R>(&self, call: &Call, mut ready: impl FnMut(&mut State) -> Result<R, usize>) -> Result<R, Failure> {
        let mut state = self.hub.lock();
        loop {
            if let Some(reason) = state.aborted.get(&self.global_rank()) {
                return Err(CommErrorKind::Aborted(reason.clone()).into());
            }
            let needed = match ready(&mut state) {
                Ok(answer) => return Ok(answer),
                Err(needed) => needed,
            };
            if let Some(kind) = &state.failed {
                return Err(kind.clone().into());
            }
            if let Some(detail) = loss(&state, self.id, needed) {
                return Err(CommErrorKind::PeerLost { rank: Some(needed), detail }.into());
            }
            let left = call.deadline().saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(call.timed_out(Some(needed)));
            }
            state = self.hub.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// After a failure nobody may read this rank's tensors any more.
    fn take_back(&self) {
        let me = self.global_rank();
        self.hub.lock().boxes.retain(|&(_, id, from, _), _| (id, from) != (self.id, me));
    }
}

fn loss(state: &State, id: u32, rank: usize) -> Option<String> {
    if let Some(reason) = state.aborted.get(&rank) {
        return Some(format!("it was aborted: {reason}"));
    }
    state.left.contains(&(id, rank)).then(|| "its thread ended or gave up the group".to_owned())
}

impl Backend for LocalBackend {
    fn exchange(&mut self, call: &Call, sends: &[Transfer], receives: &[Transfer]) -> Result<(), Failure> {
        if call.lane == Lane::Collective {
            self.enter(call)?;
        }
        let mut posted = self.post(call, sends);
        let result = receives.iter().try_for_each(|receive| self.receive(call, receive)).and_then(|()| {
            self.wait(call, |state| {
                posted.retain(|id, _| state.unread.contains(id));
                posted.values().next().map_or(Ok(()), |&rank| Err(rank))
            })
        });
        if result.is_err() {
            self.take_back();
        }
        result
    }

    fn split(&mut self, _call: &Call, group: &SubGroup) -> Result<Box<dyn Backend>, Failure> {
        let members: Vec<usize> = group.members.iter().map(|&member| self.members[member]).collect();
        let rank = group.members.iter().position(|&member| member == self.rank);
        let rank = rank.ok_or_else(|| Failure::backend("a rank is not in its own group"))?;
        Ok(Box::new(LocalBackend { hub: Arc::clone(&self.hub), id: group.id, rank, members }))
    }

    fn failed(&mut self, _kind: &CommErrorKind) {
        let key = (self.id, self.global_rank());
        self.hub.lock().left.insert(key);
        self.hub.changed.notify_all();
    }

    fn abort_handle(&self) -> AbortHandle {
        let (hub, rank) = (Arc::clone(&self.hub), self.global_rank());
        AbortHandle::new(move |reason| {
            hub.lock().aborted.entry(rank).or_insert_with(|| reason.to_owned());
            hub.changed.notify_all();
        })
    }
}

impl Drop for LocalBackend {
    fn drop(&mut self) {
        let key = (self.id, self.global_rank());
        self.hub.lock().left.insert(key);
        self.hub.changed.notify_all();
    }
}
