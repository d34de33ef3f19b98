//! Which part of the model each generation rank holds.

use tangelo_configs::{JobPlan, MixerSpec, ModelSpec, Role, Sharding};
use tangelo_core::{Axis, DeviceMesh, Group, Topology, ZeroScopes};
use thiserror::Error;

/// Why ranks cannot generate together as asked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GenerationLayoutError {
    /// Groups of `tp` ranks do not fill the pool.
    #[error("{key} = {tp} does not divide the {ranks} ranks that generate; choose a divisor of {ranks}")]
    Ranks {
        /// The configuration key.
        key: &'static str,
        /// The degree asked for.
        tp: usize,
        /// Ranks of the pool.
        ranks: usize,
    },
    /// The model's width does not fall into as many parts.
    #[error("{key} = {tp} does not divide the model's {count} {what}; choose a divisor of {count}")]
    Width {
        /// The configuration key.
        key: &'static str,
        /// The degree asked for.
        tp: usize,
        /// How many there are.
        count: usize,
        /// Of what.
        what: &'static str,
    },
}

/// The key that says how many ranks share a model in generation.
const KEY: &str = "rollout.tensor_parallel_degree";

/// How the ranks of a pool share a model in generation: `num_ranks / tp` replicas of `tp` parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerationLayout {
    tp: usize,
    /// The part of each rank.
    parts: Vec<usize>,
    /// The ranks of each replica, by part.
    replicas: Vec<Vec<usize>>,
}

impl GenerationLayout {
    /// That of a job: on the ranks that train where these generate too, else on the rollout's own.
    ///
    /// # Errors
    /// A degree that does not fit the pool or the policy's model.
    pub fn of_job(job: &JobPlan) -> Result<GenerationLayout, GenerationLayoutError> {
        let tp = job.rollout().tensor_parallel_degree;
        let layout = match job.shares_pool(Role::Policy, Role::Rollout) {
            true => GenerationLayout::colocated(&job.policy.topology, tp),
            false => GenerationLayout::separate(job.ranks(Role::Rollout).len(), tp),
        }?;
        layout.check(&job.policy.model)?;
        Ok(layout)
    }

    /// On the ranks that train: those whose training shards lie in the same part of the width get that part, and ranks close
    /// to one another make a replica.
    pub fn colocated(training: &Topology, tp: usize) -> Result<GenerationLayout, GenerationLayoutError> {
        let ranks = training.mesh.world_size();
        let mut order: Vec<usize> = (0..ranks).collect();
        order.sort_by_key(|&rank| (training.index(Group::Tensor, rank), rank));
        GenerationLayout::new(order, tp)
    }

    /// On ranks of their own.
    pub fn separate(num_ranks: usize, tp: usize) -> Result<GenerationLayout, GenerationLayoutError> {
        // Neighbours make a replica: every `num_ranks / tp`-th rank of this order has the same part.
        let of_part = |part: usize| (0..num_ranks.max(1) / tp.max(1)).map(move |replica| replica * tp + part);
        GenerationLayout::new((0..tp).flat_map(of_part).collect(), tp).and_then(|layout| {
            let complete = layout.num_ranks() == num_ranks;
            complete.then_some(layout).ok_or(GenerationLayoutError::Ranks { key: KEY, tp, ranks: num_ranks })
        })
    }

    /// Ranks in the order of their parts.
    fn new(order: Vec<usize>, tp: usize) -> Result<GenerationLayout, GenerationLayoutError> {
        let ranks = order.len();
        if tp == 0 || ranks == 0 || !ranks.is_multiple_of(tp) {
            return Err(GenerationLayoutError::Ranks { key: KEY, tp, ranks });
        }
        let each = ranks / tp;
        let mut parts = vec![0; ranks];
        let mut members: Vec<Vec<usize>> = order.chunks(each).map(<[usize]>::to_vec).collect();
        for (part, members) in members.iter_mut().enumerate() {
            members.sort_unstable();
            members.iter().for_each(|&rank| parts[rank] = part);
        }
        let replicas = (0..each).map(|replica| members.iter().map(|ranks| ranks[replica]).collect()).collect();
        Ok(GenerationLayout { tp, parts, replicas })
    }

