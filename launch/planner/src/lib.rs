//! What a plan costs, before it runs: parameters, FLOPs, memory, the way of a batch through a step; the step of every
//! rank as a program, and the proof that these understand each other.
//!
//! Pure functions of a [`Plan`](tangelo_configs::Plan): no device is asked, nothing is measured. `tangelo check` prints
//! [`render_check`] and [`prove::render`]; a worker prints [`Memory::render`] where memory runs out.
//!
//! Deliberately absent: time. A search over layouts and a cost model of collectives come with the layouts to choose
//! from.

pub mod check;
pub mod flops;
pub mod layers;
pub mod memory;
pub mod program;
pub mod prove;
pub mod publish;
pub mod rlhf;
pub mod table;
pub mod traffic;
pub mod walk;

pub use check::{render_check, render_schedule};
pub use flops::{FlopsPerToken, ForwardFlops, per_token};
pub use memory::{Memory, predict};
pub use prove::{Mismatch, Proof, prove};
