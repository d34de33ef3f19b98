//! Named axes over ranks.
//!
//! Ranks are laid out row-major over the axes in the order of [`Axis::ALL`]: the last axis (`tp`) varies fastest, so
//! that its groups sit inside a node. An axis may be cut into ordered [`SubAxis`]es: a ZeRO scope is the inner part of
//! the data axes, 2D attention is a head part and a ring part of `cp`. World size 1 is not special: every axis has
//! degree 1 and every group has one member.

use serde::{Deserialize, Serialize};
use std::fmt;
use thiserror::Error;

/// A mesh axis. `dim` is kept for tensor dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Pipeline stages.
    Pp,
    /// Data parallel, weights replicated.
    DpReplicate,
    /// Data parallel, over which ZeRO scopes shard.
    DpShard,
    /// Context parallel: the sequence is split.
    Cp,
    /// Tensor parallel.
    Tp,
}

impl Axis {
    /// Every axis, slowest-varying first.
    pub const ALL: [Axis; 5] = [Axis::Pp, Axis::DpReplicate, Axis::DpShard, Axis::Cp, Axis::Tp];

    const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Axis::Pp => "pp",
            Axis::DpReplicate => "dp_replicate",
            Axis::DpShard => "dp_shard",
            Axis::Cp => "cp",
            Axis::Tp => "tp",
        })
    }
}

/// Part of an axis: the coordinate along it is `(coordinate along axis / stride) % degree`.
///
/// The whole axis has stride 1 and the axis's degree; its inner part of size `n` has stride 1 and degree `n`; its
/// outer part has stride `n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SubAxis {
    /// The axis this is a part of.
    pub axis: Axis,
    /// Steps along the axis between neighbours of this part.
    pub stride: usize,
    /// Number of coordinates.
    pub degree: usize,
}

/// What is wrong with a mesh that was asked for.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MeshError {
    /// An axis has no ranks.
    #[error("the degree of axis {axis} is 0; every degree is at least 1")]
    ZeroDegree {
        /// The axis.
        axis: Axis,
    },
    /// A part of an axis does not divide it.
    #[error("{axis} has degree {degree}, which {part} does not divide: {degree} / {part} leaves {}", degree % part)]
    Indivisible {
        /// The axis.
        axis: Axis,
        /// Its degree.
        degree: usize,
        /// The size of the part.
        part: usize,
    },
}

/// Ranks arranged over the five axes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMesh {
    degrees: [usize; Axis::ALL.len()],
}

impl DeviceMesh {
    /// A mesh with the given degrees; axes not named have degree 1.
    pub fn new(degrees: &[(Axis, usize)]) -> Result<DeviceMesh, MeshError> {
        let mut all = [1; Axis::ALL.len()];
        for &(axis, degree) in degrees {
            if degree == 0 {
                return Err(MeshError::ZeroDegree { axis });
            }
            all[axis.index()] = degree;
        }
        Ok(DeviceMesh { degrees: all })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        // Absurd degrees are refused by their number, not by an overflow.
        self.degrees.iter().fold(1, |product: usize, &degree| product.saturating_mul(degree))
    }

    /// Number of coordinates along `axis`.
    pub fn degree(&self, axis: Axis) -> usize {
        self.degrees[axis.index()]
    }

    /// The whole of `axis` as a [`SubAxis`].
    pub fn whole(&self, axis: Axis) -> SubAxis {
        SubAxis { axis, stride: 1, degree: self.degree(axis) }
    }

    /// The inner part of `axis` with `degree` coordinates (neighbouring ranks).
    pub fn inner(&self, axis: Axis, degree: usize) -> Result<SubAxis, MeshError> {
        self.part(axis, 1, degree)
    }

    /// What [`DeviceMesh::inner`] leaves of `axis`.
    pub fn outer(&self, axis: Axis, inner_degree: usize) -> Result<SubAxis, MeshError> {
        self.inner(axis, inner_degree)?;
        self.part(axis, inner_degree, self.degree(axis) / inner_degree)
    }

    /// Part of several axes taken as one, the last varying fastest: the coordinate along it is
    /// `(coordinate along all of them / stride) % degree`. Outer to inner; parts of degree 1 are left out.
    pub fn part_of(&self, axes: &[Axis], stride: usize, degree: usize) -> Result<Vec<SubAxis>, MeshError> {
        let mut parts = Vec::new();
        let mut below = 1;
        for &axis in axes.iter().rev() {
            let own = self.degree(axis);
            let (from, to) = (stride.max(below), (stride * degree).min(below * own));
            if from < to {
                let whole = from.is_multiple_of(below) && to.is_multiple_of(from) && (below * own).is_multiple_of(to);
                if !whole {
                    return Err(MeshError::Indivisible { axis, degree: own, part: to.div_ceil(below) });
                }
                parts.push(SubAxis { axis, stride: from / below, degree: to / from });
            }
            below *= own;
        }
        if !below.is_multiple_of(stride * degree) {
            return Err(MeshError::Indivisible { axis: axes[0], degree: self.degree(axes[0]), part: stride * degree });
        }
        parts.reverse();
        Ok(parts)
    }

    fn part(&self, axis: Axis, stride: usize, part: usize) -> Result<SubAxis, MeshError> {
        let degree = self.degree(axis);
        if part == 0 || !degree.is_multiple_of(stride * part) {
            return Err(MeshError::Indivisible { axis, degree, part });
        }
        Ok(SubAxis { axis, stride, degree: part })
    }

