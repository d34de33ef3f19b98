//! What the planner says a step communicates, against the calls that it makes: every rank, every group, in order.

use super::harness::Case;
use crate::support;
use std::collections::BTreeMap;
use tangelo_configs::Plan;
use tangelo_core::{Call, CallKind, Group};
use tangelo_kernels::comm::{CallRecord, Operation};
use tangelo_kernels::device;
use tangelo_planner::program::{Sizes, build};

/// Every dimension, both ways round the ring, every scope, and products.
const LAYOUTS: [&str; 22] = [
    "gqa tp8 muon",
    "gqa dp2 tp2 pp2 z2.2.2 muon",
    "gqa",
    "mha rep2 dp2 z2.2.2",
    "gqa dp4 z2.4.4 never",
    "gqa dp8 z2.4.8",
    "gqa dp4 z1.2.4",
    "odd tp2",
    "gqa tp8",
    "mha tp4 attn",
    "gqa cp8 heads8",
    "odd cp3 ring",
    "gqa cp4",
    "gqa cp8 heads4 ring",
    "gqa pp4 gpipe",
    "mha pp3 stages1.2.1",
    "gqa tp2 cp4 heads2 ring full",
    "gqa dp2 cp2 tp2 z4.4.4 heads2 full",
    "odd dp2 tp2 pp2 z2.2.2 mixed",
    "gqa dp2 cp2 pp2 heads2 z2.2.4",
    "gqa rep2 dp4 z1.2.2",
    "gqa dp2 pp2 z2.2.2 never gpipe",
];

#[test]
fn every_call_is_the_one_that_was_predicted() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    for line in LAYOUTS {
        let case = Case::parse(line, seed);
        let (plan, made) = (case.plan(), case.record());
        let sizes = Sizes::new(&plan);
        assert_eq!(made.iter().any(|(calls, _)| calls.is_empty()), made.len() == 1, "{line}");
        for (rank, (calls, bytes)) in made.into_iter().enumerate() {
            let predicted = predict(&plan, &sizes, rank);
            let sent: usize = predicted.iter().map(|call| bytes_sent(&plan, call, rank)).sum();
            let predicted = by_group(predicted.iter().map(|call| record(&plan, call, rank)).collect());
            let calls = by_group(calls);
            assert!(calls.keys().eq(predicted.keys()), "{line}, rank {rank}: {:?}", calls.keys());
            for (group, calls) in &calls {
                let wanted = &predicted[group];
                let differs = calls.iter().zip(wanted).position(|(made, wanted)| made != wanted);
                if let Some(at) = differs {
                    panic!("{line}, rank {rank}, call {at}: predicted {:?}, made {:?}", wanted[at], calls[at]);
                }
                assert_eq!(calls.len(), wanted.len(), "{line}, rank {rank}, {group}: calls");
            }
            assert_eq!(bytes, sent as u64, "{line}, rank {rank}: bytes sent");
        }
    }
}

fn predict(plan: &Plan, sizes: &Sizes, rank: usize) -> Vec<Call> {
    let program = build(plan, plan.topology.stage(rank));
    let evaluations = std::iter::repeat_n(&program.evaluate, plan.gradient_accumulation_steps).flatten();
    let all = program.pass.iter().chain(&program.update).chain(evaluations);
    let calls = all.flat_map(|&instruction| sizes.calls(instruction, rank));
    // After the last batch, all learn the sum of losses, and readers that of weights.
    let sums = [Group::World, Group::Batch].map(|group| Call {
        group,
        kind: CallKind::AllGather,
        element_bytes: 8,
        counts: vec![1; plan.topology.size(group)].into(),
        counts_in: [].into(),
        peer: None,
    });
    calls.chain(sums.into_iter().filter(|call| call.counts.len() > 1)).collect()
}

fn bytes_sent(plan: &Plan, call: &Call, rank: usize) -> usize {
    call.bytes_sent(plan.topology.index(call.group, rank), plan.topology.size(call.group))
}

/// A predicted call as a communicator notes it. A channel is a group of the sender and the receiver.
fn record(plan: &Plan, call: &Call, rank: usize) -> CallRecord {
    let (operation, channel) = match call.kind {
        CallKind::AllReduce => (Operation::AllReduce, None),
        CallKind::AllGather => (Operation::AllGather, None),
        CallKind::ReduceScatter => (Operation::ReduceScatter, None),
        CallKind::AllToAll => (Operation::AllToAll, None),
        CallKind::Shift => (Operation::Shift, None),
        CallKind::Send => (Operation::Send, call.peer.map(|peer| (stage_peer(plan, rank, peer), 1))),
        CallKind::Receive => (Operation::Receive, call.peer.map(|peer| (stage_peer(plan, rank, peer), 0))),
    };
    let group = match (channel, call.group) {
        (Some((peer, 1)), _) => format!("world/{rank}->{peer}"),
        (Some((peer, _)), _) => format!("world/{peer}->{rank}"),
        (None, Group::World) => "world".into(),
        (None, group) => format!("world/{group}"),
    };
    CallRecord {
        group,
        operation,
        element_bytes: call.element_bytes,
        counts: call.counts.to_vec(),
        counts_in: call.counts_in.to_vec(),
        peer: channel.map(|(_, place)| place).or(call.peer),
    }
}

fn stage_peer(plan: &Plan, rank: usize, stage: usize) -> usize {
    plan.topology.members(Group::Stages, rank)[stage]
}

fn by_group(calls: Vec<CallRecord>) -> BTreeMap<String, Vec<CallRecord>> {
    let mut groups: BTreeMap<String, Vec<CallRecord>> = BTreeMap::new();
    for call in calls {
        groups.entry(call.group.clone()).or_default().push(call);
    }
    groups
}
