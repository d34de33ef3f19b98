//! Writes where this rank is into a file that outlives it: see `tangelo_core::position`.
//!
//! The first place in the file says which step the rank is in, and which phase of it. Each lane of each group has a place
//! of its own after that, because groups whose calls run in the background are
//! under way at the same time. A record is one `pwrite` of 256 bytes, at the start of a call and at its end. A call that
//! fails keeps its record: the rank was in it. No write ever fails a call.

use super::backend::{Call, Lane};
use super::communicator::Shared;
use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::Location;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tangelo_core::Moment;
use tangelo_core::position::{self, GroupId, Position, RECORD_BYTES, State};

/// Places in a file. Groups beyond these leave no records.
const MAX_PLACES: u64 = 4096;

/// The file of one rank.
pub(crate) struct Recorder {
    file: File,
    num_calls: AtomicU64,
    num_places: AtomicU64,
}

impl Recorder {
    /// Empties the file: what an earlier attempt left is no longer true.
    pub fn create(path: &Path) -> std::io::Result<Recorder> {
        Ok(Recorder { file: File::create(path)?, num_calls: AtomicU64::new(0), num_places: AtomicU64::new(1) })
    }

    pub fn write_moment(&self, moment: Moment) {
        _ = self.file.write_all_at(&position::encode_moment(moment), 0);
    }

    fn write(&self, place: u64, position: &Position) {
        if place < MAX_PLACES {
            // A full disk must not end a job that needs no records.
            _ = self.file.write_all_at(&position.encode(), place * RECORD_BYTES as u64);
        }
    }
}

/// The last call of one lane.
struct Record {
    place: u64,
    sequence: u64,
    operation: &'static str,
    site: &'static Location<'static>,
    /// `file:line` of the site.
    site_text: String,
    state: State,
    peers: [Option<u32>; 2],
}

/// Follows the calls of one group, and knows who stands still for them.
pub(crate) struct Tracker {
    pub shared: Arc<Shared>,
    group: GroupId,
    name: String,
    lanes: [Mutex<Option<Record>>; 2],
    /// Whether the group's calls are made by a thread of their own.
    is_background: AtomicBool,
    num_waiting: AtomicUsize,
}

impl Tracker {
    pub fn new(shared: Arc<Shared>, id: u32, name: &str, ranks: &[usize]) -> Tracker {
        let as_u32 = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Tracker {
            shared,
            group: GroupId { id, first: as_u32(ranks[0]), size: as_u32(ranks.len()) },
            name: name.to_owned(),
            lanes: Default::default(),
            is_background: AtomicBool::new(false),
            num_waiting: AtomicUsize::new(0),
        }
    }

    pub fn move_to_background(&self) {
        self.is_background.store(true, Ordering::Relaxed);
    }

    pub fn is_background(&self) -> bool {
        self.is_background.load(Ordering::Relaxed)
    }

    /// Tells the others' launcher that this rank is a member, before its first call.
    pub fn opened(&self, site: &'static Location<'static>) {
        self.put(Lane::Collective, "open", 0, site, State::Opened, [None; 2]);
    }

    pub fn enter(&self, call: &Call, peers: [Option<u32>; 2]) {
        self.put(call.lane, call.operation.name(), call.sequence, call.site, State::Inside, peers);
    }

    pub fn leave(&self, call: &Call) {
        if let Some(recorder) = self.shared.recorder.get()
            && let Some(record) = &mut *self.lock(call.lane)
        {
            record.state = State::Done;
            self.write(recorder, call.lane, record);
        }
    }

    /// The rank stands still for the calls under way, until [`Tracker::end_wait`].
    pub fn begin_wait(&self) {
        self.num_waiting.fetch_add(1, Ordering::Relaxed);
        self.rewrite_running();
    }

    pub fn end_wait(&self) {
        self.num_waiting.fetch_sub(1, Ordering::Relaxed);
        self.rewrite_running();
    }

    fn rewrite_running(&self) {
        let Some(recorder) = self.shared.recorder.get() else { return };
        for lane in [Lane::Collective, Lane::PointToPoint] {
            if let Some(record) = &*self.lock(lane)
                && record.state == State::Inside
            {
                self.write(recorder, lane, record);
            }
        }
    }

    fn lock(&self, lane: Lane) -> MutexGuard<'_, Option<Record>> {
        self.lanes[lane as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the record of a lane, and writes it.
    fn put(
        &self,
        lane: Lane,
        operation: &'static str,
        sequence: u64,
        site: &'static Location<'static>,
        state: State,
        peers: [Option<u32>; 2],
    ) {
        let Some(recorder) = self.shared.recorder.get() else { return };
        let mut record = self.lock(lane);
        let (place, site_text) = match record.take() {
            Some(last) if std::ptr::eq(last.site, site) => (last.place, last.site_text),
            Some(last) => (last.place, text_of(site)),
            None => (recorder.num_places.fetch_add(1, Ordering::Relaxed), text_of(site)),
        };
        let record = record.insert(Record { place, sequence, operation, site, site_text, state, peers });
        self.write(recorder, lane, record);
    }

    fn write(&self, recorder: &Recorder, lane: Lane, record: &Record) {
        let position = Position {
            call: recorder.num_calls.fetch_add(1, Ordering::Relaxed),
            group: self.group,
            group_name: Cow::Borrowed(&self.name),
            lane: match lane {
                Lane::Collective => position::Lane::Collective,
                Lane::PointToPoint => position::Lane::PointToPoint,
            },
            sequence: record.sequence,
            operation: Cow::Borrowed(record.operation),
            site: Cow::Borrowed(&record.site_text),
            state: record.state,
            is_awaited: !self.is_background() || self.num_waiting.load(Ordering::Relaxed) > 0,
            peers: record.peers,
        };
        recorder.write(record.place, &position);
    }
}

fn text_of(site: &Location) -> String {
    format!("{}:{}", site.file(), site.line())
}
