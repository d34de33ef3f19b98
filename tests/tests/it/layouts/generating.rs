//! Generation over tensor ranks: log-probabilities are those of the trainer at the same degree, to the bit; tokens are those
//! of one rank; and what is generated after a transition is what is generated from an exported checkpoint.

use super::harness::{Case, LR};
use super::moving::save;
use crate::support;
use std::path::Path;
use std::sync::Barrier;
use tangelo_configs::{EngineConfig, Plan, SamplingParams};
use tangelo_core::batch::{ragged_f32, ragged_u32};
use tangelo_core::hash::mix64;
use tangelo_core::reshard::Ranks;
use tangelo_core::{Batch, Column, DType, Group, LossSpec};
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::device;
use tangelo_models::Model;
use tangelo_planner::publish::{GenerationLayout, Publish};
use tangelo_rollout::{Completion, Engine, FinishReason, Request};
use tangelo_trainer::init;
use tangelo_trainer::open_model::Source;
use tangelo_trainer::publish::{Members, Publisher, generation_model};
use tangelo_trainer::verb::export;
use tangelo_trainer::worker::{TrainWorker, kind_of};
use tch::Device;

const EOS: u32 = 330;

/// A layout of the table with weights large enough that distributions have peaks, in a type.
fn case(line: &str, dtype: &str, seed: u64) -> Case {
    let mut case = Case::parse(line, seed);
    case.set("model", &["initializer_range=0.2"]);
    case.set("training", &[&format!("mixed_precision_param='{dtype}'")]);
    case
}

/// Prompts of 1 to 20 tokens, the same on every rank.
fn requests(seed: u64, count: u64, sampling: &SamplingParams) -> Vec<Request> {
    let draw = |id: u64, i: u64| mix64(mix64(seed ^ id) ^ i);
    let prompt = |id| (1..=1 + draw(id, 0) % 20).map(|i| (draw(id, i) % u64::from(EOS)) as u32).collect();
    let request = |id| Request { id, prompt: prompt(id), sampling: sampling.clone(), seed: seed ^ id };
    (0..count).map(request).collect()
}

fn sampling(n: usize) -> SamplingParams {
    SamplingParams { n, max_tokens: 24, temperature: 0.8, ..SamplingParams::default() }
}

/// Slots, tokens of a step.
fn options(max_num_seqs: usize, max_num_batched_tokens: usize) -> EngineConfig {
    EngineConfig { max_num_seqs, max_num_batched_tokens, kv_memory_mib: 8, ..EngineConfig::default() }
}

/// All samples, by request and sample.
fn run(engine: &mut Engine, model: &Model, requests: &[Request]) -> Vec<Completion> {
    requests.iter().for_each(|request| engine.add(request.clone()).expect("a good request"));
    let mut completions = engine.run(model).expect("the engine runs");
    completions.sort_by_key(|c| (c.request, c.index));
    completions
}

/// One rank's generation model and its group, of the layout with `tp` ranks a replica; the trainer's weights are in it.
fn published(plan: &Plan, worker: &TrainWorker, comm: &Communicator, tp: usize) -> (Model, Communicator) {
    let layout = GenerationLayout::colocated(&plan.topology, tp).expect("a layout that fits");
    let group = group_of(&layout, comm);
    let kind = worker.model().kind();
    let model = generation_model(Some(worker), &plan.model, &layout, comm.rank(), kind, Device::Cpu);
    let way = Publish::new(&plan.model, &plan.sharding(), &layout, Ranks::Same, 20_000).expect("a way");
    let publisher = Publisher::new(way, Members::same(comm.size()), kind);
    publisher.run(comm, Some(worker), Some(&model)).expect("weights arrive");
    (model, group)
}

/// The ranks that hold a model together with this one.
fn group_of(layout: &GenerationLayout, comm: &Communicator) -> Communicator {
    let (replica, part) = (layout.replica(comm.rank()) as u32, layout.part(comm.rank()) as i64);
    comm.split("generate", Some(replica), part).expect("a group").expect("this rank's")
}

/// A worker with the case's weights, and a communicator of the same ranks beside its own.
fn worker(case: &Case, plan: &Plan, comm: Communicator) -> (TrainWorker, Communicator) {
    let beside = comm.split("beside", Some(0), comm.rank() as i64).expect("a group").expect("every rank's");
    (case.worker(plan, comm), beside)
}

