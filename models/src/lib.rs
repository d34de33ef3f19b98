//! The decoder: one definition over packed tokens that serves training, scoring and generation.
//!
//! A model is a list of *units*: the embedding, each block, the head. A unit's parameters lie in one flat buffer in
//! execution order ([`UnitWeights`]), so that a unit can be gathered, freed, reduced and updated as a whole, and so
//! that projections which read the same input are one product ([`weights::Weight`] views of adjacent rows).
//!
//! Invariants: forward is a pure function of (weights, tokens, [`PackContext`]); nothing here knows of ranks, steps or
//! optimizers. Activations are `[T, ...]` over the packed tokens of a micro-batch; there is no batch dim and no padding.
//! Deliberately absent: losses beyond the head's hidden states, sampling policy, and where weights come from.

pub mod block;
pub mod context;
pub mod decode;
pub mod model;
pub mod weights;

pub use block::Flow;
pub use context::{PackContext, RopeTable};
pub use decode::{DecodeState, Past};
pub use model::{Head, Model};
pub use weights::{UnitWeights, Weight};
