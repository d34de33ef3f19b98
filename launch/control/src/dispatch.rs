//! Who gets what and who answers, as data: one mechanism for every transfer protocol.
//!
//! A [`MeshMap`] gives each rank of a role a [`Seat`]: the index of the part it gets, the number of parts, whether its
//! answer counts. Ranks with the same index get the same part, and answers come back in order of index, then rank. All
//! protocols of HybridFlow's table 3 (arXiv 2409.19256) are such maps; the tests below list them.
//!
//! Batches are split by token count with whole groups ([`mod@tangelo_core::balance`]), and what comes back is put into the
//! order of what was split ([`Split::restore`]). Pure.

use crate::error::ControlError;
use crate::remote::RemoteBatch;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tangelo_core::balance::{self, Counts};
use tangelo_core::{Axis, DeviceMesh, SubAxis};

/// A rank's place in a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// Index of the part that the rank gets.
    pub index: usize,
    /// Number of parts.
    pub size: usize,
    /// Whether its answer is collected.
    pub answers: bool,
}

/// Who gets what and who answers, over the ranks of a role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshMap {
    seats: BTreeMap<usize, Seat>,
    size: usize,
}

impl MeshMap {
    /// From what each rank says of itself.
    ///
    /// # Errors
    /// Ranks that disagree about the number of parts, a part that nobody gets or that nobody answers for.
    pub fn new(seats: BTreeMap<usize, Seat>) -> Result<MeshMap, ControlError> {
        let Some((&first, &Seat { size, .. })) = seats.first_key_value() else {
            return Err(ControlError::Placement("a mesh without ranks".into()));
        };
        for (rank, seat) in &seats {
            if seat.size != size || seat.index >= size {
                return Err(ControlError::Placement(format!(
                    "rank {rank} says it gets part {} of {}, rank {first} says there are {size} parts",
                    seat.index, seat.size
                )));
            }
        }
        for index in 0..size {
            let ranks: Vec<usize> = seats.iter().filter(|(_, s)| s.index == index).map(|(&rank, _)| rank).collect();
            if !ranks.iter().any(|rank| seats[rank].answers) {
                return Err(ControlError::Placement(format!(
                    "nobody answers for part {index} of {size}, which ranks {ranks:?} get"
                )));
            }
        }
        Ok(MeshMap { seats, size })
    }

    /// Every rank gets the same; all answer.
    pub fn everyone(ranks: &[usize]) -> Result<MeshMap, ControlError> {
        let seat = Seat { index: 0, size: 1, answers: true };
        MeshMap::new(ranks.iter().map(|&rank| (rank, seat)).collect())
    }

    /// Splits over parts of a mesh whose ranks are `ranks` in order; those answer that have the named coordinates.
    pub fn over(
        mesh: &DeviceMesh,
        ranks: &[usize],
        split: &[SubAxis],
        answering: &[(SubAxis, usize)],
    ) -> Result<MeshMap, ControlError> {
        if ranks.len() != mesh.world_size() {
            let (ranks, needed) = (ranks.len(), mesh.world_size());
            return Err(ControlError::Placement(format!("a mesh of {needed} ranks was laid over {ranks} ranks")));
        }
        let seats = ranks.iter().enumerate().map(|(place, &rank)| (rank, Seat::at(mesh, place, split, answering)));
        MeshMap::new(seats.collect())
    }

    /// Number of parts.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Every rank and its seat, by rank.
    pub fn seats(&self) -> impl Iterator<Item = (usize, Seat)> + '_ {
        self.seats.iter().map(|(&rank, &seat)| (rank, seat))
    }

    /// Puts answers of ranks in order of index, then rank.
    pub(crate) fn sort<T>(&self, answers: &mut [(usize, T)]) {
        answers.sort_by_key(|(rank, _)| (self.seats.get(rank).map(|seat| seat.index), *rank));
    }

    /// Whether the answer of a rank is collected.
    pub(crate) fn answers(&self, rank: usize) -> bool {
        self.seats.get(&rank).is_some_and(|seat| seat.answers)
    }
}

impl Seat {
    /// The seat of the rank at `place` of a mesh: the part it gets is its index over `split`, and it answers where its
    /// coordinates are the named ones.
    pub fn at(mesh: &DeviceMesh, place: usize, split: &[SubAxis], answering: &[(SubAxis, usize)]) -> Seat {
        Seat {
            index: mesh.index_in_group(place, split),
            size: split.iter().map(|part| part.degree).product(),
            answers: answering.iter().all(|&(part, coordinate)| mesh.sub_coordinate(place, part) == coordinate),
        }
    }

