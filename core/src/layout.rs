//! Which box of a tensor each rank holds.
//!
//! A [`Placement`] is a list of [`Split`]s: a tensor dim is cut over sub-axes of the mesh, outer to inner, in units of
//! whole blocks, unevenly where blocks do not divide. Ranks that differ only along axes no split names hold replicas.
//! Everything else (ZeRO scopes, tensor parallelism, whole-tensor ownership) is a placement; [`Placement::boxes`]
//! resolves it to one [`IndexBox`] per rank, which is all that resharding looks at.
//!
//! Invariant: the distinct boxes of a placement are disjoint and cover the tensor.

use crate::DType;
use crate::mesh::{Axis, DeviceMesh, SubAxis};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A parameter as the whole system names it: Hugging Face's name, the full shape, the element type of storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamMeta {
    /// The name in a Hugging Face checkpoint, `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The full shape, whatever part of it a rank holds.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

impl ParamMeta {
    /// Number of elements of the full tensor.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A half-open box of indices: one range per tensor dim. A scalar has no dims and one element.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IndexBox {
    /// Start (inclusive) and end (exclusive) per dim.
    pub ranges: Vec<Range64>,
}

/// A half-open range of indices that can be ordered, hashed and written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Range64 {
    /// First index.
    pub start: usize,
    /// One past the last index.
    pub end: usize,
}

impl Range64 {
    /// Number of indices.
    pub fn len(self) -> usize {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no index in it.
    pub fn is_empty(self) -> bool {
        self.end <= self.start
    }
}

impl From<Range<usize>> for Range64 {
    fn from(r: Range<usize>) -> Range64 {
        Range64 { start: r.start, end: r.end }
    }
}

impl IndexBox {
    /// The whole of a tensor.
    pub fn full(shape: &[usize]) -> IndexBox {
        IndexBox { ranges: shape.iter().map(|&n| Range64 { start: 0, end: n }).collect() }
    }

    /// A box from ranges.
    pub fn new(ranges: impl IntoIterator<Item = Range<usize>>) -> IndexBox {
        IndexBox { ranges: ranges.into_iter().map(Range64::from).collect() }
    }

    /// Length per dim.
    pub fn shape(&self) -> Vec<usize> {
        self.ranges.iter().map(|r| r.len()).collect()
    }

    /// Number of elements.
    pub fn volume(&self) -> usize {
        self.ranges.iter().map(|r| r.len()).product()
    }

    /// Whether the box holds nothing.
    pub fn is_empty(&self) -> bool {
        self.ranges.iter().any(|r| r.is_empty())
    }

    /// What two boxes of one tensor share, `None` where that is nothing.
    pub fn intersect(&self, other: &IndexBox) -> Option<IndexBox> {
        assert_eq!(self.ranges.len(), other.ranges.len(), "boxes of tensors with different numbers of dims");
        let both = self.ranges.iter().zip(&other.ranges);
        let shared = IndexBox {
            ranges: both.map(|(a, b)| Range64 { start: a.start.max(b.start), end: a.end.min(b.end) }).collect(),
        };
        (!shared.is_empty()).then_some(shared)
    }

    /// This box in the coordinates of `frame`, a box that contains it.
    pub fn relative_to(&self, frame: &IndexBox) -> IndexBox {
        let both = self.ranges.iter().zip(&frame.ranges);
        IndexBox {
            ranges: both
                .map(|(r, f)| {
                    assert!(r.start >= f.start && r.end <= f.end, "{r:?} is not inside {f:?}");
                    Range64 { start: r.start - f.start, end: r.end - f.start }
                })
                .collect(),
        }
    }
}

/// One dim of a tensor cut over parts of mesh axes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// The tensor dim.
    pub dim: usize,
    /// The sub-axes it is cut over, outer to inner.
    pub over: Vec<SubAxis>,
    /// Cuts fall only at multiples of this many indices of `dim`, counted from where the part being cut starts.
    pub block: usize,
    /// The coordinate that gets the first part; the others follow in order, around the end. With a block as long as
    /// the dim, this is the owner of the whole tensor.
    pub first: usize,
}

/// How a tensor lies over a mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Applied in order: a later split of the same dim cuts what the earlier one left.
    pub splits: Vec<Split>,
    /// Sub-axes over which what ranks hold must still be summed.
    pub partial: Vec<SubAxis>,
    /// Where only some coordinates of an axis hold the tensor (pipeline stages): the axis and those coordinates.
    pub only_at: Option<(Axis, Vec<usize>)>,
}

impl Placement {
    /// The whole tensor on every rank.
    pub fn replicated() -> Placement {
        Placement::default()
    }

    /// Dim 0 cut over `over` in blocks of `block` rows.
    pub fn sharded(over: Vec<SubAxis>, block: usize) -> Placement {
        Placement { splits: vec![Split { dim: 0, over, block, first: 0 }], ..Placement::default() }
    }

