//! What each instruction of a [`Program`](tangelo_core::Program) communicates, with sizes: the calls that the trainer
//! makes for it, in the trainer's order.
//!
//! | instruction | calls |
//! |---|---|
//! | `CountTokens`, `ShareLoss` | all-gather of two float64 over the batch's readers, over all ranks |
//! | `StartGather`, `StartReduce` | all-gather of weights, reduce-scatter of fp32 gradients, uneven, beside the computation |
//! | `Embed`, `EmbedBackward` | scatter of the tensor ranks' partial embeddings, gather of their gradients |
//! | `Exchange` | one collective over tensor or heads ranks for all that is worked on |
//! | `RingAttend` of R ranks | R - 1 shifts of keys and values, or one all-gather |
//! | its backward | R - 1 shifts of keys and values and as many of fp32 gradients, or an all-gather and a reduce-scatter |
//! | `Loss` under tensor parallelism | gather of hidden states, three numbers a token for each chunk, scatter of gradients; none with a scalar head |
//! | `Send`, `Receive` | this rank's tokens of the residual stream |
//! | `StartBucket`, `SumBucket` | reduce-scatter beyond the gradients' scope, then all-reduce beyond the states', beside |
//! | `SumReplicated` | all-reduces of what several tensor ranks, or both ends of the pipeline, hold |
//! | `Norm` | all-gather of float64 chunk sums over the owners of states, of one number over the parts of the model |
//! | `UpdateMatrices` | under tensor parallelism, an all-gather in fp32 of the parts of the matrices that a rank owns |
//! | `PublishBucket` | all-gather of new weights beyond the weights' scope |
//!
//! A group of one rank makes no call; neither does a sum of nothing. Everything else is called even where it is empty.
//! Rows are always `seq_len` long, so every micro-batch has the same tokens. The loss is cross-entropy alone: sums of
//! components send a fourth number a token, and more counts and sums.

use super::buckets;
use crate::memory::LOSS_CHUNK_TOKENS;
use std::ops::Range;
use std::sync::Arc;
use tangelo_configs::job::RotateMethod;
use tangelo_configs::model::EMBEDDING;
use tangelo_configs::sharding::chunk_rows;
use tangelo_configs::{HeadSpec, MixerSpec, ModelSpec, Plan, Sharding};
use tangelo_core::{
    Axis, Call, CallKind, DType, Exchange, Group, Instruction, Level, ParamMeta, Pass, SequenceLayout, Topology, Unit,
};

/// Bytes of a gradient's element: fp32 whatever the weights are.
const GRADIENT_BYTES: usize = 4;
/// Bytes of a float64.
const F64_BYTES: usize = 8;

type Counts = Arc<[usize]>;

/// The sizes of everything that a plan communicates.
#[derive(Clone, Debug)]
pub struct Sizes {
    topology: Topology,
    element_bytes: usize,
    hidden_size: usize,
    layout: SequenceLayout,
    rotate_method: RotateMethod,
    has_scalar_head: bool,
    heads: Vec<LocalHeads>,
    /// By stage, then by tensor rank.
    parts: Vec<Vec<ModelPart>>,
}

/// Heads that one tensor rank has of a block.
#[derive(Clone, Copy, Debug)]
struct LocalHeads {
    queries: usize,
    keys: usize,
    head_dim: usize,
}

/// What one tensor rank of one stage holds of the model, cut over the ranks of the ZeRO scopes.
#[derive(Clone, Debug)]
struct ModelPart {
    units: Vec<Unit>,
    /// By unit.
    gathers: Vec<Counts>,
    reduces: Vec<Counts>,
    /// By bucket, then by place in the gradients' scope.
    bucket_reduces: Vec<Vec<Counts>>,
    /// By bucket, then by place in the weights' scope.
    bucket_publishes: Vec<Vec<Counts>>,
    /// By bucket, then by place in the states' scope.
    owned: Vec<Vec<usize>>,
    /// By bucket, then by place in the states' scope: elements of matrices whose updates this tensor rank sends.
    matrices: Vec<Vec<usize>>,
    /// By place in the states' scope: gradients to sum over [`SUMMED`].
    replicated: Vec<[usize; 3]>,
    /// Chunks of the norm, by place in the states' scope.
    chunks: Counts,
}

/// Groups that sum what they all hold, in the trainer's order.
const SUMMED: [Group; 3] = [Group::Tensor, Group::KeyReplicas, Group::TiedEnds];

/// Where a rank stands among those that share a sequence and a model.
struct Place {
    rank: usize,
    stage: usize,
    tensor: usize,
    heads: usize,
    ring: usize,
}

