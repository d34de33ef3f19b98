//! The whole decoder as units: embedding, blocks, head.

use crate::block::{Angles, Block, BlockWeights};
use crate::context::PackContext;
use crate::decode::{DecodeState, LayerCache};
use crate::weights::{UnitWeights, Weight};
use tangelo_configs::model::{EMBEDDING, FINAL_NORM, LM_HEAD};
use tangelo_configs::{MixerSpec, ModelSpec};
use tangelo_core::{DType, ParamMeta};
use tangelo_kernels::op;
use tch::{Device, Kind, Tensor};

/// A part of the model whose weights are gathered, freed, reduced and updated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    /// The token embedding.
    Embedding,
    /// A block, by layer.
    Block(usize),
    /// The final norm and the untied head.
    Head,
}

impl Unit {
    /// Every unit of `spec` in execution order.
    pub fn all(spec: &ModelSpec) -> Vec<Unit> {
        let blocks = (0..spec.blocks.len()).map(Unit::Block);
        std::iter::once(Unit::Embedding).chain(blocks).chain([Unit::Head]).collect()
    }

    /// The parameters of this unit in execution order.
    pub fn parameters(self, spec: &ModelSpec, dtype: DType) -> Vec<ParamMeta> {
        match self {
            Unit::Embedding => spec.embedding_parameters(dtype),
            Unit::Block(layer) => spec.block_parameters(layer, dtype),
            Unit::Head => spec.head_parameters(dtype),
        }
    }
}

/// The final norm's weight `[D]` and the head's `[V, D]` (the embedding's where they are tied).
#[derive(Debug)]
pub struct Head {
    norm: Weight,
    /// The projection onto the vocabulary.
    pub weight: Weight,
}

/// A decoder with its weights.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    blocks: Vec<Block>,
    units: Vec<UnitWeights>,
    block_weights: Vec<BlockWeights>,
    embedding: Weight,
    head: Head,
    kind: Kind,
    device: Device,
}

impl Model {
    /// A model with zeroed weights of type `kind`; with fp32 gradient buffers where `trained`.
    pub fn zeros(spec: &ModelSpec, kind: Kind, device: Device, trained: bool) -> Model {
        let dtype = if kind == Kind::BFloat16 { DType::BF16 } else { DType::F32 };
        let units: Vec<UnitWeights> = Unit::all(spec)
            .into_iter()
            .map(|unit| UnitWeights::zeros(unit.parameters(spec, dtype), kind, device, trained))
            .collect();
        let blocks: Vec<Block> = spec.blocks.iter().map(|b| Block::new(*b, spec.rms_norm_eps)).collect();
        let block_weights =
            spec.blocks.iter().enumerate().map(|(i, b)| BlockWeights::new(b, i, &units[i + 1])).collect();
        let (first, last) = (&units[0], &units[units.len() - 1]);
        let embedding = first.weight(EMBEDDING);
        let weight = if spec.tie_word_embeddings { embedding.share() } else { last.weight(LM_HEAD) };
        let head = Head { norm: last.weight(FINAL_NORM), weight };
        Model { spec: spec.clone(), blocks, units, block_weights, embedding, head, kind, device }
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

    /// The head's weights.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// L.
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

    /// Tokens `[T]` to hidden states `[T, D]`, without a graph: see [`Model::embed_backward`].
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        op::embedding(tokens, &self.embedding.value)
    }

    /// Adds to the table's gradient what flowed back to the embedding's output, `[T, D]`.
    pub fn embed_backward(&self, tokens: &Tensor, grad: &Tensor) {
        if let Some(main_grad) = self.embedding.grad() {
            op::embedding_backward(tokens, grad, main_grad);
        }
    }

    /// Block `layer`: `[T, D]` to `[T, D]`.
    pub fn block(&self, layer: usize, x: &Tensor, pack: &PackContext, angles: &BlockAngles) -> Tensor {
        self.blocks[layer].forward(&self.block_weights[layer], x, pack, angles.of(layer), None)
    }

    /// The final norm: `[T, D]` to what the head's weight is multiplied with.
    pub fn final_norm(&self, x: &Tensor) -> Tensor {
        op::rms_norm(x, &self.head.norm.value, self.spec.rms_norm_eps, self.head.norm.grad())
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
        tch::no_grad(|| op::linear(&self.hidden(pack), &self.head.weight.value, None, None, None))
    }

    /// An empty state for one sequence.
    pub fn new_state(&self) -> DecodeState {
        let cache = |block: &Block| {
            let MixerSpec::Attention(a) = &block.spec().mixer;
            LayerCache::new(a.num_kv_heads, a.head_dim, self.kind, self.device)
        };
        DecodeState { num_tokens: 0, layers: self.blocks.iter().map(cache).collect() }
    }

    /// Feeds `tokens` that follow what `state` has seen; the logits `[V]` of the last, in fp32 (fp64 of an fp64 model).
    pub fn decode(&self, state: &mut DecodeState, tokens: &[u32]) -> Tensor {
        assert!(!tokens.is_empty(), "nothing to decode");
        tch::no_grad(|| {
            let start = state.num_tokens as u32;
            let positions: Vec<u32> = (start..start + tokens.len() as u32).collect();
            let pack = PackContext::new(tokens, &positions, vec![0, tokens.len() as i64], self.device);
            let angles = self.angles(&pack.positions);
            let mut x = self.embed(&pack.tokens);
            for (layer, cache) in state.layers.iter_mut().enumerate() {
                x = self.blocks[layer].forward(&self.block_weights[layer], &x, &pack, angles.of(layer), Some(cache));
            }
            state.num_tokens += tokens.len();
            let last = self.final_norm(&x.narrow(0, tokens.len() as i64 - 1, 1));
            let logits = op::linear(&last, &self.head.weight.value, None, None, None).squeeze_dim(0);
            if self.kind == Kind::Double { logits } else { logits.to_kind(Kind::Float) }
        })
    }
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
