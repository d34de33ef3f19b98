//! From training layouts to generation layouts: every weight arrives with the bits it has, by the fewest bytes, in the
//! least memory; beside the formulas of HybridFlow's table 2 where the layout is pure p-t-d. The first test prints the table
//! of docs/resharding.md.

use super::harness::{Case, no_one_else_draws};
use crate::support;
use std::sync::Mutex;
use tangelo_configs::{ModelSpec, Plan};
use tangelo_core::reshard::Ranks;
use tangelo_core::{DType, Level};
use tangelo_kernels::comm::{CommOptions, Communicator, local};
use tangelo_kernels::device;
use tangelo_models::Model;
use tangelo_planner::publish::{GenerationLayout, PaperBytes, Publish, paper_bytes};
use tangelo_trainer::TrainWorker;
use tangelo_trainer::init::part_of;
use tangelo_trainer::publish::{Members, Published, Publisher, generation_model};
use tch::{Device, Kind};

/// Training layout; ranks that share a model in generation, and whether they have processes of their own (how many); the
/// type that is generated in.
const PAIRS: &str = "
    gqa               | tp1        | float
    gqa dp2           | tp1        | float
    gqa dp2           | tp1        | bf16
    gqa tp2           | tp2        | float
    mha tp2           | tp1        | bf16
    gqa dp2 tp2       | tp1        | bf16
    gqa dp2 tp4       | tp2        | float
    mha rep2 tp4      | tp1        | bf16
    gqa pp2 tp2       | tp1        | float
    qwen pp2 dp2 tp2  | tp2        | bf16
    odd pp4           | tp4        | float
    qwen dp4 z4.4.4   | tp1        | bf16
    qwen dp4 z2.4.4   | tp2        | float
    odd rep2 dp2 z1.1.2 cp2 | tp2  | bf16
    mha cp2 heads2 tp2 | tp4       | float
    qwen tp8          | tp8        | bf16
    gqa tp8           | tp2        | float
    gqa dp2 tp2 z2.2.2 muon | tp2  | bf16
    gqa dp2           | own2 tp1   | bf16
    mha pp2 tp2       | own3 tp1   | float
    qwen tp2          | own4 tp4   | bf16
    qwen dp2 z2.2.2   | own2 tp2   | float
";

/// Elements of a bucket: small, so that every pair needs several and the largest parameters are cut.
const BUCKET: usize = 20_000;

struct Pair {
    case: Case,
    tp: usize,
    own: Option<usize>,
    kind: Kind,
}

/// What a generation rank ended up with.
struct Arrived {
    rank: usize,
    moved: Published,
    /// Bytes of tensors that came to be at most, and those of the weights that the rank holds beyond the trainer's.
    allocated: u64,
    own: u64,
}

impl Pair {
    fn parse(line: &str, seed: u64) -> Pair {
        let [layout, generation, kind] = line.split('|').map(str::trim).collect::<Vec<_>>()[..] else {
            panic!("three columns: {line}")
        };
        let number = |prefix: &str| {
            generation
                .split_whitespace()
                .find_map(|word| word.strip_prefix(prefix))
                .map(|n| n.parse().expect("a number"))
        };
        let kind = if kind == "bf16" { Kind::BFloat16 } else { Kind::Float };
        Pair { case: Case::parse(layout, seed), tp: number("tp").expect("a degree"), own: number("own"), kind }
    }

    fn layout(&self, plan: &Plan) -> GenerationLayout {
        match self.own {
            Some(ranks) => GenerationLayout::separate(ranks, self.tp),
            None => GenerationLayout::colocated(&plan.topology, self.tp),
        }
        .expect("a layout that fits")
    }

    fn way(&self, plan: &Plan) -> Publish {
        let ranks = if self.own.is_some() { Ranks::Separate } else { Ranks::Same };
        Publish::new(&plan.model, &plan.sharding(), &self.layout(plan), ranks, BUCKET).expect("a way")
    }

