//! Agreement within groups, and pairing in channels.

use super::{Does, Groups, Made, Mismatch, PARTS, Schedule, Step};
use std::collections::{HashMap, HashSet};
use tangelo_core::{Call, CallKind, Group};

/// Steps of every list by group, in order.
struct ByGroup {
    steps: HashMap<usize, [Vec<Step>; Group::ALL.len()]>,
}

impl ByGroup {
    fn new(schedule: &Schedule, part: usize) -> ByGroup {
        let mut steps = HashMap::new();
        for list in schedule.ranks.iter().map(|parts| parts[part]) {
            steps.entry(list).or_insert_with(|| {
                let mut by_group: [Vec<Step>; Group::ALL.len()] = Default::default();
                for &step in &schedule.lists[list] {
                    if let Does::Call(call) = step.does {
                        by_group[schedule.call(call).group as usize].push(step);
                    }
                }
                by_group
            });
        }
        ByGroup { steps }
    }

    fn of(&self, list: usize, group: Group) -> &[Step] {
        &self.steps[&list][group as usize]
    }
}

/// Members of every group make the same calls.
pub(super) fn check(schedule: &Schedule, groups: &Groups, part: usize) -> Result<(), Box<Mismatch>> {
    let by_group = ByGroup::new(schedule, part);
    for kind in Group::ALL.into_iter().filter(|&kind| kind != Group::Stages) {
        let mut seen: HashSet<Vec<usize>> = HashSet::new();
        let mut fitting: HashSet<Vec<u32>> = HashSet::new();
        for members in groups.of_kind(kind).iter().filter(|members| members.len() > 1) {
            let lists: Vec<usize> = members.iter().map(|&rank| schedule.ranks[rank][part]).collect();
            if !seen.contains(&lists) {
                let steps: Vec<&[Step]> = lists.iter().map(|&list| by_group.of(list, kind)).collect();
                One { schedule, part, group: kind, members, steps }.check(&mut fitting)?;
                seen.insert(lists);
            }
        }
    }
    Ok(())
}

/// One group, and what each of its members does there.
struct One<'a> {
    schedule: &'a Schedule,
    part: usize,
    group: Group,
    members: &'a [usize],
    steps: Vec<&'a [Step]>,
}

impl One<'_> {
    fn check(&self, fitting: &mut HashSet<Vec<u32>>) -> Result<(), Box<Mismatch>> {
        let shortest = self.steps.iter().map(|steps| steps.len()).min().unwrap_or(0);
        for number in 0..shortest {
            let calls: Vec<u32> = self.steps.iter().map(|steps| place(steps[number])).collect();
            if fitting.contains(&calls) {
                continue;
            }
            if let Some((first, second, why)) = differs(self.schedule, &calls) {
                return Err(Box::new(Mismatch::Differ {
                    part: PARTS[self.part],
                    group: self.group,
                    members: self.members.to_vec(),
                    number,
                    first: Box::new(self.made(first, number)),
                    second: Box::new(self.made(second, number)),
                    why,
                }));
            }
            fitting.insert(calls);
        }
        let (with, without) = (self.member(|n| n > shortest), self.member(|n| n == shortest));
        match (with, without) {
            (Some(with), Some(without)) => Err(Box::new(Mismatch::Missing {
                part: PARTS[self.part],
                group: self.group,
                members: self.members.to_vec(),
                number: shortest,
                made: Box::new(self.made(with, shortest)),
                missing: self.members[without],
            })),
            _ => Ok(()),
        }
    }

    fn member(&self, makes: impl Fn(usize) -> bool) -> Option<usize> {
        self.steps.iter().position(|steps| makes(steps.len()))
    }

    fn made(&self, member: usize, number: usize) -> Made {
        self.schedule.made(self.members[member], self.part, self.steps[member][number])
    }
}

fn place(step: Step) -> u32 {
    match step.does {
        Does::Call(place) => place,
        _ => unreachable!("only calls were taken"),
    }
}

