//! The groups of a hybrid-parallel job: every collective of a training step runs in one of these.
//!
//! ```text
//!   pp | dp_replicate | dp_shard | cp = ring x heads | tp        slowest-varying first
//!        \____ batch ______/                                     ranks that read different rows
//!                       \___ weights ___/                        dp_shard x cp: what ZeRO scopes are cut from
//!
//!   weights axis, inner to outer:   | parameters | gradients / parameters | states / gradients | beyond |
//!                                    \_ gathered _/
//!                                    \_____ reduced per micro-batch _____/
//!                                    \________________ reduced once per step _________________/ then summed beyond
//! ```
//!
//! Invariants: scopes nest (parameters within gradients within states), inner ranks first, so that a scope fills a node
//! before it crosses one (AMSP, arXiv 2311.00257); a group of one rank is a group like any other.

use crate::layout::Split;
use crate::mesh::{Axis, DeviceMesh, MeshError, SubAxis};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The axes over which whole weights would be replicated, and that ZeRO scopes are cut from.
pub const WEIGHT_AXES: [Axis; 2] = [Axis::DpShard, Axis::Cp];

/// A set of ranks that communicate, seen from each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Every rank.
    World,
    /// Ranks that read different rows of a batch: dp_replicate x dp_shard.
    Batch,
    /// Tensor parallel: parts of matrices, and of the sequence between them.
    Tensor,
    /// Ranks of tensor parallelism that hold the same key and value heads, where there are fewer of these than ranks.
    KeyReplicas,
    /// Context parallel, inner part: heads are exchanged for tokens (Ulysses).
    Heads,
    /// Context parallel, outer part: keys and values go round, or are gathered.
    Ring,
    /// Ranks among which weights are cut; gathered before use.
    Parameters,
    /// Ranks among which gradients are cut; reduced after every micro-batch where it is more than one rank.
    Gradients,
    /// What optimizer states are cut over beyond gradients; reduced once per step.
    StatesOverGradients,
    /// What optimizer states are cut over beyond parameters; new weights are gathered here once per step.
    StatesOverParameters,
    /// Ranks among which optimizer states are cut.
    States,
    /// Ranks with the same part of the states; gradients are summed over them once per step.
    Replicas,
    /// The first and the last stage, where they share an embedding.
    TiedEnds,
    /// Ranks that hold different parts of the model: pp x tp.
    ModelParts,
    /// Pipeline stages.
    Stages,
}

impl Group {
    /// Every group, in the order in which communicators are opened.
    pub const ALL: [Group; 15] = [
        Group::World,
        Group::Batch,
        Group::Tensor,
        Group::KeyReplicas,
        Group::Heads,
        Group::Ring,
        Group::Parameters,
        Group::Gradients,
        Group::StatesOverGradients,
        Group::StatesOverParameters,
        Group::States,
        Group::Replicas,
        Group::TiedEnds,
        Group::ModelParts,
        Group::Stages,
    ];

    /// Whether calls of this group run on a thread of their own, beside the computation: weights on their way to a block,
    /// gradients on their way from one and to the owners of states, keys on their way round the ring.
    pub const fn is_beside(self) -> bool {
        match self {
            Group::Parameters | Group::Gradients | Group::StatesOverGradients | Group::Replicas | Group::Ring => true,
            Group::World | Group::Batch | Group::Tensor | Group::KeyReplicas | Group::Heads => false,
            Group::StatesOverParameters | Group::States | Group::TiedEnds | Group::Stages | Group::ModelParts => false,
        }
    }

    /// The name, as errors and tables show it.
    pub const fn name(self) -> &'static str {
        match self {
            Group::World => "world",
            Group::Batch => "batch",
            Group::Tensor => "tensor",
            Group::KeyReplicas => "key_replicas",
            Group::Heads => "heads",
            Group::Ring => "ring",
            Group::Parameters => "parameters",
            Group::Gradients => "gradients",
            Group::StatesOverGradients => "states_over_gradients",
            Group::StatesOverParameters => "states_over_parameters",
            Group::States => "states",
            Group::Replicas => "replicas",
            Group::TiedEnds => "tied_ends",
            Group::ModelParts => "model_parts",
            Group::Stages => "stages",
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Over how many ranks each kind of model state is cut; replicated beyond. Each divides the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZeroScopes {
    /// Weights (ZeRO-3).
    pub parameters: usize,
    /// Gradients (ZeRO-2).
    pub gradients: usize,
    /// Optimizer states (ZeRO-1).
    pub states: usize,
}

impl ZeroScopes {
    /// Over how many ranks a kind of model state is cut.
    pub fn degree(self, level: Level) -> usize {
        match level {
            Level::Parameters => self.parameters,
            Level::Gradients => self.gradients,
            Level::States => self.states,
        }
    }
}

/// A kind of model state, and with it the scope it is cut over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// Weights.
    Parameters,
    /// Gradients.
    Gradients,
    /// Optimizer states.
    States,
}

/// The mesh, and how its axes are cut into the parts that groups are made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// The ranks and their axes.
    pub mesh: DeviceMesh,
    /// Degree of the inner part of cp, over which heads are exchanged; the rest of cp is the ring.
    pub head_degree: usize,
    /// Neighbouring ranks of tp that hold the same key and value heads.
    pub key_replicas: usize,
    /// The ZeRO scopes.
    pub scopes: ZeroScopes,
    /// The parts of axes that each of [`Group::ALL`] spans, outer to inner.
    spans: Vec<Vec<SubAxis>>,
    gradients_over_parameters: Vec<SubAxis>,
}