    /// The box of a tensor of `shape` that `rank` holds; it may be empty.
    pub fn box_of(&self, shape: &[usize], mesh: &DeviceMesh, rank: usize) -> IndexBox {
        let mut held = IndexBox::full(shape);
        if self.only_at.as_ref().is_some_and(|(axis, at)| !at.contains(&mesh.coordinate(rank, *axis))) {
            return IndexBox { ranges: vec![Range64 { start: 0, end: 0 }; shape.len()] };
        }
        for split in &self.splits {
            let parts: usize = split.over.iter().map(|s| s.degree).product();
            let part = (mesh.index_in_group(rank, &split.over) + parts - split.first % parts) % parts;
            let range = &mut held.ranges[split.dim];
            let cut = part_range(range.len(), split.block, parts, part);
            *range = Range64 { start: range.start + cut.start, end: range.start + cut.end };
        }
        held
    }

    /// The box each rank holds.
    pub fn boxes(&self, shape: &[usize], mesh: &DeviceMesh) -> Vec<IndexBox> {
        (0..mesh.world_size()).map(|rank| self.box_of(shape, mesh, rank)).collect()
    }
}

/// Part `part` of `length` indices cut into `parts` runs of whole blocks, the earlier ones longer by at most a block.
pub fn part_range(length: usize, block: usize, parts: usize, part: usize) -> Range<usize> {
    assert!(block > 0 && part < parts);
    let blocks = length.div_ceil(block);
    let (each, extra) = (blocks / parts, blocks % parts);
    let first = part * each + part.min(extra);
    let count = each + usize::from(part < extra);
    (first * block).min(length)..((first + count) * block).min(length)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // boxes of one dim
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn zero_scope_cuts_rows_in_whole_blocks() {
        let mesh = DeviceMesh::new(&[(Axis::DpShard, 3)]).unwrap();
        let placement = Placement::sharded(vec![mesh.whole(Axis::DpShard)], 4);
        let boxes = placement.boxes(&[10, 2], &mesh);
        assert_eq!(boxes, [IndexBox::new([0..4, 0..2]), IndexBox::new([4..8, 0..2]), IndexBox::new([8..10, 0..2])]);
    }

    #[test]
    fn scalars_and_empty_parts() {
        let mesh = DeviceMesh::new(&[(Axis::DpShard, 4)]).unwrap();
        let placement = Placement::sharded(vec![mesh.whole(Axis::DpShard)], 8);
        let boxes = placement.boxes(&[10], &mesh);
        assert_eq!(boxes.iter().map(IndexBox::volume).collect::<Vec<_>>(), [8, 2, 0, 0]);
        assert_eq!(Placement::replicated().box_of(&[], &mesh, 2).volume(), 1);
    }

    #[test]
    fn whole_tensors_have_one_owner_and_stages_may_hold_nothing() {
        let mesh = DeviceMesh::new(&[(Axis::Pp, 2), (Axis::DpShard, 2)]).unwrap();
        let split = Split { dim: 0, over: vec![mesh.whole(Axis::DpShard)], block: 10, first: 1 };
        let placement = Placement { splits: vec![split], only_at: Some((Axis::Pp, vec![1])), ..Placement::default() };
        let volumes: Vec<usize> = placement.boxes(&[10, 2], &mesh).iter().map(IndexBox::volume).collect();
        assert_eq!(volumes, [0, 0, 0, 20]);
    }

    proptest! {
        #[test]
        fn distinct_boxes_are_disjoint_and_cover(
            shape in proptest::collection::vec(1usize..12, 1..4), dp in 1usize..5, tp in 1usize..4, block in 1usize..4,
            first in 0usize..5,
        ) {
            let mesh = DeviceMesh::new(&[(Axis::DpShard, dp), (Axis::Tp, tp)]).unwrap();
            let last = shape.len() - 1;
            let placement = Placement {
                splits: vec![
                    Split { dim: last, over: vec![mesh.whole(Axis::Tp)], block: 1, first: 0 },
                    Split { dim: 0, over: vec![mesh.whole(Axis::DpShard)], block, first },
                ],
                ..Placement::default()
            };
            let mut boxes: Vec<IndexBox> =
                placement.boxes(&shape, &mesh).into_iter().filter(|b| !b.is_empty()).collect();
            boxes.sort();
            boxes.dedup();
            let volume: usize = boxes.iter().map(IndexBox::volume).sum();
            prop_assert_eq!(volume, shape.iter().product::<usize>());
            for (i, a) in boxes.iter().enumerate() {
                for b in &boxes[i + 1..] {
                    prop_assert!(a.intersect(b).is_none());
                }
            }
        }
    }
}
