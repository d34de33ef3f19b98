//! The whole decoder as units: embedding, blocks, head.

use crate::block::{Angles, Block, BlockWeights, Flow};
use crate::context::PackContext;
use crate::decode::{DecodeState, LayerCache, LayerPast, Past};
use crate::weights::{UnitWeights, Weight};
use std::ops::Range;
use tangelo_configs::model::{EMBEDDING, FINAL_NORM, HeadSpec, LM_HEAD, SCORE, SCORE_BIAS};
use tangelo_configs::{BlockSpec, MixerSpec, ModelSpec, Sharding};
use tangelo_core::{DType, Group, IndexBox, ParamMeta, Part, Parts, Placement, Unit};
use tangelo_kernels::comm::{CommError, Communicator};
use tangelo_kernels::op;
use tch::{Device, Kind, Tensor};

/// The final norm's weight `[D]` and the head's: `[V, D]` onto the vocabulary (the embedding's where they are tied), or
/// `[1, D]` onto one number.
#[derive(Debug)]
pub struct Head {
    norm: Weight,
    /// The projection.
    pub weight: Weight,
    /// What a scalar head adds, `[1]`, where it has that.
    pub bias: Option<Weight>,
    is_scalar: bool,
}

/// A decoder with its weights, or the part of one that a rank of a hybrid-parallel job computes with.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    /// The layers of this part.
    layers: Range<usize>,
    blocks: Vec<Block>,
    units: Vec<UnitWeights>,
    unit_names: Vec<Unit>,
    block_weights: Vec<BlockWeights>,
    embedding: Option<Weight>,
    head: Option<Head>,
    /// The ids whose rows of the embedding and the head this part holds.
    ids: Range<i64>,
    kind: Kind,
    device: Device,
}

impl Head {
    fn new(spec: &ModelSpec, unit: &UnitWeights, embedding: Option<&Weight>) -> Head {
        let (weight, bias) = match (spec.head, embedding) {
            (HeadSpec::Scalar { bias }, _) => (unit.weight(SCORE), bias.then(|| unit.weight(SCORE_BIAS))),
            (_, Some(embedding)) if spec.tie_word_embeddings => (embedding.share(), None),
            _ if spec.tie_word_embeddings => (unit.weight(EMBEDDING), None),
            _ => (unit.weight(LM_HEAD), None),
        };
        Head { norm: unit.weight(FINAL_NORM), weight, bias, is_scalar: spec.head != HeadSpec::Vocabulary }
    }

    /// Whether it gives one number a token instead of logits.
    pub fn is_scalar(&self) -> bool {
        self.is_scalar
    }

    /// A scalar head's values of `normed [T, D]`: `[T]` in fp32 (float64 for float64), whatever the model's type. Without a
    /// graph: see [`Head::scalar_backward`].
    pub fn values(&self, normed: &Tensor) -> Tensor {
        let wide = if normed.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let products = normed.to_kind(wide) * self.weight.value.to_kind(wide);
        let values = products.sum_dim_intlist([1i64].as_slice(), false, wide);
        match &self.bias {
            Some(bias) => values + bias.value.to_kind(wide),
            None => values,
        }
    }

    /// From the gradient of the values, `[T]`, that of `normed`; adds those of the weights.
    pub fn scalar_backward(&self, normed: &Tensor, dvalues: &Tensor) -> Tensor {
        let (wide, column) = (dvalues.kind(), dvalues.unsqueeze(1));
        if let Some(grad) = self.weight.grad() {
            let sum = (&column * normed.to_kind(wide)).sum_dim_intlist([0i64].as_slice(), true, wide);
            let _ = grad.shallow_clone().g_add_(&sum.to_kind(grad.kind()));
        }
        if let Some(grad) = self.bias.as_ref().and_then(Weight::grad) {
            let _ = grad.shallow_clone().g_add_(&dvalues.sum(wide).to_kind(grad.kind()));
        }
        (column * self.weight.value.to_kind(wide)).to_kind(normed.kind())
    }
}

impl Model {
    /// A whole model with zeroed weights of type `kind`; with fp32 gradient buffers where `trained`.
    pub fn zeros(spec: &ModelSpec, kind: Kind, device: Device, trained: bool) -> Model {
        Model::part(spec, &Sharding::single(spec), 0, kind, device, trained)
    }