impl Topology {
    /// Fails where a part does not divide its axis.
    pub fn new(
        mesh: DeviceMesh,
        head_degree: usize,
        key_replicas: usize,
        scopes: ZeroScopes,
    ) -> Result<Topology, MeshError> {
        let spans = Group::ALL.iter().map(|&group| span(&mesh, head_degree, key_replicas, scopes, group));
        let spans = spans.collect::<Result<_, _>>()?;
        let ZeroScopes { parameters, gradients, .. } = scopes;
        let gradients_over_parameters = mesh.part_of(&WEIGHT_AXES, parameters, gradients / parameters.max(1))?;
        Ok(Topology { mesh, head_degree, key_replicas, scopes, spans, gradients_over_parameters })
    }

    /// Every rank by itself, for a world of one.
    pub fn single() -> Topology {
        let mesh = DeviceMesh::new(&[]).expect("degrees of 1");
        let scopes = ZeroScopes { parameters: 1, gradients: 1, states: 1 };
        Topology::new(mesh, 1, 1, scopes).expect("1 divides 1")
    }

    /// The parts of axes that a group spans, outer to inner.
    pub fn span(&self, group: Group) -> &[SubAxis] {
        &self.spans[group as usize]
    }

    /// Number of ranks in a group; for [`Group::TiedEnds`] of a rank at an end.
    pub fn size(&self, group: Group) -> usize {
        self.span(group).iter().map(|s| s.degree).product()
    }

    /// The ranks of `rank`'s group, in group order.
    pub fn members(&self, group: Group, rank: usize) -> Vec<usize> {
        match group {
            Group::TiedEnds if !self.is_end(rank) => vec![rank],
            _ => self.mesh.group_of(rank, self.span(group)),
        }
    }

    /// The place of `rank` in its group.
    pub fn index(&self, group: Group, rank: usize) -> usize {
        match group {
            Group::TiedEnds if !self.is_end(rank) => 0,
            _ => self.mesh.index_in_group(rank, self.span(group)),
        }
    }

    /// The pipeline stage of `rank`.
    pub fn stage(&self, rank: usize) -> usize {
        self.mesh.coordinate(rank, Axis::Pp)
    }

    /// Number of pipeline stages.
    pub fn num_stages(&self) -> usize {
        self.mesh.degree(Axis::Pp)
    }

    fn is_end(&self, rank: usize) -> bool {
        self.stage(rank) == 0 || self.stage(rank) + 1 == self.num_stages()
    }

    /// The cuts of a tensor's dim 0 down to `level`, outer cut first, in blocks of `block` rows. What a rank holds at one
    /// level lies inside what it holds at the level before. `first` says which coordinate of each cut comes first.
    pub fn zero_splits(&self, level: Level, block: usize, first: [usize; 3]) -> Vec<Split> {
        let gradients = &self.gradients_over_parameters;
        let cuts = [self.span(Group::Parameters), gradients, self.span(Group::StatesOverGradients)];
        let wanted = level as usize + 1;
        let split = |(over, first): (&[SubAxis], usize)| Split { dim: 0, over: over.to_vec(), block, first };
        cuts.into_iter().zip(first).take(wanted).filter(|(over, _)| !over.is_empty()).map(split).collect()
    }
}

