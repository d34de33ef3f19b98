//! Where a rank is in its collectives, as a record of fixed size that outlives the rank: of a rank that is stopped or
//! killed, the file of its records still says which call it was in.
//!
//! A file holds one record of [`RECORD_BYTES`] for each group and lane of the rank, at a place of its own, rewritten
//! before each call begins and when it is done; the numbers of `call` tell which is the newest. The first place says which
//! phase of which step the rank is in ([`encode_moment`]), rewritten when that changes. A launcher reads the
//! files of its ranks with [`decode_all`] and asks [`behind`] who keeps the others waiting. The rank's side is
//! `kernels::comm`, switched on by [`crate::env::POSITION_FILE`].
//!
//! Numbers do not tell who is stopped inside a call that all members entered. The launcher sees that in the state of its
//! processes (`T` in `/proc/PID/stat`, or a signal that killed one) and says so: [`Report::is_running`].
//!
//! Deliberately absent: files, clocks and processes.

use crate::hash::mix64;
use crate::phase::{Moment, Phase};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Bytes of an encoded record.
pub const RECORD_BYTES: usize = 256;

const MAGIC: u32 = 0x7a6e_7001;
const MOMENT_MAGIC: u32 = 0x7a6e_7002;
const NOBODY: u32 = u32::MAX;
/// Where the three texts and the checksum begin; each text ends where the next begins.
const OPERATION_AT: usize = 56;
const GROUP_AT: usize = 76;
const SITE_AT: usize = 140;
const CHECKSUM_AT: usize = 248;

/// Whether a call is one of all members of a group, or of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Lane {
    /// Numbered by the group.
    Collective = 0,
    /// Numbered by the pair.
    PointToPoint = 1,
}

/// How far a rank is in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// The group was opened, and no call was made yet.
    Opened = 0,
    /// The call began.
    Inside = 1,
    /// The call is done.
    Done = 2,
}

/// Tells groups apart over all ranks of a job: groups of one id have no member in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupId {
    /// The id that the members agreed on.
    pub id: u32,
    /// Global rank of the first member.
    pub first: u32,
    /// Number of members.
    pub size: u32,
}

/// One record: the last call of a rank in one lane of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position<'a> {
    /// Number of the record in its process.
    pub call: u64,
    /// The group.
    pub group: GroupId,
    /// Its name. Long names and call sites keep their end.
    pub group_name: Cow<'a, str>,
    /// The lane.
    pub lane: Lane,
    /// Number of the call in its lane: of the group for collectives, of the pair for point-to-point.
    pub sequence: u64,
    /// The name of the call.
    pub operation: Cow<'a, str>,
    /// `file:line` of the call.
    pub site: Cow<'a, str>,
    /// How far the rank is in it.
    pub state: State,
    /// Whether the rank stands still until the call is done; in the background a call may be under way beside work.
    pub is_awaited: bool,
    /// Global ranks that a point-to-point call needs.
    pub peers: [Option<u32>; 2],
}

