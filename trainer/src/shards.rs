//! Which part of each parameter's optimizer state a rank owns, and in which order everything is reduced.
//!
//! Every parameter is cut along dim 0 into *chunks* of whole rows, a size that depends on its shape alone. A ZeRO scope
//! deals whole chunks to its ranks ([`Placement::sharded`] with that block), so a chunk is never split, and the square
//! sum of a gradient is the sum over chunks in global order whatever the scope. Gradients are elementwise sums in rank
//! order and the update is elementwise; hence every scope gives the same bits.

use std::ops::Range;
use tangelo_core::{Axis, DeviceMesh, IndexBox, MeshError, ParamMeta, Placement, SubAxis};
use tangelo_models::weights::ParamSpan;

/// Elements a chunk aims at: small enough that eight ranks share a small model evenly, large enough that the square
/// sums of an 8B model are 4 MB.
const CHUNK_ELEMENTS: usize = 16_384;

/// Rows per chunk of a parameter with rows of `row_len` elements.
pub fn chunk_rows(row_len: usize) -> usize {
    (CHUNK_ELEMENTS / row_len.max(1)).max(1)
}

/// A contiguous part of a unit's flat buffer that one rank owns, and whose parameter it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedRange {
    /// Index of the parameter within its unit.
    pub param: usize,
    /// The elements in the unit's flat buffer.
    pub flat: Range<usize>,
    /// Elements per chunk.
    pub chunk_len: usize,
}

impl OwnedRange {
    /// Number of chunks in the range; the last may be short.
    pub fn num_chunks(&self) -> usize {
        self.flat.len().div_ceil(self.chunk_len)
    }
}

/// How optimizer states lie over the ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct ZeroScope {
    mesh: DeviceMesh,
    /// The ranks over which states are cut: the inner part of `dp_shard`.
    scope: SubAxis,
}

impl ZeroScope {
    /// States cut over the inner `degree` ranks of `dp_shard`.
    pub fn new(mesh: &DeviceMesh, degree: usize) -> Result<ZeroScope, MeshError> {
        Ok(ZeroScope { mesh: mesh.clone(), scope: mesh.inner(Axis::DpShard, degree)? })
    }

    /// Ranks that share one copy of the states.
    pub fn degree(&self) -> usize {
        self.scope.degree
    }

    /// The index within the scope of `rank`.
    pub fn index(&self, rank: usize) -> usize {
        self.mesh.index_in_group(rank, &[self.scope])
    }

    /// The ranks that share one copy with `rank`.
    pub fn group(&self, rank: usize) -> Vec<usize> {
        self.mesh.group_of(rank, &[self.scope])
    }

    /// The placement of a parameter's states.
    pub fn placement(&self, meta: &ParamMeta) -> Placement {
        let row_len: usize = meta.shape[1..].iter().product();
        Placement::sharded(vec![self.scope], chunk_rows(row_len))
    }

    /// The box of a parameter's states that `rank` owns.
    pub fn box_of(&self, meta: &ParamMeta, rank: usize) -> IndexBox {
        self.placement(meta).box_of(&meta.shape, &self.mesh, rank)
    }

    /// What `rank` owns of a unit, in the order of the flat buffer; parameters of which it owns nothing are left out.
    pub fn owned(&self, spans: &[ParamSpan], rank: usize) -> Vec<OwnedRange> {
        let range = |(param, span): (usize, &ParamSpan)| {
            let rows = self.box_of(&span.meta, rank).ranges[0];
            let row_len = span.row_len();
            let flat = span.offset + rows.start * row_len..span.offset + rows.end * row_len;
            (!flat.is_empty()).then(|| OwnedRange { param, flat, chunk_len: chunk_rows(row_len) * row_len })
        };
        spans.iter().enumerate().filter_map(range).collect()
    }
}

/// Total length of ranges.
pub fn total_len(ranges: &[OwnedRange]) -> usize {
    ranges.iter().map(|r| r.flat.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangelo_core::DType;

    fn spans() -> Vec<ParamSpan> {
        let shapes = [vec![64usize], vec![700, 64], vec![3, 40_000], vec![5000], vec![1, 7]];
        let metas = shapes.into_iter().enumerate().map(|(i, shape)| ParamMeta {
            name: format!("p{i}"),
            shape,
            dtype: DType::F32,
        });
        ParamSpan::lay_out(metas.collect())
    }

    #[test]
    fn every_element_has_one_owner_and_chunks_are_never_split() {
        let spans = spans();
        let n: usize = spans.iter().map(|s| s.len).sum();
        for degree in 1..=5 {
            let mesh = DeviceMesh::new(&[(Axis::DpShard, degree)]).unwrap();
            let scope = ZeroScope::new(&mesh, degree).unwrap();
            let mut owner = vec![None; n];
            for rank in 0..degree {
                for range in scope.owned(&spans, rank) {
                    assert_eq!((range.flat.start - spans[range.param].offset) % range.chunk_len, 0);
                    for element in range.flat {
                        assert_eq!(owner[element].replace(rank), None, "element {element} has two owners");
                    }
                }
            }
            assert!(owner.iter().all(Option::is_some), "degree {degree}");
        }
    }

    #[test]
    fn a_partial_scope_repeats_along_the_rest_of_the_axis() {
        let mesh = DeviceMesh::new(&[(Axis::DpShard, 4)]).unwrap();
        let scope = ZeroScope::new(&mesh, 2).unwrap();
        assert_eq!(scope.owned(&spans(), 0), scope.owned(&spans(), 2));
        assert_eq!(scope.group(2), [2, 3]);
    }
}