    /// What `rank` computes with: its stage's units, of each its tensor rank's part. What a ZeRO scope cuts has no memory
    /// yet: no more than one unit is ever whole.
    pub fn part(
        spec: &ModelSpec,
        sharding: &Sharding,
        rank: usize,
        kind: Kind,
        device: Device,
        trained: bool,
    ) -> Model {
        let scopes = sharding.topology().scopes;
        let zeros = |_, parts| UnitWeights::zeros(parts, kind, device, trained);
        // Views need the memory that they are made of; afterwards what is cut is there only while it is used.
        let release = |unit: &UnitWeights| {
            unit.hold_weights(scopes.parameters == 1);
            unit.hold_gradients(scopes.gradients == 1);
        };
        Model::assemble(spec, sharding, rank, kind, device, (zeros, release))
    }

    /// As [`Model::part`], with each unit's weights made of its parameters and the parts of them that are held by the first
    /// function. The second is called with each unit whose views are made.
    pub fn assemble(
        spec: &ModelSpec,
        sharding: &Sharding,
        rank: usize,
        kind: Kind,
        device: Device,
        (mut unit, ready): (impl FnMut(Unit, Vec<(ParamMeta, IndexBox)>) -> UnitWeights, impl Fn(&UnitWeights)),
    ) -> Model {
        let dtype = if kind == Kind::BFloat16 { DType::BF16 } else { DType::F32 };
        let (stage, tensor_rank) = (sharding.topology().stage(rank), sharding.topology().index(Group::Tensor, rank));
        let (layers, unit_names) = (sharding.layers(stage), sharding.units(stage));
        let held = |meta: ParamMeta| {
            let held = sharding.model_box(&meta, rank);
            (meta, held)
        };
        let parts = |unit: &Unit| sharding.parameters(spec, *unit, dtype).into_iter().map(held).collect();
        let local = |layer: usize| local_block(&spec.blocks[layer], sharding.topology().size(Group::Tensor));
        let blocks = layers.clone().map(|layer| Block::new(local(layer), spec.rms_norm_eps)).collect();
        let (mut units, mut block_weights, mut embedding, mut head) = (Vec::new(), Vec::new(), None, None);
        for &name in &unit_names {
            let unit = unit(name, parts(&name));
            match name {
                Unit::Embedding => embedding = Some(unit.weight(EMBEDDING)),
                Unit::Block(layer) => {
                    block_weights.push(BlockWeights::new(&spec.blocks[layer], layer, &unit, tensor_rank == 0));
                }
                Unit::Head => head = Some(Head::new(spec, &unit, embedding.as_ref())),
            }
            ready(&unit);
            units.push(unit);
        }
        let ids = spec.embedding_parameters(dtype).first().map_or(0..0, |meta| {
            let whole = sharding.model_placement(meta);
            let rows = Placement { only_at: None, ..whole }.box_of(&meta.shape, &sharding.topology().mesh, rank);
            rows.ranges[0].start as i64..rows.ranges[0].end as i64
        });
        let spec = spec.clone();
        Model { spec, layers, blocks, units, unit_names, block_weights, embedding, head, ids, kind, device }
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Type of weights and activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The units' weights in execution order.
    pub fn units(&self) -> &[UnitWeights] {
        &self.units
    }

    /// Which unit each of [`Model::units`] is.
    pub fn unit_names(&self) -> &[Unit] {
        &self.unit_names
    }

    /// The weights of a unit of this part.
    pub fn unit(&self, unit: Unit) -> &UnitWeights {
        &self.units[self.unit_index(unit)]
    }

    /// Its place among [`Model::units`].
    pub fn unit_index(&self, unit: Unit) -> usize {
        let at = self.unit_names.iter().position(|&name| name == unit);
        at.unwrap_or_else(|| panic!("this stage holds no {unit:?}"))
    }

    /// The head's weights. Panics on a pipeline stage without it.
    pub fn head(&self) -> &Head {
        self.head.as_ref().expect("the last stage holds the head")
    }

    fn embedding(&self) -> &Weight {
        self.embedding.as_ref().expect("the first stage holds the embedding")
    }

    /// The ids whose rows of the embedding and the head this part holds.
    pub fn ids(&self) -> Range<i64> {
        self.ids.clone()
    }

    /// The layers of this part.
    pub fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    /// The shape of block `layer` as this part holds it.
    pub fn block_shape(&self, layer: usize) -> &Block {
        &self.blocks[layer - self.layers.start]
    }

    /// Number of blocks of this part.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// One parameter's values, by full name.
    pub fn weight(&self, name: &str) -> Option<Weight> {
        self.units.iter().find(|u| u.span(name).is_some()).map(|u| u.weight(name))
    }

    /// The rotary angles each block reads; blocks with equal tables share them.
    pub fn angles(&self, positions: &Tensor) -> BlockAngles {
        let mut tables: Vec<(usize, Angles)> = Vec::new();
        let index = self
            .blocks
            .iter()
            .enumerate()
            .map(|(layer, block)| {
                let known = tables.iter().position(|&(first, _)| self.blocks[first].same_angles(block));
                known.unwrap_or_else(|| {
                    tables.push((layer, block.angles(positions)));
                    tables.len() - 1
                })
            })
            .collect();
        BlockAngles { tables: tables.into_iter().map(|(_, a)| a).collect(), index }
    }

    /// Tokens `[T]` to hidden states `[T, D]`, without a graph: see [`Model::embed_backward`]. Ids whose rows are held
    /// elsewhere give zeros.
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        let table = &self.embedding().value;
        if self.holds_all_ids() {
            return op::embedding(tokens, table);
        }
        let out = Tensor::zeros([tokens.size()[0], self.spec.hidden_size as i64], (self.kind, self.device));
        let (at, ids) = self.held_tokens(tokens);
        out.index_copy(0, &at, &op::embedding(&ids, table))
    }

