//! What can go wrong on a rank, by what the caller does about it.

use tangelo_observe::FailureKind;
use thiserror::Error;

/// An error of a rank.
#[derive(Debug, Error)]
pub enum TrainError {
    /// The job's file, or what it names.
    #[error("{0}")]
    Config(String),
    /// Data, checkpoint or model files.
    #[error("{0}")]
    Data(String),
    /// Memory, GPU, disk.
    #[error("{0}")]
    Device(String),
    /// A collective failed because another rank did.
    #[error("{0}")]
    Peer(String),
    /// Our own bug, with what libtorch or a panic said.
    #[error("{0}")]
    Internal(String),
}

impl TrainError {
    /// Who has to act.
    pub fn kind(&self) -> FailureKind {
        match self {
            TrainError::Config(_) => FailureKind::Config,
            TrainError::Data(_) => FailureKind::Data,
            TrainError::Device(_) => FailureKind::Device,
            TrainError::Peer(_) => FailureKind::Peer,
            TrainError::Internal(_) => FailureKind::Internal,
        }
    }

    /// Of this kind.
    pub fn of_kind(kind: FailureKind, message: String) -> TrainError {
        match kind {
            FailureKind::Config => TrainError::Config(message),
            FailureKind::Data => TrainError::Data(message),
            FailureKind::Device => TrainError::Device(message),
            FailureKind::Peer => TrainError::Peer(message),
            FailureKind::Internal => TrainError::Internal(message),
        }
    }

    /// What a panic on the device thread means: libtorch's out-of-memory is the machine's, the rest is ours.
    pub fn from_panic(message: String) -> TrainError {
        if is_out_of_memory(&message) { TrainError::Device(message) } else { TrainError::Internal(message) }
    }
}

/// Whether libtorch says that memory ran out.
pub fn is_out_of_memory(message: &str) -> bool {
    let lower = message.to_lowercase();
    lower.contains("out of memory") || lower.contains("can't allocate memory")
}

/// Results on a rank.
pub type Result<T> = std::result::Result<T, TrainError>;

impl From<tangelo_core::BatchError> for TrainError {
    fn from(e: tangelo_core::BatchError) -> TrainError {
        TrainError::Data(e.to_string())
    }
}

impl From<tangelo_kernels::device::DeviceError> for TrainError {
    fn from(e: tangelo_kernels::device::DeviceError) -> TrainError {
        use tangelo_kernels::device::DeviceError;
        match e {
            DeviceError::Panicked { .. } => TrainError::from_panic(e.to_string()),
            other => TrainError::Device(other.to_string()),
        }
    }
}

impl From<tangelo_core::MeshError> for TrainError {
    fn from(e: tangelo_core::MeshError) -> TrainError {
        TrainError::Config(e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_memory_is_the_machines() {
        let oom = "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to ...";
        assert_eq!(TrainError::from_panic(oom.into()).kind(), FailureKind::Device);
        assert_eq!(TrainError::from_panic("index out of bounds".into()).kind(), FailureKind::Internal);
    }
}