// ---- beside the trainer --------------------------------------------------------------------------------------------

/// Rows for training, as generation makes them.
fn rows(requests: &[Request], completions: &[Completion]) -> Batch {
    let whole: Vec<Vec<u32>> =
        completions.iter().map(|c| [requests[c.request as usize].prompt.as_slice(), &c.ids].concat()).collect();
    let drawn = |c: &Completion| requests[c.request as usize].prompt.len() - 1;
    let cut = |from: usize| whole.iter().map(|w| w[from..w.len() - 1 + from].to_vec()).collect::<Vec<_>>();
    let each = |value: fn(usize) -> u32| {
        whole.iter().map(|w| (0..w.len() - 1).map(value).collect()).collect::<Vec<Vec<u32>>>()
    };
    let mask: Vec<Vec<f32>> =
        completions.iter().map(|c| [vec![0.0; drawn(c)], vec![1.0; c.ids.len()]].concat()).collect();
    Batch::from_columns(vec![
        (Column::Tokens, ragged_u32(&cut(0))),
        (Column::Targets, ragged_u32(&cut(1))),
        (Column::Positions, ragged_u32(&each(|i| i as u32))),
        (Column::SeqId, ragged_u32(&each(|_| 0))),
        (Column::LossMask, ragged_f32(&mask)),
    ])
    .expect("columns of equal lengths")
}

/// The trainer's log-probabilities of the tokens of each completion.
fn trained(worker: &TrainWorker, requests: &[Request], completions: &[Completion], temperature: f64) -> Vec<Vec<f32>> {
    let batch = rows(requests, completions);
    let scored = worker.forward(&batch, &[Column::OldLogprob], temperature).expect("a pass").expect("the last stage");
    let all = scored.f32_values(Column::OldLogprob).expect("the column");
    let mut at = 0;
    let of = |c: &Completion| {
        at += requests[c.request as usize].prompt.len() - 1 + c.ids.len();
        all[at - c.ids.len()..at].to_vec()
    };
    completions.iter().map(of).collect()
}

/// Everything that is said of the log-probabilities and tokens of one layout, on one rank; its completions.
fn check(case: &Case, plan: &Plan, comm: Communicator) -> Vec<Completion> {
    let (worker, comm) = worker(case, plan, comm);
    let (model, group) = published(plan, &worker, &comm, plan.config.parallelism.tensor_parallel_degree);
    let group = || group.split("again", Some(0), group.rank() as i64).expect("a group").expect("this rank's");
    let engine = |options| Engine::parallel(&model, &options, &[EOS], None, group()).expect("an engine");
    let requests = requests(case.seed(), 5, &sampling(3));
    let expected = run(&mut engine(options(64, 8192)), &model, &requests);
    for (at, of) in [(1.0, (|c| &c.logprobs) as fn(&Completion) -> &Vec<f32>), (0.8, |c| &c.sampling_logprobs)] {
        let trained = trained(&worker, &requests, &expected, at);
        let found: Vec<&Vec<f32>> = expected.iter().map(of).collect();
        assert_eq!(found, trained.iter().collect::<Vec<_>>(), "at temperature {at}");
    }
    // Whatever is beside a sample, in whichever pieces, however often it is computed again.
    for options in [options(3, 3), options(7, 16), EngineConfig { kv_memory_mib: 1, ..options(64, 64) }] {
        assert_eq!(run(&mut engine(options.clone()), &model, &requests), expected, "{options:?}");
    }
    let mut disturbed = engine(options(64, 64));
    requests.iter().for_each(|request| disturbed.add(request.clone()).expect("a good request"));
    let mut found = Vec::new();
    for step in 0.. {
        if disturbed.is_idle() {
            break;
        }
        if step % 5 == 4 {
            disturbed.release_kv();
            disturbed.acquire_kv();
        }
        found.extend(disturbed.step(&model).expect("a step").completions);
    }
    found.sort_by_key(|c| (c.request, c.index));
    assert_eq!(found, expected, "keys and values taken away");
    expected.into_iter().chain(check_filters(&worker, &model, &mut engine(options(64, 8192)), case.seed())).collect()
}