    /// Adds to the table's gradient what flowed back to the embedding's output, `[T, D]`.
    pub fn embed_backward(&self, tokens: &Tensor, grad: &Tensor) {
        let Some(main_grad) = self.embedding().grad() else { return };
        if self.holds_all_ids() {
            return op::embedding_backward(tokens, grad, main_grad);
        }
        let (at, ids) = self.held_tokens(tokens);
        op::embedding_backward(&ids, &grad.index_select(0, &at), main_grad);
    }

    fn holds_all_ids(&self) -> bool {
        self.ids == (0..self.spec.vocab_size as i64)
    }

    /// Where tokens are whose rows are held here, and which rows.
    fn held_tokens(&self, tokens: &Tensor) -> (Tensor, Tensor) {
        let here = tokens.ge(self.ids.start).logical_and(&tokens.lt(self.ids.end));
        let at = here.nonzero().squeeze_dim(1);
        let ids = tokens.index_select(0, &at) - self.ids.start;
        (at, ids)
    }

    /// Block `layer`: `[T, D]` to `[T, D]`.
    pub fn block(&self, layer: usize, x: &Tensor, pack: &PackContext, angles: &BlockAngles) -> Tensor {
        let flow = Flow { x: x.shallow_clone(), work: Vec::new() };
        self.block_parts(layer, Parts::BLOCK, flow, pack, angles).x
    }

    /// Some parts of block `layer`.
    pub fn block_parts(
        &self,
        layer: usize,
        parts: Parts,
        flow: Flow,
        pack: &PackContext,
        angles: &BlockAngles,
    ) -> Flow {
        let at = layer - self.layers.start;
        self.blocks[at].run(parts, &self.block_weights[at], flow, pack, angles.of(at), None)
    }

    /// The final norm: `[T, D]` to what the head's weight is multiplied with.
    pub fn final_norm(&self, x: &Tensor) -> Tensor {
        let norm = &self.head().norm;
        op::rms_norm(x, &norm.value, self.spec.rms_norm_eps, norm.grad())
    }

    /// Hidden states `[T, D]` after the final norm; no gradients.
    pub fn hidden(&self, pack: &PackContext) -> Tensor {
        tch::no_grad(|| {
            let angles = self.angles(&pack.positions);
            let blocks = (0..self.num_blocks()).fold(self.embed(&pack.tokens), |x, i| self.block(i, &x, pack, &angles));
            self.final_norm(&blocks)
        })
    }

