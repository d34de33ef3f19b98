//! From one layout of a tensor to another by the fewest bytes.
//!
//! `plan` intersects what ranks hold with what ranks need. A need met by what the rank already holds is a local copy;
//! the rest comes from the holder that has sent least so far. This is the one mechanism behind loading a checkpoint at
//! another layout, moving weights from the trainer's layout to the generator's, and export.
//!
//! Invariant: bytes received by a rank = |its target box| - |its target box ∩ its source box|.

use crate::layout::IndexBox;
use std::collections::BTreeMap;
use thiserror::Error;

/// One box of a tensor that travels from `src` to `dst` (local where they are equal).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoxCopy {
    /// The rank (or file) that holds it.
    pub src: usize,
    /// The rank that needs it.
    pub dst: usize,
    /// The indices, in the coordinates of the full tensor.
    pub indices: IndexBox,
}

/// The copies that turn one layout into another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReshardPlan {
    /// Ordered by destination, then by position in the tensor.
    pub copies: Vec<BoxCopy>,
}

/// Why no plan exists.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReshardError {
    /// Nobody holds part of what a rank needs.
    #[error("{missing} of the {needed} elements that rank {dst} needs ({indices:?}) are held by no source")]
    Uncovered {
        /// The rank.
        dst: usize,
        /// What it needs.
        indices: IndexBox,
        /// Elements it needs.
        needed: usize,
        /// Elements nobody has.
        missing: usize,
    },
    /// Source boxes overlap without being equal, so "who has it" has no one answer.
    #[error("source boxes {a:?} and {b:?} overlap without being replicas")]
    Overlap {
        /// One box.
        a: IndexBox,
        /// The other.
        b: IndexBox,
    },
}

/// Whether sources and destinations are the same processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranks {
    /// Source `r` is destination `r`: what it already holds is not sent.
    Same,
    /// Sources are others (files of a checkpoint, ranks of another pool).
    Separate,
}

impl ReshardPlan {
    /// The copies from `from` (one box per source) to `to` (one box per destination).
    pub fn plan(from: &[IndexBox], to: &[IndexBox], ranks: Ranks) -> Result<ReshardPlan, ReshardError> {
        ReshardPlan::plan_onto(from, to, ranks, &mut vec![0; from.len()])
    }

    /// As [`ReshardPlan::plan`] for one tensor after others: `sent` holds the elements that each source sends so far, so
    /// that replicas share the sending over all of them.
    pub fn plan_onto(
        from: &[IndexBox],
        to: &[IndexBox],
        ranks: Ranks,
        sent: &mut [usize],
    ) -> Result<ReshardPlan, ReshardError> {
        let holders = holders(from)?;
        let mut copies = Vec::new();
        for (dst, need) in to.iter().enumerate().filter(|(_, need)| !need.is_empty()) {
            let mut covered = 0;
            for (held, who) in &holders {
                let Some(indices) = held.intersect(need) else { continue };
                covered += indices.volume();
                let local = ranks == Ranks::Same && who.contains(&dst);
                let src = if local { dst } else { least_loaded(who, sent) };
                if !local {
                    sent[src] += indices.volume();
                }
                copies.push(BoxCopy { src, dst, indices });
            }
            if covered != need.volume() {
                let (needed, missing) = (need.volume(), need.volume() - covered);
                return Err(ReshardError::Uncovered { dst, indices: need.clone(), needed, missing });
            }
        }
        Ok(ReshardPlan { copies })
    }

    /// The copies that `dst` receives, its own included.
    pub fn received_by(&self, dst: usize) -> impl Iterator<Item = &BoxCopy> {
        self.copies.iter().filter(move |copy| copy.dst == dst)
    }

    /// Elements that cross from one rank to another, summed.
    pub fn elements_moved(&self) -> usize {
        self.copies.iter().filter(|copy| copy.src != copy.dst).map(|copy| copy.indices.volume()).sum()
    }
}

fn least_loaded(who: &[usize], sent: &[usize]) -> usize {
    *who.iter().min_by_key(|&&rank| (sent[rank], rank)).expect("a distinct box has a holder")
}