/// Draws from some of the tokens, and without some.
fn check_filters(worker: &TrainWorker, model: &Model, engine: &mut Engine, seed: u64) -> Vec<Completion> {
    let mut requests = requests(seed ^ 1, 6, &sampling(2));
    for (i, request) in requests.iter_mut().enumerate() {
        let sampling = &mut request.sampling;
        match i % 3 {
            0 => sampling.top_k = 3,
            1 => (sampling.top_p, sampling.min_p) = (0.9, 0.02),
            // Every id of one rank is banned, and some of the others'.
            _ => (sampling.stop_token_ids, sampling.min_tokens) = ((0..200).collect(), 20),
        }
    }
    let completions = run(engine, model, &requests);
    let trained = trained(worker, &requests, &completions, 1.0);
    for (c, trained) in completions.iter().zip(&trained) {
        assert_eq!(&c.logprobs, trained, "request {}", c.request);
        let sampling = &requests[c.request as usize].sampling;
        assert!(c.sampling_logprobs.iter().zip(&c.logprobs).any(|(drawn, model)| drawn > model), "nothing was dropped");
        assert!(sampling.min_tokens == 0 || c.ids[..20].iter().all(|&id| id >= 200), "a banned token was drawn");
    }
    completions
}

#[test]
fn log_probabilities_over_tensor_ranks_are_the_trainers() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    for line in ["gqa tp2", "odd tp2", "qwen tp2", "mha tp4", "odd tp4"] {
        for dtype in ["float32", "bfloat16"] {
            let case = case(line, dtype, seed);
            let found = case.on_all_ranks(|plan, comm| check(&case, plan, comm));
            assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{line} {dtype}: ranks drew different tokens");
        }
    }
}

/// Likeliest tokens of `requests`, with as many tensor ranks as the line says.
fn greedy(line: &str, seed: u64) -> (Vec<Request>, Vec<Completion>) {
    let case = case(line, "float32", seed);
    let likeliest = SamplingParams { temperature: 0.0, ignore_eos: true, max_tokens: 24, ..SamplingParams::default() };
    let requests = requests(seed, 8, &likeliest);
    let mut found = case.on_all_ranks(|plan, comm| {
        let (worker, comm) = worker(&case, plan, comm);
        let (model, group) = published(plan, &worker, &comm, comm.size());
        let mut engine = Engine::parallel(&model, &options(4, 32), &[EOS], None, group).expect("an engine");
        run(&mut engine, &model, &requests)
    });
    (requests.clone(), found.swap_remove(0))
}

#[test]
fn two_tensor_ranks_choose_the_tokens_that_one_chooses() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    for model in ["gqa", "mha"] {
        let (_, one) = greedy(model, seed);
        let (_, two) = greedy(&format!("{model} tp2"), seed);
        for (one, two) in one.iter().zip(&two) {
            let same = one.ids.iter().zip(&two.ids).take_while(|(a, b)| a == b).count();
            // Sums over ranks are grouped otherwise: two tokens may change places only where they are as likely to within
            // rounding (some 1e-6 of logits of the order of 10).
            let near = one.logprobs.get(same).zip(two.logprobs.get(same)).is_none_or(|(a, b)| (a - b).abs() < 1e-5);
            assert!(near, "{model}: request {} parts at token {same}", one.request);
            let apart = one.logprobs.iter().zip(&two.logprobs).take(same).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f32::max) < 1e-4, "{model}: request {}", one.request);
        }
    }
}

#[test]
fn a_group_stops_before_the_same_step() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let case = case("gqa tp2", "float32", seed);
    let ready = Barrier::new(2);
    let stopped = case.on_all_ranks(|plan, comm| {
        let (worker, comm) = worker(&case, plan, comm);
        let (model, group) = published(plan, &worker, &comm, 2);
        let mut engine = Engine::parallel(&model, &options(4, 32), &[EOS], None, group).expect("an engine");
        let endless = SamplingParams { ignore_eos: true, max_tokens: 1000, ..sampling(1) };
        let requests = requests(seed, 3, &SamplingParams { max_tokens: 40, ..endless });
        requests.iter().for_each(|request| engine.add(request.clone()).expect("a good request"));
        let mut steps = 0;
        ready.wait();
        // One rank is told in its eighth step; the other never is.
        while !engine.any(comm.rank() == 1 && steps == 8).expect("both ranks live") {
            engine.step(&model).expect("a step");
            steps += 1;
        }
        let aborted: Vec<Completion> = (0..3).flat_map(|id| engine.abort(id)).collect();
        assert!(engine.is_idle() && engine.free_blocks() == engine.num_blocks());
        assert!(aborted.iter().all(|c| c.finish_reason == FinishReason::Abort));
        (steps, aborted)
    });
    assert_eq!(stopped[0].0, 8);
    assert_eq!(stopped[0], stopped[1]);
}

