//! New groups out of some of a group's ranks.

use super::run::Run;
use super::{Caller, CommError, Communicator, Operation, signature};
use crate::comm::backend::{Failure, SubGroup};
use std::panic::Location;
use std::sync::{Arc, TryLockError};
use tangelo_core::hash;
use tch::{Device, Kind, Tensor};

impl Communicator {
    /// New groups: ranks that give the same colour form one, ordered by key, then by rank; `None` joins no group.
    /// Every rank of this group must call it.
    #[track_caller]
    pub fn split(&self, name: &str, color: Option<u32>, key: i64) -> Result<Option<Communicator>, CommError> {
        Ok(self.split_many(&[(name, color, key)])?.pop().flatten())
    }

    /// Several splits, `(name, colour, key)` each, that the ranks agree on in one exchange. Every rank of this group
    /// must call it with the same names.
    #[track_caller]
    pub fn split_many(&self, splits: &[(&str, Option<u32>, i64)]) -> Result<Vec<Option<Communicator>>, CommError> {
        let names = splits.iter().fold(splits.len() as u64, |seed, (name, ..)| hash::hash_bytes(seed, name.as_bytes()));
        self.call(Operation::Split, Kind::Int64, names, |run| {
            let mine: Vec<i64> =
                splits.iter().flat_map(|(_, color, key)| [color.map_or(-1, i64::from), *key]).collect();
            let (first_id, all) = run.agree_on_groups(splits.len(), &mine)?;
            let open = |(index, (name, color, _)): (usize, &(&str, Option<u32>, i64))| {
                let Some(color) = color else { return Ok(None) };
                let is_member = |rank: &usize| all[*rank][2 * index] == i64::from(*color);
                let mut members: Vec<usize> = (0..run.size()).filter(is_member).collect();
                members.sort_by_key(|&rank| (all[rank][2 * index + 1], rank));
                let group = SubGroup { id: first_id + index as u32, name: format!("{}/{name}", self.name), members };
                run.open_group(group).map(Some)
            };
            splits.iter().enumerate().map(open).collect()
        })
    }

    /// A new group of the given ranks (within this group), in the given order; `None` on all others. Every rank of
    /// this group must call it with the same list.
    #[track_caller]
    pub fn group(&self, name: &str, ranks: &[usize]) -> Result<Option<Communicator>, CommError> {
        let place = ranks.iter().position(|&rank| rank == self.rank);
        self.split(name, place.map(|_| 0), place.unwrap_or(0) as i64)
    }

    /// A group for each pair of ranks that this rank is in; `None` for the others. Every rank must call it with the
    /// same list; the members are known from it, so the ranks agree on ids alone.
    pub(crate) fn pairs(
        &self,
        pairs: &[(usize, usize)],
        site: &'static Location<'static>,
    ) -> Result<Vec<Option<Communicator>>, CommError> {
        let numbers: Vec<usize> = pairs.iter().flat_map(|&(first, second)| [first, second]).collect();
        let caller = Caller { site, phase: self.shared.phase() };
        self.on_behalf_of(caller, || {
            self.call(Operation::Split, Kind::Int64, signature(&numbers), |run| {
                for &(first, second) in pairs {
                    run.expect_rank(first)?;
                    run.expect_rank(second)?;
                    if first == second {
                        return Err(Failure::invalid(format!("a pair of rank {first} and itself")));
                    }
                }
                let (first_id, _) = run.agree_on_groups(pairs.len(), &[])?;
                let open = |(index, &(first, second)): (usize, &(usize, usize))| {
                    if ![first, second].contains(&run.rank()) {
                        return Ok(None);
                    }
                    let name = format!("{}/{}->{}", self.name, self.ranks[first], self.ranks[second]);
                    let group = SubGroup { id: first_id + index as u32, name, members: vec![first, second] };
                    run.open_group(group).map(Some)
                };
                pairs.iter().enumerate().map(open).collect()
            })
        })
    }
}

impl Run<'_> {
    /// The first of `count` ids that no group of any rank has, and what all ranks say, as many numbers each.
    fn agree_on_groups(&self, count: usize, mine: &[i64]) -> Result<(u32, Vec<Vec<i64>>), Failure> {
        // Two agreements of one rank at the same time might settle on the same ids.
        let mut next_group = match self.comm.shared.next_group.try_lock() {
            Ok(next_group) => next_group,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::invalid("another thread of this rank makes groups at the same time"));
            }
        };
        let device = self.comm.options.device;
        let mine: Vec<i64> = [*next_group].iter().chain(mine).copied().collect();
        let input = Tensor::f_from_slice(&mine)?.f_to_device(device)?;
        let output = Tensor::f_zeros([(self.size() * mine.len()) as i64], (Kind::Int64, device))?;
        self.all_gather(&output, &input, &vec![mine.len(); self.size()])?;
        let all: Vec<i64> = Vec::try_from(output.f_to_device(Device::Cpu)?)?;
        let rows: Vec<&[i64]> = all.chunks_exact(mine.len()).collect();
        let first_id = rows.iter().map(|row| row[0]).max().unwrap_or(1);
        let end = first_id + count as i64;
        u32::try_from(end).map_err(|_| Failure::backend("more groups than ids"))?;
        *next_group = end;
        Ok((first_id as u32, rows.into_iter().map(|row| row[1..].to_vec()).collect()))
    }

    fn open_group(&self, group: SubGroup) -> Result<Communicator, Failure> {
        let rank = group.members.iter().position(|&rank| rank == self.rank());
        let rank = rank.ok_or_else(|| Failure::backend("a rank is not in its own group"))?;
        let backend = match &self.comm.backend {
            Some(backend) if group.members.len() > 1 => Some(backend.borrow_mut().split(&self.call, &group)?),
            _ => None,
        };
        let ranks: Vec<usize> = group.members.iter().map(|&member| self.comm.ranks[member]).collect();
        let (options, shared) = (self.comm.options.clone(), Arc::clone(&self.comm.shared));
        let communicator = Communicator::assemble(backend, group.id, &group.name, rank, ranks, options, shared);
        communicator.tracker.opened(self.call.site);
        Ok(communicator)
    }
}
