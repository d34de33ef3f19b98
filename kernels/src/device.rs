//! The device of a rank: choosing it, the thread that owns it, its memory and its speed.
//!
//! Invariants: libtorch_cuda is opened only where a CUDA driver is present, before anything asks libtorch about CUDA;
//! one OS thread owns a rank's tensors ([`DeviceThread`]).

mod buffers;
mod choose;
mod measure;
mod thread;

pub use buffers::lasting_zeros;
pub use choose::{DeviceChoice, choose, driver_present, open_cuda, set_threads, use_deterministic_operations};
pub(crate) use measure::Counting;
pub use measure::{
    GpuMemoryUse, MemoryUse, available_memory, count_allocations, gpu_memory, keep_freed_memory,
    measured_matmul_peak_flops, memory,
};
pub use thread::{DeviceThread, Pending};

/// What can go wrong with a rank's device.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeviceError {
    /// A job panicked; this is its message, with libtorch's own text where libtorch failed.
    #[error("device thread {thread}: panicked at {location}: {message}")]
    Panicked {
        /// Name of the thread.
        thread: String,
        /// `file:line` of the panic.
        location: String,
        /// What it said.
        message: String,
    },
    /// The thread was closed before the job began, or could not be started.
    #[error("device thread {thread}: {detail}")]
    Closed {
        /// Name of the thread.
        thread: String,
        /// Why.
        detail: String,
    },
    /// The device asked for cannot be had.
    #[error("{0}")]
    Unavailable(String),
}