impl Sizes {
    /// The sizes of `plan`.
    pub fn new(plan: &Plan) -> Sizes {
        let topology = plan.topology.clone();
        let (size, training) = (|group| topology.size(group), &plan.config.training);
        let layout = SequenceLayout {
            num_tokens: training.local_batch_size * training.seq_len,
            ring: size(Group::Ring),
            heads: size(Group::Heads),
            tensor: size(Group::Tensor),
        };
        let heads = plan.model.blocks.iter().map(|block| {
            let MixerSpec::Attention(a) = &block.mixer;
            let keys = (a.num_kv_heads / layout.tensor).max(1);
            LocalHeads { queries: a.num_heads / layout.tensor, keys, head_dim: a.head_dim }
        });
        let parts = (0..topology.num_stages()).map(|stage| model_parts(plan, stage)).collect();
        Sizes {
            element_bytes: plan.compute_dtype().size_bytes(),
            hidden_size: plan.model.hidden_size,
            layout,
            rotate_method: plan.config.parallelism.context_parallel_rotate_method,
            has_scalar_head: plan.model.head != HeadSpec::Vocabulary,
            heads: heads.collect(),
            parts,
            topology,
        }
    }

    /// The calls that `rank` makes for an instruction of its stage's program, in order.
    pub fn calls(&self, instruction: Instruction, rank: usize) -> Vec<Call> {
        use Instruction as I;
        let place = self.place(rank);
        let calls = match instruction {
            I::CountTokens => vec![self.numbers(Group::Batch, 2)],
            I::ShareLoss => vec![self.numbers(Group::World, 2)],
            I::StartGather(unit) => {
                let counts = self.part(&place).of_unit(unit, |part| &part.gathers);
                vec![call(Group::Parameters, CallKind::AllGather, self.element_bytes, counts)]
            }
            I::StartReduce(unit) => {
                let counts = self.part(&place).of_unit(unit, |part| &part.reduces);
                vec![call(Group::Gradients, CallKind::ReduceScatter, GRADIENT_BYTES, counts)]
            }
            I::Embed(_) => vec![self.sequence(&place, CallKind::ReduceScatter)],
            I::EmbedBackward(_) => vec![self.sequence(&place, CallKind::AllGather)],
            I::Receive(pass, _) => vec![self.neighbour(&place, CallKind::Receive, pass == Pass::Backward)],
            I::Send(pass, _) => vec![self.neighbour(&place, CallKind::Send, pass == Pass::Forward)],
            I::RingAttend { layer, .. } => self.ring(&place, layer),
            I::RingAttendBackward { layer, .. } => self.ring_backward(&place, layer),
            I::Exchange { exchange, pass, layer, .. } => vec![self.exchange(&place, exchange, pass, layer)],
            I::Loss { train, .. } => self.loss(&place, train),
            I::StartBucket(bucket) => self.start_bucket(&place, bucket),
            I::SumBucket(bucket) => vec![self.sum_bucket(&place, bucket)],
            I::SumReplicated => self.sum_replicated(&place),
            I::Norm => self.norm(&place),
            I::UpdateMatrices(bucket) => self.matrices(&place, bucket),
            I::PublishBucket(bucket) => {
                let at = self.topology.index(Group::Parameters, rank);
                let counts = Arc::clone(&self.part(&place).bucket_publishes[bucket][at]);
                vec![call(Group::StatesOverParameters, CallKind::AllGather, self.element_bytes, counts)]
            }
            I::FinishGather(_) | I::Release(_) | I::OpenGradient(_) | I::FinishReduce(_) | I::FinishBucket(_) => {
                Vec::new()
            }
            I::Stash(_) | I::Restore(_) | I::Update => Vec::new(),
            I::Block { .. } | I::BlockBackward { .. } | I::ResidualBackward(_) => Vec::new(),
        };
        calls.into_iter().filter(|call| self.topology.size(call.group) > 1).collect()
    }

    fn place(&self, rank: usize) -> Place {
        let index = |group| self.topology.index(group, rank);
        let (tensor, heads, ring) = (index(Group::Tensor), index(Group::Heads), index(Group::Ring));
        Place { rank, stage: self.topology.stage(rank), tensor, heads, ring }
    }

    fn part(&self, place: &Place) -> &ModelPart {
        &self.parts[place.stage][place.tensor]
    }

    /// So many float64 of each rank.
    fn numbers(&self, group: Group, n: usize) -> Call {
        call(group, CallKind::AllGather, F64_BYTES, vec![n; self.topology.size(group)].into())
    }