    /// Runs every rank on a thread; `truth` has the weights.
    fn run(&self, plan: &Plan, truth: &Mutex<Model>) -> Vec<Arrived> {
        let training = plan.topology.mesh.world_size();
        let total = training + self.own.unwrap_or(0);
        let arrived = std::thread::scope(|scope| {
            let start = |comm: Communicator| scope.spawn(move || self.rank(plan, comm, training, truth));
            let threads: Vec<_> = local::group(total, &CommOptions::default()).into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("a rank ends well")).collect::<Vec<_>>()
        });
        arrived.into_iter().flatten().collect()
    }

    fn rank(&self, plan: &Plan, comm: Communicator, training: usize, truth: &Mutex<Model>) -> Option<Arrived> {
        let (layout, rank) = (self.layout(plan), comm.rank());
        let trains = rank < training;
        let pool = comm.split_many(&[("pool", Some(u32::from(!trains)), rank as i64)]).expect("pools").remove(0);
        let mut worker =
            trains.then(|| TrainWorker::new(plan, rank, pool.expect("a pool"), Device::Cpu).expect("a worker"));
        if let Some(worker) = &mut worker {
            no_one_else_draws(|| worker.start_from_seed(self.case.seed()));
        }
        let (members, place) = match self.own {
            Some(own) => (Members::separate(training, own), rank.checked_sub(training)),
            None => (Members::same(training), Some(rank)),
        };
        let publisher = Publisher::new(self.way(plan), members, self.kind);
        let ((model, moved), allocated) = device::count_allocations(|| {
            let model = place
                .map(|place| generation_model(worker.as_ref(), &plan.model, &layout, place, self.kind, Device::Cpu));
            let moved = publisher.run(&comm, worker.as_ref(), model.as_ref()).expect("weights arrive");
            (model, moved)
        });
        let (model, place) = (model?, place?);
        check_weights(&model, &truth.lock().expect("no rank panicked"), self.kind);
        let bytes: usize = model.units().iter().map(|unit| unit.len() * self.kind.elt_size_in_bytes()).sum();
        Some(Arrived { rank: place, moved, allocated, own: bytes as u64 - moved.shared_bytes })
    }
}

/// The generation model has exactly the bits of the whole model, in its type.
fn check_weights(model: &Model, truth: &Model, kind: Kind) {
    for unit in model.units() {
        for span in unit.spans() {
            let whole = truth.weight(&span.meta.name).expect("the same parameters").value;
            let expected = part_of(&whole, &span.held).to_kind(kind).contiguous();
            assert!(unit.value(&span.meta.name).equal(&expected), "{} differs", span.meta.name);
        }
    }
}

/// |generation shard| - |its intersection with the training shard|, elements.
fn least(plan: &Plan, layout: &GenerationLayout, rank: usize, same: bool) -> usize {
    let shards = layout.sharding(&plan.model);
    let one = |meta: &tangelo_core::ParamMeta| {
        let needed = shards.model_box(meta, layout.part(rank));
        let held = plan.sharding().box_at(meta, Level::Parameters, if same { rank } else { 0 });
        needed.volume() - if same { held.intersect(&needed).map_or(0, |both| both.volume()) } else { 0 }
    };
    plan.model.parameters(DType::F32).iter().map(one).sum()
}

