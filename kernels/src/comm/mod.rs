//! Collective communication between the ranks of a job.
//!
//! A [`Communicator`] belongs to one rank and one group of ranks; it lives on that rank's device thread, or in a
//! [`Background`] on a thread of its own, while other groups of the rank are used by other threads. Three back ends move the bytes, one code path above them does the arithmetic:
//!
//! ```text
//!   Background, channel   calls of one communicator on a thread of its own, beside the rank's work
//!   Communicator          checks, sequence numbers, deadlines, statistics, positions, sums in rank order
//!     Backend             "these tensors to those peers, those tensors from these peers, by then"
//!       local             ranks are threads of one process; shared memory; for tests and layout checks
//!       gloo              ranks are processes; libtorch's Gloo over TCP; tensors on the CPU
//!       nccl              ranks are processes; one GPU each
//! ```
//!
//! Invariants:
//! 1. Every reduction is a sum (or maximum, minimum) of whole parts in ascending rank order, in fp32 for 16-bit
//!    inputs, rounded once. Its bits depend on the values and the number of ranks only: not on the back end, not on
//!    how tensors were bucketed, not on who owns which part.
//! 2. Every call has a deadline. A call that failed leaves its communicator failed: later calls return at once.
//! 3. Every message says which call it belongs to; ranks that call different things get [`CommErrorKind::Mismatch`],
//!    not each other's bytes.
//! 4. World size 1 runs the same code with nobody to talk to.
//!
//! Absent on purpose: a choice of what overlaps (the block executor makes it), averaging (callers scale), and reductions in the network, whose order of summation cannot be fixed.

mod backend;
mod background;
pub mod channel;
pub mod check;
mod communicator;
mod error;
pub mod gloo;
pub mod local;
pub mod nccl;
mod position;
mod reduce;
mod store;

pub use backend::AbortHandle;
pub use background::{Background, Pending};
pub use communicator::{CallRecord, CommOptions, CommStats, Communicator};
pub use error::{CommError, CommErrorKind, Operation};
pub use reduce::ReduceOp;
pub use store::{Store, StoreError, StoreOptions};

use std::panic::Location;
use std::path::Path;
use tangelo_core::env;
use tch::Device;

/// Meets the other ranks with the back end that fits the device: Gloo on CPUs, NCCL on GPUs. Records positions in the
/// file that the environment names.
#[track_caller]
pub fn connect(options: &gloo::GlooOptions, device: Device) -> Result<Communicator, CommError> {
    let comm = connect_on(options, device)?;
    if let Some(path) = std::env::var_os(env::POSITION_FILE)
        && let Err(error) = comm.record_positions(Path::new(&path))
    {
        eprintln!("a report about hanging ranks will miss rank {}: {}: {error}", options.rank, path.display());
    }
    Ok(comm)
}

#[track_caller]
fn connect_on(options: &gloo::GlooOptions, device: Device) -> Result<Communicator, CommError> {
    let Device::Cuda(device_index) = device else { return gloo::connect(options) };
    if options.size == 1 {
        return Ok(Communicator::single_on(device));
    }
    let store = gloo::open_store(options, Location::caller())?;
    let options = nccl::NcclOptions {
        rank: options.rank,
        size: options.size,
        device_index,
        prefix: options.prefix.clone(),
        init_timeout: options.init_timeout,
        timeout: options.timeout,
    };
    nccl::connect(&store, &options)
}