    // ---- the sequence ----------------------------------------------------------------------------------------------

    /// Gathers or scatters the tokens of tensor ranks, a residual stream wide.
    fn sequence(&self, place: &Place, kind: CallKind) -> Call {
        let counts = self.layout.tensor_counts(place.ring, place.heads);
        call(Group::Tensor, kind, self.element_bytes, times(&counts, self.hidden_size))
    }

    fn neighbour(&self, place: &Place, kind: CallKind, after: bool) -> Call {
        let tokens = self.layout.tensor_counts(place.ring, place.heads)[place.tensor];
        let peer = if after { place.stage + 1 } else { place.stage - 1 };
        let counts = [tokens * self.hidden_size].into();
        Call { peer: Some(peer), ..call(Group::Stages, kind, self.element_bytes, counts) }
    }

    fn exchange(&self, place: &Place, exchange: Exchange, pass: Pass, layer: usize) -> Call {
        let to_heads = match exchange {
            Exchange::GatherSequence => return self.sequence(place, CallKind::AllGather),
            Exchange::ScatterSequence => return self.sequence(place, CallKind::ReduceScatter),
            Exchange::TokensToHeads => true,
            Exchange::HeadsToTokens => false,
        };
        // Queries, keys and values go to attention, its output comes back; gradients the other way round.
        let has_keys = to_heads == (pass == Pass::Forward);
        let shared = self.shared_heads(layer);
        let heads = shared.queries + if has_keys { 2 * shared.keys } else { 0 };
        let tokens = self.layout.head_counts(place.ring);
        let theirs = times(&tokens, heads * shared.head_dim);
        let own = times(&vec![tokens[place.heads]; tokens.len()], heads * shared.head_dim);
        let (counts, counts_in) = if to_heads { (own, theirs) } else { (theirs, own) };
        Call { counts_in, ..call(Group::Heads, CallKind::AllToAll, self.element_bytes, counts) }
    }

    /// Heads of one tensor rank that each heads rank attends with: at least one.
    fn shared_heads(&self, layer: usize) -> LocalHeads {
        let LocalHeads { queries, keys, head_dim } = self.heads[layer];
        let share = |n: usize| (n / self.layout.heads).max(1);
        LocalHeads { queries: share(queries), keys: share(keys), head_dim }
    }

    /// Elements of keys and values of each ring rank.
    fn keys_and_values(&self, layer: usize) -> Vec<usize> {
        let heads = self.shared_heads(layer);
        (0..self.layout.ring).map(|r| self.layout.ring_len(r) * 2 * heads.keys * heads.head_dim).collect()
    }

    fn ring(&self, place: &Place, layer: usize) -> Vec<Call> {
        let kv = self.keys_and_values(layer);
        match self.rotate_method {
            RotateMethod::Allgather => vec![call(Group::Ring, CallKind::AllGather, self.element_bytes, kv.into())],
            RotateMethod::Ring => (1..kv.len()).map(|step| turn(place, &kv, step, self.element_bytes)).collect(),
        }
    }

    fn ring_backward(&self, place: &Place, layer: usize) -> Vec<Call> {
        let kv = self.keys_and_values(layer);
        match self.rotate_method {
            RotateMethod::Allgather => {
                let kv: Counts = kv.into();
                let gather = call(Group::Ring, CallKind::AllGather, self.element_bytes, Arc::clone(&kv));
                vec![gather, call(Group::Ring, CallKind::ReduceScatter, GRADIENT_BYTES, kv)]
            }
            RotateMethod::Ring => {
                // Gradients follow the keys that they belong to one step behind, and go one step further: home.
                let gradients = |step| (step > 1).then(|| turn(place, &kv, step, GRADIENT_BYTES));
                let both = |step| std::iter::once(turn(place, &kv, step, self.element_bytes)).chain(gradients(step));
                let home = (kv.len() > 1).then(|| turn(place, &kv, kv.len(), GRADIENT_BYTES));
                (1..kv.len()).flat_map(both).chain(home).collect()
            }
        }
    }

    fn loss(&self, place: &Place, train: bool) -> Vec<Call> {
        if self.has_scalar_head {
            return Vec::new();
        }
        let tokens = self.layout.head_counts(place.ring)[place.heads];
        let mut calls = vec![self.sequence(place, CallKind::AllGather)];
        for at in (0..tokens).step_by(LOSS_CHUNK_TOKENS) {
            let numbers = 3 * LOSS_CHUNK_TOKENS.min(tokens - at);
            let counts = vec![numbers; self.layout.tensor].into();
            calls.push(call(Group::Tensor, CallKind::AllGather, GRADIENT_BYTES, counts));
        }
        calls.extend(train.then(|| self.sequence(place, CallKind::ReduceScatter)));
        calls
    }

