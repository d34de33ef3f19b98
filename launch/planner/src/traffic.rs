//! What bytes are sent for, and the fewest that each mode needs, in closed form.
//!
//! The closed form shares nothing with [`Sizes`](crate::program::Sizes): it counts all ranks' bytes of a step from
//! degrees, shapes and parameters alone, so that a difference of more than a little is a bug in one of them.
//!
//! With states cut over s ranks, gradients over g and weights over p; R ring, h heads and t tensor ranks; T tokens per
//! micro-batch; e bytes per element; P parameters of one tensor rank of one stage (summed over both), in V =
//! dp_replicate x dp_shard x cp copies:
//!
//! | for | bytes sent by all ranks |
//! |---|---|
//! | weights | a gather: e P (p - 1) V / p, of blocks for each pass (and each micro-batch) but where the same block comes next, once where weights are kept; new weights: e P (s/p - 1) V / s; Muon's updates of H elements of matrices cut by t: 4 H (t - 1) V / s |
//! | gradients | 4 P (g - 1) V / g per micro-batch where g > 1; 4 P (s/g - 1) V / s; all-reduce over the V / s others: 2 x 4 P (V / s - 1); what c ranks hold alike: 2 x 4 P' (c - 1) V / s |
//! | tensor | (t - 1) T D e for each gather or scatter: 2 for the embedding, 2 for the loss, 4 a block and pass; t (t - 1) T x 12 for the loss |
//! | heads | (h - 1) T d e a tensor rank for each head that a rank gets (its share of q, k, v and o), each pass |
//! | ring | (R - 1) T 2 d K e a tensor and heads rank for K key heads each pass, with 4 bytes more per element backward |
//! | pipeline | T D e each way for each border between stages |
//!
//! The last four for each micro-batch of each reader of rows. A pass is forward, backward, and forward again where a
//! part of a block is recomputed (but for the last sum of what runs again, which nobody reads). An
//! all-reduce of n bytes over c ranks needs 2 n (c - 1) in all; small ones send c n (c - 1) in one exchange instead of
//! two, which shows in small models. What coordinates ranks (numbers of tokens, losses, norms) has no minimum.

use crate::program::actions;
use tangelo_configs::job::Recompute;
use tangelo_configs::model::EMBEDDING;
use tangelo_configs::{MixerSpec, Plan, Sharding};
use tangelo_core::{Call, CallKind, DType, Group, Pass, Unit};

/// What bytes are sent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Weights, gathered before use and after the update.
    Weights,
    /// Gradients.
    Gradients,
    /// Tokens of tensor ranks.
    Tensor,
    /// Heads for tokens.
    Heads,
    /// Keys and values, and their gradients.
    Ring,
    /// The residual stream, and its gradient.
    Pipeline,
    /// Numbers that all must know: tokens, loss, norm.
    Coordination,
}

/// Kinds of traffic.
pub const NUM_KINDS: usize = 7;

impl Traffic {
    /// Every kind.
    pub const ALL: [Traffic; NUM_KINDS] = [
        Traffic::Weights,
        Traffic::Gradients,
        Traffic::Tensor,
        Traffic::Heads,
        Traffic::Ring,
        Traffic::Pipeline,
        Traffic::Coordination,
    ];

    /// What a call of the pass, or of the update, is for.
    pub fn of(call: &Call, in_update: bool) -> Traffic {
        match call.group {
            Group::Parameters | Group::StatesOverParameters => Traffic::Weights,
            Group::Gradients | Group::StatesOverGradients | Group::Replicas => Traffic::Gradients,
            Group::KeyReplicas | Group::TiedEnds => Traffic::Gradients,
            Group::Tensor if call.kind == CallKind::AllReduce => Traffic::Gradients,
            Group::Tensor if in_update => Traffic::Weights,
            Group::Tensor => Traffic::Tensor,
            Group::Heads => Traffic::Heads,
            Group::Ring => Traffic::Ring,
            Group::Stages => Traffic::Pipeline,
            Group::World | Group::Batch | Group::States | Group::ModelParts => Traffic::Coordination,
        }
    }

    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Traffic::Weights => "weights",
            Traffic::Gradients => "gradients",
            Traffic::Tensor => "activations, tensor",
            Traffic::Heads => "activations, heads",
            Traffic::Ring => "keys and values, ring",
            Traffic::Pipeline => "activations, pipeline",
            Traffic::Coordination => "coordination",
        }
    }
}

