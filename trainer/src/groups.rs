//! The communicators of a rank: one for each [`Group`] of the job.

use crate::error::Result;
use std::collections::HashMap;
use std::time::Duration;
use tangelo_core::{Group, Topology};
use tangelo_kernels::comm::Communicator;

/// A rank's end of every group.
#[derive(Debug)]
pub struct Groups {
    world: Communicator,
    others: HashMap<Group, Communicator>,
}

impl Groups {
    /// Opens all groups; every rank of `world` must call it with the same topology.
    pub fn open(world: Communicator, topology: &Topology) -> Result<Groups> {
        let rank = world.rank();
        let mut others = HashMap::new();
        for group in Group::ALL.into_iter().filter(|&group| group != Group::World && topology.size(group) > 1) {
            let members = topology.members(group, rank);
            // Groups are disjoint and cover the world, so the least rank of each names it.
            let color = members.iter().min().copied().unwrap_or(rank) as u32;
            if let Some(comm) = world.split(group.name(), Some(color), topology.index(group, rank) as i64)? {
                others.insert(group, comm);
            }
        }
        Ok(Groups { world, others })
    }

    /// All ranks.
    pub fn world(&self) -> &Communicator {
        &self.world
    }

    /// Time that this rank stood still in calls of any group so far.
    pub fn waited(&self) -> Duration {
        Duration::from_secs_f64(self.world.stats().seconds)
    }

    /// A group of more than one rank; `None` where this rank is alone in it.
    pub fn get(&self, group: Group) -> Option<&Communicator> {
        match group {
            Group::World => Some(&self.world).filter(|world| world.size() > 1),
            _ => self.others.get(&group).filter(|comm| comm.size() > 1),
        }
    }
}