    // ---- the update ------------------------------------------------------------------------------------------------

    fn start_bucket(&self, place: &Place, bucket: usize) -> Vec<Call> {
        if self.topology.size(Group::StatesOverGradients) == 1 {
            return vec![self.sum_bucket(place, bucket)];
        }
        let at = self.topology.index(Group::Gradients, place.rank);
        let counts = Arc::clone(&self.part(place).bucket_reduces[bucket][at]);
        vec![call(Group::StatesOverGradients, CallKind::ReduceScatter, GRADIENT_BYTES, counts)]
    }

    fn sum_bucket(&self, place: &Place, bucket: usize) -> Call {
        let own = self.part(place).owned[bucket][self.topology.index(Group::States, place.rank)];
        call(Group::Replicas, CallKind::AllReduce, GRADIENT_BYTES, [own].into())
    }

    fn sum_replicated(&self, place: &Place) -> Vec<Call> {
        let elements = self.part(place).replicated[self.topology.index(Group::States, place.rank)];
        let some = SUMMED.into_iter().zip(elements).filter(|(_, n)| *n > 0);
        some.map(|(group, n)| call(group, CallKind::AllReduce, GRADIENT_BYTES, [n].into())).collect()
    }

    fn norm(&self, place: &Place) -> Vec<Call> {
        let chunks = Arc::clone(&self.part(place).chunks);
        let sums = call(Group::States, CallKind::AllGather, F64_BYTES, chunks);
        vec![sums, self.numbers(Group::ModelParts, 1)]
    }
}

impl Sizes {
    /// The updates of matrices that tensor ranks cut, made whole on each of them; nothing where this rank owns none.
    fn matrices(&self, place: &Place, bucket: usize) -> Vec<Call> {
        let at = self.topology.index(Group::States, place.rank);
        let counts: Counts = self.parts[place.stage].iter().map(|part| part.matrices[bucket][at]).collect();
        let sent = counts.iter().any(|&n| n > 0);
        sent.then(|| call(Group::Tensor, CallKind::AllGather, GRADIENT_BYTES, counts)).into_iter().collect()
    }
}

impl ModelPart {
    fn of_unit(&self, unit: Unit, counts: impl Fn(&ModelPart) -> &Vec<Counts>) -> Counts {
        let index = self.units.iter().position(|&own| own == unit).expect("a program uses the units of its stage");
        Arc::clone(&counts(self)[index])
    }
}

fn call(group: Group, kind: CallKind, element_bytes: usize, counts: Counts) -> Call {
    Call { group, kind, element_bytes, counts, counts_in: [].into(), peer: None }
}

fn times(counts: &[usize], width: usize) -> Counts {
    counts.iter().map(|n| n * width).collect()
}

/// Turn number `step` of the ring: what belongs to the rank `step` before this one comes in.
fn turn(place: &Place, kv: &[usize], step: usize, element_bytes: usize) -> Call {
    let ranks = kv.len();
    let source = |step: usize| (place.ring + ranks - step % ranks) % ranks;
    let (counts, counts_in) = ([kv[source(step - 1)]].into(), [kv[source(step)]].into());
    let peer = Some((place.ring + 1) % ranks);
    Call { counts_in, peer, ..call(Group::Ring, CallKind::Shift, element_bytes, counts) }
}

/// What each tensor rank of `stage` holds.
fn model_parts(plan: &Plan, stage: usize) -> Vec<ModelPart> {
    let (sharding, buckets) = (plan.sharding(), buckets(plan, stage));
    let mesh = &plan.topology.mesh;
    let first = stage * mesh.world_size() / mesh.degree(Axis::Pp);
    let builder = |rank| PartBuilder { spec: &plan.model, sharding: &sharding, stage, rank };
    (0..mesh.degree(Axis::Tp)).map(|tensor| builder(first + tensor).build(&buckets)).collect()
}

/// Works out the [`ModelPart`] of `rank` and all that hold the same.
struct PartBuilder<'a> {
    spec: &'a ModelSpec,
    sharding: &'a Sharding,
    stage: usize,
    rank: usize,
}