/// The fewest bytes that all ranks together send in a step, by [`Traffic`]; none are said for coordination.
pub fn minimum(plan: &Plan) -> [f64; NUM_KINDS] {
    let m = Minimum::new(plan);
    [m.weights(), m.gradients(), m.tensor(), m.heads(), m.ring(), m.pipeline(), 0.0]
}

struct Minimum<'a> {
    plan: &'a Plan,
    sharding: Sharding,
    /// Bytes of an element of weights and activations.
    e: f64,
    /// Tokens of all readers in a step.
    tokens: f64,
    /// Micro-batches.
    steps: f64,
}

impl Minimum<'_> {
    fn new(plan: &Plan) -> Minimum<'_> {
        Minimum {
            plan,
            sharding: plan.sharding(),
            e: plan.compute_dtype().size_bytes() as f64,
            tokens: plan.tokens_per_step() as f64,
            steps: plan.gradient_accumulation_steps as f64,
        }
    }

    fn size(&self, group: Group) -> f64 {
        self.plan.topology.size(group) as f64
    }

    /// Ranks that hold the same part of the model, but for ZeRO.
    fn copies(&self) -> f64 {
        self.size(Group::States) * self.size(Group::Replicas)
    }

    /// Parameters of a unit over all tensor ranks: what these hold alike counts once for each of them.
    fn parameters(&self, unit: Unit) -> f64 {
        let metas = self.sharding.parameters(&self.plan.model, unit, DType::F32);
        metas.iter().map(|m| m.num_elements() as f64 * self.alike(&m.name)).sum()
    }

    /// Tensor ranks that hold the same of a parameter.
    fn alike(&self, name: &str) -> f64 {
        self.sharding.replicated_over(name).map_or(1.0, |group| self.size(group))
    }

    fn units(&self) -> impl Iterator<Item = Unit> {
        (0..self.plan.topology.num_stages()).flat_map(|stage| self.sharding.units(stage))
    }

    /// How often a unit's weights are gathered in a step.
    fn gathers(&self, unit: Unit) -> f64 {
        let read_twice = match unit {
            Unit::Block(_) => true,
            Unit::Embedding => self.plan.model.tie_word_embeddings && !self.sharding.copies_embedding(),
            Unit::Head => false,
        };
        match self.plan.reshards_after_forward() {
            true => self.steps * if read_twice { 2.0 } else { 1.0 } - self.turns(unit),
            false => 1.0,
        }
    }

    /// How often a block's weights stay because it is the next to be used: a stage's last block where forward turns into
    /// backward, its first where it turns back.
    fn turns(&self, unit: Unit) -> f64 {
        let Unit::Block(layer) = unit else { return 0.0 };
        let mut turns = 0;
        for (stage, layers) in self.plan.stage_layers.iter().enumerate() {
            let actions = actions(self.plan, stage);
            let to = |pass| actions.windows(2).filter(|pair| pair[0].pass != pass && pair[1].pass == pass).count();
            let (last, first) = (layer + 1 == layers.end, layer == layers.start);
            turns += usize::from(last) * to(Pass::Backward) + usize::from(first) * to(Pass::Forward);
            if layers.len() == 1 && last {
                // Passes of one kind follow each other with the same block.
                turns += actions.windows(2).filter(|pair| pair[0].pass == pair[1].pass).count();
            }
        }
        turns as f64
    }

    fn weights(&self) -> f64 {
        let (p, s, copies) = (self.size(Group::Parameters), self.size(Group::States), self.copies());
        let gathered: f64 = self.units().map(|unit| self.gathers(unit) * self.parameters(unit)).sum();
        let all: f64 = self.units().map(|unit| self.parameters(unit)).sum();
        self.e * (gathered * (p - 1.0) * copies / p + all * (s / p - 1.0) * copies / s) + self.updates()
    }

    /// Muon's updates of matrices that tensor ranks cut, made whole on each of them in fp32.
    fn updates(&self) -> f64 {
        let metas = self.units().flat_map(|unit| self.sharding.parameters(&self.plan.model, unit, DType::F32));
        let whole: f64 = metas.filter(|m| self.sharding.is_whole(&m.name)).map(|m| m.num_elements() as f64).sum();
        4.0 * whole * (self.size(Group::Tensor) - 1.0) * self.copies() / self.size(Group::States)
    }

    fn gradients(&self) -> f64 {
        let (g, s, copies) = (self.size(Group::Gradients), self.size(Group::States), self.copies());
        let all: f64 = self.units().map(|unit| self.parameters(unit)).sum();
        let each_pass = self.steps * (g - 1.0) * copies / g;
        let once = (s / g - 1.0) * copies / s + 2.0 * (copies / s - 1.0);
        4.0 * (all * (each_pass + once) + self.replicated() * 2.0 * copies / s)
    }

    /// Parameters that several ranks hold alike, once for each of these but one.
    fn replicated(&self) -> f64 {
        let mut sum = 0.0;
        for unit in self.units() {
            for meta in self.sharding.parameters(&self.plan.model, unit, DType::F32) {
                sum += meta.num_elements() as f64 * (self.alike(&meta.name) - 1.0);
                let copy = unit == Unit::Head && meta.name == EMBEDDING;
                sum += if copy { meta.num_elements() as f64 } else { 0.0 };
            }
        }
        sum
    }

    /// Passes through a block: forward, backward, and again where `part` of it (or all) is recomputed.
    fn passes(&self, layer: usize, part: Recompute) -> f64 {
        let recompute = self.plan.recompute(layer);
        if recompute == Recompute::Full || recompute == part { 3.0 } else { 2.0 }
    }

    fn layers(&self) -> std::ops::Range<usize> {
        0..self.plan.model.blocks.len()
    }

    fn tensor(&self) -> f64 {
        let (t, d) = (self.size(Group::Tensor), self.plan.model.hidden_size as f64);
        let block = |layer| {
            let both = self.passes(layer, Recompute::Attention) + self.passes(layer, Recompute::FeedForward);
            2.0 * both - if self.plan.recompute(layer) == Recompute::None { 0.0 } else { 1.0 }
        };
        let moves = 4.0 + self.layers().map(block).sum::<f64>();
        (t - 1.0) * self.tokens * (moves * d * self.e + t * 12.0)
    }

    /// Query and key heads that a rank attends with after the exchange, and their width.
    fn shares(&self, layer: usize) -> (f64, f64, f64) {
        let MixerSpec::Attention(a) = &self.plan.model.blocks[layer].mixer;
        let ranks = self.size(Group::Tensor) * self.size(Group::Heads);
        let (queries, keys) = (a.num_heads as f64 / ranks, (a.num_kv_heads as f64 / ranks).max(1.0));
        (queries, keys, a.head_dim as f64)
    }

    fn heads(&self) -> f64 {
        let (t, h) = (self.size(Group::Tensor), self.size(Group::Heads));
        let block = |layer| {
            let (queries, keys, width) = self.shares(layer);
            self.passes(layer, Recompute::Attention) * 2.0 * (queries + keys) * width
        };
        t * (h - 1.0) * self.tokens * self.e * self.layers().map(block).sum::<f64>()
    }

    fn ring(&self) -> f64 {
        let (others, ranks) = (self.size(Group::Tensor) * self.size(Group::Heads), self.size(Group::Ring));
        let block = |layer| {
            let (_, keys, width) = self.shares(layer);
            2.0 * keys * width * (self.passes(layer, Recompute::Attention) * self.e + 4.0)
        };
        others * (ranks - 1.0) * self.tokens * self.layers().map(block).sum::<f64>()
    }

    fn pipeline(&self) -> f64 {
        let borders = self.plan.topology.num_stages() as f64 - 1.0;
        borders * 2.0 * self.tokens * self.plan.model.hidden_size as f64 * self.e
    }
}