/// The distinct boxes and who holds each.
fn holders(from: &[IndexBox]) -> Result<BTreeMap<&IndexBox, Vec<usize>>, ReshardError> {
    let mut holders: BTreeMap<&IndexBox, Vec<usize>> = BTreeMap::new();
    for (rank, held) in from.iter().enumerate().filter(|(_, held)| !held.is_empty()) {
        holders.entry(held).or_default().push(rank);
    }
    let distinct: Vec<&&IndexBox> = holders.keys().collect();
    for (i, a) in distinct.iter().enumerate() {
        if let Some(b) = distinct[i + 1..].iter().find(|b| a.intersect(b).is_some()) {
            return Err(ReshardError::Overlap { a: (**a).clone(), b: (***b).clone() });
        }
    }
    Ok(holders)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // boxes of one dim
mod tests {
    use super::*;
    use crate::{Axis, DeviceMesh, Placement};
    use proptest::prelude::*;

    fn run(plan: &ReshardPlan, shape: &[usize], to: &[IndexBox]) -> Vec<Vec<usize>> {
        // Each element's value is its flat index; the result is what each destination ends up with, row-major.
        let flat = |index: &[usize]| index.iter().zip(shape).fold(0, |f, (&i, &n)| f * n + i);
        let each = |b: &IndexBox, f: &mut dyn FnMut(&[usize])| {
            let mut index: Vec<usize> = b.ranges.iter().map(|r| r.start).collect();
            if b.is_empty() {
                return;
            }
            loop {
                f(&index);
                let Some(d) = (0..index.len()).rev().find(|&d| index[d] + 1 < b.ranges[d].end) else { return };
                index[d] += 1;
                for (later, r) in b.ranges.iter().enumerate().skip(d + 1) {
                    index[later] = r.start;
                }
            }
        };
        to.iter()
            .enumerate()
            .map(|(dst, need)| {
                let mut got = BTreeMap::new();
                for copy in plan.received_by(dst) {
                    each(&copy.indices, &mut |i| assert!(got.insert(i.to_vec(), flat(i)).is_none(), "written twice"));
                }
                let mut out = Vec::new();
                each(need, &mut |i| out.push(got[i]));
                out
            })
            .collect()
    }

    proptest! {
        #[test]
        fn every_pair_of_layouts_arrives_whole_with_the_least_bytes(
            rows in 1usize..20, columns in 1usize..6, a in 1usize..4, b in 1usize..4, block in 1usize..5,
        ) {
            let mesh = DeviceMesh::new(&[(Axis::DpShard, a), (Axis::Tp, b)]).unwrap();
            let over = |axes: &[Axis]| axes.iter().map(|&x| mesh.whole(x)).collect::<Vec<_>>();
            let layouts = [
                Placement::replicated(),
                Placement::sharded(over(&[Axis::DpShard]), block),
                Placement::sharded(over(&[Axis::Tp, Axis::DpShard]), 1),
                Placement { splits: vec![crate::Split { dim: 1, over: over(&[Axis::Tp]), block: 1, first: 0 }], ..Placement::default() },
            ];
            let shape = [rows, columns];
            for from in &layouts {
                for to in &layouts {
                    let (from, to) = (from.boxes(&shape, &mesh), to.boxes(&shape, &mesh));
                    let plan = ReshardPlan::plan(&from, &to, Ranks::Same).unwrap();
                    for (dst, got) in run(&plan, &shape, &to).into_iter().enumerate() {
                        prop_assert_eq!(got.len(), to[dst].volume());
                        let received: usize =
                            plan.received_by(dst).filter(|c| c.src != dst).map(|c| c.indices.volume()).sum();
                        let kept = from[dst].intersect(&to[dst]).map_or(0, |b| b.volume());
                        prop_assert_eq!(received, to[dst].volume() - kept);
                    }
                }
            }
        }
    }

    #[test]
    fn replicas_share_the_sending() {
        let whole = IndexBox::full(&[8]);
        let to: Vec<IndexBox> = (0..4).map(|i| IndexBox::new([2 * i..2 * i + 2])).collect();
        let plan = ReshardPlan::plan(&[whole.clone(), whole], &to, Ranks::Separate).unwrap();
        let sent = |src| plan.copies.iter().filter(|c| c.src == src).map(|c| c.indices.volume()).sum::<usize>();
        assert_eq!((sent(0), sent(1)), (4, 4));
    }

    #[test]
    fn gaps_and_overlaps_are_named() {
        let full = [IndexBox::full(&[4])];
        let gap = ReshardPlan::plan(&[IndexBox::new([0..3])], &full, Ranks::Separate).unwrap_err();
        assert_eq!(
            gap,
            ReshardError::Uncovered { dst: 0, indices: full[0].clone(), needed: 4, missing: 1 },
            "one element short"
        );
        let overlap = [IndexBox::new([0..3]), IndexBox::new([2..4])];
        let error = ReshardPlan::plan(&overlap, &full, Ranks::Separate).unwrap_err();
        assert!(matches!(error, ReshardError::Overlap { .. }));
    }
}