impl PartBuilder<'_> {
    fn build(&self, buckets: &[Range<usize>]) -> ModelPart {
        let units = self.sharding.units(self.stage);
        let metas: Vec<Vec<ParamMeta>> =
            units.iter().map(|&unit| self.sharding.parameters(self.spec, unit, DType::F32)).collect();
        let owners = self.topology().members(Group::States, self.rank);
        let by_unit = |level, group| -> Vec<Counts> {
            let members = self.topology().members(group, self.rank);
            metas.iter().map(|unit| self.elements(unit, level, &members).into()).collect()
        };
        let states: Vec<Vec<usize>> = metas.iter().map(|unit| self.elements(unit, Level::States, &owners)).collect();
        let in_bucket = |bucket: &Range<usize>, at: usize| states[bucket.clone()].iter().map(|unit| unit[at]).sum();
        let owned: Vec<Vec<usize>> =
            buckets.iter().map(|bucket| (0..owners.len()).map(|at| in_bucket(bucket, at)).collect()).collect();
        ModelPart {
            gathers: by_unit(Level::Parameters, Group::Parameters),
            reduces: by_unit(Level::Gradients, Group::Gradients),
            bucket_reduces: self.by_scope(&owned, &owners, Group::Gradients),
            bucket_publishes: self.by_scope(&owned, &owners, Group::Parameters),
            owned,
            matrices: buckets.iter().map(|bucket| self.matrices(&metas[bucket.clone()], &owners)).collect(),
            replicated: self.replicated(&metas, &owners),
            chunks: self.chunks(&metas, &owners).into(),
            units,
        }
    }

    fn topology(&self) -> &Topology {
        self.sharding.topology()
    }

    /// What each of `ranks` holds of some parameters at `level`.
    fn elements(&self, metas: &[ParamMeta], level: Level, ranks: &[usize]) -> Vec<usize> {
        let mut elements = vec![0; ranks.len()];
        for meta in metas {
            let placement = self.sharding.placement(meta, level);
            for (sum, &rank) in elements.iter_mut().zip(ranks) {
                *sum += placement.box_of(&meta.shape, &self.topology().mesh, rank).volume();
            }
        }
        elements
    }

    /// What owners of states have, by bucket and by their place in an inner scope; owners of one place in order.
    fn by_scope(&self, owned: &[Vec<usize>], owners: &[usize], scope: Group) -> Vec<Vec<Counts>> {
        let places: Vec<usize> = owners.iter().map(|&rank| self.topology().index(scope, rank)).collect();
        let by_place = |bucket: &Vec<usize>| -> Vec<Counts> {
            let mut counts = vec![Vec::new(); self.topology().size(scope)];
            bucket.iter().zip(&places).for_each(|(&n, &place)| counts[place].push(n));
            counts.into_iter().map(Counts::from).collect()
        };
        owned.iter().map(by_place).collect()
    }

    /// Elements of whole matrices of each owner that this tensor rank, and none before it, holds a part of.
    fn matrices(&self, metas: &[Vec<ParamMeta>], owners: &[usize]) -> Vec<usize> {
        let is_sent = |name: &str| self.sharding.is_whole(name) && self.sharding.counts(name, self.rank);
        let sent: Vec<ParamMeta> = metas.iter().flatten().filter(|meta| is_sent(&meta.name)).cloned().collect();
        self.elements(&sent, Level::States, owners)
    }

    /// Gradients of each owner that [`SUMMED`] groups sum.
    fn replicated(&self, metas: &[Vec<ParamMeta>], owners: &[usize]) -> Vec<[usize; 3]> {
        let is_summed = |meta: &ParamMeta, group| match group {
            Group::TiedEnds => self.sharding.copies_embedding() && meta.name == EMBEDDING,
            _ => self.sharding.replicated_over(&meta.name) == Some(group),
        };
        let of = |group| {
            let summed = metas.iter().flatten().filter(|meta| is_summed(meta, group)).cloned().collect::<Vec<_>>();
            self.elements(&summed, Level::States, owners)
        };
        let [tensor, keys, ends] = SUMMED.map(of);
        (0..owners.len()).map(|at| [tensor[at], keys[at], ends[at]]).collect()
    }

    /// Chunks of the gradient's norm that each owner adds up.
    fn chunks(&self, metas: &[Vec<ParamMeta>], owners: &[usize]) -> Vec<usize> {
        let mut chunks = vec![0; owners.len()];
        for meta in metas.iter().flatten().filter(|meta| self.sharding.counts(&meta.name, self.rank)) {
            let row_len: usize = self.sharding.model_box(meta, self.rank).shape()[1..].iter().product();
            let chunk_len = chunk_rows(row_len) * row_len.max(1);
            let owned = self.elements(std::slice::from_ref(meta), Level::States, owners);
            chunks.iter_mut().zip(owned).for_each(|(sum, n)| *sum += n.div_ceil(chunk_len));
        }
        chunks
    }
}
