//! Gradients of one global batch under every layout of the data ranks, against one rank.

use crate::job::Job;
use crate::support;
use std::collections::BTreeMap;
use std::sync::Mutex;
use tangelo_configs::Plan;
use tangelo_configs::resolve::{self, Resources};
use tangelo_core::LossSpec;
use tangelo_data::{Loader, Split, loader_options};
use tangelo_kernels::comm::{CommOptions, Communicator, local};
use tangelo_trainer::init;
use tangelo_trainer::worker::TrainWorker;
use tch::{Device, Tensor};

/// Each sum over ranks and each product rounds once more or less: some 1e-7 of a gradient's norm.
const MAX_GRADIENT_ERROR: f64 = 1e-6;

type Gradients = BTreeMap<String, Vec<f32>>;

fn plan(job: &Job, ranks: usize, sets: &[&str]) -> Plan {
    let mut sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    // Whole micro-batches of two rows for two, three and four ranks.
    sets.push("training.global_batch_size=24".into());
    sets.push(format!("job.dump_folder={:?}", job.path("prepare").display().to_string()));
    let config = resolve::load(&job.path("job.toml"), &sets).unwrap();
    let resources = Resources::of_this_machine(ranks, ranks).unwrap();
    resolve::resolve(config, &resources, &tangelo_formats::Assets).unwrap()
}

/// The reduced gradients that this rank owns, by parameter and first element, and the norm of all.
fn one_rank(plan: &Plan, comm: Communicator, initialising: &Mutex<()>) -> (BTreeMap<(String, usize), Vec<f32>>, f64) {
    let rank = comm.rank();
    let mut worker = TrainWorker::new(plan, rank, comm, Device::Cpu).unwrap();
    {
        // libtorch's generator is one for all threads.
        let _alone = initialising.lock().unwrap();
        init::from_seed(worker.model(), plan.config.debug.seed);
    }
    worker.adopt_weights();
    let options = loader_options(&plan.config, Split::Train, plan.global_batch_size, rank, plan.data_parallel_size);
    let batch = Loader::open(options.unwrap()).unwrap().batch_at(0).unwrap();
    worker.forward_backward(&batch, &LossSpec::next_token(), false).unwrap();
    worker.optimizer().reduce(worker.model()).unwrap();
    let (norm, _) = worker.optimizer().grad_norm(worker.model()).unwrap();
    let mut owned = BTreeMap::new();
    for state in worker.optimizer().states() {
        let unit = &worker.model().units()[state.unit];
        let span = &unit.spans()[state.range.param];
        let flat = &state.range.flat;
        let gradient = unit.main_grad().unwrap().narrow(0, flat.start as i64, flat.len() as i64);
        owned.insert((span.meta.name.clone(), flat.start - span.offset), Vec::<f32>::try_from(&gradient).unwrap());
    }
    (owned, norm)
}

/// The whole gradients, put together from what each rank owns, and the norm that every rank found.
fn gradients(job: &Job, ranks: usize, sets: &[&str]) -> (Gradients, f64) {
    let plan = plan(job, ranks, sets);
    let initialising = Mutex::new(());
    let group = local::group(ranks, &CommOptions::default());
    let parts: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            group.into_iter().map(|comm| scope.spawn(|| one_rank(&plan, comm, &initialising))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let norm = parts[0].1;
    assert!(parts.iter().all(|part| part.1 == norm), "{ranks} ranks, {sets:?}: ranks found different norms");
    // Ranks that hold the same part hold the same bits; parts in order of their first element make up the whole.
    let mut pieces: BTreeMap<(String, usize), Vec<f32>> = BTreeMap::new();
    for (key, values) in parts.into_iter().flat_map(|part| part.0) {
        let known = pieces.entry(key.clone()).or_insert_with(|| values.clone());
        assert!(*known == values, "{ranks} ranks, {sets:?}: copies of {key:?} differ");
    }
    let mut whole = Gradients::new();
    for ((name, start), values) in pieces {
        let gradient = whole.entry(name).or_default();
        assert_eq!(gradient.len(), start, "a gap or an overlap");
        gradient.extend(values);
    }
    (whole, norm)
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let [found, expected] = [found, expected].map(|x| Tensor::from_slice(x).to_kind(tch::Kind::Double));
    ((found - &expected).norm() / expected.norm()).double_value(&[])
}

#[test]
fn gradients_do_not_depend_on_the_layout() {
    let job = Job::new(support::fresh_seed());
    job.run("prepare", 1, &["--set", "training.steps=1"]);
    let (expected, expected_norm) = gradients(&job, 1, &[]);
    let replicas = "parallelism.data_parallel_replicate_degree=2";
    let layouts: [(usize, &[&str]); 7] = [
        (2, &[]),
        (2, &["parallelism.zero_optimizer_degree=1"]),
        (3, &[]),
        (4, &[]),
        (4, &["parallelism.zero_optimizer_degree=2"]),
        (4, &[replicas]),
        (4, &[replicas, "parallelism.zero_optimizer_degree=1"]),
    ];
    let mut by_ranks: BTreeMap<usize, (Gradients, f64)> = BTreeMap::new();
    for (ranks, sets) in layouts {
        let (found, norm) = gradients(&job, ranks, sets);
        assert!(found.keys().eq(expected.keys()));
        let mut worst = 0f64;
        for (name, values) in &found {
            let error = relative_error(values, &expected[name]);
            assert!(error <= MAX_GRADIENT_ERROR, "{ranks} ranks, {sets:?}: {name} is off by {error:.1e}");
            worst = worst.max(error);
        }
        println!("{ranks} ranks, {sets:?}: worst gradient error {worst:.1e}");
        assert!((norm / expected_norm - 1.0).abs() <= MAX_GRADIENT_ERROR, "{norm} against {expected_norm}");
        let same_ranks = by_ranks.entry(ranks).or_insert_with(|| (found.clone(), norm));
        assert!(*same_ranks == (found, norm), "{ranks} ranks: {sets:?} gives other bits than another ZeRO degree");
    }
}
