//! One-way channels between pairs of ranks: what a pipeline sends to its next stage and gets from the one before.
//!
//! Every channel has a communicator of its own at either end, on a thread of its own: so a rank may be sending to one
//! neighbour, receiving from another and computing, all at once, and no schedule of sends can lock up against one of
//! receives. Tensors arrive in the order they were sent.

use super::background::{Background, Pending};
use super::communicator::Communicator;
use super::error::CommError;
use std::panic::Location;
use tch::Tensor;

/// This rank's end of a channel.
pub enum ChannelEnd {
    /// This rank sends.
    Sender(Sender),
    /// This rank receives.
    Receiver(Receiver),
}

/// Opens a channel for each `(sender, receiver)`, ranks within `world`; `None` for those that this rank has no end of.
/// Every rank of `world` must call it with the same list, which may name a rank, and a pair, more than once. One
/// exchange for all of them.
#[track_caller]
pub fn open(world: &Communicator, pairs: &[(usize, usize)]) -> Result<Vec<Option<ChannelEnd>>, CommError> {
    let groups = world.pairs(pairs, Location::caller())?;
    let end = |group: Communicator| match group.rank() {
        0 => ChannelEnd::Sender(Sender { background: Background::new(group) }),
        _ => ChannelEnd::Receiver(Receiver { background: Background::new(group) }),
    };
    Ok(groups.into_iter().map(|group| group.map(end)).collect())
}

/// The end that sends.
pub struct Sender {
    background: Background,
}

impl Sender {
    /// Sends the tensor after all those before it. The tensor must not be written before the answer.
    #[track_caller]
    pub fn start_send(&self, tensor: Tensor) -> Pending {
        self.background.start_send(tensor, 1)
    }

    /// Global rank of the receiver.
    pub fn peer(&self) -> usize {
        self.background.ranks()[1]
    }
}

/// The end that receives.
pub struct Receiver {
    background: Background,
}

impl Receiver {
    /// Receives the next tensor, of the same size and type, after those that were started.
    #[track_caller]
    pub fn recv(&self, tensor: &Tensor) -> Result<(), CommError> {
        self.start_recv(tensor.shallow_clone()).wait().map(|_| ())
    }

    /// Starts to receive the next tensor.
    #[track_caller]
    pub fn start_recv(&self, tensor: Tensor) -> Pending {
        self.background.start_recv(tensor, 0)
    }

    /// Global rank of the sender.
    pub fn peer(&self) -> usize {
        self.background.ranks()[0]
    }
}
