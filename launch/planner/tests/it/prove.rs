//! The proof: whole layouts pass it, planted mismatches are caught and named.

use crate::{Tokenizer, machine};
use expect_test::{Expect, expect};
use proptest::prelude::*;
use tangelo_configs::Plan;
use tangelo_configs::resolve::{load_str, resolve};
use tangelo_core::{Call, CallKind, Group};
use tangelo_planner::prove::{Does, Schedule, Step};
use tangelo_planner::traffic::{Traffic, minimum};
use tangelo_planner::{prove, render_schedule};

fn plan(world_size: usize, model: &str, parallelism: &str, sets: &[&str]) -> Result<Plan, String> {
    let text = format!(
        "[model]\n{model}\n[data]\ntokenizer = 't.json'\nsources = [{{ paths = ['corpus/*.txt'] }}]\n\
         [training]\nlocal_batch_size = 1\nseq_len = 256\n[parallelism]\n{parallelism}\n"
    );
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    let config = load_str(&text, "job.toml", &sets).map_err(|e| e.to_string())?;
    resolve(config, &machine(world_size, world_size.min(8), true), &Tokenizer(300)).map_err(|e| e.to_string())
}

/// Eight heads on four, two layers.
const SMALL: &str = "vocab_size = 331\nhidden_size = 64\nintermediate_size = 192\nnum_hidden_layers = 4\n\
                     num_attention_heads = 8\nnum_key_value_heads = 4\nhead_dim = 8\nmax_position_embeddings = 256\n\
                     tie_word_embeddings = true";

/// Two stages of two tensor ranks that read two sequences.
fn hybrid() -> Schedule {
    let degrees = "pipeline_parallel_degree = 2\ntensor_parallel_degree = 2\ndata_parallel_shard_degree = 2";
    let plan = plan(8, SMALL, degrees, &["training.global_batch_size=4"]).unwrap();
    let schedule = Schedule::new(&plan);
    schedule.prove().unwrap();
    schedule
}

fn refused(schedule: &Schedule, expected: Expect) {
    expected.assert_eq(&schedule.prove().unwrap_err().to_string());
}

/// Places of the calls of a group in a rank's steps.
fn calls_of(schedule: &Schedule, rank: usize, part: usize, is_one: impl Fn(&Call) -> bool) -> Vec<usize> {
    let is_one = |step: &Step| matches!(step.does, Does::Call(call) if is_one(schedule.call(call)));
    schedule.steps(rank, part).iter().enumerate().filter(|(_, step)| is_one(step)).map(|(at, _)| at).collect()
}

/// Replaces the call at a place of a rank's steps.
fn change(schedule: &mut Schedule, rank: usize, part: usize, at: usize, change: impl FnOnce(&mut Call)) {
    let Does::Call(place) = schedule.steps(rank, part)[at].does else { panic!("no call") };
    let mut call = schedule.call(place).clone();
    change(&mut call);
    let place = schedule.place_of(call);
    schedule.steps_mut(rank, part)[at].does = Does::Call(place);
}

#[test]
fn a_call_that_is_left_out_is_named() {
    let mut schedule = hybrid();
    let at = calls_of(&schedule, 1, 0, |call| call.group == Group::Tensor)[2];
    schedule.steps_mut(1, 0).remove(at);
    refused(
        &schedule,
        expect![
            "pass: call 2 of tensor [0, 1]: rank 0 calls reduce_scatter of 2 B x [8192, 8192] for Exchange { exchange: ScatterSequence, pass: Forward, layer: 0, micro_batch: 0 }; rank 1 calls all_gather of 2 B x [8192, 8192] for Exchange { exchange: GatherSequence, pass: Forward, layer: 0, micro_batch: 0 }: they call different things"
        ],
    );
    // The last one of all.
    let mut schedule = hybrid();
    let at = *calls_of(&schedule, 2, 1, |call| call.group == Group::StatesOverParameters).last().unwrap();
    schedule.steps_mut(2, 1).remove(at);
    refused(
        &schedule,
        expect![
            "update: call 0 of states_over_parameters [0, 2]: rank 0 calls all_gather of 2 B x [35328, 24704] for PublishBucket(0); rank 2 makes only 0 calls there"
        ],
    );
}

#[test]
fn another_size_is_named() {
    let mut schedule = hybrid();
    let at = calls_of(&schedule, 5, 0, |call| call.group == Group::Tensor)[7];
    change(&mut schedule, 5, 0, at, |call| call.counts = call.counts.iter().map(|n| n + 1).collect());
    refused(
        &schedule,
        expect![
            "pass: call 7 of tensor [4, 5]: rank 4 calls reduce_scatter of 2 B x [8192, 8192] for Exchange { exchange: ScatterSequence, pass: Forward, layer: 3, micro_batch: 0 }; rank 5 calls reduce_scatter of 2 B x [8193, 8193] for Exchange { exchange: ScatterSequence, pass: Forward, layer: 3, micro_batch: 0 }: their sizes differ"
        ],
    );
}