    /// The coordinate of `rank` along `axis`.
    pub fn coordinate(&self, rank: usize, axis: Axis) -> usize {
        debug_assert!(rank < self.world_size());
        let below: usize = self.degrees[axis.index() + 1..].iter().product();
        (rank / below) % self.degree(axis)
    }

    /// The coordinate of `rank` along part of an axis.
    pub fn sub_coordinate(&self, rank: usize, sub: SubAxis) -> usize {
        (self.coordinate(rank, sub.axis) / sub.stride) % sub.degree
    }

    /// The index of `rank` within its group over `subs`, the first being the slowest-varying.
    pub fn index_in_group(&self, rank: usize, subs: &[SubAxis]) -> usize {
        subs.iter().fold(0, |index, &s| index * s.degree + self.sub_coordinate(rank, s))
    }

    /// The ranks that differ from `rank` only along `subs`, in the order of their index in the group.
    pub fn group_of(&self, rank: usize, subs: &[SubAxis]) -> Vec<usize> {
        let step = |s: &SubAxis| s.stride * self.degrees[s.axis.index() + 1..].iter().product::<usize>();
        let first = rank - subs.iter().map(|s| self.sub_coordinate(rank, *s) * step(s)).sum::<usize>();
        subs.iter().fold(vec![first], |members, s| {
            members.iter().flat_map(|&member| (0..s.degree).map(move |i| member + i * step(s))).collect()
        })
    }

    /// Every group over `subs`: each rank is in exactly one.
    pub fn groups(&self, subs: &[SubAxis]) -> Vec<Vec<usize>> {
        let firsts = (0..self.world_size()).filter(|&rank| self.index_in_group(rank, subs) == 0);
        firsts.map(|rank| self.group_of(rank, subs)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tp_neighbours_are_adjacent_ranks() {
        let mesh = DeviceMesh::new(&[(Axis::Pp, 2), (Axis::DpShard, 2), (Axis::Tp, 2)]).unwrap();
        assert_eq!(mesh.groups(&[mesh.whole(Axis::Tp)]), [[0, 1], [2, 3], [4, 5], [6, 7]]);
        assert_eq!(mesh.groups(&[mesh.whole(Axis::DpShard)]), [[0, 2], [1, 3], [4, 6], [5, 7]]);
        assert_eq!(mesh.groups(&[mesh.whole(Axis::Pp)]), [[0, 4], [1, 5], [2, 6], [3, 7]]);
    }

    #[test]
    fn inner_scope_is_made_of_neighbours_and_outer_of_the_rest() {
        let mesh = DeviceMesh::new(&[(Axis::DpShard, 6)]).unwrap();
        let (inner, outer) = (mesh.inner(Axis::DpShard, 2).unwrap(), mesh.outer(Axis::DpShard, 2).unwrap());
        assert_eq!(mesh.groups(&[inner]), [[0, 1], [2, 3], [4, 5]]);
        assert_eq!(mesh.groups(&[outer]), [[0, 2, 4], [1, 3, 5]]);
        assert_eq!(mesh.groups(&[outer, inner]), [[0, 1, 2, 3, 4, 5]]);
    }

    #[test]
    fn errors_show_the_arithmetic() {
        let mesh = DeviceMesh::new(&[(Axis::DpShard, 3), (Axis::Tp, 2)]).unwrap();
        expect_test::expect!["dp_shard has degree 3, which 2 does not divide: 3 / 2 leaves 1"]
            .assert_eq(&mesh.inner(Axis::DpShard, 2).unwrap_err().to_string());
        assert!(DeviceMesh::new(&[(Axis::Cp, 0)]).is_err());
    }

    #[test]
    fn several_axes_taken_as_one_are_cut_where_their_degrees_allow() {
        let mesh = DeviceMesh::new(&[(Axis::DpShard, 4), (Axis::Cp, 2)]).unwrap();
        let part = |stride, degree| mesh.part_of(&[Axis::DpShard, Axis::Cp], stride, degree);
        assert_eq!(part(1, 1).unwrap(), []);
        assert_eq!(mesh.groups(&part(1, 2).unwrap()), [[0, 1], [2, 3], [4, 5], [6, 7]]);
        assert_eq!(mesh.groups(&part(1, 4).unwrap()), [[0, 1, 2, 3], [4, 5, 6, 7]]);
        assert_eq!(mesh.groups(&part(2, 4).unwrap()), [[0, 2, 4, 6], [1, 3, 5, 7]]);
        assert_eq!(mesh.groups(&part(4, 2).unwrap()), [[0, 4], [1, 5], [2, 6], [3, 7]]);
        for (stride, degree) in [(1, 3), (1, 16), (2, 8)] {
            assert!(part(stride, degree).is_err(), "{stride} {degree}");
        }
    }

    proptest! {
        #[test]
        fn groups_partition_the_ranks(degrees in proptest::array::uniform5(1usize..4), pick in 0usize..5) {
            let named: Vec<_> = Axis::ALL.into_iter().zip(degrees).collect();
            let mesh = DeviceMesh::new(&named).unwrap();
            let subs = [mesh.whole(Axis::ALL[pick]), mesh.whole(Axis::ALL[(pick + 2) % 5])];
            let mut seen: Vec<usize> = mesh.groups(&subs).concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..mesh.world_size()).collect::<Vec<_>>());
            for group in mesh.groups(&subs) {
                for (index, rank) in group.into_iter().enumerate() {
                    prop_assert_eq!(mesh.index_in_group(rank, &subs), index);
                }
            }
        }
    }
}