/// The first two members (places in the group) whose calls do not fit, and why.
fn differs(schedule: &Schedule, calls: &[u32]) -> Option<(usize, usize, String)> {
    let call = |member: usize| schedule.call(calls[member]);
    let first = call(0);
    for member in 1..calls.len() {
        if let Some(why) = same_kind(first, call(member)) {
            return Some((0, member, why));
        }
        let common = !matches!(first.kind, CallKind::AllToAll | CallKind::Shift);
        if common && calls[member] != calls[0] && call(member).counts != first.counts {
            return Some((0, member, "their sizes differ".into()));
        }
    }
    match first.kind {
        CallKind::AllReduce => None,
        // A rank of the group that has no count, or a count without a rank.
        CallKind::AllGather | CallKind::ReduceScatter => (first.counts.len() != calls.len())
            .then(|| (0, 1, format!("{} counts for {} ranks", first.counts.len(), calls.len()))),
        CallKind::AllToAll => unequal_pair(calls.len(), call),
        CallKind::Shift => unequal_turn(calls.len(), call),
        CallKind::Send | CallKind::Receive => Some((0, 1, "a transfer belongs into a channel".into())),
    }
}

fn same_kind(a: &Call, b: &Call) -> Option<String> {
    if a.kind != b.kind {
        return Some("they call different things".into());
    }
    (a.element_bytes != b.element_bytes).then(|| "their types differ".into())
}

fn unequal_pair<'a>(size: usize, call: impl Fn(usize) -> &'a Call) -> Option<(usize, usize, String)> {
    let given = |from: usize, to: usize| call(from).counts.get(to);
    let taken = |to: usize, from: usize| call(to).counts_in.get(from);
    let mut pairs = (0..size).flat_map(|from| (0..size).map(move |to| (from, to)));
    let wrong = pairs.find(|&(from, to)| given(from, to).is_none() || given(from, to) != taken(to, from));
    wrong.map(|(from, to)| {
        (from, to, format!("the first gives {:?}, the second takes {:?}", given(from, to), taken(to, from)))
    })
}

fn unequal_turn<'a>(size: usize, call: impl Fn(usize) -> &'a Call) -> Option<(usize, usize, String)> {
    (0..size).find_map(|rank| {
        let next = (rank + 1) % size;
        if call(rank).peer != Some(next) {
            return Some((rank, next, "the first does not give to its neighbour".into()));
        }
        let (given, taken) = (&call(rank).counts, &call(next).counts_in);
        (given != taken).then(|| (rank, next, format!("the first gives {given:?}, the second takes {taken:?}")))
    })
}

/// Sends and receives of every channel pair up.
pub(super) fn check_channels(schedule: &Schedule, part: usize) -> Result<(), Box<Mismatch>> {
    let (stages, mut seen) = (schedule.topology.num_stages(), HashSet::new());
    let per_stage = schedule.num_ranks() / stages;
    for before in 0..per_stage * (stages - 1) {
        let after = before + per_stage;
        if seen.insert((schedule.ranks[before][part], schedule.ranks[after][part])) {
            check_channel(schedule, part, before, after)?;
            check_channel(schedule, part, after, before)?;
        }
    }
    Ok(())
}

fn check_channel(schedule: &Schedule, part: usize, from: usize, to: usize) -> Result<(), Box<Mismatch>> {
    let transfers = |rank: usize, kind: CallKind, other: usize| -> Vec<Step> {
        let peer = Some(schedule.topology.stage(other));
        let is_one = |step: &&Step| match step.does {
            Does::Call(place) => schedule.call(place).kind == kind && schedule.call(place).peer == peer,
            _ => false,
        };
        schedule.steps(rank, part).iter().filter(is_one).copied().collect()
    };
    let (sends, receives) = (transfers(from, CallKind::Send, to), transfers(to, CallKind::Receive, from));
    let made = |rank, step| Box::new(schedule.made(rank, part, step));
    for number in 0..sends.len().max(receives.len()) {
        let unpaired =
            |made, missing| Box::new(Mismatch::Unpaired { part: PARTS[part], from, to, number, made, missing });
        match (sends.get(number), receives.get(number)) {
            (Some(&send), Some(&receive)) => {
                let (sent, received) = (made(from, send), made(to, receive));
                let why = if sent.call.element_bytes != received.call.element_bytes {
                    "their types differ"
                } else if sent.call.counts != received.call.counts {
                    "their sizes differ"
                } else {
                    continue;
                };
                let why = why.into();
                return Err(Box::new(Mismatch::Transfer { part: PARTS[part], from, to, number, sent, received, why }));
            }
            (Some(&send), None) => return Err(unpaired(made(from, send), to)),
            (None, Some(&receive)) => return Err(unpaired(made(to, receive), from)),
            (None, None) => {}
        }
    }
    Ok(())
}