impl Position<'_> {
    /// The record as it is written.
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = self.lane as u8;
        bytes[5] = self.state as u8;
        bytes[6] = u8::from(self.is_awaited);
        bytes[16..24].copy_from_slice(&self.call.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        let [to, from] = self.peers.map(|peer| peer.unwrap_or(NOBODY));
        for (index, word) in [self.group.id, self.group.first, self.group.size, to, from].into_iter().enumerate() {
            bytes[32 + 4 * index..36 + 4 * index].copy_from_slice(&word.to_le_bytes());
        }
        bytes[8] = put_end(&mut bytes[OPERATION_AT..GROUP_AT], &self.operation);
        bytes[7] = put_end(&mut bytes[GROUP_AT..SITE_AT], &self.group_name);
        bytes[9] = put_end(&mut bytes[SITE_AT..CHECKSUM_AT], &self.site);
        let checksum = checksum(&bytes);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The reverse of [`Position::encode`]; `None` for anything else, also for a record read while it was written.
    pub fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Position<'static>> {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if word(0) != MAGIC || long(CHECKSUM_AT) != checksum(bytes) {
            return None;
        }
        let text = |room: &[u8], length: u8| {
            let text = room.get(..usize::from(length))?;
            Some(Cow::Owned(String::from_utf8_lossy(text).into_owned()))
        };
        let peer = |at: usize| Some(word(at)).filter(|peer| *peer != NOBODY);
        Some(Position {
            call: long(16),
            group: GroupId { id: word(32), first: word(36), size: word(40) },
            group_name: text(&bytes[GROUP_AT..SITE_AT], bytes[7])?,
            lane: *[Lane::Collective, Lane::PointToPoint].get(usize::from(bytes[4]))?,
            sequence: long(24),
            operation: text(&bytes[OPERATION_AT..GROUP_AT], bytes[8])?,
            site: text(&bytes[SITE_AT..CHECKSUM_AT], bytes[9])?,
            state: *[State::Opened, State::Inside, State::Done].get(usize::from(bytes[5]))?,
            is_awaited: bytes[6] != 0,
            peers: [peer(44), peer(48)],
        })
    }

    /// Orders what ranks of one group and lane did.
    fn step(&self) -> u64 {
        match self.state {
            State::Opened => 0,
            State::Inside => 2 * self.sequence + 1,
            State::Done => 2 * self.sequence + 2,
        }
    }

    /// Whether the rank stands still in this call.
    fn is_standing(&self) -> bool {
        self.state == State::Inside && self.is_awaited
    }

    fn is_same_lane(&self, other: &Position) -> bool {
        (self.group, self.lane) == (other.group, other.lane)
    }

    fn needs(&self, rank: usize) -> bool {
        self.peers.iter().flatten().any(|peer| *peer as usize == rank)
    }
}

impl fmt::Display for Position<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{} of {} at {}", self.operation, self.sequence, self.group_name, self.site)
    }
}

/// Of all before it, word by word: it is made for every call.
fn checksum(bytes: &[u8; RECORD_BYTES]) -> u64 {
    let (words, _) = bytes[..CHECKSUM_AT].as_chunks::<8>();
    words.iter().fold(0, |sum, word| mix64(sum ^ u64::from_le_bytes(*word)))
}

/// Writes the end of a text that is too long; returns the length written.
fn put_end(room: &mut [u8], text: &str) -> u8 {
    let text = &text.as_bytes()[text.len().saturating_sub(room.len())..];
    room[..text.len()].copy_from_slice(text);
    text.len() as u8
}

/// The records of a file, places that were never written or are being written left out.
pub fn decode_all(bytes: &[u8]) -> Vec<Position<'static>> {
    bytes.chunks_exact(RECORD_BYTES).filter_map(|chunk| Position::decode(chunk.first_chunk()?)).collect()
}

/// Where a rank is in its steps, as the first record of its file says it.
pub fn encode_moment(moment: Moment) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    bytes[..4].copy_from_slice(&MOMENT_MAGIC.to_le_bytes());
    bytes[4] = moment.phase.map_or(0, |phase| phase as u8);
    bytes[16..24].copy_from_slice(&moment.step.to_le_bytes());
    let checksum = checksum(&bytes);
    bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The reverse of [`encode_moment`], from a whole file; `None` before the first step.
pub fn decode_moment(file: &[u8]) -> Option<Moment> {
    let bytes: &[u8; RECORD_BYTES] = file.first_chunk()?;
    let is_whole = bytes[..4] == MOMENT_MAGIC.to_le_bytes() && bytes[CHECKSUM_AT..] == checksum(bytes).to_le_bytes();
    let step = u64::from_le_bytes(std::array::from_fn(|i| bytes[16 + i]));
    is_whole.then_some(Moment { step, phase: Phase::from_code(bytes[4]) })
}

