//! What ranks would not understand, with names.

use std::fmt;
use tangelo_core::{Call, Group, Instruction};
use thiserror::Error;

/// A call that a rank makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// The rank.
    pub rank: usize,
    /// What it calls.
    pub call: Call,
    /// For which instruction.
    pub instruction: Instruction,
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} calls {} for {:?}", self.rank, self.call, self.instruction)
    }
}

/// A rank that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// The rank.
    pub rank: usize,
    /// In which instruction.
    pub instruction: Instruction,
    /// For what.
    pub what: String,
    /// For which rank.
    pub on: usize,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} waits in {:?} for rank {}: {}", self.rank, self.instruction, self.on, self.what)
    }
}

/// Why a plan's ranks would not understand each other.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Mismatch {
    /// Two members of a group make different calls.
    #[error("{part}: call {number} of {group} {}: {first}; {second}: {why}", Ranks(members))]
    Differ {
        /// Of the program.
        part: &'static str,
        /// Which kind of group.
        group: Group,
        /// Its ranks.
        members: Vec<usize>,
        /// Number of the call in this group, from 0.
        number: usize,
        /// One call.
        first: Box<Made>,
        /// The other.
        second: Box<Made>,
        /// What differs.
        why: String,
    },
    /// A member of a group makes fewer calls than another.
    #[error(
        "{part}: call {number} of {group} {}: {made}; rank {missing} makes only {number} calls there",
        Ranks(members)
    )]
    Missing {
        /// Of the program.
        part: &'static str,
        /// Which kind of group.
        group: Group,
        /// Its ranks.
        members: Vec<usize>,
        /// Number of the call in this group, from 0.
        number: usize,
        /// The call.
        made: Box<Made>,
        /// The rank without.
        missing: usize,
    },
    /// A send and a receive of different sizes.
    #[error("{part}: transfer {number} from rank {from} to rank {to}: {sent}; {received}: {why}")]
    Transfer {
        /// Of the program.
        part: &'static str,
        /// Sender.
        from: usize,
        /// Receiver.
        to: usize,
        /// Number of the transfer in this channel, from 0.
        number: usize,
        /// The send.
        sent: Box<Made>,
        /// The receive.
        received: Box<Made>,
        /// What differs.
        why: String,
    },
    /// A send without a receive, or the reverse.
    #[error("{part}: transfer {number} from rank {from} to rank {to}: {made}; rank {missing} does nothing for it")]
    Unpaired {
        /// Of the program.
        part: &'static str,
        /// Sender.
        from: usize,
        /// Receiver.
        to: usize,
        /// Number of the transfer in this channel, from 0.
        number: usize,
        /// The one that is there.
        made: Box<Made>,
        /// The rank without.
        missing: usize,
    },
    /// Ranks that wait for each other, or for one that has ended.
    #[error("{part}: nobody can go on:\n{}", lines(waits))]
    Deadlock {
        /// Of the program.
        part: &'static str,
        /// Each waits for the next one's rank; the last for one of them, or for a rank that has ended.
        waits: Vec<Wait>,
    },
}

fn lines(waits: &[Wait]) -> String {
    waits.iter().map(|wait| format!("  {wait}")).collect::<Vec<_>>().join("\n")
}

/// Ranks of a group; of many, the first.
struct Ranks<'a>(&'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            few if few.len() <= 8 => write!(f, "{few:?}"),
            many => write!(f, "[{}, {}, {}, .. {} ranks]", many[0], many[1], many[2], many.len()),
        }
    }
}