#[test]
fn parts_that_make_no_model_are_refused() {
    device::set_threads(1);
    let case = case("gqa tp2", "float32", support::fresh_seed());
    let errors = case.on_all_ranks(|plan, comm| {
        // Both hold the same half.
        let layout = GenerationLayout::separate(2, 2).expect("a layout");
        let model = generation_model(
            None,
            &plan.model,
            &layout,
            0,
            kind_of(plan.config.training.mixed_precision_param),
            Device::Cpu,
        );
        Engine::parallel(&model, &options(4, 32), &[EOS], None, comm).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("ids 0..166, 4 heads; layers 0..4, ids 0..166, 4 heads"), "{error}");
        assert!(error.contains("of 4 layers, 331 ids and 8 heads"), "{error}");
    }
}

// ---- after a transition --------------------------------------------------------------------------------------------

/// What one rank generates after the transition from training, and from the checkpoint that training exported.
fn after_training(case: &Case, plan: &Plan, comm: Communicator, tp: usize, folder: &Path) -> [Vec<Completion>; 2] {
    let (mut worker, comm) = worker(case, plan, comm);
    let batch = case.rank_batch(plan, 0, plan.topology.index(Group::Batch, worker.rank()));
    let loss = worker.forward_backward(&batch, &LossSpec::next_token(), false).expect("a step");
    assert!(!worker.optim_step(LR, &loss).expect("an update").skipped);
    let (model, group) = published(plan, &worker, &comm, tp);
    let layout = GenerationLayout::colocated(&plan.topology, tp).expect("a layout that fits");
    let requests = requests(case.seed() ^ layout.replica(comm.rank()) as u64, 4, &sampling(2));
    let generate = |model: &Model, group| {
        let mut engine = Engine::parallel(model, &options(16, 64), &[EOS], None, group).expect("an engine");
        run(&mut engine, model, &requests)
    };
    let moved = generate(&model, group);
    save(&worker, plan, folder);
    let exported = folder.join("export");
    if comm.rank() == 0 {
        let checkpoint = Source::open(&folder.join("step-00000001"), None).expect("a checkpoint");
        export::write(&checkpoint, None, DType::F32, &exported, |_, _| {}).expect("an export");
    }
    comm.barrier().expect("every rank lives");
    let source = Source::open(&exported, None).expect("the export");
    let loaded = generation_model(None, &plan.model, &layout, comm.rank(), model.kind(), Device::Cpu);
    let fill = |unit| init::from_source(unit, source.tensors(), &mut |_, _| {});
    loaded.units().iter().try_for_each(fill).expect("the export has every weight");
    [moved, generate(&loaded, group_of(&layout, &comm))]
}

/// Training layout, ranks that share a model in generation, type.
const TRANSITIONS: [(&str, usize, &str); 8] = [
    ("gqa dp2", 2, "float32"),
    ("gqa dp2 z2.2.2", 1, "bfloat16"),
    ("gqa tp2", 1, "float32"),
    ("gqa pp2", 2, "bfloat16"),
    ("qwen pp2 tp2", 2, "float32"),
    ("qwen dp2 tp2", 4, "bfloat16"),
    ("gqa dp2 tp2", 2, "float32"),
    ("odd rep2 dp2 z1.1.2 cp2", 2, "bfloat16"),
];

#[test]
fn generation_after_a_transition_is_generation_from_an_exported_checkpoint() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let folder = tempfile::tempdir().unwrap();
    for (at, (line, tp, dtype)) in TRANSITIONS.into_iter().enumerate() {
        let case = case(line, dtype, seed);
        let folder = folder.path().join(at.to_string());
        let found = case.on_all_ranks(|plan, comm| after_training(&case, plan, comm, tp, &folder));
        for (rank, [moved, loaded]) in found.iter().enumerate() {
            assert!(moved.iter().map(|c| c.ids.len()).sum::<usize>() > 20, "{line}: nothing to compare");
            // Tokens, log-probabilities and versions.
            assert_eq!(moved, loaded, "{line} to {tp} tensor ranks, {dtype}: rank {rank}");
        }
    }
}