#[test]
fn another_type_is_named() {
    let mut schedule = hybrid();
    let at = calls_of(&schedule, 1, 1, |call| call.group == Group::TiedEnds)[0];
    change(&mut schedule, 1, 1, at, |call| call.element_bytes = 2);
    refused(
        &schedule,
        expect![
            "update: call 0 of tied_ends [1, 5]: rank 1 calls all_reduce of 2 B x 10560 for SumReplicated; rank 5 calls all_reduce of 4 B x 10560 for SumReplicated: their types differ"
        ],
    );
}

#[test]
fn swapped_calls_are_named() {
    let mut schedule = hybrid();
    let calls = calls_of(&schedule, 6, 0, |call| call.group == Group::Tensor);
    schedule.steps_mut(6, 0).swap(calls[0], calls[1]);
    refused(
        &schedule,
        expect![
            "pass: call 0 of tensor [6, 7]: rank 6 calls reduce_scatter of 2 B x [8192, 8192] for Exchange { exchange: ScatterSequence, pass: Forward, layer: 2, micro_batch: 0 }; rank 7 calls all_gather of 2 B x [8192, 8192] for Exchange { exchange: GatherSequence, pass: Forward, layer: 2, micro_batch: 0 }: they call different things"
        ],
    );
    // Of different groups: each group sees the same order, but ranks wait for each other in a circle.
    let mut schedule = hybrid();
    for rank in [0, 5] {
        let first = calls_of(&schedule, rank, 1, |call| call.group == Group::Tensor)[0];
        let second = calls_of(&schedule, rank, 1, |call| call.group == Group::TiedEnds)[0];
        schedule.steps_mut(rank, 1).swap(first, second);
    }
    refused(
        &schedule,
        expect![[r#"
        update: nobody can go on:
          rank 0 waits in SumReplicated for rank 4: call 0 of tied_ends
          rank 4 waits in SumReplicated for rank 5: call 0 of tensor
          rank 5 waits in SumReplicated for rank 1: call 0 of tied_ends
          rank 1 waits in SumReplicated for rank 0: call 0 of tensor"#]],
    );
}

#[test]
fn a_send_without_its_receive_is_named() {
    let mut schedule = hybrid();
    let at = calls_of(&schedule, 5, 0, |call| call.kind == CallKind::Receive)[1];
    schedule.steps_mut(5, 0).remove(at);
    refused(
        &schedule,
        expect![
            "pass: transfer 1 from rank 1 to rank 5: rank 1 calls send of 2 B x 8192 for Send(Forward, 1); rank 5 does nothing for it"
        ],
    );
    let mut schedule = hybrid();
    let at = calls_of(&schedule, 1, 0, |call| call.kind == CallKind::Send)[1];
    change(&mut schedule, 1, 0, at, |call| call.counts = [3].into());
    refused(
        &schedule,
        expect![
            "pass: transfer 1 from rank 1 to rank 5: rank 1 calls send of 2 B x 3 for Send(Forward, 1); rank 5 calls recv of 2 B x 8192 for Receive(Forward, 1): their sizes differ"
        ],
    );
}

#[test]
fn who_waits_for_whom_is_named() {
    let mut schedule = hybrid();
    // Both stages receive before they send.
    let received = calls_of(&schedule, 0, 0, |call| call.kind == CallKind::Receive)[0];
    let step = schedule.steps_mut(0, 0).remove(received);
    schedule.steps_mut(0, 0).insert(0, step);
    refused(
        &schedule,
        expect![[r#"
        pass: nobody can go on:
          rank 0 waits in Receive(Backward, 0) for rank 4: to send what it receives
          rank 4 waits in Receive(Forward, 0) for rank 0: to send what it receives"#]],
    );
}

fn large(world_size: usize, parallelism: &str, sets: &[&str]) -> Plan {
    let sets = [&["training.seq_len=8192", "training.global_batch_size=1024"], sets].concat();
    plan(world_size, "flavor = 'llama-3.1-8b'", parallelism, &sets).unwrap()
}

#[test]
fn a_thousand_ranks_take_seconds() {
    let degrees = "data_parallel_replicate_degree = 2\npipeline_parallel_degree = 4\ntensor_parallel_degree = 4\n\
                   context_parallel_degree = 8\ncontext_parallel_head_degree = 2\ncontext_parallel_rotate_method = 'ring'\n\
                   zero_parameter_degree = 1\nzero_gradient_degree = 8";
    let plan = large(1024, degrees, &["activation_checkpoint.mode=full"]);
    let begin = std::time::Instant::now();
    let proof = prove(&plan).unwrap();
    println!("{}", render_schedule("schedule", &plan, &proof, begin.elapsed()));
    assert_eq!(proof.num_ranks, 1024);
    // Ten times what it takes where nothing is optimised and all cores are busy.
    assert!(begin.elapsed().as_secs() < 60, "{:?}", begin.elapsed());
}

#[test]
fn bytes_are_the_least_of_each_mode() {
    let cases = [
        (16, "data_parallel_shard_degree = 16"),
        (16, "data_parallel_replicate_degree = 2"),
        (16, "zero_parameter_degree = 16"),
        (16, "zero_parameter_degree = 16\nfsdp_reshard_after_forward = 'never'"),
        (16, "zero_parameter_degree = 2\nzero_gradient_degree = 4\nzero_optimizer_degree = 8"),
        (16, "tensor_parallel_degree = 8"),
        (16, "context_parallel_degree = 8\ncontext_parallel_head_degree = 8"),
        (16, "context_parallel_degree = 16\ncontext_parallel_head_degree = 16"),
        (16, "context_parallel_degree = 8"),
        (16, "context_parallel_degree = 8\ncontext_parallel_rotate_method = 'ring'"),
        (16, "pipeline_parallel_degree = 4"),
        (
            64,
            "pipeline_parallel_degree = 2\ntensor_parallel_degree = 4\ncontext_parallel_degree = 4\n\
              context_parallel_head_degree = 2\nzero_parameter_degree = 2",
        ),
    ];
    for (world_size, parallelism) in cases {
        for mode in ["none", "full", "selective"] {
            let sets = [
                format!("activation_checkpoint.mode={mode}"),
                "activation_checkpoint.selective_ac_option='attention'".into(),
            ];
            let plan = large(world_size, parallelism, &sets.each_ref().map(String::as_str));
            let (sent, least) = (prove(&plan).unwrap().traffic, minimum(&plan));
            for kind in Traffic::ALL.into_iter().filter(|&kind| kind != Traffic::Coordination) {
                let (sent, least) = (sent[kind as usize] as f64, least[kind as usize]);
                let close = (sent - least).abs() <= 0.02 * least;
                assert!(close, "{parallelism}, {mode}: {kind:?} {sent:e}, not {least:e}");
            }
        }
    }
}

/// One of the divisors of `n`.
fn divisor(n: usize, pick: usize) -> usize {
    let divisors: Vec<usize> = (1..=n).filter(|&d| n.is_multiple_of(d)).collect();
    divisors[pick % divisors.len()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_layout_is_proven(
        degrees in proptest::array::uniform5(1usize..=4), picks in proptest::array::uniform4(0usize..60),
        method in any::<bool>(), never in any::<bool>(), gpipe in any::<bool>(), batches in 1usize..=3,
        recompute in 0usize..4, tied in any::<bool>(), kv_heads in 0usize..4,
    ) {
        let [pp, replicate, shard, cp, tp] = degrees;
        let world_size: usize = degrees.iter().product();
        prop_assume!(world_size <= 64);
        let heads = divisor(cp, picks[0]);
        let states = divisor(shard * cp, picks[1]);
        let gradients = divisor(states, picks[2]);
        let parallelism = format!(
            "pipeline_parallel_degree = {pp}\ndata_parallel_replicate_degree = {replicate}\n\
             data_parallel_shard_degree = {shard}\ncontext_parallel_degree = {cp}\ntensor_parallel_degree = {tp}\n\
             context_parallel_head_degree = {heads}\ncontext_parallel_rotate_method = '{}'\n\
             zero_parameter_degree = {}\nzero_gradient_degree = {gradients}\nzero_optimizer_degree = {states}\n\
             fsdp_reshard_after_forward = '{}'\npipeline_parallel_schedule = '{}'",
            if method { "ring" } else { "allgather" },
            divisor(gradients, picks[3]),
            if never { "never" } else { "default" },
            if gpipe { "GPipe" } else { "1F1B" },
        );
        let mode = ["none", "full", "selective", "selective"][recompute];
        let option = ["1", "1", "attention", "feed_forward"][recompute];
        let sets = [
            format!("activation_checkpoint.mode='{mode}'"),
            format!("activation_checkpoint.selective_ac_option='{option}'"),
            format!("training.global_batch_size={}", batches * replicate * shard),
            format!("model.tie_word_embeddings={tied}"),
            "model.hidden_size=96".into(),
            "model.num_attention_heads=12".into(),
            format!("model.num_key_value_heads={}", [12, 4, 2, 1][kv_heads]),
            "training.seq_len=37".into(),
        ];
        // Whatever divides is built; what does not is refused with its reason.
        let plan = plan(world_size, SMALL, &parallelism, &sets.each_ref().map(String::as_str));
        prop_assume!(plan.is_ok());
        let proof = prove(&plan.unwrap());
        prop_assert!(proof.is_ok(), "{parallelism}\n{}", proof.unwrap_err());
    }
}