/// The rank that keeps others waiting, and what they wait in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behind {
    /// The rank.
    pub rank: usize,
    /// Whether anything is known of it: of a rank of another node only who waits for it.
    pub is_known: bool,
    /// In which phase it is, where that is known.
    pub moment: Option<Moment>,
    /// The call in which most of the others wait for it.
    pub awaited_in: Position<'static>,
    /// Who waits for it there.
    pub waiting: Vec<usize>,
    /// The newest record of the rank itself; `None` where it left none.
    pub last: Option<Position<'static>>,
}

impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks: Vec<String> = self.waiting.iter().map(usize::to_string).collect();
        let (noun, verb) = if ranks.len() == 1 { ("rank", "waits") } else { ("ranks", "wait") };
        let (rank, ranks) = (self.rank, ranks.join(", "));
        if !self.is_known {
            return write!(f, "{noun} {ranks} {verb} for rank {rank} of another node in {}", self.awaited_in);
        }
        let moment = self.moment.map(|moment| format!(", {moment}")).unwrap_or_default();
        write!(f, "rank {rank} is behind{moment}: {noun} {ranks} {verb} for it in {}; ", self.awaited_in)?;
        match &self.last {
            None => write!(f, "it made no call yet"),
            Some(last) if last.state == State::Opened => write!(f, "it made no call in {} yet", last.group_name),
            Some(last) if last.state == State::Inside => write!(f, "it is in {last}"),
            Some(last) => write!(f, "its last call, {last}, is done"),
        }
    }
}

/// What is known of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Global rank.
    pub rank: usize,
    /// Its records; none where its file is missing or empty.
    pub positions: Vec<Position<'static>>,
    /// Where it is in its steps, where that is known.
    pub moment: Option<Moment>,
    /// False for a process that was found stopped or killed, and so waits for nobody. True for one that ended by itself:
    /// its records say what it waited for.
    pub is_running: bool,
}

/// Rank `waiter` stands still in `position` until rank `on` comes along.
struct Wait<'a> {
    waiter: usize,
    on: usize,
    position: &'a Position<'static>,
}

/// Who keeps the others waiting, from the records of all ranks.
///
/// A rank in a collective waits for every member whose last call of that group is an earlier one, or the same one where
/// the member does not run; a rank in a point-to-point call waits for the peers that are not in it, in the same way. Such
/// waits lead from rank to rank; the answer is the rank at which most of them end, of those that do not run where there
/// are any: it is waited for and waits for nobody. `None` where nobody is behind, or where the ranks that are waited for stand in one and the same call.
pub fn behind(reports: &[Report]) -> Option<Behind> {
    let waits: Vec<Wait> = reports.iter().flat_map(|report| waits_of(report, reports)).collect();
    let waiters: BTreeSet<usize> = waits.iter().map(|wait| wait.waiter).collect();
    let mut waited_for: BTreeMap<usize, Vec<&Wait>> = BTreeMap::new();
    for wait in waits.iter().filter(|wait| !waiters.contains(&wait.on) && !stands_with_others(wait.on, reports)) {
        waited_for.entry(wait.on).or_default().push(wait);
    }
    // One that does not run explains more than one that has not come yet; then the first of those that most wait for.
    let is_gone = |rank: usize| find(rank, reports).is_some_and(|report| !report.is_running);
    let (rank, waits) = waited_for.into_iter().rev().max_by_key(|(rank, waits)| (is_gone(*rank), waits.len()))?;
    let together = |one: &Wait| waits.iter().filter(|w| w.position.is_same_lane(one.position)).count();
    let awaited_in = waits.iter().rev().max_by_key(|wait| together(wait))?.position;
    let waiting = waits.iter().filter(|w| w.position.is_same_lane(awaited_in)).map(|wait| wait.waiter).collect();
    let newest = |report: &Report| report.positions.iter().max_by_key(|position| position.call).cloned();
    let report = find(rank, reports);
    let (last, moment) = (report.and_then(newest), report.and_then(|report| report.moment));
    Some(Behind { rank, is_known: report.is_some(), moment, awaited_in: awaited_in.clone(), waiting, last })
}

