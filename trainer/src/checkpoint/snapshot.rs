//! A copy of a rank's part of the training state, in host memory and owned, so that training can go on.

use super::manifest::{RankEntry, to_ranges};
use super::{StateKind, TrainState};
use tangelo_core::{IndexBox, ParamMeta};

/// One rank's part of a checkpoint: the boxes that it writes, one after another in one arena.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) state: TrainState,
    pub(super) entries: Vec<RankEntry>,
    arena: Vec<f32>,
    used: usize,
}

impl Snapshot {
    /// An empty snapshot that fills `arena`, best the one of an earlier save: its pages are mapped already.
    pub(super) fn new(state: TrainState, arena: Vec<f32>) -> Snapshot {
        Snapshot { state, entries: Vec::new(), arena, used: 0 }
    }

    /// Adds the box `indices` of a tensor; `fill` writes its elements, row-major, all of them. An empty one is skipped.
    pub fn push<E>(
        &mut self,
        kind: StateKind,
        meta: &ParamMeta,
        indices: &IndexBox,
        fill: impl FnOnce(&mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        assert_eq!(meta.shape.len(), indices.ranges.len(), "the box of {} has another number of dims", meta.name);
        if indices.is_empty() {
            return Ok(());
        }
        let (start, end) = (self.used, self.used + indices.volume());
        if self.arena.len() < end {
            // Fresh zeroed memory costs no writing of zeros; the parts before move once per doubling.
            let mut larger = vec![0f32; end.max(2 * start)];
            larger[..start].copy_from_slice(&self.arena[..start]);
            self.arena = larger;
        }
        fill(&mut self.arena[start..end])?;
        self.used = end;
        let (name, shape) = (meta.name.clone(), meta.shape.clone());
        self.entries.push(RankEntry { kind, name, shape, ranges: to_ranges(indices) });
        Ok(())
    }

    /// Bytes of tensors in it.
    pub fn size_bytes(&self) -> usize {
        self.used * size_of::<f32>()
    }

    pub(super) fn data(&self) -> &[f32] {
        &self.arena[..self.used]
    }

    pub(super) fn into_arena(self) -> Vec<f32> {
        self.arena
    }
}

/// Which rank writes what, where several hold the same box.
///
/// `held[tensor][rank]` is the box of that state tensor that the rank holds; the answer lists, per rank, the tensors
/// whose box it writes. Each distinct box is written by exactly one of its holders. Boxes with one holder come first,
/// then the largest goes to its least loaded holder, so that ranks write about the same number of bytes. A pure
/// function of its arguments: every rank computes the same answer.
pub fn plan_writes(world_size: usize, held: &[Vec<IndexBox>]) -> Vec<Vec<usize>> {
    let mut boxes: Vec<(usize, usize, Vec<usize>)> = Vec::new();
    for (tensor, ranks) in held.iter().enumerate() {
        assert_eq!(ranks.len(), world_size, "one box per rank");
        let mut distinct: std::collections::BTreeMap<&IndexBox, Vec<usize>> = std::collections::BTreeMap::new();
        for (rank, indices) in ranks.iter().enumerate().filter(|(_, b)| !b.is_empty()) {
            distinct.entry(indices).or_default().push(rank);
        }
        boxes.extend(distinct.into_iter().map(|(indices, who)| (tensor, indices.volume(), who)));
    }
    boxes.sort_by_key(|(tensor, volume, who)| (who.len() > 1, std::cmp::Reverse(*volume), *tensor));
    let mut load = vec![0usize; world_size];
    let mut writes = vec![Vec::new(); world_size];
    for (tensor, volume, who) in boxes {
        let rank = who.into_iter().min_by_key(|&rank| (load[rank], rank)).expect("a box has a holder");
        load[rank] += volume;
        writes[rank].push(tensor);
    }
    for tensors in &mut writes {
        tensors.sort_unstable();
    }
    writes
}
