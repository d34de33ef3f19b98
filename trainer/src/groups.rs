//! The communicators of a rank: one for each [`Group`] of the job, and the channels to its neighbours in the pipeline.
//!
//! Weights on their way to a block, gradients on their way from one, keys on their way round the ring and the messages of
//! a pipeline travel beside the computation: those groups, and the channels, have threads of their own. All others are
//! used where the rank stands still. Reports about failures say where in its step a rank is: that is noted here, too.

use crate::error::Result;
use crate::faults::Fault;
use std::cell::Cell;
use std::collections::HashMap;
use std::time::Duration;
use tangelo_core::{Group, Moment, Phase, Topology};
use tangelo_kernels::comm::channel::{self, ChannelEnd, Receiver, Sender};
use tangelo_kernels::comm::{Background, Communicator, Pending};
use tch::Tensor;

/// A rank's end of every group.
pub struct Groups {
    world: Communicator,
    others: HashMap<Group, Communicator>,
    beside: HashMap<Group, Background>,
    neighbours: Neighbours,
    step: Cell<u64>,
    /// Tests only.
    fault: Option<Fault>,
}

/// A tensor that is being filled by other ranks.
pub struct Arriving {
    /// Its values once `pending` is done.
    pub tensor: Tensor,
    /// The call.
    pub pending: Pending,
}

impl Arriving {
    /// The tensor, filled.
    pub fn wait(self) -> Result<Tensor> {
        self.pending.wait()?;
        Ok(self.tensor)
    }
}

/// Channels to the stages before and after.
#[derive(Default)]
pub struct Neighbours {
    /// Values from the stage before.
    pub values_in: Option<Receiver>,
    /// Values to the stage after.
    pub values_out: Option<Sender>,
    /// Gradients from the stage after.
    pub gradients_in: Option<Receiver>,
    /// Gradients to the stage before.
    pub gradients_out: Option<Sender>,
}

impl Groups {
    /// Opens all groups; every rank of `world` must call it with the same topology.
    pub fn open(world: Communicator, topology: &Topology) -> Result<Groups> {
        let rank = world.rank();
        let wanted: Vec<Group> =
            Group::ALL.into_iter().filter(|&group| group != Group::World && topology.size(group) > 1).collect();
        let spec = |&group: &Group| {
            // Groups are disjoint and cover the world, so the least rank of each names it.
            let color = topology.members(group, rank).into_iter().min().map(|least| least as u32);
            (group.name(), color, topology.index(group, rank) as i64)
        };
        let opened = world.split_many(&wanted.iter().map(spec).collect::<Vec<_>>())?;
        let (mut others, mut beside) = (HashMap::new(), HashMap::new());
        for (group, comm) in wanted.into_iter().zip(opened) {
            match comm {
                Some(comm) if group.is_beside() => _ = beside.insert(group, beside_computation(comm)),
                Some(comm) => _ = others.insert(group, comm),
                None => {}
            }
        }
        let neighbours = Neighbours::open(&world, topology)?;
        Ok(Groups { world, others, beside, neighbours, step: Cell::new(0), fault: None })
    }

    /// Tests only: something will go wrong on this rank.
    pub fn plant(&mut self, fault: Option<Fault>) {
        self.fault = fault;
    }

    /// The rank begins a step.
    pub fn begin_step(&self, step: u64) -> Result<()> {
        self.step.set(step);
        self.pass(None)
    }

    /// The rank enters a phase of its step: reports about failures say so. Belongs before every instruction.
    pub fn enter(&self, phase: Phase) -> Result<()> {
        self.pass(Some(phase))
    }

    fn pass(&self, phase: Option<Phase>) -> Result<()> {
        let moment = Moment { step: self.step.get(), phase };
        self.world.enter(moment);
        self.fault.as_ref().map_or(Ok(()), |fault| fault.strike(moment))
    }

    /// All ranks.
    pub fn world(&self) -> &Communicator {
        &self.world
    }

    /// Time that this rank stood still for calls of any group so far.
    pub fn waited(&self) -> Duration {
        Duration::from_secs_f64(self.world.stats().exposed_seconds)
    }

    /// A group of more than one rank; `None` where this rank is alone in it.
    pub fn get(&self, group: Group) -> Option<&Communicator> {
        match group {
            Group::World => Some(&self.world).filter(|world| world.size() > 1),
            _ => self.others.get(&group).filter(|comm| comm.size() > 1),
        }
    }

    /// A group of more than one rank whose calls run beside the computation.
    pub fn beside(&self, group: Group) -> Option<&Background> {
        self.beside.get(&group).filter(|comm| comm.size() > 1)
    }

    /// The channels of this rank's stage.
    pub fn neighbours(&self) -> &Neighbours {
        &self.neighbours
    }
}

/// On a GPU the collectives of several communicators must start in the same order on all ranks, which threads of their own
/// do not keep: there they start where they are submitted. (Channels of a pipeline have threads there, too: a send that
/// waits would lock 1F1B up. They were never tried beside tensor parallelism on GPUs.)
fn beside_computation(comm: Communicator) -> Background {
    if comm.device().is_cuda() { Background::inline(comm) } else { Background::new(comm) }
}

impl Neighbours {
    fn open(world: &Communicator, topology: &Topology) -> Result<Neighbours> {
        let stages = topology.num_stages();
        if stages == 1 {
            return Ok(Neighbours::default());
        }
        let per_stage = topology.mesh.world_size() / stages;
        // The stage varies slowest: the next stage's rank of the same place lies `per_stage` further.
        let forward: Vec<(usize, usize)> = (0..per_stage * (stages - 1)).map(|rank| (rank, rank + per_stage)).collect();
        let backward = forward.iter().map(|&(before, after)| (after, before));
        let pairs: Vec<(usize, usize)> = forward.iter().copied().chain(backward).collect();
        let mut found = Neighbours::default();
        for (index, end) in channel::open(world, &pairs)?.into_iter().enumerate() {
            match (end, index < forward.len()) {
                (Some(ChannelEnd::Sender(end)), true) => found.values_out = Some(end),
                (Some(ChannelEnd::Receiver(end)), true) => found.values_in = Some(end),
                (Some(ChannelEnd::Sender(end)), false) => found.gradients_out = Some(end),
                (Some(ChannelEnd::Receiver(end)), false) => found.gradients_in = Some(end),
                (None, _) => {}
            }
        }
        Ok(found)
    }
}