fn find(rank: usize, reports: &[Report]) -> Option<&Report> {
    reports.iter().find(|report| report.rank == rank)
}

impl Report {
    fn in_lane_of(&self, position: &Position) -> Option<&Position<'static>> {
        self.positions.iter().find(|other| other.is_same_lane(position))
    }

    /// Whether this rank, whose record of the same lane is `theirs`, did not come as far as `position`.
    fn is_late(&self, theirs: &Position, position: &Position) -> bool {
        theirs.step() < position.step() || (!self.is_running && theirs.step() == position.step())
    }
}

fn waits_of<'a>(report: &'a Report, reports: &[Report]) -> Vec<Wait<'a>> {
    let standing = report.positions.iter().filter(|position| report.is_running && position.is_standing());
    let waits = standing.flat_map(|position| {
        let others = match position.lane {
            Lane::Collective => late_members(report.rank, position, reports),
            Lane::PointToPoint => late_peers(report.rank, position, reports),
        };
        others.into_iter().map(move |on| Wait { waiter: report.rank, on, position })
    });
    waits.collect()
}

/// Members that are late. Where not all members have a record, ranks without any count.
fn late_members(rank: usize, position: &Position, reports: &[Report]) -> Vec<usize> {
    let others = || reports.iter().filter(|other| other.rank != rank);
    let known = 1 + others().filter(|other| other.in_lane_of(position).is_some()).count();
    let is_late = |other: &&Report| match other.in_lane_of(position) {
        Some(theirs) => other.is_late(theirs, position),
        None => other.positions.is_empty() && known < position.group.size as usize,
    };
    others().filter(is_late).map(|other| other.rank).collect()
}

/// Peers that are neither in the call nor through with it.
fn late_peers(rank: usize, position: &Position, reports: &[Report]) -> Vec<usize> {
    let came = |peer: usize| {
        let theirs = find(peer, reports).and_then(|other| Some((other, other.in_lane_of(position)?)));
        theirs.is_some_and(|(other, theirs)| theirs.needs(rank) && !other.is_late(theirs, position))
    };
    let peers: BTreeSet<usize> = position.peers.iter().flatten().map(|peer| *peer as usize).collect();
    peers.into_iter().filter(|peer| !came(*peer)).collect()
}