    /// The seat for training: split over the data axes; the first tensor and context rank of the last stage answers.
    pub fn training(mesh: &DeviceMesh, place: usize) -> Seat {
        let split = [mesh.whole(Axis::DpReplicate), mesh.whole(Axis::DpShard)];
        let last = mesh.degree(Axis::Pp) - 1;
        let answering = [(mesh.whole(Axis::Pp), last), (mesh.whole(Axis::Cp), 0), (mesh.whole(Axis::Tp), 0)];
        Seat::at(mesh, place, &split, &answering)
    }
}

/// What each rank gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Args<T> {
    /// All the same.
    Same(T),
    /// The i-th for the ranks whose index is i.
    PerIndex(Vec<T>),
}

/// A batch split for the parts of a mesh; remembers the order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    rows: Vec<Vec<usize>>,
    parts: Vec<RemoteBatch>,
}

impl Split {
    /// Deals the rows of a batch, so that parts have about the same number of tokens; rows of a group stay together. `whom`
    /// is for the error.
    ///
    /// # Errors
    /// Fewer groups than parts: some rank would have nothing to do, and its collectives would have no partner.
    pub fn new(batch: &RemoteBatch, num_parts: usize, whom: &str) -> Result<Split, ControlError> {
        let weights: Vec<u64> = batch.rows().iter().map(|row| u64::from(row.tokens)).collect();
        let groups: Vec<i64> = batch.rows().iter().map(|row| row.group).collect();
        let dealt = balance::balance(&weights, Some(&groups), num_parts, Counts::Any);
        let rows = dealt.map_err(|e| ControlError::Batch(e.to_string()))?.parts().to_vec();
        if let Some(empty) = rows.iter().position(Vec::is_empty) {
            return Err(ControlError::Batch(format!(
                "a batch of {} rows in {empty} groups cannot be split over the {num_parts} data-parallel parts of \
                 {whom}: groups are never split; make the batch larger or the data-parallel degree smaller",
                batch.num_rows()
            )));
        }
        let parts = rows.iter().map(|rows| batch.select(rows)).collect::<Result<_, _>>()?;
        Ok(Split { rows, parts })
    }

    /// The parts.
    pub fn parts(&self) -> &[RemoteBatch] {
        &self.parts
    }

