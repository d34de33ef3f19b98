//! Pure types shared by every room: the mesh of ranks, who holds which box of a tensor, how to get from one
//! holding to another, the batch that flows through a step, and the loss that reads it.
//!
//! Invariants: no IO, no clock, no threads, no tensors. Everything here is a function of its arguments.
//! Deliberately absent: device types, communicators, and anything that knows how a file is laid out.

pub mod balance;
pub mod batch;
pub mod dtype;
pub mod env;
pub mod failure;
pub mod hash;
pub mod layout;
pub mod loss;
pub mod mesh;
pub mod phase;
pub mod pipeline;
pub mod position;
pub mod program;
pub mod reshard;
pub mod schedule;
pub mod sequence;
pub mod topology;

pub use balance::{Assignment, BalanceError, Counts, balance};
pub use batch::{Batch, BatchError, Column};
pub use dtype::DType;
pub use failure::FailureKind;
pub use layout::{IndexBox, ParamMeta, Placement, Split};
pub use loss::{Aggregation, KlEstimator, LossComponent, LossSpec};
pub use mesh::{Axis, DeviceMesh, MeshError, SubAxis};
pub use phase::{Moment, Phase};
pub use pipeline::{Action, Pass, PipelineSchedule};
pub use program::{Call, CallKind, Exchange, Instruction, Part, Parts, Program, Unit};
pub use reshard::{BoxCopy, ReshardError, ReshardPlan};
pub use schedule::{DecayShape, LrSchedule};
pub use sequence::SequenceLayout;
pub use topology::{Group, Level, Topology, ZeroScopes};