#[test]
fn weights_arrive_with_their_bits_by_the_fewest_bytes() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    println!(
        "| training | generation | type | received = least | peak | shard + bucket | DS-Chat | HybridFlow-V | HybridFlow |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for line in PAIRS.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let pair = Pair::parse(line, seed);
        let plan = pair.case.plan();
        let truth = whole_model(&plan, seed);
        let (layout, width) = (pair.layout(&plan), pair.kind.elt_size_in_bytes() as u64);
        let mut most = Row::default();
        for arrived in pair.run(&plan, &truth) {
            let least = least(&plan, &layout, arrived.rank, pair.own.is_none()) as u64 * width;
            assert_eq!(arrived.moved.received_bytes, least, "{line}: rank {}", arrived.rank);
            // The shard, what one bucket sends and receives, and the largest view's copy where a type is changed.
            let bound = arrived.own + BUCKET as u64 * width;
            assert!(
                arrived.allocated <= bound,
                "{line}: rank {}: {} of {bound} bytes",
                arrived.rank,
                arrived.allocated
            );
            most.received = most.received.max(least);
            most.fewest = most.fewest.min(least);
            (most.allocated, most.bound) = (most.allocated, most.bound).max((arrived.allocated, bound));
        }
        println!("{}", most.print(line, beside(&plan, &pair, most.received)));
    }
}

/// What the ranks of a pair received, and the peak of parameter memory beyond training's beside its bound; bytes.
struct Row {
    fewest: u64,
    received: u64,
    allocated: u64,
    bound: u64,
}

impl Default for Row {
    fn default() -> Row {
        Row { fewest: u64::MAX, received: 0, allocated: 0, bound: 0 }
    }
}

impl Row {
    fn print(&self, line: &str, paper: Option<PaperBytes>) -> String {
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        let paper = paper.map_or("- | - | -".into(), |p| {
            format!("{:.0} | {:.0} | {:.0}", p.deepspeed_chat, p.hybridflow_v, p.hybridflow)
        });
        let received = if self.fewest == self.received {
            self.received.to_string()
        } else {
            format!("{} to {}", self.fewest, self.received)
        };
        format!("| {} | {received} | {} | {} | {paper} |", columns.join(" | "), self.allocated, self.bound)
    }
}

/// The whole model, with the values that every layout starts from.
fn whole_model(plan: &Plan, seed: u64) -> Mutex<Model> {
    let model = Model::zeros(&plan.model, Kind::Float, Device::Cpu, false);
    let std = plan.model.initializer_range;
    no_one_else_draws(|| model.units().iter().for_each(|unit| tangelo_trainer::init::from_seed(unit, seed, std)));
    Mutex::new(model)
}

/// The paper's formulas, where they hold: every axis but p, t and d is 1, nothing is cut over d, t_g divides t.
fn beside(plan: &Plan, pair: &Pair, received: u64) -> Option<PaperBytes> {
    let (t, topology) = (&plan.config.parallelism, &plan.topology);
    let tp = t.tensor_parallel_degree;
    let pure = topology.scopes.parameters == 1 && t.context_parallel_degree == 1 && pair.own.is_none();
    if !pure || !tp.is_multiple_of(pair.tp) {
        return None;
    }
    let p = t.pipeline_parallel_degree;
    let d = topology.mesh.world_size() / (p * tp);
    let model_bytes = (elements(&plan.model) * pair.kind.elt_size_in_bytes()) as f64;
    let paper = paper_bytes(model_bytes, [p, tp, d], pair.tp);
    // Norms and biases of sums are whole on every tensor rank, stages differ in size, key heads may be fewer than ranks.
    assert!(received as f64 <= 1.6 * paper.hybridflow + 1.0, "{received} against {paper:?}");
    Some(paper)
}

fn elements(spec: &ModelSpec) -> usize {
    spec.parameters(DType::F32).iter().map(tangelo_core::ParamMeta::num_elements).sum()
}

#[test]
fn a_rank_that_generates_what_it_trains_copies_nothing() {
    let pair = Pair::parse("gqa dp2 tp2 | tp2 | float", support::fresh_seed());
    let plan = pair.case.plan();
    let truth = whole_model(&plan, pair.case.seed());
    for arrived in pair.run(&plan, &truth) {
        assert_eq!((arrived.moved.received_bytes, arrived.own), (0, 0));
        // The frequencies of rotary embeddings, 4 of them.
        assert!(arrived.allocated < 256, "{} bytes", arrived.allocated);
        assert!(arrived.moved.shared_bytes > 0);
    }
}