    /// Fails where the model's width does not fall into `tp` equal parts.
    pub fn check(&self, spec: &ModelSpec) -> Result<(), GenerationLayoutError> {
        let tp = self.tp;
        for block in &spec.blocks {
            let MixerSpec::Attention(a) = &block.mixer;
            let widths = [(a.num_heads, "attention heads"), (block.feed_forward.intermediate_size, "hidden features")];
            if let Some(&(count, what)) = widths.iter().find(|(count, _)| !count.is_multiple_of(tp)) {
                return Err(GenerationLayoutError::Width { key: KEY, tp, count, what });
            }
            let keys = a.num_kv_heads;
            if !keys.is_multiple_of(tp) && !tp.is_multiple_of(keys) {
                return Err(GenerationLayoutError::Width { key: KEY, tp, count: keys, what: "key and value heads" });
            }
        }
        Ok(())
    }

    /// Ranks that share a model.
    pub fn tp(&self) -> usize {
        self.tp
    }

    /// Ranks that generate.
    pub fn num_ranks(&self) -> usize {
        self.parts.len()
    }

    /// The part of the model that `rank` holds.
    pub fn part(&self, rank: usize) -> usize {
        self.parts[rank]
    }

    /// The ranks of each replica of the model, by part.
    pub fn replicas(&self) -> &[Vec<usize>] {
        &self.replicas
    }

    /// The replica that `rank` belongs to.
    pub fn replica(&self, rank: usize) -> usize {
        self.replicas.iter().position(|ranks| ranks.contains(&rank)).expect("every rank is in a replica")
    }

    /// How a replica's model lies over its parts: rank `i` of it is part `i`.
    pub fn sharding(&self, spec: &ModelSpec) -> Sharding {
        let keys = spec.blocks.first().map_or(1, |block| {
            let MixerSpec::Attention(a) = &block.mixer;
            a.num_kv_heads
        });
        let mesh = DeviceMesh::new(&[(Axis::Tp, self.tp)]).expect("a degree of at least 1");
        let scopes = ZeroScopes { parameters: 1, gradients: 1, states: 1 };
        let key_replicas = (self.tp / keys.max(1)).max(1);
        let topology = Topology::new(mesh, 1, key_replicas, scopes).expect("checked: key heads divide the ranks");
        Sharding::new(spec, topology, std::iter::once(0..spec.blocks.len()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(degrees: [usize; 5]) -> Topology {
        let named: Vec<_> = Axis::ALL.into_iter().zip(degrees).collect();
        let scopes = ZeroScopes { parameters: 1, gradients: 1, states: 1 };
        Topology::new(DeviceMesh::new(&named).unwrap(), 1, 1, scopes).unwrap()
    }

    #[test]
    fn groups_are_those_of_the_paper() {
        // 1-4-2 to 1-2-2-2 on 8 ranks: {G1, G3}, {G2, G4}, {G5, G7}, {G6, G8} generate together.
        let layout = GenerationLayout::colocated(&topology([1, 1, 2, 1, 4]), 2).unwrap();
        assert_eq!(layout.replicas(), [[0, 2], [1, 3], [4, 6], [5, 7]]);
        assert_eq!((layout.part(3), layout.replica(3)), (1, 1));
    }

    #[test]
    fn a_finer_cut_than_the_trainers_and_ranks_of_their_own() {
        let finer = GenerationLayout::colocated(&topology([1, 1, 4, 1, 1]), 4).unwrap();
        assert_eq!(finer.replicas(), [[0, 1, 2, 3]]);
        let separate = GenerationLayout::separate(6, 2).unwrap();
        assert_eq!(separate.replicas(), [[0, 1], [2, 3], [4, 5]]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = GenerationLayout::separate(6, 4).unwrap_err().to_string();
        assert_eq!(
            error,
            "rollout.tensor_parallel_degree = 4 does not divide the 6 ranks that generate; choose a divisor of 6"
        );
        assert!(GenerationLayout::colocated(&topology([1, 1, 3, 1, 1]), 2).is_err());
    }
}