/// Whether a rank stands in a call in which another one stands, too: then their numbers do not tell who is stopped.
fn stands_with_others(rank: usize, reports: &[Report]) -> bool {
    let is_same = |other: &Position, mine: &Position| other.state == State::Inside && other.step() == mine.step();
    let others = |mine: &Position| {
        let records = reports.iter().filter(|other| other.rank != rank).filter_map(|other| other.in_lane_of(mine));
        records.filter(|other| is_same(other, mine)).count()
    };
    let report = find(rank, reports).filter(|report| report.is_running);
    report.is_some_and(|report| report.positions.iter().any(|mine| mine.is_standing() && others(mine) > 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    const WORLD: GroupId = GroupId { id: 0, first: 0, size: 4 };

    fn tp(first: u32) -> GroupId {
        GroupId { id: 1, first, size: 2 }
    }

    fn dp(first: u32) -> GroupId {
        GroupId { id: 2, first, size: 2 }
    }

    fn collective(call: u64, group: GroupId, sequence: u64, state: State) -> Position<'static> {
        let (name, operation, line) = match group.id {
            0 => ("world", "barrier", 3),
            1 => ("world/tp", "all_reduce", 10),
            _ => ("world/dp", "reduce_scatter", 20),
        };
        Position {
            call,
            group,
            group_name: name.into(),
            lane: Lane::Collective,
            sequence,
            operation: operation.into(),
            site: format!("trainer/src/step.rs:{line}").into(),
            state,
            is_awaited: true,
            peers: [None; 2],
        }
    }

    fn message(call: u64, operation: &'static str, sequence: u64, state: State, peer: u32) -> Position<'static> {
        let group = GroupId { id: 5, first: 1, size: 2 };
        let position = collective(call, group, sequence, state);
        Position {
            group_name: "world/1->2".into(),
            lane: Lane::PointToPoint,
            operation: operation.into(),
            peers: [Some(peer), None],
            ..position
        }
    }

    type Records = (usize, Vec<Position<'static>>);

    fn check(records: &[Records], want: Expect) {
        check_with(records, None, want);
    }

    fn check_with(records: &[Records], stopped: Option<usize>, want: Expect) {
        let report = |(rank, positions): &Records| Report {
            rank: *rank,
            positions: positions.clone(),
            moment: None,
            is_running: stopped != Some(*rank),
        };
        let reports: Vec<Report> = records.iter().map(report).collect();
        want.assert_eq(&behind(&reports).map_or_else(|| "nobody".to_owned(), |behind| behind.to_string()));
    }

    #[test]
    fn records_survive_the_file() {
        let written = [
            message(7, "recv", u64::MAX, State::Inside, 3),
            Position { is_awaited: false, ..collective(9, dp(3), 0, State::Done) },
        ];
        let mut bytes: Vec<u8> = written.iter().flat_map(Position::encode).collect();
        assert_eq!(decode_all(&bytes), written);
        // A torn record, a place that was never written, and half a place.
        bytes[100] ^= 1;
        bytes.extend([0; RECORD_BYTES + 10]);
        assert_eq!(decode_all(&bytes), written[1..]);
    }

    #[test]
    fn the_first_record_says_where_in_a_step_a_rank_is() {
        let moment = Moment { step: 300, phase: Some(Phase::Ring) };
        let call = collective(9, dp(3), 0, State::Done);
        let mut file = [encode_moment(moment), call.encode()].concat();
        assert_eq!((decode_moment(&file), decode_all(&file)), (Some(moment), vec![call.clone()]));
        let report = |rank, positions, moment| Report { rank, positions, moment, is_running: true };
        let waiting = vec![collective(9, WORLD, 7, State::Inside)];
        let reports = [report(0, waiting, None), report(2, vec![], Some(moment))];
        let said = behind(&reports).unwrap().to_string();
        assert!(said.starts_with("rank 2 is behind, in phase ring of step 300: rank 0 waits for it"), "{said}");
        file[20] ^= 1;
        assert_eq!((decode_moment(&file), decode_moment(&call.encode()), decode_moment(&[])), (None, None, None));
    }

    #[test]
    fn long_texts_keep_their_end() {
        let long = Position {
            group_name: "x/".repeat(90).into(),
            site: format!("{}end.rs:12", "deep/".repeat(50)).into(),
            operation: "é".repeat(20).into(),
            ..collective(1, WORLD, 2, State::Opened)
        };
        let read = Position::decode(&long.encode()).unwrap();
        assert!(read.site.ends_with("deep/end.rs:12") && read.site.len() == 108);
        assert!(long.group_name.ends_with(&*read.group_name) && read.group_name.len() == 64);
        assert_eq!(read.operation, "é".repeat(10));
    }

    #[test]
    fn the_rank_that_did_not_come_is_behind() {
        let inside = |rank| (rank, vec![collective(9, WORLD, 7, State::Inside)]);
        let late = |state| vec![inside(0), inside(1), (2, vec![collective(8, WORLD, 6, state)]), inside(3)];
        check(
            &late(State::Done),
            expect![
                "rank 2 is behind: ranks 0, 1, 3 wait for it in barrier #7 of world at trainer/src/step.rs:3; its last call, barrier #6 of world at trainer/src/step.rs:3, is done"
            ],
        );
        // Stopped on its way out of the call before.
        check(
            &late(State::Inside),
            expect![
                "rank 2 is behind: ranks 0, 1, 3 wait for it in barrier #7 of world at trainer/src/step.rs:3; it is in barrier #6 of world at trainer/src/step.rs:3"
            ],
        );
        check(
            &[inside(0), inside(1), (2, vec![]), inside(3)],
            expect![
                "rank 2 is behind: ranks 0, 1, 3 wait for it in barrier #7 of world at trainer/src/step.rs:3; it made no call yet"
            ],
        );
        let all = [inside(0), inside(1), inside(2), inside(3)];
        check(&all, expect!["nobody"]);
        check_with(
            &all,
            Some(1),
            expect![
                "rank 1 is behind: ranks 0, 2, 3 wait for it in barrier #7 of world at trainer/src/step.rs:3; it is in barrier #7 of world at trainer/src/step.rs:3"
            ],
        );
        check(&[], expect!["nobody"]);
    }

    #[test]
    fn waits_are_followed_across_groups() {
        // Rank 3 never came to dp #4. Rank 1 waits for it there, rank 2 in tp; rank 0 waits for rank 1 and rank 2.
        let reports = [
            (0, vec![collective(20, tp(0), 8, State::Inside), collective(11, dp(0), 3, State::Done)]),
            (1, vec![collective(17, tp(0), 7, State::Done), collective(18, dp(1), 4, State::Inside)]),
            (2, vec![collective(20, tp(2), 8, State::Inside), collective(11, dp(0), 3, State::Done)]),
            (3, vec![collective(15, tp(2), 7, State::Done), collective(11, dp(1), 3, State::Done)]),
        ];
        check(
            &reports,
            expect![
                "rank 3 is behind: rank 1 waits for it in reduce_scatter #4 of world/dp at trainer/src/step.rs:20; its last call, all_reduce #7 of world/tp at trainer/src/step.rs:10, is done"
            ],
        );
    }

    #[test]
    fn who_works_beside_a_call_does_not_wait_in_it() {
        // Rank 0 is stuck in its own work with a reduction under way; rank 1 waits for it in tp.
        let beside = Position { is_awaited: false, ..collective(21, dp(0), 4, State::Inside) };
        let reports = [
            (0, vec![collective(20, tp(0), 7, State::Done), beside]),
            (1, vec![collective(20, tp(0), 8, State::Inside), collective(11, dp(1), 3, State::Done)]),
            (2, vec![collective(20, tp(2), 8, State::Done), collective(11, dp(0), 3, State::Done)]),
        ];
        check(
            &reports,
            expect![
                "rank 0 is behind: rank 1 waits for it in all_reduce #8 of world/tp at trainer/src/step.rs:10; it is in reduce_scatter #4 of world/dp at trainer/src/step.rs:20"
            ],
        );
    }

    #[test]
    fn messages_lead_to_the_peer() {
        let receiver = (2, vec![message(4, "recv", 5, State::Inside, 1)]);
        check(
            &[(1, vec![message(9, "send", 4, State::Done, 2)]), receiver.clone()],
            expect![
                "rank 1 is behind: rank 2 waits for it in recv #5 of world/1->2 at trainer/src/step.rs:20; its last call, send #4 of world/1->2 at trainer/src/step.rs:20, is done"
            ],
        );
        // Of another node; to and from the same.
        let both_ways = Position { peers: [Some(1); 2], ..message(4, "shift", 5, State::Inside, 1) };
        check(
            &[(2, vec![both_ways])],
            expect!["rank 2 waits for rank 1 of another node in shift #5 of world/1->2 at trainer/src/step.rs:20"],
        );
        // Both are in it: nobody is behind.
        let both = [(1, vec![message(9, "send", 5, State::Inside, 2)]), receiver];
        check(&both, expect!["nobody"]);
        check_with(
            &both,
            Some(2),
            expect![
                "rank 2 is behind: rank 1 waits for it in send #5 of world/1->2 at trainer/src/step.rs:20; it is in recv #5 of world/1->2 at trainer/src/step.rs:20"
            ],
        );
    }
}