    /// Puts what came back into the order of what was split. `answers` are, per part, the new rows and, for each of
    /// them, the row of the part that it came from; several rows of one origin stay in their order.
    ///
    /// # Errors
    /// An origin that the part does not have.
    pub fn restore(&self, answers: &[(RemoteBatch, Vec<u32>)]) -> Result<RemoteBatch, ControlError> {
        let mut origins = Vec::new();
        for ((_, came_from), rows) in answers.iter().zip(&self.rows) {
            for &row in came_from {
                let origin = rows.get(row as usize).ok_or_else(|| {
                    ControlError::Batch(format!("a rank answered for row {row}, but it was given {} rows", rows.len()))
                })?;
                origins.push(*origin);
            }
        }
        let whole = RemoteBatch::concat(&answers.iter().map(|(batch, _)| batch.clone()).collect::<Vec<_>>())?;
        let mut order: Vec<usize> = (0..whole.num_rows()).collect();
        order.sort_by_key(|&row| origins[row]);
        whole.select(&order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::tests::shard;
    use proptest::prelude::*;
    use tangelo_core::Column;

    /// Which part each rank gets, and which ranks answer, in the order of their answers.
    fn check(map: &MeshMap, indices: &[usize], answers: &[usize]) {
        assert_eq!(map.seats().map(|(_, seat)| seat.index).collect::<Vec<_>>(), indices);
        let mut who: Vec<(usize, ())> = map.seats().filter(|(_, s)| s.answers).map(|(rank, _)| (rank, ())).collect();
        who.reverse();
        map.sort(&mut who);
        assert_eq!(who.iter().map(|(rank, ())| *rank).collect::<Vec<_>>(), answers);
    }

    /// HybridFlow's table 3, on pp 2, dp 2, tp 2 where it is about training.
    #[test]
    fn every_protocol_of_the_paper_is_a_map() {
        let ranks: Vec<usize> = (0..8).collect();
        let mesh = DeviceMesh::new(&[(Axis::Pp, 2), (Axis::DpShard, 2), (Axis::Tp, 2)]).unwrap();
        let (pp, dp, tp) = (mesh.whole(Axis::Pp), mesh.whole(Axis::DpShard), mesh.whole(Axis::Tp));
        // ONE_TO_ALL: broadcast to all, gather from all.
        check(&MeshMap::everyone(&ranks).unwrap(), &[0; 8], &ranks);
        // 3D_PROTO: split over dp, broadcast within; from p = last, t = 0 of each group.
        let map = MeshMap::over(&mesh, &ranks, &[dp], &[(pp, 1), (tp, 0)]).unwrap();
        check(&map, &[0, 0, 1, 1, 0, 0, 1, 1], &[4, 6]);
        let seats = ranks.iter().map(|&rank| (rank, Seat::training(&mesh, rank))).collect();
        assert_eq!(MeshMap::new(seats).unwrap(), map);
        // 3D_PP_ONLY: broadcast; from t = 0, d = 0 of every stage.
        check(&MeshMap::over(&mesh, &ranks, &[], &[(dp, 0), (tp, 0)]).unwrap(), &[0; 8], &[0, 4]);
        // DP_PROTO: split over all ranks, all answer. ALL_TO_ALL is the same map with arguments per rank.
        let plain = DeviceMesh::new(&[(Axis::DpShard, 8)]).unwrap();
        check(&MeshMap::over(&plain, &ranks, &[plain.whole(Axis::DpShard)], &[]).unwrap(), &ranks, &ranks);
        // 3D_ALL_MICRO_DP: training 1-4-2, generation with 2 tensor ranks at stride 2: the micro-dp groups are
        // neighbours {0,1}, the generation tensor groups {0,2}, {1,3}, {4,6}, {5,7} share a part, whose first answers.
        let train = DeviceMesh::new(&[(Axis::DpShard, 2), (Axis::Tp, 4)]).unwrap();
        let (micro, tp_gen) = (train.inner(Axis::Tp, 2).unwrap(), train.outer(Axis::Tp, 2).unwrap());
        let map = MeshMap::over(&train, &ranks, &[train.whole(Axis::DpShard), micro], &[(tp_gen, 0)]);
        check(&map.unwrap(), &[0, 1, 0, 1, 2, 3, 2, 3], &[0, 1, 4, 5]);
    }

    #[test]
    fn seats_that_contradict_are_refused() {
        let check = |seats: &[(usize, usize, bool)], expected: expect_test::Expect| {
            let seats = seats.iter().enumerate();
            let map = seats.map(|(rank, &(index, size, answers))| (rank, Seat { index, size, answers })).collect();
            expected.assert_eq(&MeshMap::new(map).unwrap_err().to_string());
        };
        check(
            &[(0, 2, true), (1, 3, true)],
            expect_test::expect!["rank 1 says it gets part 1 of 3, rank 0 says there are 2 parts"],
        );
        check(
            &[(0, 2, true), (1, 2, false)],
            expect_test::expect!["nobody answers for part 1 of 2, which ranks [1] get"],
        );
    }

    #[test]
    fn fewer_groups_than_parts_are_refused() {
        let batch = shard(0, &[Column::Tokens], 0, 3);
        expect_test::expect![
            "a batch of 3 rows in 3 groups cannot be split over the 4 data-parallel parts of policy: groups are never split; make the batch larger or the data-parallel degree smaller"
        ]
        .assert_eq(&Split::new(&batch, 4, "policy").unwrap_err().to_string());
    }

    proptest! {
        /// n rows for each row (n completions of a prompt) come back in the order of what was split.
        #[test]
        fn order_is_restored(rows in 4usize..30, parts in 1usize..5, n in 1usize..4) {
            let batch = shard(0, &[Column::Tokens], 100, rows);
            let split = Split::new(&batch, parts, "rollout").unwrap();
            let answer = |part: &RemoteBatch| {
                let origins: Vec<u32> = (0..part.num_rows() as u32).flat_map(|row| vec![row; n]).collect();
                (part.select(&origins.iter().map(|&o| o as usize).collect::<Vec<_>>()).unwrap(), origins)
            };
            let answers: Vec<_> = split.parts().iter().map(answer).collect();
            let restored = split.restore(&answers).unwrap();
            let groups: Vec<i64> = restored.rows().iter().map(|row| row.group).collect();
            let expected: Vec<i64> = (0..rows as i64).flat_map(|row| vec![100 + row; n]).collect();
            prop_assert_eq!(groups, expected);
        }
    }
}