fn span(
    mesh: &DeviceMesh,
    heads: usize,
    key_replicas: usize,
    scopes: ZeroScopes,
    group: Group,
) -> Result<Vec<SubAxis>, MeshError> {
    let whole = |axes: &[Axis]| -> Vec<SubAxis> {
        axes.iter().map(|&axis| mesh.whole(axis)).filter(|s| s.degree > 1).collect()
    };
    let weights = |inner: usize, outer: usize| {
        let degree = outer.checked_div(inner).unwrap_or(1);
        mesh.part_of(&WEIGHT_AXES, inner, degree)
    };
    let ZeroScopes { parameters, gradients, states } = scopes;
    Ok(match group {
        Group::World => whole(&Axis::ALL),
        Group::Batch => whole(&[Axis::DpReplicate, Axis::DpShard]),
        Group::Tensor => whole(&[Axis::Tp]),
        Group::KeyReplicas => mesh.part_of(&[Axis::Tp], 1, key_replicas)?,
        Group::Heads => mesh.part_of(&[Axis::Cp], 1, heads)?,
        Group::Ring => weights_of_ring(mesh, heads)?,
        Group::Parameters => weights(1, parameters)?,
        Group::Gradients => weights(1, gradients)?,
        Group::StatesOverGradients => weights(gradients, states)?,
        Group::StatesOverParameters => weights(parameters, states)?,
        Group::States => weights(1, states)?,
        Group::Replicas => {
            let all = mesh.degree(Axis::DpShard) * mesh.degree(Axis::Cp);
            [whole(&[Axis::DpReplicate]), weights(states, all)?].concat()
        }
        Group::TiedEnds => {
            let stages = mesh.degree(Axis::Pp);
            let ends = SubAxis { axis: Axis::Pp, stride: stages.saturating_sub(1).max(1), degree: 2 };
            if stages > 1 { vec![ends] } else { Vec::new() }
        }
        Group::ModelParts => whole(&[Axis::Pp, Axis::Tp]),
        Group::Stages => whole(&[Axis::Pp]),
    })
}

fn weights_of_ring(mesh: &DeviceMesh, heads: usize) -> Result<Vec<SubAxis>, MeshError> {
    mesh.inner(Axis::Cp, heads)?;
    mesh.part_of(&[Axis::Cp], heads, mesh.degree(Axis::Cp) / heads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IndexBox, Placement};
    use proptest::prelude::*;

    fn topology(degrees: [usize; 5], heads: usize, scopes: [usize; 3]) -> Result<Topology, MeshError> {
        let named: Vec<_> = Axis::ALL.into_iter().zip(degrees).collect();
        let [parameters, gradients, states] = scopes;
        Topology::new(DeviceMesh::new(&named)?, heads, 1, ZeroScopes { parameters, gradients, states })
    }

    #[test]
    fn scopes_fill_neighbouring_ranks_first() {
        let t = topology([1, 1, 4, 2, 1], 2, [2, 4, 8]).unwrap();
        assert_eq!(t.members(Group::Parameters, 5), [4, 5]);
        assert_eq!(t.members(Group::Gradients, 5), [4, 5, 6, 7]);
        assert_eq!(t.members(Group::StatesOverGradients, 5), [1, 5]);
        assert_eq!(t.members(Group::StatesOverParameters, 5), [1, 3, 5, 7]);
        assert_eq!(t.members(Group::Replicas, 5), [5]);
        assert_eq!(t.members(Group::Heads, 5), [4, 5]);
        assert_eq!(t.members(Group::Ring, 5), [5]);
    }

    #[test]
    fn the_ends_of_a_pipeline_find_each_other() {
        let t = topology([4, 1, 1, 1, 2], 1, [1, 1, 1]).unwrap();
        assert_eq!(t.members(Group::TiedEnds, 1), [1, 7]);
        assert_eq!(t.members(Group::TiedEnds, 7), [1, 7]);
        assert_eq!(t.members(Group::TiedEnds, 3), [3]);
        assert_eq!(t.members(Group::ModelParts, 3).len(), 8);
    }

    #[test]
    fn parts_that_do_not_divide_are_refused() {
        assert!(topology([1, 1, 4, 1, 1], 1, [1, 1, 3]).is_err());
        assert!(topology([1, 1, 1, 4, 1], 3, [1, 1, 1]).is_err());
        assert!(topology([1, 1, 2, 1, 1], 1, [1, 1, 4]).is_err());
    }

    proptest! {
        #[test]
        fn every_level_lies_inside_the_one_before_and_covers(
            dp in 0u32..3, cp in 0u32..3, cuts in proptest::array::uniform3(0u32..5),
            rows in 1usize..40, block in 1usize..4, first in proptest::array::uniform3(0usize..4),
        ) {
            let most = dp + cp;
            let mut cuts = cuts.map(|c| c.min(most));
            cuts.sort_unstable();
            let t = topology([1, 1, 1 << dp, 1 << cp, 1], 1, cuts.map(|c| 1 << c)).unwrap();
            let boxes = |level| {
                let splits = t.zero_splits(level, block, first);
                Placement { splits, ..Placement::default() }.boxes(&[rows], &t.mesh)
            };
            let levels = [Level::Parameters, Level::Gradients, Level::States].map(boxes);
            for (level, held) in levels.iter().enumerate() {
                let mut distinct: Vec<&IndexBox> = held.iter().filter(|b| !b.is_empty()).collect();
                distinct.sort();
                distinct.dedup();
                prop_assert_eq!(distinct.iter().map(|b| b.volume()).sum::<usize>(), rows);
                if level > 0 {
                    for (inner, outer) in held.iter().zip(&levels[level - 1]) {
                        prop_assert!(inner.is_empty() || inner.intersect(outer).as_ref() == Some(inner));
                    }
                }
            }
        }
    }
}