    /// Logits `[T, V]` of every token; no gradients. For checks and short prompts: the whole table of T x V exists.
    pub fn logits(&self, pack: &PackContext) -> Tensor {
        tch::no_grad(|| op::linear(&self.hidden(pack), &self.head().weight.value, None, None, None))
    }

    /// An empty state for one sequence.
    pub fn new_state(&self) -> DecodeState {
        let cache = |block: &Block| {
            let MixerSpec::Attention(a) = &block.spec().mixer;
            LayerCache::new(a.num_kv_heads, a.head_dim, self.kind, self.device)
        };
        DecodeState { num_tokens: 0, layers: self.blocks.iter().map(cache).collect() }
    }

    /// Hidden states `[R, D]` after the final norm of the tokens `rows` of `pack`, all of which continue the sequences that
    /// `past` holds; no gradients. A part of a model needs the group of `tensor` ranks that hold the other parts, all of which
    /// must make the call with the same tokens; each gets the same bits, those of training in that group.
    ///
    /// # Errors
    /// A rank of the group that failed.
    pub fn hidden_after(
        &self,
        pack: &PackContext,
        past: &mut dyn Past,
        rows: &[i64],
        tensor: Option<&Communicator>,
    ) -> Result<Tensor, CommError> {
        let sum = |partial: &Tensor| tensor.map_or(Ok(()), |comm| comm.all_reduce(partial));
        tch::no_grad(|| {
            let angles = self.angles(&pack.positions);
            let mut flow = Flow { x: self.embed(&pack.tokens), work: Vec::new() };
            sum(&flow.x)?;
            for (layer, block) in self.blocks.iter().enumerate() {
                for parts in BETWEEN_SUMS {
                    let past = LayerPast { past: &mut *past, layer };
                    flow = block.run(parts, &self.block_weights[layer], flow, pack, angles.of(layer), Some(past));
                    flow.work.iter().try_for_each(sum)?;
                }
            }
            Ok(self.final_norm(&flow.x.index_select(0, &Tensor::from_slice(rows).to_device(self.device))))
        })
    }

    /// Feeds `tokens` that follow what `state` has seen; the logits `[V]` of the last, in fp32 (fp64 of an fp64 model).
    pub fn decode(&self, state: &mut DecodeState, tokens: &[u32]) -> Tensor {
        assert!(!tokens.is_empty(), "nothing to decode");
        tch::no_grad(|| {
            let start = state.num_tokens as u32;
            let positions: Vec<u32> = (start..start + tokens.len() as u32).collect();
            let pack = PackContext::new(tokens, &positions, vec![0, tokens.len() as i64], self.device);
            let last = self.hidden_after(&pack, state, &[tokens.len() as i64 - 1], None);
            let last = last.expect("one rank waits for nobody");
            state.num_tokens += tokens.len();
            let logits = op::linear(&last, &self.head().weight.value, None, None, None).squeeze_dim(0);
            if self.kind == Kind::Double { logits } else { logits.to_kind(Kind::Float) }
        })
    }
}

/// The parts of a block, cut where each tensor rank has made its share of a sum.
const BETWEEN_SUMS: [Parts; 3] = [
    Parts { first: Part::InputNorm, last: Part::Output },
    Parts { first: Part::AttentionResidual, last: Part::FeedForward },
    Parts { first: Part::FeedForwardResidual, last: Part::FeedForwardResidual },
];

/// A block as one of `tensor_degree` ranks computes it: its share of heads and of the feed-forward's features.
fn local_block(spec: &BlockSpec, tensor_degree: usize) -> BlockSpec {
    let mut local = *spec;
    let MixerSpec::Attention(a) = &mut local.mixer;
    a.num_heads /= tensor_degree;
    a.num_kv_heads = (a.num_kv_heads / tensor_degree).max(1);
    local.feed_forward.intermediate_size /= tensor_degree;
    local
}

/// Rotary angles for every block of a micro-batch.
#[derive(Debug)]
pub struct BlockAngles {
    tables: Vec<Angles>,
    index: Vec<usize>,
}

impl BlockAngles {
    fn of(&self, layer: usize) -> &Angles {
        &self.tables[self.index[layer]]
    }
}
